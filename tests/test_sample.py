"""Solvers on a velocity known in closed form, guidance, options, and sample.py from a checkpoint
to files.

    python -m pytest tests/test_sample.py
"""
import math
import os
import socket
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

import sample as P
from sit import SiT, SiTConfig, interpolant
from vae import VAE, VAEConfig, to_uint8

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ["disc", "ring", "star"]
M, STD = 0.7, 0.4               # the Gaussian that the analytic velocity leads to


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def coefficients(t, path):
    """alpha, sigma, d_alpha, d_sigma at time t, as numbers."""
    return [float(x) for x in interpolant(torch.tensor(t, dtype=torch.float64), path)]


def gaussian(path, calls=None):
    """E[v | z_t = z] for data N(M, STD^2). Its ODE keeps (z - alpha M) / std_t: z at t = 0 is
    M + STD z at t = 1."""
    def velocity(z, t):
        if calls is not None:
            calls.append(t)
        alpha, sigma, d_alpha, d_sigma = coefficients(t, path)
        var = alpha**2 * STD**2 + sigma**2
        slope = (d_alpha * alpha * STD**2 + d_sigma * sigma) / var
        return d_alpha * M + slope * (z - alpha * M)
    return velocity


def randomise(sit):
    """All weights random (a new SiT's velocity is 0), and statistics that are not 0 and 1."""
    for i, p in enumerate(sit.parameters()):
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(i))
    sit.bn.load_stats(torch.tensor([1.0, 0, -1, 0.5]), torch.tensor([1.0, 2, 0.5, 1]))


def checkpoint(path, sit=True, **more):
    """A small checkpoint as train.py writes it."""
    vae_config = VAEConfig(z_channels=4, ch=8, ch_mult=(1, 2), num_res_blocks=1, groups=4, patch=2)
    sit_config = SiTConfig(2, 24, 3, 2, 4, 4, len(CLASSES), (), 1)
    torch.manual_seed(0)
    vae, net = VAE(vae_config), SiT(sit_config)
    randomise(net)
    file = {"vae": vae.state_dict(), "vae_config": asdict(vae_config), "config": {},
            "classes": CLASSES, "steps": 7}
    if sit:
        file |= {"ema": net.state_dict(), "sit_config": asdict(sit_config)}
    torch.save(file | more, path)
    return vae, net


def published(path, sit_only=False, **more):
    """The same as the authors save it, weights without a configuration of ours, of nets whose
    shapes tell theirs."""
    vae = VAE(VAEConfig(z_channels=4, ch=32, ch_mult=(1, 2), num_res_blocks=1))
    sit = SiT(SiTConfig(2, 64, 1, 2, 4, 4, 3, (6,), 1, 8))
    randomise(sit)
    nets = {"vae": vae.state_dict(), "discriminator": {"main.0.weight": torch.zeros(1)},
            "opt_vae": {}, "opt_disc": {}}
    args = Namespace(model="SiT-XL/2", encoder_depth=1, path_type="linear", cfg_prob=0.1,
                     vae_ckpt=None, batch_size=256)
    file = {"model": {}, "ema": sit.state_dict(), "args": args, "steps": 400_000,
            "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]}}
    torch.save(file | ({} if sit_only else nets) | more, path)
    return vae, sit, file


def levels(a, b):
    """The largest difference of two arrays of pixels, in grey levels."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


# ---- Solvers --------------------------------------------------------------------

@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("name, order, calls", [("euler", 1, 80), ("heun", 2, 159), ("ab2", 2, 80)])
def test_order_of_convergence(name, order, calls, path):
    """Halving the step divides the error by 2 (euler) or 4 (heun, ab2); steps says how many
    network calls."""
    z, solve, seen = noise(50), P.SOLVERS[name], []
    exact = M + STD * z
    errors = [(solve(gaussian(path), z, n) - exact).abs().max().item() for n in (40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)
    assert errors[1] < 0.03
    solve(gaussian(path, seen), z, 80)
    assert len(seen) == calls and seen[0] == 1 and min(seen) > 0
    assert seen == sorted(seen, reverse=True)


def test_solvers_by_hand():
    """One or two steps each, from the definition: dz/dt = t z from t = 1 to 0."""
    z = torch.tensor([1.0], dtype=torch.float64)

    def velocity(z, t):
        return t * z
    assert P.euler(velocity, z, 1).item() == 0
    assert P.euler(velocity, z, 2).item() == pytest.approx(0.5 * 0.75)
    heun = 1 - 0.25 * (1 + 0.5 * 0.5)                               # then Euler: 1/2 of 1/2
    assert P.heun(velocity, z, 2).item() == pytest.approx(heun * 0.75)
    ab2 = 0.5 - 0.5 * (1.5 * 0.5 * 0.5 - 0.5 * 1)
    assert P.ab2(velocity, z, 2).item() == pytest.approx(ab2)


def test_solvers_have_one_signature():
    """Each solver takes noise and the interpolant: the pipeline passes them to whichever was
    chosen, and the deterministic ones draw nothing."""
    def draw():
        raise AssertionError("a draw")
    z, velocity = noise(6), gaussian("cosine")
    for name, solve in P.SOLVERS.items():
        if name == "sde":
            with pytest.raises(AssertionError, match="a draw"):
                solve(velocity, z, 5, draw, "cosine")
        else:
            assert torch.equal(solve(velocity, z, 5, draw, "cosine"), solve(velocity, z, 5))


def moments(path, steps, t_last):
    """Mean and std that the reverse SDE's Euler steps have from N(0, 1), each step being affine in
    z: by recursion."""
    times, mean, var = [*np.linspace(1, t_last, steps), 0.0], 0.0, 1.0
    for t, t_next in zip(times, times[1:]):
        alpha, sigma, d_alpha, d_sigma = coefficients(t, path)
        var_t, dt = alpha**2 * STD**2 + sigma**2, t_next - t
        # of v - w/2 score, w(t) = 2t
        slope = (d_alpha * alpha * STD**2 + d_sigma * sigma) / var_t + t / var_t
        mean = mean + dt * (d_alpha * M + slope * (mean - alpha * M))
        var = var * (1 + dt * slope) ** 2 + (2 * t * -dt if t_next else 0)
    return mean, math.sqrt(var)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("steps, t_last", [(50, 0.04), (500, 0.002)])
def test_sde(path, steps, t_last):
    """Euler-Maruyama's samples have the moments of its definition, and with a small last step
    those of the data."""
    n, g, seen = 40_000, torch.Generator().manual_seed(0), []

    def draw():
        return torch.randn(n, generator=g, dtype=torch.float64)
    z = P.euler_maruyama(gaussian(path, seen), draw(), steps, draw, path, t_last)
    assert len(seen) == steps and seen[0] == 1 and seen[-1] == pytest.approx(t_last)
    mean, std = moments(path, steps, t_last)
    assert abs(z.mean() - mean) < 4 * STD / n**0.5
    assert abs(z.std() / std - 1) < 4 / (2 * n) ** 0.5
    if t_last < 0.01:
        assert mean == pytest.approx(M, abs=0.002) and std == pytest.approx(STD, rel=0.003)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_sde_by_hand(path):
    """Published steps: t from 1 to 0.04, drift v - w/2 score, noise sqrt(w dt), w(t) = 2t; the last
    without noise."""
    draws, z = [noise(6, seed=i) for i in range(4)], noise(6, seed=9)
    unused = iter(draws)
    result = P.euler_maruyama(gaussian(path), z, 5, lambda: next(unused), path)
    assert not list(unused)                                         # four draws for five steps
    times, a = [1, 0.76, 0.52, 0.28, 0.04, 0], math.pi / 2
    for t, t_next, eps in zip(times, times[1:], [*draws, torch.zeros(6)]):
        alpha, sigma = (1 - t, t) if path == "linear" else (math.cos(a * t), math.sin(a * t))
        score = -(z - alpha * M) / (alpha**2 * STD**2 + sigma**2)
        drift = gaussian(path)(z, t) - t * score
        z = z - (t - t_next) * drift + math.sqrt(2 * t * (t - t_next)) * eps
    assert torch.allclose(result, z, atol=1e-10)


# ---- Guidance -------------------------------------------------------------------

class Shown:
    """In place of a SiT: a velocity that shows what it was asked, and how often."""
    cfg = Namespace(num_classes=10)

    def __init__(self):
        self.sizes = []

    def __call__(self, z, t, y):
        self.sizes.append(len(z))
        assert z.dtype == t.dtype == torch.float32
        return z * t[:, None] + y[:, None], []


@pytest.mark.parametrize("scale, t, calls", [
    (2.5, 0.5, [4]), (2.5, 0.25, [4]), (2.5, 0.75, [4]), (2.5, 0.2, [2]), (2.5, 0.8, [2]),
    (1.0, 0.5, [2]), (0.0, 0.5, [4]), (0.5, 0.5, [4])])
def test_guided(scale, t, calls):
    """Inside the interval, ends too, v_null + scale (v_y - v_null) in one call of 2B; outside, or
    where the scale switches guidance off, v_y in one call of B."""
    sit, y, z = Shown(), torch.tensor([3, 4]), noise(2, 5)
    v = P.guided(sit, y, scale, 0.25, 0.75)(z, t)
    label = 10 + scale * (y - 10) if calls == [4] else y
    assert sit.sizes == calls and v.dtype == torch.float64
    assert torch.allclose(v, z * t + label[:, None], atol=1e-5)


# ---- The pipeline ---------------------------------------------------------------

def test_pipeline_in_two_lines(tmp_path):
    """Image i is a function of (seed, i, label, settings): not of the batch, of a call's start, or
    of other dice."""
    checkpoint(tmp_path / "m.pt")
    model = P.load_pipeline(tmp_path / "m.pt")
    labels = [0, 1, 2, 0, 1, 2, 0]
    for solver in P.SOLVERS:
        options = dict(steps=4, solver=solver, guidance=2.0, high=0.8)
        whole = model(labels, **options)
        assert whole.dtype == torch.uint8 and whole.shape == (7, 3, 16, 16)
        assert whole.float().std() > 5
        torch.manual_seed(99)
        before = torch.get_rng_state()
        assert levels(model(labels, batch=3, **options), whole) <= 1
        assert levels(model(labels[4:], first=4, **options), whole[4:]) <= 1
        assert levels(model(labels[:1], **options), whole[:1]) <= 1
        assert torch.equal(torch.get_rng_state(), before)
        assert levels(model(labels, seed=1, **options), whole) > 10
        assert levels(whole[0], whole[3]) > 10
        # the label and guidance matter
        assert levels(model([1] * 7, **options)[0], whole[0]) > 1
        assert levels(model(labels, steps=4, solver=solver), whole) > 1


def test_compiled_blocks_give_the_same_images(tmp_path, monkeypatch):
    """prepare, told that this is a GPU: the same images, also of a smaller last batch. On a CPU it
    changes nothing."""
    checkpoint(tmp_path / "m.pt")
    model, labels = P.load_pipeline(tmp_path / "m.pt"), [0, 1, 2, 0, 1]
    options = dict(steps=4, guidance=2.0, high=0.8, batch=3)

    def compiled():
        return [block._compiled_call_impl is not None for block in model.sit.blocks]
    eager = model(labels, **options)
    assert model.prepare(10**6) is model and not any(compiled())
    assert model.sit.final_layer.linear.weight.dtype == torch.float32
    monkeypatch.setattr(P, "can_compile", lambda device: True)
    model.prepare(999)
    assert not any(compiled())
    model.prepare(1000)
    assert all(compiled())
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    assert levels(model(labels, **options), eager) <= 1 and eager.float().std() > 5
    assert 0 < counted["unique_graphs"] - before <= 4               # batches of 3 and 2, and twice


def test_pipeline_by_hand(tmp_path):
    """What is decoded: the EMA SiT's velocity, bn's statistics undone, the averaged VAE if any."""
    plain, sit = checkpoint(tmp_path / "m.pt")
    other = VAE(plain.cfg)
    checkpoint(tmp_path / "averaged.pt", vae_ema=other.state_dict())
    generator = torch.Generator().manual_seed(P.seed_of(5, "image", 0))
    eps = torch.randn(4, 4, 4, generator=generator)[None].double()

    def velocity(z, t):
        return sit(z.float(), torch.tensor([t]).float(), torch.tensor([1]))[0]
    with torch.no_grad():
        zn = P.euler(velocity, eps, 3)
        std = (sit.bn.running_var + 1e-4).sqrt()
        z = zn * std[:, None, None] + sit.bn.running_mean[:, None, None]
        for name, vae in (("m.pt", plain), ("averaged.pt", other)):
            model = P.load_pipeline(tmp_path / name)
            images = model([1], steps=3, solver="euler", seed=5)
            assert levels(images, to_uint8(vae.decode(z.float()))) <= 1
            assert model.step == 7 and model.classes == CLASSES
            assert not model.vae.training and not model.sit.training


def test_run_without_snapshots(tmp_path):
    """A run that was killed before its first snapshot is sampled from its state; what only the
    run needs in there does not matter."""
    checkpoint(tmp_path / "m.pt")
    expected = P.load_pipeline(tmp_path / "m.pt")([0, 2], steps=3)
    assert expected.float().std() > 5
    (tmp_path / "run").mkdir()
    more = {"model": {}, "skipped": torch.zeros(2), "opt": {}, "opt_vae": {}, "opt_disc": {}}
    for name, step in (("state.prev.pt", 5), ("state.pt", 9)):
        checkpoint(tmp_path / "run" / name, steps=step, **more)
        model = P.load_pipeline(tmp_path / "run")
        assert model.step == step and torch.equal(model([0, 2], steps=3), expected)


def test_published_checkpoint(tmp_path):
    """The authors' files play as ours: the same networks, written in either format, give the same
    images."""
    vae, sit, _ = published(tmp_path / "0400000.pt")
    checkpoint(tmp_path / "step_0000007.pt", vae=vae.state_dict(), vae_config=asdict(vae.cfg),
               ema=sit.state_dict(), sit_config=asdict(sit.cfg))
    theirs, ours = (P.load_pipeline(tmp_path / name) for name in ("0400000.pt", "step_0000007.pt"))
    assert theirs.sit.cfg == sit.cfg and theirs.vae.cfg == vae.cfg and not theirs.vae.training
    assert theirs.classes == ["0", "1", "2"] and theirs.step == 400_000 and theirs.config == {}
    assert len(sit.projectors) == 1 and not theirs.sit.projectors and not ours.sit.projectors
    options = dict(steps=3, guidance=2.0)
    images = ours([0, 2], **options)
    assert torch.equal(theirs([0, 2], **options), images) and images.float().std() > 5


def test_checkpoint_without_a_vae(tmp_path):
    """REPA's and frozen-VAE runs need --vae; statistics are the SiT's own, or REPA's 0.18215; else
    --vae wins."""
    vae, sit, file = published(tmp_path / "ldm.pt", sit_only=True)
    bare = {key: value for key, value in file["ema"].items() if not key.startswith("bn.")}
    torch.save(bare, tmp_path / "repa.pt")
    small, _ = checkpoint(tmp_path / "ours.pt")
    other = VAE(VAEConfig(z_channels=8, ch=32, ch_mult=(1, 2), num_res_blocks=1))
    torch.save(other.state_dict(), tmp_path / "other.pt")
    torch.save(vae.state_dict(), tmp_path / "vae.pt")
    name, wide = str(tmp_path / "vae.pt"), str(tmp_path / "other.pt")
    own_std, repas_std = (sit.bn.running_var + 1e-4).sqrt(), torch.full((4,), 1 / 0.18215)
    z = torch.ones(1, 4, 4, 4)
    for path, std in (("ldm.pt", own_std), ("repa.pt", repas_std)):
        for wrong, message in (("", "holds no VAE: name one with --vae="), ("f8d4", "untrained"),
                               (wide, "8 channels, the SiT of 4")):
            with pytest.raises(ValueError, match=message):
                P.load_pipeline(tmp_path / path, vae=wrong)
        model = P.load_pipeline(tmp_path / path, vae=name)
        assert torch.equal(model.vae.decode(z), vae.decode(z))
        bn = model.sit.bn
        ends = [bn.inverse(torch.full((1, 4, 1, 1), x)).flatten() for x in (0.0, 1.0)]
        assert torch.allclose(ends[1] - ends[0], std, rtol=1e-6)
        assert model([0, 1], steps=2).shape == (2, 3, 8, 8)
    assert torch.equal(P.load_pipeline(tmp_path / "ours.pt").vae.decode(z), small.decode(z))
    replaced = P.load_pipeline(tmp_path / "ours.pt", vae=name)
    assert torch.equal(replaced.vae.decode(z), vae.decode(z))


class Malicious:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_damaged_checkpoints(tmp_path):
    """A missing, an extra and a misshapen weight are named in one line, with the file, whatever its
    layout; a file that would execute something is not executed."""
    path, executed, vae = tmp_path / "x.pt", tmp_path / "executed", tmp_path / "vae.pt"
    net, _, file = published(path)
    torch.save(net.state_dict(), vae)
    state = file["ema"]
    name, extra = "blocks.1.mlp.fc1.bias", "blocks.1.mlp.fc3.bias"
    without = {key: value for key, value in state.items() if key != name}
    cases = [({**file, "ema": wrong}, words)
             for wrong, words in ((without, [name]), (state | {extra: torch.zeros(1)}, [extra]),
                                  (state | {name: torch.zeros(9)}, [name, "9", "256"]))]
    cases += [(form, words) for content, words in cases
              for form in ({"ema": content["ema"]}, content["ema"])]
    cases += [(file | {"args": Malicious(executed)}, [])]
    for content, words in cases:
        torch.save(content, path)
        with pytest.raises(ValueError) as caught:
            P.load_pipeline(path, vae=str(vae))
        text = str(caught.value)
        assert str(path) in text and "\n" not in text and all(word in text for word in words)
    assert not executed.exists()
    torch.load(path, weights_only=False)                # what a careless reader would have done
    assert executed.exists()


# ---- Random numbers and labels --------------------------------------------------

def test_seeds():
    """Seeds fit the 32 bits that CPU generators use, and differ between images, seeds, streams."""
    seeds = {P.seed_of(seed, stream, i)
             for seed in range(5) for stream in ("image", "align") for i in range(1000)}
    assert len(seeds) == 10_000 and all(0 <= s < 2**32 for s in seeds)
    assert 0 <= P.seed_of(0, "image", 2**32 - 1) < 2**32


def test_streams_keep_their_numbers():
    """A stream's number makes its seeds: if another were put before it, all images would change."""
    numbers = {"weights": 0, "epoch": 1, "step": 2, "statistics": 3, "image": 4, "align": 6}
    for stream, number in numbers.items():
        first = int(np.random.SeedSequence([9, number]).generate_state(1)[0])
        assert P.seed_of(9, stream, 7) == (first + 7) % 2**32
    labels = [int(np.random.default_rng([9, 5, i]).integers(1000)) for i in range(20)]
    assert [P.choose_label("random", 9, i, 1000) for i in range(20)] == labels


def test_labels():
    """balanced: each class equally often; random: by (seed, i) alone, about equally; --classes by
    name or number."""
    balanced = [P.choose_label("balanced", 0, i, 7) for i in range(70)]
    assert np.bincount(balanced).tolist() == [10] * 7
    chosen = [P.choose_label("random", 0, i, 10) for i in range(2000)]
    count = np.bincount(chosen, minlength=10)
    assert len(count) == 10 and abs(count - 200).max() < 60         # standard deviation: 13
    assert [P.choose_label("random", 1, i, 10) for i in range(2000)] != chosen
    assert P.parse_classes("star,0,ring,2", CLASSES) == [2, 0, 1, 2]
    assert P.parse_classes("7", ["7", "8"]) == [0]
    for text, word in (("sart", "star"), ("disc,3", "below 3"), ("-1", "below 3"), ("", "disc"),
                       ("²", "below 3")):
        with pytest.raises(ValueError, match=word) as caught:
            P.parse_classes(text, CLASSES)
        assert "unknown class" in str(caught.value)


# ---- Pictures -------------------------------------------------------------------

def test_grid(tmp_path):
    """Images lie row by row, black where they end; a small picture is enlarged by a whole factor,
    a large one is not."""
    images = torch.arange(1, 6).to(torch.uint8)[:, None, None, None].expand(5, 3, 4, 4)
    P.save_grid(tmp_path / "a.png", images, columns=3)
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    scale = 640 // 12
    assert picture.shape == (8 * scale, 12 * scale, 3)
    middles = picture[2 * scale :: 4 * scale, 2 * scale :: 4 * scale]
    assert middles.tolist() == [[[1] * 3, [2] * 3, [3] * 3], [[4] * 3, [5] * 3, [0] * 3]]
    P.save_grid(tmp_path / "b.png", images, columns=1)
    assert Image.open(tmp_path / "b.png").size == (640, 5 * 640)
    P.save_grid(tmp_path / "c.png", torch.zeros(9, 3, 80, 80, dtype=torch.uint8))
    assert Image.open(tmp_path / "c.png").size == (8 * 80, 2 * 80)


def test_pictures_keep_every_level(tmp_path):
    """A PNG holds the same 256 levels and the same pixels that were given, one image or many."""
    ramp = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16).clone()
    ramp[1] = ramp[1].flip(-1)
    ramp[:, 2] = 255 - ramp[:, 2]
    for images in (ramp, ramp[:1]):
        P.save_grid(tmp_path / "a.png", images, columns=len(images))
        scale = 640 // (16 * len(images))
        picture = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)
        expected = torch.cat(list(images), -1)
        for corner in (0, scale - 1):
            assert torch.equal(picture[:, corner::scale, corner::scale], expected)


# ---- Options and the command ----------------------------------------------------

@dataclass
class Demo:
    path: str
    steps: int = 5
    rate: float = 1.0
    fast: bool = False
    solver: Literal["euler", "heun"] = "euler"  # how


def demo(path: str, other: int, *, to: str, steps: int = 5):
    return path, other, to, steps


PRESETS = {"a": dict(steps=1, rate=2.0), "b": dict(steps=2)}


def test_parse():
    """The order of authority: defaults, presets from left to right, then what is given by name
    wherever it stands. Parameters without a default are words; keyword-only ones, options."""
    assert P.parse(Demo, ["x"]) == Demo("x")
    assert P.parse(Demo, ["x", "--preset=a,b"], PRESETS) == Demo("x", steps=2, rate=2.0)
    assert P.parse(Demo, ["x", "--preset=b,a"], PRESETS) == Demo("x", steps=1, rate=2.0)
    for words in (["--steps=9", "x", "--preset=a"], ["--preset=a", "x", "--steps=9"]):
        assert P.parse(Demo, words, PRESETS) == Demo("x", steps=9, rate=2.0)
    given = P.parse(Demo, ["a=b", "--rate=1e-4", "--fast=True", "--solver=heun"])
    assert given == Demo("a=b", rate=1e-4, fast=True, solver="heun")
    assert P.parse(Demo, ["x", "--fast=False", "--steps=-3"]) == Demo("x", steps=-3)
    assert P.parse(demo, ["x", "--to=y", "3"]) == ("x", 3, "y", 5)
    assert P.parse(demo, ["x", "3", "--steps=7", "--to="]) == ("x", 3, "", 7)


@pytest.mark.parametrize("target, words, named", [
    (Demo, ["x", "--step=1"], ["--step", "did you mean --steps"]),      # no abbreviations
    (Demo, ["x", "--steps=many"], ["--steps", "many"]),
    (Demo, ["x", "--steps=1.5"], ["--steps", "1.5"]),
    (Demo, ["x", "--rate=fast"], ["--rate", "fast"]),
    (Demo, ["x", "--fast=2"], ["--fast", "expected one of 0, 1"]),
    (Demo, ["x", "--steps"], ["--steps"]),
    (Demo, ["x", "--solver=huen"], ["--solver", "huen", "did you mean heun"]),
    (Demo, ["x", "--solver="], ["--solver", "expected one of euler, heun"]),
    (Demo, ["x", "--preset=c"], ["unknown preset 'c'", "a, b"]),
    (Demo, ["x", "--xyzzy=1"], ["--xyzzy", "expected one of --steps, --rate"]),
    (Demo, ["x", "extra"], ["extra"]),
    (Demo, [], ["path"]),
    (demo, ["x", "--to=y"], ["other"]),
    (demo, ["x", "3"], ["--to"])])
def test_parse_refuses(target, words, named):
    """Each mistake is one ValueError that names the option and what was given for it."""
    with pytest.raises(ValueError) as caught:
        P.parse(target, words, PRESETS)
    assert all(word in str(caught.value) for word in named), caught.value


def test_presets_only_where_there_are_some():
    """A command without presets does not take --preset: it would be ignored."""
    with pytest.raises(ValueError, match="--preset"):
        P.parse(Demo, ["x", "--preset=a"])


@pytest.mark.parametrize("words", [["--help"], ["x", "--steps=7", "-h"]])
def test_help(words, capsys):
    """--help prints the options with their comments and the presets, runs nothing, exit code 0."""
    with pytest.raises(SystemExit) as caught:
        P.parse(Demo, words, PRESETS)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in Demo.__annotations__)
    assert "# how" in out and "presets: a, b" in out


def command(*words, launcher=(), cwd=ROOT):
    line = [sys.executable, *launcher, str(ROOT / "sample.py"), *map(str, words)]
    return subprocess.run(line, cwd=cwd, timeout=300, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def torchrun(n):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return ["-m", "torch.distributed.run", f"--nproc_per_node={n}", f"--master_port={port}"]


@pytest.mark.parametrize("name", [field.name for field in fields(P.Options)][1:])
def test_options_pass_through_torchrun(name):
    """torchrun must not take an option of ours for an abbreviation of its own (as "--n" would
    be)."""
    words = ["runs/tiny", f"--{name}=1"]
    parsed = get_args_parser().parse_args(["--nproc_per_node=8", "sample.py", *words])
    assert parsed.training_script_args == words


def test_command(tmp_path):
    """A run's path alone gives a grid; .npz has ADM's layout; two processes give the pictures and
    labels of one."""
    checkpoint(tmp_path / "step_0000007.pt")
    done = command(tmp_path, "--count=3", "--steps=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "grid.png").size == (640, 640)
    words = (tmp_path, "--count=7", "--steps=3", "--batch=2", "--guidance=2")
    for name, launcher in (("one.npz", ()), ("two.npz", torchrun(2))):
        done = command(*words, f"--out={tmp_path / name}", launcher=launcher)
        assert done.returncode == 0, done.stderr
        assert "7 images, step 7, sde 3 steps" in done.stdout
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert one["arr_0"].shape == (7, 16, 16, 3) and one["arr_0"].dtype == np.uint8
    labels = [P.choose_label("random", 0, i, 3) for i in range(7)]
    assert one["arr_1"].tolist() == two["arr_1"].tolist() == labels
    assert one["classes"].tolist() == CLASSES
    assert levels(one["arr_0"], two["arr_0"]) <= 1
    images = P.load_pipeline(tmp_path)(labels, steps=3, guidance=2.0)
    assert levels(images.permute(0, 2, 3, 1), one["arr_0"]) <= 1
    left = sorted(file.name for file in tmp_path.iterdir())
    assert left == ["grid.png", "one.npz", "step_0000007.pt", "two.npz"]


def test_classes_repeat_in_turn(tmp_path, monkeypatch):
    """--classes=star,0 labels the images star, disc, star, ..., in place of drawn labels."""
    monkeypatch.chdir(tmp_path)
    checkpoint("m.pt")
    words = ["m.pt", "--count=5", "--steps=2", "--solver=euler", "--out=a.npz", "--classes=star,0"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    P.main()
    file = np.load("a.npz")
    assert file["arr_1"].tolist() == [2, 0, 2, 0, 2]
    images = P.load_pipeline("m.pt")([2, 0, 2, 0, 2], steps=2, solver="euler")
    assert levels(images.permute(0, 2, 3, 1), file["arr_0"]) <= 1


def test_mistakes_of_users(tmp_path, monkeypatch, capsys):
    """Each mistake ends with exit code 2 and one line on stderr that names it; nothing is
    written."""
    monkeypatch.chdir(tmp_path)
    checkpoint("vae.pt", sit=False)
    checkpoint("m.pt")
    published("repa.pt", sit_only=True)
    torch.save({"a": torch.zeros(1)}, "other.pt")
    Path("text.pt").write_text("hello")
    Path("empty.pt").write_text("")
    Path("folder").mkdir()
    before = sorted(os.listdir())
    for words, message in (
            (["vae.pt"], "a VAE without a SiT (--method=vae)"),
            (["other.pt", "--vae=vae.pt"], "holds a, expected a network with x_embedder"),
            (["repa.pt"], "name one with --vae="),
            (["repa.pt", "--vae=tiny"], "tiny is untrained"),
            (["repa.pt", "--vae=text.pt"], "text.pt"),
            (["text.pt"], "text.pt"),
            (["empty.pt"], "empty.pt"),
            (["absent.pt"], "no file at absent.pt"),
            (["folder"], "folder holds no checkpoint"),
            ([], "path"),
            (["m.pt", "--solver=huen"], "did you mean heun"),
            (["m.pt", "--count=0"], "at least 1"),
            (["m.pt", "--count=few"], "few"),
            (["m.pt", "--steps=1"], "--steps"),
            (["m.pt", "--seed=-1"], "--seed"),
            (["m.pt", "--guidance=nan"], "--guidance=nan"),
            (["m.pt", "--low=0.5", "--high=0.4"], "low <= high"),
            (["m.pt", "--out=a.jpg"], "a.jpg"),
            (["m.pt", "--labels=even"], "even"),
            (["m.pt", "--classes=stra"], "star"),
            (["m.pt", "--guidnce=2"], "did you mean --guidance"),
            (["m.pt", "--out=m.pt/a.png"], "cannot write m.pt/a.png"),
            (["export", "m.pt"], "--to"),
            (["export", "absent.pt", "--to=new"], "no file at absent.pt")):
        monkeypatch.setattr(sys, "argv", ["sample.py", *words])
        with pytest.raises(SystemExit) as caught:
            P.main()
        lines = capsys.readouterr().err.strip().splitlines()
        assert caught.value.code == 2 and len(lines) == 1, lines
        assert lines[0].startswith("error: ") and message in lines[0], lines
    assert sorted(os.listdir()) == before


def test_mistake_at_the_command_line(tmp_path):
    """The same in a real process: one line, no traceback."""
    checkpoint(tmp_path / "vae.pt", sit=False)
    done = command(tmp_path / "vae.pt")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
