"""Representations: the frozen teacher, the alignment loss, and a measure of alignment.

REPA-E trains a VAE through a diffusion transformer. The diffusion loss cannot do that: it is small where latents are
easy to denoise, and the easiest latents are constant ones. The alignment loss can: SiT's early tokens must predict what
a frozen self-supervised teacher sees in the clean image, so the latents must keep the image's meaning.

    align(h, f) = - mean over images and tokens of cos( projector(h_t), f )       (REPA, equation 8)

    f  [B, T, d]   the teacher's patch tokens of the clean image (DINOv2 ViT-B/14: T = 256, d = 768)
    h  [B, T, D]   SiT's tokens after block `align_depth`, at noise level t; projected to [B, T, d]
"""
import hashlib
import math
import os
import zipfile
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

def align_loss(projected, target):
    """Lists of [B, T, d] (SiT's projected tokens, the teacher's tokens) -> scalar in [-1, 1]; -1 is perfect."""
    with torch.autocast(target[0].device.type, enabled=False):      # norms in half precision are a source of NaN
        cosines = [(F.normalize(p.float(), dim=-1) * F.normalize(f.float(), dim=-1)).sum(-1).mean()
                   for p, f in zip(projected, target, strict=True)]
        return -sum(cosines) / len(cosines)

def load_weights(net, path, part=None):
    """A file's weights (or a part of it) into the net, checksums and types compared -> the file's content."""
    if (zipped := zipfile.is_zipfile(path)) and (bad := zipfile.ZipFile(path).testzip()):
        raise ValueError(f"the checksum of {bad} differs")
    file = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    state = file[part] if part else file
    for key, own in net.state_dict().items():
        if key in state and own.is_floating_point() != state[key].is_floating_point():
            raise ValueError(f"{key} is {state[key].dtype}, expected {own.dtype}")
    net.load_state_dict(state)
    return file

# ---------------------------------------------------------------- DINOv2 (Oquab et al., 2304.07193) through torch.hub.

DINOV2_REPO = "facebookresearch/dinov2"
DINOV2_REVISION = "e1277af2ba9496fbadf7aec6eba56e8d882d1e35"    # has the registers, and runs on every Python since 3.9
DINOV2_DIMS = {"vits14": 384, "vitb14": 768, "vitl14": 1024, "vitg14": 1536}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

def resize(x, side):
    """Images float [B, 3, R, R] -> [B, 3, side, side], bicubic: without antialias, as in the paper (256 -> 224), while
    the scale is at least 0.8."""
    if x.shape[-1] == side:
        return x
    return F.interpolate(x, (side, side), mode="bicubic", antialias=side < 0.8 * x.shape[-1])

class DINOv2(nn.Module):
    """uint8 [B, 3, R, R] -> patch tokens [B, grid^2, d]: the image is resized to 14 grid, patches have 14 px.
    Without downloads: repo is a clone of facebookresearch/dinov2, weights a file (dinov2_vitb14_pretrain.pth).
    """
    stride = 14
    def __init__(self, name, grid, repo="", weights=""):
        super().__init__()
        file = f"dinov2_{name.split('_')[1]}{'_reg4' if name.endswith('_reg') else ''}_pretrain.pth"
        self.grid, cached = grid, Path(torch.hub.get_dir()) / "checkpoints" / file
        weights = weights or (str(cached) if cached.exists() else "")
        os.environ.setdefault("XFORMERS_DISABLED", "1")   # with xformers: graph breaks, other numbers
        try:
            where, source = (repo, "local") if repo else (f"{DINOV2_REPO}:{DINOV2_REVISION}", "github")
            self.net = torch.hub.load(where, name, source=source, trust_repo=True, skip_validation=True, verbose=False,
                                      pretrained=not weights)
            if weights:
                load_weights(self.net, weights)
        except Exception as error:      # hub code of any kind runs here
            why = f"from {weights or 'torch.hub'} ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
            raise ValueError(
                f"cannot load the teacher {name} {why}: name a clone of {DINOV2_REPO} with --teacher_repo=DIR, and put "
                f"{file} into {torch.hub.get_dir()}/checkpoints or name it with --teacher_weights=FILE (evaluate.py: "
                "--repo, --weights)") from None
        self.net.pos_embed = nn.Parameter(self.resample(self.net.pos_embed.data, grid), requires_grad=False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)
    @staticmethod
    def resample(table, side):
        """Position table [1, 1 + n*n, d] -> [1, 1 + side*side, d]: bicubic; the class token's row stays. With
        antialias and without the offset of DINOv2's own resampling at run time, which gives other tokens."""
        first, grid = table[:, :1], table[:, 1:]
        n = math.isqrt(grid.shape[1])
        grid = grid.reshape(1, n, n, -1).permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([first, grid.permute(0, 2, 3, 1).reshape(1, side * side, -1).to(table.dtype)], 1)
    def preprocess(self, image):
        """uint8 -> normalised by ImageNet's statistics, then 14 px for each patch."""
        return resize((image.float() / 255 - self.mean) / self.std, self.stride * self.grid)
    def forward(self, image):
        return self.net.forward_features(self.preprocess(image))["x_norm_patchtokens"]

# -------------------------- The offline teacher of the `tiny` world: a small convnet, trained on the spot in a minute.

class TinyTeacher(nn.Module):
    """uint8 [B, 3, R, R] -> tokens [B, grid^2, 64], learnt by naming each token's shape, or background. The image is
    resized to 8 grid; while the teacher is trained, grid is None and the image stays as it is."""
    dim, stride = 64, 8
    def __init__(self, num_classes=10):
        super().__init__()
        self.grid = None
        def stage(c_in, c_out, stride):
            return nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()
        self.net = nn.Sequential(*stage(3, 32, 2), *stage(32, 64, 2), *stage(64, 64, 1), *stage(64, 96, 2),
                                 *stage(96, 96, 1))
        self.token, self.norm = nn.Linear(96, self.dim), nn.BatchNorm1d(self.dim, affine=False)
        self.segment = nn.Linear(self.dim, num_classes + 1)     # the last class is the background
        self.classify = nn.Linear(96, num_classes)
        self.to(memory_format=torch.channels_last)
    def features(self, image):
        """-> tokens [B, T, 64], pooled [B, 96]."""
        x = image.float() / 127.5 - 1
        if self.grid is not None:
            x = resize(x, self.stride * self.grid)
        h = self.net(x).flatten(2).transpose(1, 2)                                              # [B, T, 96]
        tokens = self.norm(self.token(h).flatten(0, 1))         # each feature centred: a cosine of 0 is chance
        return tokens.view(len(h), -1, self.dim), h.mean(1)
    def forward(self, image):
        return self.features(image)[0]

def fit(net, loss, title, steps, batch=64):
    """Trains a small net for `steps`: loss(indices of the batch's images) -> scalar; one cycle of the learning rate."""
    opt = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=steps)
    for step in tqdm(range(steps), title, leave=False):
        opt.zero_grad()
        loss(range(step * batch, (step + 1) * batch)).backward()
        opt.step()
        schedule.step()

def train_tiny_teacher(net, draw, steps=700, batch=64):
    """draw(indices) -> images, labels, masks (vae.py's Shapes.draw). Returns the accuracy on held-out images."""
    def loss(indices):
        image, label, mask = draw(indices)
        tokens, pooled = net.features(image)
        share = F.avg_pool2d(mask[:, None], net.stride).flatten(1)                              # [B, T], of the shape
        target = torch.where(share > 0.25, label[:, None], net.segment.out_features - 1)        # [B, T]
        return (F.cross_entropy(net.segment(tokens).flatten(0, 1), target.flatten())
                + F.cross_entropy(net.classify(pooled), label))
    fit(net, loss, "training the tiny teacher", steps, batch)
    net.eval()
    with torch.no_grad():
        image, label, _ = draw(range(10**6, 10**6 + 1000))
        return (net.classify(net.features(image)[1]).argmax(1) == label).float().mean().item()

def trained_once(kind, build, seed, draw, train, *recipe):
    """-> build() of this seed, in eval mode, with the weights that train(net) -> extra gives it the first time and
    torch.hub's cache keeps, and extra. The file's name stands for the data, the recipe and the net."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build()
    sheet = draw(range(16))[0].numpy().tobytes()
    key = hashlib.sha256(f"{recipe} {net}".encode() + sheet).hexdigest()[:8]
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{kind}-{key}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        extra = train(net)
        torch.save({"net": net.state_dict(), "extra": extra}, f"{path}.tmp")
        Path(f"{path}.tmp").replace(path)
    try:
        return net.eval(), load_weights(net, path, "net")["extra"]
    except Exception as error:              # a damaged file may lead its reader anywhere
        raise ValueError(f"{path} is damaged ({type(error).__name__}): remove it, it is made again") from None

def load_tiny_teacher(draw):
    """-> the teacher, trained or from the cache, and its accuracy."""
    return trained_once("tiny-teacher", TinyTeacher, 0, draw, lambda net: train_tiny_teacher(net, draw))

def frozen_tiny_teacher(grid, draw):
    """The tiny teacher for a denoiser of grid x grid tokens; draw: Shapes.draw, which it is trained on."""
    if draw is None:
        raise ValueError("--teacher=tiny is trained on --data=tiny: use both, or one of "
                         f"{', '.join(name for name in TEACHERS if name != 'tiny')}")
    teacher = load_tiny_teacher(draw)[0].requires_grad_(False)
    teacher.grid = grid
    return teacher

class Teacher(NamedTuple):
    """An entry of TEACHERS."""
    dim: int            # d, of its tokens
    stride: int         # pixels of its input a token: the image is resized to stride x grid
    load: Callable      # (grid, repo, weights, draw) -> a frozen network: uint8 [B, 3, R, R] -> tokens [B, grid^2, d]

def dinov2(size, registers):
    """The entry of one DINOv2."""
    return Teacher(DINOV2_DIMS[size], DINOv2.stride, lambda grid, repo, weights, draw: DINOv2(
        f"dinov2_{size}{registers}", grid, repo, weights))

TEACHERS = {"tiny": Teacher(TinyTeacher.dim, TinyTeacher.stride,
                            lambda grid, repo, weights, draw: frozen_tiny_teacher(grid, draw))}
TEACHERS |= {f"dinov2_{size}{registers}": dinov2(size, registers) for size in DINOV2_DIMS for registers in ("", "_reg")}

def load_teacher(name, grid, repo="", weights="", draw=None):
    """A frozen teacher for a denoiser of grid x grid tokens: uint8 [B, 3, R, R] -> tokens [B, grid^2, d], of any
    resolution R. One rank loads it first."""
    if name not in TEACHERS:
        raise ValueError(f"unknown teacher {name!r}: expected one of {', '.join(TEACHERS)}")
    return TEACHERS[name].load(grid, repo, weights, draw)

# ----------------------------- A measure of alignment that needs no projector: do the same images lie near each other?

def neighbours(x, k):
    """Rows of unit length [N, D] -> inner products with the k nearest other rows, and their numbers, [N, k] each."""
    found = []
    for first in range(0, len(x), 1024):
        products = x[first : first + 1024] @ x.T
        products.diagonal(first).fill_(-math.inf)               # not the row itself
        found.append(products.topk(k, dim=1))
    return [torch.cat(parts) for parts in zip(*found)]

def cknna(a, b, k=10):
    """Centred kernel nearest-neighbour alignment (Huh et al., 2405.07987, as in REPA): features [N, D], [N, d] of the
    same N images -> 1 for the same neighbourhoods, about 0 for unrelated ones.

        K_ij = a_i . a_j,  L_ij = b_i . b_j     of unit length, if j is among the k nearest of i in a and in b, else 0
        CKNNA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))        with the unbiased HSIC (Song et al. 2012, equation 5)

    At most N k entries are not 0: no N x N matrix is kept. Huh et al.'s code adds 1e-6 to the denominator.
    """
    n = len(a)
    if len(b) != n or n <= max(k, 3):
        raise ValueError(f"CKNNA with k = {k} needs {max(k, 3) + 1} images or more, twice the same: {n} and {len(b)}")
    a, b = (neighbours(F.normalize(x.float(), dim=1), k) for x in (a, b))
    def hsic(p, q):
        (value_p, index_p), (value_q, index_q) = p, q
        i, u, v = (index_p[:, :, None] == index_q[:, None]).nonzero(as_tuple=True)      # in both
        j, K, L = index_p[i, u], value_p[i, u].double(), value_q[i, v].double()         # entries K_ij, L_ij
        mirrored = torch.isin(i * n + j, j * n + i)                                     # L_ji is one, too
        columns, rows = K.new_zeros(n).index_add_(0, j, K), K.new_zeros(n).index_add_(0, i, L)
        return (K * L)[mirrored].sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 * columns @ rows / (n - 2)
    return float(hsic(a, b) / (hsic(a, a) * hsic(b, b)).sqrt())     # HSIC's factor 1 / (n (n - 3)) cancels
