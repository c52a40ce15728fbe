"""What decides whether a GPU computes the right thing fast, as far as a CPU can show it.

    python -m pytest tests/test_cuda.py
"""
import functools
import json
import os
import sys
from datetime import timedelta

import pytest
import torch

import evaluate as ev
import repa
import sample
import train
import vae as V
from sit import SiT, SiTConfig
from test_train import CPU, NARROW, SMALL, config, losses, python, quick_teacher, run, torchrun

assert quick_teacher        # a fixture for every test here, too


@pytest.fixture
def quick_compiler(monkeypatch):
    """torch.compile with all but its code generator; nothing of it is left afterwards."""
    compile_module = torch.nn.Module.compile
    quick = functools.partialmethod(compile_module, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", quick)
    before = torch._dynamo.config.optimize_ddp, torch._functorch.config.donated_buffer
    torch._dynamo.reset()
    yield
    torch._dynamo.config.optimize_ddp, torch._functorch.config.donated_buffer = before
    torch._dynamo.reset()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_processes_run_the_graphs_of_one(tmp_path):
    """Under DDP with many buckets, compiled graphs stay whole: as many on two processes as on
    one."""
    script = tmp_path / "count.py"
    script.write_text(
        "import functools, sys, torch, train\n"
        "from pathlib import Path\n"
        "from sample import init_distributed\n"
        "ddp, module = train.DistributedDataParallel, torch.nn.Module\n"
        "ddp.__init__ = functools.partialmethod(ddp.__init__, bucket_cap_mb=0.02)\n"
        "module.compile = functools.partialmethod(module.compile, backend='aot_eager')\n"
        "cfg = train.parse(train.Config, sys.argv[1:], train.PRESETS)\n"
        "Path(cfg.out).mkdir(exist_ok=True)\n"
        "rank, world, device = init_distributed()\n"
        "train.run(cfg, rank, world, device)\n"
        "if rank == 0:\n"
        "    print('graphs', torch._dynamo.utils.counters['stats']['unique_graphs'])\n")
    counts, lines = [], []
    for n in (1, 2):
        out = tmp_path / str(n)
        words = [*SMALL, "--compile=1", "--steps=2", "--log_every=2", "--gan=0", f"--out={out}"]
        done = python(*torchrun(n), str(script), *words)
        assert done.returncode == 0, done.stderr
        counts.append(int(done.stdout.split("graphs ")[1].split()[0]))
        lines += losses(out)
    assert counts[0] == counts[1] > 4
    for name in ("vae", "sit", "norm_vae", "norm_sit"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-4), name


def test_the_residual_stream_is_contiguous():
    """Whatever layout the weights have, each block of SiT gets tokens whose features lie side by
    side."""
    sit = SiT(SiTConfig(2, 32, 2, size=8, num_classes=10, teacher_dims=()))
    seen = []
    for block in sit.blocks:
        block.register_forward_pre_hook(
            lambda module, args: seen.append(args[0].is_contiguous()))
    z, t, y = torch.randn(3, 4, 8, 8), torch.rand(3), torch.zeros(3, dtype=torch.long)
    for layout in (torch.contiguous_format, torch.channels_last):
        sit.to(memory_format=layout)(z.contiguous(memory_format=layout), t, y)
    assert seen == [True] * 4


def test_adaptive_gan_weight_runs_no_compiled_backward(quick_compiler):
    """The two gradients at the decoder's last layer do not go through the rest of the compiled
    VAE."""
    torch.manual_seed(0)
    vae = V.VAE(NARROW)
    train.compile_networks(train.Config(gan_adaptive=True), train.Networks(vae))
    x = torch.rand(2, 3, 16, 16)
    z, rec, _, _ = vae(x, torch.randn(2, 4, 8, 8))
    nll, gan, last_layer = (x - rec).abs().mean(), -rec.mean(), vae.decoder.conv_out.weight
    with torch.profiler.profile() as profile:
        weight = V.adaptive_gan_weight(nll, gan, last_layer)
    names = [event.name for event in profile.events()]
    assert any("ConvolutionBackward" in name for name in names)
    assert not any("CompiledFunction" in name for name in names)
    assert weight > 0
    with torch.profiler.profile() as profile:
        (rec.mean() + z.mean()).backward()
    assert any("CompiledFunction" in event.name for event in profile.events())
    assert all(p.grad is not None for p in vae.parameters())


def test_previews_compile_nothing(quick_compiler, tmp_path, monkeypatch):
    """A preview of a run with a frozen VAE, of other shapes than its steps, runs the networks as
    they are."""
    counts, preview = [], train.preview

    def counting(*args):
        counts.append(graphs())
        preview(*args)
        counts.append(graphs())
    monkeypatch.setattr(train, "preview", counting)
    run(config(tmp_path / "run", "--method=repa", "--compile=1", "--steps=4", "--preview_every=2"))
    assert len(counts) == 4 and counts[0] > 0 and len(set(counts)) == 1
    assert (tmp_path / "run" / "reconstructions_0000004.png").exists()


def test_rounded_weights_give_the_same_bits():
    """Linear weights in bfloat16 are what autocast makes of them in each call; the time embedding
    stays float32."""
    torch.manual_seed(0)
    sit = SiT(SiTConfig(2, 32, 2, size=8, num_classes=10, teacher_dims=(16,), align_depth=1,
                        qk_norm=True)).requires_grad_(False)
    for p in sit.parameters():
        p.add_(0.1 * torch.randn_like(p))
    args = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([1, 2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        before = sit(*args)
        sample.round_weights(sit)
        after = sit(*args)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1][0], after[1][0])
    for layer in (sit.blocks[0].attn.qkv, sit.final_layer.linear):
        assert layer.weight.dtype == torch.bfloat16
    for layer in (sit.t_embedder.mlp[0], sit.blocks[0].attn.q_norm):
        assert layer.weight.dtype == torch.float32


def test_a_vae_is_evaluated_in_float32(tmp_path, monkeypatch):
    """recon and align encode and decode outside of autocast; SiT and the teacher run under it."""
    run(config(tmp_path / "run", "--steps=2", "--save_every=2"))
    monkeypatch.setattr(ev, "autocast", lambda *_: torch.autocast("cpu", torch.bfloat16))
    monkeypatch.setattr(ev, "load_tiny_classifier", lambda resolution: ev.TinyClassifier().eval())
    seen = []

    def recording(module, name):
        method = getattr(module, name)

        def wrapped(self, *args):
            seen.append((module.__name__, torch.is_autocast_enabled("cpu")))
            return method(self, *args)
        monkeypatch.setattr(module, name, wrapped)
    for module, name in ((V.VAE, "encode"), (V.VAE, "decode"), (SiT, "forward"),
                         (repa.TinyTeacher, "features")):
        recording(module, name)
    for call in (ev.recon, ev.align):
        call(str(tmp_path / "run"), "tiny", count=20)
    assert set(seen) == {("VAE", False), ("SiT", True), ("TinyTeacher", True)}


def test_images_are_decoded_a_few_at_a_time(monkeypatch):
    """40 images at once are decoded 16 at a time, and are the images of one call."""
    torch.manual_seed(0)
    sit = SiT(SiTConfig(1, 32, 2, size=8, num_classes=10, teacher_dims=()))
    model = sample.Pipeline(V.VAE(NARROW), sit, list("abcdefghij"), {}, 0)
    seen, decode = [], V.VAE.decode

    def recording(vae, z):
        seen.append(len(z))
        return decode(vae, z)
    monkeypatch.setattr(V.VAE, "decode", recording)
    few = model([1] * 40, steps=2)
    monkeypatch.setattr(sample, "DECODED", 64)
    whole = model([1] * 40, steps=2)
    assert seen == [16, 16, 8, 40]
    assert (few.int() - whole.int()).abs().max() <= 1


def test_discriminator_sees_one_layout(tmp_path, monkeypatch):
    """Images and reconstructions reach it in channels_last, so that two variants of it are
    compiled, not three."""
    seen, forward = [], V.Discriminator.forward

    def recording(disc, x):
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return forward(disc, x)
    monkeypatch.setattr(V.Discriminator, "forward", recording)
    run(config(tmp_path / "run", "--gan_start=0", "--steps=1"))
    assert seen == [True] * 3                           # D(rec), then D(x) and D(rec) in its step


@pytest.mark.parametrize("capability, triton, compiler, expected", [
    ((9, 0), True, "/usr/bin/cc", True), ((6, 1), True, "/usr/bin/cc", False),
    ((9, 0), False, "/usr/bin/cc", False), ((9, 0), True, None, False)])
def test_compile_is_automatic_where_it_works(monkeypatch, tmp_path, capability, triton, compiler,
                                             expected):
    """A GPU before Volta, no Triton, or no C compiler: the run goes on without torch.compile."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.utils._triton, "has_triton_package", lambda: triton)
    monkeypatch.setattr(sample.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(sample.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    assert sample.can_compile(torch.device("cuda")) is expected
    assert sample.can_compile(CPU) is False
    (tmp_path / "Python.h").unlink()
    assert sample.can_compile(torch.device("cuda")) is False


def test_processes_wait_an_hour_for_each_other(monkeypatch):
    """Downloads, saves and previews of one process may take longer than NCCL's ten minutes."""
    given = {}
    monkeypatch.setattr(sample.dist, "rendezvous", lambda where: iter([("store", 0, 2)]))
    monkeypatch.setattr(sample.dist, "init_process_group",
                        lambda *args, **more: given.update(more))
    monkeypatch.setattr(train.dist, "new_group", lambda **more: given.update(side=more["timeout"]))
    monkeypatch.setattr(train.signal, "signal", lambda *args: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    sample.init_distributed()
    train.PoliteStop(2)
    assert given["timeout"] == given["side"] == timedelta(hours=1)


@pytest.mark.parametrize("deterministic", [0, 1])
def test_cudnn_tries_its_kernels(monkeypatch, tmp_path, deterministic):
    """cudnn.benchmark is on, but not where the same bits are wanted each time."""
    seen = []

    def no_run(*args):
        seen.append(torch.backends.cudnn.benchmark)
        return True
    monkeypatch.setattr(train, "run", no_run)
    monkeypatch.setattr(train, "PoliteStop", lambda world: None)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")           # restored afterwards
    words = [*SMALL, f"--out={tmp_path / 'run'}", f"--deterministic={deterministic}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    train.main()
    assert seen == [not deterministic]


def test_latents_are_cached_in_float32(monkeypatch, tmp_path):
    """train.py encode switches TF32 off, whatever start() chose."""
    run(config(tmp_path / "vae", "--method=vae", "--steps=1"))
    seen, encode = [], V.VAE.encode
    chosen = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(V.Shapes.__init__, "__defaults__", (32, 20, 0))

    def recording(vae, x):
        precision = torch.get_float32_matmul_precision()
        seen.append((precision, torch.backends.cudnn.allow_tf32))
        return encode(vae, x)
    monkeypatch.setattr(V.VAE, "encode", recording)
    try:
        torch.set_float32_matmul_precision("high")
        train.encode(str(tmp_path / "vae"), "tiny", str(tmp_path / "cache"))
    finally:
        torch.set_float32_matmul_precision(chosen[0])
        torch.backends.cudnn.allow_tf32 = chosen[1]
    assert set(seen) == {("highest", False)}


def test_dinov2_runs_without_xformers(monkeypatch):
    """DINOv2's code looks for xformers when it is imported: by then the switch is set."""
    seen = []
    monkeypatch.delenv("XFORMERS_DISABLED", raising=False)

    def load(*args, **more):
        seen.append(os.environ.get("XFORMERS_DISABLED"))
        raise OSError("offline")
    monkeypatch.setattr(torch.hub, "load", load)
    with pytest.raises(ValueError, match="cannot load the teacher"):
        repa.DINOv2("dinov2_vits14", 16)
    assert seen == ["1"]
    os.environ.pop("XFORMERS_DISABLED")


def test_the_clock_starts_after_the_first_step(tmp_path, monkeypatch):
    """images/s of the first line leaves out the first step, which compiles: 2 steps of 1 s after
    one of 100 s."""
    now = [0.0]
    monkeypatch.setattr(train.time, "time", lambda: now[0])
    log, ok, one = train.Log(tmp_path, 0, CPU), torch.tensor(True), {"v": torch.tensor(1.0)}
    for i, seconds in enumerate((100, 1, 1)):
        now[0] += seconds
        log.add(ok, one)
        if i == 0:
            log.restart_clock()
    log.flush(3, train.Config(), torch.zeros(2))
    now[0] += 6
    for _ in range(3):
        log.add(ok, one)
    log.flush(6, train.Config(), torch.zeros(2))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["ms"] for line in lines] == [1000, 2000]
    assert [line["v"] for line in lines] == [1, 1]


def test_waiting_on_data_is_timed_apart(tmp_path, monkeypatch):
    """data_ms is the time inside next() alone, a step: 0.5 s of 2 s here; the batches stay."""
    now = [0.0]
    monkeypatch.setattr(train.time, "time", lambda: now[0])

    def slow():
        for batch in ("a", "b"):
            now[0] += 0.5
            yield batch
    log = train.Log(tmp_path, 0, CPU)
    batches, got = log.timed(slow()), []
    for _ in range(2):
        got.append(next(batches))
        now[0] += 1.5
        log.add(torch.tensor(True), {"v": torch.tensor(1.0)})
    log.flush(2, train.Config(), torch.zeros(2))
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert got == ["a", "b"] and (line["ms"], line["data_ms"]) == (2000, 500)
