"""Damaged files for every reader: each is refused in one line that names it, or loads as before, bit by bit.

    OMP_NUM_THREADS=1 python tests/fuzz.py --count=1000 --seed=0    # a table, the failures; exit code 1 if any
    python tests/fuzz.py --seed=0 --case=17                         # one case again, with its traceback

Case N of a seed is always the same damage. The cases run one after another in a child process with little memory and
60 s for each. Files that carry checksums (.pt and .npz are zips; our caches have their own) must never load changed;
others' raw files may ("differs"): nothing in an image, a .safetensors or a .json tells a changed value from another.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate as E    # noqa: E402
import repa as R        # noqa: E402
import sample as S      # noqa: E402
import sit as T         # noqa: E402
import train            # noqa: E402
import vae as V         # noqa: E402

GOOD = ("refused", "correct", "differs")
BAD = ("silently wrong", "traceback", "hang", "crash", "executed", "big allocation")
SECONDS, GIB = 60, 8         # a case takes 0.1 s, but other processes may want the machine

# ---------------------------------------------------------------------------------------------------------------------
# Originals, as small as they can be, and their readers.

class Net(nn.Module):
    """In place of Inception."""
    name, metric, dim = "inception", "FID", 12

    def __init__(self):
        super().__init__()
        self.first, self.fc = nn.Linear(3 * 4, 12), nn.Linear(12, 5)

    def forward(self, images):
        x = nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)
        return self.first(x), x[:, :7]

DINO = """import torch
dependencies = ["torch"]
def dinov2_vits14(pretrained=True):
    net = torch.nn.Linear(64, 64)
    net.pos_embed = torch.nn.Parameter(torch.zeros(1, 5, 8))
    return net
"""


def config(out, vae, **more):
    """A run of one step without a teacher, the GAN on."""
    return train.Config(out=str(out), vae=str(vae), data="tiny", resolution=32, sit="2-32-2/4",
                        batch=2, align_sit=0.0, align_vae=0.0, lpips=0.0, disc_ch=4, gan_start=0,
                        vae_ema=0.5, workers=0, preview_steps=2, compile="0",
                        **{"steps": 1} | more)


def make(root):
    """The folders of the originals, each with the files that are damaged and what these need beside them."""
    torch.manual_seed(0)
    for name in "data flat pack cache vae run later joint sit old reference inception hub".split():
        (root / name).mkdir()
    noise, shapes = np.random.default_rng(0), V.fetch(V.Shapes(32), range(6))[0].permute(0, 2, 3, 1).numpy()
    for i, end in enumerate(("jpg", "png", "webp", "bmp", "JPEG", "png")):
        (root / f"data/{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(shapes[i]).save(root / f"data/{i % 2}/{i}.{end}")
    Image.fromarray(noise.integers(0, 2**16, (20, 24), dtype=np.uint16)).save(root / "data/0/deep.png")
    shutil.copy(root / "data/0/0.jpg", root / "flat")
    shutil.copy(root / "data/1/1.png", root / "flat")
    train.pack(str(root / "data"), str(root / "pack"), 16)

    torch.save(V.VAE(V.VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)).state_dict(), root / "start.pt")
    train.run(config(root / "run", root / "start.pt"), 0, 1, torch.device("cpu"))
    later = config(root / "later", root / "start.pt", steps=2, save_every=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                            # as the cases: its second step is repeated
    train.run(later, 0, 1, torch.device("cpu"))
    torch.set_num_threads(threads)
    S.export(str(root / "run"), to=str(root / "vae"))
    (root / "diffusers").mkdir()
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        (root / "vae" / name).rename(root / "diffusers" / name)
    train.encode(str(root / "vae/vae.pt"), str(root / "pack"), str(root / "cache"), batch=1)

    sit = T.SiT(T.SiTConfig(2, 64, 1, 2, 4, 8, 10, (64,), 1, 16))
    args = argparse.Namespace(encoder_depth=1, path_type="linear", prediction="v")
    (vae, _, disc), theirs = S.load_vae(str(root / "run")), {"ema": sit.state_dict(), "args": args, "steps": 3}
    torch.save(theirs | {"model": sit.state_dict(), "vae": vae.state_dict(), "discriminator": disc},
               root / "joint/7.pt")
    torch.save(theirs, root / "sit/sit.pt")
    torch.save(theirs, root / "old/sit.pt", _use_new_zipfile_serialization=False)       # PyTorch's format until 2020

    net, pictures = Net(), V.open_pack(root / "pack")
    stats = E.feature_stats(pictures, len(pictures), net, 4, "")
    stats = {name: np.asarray(stats[name]) for name in ("mu", "sigma", "mu_s", "sigma_s")}
    images = V.fetch(pictures, range(len(pictures)))[0].permute(0, 2, 3, 1).numpy()
    np.savez(root / "reference/images.npz", arr_0=images)
    np.savez(root / "reference/both.npz", arr_0=images, network="inception", **stats)
    np.savez(root / "reference/statistics.npz", mu=stats["mu"], sigma=stats["sigma"])
    torch.save(net.state_dict(), root / "inception/inception.pth")
    (root / "hub/checkpoints").mkdir()
    digest = hashlib.sha256((root / "inception/inception.pth").read_bytes()).hexdigest()
    shutil.copy(root / "inception/inception.pth", root / f"hub/checkpoints/pt_inception-{digest[:8]}.pth")
    with mock.patch.dict(os.environ, TORCH_HOME=str(root)):
        R.trained_once("tiny_teacher", R.TinyTeacher, 0, V.Shapes(32).draw, lambda net: 0.5)
    torch.save({**nn.Linear(64, 64).state_dict(), "pos_embed": torch.zeros(1, 5, 8)}, root / "hub/dinov2.pth")
    (root / "hub/hubconf.py").write_text(DINO)

def everything(data):
    """A data set's images, labels and classes, or those of a cache with its latents."""
    return V.fetch(data, list(range(len(data)))), getattr(data, "classes", None)

def packed_again(folder):
    """train.py pack: a counted skip is as good as a refusal, if all else is there."""
    shutil.rmtree(folder.parent / "again", ignore_errors=True)
    train.pack(str(folder), str(folder.parent / "again"), 16)
    data = V.open_pack(folder.parent / "again")
    files, rows = [file for file, _ in V.Folder(folder, 16).samples], set(data.rows.tolist())
    skipped = [file for i, file in enumerate(files) if i not in rows]
    if skipped and len(data) + len(skipped) == len(files):
        raise ValueError(f"skipped {' '.join(skipped)}")
    return everything(data)

def cached(folder, encode):
    vae, pack = (str(folder.parent / f"originals/{name}") for name in ("vae/vae.pt", "pack"))
    if encode:
        train.encode(vae, pack, str(folder), batch=1)
    return everything(train.CachedLatents(V.open_images(pack), folder, S.load_vae(vae)[0]))


def begun(folder):
    """A new run's networks from the VAE's files."""
    cfg = config(folder, folder / "vae.pt")
    nets, *rest = train.build(cfg, V.Shapes(32), None, 1, torch.device("cpu"))
    return nets.vae, nets.sit, nets.disc, rest


def resumed(folder, steps):
    """A run goes on to `steps`; a wrong bit in anything that it restores is in what that saves."""
    train.run(config(folder, "", steps=steps), 0, 1, torch.device("cpu"))
    state = torch.load(folder / "state.pt", weights_only=True)
    return [value for key, value in state.items() if key != "config"]


def resumed_from_previous(folder):
    """A damaged state.pt beside a whole state.prev.pt ends no run: that goes on from the older."""
    try:
        return resumed(folder, 3)
    except ValueError as error:
        of_the_disk = isinstance(error.__cause__, OSError)
        assert of_the_disk or str(folder / "state.pt") not in str(error), "state.prev.pt is whole"
        raise


def initialised(folder):
    sit = T.SiT(T.SiTConfig(2, 32, 2, 4, 4, 16, 10, (), 1, 16))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train.start_from(sit, str(folder / "step_0000001.pt"))
    if "afresh" in said.getvalue():
        raise ValueError(said.getvalue().strip())       # other classes, another size: allowed, and named
    return sit

def played(path, vae=""):
    model = S.load_pipeline(path, vae=vae)
    return model.vae, model.sit, dataclasses.asdict(model.sit.cfg), model.classes, model.config, model.step

def references(folder):
    torch.manual_seed(0)
    net = Net()
    stats = [E.load_reference(str(path), net, 16, 4) for path in sorted(folder.iterdir())]
    return [{name: value for name, value in each.items() if name != "sha256"} for each in stats]

def hub(read):
    def read_from(folder):
        torch.hub.set_dir(str(folder))
        E.INCEPTION_URL = f"http://localhost:9/{next(folder.glob('checkpoints/pt_*')).name}"     # named by its hash
        return read(folder)
    return read_from

def dinov2(folder):
    return R.DINOv2("dinov2_vits14", 2, str(folder), str(folder / "dinov2.pth"))

ORIGINAL = "originals/vae/vae.pt"
READERS = {             # name: its folder, the files that are damaged, whether they carry checksums, how they are read
    "images": ("data", "*/*.*", False, lambda folder: everything(V.Folder(folder, 16))),
    "images, no classes": ("flat", "*.*", False, lambda folder: everything(V.open_images(str(folder)))),
    "train.py pack": ("data", "*/*.*", False, packed_again),
    "packed images": ("pack", "*", False, lambda folder: everything(V.open_images(str(folder)))),
    "latents": ("cache", "*", False, lambda folder: cached(folder, False)),
    "latents, encoded on": ("cache", "*", False, lambda folder: cached(folder, True)),
    "VAE": ("vae", "vae.pt", True, begun),
    "statistics": ("vae", "*stats.pt", True, begun),
    "discriminator": ("vae", "*disc*.pt", True, begun),
    "diffusers": ("diffusers", "*", False, lambda folder: S.load_vae(str(folder))),
    "snapshot": ("run", "*001.pt", True, lambda folder: played(folder)),
    # of load_vae's three values the discriminator is as it is in the file, and checked by the networks that load it
    "snapshot's VAE": ("run", "*001.pt", True, lambda folder: S.load_vae(str(folder))[:2]),
    "--init": ("run", "*001.pt", True, initialised),
    "resume": ("run", "state.pt", True, lambda folder: resumed(folder, 2)),
    "joint checkpoint": ("joint", "*", True, lambda folder: played(folder / "7.pt")),
    "SiT": ("sit", "*", True, lambda folder: played(folder / "sit.pt", str(folder.parent / ORIGINAL))),
    "SiT, old format": ("old", "*", False, lambda folder: played(folder / "sit.pt", str(folder.parent / ORIGINAL))),
    "reference": ("reference", "*", True, references),
    "Inception": ("inception", "*", True, lambda folder: E.load_inception(str(folder / "inception.pth"))),
    "hub: Inception": ("hub", "checkpoints/pt_*", True, hub(lambda folder: E.load_inception())),
    "hub: tiny teacher": ("hub", "checkpoints/tiny*", True, hub(lambda _: R.load_tiny_teacher(V.Shapes(32).draw))),
    "hub: DINOv2": ("hub", "dinov2.pth", True, hub(dinov2)),
    "resume, one before": ("later", "state.pt", True, resumed_from_previous),
}

def fingerprint(x):
    """What was read -> a hash of all its bits."""
    digest = hashlib.sha256()
    def add(x):
        if isinstance(x, nn.Module):
            x = x.state_dict()
        if isinstance(x, dict):
            x = sorted(x.items(), key=str)
        x = x.cpu().numpy() if isinstance(x, torch.Tensor) else x
        if isinstance(x, (list, tuple)):
            digest.update(f"{len(x)} items".encode())
            for item in x:
                add(item)
        elif isinstance(x, np.ndarray):
            digest.update(f"{x.dtype} {x.shape}".encode() + np.ascontiguousarray(x).tobytes())
        else:
            digest.update(repr(x).encode())
    add(x)
    return digest.hexdigest()

# ---------------------------------------------------------------------------------------------------------------------
# Damages: of bytes, and of what the bytes mean.

class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)

def place(raw, rng):
    """A position: half of them near the ends, where headers and directories are."""
    return rng.choice((rng.randrange(len(raw)), rng.randrange(len(raw)), rng.randrange(min(len(raw), 300)),
                       len(raw) - 1 - rng.randrange(min(len(raw), 1500))))

def flip(raw, rng, count):
    raw = bytearray(raw)
    for _ in range(count):
        raw[place(raw, rng)] ^= 1 << rng.randrange(8)
    return raw

def zeros(raw, rng):
    first, count = place(raw, rng), rng.choice((1, 16, 512, 4096))
    return raw[:first] + bytes(len(raw[first : first + count])) + raw[first + count :]

def png(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(100 * (1 + 3 * 100)))) + chunk(b"IEND", b""))

BYTES = {
    "truncated": lambda raw, rng: raw[: place(raw, rng)], "zeros": zeros, "1 bit": lambda raw, rng: flip(raw, rng, 1),
    "10 bits": lambda raw, rng: flip(raw, rng, 10), "1000 bits": lambda raw, rng: flip(raw, rng, 1000),
    "empty": lambda raw, rng: b"", "text": lambda raw, rng: b"to be done\n", "png": lambda raw, rng: png(100, 100),
    "html": lambda raw, rng: b"<!DOCTYPE html>\n<html><title>404</title>Not found</html>\n",
    "random": lambda raw, rng: rng.randbytes(len(raw))}
MEANING = ("dtype", "shape", "claim", "code")           # another kind or shape of a value, an absurd size, a pickle
DAMAGES = [*BYTES, "directory", *MEANING, "1 bit", "10 bits", *MEANING[:3], "truncated"]

def other_array(array, how, rng):
    if how == "dtype":
        kinds = "int16", "float64", "complex64", "S4", "bool"
        return array.astype(rng.choice([kind for kind in kinds if kind != array.dtype]))
    flat = array.reshape(-1)
    return rng.choice((array[None], flat, flat[:-1], flat[0] if len(flat) else array[None],
                       array[:0].copy() if array.ndim else array[None]))

def other_tensor(value, how, rng):
    if how == "claim":
        return value.reshape(-1)[:1].expand(2**40) if value.dim() < 2 else value[:1].expand(2**40, *value.shape[1:])
    if how == "dtype" and rng.random() < 0.3:
        return rng.choice(("text", None, [1, 2], {}))
    if how == "dtype":
        return value.to(rng.choice((torch.int16, torch.float64, torch.complex64, torch.bool)))
    return torch.from_numpy(np.asarray(other_array(value.numpy(), how, rng)))

def other_json(how, rng):
    return rng.choice({"dtype": ("text", None, {}, True), "shape": ([], [1, [2]], [0.5] * 3),
                       "claim": (2**60, -1, 1e308)}[how])

def directory_entry(raw, rng):
    """A zip whose central directory claims 4 GiB for an entry."""
    at = [i for i in range(len(raw)) if raw[i : i + 4] == b"PK\x01\x02"]
    first = rng.choice(at) + rng.choice((20, 24))
    return raw[:first] + struct.pack("<I", 0xFFFFFFF0) + raw[first + 4 :]

def npy_claim(shape, descr="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(64)

def leaves(tree):
    """Nested dicts -> (dict, key) of every tensor."""
    pairs = [(tree, key) for key, value in tree.items() if isinstance(value, torch.Tensor)]
    return pairs + [pair for value in tree.values() if isinstance(value, dict) for pair in leaves(value)]

def change_meaning(path, how, rng, marker):
    """Writes another file of the same format, in good order, with one thing in it changed."""
    raw, evil = path.read_bytes(), Evil(marker)
    if path.suffix in (".pt", ".pth"):
        if how == "claim" and raw[:2] == b"PK" and rng.random() < 0.5:
            return path.write_bytes(directory_entry(raw, rng))
        tree = torch.load(path, weights_only=False)
        where, key = rng.choice(leaves(tree))
        where[key] = evil if how == "code" else other_tensor(where[key], how, rng)
        return torch.save(tree, path, _use_new_zipfile_serialization=raw[:2] == b"PK")
    if path.suffix == ".npz":
        if how == "claim" and rng.random() < 0.5:
            return path.write_bytes(directory_entry(raw, rng))
        with np.load(path) as file:
            arrays = dict(file)
        key = rng.choice(list(arrays))
        if how == "claim":
            with zipfile.ZipFile(path, "w") as file:
                for name, array in arrays.items():
                    buffer = io.BytesIO()
                    np.save(buffer, array)
                    file.writestr(f"{name}.npy", npy_claim((2**40,) + array.shape[1:]) if name == key else
                                  buffer.getvalue())
            return None
        arrays[key] = np.array([evil], object) if how == "code" else other_array(arrays[key], how, rng)
        return np.savez(path, **arrays)
    if path.suffix == ".npy":
        array = np.load(path)
        if how == "claim":
            return path.write_bytes(npy_claim((2**40,) + array.shape[1:], array.dtype.str))
        return np.save(path, np.array([evil], object) if how == "code" else other_array(array, how, rng))
    if how == "code":
        return path.write_bytes(pickle.dumps(evil))
    if path.suffix == ".json":
        tree = json.loads(raw)
        keys = range(len(tree)) if isinstance(tree, list) else tree
        tree[rng.choice(list(keys))] = other_json(how, rng)
        return path.write_text(json.dumps(tree if rng.random() < 0.8 else other_json(how, rng)))
    if path.suffix == ".safetensors":
        size = int.from_bytes(raw[:8], "little")
        header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
        entry, which = header[rng.choice(list(header))], rng.randrange(4)
        if how == "dtype":
            entry["dtype"] = rng.choice(("F64", "F16", "I64", "U8", "F5", 3, None))
        elif how == "shape":
            entry["shape"] = rng.choice(([1, *entry["shape"]], entry["shape"][:-1], [-1], [], [0], "4", None))
        elif which == 0:
            return path.write_bytes((2**60).to_bytes(8, "little") + raw[8:])
        elif which == 1:
            entry["shape"] = [2**40, *entry["shape"][1:]]
        else:
            entry["data_offsets"] = ([0, 2**60], [-8, 2**60])[which - 2]
        text = json.dumps(header).encode()
        return path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    if how == "claim":
        return path.write_bytes(png(*rng.choice(((60_000, 60_000), (10**8, 1), (2**31 - 1, 2**31 - 1), (0, 0)))))
    with Image.open(path) as image:
        image = (image.convert(rng.choice(("L", "1", "RGB"))) if how == "dtype" else
                 image.resize(rng.choice(((1, 1), (1, 500), (1000, 2)))))
    return image.save(path)

def damage(path, how, rng, marker):
    if how == "directory":
        path.unlink()
        path.mkdir()
    elif how in BYTES:
        path.write_bytes(BYTES[how](path.read_bytes(), rng))
    else:
        change_meaning(path, how, rng, marker)

# ---------------------------------------------------------------------------------------------------------------------
# Cases.

class Hang(BaseException):
    pass

def ring(*_):
    raise Hang


def plan(seed, case):
    """-> a case's reader, its damage, and its dice. Each reader meets all damages in turn."""
    turn, reader = divmod(case, len(READERS))
    how = DAMAGES[(turn + reader) % len(DAMAGES)]
    return list(READERS)[reader], how, random.Random(f"{seed}/{case}")


def prepare(root, name):
    """A fresh copy of a reader's folder."""
    shutil.rmtree(root / "executed", ignore_errors=True)
    shutil.rmtree(root / "case", ignore_errors=True)
    return Path(shutil.copytree(root / "originals" / READERS[name][0], root / "case"))

def judge(root, seed, case, good, loud=False):
    """-> which file was damaged, the outcome, and what was said. good: fingerprints of the originals, by reader."""
    name, how, rng = plan(seed, case)
    _, files, checked, read = READERS[name]
    if name not in good:
        good[name] = fingerprint(read(prepare(root, name)))
    folder, text = prepare(root, name), ""
    path = rng.choice(sorted(p for p in folder.glob(files) if p.suffix != ".jsonl"))
    damage(path, how, rng, root / "executed")
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        outcome = "correct" if fingerprint(read(folder)) == good[name] else "silently wrong" if checked else "differs"
    except Hang:
        outcome = "hang"
    except Exception as error:
        if loud:
            traceback.print_exc()
        text, named = f"{type(error).__name__}: {error}", path.name in str(error) or str(folder) in str(error)
        big = isinstance(error, MemoryError) or "can't allocate" in text or "Unable to allocate" in text
        refused = isinstance(error, (ValueError, OSError)) and "\n" not in text and named
        outcome = "refused" if refused else "big allocation" if big else "traceback"
    signal.alarm(0)
    return path.name, "executed" if (root / "executed").exists() else outcome, text

def limit():
    """This process: one thread, no data workers, little memory, a small network for Inception's."""
    torch.set_num_threads(1)
    loader, E.Inception = torch.utils.data.DataLoader, Net
    # no workers: forked from a process that has computed on threads of its own for a thousand cases, they may block
    torch.utils.data.DataLoader = lambda data, **options: loader(data, **{**options, "num_workers": 0})
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()    # mapped by libraries
    resource.setrlimit(resource.RLIMIT_AS, (used + GIB * 2**30,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

def child(pipe, root, seed):
    """Answers numbers of cases with what judge() says."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    good = {}
    limit()
    while (case := pipe.recv()) is not None:
        pipe.send(judge(root, seed, case, good))

def fuzz(cases, seed):
    """-> [(case, reader, file, damage, outcome, text)]. A child that dies or hangs is replaced."""
    results, process, context = [], None, multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "originals").mkdir()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make(root / "originals")
        for case in cases:
            if process is None:
                pipe, other = context.Pipe()
                process = context.Process(target=child, args=(other, root, seed))
                process.start()
                other.close()
            found = "?", "hang", f"over {3 * SECONDS} s"
            try:
                pipe.send(case)
                if pipe.poll(3 * SECONDS):          # a new child imports first
                    found = pipe.recv()
            except (EOFError, ConnectionError):
                process.join()
                found = "?", "crash", f"exit code {process.exitcode}"
            if found[0] == "?":
                process.kill()
                process = None
            name, how, _ = plan(seed, case)
            results.append((case, name, found[0], how, *found[1:]))
        if process is not None:
            pipe.send(None)
            process.join()
    return results

def failures(results, seed):
    """One line for each, with the command that repeats it."""
    return [f"{outcome}: {name}, {file}, {how}: python tests/fuzz.py --seed={seed} --case={case}  # {text[:200]!r}"
            for case, name, file, how, outcome, text in results if outcome not in GOOD]

def main():
    parser = argparse.ArgumentParser()
    for name, default in (("count", 1000), ("seed", 0), ("case", -1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if options.case >= 0:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "originals").mkdir()
            make(Path(folder) / "originals")
            limit()
            print(*plan(options.seed, options.case)[:2], *judge(Path(folder), options.seed, options.case, {}, True))
        return
    results = fuzz(range(options.count), options.seed)
    counts = Counter((name, outcome) for _, name, _, _, outcome, _ in results)
    print(f"{'reader':20}" + "".join(f"{outcome:>16}" for outcome in GOOD + BAD))
    for name in [*READERS, "all"]:
        sums = (sum(n for (who, what), n in counts.items() if name in (who, "all") and what == outcome)
                for outcome in GOOD + BAD)
        print(f"{name:20}" + "".join(f"{n:16}" for n in sums))
    bad = failures(results, options.seed)
    print(*bad, sep="\n")
    sys.exit(bool(bad))

if __name__ == "__main__":
    main()
