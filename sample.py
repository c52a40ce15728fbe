"""Images out of a checkpoint: solvers, guidance, the pipeline, and all formats of weight files.

    python sample.py runs/tiny --count=64 --guidance=2          # grid.png; the path is all it needs
    python sample.py runs/tiny --classes=star,heart --solver=ab2 --steps=50
    torchrun --nproc_per_node=8 sample.py runs/repa-e --count=50000 --out=samples.npz   # for FID
    python sample.py export runs/repa-e --to=my-vae             # for diffusers; the authors' files

    from sample import load_pipeline                            # the same from Python
    images = load_pipeline("runs/tiny")([5, 7], steps=50, guidance=2.0)     # uint8 [2, 3, R, R]

Noise at t = 1 flows to latents at t = 0 along dz/dt = v (euler, heun, ab2), or with noise injected
on the way (sde: Euler-Maruyama, the paper's). Noise and label of image i depend on (seed, i) alone.
"""
import argparse
import copy
import errno
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.utils._triton
from torchvision.utils import save_image
from tqdm import tqdm

from sit import LatentNorm, SiT, SiTConfig, TimestepEmbedder, score_from_velocity, wide
from vae import (VAE, VAES, Folder, VAEConfig, collate, load_pt, load_weights, reading, to_uint8,
                 unwrap)


# ---- Solvers --------------------------------------------------------------------
# z at t = 1 -> z at t = 0, float64 (wide), along velocity(z, t: float) -> dz/dt. `steps`
# counts calls of it (heun: about half of them). noise() is normal, like z.

def euler(velocity, z, steps, noise=None, path="linear"):
    """Order 1: z += dt v(z, t)."""
    for t, t_next in pairwise(np.linspace(1, 0, steps + 1)):
        z = z + (t_next - t) * velocity(z, t)
    return z


def heun(velocity, z, steps, noise=None, path="linear"):
    """Order 2: the mean velocity of a step's two ends. The last step is Euler's, as the
    authors'."""
    for t, t_next in pairwise(np.linspace(1, 0, steps + 1)):
        v = velocity(z, t)
        ahead = z + (t_next - t) * v
        if t_next > 0:
            ahead = z + (t_next - t) * (v + velocity(ahead, t_next)) / 2
        z = ahead
    return z


def ab2(velocity, z, steps, noise=None, path="linear"):
    """Adams-Bashforth, order 2 with one call a step: extrapolates v to the step's middle."""
    last = None
    for t, t_next in pairwise(np.linspace(1, 0, steps + 1)):
        v = velocity(z, t)
        z = z + (t_next - t) * (v if last is None else 1.5 * v - 0.5 * last)
        last = v
    return z


def euler_maruyama(velocity, z, steps, noise, path="linear", t_last=0.04):
    """The reverse SDE dz = (v - w/2 score) dt + sqrt(w) dW, w(t) = 2t (SiT, section 2.3). t runs
    from 1 to t_last in steps - 1 intervals (the score is singular at 0), then to 0 without
    noise."""
    for t, t_next in pairwise([*np.linspace(1, t_last, steps), 0.0]):
        v, w = velocity(z, t), 2 * t
        score = score_from_velocity(v, z, z.new_full((len(z),), t), path)
        z = z + (t_next - t) * (v - 0.5 * w * score)
        if t_next > 0:
            z = z + math.sqrt(w * (t - t_next)) * noise()
    return z


SOLVERS = {"euler": euler, "heun": heun, "ab2": ab2, "sde": euler_maruyama}


def guided(net, y, scale=1.0, low=0.0, high=1.0):
    """Classifier-free guidance in an interval (Kynkaanniemi et al., 2404.07724): -> velocity(z, t).

    v = v_null + scale (v_y - v_null) where low <= t <= high: scale 0 is unconditional. Elsewhere,
    and with scale 1, it is v_y, in one network call. The SDE's drift is affine in v, so guiding the
    velocity guides the drift.
    """
    def velocity(z, t):
        z, dtype = z.float(), z.dtype
        time = z.new_full((len(z),), t)
        if scale == 1 or not low <= t <= high:
            return net(z, time, y)[0].to(dtype)
        labels = torch.cat([y, torch.full_like(y, net.cfg.num_classes)])        # y, and null
        both, _ = net(torch.cat([z, z]), torch.cat([time, time]), labels)
        v, v_null = both.to(dtype).chunk(2)
        return v_null + scale * (v - v_null)
    return velocity


# ---- The pipeline ---------------------------------------------------------------
# Labels -> images: noise, solver, bn's inverse, decoder.

DECODED = 16        # images that a VAE works on at a time: in float32 at 256 px they take 5 GB


@dataclass
class Pipeline:
    """A snapshot's networks: the VAE (or its average), the EMA SiT with its bn; class names."""
    vae: VAE
    sit: SiT
    classes: list
    config: dict
    step: int
    precision: str = "auto"

    @torch.no_grad()
    def batch(self, indices, labels, steps, solver, guidance, low, high, seed):
        """Images number `indices` of the seed, of these labels -> uint8 [B, 3, R, R]."""
        cfg, device = self.sit.cfg, self.sit.pos_embed.device
        self.check(labels)
        generators = generators_of(seed, "image", indices, device)
        y = torch.as_tensor(labels, device=device)

        def noise():
            shape = cfg.channels, cfg.size, cfg.size
            rows = [torch.randn(shape, generator=g, device=g.device) for g in generators]
            return torch.stack(rows).to(device, wide(device))   # [B, C, H, W]
        with autocast(device, self.precision):
            velocity = guided(self.sit, y, guidance, low, high)
            zn = SOLVERS[solver](velocity, noise(), steps, noise, cfg.path)
        z = self.sit.bn.inverse(zn).float()
        return torch.cat([to_uint8(self.vae.decode(part)) for part in z.split(DECODED)])

    def check(self, labels):
        """ValueError if they are no labels of this model."""
        labels, count = np.asarray(labels), self.sit.cfg.num_classes
        whole = labels.ndim == 1 and len(labels) and labels.dtype.kind in "iu"
        if not whole or labels.min() < 0 or labels.max() >= count:
            raise ValueError(f"labels {labels.tolist()}: expected a list of numbers from 0 to "
                             f"{count - 1}")

    def prepare(self, count):
        """Makes `count` images in all faster on a GPU: SiT's weights in bfloat16, and from a
        thousand images on compiled blocks (TORCH_COMPILE_DISABLE=1: never). -> itself"""
        device = self.sit.pos_embed.device
        if in_bfloat16(device, self.precision):
            round_weights(self.sit)
        if count >= 1000 and can_compile(device):
            for block in self.sit.blocks:
                block.compile(dynamic=False)
        return self

    def __call__(self, labels, steps=250, solver="sde", guidance=1.0, low=0.0, high=1.0, seed=0,
                 batch=64, first=0):
        """Labels (numbers) -> uint8 [len(labels), 3, R, R] on the CPU; image i is number first + i
        of the seed."""
        self.check(labels)
        images = []
        for i in range(0, len(labels), batch):
            part = labels[i : i + batch]
            numbers = range(first + i, first + i + len(part))
            images.append(self.batch(numbers, part, steps, solver, guidance, low, high, seed).cpu())
        return torch.cat(images)


def generators_of(seed, stream, indices, device):
    """A generator for each image, by its number alone; for Apple's GPUs on the CPU."""
    device = "cpu" if device.type == "mps" else device
    return [torch.Generator(device).manual_seed(seed_of(seed, stream, i)) for i in indices]


def round_weights(sit):
    """Linear weights to bfloat16 once, as autocast does in every call: the same bits, without its
    work. The time embedding's stay: autocast is off there."""
    timestep = set(sit.t_embedder.modules())
    for module in sit.modules():
        if isinstance(module, torch.nn.Linear) and module not in timestep:
            module.bfloat16()


def load_pipeline(path, device="cpu", vae=""):
    """A snapshot of ours, or a checkpoint of REPA-E, REPA or SiT; of a run's folder its newest.

    vae: what load_vae takes, in place of the checkpoint's own; frozen-VAE runs of the authors hold
    none. All processes call it.
    """
    with rank0_first():
        path = find_checkpoint(path)
    content = read_weights(path)
    if "vae_config" in content and "sit_config" not in content:
        raise ValueError(f"{path} holds a VAE without a SiT (--method=vae)")
    if vae in VAES:
        raise ValueError(f"--vae={vae} is untrained: name a trained one")
    sit_weights(content, path)
    if not vae and "vae" not in content:
        raise ValueError(f"{path} holds no VAE: name one with --vae=..., for REPA and SiT "
                         "hf:stabilityai/sd-vae-ft-mse")
    with reading(path, "a checkpoint of train.py, REPA-E, REPA or SiT"):
        if "sit_config" in content:
            cfg = config_of(SiTConfig, content["sit_config"])
            weights = sit_weights(content, path)
        else:
            cfg, weights = published_sit(content)
        sit = SiT(cfg)
        load_weights(sit, weights)
    sit.projectors = torch.nn.ModuleList()              # sampling needs no tokens
    with rank0_first():
        own, _, _ = load_vae(vae or path)
    if own.cfg.z_channels != cfg.channels:
        raise ValueError(f"{vae} has latents of {own.cfg.z_channels} channels, the SiT of "
                         f"{cfg.channels}")
    for net in (own, sit):
        net.to(device).eval().requires_grad_(False)
    classes = content.get("classes") or [str(i) for i in range(cfg.num_classes)]
    return Pipeline(own, sit, classes, content.get("config", {}), content.get("steps", 0))


# ---- Weights: finding files -----------------------------------------------------
# Everything is read with weights_only=True: nothing in a file is ever executed.

PUBLISHED = {"sdvae": "f8d4", "invae": "f16d32", "vavae": "f16d32"}     # the authors' start VAEs


HUB = "https://huggingface.co"


def hub_files(name):
    """sdvae, invae, vavae, hf:OWNER/NAME[/FOLDER] (an AutoencoderKL) or hf:OWNER/NAME/FILE -> a
    repository and its files, the weights last; None for other names."""
    if name in PUBLISHED:
        stem = f"{name}-{PUBLISHED[name]}"
        return f"REPA-E/{name}", [f"{stem}-latents-stats.pt", f"{stem}-discriminator-ckpt.pt",
                                  f"{stem}.pt"]
    if not re.match(r"hf:[^/]+/[^/]", name):
        return None
    owner, repository, *folder = name.removeprefix("hf:").split("/")
    files = ["config.json", "diffusion_pytorch_model.safetensors"]
    if folder and "." in folder[-1]:
        files = [folder.pop()]
    return f"{owner}/{repository}", ["/".join([*folder, file]) for file in files]


def hub_path(repository, file):
    """Where a downloaded file lies: in torch.hub's cache."""
    return Path(torch.hub.get_dir()) / "checkpoints" / repository.replace("/", "--") / file


def download(repository, files):
    """-> the local path of the last file. Each is downloaded once."""
    for file in files:
        target, url = hub_path(repository, file), f"{HUB}/{repository}/resolve/main/{file}"
        try:
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(target))
        except OSError as error:
            raise ValueError(f"cannot download {url} ({error}): put it at {target}") from None
    return target


def snapshots_of(folder):
    """The snapshots in a run's folder, ours or the authors', the newest last."""
    files = [*folder.glob("*.pt"), *folder.glob("checkpoints/*.pt")]
    found = [file for file in files if re.fullmatch(r"(step_)?\d{7,}", file.stem)]
    return sorted(found, key=lambda file: int(file.stem.removeprefix("step_")))


def find_checkpoint(name):
    """-> the path of the weights: a file; in a folder the newest snapshot (a run's, also the
    authors'), else its state.pt, or diffusers' weights; or a known name, which is downloaded."""
    path = Path(name).expanduser()
    if path.is_dir():
        found = snapshots_of(path)[-1:]
        found += [file for file in (path / "state.pt", path / "state.prev.pt") if file.exists()]
        for pattern in ("*.safetensors", "*.bin"):      # the plain one, else .fp16 or another
            for folder in (path, path / "vae"):         # vae: of a whole pipeline's folder
                files = folder.glob(f"diffusion_pytorch_model{pattern}")
                found += sorted(files, key=lambda file: len(file.name))
        if not found:
            raise ValueError(f"{path} holds no checkpoint (step_0000000.pt or state.pt)")
        return found[0]
    if not path.exists() and (known := hub_files(str(name))):
        return download(*known)
    return path


def read_weights(file, mapped=True):
    """A .pt or .safetensors file -> its content: tensors, numbers, dicts."""
    with reading(file, "a .pt or .safetensors file of weights"):
        if file.suffix == ".safetensors":
            return read_safetensors(file)
        return dict(load_pt(file, mapped))


SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "I64": torch.int64}


def read_safetensors(file):
    """8 bytes (the length of the header), the header in JSON, raw bytes -> dict of tensors."""
    raw = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        data = torch.frombuffer(raw[start + first : start + end], dtype=SAFETENSORS[entry["dtype"]])
        tensors[name] = data.view(entry["shape"])
    return tensors


def write_safetensors(file, tensors):
    """Dict of tensors -> file, in float32."""
    header, data = {}, bytearray()
    for name, value in tensors.items():
        first = len(data)
        data += value.float().contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": [first, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                     # the data begin at a multiple of 8 bytes
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def config_of(cls, values):
    """A dataclass from a checkpoint's dict; a field that it does not have is a TypeError."""
    return cls(**values)


# ---- Weights of VAEs ------------------------------------------------------------
# Four families, told apart by their keys. Each -> VAEConfig, state dict, stats, disc:
# the latents' mean and variance [C] or None, the discriminator's weights or None.

def load_vae(name):
    """A VAE by name or path -> vae, stats, disc. A name: of VAES (random weights), sdvae, invae,
    vavae or hf:... (downloaded once). A path: a file or folder of any of the four families."""
    if name in VAES:
        return VAE(VAES[name]), None, None
    file = find_checkpoint(name)
    content = read_weights(file)
    weights = vae_weights(content, file)
    with reading(file, "a VAE with latent-diffusion's or diffusers' names"):
        if "encoder.conv_norm_out.weight" in weights:
            cfg, weights, stats, disc = from_diffusers(file, weights)
        elif "vae" in content:
            cfg, weights, stats, disc = from_joint(content)
        else:
            cfg, weights, stats, disc = from_latent_diffusion(file, weights)
        if any(key.endswith(".main.0.weight") for key in disc or ()):
            disc = unwrap(disc, ["main.0.weight"], file)
        vae = VAE(cfg)
        load_weights(vae, weights)
        for values in stats or ():
            if values.shape != (cfg.z_channels,) or not values.is_floating_point():
                raise ValueError(f"latents' statistics are {values.dtype} {list(values.shape)}, "
                                 f"expected {cfg.z_channels} floats")
    return vae, stats, disc


def vae_weights(content, file="this"):
    """A VAE's state dict, its average if there is one; of a file with several networks or alone."""
    weights = content.get("vae_ema") or content.get("vae") or content
    return unwrap(weights, ("encoder.conv_in.weight", "decoder.conv_in.weight"), file)


def from_joint(content):
    """A checkpoint with all networks: ours or REPA-E's."""
    weights = vae_weights(content)
    cfg = config_of(VAEConfig, content["vae_config"]) if "vae_config" in content else guess(weights)
    stats = None
    if any(key.endswith("bn.running_mean") for key in content.get("ema") or ()):
        ema = unwrap(content["ema"], ["bn.running_mean"], "")
        stats = ema["bn.running_mean"], ema["bn.running_var"]
    return cfg, weights, stats, content.get("discriminator")


def from_latent_diffusion(file, weights):
    """latent-diffusion's names; beside FILE.pt the authors' FILE-latents-stats.pt (scale = 1 / std,
    bias = mean, [1, C, 1, 1]) and FILE-discriminator-ckpt.pt, if they are there."""
    weights = {key: value for key, value in weights.items()
               if key.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))}
    stem, stats, disc = file.with_suffix(""), None, None
    stats_file, disc_file = Path(f"{stem}-latents-stats.pt"), Path(f"{stem}-discriminator-ckpt.pt")
    if stats_file.exists():
        saved = read_weights(stats_file)
        scale = saved["latents_scale"].flatten()
        stats = saved["latents_bias"].flatten(), scale.double().pow(-2).to(scale.dtype)
    if disc_file.exists():
        disc = read_weights(disc_file)
    return guess(weights), weights, stats, disc


def count_modules(weights, prefix):
    """How many numbered modules have names that begin so: "blocks." -> SiT's depth."""
    names = [key.removeprefix(prefix) for key in weights if key.startswith(prefix)]
    return len({name.split(".")[0] for name in names})


def guess(weights):
    """The VAEConfig of weights with latent-diffusion's names, by their shapes (32 groups)."""
    ch = len(weights["encoder.conv_in.weight"])
    stages = count_modules(weights, "encoder.down.")
    blocks = count_modules(weights, "encoder.down.0.block.")
    widths = [len(weights[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(stages)]
    return VAEConfig(
        weights["decoder.conv_in.weight"].shape[1], ch, tuple(width // ch for width in widths),
        blocks, attn_last=f"encoder.down.{stages - 1}.attn.0.q.weight" in weights,
        quant_conv="quant_conv.weight" in weights)


# Parts of AutoencoderKL's names: here, in diffusers. They are replaced from top to bottom; the last
# four are diffusers' until 2023, which are only read.
DIFFUSERS_NAMES = [line.split() for line in """
    down.           down_blocks.
    up.             up_blocks.
    mid.block_1.    mid_block.resnets.0.
    mid.block_2.    mid_block.resnets.1.
    mid.attn_1.     mid_block.attentions.0.
    .block.         .resnets.
    .attn.          .attentions.
    nin_shortcut    conv_shortcut
    norm_out        conv_norm_out
    downsample.     downsamplers.0.
    upsample.       upsamplers.0.
    .norm.          .group_norm.
    .q.             .to_q.
    .k.             .to_k.
    .v.             .to_v.
    .proj_out.      .to_out.0.
    .q.             .query.
    .k.             .key.
    .v.             .value.
    .proj_out.      .proj_attn.
    """.strip().splitlines()]


def rename(key, names, stages):
    """Replaces parts of a key; the decoder's stages are counted the other way in diffusers."""
    for old, new in names:
        key = key.replace(old, new)
    return re.sub(r"(decoder\.up\w*)\.(\d+)", lambda m: f"{m[1]}.{stages - 1 - int(m[2])}", key)


def from_diffusers(file, weights):
    """diffusers' AutoencoderKL; its config.json lies beside the weights, else stats are unknown."""
    stages = count_modules(weights, "encoder.down_blocks.")
    names = [(theirs, ours) for ours, theirs in DIFFUSERS_NAMES]
    weights = {rename(key, names, stages): value for key, value in weights.items()}
    for key, value in weights.items():
        if value.dim() == 2:                            # a Linear there, a 1x1 convolution here
            weights[key] = value[..., None, None]
    cfg, config_file = guess(weights), file.parent / "config.json"
    if not config_file.exists():
        return cfg, weights, None, None
    with reading(config_file, "diffusers' config"):
        config = json.loads(config_file.read_text())
    shift, factor = config.get("shift_factor") or 0.0, config.get("scaling_factor", 0.18215)
    mean = torch.tensor(config.get("latents_mean") or [shift] * cfg.z_channels)
    std = torch.tensor(config.get("latents_std") or [1 / factor] * cfg.z_channels,
                       dtype=torch.float64)
    stats = mean.flatten().float(), std.flatten().square().float()
    return replace(cfg, groups=config.get("norm_num_groups", 32)), weights, stats, None


def diffusers_config(cfg, stats):
    """The config.json of an AutoencoderKL, but for what is its default (32 groups, SiLU);
    zn = (z - latents_mean) / latents_std."""
    stages, attn = len(cfg.ch_mult), "Attn" if cfg.attn_last else ""
    config = {
        "_class_name": "AutoencoderKL", "latent_channels": cfg.z_channels,
        "block_out_channels": [cfg.ch * m for m in cfg.ch_mult],
        "layers_per_block": cfg.num_res_blocks,
        "down_block_types": ["DownEncoderBlock2D"] * (stages - 1) + [f"{attn}DownEncoderBlock2D"],
        "up_block_types": [f"{attn}UpDecoderBlock2D"] + ["UpDecoderBlock2D"] * (stages - 1),
        "sample_size": 32 * cfg.downsampling, "use_quant_conv": cfg.quant_conv,
        "use_post_quant_conv": cfg.quant_conv, "scaling_factor": 1.0}
    if stats:
        config |= {"latents_mean": stats[0].tolist(),
                   "latents_std": stats[1].double().sqrt().tolist()}
    return config


def export(checkpoint: str, *, to: str):
    """Writes a VAE into the folder `to`: as diffusers' AutoencoderKL, and as the authors' NAME.pt,
    NAME-latents-stats.pt and NAME-discriminator-ckpt.pt, where NAME is the folder's."""
    vae, stats, disc = load_vae(checkpoint)
    stats, disc = copy.deepcopy((stats, disc))          # they may be mapped from files written here
    cfg, weights = vae.cfg, vae.state_dict()
    if cfg.patch > 1 or cfg.sigma or cfg.groups != 32:
        raise ValueError(f"{checkpoint}: published formats have no patch, sigma or other groups")
    out = prepare_out(Path(to) / "config.json").parent.absolute()
    torch.save(weights, out / f"{out.name}.pt")
    if stats:
        mean, scale = stats[0], stats[1].double().rsqrt().float()
        saved = {"latents_scale": scale.view(1, -1, 1, 1), "latents_bias": mean.view(1, -1, 1, 1)}
        torch.save(saved, out / f"{out.name}-latents-stats.pt")
    if disc:
        torch.save(disc, out / f"{out.name}-discriminator-ckpt.pt")
    renamed = {}
    for key, value in weights.items():
        if "attn" in key and value.dim() == 4:          # a 1x1 convolution here, a Linear there
            value = value.flatten(1)
        renamed[rename(key, DIFFUSERS_NAMES, len(cfg.ch_mult))] = value
    write_safetensors(out / "diffusion_pytorch_model.safetensors", renamed)
    (out / "config.json").write_text(json.dumps(diffusers_config(cfg, stats), indent=2))
    without = "" if stats else ", without latents' statistics"
    print(f"{to}: a diffusers AutoencoderKL and {out.name}*.pt{without}")


# ---- Weights of SiTs ------------------------------------------------------------

def sit_weights(content, file="this"):
    """The average's state dict, of a file with several networks or of SiT alone."""
    keys = "x_embedder.proj.weight", "final_layer.linear.weight"
    return unwrap(content.get("ema") or content, keys, file)


def published_sit(content):
    """A checkpoint of REPA-E, REPA (sihyun-yu/REPA) or SiT (willisma/SiT) -> SiTConfig, state dict.

    The architecture is read off the shapes (heads have 64 channels, XL's 72); the file's args, if
    any, tell the rest. Files without the latents' statistics are SD-VAE's: zn = 0.18215 z.
    """
    weights, args = sit_weights(content), content.get("args")
    early, late = count_modules(weights, "blocks."), count_modules(weights, "decoder_blocks.")

    def renumber(m):        # older files of REPA number the blocks behind align_depth from 0
        return f"blocks.{early + int(m[1])}"
    weights = {re.sub(r"^decoder_blocks\.(\d+)", renumber, key): value
               for key, value in weights.items()}
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    dims = tuple(len(w) for key, w in weights.items()
                 if re.fullmatch(r"projectors\.\d+\.4\.weight", key))
    default_depth = 8 if width >= 1024 else 4
    if late:
        default_depth = early
    cfg = SiTConfig(
        depth=early + late, width=width, heads=16 if width == 1152 else width // 64, patch=patch,
        channels=channels, size=patch * math.isqrt(weights["pos_embed"].shape[1]),
        num_classes=len(weights["y_embedder.embedding_table.weight"]) - 1, teacher_dims=dims,
        align_depth=getattr(args, "encoder_depth", default_depth),
        projector_width=len(weights["projectors.0.0.weight"]) if dims else 2048,
        qk_norm="blocks.0.attn.q_norm.weight" in weights,
        path=getattr(args, "path_type", "linear").lower())
    prediction = getattr(args, "prediction", "v")
    if cfg.path not in ("linear", "cosine") or prediction not in ("v", "velocity"):
        raise ValueError(f"path {cfg.path}, prediction {prediction}: expected linear or cosine, v")
    if len(weights["final_layer.linear.weight"]) == 2 * patch * patch * channels:
        reverse_time(weights, patch, channels)
    if "bn.running_var" not in weights and channels == 4:
        bn = LatentNorm(channels)
        bn.load_stats(torch.zeros(channels), torch.full((channels,), 0.18215**-2 - bn.eps))
        weights |= {f"bn.{key}": value for key, value in bn.state_dict().items()}
    return cfg, weights


def reverse_time(weights, patch, channels):
    """willisma/SiT's weights, in place: there t = 1 is data, and v has the other sign.

    v(z, t) = -theirs(z, 1 - t). The first layer behind the cosines and sines takes 1 - t in:
    cos f(1 - t) = cos f cos ft + sin f sin ft, sin f(1 - t) = sin f cos ft - cos f sin ft. Of the
    2C channels of the output, C are the velocity. (DiT's files have the same names and shapes but
    predict noise: nothing tells them from SiT's.)
    """
    cos, sin = weights["t_embedder.mlp.0.weight"].double().chunk(2, 1)
    f = TimestepEmbedder.frequencies().double()
    turned = cos * f.cos() + sin * f.sin(), cos * f.sin() - sin * f.cos()
    weights["t_embedder.mlp.0.weight"] = torch.cat(turned, 1).float()
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = weights[key].unflatten(0, (patch * patch, 2 * channels))     # row, column, channel
        weights[key] = -rows[:, :channels].flatten(0, 1)


# ---- Processes and devices ------------------------------------------------------
# One process without torchrun; as many as it starts with it.

PATIENCE = timedelta(hours=1)       # for one that downloads, saves or previews (NCCL's own: 10 min)


def init_distributed(apple=False):
    """-> rank, world size, device. Joins torchrun's process group: NCCL on GPUs, gloo on CPUs.
    apple: one process may use Apple's GPU, which has no float64."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpu, device = torch.cuda.is_available(), torch.device("cpu")
    if gpu:
        count = torch.cuda.device_count()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > count:
            raise ValueError(f"more processes than GPUs: use --nproc_per_node={count}")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")      # TF32 where float32 is asked for
        if rank == 0 and not has_bfloat16(device):
            print("note: this GPU does not compute in bfloat16: float32 is used")
    elif apple and world_size == 1 and torch.backends.mps.is_available():
        device = torch.device("mps")
    if world_size > 1 and not dist.is_initialized():
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":   # one torchrun keeps its store over restarts
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = dist.PrefixStore(f"restart {restart}", store)
        nccl = gpu and dist.is_nccl_available()         # Windows has none
        dist.init_process_group("nccl" if nccl else "gloo", store=store, rank=rank,
                                timeout=PATIENCE, world_size=world_size,
                                device_id=device if nccl else None)
    return rank, world_size, device


@contextmanager
def rank0_first():
    """Runs its block on the first process of each machine, then on the others: downloads happen
    once."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    try:
        if dist.is_initialized() and not first:
            dist.barrier()
        yield
    finally:
        if dist.is_initialized() and first:
            dist.barrier()


def all_mean(x):
    """A tensor averaged over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def has_bfloat16(device):
    """Does the device compute in bfloat16? GPUs from Ampere on do."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def in_bfloat16(device, precision="auto"):
    """auto: on the GPUs that compute in it."""
    return precision == "bf16" or (precision == "auto" and has_bfloat16(device))


def autocast(device, precision="auto"):
    """bfloat16 or float32: auto, bf16 or float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(device, precision))


def can_compile(device):
    """Can torch.compile make code for this device? It takes a GPU since Volta, Triton, and what
    Triton builds with."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 0):
        return False
    if not torch.utils._triton.has_triton_package():
        return False
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return sys.platform == "win32" or any(map(shutil.which, compilers)) and header.exists()


STREAMS = ("weights", "epoch", "step", "statistics", "image", "label", "align")     # append only


def seed_of(seed, stream, i):
    """A 32-bit seed (CPU generators use no more): a number of (seed, stream), plus i, so that no
    two i share one."""
    start = np.random.SeedSequence([seed, STREAMS.index(stream)]).generate_state(1)[0]
    return (int(start) + i) % 2**32


def choose_label(protocol, seed, i, num_classes):
    """The label of image i: uniform ("random"), or each class equally often ("balanced")."""
    if protocol == "balanced":
        return i % num_classes
    return int(np.random.default_rng([seed, STREAMS.index("label"), i]).integers(num_classes))


def open_array(file, dtype, shape):
    """A memory-mapped .npy that many processes open and fill, once one has made it: zeros where
    nothing was written. The disk gives its blocks now: to write to a mapped file on a full disk is
    a bus error."""
    if not file.exists():
        np.lib.format.open_memmap(file, "w+", dtype, shape)
    with reading(file, f"{np.dtype(dtype)} {list(shape)}: remove it"):
        array = np.lib.format.open_memmap(file, "r+")
        if (array.shape, array.dtype) != (shape, dtype):
            raise ValueError(f"{array.dtype} {list(array.shape)}")
    about = file.stat()
    blocks = getattr(about, "st_blocks", math.inf)
    if hasattr(os, "posix_fallocate") and 512 * blocks < about.st_size:
        with open(file, "r+b") as handle:
            try:
                os.posix_fallocate(handle.fileno(), 0, about.st_size)
            except OSError as error:            # some network file systems can't
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise OSError(error.errno, error.strerror, str(file)) from None
    return array


PREFETCH = 4        # batches that each data worker has ready
POLL = 5            # seconds after which a wait for data looks for signals


def load_batches(data, order, batch, workers, device, timeout=300, stop=None):
    """Batches of a data set on the device, in this order (an iterable of lists of at most `batch`
    numbers). ValueError if none comes for `timeout` seconds (the first: 3 times that)."""
    workers = fitting_workers(workers, batch * 3 * data.resolution**2)
    mask = getattr(data, "unreadable", None)
    if mask is not None and workers:
        mask.share_memory_()                # workers mark in it what they can't read
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=order, collate_fn=collate, num_workers=workers,
        prefetch_factor=PREFETCH if workers else None, worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda", timeout=min(POLL, timeout) if workers else 0)
    iterator, patience = iter(loader), 3 * timeout
    while True:
        values = next_batch(iterator, patience, stop)
        patience = timeout
        if values is None:
            return
        yield [value.to(device, non_blocking=True) for value in values]


def next_batch(iterator, patience, stop):
    """The loader's next batch, None after the last. ValueError after `patience` seconds without
    one, or a minute after a signal (stop: PoliteStop or None)."""
    deadline = time.time() + patience
    while True:
        try:
            return next(iterator, None)
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            if "exited unexpectedly" in said or "killed by signal" in said:
                raise ValueError(f"a data worker has died ({said}): use fewer --workers, or more "
                                 "shared memory (docker run --shm-size=8g)") from None
            if "DataLoader timed out" not in said:
                raise
        if stop is not None and stop.asked and time.time() > stop.asked + 60:
            raise ValueError("stopped while it waited for data: the same command goes on from the "
                             "last state.pt")
        if time.time() >= deadline:
            raise ValueError(f"no batch for {patience} s: does the data's disk answer? --workers=0 "
                             "reads without workers, --loader_timeout=SECONDS waits longer")


def ignore_signals(_):
    """Data workers leave signals to the process that they work for; they end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def default_workers(data):
    """Data workers of commands that have no option for them: files are decoded ahead."""
    return min(8, os.cpu_count()) if isinstance(data, Folder) else 0


def fitting_workers(workers, batch_bytes):
    """As many of the workers as have room: they hand over their batches in /dev/shm, which has
    64 MB in a Docker container. Two are on the way beside those that are ready."""
    if not workers or not os.path.isdir("/dev/shm"):
        return workers
    each = (PREFETCH + 2) * batch_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = free_space("/dev/shm")
    if free >= workers * each:
        return workers
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"note: /dev/shm has {free / 1e6:.0f} MB free, {workers} data workers need "
              f"{workers * each / 1e6:.0f}: using {free // each} (docker run --shm-size=8g)")
    return free // each


def free_space(folder):
    """Bytes; without limit where the system can't tell."""
    try:
        return shutil.disk_usage(folder).free
    except (AttributeError, OSError):
        return math.inf


def name_unreadable(data, named, rank, device):
    """How many images no process could read, so that others take their place; new ones are named
    and added to the set `named`. ValueError if they are more than one and more than 1%."""
    if not hasattr(data, "unreadable"):
        return 0
    mask = data.unreadable.clone().to(device)           # uint8 [N]; workers write into the first
    if dist.is_initialized():
        dist.all_reduce(mask, dist.ReduceOp.MAX)
    found = set(mask.nonzero().flatten().tolist())
    if rank == 0 and found - named:
        files = data.files or [f"image {i}" for i in range(len(data))]
        for i in sorted(found - named):
            print(f"cannot read {files[i]}: the next image takes its place", flush=True)
    named |= found
    if len(found) > max(1, len(data) / 100):
        raise ValueError(f"{len(found):,} of {len(data):,} images cannot be read, more than 1%: "
                         "repair or remove them")
    return len(found)


def check_side(images, vae):
    """A VAE takes images of a multiple of its downsampling."""
    if images.resolution % vae.cfg.downsampling:
        raise ValueError(f"images of {images.resolution} px: give --resolution=, a multiple of "
                         f"{vae.cfg.downsampling}")


def prepare_out(path):
    """Makes the folder of a file that will be written. ValueError, before any work, if it can't be
    made or written. -> Path"""
    if str(path).endswith(("/", os.sep)) or os.path.isdir(path):
        raise ValueError(f"cannot write {path}: it is a folder, name a file")
    path = Path(path).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}): name another place") from None
    return path


# ---- Command lines --------------------------------------------------------------
# A dataclass or a function is the command line: parameters without a default are
# words, the others --key=value. A user's mistake ends in one line and exit code 2.

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def nearest(word, known):
    close = get_close_matches(word, known, 1, 0.5)
    return f": did you mean {close[0]}?" if close else f": expected one of {', '.join(known)}"


def one_of(choices):
    """A type for argparse: choices[text], or an error that names the nearest."""
    def convert(text):
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r}{nearest(text, choices)}")
        return choices[text]
    return convert


def at_home(text):
    """~/runs -> /home/me/runs; other texts stay."""
    return os.path.expanduser(text)


BOOLEANS = {"0": False, "1": True, "False": False, "True": True}


def parse(target, argv, presets=None):
    """Calls a dataclass or a function with the command line's words. --preset=a,b applies
    presets[a], then presets[b]; --key=value stands above both. --help prints the source with its
    comments."""
    if "--help" in argv or "-h" in argv:
        print(inspect.getsource(target), f"presets: {', '.join(presets or ['none'])}", sep="\n")
        raise SystemExit(0)
    parser = Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False)
    for name, option in inspect.signature(target).parameters.items():
        kind, required = option.annotation, option.default is option.empty
        choices = BOOLEANS if kind is bool else {word: word for word in get_args(kind)}
        convert = one_of(choices) if choices else at_home if kind is str else kind
        if required and option.kind is not option.KEYWORD_ONLY:
            parser.add_argument(name, type=convert)
        else:
            parser.add_argument(f"--{name}", type=convert, required=required)
    if presets:
        parser.add_argument("--preset")
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        key = unknown[0].partition("=")[0]
        raise ValueError(f"unknown option {key}{nearest(key, parser._option_string_actions)}")
    values, chosen = vars(values), {}
    for name, lowest in (("batch", 1), ("count", 0), ("resolution", 0), ("seed", 0)):
        if inspect.isfunction(target) and values.get(name, lowest) < lowest:
            raise ValueError(f"--{name}={values[name]}: expected at least {lowest}")
    for name in filter(None, values.pop("preset", "").split(",")):
        if name not in presets:
            raise ValueError(f"unknown preset {name!r}{nearest(name, presets)}")
        chosen |= presets[name]
    return target(**chosen | values)


def first_to_fail():
    """One message for all processes: True on the first one that asks (without a group: on rank
    0)."""
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except (RuntimeError, ValueError):      # the process that holds the store is gone, or no group
        return dist.is_initialized() or os.environ.get("RANK", "0") == "0"


def message_of(error):
    """One line for the user, or None if the error is the program's fault."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, (ValueError, OSError)):
        return text.splitlines()[-1].removeprefix("ValueError: ")   # of a data worker's traceback
    if isinstance(error, torch.OutOfMemoryError):
        return f"{text.splitlines()[-1]}: lower --micro_batch or --batch"
    if isinstance(error, dist.DistError) or "/gloo/" in text:
        return (f"a collective failed ({text.splitlines()[0]}): if a process is gone, the same "
                "command goes on")
    return None


def friendly(main):
    """Runs main(argv); a user's mistake ends in one line and exit code 2 (TRACEBACK=1 shows
    all)."""
    def run():
        code = 0
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError):                      # (a notebook's)
                stream.reconfigure(errors="backslashreplace")   # file names need not be UTF-8
        try:
            main(sys.argv[1:])
        except Exception as error:
            message = message_of(error)
            code = 2 if message else 1
            if message is None or os.environ.get("TRACEBACK"):
                traceback.print_exc()
            elif first_to_fail():
                rank = os.environ.get("RANK", "0")
                where = f" (process {rank})" if rank != "0" else ""
                print(f"error{where}: {message}", file=sys.stderr)
            for worker in torch.multiprocessing.active_children():
                worker.kill()                   # some may hang, and signals don't end them
            time.sleep(dist.is_initialized())   # torchrun names the first that it finds gone
        sys.stdout.flush()
        if dist.is_initialized():
            os._exit(code)                      # other processes may wait in a collective
        if code:
            sys.exit(code)
    return run


# ---- The command ----------------------------------------------------------------

@dataclass
class Options:
    path: str                   # a checkpoint, or a run's folder (its newest)
    count: int = 64             # how many images
    out: str = ""               # .png (a grid) or .npz (ADM's layout); default by count
    solver: Literal[*SOLVERS] = "sde"   # sde (Euler-Maruyama, the paper's), euler, heun, ab2
    steps: int = 250            # network calls (heun: nearly twice as many)
    guidance: float = 1.0       # classifier-free guidance scale; 1 is off, 0 unconditional
    low: float = 0.0            # guidance only where low <= t <= high (t = 1 is noise)
    high: float = 1.0
    labels: Literal["random", "balanced"] = "random"    # balanced: each class equally often
    classes: str = ""           # instead: names or numbers, repeated in turn (star,heart)
    seed: int = 0
    batch: int = 64             # images at a time on each process
    vae: str = ""               # for checkpoints that hold none (REPA's, SiT's)
    precision: Literal["auto", "bf16", "float32"] = "auto"  # auto: bf16 on GPUs that have it


def check(opt):
    """The first mistake in the options, as a ValueError."""
    if min(opt.count, opt.batch) < 1 or opt.steps < 2 or opt.seed < 0:
        raise ValueError("--count and --batch must be at least 1, --steps 2, --seed 0")
    if not math.isfinite(opt.guidance) or not opt.low <= opt.high:
        raise ValueError(f"--guidance={opt.guidance} --low={opt.low} --high={opt.high}: expected "
                         "numbers, low <= high")
    if opt.out and not opt.out.endswith((".png", ".npz")):
        raise ValueError(f"--out={opt.out}: expected .png (a grid) or .npz (ADM's layout)")


def parse_classes(text, names):
    """"star,7" -> label numbers; names are the data set's."""
    numbers = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    for word in text.split(","):
        if word not in numbers:
            raise ValueError(f"unknown class {word!r}{nearest(word, names)} (or a number below "
                             f"{len(names)})")
    return [numbers[word] for word in text.split(",")]


def save_grid(file, images, columns=8):
    """uint8 [N, 3, R, R] -> a PNG, row by row; small images are enlarged to be looked at."""
    scale = max(1, 640 // (images.shape[-1] * columns))
    images = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    save_image(images / 255, file, nrow=columns, padding=0)


def sample(opt):
    """Every process writes its rows of one memory-mapped file: 50,000 images are never in
    memory."""
    rank, world_size, device = init_distributed(apple=True)
    model = load_pipeline(opt.path, device, opt.vae)
    out = prepare_out(opt.out or ("grid.png" if opt.count <= 100 else "samples.npz"))
    model.precision = opt.precision
    model.prepare(opt.count)
    numbers, classes = range(opt.count), model.classes
    labels = np.array([choose_label(opt.labels, opt.seed, i, len(classes)) for i in numbers])
    if opt.classes:
        labels = np.resize(parse_classes(opt.classes, classes), opt.count)      # repeated in turn
    side = model.sit.cfg.size * model.vae.cfg.downsampling
    raw, shape = Path(f"{out}.rows.npy"), (opt.count, side, side, 3)
    if rank == 0:
        raw.unlink(missing_ok=True)                     # of a call that was interrupted
        open_array(raw, np.uint8, shape)
    if world_size > 1:
        dist.barrier()
    rows, mine = open_array(raw, np.uint8, shape), numbers[rank::world_size]
    for i in tqdm(range(0, len(mine), opt.batch), "sampling", disable=rank > 0):
        indices = mine[i : i + opt.batch]
        images = model.batch(indices, labels[indices], opt.steps, opt.solver, opt.guidance,
                             opt.low, opt.high, opt.seed)
        rows[indices] = images.permute(0, 2, 3, 1).cpu().numpy()
    rows.flush()
    if world_size > 1:
        dist.barrier()
    if rank > 0:
        return
    if out.suffix == ".png":
        images = torch.tensor(rows).permute(0, 3, 1, 2)
        save_grid(out, images, math.ceil(math.sqrt(opt.count)))
    else:
        np.savez(f"{out}.tmp.npz", arr_0=rows, arr_1=labels, classes=classes)
        os.replace(f"{out}.tmp.npz", out)
    del rows                                            # Windows removes no file that is mapped
    raw.unlink()
    print(f"{out}: {opt.count} images, step {model.step}, {opt.solver} {opt.steps} steps, guidance "
          f"{opt.guidance} in [{opt.low}, {opt.high}], seed {opt.seed}")


@friendly
def main(argv):
    if argv[:1] == ["export"]:
        parse(export, argv[1:])
    else:
        opt = parse(Options, argv)
        check(opt)
        sample(opt)


if __name__ == "__main__":
    main()
