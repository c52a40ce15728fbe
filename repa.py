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
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from vae import load_pt, load_weights, reading


def align_loss(tokens, target):
    """Two lists of [B, T, d], one entry for each projector -> scalar in [-1, 1]; -1 is perfect."""
    cosines = []
    with torch.autocast(target[0].device.type, enabled=False):      # half precision makes NaN
        for p, f in zip(tokens, target, strict=True):
            p, f = F.normalize(p.float(), dim=-1), F.normalize(f.float(), dim=-1)
            cosines.append((p * f).sum(-1).mean())
    return -sum(cosines) / len(cosines)


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
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DINOv2(nn.Module):
    """uint8 [B, 3, R, R] -> patch tokens [B, grid^2, d]. The image is resized to 14 grid: patches
    have 14 px. Without downloads: repo is a clone of facebookresearch/dinov2, weights a file."""
    stride = 14

    def __init__(self, name, grid, repo="", weights=""):
        super().__init__()
        self.grid = grid
        self.net = self.load(name, repo, weights)
        table = self.resample(self.net.pos_embed.data, grid)
        self.net.pos_embed = nn.Parameter(table, requires_grad=False)
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("std", std[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    @staticmethod
    def load(name, repo, weights):
        """From torch.hub, or a local clone; with a local file's weights, if there is one."""
        registers = "_reg4" if name.endswith("_reg") else ""
        file = f"dinov2_{name.split('_')[1]}{registers}_pretrain.pth"
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        if not weights and (folder / file).exists():
            weights = str(folder / file)
        os.environ.setdefault("XFORMERS_DISABLED", "1")     # with it: graph breaks, other numbers
        source = "local" if repo else "github"
        try:
            net = torch.hub.load(
                repo or f"{DINOV2_REPO}:{DINOV2_REVISION}", name, source=source, trust_repo=True,
                skip_validation=True, verbose=False, pretrained=not weights)
            if weights:
                load_weights(net, load_pt(weights))
        except Exception as error:                          # hub code of any kind runs here
            said = " ".join(str(error).split())[:200]
            raise ValueError(
                f"cannot load the teacher {name} from {weights or 'torch.hub'} "
                f"({type(error).__name__}: {said}): name a clone of {DINOV2_REPO} with "
                f"--teacher_repo=DIR, and put {file} into {folder} or name it with "
                "--teacher_weights=FILE (evaluate.py: --repo, --weights)") from error
        return net

    @staticmethod
    def resample(table, side):
        """Position table [1, 1 + n^2, d] -> [1, 1 + side^2, d]; the class token's row stays.
        Bicubic with antialias, as the authors do; DINOv2's own resampling gives other tokens."""
        first, grid = table[:, :1], table[:, 1:]
        n = math.isqrt(grid.shape[1])
        grid = grid.reshape(1, n, n, -1).permute(0, 3, 1, 2).float()            # [1, d, n, n]
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
        grid = grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)
        return torch.cat([first, grid.to(table.dtype)], 1)

    def preprocess(self, image):
        """uint8 -> normalised by ImageNet's statistics, then 14 px for each patch."""
        return resize((image.float() / 255 - self.mean) / self.std, self.stride * self.grid)

    def forward(self, image):
        return self.net.forward_features(self.preprocess(image))["x_norm_patchtokens"]


# ---- The small teacher ----------------------------------------------------------
# Of the tiny preset: a convnet, trained on the spot in a minute, without downloads.

class TinyTeacher(nn.Module):
    """uint8 [B, 3, R, R] -> tokens [B, grid^2, 64], learnt by naming each token's shape, or
    background. The image is resized to 8 grid; in its training grid is None: it stays as it is."""
    dim, stride = 64, 8

    def __init__(self, num_classes=10):
        super().__init__()
        self.grid = None
        layers = []
        for c_in, c_out, stride in ((3, 32, 2), (32, 64, 2), (64, 64, 1), (64, 96, 2), (96, 96, 1)):
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
        h = self.net(x).flatten(2).transpose(1, 2)              # [B, T, 96]
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
    """draw: Shapes.draw -> accuracy on held-out images."""
    background = net.segment.out_features - 1

    def loss(indices):
        image, label, mask = draw(indices)
        tokens, pooled = net.features(image)
        share = F.avg_pool2d(mask[:, None], net.stride).flatten(1)              # [B, T]
        target = torch.where(share > 0.25, label[:, None], background)          # [B, T]
        segments = net.segment(tokens).flatten(0, 1)
        return (F.cross_entropy(segments, target.flatten())
                + F.cross_entropy(net.classify(pooled), label))
    fit(net, loss, "training the tiny teacher", steps, batch)
    net.eval()
    with torch.no_grad():
        image, label, _ = draw(range(10**6, 10**6 + 1000))
        guess = net.classify(net.features(image)[1]).argmax(1)
        return (guess == label).float().mean().item()


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
        file.parent.mkdir(parents=True, exist_ok=True)
        train(net)
        torch.save(net.state_dict(), f"{file}.{os.getpid()}.tmp")
        os.replace(f"{file}.{os.getpid()}.tmp", file)
    with reading(file, "a network that was trained here: remove it, it is made again"):
        load_weights(net, load_pt(file))
    return net.eval().requires_grad_(False)


def load_tiny_teacher(draw, grid=None):
    """The small teacher for grid x grid tokens; draw: Shapes.draw, which it is trained on."""
    if draw is None:
        raise ValueError("--teacher=tiny is trained on --data=tiny: use both, or one of "
                         f"{', '.join(name for name in TEACHERS if name != 'tiny')}")
    teacher = trained_once("tiny_teacher", TinyTeacher, 0, draw,
                           lambda net: train_tiny_teacher(net, draw))
    teacher.grid = grid
    return teacher


# ---- TEACHERS -------------------------------------------------------------------

class Teacher(NamedTuple):
    dim: int            # d, of its tokens
    stride: int         # the image is resized to stride x grid
    load: Callable      # (grid, repo, weights, draw) -> frozen network


def dinov2(name, dim):
    return Teacher(dim, DINOv2.stride,
                   lambda grid, repo, weights, draw: DINOv2(name, grid, repo, weights))


TEACHERS = {
    "tiny": Teacher(TinyTeacher.dim, TinyTeacher.stride,
                    lambda grid, repo, weights, draw: load_tiny_teacher(draw, grid)),
}
for size, dim in DINOV2_DIMS.items():
    TEACHERS[f"dinov2_{size}"] = dinov2(f"dinov2_{size}", dim)
    TEACHERS[f"dinov2_{size}_reg"] = dinov2(f"dinov2_{size}_reg", dim)


def load_teacher(name, grid, repo="", weights="", draw=None):
    """A frozen teacher for a denoiser of grid x grid tokens, for images of any resolution."""
    if name not in TEACHERS:
        raise ValueError(f"unknown teacher {name!r}: expected one of {', '.join(TEACHERS)}")
    return TEACHERS[name].load(grid, repo, weights, draw)
