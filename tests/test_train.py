"""The loop: gradient routing, resume, ranks, accumulation, the gate, real folders, compile, and what users get wrong.

    python -m pytest tests/test_train.py
"""
import contextlib
import io
import json
import linecache
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import repa
import train
import vae as V
from sample import parse
from train import PRESETS, Config, check, frozen

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
# the whole joint step, small: random VAE, SiT of 2 blocks, a teacher trained for a few steps, GAN on
SMALL = ("--preset=tiny --sit=2-32-2/2 --align_depth=1 --batch=8 --first_stage=0 --steps=6 --log_every=3 "
         "--save_every=3 --preview_every=1000 --preview_steps=2 --disc_ch=8 --projector_width=32 --vae_ema=0").split()


def config(out, *extra):
    return parse(Config, [*SMALL, f"--out={out}", *extra], PRESETS)


@pytest.fixture(autouse=True, scope="session")
def quick_teacher(tmp_path_factory):
    """A tiny teacher of three training steps, in a torch.hub cache of the tests' own, found there by every run."""
    use_quick_teacher(tmp_path_factory.mktemp("torch"))


def use_quick_teacher(folder):
    """Trains it into this torch.hub cache."""
    os.environ["TORCH_HOME"] = str(folder)
    train_it = repa.train_tiny_teacher
    repa.train_tiny_teacher = lambda net, draw: train_it(net, draw, steps=3)
    for resolution in (32, 64):
        repa.load_tiny_teacher(V.Shapes(resolution).draw)
    repa.train_tiny_teacher = train_it


def execute(*words, env=(), launcher=(), ok=True):
    """The real command in a new process -> CompletedProcess."""
    command = [sys.executable, *launcher, "train.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **dict(env)})
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def torchrun(n):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return ["-m", "torch.distributed.run", f"--nproc_per_node={n}", f"--master_port={port}"]


def run(cfg):
    """The loop in this process -> content of the last pair of checkpoints."""
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        train.run(cfg, 0, 1, CPU)
    return last_pair(cfg.out)


def last_pair(out):
    step = train.checkpoints(out)[-1]
    return [torch.load(Path(out) / f"step_{step:07d}{kind}.pt", weights_only=True) for kind in ("", ".resume")]


def flatten(tree, prefix=""):
    """Nested dicts and lists of tensors and numbers -> {path: leaf}."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in flatten(value, f"{prefix}/{key}").items()}
    return {prefix: tree}


# the discriminator's running statistics: never read, so a skipped step does not care for them
UNREAD = tuple(f"discriminator/main.{i}.{name}" for i in (3, 6, 9)
               for name in ("running_mean", "running_var", "num_batches_tracked"))


def assert_equal(a, b, skip=("config",)):
    """The same keys and bits."""
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for key in a:
        if not key.startswith(tuple(f"/{s}" for s in skip)):
            same = torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]
            assert same, key


def assert_close(a, b, keys, tolerance):
    """Largest difference, relative to each tensor's largest value."""
    for key in keys:
        for name, x in flatten(a[key]).items():
            if torch.is_tensor(x) and x.is_floating_point():
                y = flatten(b[key])[name]
                assert (x - y).abs().max() <= tolerance * max(1e-3, x.abs().max().item()), f"{key}{name}"


# --------------------------------------------------------------------------------------------------- gradient routing


def one_step(monkeypatch, tmp_path, *extra, steps=1):
    """Runs steps of the loop and records, at each backward(), which networks got a gradient from it."""
    seen, cfg = [], config(tmp_path / "run", f"--steps={steps}", *extra)
    networks, real_build, backward = {}, train.build, torch.Tensor.backward

    def build(*args):
        built = real_build(*args)
        networks.update({name: net for name, net in zip(("vae", "sit", "disc"), built) if net is not None})
        for net in networks.values():       # adaLN-Zero would make most gradients zero, not absent
            for p in net.parameters():
                p.data += 0.02 * torch.randn_like(p)
        return built

    def spy(loss, *args, **kwargs):
        before = {n: {k: None if p.grad is None else p.grad.clone() for k, p in net.named_parameters()}
                  for n, net in networks.items()}
        bn = networks["sit"].bn.running_mean.clone() if "sit" in networks else None
        backward(loss, *args, **kwargs)
        got = {n for n, net in networks.items() for k, p in net.named_parameters()
               if p.grad is not None and (before[n][k] is None or not torch.equal(before[n][k], p.grad))}
        parts = {k for k, p in networks["sit"].named_parameters() if p.grad is not None} if "sit" in networks else set()
        seen.append((got, parts, bn))

    monkeypatch.setattr(train, "build", build)
    monkeypatch.setattr(torch.Tensor, "backward", spy)
    run(cfg)
    return seen, networks


def test_routing_of_the_three_losses(monkeypatch, tmp_path):
    """VAE loss -> VAE alone (through SiT and D); D's loss -> D alone; SiT's loss -> SiT alone."""
    seen, _ = one_step(monkeypatch, tmp_path)
    assert [got for got, _, _ in seen] == [{"vae"}, {"disc"}, {"sit"}]


def test_alignment_reaches_the_encoder(monkeypatch, tmp_path):
    """With every other term off, the encoder still gets a gradient, from the alignment alone; the decoder none."""
    monkeypatch.setattr(train, "reconstruction_loss", lambda x, rec, kind: 0.0 * rec.sum())
    grads = {}
    real = torch.nn.utils.clip_grad_norm_

    def clip(parameters, norm):
        parameters = list(parameters)
        grads.setdefault(len(grads), [p.grad.abs().sum().item() for p in parameters])
        return real(parameters, norm)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    _, nets = one_step(monkeypatch, tmp_path, "--gan=0", "--kl=0")
    named = dict(zip((k for k, _ in nets["vae"].named_parameters()), grads[0]))
    assert named["encoder.conv_in.weight"] > 0 and named["decoder.conv_out.weight"] == 0


def test_naive_ablation_sends_the_diffusion_loss_into_the_vae(monkeypatch, tmp_path):
    """--preset=naive: one backward of the sum, which reaches VAE and SiT."""
    seen, _ = one_step(monkeypatch, tmp_path, *"--stop_grad=0 --repa_vae=0 --repa_sit=0 --teacher=none --gan=0".split())
    assert [got for got, _, _ in seen] == [{"vae", "sit"}]


@pytest.mark.parametrize("extra, expected", [
    (("--train_vae=0", "--latent_norm=fixed"), [{"sit"}]),                                          # REPA
    (("--train_vae=0", "--latent_norm=fixed", "--repa_sit=0", "--repa_vae=0", "--teacher=none"), [{"sit"}]),    # SiT
    (("--sit=none", "--teacher=none"), [{"vae"}, {"disc"}]),                                        # first stage
])
def test_other_runs_are_the_same_loop(monkeypatch, tmp_path, extra, expected):
    """REPA, plain SiT and the VAE's first stage train just what they say."""
    seen, nets = one_step(monkeypatch, tmp_path, *extra)
    assert [got for got, _, _ in seen] == expected


def test_frozen_vae_and_fixed_statistics_stay(tmp_path):
    """A REPA run changes no bit of the VAE nor of the latents' statistics."""
    first, _ = run(config(tmp_path / "a", "--train_vae=0", "--latent_norm=fixed", "--steps=1"))
    last, resume = run(config(tmp_path / "a", "--train_vae=0", "--latent_norm=fixed", "--steps=4"))
    assert_equal(first["vae"], last["vae"])
    assert torch.equal(first["ema"]["bn.running_mean"], resume["model"]["bn.running_mean"])


def test_both_passes_share_t_and_noise_and_only_one_drops_labels(monkeypatch, tmp_path):
    """The alignment pass and the SiT pass see one (t, eps); labels drop in the second only; bn moves after both."""
    calls, drops, interpolate, align, forward = [], [], train.interpolate, train.SiT.align_only, train.SiT.forward

    def spy_interpolate(zn, eps, t, path):
        calls.append((eps, t))
        return interpolate(zn, eps, t, path)

    def spy_align(self, z, t, y):
        drops.append(self.bn.running_mean.clone())
        return align(self, z, t, y)

    def spy_forward(self, z, t, y, drop):
        drops.append((self.bn.running_mean.clone(), drop))
        return forward(self, z, t, y, drop)
    monkeypatch.setattr(train, "interpolate", spy_interpolate)
    monkeypatch.setattr(train.SiT, "align_only", spy_align)
    monkeypatch.setattr(train.SiT, "forward", spy_forward)
    run(config(tmp_path / "a", "--steps=1", "--label_drop=0.5"))
    assert len(calls) == 2 and torch.equal(calls[0][0], calls[1][0]) and torch.equal(calls[0][1], calls[1][1])
    assert torch.equal(drops[0], drops[1][0]) and drops[1][1].any() and not drops[1][1].all()


def test_frozen_restores_what_it_found():
    """frozen() switches only what was trainable, and back even after an error."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    net[0].requires_grad_(False)
    with pytest.raises(KeyError), frozen(net):
        assert not any(p.requires_grad for p in net.parameters())
        raise KeyError
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True]


# ------------------------------------------------------------------------------------ resume, ranks, accumulation, gate


def test_resume_is_bit_exact(tmp_path):
    """Six steps equal three, a new process, three: every tensor of both files, VAE's EMA and the discriminator too."""
    extra = ("--vae_ema=0.9", "--hflip=1")
    whole = run(config(tmp_path / "whole", *extra))
    for steps in (3, 6):
        threads = [("OMP_NUM_THREADS", str(torch.get_num_threads()))]
        execute(*SMALL, *extra, f"--out={tmp_path / 'parts'}", f"--steps={steps}", env=threads)
    for a, b in zip(whole, last_pair(tmp_path / "parts")):
        assert_equal(a, b)


def test_two_ranks_equal_one(tmp_path):
    """Two gloo ranks of half the batch follow one rank of the whole batch (GAN off: its BatchNorm is per rank)."""
    extra = ("--gan=0", "--steps=4", "--save_every=4")
    one = run(config(tmp_path / "one", *extra))
    execute(*SMALL, *extra, f"--out={tmp_path / 'two'}", launcher=torchrun(2))
    two = last_pair(tmp_path / "two")
    assert_close(one[0], two[0], ("vae", "ema"), 2e-3)  # Adam's first steps are signs: rounding grows to lr
    a, b = ([json.loads(line) for line in open(tmp_path / n / "metrics.jsonl")][1] for n in ("one", "two"))
    for key in ("vae", "sit", "v", "norm_vae", "norm_sit"):
        assert a[key] == pytest.approx(b[key], rel=1e-4), key


@pytest.mark.parametrize("extra", [(), ("--stop_grad=0", "--repa_vae=0"), ("--compile=1", "--recompute=1")])
def test_two_ranks_stay_replicas(tmp_path, extra):
    """With GAN and accumulation, in the naive ablation, and compiled, both ranks' weights are equal at each save."""
    extra = ("--micro_batch=2", "--steps=4", "--save_every=2", *extra)
    execute(*SMALL, *extra, f"--out={tmp_path / 'r'}", launcher=torchrun(2))
    assert train.checkpoints(tmp_path / "r") == [2, 4]


def test_accumulation_equals_the_large_batch(tmp_path, monkeypatch):
    """Four micro-batches of 2 give the gradients of one of 8, for VAE, discriminator and SiT, with fixed BatchNorms."""
    monkeypatch.setattr(train, "Discriminator", lambda ch: V.Discriminator(ch).eval())
    gradients = []

    def clip(parameters, norm):
        gradients[-1].append([p.grad.clone() for p in parameters])
        return torch.tensor(1.0)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    for micro in (8, 2):
        gradients.append([])
        run(config(tmp_path / str(micro), f"--micro_batch={micro}", "--latent_norm=fixed", "--steps=1"))
    assert len(gradients[0]) == 3
    for whole, parts in zip(*gradients):
        for a, b in zip(whole, parts):
            assert (a - b).abs().max() <= 2e-5 * a.abs().max() + 1e-8


def test_accumulation_commits_the_statistics_of_the_whole_batch(tmp_path, monkeypatch):
    """Running statistics after a step do not depend on the number of micro-batches, nor does the sum of images."""
    monkeypatch.setattr(train, "measure_statistics", lambda *args: None)
    runs = [run(config(tmp_path / str(m), f"--micro_batch={m}", "--steps=1"))[1]["model"] for m in (8, 4)]
    for key in ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"):
        assert torch.allclose(runs[0][key].float(), runs[1][key].float(), rtol=1e-5, atol=1e-7), key


def test_non_finite_step_is_skipped_whole(tmp_path, monkeypatch):
    """A NaN in one step leaves weights, statistics, EMA and optimizers as they were; the run goes on and counts it."""
    before = run(config(tmp_path / "run", "--steps=2", "--save_every=1"))
    real, factors = train.reconstruction_loss, iter([float("nan"), 1.0])
    monkeypatch.setattr(train, "reconstruction_loss", lambda x, rec, kind: real(x, rec, kind) * next(factors))
    after = run(config(tmp_path / "run", "--steps=3", "--save_every=1"))
    assert_equal(before[0], after[0], skip=("config", "steps", *UNREAD))
    assert_equal(before[1], after[1], skip=("steps", "skipped"))
    assert after[1]["skipped"].tolist() == [1, 1]
    last = run(config(tmp_path / "run", "--steps=4", "--save_every=1"))
    assert last[1]["skipped"].tolist() == [1, 0] and not torch.equal(last[0]["ema"]["x_embedder.proj.weight"],
                                                                     after[0]["ema"]["x_embedder.proj.weight"])


def test_ten_non_finite_steps_stop_the_run(tmp_path, monkeypatch):
    """A run that only produces NaN stops, says what was not finite, and keeps its checkpoint."""
    monkeypatch.setattr(train, "reconstruction_loss", lambda x, rec, kind: rec.sum() * float("nan"))
    with pytest.raises(ValueError, match="ten steps in a row.*l1"):
        run(config(tmp_path / "run", "--steps=30"))


def test_data_order_is_a_function_of_the_position():
    """Ranks and micro-batches cut one global order; every epoch is a permutation; a late start continues it."""
    cfg = replace(Config(), batch=8, micro_batch=2)

    def take(rank, world, first, n):
        it = iter(train.Order(20, cfg, rank, world, first))
        return [i for _ in range(n) for i in next(it)]
    whole = take(0, 1, 0, 20)                                                       # 5 steps: two epochs of 20
    assert sorted(whole[:20]) == sorted(whole[20:]) == list(range(20)) and whole[:20] != whole[20:]
    halves = [take(rank, 2, 0, 2) for rank in (0, 1)]
    assert halves[0] + halves[1] == whole[:8]
    assert take(0, 1, 3, 8) == whole[24:40]


# ------------------------------------------------------------------------------------------- real data, DINOv2, starts


def make_tree(root):
    """Three classes of odd-sized files in the formats that people have."""
    rng = np.random.default_rng(0)
    modes = [("RGB", "png"), ("RGB", "jpg"), ("L", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("L", "jpg")]
    for c, name in enumerate(("ant", "bee", "cat")):
        (root / name).mkdir(parents=True)
        for i, (mode, suffix) in enumerate(modes):
            pixels = rng.integers(0, 256, (37 + 11 * i, 83 - 7 * c, len(mode)), np.uint8).squeeze()
            Image.fromarray(pixels, mode).save(root / name / f"{i}.{suffix}")
    return root


DINO_STAND_IN = '''
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = torch.nn.Conv2d(3, 768, 14, 14)
        self.pos_embed = torch.nn.Parameter(torch.randn(1, 1 + 37 * 37, 768))
    def forward_features(self, x):
        return {"x_norm_patchtokens": self.patch(x).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]}
def dinov2_vitb14(pretrained=True, **kwargs):
    torch.manual_seed(0)
    return Net()
'''


def test_real_folder_dinov2_lpips_off(tmp_path):
    """A joint run on PNG, JPEG, grey, CMYK and RGBA files, workers, DINOv2 from a local hub repo; sampling by name."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(DINO_STAND_IN)
    words = ("--preset=tiny --resolution=64 --sit=2-32-2/4 --align_depth=1 --teacher=dinov2_vitb14 --first_stage=0 "
             "--steps=2 --batch=4 --workers=2 --projector_width=32 --preview_steps=2").split()
    execute(*words, f"--data={make_tree(tmp_path / 'images')}", f"--teacher_repo={tmp_path / 'hub'}",
            f"--out={tmp_path / 'run'}")
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"samples_0000002.png", "reconstructions_0000002.png", "metrics.jsonl"} <= written
    words = ["--classes=bee,cat", "--count=3", "--steps=3", f"--out={tmp_path / 'g.png'}"]
    done = subprocess.run([sys.executable, "sample.py", str(tmp_path / "run"), *words], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0 and Image.open(tmp_path / "g.png").size[0] >= 128, done.stderr


def test_vae_and_init_from_a_checkpoint(tmp_path):
    """--vae=RUN takes VAE, latents' statistics and discriminator; --init=RUN also SiT, for other classes."""
    first, _ = run(config(tmp_path / "a", "--steps=2"))
    vae, stats, disc = V.load_vae(str(tmp_path / "a"))
    assert torch.equal(stats[0], first["ema"]["bn.running_mean"]) and disc.keys() == first["discriminator"].keys()
    assert_equal(vae.state_dict(), first["vae"])
    frozen_vae = ("--train_vae=0", "--latent_norm=fixed", "--steps=1")
    second, _ = run(config(tmp_path / "b", f"--vae={tmp_path / 'a'}", *frozen_vae))
    assert_equal(second["vae"], first["vae"])
    assert torch.equal(second["ema"]["bn.running_var"], first["ema"]["bn.running_var"])
    make_tree(tmp_path / "images")
    third, _ = run(config(tmp_path / "c", f"--init={tmp_path / 'a'}", f"--data={tmp_path / 'images'}", "--teacher=none",
                          "--repa_sit=0", "--repa_vae=0", "--workers=0", "--lr_sit=1e-12", "--batch=2", "--steps=1"))
    assert third["ema"]["y_embedder.embedding_table.weight"].shape[0] == 4
    assert torch.allclose(third["ema"]["blocks.0.attn.qkv.weight"], first["ema"]["blocks.0.attn.qkv.weight"])


def losses(out):
    """The numbers of each logged step, without times."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("ms", "data_ms")} for line in lines if "step" in line]


def test_packed_training_equals_folder_training(tmp_path):
    """vae.py pack takes the folder's place: the same batches, so the same weights bit by bit."""
    make_tree(tmp_path / "images")
    V.pack(str(tmp_path / "images"), str(tmp_path / "images.npz"), 32)
    words = ("--teacher=none", "--repa_sit=0", "--repa_vae=0", "--steps=2", "--batch=4", "--workers=1")
    folder, packed = (run(config(tmp_path / f"run-{name}", f"--data={tmp_path / name}", *words))
                      for name in ("images", "images.npz"))
    for a, b in zip(folder, packed):
        assert_equal(a, b)


@pytest.mark.parametrize("teacher", ["tiny", "none"])
def test_cache_equals_encoding_on_the_fly(tmp_path, teacher):
    """The second stage: a frozen VAE's cached latents, with the posterior's noise of the step, give the losses that
    encoding gives, within float16's rounding. Another VAE's cache, or a resume with another VAE, is refused."""
    run(config(tmp_path / "vae", "--sit=none", "--teacher=none", "--steps=3", "--lr_vae=1e-2"))
    V.pack(str(make_tree(tmp_path / "images")), str(tmp_path / "tree.npz"), 32)
    data = {"tiny": "tiny", "none": str(tmp_path / "tree.npz")}[teacher]
    short = V.Shapes.__init__.__defaults__
    V.Shapes.__init__.__defaults__ = (32, 40, 0)                    # 40 images of the tiny world are enough here
    try:
        V.encode(str(tmp_path / "vae"), data, str(tmp_path / "cache"), 32)
        frozen_vae = [f"--vae={tmp_path / 'vae'}", f"--data={data}", "--train_vae=0", "--latent_norm=fixed",
                      "--steps=3", "--log_every=1", "--batch=4", "--workers=0"]
        frozen_vae += ["--teacher=none", "--repa_sit=0"] if teacher == "none" else []
        cached = [*frozen_vae, f"--latents={tmp_path / 'cache'}"]
        encoded = run(config(tmp_path / "a", *frozen_vae))
        read = run(config(tmp_path / "b", *cached))
        for a, b in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
            assert a == pytest.approx(b, rel=2e-3) and a["v"] != 0
        assert_equal(encoded[0]["vae"], read[0]["vae"])
        assert_close(encoded[0], read[0], ["ema"], 2e-3)
        words = ("--sit=none", "--teacher=none", "--steps=1", "--seed=5")
        run(config(tmp_path / "other", *words))
        with pytest.raises(ValueError, match="cache of another VAE"):
            run(config(tmp_path / "c", *cached, f"--vae={tmp_path / 'other'}"))
        with pytest.raises(ValueError, match="vae was .*other"):
            run(config(tmp_path / "b", *cached, f"--vae={tmp_path / 'other'}"))
    finally:
        V.Shapes.__init__.__defaults__ = short
    assert any("--latents is for a frozen VAE" in line for line in check(config("x", "--latents=cache"), 1))
    assert any("flipped" in line for line in check(config("x", *cached, "--hflip=1"), 1))


def test_sd3_and_flux_shaped_vaes_train_jointly(tmp_path):
    """f8d16 (16 channels, no quant convs) goes through the whole joint step, and its gradients reach the encoder."""
    before = V.load_vae("f8d16")[0].state_dict()
    torch.save(before, tmp_path / "flux.pt")
    plays, _ = run(config(tmp_path / "run", f"--vae={tmp_path / 'flux.pt'}", "--sit=2-32-2/1", "--batch=2", "--steps=1",
                          "--gan_start=0"))
    assert plays["sit_config"]["channels"] == 16 and plays["vae_config"]["quant_conv"] is False
    assert not torch.equal(plays["vae"]["encoder.conv_in.weight"], before["encoder.conv_in.weight"])
    line, = losses(tmp_path / "run")
    assert all(np.isfinite(value) for value in line.values()) and {"align_vae", "v", "disc"} <= line.keys()


def terms_of(monkeypatch):
    """Records the names of each step's logged terms."""
    seen, add = [], train.Log.add
    monkeypatch.setattr(train.Log, "add", lambda log, ok, terms: (seen.append(set(terms)), add(log, ok, terms))[1])
    return seen


def test_the_discriminator_learns_before_the_vae_hears_it(tmp_path, monkeypatch):
    """--gan_start: D learns from 2,000 steps before; without an option 0 with a discriminator's file, else 2,000."""
    run(config(tmp_path / "a", "--sit=none", "--teacher=none", "--gan=0", "--steps=1"))
    run(config(tmp_path / "b", "--sit=none", "--teacher=none", "--gan_start=0", "--steps=1"))
    seen = terms_of(monkeypatch)
    plays, _ = run(config(tmp_path / "c", f"--vae={tmp_path / 'a'}", "--steps=2"))
    assert all("disc" in terms and "gan" not in terms for terms in seen) and plays["config"]["gan_start"] == 2000
    run(config(tmp_path / "c", f"--vae={tmp_path / 'a'}", "--steps=3"))        # resumed: not a file's, still 2,000
    assert "gan" not in seen[-1]
    plays, _ = run(config(tmp_path / "d", f"--vae={tmp_path / 'b'}", "--steps=1"))
    assert {"disc", "gan"} <= seen[-1] and plays["config"]["gan_start"] == 0
    run(config(tmp_path / "e", f"--vae={tmp_path / 'a'}", "--gan_start=2001", "--steps=2"))
    assert "disc" not in seen[-2] and "disc" in seen[-1]


def test_first_stage_joins_the_joint_run(tmp_path):
    """--first_stage trains the VAE alone; the joint run starts from it, statistics measured; a rerun adds nothing."""
    words = [*SMALL, f"--out={tmp_path / 'r'}", "--first_stage=2", "--steps=2", "--save_every=2"]
    execute(*words)
    stage, joint = last_pair(tmp_path / "r" / "first-stage")[0], last_pair(tmp_path / "r")[0]
    assert "ema" not in stage and joint["config"]["vae"].endswith("first-stage")
    assert not torch.allclose(joint["ema"]["bn.running_var"], torch.tensor(1.0))
    again = execute(*words)
    assert "resuming" in again.stdout and last_pair(tmp_path / "r")[0]["steps"] == 2


def test_ema_by_hand():
    """average + (1 - decay) (model - average), counters copied; where the step was skipped, nothing."""
    average, model = torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2)
    with torch.no_grad():
        for i, value in enumerate([*average.state_dict().values(), *model.state_dict().values()]):
            value.copy_(torch.arange(i, i + value.numel()).view_as(value))
    before, now = ({k: v.clone() for k, v in net.state_dict().items()} for net in (average, model))
    train.ema_update(average, model, 0.75, torch.tensor(False))
    assert_equal(average.state_dict(), before)
    train.ema_update(average, model, 0.75, torch.tensor(True))
    for name, value in average.state_dict().items():
        floats = value.is_floating_point()
        assert torch.allclose(value, 0.75 * before[name] + 0.25 * now[name] if floats else now[name]), name
    assert_equal(model.state_dict(), now)


def test_compiled_step_equals_eager_and_never_recompiles(tmp_path):
    """The joint step under torch.compile (with activations computed again in the backward) follows the eager one, its
    graphs have no breaks, and steps 2 to 5 compile nothing."""
    code = ("import sys, pathlib, torch, train; from torch._dynamo.utils import counters\n"
            "cfg = train.parse(train.Config, sys.argv[1:], train.PRESETS); pathlib.Path(cfg.out).mkdir()\n"
            "n, real = [], train.draws\n"
            "def draws(*a):\n    n.append(counters['stats']['unique_graphs']); return real(*a)\n"
            "train.draws = draws; train.run(cfg, 0, 1, torch.device('cpu')); print('graphs', *n)\n"
            "print('breaks', sum(counters['graph_break'].values()))")
    words = [*SMALL, "--save_every=6", "--gan_adaptive=1"]
    eager = run(config(tmp_path / "eager", *words[-2:]))
    done = subprocess.run([sys.executable, "-c", code, *words, f"--out={tmp_path / 'fast'}", "--compile=1",
                           "--recompute=1"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    graphs = [int(n) for n in re.search(r"graphs (.*)", done.stdout)[1].split()][-6:]   # before each of the six steps
    assert graphs[0] == 0 < graphs[1] and len(set(graphs[2:])) == 1, graphs
    assert "breaks 0" in done.stdout, done.stdout
    fast = last_pair(tmp_path / "fast")
    assert flatten(fast[0]["vae"]).keys() == flatten(eager[0]["vae"]).keys()        # no _orig_mod. in names
    a, b = (json.loads(open(tmp_path / n / "metrics.jsonl").readlines()[1]) for n in ("eager", "fast"))
    for key in ("vae", "disc", "sit", "norm_vae", "norm_disc", "norm_sit"):
        assert a[key] == pytest.approx(b[key], rel=2e-3), key


WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")


class HostReads(TorchDispatchMode):
    """Records, by step, the lines of train.py that make the host wait for the device: reads of a tensor's value. On a
    CPU nothing waits, but the calls are the same ones. Reading the data (Log.wait) is the host's own work."""
    def __init__(self, monkeypatch):
        super().__init__()
        self.found, self.step, self.reading = [], "before", False
        for name in WAITS:
            monkeypatch.setattr(torch.Tensor, name, self.recording(getattr(torch.Tensor, name)))
        draws, wait = train.draws, train.Log.wait

        def step_begins(cfg, step, rank, world, latent, device, stream="step"):
            self.step = step if stream == "step" else "before"
            return draws(cfg, step, rank, world, latent, device, stream)

        def data(log, batches):
            self.reading = True
            batch, self.reading = wait(log, batches), False
            return batch
        monkeypatch.setattr(train, "draws", step_begins)
        monkeypatch.setattr(train.Log, "wait", data)

    def record(self):
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename != train.__file__:
            frame = frame.f_back
        if frame and not self.reading:
            line = linecache.getline(train.__file__, frame.f_lineno).strip()
            self.found.append((self.step, frame.f_code.co_name, line))

    def recording(self, method):
        def wrapped(tensor, *args, **kwargs):
            self.record()
            return method(tensor, *args, **kwargs)
        return wrapped

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func._schema.name in ("aten::index", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1])
        if by_mask or func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
            self.record()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("extra", [(), ("--train_vae=0", "--latent_norm=fixed"), ("--batch=8", "--micro_batch=4")])
def test_silent_steps_never_wait_for_the_device(tmp_path, monkeypatch, extra):
    """Between two log lines nothing reads a value from the device, but a CPU's own check (see `device.type`)."""
    cfg = config(tmp_path / "run", "--steps=8", "--log_every=4", "--save_every=100", "--vae_ema=0.9", *extra)
    with HostReads(monkeypatch) as reads:
        run(cfg)
    silent = {(name, line) for step, name, line in reads.found if step in (1, 2, 4, 5, 6)}
    assert {line for _, line in silent} <= {
        'if (device.type == "cpu" or (step + 1) % cfg.log_every == 0) and skipped[1] >= 10:'}, silent
    assert any(step == 3 for step, _, _ in reads.found)                 # the line that is printed is read


@pytest.mark.parametrize("read", [lambda x: x.item(), lambda x: bool(x), lambda x: x.reshape(1)[x.reshape(1) > 0]])
def test_a_read_in_the_step_is_found(tmp_path, monkeypatch, read):
    finite = train.all_finite
    monkeypatch.setattr(train, "all_finite", lambda *values: (read(values[0]), finite(*values))[1])
    with HostReads(monkeypatch) as reads:
        run(config(tmp_path / "run", "--steps=3", "--log_every=3", "--save_every=100"))
    assert [line for step, _, line in reads.found if step == 1][0].startswith("ok = all_finite"), reads.found


# ---------------------------------------------------------------------------------------------------------- bad input


def test_paper_settings_are_the_defaults():
    """No argument is the paper's run; every preset passes the checks; REPA's preset composes with tiny."""
    cfg = Config()
    assert (cfg.batch, cfg.steps, cfg.lr_sit, cfg.lr_vae, cfg.ema, cfg.repa_sit, cfg.repa_vae, cfg.kl, cfg.gan) == (
        256, 400_000, 1e-4, 1e-4, 0.9999, 0.5, 1.5, 1e-6, 0.1)
    assert train.architecture(cfg) == (28, 1152, 16, 2, 8)
    for name in PRESETS:
        assert check(parse(Config, [f"--preset={name}"], PRESETS), 8) == [], name
    both = parse(Config, ["--steps=7", "--preset=tiny,repa"], PRESETS)
    assert (both.vae, both.train_vae, both.steps, both.out) == ("tiny", False, 7, "runs/repa")


@pytest.mark.parametrize("words, message", [
    (["--lr_sti=1"], "did you mean lr_sit"),
    (["--steps=many"], "expected a whole number"),
    (["--lr_sit"], "needs a value"),
    (["--preset=tiney"], "did you mean tiny"),
    (["--batch=0"], "must be positive"),
    (["--sit=SiT-XXL/2"], "unknown SiT"),
    (["--preset=tiny", "--sit=6-192-3/1"], "use patch 2"),
    (["--teacher=dinov3"], "did you mean"),
    (["--train_vae=0"], "--latent_norm=fixed"),
    (["--teacher=none"], "--repa_sit=0"),
    (["--preset=tiny", "--resolution=30"], "no multiple of"),
    (["--preset=tiny", "--align_depth=9"], "deeper than"),
    (["--preset=tiny", "--micro_batch=5"], "try 4"),
    (["--data=/nowhere", "--vae=f8d4"], "no data folder"),
    (["--preset=tiny", "--first_stage=0", "--vae=/nowhere.pt"], "no file at"),
    (["--preset=tiny", "--out=/proc/x"], "cannot write"),
    (["--preset=tiny", "--first_stage=0", "--teacher=dinov2_vitb14", "--resolution=64", "--sit=3-32-2/4",
      "--data=FOLDER", "--teacher_repo=/nowhere"], "--teacher_repo=DIR"),
    (["--preset=tiny,sit", "--first_stage=0", "--train_vae=1", "--lpips=1"], "vgg16-397923af.pth"),
])
def test_mistakes_end_in_one_line_and_code_2(tmp_path, words, message):
    """The user's mistakes: one line that says what to do, exit code 2, no traceback, before anything is trained."""
    words = [w.replace("FOLDER", str(make_tree(tmp_path / "images"))) if "FOLDER" in w else w for w in words]
    out = [] if any(w.startswith("--out") for w in words) else [f"--out={tmp_path / 'run'}"]
    done = execute(*words, *out, ok=False, env=[("TORCH_HOME", str(tmp_path))] if "--lpips=1" in words else [])
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and message in lines[-1] and lines[-1].startswith("error:"), done.stderr
    assert "Traceback" not in done.stderr


def test_batch_must_divide_over_the_processes():
    """The message names the batches that would do."""
    assert "try 248 or 256" in check(replace(Config(), batch=250), 8)[0]


def test_damaged_checkpoint_and_changed_settings_are_refused(tmp_path):
    """A truncated checkpoint, or a run continued under another architecture, ends in one line."""
    run(config(tmp_path / "r", "--steps=3"))
    with pytest.raises(ValueError, match="sit was '2-32-2/2', is '3-32-2/2'"):
        run(config(tmp_path / "r", "--sit=3-32-2/2"))
    path = tmp_path / "r" / "step_0000003.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="step_0000003.pt is damaged or no PyTorch file"):
        run(config(tmp_path / "r"))


def test_replicas_are_compared(tmp_path):
    """Two processes whose weights differ are stopped at the next save, the parameter named."""
    code = ("import sys, torch, torch.distributed as dist, train\n"
            "dist.init_process_group('gloo'); n = torch.nn.Linear(2, 2)\n"
            "torch.nn.init.constant_(n.weight, 1.0); torch.nn.init.constant_(n.bias, float(dist.get_rank()))\n"
            "try: train.check_replicas(2, sit=n)\n"
            "except RuntimeError as e: sys.stdout.write('[named]' * ('sit.bias' in str(e)))\n"
            "dist.destroy_process_group()")
    script = tmp_path / "differ.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, *torchrun(2), str(script)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.stdout.count("[named]") == 2, done.stdout + done.stderr
