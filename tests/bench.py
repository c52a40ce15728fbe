"""How fast everything is on this device: the step by parts with its FLOPs, memory, sampling, metrics, data.

    python tests/bench.py --preset=tiny
    python tests/bench.py step frozen sampling --preset=sdvae --peer=REPA-E     # beside a checkout of the authors'
    python tests/bench.py count memory traffic --preset=sdvae       # FLOPs, bytes kept and moved: needs no GPU
    python tests/bench.py evaluation        # features beside torch-fidelity's in turns, metrics of 50,000 samples
    python tests/bench.py data              # reading images: a folder of JPEGs, and the same packed

Any option of train.py can be given; weights are random and of the true shape, so nothing is downloaded. The parts are
train.py's own calls in its order, with the device drained between them; the whole step is timed without that, as the
loop runs it. FLOPs are counted on tensors without storage (2 a multiply-add, matrix products and convolutions alone).
--peer times the authors' code in turns with ours and prints how far the losses of a step differ on equal weights.
"""
import itertools
import resource
import statistics
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import train  # noqa: E402
from sample import PUBLISHED, Pipeline, euler_maruyama, guided, init_distributed, parse  # noqa: E402
from steps import Ours, Peer  # noqa: E402
from vae import VAE, VAES, collate, open_images  # noqa: E402

# ------------------------------------------------------------------------------------------------ What is measured.

def largest_difference(ours, peer, step, args):
    """The same step on both sides with the same weights and draws -> the largest relative difference of a loss."""
    B, cfg = len(args[-1]), ours.cfg
    torch.manual_seed(1)                # theirs draws in this order: posterior noise, t, eps, label drop
    noise = torch.randn(B, *ours.latent)
    t = torch.rand(B, 1, 1, 1) if cfg.weighting == "uniform" else torch.randn(B, 1, 1, 1).exp()
    t = t.flatten() if cfg.weighting == "uniform" else (t / (1 + t)).flatten()
    eps = torch.randn(B, *ours.latent)
    drawn = train.Draws(0, t, eps, noise, torch.rand(B) < cfg.label_drop, torch.zeros(B, dtype=torch.bool))
    mine = {name: value.item() for name, value in getattr(ours, step)(*args, drawn).items()}
    torch.manual_seed(1)
    theirs = getattr(peer, step)(*args)
    shared = mine.keys() & theirs.keys() - {"norm_sit"}     # theirs counts the gradient of its position table
    return max(abs(mine[name] - theirs[name]) / max(abs(mine[name]), 1e-6) for name in shared)

def counted(cfg, step):
    """ours.step (or .frozen_step) without storage, one image -> {part: FLOPs}."""
    fake, flops = FakeTensorMode(allow_non_fake_inputs=True), defaultdict(int)
    ours = Ours(replace(cfg, batch=1, compile="0", recompute=0), torch.device("cpu"), fake)     # useful FLOPs alone

    @contextmanager
    def part(name):
        with FlopCounterMode(display=False) as counter:
            yield
        flops[name] += counter.get_total_flops()
    with fake:
        getattr(ours, step)(*inputs(ours, step), draws_like(ours), part)
    return flops

def bench_count(cfg, rate=0.35 * 790e12):
    """FLOPs of both steps by part; the gradients that DDP sums, and the bandwidth that hides them at such a rate."""
    for step in ("step", "frozen_step"):
        flops = counted(cfg, step)
        print(f"{step}, GFLOP an image: {sum(flops.values()) / 1e9:.1f} = " + ", ".join(
            f"{part} {value / 1e9:.1f}" for part, value in flops.items() if value))
        if step == "step":
            joint = flops
    ours = Ours(replace(cfg, batch=1), torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True))
    for name, part in (("vae", "VAE backward"), ("disc", "discriminator"), ("sit", "SiT backward")):
        size = 4 * sum(p.numel() for p in getattr(ours.nets, name).parameters())
        seconds = cfg.batch * joint[part] / rate
        print(f"{name}: {size / 1e9:.3f} GB of float32 gradients, {part} {seconds * 1e3:.0f} ms at {rate / 1e12:.0f} "
              "TFLOP/s" + "".join(f"; {n} GPUs send {2 * (n - 1) / n * size / 1e9:.2f} GB each, hidden from "
                                  f"{2 * (n - 1) / n * size / 1e9 / seconds:.0f} GB/s" for n in (8, 64)))

def draws_like(ours):
    """Draws of the right shapes, of no particular value."""
    B, device = ours.cfg.batch, ours.device
    eps, noise = (torch.randn(B, *ours.latent, device=device) for _ in range(2))
    drop, flip = torch.rand(2, B, device=device) < 0.1
    return train.Draws(0, torch.rand(B, device=device), eps, noise, drop, flip)

def inputs(ours, step):
    """Random images and labels; moments of a cache first, where there is one."""
    B, R, device = ours.cfg.batch, ours.cfg.resolution, ours.device
    image = torch.randint(0, 256, (B, 3, R, R), dtype=torch.uint8, device=device)
    moments = torch.rand(B, 2, *ours.latent, device=device).half()
    return (moments,) * (step == "frozen_step") + (image, torch.randint(0, 1000, (B,), device=device))

def clock():
    """Seconds; on one CPU thread those that this process computed in, so that other programs count less."""
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()

def turns(count, drain, **functions):
    """Calls the functions in turn -> seconds of each, a list by name. So a busy machine is busy for all of them."""
    seconds = {name: [] for name in functions}
    for _ in range(count):
        for name, function in functions.items():
            drain()
            begin = clock()
            function()
            drain()
            seconds[name].append(clock() - begin)
    return seconds

def matmul_rate(drain):
    """FLOP/s of a large bfloat16 product."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / min(turns(20, drain, product=lambda: a @ a)["product"])

def bench_step(cfg, device, step, name, checkout):
    """Our step, beside the peer's if there is a checkout; then ours by parts."""
    cuda = device.type == "cuda"
    drain = torch.cuda.synchronize if cuda else lambda: None
    flops, ours = counted(cfg, step), Ours(cfg, device)
    args, number = inputs(ours, step), itertools.count()
    calls = {"ours": lambda: getattr(ours, step)(*args, ours.draws(next(number)))}
    warm_up, n = (3, 20) if cuda else (2, 12) if cfg.resolution <= 64 else (1, 3)
    if checkout:
        peer = Peer(checkout, ours)
        calls["peer"] = lambda: getattr(peer, step)(*args)
        if not cuda:
            print(f"{name}: largest relative difference of a loss from the peer's, equal weights and draws: "
                  f"{largest_difference(ours, peer, step, args):.1e}")
    turns(warm_up, drain, ours=calls["ours"])
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    turns(warm_up, drain, **calls)
    seconds = turns(n, drain, **calls)
    whole = {side: statistics.median(values) for side, values in seconds.items()}
    for side, values in seconds.items():
        print(f"{name}, {side}: {whole[side] * 1e3:.1f} ms (best {min(values) * 1e3:.1f}), "
              f"{cfg.batch / whole[side]:.2f} images/s")
    if checkout:
        print(f"{name}: {whole['peer'] / whole['ours']:.2f} times as fast as the peer "
              f"(best turns: {min(seconds['peer']) / min(seconds['ours']):.2f})")
    total = sum(flops.values()) * cfg.batch
    print(f"{name}: {total / whole['ours'] / 1e12:.3f} TFLOP/s at {total / cfg.batch / 1e9:.1f} GFLOP an image", end="")
    if cuda:
        rate = matmul_rate(drain)
        print(f", {100 * total / whole['ours'] / rate:.1f}% of bf16 matmul's {rate / 1e12:.0f} TFLOP/s", end="")
    print(f"; peak memory {peak / 2**30:.2f} GiB" + (", the peer's beside ours" if checkout else ""))
    ms = defaultdict(float)

    @contextmanager
    def part(name):
        drain()
        begin = clock()
        yield
        drain()
        ms[name] += (clock() - begin) * 1e3 / n
    turns(n, drain, ours=lambda: getattr(ours, step)(*args, ours.draws(next(number)), part))
    for name, value in ms.items():
        print(f"  {name:20s} {value:9.1f} ms {100 * value / sum(ms.values()):5.1f}% "
              f"{flops[name] / 1e9:9.1f} GFLOP an image")

def bench_sampling(cfg, device, checkout, steps=10):
    """The paper's SDE sampler with guidance 2.2 on [0, 0.65], images decoded; theirs beside it on the same numbers."""
    drain = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    steps = 50 if device.type == "cuda" else steps
    cfg = replace(cfg, lpips_legacy_range=False)
    ours = Ours(cfg, device)
    peer = Peer(checkout, ours) if checkout else None
    sit = ours.nets.sit.requires_grad_(False)
    sit.projectors = torch.nn.ModuleList()          # as load_pipeline does
    rows = []
    hook = sit.x_embedder.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    y, model = torch.randint(0, 1000, (cfg.batch,), device=device), Pipeline(ours.nets.vae, sit, [], {}, 0)
    z = torch.randn(cfg.batch, *ours.latent, device=device)
    for scale, low, high in ((1.0, 0.0, 1.0), (2.2, 0.0, 0.65)):
        rows.clear()
        model.batch(range(cfg.batch), y, steps, "sde", scale, low, high, 0)
        calls = {"ours": lambda: model.batch(range(cfg.batch), y, steps, "sde", scale, low, high, 0)}
        evaluations, text = sum(rows) / cfg.batch, f"guidance {scale} on [{low}, {high}]"
        if peer:
            peer.sit.eval()

            def theirs():
                sampler = peer.samplers.euler_maruyama_sampler
                out = sampler(peer.plain_sit, z, y, steps, False, scale, low, high, cfg.path)
                return out, peer.vae.decode(out.float()).sample
            torch.manual_seed(2)
            with torch.no_grad():
                b = theirs()[0]
                torch.manual_seed(2)
                a = euler_maruyama(guided(sit, y, scale, low, high), z.double(), steps,
                                   lambda: torch.randn_like(z.double()), cfg.path)
            print(f"sampling, {text}: largest difference of a latent {(a - b).abs().max():.1e} of {b.abs().max():.1f}")
            calls["peer"] = torch.no_grad()(theirs)
        seconds = {side: statistics.median(values) for side, values in turns(3, drain, **calls).items()}
        print(f"sampling, {steps} sde steps, {text}: {evaluations:.0f} network evaluations an image; " + ", ".join(
            f"{side} {cfg.batch / value:.3f} images/s" for side, value in seconds.items())
            + (f", ratio {seconds['peer'] / seconds['ours']:.2f}" if peer else ""))
    hook.remove()

def kept_bytes(networks, function):
    """Bytes that autograd keeps for the backward of function(), without the networks' own weights."""
    weights = {p.untyped_storage()._cdata for net in networks for p in net.parameters()}
    sizes, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)            # else its address may be another's
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive.append(function())
    return sum(sizes.values())

@cache
def splitting():
    """torch.compile's own split into forward and backward, which decides what is kept, without code for any device."""
    import torch._inductor.lowering         # decompositions look into it
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    return aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=lambda graph, _: graph,
                        partition_fn=min_cut_rematerialization_partition,
                        decompositions=torch._inductor.decomposition.select_decomp_table())

def split(net):
    net.compile(backend=splitting(), dynamic=False)
    return net

@contextmanager
def as_on_a_gpu():
    """bfloat16 by CUDA's rules, of which a CPU's differ in norms and attention."""
    attention, norms = F.scaled_dot_product_attention, (F.group_norm, F.layer_norm)
    F.scaled_dot_product_attention = lambda q, k, v: (
        torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0])
    F.group_norm, F.layer_norm = (lambda x, *a, norm=norm, **more: norm(x.float(), *a, **more) for norm in norms)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        F.scaled_dot_product_attention, (F.group_norm, F.layer_norm) = attention, norms

def bench_memory(cfg):
    """What a GPU would hold, counted with and without torch.compile. An estimate: gradients in flight, cuDNN's
    workspaces and the allocator's gaps come on top."""
    levels = len(VAES[PUBLISHED.get(cfg.vae, cfg.vae)].ch_mult)
    for title, maybe in (("--compile=0", lambda net: net), ("--compile=1", split)):
        counts = defaultdict(list)      # {part: bytes of 1 and of 2 images}
        for B in (1, 2):
            fake = FakeTensorMode(allow_non_fake_inputs=True)
            ours = Ours(replace(cfg, compile="0"), torch.device("cpu"), fake)
            sit, disc = ours.nets.sit, ours.nets.disc
            judges = [maybe(net) for net in (ours.nets.lpips, disc) if net]
            for block in sit.blocks:
                maybe(block)
            with fake:
                x = torch.rand(B, 3, cfg.resolution, cfg.resolution)
                z, noise = (torch.rand(B, *ours.latent) for _ in range(2))
                t, y, rec = torch.rand(B), torch.zeros(B, dtype=torch.long), x.clone().requires_grad_()
                with train.frozen(disc):
                    counts["LPIPS and D's share"].append(kept_bytes(
                        judges, lambda: [net(rec) if net is disc else net(x, rec) for net in judges]))
                with as_on_a_gpu():
                    counts["SiT step"].append(kept_bytes([sit], lambda: sit(z, t, y)))
                    for n in range(levels + 1):
                        torch._dynamo.reset()           # lest it gives up after so many variants
                        vae = VAE(ours.nets.vae.cfg)
                        for level in [*vae.encoder.down[:n], *vae.decoder.up[:n]]:
                            level.recompute = True
                        counts[f"VAE, --recompute={n}"].append(kept_bytes([vae], lambda: maybe(vae)(x, noise)))
                    block = maybe(VAE(ours.nets.vae.cfg).encoder.down[0].block[0])
                    h = torch.rand(B, vae.cfg.ch, *x.shape[2:], requires_grad=True, dtype=torch.bfloat16)
                    counts["one block, computed again"].append(kept_bytes([block], lambda: block(h)))
                    with train.frozen(sit):
                        z.requires_grad_()
                        counts["alignment pass"].append(kept_bytes(
                            [sit], lambda: sit(z, t, y, depth=sit.cfg.align_depth)))
        image = {name: two - one for name, (one, two) in counts.items()}
        fixed = {name: one - image[name] for name, (one, _) in counts.items()}
        for name in counts:
            print(f"{title}, kept for the backward, {name:28s} {image[name] / 2**20:8.1f} MiB an image + "
                  f"{fixed[name] / 2**20:.1f} MiB")
        numbers = {name: sum(p.numel() for p in getattr(ours.nets, name).parameters()) for name in ("vae", "disc", "sit")}
        frozen = sum(p.numel() for net in (ours.nets.teacher, ours.nets.lpips) if net for p in net.parameters())
        state = 4 * (3 * sum(numbers.values()) + numbers["sit"] + frozen)       # weights, AdamW's two, EMA
        for n in range(levels + 1):
            joint = [f"VAE, --recompute={n}", "LPIPS and D's share", "alignment pass"]
            joint += ["one block, computed again"] * (n > 0)
            vae_step = sum(cfg.batch * image[name] + fixed[name] for name in joint) + 4 * numbers["vae"]
            sit_step = cfg.batch * image["SiT step"] + fixed["SiT step"] + 4 * sum(numbers.values())
            print(f"{title} --recompute={n}, {cfg.batch} images: weights, AdamW, EMA {state / 2**30:.1f} GiB + the "
                  f"larger of the VAE step's {vae_step / 2**30:.1f} and the SiT step's {sit_step / 2**30:.1f} GiB = "
                  f"{(state + max(vae_step, sit_step)) / 2**30:.1f} GiB")

def bench_traffic(cfg):
    """Bytes that torch.compile's kernels for the VAE read and write, forward and backward, by its own count of what it
    fused for a CPU in bfloat16, at a quarter of the resolution; a GPU's kernels differ in detail. Some minutes."""
    from torch._inductor import compile_fx, config, metrics
    config.force_disable_caches = True                              # else the count is not made
    compile_fx.inductor_metrics_log.setLevel("INFO")
    compile_fx.inductor_metrics_log.addFilter(lambda record: False)
    attention, side, counts = F.scaled_dot_product_attention, cfg.resolution // 4, []
    for B in (1, 2):
        torch._dynamo.reset()
        metrics.reset()
        vae = VAE(VAES[PUBLISHED.get(cfg.vae, cfg.vae)]).to(memory_format=torch.channels_last)
        latent = side // vae.cfg.downsampling
        with as_on_a_gpu():
            F.scaled_dot_product_attention = attention              # the other one has no CPU kernel
            z, rec, _, _ = torch.compile(vae, dynamic=False)(
                torch.rand(B, 3, side, side), torch.rand(B, vae.cfg.z_channels, latent, latent))
        forward = metrics.num_bytes_accessed
        (z.sum() + rec.sum()).backward()
        counts.append((forward, metrics.num_bytes_accessed - forward))
    forward, backward = (16 * (two - one) / 1e9 for one, two in zip(*counts))
    print(f"compiled VAE at {cfg.resolution} px, read and written for an image: forward {forward:.1f} GB, backward "
          f"{backward:.1f} GB")

# ----------------------------------------------------------------------------------- Evaluation and data.

def evaluation():
    """Inception's features beside torch-fidelity's on the same random weights, in turns; metrics of N = 50,000."""
    import tempfile

    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    import evaluate as ev
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    drain = torch.cuda.synchronize if cuda else lambda: None
    file = tempfile.NamedTemporaryFile(suffix=".pth")
    torch.save(ev.Inception().state_dict(), file.name)
    ours = ev.load_inception(file.name).to(device)

    def memory():
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    print(f"memory of the process with Inception: {memory()}")
    fake, real = torch.rand(50_000, 2048).square_().to(device), torch.rand(10_000, 2048).square_().to(device)
    moments, stats, timed = [ev.Moments(2048, device), ev.Moments(2048, device)], [], {}

    def timing(name, what):
        drain()
        begin = time.perf_counter()
        result = what()
        drain()
        timed[name] = time.perf_counter() - begin
        return result
    timing("moments", lambda: [m.update(part) for m, rows in zip(moments, (fake, real)) for part in rows.split(64)])
    stats = [value for m in moments for value in m.result()]
    timing("FID", lambda: ev.frechet(*stats))
    timing("IS", lambda: ev.inception_score(ours.logits(fake)))
    timing("precision, recall", lambda: ev.precision_recall(real, fake))
    print("metrics of 50,000 against 10,000: " + ", ".join(f"{name} {value:.1f} s" for name, value in timed.items()))
    print(f"peak memory of the process: {memory()}")
    theirs = FeatureExtractorInceptionV3("bench", ["2048"], file.name).to(device)
    for size in (32, 256, 299):
        x = torch.randint(0, 256, (16, 3, size, size), dtype=torch.uint8, device=device)
        seconds = {"ours": [], "torch-fidelity": []}
        for turn in range(6):
            for name, net in (("ours", ours), ("torch-fidelity", theirs)):
                drain()
                begin = time.perf_counter()
                with torch.no_grad():
                    net(x)
                drain()
                seconds[name].append(time.perf_counter() - begin)
        best = {name: 16 / min(times[1:]) for name, times in seconds.items()}
        print(f"features at {size:3d} px: {best['ours']:.1f} images/s, torch-fidelity {best['torch-fidelity']:.1f}, "
              f"ratio {best['ours'] / best['torch-fidelity']:.2f}")

def data():
    """Images/s from 640 JPEGs of 500 x 375 px, cropped to 256, and from their pack, on one core and with workers."""
    import os
    import tempfile

    import numpy as np
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(640):
            path = Path(folder) / "tree" / f"{i % 10}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))     # smooth, as photographs are
            small.resize((500, 375), Image.BICUBIC).save(path, quality=90)
        begin = time.perf_counter()
        train.pack(f"{folder}/tree", f"{folder}/packed", 256)
        print(f"pack: {640 / (time.perf_counter() - begin):.0f} images/s on {os.cpu_count()} cores")
        for name in ("tree", "packed"):
            images = open_images(f"{folder}/{name}", 256)
            for workers in (0, 2):
                order = [list(range(i, i + 32)) for i in range(0, 640, 32)] * (10 if name == "packed" else 1)
                loader = torch.utils.data.DataLoader(images, batch_sampler=order, num_workers=workers,
                                                     collate_fn=collate)
                begin = time.perf_counter()
                count = sum(len(x) for x, _ in loader)
                print(f"{name}, {workers} workers: {count / (time.perf_counter() - begin):.0f} images/s")

def main():
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    options = [word for word in sys.argv[1:] if word.startswith("--")]
    checkout = next((word.partition("=")[2] for word in options if word.startswith("--peer=")), None)
    if wrong := set(words) - set("step frozen sampling count memory traffic evaluation data".split()):
        sys.exit(f"unknown {' '.join(wrong)}: see the head of this file")
    cfg = parse(train.Config, [word for word in options if not word.startswith("--peer=")], train.PRESETS)
    cfg.batch = min(cfg.batch, cfg.micro_batch)     # one micro-batch: what a device has at a time
    cfg.lpips_legacy_range = bool(checkout)         # theirs: equal numbers
    _, _, device = init_distributed()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {cfg.sit}, VAE {cfg.vae}, {cfg.resolution} px, batch {cfg.batch}")
    for word in words or ["step"]:
        if word in ("step", "frozen"):
            bench_step(cfg, device, {"step": "step", "frozen": "frozen_step"}[word], word, checkout)
        elif word == "sampling":
            bench_sampling(cfg, device, checkout)
        elif word in ("count", "memory", "traffic"):
            {"count": bench_count, "memory": bench_memory, "traffic": bench_traffic}[word](cfg)
        else:
            {"evaluation": evaluation, "data": data}[word]()

if __name__ == "__main__":
    main()
