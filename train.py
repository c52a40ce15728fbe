"""REPA-E: a VAE and a latent diffusion transformer, trained together (Leng et al., 2504.10483).

    torchrun --nproc_per_node=8 train.py --data=imagenet/train      # the paper's SD-VAE run: defaults are its settings
    python train.py --data=imagenet/train                           # the same on one GPU: 8 micro-batches a step
    python train.py --preset=tiny                                   # the whole system on a laptop, no download
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py --data=...

Which loss trains what (x: its gradient arrives there):

    loss                                             VAE   discriminator   SiT and projector
    reconstruction + LPIPS + KL                       x
    GAN, generator's side: -D(rec)                    x     (frozen)
    alignment of SiT(z), through SiT and its bn       x                     (frozen)
    GAN, discriminator's side: hinge on x and rec           x
    velocity + alignment on z.detach()                                      x

Without that detach the diffusion loss would reach the VAE and collapse the latents (--preset=naive shows it).
REPA with a frozen VAE, plain SiT and a VAE's own first stage are the same loop under other settings: see PRESETS.

A run's folder (--out) gets metrics.jsonl, previews, and pairs of checkpoints: step_N.pt plays (sample.py, evaluate.py,
--init, --vae), step_N.resume.pt continues. The same command again resumes.
"""
import copy
import fcntl
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from repa import TEACHERS, align_loss, load_teacher, teacher_shape
from sample import (PATIENCE, Model, all_mean, autocast, can_compile, friendly, nearest, parse, rank0_first, seed_of,
                    start)
from sit import SiT, SiTConfig, interpolate, parse_size, time_from_uniform
from vae import (PUBLISHED, VAE, VAES, Cached, Discriminator, Perceptual, VAEConfig, adaptive_gan_weight,
                 config_from_dict, discriminator_loss, find_checkpoint, generator_loss, grid, identity, kl_divergence,
                 load_strict, load_vae, misfits, open_images, read_weights, reading, reconstruction_loss, save_png,
                 to_float, to_uint8)

# ---------------- Config. The defaults are the paper's ImageNet run; --key=value changes one, --preset=NAME a handful.

@dataclass
class Config:
    out: str = "runs/repa-e"        # the run's folder; the same command again resumes from it
    data: str = "data/imagenet/train"   # a tree of class folders, an .npz of vae.py pack, or tiny (drawn on demand)
    latents: str = ""               # a cache by vae.py encode, instead of encoding with the frozen VAE
    resolution: int = 256           # R, side of the images
    vae: str = "sdvae"              # sdvae, invae, vavae, hf:... (downloaded); a file, a folder; f8d4 ... tiny (random)
    sit: str = "SiT-XL/2"           # SiT-{S,B,L,XL}/{1,2,4,8}, depth-width-heads/patch, or none (VAE only)
    teacher: Literal["none", *TEACHERS] = "dinov2_vitb14"   # dinov2_vit{s,b,l,g}14[_reg], tiny, or none
    teacher_repo: str = ""          # a local clone of facebookresearch/dinov2, for machines without internet
    teacher_weights: str = ""       # a local file of the teacher's weights
    init: str = ""                  # start from this checkpoint's VAE, discriminator and EMA SiT
    train_vae: bool = True          # False: the VAE stays as it is (REPA, plain SiT)
    latent_norm: Literal["batch", "fixed"] = "batch"    # BatchNorm follows the latents, or stays as it was at the start
    stop_grad: bool = True          # False: the diffusion loss reaches the VAE (the naive ablation)
    first_stage: int = 0            # train the VAE alone for so many steps first (with a random --vae)
    # SiT
    path: Literal["linear", "cosine"] = "linear"            # the interpolant
    weighting: Literal["uniform", "lognormal"] = "uniform"  # of t
    label_drop: float = 0.1         # share of labels replaced by the null class, for guidance
    align_depth: int = 0            # SiT block that is aligned; 0: 8 for L and XL, 4 for B and S, else half the depth
    projector_width: int = 2048
    qk_norm: bool = False
    # losses
    repa_sit: float = 0.5           # weight of the alignment in the SiT step
    repa_vae: float = 1.5           # ... and in the VAE step: the only way from SiT back to the VAE
    recon_loss: Literal["l1", "l2"] = "l1"      # l1 (the released configuration) or l2 (the paper's text)
    lpips: float = 1.0
    lpips_legacy_range: bool = False    # LPIPS on 2x - 1, as the published VAEs were trained
    kl: float = 1e-6
    sigma: float = 0.0              # > 0: fixed posterior std (sigma-VAE), for a VAE from scratch
    gan: float = 0.1                # 0 switches the discriminator off
    gan_start: int = -1             # the VAE hears D from this step on, D learns 2,000 steps before; -1: 0 with a
                                    # discriminator from a file, else 2,000
    gan_adaptive: bool = False      # times LDM's ratio of gradients at the last layer, for a VAE from scratch
    disc_ch: int = 64               # discriminator's first width, where none is loaded
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
    compile: Literal["auto", "0", "1"] = "auto"     # torch.compile; auto: on GPUs
    recompute: int = 0              # the VAE's so many largest levels: activations again in the backward, less memory
    deterministic: bool = False     # the same bits each time on a GPU, too: slower
    workers: int = 8                # processes that decode images, for each rank
    # output
    log_every: int = 100
    preview_every: int = 10_000
    preview_steps: int = 50
    preview_guidance: float = 1.0
    save_every: int = 25_000
    keep: int = 2                   # newest checkpoints that are kept,
    keep_every: int = 50_000        # and those at multiples of this
    dry: bool = False               # check everything that can be checked without a model, print the settings, stop

VERSIONS = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": str(np.__version__)}
PRESETS = {     # gFID at 400k steps without / with guidance, as published
    "sdvae": {},                                                                    # 4.07 / 1.67
    "invae": dict(vae="invae", sit="SiT-XL/1", out="runs/invae"),                   # 4.09 / 1.61
    "vavae": dict(vae="vavae", sit="SiT-XL/1", out="runs/vavae"),                   # 4.05 / 1.73
    "scratch": dict(vae="f8d4", out="runs/scratch"),                                # 4.34: VAE from random weights
    "flux": dict(vae="hf:black-forest-labs/FLUX.1-schnell/vae", out="runs/flux"),   # f8d16; nothing published
    "repa": dict(train_vae=False, latent_norm="fixed", out="runs/repa"),            # 7.90: REPA, frozen VAE
    "second-stage": dict(vae="hf:REPA-E/e2e-vavae-hf", sit="SiT-XL/1", train_vae=False, latent_norm="fixed",
                         steps=4_000_000, out="runs/second-stage"),                 # 1.69 / 1.12 after 800 epochs
    "sit": dict(train_vae=False, latent_norm="fixed", repa_sit=0.0, repa_vae=0.0, teacher="none", out="runs/sit"),
    "no-batchnorm": dict(latent_norm="fixed", out="runs/no-batchnorm"),             # 18.1 against 16.3 (L, 100k)
    "naive": dict(stop_grad=False, repa_vae=0.0, repa_sit=0.0, teacher="none", out="runs/naive"),   # collapses
    "vae": dict(sit="none", teacher="none", vae="f8d4", gan=0.5, gan_adaptive=True, gan_start=50_000, out="runs/vae"),
    "tiny": dict(
        out="runs/tiny", data="tiny", resolution=32, vae="tiny", sit="6-192-3/2", teacher="tiny", align_depth=3,
        projector_width=256, weighting="lognormal", lpips=0.0, gan=0.005, repa_vae=0.5, disc_ch=16, first_stage=500,
        steps=2200, batch=32, lr_sit=2e-3, lr_vae=6e-4, lr_disc=2e-4, ema=0.995, vae_ema=0.99, log_every=50,
        preview_every=500, preview_guidance=3.0, save_every=500, keep_every=10**9),
}

def architecture(cfg):
    """(depth, width, heads, patch, align_depth) of --sit."""
    depth, width, heads, patch = parse_size(cfg.sit)
    align_depth = cfg.align_depth or (8 if width >= 1024 else 4 if depth >= 12 else max(1, depth // 2))
    if align_depth > depth:
        raise ValueError(f"--align_depth={align_depth} is deeper than --sit={cfg.sit} with its {depth} blocks")
    return depth, width, heads, patch, align_depth

def check(cfg, world, vae_config=None):
    """All that is wrong with the settings, each in one line that says what to do."""
    bad, shares = [], ["label_drop", "ema", "vae_ema"]
    zero = shares + ("repa_sit repa_vae lpips kl sigma gan seed first_stage workers align_depth "
                     "recompute").split()
    for name, value in asdict(cfg).items():
        if (words := get_args(Config.__annotations__[name])) and value not in words:
            bad.append(f"--{name}={value}{nearest(str(value), words)}")
        elif name in shares and not 0 <= value < 1:
            bad.append(f"--{name}={value} must be at least 0 and below 1")
        elif name == "gan_start" and value < -1:
            bad.append(f"--gan_start={value} must be a step, or -1")
        elif type(value) in (int, float) and name != "gan_start" and not (value > 0 or (value == 0 and name in zero)):
            bad.append(f"--{name}={value} must be positive")
    if bad:
        return bad
    share, rest = divmod(cfg.batch, world)
    if rest:
        fits = " or ".join(str(n * world) for n in (share, share + 1) if n)
        bad.append(f"--batch={cfg.batch} does not divide over {world} processes: try {fits}")
    elif share % min(cfg.micro_batch, share):
        best = max(n for n in range(1, cfg.micro_batch + 1) if share % n == 0)
        bad.append(f"--micro_batch={cfg.micro_batch} does not divide the {share} images of each process: try {best}")
    sit = cfg.sit != "none"
    joint, frozen_vae, aligned = sit and cfg.train_vae, sit and not cfg.train_vae, sit and cfg.repa_sit
    rules = [
        (not sit and not cfg.train_vae, "--sit=none with --train_vae=0 trains nothing: leave one of them out"),
        (aligned and cfg.teacher == "none", "--teacher=none: name a teacher, or add --repa_sit=0 --repa_vae=0"),
        (joint and cfg.repa_vae and not cfg.repa_sit, "--repa_vae needs --repa_sit, which trains the projector"),
        (joint and cfg.repa_vae and not cfg.stop_grad, "--stop_grad=0 gives the VAE all SiT's loss: add --repa_vae=0"),
        (frozen_vae and not cfg.stop_grad, "--stop_grad=0 trains the VAE, --train_vae=0 freezes it: choose one"),
        (frozen_vae and cfg.latent_norm == "batch", "--train_vae=0 freezes the latents: add --latent_norm=fixed"),
        (cfg.latents and not frozen_vae, "--latents is for a frozen VAE: add --train_vae=0 --latent_norm=fixed"),
        (cfg.latents and cfg.hflip, "--latents holds no flipped images: add --hflip=0"),
        (cfg.sigma and (cfg.init or cfg.vae not in VAES), f"--sigma needs a random --vae: {' or '.join(VAES)}")]
    bad += [message for wrong, message in rules if wrong]
    try:
        patch = architecture(cfg)[3] if sit else 1
        wanted = teacher_shape(cfg.teacher, cfg.resolution)[0] if aligned and cfg.teacher != "none" else None
    except ValueError as error:
        return bad + [str(error)]
    if vae_config is None and not cfg.init:             # of a file it is known once that is read
        vae_config = VAES.get(PUBLISHED.get(cfg.vae, cfg.vae))
    if vae_config:
        unit, side = vae_config.downsampling * patch, cfg.resolution // vae_config.downsampling
        if cfg.resolution % unit:
            bad.append(f"--resolution={cfg.resolution} is no multiple of {unit}, VAE times patch")
        elif wanted not in (None, (side // patch) ** 2):
            fits = [f"patch {p}" for p in (1, 2, 4, 8) if (side // p) ** 2 == wanted] + ["another VAE or teacher"]
            bad.append(f"--sit={cfg.sit} on latents of {side}x{side} has {(side // patch) ** 2} tokens, "
                       f"--teacher={cfg.teacher} {wanted}: use {fits[0]}")
    return bad

# ---- Data order and randomness: functions of (seed, step), for the whole batch; each process takes its rows. Nothing
# about them is ever saved, a resumed run goes on exactly where it was, and the number of processes may change between.

class Order(torch.utils.data.Sampler):
    """Index lists of this process's micro-batches, step after step through a fresh permutation of each epoch."""
    def __init__(self, length, cfg, rank, world, first_step, stream="epoch"):
        self.length, self.cfg, self.rank, self.world = length, cfg, rank, world
        self.first, self.stream = first_step, stream
    def __iter__(self):
        epoch, share, micro = None, self.cfg.batch // self.world, self.cfg.micro_batch
        for position in range(self.first * self.cfg.batch + self.rank * share, 2**62, self.cfg.batch):
            rows = []
            for i in range(position, position + share):
                if i // self.length != epoch:
                    epoch = i // self.length
                    generator = torch.Generator().manual_seed(seed_of(self.cfg.seed, self.stream, epoch))
                    order = torch.randperm(self.length, generator=generator)
                rows.append(int(order[i % self.length]))
            yield from (rows[i : i + micro] for i in range(0, share, micro))

def batches_of(data, cfg, rank, world, device, stream, first_step=0):
    """Endless micro-batches (uint8 [b, 3, R, R], labels [b], what a cache adds) on the device, from first_step on."""
    workers = 0 if cfg.data == "tiny" else cfg.workers
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, sampler=Order(len(data), cfg, rank, world, first_step, stream), num_workers=workers,
        pin_memory=device.type == "cuda", prefetch_factor=4 if workers else None, worker_init_fn=ignore_signals)
    for values in loader:
        yield [value.to(device, non_blocking=True) for value in values]

def ignore_signals(_):
    """Data workers leave signals to the process that they work for; they end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

def draws(cfg, step, rank, world, latent, device, stream="step"):
    """All randomness of a step, this process's rows of it: t [b], eps and noise [b, C, h, w], drop [b], flip [b].
    The same on each kind of device; a GPU with another number of multiprocessors may draw other numbers."""
    g = torch.Generator(device).manual_seed(seed_of(cfg.seed, stream, step))
    B, mine = cfg.batch, slice(rank * cfg.batch // world, (rank + 1) * cfg.batch // world)
    u = torch.rand(3, B, generator=g, device=device)
    eps, noise = (torch.randn(B, *latent, generator=g, device=device)[mine] for _ in range(2))
    t = time_from_uniform(u[0], cfg.weighting, cfg.path)
    return t[mine], eps, noise, u[1, mine] < cfg.label_drop, u[2, mine] < (0.5 if cfg.hflip else 0.0)

# ------------------------------------------------------------------------------------------ Small helpers of the loop.

@contextmanager
def frozen(*modules):
    """Inside, gradients flow through the modules, not into their parameters; after it all is as it was."""
    trainable = [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)

def parallel(network, world, device):
    """The network under DDP, if there are several processes."""
    if network is None or world == 1:
        return network
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")          # older versions lack its newer name
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None,
                                   broadcast_buffers=False, gradient_as_bucket_view=True)

def syncing(now, *networks):
    """A context in which DDP averages gradients over the processes only if `now`: in a step's last micro-batch."""
    stack = ExitStack()
    for network in networks:
        if isinstance(network, DistributedDataParallel) and not now:
            stack.enter_context(network.no_sync())
    return stack

@torch.no_grad()
def ema_update(average, model, decay, ok):
    """average += (1 - decay) (model - average), parameters and float buffers; counters are copied. Only where ok."""
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

def make_optimizer(network, lr):
    """The paper's AdamW. Fused: one kernel, whose `found_inf` skips a step on the device, without asking the host."""
    return torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)

def load_optimizer(opt, saved, what):
    """AdamW's two averages of every parameter; the settings, among them a changed rate, are this run's."""
    own = {f"{i}.{key}": opt.param_groups[0]["params"][i] if key != "step" else torch.tensor(0.0)
           for i in saved["state"] for key in ("step", "exp_avg", "exp_avg_sq")}
    given = {f"{i}.{key}": value for i, values in saved["state"].items() for key, value in values.items()}
    if wrong := misfits(own, given) or [f"{key} is too many or missing" for key in own.keys() ^ given.keys()]:
        raise ValueError(f"{what} does not fit: {wrong[0]}")
    opt.load_state_dict({**opt.state_dict(), "state": saved["state"]})

class Log:
    """Sums of scalars on the device; one reduction and one copy to the host for each line that is printed."""
    NETWORKS = {"vae": ("l1", "lpips", "kl", "gan", "align_vae"), "disc": (), "sit": ("v", "align_sit")}
    def __init__(self, out, rank, device):
        self.out, self.rank, self.device = Path(out), rank, device
        self.sums, self.count = {}, 0
        self.restart_clock()
    def restart_clock(self):
        """After the first step, whose time is torch.compile's."""
        self.since, self.waited, self.untimed = time.time(), 0.0, self.count
    def wait(self, batches):
        """The next batch; the time it takes is what the loop waits on data (a GPU may be busy meanwhile)."""
        begin, batch = time.time(), next(batches)
        self.waited += time.time() - begin
        return batch
    def add(self, ok, terms):
        """Scalars of a step, on the device; those of a skipped step do not count."""
        for name, value in {**terms, "good": torch.ones_like(ok)}.items():
            self.sums[name] = self.sums.get(name, 0.0) + torch.where(ok, value.double(), 0.0)
        self.count += 1
    def write(self, line):
        with surviving("metrics.jsonl"):
            if self.rank == 0:
                with open(self.out / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
    def flush(self, step, cfg, skipped):
        """Prints the means since the last call in one line, and writes them as JSON."""
        sums = dict(zip(self.sums, all_mean(torch.stack(list(self.sums.values()))).tolist()))
        good, timed = max(sums.pop("good"), 1), max(self.count - self.untimed, 1)
        seconds = (time.time() - self.since) / timed
        mean = {name: value / good for name, value in sums.items()}
        memory = {"GiB": torch.cuda.max_memory_allocated() / 2**30} if self.device.type == "cuda" else {}
        line = {"step": step, **mean, "ms": seconds * 1e3, "data_ms": self.waited / timed * 1e3,
                "skipped": int(skipped[0]), **memory}
        if self.rank == 0:
            left = int((cfg.steps - step) * seconds)
            parts = [" ".join(f"{term} {mean[term]:.3f}" for term in (net, *inside) if term in mean)
                     for net, inside in self.NETWORKS.items() if net in mean]
            parts.append("|g| " + " ".join(f"{mean[f'norm_{net}']:.2f}" for net in self.NETWORKS if net in mean))
            parts += [f"{cfg.batch / seconds:.0f} img/s", f"{line['ms']:.0f} ms, data {line['data_ms']:.0f}"]
            parts += [f"{memory['GiB']:.1f} GiB"] if memory else []
            parts += [f"SKIPPED {line['skipped']}"] if line["skipped"] else []
            if mean.get("z_var", 1.0) < 0.05:
                parts.append(f"WARNING: the latents collapse, their spatial variance is {mean['z_var']:.4f}")
            if not 0.02 < mean.get("disc", 1.0) < 2:        # hinge: 0 where it always wins, 1 where it knows nothing
                parts.append("WARNING: the discriminator wins or runs away: lower --gan or --lr_disc")
            parts.append(f"left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}")
            print(f"step {step:07d}/{cfg.steps:07d}", *parts, sep=" | ", flush=True)
        self.write(line)
        self.sums, self.count = {}, 0
        self.restart_clock()

# ---------------- Checkpoints: a pair of files. step_N.pt describes and plays itself; step_N.resume.pt only continues.

def checkpoints(out):
    """Steps of which both files are there, in order."""
    names = {entry.name for entry in Path(out).iterdir()}
    plays = [name for name in names if re.fullmatch(r"step_\d{7,}\.pt", name)]
    return sorted(int(name[5:-3]) for name in plays if f"{name[:-3]}.resume.pt" in names)

@contextmanager
def surviving(what, last=False):
    """A disk that is full, read-only or gone is reported, and the run goes on; `last` has no later chance."""
    try:
        yield
    except OSError as error:
        if last:
            raise
        print(f"could not write {what} ({error.strerror}): going on, the next interval tries again", flush=True)

def lock(out):
    """One run in a folder at a time. The system ends the lock with its process, so none is ever stale."""
    tempfile.TemporaryFile(dir=out).close()                 # an OSError where the folder is read-only
    fd = os.open(Path(out) / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        user = os.read(fd, 200).decode()
        raise ValueError(f"{out} is in use by {user}: stop that run, or name another --out") from None
    os.ftruncate(fd, 0)
    os.write(fd, f"process {os.getpid()} on {platform.node()}".encode())

class PoliteStop:
    """SIGTERM and SIGINT ask for a stop. All processes call it after each step: was any of them asked? (On the CPU, so
    that no GPU waits.) A second signal, 3 s later, ends the process at once."""
    def __init__(self, world):
        self.asked, self.group = 0.0, dist.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None
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

def save(cfg, step, plays, resumes):
    """Both files of a step, the one that plays last: it completes the pair. Then old pairs go, and what kills left."""
    out = Path(cfg.out)
    for name, content in ((f"step_{step:07d}.resume.pt", resumes), (f"step_{step:07d}.pt", plays)):
        content = {key: value.state_dict() if hasattr(value, "state_dict") else value
                   for key, value in content.items() if value is not None}
        content = tree_map_only(torch.Tensor, torch.Tensor.cpu, content)    # at once, not tensor by tensor while writing
        try:
            with open(out / f"{name}.tmp", "wb") as file:   # on the disk before it gets its name: whole or not at all
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(out / f"{name}.tmp", out / name)
        except RuntimeError as error:                       # torch.save's, after the disk's own
            raise error.__context__ or error
        finally:
            (out / f"{name}.tmp").unlink(missing_ok=True)
    steps = checkpoints(out)
    kept = {f"step_{old:07d}.resume.pt" for old in steps if old in steps[-cfg.keep :] or old % cfg.keep_every == 0}
    for path in out.glob("step_*.resume.pt"):
        if re.fullmatch(r"step_\d{7,}\.resume\.pt", path.name) and path.name not in kept:
            path.with_name(path.name.replace(".resume", "")).unlink(missing_ok=True)
            path.unlink()

def load_pair(cfg, rank):
    """The newest complete pair of the run's folder, or None. ValueError where its settings can't be continued."""
    if not (steps := checkpoints(cfg.out)):
        return None
    path = Path(cfg.out) / f"step_{steps[-1]:07d}.pt"
    plays, resumes = (read_weights(p) for p in (path, path.with_suffix(".resume.pt")))
    old, new = plays["config"], asdict(cfg)
    if not steps[-1] == plays["steps"] == resumes["steps"] or misfits({"skipped": torch.zeros(2)}, resumes):
        raise ValueError(f"{path} and its .resume.pt are no pair of one step: remove both")
    if cfg.train_vae and cfg.gan and "opt_disc" not in resumes:
        raise ValueError(f"{cfg.out} was trained without a discriminator: use --gan=0, or a new --out and --init")
    fixed = "data resolution sit teacher train_vae latent_norm stop_grad path batch seed hflip".split()
    fixed += [] if cfg.train_vae else ["vae"]
    if wrong := [f"{key} was {old[key]!r}, is {new[key]!r}" for key in fixed if old.get(key) != new[key]]:
        raise ValueError(f"{cfg.out} holds a run with other settings ({'; '.join(wrong)}): use those, or another --out")
    changed = [f"{key} {old.get(key)!r} -> {new[key]!r}" for key in new if key != "dry" and old.get(key) != new[key]]
    if rank == 0:
        print(f"resuming {path}" + (f", changed: {', '.join(changed)}" if changed else ""))
    return plays, resumes

# ------------------------------------------------------------------------------------------------------------- Models.

def build(cfg, data, pair, world, device):
    """-> vae, sit, disc, teacher, perceptual (None where the settings need none), needs_statistics, gan_start."""
    torch.manual_seed(seed_of(cfg.seed, "weights", 0))
    sit = disc = teacher = perceptual = stats = None
    if pair is None:        # weights come from --init, --vae or the dice (seeded), when resuming from the checkpoint
        with rank0_first():
            vae, stats, disc_state = load_vae(cfg.init or cfg.vae)
        if cfg.sigma:
            vae = VAE(replace(vae.cfg, sigma=cfg.sigma))
    else:
        vae, disc_state = VAE(config_from_dict(VAEConfig, pair[0]["vae_config"])), pair[0].get("discriminator")
        load_strict(vae, pair[0]["vae"], f"{cfg.out}: its VAE")
    if problems := check(cfg, world, vae.cfg):
        raise ValueError(problems[0])
    if cfg.sit != "none":
        depth, width, heads, patch, align_depth = architecture(cfg)
        dims = (teacher_shape(cfg.teacher, cfg.resolution)[1],) if cfg.repa_sit else ()
        sit = SiT(SiTConfig(depth, width, heads, patch, vae.cfg.z_channels, cfg.resolution // vae.cfg.downsampling,
                            len(data.classes), dims, align_depth, cfg.projector_width, cfg.qk_norm, cfg.path))
        if pair is not None:
            load_strict(sit, pair[1]["model"], f"{cfg.out}: its SiT")
        elif cfg.init:
            start_from(sit, cfg.init)
        if stats is not None:
            sit.bn.set(*stats)
        if dims:
            with rank0_first():
                teacher = load_teacher(cfg.teacher, cfg.resolution, cfg.teacher_repo, cfg.teacher_weights,
                                       getattr(data, "draw", None)).to(device, memory_format=torch.channels_last)
    if cfg.train_vae and cfg.gan:
        disc = Discriminator(disc_state["main.0.weight"].shape[0] if disc_state else cfg.disc_ch)
        if disc_state:
            load_strict(disc, disc_state, f"{cfg.out if pair else cfg.init or cfg.vae}: its discriminator")
    if cfg.train_vae and cfg.lpips:
        with rank0_first():
            perceptual = Perceptual(cfg.lpips_legacy_range).to(device)
    for network in filter(None, (vae, sit, disc)):
        network.to(device, memory_format=torch.channels_last)
    needs_statistics = sit is not None and pair is None and stats is None
    gan_start = cfg.gan_start if cfg.gan_start >= 0 else 0 if disc_state else 2000
    if pair is not None and cfg.gan_start < 0:
        gan_start = pair[0]["config"]["gan_start"]
    return vae, sit, disc, teacher, perceptual, needs_statistics, gan_start

def start_from(sit, path):
    """--init: another run's EMA SiT, for other data or classes; what depends on those starts afresh, and is named."""
    file, own = read_weights(find_checkpoint(path)), sit.state_dict()
    if "ema" not in file:
        raise ValueError(f"--init={path} holds no SiT: for its VAE alone use --vae={path}")
    fits = {key: file["ema"][key] for key in own.keys() & file["ema"] if not misfits({key: own[key]}, file["ema"])}
    fresh = sorted(own.keys() - fits.keys())
    if wrong := [key for key in fresh if not key.startswith(("y_embedder.", "pos_embed", "projectors."))]:
        raise ValueError(f"--init={path} does not fit --sit: {', '.join(wrong[:3])} and so on are missing or misshapen")
    sit.load_state_dict(own | fits)
    print(f"--init={path}: " + (f"starting afresh: {', '.join(fresh)}" if fresh else "all of SiT"))

def posterior(vae, x, cached):
    """Images x, or [moments] of the cache -> mean, logvar [b, C, h, w]."""
    if not cached:
        return vae.encode(x)
    mean, std = cached[0].float().unbind(1)
    return mean, 2 * std.log()

@torch.no_grad()
def measure_statistics(sit, vae, batches, cfg, rank, world, latent, device, steps=8):
    """The latents' own mean and variance over a few batches: where `bn` starts if no file of statistics is given."""
    for step in range(steps):
        for noise in draws(cfg, step, rank, world, latent, device, "statistics")[2].split(cfg.micro_batch):
            image, _, *cached = next(batches)
            with autocast(device):
                mean, logvar = posterior(vae, to_float(image), cached)
            sit.bn.normalise_batch(vae.sample(mean, logvar, noise))
    sit.bn.set(*sit.bn.pending_statistics())
    sit.bn.pending = None

def compile_networks(cfg, vae, sit, disc, teacher, perceptual):
    """torch.compile in place, so that state dicts keep their names: each network, but SiT block by block."""
    torch._dynamo.config.optimize_ddp = False           # else it cuts the graphs of several GPUs into others than one's
    torch._functorch.config.donated_buffer = not cfg.gan_adaptive       # whose two extra backwards keep their graphs
    decoder = vae.decoder if cfg.train_vae else None
    for module in [vae.encoder, decoder, *(sit.blocks if sit else ()), disc, teacher, perceptual]:
        if module is not None:
            module.compile(dynamic=False)

def check_replicas(world, **networks):
    """Every parameter and buffer is the same on all processes, else a RuntimeError names the first that is not. (Not
    the discriminator's running statistics: each process has its own, and none is ever read.)"""
    sums = {f"{label}.{name}": value.double().sum() for label, network in networks.items() if network is not None
            for name, value in (network.named_parameters() if label == "disc" else network.state_dict().items())}
    low, high = torch.stack(list(sums.values())), torch.stack(list(sums.values()))
    if world > 1:
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        for name, same in zip(sums, (low == high).tolist()):            # NaN is never equal
            if not same:
                raise RuntimeError(f"the processes differ in {name} since the last checkpoint: resume from that")

# ------------------------------------------------------------------------------------------------------------ The run.

def run(cfg, rank, world, device, stop=lambda: False):
    """Trains to cfg.steps, from the newest checkpoint of cfg.out if there is one. -> False if stop() ended it."""
    data = open_images(cfg.data, cfg.resolution)
    resuming = partial(reading, cfg.out, "run's folder", "move its newest pair of checkpoints away")
    with resuming():
        pair = load_pair(cfg, rank)
    first = pair[0]["steps"] if pair else 0
    if all_mean(torch.tensor(float(first), device=device)).item() != first:
        raise ValueError(f"the machines see different checkpoints: --out={cfg.out} must be a folder that they share")
    vae, sit, disc, teacher, perceptual, needs_statistics, gan_start = build(cfg, data, pair, world, device)
    cfg = replace(cfg, gan_start=gan_start)
    fingerprint = identity(data)["data"][:16]
    if pair and pair[0].get("data", fingerprint) != fingerprint:
        raise ValueError(f"{cfg.data} is not what {cfg.out} was trained on (classes, labels): name another --out")
    need = 16 * sum(p.numel() for net in (vae, sit, disc) if net for p in net.parameters())     # weights, EMA, AdamW
    if shutil.disk_usage(cfg.out).free < need:
        raise ValueError(f"--out={cfg.out} has no room for a checkpoint of {need / 1e9:.2f} GB")
    latent = (vae.cfg.z_channels, *[cfg.resolution // vae.cfg.downsampling] * 2)            # C, h, w
    micro = min(cfg.micro_batch, cfg.batch // world)                                        # images at a time
    accumulate = cfg.batch // world // micro
    source = Cached(data, cfg.latents, vae, images=teacher is not None) if cfg.latents else data
    stream = partial(batches_of, source, cfg, rank, world, device)
    # what is trained, each with its own AdamW. EMA copies are taken before anything is compiled
    vae.requires_grad_(cfg.train_vae)
    trained = {name: net for name, net in (("vae", cfg.train_vae and vae), ("disc", disc), ("sit", sit)) if net}
    opts = {name: make_optimizer(net, getattr(cfg, f"lr_{name}")) for name, net in trained.items()}
    opt_keys = {"sit": "opt", "vae": "opt_vae", "disc": "opt_disc"}                         # the authors' names
    disc_train = parallel(disc, world, device)
    if needs_statistics:
        measure_statistics(sit, vae, stream("statistics"), cfg, rank, world, latent, device)
    ema = copy.deepcopy(sit).requires_grad_(False) if sit else None
    vae_ema = copy.deepcopy(vae).requires_grad_(False) if cfg.vae_ema and cfg.train_vae else None
    skipped = pair[1]["skipped"].to(device) if pair else torch.zeros(2, device=device)      # in all, in a row
    if pair:
        with resuming():
            for name, opt in opts.items():
                load_optimizer(opt, pair[1][opt_keys[name]], f"{cfg.out}: its {opt_keys[name]}")
            for key, average in filter(all, (("ema", ema), ("vae_ema", vae_ema))):
                load_strict(average, pair[0].get(key) or pair[0]["vae"], f"{cfg.out}: its {key}")
        pair = None                                     # frees the memory
    if cfg.compile == "1" or (cfg.compile == "auto" and can_compile(device)):
        compile_networks(cfg, vae, sit, disc, teacher, perceptual)
    elif device.type == "cuda" and rank == 0:
        print("torch.compile is off" + ": it needs a GPU since Volta, Triton, a C compiler, Python.h" *
              (cfg.compile == "auto"))
    for level in [*vae.encoder.down[: cfg.recompute], *vae.decoder.up[: cfg.recompute]]:
        level.recompute = cfg.train_vae
    vae_train = parallel(vae, world, device) if cfg.train_vae else vae
    sit_train = parallel(sit, world, device)
    batches = stream("epoch", first)
    log = Log(cfg.out, rank, device)
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    log.write({"config": asdict(cfg), "world": world, "from_step": first, "versions": VERSIONS, "images": len(data),
               "data": fingerprint, "git": git.stdout.strip(), "threads": torch.get_num_threads()})

    for step in range(first, cfg.steps + 1):            # one turn more than steps: the last one only looks and saves
        done, stopping = step == cfg.steps, stop()
        if step > first and (done or step % cfg.preview_every == 0) and rank == 0:
            with surviving("the preview"), torch.compiler.set_stance("force_eager"):      # other shapes than the step's
                preview(cfg, step, vae_ema or vae, ema, data, device)
        if step > first and (done or stopping or step % cfg.save_every == 0):
            check_replicas(world, vae=vae, sit=sit, disc=disc)
            if rank == 0:
                plays = {"config": asdict(cfg), "vae_config": asdict(vae.cfg), "sit_config": sit and asdict(sit.cfg),
                         "vae": vae, "vae_ema": vae_ema, "ema": ema, "discriminator": disc, "steps": step,
                         "classes": list(data.classes), "data": fingerprint, "versions": VERSIONS}
                resumes = {"model": sit, "steps": step, "skipped": skipped.cpu()}
                with surviving(f"the checkpoint of step {step}", last=done or stopping):
                    save(cfg, step, plays, resumes | {opt_keys[name]: opt for name, opt in opts.items()})
            if world > 1:
                dist.barrier()                          # nobody looks for the files before they are there
        if done or stopping:
            return done

        # ---------------------------------------------------------------------------------- one step of the paper
        gan_on, terms = disc is not None and step >= cfg.gan_start, {}
        disc_on = disc is not None and step >= cfg.gan_start - 2000     # it learns before the VAE hears it
        drawn = [values.split(micro) for values in draws(cfg, step, rank, world, latent, device)]
        for i, (t, eps, noise, drop, flip) in enumerate(zip(*drawn)):
            image, y, *cached = log.wait(batches)                           # uint8 [b, 3, R, R], [b]
            image = torch.where(flip[:, None, None, None], image.flip(-1), image) if cfg.hflip else image
            x, now = to_float(image).contiguous(memory_format=torch.channels_last), {}  # [b, 3, R, R] in [-1, 1]
            with syncing(i == accumulate - 1, vae_train, disc_train, sit_train):
                with torch.no_grad(), autocast(device):
                    f = [teacher(image)] if teacher else []                 # [b, T, d]
                    if not cfg.train_vae:
                        z = vae.sample(*posterior(vae, x, cached), noise)   # [b, C, h, w]

                # 1. VAE: pixels, KL, GAN; and alignment through the frozen SiT, the VAE's only signal from there
                if cfg.train_vae:
                    with frozen(sit, disc):
                        with autocast(device):
                            z, rec, mean, logvar = vae_train(x, noise)      # rec [b, 3, R, R], the others [b, C, h, w]
                        now["l1"] = reconstruction_loss(x, rec, cfg.recon_loss)
                        now["lpips"] = perceptual(x, rec) if perceptual else x.new_zeros(())
                        now["kl"] = kl_divergence(mean, logvar)
                        now["vae"] = now["l1"] + cfg.lpips * now["lpips"] + cfg.kl * now["kl"]
                        if gan_on:
                            now["gan"] = generator_loss(disc(rec))
                            nll, last = now["l1"] + cfg.lpips * now["lpips"], vae.decoder.conv_out.weight
                            balance = adaptive_gan_weight(nll, now["gan"], last) if cfg.gan_adaptive else 1
                            now["vae"] = now["vae"] + cfg.gan * balance * now["gan"]
                        if sit and cfg.repa_vae:
                            z_t, _ = interpolate(sit.bn(z), eps, t, cfg.path)       # bn: running statistics, constants
                            with autocast(device):
                                h = sit.align_only(z_t, t, y)                       # [b, T, d], no label dropout
                            now["align_vae"] = align_loss(h, f)
                            now["vae"] = now["vae"] + cfg.repa_vae * now["align_vae"]
                        if cfg.stop_grad:
                            (now["vae"] / accumulate).backward()

                # 2. discriminator: the same x and reconstruction
                if disc_on:
                    now["disc"] = discriminator_loss(disc_train(x), disc_train(rec.detach()))
                    (now["disc"] / accumulate).backward()

                # 3. SiT: velocity and alignment, with the same t and eps as in 1; detach keeps this loss out of the VAE
                if sit:
                    z = z.detach() if cfg.stop_grad else z
                    zn = sit.bn.normalise_batch(z) if cfg.latent_norm == "batch" else sit.bn(z)
                    z_t, target = interpolate(zn, eps, t, cfg.path)
                    with autocast(device):
                        v, h = sit_train(z_t, t, y, drop)                   # [b, C, h, w], [b, T, d]
                    now["sit"] = now["v"] = F.mse_loss(v.float(), target)
                    if h:
                        now["align_sit"] = align_loss(h, f)
                        now["sit"] = now["v"] + cfg.repa_sit * now["align_sit"]
                    loss = now["sit"] if cfg.stop_grad else now["sit"] + now["vae"]     # naive: one backward of the sum
                    (loss / accumulate).backward()
            now["z_var"] = z.detach().var((2, 3)).mean()                    # -> 0 where the latents collapse
            terms = {name: terms.get(name, 0) + value.detach() / accumulate for name, value in now.items()}

        # 4. the three updates are independent of each other: clip each, check all once, step all or none
        active = [name for name in trained if name != "disc" or disc_on]
        for name in active:
            terms[f"norm_{name}"] = torch.nn.utils.clip_grad_norm_(trained[name].parameters(), cfg.clip)
        ok = all_finite(*terms.values())
        for name in active:
            opts[name].found_inf = (~ok).float()
            opts[name].step()
            opts[name].zero_grad()
        if sit and cfg.latent_norm == "batch":
            sit.bn.commit(ok)
        # 5. averages of the weights
        if sit:
            ema_update(ema, sit, cfg.ema, ok)
        if vae_ema:
            ema_update(vae_ema, vae, cfg.vae_ema, ok)
        # -------------------------------------------------------------------------------------- end of the step

        skipped = torch.stack([skipped[0] + ~ok, torch.where(ok, 0.0, skipped[1] + 1)])
        log.add(ok, terms)
        if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps:
            log.flush(step + 1, cfg, skipped)
        elif step == first:
            log.restart_clock()
        if (device.type == "cpu" or (step + 1) % cfg.log_every == 0) and skipped[1] >= 10:
            seen = {name: value.item() for name, value in terms.items() if not torch.isfinite(value)}
            raise ValueError(f"ten steps in a row were not finite, up to {step} (process {rank}: {seen or 'finite'}): "
                             f"stopped; {cfg.out} keeps its last checkpoint. Lower the learning rates, check the data")

@torch.no_grad()
def preview(cfg, step, vae, ema, data, device):
    """samples_N.png (EMA SiT, fixed seed, a row for each class while there are ten) and reconstructions_N.png."""
    if ema:
        classes = np.linspace(0, len(data.classes) - 1, min(10, len(data.classes))).round().astype(int).tolist()
        model, labels = Model(vae, ema, list(data.classes), {}, step), [c for c in classes for _ in range(8)]
        images = model(labels, cfg.preview_steps, "ab2", cfg.preview_guidance, batch=cfg.micro_batch)
        save_png(f"{cfg.out}/samples_{step:07d}.png", grid(images, 8))
    image, _ = data[list(range(0, len(data), max(1, len(data) // 16)))[:16]]
    rec = to_uint8(vae.decode(vae.encode(to_float(image.to(device)))[0])).cpu()
    save_png(f"{cfg.out}/reconstructions_{step:07d}.png", grid(torch.stack([image, rec], 1).flatten(0, 1), 8))  # pairs

@friendly
def main(argv):
    cfg = parse(Config, argv, PRESETS)
    rank, world, device = start()
    if problems := check(cfg, world):
        raise ValueError("; ".join(problems))
    if rank == 0:
        differs = {key: value for key, value in asdict(cfg).items() if value != getattr(Config, key)}
        print(f"settings that differ from the paper's run: {differs or 'none'}")
    if cfg.dry:
        return
    try:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        if rank == 0:
            lock(cfg.out)
    except OSError as error:
        raise ValueError(f"cannot write to --out={cfg.out} ({error.strerror}): name another folder") from None
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not cfg.deterministic      # tries all kernels once for each shape; shapes are fixed
    stop, finished = PoliteStop(world), True
    if cfg.first_stage and cfg.sit != "none" and cfg.vae in VAES and not cfg.init:
        # the first stage of a latent diffusion model is this very loop without SiT; the GAN joins in its second half
        stage = replace(cfg, out=f"{cfg.out}/first-stage", sit="none", teacher="none", steps=cfg.first_stage,
                        first_stage=0, latents="", gan_start=cfg.first_stage // 2, train_vae=True, stop_grad=True)
        Path(stage.out).mkdir(exist_ok=True)
        finished = bool(checkpoints(cfg.out)) or run(stage, rank, world, device, stop)
        cfg = replace(cfg, vae=stage.out, sigma=0.0)    # the stage's VAE carries its sigma
    finished = finished and run(cfg, rank, world, device, stop)
    if rank == 0:
        print(f"stopped. To go on: the same command ({' '.join(sys.argv)})" if not finished else
              f"done: {cfg.out}" + (f". Samples: python sample.py {cfg.out}" if cfg.sit != "none" else ""))

if __name__ == "__main__":
    main()
