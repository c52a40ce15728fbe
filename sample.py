"""Images out of a checkpoint: solvers, guidance, and the few helpers that every script which uses a model needs.

    python sample.py runs/tiny --count=64 --guidance=2             # grid.png; the path is all it needs
    python sample.py runs/tiny --classes=star,heart --solver=ab2 --steps=50
    torchrun --nproc_per_node=8 sample.py runs/repa-e --count=50000 --out=samples.npz  # ADM's layout, for FID

    from sample import load_model                                  # the same from Python
    images = load_model("runs/tiny")([5, 7], steps=50, guidance=2.0)                   # uint8 [2, 3, R, R]

Noise eps at t = 1 flows to latents at t = 0 along dz/dt = v (ODE: euler, heun, ab2), or with noise injected on the way
(sde: Euler-Maruyama, the paper's). The noise and the label of image i depend on (seed, i) alone.
"""
import inspect
import math
import os
import shutil
import sys
import sysconfig
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.utils._triton
from tqdm import tqdm

from sit import SiT, SiTConfig, published_sit, score_from_velocity
from vae import (VAE, VAES, config_from_dict, find_checkpoint, grid, load_strict, load_vae, one_line, read_weights,
                 reading, save_png, shared_array, to_uint8, write_npz)

# ---------------------------------------------- Processes. One process without torchrun; as many as it starts with it.

PATIENCE = timedelta(hours=1)       # others wait so long while one downloads, saves or previews (NCCL's own: 10 min)

def start():
    """-> rank, world size, device. Joins torchrun's process group if there is one (NCCL on GPUs, gloo on CPUs)."""
    rank, world, local = (int(os.environ.get(key, n)) for key, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
            raise ValueError(f"more processes than GPUs: use --nproc_per_node={torch.cuda.device_count()} or fewer")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")                  # TF32 where float32 is asked for
    elif torch.backends.mps.is_available() and rank == 0:
        print("note: Apple's GPU has no float64, which latent statistics and solvers need: running on the CPU")
    if world > 1 and not dist.is_initialized():
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":       # one torchrun keeps its store, and all in it, over restarts
            store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=world,
                                timeout=PATIENCE, device_id=device if gpu else None)
    return rank, world, device

@contextmanager
def rank0_first():
    """Runs its block on the first process of each machine, then on the others: downloads happen once."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    try:
        if dist.is_initialized() and not first:
            dist.barrier()
        yield
    finally:
        if dist.is_initialized() and first:
            dist.barrier()

def all_mean(x):
    """A tensor averaged over all processes (in place)."""
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
    """Can torch.compile make code for this device? It takes a GPU since Volta, Triton, and what Triton builds with."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 0):
        return False
    if not torch.utils._triton.has_triton_package():
        return False
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return sys.platform == "win32" or any(map(shutil.which, compilers)) and header.exists()

STREAMS = ("weights", "epoch", "step", "statistics", "image", "label", "align")     # append only: numbers are seeds

def seed_of(seed, stream, i):
    """A 32-bit seed (CPU generators use no more): a number of (seed, stream), plus i, so that no two i share one."""
    start = np.random.SeedSequence([seed, STREAMS.index(stream)]).generate_state(1)[0]
    return (int(start) + i) % 2**32

# --- Options: a dataclass or a function is the command line. `--key=value`; leading values without key fill the first.

def parse(target, argv, presets=None):
    """Calls a dataclass or a function with the command line's words. ValueError names the wrong word and the nearest
    right one. --preset=a,b applies presets[a], then presets[b]; what is given by --key=value stands above both."""
    signature = inspect.signature(target)
    known, unnamed, words = signature.parameters, list(signature.parameters), iter(argv)
    chosen, values = {}, {}
    for word in words:
        if word in ("-h", "--help"):
            print(inspect.getsource(target) if isinstance(target, type) else f"{signature}\n{target.__doc__}")
            print(f"presets: {', '.join(presets or ['none'])}")
            raise SystemExit(0)
        if not word.startswith("--"):
            if not unnamed:
                raise ValueError(f"one value too many: {word!r}")
            word = f"--{unnamed.pop(0)}={word}"
        key, equals, text = word[2:].partition("=")
        if key == "preset" and presets:
            for name in text.split(","):
                if name not in presets:
                    raise ValueError(f"unknown preset {name!r}{nearest(name, presets)}")
                chosen |= presets[name]
        elif key in known:
            values[key] = cast(key, text if equals else next(words, None), known[key].annotation)   # or --key value
        else:
            raise ValueError(f"unknown option --{key}{nearest(key, known)}")
    for key, option in known.items():
        if option.default is option.empty and key not in values:
            raise ValueError(f"--{key} is missing: expected {', '.join(get_args(option.annotation)) or 'a value'}")
    return target(**(chosen | values))

def nearest(word, known):
    close = get_close_matches(word, known, 1, 0.5)
    return f": did you mean {close[0]}?" if close else f": expected one of {', '.join(filter(None, known))}"

def cast(key, text, kind):
    """Text -> int, float, bool or str, or one of a few words, by the field's type."""
    if text is None or text.startswith("--"):
        raise ValueError(f"--{key} needs a value: --{key}=...")
    if choices := get_args(kind):
        if text not in choices:
            raise ValueError(f"--{key}={text}{nearest(text, choices)}")
        return text
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    try:
        return words[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        expected = {int: "a whole number", float: "a number", bool: "0 or 1"}[kind]
        raise ValueError(f"--{key}={text}: expected {expected}") from None

def first_to_fail():
    """One message for all processes: True on the first one that asks (without a process group: on rank 0)."""
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except (RuntimeError, ValueError):          # the process that holds the store is gone, or there is no group
        return dist.is_initialized() or os.environ.get("RANK", "0") == "0"

def friendly(main):
    """Runs main(argv); a user's mistake (ValueError, OSError) ends in one line and exit code 2 (TRACEBACK=1: all)."""
    def run():
        code = 0
        try:
            main(sys.argv[1:])
        except Exception as error:
            code = 2 if isinstance(error, (ValueError, OSError, torch.OutOfMemoryError)) else 1
            lost = dist.is_initialized() and (isinstance(error, dist.DistError) or "/gloo/" in str(error))
            if code == 1 and not lost or os.environ.get("TRACEBACK"):
                traceback.print_exc()
            elif first_to_fail():
                text = str(error).strip() or type(error).__name__       # a data worker's is a traceback: its last line
                if lost:        # torchrun names the process that is gone
                    text = f"a collective failed ({one_line(error)}): if a process is gone, the same command goes on"
                hint = ": lower --micro_batch or --batch" * isinstance(error, torch.OutOfMemoryError)
                where = f" (process {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
                print(f"error{where}: {text.splitlines()[-1].removeprefix('ValueError: ')}{hint}", file=sys.stderr)
            traceback.clear_frames(error.__traceback__)     # data workers end with their loader
            time.sleep(dist.is_initialized())       # torchrun names the one it finds gone first: a killed one, not this
        sys.stdout.flush()
        if dist.is_initialized():
            os._exit(code)      # others may wait in a collective; and threads of the groups could abort an ordinary end
        if code:
            sys.exit(code)
    return run

# -- Solvers: z at t = 1 -> z at t = 0, float64, along velocity(z, t: float) -> dz/dt; `steps` calls (heun: about two).

def euler(velocity, z, steps):
    """Order 1: z += dt v(z, t)."""
    for t, t_next in pairwise(np.linspace(1, 0, steps + 1)):
        z = z + (t_next - t) * velocity(z, t)
    return z

def heun(velocity, z, steps):
    """Order 2: the mean of the velocities at both ends of the step. The last step is Euler's, as the authors'."""
    for t, t_next in pairwise(np.linspace(1, 0, steps + 1)):
        v = velocity(z, t)
        ahead = z + (t_next - t) * v
        z = ahead if t_next == 0 else z + (t_next - t) * (v + velocity(ahead, t_next)) / 2
    return z

def ab2(velocity, z, steps):
    """Adams-Bashforth, order 2 with one call a step: v(t + dt/2) extrapolated from this velocity and the last one."""
    v = None
    for t, t_next in pairwise(np.linspace(1, 0, steps + 1)):
        last, v = v, velocity(z, t)
        z = z + (t_next - t) * (v if last is None else 1.5 * v - 0.5 * last)
    return z

def euler_maruyama(velocity, z, steps, noise, path="linear", t_last=0.04):
    """The reverse SDE dz = (v - w/2 score) dt + sqrt(w) dW, w(t) = 2t (SiT, section 2.3); noise() is normal, like z.
    t runs from 1 to t_last in steps - 1 intervals (the score is singular at 0), and to 0 in one more, without noise."""
    for t, t_next in pairwise([*np.linspace(1, t_last, steps), 0.0]):
        v, w = velocity(z, t), 2 * t
        score = score_from_velocity(v, z, z.new_full((len(z),), t), path)
        z = z + (t_next - t) * (v - 0.5 * w * score)
        if t_next > 0:
            z = z + math.sqrt(w * (t - t_next)) * noise()
    return z

SOLVERS = {"euler": euler, "heun": heun, "ab2": ab2, "sde": euler_maruyama}

def guided(sit, y, scale=1.0, low=0.0, high=1.0):
    """Classifier-free guidance in an interval (Kynkaanniemi et al., 2404.07724): -> velocity(z, t).
    v = v_null + scale (v_y - v_null) where low <= t <= high and scale > 1, else v_y: one network call, not two.
    The SDE's drift is affine in v, so guiding the velocity guides the drift."""
    def velocity(z, t):
        z, time = z.float(), z.new_full((len(z),), t, dtype=torch.float32)
        if scale <= 1 or not low <= t <= high:
            return sit(z, time, y)[0].double()
        null = torch.full_like(y, sit.cfg.num_classes)
        both, _ = sit(torch.cat([z, z]), torch.cat([time, time]), torch.cat([y, null]))
        v, v_null = both.double().chunk(2)
        return v_null + scale * (v - v_null)
    return velocity

# --------------------------------------------------------------------------------------------- A model that generates.

DECODED = 16        # images that a VAE works on at a time: in float32 at 256 px they take 5 GB

@dataclass
class Model:
    """What a checkpoint plays: the plain (or averaged) VAE, the EMA SiT with its latent statistics, the class names."""
    vae: VAE
    sit: SiT
    classes: list
    config: dict
    step: int
    @torch.no_grad()
    def batch(self, indices, labels, steps, solver, guidance, low, high, seed):
        """Images number `indices` of the seed, of these labels -> uint8 [B, 3, R, R]."""
        cfg, device = self.sit.cfg, self.sit.pos_embed.device
        velocity = guided(self.sit, torch.as_tensor(labels, device=device), guidance, low, high)
        generators = [torch.Generator(device).manual_seed(seed_of(seed, "image", i)) for i in indices]
        def noise():
            shape = (cfg.channels, cfg.size, cfg.size)
            return torch.stack([torch.randn(shape, generator=g, device=device) for g in generators]).double()
        with autocast(device):
            zn = SOLVERS[solver](velocity, noise(), steps, *((noise, cfg.path) if solver == "sde" else ()))
        z = self.sit.bn.inverse(zn).float()
        return torch.cat([to_uint8(self.vae.decode(part)) for part in z.split(DECODED)])
    def prepare(self, count):
        """Makes `count` images in all faster on a GPU: SiT's weights in bfloat16, and from a thousand images on
        compiled blocks (TORCH_COMPILE_DISABLE=1: never). -> itself"""
        device = self.sit.pos_embed.device
        if has_bfloat16(device):
            round_weights(self.sit)
        if count >= 1000 and can_compile(device):
            for block in self.sit.blocks:
                block.compile(dynamic=False)
        return self
    def __call__(self, labels, steps=250, solver="sde", guidance=1.0, low=0.0, high=1.0, seed=0, batch=64, first=0):
        """Labels (numbers) -> uint8 [len(labels), 3, R, R] on the CPU. Image i of a seed is number first + i."""
        numbers = range(first, first + len(labels))
        return torch.cat([self.batch(numbers[i : i + batch], labels[i : i + batch], steps, solver, guidance, low, high,
                                     seed).cpu() for i in range(0, len(labels), batch)])

def round_weights(sit):
    """Linear weights to bfloat16 once, as autocast does in every call: the same bits, without its work (XL: 2.7 GB
    read, 1.3 GB written a call). The time embedding's stay: autocast is off there."""
    timestep = set(sit.t_embedder.modules())
    for module in sit.modules():
        if isinstance(module, torch.nn.Linear) and module not in timestep:
            module.bfloat16()

def load_model(path, device="cpu", vae=""):
    """A checkpoint of ours, REPA-E's, REPA's or SiT's, or a run's folder (its newest) -> Model. All processes call it.
    vae: as for vae.load_vae, in place of the checkpoint's own; frozen-VAE runs of REPA-E, REPA and SiT hold none."""
    with rank0_first():
        path = find_checkpoint(path)
    file = read_weights(path)
    keys = set(file) if isinstance(file, dict) else set()
    ours = {"sit_config", "ema"} <= keys
    if "vae_config" in keys and not ours:
        raise ValueError(f"{path} holds a VAE without a SiT (--method=vae): train one with --vae={path}")
    with reading(path, "checkpoint of train.py, REPA-E, REPA or SiT"):
        cfg, state = (config_from_dict(SiTConfig, file["sit_config"]), file["ema"]) if ours else published_sit(file)
        sit = load_strict(SiT(cfg), state, f"{path}: its SiT")
        sit.projectors = torch.nn.ModuleList()          # sampling needs no tokens
    if vae in VAES or not vae and "vae" not in keys:
        raise ValueError((f"--vae={vae} is untrained" if vae else f"{path} holds no VAE") +
                         ": name one with --vae=..., for REPA and SiT: hf:stabilityai/sd-vae-ft-mse")
    with rank0_first():
        own = load_vae(vae or str(path.absolute()))[0]
    if own.cfg.z_channels != cfg.channels:
        raise ValueError(f"--vae={vae} has latents of {own.cfg.z_channels} channels, the SiT of {cfg.channels}")
    own, sit = (net.to(device).eval().requires_grad_(False) for net in (own, sit))
    classes = file.get("classes") or [str(i) for i in range(cfg.num_classes)]
    return Model(own, sit, classes, file.get("config", {}), file.get("steps", 0))

def choose_label(protocol, seed, i, num_classes):
    """The label of image i: uniform ("random"), or each class equally often ("balanced")."""
    if protocol == "balanced":
        return i % num_classes
    return int(np.random.default_rng([seed, STREAMS.index("label"), i]).integers(num_classes))

def parse_classes(text, names):
    """"star,7" -> label numbers; names are the data set's."""
    numbers = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    for word in text.split(","):
        if word not in numbers:
            raise ValueError(f"unknown class {word!r}{nearest(word, names)} (or a number below {len(names)})")
    return [numbers[word] for word in text.split(",")]

# -------------------------------------------------------------------------------------------------------- The command.

@dataclass
class Options:
    path: str = ""              # a checkpoint, or a run's folder (its newest)
    count: int = 64             # how many images
    out: str = ""               # .png (a grid) or .npz (ADM's layout); default grid.png to 100 images, then samples.npz
    solver: Literal[*SOLVERS] = "sde"       # sde (Euler-Maruyama, the paper's), euler, heun, ab2
    steps: int = 250            # network calls (heun: nearly twice as many)
    guidance: float = 1.0       # classifier-free guidance scale; 1 is off
    low: float = 0.0            # guidance only where low <= t <= high (t = 1 is noise)
    high: float = 1.0
    labels: Literal["random", "balanced"] = "random"    # balanced: each class equally often; say which by any FID
    classes: str = ""           # instead: names or numbers, repeated in turn (star,heart)
    seed: int = 0
    batch: int = 64             # images at a time on each process
    vae: str = ""               # for checkpoints that hold none (REPA's, SiT's): hf:stabilityai/sd-vae-ft-mse

def check(opt):
    """The first mistake in the options, as a ValueError."""
    if not opt.path:
        raise ValueError("name a checkpoint or a run's folder: python sample.py runs/tiny")
    if min(opt.count, opt.batch) < 1 or opt.steps < 2 or opt.seed < 0:
        raise ValueError("--count and --batch must be at least 1, --steps at least 2, --seed at least 0")
    if not 0 <= opt.guidance < math.inf or not opt.low <= opt.high:
        raise ValueError(f"--guidance={opt.guidance} --low={opt.low} --high={opt.high}: expected numbers, low <= high")
    if opt.out and not opt.out.endswith((".png", ".npz")):
        raise ValueError(f"--out={opt.out}: expected a name that ends in .png (a grid) or .npz (ADM's layout)")

@friendly
def main(argv):
    opt = parse(Options, argv)
    check(opt)
    rank, world, device = start()
    model = load_model(opt.path, device, opt.vae).prepare(opt.count)
    out = Path(opt.out or ("grid.png" if opt.count <= 100 else "samples.npz"))
    chosen = parse_classes(opt.classes, model.classes) if opt.classes else None
    labels = [chosen[i % len(chosen)] if chosen else choose_label(opt.labels, opt.seed, i, len(model.classes))
              for i in range(opt.count)]
    # every process writes its rows of one memory-mapped file: 50,000 images of 256 px never are in memory
    side, raw = model.sit.cfg.size * model.vae.cfg.downsampling, Path(f"{out}.rows.npy")
    with rank0_first():
        rows = shared_array(raw, "|u1", (opt.count, 3, side, side))
    for i in tqdm(range(rank, opt.count, world * opt.batch), "sampling", disable=rank > 0):
        indices = list(range(i, min(i + world * opt.batch, opt.count), world))
        rows[indices] = model.batch(indices, [labels[j] for j in indices], opt.steps, opt.solver, opt.guidance,
                                    opt.low, opt.high, opt.seed).cpu()
    rows.flush()
    if world > 1:
        dist.barrier()
    if rank == 0:
        if out.suffix == ".png":
            save_png(out, grid(torch.from_numpy(rows)))
        else:
            write_npz(out, (opt.count, side, side, 3), torch.from_numpy(rows), arr_1=labels, classes=model.classes)
        os.remove(raw)
        print(f"{out}: {opt.count} images, step {model.step}, {opt.solver} {opt.steps} steps, guidance {opt.guidance} "
              f"in [{opt.low}, {opt.high}], labels {opt.classes or opt.labels}, seed {opt.seed}")

if __name__ == "__main__":
    main()
