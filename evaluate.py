"""How good are the images? Metrics of samples, reconstructions and latents.

    python evaluate.py gen runs/tiny --ref=tiny               # samples on the fly: a table, a JSON
    torchrun --nproc_per_node=8 evaluate.py gen runs/repa-e --ref=VIRTUAL_imagenet256_labeled.npz
    python evaluate.py gen samples.npz --ref=REF.npz          # or a folder of images
    python evaluate.py ref imagenet/train --out=REF.npz       # a reference of your own
    python evaluate.py recon runs/tiny tiny                   # the VAE, on held-out images
    python evaluate.py align runs/tiny tiny                   # SiT and latents beside the teacher

Definitions are those of OpenAI's guided-diffusion evaluator (ADM), which papers report; ranks and
batches do not change the numbers. FID: Fréchet distance of pooled features, 50k samples against the
training set (rFID: reconstructions; FD-dinov2, FD-tiny: other features). sFID: of 7 channels of an
inner 17x17 map. IS, precision, recall: see below.

N images, B in a batch, R their side; D features, their mean mu [D] and covariance sigma [D, D].
"""
import functools
import hashlib
import itertools
import json
import math
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models import inception as tv
from tqdm import tqdm

from repa import DINOv2, fit, load_teacher, trained_once
from sample import (DECODED, SOLVERS, Options, autocast, check, choose_label, find_checkpoint,
                    friendly, generators_of, init_distributed, load_pipeline, load_vae, nearest,
                    parse, rank0_first, save_grid)
from sit import interpolate
from vae import (LPIPS, Folder, Shapes, collate, fetch, load_pt, load_weights, open_images,
                 open_npz, reading, to_float, to_uint8)

HELD_OUT = 9_000_000    # the drawn shapes from here on: nothing is trained on them


# ---- Metrics --------------------------------------------------------------------
# Pure functions of features and images.

@contextmanager
def full_float32():
    """True float32: TF32's mantissa of 10 bits is too coarse for differences of large numbers."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
              torch.autocast("cuda", enabled=False)):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class Moments:
    """Mean and covariance of rows that arrive in batches on any number of ranks, and are not
    kept."""

    def __init__(self, dim, device="cpu"):
        self.sums = torch.zeros(1 + dim, 1 + dim, dtype=torch.float64, device=device)

    def update(self, rows):
        """rows [B, D]: adds (1, x) (1, x)^T of each."""
        rows = F.pad(rows.double(), (1, 0), value=1)
        self.sums.addmm_(rows.T, rows)

    def result(self):
        """-> mu [D], sigma [D, D] (by N - 1), float64 on the CPU, the same on all ranks."""
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        sums = sums.cpu()
        n, mu = sums[0, 0], sums[0, 1:] / sums[0, 0]
        return mu, (sums[1:, 1:] - n * mu.outer(mu)) / (n - 1)


def frechet(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr (S1 S2)^1/2. With S = A A^T the last trace is the sum
    of the singular values of A1^T A2: no general matrix root; null spaces are dropped."""
    device = "cuda" if torch.cuda.is_available() else "cpu"     # a minute on one CPU thread
    mu1, sigma1, mu2, sigma2 = (
        torch.as_tensor(a, device=device).double() for a in (mu1, sigma1, mu2, sigma2))

    def factor(sigma):
        values, vectors = torch.linalg.eigh(sigma)              # ascending
        rounding = values[-1] * len(values) * torch.finfo(values.dtype).eps
        keep = values > rounding
        return vectors[:, keep] * values[keep].sqrt()           # A [D, rank]
    root = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    distance = (mu1 - mu2).square().sum()
    return float(distance + sigma1.trace() + sigma2.trace() - 2 * root)


def inception_score(logits, split_size=5000):
    """Mean over splits of exp(E_x KL(p(y|x) || p(y))); logits [N, classes] in file order."""
    scores = []
    for part in logits.split(split_size):
        log_p = part.double().log_softmax(1)                    # ln p(y|x)
        log_q = log_p.logsumexp(0) - math.log(len(part))        # ln p(y)
        scores.append((log_p.exp() * (log_p - log_q)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


@full_float32()
def precision_recall(real, fake, k=3):
    """Kynkaanniemi et al. 2019: precision is the share of fake rows inside a ball of real; recall
    of real rows inside a ball of fake. A row's ball reaches to its k-th nearest neighbour in its
    own set. real [M, D], fake [N, D]."""
    real, fake = real - real.mean(0), fake - real.mean(0)       # shorter vectors: less cancellation

    def inside(a, b):
        """Share of a's rows in a ball of b, a few rows at a time; the nearest is the row itself."""
        few = max(1, 2**24 // len(b))
        radii = [torch.cdist(x, b).topk(k + 1, largest=False).values[:, -1] for x in b.split(few)]
        radii = torch.cat(radii)
        hits = [(torch.cdist(x, b) <= radii).any(1) for x in a.split(few)]
        return torch.cat(hits).double().mean().item()
    return inside(fake, real), inside(real, fake)


def psnr(a, b):
    """10 log10(255^2 / mean squared error) of uint8 [B, 3, H, W]; infinite for equal images."""
    return 10 * (255**2 / (a.double() - b.double()).square().mean((1, 2, 3))).log10()


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of uint8 [B, 3, H, W], at least 11x11: Gaussian
    window of 11x11, sigma 1.5, inside the image; biased moments, mean over channels."""
    x = torch.arange(11, dtype=torch.float64, device=a.device) - 5
    g = torch.exp(-(x**2) / (2 * 1.5**2))
    g = (g / g.sum()).expand(3, 1, 1, 11)
    a, b = a.double(), b.double()

    def blur(v):
        return F.conv2d(F.conv2d(v, g, groups=3), g.mT, groups=3)       # [B, 3, H - 10, W - 10]
    ma, mb = blur(a), blur(b)
    va, vb, vab = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * ma * mb + c1) * (2 * vab + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return similarity.mean((1, 2, 3))


def monitors(z):
    """Latents [B, C, h, w] -> [B, 2]: variance over positions, and total variation (the sum of
    |difference| of neighbours), means over channels. Both are 0 where latents collapse."""
    z = z.double()
    variation = z.diff(dim=2).abs().sum((2, 3)) + z.diff(dim=3).abs().sum((2, 3))
    return torch.stack([z.var((2, 3), correction=0), variation]).mean(2).T


def cknna(a, b, k=10):
    """Centred kernel nearest-neighbour alignment (Huh et al., 2405.07987, as in REPA): features
    [N, D], [N, d] of the same N images -> 1 for the same neighbourhoods, about 0 for unrelated
    ones.

        K_ij = a_i . a_j, L_ij = b_i . b_j  of unit length, if j is among the k nearest of i in both
        CKNNA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), HSIC unbiased (Song et al. 2012, eq. 5)
    """
    n = len(a)
    if len(b) != n or n <= max(k, 3):
        raise ValueError(f"CKNNA with k = {k} needs {max(k, 3) + 1} images or more, twice the "
                         f"same: {n} and {len(b)}")

    def kernel(x):
        """-> inner products, and whether j is among the k nearest of i: [N, N] each."""
        x = F.normalize(x.float(), dim=1)
        K = (x @ x.T).fill_diagonal_(-math.inf)                 # not the row itself
        near = torch.zeros_like(K, dtype=torch.bool).scatter_(1, K.topk(k, dim=1).indices, True)
        return K.fill_diagonal_(0), near

    def hsic(K, L, near):
        K, L = (K * near).double(), (L * near).double()
        total = K.sum() * L.sum() / ((n - 1) * (n - 2))
        return (K * L.T).sum() + total - 2 * K.sum(0) @ L.sum(1) / (n - 2)
    (K, near_a), (L, near_b) = kernel(a), kernel(b)
    both, aa, bb = hsic(K, L, near_a & near_b), hsic(K, K, near_a), hsic(L, L, near_b)
    return float(both / (aa * bb).sqrt())                       # the factor 1 / (n (n - 3)) cancels


# ---- Feature networks -----------------------------------------------------------
# uint8 [B, 3, R, R] -> features [B, D], and more kinds of features behind them.

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")


class Inception(tv.Inception3):
    """The network of 2015-12-05 that defines FID: torchvision's blocks, TensorFlow's poolings."""
    name, metric, dim = "inception", "FID", 2048

    def __init__(self):
        super().__init__(1008, aux_logits=False, init_weights=False)
        for block in self.children():
            if hasattr(block, "branch_pool"):
                block.register_forward_pre_hook(self.keep_input)
                block.branch_pool.register_forward_pre_hook(functools.partial(self.pool, block))

    @staticmethod
    def keep_input(block, args):
        block.branch_pool.block_input = args[0]

    def pool(self, block, branch, args):
        """torchvision's mean counts the padding; Mixed_7c's maximum is a slip of the original."""
        if block is self.Mixed_7c:
            return F.max_pool2d(branch.block_input, 3, stride=1, padding=1)
        return F.avg_pool2d(branch.block_input, 3, stride=1, padding=1, count_include_pad=False)

    @full_float32()
    def forward(self, images):
        """-> pooled [B, 2048] (FID, IS, precision, recall), spatial [B, 2023] (sFID)."""
        x = (resize_tf1(images.float(), 299) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        for name, block in list(self.named_children())[:-3]:    # avgpool, dropout and fc come last
            x = block(x)
            if name == "Mixed_6d":      # the first branch: TensorFlow's mixed_6/conv, as H W C
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)       # [B, 17 17 7]
        return x.mean((2, 3)), spatial

    @full_float32()
    def logits(self, pooled):
        """[N, 2048] -> [N, 1008] without the bias, as the Inception Score was always computed."""
        return pooled @ self.fc.weight.T


def resize_tf1(x, size):
    """[B, C, H, W] -> [B, C, size, size] as TensorFlow 1 did: bilinear at src = dst (in / out)."""
    def matrix(n):
        src = torch.arange(size, dtype=torch.float32) * (n / size)      # rounded as in TensorFlow
        low = src.long()
        high, w = (low + 1).clamp(max=n - 1), (src - low)[:, None]
        return (F.one_hot(low, n) * (1 - w) + F.one_hot(high, n) * w).to(x)     # [size, n]
    return matrix(x.shape[2]) @ x @ matrix(x.shape[3]).T


def load_inception(weights=""):
    """With its weights, from a local file or the internet, on the CPU."""
    net = Inception()
    cached = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(INCEPTION_URL)
    file = weights or cached
    with reading(file, f"the file of {INCEPTION_URL} (offline: --weights=FILE)"):
        if not weights and not cached.exists():
            torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location="cpu", check_hash=True,
                                               weights_only=True)
        content = Path(file).read_bytes()
        if not weights and not hashlib.sha256(content).hexdigest().startswith(cached.stem[-8:]):
            raise ValueError("its hash differs: remove it")
        load_weights(net, load_pt(file))
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


class TinyClassifier(nn.Module):
    """Of the drawn shapes: features [B, 128], and which shape it is. It shares nothing with the
    teacher (other layers, seed and images), which samples were trained to match."""
    name, metric, dim = "tiny", "FD-tiny", 128

    def __init__(self):
        super().__init__()
        layers = []
        for c_in, c_out, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2),
                                    (128, 128, 1)):
            conv = nn.Conv2d(c_in, c_out, 3, stride, 1)
            layers.append(nn.Sequential(conv, nn.GroupNorm(8, c_out), nn.GELU()))
        self.net = nn.Sequential(*layers)
        self.head = nn.Linear(self.dim, len(Shapes.classes))

    def forward(self, images):
        return (self.net(to_float(images)).mean((2, 3)),)


def load_tiny_classifier(resolution, steps=800):
    """From torch.hub's cache, or trained for it, about a minute: it names over 99% of new
    images."""
    data = Shapes(resolution, first=5_000_000)                  # used nowhere else

    def train(net):
        def loss(indices):
            images, labels = fetch(data, indices)
            return F.cross_entropy(net.head(net(images)[0]), labels)
        fit(net, loss, "training the classifier", steps)
    return trained_once("tiny_classifier", TinyClassifier, 1234, data.draw, train, steps)


class ClassToken(nn.Module):
    """DINOv2 ViT-L/14's class token [B, 1024] (Stein et al., 2306.04675)."""
    name, metric, dim = "dinov2", "FD-dinov2", 1024

    def __init__(self, repo="", weights=""):
        super().__init__()
        self.teacher = DINOv2("dinov2_vitl14", 37, repo, weights)       # its own table

    @full_float32()
    def forward(self, images):
        for size in ((images.shape[2], 224), (224, 224)):       # as PIL: columns, then rows
            images = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
            images = images.round().clamp(0, 255)
        x = (images / 255 - self.teacher.mean) / self.teacher.std
        return (self.teacher.net.forward_features(x)["x_norm_clstoken"],)


FEATURES = {    # name: (resolution, weights, repo) -> network
    "inception": lambda resolution, weights, repo: load_inception(weights),
    "dinov2": lambda resolution, weights, repo: ClassToken(repo, weights),
    "tiny": lambda resolution, weights, repo: load_tiny_classifier(resolution),
}


def load_features(name, tiny, resolution, weights, repo, device):
    """An entry of FEATURES; by default tiny for the drawn shapes, Inception elsewhere."""
    name = name or ("tiny" if tiny else "inception")
    if name not in FEATURES:
        raise ValueError(f"--features={name}{nearest(name, FEATURES)}")
    with rank0_first():
        return FEATURES[name](resolution, weights, repo).to(device)


# ---- Statistics over ranks ------------------------------------------------------

class Generated:
    """A data set of a model's images, each made when it is asked for; how: Pipeline.batch's
    rest."""

    def __init__(self, model, protocol, how):
        self.model, self.protocol, self.how, self.classes = model, protocol, how, model.classes
        self.resolution = model.sit.cfg.size * model.vae.cfg.downsampling

    def __getitems__(self, indices):
        seed, count = self.how["seed"], len(self.classes)
        labels = [choose_label(self.protocol, seed, i, count) for i in indices]
        return self.model.batch(indices, labels, **self.how), torch.tensor(labels)


def open_data(path, resolution, count=0):
    """tiny (held-out images), an .npz, a pack or a folder -> at least count of its images."""
    if path == "tiny":
        data = Shapes(resolution or 32, 10_000, HELD_OUT)
    else:
        data = open_images(path, resolution)
    if len(data) < count:
        raise ValueError(f"{path} holds {len(data)} images, expected at least {count}")
    return data


def ranks():
    """-> this process's rank, how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@torch.no_grad()
def extract_features(data, n, batch, title, device, of_batch):
    """of_batch(indices, images [B, 3, R, R], labels [B]) -> rows to keep [B, K], features [B,
    D]..., for the first n images, shared out to the ranks -> rows, float32 [n, K] in the images'
    order, and mu, sigma of each kind of features."""
    rank, world_size = ranks()
    if n < max(2, world_size):
        raise ValueError(f"{n} images are too few (for {world_size} processes)")
    if batch < 1:
        raise ValueError(f"--batch={batch}: expected at least 1")
    step, rows = batch * world_size, None
    shares = [range(i, min(i + step, n), world_size) for i in range(rank, n, step)]
    workers = min(8, os.cpu_count()) if isinstance(data, Folder) else 0         # they decode ahead
    loader = torch.utils.data.DataLoader(data, batch_sampler=[list(share) for share in shares],
                                         num_workers=workers, collate_fn=collate)
    bar = tqdm(shares, title, leave=False, disable=rank > 0)
    for share, (images, labels) in zip(bar, loader):
        kept, *features = of_batch(share, images.to(device), labels.to(device))
        if rows is None:
            rows = torch.zeros(n, kept.shape[1], device=device)
            moments = [Moments(x.shape[1], device) for x in features]
        rows[list(share)] = kept.float()
        for m, x in zip(moments, features):
            m.update(x)
    if world_size > 1:
        dist.all_reduce(rows)                                   # each row is 0 but on one rank
    return rows, *itertools.chain(*(m.result() for m in moments))


def feature_stats(data, n, net, batch, title, keep=True):
    """The first n images -> a dict: n, mu, sigma, Inception's mu_s, sigma_s, rows [N, D] if they
    are to be kept, and for the drawn shapes labels [N]."""
    @full_float32()
    def one_batch(indices, images, labels):
        features = net(images)
        kept = features[0] if keep else features[0][:, :0]
        return torch.cat([labels[:, None], kept], 1), *features
    device = next(net.parameters()).device
    rows, *moments = extract_features(data, n, batch, title, device, one_batch)
    stats = {"n": n, "rows": rows[:, 1:], **dict(zip(("mu", "sigma", "mu_s", "sigma_s"), moments))}
    if isinstance(net, TinyClassifier) and data.classes == Shapes.classes:
        stats["labels"] = rows[:, 0]
    return stats


def load_reference(path, net, resolution, batch):
    """tiny, or an .npz -> its statistics under this network: those that the file states (ADM's do,
    of more images than they hold), else those of its images."""
    if path == "tiny":                          # its images never change, the network may
        weights = b"".join(t.cpu().numpy().tobytes() for t in net.state_dict().values())
        data = open_data(path, resolution)
        stats = feature_stats(data, len(data), net, batch, "reference")
        return stats | {"sha256": hashlib.sha256(weights).hexdigest()}
    with reading(path, "a reference (.npz)"):
        held = np.load(path)
        names = [name for name in ("mu", "sigma", "mu_s", "sigma_s", "n") if name in held]
        stats = {name: held[name] for name in names}
        if any(stats[name].dtype.kind != "f" for name in names if name != "n"):
            raise ValueError(f"{path}: mu and sigma must be floats")
        maker = str(held["network"]) if "network" in held else "inception"      # ADM's name none
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if "mu" in stats and (maker, len(stats["mu"])) != (net.name, net.dim):
            raise ValueError(f"{path} was made with {maker} features [{len(stats['mu'])}], not "
                             f"{net.name} [{net.dim}]: use --features={maker}, or make another "
                             "reference (evaluate.py ref)")
        for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if mu in stats and stats[sigma].shape != 2 * stats[mu].shape:
                raise ValueError(f"{path}: {sigma} is {stats[sigma].shape}, expected "
                                 f"{2 * stats[mu].shape}")
    if "arr_0" in held:
        images = open_npz(path)
        if images.resolution != resolution:
            raise ValueError(f"{path} holds images of {images.resolution} px, the samples have "
                             f"{resolution}")
        own = feature_stats(images, len(images), net, batch, "reference")
        stats = {"rows": own["rows"], **stats} if "mu" in stats else own
    if "mu" not in stats:
        raise ValueError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma)")
    return stats | {"sha256": digest}


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
        hits = net.head(fake["rows"]).argmax(1) == fake["labels"]
        values["accuracy"] = hits.double().mean().item()
    return values


def report(stem, command, values, settings, usual, header=True):
    """Prints a line of a table, above it what all its lines share, below it values that are lists;
    appends an entry to a JSON beside the checkpoint."""
    if ranks()[0] > 0:
        return
    varying = ("step", "guidance", "low", "high")
    lists = {name: value for name, value in values.items() if isinstance(value, list)}
    line = {name: value for name, value in settings.items() if name in varying}
    line |= {name: value for name, value in values.items() if name not in lists}
    widths = {name: max(len(name) + 2, 12) for name in line}
    if header:
        print("  ".join(f"{name}: {v}" for name, v in settings.items() if name not in varying))
        if settings["N"] < usual:
            print(f"warning: N = {settings['N']:,} is few: use {usual:,}, or compare with values "
                  "of the same N only")
        print("".join(name.rjust(widths[name]) for name in line))
    cells = {name: f"{v:.4f}" if isinstance(v, float) else str(v) for name, v in line.items()}
    print("".join(cell.rjust(widths[name]) for name, cell in cells.items()), flush=True)
    for name, value in lists.items():
        print(f"{name}: " + " ".join(f"{v:.3f}" for v in value))
    file = Path(f"{str(stem).removesuffix('.pt').removesuffix('.npz')}.{command}.json")
    earlier = json.loads(file.read_text()) if file.exists() else []
    file.write_text(json.dumps([*earlier, {"values": values, **settings}], indent=1))


# ---- The commands ---------------------------------------------------------------

def sweep(path, guidance, interval, solver, steps, seed, batch):
    """-> arguments of Pipeline.batch: every scale in every interval; one where guidance is off."""
    settings = []
    for text, bounds in itertools.product(guidance.split(","), interval.split(",")):
        try:
            scale = float(text)
            low, high = map(float, (bounds if scale > 1 else "0:1").split(":"))
        except ValueError:
            raise ValueError(f"--guidance={guidance} --interval={interval}: expected numbers, as "
                             "in 1,2.2 and 0:1,0.1:0.8") from None
        how = dict(solver=solver, steps=steps, guidance=scale, seed=seed, low=low, high=high)
        check(Options(path, batch=batch, **how))
        if how not in settings:
            settings.append(how)
    return settings


def gen(path: str, *, ref: str, count: int = 0, features: str = "", weights: str = "",
        repo: str = "", vae: str = "", curve: bool = False, solver: Literal["", *SOLVERS] = "",
        steps: int = 0, guidance: str = "1", interval: str = "0:1",
        labels: Literal["random", "balanced"] = "random", seed: int = 0, batch: int = 64):
    """Metrics of a model's images, or of images in a file or folder, against a reference.

    path: a checkpoint, a run's folder (curve: all its snapshots), or images. ref: an .npz or tiny.
    count: 0 is 50,000 (tiny: 1,000; given images: all). solver, steps: default sde, 250 (tiny: ab2,
    50). guidance 1,1.5,2 and interval 0:1,0.1:0.8 are sweeps. features: of FEATURES; weights, repo:
    local files of that network. labels balanced: each class equally often.
    """
    device = init_distributed()[2]
    folder = Path(path)
    files = [folder] if folder.suffix in (".pt", ".pth") else sorted(folder.glob("step_???????.pt"))
    files = files or sorted(folder.glob("state*.pt"))[-1:]      # state.pt, else state.prev.pt
    files = files if curve else files[-1:]
    load = functools.lru_cache(1)(lambda file: load_pipeline(file, device, vae))
    tiny = ref == "tiny" or bool(files) and load(files[0]).config.get("data") == "tiny"
    usual = 1000 if tiny else 50_000
    if files:
        how = sweep(path, guidance, interval, solver or ("ab2" if tiny else "sde"),
                    steps or (50 if tiny else 250), seed, batch)
        runs = list(itertools.product(files, how))
        data = Generated(load(files[0]), labels, {})
        n = count or usual
    else:
        runs = [(folder, None)]
        data = open_data(path, 0, count)
        n = count or len(data)
    net = load_features(features, tiny, data.resolution, weights, repo, device)
    real = load_reference(ref, net, data.resolution, batch)
    about = {"N": n, "reference": ref, "sha256": real["sha256"][:12], "features": net.name}
    for i, (file, how) in enumerate(runs):
        if how:
            model = load(file).prepare(n)                       # a sweep reads its checkpoint once
            data = Generated(model, labels, how)
            about = {**about, "step": model.step, "labels": labels, **how}
        fake = feature_stats(data, n, net, batch, f"{file} {how or ''}")
        stem = file if file.exists() else path.replace("/", "-")        # hf:...
        report(stem, "gen", compare(fake, real, net), about, usual, header=i == 0)


def ref(path: str, *, out: str, count: int = 0, resolution: int = 0, features: str = "",
        weights: str = "", repo: str = "", batch: int = 64):
    """Writes a reference: statistics of all images and 10,000 of the images, spread evenly, in
    ADM's layout. resolution: to which a folder's images are cropped; 0: 256."""
    device = init_distributed()[2]
    data = open_data(path, resolution, count)
    n = count or len(data)
    net = load_features(features, path == "tiny", data.resolution, weights, repo, device)
    stats = feature_stats(data, n, net, batch, "reference", keep=False)
    if ranks()[0] > 0:
        return
    kept = np.linspace(0, n - 1, min(n, 10_000)).round().astype(int).tolist()
    images = np.stack([fetch(data, [i])[0][0].permute(1, 2, 0).numpy() for i in kept])
    stats = {name: value for name, value in stats.items() if name not in ("rows", "labels")}
    np.savez(f"{out}.tmp.npz", arr_0=images, network=net.name, **stats)
    os.replace(f"{out}.tmp.npz", out)
    print(f"{out}: {net.name} statistics of {n:,} images, {len(kept):,} of the images")


def principal_colors(z, side):
    """Latents [M, C, h, w] -> uint8 [M, 3, side, side]: their first three principal components as
    red, green, blue."""
    flat = z.permute(0, 2, 3, 1).flatten(0, 2)                  # [M h w, C]
    components = torch.linalg.eigh(flat.T.cov())[1].flip(1)[:, :3]
    rgb = (flat - flat.mean(0)) @ components
    low, high = torch.from_numpy(np.quantile(rgb.numpy(), (0.01, 0.99), 0).astype(np.float32))
    rgb = (rgb - low) / (high - low) * 2 - 1
    rgb = rgb.view(len(z), *z.shape[2:], 3).permute(0, 3, 1, 2)
    return to_uint8(F.interpolate(rgb, (side, side), mode="nearest"))


def encode_means(vae, x):
    """uint8 [B, 3, R, R] -> the posterior's mean [B, C, h, w]."""
    return torch.cat([vae.encode(to_float(part))[0] for part in x.split(DECODED)])


def save_latents(file, vae, data, device):
    """A picture of 16 images: each with its reconstruction and its latents as colors."""
    spread = np.linspace(0, len(data) - 1, min(16, len(data))).round().astype(int).tolist()
    x = fetch(data, spread)[0].to(device)
    with torch.no_grad(), full_float32():
        z = encode_means(vae, x)
        rec = to_uint8(vae.decode(z))
    triples = torch.stack([x.cpu(), rec.cpu(), principal_colors(z.cpu(), data.resolution)], 1)
    save_grid(file, triples.flatten(0, 1), 12)


def stem_of(name):
    """Where reports about a checkpoint go: beside it, if it is a local one."""
    return find_checkpoint(name) if Path(name).exists() else name.replace("/", "-")


def recon(path: str, data: str, *, count: int = 0, resolution: int = 0, features: str = "",
          weights: str = "", repo: str = "", batch: int = 64):
    """Closeness of held-out images to their reconstructions from the posterior's mean, both as
    uint8; and a picture of images, reconstructions and latents. path: what load_vae takes."""
    device = init_distributed()[2]
    tiny, lpips = data == "tiny", None
    with rank0_first():
        vae = load_vae(path)[0].to(device).eval()
    images = open_data(data, resolution, count)
    usual = 1000 if tiny else 50_000
    n = count or min(len(images), usual)
    net = load_features(features, tiny, images.resolution, weights, repo, device)
    try:
        with rank0_first():
            lpips = None if tiny else LPIPS().to(device)        # tiny does without downloads
    except (ValueError, ImportError) as error:
        print(f"note: LPIPS is left out: {error}")

    @full_float32()
    def one_batch(indices, x, labels):
        parts = [to_uint8(vae.decode(encode_means(vae, part))) for part in x.split(DECODED)]
        rec = torch.cat(parts)
        a, b = to_float(x), to_float(rec)
        columns = [psnr(x, rec), ssim(x, rec), (a - b).abs().mean((1, 2, 3))]
        if lpips is not None:
            columns.append(lpips(a, b).expand(len(x)))
        return torch.stack(columns, 1), net(rec)[0], net(x)[0]
    rows, *moments = extract_features(images, n, batch, "reconstructions", device, one_batch)
    values = dict(zip(("PSNR", "SSIM", "L1", "LPIPS"), rows.double().mean(0).tolist()))
    values[f"r{net.metric}"] = frechet(*moments)
    stem = stem_of(path)
    if ranks()[0] == 0:
        save_latents(f"{str(stem).removesuffix('.pt')}.recon.png", vae, images, device)
    report(stem, "recon", values, {"N": n, "data": data, "features": net.name}, usual)


def block_features(sit, z_t, t, y):
    """The mean token behind each of SiT's blocks, [B, depth D]."""
    seen = []
    hooks = [block.register_forward_hook(lambda module, args, x: seen.append(x.mean(1)))
             for block in sit.blocks]
    sit(z_t, t, y)
    for hook in hooks:
        hook.remove()
    return torch.cat(seen, 1)


def align(path: str, data: str, *, count: int = 0, teacher: str = "", vae: str = "",
          weights: str = "", repo: str = "", seed: int = 0, batch: int = 64):
    """CKNNA of latents and of each SiT block with the teacher; collapse monitors of the latents.
    teacher: default the run's own."""
    device = init_distributed()[2]
    model, file = load_pipeline(path, device, vae), stem_of(path)
    net, sit, config, cfg = model.vae, model.sit, model.config, model.sit.cfg
    images = open_data(data, cfg.size * net.cfg.downsampling, count)
    tiny = config.get("data") == "tiny"
    usual = 1000 if tiny else 10_000
    n = count or min(len(images), usual)
    name = teacher or config.get("teacher", "dinov2_vitb14")
    repo = repo or config.get("teacher_repo", "")
    weights = weights or config.get("teacher_weights", "")
    with rank0_first():
        draw = Shapes(images.resolution).draw
        judge = load_teacher(name, sit.grid, repo, weights, draw).to(device)

    def clean(indices, x, labels):
        """-> [B, 2 + C h w + d]: monitors, latents, the teacher's mean token."""
        with full_float32():
            z = encode_means(net, x)
        with autocast(device):
            target = judge(x).float().mean(1)
        return [torch.cat([monitors(z), z.flatten(1), target], 1)]

    def noisy(t, indices, x, labels):
        """-> [B, depth D]; the noise of image i depends on the seed and i alone."""
        generators = generators_of(seed, "align", indices, device)
        with full_float32():
            zn = sit.bn(encode_means(net, x))
        eps = [torch.randn(zn.shape[1:], generator=g, device=device) for g in generators]
        known = images.classes == model.classes
        y = labels if known else torch.full_like(labels, cfg.num_classes)
        times = torch.full((len(x),), t, device=device)
        z_t, _ = interpolate(zn, torch.stack(eps), times, cfg.path)
        with autocast(device):
            return [block_features(sit, z_t, times, y)]
    rows, = extract_features(images, n, batch, "latents", device, clean)
    collapse, z, target = rows.tensor_split((2, 2 + cfg.channels * cfg.size**2), 1)
    with full_float32():
        variance, variation = collapse.mean(0).tolist()
        values = {"spatial variance": variance, "total variation": variation,
                  "CKNNA of latents": cknna(z, target)}
        for t in (0.0, 0.25, 0.5, 0.75):
            of_batch = functools.partial(noisy, t)
            rows, = extract_features(images, n, batch, f"t = {t}", device, of_batch)
            blocks = rows.split(cfg.width, 1)
            values[f"CKNNA of blocks at t = {t}"] = [cknna(h, target) for h in blocks]
    if ranks()[0] == 0:
        save_latents(f"{str(file).removesuffix('.pt')}.latents.png", net, images, device)
    settings = {"step": model.step, "N": n, "data": data, "teacher": name, "seed": seed,
                "classes given": images.classes == model.classes}
    report(file, "align", values, settings, usual)


COMMANDS = {"gen": gen, "ref": ref, "recon": recon, "align": align}


@friendly
def main(argv):
    name, *words = argv or ["none"]
    if name in ("-h", "--help"):
        return print(__doc__)
    if name not in COMMANDS:
        raise ValueError(f"evaluate.py {name}{nearest(name, COMMANDS)}")
    parse(COMMANDS[name], words)


if __name__ == "__main__":
    main()
