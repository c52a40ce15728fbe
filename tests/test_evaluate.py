"""What evaluate.py promises, with torch-fidelity, scipy and scikit-image as references.

    python -m pytest tests/test_evaluate.py
"""
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import scipy.linalg
import skimage.metrics
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

import evaluate as ev
from repa import TinyTeacher
from sample import load_pipeline
from sit import SiT, SiTConfig
from vae import VAE, Shapes, VAEConfig, fetch, open_npz


def close(a, b, rel):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape
    error = float((a - b).abs().max() / b.abs().max())
    assert error <= rel, f"relative error {error:.2e} > {rel:.0e}"


def moments(x):
    m = ev.Moments(x.shape[1])
    m.update(x)
    return m.result()


def images(size, n=4, seed=0):
    """Noise, a smooth pattern, a dark image and a constant one: [n, 3, size, size]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=g)
    x[1] = (torch.arange(size)[:, None] * torch.arange(size) % 256).to(torch.uint8)
    x[2], x[3] = x[2] // 4, 128
    return x


def clouds(m, n, dim, seed=0):
    """Two sets of correlated features, as float32 [m, dim], [n, dim], all positive like
    Inception's."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=g) / dim ** 0.5 * torch.logspace(0, -2, dim)
    return ((torch.randn(m, dim, generator=g) @ mix).abs() + 0.1,
            (torch.randn(n, dim, generator=g) @ mix * 1.1 + 0.02).abs() + 0.1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the true shapes, under which activations keep their scale, in both
    published forms: without BatchNorm's counters (what the two ports publish) and as saved from a
    module (with them)."""
    g = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        module = ev.Inception().state_dict()
    state = {}
    for name, t in module.items():
        r = torch.randn(t.shape, generator=g)
        if name.endswith("conv.weight"):
            state[name] = r * (2 / t[0].numel()) ** 0.5
        elif name.endswith("bn.weight"):
            state[name] = 1 + 0.2 * r
        elif name.endswith("running_var"):
            state[name] = 0.5 + torch.rand(t.shape, generator=g)
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1)
        else:  # means, biases and the classifier
            state[name] = r * (0.05 if name == "fc.weight" else 0.1)
    folder = tmp_path_factory.mktemp("inception")
    torch.save(state, folder / "module.pth")
    public = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(public, folder / "public.pth")
    return folder


@pytest.fixture(scope="module")
def net(weights):
    return ev.load_inception(str(weights / "public.pth"))


@pytest.fixture(scope="module")
def fidelity(weights):
    return FeatureExtractorInceptionV3("ref", ["2048", "logits_unbiased"],
                                       str(weights / "public.pth"))


# ---- Inception ------------------------------------------------------------------

@pytest.mark.parametrize("size", [32, 256, 299])
def test_inception_equals_torch_fidelity(net, fidelity, size):
    """Protects the network, the reading of its weights, the resize, the choice and the order of
    sFID's features."""
    branch = []
    hook = fidelity.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, args, out: branch.append(out))
    x = images(size)
    with torch.no_grad():
        pool, logits = fidelity(x)
    hook.remove()
    ours, spatial = net(x)
    assert ours.dtype == spatial.dtype == torch.float32 and pool.std(0).mean() > 0.1
    close(ours, pool, 1e-5)
    close(net.logits(ours), logits, 1e-5)
    close(spatial, branch[0][:, :7].permute(0, 2, 3, 1).reshape(4, 17 * 17 * 7), 1e-5)
    assert spatial.min() == 0 and spatial.max() > 0.1  # after the ReLU


@pytest.mark.parametrize("h, w", [(32, 32), (256, 256), (299, 299), (400, 37)])
def test_resize_is_tensorflows(h, w):
    """Protects the missing half-pixel offset and antialiasing; the identity at 299 is exact."""
    g = torch.Generator().manual_seed(h)
    x = torch.randint(0, 256, (1, 2, h, w), generator=g).float()
    ours = ev.resize_tf1(x, 299)
    theirs = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    close(ours, theirs, 3e-7)
    assert (h, w) != (299, 299) or torch.equal(ours, x)


def test_features_do_not_depend_on_batch_precision_settings_or_form_of_the_file(net, weights):
    """Protects the report from the caller's TF32, which is put back afterwards."""
    x = images(64)
    alone = torch.cat([net(x[i : i + 1])[0] for i in range(4)])
    torch.set_float32_matmul_precision("medium")
    try:
        together = net(x)[0]
        logits = net.logits(together)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert together.dtype == logits.dtype == torch.float32
    close(together, alone, 1e-5)
    other_form = ev.load_inception(str(weights / "module.pth"))
    assert torch.equal(other_form(x)[0], net(x)[0])


def test_wrong_weights_are_named_in_one_line(weights, tmp_path, monkeypatch):
    """Protects the user: a missing, damaged or different file is one readable line that says what
    to get; a download that fails says why."""
    state = torch.load(weights / "public.pth", weights_only=True)
    (tmp_path / "garbage.pth").write_bytes(b"<html>404</html>" * 9)
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({k: v for k, v in state.items() if k != "fc.bias"}, tmp_path / "missing.pth")
    torch.save(state | {"AuxLogits.fc.bias": torch.zeros(1)}, tmp_path / "extra.pth")
    torch.save(state | {"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "shape.pth")
    words = dict(garbage="", empty="", list="list", missing="fc.bias", extra="AuxLogits",
                 shape="1000, 2048", absent="no file at")
    for name, word in words.items():
        with pytest.raises(ValueError) as error:
            ev.load_inception(str(tmp_path / f"{name}.pth"))
        text = str(error.value)
        assert f"{name}.pth" in text and word in text and "\n" not in text
        assert ev.INCEPTION_URL in text and "--weights=FILE" in text

    def offline(*args, **kwargs):
        assert args == (ev.INCEPTION_URL,) and kwargs["weights_only"] and kwargs["check_hash"]
        raise OSError("<urlopen error>")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match="urlopen.*offline"):
        ev.load_inception()


def test_a_damaged_download_is_not_used(weights, tmp_path, monkeypatch):
    """Protects the papers' numbers: torch.hub's cached file must have the hash in its name; a file
    that the user names himself may have another."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints" / os.path.basename(ev.INCEPTION_URL)
    cached.parent.mkdir(parents=True)
    shutil.copy(weights / "public.pth", cached)
    with pytest.raises(ValueError, match="its hash differs: remove it") as error:
        ev.load_inception()
    assert str(cached) in str(error.value) and "\n" not in str(error.value)
    digest = hashlib.sha256(cached.read_bytes()).hexdigest()
    renamed = ev.INCEPTION_URL.replace("6726825d", digest[:8])
    monkeypatch.setattr(ev, "INCEPTION_URL", renamed)
    cached.rename(cached.with_name(os.path.basename(renamed)))
    assert torch.equal(ev.load_inception().fc.bias, torch.load(weights / "public.pth")["fc.bias"])


# ---- Moments and the Frechet distance -------------------------------------------

def test_moments_equal_numpy_for_any_batches():
    """Protects mean and covariance (N - 1) in float64, also when the mean is large against the
    spread."""
    x = clouds(103, 1, 24)[0] * 0.01 + 100
    m = ev.Moments(24)
    for part in x.split(10):
        m.update(part)
    mu, sigma = m.result()
    close(mu, x.double().mean(0), 1e-14)
    expected = np.cov(x.double().numpy(), rowvar=False)
    # N roundings of mean^2, against the variance
    close(sigma, expected, 103 * 2.2e-16 * 100 ** 2 / expected.max())
    assert torch.equal(m.result()[1], sigma)  # reading changes nothing


@pytest.mark.parametrize("n, dim", [(600, 128), (100, 256)])
def test_frechet_equals_scipy_and_torch_fidelity(n, dim):
    """Protects FID and sFID, for regular and for singular covariances (fewer images than
    features)."""
    a, b = clouds(n, n + 20, dim)
    (mu1, s1), (mu2, s2) = moments(a), moments(b)
    ours = ev.frechet(mu1, s1, mu2, s2)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b),
                                      verbose=False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert ev.frechet(mu2, s2, mu1, s1) == pytest.approx(ours, rel=1e-10)
    if n > dim:
        root = np.trace(scipy.linalg.sqrtm(s1.numpy() @ s2.numpy()).real)
        rest = float((mu1 - mu2).square().sum() + s1.trace() + s2.trace())
        assert ours == pytest.approx(rest - 2 * root, rel=1e-9)


def test_frechet_of_equal_sets_is_zero():
    """Protects the stability at Inception's width with few images, where eigenvalues of S1 S2 lose
    half the digits."""
    mu, sigma = moments(clouds(300, 1, 2048)[0] * 2)
    assert abs(ev.frechet(mu, sigma, mu, sigma)) < 1e-6
    # a single repeated image each
    assert ev.frechet(mu, 0 * sigma, mu + 1, 0 * sigma) == pytest.approx(2048)


def test_frechet_of_gaussians_in_closed_form():
    """Protects the formula: for commuting covariances it is |dmu|^2 + sum (s1 - s2)^2 over standard
    deviations."""
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(32, 32, generator=g, dtype=torch.float64))[0]
    s1, s2, d = torch.rand(3, 32, generator=g, dtype=torch.float64)
    # numpy and torch are accepted
    ours = ev.frechet(d.numpy(), (q * s1 ** 2) @ q.T, 0 * d, (q * s2 ** 2) @ q.T)
    assert ours == pytest.approx(float((d ** 2).sum() + ((s1 - s2) ** 2).sum()), rel=1e-12)


# ---- Inception Score, precision, recall -----------------------------------------

def test_inception_score_equals_torch_fidelity():
    """Protects splits and file order: torch-fidelity's equal splits without shuffling."""
    logits = torch.randn(1000, 1008, generator=torch.Generator().manual_seed(0)) * 3
    theirs = isc_features_to_metric(logits, splits=4, shuffle=False)["inception_score_mean"]
    assert ev.inception_score(logits, 250) == pytest.approx(theirs, rel=1e-10)
    short = [ev.inception_score(part) for part in logits.split(300)]  # 300, 300, 300, 100
    assert ev.inception_score(logits, 300) == pytest.approx(np.mean(short), rel=1e-12)


def test_inception_score_bounds():
    """Protects the extremes: 1 for equal predictions, the number of classes for certain and
    balanced ones; where posteriors underflow, ADM's float32 gives NaN."""
    assert ev.inception_score(torch.ones(50, 10)) == pytest.approx(1, abs=1e-12)
    assert ev.inception_score(torch.eye(10).repeat(5, 1) * 1e4) == pytest.approx(10, rel=1e-12)
    assert ev.inception_score(torch.tensor([[0.0, -1e4, 0.0]] * 3)) == pytest.approx(1, abs=1e-12)


def test_precision_recall_equal_torch_fidelity(monkeypatch):
    """Protects which set is which, k, and `<=`; and that blocks do not change the counts."""
    real, fake = clouds(500, 700, 64)
    theirs = prc_features_to_metric(fake, real, prc_neighborhood=3, prc_batch_size=10000,
                                    save_cpu_ram=False, verbose=False)
    precision, recall = ev.precision_recall(real, fake)
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)
    assert 0.1 < recall < 0.95 and 0.1 < precision < 0.95 and abs(precision - recall) > 0.02
    exact = [torch.cdist(a.double(), b.double())
             for a, b in ((real, real), (fake, fake), (fake, real))]
    rr, rf = (d.kthvalue(4).values for d in exact[:2])
    assert precision == (exact[2] <= rr).any(1).double().mean()
    assert recall == (exact[2].T <= rf).any(1).double().mean()
    split = torch.Tensor.split  # blocks of 37 rows instead of all
    monkeypatch.setattr(torch.Tensor, "split", lambda self, rows: split(self, 37))
    assert ev.precision_recall(real, fake) == (precision, recall)


def test_precision_recall_on_a_line():
    """Protects the definition on numbers a reader can check, and distances small against the
    features' norm."""
    # k = 1: every ball of a real row reaches 1
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]]) + 1000
    # radii 3.5, 1, 1, 4; 4.0 lies on the edge of 3.0
    fake = torch.tensor([[0.5], [4.0], [5.0], [9.0]]) + 1000
    assert ev.precision_recall(real, fake, k=1) == (0.5, 1.0)
    assert ev.precision_recall(real, real) == (1, 1)


# ---- Reconstructions and latents ------------------------------------------------

@pytest.mark.parametrize("h, w", [(11, 11), (40, 56)])
def test_psnr_and_ssim_equal_scikit_image(h, w):
    """Protects the definitions of the reconstruction table."""
    g = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (3, 3, h, w), dtype=torch.uint8, generator=g)
    a[1] = (torch.arange(h)[:, None] * 3 + torch.arange(w)).to(torch.uint8)
    b = (a.int() + torch.randint(-20, 21, a.shape, generator=g)).clamp(0, 255).to(torch.uint8)
    for x, y, p, s in zip(a.numpy(), b.numpy(), ev.psnr(a, b), ev.ssim(a, b)):
        theirs = skimage.metrics.peak_signal_noise_ratio(x, y, data_range=255)
        assert float(p) == pytest.approx(theirs, rel=1e-12)
        theirs = skimage.metrics.structural_similarity(
            x, y, channel_axis=0, data_range=255, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False)
        assert float(s) == pytest.approx(theirs, rel=1e-9)
    assert ev.psnr(a, a).isposinf().all() and ev.ssim(a, a).eq(1).all()


def test_latent_monitors_on_known_maps():
    """Protects the two collapse monitors, [variance, total variation]: a constant map, a
    checkerboard and a ramp."""
    assert ev.monitors(torch.full((2, 4, 8, 8), 3.0)).tolist() == [[0, 0], [0, 0]]
    board = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2) * 2.0     # 0 and 2
    # 112 neighbours differ by 2
    found = ev.monitors(board.expand(1, 4, 8, 8))[0].tolist()
    assert found == pytest.approx([1, 2 * 2 * 7 * 8])
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    assert ev.monitors(ramp)[0].tolist() == [(64 - 1) / 12, 56]


def test_cknna_equals_a_double_loop():
    """Protects the definition: shared neighbours of normalised features, unbiased HSIC, ratio."""
    g, n, k = torch.Generator().manual_seed(0), 30, 5
    a = torch.randn(n, 8, generator=g)
    b = torch.cat([a[:, :4] + 0.5 * torch.randn(n, 4, generator=g),
                   torch.randn(n, 3, generator=g)], 1)
    kernels = [(x @ x.T / x.norm(dim=1) / x.norm(dim=1)[:, None]).double() for x in (a, b)]

    def nearest(K, i):
        return sorted((j for j in range(n) if j != i), key=lambda j: -K[i, j])[:k]
    near = [[nearest(K, i) for i in range(n)] for K in kernels]

    def hsic(p, q):
        K, L = torch.zeros(2, n, n, dtype=torch.float64)
        for i in range(n):
            for j in range(n):
                if j in near[p][i] and j in near[q][i]:
                    K[i, j], L[i, j] = kernels[p][i, j], kernels[q][i, j]
        total = K.sum() * L.sum() / ((n - 1) * (n - 2))
        return (K @ L).trace() + total - 2 * (K @ L).sum() / (n - 2)
    expected = float(hsic(0, 1) / (hsic(0, 0) * hsic(1, 1)).sqrt())
    assert ev.cknna(a, b, k) == pytest.approx(expected, rel=1e-5)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=g))[0]
    assert ev.cknna(a, 3 * a @ rotation, k) == pytest.approx(1)  # angles alone count
    unrelated = torch.randn(500, 8, generator=g), torch.randn(500, 8, generator=g)
    assert abs(ev.cknna(*unrelated)) < 0.1
    with pytest.raises(ValueError, match="10 and 10"):
        ev.cknna(a[:10], b[:10])
    with pytest.raises(ValueError, match="30 and 29"):
        ev.cknna(a, b[:29])


def test_cknna_leaves_its_features_alone():
    """Protects the next layer's value: the same teacher features serve all of them."""
    a, b = clouds(50, 50, 16)
    before = a.clone(), b.clone()
    first = ev.cknna(a, b)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])
    assert ev.cknna(a, b) == first


# ---- The commands ---------------------------------------------------------------

class Tiny:
    """A run's folder with two checkpoints of random weights, and a classifier of a few steps in
    torch.hub's cache."""

    def __init__(self, folder):
        self.folder, self.run = folder, folder / "run"
        self.run.mkdir()
        cfg = VAEConfig(z_channels=4, ch=16, ch_mult=(1,), num_res_blocks=1, groups=8, patch=4)
        torch.manual_seed(0)
        vae, sit = VAE(cfg), SiT(SiTConfig(2, 32, 2, 2, 4, 8, 10, (64,), 1, 16))
        sit.bn.load_stats(torch.tensor([0.5, -1, 0, 2]), torch.tensor([1.0, 2, 0.5, 4]))
        config = {"data": "tiny", "resolution": 32, "teacher": "tiny", "teacher_repo": "",
                  "teacher_weights": ""}
        for seed, step in enumerate((20, 30)):
            torch.manual_seed(seed)
            for p in [*vae.parameters(), *sit.parameters()]:
                p.data += 0.05 * torch.randn_like(p)
            torch.save({"config": config, "vae_config": asdict(vae.cfg), "vae": vae.state_dict(),
                        "sit_config": asdict(sit.cfg), "ema": sit.state_dict(), "steps": step,
                        "classes": Shapes.classes, "versions": {}},
                       self.run / f"step_{step:07d}.pt")

    def __call__(self, *words, script="evaluate.py", ranks=0):
        """Runs a command as a user does (ranks: under torchrun)."""
        here = os.path.dirname(os.path.abspath(ev.__file__))
        line = [sys.executable, script, *map(str, words)]
        if ranks:
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            line[1:1] = [*torchrun, f"--nproc_per_node={ranks}"]
        subprocess.run(line, cwd=here, check=True, timeout=100)

    def reports(self, name):
        """The entries of a report, which is taken away."""
        path = self.folder / name
        entries = json.loads(path.read_text())
        path.unlink()
        return entries


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    patch = pytest.MonkeyPatch()
    patch.setenv("TORCH_HOME", str(folder / "cache"))
    fit = ev.fit
    patch.setattr(ev, "fit", lambda net, loss, title, steps: fit(net, loss, title, 5))
    before = torch.get_rng_state()
    trained, cached = ev.load_tiny_classifier(32), ev.load_tiny_classifier(32)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(trained.head.weight, cached.head.weight)
    tiny = Tiny(folder)
    run(tiny, "ref", "tiny", f"--out={folder}/ref.npz", "--count=120")
    yield tiny
    patch.undo()


def run(tiny, *words):
    """The same in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        ev.main()


SHORT = ("--solver=ab2", "--steps=2", "--guidance=2")


def test_one_report_for_any_ranks_batch_and_origin_of_the_images(tiny, capfd):
    """Protects the promise: two ranks and another batch, an .npz of the same samples, or a folder
    of them, report what one process samples on the fly; and the report says what it is of."""
    reference = f"--ref={tiny.folder}/ref.npz"
    run(tiny, "gen", tiny.run, reference, "--count=41", *SHORT, "--batch=41")
    out = capfd.readouterr().out
    one, = tiny.reports("run/step_0000030.gen.json")
    assert {"FD-tiny", "precision", "recall", "accuracy"} == one["values"].keys()
    assert "N = 41 is few: use 1,000" in out
    sha = hashlib.sha256((tiny.folder / "ref.npz").read_bytes()).hexdigest()
    distance = f"{one['values']['FD-tiny']:.4f}"
    for value in ("FD-tiny", "ab2", sha[:12], "random", distance, "step", "guidance"):
        assert value in out
    expected = dict(N=41, step=30, steps=2, solver="ab2", guidance=2, seed=0, labels="random",
                    features="tiny")
    assert expected.items() <= one.items() and one["sha256"] == sha[:12]
    tiny("gen", tiny.run, reference, "--count=41", *SHORT, "--batch=7", ranks=2)
    two, = tiny.reports("run/step_0000030.gen.json")
    samples = tiny.folder / "samples.npz"
    tiny(tiny.run, "--count=41", *SHORT, f"--out={samples}", script="sample.py")
    run(tiny, "gen", samples, reference, "--features=tiny", "--batch=16")
    packed, = tiny.reports("samples.gen.json")
    (tiny.folder / "png").mkdir()
    for i, image in enumerate(np.load(samples)["arr_0"]):
        Image.fromarray(image).save(tiny.folder / "png" / f"{i:03d}.png")
    run(tiny, "gen", tiny.folder / "png", reference, "--features=tiny")
    files, = tiny.reports("png.gen.json")
    assert "accuracy" not in files["values"]            # a folder has no labels
    files["values"]["accuracy"] = one["values"]["accuracy"]
    for other in (two, packed, files):
        assert other["values"] == pytest.approx(one["values"], rel=1e-4)


def test_sweep_and_curve(tiny):
    """Protects the list of settings: guidance that is off has no interval; each checkpoint gets its
    report in order."""
    settings = ev.sweep("x", "1,1.5,2", "0:1,0.1:0.8", "sde", 250, 3, 64)
    assert [(how["guidance"], how["low"], how["high"]) for how in settings] == [
        (1, 0, 1), (1.5, 0, 1), (1.5, 0.1, 0.8), (2, 0, 1), (2, 0.1, 0.8)]
    same = {(how["solver"], how["steps"], how["seed"]) for how in settings}
    assert same == {("sde", 250, 3)}
    gen = ("gen", tiny.run, f"--ref={tiny.folder}/ref.npz", "--count=4")
    run(tiny, *gen, *SHORT[:2], "--curve=1", "--guidance=1,2")
    for step in (20, 30):
        entries = tiny.reports(f"run/step_{step:07d}.gen.json")
        assert [(e["step"], e["guidance"]) for e in entries] == [(step, 1), (step, 2)]
        assert entries[0]["values"]["FD-tiny"] != entries[1]["values"]["FD-tiny"]
    run(tiny, *gen)                                     # fast settings
    entry, = tiny.reports("run/step_0000030.gen.json")
    assert (entry["solver"], entry["steps"]) == ("ab2", 50)


def test_classifier_of_other_data_is_another(tiny, monkeypatch):
    """Protects comparisons: the classifier in the cache belongs to the images it was trained on."""
    class Dark(Shapes):
        def draw(self, indices):
            images, labels, masks = super().draw(indices)
            return images // 2, labels, masks

    def cached():
        return len(list((tiny.folder / "cache").rglob("tiny_classifier-*.pt")))
    assert cached() == 1
    monkeypatch.setattr(ev, "Shapes", Dark)
    ev.load_tiny_classifier(32)
    assert cached() == 2


def test_features_are_chosen(tiny, monkeypatch):
    """Protects the choice of features: the classifier for the drawn shapes, Inception elsewhere, an
    entry of FEATURES by its name; a network of one's own is one more entry."""
    asked = []

    def own(resolution, weights, repo):
        asked.append((resolution, weights, repo))
        return torch.nn.Linear(1, 1)
    for name in ("inception", "own"):
        monkeypatch.setitem(ev.FEATURES, name, own)
    chosen = ev.load_features("", True, 32, "", "", "cpu")
    assert isinstance(chosen, ev.TinyClassifier) and not asked
    ev.load_features("", False, 64, "file", "", "cpu")
    ev.load_features("own", True, 32, "", "clone", "cpu")
    assert asked == [(64, "file", ""), (32, "", "clone")]
    with pytest.raises(ValueError, match="did you mean tiny"):
        ev.load_features("tinny", True, 32, "", "", "cpu")


def test_a_reference_of_ones_own(tiny):
    """Protects the file: ADM's keys and ours, the images as they were, statistics of all of
    them."""
    file = np.load(tiny.folder / "ref.npz")
    images, _ = fetch(Shapes(32, first=ev.HELD_OUT), range(120))
    assert sorted(file.files) == ["arr_0", "mu", "n", "network", "sigma"]
    tiny("ref", "tiny", f"--out={tiny.folder}/two.npz", "--count=120", "--batch=7", ranks=2)
    two = np.load(tiny.folder / "two.npz")
    assert two.files == file.files
    for name, value in two.items():
        assert name == "network" or np.allclose(value, file[name], rtol=1e-4, atol=1e-7)
    assert file["network"] == "tiny" and file["n"] == 120
    assert np.array_equal(file["arr_0"], images.permute(0, 2, 3, 1))
    with torch.no_grad():
        features = ev.load_tiny_classifier(32)(images)[0]
    close(file["mu"], features.double().mean(0), 1e-6)
    close(file["sigma"], np.cov(features.double().numpy(), rowvar=False), 1e-5)


def test_adm_reference_is_read_by_key(net, tmp_path):
    """Protects the papers' reference files: statistics under ADM's names stand, even if the images
    have others; images serve precision and recall, and give the statistics where there are none."""
    g, x = np.random.default_rng(0), images(32, 6)
    arrays = x.permute(0, 2, 3, 1).numpy()
    stored = {"mu": g.random(2048, np.float32), "sigma": np.eye(2048),
              "mu_s": g.random(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "adm.npz", arrays, **stored)
    np.savez(tmp_path / "images.npz", arrays)
    np.savez(tmp_path / "statistics.npz", **stored)
    rows = net(x)[0]
    adm, own, bare = (ev.load_reference(str(tmp_path / f"{name}.npz"), net, 32, 4)
                      for name in ("adm", "images", "statistics"))
    for reference in (adm, bare):
        assert "n" not in reference
        assert all(np.array_equal(reference[k], v) for k, v in stored.items())
    assert "rows" not in bare and own["mu_s"].shape == (2023,)
    for reference in (adm, own):
        close(reference["rows"], rows, 1e-5)
    close(own["mu"], rows.double().mean(0), 1e-5)
    values = ev.compare(own, adm, net)
    spatial = ev.frechet(own["mu_s"], own["sigma_s"], stored["mu_s"], stored["sigma_s"])
    assert values["sFID"] == pytest.approx(spatial)
    assert values["precision"] == 1 and values["IS"] >= 1


def test_wrong_references_are_one_line(net, tmp_path):
    """Protects hours of sampling: a reference of other features, size or layout is refused at once,
    by name."""
    x, mu, sigma = np.zeros((3, 32, 32, 3), np.uint8), np.zeros(2048), np.eye(2048)
    np.savez(tmp_path / "network.npz", x, mu=mu[:128], sigma=sigma[:128, :128], network="tiny")
    np.savez(tmp_path / "width.npz", mu=mu[:768], sigma=sigma[:768, :768])
    np.savez(tmp_path / "size.npz", np.zeros((3, 64, 64, 3), np.uint8), mu=mu, sigma=sigma)
    np.savez(tmp_path / "alone.npz", x, mu=mu)
    np.savez(tmp_path / "square.npz", x, mu=mu, sigma=sigma[:5])
    np.savez(tmp_path / "empty.npz", other=mu)
    np.savez(tmp_path / "float.npz", x / 255)
    (tmp_path / "garbage.npz").write_bytes(b"<html>404</html>")
    words = dict(network="tiny features .128., not inception .2048.: use --features=tiny",
                 width="features .768.", size="64 px, expected 32", alone="sigma",
                 square="sigma is .5, 2048.", empty="neither images .arr_0. nor statistics",
                 float="arr_0 is float64", garbage="expected a reference", absent="no file at")
    for name, word in words.items():
        with pytest.raises(ValueError, match=word) as error:
            ev.load_reference(str(tmp_path / f"{name}.npz"), net, 32, 4)
        assert f"{name}.npz" in str(error.value) and "\n" not in str(error.value)
    np.savez(tmp_path / "one.npz", x[:1])
    with pytest.raises(ValueError, match="1 images are too few"):
        ev.load_reference(str(tmp_path / "one.npz"), net, 32, 4)


def test_mistakes_end_in_one_line(tiny, capsys):
    """Protects the user: exit code 2 and what to do."""
    checkpoint = tiny.run / "step_0000030.pt"
    reference = f"--ref={tiny.folder}/ref.npz"
    gen = ["gen", checkpoint, reference]
    for words, message in (
            ([], "expected one of gen, ref, recon, align"),
            (["generate", checkpoint], "did you mean gen"),
            (["gen", checkpoint], "--ref"),
            (["ref", "tiny"], "--out"),
            (["align", checkpoint], "data"),
            (["align", checkpoint, "tiny", "--guidance=2"], "--guidance"),
            (["recon", checkpoint, "tiny", "--count=1"], "1 images are too few"),
            ([*gen, "--steps=1"], "at least 1, --steps 2"),
            ([*gen, "--batch=0"], "--batch=0: expected at least 1"),
            ([*gen, "--solver=ab22"], "did you mean ab2"),
            ([*gen, "--guidance=1,x"], "--guidance=1,x"),
            ([*gen, "--guidance=2", "--interval=0"], "--interval=0:"),
            ([*gen, "--guidance=2", "--interval=0.8:0.1"], "low <= high"),
            ([*gen, "--features=dino"], "did you mean dinov2"),
            ([*gen, "--features=dinov2", "--repo=/nowhere"],
             "cannot load the teacher dinov2_vitl14"),
            ([*gen, "--features=inception", "--weights=/nowhere.pth"],
             "no file at /nowhere.pth, expected the file of"),
            (["gen", checkpoint, "--ref=/nowhere.npz"], "no file at /nowhere.npz"),
            (["gen", tiny.folder / "nothing", reference], "no data folder"),
            (["recon", checkpoint, "tiny", "--count=20000"], "expected at least 20000")):
        with pytest.raises(SystemExit) as caught:
            run(tiny, *words)
        error = capsys.readouterr().err
        assert caught.value.code == 2 and message in error, error
        assert len(error.strip().splitlines()) == 1, error
    assert not list(tiny.run.glob("*.json"))


def triples(picture, side):
    """A picture of triples, four a row -> [M, 3, side, side, 3]: image, reconstruction, latents."""
    pixels = np.asarray(Image.open(picture))
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    pixels = pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return pixels.reshape(-1, 3, side, side, 3)


def check_picture(picture, vae):
    """Sixteen held-out images, spread evenly, each with its reconstruction and its latents."""
    held_out = Shapes(32, 10_000, ev.HELD_OUT)
    spread = np.linspace(0, 9999, 16).round().astype(int).tolist()
    images = fetch(held_out, spread)[0]
    with torch.no_grad():
        z = vae.encode(ev.to_float(images))[0]
        rec = ev.to_uint8(vae.decode(z))
    seen = torch.from_numpy(triples(picture, 32).copy()).permute(1, 0, 4, 2, 3)
    assert torch.equal(seen[0], images)
    assert (seen[1].int() - rec).abs().max() <= 1
    assert (seen[2].int() - ev.principal_colors(z, 32)).abs().max() <= 1
    assert seen[2].float().std() > 20                   # the latents are no grey square


class Distance(torch.nn.Module):
    """In place of LPIPS."""

    def forward(self, x, rec):
        return (x - rec).square().mean()


def offline():
    """LPIPS where its weights are not to be had."""
    raise ValueError("no weights")


def test_recon(tiny, monkeypatch):
    """Protects the reconstruction table: means over images of the metrics above, whatever the
    batch; LPIPS only if its weights are there; and the picture beside it."""
    images, _ = fetch(Shapes(32, first=ev.HELD_OUT), range(32))
    held_out = tiny.folder / "held-out.npz"
    np.savez(held_out, images.permute(0, 2, 3, 1).numpy())
    for data, lpips, batch in ((held_out, Distance, 5), (held_out, Distance, 32),
                               (held_out, offline, 32), ("tiny", None, 8)):
        monkeypatch.setattr(ev, "LPIPS", lpips)
        run(tiny, "recon", tiny.run, data, "--count=32", f"--batch={batch}", "--features=tiny")
    vae = ev.load_vae(str(tiny.run))[0]
    check_picture(tiny.run / "step_0000030.recon.png", vae)
    tiny("recon", tiny.run, "tiny", "--count=32", "--batch=5", ranks=2)
    entries = tiny.reports("run/step_0000030.recon.json")
    small, values, left_out, none, ranks = (entry["values"] for entry in entries)
    without_lpips = {name: value for name, value in values.items() if name != "LPIPS"}
    for other, expected in ((small, values), (left_out, without_lpips), (none, without_lpips),
                            (ranks, without_lpips)):
        # Other batches round a few pixels to the next level. abs: this SSIM is 0.01 of 1, and one
        # such pixel moves it by 2e-7.
        assert other == pytest.approx(expected, rel=1e-4, abs=1e-6)
    images, _ = fetch(open_npz(str(held_out)), range(32))
    with torch.no_grad():                               # in the command's own parts and layout
        parts = [ev.to_float(part) for part in images.split(ev.DECODED)]
        rec = torch.cat([ev.to_uint8(vae.decode(vae.encode(part)[0])) for part in parts])
        net = ev.load_tiny_classifier(32)
        rfid = ev.frechet(*moments(net(images)[0]), *moments(net(rec)[0]))
    error = (images.double() - rec) / 127.5
    expected = {"PSNR": ev.psnr(images, rec).mean(), "SSIM": ev.ssim(images, rec).mean(),
                "L1": error.abs().mean(), "LPIPS": error.square().mean(), "rFD-tiny": rfid}
    assert values == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-6)


def blocks_by_hand(sit, z, t, y):
    """The tokens behind each of SiT's blocks, a list of [B, T, D]."""
    x = sit.x_embedder(z) + sit.pos_embed
    c = sit.t_embedder(t) + sit.y_embedder.embedding_table(y)
    return [x := block(x, c) for block in sit.blocks]


@torch.no_grad()
def test_block_features():
    """Protects the analysis: each block's mean token, in order; the SiT is left as it was."""
    torch.manual_seed(0)
    sit = SiT(SiTConfig(3, 24, 3, 2, 4, 8, 5, (6,), 2, 16))
    for p in sit.parameters():
        torch.nn.init.normal_(p, std=0.2)
    z, t, y = torch.randn(4, 4, 8, 8), torch.tensor([0.0, 0.3, 0.6, 0.9]), torch.arange(4)
    before = sit(z, t, y)[0]
    features = ev.block_features(sit, z, t, y)
    assert features.shape == (4, 3 * 24)
    expected = torch.cat([h.mean(1) for h in blocks_by_hand(sit, z, t, y)], 1)
    assert torch.equal(features, expected)
    assert torch.equal(ev.block_features(sit, z, t, y), expected)
    assert torch.equal(sit(z, t, y)[0], before)
    assert not any(block._forward_hooks for block in sit.blocks)


def test_align(tiny, monkeypatch):
    """Protects the analysis: one value for each block and noise level, the latents' monitors, a
    picture; any batch; another teacher if one is named; the null class for images of classes that
    the model does not know."""
    torch.manual_seed(0)
    teacher, asked = TinyTeacher().eval(), []

    def load_teacher(name, grid, *_):
        asked.append((name, grid))
        return teacher
    monkeypatch.setattr(ev, "load_teacher", load_teacher)
    align = ("align", tiny.run, "tiny", "--count=48")
    for more in ("--batch=7", "--batch=64", "--teacher=dinov2_vits14", "--seed=1"):
        run(tiny, *align, more)
    # by default the run's own teacher, for the SiT's 4 x 4 tokens
    assert asked == [("tiny", 4), ("tiny", 4), ("dinov2_vits14", 4), ("tiny", 4)]
    model = load_pipeline(tiny.run)
    check_picture(tiny.run / "step_0000030.latents.png", model.vae)
    entries = tiny.reports("run/step_0000030.align.json")
    assert [entry["teacher"] for entry in entries] == [name for name, _ in asked]
    a, b, _, other_noise = (entry["values"] for entry in entries)
    images, labels = fetch(Shapes(32, first=ev.HELD_OUT), range(48))
    np.savez(tiny.folder / "unknown.npz", images.permute(0, 2, 3, 1).numpy())
    run(tiny, "align", tiny.run, tiny.folder / "unknown.npz")
    unknown, = tiny.reports("run/step_0000030.align.json")
    assert entries[0]["classes given"] and not unknown["classes given"]
    null = torch.full_like(labels, 10)
    with torch.no_grad():
        z = model.vae.encode(ev.to_float(images))[0]
        f = teacher(images).mean(1)
        zn, t = model.sit.bn(z), torch.zeros(48)
        blocks, null_blocks = (
            [ev.cknna(h.mean(1), f) for h in blocks_by_hand(model.sit, zn, t, y)]
            for y in (labels, null))
    latents = ev.cknna(z.flatten(1), f)
    clean, half = "CKNNA of blocks at t = 0.0", "CKNNA of blocks at t = 0.5"
    for values in (a, b):
        both = [values["spatial variance"], values["total variation"]]
        assert both == pytest.approx(ev.monitors(z).mean(0).tolist(), rel=1e-4)
        assert values["CKNNA of latents"] == pytest.approx(latents, rel=1e-4)
        assert values[clean] == pytest.approx(blocks, rel=1e-3)
        assert values[half] == pytest.approx(a[half], rel=1e-3)
    assert other_noise[clean] == pytest.approx(blocks, rel=1e-3)
    assert other_noise[half] != pytest.approx(a[half], rel=1e-2)
    assert unknown["values"][clean] == pytest.approx(null_blocks, rel=1e-3)
    assert unknown["values"][clean] != pytest.approx(blocks, rel=1e-2)


def test_run_without_snapshots(tiny, tmp_path):
    """Protects runs that were killed before their first snapshot: every command takes the state."""
    shutil.copy(tiny.run / "step_0000020.pt", tmp_path / "state.pt")
    short = (f"--ref={tiny.folder}/ref.npz", "--count=4", *SHORT[:2])
    for curve in (0, 1):
        run(tiny, "gen", tmp_path, *short, f"--curve={curve}")
    run(tiny, "recon", tmp_path, "tiny", "--count=4")
    entries = json.loads((tmp_path / "state.gen.json").read_text())
    assert [entry["step"] for entry in entries] == [20, 20]
    run(tiny, "gen", tiny.run / "step_0000020.pt", *short)
    expected, = tiny.reports("run/step_0000020.gen.json")
    assert entries[0]["values"] == expected["values"]
    assert (tmp_path / "state.recon.json").exists() and (tmp_path / "state.recon.png").exists()
    shutil.copy(tiny.run / "step_0000030.pt", tmp_path)     # the first snapshot: it is the newest
    run(tiny, "gen", tmp_path, *short)
    entry, = json.loads((tmp_path / "step_0000030.gen.json").read_text())
    assert entry["step"] == 30


HUBCONF = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pos_embed = torch.nn.Parameter(torch.arange(1370.0 * 1024).view(1, 1370, 1024))
    def forward_features(self, x):
        x = torch.nn.functional.adaptive_avg_pool2d(x, (16, 64))
        return {"x_norm_clstoken": x.mean(1).flatten(1)}
def dinov2_vitl14(pretrained=True):
    return Net()
"""


def test_class_token(tmp_path):
    """Protects FD-dinov2's input: PIL's bicubic resize to 224 px and ImageNet's statistics, as
    dgm-eval publishes it; and the network's own table of positions, untouched."""
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    net, x = ev.ClassToken(str(tmp_path)), images(256)
    close(net.teacher.net.pos_embed, torch.arange(1370.0 * 1024).view(1, 1370, 1024), 1e-6)
    big = [Image.fromarray(i.permute(1, 2, 0).numpy()).resize((224, 224), Image.BICUBIC) for i in x]
    big = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in big]) / 255
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    seen = torch.nn.functional.adaptive_avg_pool2d((big - mean) / std, (16, 64))
    seen = seen.mean(1).flatten(1)
    features = net(x)[0]
    assert features.shape == (4, net.dim)
    assert (features - seen).abs().max() < 0.005        # a level is 0.017
