"""How good are the images? Metrics of samples, reconstructions and latents.

    python evaluate.py gen runs/tiny --ref=tiny               # samples on the fly: a table, a JSON by the checkpoint
    torchrun --nproc_per_node=8 evaluate.py gen runs/repa-e --ref=VIRTUAL_imagenet256_labeled.npz --guidance=1,2.2
    python evaluate.py gen samples.npz --ref=REF.npz          # or a folder of images
    python evaluate.py ref imagenet/train --out=REF.npz       # a reference of your own
    python evaluate.py recon runs/tiny tiny                   # the VAE, on held-out images
    python evaluate.py align runs/tiny tiny                   # SiT's features and the latents beside the teacher's

Definitions are those of OpenAI's guided-diffusion evaluator (ADM), which papers report; ranks and batches do not change
the numbers. FID: Fréchet distance of pooled features, 50k samples against the training set (rFID: reconstructions;
FD-dinov2, FD-tiny: other features). sFID: of 7 channels of an inner 17x17 map. IS, precision, recall: see below.
N images, B in a batch, R their side; D features, their mean mu [D] and covariance sigma [D, D].
"""
import functools
import hashlib
import itertools
import json
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models import inception as tv
from tqdm import tqdm

import sample
from repa import DINOv2, cknna, fit, load_teacher, trained_once
from sample import autocast, cast, choose_label, friendly, load_model, parse, rank0_first
from sit import interpolate
from vae import (Folder, Packed, Perceptual, Shapes, find_checkpoint, grid, load_vae, misfits, one_line,
                 open_images, principal_colours, read_weights, reading, save_png, to_float, to_uint8, write_npz)

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")    # torch-fidelity's file has the same names and content
HELD_OUT = 9_000_000    # the tiny world's images from here on: nothing is trained on them

@contextmanager
def full_float32():
    """True float32, whatever sampling chose: TF32 keeps 10 bits, and distances, differences of large numbers, fewer."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)

class Inception(tv.Inception3):
    """The network of 2015-12-05 that defines FID: torchvision's blocks, TensorFlow's poolings, 1008 classes."""
    name, metric, dim = "inception", "FID", 2048
    def __init__(self):
        super().__init__(1008, aux_logits=False, init_weights=False)
        def pool(branch, args):         # torchvision counts the padding; Mixed_7c's maximum is a slip of the original
            if branch is self.Mixed_7c.branch_pool:
                return F.max_pool2d(branch.x, 3, stride=1, padding=1)
            return F.avg_pool2d(branch.x, 3, stride=1, padding=1, count_include_pad=False)
        for block in self.children():
            if hasattr(block, "branch_pool"):
                block.register_forward_pre_hook(lambda block, args: setattr(block.branch_pool, "x", args[0]))
                block.branch_pool.register_forward_pre_hook(pool)
    @full_float32()
    def forward(self, images):
        """uint8 [B, 3, R, R] -> pool features [B, 2048] (FID, IS, precision, recall), spatial [B, 2023] (sFID)."""
        x = ((resize_tf1(images.float(), 299) - 128) / 128).contiguous(memory_format=torch.channels_last)
        for name, block in list(self.named_children())[:-3]:        # in order; avgpool, dropout and fc come last
            x = block(x)
            if name == "Mixed_6d":  # its first branch is TensorFlow's mixed_6/conv; H, W, C order as in ADM's mu_s
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)   # [B, 17 * 17 * 7]
        return x.mean((2, 3)), spatial
    @full_float32()
    def logits(self, pool):
        """[N, 2048] -> [N, 1008] without the bias, as the Inception Score has always been computed."""
        return pool @ self.fc.weight.T

def resize_tf1(x, size):
    """[B, C, H, W] -> [B, C, size, size] as TensorFlow 1 did: bilinear at src = dst * (in / out), no antialiasing."""
    def matrix(n):
        src = torch.arange(size, dtype=torch.float32) * (n / size)  # the ratio is rounded to float32, as in TF
        low = src.long()
        high, w = (low + 1).clamp(max=n - 1), (src - low)[:, None]
        return (F.one_hot(low, n) * (1 - w) + F.one_hot(high, n) * w).to(x)             # [size, n]
    return matrix(x.shape[2]) @ x @ matrix(x.shape[3]).T

def load_inception(path=""):
    """The network with its weights, from a local file or the internet, on the CPU."""
    net, cached = Inception(), Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(INCEPTION_URL)
    try:
        if not path and cached.exists():    # torch.hub compares the hash in the name only when it downloads
            if not hashlib.sha256(cached.read_bytes()).hexdigest().startswith(cached.stem[-8:]):
                raise ValueError(f"{cached} is damaged, its hash differs: remove it")
        state = read_weights(path) if path else torch.hub.load_state_dict_from_url(
            INCEPTION_URL, map_location="cpu", check_hash=True, weights_only=True)
        if wrong := misfits(net.state_dict(), state):
            raise ValueError(wrong[0])
        net.load_state_dict(state)
    except Exception as error:              # a damaged file may lead its reader anywhere
        raise ValueError(f"no FID Inception in {path or 'the internet'} ({one_line(error)}): expected the file of "
                         f"{INCEPTION_URL}; offline: --weights=FILE") from error
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)

class Moments:
    """Mean and covariance of rows that arrive in batches on any number of ranks, and are not kept."""
    def __init__(self, dim, device="cpu"):
        self.sums = torch.zeros(1 + dim, 1 + dim, dtype=torch.float64, device=device)   # of (1, x) (1, x)^T
    def update(self, rows):             # [B, D]
        rows = F.pad(rows.double(), (1, 0), value=1)
        self.sums.addmm_(rows.T, rows)
    def result(self):
        """-> mu [D], sigma [D, D] (N - 1 in the denominator), float64 on the CPU, the same on all ranks."""
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        n, mu = sums[0, 0].cpu(), sums[0, 1:].cpu() / sums[0, 0].cpu()
        return mu, (sums[1:, 1:].cpu() - n * mu.outer(mu)) / (n - 1)

def frechet(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr (S1 S2)^1/2. With S = A A^T the last trace is the sum of singular values
    of A1^T A2: no general matrix root, symmetric, and stable for singular covariances, whose null space is dropped."""
    device = "cuda" if torch.cuda.is_available() else "cpu"     # the decompositions take a minute on one CPU thread
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a, device=device).double() for a in (mu1, sigma1, mu2, sigma2))
    def factor(sigma):
        values, vectors = torch.linalg.eigh(sigma)                                  # ascending
        keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps    # the rest is rounding
        return vectors[:, keep] * values[keep].sqrt()                               # A [D, rank]
    root = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root)

def inception_score(logits, split_size=5000):
    """Mean over splits of exp(E_x KL(p(y|x) || p(y))). logits [N, classes] in file order. It depends on N."""
    scores = []
    for part in logits.split(split_size):
        log_p = part.double().log_softmax(1)                    # ln p(y|x)
        log_q = log_p.logsumexp(0) - math.log(len(part))        # ln p(y), finite even where every p underflows to 0
        scores.append((log_p.exp() * (log_p - log_q)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())

@full_float32()
def precision_recall(real, fake, k=3):
    """Precision: share of fake rows inside a ball of real; recall: share of real rows inside a ball of fake. A row's
    ball reaches to its k-th nearest neighbour in its own set (Kynkaanniemi et al. 2019). real [M, D], fake [N, D]."""
    real, fake = real - real.mean(0), fake - real.mean(0)     # the same distances of shorter vectors: less cancellation
    def inside(a, b):           # share of a's rows in a ball of b, a few rows at a time; the nearest is the row itself
        few = max(1, 2 ** 24 // len(b))
        radii = torch.cat([torch.cdist(x, b).topk(k + 1, largest=False).values[:, -1] for x in b.split(few)])
        return torch.cat([(torch.cdist(x, b) <= radii).any(1) for x in a.split(few)]).double().mean().item()
    return inside(fake, real), inside(real, fake)

def psnr(a, b):
    """10 log10(255^2 / mean squared error) of uint8 [B, 3, H, W]; infinite for equal images."""
    return 10 * (255 ** 2 / (a.double() - b.double()).square().mean((1, 2, 3))).log10()

def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of uint8 [B, 3, H, W], at least 11x11: Gaussian window of 11x11, sigma
    1.5, wholly inside the image, biased moments, C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2, mean over channels."""
    g = torch.exp(-(torch.arange(11, dtype=torch.float64, device=a.device) - 5) ** 2 / (2 * 1.5 ** 2))
    g, a, b = (g / g.sum()).expand(3, 1, 1, 11), a.double(), b.double()
    ma, mb, aa, bb, ab = (F.conv2d(F.conv2d(v, g, groups=3), g.mT, groups=3) for v in (a, b, a * a, b * b, a * b))
    va, vb, vab = aa - ma * ma, bb - mb * mb, ab - ma * mb                      # each [B, 3, H - 10, W - 10]
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * ma * mb + c1) * (2 * vab + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))).mean((1, 2, 3))

def monitors(z):
    """Latents [B, C, h, w] -> [B, 2]: variance over positions, and total variation (the sum of |difference| of
    horizontal and vertical neighbours), means over channels. 0 where latents collapse; compare equal sizes only."""
    variation = z.double().diff(dim=2).abs().sum((2, 3)) + z.double().diff(dim=3).abs().sum((2, 3))
    return torch.stack([z.double().var((2, 3), correction=0), variation]).mean(2).T

class Judge(nn.Module):
    """The tiny world's network: uint8 [B, 3, R, R] -> [B, 128], alone. A classifier of its shapes that shares nothing
    with the teacher (other layers, seed and images), lest samples be judged by what they were trained to imitate."""
    name, metric, dim = "tiny", "FD-tiny", 128
    def __init__(self):
        super().__init__()
        layers = ((3, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1))   # in, out, stride
        self.net = nn.Sequential(*(nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(8, b), nn.GELU())
                                   for a, b, stride in layers))
        self.head = nn.Linear(self.dim, len(Shapes.classes))
    def forward(self, images):
        return (self.net(to_float(images)).mean((2, 3)),)

def load_judge(resolution, steps=800):
    """From torch.hub's cache, or trained for it, about a minute on a CPU: it names over 99% of new images rightly."""
    data = Shapes(resolution, first=5_000_000)                      # used nowhere else
    def train(net):
        def loss(indices):
            images, labels = data[indices]
            return F.cross_entropy(net.head(net(images)[0]), labels)
        fit(net, loss, "training the judge", steps)
    return trained_once("tiny-judge", Judge, 1234, data.draw, train, steps)[0].requires_grad_(False)

class ClassToken(nn.Module):
    """DINOv2 ViT-L/14's class token (Stein et al., 2306.04675): uint8 [B, 3, R, R] -> [B, 1024], alone."""
    name, metric, dim = "dinov2", "FD-dinov2", 1024
    def __init__(self, repo="", weights=""):
        super().__init__()
        self.teacher = DINOv2("dinov2_vitl14", 37, repo, weights)      # its own table, which it resamples itself
    @full_float32()
    def forward(self, images):
        for size in ((images.shape[2], 224), (224, 224)):           # PIL's resize: columns, then rows, each to uint8
            images = F.interpolate(images.float(), size, mode="bicubic", antialias=True).round().clamp(0, 255)
        x = (images / 255 - self.teacher.mean) / self.teacher.std
        return (self.teacher.net.forward_features(x)["x_norm_clstoken"],)

def load_network(opt, tiny, resolution, device):
    """The feature network of --features; by default the judge in the tiny world, Inception elsewhere."""
    with rank0_first():
        net = {"tiny": lambda: load_judge(resolution), "inception": lambda: load_inception(opt.weights),
               "dinov2": lambda: ClassToken(opt.repo, opt.weights)}[opt.features or ("tiny" if tiny else "inception")]()
    return net.to(device)

# --------------- Sets of images: len(), .resolution R, .classes, and data[[i, ...]] -> uint8 [B, 3, R, R], labels [B].

class Generated:
    """A model's images, each made when it is asked for; how: the arguments of Model.batch."""
    def __init__(self, model, protocol, how):
        self.model, self.protocol, self.how, self.classes = model, protocol, how, model.classes
        self.resolution = model.sit.cfg.size * model.vae.cfg.downsampling
    def __getitem__(self, indices):
        labels = [choose_label(self.protocol, self.how["seed"], i, len(self.classes)) for i in indices]
        return self.model.batch(indices, labels, **self.how), torch.tensor(labels)

def open_data(path, resolution, count=0):
    """tiny (held-out images), an .npz or a folder -> at least count of its images (resolution: see open_images)."""
    data = Shapes(resolution or 32, 10_000, HELD_OUT) if path == "tiny" else open_images(path, resolution)
    if len(data) < count:
        raise ValueError(f"{path} holds {len(data)} images, expected at least {count}")
    return data

def ranks():                    # -> this process's rank, how many there are
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

@torch.no_grad()
def gather(data, n, batch, title, device, of_batch):
    """of_batch(indices, images [B, 3, R, R], labels [B]) -> rows to keep [B, K], features [B, D]..., for the first n
    images, shared out to the ranks -> rows, float32 [n, K] in the images' order, mu, sigma of each kind of features."""
    rank, world = ranks()
    if n < max(2, world):
        raise ValueError(f"{n} images are too few (for {world} processes)")
    shares, rows = [range(i, min(i + batch * world, n), world) for i in range(rank, n, batch * world)], None
    workers = min(8, os.cpu_count()) if isinstance(data, Folder) else 0         # processes that decode files ahead
    loader = torch.utils.data.DataLoader(data, batch_size=None, sampler=shares, num_workers=workers)
    for share, (images, labels) in zip(tqdm(shares, title, leave=False, disable=rank > 0), loader):
        kept, *features = of_batch(share, images.to(device), labels.to(device))
        if rows is None:
            rows = torch.zeros(n, kept.shape[1], device=device)
            moments = [Moments(x.shape[1], device) for x in features]
        rows[list(share)] = kept.float()
        for m, x in zip(moments, features):
            m.update(x)
    if world > 1:
        dist.all_reduce(rows)               # every row is 0 but on one rank
    return rows, *(value for m in moments for value in m.result())

def collect(data, n, net, batch, title, keep=True):
    """The first n images -> n, mu, sigma, Inception's mu_s, sigma_s, the judge's labels [N]; to keep: rows [N, D]."""
    @full_float32()
    def one_batch(indices, images, labels):
        features = net(images)
        return torch.cat([labels[:, None], features[0] if keep else features[0][:, :0]], 1), *features
    rows, *moments = gather(data, n, batch, title, next(net.parameters()).device, one_batch)
    stats = {"n": n, "rows": rows[:, 1:], **dict(zip(("mu", "sigma", "mu_s", "sigma_s"), moments))}
    if isinstance(net, Judge) and data.classes == Shapes.classes:
        stats["labels"] = rows[:, 0]
    return stats

def load_reference(path, net, resolution, batch):
    """tiny, or an .npz -> its statistics under this network: those that the file states (ADM's do, of more images than
    they hold), else those of its images. Whatever can be wrong with it is said here, before hours of sampling."""
    if path == "tiny":                      # its images never change, the judge's weights may
        weights = b"".join(t.cpu().numpy().tobytes() for t in net.state_dict().values())
        data = open_data(path, resolution)
        return collect(data, len(data), net, batch, "reference") | {"sha256": hashlib.sha256(weights).hexdigest()}
    images = Packed(path)
    held = images.held
    D, S = (np.size(held.get(name, ())) for name in ("mu", "mu_s"))                     # 2048, 2023
    forms = {"mu": torch.empty(D), "sigma": torch.empty(D, D), "mu_s": torch.empty(S), "sigma_s": torch.empty(S, S),
             "n": torch.tensor(2)}
    stats = {name: held[name] for name in forms if name in held} if "mu" in held else {}
    with reading(path, "reference"):
        if wrong := misfits(forms, {name: torch.as_tensor(value) for name, value in stats.items()}):
            raise ValueError(wrong[0])
    maker, width = str(held.get("network", "inception")), len(stats.get("mu", ()))      # ADM's files don't name it
    if stats and (maker, width) != (net.name, net.dim):
        raise ValueError(f"{path} was made with {maker} features [{width}], not {net.name} [{net.dim}]: "
                         f"use --features={maker}, or make another reference (evaluate.py ref)")
    if ("sigma" not in stats or stats.get("n", 2) < 2) if stats else len(images) < 2:
        raise ValueError(f"{path} holds fewer than 2 images (arr_0), or statistics (mu, sigma) of fewer")
    if len(images):
        if images.resolution != resolution:
            raise ValueError(f"{path} holds images of {images.resolution} px, the samples have {resolution}")
        own = collect(images, len(images), net, batch, "reference")
        stats = {"rows": own["rows"], **stats} if stats else own
    with open(path, "rb") as file:
        return stats | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}

def compare(fake, real, net):
    """Two sets' statistics -> the metrics that they allow, by name."""
    values = {net.metric: frechet(fake["mu"], fake["sigma"], real["mu"], real["sigma"])}
    if "mu_s" in fake and "mu_s" in real:
        values["sFID"] = frechet(fake["mu_s"], fake["sigma_s"], real["mu_s"], real["sigma_s"])
    if isinstance(net, Inception):
        values["IS"] = inception_score(net.logits(fake["rows"]))
    if min(len(fake["rows"]), len(real.get("rows", ()))) > 3:
        values["precision"], values["recall"] = precision_recall(real["rows"], fake["rows"])
    if "labels" in fake:
        values["accuracy"] = (net.head(fake["rows"]).argmax(1) == fake["labels"]).double().mean().item()
    return values

def report(stem, command, values, settings, usual, header=True):
    """A line of a table, above it what all its lines share, below it values that are lists; an entry of a JSON."""
    if ranks()[0] > 0:
        return
    varies = ("step", "guidance", "low", "high")
    lists = {name: value for name, value in values.items() if isinstance(value, list)}
    line = {name: f"{value:.4f}" if isinstance(value, float) else str(value) for name, value in
            {**settings, **values}.items() if name in (*varies, *values) and name not in lists}
    widths = [max(len(name) + 2, 12) for name in line]
    if header:
        print("  ".join(f"{name}: {value}" for name, value in settings.items() if name not in varies))
        if settings["N"] < usual:
            print(f"warning: N = {settings['N']:,} is few: use {usual:,}, or compare with values of the same N only")
        print("".join(map(str.rjust, line, widths)))
    print("".join(map(str.rjust, line.values(), widths)), flush=True)
    for name, value in lists.items():
        print(f"{name}: " + " ".join(f"{v:.3f}" for v in value))
    path = Path(f"{str(stem).removesuffix('.pt').removesuffix('.npz')}.{command}.json")
    earlier = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*earlier, {"values": values, **settings}], indent=1))

@dataclass
class Options:
    command: Literal["gen", "recon", "align", "ref"]
    path: str = ""              # a checkpoint or a run's folder; gen: or samples (.npz, folder); ref: the images
    data: str = ""              # recon, align: held-out images: tiny, an .npz, a folder of images or of class folders
    count: int = 0              # how many images; 0: 50,000 (align: 10,000; tiny: 1,000), of given samples all
    features: Literal["", "inception", "dinov2", "tiny"] = ""   # default: tiny in the tiny world, else inception
    weights: str = ""           # a local file of that network's weights
    repo: str = ""              # a local clone of facebookresearch/dinov2
    resolution: int = 0         # ref, recon: side to which a folder's images are cropped; 0: 256
    batch: int = 64             # images at a time on each process
    seed: int = 0
    out: str = ""               # ref: the .npz to write
    ref: str = ""               # gen: the reference, an .npz (ADM's or evaluate.py ref's) or tiny
    vae: str = ""               # gen, align: the VAE of a checkpoint that holds none
    curve: bool = False         # gen: all checkpoints of the run's folder
    solver: Literal["", *sample.SOLVERS] = ""       # gen: as in sample.py; default sde (tiny: ab2)
    steps: int = 0              # gen: default 250 (tiny: 50)
    guidance: str = "1"         # a scale; a list is a sweep: 1,1.5,2
    interval: str = "0:1"       # guidance where low <= t <= high; a list is a sweep: 0:1,0.1:0.8
    labels: Literal["random", "balanced"] = "random"    # balanced: each class equally often

def sweep(opt, solver, steps):
    """-> arguments of Model.batch: every scale in every interval, but one where a scale <= 1 switches guidance off."""
    settings = []
    for text, interval in itertools.product(opt.guidance.split(","), opt.interval.split(",")):
        scale = cast("guidance", text, float)
        low, _, high = (interval if scale > 1 else "0:1").partition(":")
        how = dict(solver=opt.solver or solver, steps=opt.steps or steps, guidance=scale, seed=opt.seed,
                   low=cast("interval", low, float), high=cast("interval", high, float))
        sample.check(sample.Options(opt.path, labels=opt.labels, batch=opt.batch, **how))
        settings += [how] if how not in settings else []
    return settings

def gen(opt, device):
    """Metrics of a model's images, or of images in a file or folder, against a reference."""
    path, load = Path(opt.path), functools.lru_cache(1)(lambda file: load_model(file, device, opt.vae))
    files = [path] if path.suffix in (".pt", ".pth") else sorted(path.glob("step_???????.pt"))
    files = (files or sorted(path.glob("state*.pt"))[-1:])[0 if opt.curve else -1:]     # state.pt, else .prev
    tiny = "tiny" in (opt.ref, files and load(files[0]).config.get("data"))
    solver, steps, usual = ("ab2", 50, 1000) if tiny else ("sde", 250, 50_000)
    runs = list(itertools.product(files, sweep(opt, solver, steps))) or [(path, None)]
    data = Generated(load(files[0]), opt.labels, {}) if files else open_data(opt.path, 0, opt.count)
    n, net = opt.count or (usual if files else len(data)), load_network(opt, tiny, data.resolution, device)
    real = load_reference(opt.ref, net, data.resolution, opt.batch)
    about = {"N": n, "reference": opt.ref, "sha256": real["sha256"][:12], "features": net.name}
    for file, how in runs:
        if how:
            model = load(file).prepare(n)   # a sweep reads its checkpoint once
            data, about = Generated(model, opt.labels, how), {**about, "step": model.step, "labels": opt.labels, **how}
        values = compare(collect(data, n, net, opt.batch, f"{file} {how or ''}"), real, net)
        report(file, "gen", values, about, usual, header=(file, how) == runs[0])

def make_reference(opt, device):
    """Statistics of all images and 10,000 of the images themselves, spread evenly, in ADM's layout."""
    data = open_data(opt.path, opt.resolution or (0 if opt.path.endswith((".npz", "tiny")) else 256), opt.count)
    n, net = opt.count or len(data), load_network(opt, opt.path == "tiny", data.resolution, device)
    stats = collect(data, n, net, opt.batch, "reference", keep=False)
    if ranks()[0] == 0:
        kept = np.linspace(0, n - 1, min(n, 10_000)).round().astype(int).tolist()
        write_npz(opt.out, (len(kept), data.resolution, data.resolution, 3), (data[[i]][0][0] for i in kept),
                  network=net.name, **{name: value for name, value in stats.items() if name not in ("rows", "labels")})
        print(f"{opt.out}: {net.name} statistics of {n:,} images, {len(kept):,} of the images")

def recon(opt, device):
    """Closeness of held-out images to their reconstructions from the posterior's mean, both as uint8."""
    vae, tiny = load_vae(opt.path)[0].to(device).eval(), opt.data == "tiny"
    data = open_data(opt.data, opt.resolution or (0 if opt.data.endswith((".npz", "tiny")) else 256), opt.count)
    usual, perceptual = 1000 if tiny else 50_000, None
    n, net = opt.count or min(len(data), usual), load_network(opt, tiny, data.resolution, device)
    try:
        with rank0_first():
            perceptual = None if tiny else Perceptual().to(device)              # tiny does without downloads
    except (ValueError, ImportError) as error:
        print(f"note: LPIPS is left out: {error}")
    @full_float32()
    def one_batch(indices, x, labels):      # x uint8 [B, 3, R, R]
        rec = torch.cat([to_uint8(vae.decode(vae.encode(to_float(part))[0])) for part in x.split(sample.DECODED)])
        a, b = to_float(x), to_float(rec)
        features = net(rec)[0], net(x)[0]
        lpips = [perceptual(a, b).expand(len(x))] if perceptual else []
        return torch.stack([psnr(x, rec), ssim(x, rec), (a - b).abs().mean((1, 2, 3)), *lpips], 1), *features
    rows, *moments = gather(data, n, opt.batch, "reconstructions", device, one_batch)
    values = dict(zip(("PSNR", "SSIM", "L1", "LPIPS"), rows.double().mean(0).tolist()))
    values[f"r{net.metric}"] = frechet(*moments)
    stem = find_checkpoint(opt.path) if Path(opt.path).exists() else opt.path.replace("/", "-")
    report(stem, "recon", values, {"N": n, "data": opt.data, "features": net.name}, usual)

def block_features(sit, z_t, t, y):
    """The mean token behind each of SiT's blocks, [B, depth D]."""
    seen = []
    hooks = [block.register_forward_hook(lambda module, args, x: seen.append(x.mean(1))) for block in sit.blocks]
    sit(z_t, t, y)
    for hook in hooks:
        hook.remove()
    return torch.cat(seen, 1)

def align(opt, device):
    """Have images the same neighbours behind SiT's blocks and in the latents as in the teacher? Do latents collapse?"""
    model, file = load_model(opt.path, device, opt.vae), find_checkpoint(opt.path)
    vae, sit, config, cfg = model.vae, model.sit, model.config, model.sit.cfg
    data = open_data(opt.data, cfg.size * vae.cfg.downsampling, opt.count)
    usual, default = (1000, "tiny") if config.get("data") == "tiny" else (10_000, "dinov2_vitb14")
    n, name = opt.count or min(len(data), usual), config.get("teacher", default)
    with rank0_first():
        teacher = load_teacher(name, sit.grid, opt.repo or config.get("teacher_repo", ""), opt.weights or
                               config.get("teacher_weights", ""), Shapes(data.resolution).draw).to(device)
    @full_float32()
    def latents(x):                         # uint8 [B, 3, R, R] -> the posterior's mean [B, C, h, w]
        return torch.cat([vae.encode(to_float(part))[0] for part in x.split(sample.DECODED)])
    def clean(indices, x, labels):          # -> [B, 2 + C h w + d]
        z = latents(x)
        with autocast(device):
            f = teacher(x).float().mean(1)
        return [torch.cat([monitors(z), z.flatten(1), f], 1)]
    def noisy(t, indices, x, labels):       # -> [B, depth D]; the noise of image i depends on the seed and i alone
        generators = [torch.Generator(device).manual_seed(sample.seed_of(opt.seed, "align", i)) for i in indices]
        zn = sit.bn(latents(x))
        eps = torch.stack([torch.randn(zn.shape[1:], generator=g, device=device) for g in generators])
        y = labels if data.classes == model.classes else torch.full_like(labels, cfg.num_classes)
        times = torch.full((len(x),), t, device=device)
        with autocast(device):
            return [block_features(sit, interpolate(zn, eps, times, cfg.path)[0], times, y)]
    rows, = gather(data, n, opt.batch, "latents", device, clean)
    collapse, z, f = rows.tensor_split((2, 2 + cfg.channels * cfg.size ** 2), 1)
    with full_float32():
        variance, variation = collapse.mean(0).tolist()
        values = {"spatial variance": variance, "total variation": variation, "CKNNA of latents": cknna(z, f)}
        for t in (0.0, 0.25, 0.5, 0.75):
            rows, = gather(data, n, opt.batch, f"t = {t}", device, functools.partial(noisy, t))
            values[f"CKNNA of blocks at t = {t}"] = [cknna(h, f) for h in rows.split(cfg.width, 1)]
    if ranks()[0] == 0:                     # images beside their latents' principal components as red, green, blue
        few = z[:16].view(-1, cfg.channels, cfg.size, cfg.size).cpu()
        pairs = torch.stack([data[range(len(few))][0], principal_colours(few, data.resolution)], 1)
        save_png(str(file).removesuffix(".pt") + ".latents.png", grid(pairs.flatten(0, 1), 8))
    report(file, "align", values, {"step": model.step, "N": n, "data": opt.data, "teacher": name, "seed": opt.seed,
                                   "classes given": data.classes == model.classes}, usual)

@friendly
def main(argv):
    opt, needs = parse(Options, argv), {"gen": "ref", "ref": "out", "recon": "data", "align": "data"}
    if not opt.path or not getattr(opt, needs[opt.command]):
        raise ValueError(f"evaluate.py {opt.command} needs a path and --{needs[opt.command]}=...")
    if opt.count < 0 or opt.count == 1 or opt.batch < 1:
        raise ValueError("expected --count at least 2, --batch at least 1")
    {"gen": gen, "ref": make_reference, "recon": recon, "align": align}[opt.command](opt, sample.start()[2])

if __name__ == "__main__":
    main()
