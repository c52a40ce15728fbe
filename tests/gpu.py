"""The first minutes on a machine with one GPU: are the numbers right, how fast is it, and where
does the time go?

    python tests/gpu.py                             # all phases, in order of value
    python tests/gpu.py gradients step frozen --limit=330 --peer=REPA-E --out=DIR
    python tests/gpu.py --small                     # small networks, for a CPU: tries this script

    gradients   every gradient of the joint step against a CPU's in float32, eager and compiled
    step        the joint step: compile time, graphs, speed, memory, parts, kernels, host waits
    frozen      the step with a frozen VAE, from cached latents
    peer        the authors' step in turns with ours; --peer is a checkout of their code
    sampling    precision, noise, network calls, decoder; with --peer their sampler beside ours
    runs        train.py: stopped and resumed, --deterministic=1 twice, the tiny preset
    micro       two ways each: upsampling, cuDNN's search, attention, the losses in bfloat16
    ddp         one rank of NCCL, a gloo group beside it, gradients under DDP

No phase begins after --limit seconds, and a phase that fails does not stop the next. The exit
code is 1 if one failed. Each value goes to OUT/gpu.json at once, and into a table at the end. OUT
is --out, else the environment's OUT, else the current folder. Weights are random and of the true
shape, so nothing is downloaded; the tiny preset's teacher is trained once. TORCH_LOGS=recompiles
tells what is compiled again.
"""
import argparse
import gc
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import bench  # noqa: E402
import sample  # noqa: E402
import steps  # noqa: E402
import train  # noqa: E402
from vae import VAE, VAES, Discriminator, generator_loss  # noqa: E402

CPU = torch.device("cpu")
# settings of train.py: the paper's networks; the same kinds of layers with little work; for a CPU
FULL = dict(batch=32)
NARROW = dict(batch=4, resolution=64, sit="4-384-6/2", teacher="dinov2_vits14")
SMALL = dict(batch=2, resolution=32, sit="2-64-2/2", teacher="tiny", vae="tiny", lpips=0.0)
TINY_RUN = ("--preset=tiny --sit=2-64-2/2 --align_depth=1 --batch=16 --first_stage=0 --gan_start=0 "
            "--log_every=10 --save_every=10 --preview_steps=2 --compile=0").split()
# kinds of kernels by a part of their names: the first that fits
KERNELS = ("nchwToNhwc nhwcToNchw fmha flash triton dgrad wgrad fprop conv gemm nvjet elementwise "
           "multi_tensor memcpy memset").split()


class Run:
    """What the phases share: the machine, the options, the values so far, the step's networks."""

    def __init__(self, small, peer="", limit=math.inf, out="."):
        self.small, self.peer, self.limit, self.out = small, peer, limit, Path(out)
        self.start = time.time()
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.cuda else CPU
        self.drain = torch.cuda.synchronize if self.cuda else lambda: None
        self.card = torch.cuda.get_device_name() if self.cuda else "CPU"
        self.phase, self.phases, self.lines, self.ours = "", {}, [], None

    def seconds(self):
        return time.time() - self.start

    def say(self, *words):
        print(f"[{self.seconds():5.0f} s]", *words, flush=True)

    def record(self, what, value, unit=""):
        """Print a value of this phase and keep it."""
        self.phases[self.phase]["values"][what] = [value, unit]
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        self.lines.append(f"{self.phase:10s} {what:42s} {shown:>12s} {unit}")
        self.say(self.lines[-1])
        self.write()

    def write(self):
        """Write gpu.json, whole at any time: a time limit may kill the process."""
        content = {"card": self.card, "torch": torch.__version__, "cuda": torch.version.cuda,
                   "cudnn": torch.backends.cudnn.version(),
                   "date": time.strftime("%Y-%m-%d %H:%M"), "phases": self.phases}
        (self.out / "gpu.json.tmp").write_text(json.dumps(content, indent=1))
        os.replace(self.out / "gpu.json.tmp", self.out / "gpu.json")

    def ms(self, function, count=10):
        """Measure a call: median milliseconds."""
        return self.ms_in_turns(count, it=function)["it"]

    def ms_in_turns(self, count, **functions):
        """The same of several functions, called in turn, so that a slower clock slows them all."""
        bench.turns(1 if self.small else 3, self.drain, **functions)
        seconds = bench.turns(1 if self.small else count, self.drain, **functions)
        return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}

    def build(self, settings, device, compile):
        """Build a run's networks and its step. Beside a peer LPIPS takes 2x - 1, as theirs."""
        settings = SMALL if self.small else settings
        cfg = train.Config(**settings, compile=compile, lpips_legacy_range=bool(self.peer))
        return steps.Ours(cfg, device)

    def full_step(self, name):
        """The paper's networks, compiled once for the phases that use them, and a step's call."""
        self.ours = self.ours or self.build(FULL, self.device, "1")
        args = *bench.inputs(self.ours, name), self.ours.draws(0)
        return self.ours, partial(getattr(self.ours, name), *args)

    def first_call(self, what, function):
        """Time the call that compiles."""
        begin = self.seconds()
        function()
        self.drain()
        self.record(what, self.seconds() - begin, f"s, {graphs()} graphs")


def graphs():
    return counters["stats"]["unique_graphs"]


def set_precision(name=""):
    """Matrix products and convolutions in float32, TF32 or bf16 from here on; "": as train.py."""
    torch.set_float32_matmul_precision("highest" if name == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = name != "float32"
    train.autocast = sample.autocast
    if name:
        train.autocast = lambda device, *_: torch.autocast(
            device.type, torch.bfloat16, enabled=name == "bf16")


def off_by(found, true):
    return ((found - true).norm() / true.norm()).item()


# ---- Gradients ---------------------------------------------------------------
# A compiler's silent mistake shows here, before any speed is worth measuring.

def gradients(run):
    """Compare eager and compiled steps with float32 on a CPU, tensor by tensor. With random weights
    TF32 is off by about 1e-2 and bf16 by 1e-1. What counts: compiled is no farther off than eager,
    in any tensor."""
    set_precision("float32")
    ours = run.build(NARROW, CPU, "0")
    batch = *bench.inputs(ours, "step"), ours.draws(0)
    true_losses, true = joint_gradients(ours, batch)
    errors = {}
    for compile, kinds in (("0", ("float32", "TF32", "bf16")), ("1", ("bf16", "float32"))):
        ours = run.build(NARROW, run.device, compile)
        for kind in kinds:
            name = f"{kind} compiled" if compile == "1" else f"{kind} eager"
            set_precision(kind)
            torch._dynamo.reset()
            losses, found = joint_gradients(ours, batch)
            total, errors[name] = deviation(found, true)
            worst = max(errors[name], key=errors[name].get)
            off = [abs(losses[key] / loss - 1) for key, loss in true_losses.items() if loss]
            run.record(f"{name}, all", total, "|difference| / |float32 on a CPU|")
            run.record(f"{name}, median tensor", statistics.median(errors[name].values()))
            run.record(f"{name}, worst tensor", errors[name][worst], worst)
            run.record(f"{name}, worst loss", max(off))

    for kind in ("float32", "bf16"):
        eager, compiled = errors[f"{kind} eager"], errors[f"{kind} compiled"]
        ratio = {key: compiled[key] / max(eager[key], 1e-4) for key in eager}
        worst = max(ratio, key=ratio.get)
        farther = sum(value > 2 for value in ratio.values())
        run.record(f"{kind}, compiled farther than eager", farther, f"of {len(ratio)} tensors")
        run.record(f"{kind}, compiled / eager, worst", ratio[worst], worst)


def joint_gradients(ours, batch):
    """Take one joint step without its update -> losses; every gradient by name, on the CPU."""
    ours.opts = {}
    bn = ours.nets.sit.bn
    before = {key: value.clone() for key, value in bn.state_dict().items()}
    losses = ours.step(*tree_map(lambda x: x.to(ours.device) if torch.is_tensor(x) else x, batch))
    bn.load_state_dict(before)          # the next step begins where this one did
    found = {}
    for name in ("vae", "disc", "sit"):
        net = getattr(ours.nets, name)
        for key, p in net.named_parameters():
            found[f"{name}.{key}"] = p.grad.to(CPU, torch.float32, copy=True)
        net.zero_grad()
    return {name: value.item() for name, value in losses.items()}, found


def deviation(found, true):
    """|found - true| / |true|, over all tensors and by tensor. A gradient that is 0 in exact
    arithmetic (of a key's bias in attention) is measured by a thousandth of the median norm."""
    norms = {key: value.norm().item() for key, value in true.items()}
    off = {key: (found[key] - value).norm().item() for key, value in true.items()}
    floor = 1e-3 * statistics.median(norms.values())
    total = math.hypot(*off.values()) / math.hypot(*norms.values())
    by_tensor = {key: off[key] / max(norms[key], floor) for key in true}
    return total, {key: e if math.isfinite(e) else math.inf for key, e in by_tensor.items()}


# ---- The step at full size ---------------------------------------------------
# It compiles once and waits for nothing; its speed, its memory, and where the time goes.

def step(run):
    counters.clear()
    ours, once = run.full_step("step")
    run.first_call("first call", once)
    first = graphs()
    run.record("graph breaks", sum(counters["graph_break"].values()), "expected 0")
    record_speed(run, "a step", once, "step")
    if run.cuda:
        run.record("reserved memory", torch.cuda.max_memory_reserved() / 2**30, "GiB")
    record_parts(run, once)
    run.record("graphs after the first call", graphs() - first, "expected 0")
    if run.cuda:
        record_kernels(run, once)
        torch.cuda.set_sync_debug_mode("error")         # the phase fails where the host waits
        once()
        torch.cuda.set_sync_debug_mode("default")
        run.record("host waits", 0)

    for n in (1, 2):
        if run.seconds() + 90 > run.limit:
            run.say(f"no time for --recompute={n}")
            continue
        with recomputing(ours.nets.vae, n):
            record_speed(run, f"--recompute={n}", once)


@contextmanager
def recomputing(vae, n):
    """--recompute=n inside. The graphs without it are kept for what follows."""
    levels = [*vae.encoder.down[:n], *vae.decoder.up[:n]]
    for level in levels:
        level.recompute = True
    try:
        yield
    finally:
        for level in levels:
            level.recompute = False


def frozen(run):
    record_speed(run, "a step", run.full_step("frozen_step")[1], "frozen_step")


def record_speed(run, what, once, name=""):
    """Record median time and peak memory; of a named step also images/s, and FLOP/s as a share of
    a large bfloat16 product's."""
    if run.cuda:
        torch.cuda.reset_peak_memory_stats()
    ms = run.ms(once)
    run.record(what, ms, "ms")
    if run.cuda:
        run.record(f"{what}, peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    if not name:
        return
    cfg = run.ours.cfg
    rate = sum(bench.counted(cfg, name).values()) * cfg.batch / (ms / 1e3)
    run.record("speed", cfg.batch / ms * 1e3, f"images/s, {cfg.batch} at a time")
    run.record("arithmetic", rate / 1e12, "TFLOP/s")
    if run.cuda:
        best = bench.matmul_rate(run.drain)
        run.record("share", 100 * rate / best, f"% of a bf16 product's {best / 1e12:.0f} TFLOP/s")


def record_parts(run, once, count=3):
    """Time the step's parts, the device drained between them."""
    ms = {}

    @contextmanager
    def part(name):
        run.drain()
        begin = time.perf_counter()
        yield
        run.drain()
        ms[name] = ms.get(name, 0) + (time.perf_counter() - begin) * 1e3 / count
    for _ in range(count):
        once(part=part)
    for name, value in ms.items():
        run.record(f"part: {name}", value, "ms")


def record_kernels(run, once):
    """Sum device time by kind of kernel; all kernels go to OUT/profile.txt. nchwToNhwc should not
    be there: it copies a tensor into another layout."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        once()
        run.drain()
    kernels = profile.key_averages()
    table = kernels.table("cuda_time_total", row_limit=100, max_name_column_width=90)
    (run.out / "profile.txt").write_text(table)
    ms = {}
    for kernel in kernels:
        kind = next((k for k in KERNELS if k.lower() in kernel.key.lower()), "other")
        ms[kind] = ms.get(kind, 0) + kernel.self_device_time_total / 1e3
    for kind in sorted(ms, key=ms.get, reverse=True):
        run.record(f"kernels: {kind}", ms[kind], "ms")


def peer(run):
    ours, once = run.full_step("step")
    image, y = bench.inputs(ours, "step")
    theirs = steps.Peer(run.peer, ours)
    run.first_call("their first call", lambda: theirs.step(image, y))
    record_turns(run, "steps", ours.cfg.batch, 8, once, lambda: theirs.step(image, y))
    if run.cuda:
        run.record("peak memory of both", torch.cuda.max_memory_allocated() / 2**30, "GiB")


def record_turns(run, what, images, count, ours, theirs):
    ms = run.ms_in_turns(count, ours=ours, theirs=theirs)
    run.record(f"{what}, ours", images / ms["ours"] * 1e3, "images/s")
    run.record(f"{what}, theirs", images / ms["theirs"] * 1e3, "images/s")
    run.record(f"{what}, ratio", ms["theirs"] / ms["ours"], "times as fast as theirs")


# ---- Sampling ----------------------------------------------------------------
# SiT's call as the solvers make it, with twice the rows for guidance; the decoder.

def sampling(run):
    ours = run.build(FULL, run.device, "0")
    sit, vae = ours.nets.sit.eval().requires_grad_(False), ours.nets.vae.eval()
    sit.to(memory_format=torch.contiguous_format)       # as load_pipeline leaves it
    rows = 4 if run.small else 64
    y = torch.randint(0, 1000, (2 * rows,), device=run.device)
    t = torch.rand(2 * rows, device=run.device)
    z = torch.randn(2 * rows, *ours.latent, device=run.device)

    @torch.no_grad()
    def call(n):
        with train.autocast(run.device):
            return sit(z[:n], t[:n], y[:n])[0].float()
    for kind in ("float32", "TF32", "bf16"):
        set_precision(kind)
        velocity = call(rows)
        if kind == "float32":
            true = velocity
        run.record(f"velocity in {kind}", off_by(velocity, true), "|difference| / |float32|")

    set_precision()
    generators = [torch.Generator(run.device).manual_seed(i) for i in range(rows)]
    noise = partial(torch.randn, ours.latent, device=run.device)
    ms = run.ms(lambda: torch.stack([noise(generator=g) for g in generators]))
    run.record("noise", ms, f"ms, {rows} images")
    theirs = steps.Peer(run.peer, ours) if run.peer else None       # copies unrounded weights
    sit.projectors = torch.nn.ModuleList()
    model = sample.Pipeline(vae, sit, [], {}, 0)
    for name, images in (("eager", 1), ("compiled", 1000)):
        model.prepare(images)
        for n in (rows, 2 * rows):
            run.record(f"network call, {n} rows, {name}", run.ms(partial(call, n)), "ms")
    if theirs:
        compare_samplers(run, model, theirs, ours.cfg)

    for layout in (torch.contiguous_format, torch.channels_last):
        vae.to(memory_format=layout)
        ms = run.ms(torch.no_grad()(lambda: vae.decode(z[:16])), 3)
        run.record(f"decoder, {layout}", ms, f"ms, {len(z[:16])} images")


def compare_samplers(run, model, theirs, cfg):
    """Time whole images, by few steps of the paper's SDE, in turns with the authors' sampler."""
    count = 2 if run.small else 20
    size = model.sit.cfg.size
    y = torch.randint(0, 1000, (cfg.batch,), device=run.device)
    z = torch.randn(cfg.batch, model.sit.cfg.channels, size, size, device=run.device)
    sit, sampler = theirs.sit.eval(), theirs.samplers.euler_maruyama_sampler

    def our_images(*guidance):
        return model.batch(range(cfg.batch), y, count, "sde", *guidance, 0)

    @torch.no_grad()
    def their_images(*guidance):
        return theirs.vae.decode(sampler(sit, z, y, count, False, *guidance, cfg.path).float())
    for guidance in ((1.0, 0.0, 1.0), (2.2, 0.0, 0.65)):
        record_turns(run, f"{count} steps, guidance {guidance[0]}", cfg.batch, 3,
                     partial(our_images, *guidance), partial(their_images, *guidance))


# ---- The command itself ------------------------------------------------------
# train.py in the tiny world, in processes of its own; its checkpoints are compared.

def runs(run):
    with tempfile.TemporaryDirectory() as folder:
        def go(out, title, *words):
            begin = run.seconds()
            command = [sys.executable, str(ROOT / "train.py"), *words, f"--out={folder}/{out}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{title}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            run.record(title, run.seconds() - begin, "s")
            return weights(f"{folder}/{out}")

        whole = go("whole", "20 steps", *TINY_RUN, "--steps=20")
        go("half", "10 steps", *TINY_RUN, "--steps=10")
        resumed = go("half", "resumed to 20", *TINY_RUN, "--steps=20")
        differences = [(whole[key] - resumed[key]).abs().max().item() for key in whole]
        run.record("resumed, largest difference", max(differences), "of a weight; on a CPU 0")
        short = ["--first_stage=3", "--steps=6", "--preview_steps=2"]
        go("tiny", "tiny preset, cut short", "--preset=tiny", *short)
        exact = [*TINY_RUN, "--steps=10", "--deterministic=1"]
        first = go("first", "deterministic", *exact)
        second = go("second", "deterministic again", *exact)
        differ = sum((first[key] != second[key]).sum().item() for key in first)
        run.record("deterministic, weights that differ", differ, "expected 0")
        if run.cuda:
            go("compiled", "deterministic, compiled", *exact, "--compile=1")


def weights(folder):
    """Read the networks of a run's newest checkpoint: {name: tensor}."""
    content = torch.load(Path(folder) / "state.pt", "cpu", weights_only=True)
    found = {}
    for net in ("vae", "ema", "discriminator"):
        found |= {f"{net}.{key}": value.double() for key, value in content[net].items()}
    return found


# ---- What a few lines settle -------------------------------------------------
# Two ways to do one thing, each forward and backward.

def micro(run):
    # in a process for each value: what cuDNN once chose for a shape stays, whatever the flag
    for benchmark in (False, True) if run.cuda else (False,):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            times = process.submit(convolution_times, run.small, benchmark).result()
        for what, ms in times.items():
            run.record(f"{what}, cudnn.benchmark={benchmark}", ms, "ms in bf16")

    def attention(q, k, v):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores.float().softmax(-1).to(v.dtype) @ v
    shape = (1, 1, 64, 512) if run.small else (32, 1, 1024, 512)
    qkv = [torch.randn(shape, device=run.device, dtype=torch.bfloat16).requires_grad_()
           for _ in range(3)]
    sdpa, compiled = F.scaled_dot_product_attention, torch.compile(attention)
    for name, way in {"SDPA": sdpa, "written out, compiled": compiled}.items():
        ms = run.ms(lambda: way(*qkv).sum().backward())
        run.record(f"one head of 512, {name}", ms, "ms in bf16")

    shape = (2, 3, 32, 32) if run.small else (32, 3, 256, 256)
    x = torch.rand(shape, device=run.device).to(memory_format=torch.channels_last)
    rec = torch.rand_like(x).requires_grad_()
    perceptual = steps.random_lpips(False).to(run.device)
    disc = Discriminator().to(run.device, memory_format=torch.channels_last).requires_grad_(False)
    perceptual.compile(dynamic=False)
    disc.compile(dynamic=False)
    compare_precisions(run, "LPIPS", rec, lambda: perceptual(x, rec))
    compare_precisions(run, "discriminator", rec, lambda: generator_loss(disc(rec)))


def compare_precisions(run, name, rec, loss_of):
    """Record a loss's time, and how far its value and gradient at rec are from float32's."""
    def backward():
        rec.grad = None
        with train.autocast(run.device):
            loss = loss_of()
        loss.backward()
        return loss.detach(), rec.grad
    for kind in ("float32", "TF32", "bf16"):
        set_precision(kind)
        loss, gradient = backward()
        if kind == "float32":
            true_loss, true = loss, gradient
        run.record(f"{name} in {kind}", run.ms(backward), "ms")
        run.record(f"{name} in {kind}, loss", off_by(loss, true_loss), "|difference| / |float32|")
        run.record(f"{name} in {kind}, gradient", off_by(gradient, true))


def convolution_times(small, benchmark):
    """Time upsampling as a transposed convolution or a plain one, and the whole compiled VAE."""
    run = Run(small)
    set_up(small)
    torch.backends.cudnn.benchmark = benchmark
    images, resolution = (2, 32) if small else (32, 256)

    def transposed(conv, x):
        kernel = 4 * F.avg_pool2d(conv.weight, 2, stride=1, padding=1)
        kernel = kernel.flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)

    def interpolated(conv, x):
        return conv(F.interpolate(x, scale_factor=2.0))

    def backward(function, *args):
        with torch.autocast(run.device.type, torch.bfloat16):
            out = function(*args)
        out.sum().backward()
    times = {}
    for width, side in ((64, 8),) if small else ((512, 32), (512, 64), (256, 128)):
        conv = torch.nn.Conv2d(width, width, 3, padding=1)
        conv.to(run.device, memory_format=torch.channels_last)
        x = torch.randn(images, width, side, side, device=run.device, dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        for way in (transposed, interpolated):
            times[f"{way.__name__}, {width} at {side}"] = run.ms(partial(backward, way, conv, x), 5)
    net = VAE(VAES["tiny" if small else "f8d4"])
    net.to(run.device, memory_format=torch.channels_last)
    net.encoder.compile(dynamic=False)
    net.decoder.compile(dynamic=False)
    x = torch.rand(images, 3, resolution, resolution, device=run.device)
    x = x.to(memory_format=torch.channels_last)
    times["compiled VAE"] = run.ms(lambda: backward(lambda: net.decode(net.encode(x)[0])), 5)
    return times


# ---- DDP ---------------------------------------------------------------------
# What eight GPUs do, as far as one shows it.

def ddp(run):
    backend, card = ("nccl", run.device) if run.cuda else ("gloo", None)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=card)
    run.record("asked to stop", train.PoliteStop(2)(), "over gloo; expected False")
    ones = sample.all_mean(torch.ones(3, device=run.device, dtype=torch.float64))
    run.record("all-reduce in float64", ones.tolist(), "expected ones")
    dist.barrier()
    found = {}
    for name in ("alone", "in DDP"):
        torch._dynamo.reset()
        counters.clear()
        ours = run.build(NARROW, run.device, "1")
        batch = *bench.inputs(ours, "step"), ours.draws(0)
        if name == "in DDP":
            wrap_in_ddp(ours)
        found[name] = joint_gradients(ours, batch)[1]
        run.record(f"graphs, {name}", graphs(), "expected equal")
    total, _ = deviation(found["in DDP"], found["alone"])
    run.record("gradients", total, "|difference| / |without DDP|: 0, or bf16's noise")
    run.record("optimize_ddp", torch._dynamo.config.optimize_ddp, "True would cut the graphs")


def wrap_in_ddp(ours):
    """Put each network under DDP, as train.py does with several processes."""
    for name, net in ours.nets.ddp.items():
        ours.nets.ddp[name] = train.parallel(net, 2, ours.device)


# ---- The script --------------------------------------------------------------

PHASES = {"gradients": gradients, "step": step, "frozen": frozen, "peer": peer,
          "sampling": sampling, "runs": runs, "micro": micro, "ddp": ddp}
SHARED = {"step", "frozen", "peer"}     # keep the networks for each other, if they follow directly


def set_up(small):
    """Set what train.py sets. Small networks are compiled without making code: that is slow."""
    torch.backends.cudnn.benchmark = True
    if small:
        torch.compile = partial(torch.compile, backend="aot_eager")


def perform(run, name):
    """Run a phase; print its failure and mark it."""
    begin = run.seconds()
    run.phase = name
    run.phases[name] = {"state": "unfinished", "values": {}}
    set_precision()
    try:
        PHASES[name](run)
        run.phases[name]["state"] = "done"
    except Exception as error:
        run.phases[name]["state"] = "failed"
        traceback.print_exc()
        traceback.clear_frames(error.__traceback__)     # they hold tensors
    if run.cuda:
        torch.cuda.set_sync_debug_mode("default")
    run.phases[name]["seconds"] = run.seconds() - begin
    run.lines.append(f"{name:10s} {run.phases[name]['state']} in {run.seconds() - begin:.0f} s")
    run.say(run.lines[-1])
    run.write()


def clean_up(run):
    """Free the memory and the compiled code of a phase, end its process group."""
    run.ours = None
    torch._dynamo.reset()
    gc.collect()
    with suppress(RuntimeError):        # a kernel's illegal access breaks CUDA, but not for `runs`
        if dist.is_initialized():
            dist.destroy_process_group()
        if run.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*")
    parser.add_argument("--limit", type=float, default=math.inf)
    parser.add_argument("--peer", default="")
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--small", action="store_true")
    options, unknown = parser.parse_known_intermixed_args()
    known = [name for name in PHASES if options.peer or name != "peer"]
    unknown += [name for name in options.phases if name not in known]
    if unknown:
        sys.exit(f"unknown: {' '.join(unknown)}. The phases: {' '.join(known)} (peer: --peer=DIR)")
    names = options.phases or known
    if not options.small and not torch.cuda.is_available():
        sys.exit("no GPU here: --small tries the script on a CPU")

    set_up(options.small)
    run = Run(options.small, options.peer, options.limit, options.out)
    run.out.mkdir(parents=True, exist_ok=True)
    run.write()
    run.say(f"{run.card}, torch {torch.__version__}, phases {' '.join(names)}")
    for name, following in zip(names, [*names[1:], None]):
        if run.seconds() >= run.limit:
            run.say(f"no time for {name}")
            continue
        perform(run, name)
        if not {name, following} <= SHARED:
            clean_up(run)
    print("", f"{run.card}, torch {torch.__version__}", *run.lines, sep="\n")
    sys.exit(int(any(phase["state"] == "failed" for phase in run.phases.values())))


if __name__ == "__main__":
    main()
