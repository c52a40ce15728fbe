"""Pixels and latents: the KL-VAE, its discriminator and losses, and the images that they see.

    image    uint8 [B, 3, R, R] in 0..255       in every file and at every function boundary
      |  to_float                               float [B, 3, R, R] in [-1, 1]
      v
    Encoder -> mean, logvar  [B, C, h, w]       h = w = R / 8 (f8) or R / 16 (f16)
      |  z = mean + exp(logvar / 2) noise       the unnormalised latents, which SiT is trained on
      v
    Decoder -> rec  float [B, 3, R, R]          to_uint8 makes an image of it

| VAES   | C  | latents of 256 px | parameters | the VAE of                                   |
|--------|----|-------------------|------------|----------------------------------------------|
| f8d4   | 4  | 4 x 32 x 32       | 83,653,863 | Stable Diffusion 1 and 2, SDXL, REPA-E sdvae |
| f16d32 | 32 | 32 x 16 x 16      | 69,836,067 | REPA-E invae and vavae                       |
| f8d16  | 16 | 16 x 32 x 32      | 83,819,683 | Stable Diffusion 3, FLUX                     |
| tiny   | 8  | 8 x 8 x 8 (32 px) | 622,232    | the laptop preset                            |

Module names follow latent-diffusion's AutoencoderKL, so that published weights load by name.
"""
import argparse
import hashlib
import json
import math
import os
import re
import zipfile
from collections import Counter, OrderedDict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint
from torchvision.datasets import ImageFolder


def to_float(image):
    """uint8 0..255 -> float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(x):
    """float in [-1, 1] -> uint8 0..255, rounded: truncation would darken by half a level."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---- The autoencoder ------------------------------------------------------------
# Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models",
# appendix G. Blocks first, then encoder, decoder and the posterior between them.

@dataclass(frozen=True)
class VAEConfig:
    z_channels: int = 4             # C, channels of the latents
    ch: int = 128                   # channels of the first stage
    ch_mult: tuple = (1, 2, 4, 4)   # of each stage, times ch; all but the last halve the side
    num_res_blocks: int = 2         # in each stage (one more in the decoder)
    groups: int = 32                # of every GroupNorm
    attn_last: bool = False         # self-attention after each block of the last stage
    quant_conv: bool = True         # 1x1 convolutions around the latents
    patch: int = 1                  # > 1: pixel-unshuffle before the encoder (tiny)
    sigma: float = 0.0              # > 0: fixed posterior std (LatentLM's sigma-VAE)

    @property
    def downsampling(self):
        return self.patch * 2 ** (len(self.ch_mult) - 1)


VAES = {
    "f8d4": VAEConfig(),
    "f16d32": VAEConfig(z_channels=32, ch_mult=(1, 1, 2, 2, 4), attn_last=True),
    "f8d16": VAEConfig(z_channels=16, quant_conv=False),
    "tiny": VAEConfig(z_channels=8, ch=64, ch_mult=(1,), num_res_blocks=1, groups=8, patch=4),
}


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))): [B, c_in, h, w] -> [B, c_out, h, w]."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class Attention(nn.Module):
    """Self-attention over the h w positions, one head of width c."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (self.tokens(conv(h)) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)                             # [B, 1, hw, c]
        return x + self.proj_out(h[:, 0].mT.reshape(x.shape))

    @staticmethod
    def tokens(h):
        """[B, c, h, w] -> [B, 1, hw, c], contiguous: else a CPU takes its quadratic path."""
        return h.flatten(2).mT.contiguous()[:, None]


def downsample(c):
    """[B, c, h, w] -> [B, c, h/2, w/2], padded on the right and at the bottom only."""
    return nn.Sequential(OrderedDict(
        pad=nn.ZeroPad2d((0, 1, 0, 1)),
        conv=nn.Conv2d(c, c, 3, stride=2)))


class Upsample(nn.Module):
    """[B, c, h, w] -> [B, c, 2h, 2w]: conv(interpolate(x, scale_factor=2)), nearest.

    As one transposed convolution, whose 4x4 kernel sums the 3x3 one in its 2x2 places:
    16 taps for each input pixel and not 4 x 9, so 4/9 of the multiplications.
    """

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        mean_of_four = F.avg_pool2d(self.conv.weight, 2, stride=1, padding=1)   # [c, c, 4, 4]
        kernel = (4 * mean_of_four).flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


def middle_blocks(c, groups):
    """Block, attention, block at the smallest side."""
    return nn.Sequential(OrderedDict(
        block_1=ResBlock(c, c, groups),
        attn_1=Attention(c, groups),
        block_2=ResBlock(c, c, groups)))


class Stage(nn.Module):
    """The blocks of one side, each followed by attention or not: [B, c_in, h, w] -> c_out."""

    def __init__(self, c_in, c_out, blocks, groups, attention):
        super().__init__()
        inputs = [c_in] + [c_out] * (blocks - 1)
        self.block = nn.ModuleList(ResBlock(c, c_out, groups) for c in inputs)
        self.attn = nn.ModuleList(
            Attention(c_out, groups) if attention else nn.Identity() for _ in inputs)
        self.recompute = False      # True: keep each block's input, compute the rest again

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            if self.recompute:
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
            x = attn(x)
        return x


class Encoder(nn.Module):
    """float [B, 3, R, R] -> moments [B, 2C, h, w]."""

    def __init__(self, cfg):
        super().__init__()
        self.patch = cfg.patch
        widths = [cfg.ch * m for m in cfg.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3 * cfg.patch**2, cfg.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([cfg.ch, *widths], widths)):
            stage = Stage(c_in, c_out, cfg.num_res_blocks, cfg.groups, cfg.attn_last and i == last)
            stage.downsample = downsample(c_out) if i < last else nn.Identity()
            self.down.append(stage)
        self.mid = middle_blocks(widths[-1], cfg.groups)
        self.norm_out = nn.GroupNorm(cfg.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * cfg.z_channels, 3, padding=1)

    def forward(self, x):
        if self.patch > 1:
            x = F.pixel_unshuffle(x, self.patch)
        h = self.conv_in(x)                                     # [B, ch, R/patch, R/patch]
        for stage in self.down:
            h = stage.downsample(stage(h))                      # the side halves, but at the last
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents [B, C, h, w] -> features [B, ch, R/patch, R/patch]; to_pixels -> [B, 3, R, R]."""

    def __init__(self, cfg):
        super().__init__()
        self.patch = cfg.patch
        widths = [cfg.ch * m for m in cfg.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(cfg.z_channels, widths[-1], 3, padding=1)
        self.mid = middle_blocks(widths[-1], cfg.groups)
        self.up = nn.ModuleList()                               # up[i] has the side of down[i]
        for i, (c_in, c_out) in enumerate(zip([*widths[1:], widths[-1]], widths)):
            attention = cfg.attn_last and i == last
            stage = Stage(c_in, c_out, cfg.num_res_blocks + 1, cfg.groups, attention)
            stage.upsample = Upsample(c_out) if i > 0 else nn.Identity()
            self.up.append(stage)
        self.norm_out = nn.GroupNorm(cfg.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3 * cfg.patch**2, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            h = stage.upsample(stage(h))                        # the side doubles, but at the first
        return F.silu(self.norm_out(h))

    def to_pixels(self, h):
        """The last layer. It stays outside of the compiled forward: the gradient at it
        (adaptive_gan_weight) would run all of the compiled backward."""
        x = self.conv_out(h)
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x


class VAE(nn.Module):
    """AutoencoderKL. forward(x, noise) is a training pass; encode, sample, decode are its parts."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        C = cfg.z_channels
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1) if cfg.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(C, C, 1) if cfg.quant_conv else nn.Identity()
        self.init_weights()

    def init_weights(self):
        """For a VAE from scratch: convolutions keep the variance, blocks start as shortcuts, the
        posterior's std at exp(-2). So pixels come through the latents' noise from the start."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
                if name.endswith(("conv2", "proj_out")):        # the last of a block
                    nn.init.zeros_(module.weight)
        moments = self.quant_conv if self.cfg.quant_conv else self.encoder.conv_out
        with torch.no_grad():
            moments.weight[self.cfg.z_channels :] *= 0.1
            moments.bias[self.cfg.z_channels :] = -4.0

    def encode(self, x):
        """float [B, 3, R, R] in [-1, 1] -> posterior mean (its mode) and logvar, [B, C, h, w]."""
        mean, logvar = self.quant_conv(self.encoder(x)).float().chunk(2, dim=1)
        if self.cfg.sigma > 0:
            logvar = torch.full_like(mean, 2 * math.log(self.cfg.sigma))
        return mean, logvar.clamp(-30, 20)

    @staticmethod
    def sample(mean, logvar, noise):
        """z = mean + std noise, [B, C, h, w]."""
        return mean + (0.5 * logvar).exp() * noise

    def decode(self, z):
        """Latents [B, C, h, w] -> float [B, 3, R, R], about [-1, 1]."""
        return self.decoder.to_pixels(self.decoder(self.post_quant_conv(z)))

    def forward(self, x, noise):
        """float x [B, 3, R, R], noise [B, C, h, w] -> z, rec, mean, logvar."""
        mean, logvar = self.encode(x)
        z = self.sample(mean, logvar, noise)
        return z, self.decode(z).float(), mean, logvar


# ---- The losses -----------------------------------------------------------------
# Of the VAE and of its discriminator, all in float32.

class Discriminator(nn.Module):
    """PatchGAN of three strided layers (Isola et al., pix2pix): [B, 3, R, R] -> logits of patches.
    It always runs in train mode: its running statistics are never read."""

    def __init__(self, ch=64):
        super().__init__()
        layers = [nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c, stride in ((ch, 2), (2 * ch, 2), (4 * ch, 1)):
            conv = nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False)
            norm = nn.BatchNorm2d(2 * c)
            nn.init.normal_(norm.weight, 1.0, 0.02)
            layers += [conv, norm, nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * ch, 1, 4, 1, 1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, x):
        return self.main(x)


def kl_divergence(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)): sum over the latents' dimensions, mean over images."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()


def reconstruction_loss(x, rec, kind="l1"):
    """Mean absolute ("l1") or squared ("l2") error of pixels in [-1, 1]."""
    loss = F.l1_loss if kind == "l1" else F.mse_loss
    return loss(rec.float(), x)


def generator_loss(fake_logits):
    """The VAE's side of the hinge GAN: -mean D(rec)."""
    return -fake_logits.float().mean()


def discriminator_loss(real_logits, fake_logits):
    """Hinge: 1/2 mean relu(1 - D(x)) + 1/2 mean relu(1 + D(rec))."""
    real = F.relu(1 - real_logits.float()).mean()
    fake = F.relu(1 + fake_logits.float()).mean()
    return 0.5 * (real + fake)


def adaptive_gan_weight(nll, gan, last_layer):
    """LDM's balance of the gradients at the decoder's last layer: |d nll| / |d gan|, detached."""
    d_nll, = torch.autograd.grad(nll, last_layer, retain_graph=True)
    d_gan, = torch.autograd.grad(gan, last_layer, retain_graph=True)
    weight = d_nll.float().norm() / (d_gan.float().norm() + 1e-4)
    return weight.clamp(max=1e4).detach()


class LPIPS(nn.Module):
    """Zhang et al. 2018, on a frozen VGG16: x, rec float [B, 3, R, R] in [-1, 1] -> scalar.
    legacy_range feeds it 2x - 1 of such images, as the authors' first release did."""

    def __init__(self, legacy_range=False):
        super().__init__()
        import lpips            # here: it takes a second, and the tiny preset does without
        with reading(self.file(), "VGG16 for LPIPS: put torchvision's file there, or use "
                     "--lpips=0"):
            self.net = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
        self.legacy_range = legacy_range

    @staticmethod
    def file():
        """Where torchvision keeps VGG16's weights."""
        return Path(torch.hub.get_dir()) / "checkpoints/vgg16-397923af.pth"

    def features(self, x):
        """Five VGG feature maps, each position scaled to unit length. The epsilon is inside the
        root: no NaN in the gradient where a position is all zero."""
        x = 2 * x - 1 if self.legacy_range else x
        maps = self.net.net(self.net.scaling_layer(x))
        return [f / (f.square().sum(1, keepdim=True) + 1e-20).sqrt() for f in maps]

    def forward(self, x, rec):
        with torch.no_grad():
            target = self.features(x)
        distance = 0
        for lin, f, g in zip(self.net.lins, self.features(rec.float()), target):
            distance = distance + lin(F.mse_loss(f, g, reduction="none")).mean()
        return distance


# ---- Images ---------------------------------------------------------------------
# A data set is data[i] -> (image uint8 [3, R, R], label), with .classes (names) and
# .labels; where batches are faster, __getitems__(indices) returns a finished one.

@contextmanager
def reading(file, kind):
    """Parsers of damaged files raise arbitrary exceptions: report each as one line with the file's
    name. `kind` says what is expected there, and what to do."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        if isinstance(error, ValueError) and str(file) in said:
            raise
        if isinstance(error, FileNotFoundError) and not os.path.exists(file):
            raise ValueError(f"no file at {file}, expected {kind}") from error
        raise ValueError(f"cannot read {file} ({type(error).__name__}: {said}), expected "
                         f"{kind}") from error


def load_pt(file, mapped=True):
    """A .pt file -> tensors, numbers and dicts, mapped into memory; nothing in it is executed.
    torch.load looks at no checksum, so the zip's are verified here."""
    zipped = zipfile.is_zipfile(file)
    if zipped and zipfile.ZipFile(file).testzip():
        raise ValueError(f"a checksum in {file} is wrong")
    with torch.serialization.safe_globals([argparse.Namespace]):        # the authors' args
        return torch.load(file, map_location="cpu", weights_only=True,
                          mmap=zipped and mapped)


def load_weights(net, weights):
    """A strict load_state_dict that refuses integers in place of floats, which torch would cast."""
    for key, own in net.state_dict().items():
        if key in weights and weights[key].is_floating_point() != own.is_floating_point():
            raise ValueError(f"{key} is {weights[key].dtype}, expected {own.dtype}")
    net.load_state_dict(weights)


def dicts_in(content):
    """The content of a file and the dicts in it; those of averages (ema) come first."""
    yield content
    inner = [(str(name), value) for name, value in content.items() if isinstance(value, dict)]
    for _, value in sorted(inner, key=lambda item: "ema" not in item[0]):
        yield from dicts_in(value)


def unwrap(content, keys, file):
    """The state dict in a file's content that has these keys: the content itself or a dict in it,
    less what wrappers add to names: module., _orig_mod., and any prefix (first_stage_model.)."""
    found = list(dicts_in(content))
    for weights in found:
        weights = {re.sub(r"(?<![^.])(module|_orig_mod)\.", "", str(name)): value
                   for name, value in weights.items()}
        for name in weights:
            prefix = name.removesuffix(keys[0])
            ends = name.endswith(keys[0]) and (not prefix or prefix.endswith("."))
            if ends and all(prefix + key in weights for key in keys):
                return {other.removeprefix(prefix): value for other, value in weights.items()
                        if other.startswith(prefix)}
    names = [str(name) for weights in found for name in weights]
    dots = " ..." if len(names) > 4 else ""
    raise ValueError(f"{file} holds {', '.join(names[:4]) or 'nothing'}{dots}, expected a network "
                     f"with {keys[0]}")


def collate(batch):
    """A batch as a data set's __getitems__ made it, or a list of (image, label) -> tensors."""
    if isinstance(batch, tuple):
        return batch
    return tuple(torch.utils.data.default_collate(batch))


def fetch(data, indices):
    """The images with these numbers: uint8 [B, 3, R, R], labels [B], and what a cache adds."""
    if hasattr(data, "__getitems__"):
        return data.__getitems__(indices)
    return collate([data[i] for i in indices])


TURNS = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
         5: Image.TRANSPOSE, 6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}


def upright_rgb(image):
    """A PIL image of any mode -> RGB: turned as its EXIF data say, on white where it is
    transparent, 16-bit grey scaled to 8 bits."""
    raw = str(image.tile[0][3]) if getattr(image, "tile", None) else ""     # before it is read
    image.load()
    with suppress(Exception):           # odd EXIF data turn nothing
        image = image.transpose(TURNS[image.getexif()[0x0112]])
    clear = image.info.get("transparency")
    if image.mode.startswith("I"):      # convert("RGB") would clip it
        pixels = np.asarray(image)
        grey = (pixels.clip(0, 65535) / 257).round()
        if clear is not None:
            grey[pixels == clear] = 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if raw in ("L;2", "L;4") and clear is not None:     # PIL scales the pixels, but not this color
        image.info["transparency"] = clear * (85 if raw == "L;2" else 17)
    if raw == "RGB;16B" and clear is not None:
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if clear is not None or image.mode in ("LA", "PA", "RGBA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def middle(image, width, height):
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def center_crop(image, resolution):
    """ADM's crop (Dhariwal and Nichol): PIL image of any size -> uint8 [3, R, R]. It is halved by
    BOX while its short side is at least 2R, brought to R by BICUBIC, and its centre is kept. One
    of more than 64 times its short side is cut to that before: it would be enlarged as a whole."""
    image = upright_rgb(image)
    longest = 64 * min(image.size)
    if max(image.size) > longest:
        image = middle(image, min(image.width, longest), min(image.height, longest))
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = resolution / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    image = middle(image.resize(size, Image.BICUBIC), resolution, resolution)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# what systems leave in folders, beside names that begin with a dot
LEFTOVERS = {"__macosx", "@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle",
             "#snapshot", "$recycle.bin", "recycler", "lost+found", "found.000", "__pycache__",
             "system volume information", "network trash folder", "temporary items", "thumbs.db",
             "ehthumbs.db", "desktop.ini"}
UNREAD = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}     # PIL knows them, but reads none


def leftover(name):
    return name.startswith((".", "~$")) or name.lower() in LEFTOVERS


def suffixes():
    """Of all files that PIL reads."""
    Image.init()
    readable = Image.OPEN.keys() - UNREAD
    return {suffix for suffix, kind in Image.EXTENSION.items() if kind in readable}


class Folder(ImageFolder):
    """FOLDER/class/.../image.jpg, all formats that PIL reads: the classes are the names of the
    folders. A folder of images without class folders is one class, named after it. resolution 0:
    256 px, without class folders the first image's short side.

    left_out: how many other files there are, by suffix. unreadable: uint8 [N], 1 for an image that
    could not be read; data workers share it.
    """

    def __init__(self, path, resolution=0):
        path = Path(path).expanduser().absolute()
        if not path.is_dir():
            raise ValueError(f"no data folder at {path}: name one, or use --data=tiny")
        self.folder, self.left_out, self.suffixes = path, Counter(), suffixes()
        entries = [entry for entry in os.scandir(path) if not leftover(entry.name)]
        folders = sorted(entry.name for entry in entries if entry.is_dir())
        self.names = folders or [path.name]
        if folders and len(folders) < len(entries):
            self.left_out["outside of class folders"] = len(entries) - len(folders)
        with reading(path, "images in each class folder: remove an empty one, or "
                     "name the folder whose subfolders are the classes"):
            super().__init__(path if folders else path.parent, is_valid_file=self.takes)
        self.labels = torch.tensor(self.targets)
        self.unreadable = torch.zeros(len(self), dtype=torch.uint8)
        self.resolution = resolution or (256 if folders else self.own_size())

    def find_classes(self, directory):
        """Called by ImageFolder -> the names, and each one's label."""
        return self.names, {name: i for i, name in enumerate(self.names)}

    def takes(self, file):
        """Called by ImageFolder: is it an image, by its name?"""
        *folders, name = os.path.relpath(file, self.folder).split(os.sep)
        if any(map(leftover, [*folders, name])):
            return False
        suffix = Path(name).suffix.lower()
        if suffix not in self.suffixes:
            self.left_out[suffix or "without a suffix"] += 1
        return suffix in self.suffixes

    @property
    def files(self):
        """Their names below the folder, with slashes."""
        return [Path(os.path.relpath(file, self.folder)).as_posix() for file, _ in self.samples]

    def own_size(self):
        """The short side of the first image that can be read."""
        for file, _ in self.samples:
            with suppress(Exception), Image.open(file) as image:
                return min(image.size)
        raise ValueError(f"{self.folder} holds no image that can be read")

    def read(self, i):
        """Image i itself; ValueError if it can't be read."""
        file, label = self.samples[i]
        with reading(file, "an image: repair or remove it"), Image.open(file) as image:
            return center_crop(image, self.resolution), label

    def __getitem__(self, i):
        """Image i, or the next one that can be read, with that one's label."""
        for j in range(i, i + 100):
            try:
                return self.read(j % len(self))
            except ValueError as error:
                self.unreadable[j % len(self)] = 1
                last = error
        raise ValueError(f"a hundred images in a row cannot be read: {last}")


class Batches:
    """A data set that reads or draws a batch at once, in __getitems__."""

    def __getitem__(self, i):
        images, labels = self.__getitems__([i])
        return images[0], labels[0]


class Pack(Batches):
    """Images uint8 [N, R, R, 3] of one file, cropped before: a memory-mapped .npy, opened by each
    process for itself, or an array. A row with label -1 could not be read: the next one takes its
    place, as in Folder. files: their names, if they had any."""

    def __init__(self, images, labels, classes, files=None):
        self.images, self.files = images, files         # images: a Path or an array
        readable = np.flatnonzero(labels >= 0)
        if not len(readable):
            raise ValueError("it holds no image")
        following = np.searchsorted(readable, np.arange(len(labels))) % len(readable)
        self.rows = readable[following]
        self.labels = torch.from_numpy(labels[self.rows].astype(np.int64))
        self.unreadable = torch.from_numpy((labels < 0).astype(np.uint8))
        self.own_labels = labels.copy()                 # of unreadable rows, too, by their names
        for i in np.flatnonzero(labels < 0) if files else ():
            self.own_labels[i] = classes.index(files[i].split("/")[0]) if "/" in files[i] else 0
        self.classes = [str(name) for name in classes]
        self.resolution = self.array().shape[1]

    def array(self):
        if isinstance(self.images, Path):
            return np.load(self.images, mmap_mode="r")
        return self.images

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, indices):
        images = torch.from_numpy(self.array()[self.rows[indices]])
        return images.permute(0, 3, 1, 2), self.labels[indices]


def open_pack(folder):
    """A folder of `train.py pack`: images.npy, labels.npy, classes.json, files.json."""
    with reading(folder, "a pack of train.py pack: pack the folder again"):
        labels = np.load(folder / "labels.npy")
        classes = json.loads((folder / "classes.json").read_text())
        files = json.loads((folder / "files.json").read_text())
        return Pack(folder / "images.npy", labels, classes, files)


def open_npz(path):
    """An .npz in ADM's layout, in memory: arr_0 uint8 [N, R, R, 3], arr_1 labels [N], classes."""
    with reading(path, "an .npz of images (ADM's layout: arr_0 uint8 [N, R, R, 3])"):
        arrays = np.load(path)
        images = arrays["arr_0"]
        N, R = images.shape[:2]
        labels = arrays.get("arr_1", np.zeros(N, np.int64))
        if images.dtype != np.uint8 or images.shape != (N, R, R, 3) or labels.shape != (N,):
            raise ValueError(f"arr_0 is {images.dtype} {list(images.shape)}, arr_1 "
                             f"{list(labels.shape)}")
        classes = arrays.get("classes", range(labels.max(initial=0) + 1))
        return Pack(images, labels, classes)


def open_images(path, resolution=0):
    """tiny, an .npz, a pack or a folder -> a data set, cropped to R; 0: as Folder, others as they
    come. ValueError says what is wrong."""
    path = os.path.expanduser(path)
    if path == "tiny":
        data = Shapes(resolution or 32)
    elif path.endswith(".npz"):
        data = open_npz(path)
    elif (Path(path) / "images.npy").exists():
        data = open_pack(Path(path))
    else:
        data = Folder(path, resolution)
    if resolution not in (0, data.resolution):
        raise ValueError(f"{path} holds images of {data.resolution} px, expected {resolution}")
    return data


def fingerprint(data):
    """A hash of classes, labels and relative names: which data these are, wherever they are. A pack
    has its folder's. (One class has the name of its folder, which may change.)"""
    if "print" not in vars(data):
        classes = data.classes if len(data.classes) > 1 else 1
        labels = np.asarray(getattr(data, "own_labels", data.labels)).tolist()
        about = json.dumps([classes, labels, getattr(data, "files", None)])
        data.print = hashlib.sha256(about.encode()).hexdigest()[:16]
    return data.print


# ---- The drawn shapes -----------------------------------------------------------
# The data of the tiny preset: each image is a function of its number alone.

class Shapes(Batches):
    """Ten kinds of shapes; position, size, rotation, colors and shading vary. Images 0..length-1,
    counted from `first`, are for training; those beyond are held out."""
    classes = ["disc", "ring", "square", "frame", "triangle", "star", "plus", "heart", "moon",
               "arrow"]

    def __init__(self, resolution=32, length=50_000, first=0):
        self.resolution, self.length, self.first = resolution, length, first
        self.labels = np.array([length])        # stands for the images, which need no list

    def __len__(self):
        return self.length

    def __getitems__(self, indices):
        return self.draw(indices)[:2]

    def draw(self, indices):
        """-> images uint8 [B, 3, R, R], labels [B], masks float [B, R, R] (1 inside the shape)."""
        R = self.resolution
        u = np.stack([np.random.default_rng(self.first + i).random(16) for i in indices])
        u = torch.from_numpy(u).float()[:, :, None, None]           # uniform [B, 16, 1, 1]
        label = (u[:, 0, 0, 0] * 10).long()

        # pixel coordinates X, Y [B, R, R] in the frame of the shape, whose radius is 1
        size = 0.6 + 0.2 * u[:, 1]                                  # in halves of the image
        shift = (u[:, 2:4] - 0.5) * 1.4 * (1 - size)[:, None]       # the shape stays inside
        angle = (u[:, 4] - 0.5) * 0.4                               # +-11 degrees
        gx = (torch.arange(R) + 0.5) / R * 2 - 1
        gy = gx[:, None]
        cos, sin = angle.cos(), angle.sin()
        dx, dy = gx - shift[:, 0], gy - shift[:, 1]
        X = (cos * dx + sin * dy) / size
        Y = (cos * dy - sin * dx) / size

        # signed distance to the edge, in radii, negative inside; the mask is antialiased
        distance = distances(X, Y)[label, range(len(label))]
        mask = (0.5 - distance * size * R / 2).clamp(0, 1)

        # colors [B, 3, 1, 1]: a gradient, and a shape that stands out, shaded the other way
        base, color = (u[:, 5:11] * 0.8 + 0.1).split(3, dim=1)
        far = torch.where(base > 0.5, base - 0.45, base + 0.45)
        differs = (color - base).abs().amax(1, keepdim=True) > 0.4
        color = torch.where(differs, color, far)
        slope = (u[:, 11:14] - 0.5) * 0.6
        direction = u[:, 14] * 2 * math.pi
        along = (direction.cos() * gx + direction.sin() * gy)[:, None]      # [B, 1, R, R]
        back, front = base + slope * along, color - slope * along / 2
        image = back + mask[:, None] * (front - back)
        return (image.clamp(0, 1) * 255).round().to(torch.uint8), label, mask


def distances(X, Y):
    """-> [10, B, R, R]: signed distances, approximate far from the edge, as in .classes."""

    def circle(radius, x=0):
        return ((X - x) ** 2 + Y * Y).sqrt() - radius

    def box(w, h):
        return torch.maximum(X.abs() - w, Y.abs() - h)

    heart = [(0, -0.45), (0.25, -0.8), (0.6, -0.85), (0.92, -0.55),
             (0.9, -0.1), (0.5, 0.45), (0, 0.95)]
    arrow = [(0, -1), (0.8, -0.1), (0.33, -0.1), (0.33, 0.95)]
    return torch.stack([
        circle(0.9),
        circle(0.72).abs() - 0.2,
        box(0.8, 0.8),
        box(0.68, 0.68).abs() - 0.18,
        polygon(X, Y, spokes([1.05] * 3)),
        polygon(X, Y, spokes([1.1, 0.45] * 5)),
        torch.minimum(box(0.95, 0.28), box(0.28, 0.95)),
        polygon(X, Y, mirrored(heart)),
        torch.maximum(circle(0.95), -circle(0.75, x=0.5)),
        polygon(X, Y, mirrored(arrow))])


def spokes(radii):
    """Points around the origin at equal angles, from the top."""
    angles = [-math.pi / 2 + k * 2 * math.pi / len(radii) for k in range(len(radii))]
    return [(radius * math.cos(a), radius * math.sin(a)) for radius, a in zip(radii, angles)]


def mirrored(half):
    """The points of the right half, from the top -> of the whole."""
    return half + [(-x, y) for x, y in reversed(half) if x > 0]


def polygon(X, Y, points):
    """Signed distance to a closed polygon: to the nearest edge; crossings give the sign."""
    nearest = torch.full_like(X, 1e9)
    inside = torch.zeros_like(X, dtype=torch.bool)
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
        ex, ey = x1 - x0, y1 - y0                               # the edge
        px, py = X - x0, Y - y0                                 # pixels, from its start
        along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        dx, dy = px - along * ex, py - along * ey               # from the nearest point of it
        nearest = torch.minimum(nearest, (dx**2 + dy**2).sqrt())
        inside ^= ((y0 > Y) != (y1 > Y)) & (X < ex * py / ey + x0)
    return torch.where(inside, -nearest, nearest)
