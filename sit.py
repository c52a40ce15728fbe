"""The denoiser and its mathematics: interpolants, the latents' BatchNorm, and SiT.

    z   [B, C, H, W]   unnormalised latents                     (from the VAE)
    zn  = (z - mean) / sqrt(var + eps)                          LatentNorm, `bn`
    z_t = alpha(t) zn + sigma(t) eps                            interpolate; t = 0 is data, t = 1 is noise
    x   [B, T, D]      tokens of z_t, T = (H / patch) (W / patch)
      |  blocks 1 .. align_depth                                early layers: they learn representations
      |---> projector ---> [B, T, d_teacher]                    aligned with the teacher's tokens
      |  the other blocks, final layer
    v   [B, C, H, W]   predicted velocity d z_t / dt

Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers"
(2401.08740); Yu et al., "Representation Alignment for Generation" (REPA, 2410.06940); Leng et al., REPA-E (2504.10483).
Module names are timm's and the authors', so that published weights load.
"""
import math
import re
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# ----------- Interpolants: z_t = alpha zn + sigma eps (SiT, section 2.1). t is any tensor; d_* are derivatives by t.

def interpolant(t, path="linear"):
    """t in [0, 1] -> alpha, sigma, d_alpha, d_sigma, each of t's shape."""
    if path == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path == "cosine":
        a = math.pi / 2
        return torch.cos(a * t), torch.sin(a * t), -a * torch.sin(a * t), a * torch.cos(a * t)
    raise ValueError(f"unknown interpolant {path!r}: expected linear or cosine")

def expand(t, x):
    """t [B] -> [B, 1, ...], to be multiplied with x [B, ...]."""
    return t.view(-1, *[1] * (x.dim() - 1))

def interpolate(zn, eps, t, path="linear"):
    """Latents zn and noise eps [B, C, H, W], t [B] -> z_t and the target velocity v = d_alpha zn + d_sigma eps."""
    alpha, sigma, d_alpha, d_sigma = interpolant(expand(t, zn), path)
    return alpha * zn + sigma * eps, d_alpha * zn + d_sigma * eps

def data_noise_from_velocity(v, z_t, t, path="linear"):
    """The two unknowns (zn, eps) of the two equations z_t = alpha zn + sigma eps, v = d_alpha zn + d_sigma eps."""
    alpha, sigma, d_alpha, d_sigma = interpolant(expand(t, z_t), path)
    det = alpha * d_sigma - sigma * d_alpha         # linear: 1, cosine: pi/2; never 0
    return (d_sigma * z_t - sigma * v) / det, (alpha * v - d_alpha * z_t) / det

def score_from_velocity(v, z_t, t, path="linear"):
    """score = grad log p_t(z_t) = -E[eps | z_t] / sigma; defined for t > 0 (SiT, equation 9)."""
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
    """u uniform in (0, 1), [B] -> training times t [B]: u itself, or EDM's lognormal sigma = exp(N(0, 1))."""
    if weighting == "uniform":
        return u
    sigma = torch.special.ndtri(u.double().clamp(1e-9, 1 - 1e-9)).exp()
    return (sigma / (1 + sigma) if path == "linear" else 2 / math.pi * torch.atan(sigma)).to(u.dtype)

# -------- Latent BatchNorm (REPA-E): the VAE's latents drift while it trains; this keeps SiT's input at unit variance.

class LatentNorm(nn.BatchNorm2d):
    """BatchNorm2d with its two modes as two calls.
    forward(z) uses the running statistics and leaves them alone: for the gradient of the VAE step they are constants.
    normalise_batch(z) uses the statistics of the whole batch on all ranks, and keeps their sums until commit() merges
    them into the running ones, once a step, however many micro-batches it had.
    """
    def __init__(self, channels):
        super().__init__(channels, eps=1e-4, momentum=0.1, affine=False)
        self.pending = None
    def forward(self, z):
        """z [B, C, H, W] -> zn, by the running statistics."""
        return self._scale(z, self.running_mean, self.running_var)
    def inverse(self, zn):
        """zn -> z: the exact inverse of forward, before decoding."""
        return zn * (self.running_var + self.eps).sqrt()[:, None, None] + self.running_mean[:, None, None]
    def _scale(self, z, mean, var):
        return (z - mean.to(z.dtype)[:, None, None]) * (var + self.eps).rsqrt().to(z.dtype)[:, None, None]
    def normalise_batch(self, z):
        """z [B, C, H, W] float32 -> zn, by this batch's mean and biased variance over all ranks."""
        count = z.numel() // z.shape[1]
        own = torch.stack([z.double().sum((0, 2, 3)), z.double().square().sum((0, 2, 3))])      # [2, C], float64
        total = own.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(total)
            count = count * dist.get_world_size()
        self.pending = (total, count) if self.pending is None else (self.pending[0] + total, self.pending[1] + count)
        mean, square = (own + (total - own).detach()) / count       # naive ablation: gradient through this rank's share
        return self._scale(z, mean.float(), (square - mean.square()).float())
    def pending_statistics(self):
        """Mean and unbiased variance [C] of everything normalised since the last commit."""
        (total, square), n = self.pending
        mean = total / n
        return mean.float(), ((square / n - mean.square()) * (n / max(n - 1, 1))).float()
    @torch.no_grad()
    def commit(self, ok):
        """Move the running statistics towards the pending ones; where ok (a bool tensor) is False they stay."""
        for running, new in zip((self.running_mean, self.running_var), self.pending_statistics()):
            running.copy_(torch.where(ok, running.lerp(new, self.momentum), running))
        self.pending = None
        self.num_batches_tracked += ok.long()
    @torch.no_grad()
    def set(self, mean, var):
        """Start from given statistics, [C] each."""
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        self.num_batches_tracked.zero_()

# ----------------------------------------------- SiT: DiT's transformer with adaLN-Zero (Peebles and Xie, 2212.09748).

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
    qk_norm: bool = False
    path: str = "linear"            # the interpolant it is trained on

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}      # depth, width, heads

def parse_size(name):
    """ "SiT-XL/2" or "depth-width-heads/patch" ("6-192-3/2") -> (depth, width, heads, patch)."""
    body, _, patch = name.removeprefix("SiT-").partition("/")
    shape = SIZES.get(body) or tuple(int(n) if n.isdecimal() else 0 for n in body.split("-"))
    if len(shape) != 3 or 0 in shape or shape[1] % shape[2] or shape[1] % 4 or patch not in ("1", "2", "4", "8"):
        raise ValueError(f"unknown SiT {name!r}: expected SiT-S, -B, -L or -XL and a patch of 1, 2, 4 or 8 (SiT-XL/2), "
                         "or depth-width-heads/patch (6-192-3/2), the width a multiple of its heads and of 4")
    return *shape, int(patch)

def sincos_2d(dim, side):
    """Fixed position table [1, side * side, dim]: half of dim for the column, half for the row, each [sin, cos]."""
    frequency = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency                        # [side, dim/4]
    line = torch.cat([angle.sin(), angle.cos()], 1)                                             # [side, dim/2]
    column, row = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)           # [side, side, dim/2]
    return torch.cat([column, row], 2).reshape(1, side * side, dim).float()

def modulate(x, shift, scale):
    """Adaptive LayerNorm of tokens x [B, T, D]; shift and scale [B, D] come from the condition."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

class TimestepEmbedder(nn.Module):
    """t [B] -> [B, D]: 128 cosines, 128 sines of t times 10000^(-k/128), then an MLP."""
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
    @staticmethod
    def frequencies(device=None):
        return torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=device) / 128)
    def forward(self, t):
        angle = t.float()[:, None] * self.frequencies(t.device)
        with torch.autocast(t.device.type, enabled=False):      # bfloat16 would merge neighbouring t
            return self.mlp(torch.cat([angle.cos(), angle.sin()], 1))

class Attention(nn.Module):
    """Multi-head self-attention, [B, T, D] -> [B, T, D]."""
    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)     # [B, heads, T, d]
        x = F.scaled_dot_product_attention(self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))

class Block(nn.Module):
    """A transformer block whose shifts, scales and gates come from the condition c [B, D]; zero gates at the start."""
    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width), gelu=nn.GELU(approximate="tanh"), fc2=nn.Linear(4 * width, width)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(x, shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(x, shift_m, scale_m))

class FinalLayer(nn.Module):
    """[B, T, D] -> [B, T, patch * patch * C]."""
    def __init__(self, width, patch, channels):
        super().__init__()
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(x, shift, scale))

class PatchEmbed(nn.Module):
    """[B, C, H, W] -> [B, T, D]."""
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)
    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()     # the residual stream keeps this layout

class SiT(nn.Module):
    """The denoiser: SiT's step, the alignment in the VAE's step and sampling all call forward."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, D, wide = cfg, cfg.width, cfg.projector_width
        self.x_embedder = PatchEmbed(cfg.channels, D, cfg.patch)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(cfg.num_classes + 1, D)})
        self.register_buffer("pos_embed", sincos_2d(D, cfg.size // cfg.patch))      # a constant: no optimizer sees it
        self.blocks = nn.ModuleList(Block(D, cfg.heads, cfg.qk_norm) for _ in range(cfg.depth))
        self.projectors = nn.ModuleList(
            nn.Sequential(nn.Linear(D, wide), nn.SiLU(), nn.Linear(wide, wide), nn.SiLU(), nn.Linear(wide, dim))
            for dim in cfg.teacher_dims)
        self.final_layer = FinalLayer(D, cfg.patch, cfg.channels)
        self.bn = LatentNorm(cfg.channels)
        self.initialise()
    def initialise(self):
        """adaLN-Zero: every block starts as the identity, and the predicted velocity as 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for layer in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
    @property
    def grid(self):
        """Side of the square of tokens."""
        return self.cfg.size // self.cfg.patch

    def unpatchify(self, x):
        """[B, T, patch * patch * C] -> [B, C, H, W]; the last axis is ordered (row in the patch, column, channel)."""
        B, p, n = len(x), self.cfg.patch, self.grid
        x = x.view(B, n, n, p, p, self.cfg.channels).permute(0, 5, 1, 3, 2, 4)      # [B, C, n, p, n, p]
        return x.reshape(B, self.cfg.channels, n * p, n * p)
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

# - Loading: the weights of REPA-E, REPA (sihyun-yu/REPA) and SiT (willisma/SiT), whose modules have the names of ours.

def published_sit(file):
    """A published checkpoint, as torch.load gives it -> (SiTConfig, state dict), the same network as a SiT of ours.
    The architecture is read off the shapes (heads have 64 channels, XL's 72); the file's args, if any, tell the rest.
    Files without statistics of the latents (REPA, SiT) are SD-VAE's: zn = 0.18215 z.
    """
    state, args = file.get("ema", file), file.get("args")
    early, late = (len({key.split(".")[1] for key in state if key.startswith(prefix)})
                   for prefix in ("blocks.", "decoder_blocks."))
    state = {re.sub(r"^decoder_blocks\.(\d+)", lambda m: f"blocks.{early + int(m[1])}", key): value
             for key, value in state.items()}           # older files of REPA count anew behind align_depth
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    dims = tuple(len(w) for key, w in state.items() if re.fullmatch(r"projectors\.\d+\.4\.weight", key))
    cfg = SiTConfig(
        depth=early + late, width=width, heads=16 if width == 1152 else width // 64, patch=patch, channels=channels,
        size=patch * math.isqrt(state["pos_embed"].shape[1]),
        num_classes=len(state["y_embedder.embedding_table.weight"]) - 1, teacher_dims=dims,
        align_depth=getattr(args, "encoder_depth", early if late else 8 if width >= 1024 else 4),
        projector_width=len(state["projectors.0.0.weight"]) if dims else SiTConfig.projector_width,
        qk_norm="blocks.0.attn.q_norm.weight" in state, path=getattr(args, "path_type", "linear").lower())
    if len(state["final_layer.linear.weight"]) == 2 * patch * patch * channels:
        reverse_time(state, patch, channels)
    prediction = getattr(args, "prediction", "v")
    if width % 64 or cfg.path not in ("linear", "cosine") or prediction not in ("v", "velocity"):
        raise ValueError(f"width {width}, path {cfg.path}, prediction {prediction}: expected a multiple of 64, linear "
                         "or cosine, v or velocity")
    if "bn.running_var" not in state and channels == 4:
        bn = LatentNorm(channels)
        bn.set(torch.zeros(channels), torch.full((channels,), 0.18215**-2 - bn.eps))
        state |= {f"bn.{key}": value for key, value in bn.state_dict().items()}
    return cfg, state

def reverse_time(state, patch, channels):
    """willisma/SiT's weights, in place: t = 1 is data there, v has the other sign. -> v(z, t) = -theirs(z, 1 - t).
    cos f(1 - t) = cos f cos ft + sin f sin ft, and sin f(1 - t) = sin f cos ft - cos f sin ft: the first layer behind
    the cosines and sines takes 1 - t in. Of the 2C channels of the output, C are the velocity and C are unused.
    (DiT's files have the same names and shapes but predict noise: nothing tells them from SiT's.)
    """
    cos, sin = state["t_embedder.mlp.0.weight"].double().chunk(2, 1)
    f = TimestepEmbedder.frequencies().double()
    turned = (cos * f.cos() + sin * f.sin(), cos * f.sin() - sin * f.cos())
    state["t_embedder.mlp.0.weight"] = torch.cat(turned, 1).float()
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[key].unflatten(0, (patch * patch, 2 * channels))               # ordered (row, column, channel)
        state[key] = -rows[:, :channels].flatten(0, 1)
