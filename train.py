"""REPA-E: a VAE and a latent diffusion transformer, trained together (Leng et al., 2504.10483).

    torchrun --nproc_per_node=8 train.py --data=imagenet/train      # the paper's run: the defaults
    python train.py --data=imagenet/train                           # on one GPU: 8 micro-batches
    python train.py --preset=tiny                                   # on a laptop, no download
    python train.py pack imagenet/train imagenet-256                # crop once: --data=imagenet-256
    torchrun --nproc_per_node=8 train.py encode sdvae imagenet-256 latents      # for a frozen VAE

Which loss trains what (x: its gradient arrives there):

    loss                                             VAE   discriminator   SiT and projector
    reconstruction + LPIPS + KL                       x
    GAN, generator's side: -D(rec)                    x     (frozen)
    alignment of SiT(z), through SiT and its bn       x                     (frozen)
    GAN, discriminator's side: hinge on x and rec           x
    velocity + alignment on z.detach()                                      x

Without that detach the diffusion loss would reach the VAE and collapse the latents: --method=naive
shows it. REPA on a frozen VAE, plain SiT and a VAE's first stage are the same loop: see METHODS.

A run's folder (--out) holds metrics.jsonl, previews, state.pt (all that resuming needs) and
snapshots step_N.pt (for sample.py, evaluate.py, --init, --vae). The same command again resumes.
"""
import copy
import errno
import hashlib
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

try:
    import fcntl
except ImportError:         # Windows has no such locks
    fcntl = None

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from repa import TEACHERS, DINOv2, align_loss, draw_of, load_teacher
from sample import (PATIENCE, PUBLISHED, Pipeline, all_mean, autocast, can_compile, check_side,
                    config_of, default_workers, find_checkpoint, free_space, friendly, hub_files,
                    hub_path, init_distributed, load_batches, load_vae, name_unreadable,
                    open_array, parse, prepare_out, rank0_first, read_weights, save_grid, seed_of)
from sit import SiT, SiTConfig, interpolate, parse_size, time_from_uniform, wide
from vae import (LPIPS, VAE, VAES, Discriminator, Folder, VAEConfig,
                 adaptive_gan_weight, discriminator_loss, fetch, fingerprint,
                 generator_loss, kl_divergence, load_weights, open_images, reading,
                 reconstruction_loss, to_float, to_uint8)


# ---- Settings -------------------------------------------------------------------
# The defaults are the paper's ImageNet run. `method` says what is trained; the
# other options say how.

class Method(NamedTuple):
    """What a method trains. (repa-e and naive train the same; what reaches the VAE through SiT is
    decided in vae_loss and train_step.)"""
    vae: bool           # the VAE, and with it the discriminator
    sit: bool           # SiT
    aligned: bool       # SiT's tokens with the teacher's, if align_sit > 0


METHODS = {
    "repa-e": Method(vae=True, sit=True, aligned=True),     # alignment trains both, diffusion SiT
    "repa": Method(vae=False, sit=True, aligned=True),      # SiT with alignment on a frozen VAE
    "sit": Method(vae=False, sit=True, aligned=False),      # the same without alignment
    "naive": Method(vae=True, sit=True, aligned=True),      # diffusion reaches the VAE: collapse
    "vae": Method(vae=True, sit=False, aligned=False),      # the VAE alone: a first stage
}


@dataclass
class Config:
    method: Literal[*METHODS] = "repa-e"    # repa-e, repa, sit, naive or vae: what is trained
    out: str = "runs/repa-e"        # the run's folder; the same command again resumes from it
    data: str = "data/imagenet/train"   # a tree of class folders, a pack of train.py pack, or tiny
    latents: str = ""               # a cache by train.py encode, in place of a frozen VAE's encoder
    resolution: int = 256           # R, side of the images
    vae: str = "sdvae"              # sdvae, invae, vavae, hf:...; a file or folder; f8d4 ... tiny
    sit: str = "SiT-XL/2"           # SiT-{S,B,L,XL}/{1,2,4,8} or depth-width-heads/patch
    teacher: Literal[*TEACHERS] = "dinov2_vitb14"   # dinov2_vit{s,b,l,g}14[_reg] or tiny
    teacher_repo: str = ""          # a local clone of facebookresearch/dinov2, without internet
    teacher_weights: str = ""       # a local file of the teacher's weights
    init: str = ""                  # start from this snapshot's VAE, discriminator and EMA SiT
    latent_norm: Literal["auto", "batch", "fixed"] = "auto"     # bn follows the latents (repa-e,
    #                                 naive), or keeps the statistics that it started with
    first_stage: int = 0            # train the VAE alone for so many steps first (random --vae)
    # SiT
    path: Literal["linear", "cosine"] = "linear"            # the interpolant
    weighting: Literal["uniform", "lognormal"] = "uniform"  # of t
    label_drop: float = 0.1         # share of labels that become the null class, for guidance
    align_depth: int = 0            # SiT block that is aligned; 0: L, XL 8, B, S 4, else half
    projector_width: int = 2048
    # losses
    align_sit: float = 0.5          # weight of the alignment in SiT's loss; trains the projector
    align_vae: float = 1.5          # ... in the VAE's loss (repa-e): the only way from SiT to it
    recon_loss: Literal["l1", "l2"] = "l1"      # l1 (the released settings), l2 (the paper's text)
    lpips: float = 1.0
    lpips_legacy_range: bool = False    # LPIPS on 2x - 1, as the published VAEs were trained
    kl: float = 1e-6
    sigma: float = 0.0              # > 0: fixed posterior std (sigma-VAE), for a VAE from scratch
    gan: float = 0.1                # 0 switches the discriminator off
    gan_start: int = -1             # the VAE hears D from this step on, D learns 2,000 before;
    #                                 -1: 0 with a discriminator from a file, else 2,000
    gan_adaptive: bool = False      # times LDM's ratio of gradients at the last layer
    disc_ch: int = 64               # the discriminator's first width, where none is loaded
    # optimisation
    steps: int = 400_000            # 80 epochs
    batch: int = 256                # images a step, over all processes
    micro_batch: int = 32           # images at a time on each process; the rest is accumulated
    lr_sit: float = 1e-4
    lr_vae: float = 1e-4
    lr_disc: float = 1e-4
    clip: float = 1.0               # norm of each network's gradient
    ema: float = 0.9999             # of SiT and its bn
    vae_ema: float = 0.0            # > 0: also of the VAE, which is then sampled with
    hflip: bool = False
    seed: int = 0
    # machine
    compile: Literal["auto", "0", "1"] = "auto"     # torch.compile; auto: on GPUs that can
    precision: Literal["auto", "bf16", "float32"] = "auto"  # auto: bf16 on GPUs that have it
    recompute: int = 0              # so many of the VAE's levels: activations again in backward
    deterministic: bool = False     # the same bits each time on a GPU, too: slower
    workers: int = 8                # processes that decode images, for each rank
    loader_timeout: int = 300       # seconds without a batch that end the run; the first: 3 times
    accept_data: bool = False       # resume on data that have changed since the run began
    # output
    log_every: int = 100
    preview_every: int = 10_000
    preview_steps: int = 50
    preview_guidance: float = 1.0
    save_every: int = 25_000        # steps between writes of state.pt
    snapshot_every: int = 50_000    # ... of step_N.pt, all of which are kept
    dry: bool = False               # check what can be checked without networks, then stop

    @property
    def trains_vae(self):
        return METHODS[self.method].vae

    @property
    def trains_sit(self):
        return METHODS[self.method].sit

    @property
    def aligned(self):
        """SiT has a projector and the teacher is needed."""
        return METHODS[self.method].aligned and self.align_sit > 0

    @property
    def batch_statistics(self):
        """bn follows the latents: the VAE moves, so they do."""
        moving = self.trains_vae and self.trains_sit
        return self.latent_norm == "batch" or (self.latent_norm == "auto" and moving)


# ---- The method -----------------------------------------------------------------
# Two losses, and a step that routes their gradients. Shapes: images x [B, 3, R, R],
# latents z [B, C, h, w], tokens [B, T, d]; B is a micro-batch of one process. What
# gets its gradient here is called through DDP (nets.ddp), what is frozen is not.

DISC_LEAD = 2000        # the discriminator learns so many steps before the VAE hears it


class Draws(NamedTuple):
    """The random numbers of a step, for this process's rows of the batch."""
    step: int
    t: torch.Tensor         # [B] in (0, 1): 0 is data, 1 is noise; both passes through SiT use it
    eps: torch.Tensor       # [B, C, h, w], noise of the interpolant, in both passes too
    noise: torch.Tensor     # [B, C, h, w], of the VAE's posterior
    drop: torch.Tensor      # [B] bool: the label becomes the null class, in SiT's own step
    flip: torch.Tensor      # [B] bool: the image is mirrored

    def split(self, size):
        """Micro-batches of so many rows, a list of Draws."""
        step, *rows = self
        return [Draws(step, *parts) for parts in zip(*[values.split(size) for values in rows])]


@dataclass
class Networks:
    """The networks of a run, by the names of their losses; None where the method has none."""
    vae: VAE
    sit: SiT | None = None
    disc: Discriminator | None = None
    teacher: nn.Module | None = None        # frozen: uint8 [B, 3, R, R] -> tokens [B, T, d]
    lpips: LPIPS | None = None              # frozen
    ema: SiT | None = None                  # average of sit, which images are sampled from
    vae_ema: VAE | None = None
    ddp: dict = field(default_factory=dict)     # vae, sit, disc again, under DDP with several ranks

    def __post_init__(self):
        self.ddp = {"vae": self.vae, "disc": self.disc, "sit": self.sit} | self.ddp


def vae_loss(cfg, nets, x, y, target, r):
    """The VAE's loss: pixels, KL, GAN, and alignment through SiT. Call it with SiT and D frozen.

    x [B, 3, R, R] in [-1, 1], labels y [B], target: list of the teacher's tokens [B, T, d],
    r: Draws -> loss, z [B, C, h, w], rec [B, 3, R, R], terms for the log.
    """
    with autocast(x.device, cfg.precision):
        z, rec, mean, logvar = nets.ddp["vae"](x, r.noise)
    l1 = reconstruction_loss(x, rec, cfg.recon_loss)
    lpips = x.new_zeros(()) if nets.lpips is None else nets.lpips(x, rec)
    nll = l1 + cfg.lpips * lpips                                # terms of x and rec
    kl = kl_divergence(mean, logvar)
    loss = nll + cfg.kl * kl
    terms = {"l1": l1, "lpips": lpips, "kl": kl}

    if nets.disc is not None and r.step >= cfg.gan_start:
        terms["gan"] = generator_loss(nets.disc(rec))
        weight = cfg.gan
        if cfg.gan_adaptive:
            last_layer = nets.vae.decoder.conv_out.weight
            weight = weight * adaptive_gan_weight(nll, terms["gan"], last_layer)
        loss = loss + weight * terms["gan"]

    if cfg.method == "repa-e" and cfg.align_vae > 0:
        zn = nets.sit.bn(z)                                     # running statistics: constants
        z_t, _ = interpolate(zn, r.eps, r.t, cfg.path)
        with autocast(x.device, cfg.precision):
            _, tokens = nets.sit(z_t, r.t, y, depth=nets.sit.cfg.align_depth)
        terms["align_vae"] = align_loss(tokens, target)
        loss = loss + cfg.align_vae * terms["align_vae"]
    return loss, z, rec, terms | {"vae": loss}


def sit_loss(cfg, nets, z, y, target, r):
    """SiT's loss: velocity, and alignment. z must be detached, unless the method is naive.

    z [B, C, h, w], labels y [B], target: list of the teacher's tokens [B, T, d], r: Draws
    -> loss, terms for the log.
    """
    bn = nets.sit.bn
    zn = bn.normalise_batch(z) if cfg.batch_statistics else bn(z)
    z_t, velocity = interpolate(zn, r.eps, r.t, cfg.path)
    with autocast(z.device, cfg.precision):
        v, tokens = nets.ddp["sit"](z_t, r.t, y, r.drop)        # [B, C, h, w], list of [B, T, d]
    loss = F.mse_loss(v.float(), velocity)
    terms = {"v": loss}
    if cfg.aligned:
        terms["align_sit"] = align_loss(tokens, target)
        loss = loss + cfg.align_sit * terms["align_sit"]
    return loss, terms | {"sit": loss}


def train_step(cfg, nets, opts, batches, draws):
    """One step of the paper, over this process's share of the batch, in micro-batches.

    batches: iterator over image uint8 [B, 3, R, R], y [B] (and moments [B, 2, C, h, w] of a cache),
    draws: Draws of the share -> terms: means, scalars on the device; ok: bool tensor, False where a
    value was not finite on any process: then nothing has changed, but for the discriminator's
    running statistics, which are never read.
    """
    micro = draws.split(min(cfg.micro_batch, len(draws.t)))
    disc_learns = nets.disc is not None and draws.step >= cfg.gan_start - DISC_LEAD
    means = {}

    for i, r in enumerate(micro):
        x, y, target, moments = prepare(cfg, nets, next(batches), r)
        terms = {}
        with synchronised(nets, i == len(micro) - 1):

            # 1. VAE, through frozen SiT and discriminator
            if cfg.trains_vae:
                with frozen(nets.sit, nets.disc):
                    loss_vae, z, rec, terms = vae_loss(cfg, nets, x, y, target, r)
                    if cfg.method != "naive":
                        (loss_vae / len(micro)).backward()
            else:
                z = frozen_latents(cfg, nets.vae, x, moments, r.noise)

            # 2. discriminator, on the same images
            if disc_learns:
                disc = nets.ddp["disc"]
                terms["disc"] = discriminator_loss(disc(x), disc(rec.detach()))
                (terms["disc"] / len(micro)).backward()

            # 3. SiT, on detached latents: the diffusion loss must not reach the VAE
            if cfg.method == "naive":
                loss_sit, terms_sit = sit_loss(cfg, nets, z, y, target, r)
                ((loss_sit + loss_vae) / len(micro)).backward()
                terms |= terms_sit
            elif cfg.trains_sit:
                loss_sit, terms_sit = sit_loss(cfg, nets, z.detach(), y, target, r)
                (loss_sit / len(micro)).backward()
                terms |= terms_sit

        terms["z_var"] = z.detach().var((2, 3)).mean()          # -> 0 where the latents collapse
        for name, value in terms.items():
            means[name] = means.get(name, 0) + value.detach() / len(micro)

    return update(cfg, nets, opts, means, disc_learns)


def update(cfg, nets, opts, terms, disc_learns):
    """One gate for all: clip each network, step all or none, then the averages. -> terms, ok"""
    active = [name for name in opts if name != "disc" or disc_learns]
    for name in active:
        parameters = getattr(nets, name).parameters()
        terms[f"norm_{name}"] = nn.utils.clip_grad_norm_(parameters, cfg.clip)
    ok = all_finite(*terms.values())

    for opt in [opts[name] for name in active]:
        if opt.defaults["fused"]:                               # reads ok on the device
            opt.found_inf = (~ok).float()
            opt.step()
        elif ok:                                                # waits for it
            opt.step()
        opt.zero_grad()
    if cfg.trains_sit and cfg.batch_statistics:
        nets.sit.bn.commit(ok)
    if nets.ema is not None:
        ema_update(nets.ema, nets.sit, cfg.ema, ok)
    if nets.vae_ema is not None:
        ema_update(nets.vae_ema, nets.vae, cfg.vae_ema, ok)
    return terms, ok


# ---- Parts of the step ----------------------------------------------------------

def prepare(cfg, nets, batch, r):
    """A micro-batch -> x [B, 3, R, R] in [-1, 1], y [B], target, [moments] of a cache or []."""
    image, y, *moments = batch
    if cfg.hflip:
        image = torch.where(r.flip[:, None, None, None], image.flip(-1), image)
    x = to_float(image).contiguous(memory_format=torch.channels_last)
    target = []
    if nets.teacher is not None:
        with torch.no_grad(), autocast(x.device, cfg.precision):
            target = [nets.teacher(image)]
    return x, y, target, moments


@torch.no_grad()
def frozen_latents(cfg, vae, x, moments, noise):
    """z [B, C, h, w] of a VAE that is not trained: of images x, or of a cache's moments."""
    if moments:
        mean, std = moments[0].float().unbind(1)
        return mean + std * noise
    with autocast(x.device, cfg.precision):
        return vae.sample(*vae.encode(x), noise)


@contextmanager
def frozen(*modules):
    """Inside, gradients flow through the modules, not into their parameters."""
    parameters = [p for module in modules if module is not None for p in module.parameters()]
    trainable = [p for p in parameters if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


def parallel(network, world_size, device):
    """The network under DDP, if there are several processes."""
    if world_size == 1:
        return network
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")      # renamed lately
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False,
                                   gradient_as_bucket_view=True)


def synchronised(nets, last):
    """A context in which DDP averages gradients over the processes, in the last micro-batch."""
    stack = ExitStack()
    for network in nets.ddp.values():
        if isinstance(network, DistributedDataParallel) and not last:
            stack.enter_context(network.no_sync())
    return stack


@torch.no_grad()
def ema_update(average, model, decay, ok):
    """average += (1 - decay) (model - average): parameters and float buffers, where ok is True.
    Integer buffers are copied."""
    share = (1 - decay) * ok.float()
    for a, b in zip(average.state_dict().values(), model.state_dict().values()):
        if a.is_floating_point():
            a.lerp_(b, share)
        else:
            a.copy_(torch.where(ok, b, a))


def all_finite(*values):
    """Bool tensor: every value (a tensor each) is finite on every process."""
    bad = torch.stack([(~torch.isfinite(v)).any() for v in values]).any().float()
    if dist.is_initialized():
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    return bad == 0


# ---- Presets and checks ---------------------------------------------------------

VERSIONS = {"python": platform.python_version(), "torch": str(torch.__version__),
            "numpy": str(np.__version__)}

PRESETS = {     # gFID at 400k steps without / with guidance, as published
    "sdvae": {},                                                        # 4.07 / 1.67
    "invae": dict(vae="invae", sit="SiT-XL/1", out="runs/invae"),       # 4.09 / 1.61
    "vavae": dict(vae="vavae", sit="SiT-XL/1", out="runs/vavae"),       # 4.05 / 1.73
    "scratch": dict(vae="f8d4", out="runs/scratch"),                    # 4.34: random weights
    "flux": dict(vae="hf:black-forest-labs/FLUX.1-schnell/vae", out="runs/flux"),   # unpublished
    "repa": dict(method="repa", out="runs/repa"),                       # 7.90
    "second-stage": dict(                                               # 1.69 / 1.12, 800 epochs
        method="repa", vae="hf:REPA-E/e2e-vavae-hf", sit="SiT-XL/1", steps=4_000_000,
        out="runs/second-stage"),
    "sit": dict(method="sit", out="runs/sit"),                          # 8.30 after 1,400 epochs
    "no-batchnorm": dict(latent_norm="fixed", out="runs/no-batchnorm"),     # 18.1 (L, 100k: 16.3)
    "naive": dict(method="naive", align_sit=0.0, out="runs/naive"),     # collapses
    "vae": dict(method="vae", vae="f8d4", gan=0.5, gan_adaptive=True, gan_start=50_000,
                out="runs/vae"),
    "tiny": dict(
        out="runs/tiny", data="tiny", resolution=32, vae="tiny", sit="6-192-3/2", teacher="tiny",
        align_depth=3, projector_width=256, weighting="lognormal", lpips=0.0, gan=0.005,
        align_vae=0.5, disc_ch=16, first_stage=500, steps=2200, batch=32, lr_sit=2e-3, lr_vae=6e-4,
        lr_disc=2e-4, ema=0.995, vae_ema=0.99, log_every=50, preview_every=500,
        preview_guidance=3.0, save_every=500, snapshot_every=500),
}


def architecture(cfg):
    """(depth, width, heads, patch, align_depth) of --sit."""
    depth, width, heads, patch = parse_size(cfg.sit)
    default = 8 if width >= 1024 else 4 if depth >= 12 else max(1, depth // 2)
    align_depth = cfg.align_depth or default
    if align_depth > depth:
        raise ValueError(f"--align_depth={align_depth} is deeper than --sit={cfg.sit} with its "
                         f"{depth} blocks")
    return depth, width, heads, patch, align_depth


def needed_files(cfg):
    """What a run reads, for --dry: (option, path, what is said if nothing is there)."""
    cache, fetched = Path(torch.hub.get_dir()), "missing: it will be downloaded"
    found = []
    for option, path in (("data", cfg.data), ("latents", cfg.latents)):
        if path not in ("", "tiny"):
            found.append((option, Path(path), "missing"))
    option, start = ("init", cfg.init) if cfg.init else ("vae", cfg.vae)
    if hub_files(start) and not Path(start).exists():
        repository, files = hub_files(start)
        found += [(option, hub_path(repository, file), fetched) for file in files]
    elif start not in VAES:
        found.append((option, Path(start), "missing"))
    if cfg.aligned and cfg.teacher.startswith("dinov2"):
        code = cfg.teacher_repo or cache / DINOv2.folder
        weights = cfg.teacher_weights or DINOv2.file(cfg.teacher)
        found.append(("teacher", Path(code), "missing" if cfg.teacher_repo else fetched))
        found.append(("teacher", Path(weights), "missing" if cfg.teacher_weights else fetched))
    if cfg.trains_vae and cfg.lpips:
        found.append(("lpips", LPIPS.file(), fetched))
    return found


SHARES = ("label_drop", "ema", "vae_ema")                   # at least 0, below 1
POSITIVE = ("resolution", "projector_width", "disc_ch", "steps", "batch", "micro_batch", "lr_sit",
            "lr_vae", "lr_disc", "clip", "log_every", "preview_every", "preview_steps",
            "save_every", "snapshot_every", "loader_timeout")


def problems(cfg, world_size, vae_config=None):
    """All that is wrong with the settings, a list of lines that each say what to do."""
    found = wrong_values(cfg)
    if found:
        return found
    found = wrong_batch(cfg, world_size)
    if cfg.latent_norm == "batch" and not (cfg.trains_vae and cfg.trains_sit):
        found.append(f"--latent_norm=batch: --method={cfg.method} moves no latents under a SiT")
    if cfg.method == "repa-e" and cfg.align_vae and not cfg.align_sit:
        found.append("--align_vae needs --align_sit, which trains the projector")
    if cfg.latents and cfg.trains_vae:
        found.append("--latents is for a frozen VAE: use --method=repa or --method=sit")
    if cfg.latents and cfg.hflip:
        found.append("--latents holds no flipped images: add --hflip=0")
    if cfg.sigma and (cfg.init or cfg.vae not in VAES):
        found.append(f"--sigma needs a random --vae: {' or '.join(VAES)}")

    patch = 1
    if cfg.trains_sit:
        try:
            patch = architecture(cfg)[3]
        except ValueError as error:
            return [*found, str(error)]
    if vae_config is None and not cfg.init:             # of a file it is known once that is read
        vae_config = VAES.get(PUBLISHED.get(cfg.vae, cfg.vae))
    if vae_config is not None and cfg.resolution % (vae_config.downsampling * patch):
        found.append(f"--resolution={cfg.resolution} is no multiple of "
                     f"{vae_config.downsampling * patch}, VAE times patch")
    return found


def wrong_values(cfg):
    """Numbers that are out of their range, each by itself."""
    found = []
    for name, value in asdict(cfg).items():
        if type(value) not in (int, float):
            continue
        lowest = -1 if name == "gan_start" else 0
        if name in POSITIVE and not 0 < value < math.inf:
            found.append(f"--{name}={value} must be positive")
        elif name in SHARES and not 0 <= value < 1:
            found.append(f"--{name}={value} must be at least 0 and below 1")
        elif not lowest <= value < math.inf:
            found.append(f"--{name}={value} must be at least {lowest}")
    return found


def wrong_batch(cfg, world_size):
    """The batch must divide over the processes, each process's share over its micro-batches."""
    share, rest = divmod(cfg.batch, world_size)
    if rest:
        below, above = cfg.batch - rest, cfg.batch - rest + world_size
        return [f"--batch={cfg.batch} does not divide over {world_size} processes: try "
                f"{below or above} or {above}"]
    if share % min(cfg.micro_batch, share):
        best = max(n for n in range(1, cfg.micro_batch) if share % n == 0)
        return [f"--micro_batch={cfg.micro_batch} does not divide the {share} images of each "
                f"process: try {best}"]
    return []


# ---- Order of the data, and randomness ------------------------------------------
# Both are functions of (seed, step), for the whole batch; each process takes its
# rows. So nothing about them is saved, and the number of processes may change.

class Order(torch.utils.data.Sampler):
    """Index lists of this process's micro-batches, step after step, from first_step on.
    Each epoch is a permutation of its own."""

    def __init__(self, length, cfg, rank, world_size, first_step, purpose="epoch"):
        self.length, self.cfg, self.rank, self.world_size = length, cfg, rank, world_size
        self.first_step, self.purpose = first_step, purpose

    def permutation(self, epoch):
        generator = torch.Generator().manual_seed(seed_of(self.cfg.seed, self.purpose, epoch))
        return torch.randperm(self.length, generator=generator)

    def __iter__(self):
        share = self.cfg.batch // self.world_size
        epoch = None
        for step in itertools.count(self.first_step):
            rows = []
            begin = step * self.cfg.batch + self.rank * share
            for i in range(begin, begin + share):
                if i // self.length != epoch:
                    epoch = i // self.length
                    indices = self.permutation(epoch)
                rows.append(int(indices[i % self.length]))
            yield from split(rows, self.cfg.micro_batch)


def split(rows, size):
    """A list -> lists of `size` of its items."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def batches_of(data, cfg, rank, world_size, device, purpose="epoch", first_step=0, stop=None):
    """Endless micro-batches (uint8 [B, 3, R, R], labels [B], what a cache adds) on the device."""
    order = Order(len(data), cfg, rank, world_size, first_step, purpose)
    workers = 0 if cfg.data == "tiny" else cfg.workers
    batch = min(cfg.micro_batch, cfg.batch // world_size)
    return load_batches(data, order, batch, workers, device, cfg.loader_timeout, stop)


def draws(cfg, step, rank, world_size, latent, device, purpose="step"):
    """All randomness of a step, this process's rows of it; latent: C, h, w -> Draws.
    The same for any number of processes; on another kind of GPU they may be others (for Apple's
    they are drawn on the CPU)."""
    source = "cpu" if wide(device) == torch.float32 else device
    generator = torch.Generator(source).manual_seed(seed_of(cfg.seed, purpose, step))
    B = cfg.batch
    mine = slice(rank * B // world_size, (rank + 1) * B // world_size)
    u = torch.rand(3, B, generator=generator, device=source)
    eps = torch.randn(B, *latent, generator=generator, device=source)
    noise = torch.randn(B, *latent, generator=generator, device=source)
    t = time_from_uniform(u[0], cfg.weighting, cfg.path)
    drop = u[1] < cfg.label_drop
    flip = u[2] < (0.5 if cfg.hflip else 0.0)
    return Draws(step, *[values[mine].to(device) for values in (t, eps, noise, drop, flip)])


# ---- Building a run's networks --------------------------------------------------

def build(cfg, data, state, world_size, device):
    """-> Networks, without averages; cfg with gan_start decided; needs_statistics: bn has none yet.
    state: what state.pt holds, or None in a new run."""
    torch.manual_seed(seed_of(cfg.seed, "weights", 0))
    vae, stats, disc_state = build_vae(cfg, state)
    if wrong := problems(cfg, world_size, vae.cfg):
        raise ValueError(wrong[0])
    sit = teacher = disc = lpips = None
    if cfg.trains_sit:
        sit = build_sit(cfg, vae.cfg, len(data.classes), state, stats)
    if cfg.aligned:
        teacher = load_run_teacher(cfg, data, sit.grid)
        teacher.to(device, memory_format=torch.channels_last)
    if cfg.trains_vae and cfg.gan:
        where = cfg.out if state else cfg.init or cfg.vae
        with reading(where, "a discriminator like the authors'"):
            disc = Discriminator(len(disc_state["main.0.weight"]) if disc_state else cfg.disc_ch)
            if disc_state:
                load_weights(disc, disc_state)
    if cfg.trains_vae and cfg.lpips:
        with rank0_first():
            lpips = LPIPS(cfg.lpips_legacy_range).to(device)
    vae.requires_grad_(cfg.trains_vae)
    for network in (vae, sit, disc):
        if network is not None:
            network.to(device, memory_format=torch.channels_last)

    if cfg.gan_start < 0:
        start = 0 if disc_state else DISC_LEAD
        cfg = replace(cfg, gan_start=state["config"]["gan_start"] if state else start)
    needs_statistics = cfg.trains_sit and state is None and stats is None
    return Networks(vae, sit, disc, teacher, lpips), cfg, needs_statistics


def load_run_teacher(cfg, data, grid):
    """--teacher, for grid x grid tokens. All processes call it."""
    with rank0_first():
        return load_teacher(cfg.teacher, grid, cfg.teacher_repo, cfg.teacher_weights,
                            draw_of(data))


def build_vae(cfg, state):
    """A new run: from --init, --vae or random weights; a resumed one: from its state.
    -> vae, its latents' statistics or None, its discriminator's weights or None."""
    if state is not None:
        with reading(cfg.out, RUN):
            vae = VAE(config_of(VAEConfig, state["vae_config"]))
            load_weights(vae, state["vae"])
        return vae, None, state.get("discriminator")
    with rank0_first():
        vae, stats, disc_state = load_vae(cfg.init or cfg.vae)
    if cfg.sigma:
        vae = VAE(replace(vae.cfg, sigma=cfg.sigma))
    return vae, stats, disc_state


def build_sit(cfg, vae_config, num_classes, state, stats):
    """SiT for these latents: of the state, of --init, or with random weights."""
    depth, width, heads, patch, align_depth = architecture(cfg)
    dims = (TEACHERS[cfg.teacher].dim,) if cfg.aligned else ()
    side = cfg.resolution // vae_config.downsampling
    sit = SiT(SiTConfig(depth, width, heads, patch, vae_config.z_channels, side, num_classes, dims,
                        align_depth, cfg.projector_width, path=cfg.path))
    if state is not None:
        with reading(cfg.out, RUN):
            load_weights(sit, state["model"])
    elif cfg.init:
        start_from(sit, cfg.init)
    if stats is not None:
        sit.bn.load_stats(*stats)
    return sit


def start_from(sit, name):
    """--init: another run's EMA SiT. What depends on the data starts afresh, and is named."""
    content, own = read_weights(find_checkpoint(name)), sit.state_dict()
    if "ema" not in content:
        raise ValueError(f"--init={name} holds no SiT: for its VAE alone use --vae={name}")
    given = content["ema"]
    fits = {key: given[key] for key in own if key in given and given[key].shape == own[key].shape}
    fresh = sorted(own.keys() - fits.keys())
    of_the_data = ("y_embedder.", "pos_embed", "projectors.")
    differing = sorted((own.keys() | given.keys()) - fits.keys())
    wrong = [key for key in differing if not key.startswith(of_the_data)]
    if wrong:
        raise ValueError(f"--init={name} does not fit --sit: {', '.join(wrong[:3])} and so on are "
                         "missing, too many or misshapen")
    load_weights(sit, own | fits)
    print(f"--init={name}: " + (f"starting afresh: {', '.join(fresh)}" if fresh else "all of SiT"))


@torch.no_grad()
def measure_statistics(sit, vae, batches, cfg, rank, world_size, latent, device, steps=8):
    """Where bn starts if no file of statistics is given: the latents of a few batches."""
    for step in range(steps):
        r = draws(cfg, step, rank, world_size, latent, device, "statistics")
        for part in r.split(min(cfg.micro_batch, len(r.t))):
            image, _, *moments = next(batches)
            z = frozen_latents(cfg, vae, to_float(image), moments, part.noise)
            sit.bn.normalise_batch(z)
    sit.bn.load_stats(*sit.bn.batch_statistics())
    sit.bn.seen = []


def compile_networks(cfg, nets):
    """torch.compile in place, so that state dicts keep their names: SiT block by block."""
    torch._dynamo.config.optimize_ddp = False       # else several GPUs run other graphs than one
    torch._functorch.config.donated_buffer = not cfg.gan_adaptive   # it keeps graphs
    modules = [nets.vae.encoder, nets.disc, nets.teacher, nets.lpips]
    if cfg.trains_vae:
        modules.append(nets.vae.decoder)
    if nets.sit is not None:
        modules += nets.sit.blocks
    for module in modules:
        if module is not None:
            module.compile(dynamic=False)


def make_optimizer(network, lr):
    """The paper's AdamW. Fused: its `found_inf` skips a step on the device, which Apple's GPUs are
    not known to do."""
    parameters = list(network.parameters())
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                             fused=parameters[0].device.type != "mps")


# ---- Checkpoints ----------------------------------------------------------------
# state.pt resumes a run; snapshots step_N.pt are for sampling and evaluation. Each
# is written under another name first, so a file is whole or not there.

RUN = "a run of this version: name another --out"
OPT_KEYS = {"sit": "opt", "vae": "opt_vae", "disc": "opt_disc"}     # the authors' names


def snapshot_of(cfg, nets, step, data):
    """What sampling, evaluation, --init and --vae need."""
    return {"config": asdict(cfg), "vae_config": asdict(nets.vae.cfg),
            "sit_config": asdict(nets.sit.cfg) if nets.sit else None,
            "vae": nets.vae, "vae_ema": nets.vae_ema, "ema": nets.ema, "discriminator": nets.disc,
            "steps": step, "classes": list(data.classes), "data": fingerprint(data),
            "images": len(data), "versions": VERSIONS}


def save_snapshot(cfg, nets, step, data):
    """Writes step_N.pt."""
    atomic_save(snapshot_file(cfg, step), snapshot_of(cfg, nets, step, data))


def snapshot_file(cfg, step):
    return Path(cfg.out) / f"step_{step:07d}.pt"


def save_state(cfg, nets, opts, step, skipped, data):
    """Writes state.pt; the one before becomes state.prev.pt."""
    optimizers = {OPT_KEYS[name]: opt for name, opt in opts.items()}
    state = snapshot_of(cfg, nets, step, data) | {"model": nets.sit, "skipped": skipped.cpu()}
    file = Path(cfg.out) / "state.pt"
    atomic_save(file, state | optimizers, keep=file.with_name("state.prev.pt"))


def atomic_save(file, content, keep=None):
    """torch.save of networks, optimizers and values; `keep` gets the file that was there before."""
    content = {key: value.state_dict() if hasattr(value, "state_dict") else value
               for key, value in content.items() if value is not None}
    content = tree_map_only(torch.Tensor, torch.Tensor.cpu, content)
    temporary = file.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as handle:
            torch.save(content, handle)
            handle.flush()
            os.fsync(handle.fileno())
        if keep is not None and file.exists():
            os.replace(file, keep)
        os.replace(temporary, file)
    except RuntimeError as error:
        raise error.__context__ or error                # torch.save hides the disk's own error
    finally:
        temporary.unlink(missing_ok=True)


def has_state(out):
    return any((Path(out) / name).exists() for name in ("state.pt", "state.prev.pt"))


def read_state(out, rank):
    """state.pt, or None if the run has none. If it is missing or damaged: state.prev.pt. If the
    disk does not answer: the error, for then state.pt may be whole. None is mapped into memory:
    Windows replaces no file that is."""
    file, before, damage = Path(out) / "state.pt", Path(out) / "state.prev.pt", None
    try:
        if file.exists():
            return read_weights(file, mapped=False)
    except ValueError as error:
        of_the_disk = isinstance(error.__cause__, OSError) and error.__cause__.errno != errno.EINVAL
        if of_the_disk or not before.exists():      # (EINVAL comes from a cut zip's directory)
            raise
        damage = error
    if not before.exists():
        return None
    state = read_weights(before, mapped=False)
    if rank == 0:
        print(f"state.pt is {'damaged' if damage else 'missing'}: resuming from {before}")
        if damage:                                  # else it would become the one before
            os.replace(file, Path(out) / "damaged.pt")
    return state


def load_state(cfg, rank):
    """The state to resume from, or None. ValueError where its settings can't be continued."""
    with rank0_first():
        state = read_state(cfg.out, rank)
    if state is None:
        if list(Path(cfg.out).glob("step_*.pt")):
            raise ValueError(f"{cfg.out} holds snapshots but no state.pt to resume from: name "
                             f"another --out, and --init={cfg.out} to start from its weights")
        return None
    if state["skipped"].shape != (2,):
        raise ValueError(f"{cfg.out} holds a state of another version: name another --out")
    old, new = state["config"], asdict(cfg)
    if cfg.trains_vae and cfg.gan and "opt_disc" not in state:
        raise ValueError(f"{cfg.out} was trained without a discriminator: use --gan=0, or a new "
                         "--out and --init")
    fixed = ["resolution", "sit", "teacher", "method", "latent_norm", "path", "batch", "seed",
             "hflip"]
    if not cfg.trains_vae and old["vae"] != cfg.vae and not same_vae(cfg.vae, state["vae"]):
        fixed.append("vae")
    wrong = [f"{key} was {old.get(key)!r}, is {new[key]!r}" for key in fixed
             if old.get(key) != new[key]]
    if wrong:
        raise ValueError(f"{cfg.out} holds a run with other settings ({'; '.join(wrong)}): use "
                         "those, or another --out")
    may_differ = {"dry", "accept_data"} | ({"gan_start"} if cfg.gan_start < 0 else set())
    changed = [f"{key} {old.get(key)!r} -> {new[key]!r}" for key in new
               if key not in may_differ and old.get(key) != new[key]]
    if rank == 0:
        print(f"resuming {cfg.out} at step {state['steps']}"
              + (f", changed: {', '.join(changed)}" if changed else ""))
    return state


def describe(data):
    """One line: how many images in how many classes, and what was left out of a folder."""
    n = len(data.classes)
    said = f"data: {len(data):,} images in {n:,} class{'es' if n > 1 else ''}"
    left_out = getattr(data, "left_out", {})
    if left_out:
        said += "; left out: " + ", ".join(f"{n:,} {kind}" for kind, n in left_out.most_common())
    return said


def same_vae(name, weights):
    """Does this name or path give the VAE that a run has, perhaps at another place?"""
    with rank0_first():
        own = load_vae(name)[0].state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[key], weights[key]) for key in own)


def check_data(cfg, state, data, rank):
    """A run goes on with the data that it began with, wherever these are now; with others, if
    --accept_data says so and they have the same classes."""
    if state["data"] == fingerprint(data):
        return
    classes = list(data.classes)
    what = f"{len(data):,} images in {len(classes)} classes"
    if (state["images"], state["classes"]) != (len(data), classes):
        what += f", it began with {state['images']:,} in {len(state['classes'])}"
    if state["classes"] != classes and len(state["classes"] + classes) > 2:     # (one may move)
        raise ValueError(f"{cfg.data} is not what {cfg.out} was trained on ({what}, classes of "
                         "other names): name another --out")
    if not cfg.accept_data:
        raise ValueError(f"{cfg.data} is not what {cfg.out} was trained on ({what}): add "
                         "--accept_data=1 if that is meant, or name another --out")
    if rank == 0:
        print(f"--accept_data: going on with {what}")


def restore(nets, opts, state):
    """The averages, and Adam's moments: rates and other settings come from the current run."""
    for name, opt in opts.items():
        opt.load_state_dict({**opt.state_dict(), "state": state[OPT_KEYS[name]]["state"]})
        if 0 < len(opt.state) < len(opt.param_groups[0]["params"]):     # 0: it has not learned yet
            raise ValueError(f"{OPT_KEYS[name]} is not whole")
        for p, moments in opt.state.items():
            shapes = [moments[key].shape for key in ("exp_avg", "exp_avg_sq", "step")]
            if shapes != [p.shape, p.shape, ()] or not moments["step"].is_floating_point():
                raise ValueError(f"{OPT_KEYS[name]} does not fit the {name}")
    for name in ("ema", "vae_ema"):
        if getattr(nets, name) is not None:
            load_weights(getattr(nets, name), state.get(name) or state["vae"])


def check_room(cfg, nets):
    """Refuses a disk that cannot hold three states (one while it is written) and a snapshot."""
    trained = [net for net in (nets.vae, nets.sit, nets.disc) if net is not None]
    numbers = sum(p.numel() for net in trained for p in net.parameters())
    need = (3 * 16 + 8) * numbers       # bytes: weights, averages, Adam's moments; a snapshot: 2
    held = sum(file.stat().st_size for file in Path(cfg.out).glob("state*.pt"))
    if free_space(cfg.out) + held < need:
        raise ValueError(f"--out={cfg.out} has no room for the run's checkpoints of "
                         f"{need / 1e9:.2f} GB")


def check_replicas(nets):
    """RuntimeError if a parameter or buffer differs between processes; it names the first.
    The discriminator's running statistics may differ: they are never read."""
    if not dist.is_initialized():
        return
    values = {f"vae.{name}": value for name, value in nets.vae.state_dict().items()}
    if nets.sit is not None:
        values |= {f"sit.{name}": value for name, value in nets.sit.state_dict().items()}
    if nets.disc is not None:
        values |= {f"disc.{name}": value for name, value in nets.disc.named_parameters()}
    low = torch.stack([value.double().sum() for value in values.values()])
    high = low.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    for name, same in zip(values, (low == high).tolist()):      # NaN is never equal
        if not same:
            raise RuntimeError(f"the processes differ in {name} since the last checkpoint: resume "
                               "from that")


@contextmanager
def surviving(what, last=False):
    """A disk that is full, read-only or gone is reported, and the run goes on; the last write of a
    run is not retried, so its error ends the run."""
    try:
        yield
    except OSError as error:
        if last:
            raise
        print(f"could not write {what} ({error.strerror}): going on, the next interval tries again",
              flush=True)


def lock(out):
    """One run in a folder at a time, where the file system has locks. The system ends a lock with
    its process: none is stale."""
    tempfile.TemporaryFile(dir=out).close()                     # an OSError where it is read-only
    fd = os.open(Path(out) / "lock", os.O_RDWR | os.O_CREAT)
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "the system has none")
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            user = os.read(fd, 200).decode()
            raise ValueError(f"{out} is in use by {user}: stop that run, or name another "
                             "--out") from None
        print(f"note: no file lock ({error.strerror}): nothing keeps a second run out of {out}")
    os.ftruncate(fd, 0)
    os.write(fd, f"process {os.getpid()} on {platform.node()}".encode())


class PoliteStop:
    """SIGTERM and SIGINT ask for a stop: True on all processes once any of them was asked.
    Reduced on the CPU, so that no GPU waits. A second signal, 3 s later, ends the process."""

    def __init__(self, world_size):
        self.asked = 0.0
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if world_size > 1 else None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, *_):
        if self.asked and time.time() > self.asked + 3:
            os._exit(1)
        self.asked = self.asked or time.time()

    def __call__(self):
        flag = torch.tensor(float(self.asked > 0))
        if self.group is not None:
            dist.all_reduce(flag, group=self.group)
        return flag.item() > 0


# ---- The log --------------------------------------------------------------------

class Log:
    """Sums of scalars on the device, and of how many steps had them; one reduction and one copy to
    the host a printed line."""

    def __init__(self, out, rank, device):
        self.out, self.rank, self.device = Path(out), rank, device
        self.sums, self.steps = {}, 0
        self.restart_clock()

    def restart_clock(self):
        """After the first step, whose time is torch.compile's."""
        self.since, self.waited, self.untimed = time.time(), 0.0, self.steps

    def timed(self, batches):
        """The same batches; the time to get one is waiting on data (a GPU may be busy then)."""
        while True:
            begin = time.time()
            batch = next(batches)
            self.waited += time.time() - begin
            yield batch

    def add(self, ok, terms):
        """Scalars of a step, on the device; those of a skipped step do not count."""
        for name, value in terms.items():
            value = value.to(wide(value.device))
            pair = torch.stack([value, torch.ones_like(value)])
            self.sums[name] = self.sums.get(name, 0.0) + torch.where(ok, pair, 0.0)
        self.steps += 1

    def write(self, line):
        with surviving("metrics.jsonl"):
            if self.rank == 0:
                with open(self.out / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")

    def flush(self, step, cfg, skipped, unreadable=0):
        """Prints the means since the last call in one line, and writes them as JSON."""
        totals, counts = all_mean(torch.stack(list(self.sums.values()), 1))
        mean = dict(zip(self.sums, (totals / counts.clamp(min=1)).tolist()))
        timed = max(self.steps - self.untimed, 1)
        seconds = (time.time() - self.since) / timed
        line = {"step": step, **mean, "ms": seconds * 1e3, "data_ms": self.waited / timed * 1e3,
                "skipped": int(skipped[0])}
        if unreadable:
            line["unreadable"] = unreadable
        if self.device.type == "cuda":
            line["GiB"] = torch.cuda.max_memory_allocated() / 2**30
        if self.rank == 0:
            left = int((cfg.steps - step) * seconds)
            parts = [f"step {step:07d}/{cfg.steps:07d}"]
            parts += [f"{name} {value:.4g}" for name, value in line.items() if name != "step"]
            parts += [f"{cfg.batch / seconds:.0f} images/s", *self.warnings(mean)]
            parts += [f"left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"]
            print(" | ".join(parts), flush=True)
        self.write(line)
        self.sums, self.steps = {}, 0
        self.restart_clock()

    @staticmethod
    def warnings(mean):
        found = []
        if mean.get("z_var", 1.0) < 0.05:
            variance = f"{mean['z_var']:.4f}"
            found.append(f"WARNING: the latents collapse, their spatial variance is {variance}")
        if not 0.02 < mean.get("disc", 1.0) < 2:        # hinge: 0 where it always wins, 1 at chance
            found.append("WARNING: the discriminator wins or runs away: lower --gan or --lr_disc")
        return found


# ---- The run --------------------------------------------------------------------

def run(cfg, rank, world_size, device, stop=None):
    """Trains to cfg.steps, from the state in cfg.out if there is one. -> False if stopped.
    stop: PoliteStop."""
    data = open_images(cfg.data, cfg.resolution)
    with reading(cfg.out, RUN):
        state = load_state(cfg, rank)
    first = state["steps"] if state else 0
    if all_mean(torch.tensor(float(first), device=device)).item() != first:
        raise ValueError(f"the machines see different checkpoints: --out={cfg.out} must be a "
                         "folder that they share")
    if state:
        with reading(cfg.out, RUN):
            check_data(cfg, state, data, rank)
    if rank == 0:
        print(describe(data))
    nets, cfg, needs_statistics = build(cfg, data, state, world_size, device)
    check_room(cfg, nets)
    latent = (nets.vae.cfg.z_channels, *[cfg.resolution // nets.vae.cfg.downsampling] * 2)
    source = data
    if cfg.latents:
        source = CachedLatents(data, cfg.latents, nets.vae, images=nets.teacher is not None)
    if needs_statistics:
        batches = batches_of(source, cfg, rank, world_size, device, "statistics")
        measure_statistics(nets.sit, nets.vae, batches, cfg, rank, world_size, latent, device)
    opts = make_trainable(cfg, nets, state, rank, world_size, device)
    skipped = torch.zeros(2, device=device)             # steps: in all, and now in a row
    if state:
        skipped = state["skipped"].to(device)
    del state                                           # frees its memory

    log, named = Log(cfg.out, rank, device), set()
    log.write(header(cfg, world_size, first, data))
    batches = log.timed(batches_of(source, cfg, rank, world_size, device, "epoch", first, stop))
    for step in range(first, cfg.steps + 1):            # one turn more: the last preview and save
        done, stopping = step == cfg.steps, stop is not None and stop()
        if step > first:
            if rank == 0 and (done or step % cfg.preview_every == 0):
                with surviving("the preview"), torch.compiler.set_stance("force_eager"):
                    preview(cfg, step, nets, data, device)
        checkpoint(cfg, nets, opts, step, skipped, data, first, done or stopping)
        if done or stopping:
            return done
        r = draws(cfg, step, rank, world_size, latent, device)
        terms, ok = train_step(cfg, nets, opts, batches, r)
        skipped = torch.stack([skipped[0] + ~ok, torch.where(ok, 0.0, skipped[1] + 1)])
        log.add(ok, terms)
        printing = (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps
        if printing:
            log.flush(step + 1, cfg, skipped, name_unreadable(data, named, rank, device))
        elif step == first:
            log.restart_clock()
        if (printing or device.type == "cpu") and skipped[1] >= 10:
            give_up(cfg, step, rank, terms)


def make_trainable(cfg, nets, state, rank, world_size, device):
    """Averages, optimizers, what a resumed run restores, torch.compile, DDP. -> opts by name

    The averages are copied first: nothing of them is compiled."""
    if nets.sit is not None:
        nets.ema = copy.deepcopy(nets.sit).requires_grad_(False)
    if cfg.vae_ema and cfg.trains_vae:
        nets.vae_ema = copy.deepcopy(nets.vae).requires_grad_(False)
    names = [name for name in ("vae", "disc", "sit") if getattr(nets, name) is not None]
    trained = [name for name in names if name != "vae" or cfg.trains_vae]
    opts = {name: make_optimizer(getattr(nets, name), getattr(cfg, f"lr_{name}"))
            for name in trained}
    if state is not None:
        with reading(cfg.out, RUN):
            restore(nets, opts, state)

    for level in [*nets.vae.encoder.down[: cfg.recompute], *nets.vae.decoder.up[: cfg.recompute]]:
        level.recompute = cfg.trains_vae
    if cfg.compile == "1" or (cfg.compile == "auto" and can_compile(device)):
        compile_networks(cfg, nets)
    elif cfg.compile == "auto" and device.type == "cuda" and rank == 0:
        print("torch.compile is off: it needs a GPU since Volta, Triton, a C compiler and Python.h")
    nets.ddp |= {name: parallel(getattr(nets, name), world_size, device) for name in trained}
    return opts


def checkpoint(cfg, nets, opts, step, skipped, data, first, last):
    """state.pt where it is due, then the snapshot; a run that was killed between the two writes
    its snapshot when it goes on. All processes compare their networks, the first one writes."""
    snapshot_due = last or step % cfg.snapshot_every == 0
    new = step > first                                          # else it was resumed from here
    write_state = new and (snapshot_due or step % cfg.save_every == 0)
    left_out = step > 0 and not snapshot_file(cfg, step).exists()
    write_snapshot = snapshot_due and (new or left_out)
    if write_state:
        check_replicas(nets)
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            with surviving(f"state.pt of step {step}", last):
                if write_state:
                    save_state(cfg, nets, opts, step, skipped, data)
        finally:                                        # there may be room for the smaller file
            with surviving(f"the snapshot of step {step}", last):
                if write_snapshot:
                    save_snapshot(cfg, nets, step, data)
    if write_state and dist.is_initialized():
        dist.barrier()                                  # until the files are there


def header(cfg, world_size, first, data):
    """The first line of metrics.jsonl: what this run is."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True,
                             capture_output=True).stdout.strip()
    except OSError:                                     # no git on this machine
        git = ""
    return {"config": asdict(cfg), "world_size": world_size, "from_step": first,
            "versions": VERSIONS, "images": len(data), "data": fingerprint(data), "git": git,
            "threads": torch.get_num_threads()}


def give_up(cfg, step, rank, terms):
    seen = {name: value.item() for name, value in terms.items() if not torch.isfinite(value)}
    raise ValueError(f"ten steps in a row were not finite, up to {step} (process {rank}: "
                     f"{seen or 'finite'}): stopped; {cfg.out} keeps its last checkpoint. Lower "
                     "the learning rates, check the data")


@torch.no_grad()
def preview(cfg, step, nets, data, device):
    """samples_N.png (EMA SiT, fixed seed, a row for each class while there are ten) and
    reconstructions_N.png (pairs)."""
    vae = nets.vae_ema or nets.vae
    if nets.ema is not None:
        last = len(data.classes) - 1
        classes = np.linspace(0, last, min(10, last + 1)).round().astype(int).tolist()
        labels = [c for c in classes for _ in range(8)]
        model = Pipeline(vae, nets.ema, list(data.classes), {}, step, cfg.precision)
        images = model(labels, cfg.preview_steps, "ab2", cfg.preview_guidance,
                       batch=cfg.micro_batch)
        save_grid(f"{cfg.out}/samples_{step:07d}.png", images)
    spread = range(0, len(data), max(1, len(data) // 16))
    image = fetch(data, list(spread)[:16])[0].to(device)
    rec = to_uint8(vae.decode(vae.encode(to_float(image))[0]))
    pairs = torch.stack([image, rec], 1).flatten(0, 1)
    save_grid(f"{cfg.out}/reconstructions_{step:07d}.png", pairs)


# ---- Images once, latents once --------------------------------------------------
# Folders that train.py takes in place of a tree of images, and of a frozen VAE.

def pack(folder: str, out: str, resolution: int = 256):
    """Crops a tree of images once, on all cores, into a folder that --data takes in its place.
    Images that can't be read are named and counted; their rows have the label -1."""
    data, out = Folder(folder, resolution), Path(out)
    prepare_out(out / "images.npy")
    if (out / "labels.npy").exists():
        raise ValueError(f"{out} is a pack already: remove it, or name another folder")
    print(describe(data))
    shape = len(data), data.resolution, data.resolution, 3
    images = open_array(out / "images.npy", np.uint8, shape)
    labels = data.labels.numpy().copy()

    def write(i):
        try:
            images[i] = data.read(i)[0].permute(1, 2, 0).numpy()
        except ValueError as error:
            print(error, flush=True)
            labels[i] = -1
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in tqdm(range(0, len(data), 1000), "packing", unit_scale=1000):
            list(pool.map(write, range(first, min(first + 1000, len(data)))))
    images.flush()
    if (labels < 0).all():
        raise ValueError(f"no image in {folder} can be read")
    (out / "classes.json").write_text(json.dumps(data.classes))
    (out / "files.json").write_text(json.dumps(data.files))
    np.save(out / "labels.tmp.npy", labels)
    os.replace(out / "labels.tmp.npy", out / "labels.npy")      # last: now it is a pack
    print(f"{out}: {(labels >= 0).sum()} images, {(labels < 0).sum()} unreadable")


def cache_about(data, vae):
    """What a cache of latents belongs to: the data and the VAE."""
    weights = hashlib.sha256(str(vae.cfg).encode())
    for value in vae.state_dict().values():
        weights.update(value.cpu().contiguous().numpy().tobytes())
    return {"data": fingerprint(data), "resolution": data.resolution,
            "VAE": weights.hexdigest()[:16]}


@torch.no_grad()
def encode(vae: str, data: str, out: str, resolution: int = 0, batch: int = 64):
    """Writes a folder that --latents takes: mean and std of each image's posterior, in float16, by
    the VAE in float32. torchrun's processes share the images; killed, the same command goes on."""
    rank, world_size, device = init_distributed()
    torch.set_float32_matmul_precision("highest")               # not TF32: it is done once
    torch.backends.cudnn.allow_tf32 = False
    if vae in VAES:
        raise ValueError(f"{vae} has random weights: name a trained VAE")
    folder = Path(out)
    with rank0_first():
        net, images = load_vae(vae)[0], open_images(data, resolution)
        check_side(images, net)
        latents, labels = open_cache(folder, cache_about(images, net), net.cfg, images)
    net.to(device, memory_format=torch.channels_last).eval()
    N = len(images)
    mine = np.arange(rank * N // world_size, (rank + 1) * N // world_size)
    mine = mine[labels[mine] == 0].tolist()
    todo = split(mine, batch)
    loaded = load_batches(images, todo, batch, default_workers(images), device)
    for rows, (image, label) in zip(todo, tqdm(loaded, "encoding", disable=rank > 0)):
        mean, logvar = net.encode(to_float(image))
        moments = torch.stack([mean, (logvar / 2).exp()], 1)     # [B, 2, C, h, w]
        latents[rows] = moments.half().cpu().numpy()
        latents.flush()                                         # on the disk before it counts
        labels[rows] = label.cpu().numpy() + 1
    labels.flush()
    name_unreadable(images, set(), rank, device)


def open_cache(folder, about, vae_config, images):
    """A new cache, or one that `encode` has begun -> latents [N, 2, C, h, w] and labels [N] plus 1
    (0: not encoded yet), mapped."""
    file = folder / "cache.json"
    prepare_out(file)
    if not file.exists():
        temporary = folder / f"cache.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(about))
        os.replace(temporary, file)
    if read_about(folder) != about:
        raise ValueError(f"{folder} is a cache of another VAE or of other data: name another "
                         "folder")
    if not (folder / "latents.npy").exists():                   # then none is done
        (folder / "labels.npy").unlink(missing_ok=True)
    N, side = len(images), images.resolution // vae_config.downsampling
    shape = N, 2, vae_config.z_channels, side, side
    latents = open_array(folder / "latents.npy", np.float16, shape)
    return latents, open_array(folder / "labels.npy", np.int64, (N,))


def read_about(folder):
    with reading(folder / "cache.json", "a cache of train.py encode: remove the folder"):
        return dict(json.loads((folder / "cache.json").read_text()))


class CachedLatents:
    """A data set with its cache: image, label, moments float16 [2, C, h, w] (mean, std).
    images=False leaves the files unread: images [B, 3, 0, 0]."""

    def __init__(self, data, folder, vae, images=True):
        self.data, self.file, self.images = data, Path(folder) / "latents.npy", images
        about = read_about(self.file.parent)
        with reading(folder, "a cache of train.py encode"):
            self.labels = torch.from_numpy(np.load(self.file.parent / "labels.npy") - 1)
            np.load(self.file, mmap_mode="r")
        for what, own in cache_about(data, vae).items():
            if about.get(what) != own:
                raise ValueError(f"{folder} is the cache of another {what}: make one by train.py "
                                 "encode")
        if hasattr(data, "unreadable"):
            self.unreadable = data.unreadable
        if len(self.labels) != len(data) or (self.labels < 0).any():
            raise ValueError(f"{folder} is not complete: run the same train.py encode again")

    def __len__(self):
        return len(self.data)

    @property
    def resolution(self):
        return self.data.resolution if self.images else 0

    def __getitems__(self, indices):
        moments = torch.from_numpy(np.load(self.file, mmap_mode="r")[indices])
        if self.images:
            return *fetch(self.data, indices), moments
        empty = torch.zeros(len(indices), 3, 0, 0, dtype=torch.uint8)
        return empty, self.labels[indices], moments


# ---- The command ----------------------------------------------------------------

def first_stage_config(cfg):
    """The first stage of a latent diffusion model is the same loop with the VAE alone; the GAN
    joins in its second half."""
    return replace(cfg, method="vae", out=f"{cfg.out}/first-stage", steps=cfg.first_stage,
                   first_stage=0, latents="", latent_norm="auto", gan_start=cfg.first_stage // 2)


def open_out(cfg, rank):
    """Makes the run's folder and locks it."""
    try:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        if cfg.first_stage:
            Path(first_stage_config(cfg).out).mkdir(exist_ok=True)
        if rank == 0:
            lock(cfg.out)
            for folder in (Path(cfg.out), Path(cfg.out) / "first-stage"):
                for file in [*folder.glob("state.tmp"), *folder.glob("step_*.tmp")]:
                    file.unlink()                               # of a run that was killed
    except OSError as error:
        raise ValueError(f"cannot write to --out={cfg.out} ({error.strerror}): name another "
                         "folder") from None


@friendly
def main(argv):
    commands = {"pack": pack, "encode": encode}
    if argv and argv[0] in commands:
        return parse(commands[argv[0]], argv[1:])
    cfg = parse(Config, argv, PRESETS)
    rank, world_size, device = init_distributed(apple=True)
    if found := problems(cfg, world_size):
        raise ValueError("; ".join(found))
    if rank == 0:
        differs = {key: value for key, value in asdict(cfg).items()
                   if value != getattr(Config, key)}
        print(f"settings that differ from the paper's run: {differs or 'none'}")
    if cfg.dry:
        for option, path, missing in needed_files(cfg) * (rank == 0):
            print(f"{option:8} {path}: {'there' if path.exists() else missing}")
        return
    open_out(cfg, rank)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not cfg.deterministic      # shapes are fixed: try all kernels

    stop, finished = PoliteStop(world_size), True
    if cfg.first_stage and cfg.trains_sit and cfg.vae in VAES and not cfg.init:
        stage = first_stage_config(cfg)
        if not has_state(cfg.out):
            if cfg.aligned:                 # else its faults would show after the first stage
                load_run_teacher(cfg, open_images(cfg.data, cfg.resolution), 1)
            finished = run(stage, rank, world_size, device, stop)
        cfg = replace(cfg, vae=stage.out, sigma=0.0)            # the stage's VAE carries its sigma
    if finished:
        finished = run(cfg, rank, world_size, device, stop)
    if rank == 0 and finished:
        samples = f". Samples: python sample.py {cfg.out}" if cfg.trains_sit else ""
        print(f"done: {cfg.out}{samples}")
    elif rank == 0:
        print(f"stopped. To go on: the same command ({' '.join(sys.argv)})")


if __name__ == "__main__":
    main()
