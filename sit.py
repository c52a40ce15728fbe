"""The denoiser and its mathematics: interpolants, the latents' BatchNorm, and SiT.

    z   [B, C, H, W]   unnormalised latents                     from the VAE
    zn  = (z - mean) / sqrt(var + eps)                          LatentNorm, `bn`
    z_t = alpha(t) zn + sigma(t) eps                            interpolate; t = 0 is data, 1 noise
    x   [B, T, D]      tokens of z_t, T = (H / patch) (W / patch)
      |  blocks 1 .. align_depth                                early: they learn representations
      |---> projector ---> [B, T, d_teacher]                    aligned with the teacher's tokens
      |  the other blocks, final layer
    v   [B, C, H, W]   predicted velocity d z_t / dt

Ma et al., "SiT" (2401.08740); Yu et al., REPA (2410.06940); Leng et al., REPA-E (2504.10483).
Module names are timm's and the authors', so that published weights load by name.

What every denoiser offers: net(z_t, t, y, drop, depth) -> v, tokens; .cfg with channels, size,
num_classes, path and align_depth; .bn, its LatentNorm; .grid, the side of its square of tokens.
"""
import math
import re
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


# ---- Interpolants ---------------------------------------------------------------
# z_t = alpha zn + sigma eps (SiT, section 2.1). t is any tensor; d_alpha, d_sigma are
# derivatives by t. From the velocity follow data, noise and score, and back.

def interpolant(t, path="linear"):
    """t in [0, 1] -> alpha, sigma, d_alpha, d_sigma, each of t's shape."""
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path == "cosine":
        a = math.pi / 2
        cos, sin = torch.cos(a * t), torch.sin(a * t)
        return cos, sin, -a * sin, a * cos
    raise ValueError(f"unknown interpolant {path!r}: expected linear or cosine")


def expand(t, x):
    """t [B] -> [B, 1, ...], to be multiplied with x [B, ...]."""
    return t.view(-1, *[1] * (x.dim() - 1))


def interpolate(zn, eps, t, path="linear"):
    """zn and noise eps [B, C, H, W], t [B] -> z_t, and the velocity d_alpha zn + d_sigma eps."""
    alpha, sigma, d_alpha, d_sigma = interpolant(expand(t, zn), path)
    return alpha * zn + sigma * eps, d_alpha * zn + d_sigma * eps


def data_noise_from_velocity(v, z_t, t, path="linear"):
    """The unknowns zn, eps of z_t = alpha zn + sigma eps and v = d_alpha zn + d_sigma eps."""
    alpha, sigma, d_alpha, d_sigma = interpolant(expand(t, z_t), path)
    det = alpha * d_sigma - sigma * d_alpha         # linear: 1, cosine: pi/2; never 0
    return (d_sigma * z_t - sigma * v) / det, (alpha * v - d_alpha * z_t) / det


def score_from_velocity(v, z_t, t, path="linear"):
    """grad log p_t(z_t) = -E[eps | z_t] / sigma, for t > 0 (SiT, equation 9)."""
    _, eps = data_noise_from_velocity(v, z_t, t, path)
    return -eps / interpolant(expand(t, z_t), path)[1]


def velocity_from(kind, value, z_t, t, path="linear"):
    """Predicted "data" (t > 0), "noise" or "score" (both t < 1) -> velocity."""
    alpha, sigma, d_alpha, d_sigma = interpolant(expand(t, z_t), path)
    if kind == "data":
        return d_alpha * value + d_sigma * (z_t - alpha * value) / sigma
    eps = -sigma * value if kind == "score" else value
    return d_alpha * (z_t - sigma * eps) / alpha + d_sigma * eps


def time_from_uniform(u, weighting="uniform", path="linear"):
    """u uniform in (0, 1), [B] -> times t [B]: u, or EDM's lognormal sigma = exp(N(0, 1))."""
    if weighting == "uniform":
        return u
    sigma = torch.special.ndtri(u.double().clamp(1e-9, 1 - 1e-9)).exp()
    t = sigma / (1 + sigma) if path == "linear" else 2 / math.pi * torch.atan(sigma)
    return t.to(u.dtype)


def wide(device):
    """The dtype of statistics and of solvers' states: float64, which Apple's GPUs don't have."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


# ---- The latents' BatchNorm -----------------------------------------------------
# The latents drift while the VAE trains; this keeps SiT's input at unit variance.

class LatentNorm(nn.BatchNorm2d):
    """BatchNorm2d with its two modes as two calls.

    forward(z) uses the running statistics and leaves them alone: for the gradient of the VAE's step
    they are constants. normalise_batch(z) uses the statistics of the whole batch on all ranks, and
    keeps them until commit() merges these into the running ones, once a step.
    """

    def __init__(self, channels):
        super().__init__(channels, eps=1e-4, momentum=0.1, affine=False)
        self.seen = []          # of each batch since commit: positions, mean [C], variance [C]

    def forward(self, z):
        """z [B, C, H, W] -> zn, by the running statistics."""
        return self.scale(z, self.running_mean, self.running_var)

    def inverse(self, zn):
        """zn -> z: the exact inverse of forward, before decoding."""
        std = (self.running_var + self.eps).sqrt()
        return zn * std[:, None, None] + self.running_mean[:, None, None]

    def scale(self, z, mean, var):
        mean, rstd = mean.to(z.dtype), (var + self.eps).rsqrt().to(z.dtype)
        return (z - mean[:, None, None]) * rstd[:, None, None]

    def normalise_batch(self, z):
        """z [B, C, H, W] float32 -> zn, by this batch's mean and biased variance over all ranks."""
        n, dtype = z.numel() // z.shape[1], wide(z.device)
        center = z.new_zeros(z.shape[1], 1, 1, dtype=dtype)     # of the sums: 0 in float64
        if dist.is_initialized():
            n = n * dist.get_world_size()
        if dtype == torch.float32:              # has too few digits for E[x^2] - E[x]^2
            center = (self.over_ranks(z.detach().sum((0, 2, 3))) / n)[:, None, None]
        sums = (z.to(dtype) - center).sum((0, 2, 3))
        squares = (z.to(dtype) - center).square().sum((0, 2, 3))
        own = torch.stack([sums, squares])                                      # [2, C]

        # the value is that of all ranks; the gradient (naive method) is this rank's
        total = own + (self.over_ranks(own.detach().clone()) - own).detach()
        mean, square = total / n
        mean, var = mean + center.flatten(), square - mean.square()
        self.seen = [*self.seen, (n, mean.detach(), var.detach())]
        return self.scale(z, mean.float(), var.float())

    @staticmethod
    def over_ranks(sums):
        if dist.is_initialized():
            dist.all_reduce(sums)
        return sums

    def batch_statistics(self):
        """Mean and unbiased variance [C] of everything normalised since the last commit."""
        total = sum(n for n, _, _ in self.seen)
        mean = sum(n * mean for n, mean, _ in self.seen) / total
        square = sum(n * (var + (own - mean).square()) for n, own, var in self.seen)
        return mean.float(), (square / (total - 1)).float()

    @torch.no_grad()
    def commit(self, ok):
        """Move the running statistics towards the batch's; where ok (a bool tensor) is False,
        they stay."""
        running = self.running_mean, self.running_var
        for old, new in zip(running, self.batch_statistics()):
            old.copy_(torch.where(ok, old.lerp(new, self.momentum), old))
        self.seen = []
        self.num_batches_tracked += ok.long()

    @torch.no_grad()
    def load_stats(self, mean, var):
        """Start from given statistics, [C] each."""
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        self.num_batches_tracked.zero_()


# ---- SiT ------------------------------------------------------------------------
# DiT's transformer with adaLN-Zero (Peebles and Xie, 2212.09748).

@dataclass(frozen=True)
class SiTConfig:
    depth: int = 28
    width: int = 1152               # D
    heads: int = 16
    patch: int = 2
    channels: int = 4               # C, of the latents
    size: int = 32                  # H = W, of the latents
    num_classes: int = 1000         # the label num_classes is the null class
    teacher_dims: tuple = (768,)    # one projector for each; () builds none
    align_depth: int = 8            # the projectors read the output of this block
    projector_width: int = 2048
    qk_norm: bool = False           # of published files
    path: str = "linear"            # the interpolant that it is trained on


# SIZES: depth, width, heads
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12),
         "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def parse_size(name):
    """ "SiT-XL/2" or "depth-width-heads/patch" ("6-192-3/2") -> (depth, width, heads, patch)."""
    found = re.fullmatch(r"(?:SiT-)?(S|B|L|XL|[1-9]\d*-[1-9]\d*-[1-9]\d*)/([1248])", name)
    if found:
        size, patch = found.groups()
        depth, width, heads = SIZES.get(size) or map(int, size.split("-"))
        if width % heads == 0 and width % 4 == 0:
            return depth, width, heads, int(patch)
    raise ValueError(f"unknown SiT {name!r}: expected SiT-S, -B, -L or -XL and a patch of 1, 2, 4 "
                     "or 8 (SiT-XL/2), or depth-width-heads/patch (6-192-3/2), the width a "
                     "multiple of its heads and of 4")


def sincos_2d(dim, side):
    """Fixed position table [1, side^2, dim]: half of dim for the column, half for the row, each
    [sin, cos] of dim/4 frequencies."""
    frequency = 10000 ** -(torch.arange(dim // 4).double() / (dim // 4))
    angle = torch.arange(side)[:, None] * frequency                             # [side, dim/4]
    line = torch.cat([angle.sin(), angle.cos()], 1)                             # [side, dim/2]
    column, row = line.repeat(side, 1), line.repeat_interleave(side, 0)         # [side^2, dim/2]
    return torch.cat([column, row], 1)[None].float()


def modulate(x, shift, scale):
    """Adaptive LayerNorm of tokens x [B, T, D]; shift and scale [B, D] come from the condition."""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * (1 + scale[:, None]) + shift[:, None]


class TimestepEmbedder(nn.Module):
    """t [B] -> [B, D]: 128 cosines, 128 sines of t times 10000^(-k/128), then an MLP."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    @staticmethod
    def frequencies(device=None):
        k = torch.arange(128, dtype=torch.float32, device=device)
        return torch.exp(-math.log(10000) * k / 128)

    def forward(self, t):
        angle = t.float()[:, None] * self.frequencies(t.device)
        with torch.autocast(t.device.type, enabled=False):      # bfloat16 merges neighbouring t
            return self.mlp(torch.cat([angle.cos(), angle.sin()], 1))


class Attention(nn.Module):
    """Multi-head self-attention, [B, T, D] -> [B, T, D]."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x):
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # [B, heads, T, d]
        q = self.q_norm(q).to(v.dtype)
        k = self.k_norm(k).to(v.dtype)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Transformer block; shifts, scales and gates come from the condition c [B, D]. At the start
    the gates are zero."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width),
            gelu=nn.GELU(approximate="tanh"),
            fc2=nn.Linear(4 * width, width)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        x = x + gate_a[:, None] * self.attn(modulate(x, shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(x, shift_m, scale_m))


class FinalLayer(nn.Module):
    """[B, T, D] -> [B, T, patch^2 C]."""

    def __init__(self, width, patch, channels):
        super().__init__()
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(x, shift, scale))


class PatchEmbed(nn.Module):
    """[B, C, H, W] -> [B, T, D], contiguous: the residual stream keeps this layout."""

    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).mT.contiguous()


def projector(width, hidden, dim):
    """[B, T, D] -> [B, T, d_teacher] (REPA): an MLP of three layers."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(),
        nn.Linear(hidden, hidden), nn.SiLU(),
        nn.Linear(hidden, dim))


class SiT(nn.Module):
    """The denoiser: SiT's step, the alignment in the VAE's step and sampling all call forward."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        D = cfg.width
        self.x_embedder = PatchEmbed(cfg.channels, D, cfg.patch)
        self.t_embedder = TimestepEmbedder(D)
        table = nn.Embedding(cfg.num_classes + 1, D)
        self.y_embedder = nn.ModuleDict({"embedding_table": table})
        self.register_buffer("pos_embed", sincos_2d(D, self.grid))      # no optimizer sees it
        self.blocks = nn.ModuleList(Block(D, cfg.heads, cfg.qk_norm) for _ in range(cfg.depth))
        self.projectors = nn.ModuleList(
            projector(D, cfg.projector_width, dim) for dim in cfg.teacher_dims)
        self.final_layer = FinalLayer(D, cfg.patch, cfg.channels)
        self.bn = LatentNorm(cfg.channels)
        self.init_weights()

    def init_weights(self):
        """adaLN-Zero: each block starts as the identity, the predicted velocity as 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        mlp = self.t_embedder.mlp
        for layer in (self.y_embedder.embedding_table, mlp[0], mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    @property
    def grid(self):
        """Side of the square of tokens."""
        return self.cfg.size // self.cfg.patch

    def unpatchify(self, x):
        """[B, T, patch^2 C] -> [B, C, H, W]; the last axis is ordered row, column, channel."""
        C, p, n = self.cfg.channels, self.cfg.patch, self.grid
        x = x.view(-1, n, n, p, p, C).permute(0, 5, 1, 3, 2, 4)                 # [B, C, n, p, n, p]
        return x.reshape(-1, C, n * p, n * p)

    def forward(self, z_t, t, y, drop=None, depth=None):
        """Velocity and projected tokens; where drop is True, the label is the null class.

        z_t [B, C, H, W] normalised noisy latents, t [B], labels y [B], drop [B] bool or None
        -> v [B, C, H, W], or None if depth is given: then no block behind that one runs;
        tokens of block align_depth, a list of [B, T, d_teacher], one for each projector.
        """
        y = y if drop is None else torch.where(drop, self.cfg.num_classes, y)
        x = self.x_embedder(z_t) + self.pos_embed                               # [B, T, D]
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)             # [B, D]
        tokens = []
        for i, block in enumerate(self.blocks, 1):
            x = block(x, c)
            if i == self.cfg.align_depth:
                tokens = [project(x) for project in self.projectors]
            if i == depth:
                return None, tokens
        return self.unpatchify(self.final_layer(x, c)), tokens
