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
import sys
import sysconfig
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
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

from sit import LatentNorm, SiT, SiTConfig, TimestepEmbedder, score_from_velocity
from vae import VAE, VAES, VAEConfig, load_pt, load_weights, reading, to_uint8


# ---- Solvers --------------------------------------------------------------------
# z at t = 1 -> z at t = 0, float64, along velocity(z, t: float) -> dz/dt. `steps`
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

    v = v_null + scale (v_y - v_null) where low <= t <= high and scale > 1; else v_y, in one network
    call. The SDE's drift is affine in v, so guiding the velocity guides the drift.
    """
    def velocity(z, t):
        z = z.float()
        time = z.new_full((len(z),), t)
        if scale <= 1 or not low <= t <= high:
            return net(z, time, y)[0].double()
        null = torch.full_like(y, net.cfg.num_classes)
        both, _ = net(torch.cat([z, z]), torch.cat([time, time]), torch.cat([y, null]))
        v, v_null = both.double().chunk(2)
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

    @torch.no_grad()
    def batch(self, indices, labels, steps, solver, guidance, low, high, seed):
        """Images number `indices` of the seed, of these labels -> uint8 [B, 3, R, R]."""
        cfg, device = self.sit.cfg, self.sit.pos_embed.device
        generators = generators_of(seed, "image", indices, device)
        y = torch.as_tensor(labels, device=device)

        def noise():
            shape = cfg.channels, cfg.size, cfg.size
            rows = [torch.randn(shape, generator=g, device=device) for g in generators]
            return torch.stack(rows).double()                   # [B, C, H, W]
        with autocast(device):
            velocity = guided(self.sit, y, guidance, low, high)
            zn = SOLVERS[solver](velocity, noise(), steps, noise, cfg.path)
        z = self.sit.bn.inverse(zn).float()
        return torch.cat([to_uint8(self.vae.decode(part)) for part in z.split(DECODED)])

    def prepare(self, count):
        """Makes `count` images in all faster on a GPU: SiT's weights in bfloat16, and from a
        thousand images on compiled blocks (TORCH_COMPILE_DISABLE=1: never). -> itself"""
        device = self.sit.pos_embed.device
        if has_bfloat16(device):
            round_weights(self.sit)
        if count >= 1000 and can_compile(device):
            for block in self.sit.blocks:
                block.compile(dynamic=False)
        return self

    def __call__(self, labels, steps=250, solver="sde", guidance=1.0, low=0.0, high=1.0, seed=0,
                 batch=64, first=0):
        """Labels (numbers) -> uint8 [len(labels), 3, R, R] on the CPU; image i is number first + i
        of the seed."""
        images = []
        for i in range(0, len(labels), batch):
            part = labels[i : i + batch]
            numbers = range(first + i, first + i + len(part))
            images.append(self.batch(numbers, part, steps, solver, guidance, low, high, seed).cpu())
        return torch.cat(images)


def generators_of(seed, stream, indices, device):
    """A generator for each image, by its number alone."""
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
        vae_path = vae or str(path)
    content = read_weights(path)
    if "vae_config" in content and "sit_config" not in content:
        raise ValueError(f"{path} holds a VAE without a SiT (--method=vae): train one with "
                         f"--vae={path}")
    if vae in VAES:
        raise ValueError(f"--vae={vae} is untrained: name a trained one")
    if not vae and "vae" not in content:
        raise ValueError(f"{path} holds no VAE: name one with --vae=..., for REPA and SiT "
                         "hf:stabilityai/sd-vae-ft-mse")
    with reading(path, "a checkpoint of train.py, REPA-E, REPA or SiT"):
        if "sit_config" in content:
            cfg, weights = config_of(SiTConfig, content["sit_config"]), content["ema"]
        else:
            cfg, weights = published_sit(content)
        sit = SiT(cfg)
        load_weights(sit, weights)
    sit.projectors = torch.nn.ModuleList()              # sampling needs no tokens
    with rank0_first():
        own, _, _ = load_vae(vae_path)
    if own.cfg.z_channels != cfg.channels:
        raise ValueError(f"--vae={vae} has latents of {own.cfg.z_channels} channels, the SiT of "
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
    """sdvae, hf:OWNER/NAME[/FOLDER] (an AutoencoderKL) or hf:OWNER/NAME/FILE -> a repository and
    its files, the weights last; None for other names."""
    if name in PUBLISHED:
        stem = f"{name}-{PUBLISHED[name]}"
        return f"REPA-E/{name}", [f"{stem}-latents-stats.pt", f"{stem}-discriminator-ckpt.pt",
                                  f"{stem}.pt"]
    if not re.fullmatch(r"hf:[^/]+/[^/]+(/.+)?", name):
        return None
    owner, repository, *folder = name.removeprefix("hf:").split("/")
    files = ["config.json", "diffusion_pytorch_model.safetensors"]
    if folder and "." in folder[-1]:
        files = [folder.pop()]
    return f"{owner}/{repository}", ["/".join([*folder, file]) for file in files]


def download(repository, files):
    """-> the local path of the last file. Each is downloaded once, to torch.hub's cache."""
    folder = Path(torch.hub.get_dir()) / "checkpoints" / repository.replace("/", "--")
    for file in files:
        target = folder / file
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        url = f"{HUB}/{repository}/resolve/main/{file}"
        try:
            torch.hub.download_url_to_file(url, str(target))
        except OSError as error:
            raise ValueError(f"cannot download {url} ({error}): put it at {target}, or name a "
                             "local file") from None
    return target


def find_checkpoint(name):
    """-> the path of the weights: a file; in a folder the newest snapshot (a run's, also the
    authors'), else its state.pt, or diffusers' weights; or a known name, which is downloaded."""
    path = Path(name)
    if path.is_dir():
        snapshots = [file for file in [*path.glob("*.pt"), *path.glob("checkpoints/*.pt")]
                     if re.fullmatch(r"(step_)?\d{7,}", file.stem)]
        if snapshots:
            return max(snapshots, key=lambda file: int(file.stem.removeprefix("step_")))
        for other in ("state.pt", "state.prev.pt", "diffusion_pytorch_model.safetensors",
                      "diffusion_pytorch_model.bin"):
            if (path / other).exists():
                return path / other
        raise ValueError(f"{path} holds no checkpoint (step_0000000.pt or state.pt): name a run's "
                         "folder or a file")
    if not path.exists() and (known := hub_files(str(name))):
        return download(*known)
    return path


def read_weights(file):
    """A .pt or .safetensors file -> its content: tensors, numbers, dicts."""
    with reading(file, "a .pt or .safetensors file of weights"):
        content = read_safetensors(file) if file.suffix == ".safetensors" else load_pt(file)
        return dict(content)


SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
               "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}


def read_safetensors(file):
    """8 bytes (the length of the header), the header in JSON, raw bytes -> dict of tensors."""
    raw = bytearray(Path(file).read_bytes())
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
    header, end = {}, 0
    for name, value in tensors.items():
        first, end = end, end + 4 * value.numel()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                     # the data begin at a multiple of 8 bytes
    with open(file, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            handle.write(value.float().contiguous().numpy().tobytes())


def config_of(cls, values):
    """A dataclass from a checkpoint's dict: lists back to tuples, unknown keys refused."""
    if unknown := values.keys() - {f.name for f in fields(cls)}:
        raise ValueError(f"{cls.__name__} has no field {sorted(unknown)}: written by a newer "
                         "version?")
    return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


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
    with reading(file, "a VAE with latent-diffusion's or diffusers' names"):
        if "vae" in content:
            cfg, weights, stats, disc = from_joint(content)
        elif "encoder.conv_norm_out.weight" in content:
            cfg, weights, stats, disc = from_diffusers(file, content)
        else:
            cfg, weights, stats, disc = from_latent_diffusion(file, content)
        vae = VAE(cfg)
        load_weights(vae, weights)
        for values in stats or ():
            if values.shape != (cfg.z_channels,) or not values.is_floating_point():
                raise ValueError(f"its latents' statistics are {values.dtype} "
                                 f"{list(values.shape)}, expected {cfg.z_channels} floats")
    return vae, stats, disc


def from_joint(content):
    """A checkpoint with all networks: ours or REPA-E's. The VAE's average, if there is one."""
    weights = content.get("vae_ema") or content["vae"]
    cfg = config_of(VAEConfig, content["vae_config"]) if "vae_config" in content else guess(weights)
    ema, stats = content.get("ema") or {}, None
    if "bn.running_mean" in ema:
        stats = ema["bn.running_mean"], ema["bn.running_var"]
    return cfg, weights, stats, content.get("discriminator")


def from_latent_diffusion(file, content):
    """latent-diffusion's names; beside FILE.pt the authors' FILE-latents-stats.pt (scale = 1 / std,
    bias = mean, [1, C, 1, 1]) and FILE-discriminator-ckpt.pt, if they are there."""
    weights = content.get("state_dict", content)
    weights = {key: value for key, value in weights.items()
               if not key.startswith(("loss.", "model_ema."))}
    stem, stats, disc = str(file).removesuffix(".pt"), None, None
    if os.path.exists(f"{stem}-latents-stats.pt"):
        saved = read_weights(Path(f"{stem}-latents-stats.pt"))
        mean, scale = saved["latents_bias"].flatten(), saved["latents_scale"].flatten()
        if not scale.is_floating_point():
            raise ValueError(f"latents_scale is {scale.dtype}, expected floats")
        stats = mean, scale.double().pow(-2).float()
    if os.path.exists(f"{stem}-discriminator-ckpt.pt"):
        disc = read_weights(Path(f"{stem}-discriminator-ckpt.pt"))
    return guess(weights), weights, stats, disc


def guess(weights):
    """The VAEConfig of weights with latent-diffusion's names, by their shapes (32 groups)."""
    def count(pattern):
        return sum(bool(re.fullmatch(pattern, key)) for key in weights)
    ch = len(weights["encoder.conv_in.weight"])
    stages = count(r"encoder\.down\.\d+\.block\.0\.conv1\.weight")
    blocks = count(r"encoder\.down\.0\.block\.\d+\.conv1\.weight")
    widths = [len(weights[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(stages)]
    return VAEConfig(
        weights["decoder.conv_in.weight"].shape[1], ch, tuple(width // ch for width in widths),
        blocks, attn_last=f"encoder.down.{stages - 1}.attn.0.q.weight" in weights,
        quant_conv="quant_conv.weight" in weights)


# names of AutoencoderKL here, in diffusers
DIFFUSERS_NAMES = (
    ("down.", "down_blocks."), ("up.", "up_blocks."), ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."), ("mid.attn_1.", "mid_block.attentions.0."),
    (".block.", ".resnets."), (".attn.", ".attentions."), ("nin_shortcut", "conv_shortcut"),
    ("norm_out", "conv_norm_out"), ("downsample.", "downsamplers.0."),
    ("upsample.", "upsamplers.0."), (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."),
    (".proj_out.", ".to_out.0."))
OLD_NAMES = ((".q.", ".query."), (".k.", ".key."), (".v.", ".value."),
             (".proj_out.", ".proj_attn."))             # until 2023


def count_down(key, stages):
    """The decoder's stages are counted the other way in diffusers."""
    return re.sub(r"(decoder\.up\w*)\.(\d+)", lambda m: f"{m[1]}.{stages - 1 - int(m[2])}", key)


def to_diffusers_name(key, stages):
    for ours, theirs in DIFFUSERS_NAMES:
        key = key.replace(ours, theirs)
    return re.sub(r"(attentions\.\d+)\.norm", r"\1.group_norm", count_down(key, stages))


def from_diffusers_name(key, stages):
    for ours, theirs in DIFFUSERS_NAMES + OLD_NAMES:
        key = key.replace(theirs, ours)
    return count_down(key, stages).replace("group_norm", "norm")


def from_diffusers(file, content):
    """diffusers' AutoencoderKL; its config.json lies beside the weights, else stats are unknown."""
    found = [re.match(r"encoder\.down_blocks\.(\d+)", key) for key in content]
    stages = 1 + max(int(m[1]) for m in found if m)
    weights = {from_diffusers_name(key, stages): value.float() for key, value in content.items()}
    for key, value in weights.items():
        if value.dim() == 2:                            # a Linear there, a 1x1 convolution here
            weights[key] = value[..., None, None]
    cfg, config_file = guess(weights), file.parent / "config.json"
    if not config_file.exists():
        return cfg, weights, None, None
    with reading(config_file, "diffusers' config"):
        config = json.loads(config_file.read_text())
    mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * cfg.z_channels
    std = config.get("latents_std") or [1 / config.get("scaling_factor", 0.18215)] * cfg.z_channels
    std = torch.tensor(std, dtype=torch.float64).flatten()
    stats = torch.tensor(mean).flatten().float(), std.square().float()
    return replace(cfg, groups=config.get("norm_num_groups", 32)), weights, stats, None


def diffusers_config(cfg, stats):
    """The config.json of an AutoencoderKL; zn = (z - latents_mean) / latents_std."""
    stages, attn = len(cfg.ch_mult), "Attn" if cfg.attn_last else ""
    config = {
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3,
        "latent_channels": cfg.z_channels, "block_out_channels": [cfg.ch * m for m in cfg.ch_mult],
        "layers_per_block": cfg.num_res_blocks, "norm_num_groups": cfg.groups, "act_fn": "silu",
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
    cfg, weights, out = vae.cfg, vae.state_dict(), Path(to).absolute()
    if cfg.patch > 1 or cfg.sigma or cfg.groups != 32:
        raise ValueError(f"{checkpoint}: published formats have no VAE with patch, sigma or "
                         f"{cfg.groups} groups (tiny)")
    out.mkdir(parents=True, exist_ok=True)
    torch.save(weights, out / f"{out.name}.pt")
    if stats:
        mean, scale = stats[0], stats[1].double().rsqrt().float()
        saved = {"latents_scale": scale.view(1, -1, 1, 1), "latents_bias": mean.view(1, -1, 1, 1)}
        torch.save(saved, out / f"{out.name}-latents-stats.pt")
    if disc:
        torch.save(disc, out / f"{out.name}-discriminator-ckpt.pt")
    linear = re.compile(r"attn.*\.(q|k|v|proj_out)\.weight")    # 1x1 convolutions here
    renamed = {}
    for key, value in weights.items():
        value = value.flatten(1) if linear.search(key) else value
        renamed[to_diffusers_name(key, len(cfg.ch_mult))] = value
    write_safetensors(out / "diffusion_pytorch_model.safetensors", renamed)
    (out / "config.json").write_text(json.dumps(diffusers_config(cfg, stats), indent=2))
    without = "" if stats else ", without latents' statistics"
    print(f"{to}: a diffusers AutoencoderKL and {out.name}*.pt{without}")


# ---- Weights of SiTs ------------------------------------------------------------

def published_sit(content):
    """A checkpoint of REPA-E, REPA (sihyun-yu/REPA) or SiT (willisma/SiT) -> SiTConfig, state dict.

    The architecture is read off the shapes (heads have 64 channels, XL's 72); the file's args, if
    any, tell the rest. Files without the latents' statistics are SD-VAE's: zn = 0.18215 z.
    """
    weights, args = content.get("ema", content), content.get("args")
    early = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    late = len({key.split(".")[1] for key in weights if key.startswith("decoder_blocks.")})
    if late:        # older files of REPA number the blocks behind align_depth from 0
        def renumber(m):
            return f"blocks.{early + int(m[1])}"
        weights = {re.sub(r"^decoder_blocks\.(\d+)", renumber, key): value
                   for key, value in weights.items()}
    weights = dict(weights)
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    dims = tuple(len(w) for key, w in weights.items()
                 if re.fullmatch(r"projectors\.\d+\.4\.weight", key))
    default_depth = early if late else 8 if width >= 1024 else 4
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


def init_distributed():
    """-> rank, world size, device. Joins torchrun's process group: NCCL on GPUs, gloo on CPUs."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpu, device = torch.cuda.is_available(), torch.device("cpu")
    if gpu:
        count = torch.cuda.device_count()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > count:
            raise ValueError(f"more processes than GPUs: use --nproc_per_node={count}")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")      # TF32 where float32 is asked for
    elif torch.backends.mps.is_available() and rank == 0:
        print("note: Apple's GPU has no float64, which latent statistics and solvers need: running "
              "on the CPU")
    if world_size > 1 and not dist.is_initialized():
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":   # one torchrun keeps its store over restarts
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = dist.PrefixStore(f"restart {restart}", store)
        dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, timeout=PATIENCE,
                                world_size=world_size, device_id=device if gpu else None)
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


def autocast(device):
    """bfloat16 where the GPU computes in it, float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


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
    """A memory-mapped .npy that many processes open and fill: zeros where nothing was written. The
    disk gives its blocks now: to write to a mapped file on a full disk is a bus error."""
    file.touch()
    if os.path.getsize(file) == 0:
        with open(file, "r+b") as handle:       # the same bytes, if several machines come at once
            about = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(handle, about)
            handle.truncate(handle.tell() + math.prod(shape) * np.dtype(dtype).itemsize)
    with reading(file, "an array that can be remade: remove it"):
        array = np.lib.format.open_memmap(file, "r+")
    if (array.shape, array.dtype) != (shape, dtype):
        expected = f"{np.dtype(dtype)} {list(shape)}"
        raise ValueError(f"{file} holds {array.dtype} {list(array.shape)}, expected {expected}: "
                         "remove it")
    size, held = os.path.getsize(file), getattr(os.stat(file), "st_blocks", 2**60) * 512
    if held < size and hasattr(os, "posix_fallocate"):
        with open(file, "r+b") as handle:
            try:
                os.posix_fallocate(handle.fileno(), 0, size)
            except OSError as error:            # some network file systems can't
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise OSError(error.errno, error.strerror, str(file)) from None
    return array


# ---- Command lines --------------------------------------------------------------
# A dataclass or a function is the command line: parameters without a default are
# words, the others --key=value. A user's mistake ends in one line and exit code 2.

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def boolean(text):
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r}, expected 0 or 1")
    return words[text.lower()]


def nearest(word, known):
    close = get_close_matches(word, known, 1, 0.5)
    return f": did you mean {close[0]}?" if close else f": expected one of {', '.join(known)}"


def one_of(choices):
    def convert(text):
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r}{nearest(text, choices)}")
        return text
    return convert


def parse(target, argv, presets=None):
    """Calls a dataclass or a function with the command line's words. --preset=a,b applies
    presets[a], then presets[b]; --key=value stands above both. --help prints the source with its
    comments."""
    if "--help" in argv or "-h" in argv:
        print(inspect.getsource(target), f"presets: {', '.join(presets or ['none'])}", sep="\n")
        raise SystemExit(0)
    parser = Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False)
    for name, option in inspect.signature(target).parameters.items():
        kind = option.annotation
        convert = one_of(get_args(kind)) if get_args(kind) else boolean if kind is bool else kind
        if option.default is option.empty and option.kind is not option.KEYWORD_ONLY:
            parser.add_argument(name, type=convert)
        else:
            parser.add_argument(f"--{name}", type=convert, required=option.default is option.empty)
    if presets is not None:
        parser.add_argument("--preset")
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        key = unknown[0].partition("=")[0]
        raise ValueError(f"unknown option {key}{nearest(key, parser._option_string_actions)}")
    values, chosen = vars(values), {}
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
    if dist.is_initialized() and (isinstance(error, dist.DistError) or "/gloo/" in text):
        return (f"a collective failed ({text.splitlines()[0]}): if a process is gone, the same "
                "command goes on")
    if isinstance(error, torch.OutOfMemoryError):
        return f"{text.splitlines()[-1]}: lower --micro_batch or --batch"
    if isinstance(error, (ValueError, OSError)):
        return text.splitlines()[-1].removeprefix("ValueError: ")   # of a data worker's traceback
    return None


def friendly(main):
    """Runs main(argv); a user's mistake ends in one line and exit code 2 (TRACEBACK=1 shows
    all)."""
    def run():
        code = 0
        try:
            main(sys.argv[1:])
        except Exception as error:
            message = message_of(error)
            expected = isinstance(error, (ValueError, OSError, torch.OutOfMemoryError))
            code = 2 if expected else 1
            if message is None or os.environ.get("TRACEBACK"):
                traceback.print_exc()
            elif first_to_fail():
                rank = os.environ.get("RANK", "0")
                where = f" (process {rank})" if rank != "0" else ""
                print(f"error{where}: {message}", file=sys.stderr)
            traceback.clear_frames(error.__traceback__)     # data workers end with their loader
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
    guidance: float = 1.0       # classifier-free guidance scale; 1 is off
    low: float = 0.0            # guidance only where low <= t <= high (t = 1 is noise)
    high: float = 1.0
    labels: Literal["random", "balanced"] = "random"    # balanced: each class equally often
    classes: str = ""           # instead: names or numbers, repeated in turn (star,heart)
    seed: int = 0
    batch: int = 64             # images at a time on each process
    vae: str = ""               # for checkpoints that hold none (REPA's, SiT's)


def check(opt):
    """The first mistake in the options, as a ValueError."""
    if min(opt.count, opt.batch) < 1 or opt.steps < 2 or opt.seed < 0:
        raise ValueError("--count and --batch must be at least 1, --steps at least 2, --seed at "
                         "least 0")
    if not 0 <= opt.guidance < math.inf or not opt.low <= opt.high:
        raise ValueError(f"--guidance={opt.guidance} --low={opt.low} --high={opt.high}: expected "
                         "numbers, low <= high")
    if opt.out and not opt.out.endswith((".png", ".npz")):
        raise ValueError(f"--out={opt.out}: expected a name that ends in .png (a grid) or .npz "
                         "(ADM's layout)")


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
    rank, world_size, device = init_distributed()
    model = load_pipeline(opt.path, device, opt.vae).prepare(opt.count)
    out = Path(opt.out or ("grid.png" if opt.count <= 100 else "samples.npz"))
    labels = [choose_label(opt.labels, opt.seed, i, len(model.classes)) for i in range(opt.count)]
    if opt.classes:
        chosen = parse_classes(opt.classes, model.classes)
        labels = [chosen[i % len(chosen)] for i in range(opt.count)]
    side = model.sit.cfg.size * model.vae.cfg.downsampling
    raw = Path(f"{out}.rows.npy")
    if rank == 0:
        raw.unlink(missing_ok=True)                     # of a call that was interrupted
    if world_size > 1:
        dist.barrier()
    with rank0_first():
        rows = open_array(raw, np.uint8, (opt.count, side, side, 3))
    starts = range(rank, opt.count, world_size * opt.batch)
    for i in tqdm(starts, "sampling", disable=rank > 0):
        indices = list(range(i, min(i + world_size * opt.batch, opt.count), world_size))
        images = model.batch(indices, [labels[j] for j in indices], opt.steps, opt.solver,
                             opt.guidance, opt.low, opt.high, opt.seed)
        rows[indices] = images.permute(0, 2, 3, 1).cpu().numpy()
    rows.flush()
    if world_size > 1:
        dist.barrier()
    if rank > 0:
        return
    if out.suffix == ".png":
        images = torch.from_numpy(rows).permute(0, 3, 1, 2)
        save_grid(out, images, math.ceil(math.sqrt(opt.count)))
    else:
        np.savez(f"{out}.tmp.npz", arr_0=rows, arr_1=labels, classes=model.classes)
        os.replace(f"{out}.tmp.npz", out)
    os.remove(raw)
    print(f"{out}: {opt.count} images, step {model.step}, {opt.solver} {opt.steps} steps, guidance "
          f"{opt.guidance} in [{opt.low}, {opt.high}], labels {opt.classes or opt.labels}, seed "
          f"{opt.seed}")


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
