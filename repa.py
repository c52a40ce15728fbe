"""Representations: the alignment loss, and the frozen teachers.

REPA-E trains a VAE through a diffusion transformer. The diffusion loss cannot do that: it is
small where latents are easy to denoise, and the easiest latents are constant ones. The alignment
loss can: SiT's early tokens must predict what a frozen self-supervised teacher sees in the clean
image, so the latents must keep the image's meaning.

    align = - mean over images and tokens of cos(tokens, target)        (REPA, equation 8)

    tokens  [B, T, d]   SiT's tokens after block `align_depth`, at noise level t, projected
    target  [B, T, d]   the teacher's tokens of the clean image (DINOv2 ViT-B/14: T = 256, d = 768)

To add a teacher: a frozen module uint8 [B, 3, R, R] -> [B, grid^2, d], and an entry of TEACHERS.
"""
import hashlib
import math
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from vae import fetch, fingerprint, load_pt, load_weights, reading, unwrap


def align_loss(tokens, target):
    """Two lists of [B, T, d], one entry for each projector -> scalar in [-1, 1]; -1 is perfect."""
    total = 0
    for p, f in zip(tokens, target, strict=True):       # in float32: half precision makes NaN
        total = total + F.cosine_similarity(p.float(), f.float(), dim=-1).mean()
    return -total / len(target)


def resize(x, side):
    """Images float [B, 3, R, R] -> [B, 3, side, side], bicubic: without antialias, as in the paper
    (256 -> 224), while the scale is at least 0.8."""
    if x.shape[-1] == side:
        return x
    return F.interpolate(x, (side, side), mode="bicubic", antialias=side < 0.8 * x.shape[-1])


# ---- DINOv2 ---------------------------------------------------------------------
# Oquab et al., 2304.07193, through torch.hub.

DINOV2_REPO = "facebookresearch/dinov2"
DINOV2_REVISION = "e1277af2ba9496fbadf7aec6eba56e8d882d1e35"    # runs on every Python since 3.9
DINOV2_DIMS = {"vits14": 384, "vitb14": 768, "vitl14": 1024, "vitg14": 1536}
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])     # mean, std of R, G, B


class DINOv2(nn.Module):
    """uint8 [B, 3, R, R] -> patch tokens [B, grid^2, d]. The image is resized to 14 grid: patches
    have 14 px. Without downloads: repo is a clone of facebookresearch/dinov2, weights a file."""
    stride = 14
    folder = f"{DINOV2_REPO}_{DINOV2_REVISION}".replace("/", "_")       # in torch.hub's cache

    def __init__(self, name, grid, repo="", weights="", draw=None):
        super().__init__()
        self.grid = grid
        self.net = self.load(name, repo, weights)
        table = self.resample(self.net.pos_embed.data, grid)
        self.net.pos_embed = nn.Parameter(table, requires_grad=False)
        self.register_buffer("mean", IMAGENET[0, :, None, None], persistent=False)
        self.register_buffer("std", IMAGENET[1, :, None, None], persistent=False)
        self.eval().requires_grad_(False)

    @staticmethod
    def file(name):
        """Where torch.hub keeps the weights."""
        name = f"{name.replace('_reg', '_reg4')}_pretrain.pth"
        return Path(torch.hub.get_dir()) / "checkpoints" / name

    @staticmethod
    def load(name, repo, weights):
        """From torch.hub or a local clone; weights from torch.hub's cache, the net or a file."""
        file = DINOv2.file(name)
        if not weights and file.exists():
            weights = file                                  # read with its checksums
        os.environ.setdefault("XFORMERS_DISABLED", "1")     # with it: graph breaks, other numbers
        source = "local" if repo else "github"
        try:
            net = torch.hub.load(
                repo or f"{DINOV2_REPO}:{DINOV2_REVISION}", name, source=source, trust_repo=True,
                skip_validation=True, verbose=False, pretrained=not weights)
            if weights:
                load_weights(net, unwrap(load_pt(weights), ["pos_embed"], weights))
        except Exception as error:                          # hub code of any kind runs here
            said = " ".join(str(error).split())[:200]
            raise ValueError(
                f"cannot load the teacher {name} ({type(error).__name__}: {said}): "
                f"name a clone of {DINOV2_REPO} with --teacher_repo=DIR, and put {file.name} into "
                f"{file.parent} or name it with --teacher_weights=FILE (evaluate.py: --repo, "
                "--weights)") from error
        return net

    @staticmethod
    def resample(table, side):
        """Position table [1, 1 + n^2, d] -> [1, 1 + side^2, d]; the class token's row stays.
        Bicubic with antialias, as the authors do; DINOv2's own resampling gives other tokens."""
        first, grid = table[:, :1], table[:, 1:]
        n = math.isqrt(grid.shape[1])
        grid = grid.mT.unflatten(2, (n, n))                                     # [1, d, n, n]
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
        return torch.cat([first, grid.flatten(2).mT], 1)

    def preprocess(self, image):
        """uint8 -> normalised by ImageNet's statistics, then 14 px for each patch."""
        return resize((image.float() / 255 - self.mean) / self.std, self.stride * self.grid)

    def forward(self, image):
        return self.net.forward_features(self.preprocess(image))["x_norm_patchtokens"]


# ---- The small teacher ----------------------------------------------------------
# Of the tiny preset: a convnet, trained on the spot in a minute or two, without
# downloads: on the drawn shapes, or on any images that have labels.

class Labelled:
    """Numbers -> images, labels, None of a data set, shuffled, again and again: what Shapes.draw
    is for the drawn shapes."""

    def __init__(self, data):
        generator = torch.Generator().manual_seed(0)
        self.order = torch.randperm(len(data), generator=generator).tolist()
        self.data, self.classes = data, data.classes
        self.recipe = fingerprint(data), data.resolution

    def __call__(self, indices):
        rows = [self.order[i % len(self.order)] for i in indices]
        return *fetch(self.data, rows), None


def draw_of(data):
    return data.draw if hasattr(data, "draw") else Labelled(data)


class TinyTeacher(nn.Module):
    """uint8 [B, 3, R, R] -> tokens [B, grid^2, 64], learnt by naming each token's shape, or
    background; without masks the tokens' mean names the image. The image is resized to 8 grid; in
    its training grid is None: it stays as it is."""
    dim, stride = 64, 8

    def __init__(self, num_classes=10):
        super().__init__()
        self.grid = None
        layers = []
        widths = [3, 32, 64, 64, 96, 96]
        for c_in, c_out, stride in zip(widths, widths[1:], [2, 2, 1, 2, 1]):
            conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(c_out), nn.ReLU()]
        self.net = nn.Sequential(*layers)
        self.token = nn.Linear(96, self.dim)
        self.norm = nn.BatchNorm1d(self.dim, affine=False)      # centred: a cosine of 0 is chance
        self.segment = nn.Linear(self.dim, num_classes + 1)     # the last class is the background
        self.classify = nn.Linear(96, num_classes)
        self.to(memory_format=torch.channels_last)

    def features(self, image):
        """-> tokens [B, T, 64], pooled [B, 96]."""
        x = image.float() / 127.5 - 1
        if self.grid is not None:
            x = resize(x, self.stride * self.grid)
        h = self.net(x).flatten(2).mT                           # [B, T, 96]
        tokens = self.norm(self.token(h).flatten(0, 1))
        return tokens.view(len(h), -1, self.dim), h.mean(1)

    def forward(self, image):
        return self.features(image)[0]


def fit(net, loss, title, steps, batch=64):
    """Trains a small net: loss(numbers of the batch's images) -> scalar; one cycle of the rate."""
    opt = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=steps)
    for step in tqdm(range(steps), title, leave=False):
        opt.zero_grad()
        loss(range(step * batch, (step + 1) * batch)).backward()
        opt.step()
        schedule.step()


def train_tiny_teacher(net, draw, steps=700, batch=64):
    """draw: numbers -> images, labels, masks (1 where a token is not background) or None."""
    background = net.segment.out_features - 1

    def loss(indices):
        image, label, mask = draw(indices)
        tokens, pooled = net.features(image)
        if mask is None:
            return (F.cross_entropy(net.segment(tokens).mean(1), label)
                    + F.cross_entropy(net.classify(pooled), label))
        share = F.avg_pool2d(mask[:, None], net.stride).flatten(1)              # [B, T]
        target = torch.where(share > 0.25, label[:, None], background)          # [B, T]
        segments = net.segment(tokens).flatten(0, 1)
        return (F.cross_entropy(segments, target.flatten())
                + F.cross_entropy(net.classify(pooled), label))
    fit(net, loss, "training the tiny teacher", steps, batch)


def trained_once(kind, build, seed, draw, train, *recipe):
    """-> build() of this seed with the weights that train(net) gave it the first time; torch.hub's
    cache keeps them. The file's name stands for data, recipe and network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build()
    images = draw(range(16))[0].numpy().tobytes()
    key = hashlib.sha256(f"{recipe} {net}".encode() + images).hexdigest()[:8]
    file = Path(torch.hub.get_dir()) / "checkpoints" / f"{kind}-{key}.pt"
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=file.parent).close()
        except OSError as error:
            raise ValueError(f"cannot write to {file.parent} ({error.strerror}): set TORCH_HOME to "
                             "a folder that can be written") from None
        train(net)
        temporary = f"{file}.{os.getpid()}.tmp"
        torch.save(net.state_dict(), temporary)
        os.replace(temporary, file)
    with reading(file, "a network that was trained here: remove it, it is made again"):
        load_weights(net, load_pt(file))
    return net.eval().requires_grad_(False)


def load_tiny_teacher(draw, grid=None, repo="", weights=""):
    """The small teacher for grid x grid tokens; draw: Shapes.draw or Labelled, which it is trained
    on."""
    classes = getattr(draw, "classes", range(10))
    if draw is None or len(classes) < 2:
        others = ", ".join(name for name in TEACHERS if name != "tiny")
        raise ValueError("--teacher=tiny learns from labels, which these images don't have: use "
                         f"--method=sit, or one of {others}")
    teacher = trained_once(
        "tiny_teacher", partial(TinyTeacher, len(classes)), 0, draw,
        lambda net: train_tiny_teacher(net, draw), *getattr(draw, "recipe", ()))
    teacher.grid = grid
    return teacher


# ---- TEACHERS -------------------------------------------------------------------

class Teacher(NamedTuple):
    dim: int            # d, of its tokens
    stride: int         # the image is resized to stride x grid
    load: Callable      # (grid=, repo=, weights=, draw=), each of which it must accept -> network


TEACHERS = {"tiny": Teacher(TinyTeacher.dim, TinyTeacher.stride, load_tiny_teacher)}
for size, dim in DINOV2_DIMS.items():
    for name in (f"dinov2_{size}", f"dinov2_{size}_reg"):
        TEACHERS[name] = Teacher(dim, DINOv2.stride, partial(DINOv2, name))


def load_teacher(name, grid, repo="", weights="", draw=None):
    """A frozen teacher for a denoiser of grid x grid tokens, for images of any resolution."""
    if name not in TEACHERS:
        raise ValueError(f"unknown teacher {name!r}: expected one of {', '.join(TEACHERS)}")
    return TEACHERS[name].load(grid=grid, repo=repo, weights=weights, draw=draw)
