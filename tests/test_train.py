"""The loop: gradient routing, resume, ranks, accumulation, the gate, checkpoints, real folders,
torch.compile, and what users get wrong.

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
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import repa
import sample
import train
import vae as V
from sample import parse
from sit import SiT, SiTConfig
from train import PRESETS, Config, frozen, problems

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
# The whole joint step, small: a random VAE, a SiT of 2 blocks, a teacher that was trained for a
# few steps. D learns from the first step on; with --gan_start=0 the VAE hears it, too.
SMALL = ("--preset=tiny --sit=2-32-2/2 --align_depth=1 --batch=8 --first_stage=0 --steps=6 "
         "--log_every=3 --save_every=3 --preview_every=1000 --preview_steps=2 --disc_ch=8 "
         "--projector_width=32 --vae_ema=0").split()
NARROW = V.VAEConfig(ch=16, ch_mult=(1, 2), num_res_blocks=1, groups=4)     # 32 px -> 16 x 16


def config(out, *extra):
    return parse(Config, [*SMALL, f"--out={out}", *extra], PRESETS)


@pytest.fixture(autouse=True, scope="session")
def quick_teacher(tmp_path_factory):
    """A tiny teacher of three training steps, in a torch.hub cache of the tests' own, found there
    by every run."""
    use_quick_teacher(tmp_path_factory.mktemp("torch"))


def use_quick_teacher(folder):
    """Trains it into this torch.hub cache."""
    os.environ["TORCH_HOME"] = str(folder)
    train_it = repa.train_tiny_teacher
    repa.train_tiny_teacher = lambda net, draw: train_it(net, draw, steps=3)
    for resolution in (32, 64):
        repa.load_tiny_teacher(V.Shapes(resolution).draw)
    repa.train_tiny_teacher = train_it


def python(*words, env=(), timeout=300):
    """A new process of one thread, in the repository's root -> CompletedProcess."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **dict(env)}
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True,
                          timeout=timeout, env=env)


def execute(*words, env=(), launcher=(), ok=True):
    """The real command in a new process -> CompletedProcess."""
    done = python(*launcher, "train.py", *words, env=env)
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def torchrun(n):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return ["-m", "torch.distributed.run", f"--nproc_per_node={n}", f"--master_port={port}"]


def run(cfg):
    """The loop in this process -> the content of its state.pt."""
    said(cfg)
    return last(cfg.out)


def said(cfg):
    """The loop in this process -> what it prints."""
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        train.run(cfg, 0, 1, CPU)
    return output.getvalue()


def last(out):
    """The content of a run's state.pt."""
    return torch.load(Path(out) / "state.pt", weights_only=True)


def losses(out):
    """The numbers of each logged step, without times."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("ms", "data_ms")}
            for line in lines if "step" in line]


def flatten(tree, prefix=""):
    """Nested dicts and lists of tensors and numbers -> {path: leaf}."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {path: leaf for key, value in items
                for path, leaf in flatten(value, f"{prefix}/{key}").items()}
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
                limit = tolerance * max(1e-3, x.abs().max().item())
                assert (x - y).abs().max() <= limit, f"{key}{name}"


# ---- Gradient routing -----------------------------------------------------------

class Distance(torch.nn.Module):
    """In place of LPIPS, whose weights are a download: frozen random features."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Conv2d(3, 8, 3).requires_grad_(False)

    def forward(self, x, rec):
        return F.mse_loss(self.features(rec), self.features(x))


def small_networks(method, **options):
    """Networks by hand, and what a step of 4 images takes -> cfg, nets, (x, y, target, r).

    x [4, 3, 32, 32], latents [4, 4, 16, 16], target [4, 16, 16] of random tokens.
    """
    torch.manual_seed(0)
    cfg = replace(Config(), method=method, batch=4, gan_start=0, **options)
    sit = SiT(SiTConfig(2, 32, 2, 4, size=16, num_classes=10, align_depth=1, projector_width=32,
                        teacher_dims=(16,) if cfg.aligned else ()))
    with torch.no_grad():
        for p in sit.parameters():      # adaLN-Zero makes most gradients zero
            p += 0.02 * torch.randn_like(p)
    target = [torch.randn(4, 16, 16)]
    teacher = (lambda image: target[0]) if cfg.aligned else None
    nets = train.Networks(V.VAE(NARROW), sit, V.Discriminator(8), teacher, Distance())
    x = V.to_float(torch.randint(256, (4, 3, 32, 32)))
    y = torch.arange(4)
    r = train.draws(cfg, 0, 0, 1, (4, 16, 16), CPU)
    return cfg, nets, (x, y, target, r)


def optimizers(cfg, nets):
    """One for each network that the method trains."""
    trained = {"vae": cfg.trains_vae, "disc": cfg.trains_vae, "sit": cfg.trains_sit}
    return {name: train.make_optimizer(getattr(nets, name), 1e-4)
            for name, moves in trained.items() if moves}


PARTS = {"encoder": ("vae.encoder.", "vae.quant_conv."),
         "decoder": ("vae.decoder.", "vae.post_quant_conv."),
         "disc": ("disc.",),
         "early": ("sit.x_embedder.", "sit.t_embedder.", "sit.y_embedder.", "sit.blocks.0."),
         "late": ("sit.blocks.1.", "sit.final_layer."),     # behind align_depth
         "projector": ("sit.projectors.",)}
VAE = {"encoder", "decoder"}
DENOISER = {"early", "late"}


def named_parameters(nets):
    return {f"{name}.{key}": p for name in ("vae", "sit", "disc")
            for key, p in getattr(nets, name).named_parameters()}


def reached(loss, nets):
    """Names of the parts that this loss trains. The parameters of the others must not even be in
    its graph."""
    named = {name: p for name, p in named_parameters(nets).items() if p.requires_grad}
    gradients = torch.autograd.grad(loss, named.values(), retain_graph=True, allow_unused=True)
    found, touched = set(), set()
    for name, gradient in zip(named, gradients):
        part = next(part for part, names in PARTS.items() if name.startswith(names))
        if gradient is not None:
            touched.add(part)
            found |= {part} if gradient.abs().max() > 0 else set()
    assert found == touched
    return found


@pytest.mark.parametrize("method, term, expected", [
    ("repa-e", "l1", VAE),
    ("repa-e", "lpips", VAE),
    ("repa-e", "kl", {"encoder"}),
    ("repa-e", "gan", VAE),                                 # generator's side, through frozen D
    ("repa-e", "align_vae", {"encoder"}),                   # through frozen SiT and projector
    ("repa-e", "vae", VAE),
    ("repa-e", "v", DENOISER),
    ("repa-e", "align_sit", {"early", "projector"}),
    ("repa-e", "sit", DENOISER | {"projector"}),
    ("vae", "vae", VAE),
    ("repa", "sit", DENOISER | {"projector"}),
    ("sit", "sit", DENOISER),
    ("naive", "vae", VAE),
    ("naive", "v", DENOISER | {"encoder"}),                 # the diffusion loss trains the VAE
    ("naive", "align_sit", {"encoder", "early", "projector"}),
])
def test_who_gets_a_gradient_from_which_loss(method, term, expected):
    """The table of train.py's docstring, by vae_loss, sit_loss and autograd. (The discriminator's
    row: the next test.)"""
    cfg, nets, (x, y, target, r) = small_networks(method)
    with frozen(nets.sit, nets.disc):
        _, z, _, terms = train.vae_loss(cfg, nets, x, y, target, r)
    z = z if method == "naive" else z.detach()
    if cfg.trains_sit:
        terms |= train.sit_loss(cfg, nets, z, y, target, r)[1]
    assert reached(terms[term], nets) == expected


@pytest.mark.parametrize("method, expected", [
    ("repa-e", [VAE, {"disc"}, DENOISER | {"projector"}]),
    ("repa", [DENOISER | {"projector"}]),
    ("sit", [DENOISER]),
    ("vae", [VAE, {"disc"}]),
    ("naive", [{"disc"}, VAE | DENOISER | {"projector"}]),  # one backward of the sum
])
def test_what_each_backward_of_a_step_reaches(monkeypatch, method, expected):
    """train_step detaches and freezes as the table says: VAE's loss, D's loss, SiT's loss. The
    latents are attached in the naive ablation alone."""
    cfg, nets, (x, y, _, r) = small_networks(method)
    everything, seen, attached = replace(nets), [], []
    backward, sit_loss = torch.Tensor.backward, train.sit_loss
    nets.vae.requires_grad_(cfg.trains_vae)
    if not cfg.trains_vae:
        nets.disc = None
    if not cfg.trains_sit:
        nets.sit = None

    def spy(loss):
        seen.append(reached(loss, everything))
        backward(loss)

    def spy_sit(cfg, nets, z, *args):
        attached.append(z.requires_grad)
        return sit_loss(cfg, nets, z, *args)
    monkeypatch.setattr(torch.Tensor, "backward", spy)
    monkeypatch.setattr(train, "sit_loss", spy_sit)
    _, ok = train.train_step(cfg, nets, optimizers(cfg, nets), iter([[V.to_uint8(x), y]]), r)
    assert ok and seen == expected
    assert attached == ([method == "naive"] if cfg.trains_sit else [])


@pytest.mark.parametrize("adaptive", [False, True])
def test_losses_are_the_weighted_sums_of_their_terms(adaptive):
    """In value and gradient, each option weighs its own term."""
    cfg, nets, (x, y, target, r) = small_networks("repa-e", lpips=0.7, kl=1e-3, gan=0.3,
                                                  align_vae=1.3, align_sit=0.6,
                                                  gan_adaptive=adaptive)
    with frozen(nets.sit, nets.disc):
        loss, z, _, terms = train.vae_loss(cfg, nets, x, y, target, r)
    pixels = terms["l1"] + 0.7 * terms["lpips"]
    gan = 0.3
    if adaptive:
        last_layer = nets.vae.decoder.conv_out.weight
        gan = gan * V.adaptive_gan_weight(pixels, terms["gan"], last_layer)
    by_hand = pixels + 1e-3 * terms["kl"] + gan * terms["gan"] + 1.3 * terms["align_vae"]
    assert_same_gradients(loss, by_hand, nets.vae)
    loss, terms = train.sit_loss(cfg, nets, z.detach(), y, target, r)
    assert_same_gradients(loss, terms["v"] + 0.6 * terms["align_sit"], nets.sit)


def assert_same_gradients(a, b, network):
    """Two losses agree in their values and in the gradients of the network's parameters."""
    assert a.item() == pytest.approx(b.item(), rel=1e-5)
    parameters = list(network.parameters())
    pairs = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (a, b)]
    for x, y in zip(*pairs):
        assert (x - y).abs().max() <= 1e-4 * y.abs().max() + 1e-8


@pytest.mark.parametrize("method, expected", [
    ("repa-e", {"vae", "disc", "sit"}), ("repa", {"sit"}), ("sit", {"sit"}),
    ("naive", {"vae", "disc", "sit"}), ("vae", {"vae", "disc"})])
def test_a_step_changes_the_weights_that_its_method_names(monkeypatch, tmp_path, method, expected):
    """The real loop, built as a user builds it."""
    moved, step = [], train.train_step

    def spy(cfg, nets, *args):
        networks = {name: getattr(nets, name) for name in ("vae", "disc", "sit")
                    if getattr(nets, name) is not None}
        before = {name: [p.detach().clone() for p in net.parameters()]
                  for name, net in networks.items()}
        result = step(cfg, nets, *args)
        moved.append({name for name, net in networks.items()
                      if not all(map(torch.equal, before[name], net.parameters()))})
        return result
    monkeypatch.setattr(train, "train_step", spy)
    run(config(tmp_path / "run", f"--method={method}", "--gan_start=0", "--steps=2"))
    assert moved == [expected, expected]


def test_frozen_vae_and_fixed_statistics_stay(tmp_path):
    """A REPA run changes no bit of the VAE nor of the latents' statistics."""
    first = run(config(tmp_path / "a", "--method=repa", "--steps=1"))
    second = run(config(tmp_path / "a", "--method=repa", "--steps=4"))
    assert second["steps"] == 4
    assert_equal(first["vae"], second["vae"])
    for kind in ("model", "ema"):
        for name in ("bn.running_mean", "bn.running_var"):
            assert torch.equal(first["model"][name], second[kind][name])


def test_both_passes_share_t_and_noise_and_only_one_drops_labels(monkeypatch):
    """The alignment pass and SiT's own see one (t, eps); labels drop in the second only; bn moves
    after both."""
    cfg, nets, (x, y, _, r) = small_networks("repa-e")
    r = r._replace(drop=torch.tensor([True, False, True, False]))
    mixed, passes, interpolate, forward = [], [], train.interpolate, SiT.forward

    def spy_interpolate(zn, eps, t, path):
        mixed.append((eps, t))
        return interpolate(zn, eps, t, path)

    def spy_forward(sit, z_t, t, y, drop=None, depth=None):
        passes.append((sit.bn.running_mean.clone(), sit.bn.seen == [], t, drop, depth))
        return forward(sit, z_t, t, y, drop, depth)
    monkeypatch.setattr(train, "interpolate", spy_interpolate)
    monkeypatch.setattr(SiT, "forward", spy_forward)
    train.train_step(cfg, nets, optimizers(cfg, nets), iter([[V.to_uint8(x), y]]), r)
    assert len(mixed) == 2 and all(map(torch.equal, *mixed))
    (mean_a, running_a, t_a, drop_a, depth_a), (mean_b, running_b, t_b, drop_b, depth_b) = passes
    assert torch.equal(mean_a, mean_b) and not torch.equal(mean_a, nets.sit.bn.running_mean)
    assert (running_a, running_b) == (True, False)      # running statistics, then the batch's own
    assert torch.equal(t_a, r.t) and torch.equal(t_b, r.t)
    assert drop_a is None and torch.equal(drop_b, r.drop)
    assert (depth_a, depth_b) == (1, None)


def test_frozen_restores_what_it_found():
    """frozen() switches only what was trainable, and back even after an error."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    net[0].requires_grad_(False)
    with pytest.raises(KeyError), frozen(None, net):
        assert not any(p.requires_grad for p in net.parameters())
        raise KeyError
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True]


# ---- Resume, ranks, accumulation, the gate --------------------------------------

def test_resume_is_bit_exact(tmp_path):
    """Six steps equal three, a new process, three: every tensor of state.pt, VAE's EMA and the
    discriminator too."""
    extra = ("--vae_ema=0.9", "--hflip=1", "--gan_start=0")
    whole = run(config(tmp_path / "whole", *extra))
    for steps in (3, 6):
        threads = [("OMP_NUM_THREADS", str(torch.get_num_threads()))]
        execute(*SMALL, *extra, f"--out={tmp_path / 'parts'}", f"--steps={steps}", env=threads)
    assert {"vae_ema", "discriminator", "opt_disc"} <= whole.keys()
    assert_equal(whole, last(tmp_path / "parts"))


def test_two_ranks_equal_one(tmp_path):
    """Two gloo ranks of half the batch follow one rank of the whole batch (GAN off: its BatchNorm
    is per rank)."""
    extra = ("--gan=0", "--steps=4", "--save_every=4")
    cfg = config(tmp_path / "one", *extra)
    one = run(cfg)
    execute(*SMALL, *extra, f"--out={tmp_path / 'two'}", launcher=torchrun(2))
    two = last(tmp_path / "two")
    for key in ("opt", "opt_vae"):
        for i, moments in one[key]["state"].items():
            a, b = moments["exp_avg"], two[key]["state"][i]["exp_avg"]      # mean gradients
            assert (a - b).abs().max() <= 1e-3 * a.abs().max() + 1e-9, f"{key} {i}"
    # Adam's first steps are signs: one weight of 30,000, whose first gradient is rounding, may move
    # by a per cent of lr. So the VAE's weights are compared as one vector, with its way so far.
    nets, _, _ = train.build(cfg, V.open_images(cfg.data, cfg.resolution), None, 1, CPU)
    start, a, b = (torch.cat([value.flatten() for value in vae.values()])
                   for vae in (nets.vae.state_dict(), one["vae"], two["vae"]))
    assert (a - b).norm() <= 1e-3 * (a - start).norm()
    assert_close(one, two, ("ema",), 2e-3)
    a, b = (losses(tmp_path / name)[0] for name in ("one", "two"))
    for key in ("vae", "sit", "v", "norm_vae", "norm_sit"):
        assert a[key] == pytest.approx(b[key], rel=1e-4), key


@pytest.mark.parametrize("extra", [(), ("--method=naive",), ("--compile=1", "--recompute=1")])
def test_two_ranks_stay_replicas(tmp_path, extra):
    """With GAN and accumulation, in the naive ablation, and compiled, both ranks' weights are
    equal at each save."""
    extra = ("--micro_batch=2", "--gan_start=0", "--steps=4", "--save_every=2", *extra)
    execute(*SMALL, *extra, f"--out={tmp_path / 'r'}", launcher=torchrun(2))
    assert last(tmp_path / "r")["steps"] == 4


def test_replicas_are_compared(tmp_path):
    """Two processes whose weights differ are told which; the discriminator's running statistics
    may differ."""
    script = tmp_path / "differ.py"
    script.write_text(
        "import sys, torch, torch.distributed as dist, train\n"
        "dist.init_process_group('gloo')\n"
        "torch.manual_seed(0)\n"
        "linear, disc = torch.nn.Linear, train.Discriminator(4)\n"
        "nets = train.Networks(linear(2, 2), linear(2, 2), disc)\n"
        "disc.main[3].running_mean.fill_(dist.get_rank())\n"
        "train.check_replicas(nets)\n"
        "for p in (nets.vae.weight, nets.sit.bias, disc.main[3].weight):\n"
        "    before = p.data.clone()\n"
        "    p.data += dist.get_rank()\n"
        "    try:\n"
        "        train.check_replicas(nets)\n"
        "    except RuntimeError as error:\n"
        "        sys.stdout.write(f'[{error}]')\n"
        "    p.data.copy_(before)\n"
        "dist.destroy_process_group()\n")
    done = python(*torchrun(2), str(script))
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("vae.weight", "sit.bias", "disc.main.3.weight"):
        assert done.stdout.count(f"[the processes differ in {name} since") == 2, done.stdout


def test_a_run_whose_processes_differ_stops(tmp_path):
    """The comparison is made before each save: the run ends, and the last state stays."""
    script = tmp_path / "drifting.py"
    script.write_text(
        "import os, train\n"
        "real = train.update\n"
        "def update(cfg, nets, opts, terms, disc_learns):\n"
        "    result = real(cfg, nets, opts, terms, disc_learns)\n"
        "    if os.environ['RANK'] == '1' and nets.sit.bn.num_batches_tracked == 3:\n"
        "        nets.sit.blocks[0].attn.proj.bias.data += 1e-3\n"
        "    return result\n"
        "train.update = update\n"
        "train.main()\n")
    done = python(*torchrun(2), str(script), *SMALL, "--steps=4", "--save_every=2",
                  f"--out={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "RuntimeError: the processes differ in sit.blocks.0.attn.proj.bias" in done.stderr
    assert last(tmp_path / "run")["steps"] == 2


def test_accumulation_equals_the_large_batch(tmp_path, monkeypatch):
    """Four micro-batches of 2 give the gradients of one of 8, for VAE, discriminator and SiT,
    with fixed BatchNorms."""
    monkeypatch.setattr(train, "Discriminator", lambda ch: V.Discriminator(ch).eval())
    gradients = []

    def clip(parameters, norm):
        gradients[-1].append([p.grad.clone() for p in parameters])
        return torch.tensor(1.0)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    for micro in (8, 2):
        gradients.append([])
        run(config(tmp_path / str(micro), f"--micro_batch={micro}", "--latent_norm=fixed",
                   "--gan_start=0", "--steps=1"))
    assert len(gradients[0]) == 3
    for whole, parts in zip(*gradients, strict=True):
        for a, b in zip(whole, parts, strict=True):
            assert (a - b).abs().max() <= 2e-5 * a.abs().max() + 1e-8


def test_accumulation_commits_the_statistics_of_the_whole_batch(tmp_path, monkeypatch):
    """Running statistics after a step do not depend on the number of micro-batches."""
    monkeypatch.setattr(train, "measure_statistics", lambda *args: None)
    models = [run(config(tmp_path / str(micro), f"--micro_batch={micro}", "--steps=1"))["model"]
              for micro in (8, 4)]
    assert not torch.equal(models[0]["bn.running_mean"], torch.zeros(8))
    for key in ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"):
        a, b = (model[key].float() for model in models)
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7), key


def test_non_finite_step_is_skipped_whole(tmp_path, monkeypatch):
    """A NaN in one step leaves weights, statistics, EMA and optimizers as they were; the run goes
    on and counts it."""
    words = ("--save_every=1", "--gan_start=0")
    before = run(config(tmp_path / "run", "--steps=2", *words))
    real, factors = train.reconstruction_loss, iter([float("nan"), 1.0])
    monkeypatch.setattr(train, "reconstruction_loss",
                        lambda x, rec, kind: real(x, rec, kind) * next(factors))
    after = run(config(tmp_path / "run", "--steps=3", *words))
    assert_equal(before, after, skip=("config", "steps", "skipped", *UNREAD))
    assert after["steps"] == 3 and after["skipped"].tolist() == [1, 1]
    end = run(config(tmp_path / "run", "--steps=4", *words))
    assert end["skipped"].tolist() == [1, 0]
    key = "x_embedder.proj.weight"
    assert not torch.equal(end["ema"][key], after["ema"][key])


def test_ten_non_finite_steps_stop_the_run(tmp_path, monkeypatch):
    """A run that only produces NaN stops, says what was not finite, and keeps its checkpoint."""
    run(config(tmp_path / "run", "--steps=2"))
    good = (tmp_path / "run/state.pt").read_bytes()
    steps = []
    monkeypatch.setattr(train, "reconstruction_loss",
                        lambda x, rec, kind: (steps.append(1), rec.sum() * float("nan"))[1])
    with pytest.raises(ValueError, match="ten steps in a row.*l1"):
        run(config(tmp_path / "run", "--steps=30", "--save_every=1000"))
    assert len(steps) == 10 and (tmp_path / "run/state.pt").read_bytes() == good


def test_data_order_is_a_function_of_the_position():
    """Ranks and micro-batches cut one global order; every epoch is a permutation; a late start
    continues it."""
    cfg = replace(Config(), batch=8, micro_batch=2)

    def take(rank, world, first, n):
        it = iter(train.Order(20, cfg, rank, world, first))
        return [i for _ in range(n) for i in next(it)]
    whole = take(0, 1, 0, 20)                                   # 5 steps: two epochs of 20
    assert sorted(whole[:20]) == sorted(whole[20:]) == list(range(20))
    assert whole[:20] != whole[20:]
    halves = [take(rank, 2, 0, 2) for rank in (0, 1)]
    assert halves[0] + halves[1] == whole[:8]
    assert take(0, 1, 3, 8) == whole[24:40]


def test_ema_by_hand():
    """average + (1 - decay) (model - average), counters copied; after a skipped step, nothing."""
    average, model = torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2)
    with torch.no_grad():
        values = [*average.state_dict().values(), *model.state_dict().values()]
        for i, value in enumerate(values):
            value.copy_(torch.arange(i, i + value.numel()).view_as(value))
    before, now = ({key: value.clone() for key, value in net.state_dict().items()}
                   for net in (average, model))
    train.ema_update(average, model, 0.75, torch.tensor(False))
    assert_equal(average.state_dict(), before)
    train.ema_update(average, model, 0.75, torch.tensor(True))
    for name, value in average.state_dict().items():
        floats = value.is_floating_point()
        expected = 0.75 * before[name] + 0.25 * now[name] if floats else now[name]
        assert torch.allclose(value, expected), name
    assert_equal(model.state_dict(), now)


def test_averages_follow_the_networks(tmp_path):
    """The real loop's first step moves both averages by 1 - decay of the networks' own move."""
    cfg = config(tmp_path / "run", "--steps=1", "--ema=0.75", "--vae_ema=0.5")
    nets, _, _ = train.build(cfg, V.open_images(cfg.data, cfg.resolution), None, 1, CPU)
    state = run(cfg)
    for average, own, net, decay in (("ema", "model", nets.sit, 0.75),
                                     ("vae_ema", "vae", nets.vae, 0.5)):
        moved = False
        for name, start in net.named_parameters():
            expected = decay * start.detach() + (1 - decay) * state[own][name]
            assert torch.allclose(state[average][name], expected, rtol=1e-5, atol=1e-7), name
            moved |= not torch.equal(state[average][name], start)
        assert moved


# ---- Checkpoints ----------------------------------------------------------------

SNAPSHOT = {"config", "vae_config", "sit_config", "vae", "vae_ema", "ema", "discriminator", "steps",
            "classes", "data", "images", "versions"}
RESUMING = {"model", "skipped", "opt", "opt_vae", "opt_disc"}


def files_of(out):
    return sorted(path.name for path in Path(out).iterdir() if path.suffix in (".pt", ".tmp"))


def test_what_a_run_writes(tmp_path):
    """state.pt at save_every, the one before it, and snapshots at snapshot_every and at the end:
    the same content without what only resuming needs."""
    out = tmp_path / "run"
    state = run(config(out, "--steps=5", "--save_every=2", "--snapshot_every=3", "--vae_ema=0.9"))
    steps = {"state.prev.pt": 4, "state.pt": 5, "step_0000003.pt": 3, "step_0000005.pt": 5}
    assert files_of(out) == sorted(steps)
    content = {name: torch.load(out / name, weights_only=True) for name in steps}
    for name, file in content.items():
        assert file["steps"] == steps[name]
        assert file.keys() == (SNAPSHOT if "step" in name else SNAPSHOT | RESUMING), name
    snapshot = content["step_0000005.pt"]
    assert_equal(snapshot, {key: state[key] for key in snapshot}, skip=())
    for name in ("step_0000005.pt", "step_0000003.pt", "state.pt", "state.prev.pt"):
        assert sample.find_checkpoint(out).name == name              # the newest that sampling can use
        (out / name).unlink()


@pytest.mark.parametrize("method, absent", [
    ("vae", {"sit_config", "ema", "vae_ema", "model", "opt"}),
    ("sit", {"vae_ema", "discriminator", "opt_vae", "opt_disc"})])
def test_state_holds_what_its_method_has(tmp_path, method, absent):
    """Networks that a method does not have are absent from its files."""
    state = run(config(tmp_path / "run", f"--method={method}", "--steps=1"))
    assert state.keys() == (SNAPSHOT | RESUMING) - absent


def test_a_kill_between_state_and_snapshot_loses_neither(tmp_path, monkeypatch):
    """The state is written first, under another name, so no name ever holds half a file. Where a
    kill came before the snapshot, the run writes it when it goes on."""
    renamed, replace_file = [], os.replace

    def spy(old, new):
        renamed.append((Path(old).name, Path(new).name))
        replace_file(old, new)
    run(config(tmp_path / "run", "--steps=1"))
    monkeypatch.setattr(train.os, "replace", spy)
    run(config(tmp_path / "run", "--steps=2"))
    assert renamed == [("state.pt", "state.prev.pt"), ("state.tmp", "state.pt"),
                       ("step_0000002.tmp", "step_0000002.pt")]

    snapshot = tmp_path / "run/step_0000002.pt"
    whole = torch.load(snapshot, weights_only=True)
    snapshot.unlink()
    renamed.clear()
    run(config(tmp_path / "run", "--steps=2"))
    assert renamed == [("step_0000002.tmp", "step_0000002.pt")]
    assert_equal(whole, torch.load(snapshot, weights_only=True))


def test_a_polite_stop_leaves_a_snapshot(tmp_path):
    """A run that is asked to stop after its second step saves both files of that step."""
    cfg, asked = config(tmp_path / "run"), iter([False, False, True])
    Path(cfg.out).mkdir()
    assert train.run(cfg, 0, 1, CPU, lambda: next(asked)) is False
    assert files_of(cfg.out) == ["state.pt", "step_0000002.pt"] and last(cfg.out)["steps"] == 2


def truncated(data):
    return data[:5000]


def changed(data):
    middle = len(data) // 2
    return data[:middle] + bytes([(data[middle] + 1) % 256]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [truncated, changed])
def test_a_damaged_state_is_left_for_the_one_before(tmp_path, damage):
    """The run says so, goes on from state.prev.pt, and ends with the bits of an undisturbed one.
    With both damaged it ends in one line."""
    out = tmp_path / "run"
    whole = run(config(out))                                    # saves at 3 and at 6
    (out / "state.pt").write_bytes(damage((out / "state.pt").read_bytes()))
    output = said(config(out))
    assert f"state.pt is damaged: resuming from {out / 'state.prev.pt'}\n" in output
    assert f"resuming {out} at step 3" in output
    assert_equal(whole, last(out))
    assert torch.load(out / "state.prev.pt", weights_only=True)["steps"] == 3   # not the damaged one
    for name in ("state.pt", "state.prev.pt"):
        (out / name).write_bytes(damage((out / name).read_bytes()))
    with pytest.raises(ValueError, match=r"state.prev.pt") as caught:
        run(config(out))
    assert "\n" not in str(caught.value)


def test_killed_between_the_renames(tmp_path):
    """A folder without state.pt: the run says so, goes on from state.prev.pt, and ends with the
    bits of an undisturbed one."""
    out = tmp_path / "run"
    whole = run(config(tmp_path / "whole"))
    run(config(out, "--steps=3"))
    (out / "state.pt").rename(out / "state.prev.pt")
    (out / "state.tmp").write_bytes(b"of the killed process")
    output = said(config(out))
    assert f"state.pt is missing: resuming from {out / 'state.prev.pt'}\n" in output
    assert f"resuming {out} at step 3" in output
    assert_equal(whole, last(out))
    assert files_of(out) == ["state.prev.pt", "state.pt", "step_0000003.pt", "step_0000006.pt"]


def test_another_architecture_is_refused(tmp_path):
    """A run that is continued under another architecture ends in one line."""
    run(config(tmp_path / "r", "--steps=3"))
    with pytest.raises(ValueError, match="sit was '2-32-2/2', is '3-32-2/2'"):
        run(config(tmp_path / "r", "--sit=3-32-2/2"))


# ---- Real data, DINOv2, starts --------------------------------------------------

def make_tree(root):
    """Three classes of odd-sized files in the formats that people have."""
    rng = np.random.default_rng(0)
    modes = [("RGB", "png"), ("RGB", "jpg"), ("L", "png"), ("CMYK", "jpg"), ("RGBA", "png"),
             ("L", "jpg")]
    for c, name in enumerate(("ant", "bee", "cat")):
        (root / name).mkdir(parents=True)
        for i, (mode, suffix) in enumerate(modes):
            shape = (37 + 11 * i, 83 - 7 * c, len(mode))
            pixels = rng.integers(0, 256, shape, np.uint8).squeeze()
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
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        return {"x_norm_patchtokens": tokens}


def dinov2_vitb14(pretrained=True, **kwargs):
    torch.manual_seed(0)
    return Net()
'''


def test_real_folder_dinov2_lpips_off(tmp_path):
    """A joint run on PNG, JPEG, grey, CMYK and RGBA files, workers, DINOv2 from a local hub repo;
    sampling by name."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text(DINO_STAND_IN)
    words = ("--preset=tiny --resolution=64 --sit=2-32-2/4 --align_depth=1 --teacher=dinov2_vitb14 "
             "--first_stage=0 --steps=2 --batch=4 --workers=2 --projector_width=32 "
             "--preview_steps=2").split()
    execute(*words, f"--data={make_tree(tmp_path / 'images')}",
            f"--teacher_repo={tmp_path / 'hub'}", f"--out={tmp_path / 'run'}")
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"samples_0000002.png", "reconstructions_0000002.png", "metrics.jsonl"} <= written
    words = ["--classes=bee,cat", "--count=3", "--steps=3", f"--out={tmp_path / 'g.png'}"]
    done = python("sample.py", str(tmp_path / "run"), *words)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "g.png").size[0] >= 128


def test_any_patch_fits_the_teacher(tmp_path):
    """8 x 8 tokens of 32 px: the teacher, which sees 4 x 4 there, enlarges the image to match."""
    cfg = config(tmp_path / "run", "--sit=2-32-2/1", "--steps=1")
    data = V.open_images(cfg.data, cfg.resolution)
    nets, _, _ = train.build(cfg, data, None, 1, CPU)
    assert nets.sit.grid == 8 and nets.teacher(V.fetch(data, [0, 1])[0]).shape == (2, 64, 64)
    assert run(cfg)["sit_config"]["patch"] == 1
    line, = losses(cfg.out)
    assert -1 < line["align_vae"] < 1 and -1 < line["align_sit"] < 1 and line["skipped"] == 0


def test_vae_and_init_from_a_checkpoint(tmp_path):
    """--vae=RUN takes VAE, latents' statistics and discriminator; --init=RUN also SiT, for other
    classes."""
    first = run(config(tmp_path / "a", "--steps=2"))
    vae, stats, disc = sample.load_vae(str(tmp_path / "a"))
    assert torch.equal(stats[0], first["ema"]["bn.running_mean"])
    assert_equal(disc, first["discriminator"])
    assert_equal(vae.state_dict(), first["vae"])
    second = run(config(tmp_path / "b", f"--vae={tmp_path / 'a'}", "--method=repa", "--steps=1"))
    assert_equal(second["vae"], first["vae"])
    assert torch.equal(second["ema"]["bn.running_var"], first["ema"]["bn.running_var"])
    make_tree(tmp_path / "images")
    words = (f"--data={tmp_path / 'images'}", "--align_sit=0", "--align_vae=0", "--workers=0",
             "--lr_sit=1e-12", "--batch=2", "--steps=1")
    third = run(config(tmp_path / "c", f"--init={tmp_path / 'a'}", *words))
    assert third["ema"]["y_embedder.embedding_table.weight"].shape[0] == 4
    key = "blocks.0.attn.qkv.weight"
    assert torch.allclose(third["ema"][key], first["ema"][key])
    run(config(tmp_path / "vae", "--method=vae", "--steps=1"))
    with pytest.raises(ValueError, match="holds no SiT: for its VAE alone use --vae="):
        run(config(tmp_path / "d", f"--init={tmp_path / 'vae'}", *words))


def test_packed_training_equals_folder_training(tmp_path):
    """A pack takes the folder's place: the same batches, so the same weights bit by bit."""
    make_tree(tmp_path / "images")
    train.pack(str(tmp_path / "images"), str(tmp_path / "packed"), 32)
    words = ("--align_sit=0", "--align_vae=0", "--steps=2", "--batch=4", "--workers=1")
    folder, packed = (run(config(tmp_path / f"run-{name}", f"--data={tmp_path / name}", *words))
                      for name in ("images", "packed"))
    assert_equal(folder, packed)


@pytest.mark.parametrize("method", ["repa", "sit"])
def test_cache_equals_encoding_on_the_fly(tmp_path, monkeypatch, method):
    """The second stage: a frozen VAE's cached latents, with the posterior's noise of the step,
    give the losses that encoding gives, within float16's rounding, and the same change of the
    weights. Another VAE's cache, or a resume with another VAE, is refused."""
    run(config(tmp_path / "vae", "--method=vae", "--steps=3", "--lr_vae=1e-2"))
    train.pack(str(make_tree(tmp_path / "images")), str(tmp_path / "packed"), 32)
    data = {"repa": "tiny", "sit": str(tmp_path / "packed")}[method]
    monkeypatch.setattr(V.Shapes.__init__, "__defaults__", (32, 40, 0))     # 40 images are enough
    train.encode(str(tmp_path / "vae"), data, str(tmp_path / "cache"), 32)
    frozen_vae = [f"--vae={tmp_path / 'vae'}", f"--data={data}", f"--method={method}", "--steps=3",
                  "--log_every=1", "--batch=4", "--workers=0"]
    cached = [*frozen_vae, f"--latents={tmp_path / 'cache'}"]
    encoded = run(config(tmp_path / "a", *frozen_vae))
    read = run(config(tmp_path / "b", *cached))
    for a, b in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
        assert a == pytest.approx(b, rel=2e-3) and a["v"] != 0
    assert_equal(encoded["vae"], read["vae"])
    # AdamW divides a gradient by its own size: where it is nearly 0, float16's rounding turns a
    # whole step. So what is compared is the weights' change as a whole.
    start = run(config(tmp_path / "start", *frozen_vae, "--lr_sit=1e-12"))["model"]
    changes = [torch.cat([(state["model"][key] - start[key]).flatten() for key in start
                          if key.startswith("blocks")]) for state in (encoded, read)]
    assert (changes[0] - changes[1]).norm() < 0.02 * changes[0].norm()
    run(config(tmp_path / "other", "--method=vae", "--steps=1", "--seed=5"))
    with pytest.raises(ValueError, match="cache of another VAE"):
        run(config(tmp_path / "c", *cached, f"--vae={tmp_path / 'other'}"))
    with pytest.raises(ValueError, match="vae was .*other"):
        run(config(tmp_path / "b", *cached, f"--vae={tmp_path / 'other'}"))
    assert "--latents is for a frozen VAE" in problems(config("x", "--latents=cache"), 1)[0]
    assert "flipped" in problems(config("x", *cached, "--hflip=1"), 1)[0]


def test_sd3_and_flux_shaped_vaes_train_jointly(tmp_path):
    """f8d16 (16 channels, no quant convs) goes through the whole joint step, and its gradients
    reach the encoder."""
    before = sample.load_vae("f8d16")[0].state_dict()
    torch.save(before, tmp_path / "flux.pt")
    state = run(config(tmp_path / "run", f"--vae={tmp_path / 'flux.pt'}", "--sit=2-32-2/1",
                       "--batch=2", "--steps=1", "--gan_start=0"))
    assert state["sit_config"]["channels"] == 16 and state["vae_config"]["quant_conv"] is False
    key = "encoder.conv_in.weight"
    assert not torch.equal(state["vae"][key], before[key])
    line, = losses(tmp_path / "run")
    assert all(np.isfinite(value) for value in line.values())
    assert {"align_vae", "v", "disc", "gan"} <= line.keys()


def terms_of(monkeypatch):
    """Records the names of each step's logged terms."""
    seen, add = [], train.Log.add

    def spy(log, ok, terms):
        seen.append(set(terms))
        add(log, ok, terms)
    monkeypatch.setattr(train.Log, "add", spy)
    return seen


def test_the_discriminator_learns_before_the_vae_hears_it(tmp_path, monkeypatch):
    """--gan_start: D learns from 2,000 steps before; without an option 0 with a discriminator's
    file, else 2,000."""
    run(config(tmp_path / "a", "--method=vae", "--gan=0", "--steps=1"))
    run(config(tmp_path / "b", "--method=vae", "--gan_start=0", "--steps=1"))
    seen = terms_of(monkeypatch)
    state = run(config(tmp_path / "c", f"--vae={tmp_path / 'a'}", "--steps=2"))
    assert all("disc" in terms and "gan" not in terms for terms in seen)
    assert state["config"]["gan_start"] == 2000
    run(config(tmp_path / "c", f"--vae={tmp_path / 'a'}", "--steps=3"))
    assert "gan" not in seen[-1]                # resumed: D is of no file, still 2,000
    state = run(config(tmp_path / "d", f"--vae={tmp_path / 'b'}", "--steps=1"))
    assert {"disc", "gan"} <= seen[-1] and state["config"]["gan_start"] == 0
    run(config(tmp_path / "e", f"--vae={tmp_path / 'a'}", "--gan_start=2001", "--steps=2"))
    assert "disc" not in seen[-2] and "disc" in seen[-1]


def test_first_stage_joins_the_joint_run(tmp_path):
    """--first_stage trains the VAE alone, the GAN joining half-way; the joint run starts from it,
    statistics measured; a rerun adds nothing, even one that was killed between two renames."""
    out = tmp_path / "r"
    words = [*SMALL, f"--out={out}", "--first_stage=2", "--steps=2", "--save_every=2"]
    execute(*words)
    stage, joint = last(out / "first-stage"), last(out)
    assert "ema" not in stage and stage["config"]["method"] == "vae" and stage["steps"] == 2
    assert stage["config"]["gan_start"] == 1
    assert joint["config"]["vae"].endswith("first-stage")
    assert not torch.allclose(joint["ema"]["bn.running_var"], torch.tensor(1.0))
    (out / "state.pt").rename(out / "state.prev.pt")
    again = execute(*words)
    assert f"resuming {out} at step 2" in again.stdout and "first-stage at" not in again.stdout
    assert len(losses(out / "first-stage")) == 1 and len(losses(out)) == 1


# ---- torch.compile, and silent steps --------------------------------------------

def test_compiled_step_equals_eager_and_never_recompiles(tmp_path):
    """The joint step under torch.compile (with activations computed again in the backward) follows
    the eager one, its graphs have no breaks, and steps 2 to 5 compile nothing."""
    code = ("import sys, pathlib, torch, train\n"
            "from torch._dynamo.utils import counters\n"
            "cfg = train.parse(train.Config, sys.argv[1:], train.PRESETS)\n"
            "pathlib.Path(cfg.out).mkdir()\n"
            "n, real = [], train.draws\n"
            "def draws(*args):\n"
            "    n.append(counters['stats']['unique_graphs'])\n"
            "    return real(*args)\n"
            "train.draws = draws\n"
            "train.run(cfg, 0, 1, torch.device('cpu'))\n"
            "print('graphs', *n)\n"
            "print('breaks', sum(counters['graph_break'].values()))\n")
    words = ["--save_every=6", "--gan_adaptive=1", "--gan_start=0"]
    eager = run(config(tmp_path / "eager", *words))
    done = python("-c", code, *SMALL, *words, f"--out={tmp_path / 'fast'}", "--compile=1",
                  "--recompute=1", timeout=600)
    assert done.returncode == 0, done.stderr
    graphs = [int(n) for n in re.search(r"graphs (.*)", done.stdout)[1].split()]
    graphs = graphs[-6:]                                        # before each of the six steps
    assert graphs[0] == 0 < graphs[1] and len(set(graphs[2:])) == 1, graphs
    assert "breaks 0" in done.stdout, done.stdout
    fast = last(tmp_path / "fast")
    assert flatten(fast).keys() == flatten(eager).keys()        # no _orig_mod. in names
    a, b = (losses(tmp_path / name)[0] for name in ("eager", "fast"))
    for key in ("vae", "gan", "disc", "sit", "norm_vae", "norm_disc", "norm_sit"):
        assert a[key] == pytest.approx(b[key], rel=2e-3), key


WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__",
         "nonzero")


class HostReads(TorchDispatchMode):
    """Records, by step, the lines of train.py that make the host wait for the device: reads of a
    tensor's value. On a CPU nothing waits, but the calls are the same ones. Getting the data
    (inside Log.timed) is the host's own work."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found, self.step, self.reading = [], "before", False
        for name in WAITS:
            monkeypatch.setattr(torch.Tensor, name, self.recording(getattr(torch.Tensor, name)))
        draws, timed = train.draws, train.Log.timed

        def step_begins(cfg, step, rank, world, latent, device, purpose="step"):
            self.step = step if purpose == "step" else "before"
            return draws(cfg, step, rank, world, latent, device, purpose)

        def data(log, batches):
            batches = timed(log, batches)
            while True:
                self.reading = True
                batch = next(batches)
                self.reading = False
                yield batch
        monkeypatch.setattr(train, "draws", step_begins)
        monkeypatch.setattr(train.Log, "timed", data)

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
        name = func._schema.name
        by_mask = name in ("aten::index", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1])
        reads = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        if by_mask or name in reads:
            self.record()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("extra", [
    ("--vae_ema=0.9",), ("--gan_adaptive=1", "--hflip=1"), ("--method=repa",), ("--method=naive",),
    ("--batch=8", "--micro_batch=4")])
def test_silent_steps_never_wait_for_the_device(tmp_path, monkeypatch, extra):
    """Between two log lines nothing reads a value from the device, but a CPU's own check (see
    `device.type`)."""
    cfg = config(tmp_path / "run", "--steps=8", "--log_every=4", "--save_every=100",
                 "--gan_start=0", *extra)
    with HostReads(monkeypatch) as reads:
        run(cfg)
    silent = {line for step, _, line in reads.found if step in (1, 2, 4, 5, 6)}
    assert silent <= {'if (printing or device.type == "cpu") and skipped[1] >= 10:'}
    assert any(step == 3 for step, _, _ in reads.found)         # the line that is printed is read


@pytest.mark.parametrize("read", [
    lambda x: x.item(), lambda x: bool(x), lambda x: x.reshape(1)[x.reshape(1) > 0]])
def test_a_read_in_the_step_is_found(tmp_path, monkeypatch, read):
    """HostReads sees what it looks for, by each of the ways to read a value."""
    finite = train.all_finite
    monkeypatch.setattr(train, "all_finite", lambda *values: (read(values[0]), finite(*values))[1])
    with HostReads(monkeypatch) as reads:
        run(config(tmp_path / "run", "--steps=3", "--log_every=3", "--save_every=100"))
    lines = [line for step, _, line in reads.found if step == 1]
    assert lines[0].startswith("ok = all_finite"), reads.found


# ---- Settings and mistakes ------------------------------------------------------

def test_paper_settings_are_the_defaults():
    """No argument is the paper's run; every preset passes the checks; REPA's preset composes with
    tiny."""
    cfg = Config()
    assert (cfg.method, cfg.batch, cfg.steps, cfg.lr_sit, cfg.lr_vae) == (
        "repa-e", 256, 400_000, 1e-4, 1e-4)
    assert (cfg.ema, cfg.align_sit, cfg.align_vae, cfg.kl, cfg.gan) == (
        0.9999, 0.5, 1.5, 1e-6, 0.1)
    assert train.architecture(cfg) == (28, 1152, 16, 2, 8)
    for name in PRESETS:
        assert problems(parse(Config, [f"--preset={name}"], PRESETS), 8) == [], name
    both = parse(Config, ["--steps=7", "--preset=tiny,repa"], PRESETS)
    assert (both.vae, both.method, both.steps, both.out) == ("tiny", "repa", 7, "runs/repa")


@pytest.mark.parametrize("method, statistics", [
    ("repa-e", True), ("naive", True), ("repa", False), ("sit", False), ("vae", False)])
def test_bn_follows_the_latents_where_these_move_under_a_sit(method, statistics):
    """--latent_norm=auto by method; fixed always holds; batch is refused where it has no effect."""
    cfg = replace(Config(), method=method)
    assert cfg.batch_statistics is statistics
    assert replace(cfg, latent_norm="fixed").batch_statistics is False
    assert (problems(replace(cfg, latent_norm="batch"), 1) == []) is statistics


@pytest.mark.parametrize("words, message", [
    (["--lr_sti=1"], "did you mean --lr_sit"),
    (["--steps=many"], "argument --steps: invalid int value: 'many'"),
    (["--lr_sit"], "argument --lr_sit: expected one argument"),
    (["--preset=tiney"], "did you mean tiny"),
    (["--method=repae"], "did you mean repa-e"),
    (["--batch=0"], "must be positive"),
    (["--gan_start=-2"], "must be at least -1"),
    (["--sit=SiT-XXL/2"], "unknown SiT"),
    (["--teacher=dinov3"], "did you mean"),
    (["--method=repa", "--latent_norm=batch"], "--method=repa moves no latents under a SiT"),
    (["--align_sit=0"], "--align_vae needs --align_sit"),
    (["--preset=tiny", "--resolution=30"], "no multiple of"),
    (["--preset=tiny", "--align_depth=9"], "deeper than"),
    (["--preset=tiny", "--micro_batch=5"], "try 4"),
    (["--data=/nowhere", "--vae=f8d4"], "no data folder"),
    (["--preset=tiny", "--first_stage=0", "--vae=/nowhere.pt"], "no file at"),
    (["--preset=tiny", "--out=/proc/x"], "cannot write"),
    (["--preset=tiny", "--data=FOLDER/ant"], "--teacher=tiny learns from labels"),
    (["--preset=tiny", "--first_stage=0", "--teacher=dinov2_vitb14", "--resolution=64",
      "--sit=3-32-2/4", "--data=FOLDER", "--teacher_repo=/nowhere"], "--teacher_repo=DIR"),
    (["--preset=tiny", "--method=vae", "--lpips=1"], "vgg16-397923af.pth"),
])
def test_mistakes_end_in_one_line_and_code_2(tmp_path, words, message):
    """The user's mistakes: one line that says what to do, exit code 2, no traceback, before
    anything is trained."""
    if any("FOLDER" in word for word in words):
        tree = make_tree(tmp_path / "images")
        words = [word.replace("FOLDER", str(tree)) for word in words]
    if not words[-1].startswith("--out"):
        words = [*words, f"--out={tmp_path / 'run'}"]
    env = [("TORCH_HOME", str(tmp_path))] if "--lpips=1" in words else []
    done = execute(*words, ok=False, env=env)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and message in lines[-1], done.stderr
    assert lines[-1].startswith("error:") and "Traceback" not in done.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_batch_must_divide_over_the_processes():
    """The message names the batches that would do."""
    assert "try 248 or 256" in problems(replace(Config(), batch=250), 8)[0]
