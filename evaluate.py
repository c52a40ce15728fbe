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
import hashlib
import functools
import itertools
import json
import math
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler
from torchvision.models import inception as tv
from tqdm import tqdm

from repa import DINOv2, draw_of, fit, load_teacher, trained_once
from sample import (DECODED, SOLVERS, Options, autocast, check, check_side, choose_label,
                    default_workers, find_checkpoint, friendly, generators_of, hub_files,
                    init_distributed, load_batches, load_pipeline, load_vae, name_unreadable,
                    nearest, parse, prepare_out, rank0_first, save_grid, snapshots_of)
from sit import interpolate
from vae import (LPIPS, Folder, Shapes, fetch, fingerprint, load_pt, load_weights, open_images,
                 reading, to_float, to_uint8, unwrap)

HELD_OUT = 9_000_000    # the drawn shapes from here on: nothing is trained on them


# ---- Metrics --------------------------------------------------------------------
# Pure functions of features and images.

@contextmanager
def full_float32():
    """True float32: TF32's mantissa of 10 bits is too coarse for differences of large numbers."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
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
        self.sums += rows.T @ rows

    def result(self):
        """-> mu [D], sigma [D, D] (by N - 1), float64 on the CPU, the same on all ranks."""
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        sums = sums.cpu()
        n = sums[0, 0]
        mu = sums[0, 1:] / n
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
    center = real.mean(0)                       # shorter vectors: less cancellation
    real, fake = real - center, fake - center

    def inside(a, b):
        """The share of a's rows in a ball of b, a thousand rows at a time."""
        # the nearest is the row itself: neighbour k is number k + 1
        radii = [torch.cdist(x, b).kthvalue(k + 1).values for x in b.split(1000)]
        radii = torch.cat(radii)
        hits = [(torch.cdist(x, b) <= radii).any(1) for x in a.split(1000)]
        return torch.cat(hits).double().mean().item()
    return inside(fake, real), inside(real, fake)


def psnr(a, b):
    """10 log10(255^2 / mean squared error) of uint8 [B, 3, H, W]; infinite for equal images."""
    error = (a.double() - b.double()).square().mean((1, 2, 3))
    return 10 * (255**2 / error).log10()


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of uint8 [B, 3, H, W], at least 11x11: Gaussian
    window of 11x11, sigma 1.5, inside the image; biased moments, mean over channels."""
    x = torch.arange(11, dtype=torch.float64, device=a.device) - 5
    window = torch.exp(-(x**2) / (2 * 1.5**2))
    window = (window / window.sum()).expand(15, 1, 1, 11)       # of a row, for each channel
    a, b = a.double(), b.double()
    maps = torch.cat([a, b, a * a, b * b, a * b], 1)            # [B, 15, H, W]
    maps = F.conv2d(F.conv2d(maps, window, groups=15), window.mT, groups=15)
    mean_a, mean_b, aa, bb, ab = maps.chunk(5, 1)               # [B, 3, H - 10, W - 10]
    squares = mean_a**2 + mean_b**2
    product = mean_a * mean_b
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    luminance = (2 * product + c1) / (squares + c1)
    structure = (2 * (ab - product) + c2) / (aa + bb - squares + c2)
    return (luminance * structure).mean((1, 2, 3))


def monitors(z):
    """Latents [B, C, h, w] -> [B, 2]: variance over positions, and total variation (the sum of
    |difference| of neighbours), means over channels. Both are 0 where latents collapse."""
    z = z.double()
    variance = z.var((2, 3), correction=0)                      # [B, C]
    down, right = z.diff(dim=2), z.diff(dim=3)
    variation = down.abs().sum((2, 3)) + right.abs().sum((2, 3))
    return torch.stack([variance.mean(1), variation.mean(1)], 1)


@full_float32()
def cknna(a, b, k=10):
    """Centred kernel nearest-neighbour alignment (Huh et al., 2405.07987, as in REPA): features
    [N, D], [N, d] of the same N images -> 1 for the same neighbourhoods, about 0 for unrelated
    ones.

        K_ij = a_i . a_j, L_ij = b_i . b_j  of unit length, if j is among the k nearest of i in both
        CKNNA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), HSIC unbiased (Song et al. 2012, eq. 5)
    """
    n = len(a)
    if len(b) != n or n <= k:
        raise ValueError(f"CKNNA with k = {k} needs {k + 1} images or more, twice the same: {n} "
                         f"and {len(b)}")

    def kernel(x):
        """-> inner products, and whether j is among the k nearest of i: [N, N] each."""
        x = F.normalize(x.float(), dim=1)
        K = (x @ x.T).fill_diagonal_(-math.inf)                 # not the row itself
        near = torch.zeros_like(K, dtype=torch.bool)
        return K, near.scatter_(1, K.topk(k).indices, True)

    def hsic(K, L, near):
        """Times n (n - 3), which cancels. Entries that are not near count as 0."""
        i, j = near.nonzero(as_tuple=True)                      # at most n k pairs
        K, L = K[i, j].double(), L[i, j].double()
        trace = (K * L)[near[j, i]].sum()                       # of K L, as L_ji = L_ij
        columns = j.bincount(K, n)                              # sums of K's columns, [N]
        rows = i.bincount(L, n)                                 # sums of L's rows, [N]
        total = K.sum() * L.sum() / ((n - 1) * (n - 2))
        return trace + total - 2 * columns @ rows / (n - 2)
    K, near_a = kernel(a)
    L, near_b = kernel(b)
    norm = (hsic(K, K, near_a) * hsic(L, L, near_b)).sqrt()
    return float(hsic(K, L, near_a & near_b) / norm)


# ---- Feature networks -----------------------------------------------------------
# uint8 [B, 3, R, R] -> features [B, D], and more kinds of features behind them.

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")


def without_padding(branch, args):
    """torchvision's mean of 3x3 pixels counts the padding's zeros, TensorFlow's does not."""
    mean = args[0]                                              # [B, C, h, w]
    share = F.avg_pool2d(torch.ones_like(mean[:1, :1]), 3, stride=1, padding=1)
    return mean / share                                         # 1, 2/3 at edges, 4/9 in corners


class MaxPooled(tv.InceptionE):
    """The last block: it takes the maximum, a slip of the original that everyone keeps."""

    def _forward(self, x):
        *branches, _ = super()._forward(x)
        maximum = F.max_pool2d(x, 3, stride=1, padding=1)
        return [*branches, self.branch_pool(maximum)]


class Inception(tv.Inception3):
    """The network of 2015-12-05 that defines FID: torchvision's blocks, TensorFlow's poolings."""
    name, metric, dim = "inception", "FID", 2048

    def __init__(self):
        super().__init__(1008, aux_logits=False, init_weights=False)
        for block in self.children():
            if hasattr(block, "branch_pool"):
                block.branch_pool.register_forward_pre_hook(without_padding)
        self.Mixed_7c = MaxPooled(2048)

    @full_float32()
    def forward(self, images):
        """-> pooled [B, 2048] (FID, IS, precision, recall), spatial [B, 2023] (sFID)."""
        x = (resize_tf1(images.float(), 299) - 128) / 128
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
    for _ in ("columns", "rows"):
        n = x.shape[3]
        src = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = src.long()
        high = (low + 1).clamp(max=n - 1)
        x = torch.lerp(x[..., low], x[..., high], src - low).mT
    return x


def load_inception(weights=""):
    """With its weights, from a local file or the internet, on the CPU."""
    net = Inception()
    file = Path(weights or f"{torch.hub.get_dir()}/checkpoints/{os.path.basename(INCEPTION_URL)}")
    with reading(file, f"the file of {INCEPTION_URL} (offline: --weights=FILE)"):
        if not weights and not file.exists():
            torch.hub.load_state_dict_from_url(INCEPTION_URL, check_hash=True, weights_only=True)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if not weights and digest[:8] != file.stem[-8:]:
            raise ValueError("its hash differs: remove it")
        load_weights(net, unwrap(load_pt(file), list(net.state_dict())[:1], file))
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


class TinyClassifier(nn.Module):
    """Of the drawn shapes, or of a reference with labels: features [B, 128], and which class it is.
    It shares no layers, seed and (shapes) images with the teacher, which samples were trained to
    match."""
    name, metric, dim = "tiny", "FD-tiny", 128

    def __init__(self, classes=Shapes.classes):
        super().__init__()
        self.classes = list(classes)
        self.net = nn.Sequential()
        for c_in, c_out in itertools.pairwise((3, 32, 32, 64, 64, 128, 128)):
            stride = 1 if c_in == c_out else 2
            conv = nn.Conv2d(c_in, c_out, 3, stride, 1)
            self.net.append(nn.Sequential(conv, nn.GroupNorm(8, c_out), nn.GELU()))
        self.head = nn.Linear(self.dim, len(classes))

    @full_float32()
    def forward(self, images):
        return (self.net(to_float(images)).mean((2, 3)),)


def load_tiny_classifier(resolution, steps=800, data=None):
    """From torch.hub's cache, or trained for it, about a minute: it names over 99% of new drawn
    shapes. data: labelled images of this resolution, in their place."""
    data = data or Shapes(resolution, first=5_000_000)          # used nowhere else
    draw = draw_of(data)

    def train(net):
        def loss(indices):
            images, labels, _ = draw(indices)
            return F.cross_entropy(net.head(net(images)[0]), labels)
        fit(net, loss, "training the classifier", steps)
    build = functools.partial(TinyClassifier, data.classes)
    recipe = steps, *getattr(draw, "recipe", ())
    return trained_once("tiny_classifier", build, 1234, draw, train, *recipe)


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


FEATURES = {    # name: (resolution, weights, repo), and data if there are labels -> network
    "inception": lambda resolution, weights, repo, data=None: load_inception(weights),
    "dinov2": lambda resolution, weights, repo, data=None: ClassToken(repo, weights),
    "tiny": lambda resolution, weights, repo, **data: load_tiny_classifier(resolution, **data),
}


def load_features(name, tiny, resolution, weights, repo, device, data=None):
    """An entry of FEATURES; by default tiny for the drawn shapes and for a reference that is a
    folder (data), Inception elsewhere."""
    name = name or ("tiny" if tiny else "inception")
    if name not in FEATURES:
        raise ValueError(f"--features={name}{nearest(name, FEATURES)}")
    with rank0_first():
        more = {"data": data} if data is not None else {}
        net = FEATURES[name](resolution, weights, repo, **more)
    return net.to(device).requires_grad_(False)


# ---- Statistics over ranks ------------------------------------------------------

class Generated:
    """A data set of a model's images, each made when it is asked for; how: Pipeline.batch's
    rest."""

    def __init__(self, model, protocol, how):
        self.model, self.protocol, self.how = model, protocol, how
        self.classes = model.classes
        self.resolution = model.sit.cfg.size * model.vae.cfg.downsampling

    def __getitems__(self, indices):
        seed = self.how["seed"]
        labels = [choose_label(self.protocol, seed, i, len(self.classes)) for i in indices]
        return self.model.batch(indices, labels, **self.how), torch.tensor(labels)


def open_data(path, resolution, count=0):
    """tiny (held-out images), an .npz, a pack or a folder -> at least count of its images."""
    held_out = Shapes(resolution or 32, 10_000, HELD_OUT)
    data = held_out if path == "tiny" else open_images(path, resolution)
    if len(data) < count:
        raise ValueError(f"{path} holds {len(data)} images, expected at least {count}")
    return data


def ranks():
    """-> this process's rank, how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def batches(data, n, batch, title, device):
    """This rank's share of the first n images: their numbers, images uint8 [B, 3, R, R], labels
    [B]."""
    rank, world_size = ranks()
    if n < max(4, world_size):          # a row, and 3 neighbours for precision and recall
        raise ValueError(f"{n} images are too few (for {world_size} processes)")
    order = BatchSampler(range(rank, n, world_size), batch, drop_last=False)
    loaded = load_batches(data, order, batch, default_workers(data), device)
    bar = tqdm(loaded, title, len(order), leave=False, disable=rank > 0)
    for indices, (images, labels) in zip(order, bar):
        yield indices, images, labels
    name_unreadable(data, set(), rank, device)


def all_rows(parts, n):
    """The rows of this rank's images, batch by batch -> those of all ranks, float32 [n, ...], in
    the images' order."""
    rank, world_size = ranks()
    own = torch.cat(parts).float()
    rows = own.new_zeros(n, *own.shape[1:])
    rows[rank::world_size] = own
    if world_size > 1:
        dist.all_reduce(rows)                                   # each row is 0 but on one rank
    return rows


@torch.no_grad()
def feature_stats(data, n, net, batch, title, keep=True):
    """The first n images -> a dict: mu [D], sigma [D, D]; Inception's mu_s, sigma_s; if they are
    to be kept rows [n, D], and of the drawn shapes labels [n]."""
    device = next(net.parameters()).device
    moments, rows, classes = None, [], []
    for _, images, labels in batches(data, n, batch, title, device):
        features = net(images)                                  # [B, D], one for each kind
        moments = moments or [Moments(x.shape[1], device) for x in features]
        for m, x in zip(moments, features):
            m.update(x)
        if keep:
            rows.append(features[0])
            classes.append(labels)

    stats = {}
    for end, m in zip(("", "_s"), moments):
        stats["mu" + end], stats["sigma" + end] = m.result()
    if keep:
        stats["rows"] = all_rows(rows, n)
    if keep and data.classes in (Shapes.classes, getattr(net, "classes", None)):
        stats["labels"] = all_rows(classes, n)
    return stats


def stated_statistics(path, arrays, net):
    """The statistics that an .npz states itself: mu, sigma, mu_s, sigma_s, or none."""
    stats = {}
    for end in ("", "_s"):
        if "mu" + end in arrays:
            mu, sigma = arrays["mu" + end], arrays["sigma" + end]
            kinds = mu.dtype.kind + sigma.dtype.kind
            if kinds != "ff" or sigma.shape != 2 * mu.shape:
                raise ValueError(f"{path}: sigma{end} is {sigma.shape} ({sigma.dtype}), mu{end} "
                                 f"{mu.shape} ({mu.dtype}), expected floats [D, D] and [D]")
            stats |= {"mu" + end: mu, "sigma" + end: sigma}
    network = str(arrays.get("network", "inception"))           # ADM's files name none
    if stats and (network, len(stats["mu"])) != (net.name, net.dim):
        raise ValueError(f"{path} was made with {network} features [{len(stats['mu'])}], not "
                         f"{net.name} [{net.dim}]: use --features={network}, or make another "
                         "reference (evaluate.py ref)")
    return stats


def load_reference(path, net, resolution, batch):
    """tiny, a folder or an .npz -> its statistics under this network: those that the file states
    (ADM's do, of more images than they hold), else those of its images."""
    if path == "tiny" or os.path.isdir(path):   # the digest is of the network, and names
        stats, images = {}, open_data(path, resolution)
        content = nn.utils.parameters_to_vector(net.parameters()).cpu().numpy().tobytes()
        content += b"" if path == "tiny" else fingerprint(images).encode()
    else:
        with reading(path, "a reference (.npz)"):
            arrays = np.load(path)
            content = Path(path).read_bytes()
            stats = stated_statistics(path, arrays, net)
            images = open_images(path, resolution) if "arr_0" in arrays else None
    digest = hashlib.sha256(content).hexdigest()
    if images:
        own = feature_stats(images, len(images), net, batch, "reference")
        stats = stats | {"rows": own["rows"]} if stats else own
    if not stats:
        raise ValueError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma)")
    return stats | {"sha256": digest}


def compare(fake, real, net):
    """Two sets' statistics -> the metrics that they allow, by name."""
    values = {net.metric: frechet(fake["mu"], fake["sigma"], real["mu"], real["sigma"])}
    if "mu_s" in fake and "mu_s" in real:
        values["sFID"] = frechet(fake["mu_s"], fake["sigma_s"], real["mu_s"], real["sigma_s"])
    if isinstance(net, Inception):
        values["IS"] = inception_score(net.logits(fake["rows"]))
    if "rows" in real:
        values["precision"], values["recall"] = precision_recall(real["rows"], fake["rows"])
    if isinstance(net, TinyClassifier) and "labels" in fake:
        hits = net.head(fake["rows"]).argmax(1) == fake["labels"]
        values["accuracy"] = hits.double().mean().item()
    return values


def stem_of(name):
    """How the names of reports begin: beside a local checkpoint or local images, where that folder
    can be written; else in the folder where the command was called."""
    path = Path(name).expanduser()
    if path.is_dir() and checkpoints(path):
        path = find_checkpoint(path)
    if not path.exists() or not os.access(path.parent, os.W_OK):
        path = Path(re.sub(r"[/\\:]+", "-", str(name).strip("/")))
    return str(path).removesuffix(".pt").removesuffix(".npz")


def report(stem, command, values, settings, usual, header=True):
    """Prints a line of a table, above it what all its lines share, below it values that are lists;
    appends an entry to a JSON beside the checkpoint."""
    varying = ("step", "guidance", "low", "high")
    line = {name: settings[name] for name in varying if name in settings} | values
    lists = {name: line.pop(name) for name in values if isinstance(values[name], list)}
    if header:
        print("  ".join(f"{name}: {v}" for name, v in settings.items() if name not in varying))
        if settings["N"] < usual:
            print(f"warning: N = {settings['N']:,} is few: use {usual:,}, or compare with values "
                  "of the same N only")
        print("".join(f"  {name:>10}" for name in line))
    for name, value in line.items():
        cell = f"{value:.4f}" if isinstance(value, float) else str(value)
        print(f"  {cell:>{max(len(name), 10)}}", end="")
    print(flush=True)
    for name, value in lists.items():
        print(f"{name}: " + " ".join(f"{v:.3f}" for v in value))
    file = Path(f"{stem}.{command}.json")
    earlier = json.loads(file.read_text()) if file.exists() else []
    file.write_text(json.dumps([*earlier, {"values": values, **settings}], indent=1))


# ---- The commands ---------------------------------------------------------------

def sweep(path, guidance, interval, solver, steps, seed, batch):
    """-> arguments of Pipeline.batch: every scale in every interval; one where guidance is off."""
    settings = []
    for text, bounds in itertools.product(guidance.split(","), interval.split(",")):
        try:
            scale = float(text)
            low, high = map(float, (bounds if scale != 1 else "0:1").split(":"))
        except ValueError:
            raise ValueError(f"--guidance={guidance} --interval={interval}: expected numbers, as "
                             "in 1,2.2 and 0:1,0.1:0.8") from None
        how = dict(solver=solver, steps=steps, guidance=scale, seed=seed, low=low, high=high)
        check(Options(path, batch=batch, **how))
        if how not in settings:
            settings.append(how)
    return settings


def checkpoints(path, curve=False):
    """A checkpoint; of a run's folder the newest, or (curve) all snapshots. Nothing for images."""
    folder = Path(path)
    if folder.is_dir():
        states = [folder / name for name in ("state.prev.pt", "state.pt")]
        found = snapshots_of(folder) or [file for file in states if file.exists()]
        return found if curve else found[-1:]
    is_name = hub_files(str(path)) is not None and not folder.exists()
    return [path] if is_name or folder.suffix in (".pt", ".pth") else []


def gen(path: str, *, ref: str, count: int = 0, features: str = "", weights: str = "",
        repo: str = "", vae: str = "", curve: bool = False, solver: Literal["", *SOLVERS] = "",
        steps: int = 0, guidance: str = "1", interval: str = "0:1",
        labels: Literal["random", "balanced"] = "random", seed: int = 0, batch: int = 64):
    """Metrics of a model's images, or of images in a file or folder, against a reference.

    path: a checkpoint, a run's folder (curve: all its snapshots), or images. ref: an .npz, tiny, or
    a folder of labelled images (a small classifier is trained on them, unless features says else).
    count: 0 is 50,000 (tiny: 1,000; given images: all). solver, steps: default sde, 250 (tiny: ab2,
    50). guidance 1,1.5,2 and interval 0:1,0.1:0.8 are sweeps. features: of FEATURES; weights, repo:
    local files of that network. labels balanced: each class equally often.
    """
    rank, _, device = init_distributed()
    files = checkpoints(path, curve)
    if files:
        model = load_pipeline(files[0], device, vae)
        data = Generated(model, labels, {})
        tiny = "tiny" in (ref, model.config.get("data"))
    else:
        data = open_data(path, 0, count)
        if isinstance(data, Folder):
            data.resolution = data.own_size()
        tiny = ref == "tiny"
    images = open_data(ref, data.resolution) if os.path.isdir(ref) else None
    tiny = tiny or images is not None
    usual, usual_solver, usual_steps = (1000, "ab2", 50) if tiny else (50_000, "sde", 250)
    n = count or (usual if files else len(data))
    settings = sweep(path, guidance, interval, solver or usual_solver, steps or usual_steps, seed,
                     batch)
    net = load_features(features, tiny, data.resolution, weights, repo, device, images)
    real = load_reference(ref, net, data.resolution, batch)

    def runs():
        """What is measured: where its report goes, a data set, what the report says of it."""
        for file in files:
            model = load_pipeline(file, device, vae).prepare(n)
            for how in settings:
                about = {"step": model.step, "labels": labels, **how}
                yield stem_of(file), Generated(model, labels, how), about
        if not files:
            yield stem_of(path), data, {}
    shared = {"N": n, "reference": ref, "sha256": real["sha256"][:12], "features": net.name}
    for i, (stem, data, about) in enumerate(runs()):
        fake = feature_stats(data, n, net, batch, stem)
        if rank == 0:
            report(stem, "gen", compare(fake, real, net), shared | about, usual, header=i == 0)


def spread(n, count):
    """At most count numbers of 0..n-1, evenly spread."""
    return np.linspace(0, n - 1, min(n, count)).round().astype(int).tolist()


def ref(path: str, *, out: str, count: int = 0, resolution: int = 0, features: str = "",
        weights: str = "", repo: str = "", batch: int = 64):
    """Writes a reference: statistics of all images and 10,000 of the images, spread evenly, in
    ADM's layout. resolution: to which a folder's images are cropped; 0: 256."""
    rank, _, device = init_distributed()
    data = open_data(path, resolution, count)
    prepare_out(out)
    n = count or len(data)
    net = load_features(features, path == "tiny", data.resolution, weights, repo, device)
    stats = feature_stats(data, n, net, batch, "reference", keep=False)
    if rank > 0:
        return
    images = fetch(data, spread(n, 10_000))[0].permute(0, 2, 3, 1)
    np.savez(f"{out}.tmp.npz", arr_0=images.numpy(), network=net.name, n=n, **stats)
    os.replace(f"{out}.tmp.npz", out)
    print(f"{out}: {net.name} statistics of {n:,} images, {len(images):,} of the images")


def principal_colors(z, side):
    """Latents [M, C, h, w] -> uint8 [M, 3, side, side]: their first three principal components as
    red, green, blue."""
    flat = z.transpose(0, 1).flatten(1)                         # [C, M h w]
    directions = torch.linalg.eigh(flat.cov()).eigenvectors.flip(1)[:, :3]
    rgb = directions.T @ flat                                   # [3, M h w]
    low, high = rgb.quantile(torch.tensor([0.01, 0.99]), 1, keepdim=True)
    rgb = (rgb - low) / (high - low) * 2 - 1
    rgb = rgb.view(3, len(z), *z.shape[2:]).transpose(0, 1)     # [M, 3, h, w]
    return to_uint8(F.interpolate(rgb, side, mode="nearest"))


@full_float32()
def encode_means(vae, x):
    """uint8 [B, 3, R, R] -> the posterior's mean [B, C, h, w], a few images at a time."""
    return torch.cat([vae.encode(to_float(part))[0] for part in x.split(DECODED)])


@full_float32()
def decode(vae, z):
    """Latents [B, C, h, w] -> uint8 [B, 3, R, R], a few images at a time."""
    return torch.cat([to_uint8(vae.decode(part)) for part in z.split(DECODED)])


@torch.no_grad()
def save_latents(file, vae, data, device):
    """A picture of 16 images: each with its reconstruction and its latents as colors."""
    x = fetch(data, spread(len(data), 16))[0].to(device)
    z = encode_means(vae, x)
    colors = principal_colors(z.cpu(), data.resolution)
    triples = torch.stack([x.cpu(), decode(vae, z).cpu(), colors], 1)
    save_grid(file, triples.flatten(0, 1), 12)


def recon(path: str, data: str, *, count: int = 0, resolution: int = 0, features: str = "",
          weights: str = "", repo: str = "", batch: int = 64):
    """Closeness of held-out images to their reconstructions from the posterior's mean, both as
    uint8; and a picture of images, reconstructions and latents. path: what load_vae takes."""
    rank, _, device = init_distributed()
    tiny, lpips = data == "tiny", None
    with rank0_first():
        vae = load_vae(path)[0].to(device).eval().requires_grad_(False)
    images = open_data(data, resolution, count)
    check_side(images, vae)
    usual = 1000 if tiny else 50_000
    n = count or min(len(images), usual)
    net = load_features(features, tiny, images.resolution, weights, repo, device)
    try:
        with rank0_first():
            lpips = None if tiny else LPIPS().to(device)        # tiny does without downloads
    except (ValueError, ImportError) as error:
        print(f"note: LPIPS is left out: {error}")

    rows, real, fake = [], Moments(net.dim, device), Moments(net.dim, device)
    for _, x, _ in batches(images, n, batch, "reconstructions", device):
        rec = decode(vae, encode_means(vae, x))
        difference = to_float(x) - to_float(rec)
        columns = [psnr(x, rec), ssim(x, rec), difference.abs().mean((1, 2, 3))]
        if lpips:
            with full_float32():
                columns.append(lpips(to_float(x), to_float(rec)).expand(len(x)))
        rows.append(torch.stack(columns, 1))                    # [B, 3 or 4]
        real.update(net(x)[0])
        fake.update(net(rec)[0])
    means = all_rows(rows, n).double().mean(0).tolist()
    statistics = *real.result(), *fake.result()
    if rank > 0:
        return
    values = dict(zip(("PSNR", "SSIM", "L1", "LPIPS"), means))
    values[f"r{net.metric}"] = frechet(*statistics)
    stem = stem_of(path)
    save_latents(f"{stem}.recon.png", vae, images, device)
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
    rank, _, device = init_distributed()
    model = load_pipeline(path, device, vae)
    sit, config = model.sit, model.config
    images = open_data(data, sit.cfg.size * model.vae.cfg.downsampling, count)
    usual = 1000 if config.get("data") == "tiny" else 10_000
    n = count or min(len(images), usual)
    name = teacher or config.get("teacher", "dinov2_vitb14")
    repo = repo or config.get("teacher_repo", "")
    weights = weights or config.get("teacher_weights", "")
    with rank0_first():
        draw = None
        if name == "tiny":              # it was trained on the run's data
            draw = draw_of(open_images(config.get("data", "tiny"), images.resolution))
        judge = load_teacher(name, sit.grid, repo, weights, draw)
    judge.to(device).requires_grad_(False)

    known = images.classes == model.classes
    latents, collapse, targets = [], [], []
    blocks = {0.0: [], 0.25: [], 0.5: [], 0.75: []}             # by noise level t
    for indices, x, labels in batches(images, n, batch, "latents", device):
        z = encode_means(model.vae, x)
        latents.append(z.flatten(1))                            # [B, C h w]
        collapse.append(monitors(z))                            # [B, 2]
        y = labels if known else torch.full_like(labels, sit.cfg.num_classes)
        generators = generators_of(seed, "align", indices, device)
        eps = [torch.randn(z.shape[1:], generator=g, device=device) for g in generators]
        eps = torch.stack(eps)          # the noise of image i depends on the seed and i alone
        with autocast(device):
            targets.append(judge(x).float().mean(1))            # [B, d]
            for t in blocks:
                times = torch.full((len(x),), t, device=device)
                z_t, _ = interpolate(sit.bn(z), eps, times, sit.cfg.path)
                blocks[t].append(block_features(sit, z_t, times, y))

    target = all_rows(targets, n)
    variance, variation = all_rows(collapse, n).mean(0).tolist()
    values = {"spatial variance": variance, "total variation": variation,
              "CKNNA of latents": cknna(all_rows(latents, n), target)}
    for t, parts in blocks.items():
        tokens = all_rows(parts, n).split(sit.cfg.width, 1)     # [n, D] for each block
        values[f"CKNNA of blocks at t = {t}"] = [cknna(h, target) for h in tokens]
    if rank > 0:
        return
    stem = stem_of(path)
    save_latents(f"{stem}.latents.png", model.vae, images, device)
    settings = {"step": model.step, "N": n, "data": data, "teacher": name, "seed": seed,
                "classes given": known}
    report(stem, "align", values, settings, usual)


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
