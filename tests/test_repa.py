"""The teachers and the alignment loss, with timm, numpy and a stand-in for DINOv2's repository as references.

    python -m pytest tests/test_repa.py
"""
import math
import socket

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed

import repa
from vae import Shapes

# A repository with DINOv2's interface: pretrained weights come through torch.hub, the position table is 37 x 37.
HUBCONF = '''
import torch
from torch import nn


class ViT(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, dim)), nn.Parameter(torch.zeros(1, 1370, dim))
        self.patch_embed, self.norm, self.drop = nn.Conv2d(3, dim, 14, 14), nn.LayerNorm(dim), nn.Dropout(0.5)

    def forward_features(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = self.drop(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed)
        x = self.norm(x + x.mean(1, keepdim=True))
        return {"x_norm_clstoken": x[:, 0], "x_norm_patchtokens": x[:, 1:]}


def make(name, dim):
    def build(*, pretrained=True, **kwargs):
        net = ViT(dim)
        if pretrained:
            url = f"https://dl.fbaipublicfiles.com/dinov2/{name}_pretrain.pth"
            net.load_state_dict(torch.hub.load_state_dict_from_url(url, map_location="cpu"))
        return net
    return build


dinov2_vits14, dinov2_vits14_reg = make("dinov2_vits14", 384), make("dinov2_vits14_reg4", 384)
dinov2_vitb14, dinov2_vitb14_reg = make("dinov2_vitb14", 768), make("dinov2_vitb14_reg4", 768)
'''


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(count, side, seed=0):
    return (noise(count, 3, side, side, seed=seed) * 60 + 128).clamp(0, 255).byte()


def stand_in(tmp_path, monkeypatch, dim=768):
    """A local repository, random weights for it, an empty TORCH_HOME and no network -> repository, weights."""
    def no_network(*_, **__):
        raise OSError("no network")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    (tmp_path / "dinov2").mkdir()
    (tmp_path / "dinov2/hubconf.py").write_text(HUBCONF)
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1370, dim), "patch_embed.weight": (dim, 3, 14, 14),
              "patch_embed.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,)}
    return str(tmp_path / "dinov2"), {key: noise(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}


def checkpoints(tmp_path):
    folder = tmp_path / "home/hub/checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cubic(d, a):
    """Keys' kernel at the distance d >= 0."""
    if d < 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def cubic_matrix(n_in, n_out):
    """[n_out, n_in]: bicubic interpolation of a line between pixel centres. Plain, it reads four
    pixels, the edge repeated (a = -0.75); below a scale of 0.8 with antialias: all pixels under
    the widened kernel, cut off at the edge (a = -0.5)."""
    matrix, scale = np.zeros((n_out, n_in)), n_in / n_out
    for i in range(n_out):
        x = (i + 0.5) * scale - 0.5
        if n_out < 0.8 * n_in:
            matrix[i] = [cubic(abs(x - j) / scale, -0.5) for j in range(n_in)]
            matrix[i] /= matrix[i].sum()
            continue
        for j in range(math.floor(x) - 1, math.floor(x) + 3):
            matrix[i, min(max(j, 0), n_in - 1)] += cubic(abs(x - j), -0.75)
    return matrix


def preprocessed(image, grid):
    """DINOv2's input, in numpy: ImageNet's statistics, then 14 px for each token."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = (image.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    matrix = cubic_matrix(x.shape[-1], 14 * grid)
    return torch.from_numpy(matrix @ x @ matrix.T)


def tokens_of(weights, image, grid):
    """What the stand-in must answer, position table resampled by timm."""
    w = {key: value.double() for key, value in weights.items()}
    x = F.conv2d(preprocessed(image, grid), w["patch_embed.weight"], w["patch_embed.bias"], 14)
    x = x.flatten(2).transpose(1, 2)
    table = resample_abs_pos_embed(w["pos_embed"], [grid, grid], antialias=True)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + table
    x = F.layer_norm(x + x.mean(1, keepdim=True), x.shape[-1:], w["norm.weight"], w["norm.bias"])
    return x[:, 1:]


def test_align_loss_is_the_mean_cosine():
    """Minus the cosine, averaged over images, tokens and teachers, each teacher alike whatever its width."""
    projected = [noise(2, 3, 5, seed=1), 7 * noise(2, 3, 8, seed=2)]
    target = [3 * noise(2, 3, 5, seed=3), noise(2, 3, 8, seed=4)]
    total = 0.0
    for p, f in zip(projected, target):
        for b in range(2):
            for t in range(3):
                total += (p[b, t] @ f[b, t] / p[b, t].norm() / f[b, t].norm()).item()
    assert repa.align_loss(projected, target).item() == pytest.approx(-total / 12, rel=1e-5)
    assert repa.align_loss(target, [5 * f for f in target]).item() == pytest.approx(-1)
    with pytest.raises(ValueError):
        repa.align_loss(projected, target[:1])


def test_align_loss_in_float32():
    """Half-precision tokens, under autocast too, are normalised in float32: none overflows or vanishes."""
    p, f = noise(2, 3, 64, seed=1).half() * 3000, noise(2, 3, 64, seed=2).half() * 3e-5
    expected = -torch.cosine_similarity(p.double(), f.double(), dim=-1).mean()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = repa.align_loss([p], [f])
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_table_of_teachers():
    """Each teacher's name, width and pixels a token: SiT's projector is built by these alone."""
    expected = {"tiny": (64, 8)}
    for size, dim in (("s", 384), ("b", 768), ("l", 1024), ("g", 1536)):
        expected |= {f"dinov2_vit{size}14{registers}": (dim, 14) for registers in ("", "_reg")}
    found = {name: (teacher.dim, teacher.stride) for name, teacher in repa.TEACHERS.items()}
    assert found.items() >= expected.items()


@pytest.mark.parametrize("resolution, side", [(256, 224), (280, 224), (64, 224), (225, 224)])
def test_resize_without_antialias(resolution, side):
    """Down to a scale of 0.8, and upwards, bicubic without antialias: the paper's bits at 256."""
    x = noise(2, 3, resolution, resolution)
    assert torch.equal(repa.resize(x, side), F.interpolate(x, (side, side), mode="bicubic"))


@pytest.mark.parametrize("resolution, side", [(281, 224), (512, 224), (256, 112), (33, 8)])
def test_resize_with_antialias(resolution, side):
    """Below a scale of 0.8 bicubic with antialias: no pixel of the image goes unread."""
    x = noise(2, 3, resolution, resolution)
    resized = repa.resize(x, side)
    assert torch.equal(resized, F.interpolate(x, (side, side), mode="bicubic", antialias=True))
    assert not torch.equal(resized, F.interpolate(x, (side, side), mode="bicubic"))


def test_resize_to_the_same_size():
    """An image that fits already is not touched: a 1:1 interpolation would cost time."""
    x = noise(2, 3, 32, 32)
    assert repa.resize(x, 32) is x


@pytest.mark.parametrize("side", [16, 32, 37])
def test_position_table_equals_timm(side):
    """The table is resampled as timm does (bicubic, antialias), the class token's row kept, 37 -> 37 unchanged."""
    table = noise(1, 1370, 12)
    ours, theirs = repa.DINOv2.resample(table, side), resample_abs_pos_embed(table, [side, side], num_prefix_tokens=1)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.equal(ours[:, 0], table[:, 0]) and (side != 37 or torch.allclose(ours, table, atol=1e-6))


@pytest.mark.parametrize("local_file", [False, True])
def test_dinov2(tmp_path, monkeypatch, local_file):
    """The tokens of a repository with DINOv2's interface, its weights from torch.hub's cache or a
    file; all frozen. The input is the paper's, bit by bit."""
    repo, weights = stand_in(tmp_path, monkeypatch)
    file = tmp_path / "w.pth" if local_file else checkpoints(tmp_path) / "dinov2_vitb14_pretrain.pth"
    torch.save(weights, file)
    teacher = repa.load_teacher("dinov2_vitb14", 16, repo, str(file) if local_file else "")
    image = pictures(2, 256)
    tokens = teacher(image)
    assert tokens.shape == (2, 16**2, repa.TEACHERS["dinov2_vitb14"].dim) == (2, 256, 768)
    normalised = (image.float() / 255 - teacher.mean) / teacher.std
    expected = F.interpolate(normalised, (224, 224), mode="bicubic")
    assert torch.equal(teacher.preprocess(image), expected)
    # float32's interpolation places its samples only to 1e-5 of a pixel: 1e-4 in the values
    teacher.double()
    assert torch.allclose(teacher.preprocess(image), preprocessed(image, 16), atol=1e-6)
    assert torch.allclose(teacher(image), tokens_of(weights, image, 16), atol=1e-5)
    assert torch.allclose(tokens.double(), tokens_of(weights, image, 16), atol=1e-2)
    assert not tokens.requires_grad and not tokens.is_inference() and not teacher.net.drop.training
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("resolution, grid", [(512, 16), (224, 16), (64, 16), (90, 6), (101, 5)])
def test_dinov2_of_any_resolution_and_grid(tmp_path, monkeypatch, resolution, grid):
    """Any image gives grid^2 tokens, those of the image at 14 px a token; _reg: its own weights."""
    repo, weights = stand_in(tmp_path, monkeypatch, dim=384)
    torch.save(weights, checkpoints(tmp_path) / "dinov2_vits14_reg4_pretrain.pth")
    image = pictures(1, resolution)
    tokens = repa.load_teacher("dinov2_vits14_reg", grid, repo).double()(image)
    assert tokens.shape == (1, grid**2, repa.TEACHERS["dinov2_vits14_reg"].dim) == (1, grid**2, 384)
    assert torch.allclose(tokens, tokens_of(weights, image, grid), atol=1e-5)


def test_dinov2_out_of_reach(tmp_path, monkeypatch):
    """No network, no repository or no weights: one line that says which file and which clone go where."""
    repo, weights = stand_in(tmp_path, monkeypatch)
    torch.save({"cls_token": weights["cls_token"]}, tmp_path / "short.pth")
    (tmp_path / "text.pth").write_text("hello")
    cases = [("dinov2_vitb14", "", ""), ("dinov2_vitb14", repo, ""), ("dinov2_vitl14", repo, ""),
             ("dinov2_vitb14", str(tmp_path / "nowhere"), ""), ("dinov2_vitb14", repo, str(tmp_path / "absent.pth")),
             ("dinov2_vitb14", repo, str(tmp_path / "short.pth")), ("dinov2_vitb14", repo, str(tmp_path / "text.pth"))]
    for name, folder, file in cases:
        with pytest.raises(ValueError) as caught:
            repa.load_teacher(name, 16, folder, file)
        words = (name, f"{name}_pretrain.pth", tmp_path / "home/hub/checkpoints", "--teacher_repo", "--teacher_weights")
        assert all(str(word) in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_unknown_teacher():
    """A wrong name lists the right ones; the tiny teacher without its data says what it needs."""
    with pytest.raises(ValueError, match="'dinov3'.*tiny, dinov2_vits14, dinov2_vits14_reg"):
        repa.load_teacher("dinov3", 16)
    with pytest.raises(ValueError, match="--teacher=tiny learns from labels.* or one of dinov2_vits14"):
        repa.load_teacher("tiny", 4)


@torch.no_grad()
def accuracy(net):
    """Of a tiny teacher's classes, on 1,000 images that it was not trained on."""
    image, label, _ = Shapes(32).draw(range(10**6, 10**6 + 1000))
    guess = net.eval().classify(net.features(image)[1]).argmax(1)
    return (guess == label).float().mean().item()


def test_tiny_teacher_learns():
    """The offline teacher learns to name shapes it has not seen, and its training depends on its weights alone."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(3)
        net = repa.TinyTeacher()
        torch.manual_seed(seed)
        repa.train_tiny_teacher(net, Shapes(32).draw, steps=5, batch=16)
        found.append((accuracy(net), net.state_dict()))
    (poor, first), (again, weights) = found
    assert again == poor and all(torch.equal(value, weights[key]) for key, value in first.items())
    net = repa.TinyTeacher()
    repa.train_tiny_teacher(net, Shapes(32).draw, steps=200, batch=32)
    assert accuracy(net) > 0.5                                                                  # chance is 0.1


def quick(monkeypatch, tmp_path):
    """A cache of the test's own, and a teacher of three training steps."""
    train = repa.train_tiny_teacher
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(repa, "train_tiny_teacher", lambda net, draw: train(net, draw, steps=3, batch=8))


def test_tiny_teacher_is_cached(tmp_path, monkeypatch):
    """The first run trains, the next ones load: the same tokens bit by bit, the same random numbers afterwards."""
    quick(monkeypatch, tmp_path)
    draw, image, found = Shapes(32).draw, pictures(3, 32), []
    for _ in range(2):
        torch.manual_seed(0)
        net = repa.load_tiny_teacher(draw)
        found.append((net(image), torch.rand(2)))
        monkeypatch.setattr(repa, "train_tiny_teacher", None)       # a second training would fail
    for a, b in zip(*found):
        assert torch.equal(a, b)
    assert len(list((tmp_path / "hub/checkpoints").iterdir())) == 1
    assert found[0][0].shape == (3, 16, repa.TEACHERS["tiny"].dim)


def test_networks_that_are_trained_here(tmp_path, monkeypatch):
    """Each is trained once; other data, another recipe or another network is another file. A
    damaged one is one line that names it, and the global random numbers stay as they were."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    small, large, trained = Shapes(16).draw, Shapes(32).draw, []

    def two():
        return torch.nn.Linear(2, 2)
    for build, draw, recipe in ((two, small, 5), (two, large, 5), (two, small, 6),
                                (lambda: torch.nn.Linear(2, 3), small, 5)):
        for _ in range(2):
            before = torch.get_rng_state()
            repa.trained_once("net", build, 0, draw, trained.append, recipe)
            assert torch.equal(torch.get_rng_state(), before)
    files = list((tmp_path / "hub/checkpoints").iterdir())
    assert len(trained) == len(files) == 4
    for file in files:
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError) as caught:
        repa.trained_once("net", two, 0, small, trained.append, 5)
    assert str(tmp_path / "hub/checkpoints/net-") in str(caught.value)
    assert "remove it, it is made again" in str(caught.value) and "\n" not in str(caught.value)


def test_tiny_teacher_is_frozen(tmp_path, monkeypatch):
    """In a run it is in eval mode and without gradients: an image's tokens do not depend on the batch it is in."""
    quick(monkeypatch, tmp_path)
    for _ in range(2):                                              # trained, then loaded
        net = repa.load_teacher("tiny", 4, draw=Shapes(32).draw)
        tokens = net(pictures(3, 32))
        assert not net.training and not tokens.requires_grad
        assert torch.allclose(net(pictures(3, 32)[1:2]), tokens[1:2], atol=1e-5)


@pytest.mark.parametrize("resolution, grid", [(32, 8), (64, 4), (40, 5), (33, 7), (50, 1)])
def test_tiny_teacher_of_any_resolution_and_grid(tmp_path, monkeypatch, resolution, grid):
    """Any image gives grid^2 tokens: those of the image resized to 8 px a token."""
    quick(monkeypatch, tmp_path)
    draw, image = Shapes(32).draw, pictures(2, resolution)
    net = repa.load_teacher("tiny", grid, draw=draw)
    tokens = net(image)
    assert tokens.shape == (2, grid**2, repa.TEACHERS["tiny"].dim) == (2, grid**2, 64)
    side = 8 * grid
    x = image.float() / 127.5 - 1
    x = F.interpolate(x, (side, side), mode="bicubic", antialias=side < 0.8 * resolution)
    h = net.net(x).flatten(2).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(tokens.flatten(0, 1), net.norm(net.token(h)), atol=1e-5)


def test_tiny_teacher_at_its_own_size(tmp_path, monkeypatch):
    """32 px and 4 x 4 tokens: the image as it is, which it was trained on, bit by bit. The grid
    belongs to a loaded teacher, not to the weights in the cache."""
    quick(monkeypatch, tmp_path)
    draw, image = Shapes(32).draw, pictures(2, 32)
    plain = repa.load_tiny_teacher(draw)
    four, eight = (repa.load_teacher("tiny", grid, draw=draw) for grid in (4, 8))
    assert plain.grid is None and four.grid == 4 and eight.grid == 8
    assert torch.equal(four(image), plain(image))
    assert len(list((tmp_path / "hub/checkpoints").iterdir())) == 1
