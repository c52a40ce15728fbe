"""Pixels and their latents: image data, the KL-VAE, its discriminator and its losses.

    image x  uint8 [B, 3, R, R] in 0..255          (every file and every function boundary)
      |  to_float                                  float [B, 3, R, R] in [-1, 1]  (inside this file only)
      v
    encoder -> mean, logvar  [B, C, h, w]          h = w = R / 8 (f8) or R / 16 (f16)
      |  z = mean + exp(logvar / 2) * noise        the unnormalised latents that SiT is trained on
      v
    decoder -> rec  float [B, 3, R, R]  -- to_uint8 -->  image

| preset | C  | latents of 256 px | parameters | the VAE of                                   |
|--------|----|-------------------|------------|----------------------------------------------|
| f8d4   | 4  | 4 x 32 x 32       | 83,653,863 | Stable Diffusion 1 and 2, SDXL, REPA-E sdvae |
| f16d32 | 32 | 32 x 16 x 16      | 69,836,067 | REPA-E invae and vavae                       |
| f8d16  | 16 | 16 x 32 x 32      | 83,819,683 | Stable Diffusion 3, FLUX                     |
| tiny   | 8  | 8 x 8 x 8 (32 px) | 622,232    | the laptop preset                            |

    python vae.py pack imagenet/train imagenet.npz          # crop once, train from one memory-mapped file
    torchrun --nproc_per_node=8 vae.py encode sdvae imagenet.npz latents    # for runs with a frozen VAE
    python vae.py export runs/repa-e --to my-vae            # for diffusers, and as the authors' files
    python vae.py reconstruct runs/repa-e photos --out=grid.png

Names of modules follow latent-diffusion's AutoencoderKL, so that published weights load without a converter.
"""
import argparse
import copy
import errno
import hashlib
import io
import json
import math
import os
import pickle
import re
import zipfile
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

class Unreadable(ValueError):
    """One line about a file."""

@contextmanager
def reading(path, kind, cure="replace it"):
    """A damaged file may lead its reader anywhere: whatever that raises becomes one line that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise Unreadable(f"no file at {path}, expected a {kind}") from None
    except Exception as error:
        said = one_line(error)
        if isinstance(error, (Unreadable, torch.OutOfMemoryError)) or type(error) is ValueError and str(path) in said:
            raise                                               # it is such a line already, or not the file's fault
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):      # a damaged zip seeks anywhere
            raise Unreadable(f"cannot read {path} ({error.strerror})") from error
        if isinstance(error, pickle.UnpicklingError):
            said = "it holds more than weights, which is never loaded, or something else"
        what = "is damaged or no" if os.path.exists(path) else "is missing, expected a"
        raise Unreadable(f"{path} {what} {kind} ({said}): {cure}") from error

def one_line(error):
    """What an exception says, in one line."""
    said = " ".join(str(error).split())[:300]
    return said if said and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__} {said}".strip()

# ----------- Images. A data set has .classes (names), len(), and data[[i, j, ...]] -> (uint8 [B, 3, R, R], int64 [B]).

def to_float(image):
    """uint8 0..255 -> float32 in [-1, 1]."""
    return image.float() / 127.5 - 1

def to_uint8(x):
    """float in [-1, 1] -> uint8 0..255, rounded to the nearest level (truncation would darken by half a level)."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

def center_crop(image, resolution):
    """ADM's crop (Dhariwal and Nichol, "Diffusion Models Beat GANs"): PIL image of any size -> uint8 [3, R, R].
    It is halved by BOX while its short side is at least 2R, brought to R by BICUBIC, and its centre is kept."""
    if image.mode.startswith("I"):  # 16-bit greyscale: convert("RGB") would clip it
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    image = image.convert("RGB")
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    pixels = np.asarray(image)[top : top + resolution, left : left + resolution]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

class Folder:
    """A tree FOLDER/class/image.jpg: classes are the sorted names of the folders. Or a folder of images: one class."""
    SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
    def __init__(self, path, resolution=0):
        path, self.files, self.labels = Path(path), [], []
        if not path.is_dir():
            raise ValueError(f"no data folder at {path}: expected a tree like {path}/dog/1.jpg, or use --data=tiny")
        folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        self.classes, self.resolution = folders or [path.absolute().name], resolution
        for label, name in enumerate(self.classes):
            folder = path / name if folders else path
            found = [str(folder / file) for file in sorted(os.listdir(folder)) if file.lower().endswith(self.SUFFIXES)]
            if not found:
                raise ValueError(f"class folder {folder} holds no images ({', '.join(self.SUFFIXES)}): remove it, or "
                                 "name the folder whose subfolders are the classes (or that holds the images)")
            self.files += found
            self.labels += [label] * len(found)
        self.resolution = resolution or (256 if folders else self.read(0, lambda image, _: min(image.size)))
    def __len__(self):
        return len(self.files)
    def read(self, i, crop=center_crop):
        """-> image i, uint8 [3, R, R]."""
        with reading(self.files[i], "image", "repair or remove it"), Image.open(self.files[i]) as image:
            return crop(image, self.resolution)
    def __getitem__(self, indices):
        return torch.stack([self.read(i) for i in indices]), torch.tensor([self.labels[i] for i in indices])

class Shapes:
    """The data of the `tiny` world: ten kinds of shapes, drawn on demand, each image a function of its index alone.
    The label is the shape; its position, size, rotation, colours and shading vary. Images 0..length-1 are for
    training; indices beyond are held-out data."""
    classes = ["disc", "ring", "square", "frame", "triangle", "star", "plus", "heart", "moon", "arrow"]
    def __init__(self, resolution=32, length=50_000, first=0):
        self.resolution, self.length, self.first = resolution, length, first
    def __len__(self):
        return self.length
    def __getitem__(self, indices):
        return self.draw(indices)[:2]
    def draw(self, indices):
        """Indices -> images uint8 [B, 3, R, R], labels [B], masks float [B, R, R] (1 inside the shape)."""
        B, R = len(indices), self.resolution
        # each image's own uniform numbers u [B, 16, 1, 1]
        u = np.stack([np.random.default_rng(self.first + i).random(16) for i in indices])
        u = torch.from_numpy(u).float()[:, :, None, None]
        label = (u[:, 0, 0, 0] * 10).long()
        # pixel coordinates in the frame of the shape, whose "radius" is 1: X, Y [B, R, R]
        size = 0.6 + 0.2 * u[:, 1]                                  # half-width in units of half an image: [B, 1, 1]
        shift = (u[:, 2:4] - 0.5) * 1.4 * (1 - size)[:, None]       # the shape stays inside the image
        angle = (u[:, 4] - 0.5) * 0.4                               # +-11 degrees
        gx = (torch.arange(R) + 0.5) / R * 2 - 1
        gy = gx[:, None]
        dx, dy = gx - shift[:, 0], gy - shift[:, 1]
        cos, sin = angle.cos(), angle.sin()
        X, Y = (cos * dx + sin * dy) / size, (cos * dy - sin * dx) / size
        # signed distance to the shape's edge, negative inside: [B, R, R], in units of the radius
        distance = self.distances(X, Y).gather(0, label[None, :, None, None].expand(1, B, R, R))[0]
        mask = (0.5 - distance * size * R / 2).clamp(0, 1)          # anti-aliased over one pixel
        # colours [B, 3, 1, 1]: a background gradient, and a shape that stands out from it, shaded the other way
        base, hue = u[:, 5:8] * 0.8 + 0.1, u[:, 8:11] * 0.8 + 0.1
        far = torch.where(base > 0.5, base - 0.45, base + 0.45)
        colour = torch.where((hue - base).abs().amax(1, keepdim=True) > 0.4, hue, far)
        slope, direction = (u[:, 11:14] - 0.5) * 0.6, u[:, 14] * 2 * math.pi
        along = (direction.cos() * gx + direction.sin() * gy)[:, None]                  # [B, 1, R, R], about -1 to 1
        back, front = base + slope * along, colour - slope * along / 2
        image = back + mask[:, None] * (front - back)
        return (image.clamp(0, 1) * 255).round().to(torch.uint8), label, mask
    @staticmethod
    def distances(X, Y):
        """Coordinates -> [10, B, R, R]: signed distances (approximate far from the edge) in the order of .classes."""
        r, ax = (X * X + Y * Y).sqrt(), X.abs()
        def box(x, y, w, h):
            return torch.maximum(x.abs() - w, y.abs() - h)
        def polygon(points):
            """Distance to a closed polygon: the nearest edge, the sign by counting crossings."""
            nearest, inside = torch.full_like(X, 1e9), torch.zeros_like(X, dtype=torch.bool)
            for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
                ex, ey, px, py = x1 - x0, y1 - y0, X - x0, Y - y0
                along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
                nearest = torch.minimum(nearest, ((px - along * ex) ** 2 + (py - along * ey) ** 2).sqrt())
                if y0 != y1:
                    inside ^= ((y0 > Y) != (y1 > Y)) & (X < ex * py / ey + x0)
            return torch.where(inside, -nearest, nearest)
        def spokes(radii):
            angles = [-math.pi / 2 + k * 2 * math.pi / len(radii) for k in range(len(radii))]
            return [(radius * math.cos(a), radius * math.sin(a)) for radius, a in zip(radii, angles)]
        heart = [(0, -0.45), (0.25, -0.8), (0.6, -0.85), (0.92, -0.55), (0.9, -0.1), (0.5, 0.45), (0, 0.95)]
        heart = heart + [(-x, y) for x, y in heart[-2:0:-1]]
        arrow = [(0, -1), (0.8, -0.1), (0.33, -0.1), (0.33, 0.95), (-0.33, 0.95), (-0.33, -0.1), (-0.8, -0.1)]
        plus = torch.minimum(box(ax, Y, 0.95, 0.28), box(ax, Y, 0.28, 0.95))
        moon = torch.maximum(r - 0.95, 0.75 - ((X - 0.5) ** 2 + Y * Y).sqrt())
        return torch.stack([r - 0.9, (r - 0.72).abs() - 0.2, box(X, Y, 0.8, 0.8), box(X, Y, 0.68, 0.68).abs() - 0.18,
                            polygon(spokes([1.05] * 3)), polygon(spokes([1.1, 0.45] * 5)), plus, polygon(heart), moon,
                            polygon(arrow)])

class Packed:
    """An .npz in ADM's layout, memory-mapped: arr_0 uint8 [N, R, R, 3], labels arr_1 [N] (-1: not an image), classes.
    Such are the files of `vae.py pack`, of sample.py, and ADM's references; the other arrays are in .held."""
    def __init__(self, path):
        self.path, self.shape = path, (0, 0, 0, 3)              # without arr_0: no images
        with reading(path, ".npz of images"), zipfile.ZipFile(path) as arrays, open(path, "rb") as file:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in arrays.filelist}
            if "checksums" in entries:                          # then each image has its own
                arrays.filelist = [entry for name, entry in entries.items() if name != "arr_0"]
            if bad := arrays.testzip():
                raise ValueError(f"the checksum of {bad} differs")
            images = entries.pop("arr_0", None)
            self.held = {name: read_npy(arrays.read(entry)) for name, entry in entries.items()}
            if images:
                if images.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("arr_0 is compressed: write it with np.savez")
                file.seek(images.header_offset + 26)            # a zip entry: 30 bytes, its name, extras, the array
                file.seek(sum(np.frombuffer(file.read(4), "<u2").tolist()), os.SEEK_CUR)
                self.shape, columns, dtype = npy_header(file)
                self.offset = file.tell()
                if (dtype, *self.shape[1:]) != (np.uint8, *self.shape[1:2] * 2, 3) or columns:
                    raise ValueError(f"arr_0 is {dtype} {list(self.shape)}, expected uint8 [N, R, R, 3] by rows")
                if self.offset + math.prod(self.shape) > os.path.getsize(path):
                    raise ValueError(f"arr_0 claims {list(self.shape)}, more than the file holds")
            labels = self.held.get("arr_1", np.zeros(self.shape[0], np.int64))
            top = min(int(labels.max(initial=0)), 2**20)
            names, sums = self.held.get("classes", np.arange(top + 1).astype(str)), self.held.get("checksums", labels)
            whole = all(array.dtype.kind in "iu" and array.shape == self.shape[:1] for array in (labels, sums))
            named = names.dtype.kind == "U" and names.ndim == 1 and top < len(names)
            if not whole or not named or labels.min(initial=0) < -1:
                raise ValueError(f"arr_1, classes or checksums do not fit {self.shape[0]} images, {names.size} classes")
            self.classes = names.tolist()
        self.rows, self.resolution = np.flatnonzero(labels >= 0), self.shape[1]
        self.labels = torch.from_numpy(labels[self.rows].astype(np.int64))
    def __len__(self):
        return len(self.rows)
    def __getitem__(self, indices):
        rows = self.rows[list(indices)]
        images = np.memmap(self.path, np.uint8, "r", self.offset, self.shape)[rows]
        for row, image in zip(rows, images if "checksums" in self.held else ()):
            if zlib.crc32(image) != self.held["checksums"][row]:
                raise ValueError(f"{self.path}: image {row} is damaged (its checksum differs): pack the folder again")
        return torch.from_numpy(images).permute(0, 3, 1, 2), self.labels[list(indices)]

def npy_header(file):
    """-> shape, order (by columns?), dtype of an .npy, whose data begin where the file is then."""
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)

def read_npy(raw):
    """The bytes of an .npy -> array. What its header claims must be there: it allocates nothing."""
    shape, columns, dtype = npy_header(file := io.BytesIO(raw))
    return np.frombuffer(bytearray(raw), dtype, offset=file.tell()).reshape(shape, order="F" if columns else "C")

def write_npz(path, shape, images, **arrays):
    """Images uint8 [3, R, R], N of them in turn, to an .npz in ADM's layout: arr_0 of this shape (N, R, R, 3), never
    whole in memory, then arrays (read when the images are through). Complete or not there, the same bytes each time."""
    temporary = Path(f"{path}.tmp")
    with zipfile.ZipFile(temporary, "w") as file:
        with file.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
            for image in images:
                entry.write(image.permute(1, 2, 0).contiguous().numpy())
        for name, array in arrays.items():
            with file.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(array))
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)

def pack(folder: str, out: str, resolution: int = 256):
    """Crops a tree of images once, on all cores, into the .npz that --data takes in its place, with checksums. Images
    that can't be read are named, counted and left out."""
    data, labels, checksums, unreadable = Folder(folder, resolution), [], [], []
    shape = (len(data), data.resolution, data.resolution, 3)
    if not out.endswith(".npz"):
        raise ValueError(f"{out}: the name of a pack ends in .npz")
    def read(i):
        try:
            return data.read(i), None
        except ValueError as error:
            return torch.zeros(3, *shape[1:3], dtype=torch.uint8), error
    def images():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for first in tqdm(range(0, len(data), 512), "packing", unit_scale=512):
                block = range(first, min(first + 512, len(data)))
                for i, (image, error) in zip(block, pool.map(read, block)):
                    if error:
                        print(error, flush=True)
                        unreadable.append(data.files[i])
                    labels.append(-1 if error else data.labels[i])
                    checksums.append(zlib.crc32(image.permute(1, 2, 0).contiguous().numpy()))
                    yield image
    write_npz(out, shape, images(), arr_1=labels, classes=data.classes, checksums=checksums, unreadable=unreadable)
    print(f"{out}: {len(data) - len(unreadable)} images, {len(unreadable)} unreadable")

def open_images(path, resolution=0):
    """'tiny', an .npz or a folder's path -> a data set (see the head of this section), cropped to R; 0: a tree to
    256 px, others as they come (tiny 32, a folder of images like its first). ValueError says what is wrong."""
    data = (Shapes(resolution or 32) if path == "tiny" else Packed(path) if path.endswith(".npz") else
            Folder(path, resolution))
    if resolution not in (0, data.resolution):
        raise ValueError(f"{path} holds images of {data.resolution} px, expected {resolution}")
    return data

def open_for(vae, path, resolution):
    """open_images, of a resolution that the VAE can encode."""
    data = open_images(path, resolution)
    if data.resolution % vae.cfg.downsampling:
        raise ValueError(f"{path} at {data.resolution} px: give --resolution=, a multiple of {vae.cfg.downsampling}")
    return data

def grid(images, columns=None):
    """uint8 [N, 3, R, R] -> uint8 [3, rows R, columns R], row by row, black where N ends."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    cells = torch.cat([images.cpu(), torch.zeros(rows * columns - len(images), *images.shape[1:], dtype=torch.uint8)])
    return cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)

def save_png(path, image):
    """uint8 [3, H, W] -> a PNG file, small images enlarged so that they can be looked at."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    ImageOps.scale(picture, max(1, 640 // picture.width), Image.NEAREST).save(path)

def principal_colours(z, side):
    """Latents [M, C, h, w] -> uint8 [M, 3, side, side]: their first three principal components as red, green, blue."""
    flat = z.permute(0, 2, 3, 1).flatten(0, 2)                                      # [M h w, C]
    rgb = (flat - flat.mean(0)) @ torch.linalg.eigh(flat.T.cov())[1].flip(1)[:, :3]
    low, high = (torch.as_tensor(np.quantile(rgb.numpy(), q, 0), dtype=rgb.dtype) for q in (0.01, 0.99))
    rgb = ((rgb - low) / (high - low) * 2 - 1).view(len(z), *z.shape[2:], 3).permute(0, 3, 1, 2)
    return to_uint8(F.interpolate(rgb, (side, side), mode="nearest"))

# ----------- The autoencoder (Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", app. G).

@dataclass(frozen=True)
class VAEConfig:
    z_channels: int = 4             # C, channels of the latents
    ch: int = 128                   # channels of the first level
    ch_mult: tuple = (1, 2, 4, 4)   # channels of each level, in units of ch; every level but the last halves the side
    num_res_blocks: int = 2         # per level (one more in the decoder)
    groups: int = 32                # of every GroupNorm
    attn_last: bool = False         # self-attention after each block of the last level, not only in the middle
    quant_conv: bool = True         # 1x1 convs around the latents
    patch: int = 1                  # > 1: pixel-unshuffle before the encoder, shuffle after the decoder (tiny)
    sigma: float = 0.0              # > 0: fixed posterior std, only the mean is learnt (LatentLM's sigma-VAE)
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
    """x [B, c_in, h, w] -> [B, c_out, h, w]: x + conv(silu(norm(conv(silu(norm(x))))))."""
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps=1e-6), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps=1e-6), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)

class Attention(nn.Module):
    """Self-attention over the h*w positions, one head of width c."""
    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))
    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).mT.contiguous()[:, None] for f in (self.q, self.k, self.v))    # [B, 1, hw, c]
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)

def chain(**modules):
    """Modules in turn, under these names."""
    return nn.Sequential(OrderedDict(modules))

def downsample(c):
    """[B, c, h, w] -> [B, c, h/2, w/2]: padded on the right and at the bottom only, as in latent-diffusion."""
    return chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2))

class Upsample(nn.Module):
    """[B, c, h, w] -> [B, c, 2h, 2w]: each pixel becomes 2x2 equal ones, then a 3x3 convolution. As one transposed
    convolution, whose 4x4 kernel is the sum of the 3x3 one in its 2x2 places, that takes 4/9 of the products."""
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)
    def forward(self, x):
        kernel = 4 * F.avg_pool2d(self.conv.weight, 2, stride=1, padding=1)         # [c, c, 4, 4], a sum by 4 * mean
        return F.conv_transpose2d(x, kernel.flip(2, 3).transpose(0, 1), self.conv.bias, stride=2, padding=1)

def middle(c, groups):
    return chain(block_1=ResBlock(c, c, groups), attn_1=Attention(c, groups), block_2=ResBlock(c, c, groups))

class Level(nn.Module):
    """The blocks of one resolution, each followed by attention or none: [B, c_in, h, w] -> [B, c_out, h, w]."""
    def __init__(self, c_in, c_out, blocks, groups, attention):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(c_out, groups) if attention else nn.Identity() for _ in range(blocks))
        self.recompute = False      # True: keep each block's input alone, and compute the rest again in the backward
    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
                     if self.recompute and torch.is_grad_enabled() else block(x))
        return x

class Encoder(nn.Module):
    """float [B, 3, R, R] -> moments [B, 2C, h, w]."""
    def __init__(self, cfg):
        super().__init__()
        widths, last = [cfg.ch * m for m in cfg.ch_mult], len(cfg.ch_mult) - 1
        self.patch = cfg.patch
        self.conv_in = nn.Conv2d(3 * cfg.patch**2, cfg.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([cfg.ch] + widths, widths)):
            self.down.append(Level(c_in, c_out, cfg.num_res_blocks, cfg.groups, cfg.attn_last and i == last))
            self.down[i].downsample = downsample(c_out) if i < last else nn.Identity()
        self.mid = middle(widths[-1], cfg.groups)
        self.norm_out = nn.GroupNorm(cfg.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * cfg.z_channels, 3, padding=1)
    def forward(self, x):
        h = self.conv_in(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)     # [B, ch, R/patch, R/patch]
        for level in self.down:
            h = level.downsample(level(h))                                              # side halves, but at the last
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))                        # [B, 2C, h, w]

class Decoder(nn.Module):
    """latents [B, C, h, w] -> features [B, ch, R/patch, R/patch]; `to_pixels` makes float [B, 3, R, R] of them."""
    def __init__(self, cfg):
        super().__init__()
        widths, last = [cfg.ch * m for m in cfg.ch_mult], len(cfg.ch_mult) - 1
        self.patch = cfg.patch
        self.conv_in = nn.Conv2d(cfg.z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], cfg.groups)
        self.up = nn.ModuleList()                                                       # up[i]: same side as down[i]
        for i, (c_in, c_out) in enumerate(zip(widths[1:] + widths[-1:], widths)):
            self.up.append(Level(c_in, c_out, cfg.num_res_blocks + 1, cfg.groups, cfg.attn_last and i == last))
            self.up[i].upsample = Upsample(c_out) if i > 0 else nn.Identity()
        self.norm_out = nn.GroupNorm(cfg.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3 * cfg.patch**2, 3, padding=1)
    def forward(self, z):
        h = self.mid(self.conv_in(z))                                                   # [B, ch * ch_mult[-1], h, w]
        for level in reversed(self.up):
            h = level.upsample(level(h))                                                # side doubles, but at the first
        return F.silu(self.norm_out(h))                                                 # [B, ch, R/patch, R/patch]
    def to_pixels(self, h):
        """The last layer, apart from the rest: torch.compile makes one node of forward, and the gradient at this
        layer (adaptive_gan_weight) would run all of its backward."""
        x = self.conv_out(h)                                                            # [B, 3 patch^2, R/patch, ...]
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x

class VAE(nn.Module):
    """AutoencoderKL. forward(x, noise) is one training pass; encode, sample and decode are its parts."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, C = cfg, cfg.z_channels
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1) if cfg.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(C, C, 1) if cfg.quant_conv else nn.Identity()
        self.initialise()
    def initialise(self):
        """For a VAE from scratch: convs keep the variance, blocks start as shortcuts, the posterior's std at exp(-2).
        So pixels come through the latents' noise from the first step; PyTorch's init shrinks them in each conv."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
                if name.endswith(("conv2", "proj_out")):                                # the last of a block
                    nn.init.zeros_(module.weight)
        moments = self.quant_conv if self.cfg.quant_conv else self.encoder.conv_out
        with torch.no_grad():
            moments.weight[self.cfg.z_channels :] *= 0.1
            moments.bias[self.cfg.z_channels :] = -4.0
    def encode(self, x):
        """float [B, 3, R, R] in [-1, 1] -> posterior mean, logvar, float32 [B, C, h, w]. The mean is also its mode."""
        mean, logvar = self.quant_conv(self.encoder(x)).float().chunk(2, dim=1)
        if self.cfg.sigma > 0:
            logvar = torch.full_like(mean, 2 * math.log(self.cfg.sigma))
        return mean, logvar.clamp(-30, 20)
    @staticmethod
    def sample(mean, logvar, noise):
        """z = mean + std * noise, [B, C, h, w]."""
        return mean + (0.5 * logvar).exp() * noise
    def decode(self, z):
        """latents [B, C, h, w] -> float [B, 3, R, R], about [-1, 1]."""
        return self.decoder.to_pixels(self.decoder(self.post_quant_conv(z)))
    def forward(self, x, noise):
        """float x, noise [B, C, h, w] -> z, reconstruction, mean, logvar."""
        mean, logvar = self.encode(x)
        z = self.sample(mean, logvar, noise)
        return z, self.decode(z).float(), mean, logvar

class Discriminator(nn.Module):
    """PatchGAN with three strided layers (Isola et al., pix2pix): float [B, 3, R, R] -> logits, one per patch."""
    def __init__(self, ch=64):
        super().__init__()
        def layer(c_in, c_out, stride):
            conv, norm = nn.Conv2d(c_in, c_out, 4, stride, 1, bias=False), nn.BatchNorm2d(c_out)
            nn.init.normal_(norm.weight, 1.0, 0.02)
            return conv, norm, nn.LeakyReLU(0.2)
        self.main = nn.Sequential(
            nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.2), *layer(ch, 2 * ch, 2), *layer(2 * ch, 4 * ch, 2),
            *layer(4 * ch, 8 * ch, 1), nn.Conv2d(8 * ch, 1, 4, 1, 1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
    def forward(self, x):
        return self.main(x)

# ----------------------------------------------------- The losses of the VAE and of the discriminator. All in float32.

def kl_divergence(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)): summed over the latents' dimensions, averaged over the batch."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()

def reconstruction_loss(x, rec, kind="l1"):
    """Mean absolute ("l1", the released configuration) or squared ("l2", the paper's text) error, pixels in [-1, 1]."""
    return F.l1_loss(rec.float(), x) if kind == "l1" else F.mse_loss(rec.float(), x)

def generator_loss(fake_logits):
    """The VAE's side of the hinge GAN: - mean D(rec)."""
    return -fake_logits.float().mean()

def discriminator_loss(real_logits, fake_logits):
    """Hinge: 1/2 mean relu(1 - D(x)) + 1/2 mean relu(1 + D(rec))."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())

def adaptive_gan_weight(nll, gan, last_layer):
    """LDM's balance of the two gradients at the decoder's last layer: |d nll| / |d gan|, at most 1e4, no gradient."""
    d_nll, d_gan = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm() for loss in (nll, gan))
    return (d_nll / (d_gan + 1e-4)).clamp(0, 1e4).detach()

class Perceptual(nn.Module):
    """LPIPS (Zhang et al. 2018) on VGG16 features, frozen: x, rec float in [-1, 1] -> scalar.
    legacy_range feeds 2x - 1 of images that are already in [-1, 1], as the authors' first release did."""
    def __init__(self, legacy_range=False):
        super().__init__()
        import lpips  # here, because `tiny` runs and most tests need neither it nor its scipy
        with reading(f"{torch.hub.get_dir()}/checkpoints/vgg16-397923af.pth", "VGG16 for LPIPS",
                     "put torchvision's file there, or switch the loss off with --lpips=0"):
            self.net = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
        self.legacy_range = legacy_range
    def train(self, mode=True):
        return super().train(False)  # the package's dropout never runs
    def features(self, x):
        """Five VGG feature maps, each position scaled to unit length (no NaN gradient where a position is all zero)."""
        maps = self.net.net(self.net.scaling_layer(2 * x - 1 if self.legacy_range else x))
        return [f / (f.square().sum(1, keepdim=True) + 1e-20).sqrt() for f in maps]
    def forward(self, x, rec):
        with torch.no_grad():
            target = self.features(x)
        # sum over the five maps of the weighted squared difference, averaged over positions and images
        return sum(lin(F.mse_loss(f, g, reduction="none")).mean()
                   for lin, f, g in zip(self.net.lins, self.features(rec.float()), target))

# ----------------------------- Loading. Everything is read with weights_only=True: nothing in a file is ever executed.

PUBLISHED = {"sdvae": "f8d4", "invae": "f16d32", "vavae": "f16d32"}     # the authors' start VAEs: name -> preset

def known(name):
    """`sdvae`, `hf:OWNER/NAME[/FOLDER]` (an AutoencoderKL), `hf:OWNER/NAME/FILE` -> a repository of huggingface.co and
    its files, the weights last; None for other names."""
    if name in PUBLISHED:
        parts = ("-latents-stats", "-discriminator-ckpt", "")
        return f"REPA-E/{name}", [f"{name}-{PUBLISHED[name]}{part}.pt" for part in parts]
    if not re.fullmatch(r"hf:[^/]+/[^/]+(/.+)?", name):
        return None
    owner, repository, *path = name[3:].split("/")
    files = [[]] if path and "." in path[-1] else [["config.json"], ["diffusion_pytorch_model.safetensors"]]
    return f"{owner}/{repository}", ["/".join(path + file) for file in files]

def download(repository, files):
    """-> the local path of the last file. Each is downloaded once, to torch.hub's cache."""
    for file in files:
        target = Path(torch.hub.get_dir()) / "checkpoints" / repository.replace("/", "--") / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            url = f"https://huggingface.co/{repository}/resolve/main/{file}"
            try:
                torch.hub.download_url_to_file(url, str(target))
            except OSError as error:
                raise ValueError(f"cannot download {url} ({error}): put it at {target}, or name a local file") from None
    return target

def find_checkpoint(name):
    """A file; a folder (a run's, also the authors': its newest checkpoint; diffusers': its weights); or a known name,
    which is downloaded -> the path of the weights."""
    path = Path(name)
    if not path.exists() and known(str(name)):
        return download(*known(str(name)))
    if not path.is_dir():
        return path
    steps = [p for p in [*path.glob("*.pt"), *path.glob("checkpoints/*.pt")] if re.fullmatch(r"(step_)?\d{7,}", p.stem)]
    weights = [p for p in (path / f"diffusion_pytorch_model.{end}" for end in ("safetensors", "bin")) if p.exists()]
    weights += [p for p in (path / "state.pt", path / "state.prev.pt") if p.exists()]       # a run without snapshots
    if not steps and not weights:
        raise ValueError(f"{path} holds no checkpoint (step_0000000.pt or state.pt): name a run's folder or a file")
    return max(steps, key=lambda p: int(p.stem.removeprefix("step_"))) if steps else weights[0]

def read_weights(path):
    """A .pt file -> its content (tensors, numbers, dicts), mapped into memory."""
    with reading(path, "PyTorch file"), torch.serialization.safe_globals([argparse.Namespace]):     # the authors' args
        zipped = zipfile.is_zipfile(path)
        if zipped and (bad := zipfile.ZipFile(path).testzip()):         # torch.load looks at no checksum
            raise ValueError(f"the checksum of {bad} differs")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        for value in tree_leaves(content):
            if isinstance(value, torch.Tensor) and value.nbytes > value.untyped_storage().nbytes():
                raise ValueError(f"a tensor claims {list(value.shape)}, more than the file holds")
        return content

def read_json(path):
    with reading(path, "JSON file"):
        return dict(json.loads(path.read_text()))

def misfits(own, state):
    """A line for each tensor of own that has another shape or kind (float, int, bool, complex) in the state dict."""
    def form(value):
        if not isinstance(value, torch.Tensor):
            return type(value).__name__
        return f"{re.sub('bfloat|[0-9]', '', str(value.dtype)[6:]) or 'float'}{tuple(value.shape)}"
    return [f"{key} is {form(state[key])}, expected {form(value)}" for key, value in own.items()
            if key in state and form(state[key]) != form(value)]

def load_strict(module, state, what):
    """load_state_dict that names the first missing, unexpected and misshapen keys in one line."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    problems = [f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                for kind, keys in (("missing", missing), ("unexpected", extra), ("misshapen", misfits(own, state)))
                if keys]
    if problems:
        raise ValueError(f"{what} does not fit: {'; '.join(problems)}")
    module.load_state_dict(state)
    return module

def guess_config(state):
    """The architecture of a VAE with latent-diffusion's names, read off its shapes (GroupNorm: 32 groups)."""
    ch = state["encoder.conv_in.weight"].shape[0]
    levels, blocks = (sum(bool(re.fullmatch(rf"encoder\.down\.{place}\.conv1\.weight", key)) for key in state)
                      for place in (r"\d+\.block\.0", r"0\.block\.\d+"))
    mult = tuple(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // ch for i in range(levels))
    return VAEConfig(state["decoder.conv_in.weight"].shape[1], ch, mult, blocks,
                     attn_last=f"encoder.down.{levels - 1}.attn.0.q.weight" in state,
                     quant_conv="quant_conv.weight" in state)

def config_from_dict(cls, values):
    """A dataclass from a checkpoint's dict (lists back to tuples, unknown keys refused)."""
    if unknown := set(values) - {f.name for f in fields(cls)}:
        raise ValueError(f"{cls.__name__} has no field {sorted(unknown)}: written by a newer version?")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

def load_vae(name):
    """A VAE by name or path -> vae; its latents' mean and variance ([C] each) or None; its discriminator's state dict
    or None. A name: of VAES (random weights); `sdvae`, `invae`, `vavae` (the authors') or `hf:OWNER/NAME[/FOLDER]`
    (a diffusers AutoencoderKL), downloaded once. A path: a checkpoint or run of ours or the authors'; an AutoencoderKL;
    latent-diffusion's names, and if they lie beside it `<stem>-latents-stats.pt` and `<stem>-discriminator-ckpt.pt`."""
    if name in VAES:
        return VAE(VAES[name]), None, None
    path, stats, disc = find_checkpoint(name), None, None
    file = read_safetensors(path) if path.suffix == ".safetensors" else read_weights(path)
    with reading(path, "VAE with latent-diffusion's or diffusers' names"):
        state = file.get("vae_ema") or file.get("vae", file.get("state_dict", file))
        if "vae" in file:                                               # a checkpoint with all networks
            cfg = config_from_dict(VAEConfig, file["vae_config"]) if "vae_config" in file else guess_config(state)
            ema, disc = file.get("ema") or {}, file.get("discriminator")
            stats = (ema["bn.running_mean"], ema["bn.running_var"]) if "bn.running_mean" in ema else None
        elif "encoder.conv_norm_out.weight" in state:
            cfg, state, stats = from_diffusers(path, state)
        else:
            cfg, stem = guess_config(state), str(path).removesuffix(".pt")
            state = {key: value for key, value in state.items() if not key.startswith(("loss.", "model_ema."))}  # SD's
            if os.path.exists(f"{stem}-latents-stats.pt"):              # scale = 1 / std, bias = mean, [1, C, 1, 1]
                saved = read_weights(f"{stem}-latents-stats.pt")
                mean, scale = saved["latents_bias"].flatten(), saved["latents_scale"].flatten()
                stats = mean, scale.double().pow(-2).float() if scale.is_floating_point() else scale
            if os.path.exists(f"{stem}-discriminator-ckpt.pt"):
                disc = read_weights(f"{stem}-discriminator-ckpt.pt")
                if not isinstance(disc, dict) or "main.0.weight" not in disc:
                    raise Unreadable(f"{stem}-discriminator-ckpt.pt is no PatchGAN: main.0.weight is missing")
        names = "mean of its latents", "variance of its latents"
        if stats and (wrong := misfits(dict.fromkeys(names, torch.zeros(cfg.z_channels)), dict(zip(names, stats)))):
            raise ValueError(f"{path}: the {wrong[0]}")
        return load_strict(VAE(cfg), state, str(path)), stats, disc

# -------------------------------------------- diffusers' AutoencoderKL, both ways: the same network under other names.

DIFFUSERS_NAMES = (
    ("down.", "down_blocks."), ("up.", "up_blocks."), ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."), ("mid.attn_1.", "mid_block.attentions.0."), (".block.", ".resnets."),
    (".attn.", ".attentions."), ("nin_shortcut", "conv_shortcut"), ("norm_out", "conv_norm_out"),
    ("downsample.", "downsamplers.0."), ("upsample.", "upsamplers.0."), (".q.", ".to_q."), (".k.", ".to_k."),
    (".v.", ".to_v."), (".proj_out.", ".to_out.0."))
OLD_NAMES = ((".q.", ".query."), (".k.", ".key."), (".v.", ".value."), (".proj_out.", ".proj_attn."))   # until 2023

def rename(key, levels, outward):
    """A parameter's name here -> there (outward) or back; the decoder's levels are counted the other way there."""
    for ours, theirs in DIFFUSERS_NAMES if outward else DIFFUSERS_NAMES + OLD_NAMES:
        key = key.replace(ours, theirs) if outward else key.replace(theirs, ours)
    key = re.sub(r"(decoder\.up\w*)\.(\d+)", lambda found: f"{found[1]}.{levels - 1 - int(found[2])}", key)
    return re.sub(r"(attentions\.\d+)\.norm", r"\1.group_norm", key) if outward else key.replace("group_norm", "norm")

def from_diffusers(path, theirs):
    """-> VAEConfig, state dict under our names, stats (None without the config.json beside the weights)."""
    levels = 1 + max(int(found[1]) for key in theirs if (found := re.match(r"encoder\.down_blocks\.(\d+)", key)))
    state = {rename(key, levels, False): value.float() for key, value in theirs.items()}
    state = {key: value[..., None, None] if value.dim() == 2 else value for key, value in state.items()}  # Linear: 1x1
    cfg, file = guess_config(state), path.parent / "config.json"
    if not file.exists():
        return cfg, state, None
    config = read_json(file)
    mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * cfg.z_channels
    std = config.get("latents_std") or [1 / config.get("scaling_factor", 0.18215)] * cfg.z_channels
    stats = torch.tensor(mean).flatten().float(), torch.tensor(std, dtype=torch.float64).flatten().square().float()
    return replace(cfg, groups=config.get("norm_num_groups", 32)), state, stats

def export(checkpoint: str, to: str):
    """Writes a VAE into the folder `to`: as diffusers' AutoencoderKL, with zn = (z - latents_mean) / latents_std, and
    as the authors' NAME.pt, NAME-latents-stats.pt and NAME-discriminator-ckpt.pt, where NAME is the folder's."""
    (vae, stats, disc), out = load_vae(checkpoint), Path(to).absolute()
    stats, disc = copy.deepcopy((stats, disc))          # they may be mapped from the very files that are written here
    cfg, state, levels = vae.cfg, vae.state_dict(), len(vae.cfg.ch_mult)
    if cfg.patch > 1 or cfg.sigma or cfg.groups != 32:
        raise ValueError(f"{checkpoint}: published formats have no VAE with patch, sigma or {cfg.groups} groups (tiny)")
    attn = "Attn" * cfg.attn_last
    config = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": cfg.z_channels,
              "block_out_channels": [cfg.ch * m for m in cfg.ch_mult], "layers_per_block": cfg.num_res_blocks,
              "down_block_types": ["DownEncoderBlock2D"] * (levels - 1) + [f"{attn}DownEncoderBlock2D"],
              "up_block_types": [f"{attn}UpDecoderBlock2D"] + ["UpDecoderBlock2D"] * (levels - 1),
              "norm_num_groups": cfg.groups, "act_fn": "silu", "sample_size": 32 * cfg.downsampling,
              "use_quant_conv": cfg.quant_conv, "use_post_quant_conv": cfg.quant_conv, "scaling_factor": 1.0}
    out.mkdir(parents=True, exist_ok=True)
    torch.save(state, out / f"{out.name}.pt")
    if stats:
        config |= {"latents_mean": stats[0].tolist(), "latents_std": stats[1].double().sqrt().tolist()}
        torch.save({"latents_scale": stats[1].double().rsqrt().float().view(1, -1, 1, 1),
                    "latents_bias": stats[0].view(1, -1, 1, 1)}, out / f"{out.name}-latents-stats.pt")
    if disc:
        torch.save(disc, out / f"{out.name}-discriminator-ckpt.pt")
    linear = re.compile(r"attn.*\.(q|k|v|proj_out)\.weight")            # 1x1 convolutions here
    write_safetensors(out / "diffusion_pytorch_model.safetensors", {
        rename(key, levels, True): value.flatten(1) if linear.search(key) else value for key, value in state.items()})
    (out / "config.json").write_text(json.dumps(config, indent=2))
    print(f"{to}: a diffusers AutoencoderKL and {out.name}*.pt" + ("" if stats else ", without latents' statistics"))

SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "I64": torch.int64, "I32": torch.int32}

def read_safetensors(path):
    """8 bytes (the length of the header), the header in JSON, raw bytes -> dict of tensors."""
    with reading(path, ".safetensors"), open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header, raw = json.loads(file.read(min(size, 10**8))), bytearray(file.read())
        header.pop("__metadata__", None)
        return {name: torch.frombuffer(raw[slice(*entry["data_offsets"])], dtype=SAFETENSORS[entry["dtype"]])
                .view(entry["shape"]) for name, entry in header.items()}

def write_safetensors(path, tensors):
    """Dict of tensors -> file, in float32."""
    header, end = {}, 0
    for name, value in tensors.items():
        first, end = end, end + 4 * value.numel()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)         # the data begin at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(value.float().contiguous().numpy().tobytes())

# ---- A cache of latents for runs with a frozen VAE, a folder: latents.npy float16 [N, 2, C, h, w], mean and std of
# each image's posterior; checksums.npy [N], 0 where there are none yet; cache.json, what VAE and data these belong to.

def identity(data, vae=None):
    """Hashes of what a cache belongs to: the data's classes, labels and size (a folder and its pack agree); the VAE."""
    weights, labels = hashlib.sha256(), hashlib.sha256(json.dumps([data.classes, data.resolution]).encode())
    for value in vae.state_dict().values() if vae else ():
        weights.update(value.cpu().contiguous().numpy().tobytes())
    labels.update(np.asarray(getattr(data, "labels", len(data)), np.int64).tobytes())
    return {"VAE": weights.hexdigest(), "data": labels.hexdigest()}

def shared_array(path, dtype, shape):
    """A memory-mapped .npy, of zeros where nothing was written; many processes may open it at once. The disk gives its
    blocks now: to write to a mapped file when the disk is full would be a bus error."""
    path.touch()
    with open(path, "r+b") as file:
        held = os.path.getsize(path)
        np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
        size = file.tell() + math.prod(shape) * np.dtype(dtype).itemsize
        try:
            if held < size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:            # some network file systems can't
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ValueError(f"no room for {path}, {size / 1e9:.2f} GB ({error.strerror}): free some") from None
        file.truncate(size)
    return np.lib.format.open_memmap(path, "r+")

@torch.no_grad()
def encode(checkpoint: str, data: str, out: str, resolution: int = 0, batch: int = 64):
    """Makes the cache, in float32; torchrun's processes share the images. The same command goes on after a kill."""
    from sample import rank0_first, start
    rank, world, device = start()
    torch.set_float32_matmul_precision("highest")       # not TF32: the cache is made once
    torch.backends.cudnn.allow_tf32 = False
    if checkpoint in VAES:
        raise ValueError(f"{checkpoint} has random weights, other ones in each process and run: name a trained VAE")
    with rank0_first():
        vae, folder = load_vae(checkpoint)[0], Path(out)
        images = open_for(vae, data, resolution)
        N, side, about = len(images), images.resolution // vae.cfg.downsampling, identity(images, vae)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "cache.json").exists():
            (folder / f"cache.json.{rank}").write_text(json.dumps(about))
            (folder / f"cache.json.{rank}").replace(folder / "cache.json")
        if read_json(folder / "cache.json") != about:
            raise ValueError(f"{out} is a cache of another VAE or of other data: name another folder, or remove it")
        latents = shared_array(folder / "latents.npy", "<f2", (N, 2, vae.cfg.z_channels, side, side))
        checksums = shared_array(folder / "checksums.npy", "<u4", (N,))
    vae.to(device, memory_format=torch.channels_last).eval()
    todo = [i for i in range(rank * N // world, (rank + 1) * N // world) if not checksums[i]]
    todo = [todo[i : i + batch] for i in range(0, len(todo), batch)]
    loader = torch.utils.data.DataLoader(images, batch_size=None, sampler=todo, num_workers=min(8, os.cpu_count()))
    for rows, (x, _) in zip(todo, tqdm(loader, "encoding", disable=rank > 0)):
        mean, logvar = vae.encode(to_float(x.to(device)))
        latents[rows] = moments = torch.stack([mean, (logvar / 2).exp()], 1).half().cpu().contiguous().numpy()
        latents.flush()                     # on the disk before it counts
        checksums[rows] = [zlib.crc32(row) or 1 for row in moments]
    checksums.flush()

class Cached:
    """A data set and its cache: data[[i, ...]] -> images, labels, moments float16 [B, 2, C, h, w] (mean, std).
    images=False leaves the files unread: images [B, 3, 0, 0]."""
    def __init__(self, data, folder, vae, images=True):
        self.data, self.path = data, Path(folder) / "latents.npy"
        self.labels = None if images or not hasattr(data, "labels") else torch.as_tensor(data.labels)
        about = read_json(self.path.parent / "cache.json")
        for what, own in identity(data, vae).items():
            if about.get(what) != own:
                raise ValueError(f"{folder} is the cache of another {what}: make one by vae.py encode")
        with reading(folder, "cache of vae.py encode", "remove it and encode again"):
            self.checksums, rows = (np.load(self.path.with_stem(n), mmap_mode="r") for n in ("checksums", "latents"))
            side = data.resolution // vae.cfg.downsampling
            form = np.float16, (len(self.checksums), 2, vae.cfg.z_channels, side, side), np.uint32, 1
            if (rows.dtype, rows.shape, self.checksums.dtype, self.checksums.ndim) != form:
                raise ValueError(f"latents.npy or checksums.npy is not float16 {list(form[1])} or not uint32")
        if len(self.checksums) != len(data) or not self.checksums.all():
            raise ValueError(f"{folder} is not complete: run the same vae.py encode again")
    def __len__(self):
        return len(self.data)
    def __getitem__(self, indices):
        moments = np.load(self.path, mmap_mode="r")[list(indices)]
        for i, row in zip(indices, moments):
            if (zlib.crc32(row) or 1) != self.checksums[i]:
                raise ValueError(f"{self.path}: row {i} is damaged: remove the folder and encode again")
        images, labels = self.data[indices] if self.labels is None else (
            torch.zeros(len(moments), 3, 0, 0, dtype=torch.uint8), self.labels[list(indices)])
        return images, labels, torch.from_numpy(moments)

# -------- The command: python vae.py export|pack|encode|reconstruct; the arguments of these functions are its options.

@torch.no_grad()
def reconstruct(checkpoint: str, images: str, out: str = "reconstructions.png", resolution: int = 0, count: int = 8):
    """A picture with a row for each of `count` images (tiny, a folder, an .npz): itself, its reconstruction, and its
    latents' three principal components as colours. Prints the rows' PSNR."""
    vae = load_vae(checkpoint)[0].eval()
    data = open_for(vae, images, resolution)
    x, _ = data[np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int).tolist()]
    z, _ = vae.encode(to_float(x))
    rec = to_uint8(vae.decode(z))
    for i, error in enumerate((x.double() - rec).square().mean((1, 2, 3))):
        print(f"row {i + 1}: PSNR {10 * math.log10(255**2 / max(error, 1e-9)):.2f} dB")
    save_png(out, grid(torch.stack([x, rec, principal_colours(z, data.resolution)], 1).flatten(0, 1), 3))
    print(f"{out}: image | reconstruction | latents")

def main(argv):
    from sample import nearest, parse
    commands, (name, *words) = {f.__name__: f for f in (export, pack, encode, reconstruct)}, argv or [""]
    if name not in commands:
        raise ValueError(f"unknown command {name!r}{nearest(name, commands)}")
    parse(commands[name], words)

if __name__ == "__main__":
    from sample import friendly
    friendly(main)()
