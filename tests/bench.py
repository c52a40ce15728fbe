"""Milliseconds of each part of one training step, and images/s, on whatever device there is.

    python tests/bench.py --preset=tiny
    python tests/bench.py --preset=sdvae --batch=32 --compile=1         # random weights of the true shapes, no download
    python tests/bench.py evaluation        # features beside torch-fidelity's in turns, metrics of 50,000 samples
    python tests/bench.py data              # reading images: a folder of JPEGs, and the same packed

Any option of train.py can be given. The parts are train.py's own calls in its order, with the device drained between
them; the whole step is also timed without that, as the loop runs it. The DINOv2 and the VGG16 here are random networks
of the true shape (timm's and lpips').
"""
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402
from repa import DINOv2, TinyTeacher, align_loss, teacher_shape  # noqa: E402
from sample import autocast, parse, start  # noqa: E402
from sit import SiT, SiTConfig, interpolate  # noqa: E402
from vae import (PUBLISHED, VAE, VAES, Discriminator, Perceptual, discriminator_loss, generator_loss,  # noqa: E402
                 kl_divergence, reconstruction_loss, to_float)


def random_teacher(cfg):
    """A teacher of the true shape with random weights."""
    if cfg.teacher == "tiny":
        return TinyTeacher().eval()
    import timm
    size = {"vits14": "small", "vitb14": "base", "vitl14": "large", "vitg14": "giant"}[cfg.teacher.split("_")[1]]
    vit = timm.create_model(f"vit_{size}_patch14_dinov2", img_size=14 * (cfg.resolution // 16), dynamic_img_size=False)
    net = DINOv2.__new__(DINOv2)
    torch.nn.Module.__init__(net)
    net.side, net.net = cfg.resolution // 16, vit
    vit.forward_features_of_timm = vit.forward_features
    vit.forward_features = lambda x: {"x_norm_patchtokens": vit.forward_features_of_timm(x)[:, 1:]}
    net.register_buffer("mean", torch.zeros(3, 1, 1))
    net.register_buffer("std", torch.ones(3, 1, 1))
    return net.eval()


def random_perceptual():
    """LPIPS on a random VGG16."""
    import lpips
    net = Perceptual.__new__(Perceptual)
    torch.nn.Module.__init__(net)
    net.net, net.legacy_range = lpips.LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False), False
    return net.eval()


def bench(cfg, device, steps):
    """-> {part: milliseconds}, milliseconds of a whole step, peak memory in GiB (None on a CPU)."""
    torch.manual_seed(0)
    depth, width, heads, patch, align_depth = train.architecture(cfg)
    vae = VAE(VAES[PUBLISHED.get(cfg.vae, cfg.vae)])
    side = cfg.resolution // vae.cfg.downsampling
    dims = (teacher_shape(cfg.teacher, cfg.resolution)[1],) if cfg.repa_sit else ()
    sit = SiT(SiTConfig(depth, width, heads, patch, vae.cfg.z_channels, side, 1000, dims, align_depth,
                        cfg.projector_width))
    disc, teacher = Discriminator(cfg.disc_ch), random_teacher(cfg).requires_grad_(False)
    perceptual = random_perceptual().requires_grad_(False).to(device) if cfg.lpips else None
    for net in (vae, sit, disc, teacher):
        net.to(device, memory_format=torch.channels_last)
    ema, vae_fast = train.copy.deepcopy(sit).requires_grad_(False), vae
    if cfg.compile == "1" or (cfg.compile == "auto" and device.type == "cuda"):
        vae_fast = torch.compile(vae, dynamic=False)
        for module in [*sit.blocks, disc, teacher, perceptual]:
            if module is not None:
                module.compile(dynamic=False)
    nets = {"vae": vae, "disc": disc, "sit": sit}
    opts = {name: train.make_optimizer(net, 1e-4) for name, net in nets.items()}
    cuda = device.type == "cuda"
    drain = torch.cuda.synchronize if cuda else lambda: None
    image = torch.randint(0, 256, (cfg.batch, 3, cfg.resolution, cfg.resolution), dtype=torch.uint8, device=device)
    y = torch.randint(0, 1000, (cfg.batch,), device=device)
    ms, apart = defaultdict(float), False

    @contextmanager
    def part(name):
        if apart:
            drain()
            begin = time.perf_counter()
        yield
        if apart:
            drain()
            ms[name] += (time.perf_counter() - begin) * 1e3

    def step(n):
        t, eps, noise, drop, _ = train.draws(cfg, n, 0, 1, (vae.cfg.z_channels, side, side), device)
        x = to_float(image)
        with part("teacher"), torch.no_grad(), autocast(device):
            f = [teacher(image)]
        with train.frozen(sit, disc):
            with part("VAE forward"), autocast(device):
                z, rec, mean, logvar = vae_fast(x, noise)
            with part("VAE losses"):
                loss = reconstruction_loss(x, rec, cfg.recon_loss) + cfg.kl * kl_divergence(mean, logvar)
                loss = loss + (cfg.lpips * perceptual(x, rec) if perceptual else 0)
                loss = loss + cfg.gan * generator_loss(disc(rec))
            with part("alignment pass"):
                z_t, _ = interpolate(sit.bn(z), eps, t, cfg.path)
                with autocast(device):
                    h = sit.align_only(z_t, t, y)
                loss = loss + cfg.repa_vae * align_loss(h, f)
            with part("VAE backward"):
                loss.backward()
        with part("discriminator"):
            discriminator_loss(disc(x), disc(rec.detach())).backward()
        with part("SiT forward"):
            z_t, target = interpolate(sit.bn.normalise_batch(z.detach()), eps, t, cfg.path)
            with autocast(device):
                v, h = sit(z_t, t, y, drop)
            loss = F.mse_loss(v.float(), target) + cfg.repa_sit * align_loss(h, f)
        with part("SiT backward"):
            loss.backward()
        with part("clip, check, AdamW"):
            norms = [torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip) for net in nets.values()]
            ok = train.all_finite(*norms)
            for opt in opts.values():
                opt.found_inf = (~ok).float()
                opt.step()
                opt.zero_grad()
            sit.bn.commit(ok)
        with part("EMA"):
            train.ema_update(ema, sit, cfg.ema, ok)

    for n in range(3):
        step(n)
    drain()
    begin = time.perf_counter()
    for n in range(steps):
        step(n)
    drain()
    whole = (time.perf_counter() - begin) * 1e3 / steps
    apart = True
    for n in range(steps):
        step(n)
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return {name: total / steps for name, total in ms.items()}, whole, memory


def evaluation():
    """Inception's features beside torch-fidelity's on the same random weights, in turns; metrics of N = 50,000."""
    import resource
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

    import vae as V
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(640):
            path = Path(folder) / "tree" / f"{i % 10}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))     # smooth, as photographs are
            small.resize((500, 375), Image.BICUBIC).save(path, quality=90)
        begin = time.perf_counter()
        V.pack(f"{folder}/tree", f"{folder}/tree.npz", 256)
        print(f"pack: {640 / (time.perf_counter() - begin):.0f} images/s on {os.cpu_count()} cores")
        for name in ("tree", "tree.npz"):
            images = V.open_images(f"{folder}/{name}", 256)
            for workers in (0, 2):
                order = [list(range(i, i + 32)) for i in range(0, 640, 32)] * (10 if name == "tree.npz" else 1)
                loader = torch.utils.data.DataLoader(images, batch_size=None, sampler=order, num_workers=workers)
                begin = time.perf_counter()
                count = sum(len(x) for x, _ in loader)
                print(f"{name}, {workers} workers: {count / (time.perf_counter() - begin):.0f} images/s")


def main():
    if sys.argv[1:] in (["evaluation"], ["data"]):
        return evaluation() if sys.argv[1] == "evaluation" else data()
    cfg = parse(train.Config, sys.argv[1:], train.PRESETS)
    cfg.batch = min(cfg.batch, cfg.micro_batch)     # one micro-batch: what a device has at a time
    _, _, device = start()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    parts, whole, memory = bench(cfg, device, 10 if device.type == "cuda" or cfg.resolution <= 64 else 2)
    print(f"{name}, torch {torch.__version__}, {cfg.sit}, VAE {cfg.vae}, {cfg.resolution} px, batch {cfg.batch}")
    for part, ms in parts.items():
        print(f"{part:20s} {ms:9.1f} ms  {100 * ms / sum(parts.values()):5.1f}%")
    print(f"{'whole step':20s} {whole:9.1f} ms  {cfg.batch / whole * 1e3:.1f} images/s"
          + (f", peak {memory:.1f} GiB" if memory else ""))


if __name__ == "__main__":
    main()
