"""Situations that people really have, each tried as it comes: their folders, files, machines.

    python -m pytest tests/test_cases.py
"""
import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from test_train import CPU, SMALL, config, execute, last, losses, python, run, use_quick_teacher

import evaluate as E
import repa as R
import sample as S
import train
import vae as V

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="module")
def quick_teacher(tmp_path_factory):
    """A tiny teacher of three training steps, in a torch.hub cache of these tests' own."""
    use_quick_teacher(tmp_path_factory.mktemp("torch"))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write(file, mode="RGB", size=(40, 36), **options):
    """An image of noise -> its file."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = noise(height, width, channels, seed=zlib.crc32(file.name.encode()))
    pixels = pixels[:, :, 0] if channels == 1 else pixels
    Image.fromarray(pixels, mode).save(file, **options)
    return file


def tree(root, classes=("cat", "dog"), each=4, size=(40, 36)):
    for name in classes:
        for i in range(each):
            write(root / name / f"{i}.png", size=size)
    return root


WORDS = ("--align_sit=0", "--align_vae=0", "--batch=4", "--workers=0", "--log_every=1")


# ---- Folders --------------------------------------------------------------------

@pytest.mark.parametrize("folder", [".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir",
                                    "lost+found", "$RECYCLE.BIN", "System Volume Information"])
def test_what_systems_leave_behind_is_no_class(tmp_path, folder):
    """Hidden folders and those of systems are no classes, at any depth; their images are none."""
    tree(tmp_path)
    write(tmp_path / folder / "x.png")
    write(tmp_path / "cat" / folder / "x.png")
    data = V.Folder(tmp_path, 32)
    assert data.classes == ["cat", "dog"] and len(data) == 8
    shutil.rmtree(tmp_path / "cat")
    shutil.rmtree(tmp_path / "dog")
    write(tmp_path / "a.png")
    loose = V.Folder(tmp_path, 32)
    assert loose.classes == [tmp_path.name] and len(loose) == 1


@pytest.mark.parametrize("name", ["._0.png", ".hidden.png", "Thumbs.db", "desktop.ini"])
def test_what_systems_leave_behind_is_no_image(tmp_path, name):
    """A Mac's ._ files beside the images, and the like, are skipped without a word."""
    tree(tmp_path)
    (tmp_path / "cat" / name).write_bytes(b"\0\5\26\7 not an image")
    data = V.Folder(tmp_path, 32)
    assert len(data) == 8 and not data.left_out


def test_images_at_any_depth_below_a_class(tmp_path):
    """a/n01/images/0.png is of class n01, as in ImageFolder."""
    write(tmp_path / "n01/images/0.png")
    write(tmp_path / "n02/0.png")
    write(tmp_path / "n02/more/and/more/1.png")
    data = V.Folder(tmp_path, 32)
    assert data.classes == ["n01", "n02"] and data.labels.tolist() == [0, 1, 1]
    assert data.files == ["n01/images/0.png", "n02/0.png", "n02/more/and/more/1.png"]


def test_what_pil_reads_is_read_and_the_rest_is_counted(tmp_path):
    """All suffixes that PIL opens; the others are counted, and the start says it."""
    for suffix in ("png", "tif", "TIFF", "gif", "ppm", "tga", "jfif", "jp2", "webp", "bmp"):
        write(tmp_path / "data/cat" / f"0.{suffix}")
    for name in ("notes.txt", "more.txt", "clip.mp4", "noname"):
        (tmp_path / "data/cat" / name).write_text("no image")
    data = V.Folder(tmp_path / "data", 32)
    assert len(data) == 10
    assert all(data[i][0].shape == (3, 32, 32) for i in range(10))
    assert data.left_out == {".txt": 2, ".mp4": 1, "without a suffix": 1}
    assert not data.unreadable.any()
    done = execute(*SMALL, "--steps=1", *WORDS, f"--data={tmp_path / 'data'}", "--resolution=32",
                   f"--out={tmp_path / 'run'}")
    assert "10 images in 1 class; left out: 2 .txt, 1 .mp4, 1 without a suffix" in done.stdout


# ---- Images ---------------------------------------------------------------------

def halves():
    """Left half black, right half white: 32 x 32."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, 16:] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photos_are_turned_upright(tmp_path, suffix, orientation):
    """EXIF's orientation is obeyed, whatever format carries it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = halves()
    (tmp_path / "a").mkdir()
    options = {"quality": 95} if suffix in ("jpg", "webp") else {}
    image.save(tmp_path / f"a/0.{suffix}", exif=exif, **options)
    seen = V.Folder(tmp_path, 32)[0][0].float().mean(0)                 # [32, 32]
    white = {1: seen[:, 16:], 3: seen[:, :16], 6: seen[16:], 8: seen[:16]}[orientation]
    assert white.mean() > 240 and seen.mean() == pytest.approx(127.5, abs=10)


def transparent(mode):
    """Noise whose upper half is transparent, in each mode that can say so."""
    rgb = noise(32, 32, 3)
    alpha = np.full((32, 32), 255, np.uint8)
    alpha[:16] = 0
    image = Image.fromarray(np.dstack([rgb, alpha]), "RGBA")
    if mode == "P":
        image = image.convert("RGB").quantize(255)
        pixels = np.array(image)
        pixels[:16] = 255
        image = Image.fromarray(pixels, "P")
        image.putpalette(noise(256, 3).tobytes())
        image.info["transparency"] = 255
        return image
    if mode in ("L", "RGB", "I;16"):
        dtype = np.uint16 if mode == "I;16" else np.uint8
        pixels = rgb.astype(dtype) if mode == "RGB" else rgb[:, :, 0].astype(dtype)
        pixels = np.maximum(pixels, 8)
        pixels[:16] = 7
        image = Image.fromarray(pixels)
        image.info["transparency"] = (7, 7, 7) if mode == "RGB" else 7
        return image
    return image.convert(mode)


@pytest.mark.parametrize("mode, suffix", [
    ("RGBA", "png"), ("LA", "png"), ("P", "png"), ("P", "gif"), ("L", "png"), ("RGB", "png"),
    ("RGBA", "webp"), ("RGBA", "tif"), ("I;16", "png")])
def test_transparent_images_stand_on_white(tmp_path, mode, suffix):
    """Every mode that carries transparency; the colors under it are never seen."""
    (tmp_path / "a").mkdir()
    image = transparent(mode)
    options = {"lossless": True} if suffix == "webp" else {}
    if "transparency" in image.info:
        options["transparency"] = image.info["transparency"]
    image.save(tmp_path / f"a/0.{suffix}", **options)
    seen = V.Folder(tmp_path, 32)[0][0]
    assert (seen[:, :15] == 255).all()
    assert (seen[:, 17:] < 255).float().mean() > 0.9


def png(width, height, depth, color, rows, clear):
    """A PNG by hand, of a bit depth that PIL does not write."""
    def chunk(kind, data):
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, color, 0, 0, 0])
    data = b"".join(b"\0" + row for row in rows)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", clear)
            + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("depth, color", [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_transparent_colors_of_every_depth(tmp_path, depth, color):
    """tRNS of grey and RGB images: the color 1 of the upper half is transparent, 0 is not."""
    channels = 1 if color == 0 else 3
    one = (1 << 8) + 1 if depth == 16 else 1
    bits = "".join(f"{one:0{depth}b}" for _ in range(32 * channels))
    upper = int(bits, 2).to_bytes(len(bits) // 8, "big")
    rows = [upper] * 16 + [bytes(len(upper))] * 16
    (tmp_path / "a").mkdir()
    clear = one.to_bytes(2, "big") * channels
    (tmp_path / "a/0.png").write_bytes(png(32, 32, depth, color, rows, clear))
    seen = V.Folder(tmp_path, 32)[0][0]
    assert (seen[:, :16] == 255).all() and (seen[:, 16:] == 0).all()


def test_a_photo_with_odd_exif_data_is_turned(tmp_path):
    """Beside the orientation stands a tag that can't be written again: a resolution that is text."""
    def entry(tag, kind, count, value):
        head = tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + count.to_bytes(4, "little")
        return head + value.ljust(4, b"\0")

    tags = entry(0x0112, 3, 1, b"\6\0") + entry(0x011A, 2, 4, b"abc\0")
    exif = b"Exif\0\0II*\0" + (8).to_bytes(4, "little") + b"\2\0" + tags + bytes(4)
    (tmp_path / "a").mkdir()
    halves().save(tmp_path / "a/0.jpg", exif=exif, quality=95)
    seen = V.Folder(tmp_path, 32).read(0)[0].float()
    assert seen[:, :16].mean() < 5 and seen[:, 16:].mean() > 250


def test_opaque_images_keep_their_bits(tmp_path):
    """An alpha of 255 everywhere changes nothing."""
    rgb = noise(32, 32, 3)
    (tmp_path / "a").mkdir()
    Image.fromarray(np.dstack([rgb, np.full((32, 32), 255, np.uint8)]), "RGBA").save(
        tmp_path / "a/0.png")
    assert np.array_equal(V.Folder(tmp_path, 32)[0][0].permute(1, 2, 0).numpy(), rgb)


@pytest.mark.parametrize("size", [(6000, 1), (1, 6000), (20000, 3)])
def test_a_thin_image_takes_little_memory(tmp_path, size):
    """It is cropped before it is enlarged."""
    file = write(tmp_path / "a/0.png", size=size)
    data = V.Folder(tmp_path, 256)
    code = (f"import resource, vae; data = vae.Folder({str(file.parent.parent)!r}, 256); "
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; image = data[0][0]; "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < 100_000, done.stderr                      # KiB
    assert data[0][0].shape == (3, 256, 256)


def test_ordinary_images_are_cropped_as_adm_does(tmp_path):
    """Up to 64 times as long as wide, the bits are those of ADM's order."""
    image = Image.open(write(tmp_path / "0.png", size=(64 * 8, 8)))
    scaled = image.resize((64 * 16, 16), Image.BICUBIC)
    left = (64 * 16 - 16) // 2
    expected = np.asarray(scaled)[:, left : left + 16]
    assert np.array_equal(V.center_crop(image, 16).permute(1, 2, 0).numpy(), expected)


# ---- Images that can't be read --------------------------------------------------

def broken_tree(root, each=30, broken=("cat/3.png",)):
    tree(root, each=each)
    for name in broken:
        (root / name).write_bytes((root / name).read_bytes()[:100])
    return root


def test_the_next_image_takes_the_place_of_one_that_cannot_be_read(tmp_path):
    """With that one's label, in folders and packs alike: the same training, bit by bit."""
    data = V.Folder(broken_tree(tmp_path / "data", broken=("cat/3.png", "dog/9.png")), 32)
    i = data.files.index("dog/9.png")
    assert torch.equal(data[i][0], data[i + 1][0]) and data[i][1] == data[i + 1][1]
    assert data.unreadable.nonzero().flatten().tolist() == [i]
    done = python("train.py", "pack", str(tmp_path / "data"), str(tmp_path / "pack"),
                  "--resolution=32")
    assert done.returncode == 0 and "58 images, 2 unreadable" in done.stdout, done.stderr
    pack = V.open_images(str(tmp_path / "pack"))
    assert len(pack) == len(data) == 60 and V.fingerprint(pack) == V.fingerprint(data)
    for a, b in zip((data[j] for j in range(60)), (pack[j] for j in range(60)), strict=True):
        assert torch.equal(a[0], b[0]) and a[1] == b[1]
    assert torch.equal(data.unreadable, pack.unreadable)


def test_a_run_outlives_one_image(tmp_path):
    """It names the image once, counts it in the log, and goes on; resumed, it ends with the same
    bits."""
    data = broken_tree(tmp_path / "data")
    words = (*WORDS, f"--data={data}", "--workers=2")
    done = execute(*SMALL, "--steps=20", *words, f"--out={tmp_path / 'run'}")
    assert done.stdout.count("cannot read cat/3.png") == 1
    assert losses(tmp_path / "run")[-1]["unreadable"] == 1
    execute(*SMALL, "--steps=10", *words, f"--out={tmp_path / 'half'}")
    execute(*SMALL, "--steps=20", *words, f"--out={tmp_path / 'half'}")
    whole, half = last(tmp_path / "run"), last(tmp_path / "half")
    assert all(torch.equal(whole["model"][key], half["model"][key]) for key in whole["model"])


def test_too_many_unreadable_images_end_the_run(tmp_path):
    """More than one, and more than 1%."""
    data = broken_tree(tmp_path / "data", each=8, broken=("cat/3.png", "cat/4.png", "dog/5.png"))
    done = execute(*SMALL, "--steps=20", *WORDS, f"--data={data}", f"--out={tmp_path / 'run'}",
                   ok=False)
    assert done.returncode == 2 and "images cannot be read, more than 1%" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_removed_files_are_accepted_on_demand(tmp_path):
    """A resume on fewer images is refused with the option that allows it."""
    data = tree(tmp_path / "data", each=20)
    words = (*WORDS, f"--data={data}")
    run(config(tmp_path / "run", *words, "--steps=2"))
    (data / "cat/3.png").unlink()
    with pytest.raises(ValueError, match="39 images .* it began with 40 .*--accept_data=1"):
        run(config(tmp_path / "run", *words, "--steps=4"))
    assert run(config(tmp_path / "run", *words, "--steps=4", "--accept_data=1"))["steps"] == 4
    assert run(config(tmp_path / "run", *words, "--steps=5"))["steps"] == 5     # now it is its own
    shutil.rmtree(data / "dog")
    with pytest.raises(ValueError, match="classes of other names"):
        run(config(tmp_path / "run", *words, "--steps=6", "--accept_data=1"))


def test_data_may_move(tmp_path):
    """The same images at another place, or packed, are the same data."""
    data = tree(tmp_path / "data", each=20)
    run(config(tmp_path / "run", *WORDS, f"--data={data}", "--steps=2"))
    data.rename(tmp_path / "moved")
    run(config(tmp_path / "run", *WORDS, f"--data={tmp_path / 'moved'}", "--steps=3"))
    train.pack(str(tmp_path / "moved"), str(tmp_path / "pack"), 32)
    run(config(tmp_path / "run", *WORDS, f"--data={tmp_path / 'pack'}", "--steps=4"))
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    run(config(tmp_path / "elsewhere", *WORDS, f"--data={tmp_path / 'pack'}", "--steps=5"))


def test_a_folder_without_classes_may_move(tmp_path):
    """Its one class has its name, which does not count."""
    for i in range(20):
        write(tmp_path / "loose" / f"{i}.png")
    run(config(tmp_path / "run", *WORDS, f"--data={tmp_path / 'loose'}", "--steps=2"))
    (tmp_path / "loose").rename(tmp_path / "job")
    run(config(tmp_path / "run", *WORDS, f"--data={tmp_path / 'job'}", "--steps=3"))
    (tmp_path / "job/3.png").unlink()
    with pytest.raises(ValueError, match="--accept_data=1"):
        run(config(tmp_path / "run", *WORDS, f"--data={tmp_path / 'job'}", "--steps=4"))


def test_a_frozen_vae_may_move(tmp_path):
    """What counts is the VAE, not its path."""
    run(config(tmp_path / "vae", "--method=vae", "--steps=1"))
    words = ("--method=sit", "--steps=1")
    run(config(tmp_path / "run", *words, f"--vae={tmp_path / 'vae'}"))
    (tmp_path / "vae").rename(tmp_path / "other")
    run(config(tmp_path / "run", "--method=sit", "--steps=2", f"--vae={tmp_path / 'other'}"))


# ---- Names and paths ------------------------------------------------------------

def test_any_name_can_be_printed(tmp_path):
    """A damaged image whose name is not UTF-8 is named by pack, and the pack is whole."""
    tree(tmp_path / "data", each=3)
    (tmp_path / "data/cat" / os.fsdecode(b"na\xefve.png")).write_bytes(b"no image")
    for env in ({}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        out = tmp_path / f"pack{len(env)}"
        done = subprocess.run(
            [sys.executable, "train.py", "pack", str(tmp_path / "data"), str(out),
             "--resolution=32"], cwd=ROOT, capture_output=True, env={**os.environ, **env})
        assert done.returncode == 0, done.stderr
        assert b"6 images, 1 unreadable" in done.stdout
        assert len(V.open_images(str(out))) == 7


def test_home_is_expanded(tmp_path, monkeypatch):
    """In every option that is a path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    tree(tmp_path / "pics")
    cfg = S.parse(train.Config, [*SMALL, *WORDS, "--data=~/pics", "--out=~/runs/x"], train.PRESETS)
    assert (cfg.data, cfg.out) == (f"{tmp_path}/pics", f"{tmp_path}/runs/x")
    opt = S.parse(S.Options, ["~/runs/x", "--out=~/a.png"])
    assert (opt.path, opt.out) == (f"{tmp_path}/runs/x", f"{tmp_path}/a.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run(config(out, "--steps=2"))
    return out


def test_folders_of_outputs_are_made_before_the_work(tmp_path, trained, small_vae):
    """Every command that writes makes the folder, or refuses before it works."""
    vae_file = tmp_path / "vae.pt"
    torch.save(small_vae.state_dict(), vae_file)
    new = tmp_path / "new/and/newer"
    for name in ("b/a.png", "c/a.npz"):
        S.sample(S.Options(str(trained), count=2, steps=2, out=str(new / name)))
        assert (new / name).exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(E.FEATURES, "tiny", lambda *args: E.TinyClassifier().eval())
        E.ref("tiny", out=str(new / "d/ref.npz"), count=20)
    assert (new / "d/ref.npz").exists()
    (tmp_path / "file").write_text("not a folder")
    wrong, folder = tmp_path / "file/a", tmp_path / "d.png"
    folder.mkdir()
    for call in (lambda: S.sample(S.Options(str(trained), count=2, out=f"{wrong}.npz")),
                 lambda: S.sample(S.Options(str(trained), count=2, out=f"{wrong}.png")),
                 lambda: S.export(str(vae_file), to=str(wrong)),
                 lambda: E.ref("tiny", out=f"{wrong}.npz"),
                 lambda: train.pack(str(tree(tmp_path / "data")), str(wrong)),
                 lambda: train.encode(str(trained), "tiny", str(wrong)),
                 lambda: E.ref("tiny", out=str(tmp_path / "file-as-folder") + "/"),
                 lambda: S.sample(S.Options(str(trained), out=str(folder)))):
        with pytest.raises(ValueError, match="cannot write .*(file|folder)") as caught:
            call()
        assert "\n" not in str(caught.value)


# ---- Weights --------------------------------------------------------------------

@pytest.fixture
def small_vae():
    torch.manual_seed(0)
    return V.VAE(V.VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1))


def test_names_of_wrappers_inside_names(tmp_path, small_vae):
    """torch.compile and DDP of parts; another encoder before the VAE; the average is taken."""
    own = small_vae.state_dict()
    weights = {"conditioner.encoder.conv_in.weight": torch.zeros(2)}
    for key, value in own.items():
        part, _, rest = key.partition(".")
        weights[f"first_stage_model.{part}._orig_mod.{rest}"] = value
    torch.save(weights, tmp_path / "svd.pt")
    assert same(S.load_vae(str(tmp_path / "svd.pt"))[0], own)
    raw = {key: torch.zeros_like(value) for key, value in own.items()}
    torch.save({"model": raw, "ema": own}, tmp_path / "both.pt")
    assert same(S.load_vae(str(tmp_path / "both.pt"))[0], own)


def same(vae, weights):
    own = vae.state_dict()
    return all(torch.equal(own[key], weights[key]) for key in own)


def test_fp16_variants_are_found(tmp_path, small_vae):
    """diffusion_pytorch_model.fp16.safetensors alone in a folder; the full one is preferred."""
    torch.save(small_vae.state_dict(), tmp_path / "vae.pt")
    S.export(str(tmp_path / "vae.pt"), to=str(tmp_path / "full"))
    (tmp_path / "half").mkdir()
    shutil.copy(tmp_path / "full/config.json", tmp_path / "half")
    shutil.copy(tmp_path / "full/diffusion_pytorch_model.safetensors",
                tmp_path / "half/diffusion_pytorch_model.fp16.safetensors")
    assert same(S.load_vae(str(tmp_path / "half"))[0], small_vae.state_dict())


@pytest.mark.parametrize("prefix", ["first_stage_model.", "module.", "_orig_mod.", "vae.",
                                    "module._orig_mod."])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "ema", "checkpoint/model"])
def test_vaes_inside_other_files(tmp_path, small_vae, prefix, wrap):
    """A whole Stable Diffusion file, DDP's and torch.compile's prefixes, training wrappers."""
    weights = {prefix + key: value for key, value in small_vae.state_dict().items()}
    weights["model.diffusion_model.out.2.bias"] = torch.zeros(4)
    for name in reversed(wrap.split("/") if wrap else []):
        weights = {name: weights, "step": 3}
    torch.save(weights, tmp_path / "whole.pt")
    assert same(S.load_vae(str(tmp_path / "whole.pt"))[0], small_vae.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_networks_load(tmp_path, trained, prefix):
    """The same for SiT, the discriminator and the features."""
    content = torch.load(S.find_checkpoint(str(trained)), weights_only=True)
    plain = S.load_pipeline(str(trained))
    for key in ("ema", "vae", "discriminator"):
        content[key] = {prefix + name: value for name, value in content[key].items()}
    content.pop("vae_ema", None)
    torch.save(content, tmp_path / "step_0000002.pt")
    wrapped = S.load_pipeline(str(tmp_path))
    assert same(wrapped.sit, plain.sit.state_dict())
    _, _, disc = S.load_vae(str(tmp_path))
    net = V.Discriminator(len(disc["main.0.weight"]))
    V.load_weights(net, disc)
    inception = E.Inception()
    torch.save({prefix + key: value for key, value in inception.state_dict().items()},
               tmp_path / "inception.pth")
    assert same(E.load_inception(str(tmp_path / "inception.pth")), inception.state_dict())


@pytest.mark.parametrize("content, says", [
    ({"text_model.embeddings.weight": torch.zeros(2)}, "text_model.embeddings.weight"),
    ({"state_dict": {"unet.conv.weight": torch.zeros(2)}}, "unet.conv.weight"),
    ({}, "nothing")])
def test_a_sound_file_of_another_kind_is_named(tmp_path, content, says):
    """What it holds is said; it is never called damaged."""
    torch.save(content, tmp_path / "other.pt")
    for load in (S.load_vae, S.load_pipeline):
        with pytest.raises(ValueError) as caught:
            load(str(tmp_path / "other.pt"))
        assert says in str(caught.value) and "damaged" not in str(caught.value)
        assert "\n" not in str(caught.value)


# ---- Evaluation and sampling ----------------------------------------------------

def test_samples_in_class_folders_keep_their_size(tmp_path, monkeypatch):
    """evaluate.py gen measures a tree of 32 px images at 32 px."""
    data = V.Shapes(32, 20, first=E.HELD_OUT)
    for i in range(20):
        image, label = data[i]
        file = tmp_path / "tree" / data.classes[int(label)] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    seen = []

    def features(resolution, weights, repo):
        seen.append(resolution)
        return E.TinyClassifier().eval()

    monkeypatch.setitem(E.FEATURES, "tiny", features)
    monkeypatch.setattr(E, "load_reference", lambda ref, net, resolution, batch: {
        "mu": torch.zeros(128), "sigma": torch.eye(128), "sha256": "0" * 64})
    E.gen(str(tmp_path / "tree"), ref="tiny")
    assert seen == [32]


def test_guidance_of_every_scale():
    """v_null + s (v - v_null) for every s; 1 takes one call of the network, 0 is unconditional."""
    class Net:
        cfg = replace(train.SiTConfig(), num_classes=10)
        calls = 0

        def __call__(self, z, t, y):
            self.calls += 1
            return y.float()[:, None, None, None].expand_as(z), []

    z, y = torch.zeros(2, 1, 2, 2, dtype=torch.float64), torch.tensor([3, 4])
    for scale in (0.0, 0.5, 1.0, 2.0, -1.0):
        net = Net()
        v = S.guided(net, y, scale)(z, 0.5)[:, 0, 0, 0]
        assert v.tolist() == (10 + scale * (y - 10)).tolist()
        assert net.calls == 1
    options = S.Options("x", guidance=0.0)
    S.check(options)


@pytest.mark.parametrize("labels", [[0, 10], [-1], [99], [], [0.5], ["0"], [[1]]])
def test_a_label_out_of_range_is_refused(trained, labels):
    """From Python, too: never silently the null class."""
    with pytest.raises(ValueError, match=r"label.* 0 to 9"):
        S.load_pipeline(str(trained))(labels, steps=2)


@pytest.mark.parametrize("words", [
    ("train.py", "encode", "VAE", "tiny", "OUT", "--batch=-1"),
    ("train.py", "pack", "DATA", "OUT", "--resolution=-5"),
    ("evaluate.py", "align", "RUN", "tiny", "--seed=-1"),
    ("evaluate.py", "ref", "tiny", "--out=OUT", "--count=-1"),
    ("evaluate.py", "recon", "RUN", "tiny", "--resolution=30")])
def test_numbers_out_of_range(tmp_path, trained, words):
    """One line, before any work; nothing is written."""
    names = {"OUT": str(tmp_path / "out"), "RUN": str(trained), "VAE": str(trained),
             "DATA": str(tree(tmp_path / "data"))}
    done = python(*[names.get(word, word.replace("OUT", names["OUT"])) for word in words])
    option = words[-1].partition("=")[0]
    assert done.returncode == 2 and option in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_reports_about_published_names(tmp_path, monkeypatch, trained):
    """evaluate.py writes the report of an hf: name into the folder where it was called, after each
    setting of a sweep."""
    monkeypatch.chdir(tmp_path)
    snapshot = S.find_checkpoint(str(trained))
    monkeypatch.setattr(S, "download", lambda repository, files: snapshot)
    monkeypatch.setitem(E.FEATURES, "tiny", lambda *args: E.TinyClassifier().eval())
    name = "hf:REPA-E/sit-repae-sdvae/checkpoints/0400000.pt"
    E.gen(name, ref="tiny", count=4, steps=2, guidance="1,2", features="tiny")
    report, = tmp_path.glob("*.gen.json")
    assert len(json.loads(report.read_text())) == 2 and "/" not in report.name


def test_unreadable_images_are_named_in_an_evaluation(tmp_path, monkeypatch, capsys):
    """One is named, and its neighbour counts twice; more than 1% is an error."""
    monkeypatch.setitem(E.FEATURES, "tiny", lambda *args: E.TinyClassifier().eval())
    data = broken_tree(tmp_path / "data", each=10)
    E.gen(str(data), ref="tiny", features="tiny")
    assert "cannot read cat/3.png" in capsys.readouterr().out
    (data / "dog/5.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="2 of 20 images cannot be read"):
        E.gen(str(data), ref="tiny", features="tiny")


def test_the_authors_run_folder_is_opened_by_all_commands(tmp_path, trained, monkeypatch):
    """args.json and checkpoints/0400000.pt: gen finds the checkpoint, and curve all of them."""
    folder = tmp_path / "authors/checkpoints"
    folder.mkdir(parents=True)
    (folder.parent / "args.json").write_text("{}")
    for name in ("0300000.pt", "0400000.pt"):
        shutil.copy(S.find_checkpoint(str(trained)), folder / name)
    monkeypatch.setitem(E.FEATURES, "tiny", lambda *args: E.TinyClassifier().eval())
    E.gen(str(folder.parent), ref="tiny", count=4, steps=2, features="tiny")
    assert (folder / "0400000.gen.json").exists()
    E.gen(str(folder.parent), ref="tiny", count=4, steps=2, features="tiny", curve=True)
    assert (folder / "0300000.gen.json").exists()
    assert S.load_pipeline(str(folder.parent)).step == 2
    assert S.load_vae(str(folder.parent))[0].cfg.z_channels == 8


# ---- Machines -------------------------------------------------------------------

def test_without_git(tmp_path):
    """The run starts; its revision is unknown."""
    (tmp_path / "bin").mkdir()
    done = execute(*SMALL, "--steps=1", *WORDS, f"--out={tmp_path / 'run'}",
                   env=[("PATH", str(tmp_path / "bin"))])
    assert done.returncode == 0
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert first["git"] == ""


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, code):
    """A note, and the run goes on; a lock that is held still refuses."""
    def no_locks(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(train.fcntl, "lockf", no_locks)
    train.lock(tmp_path)
    assert "no file lock" in capsys.readouterr().out

    def held(*args):
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(train.fcntl, "lockf", held)
    with pytest.raises(ValueError, match="in use by"):
        train.lock(tmp_path)


WINDOWS = """
import builtins, os, sys
real = builtins.__import__

def without(name, *args, **kwargs):
    if name in ("fcntl", "resource", "pwd", "grp", "termios"):
        raise ImportError(f"No module named {name!r}", name=name)
    return real(name, *args, **kwargs)

builtins.__import__ = without
for name in ("posix_fallocate", "statvfs", "sched_getaffinity", "fork"):
    if hasattr(os, name):
        delattr(os, name)
import torch, torch.distributed as dist
dist.is_nccl_available = lambda: False
import train
train.main()
"""


def test_without_posix(tmp_path):
    """train.py where fcntl and the posix calls are missing, as on Windows."""
    words = [*SMALL, "--steps=2", *WORDS, f"--out={tmp_path / 'run'}"]
    for _ in range(2):                          # then it resumes, or finds that it is done
        done = subprocess.run([sys.executable, "-c", WINDOWS, *words], cwd=ROOT, text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stderr
    assert last(tmp_path / "run")["steps"] == 2
    assert "no file lock" in done.stdout


def test_no_file_is_mapped_when_it_is_replaced(tmp_path):
    """Windows can't replace a file that is mapped: a resumed run holds none of its own."""
    cfg = config(tmp_path / "run", "--steps=2")
    run(cfg)
    held, replaced = [], os.replace

    def spy(old, new):
        maps = Path("/proc/self/maps").read_text()
        held.extend(str(path) for path in (old, new) if str(path) in maps)
        replaced(old, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.os, "replace", spy)
        run(replace(cfg, steps=4))
    assert not held and last(tmp_path / "run")["steps"] == 4


def test_spawned_workers(tmp_path):
    """Where processes are spawned (macOS, Windows), data workers start, too, and the bits are the
    same."""
    data = tree(tmp_path / "data", each=10)
    code = ("import torch.multiprocessing as mp\nimport train\n"
            "if __name__ == '__main__':\n    mp.set_start_method('spawn')\n    train.main()\n")
    (tmp_path / "spawned.py").write_text(code)
    words = [*SMALL, "--steps=3", *WORDS, f"--data={data}", "--workers=2"]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "spawned.py"), *words, f"--out={tmp_path / 'a'}"],
        cwd=ROOT, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    execute(*words, f"--out={tmp_path / 'b'}")
    a, b = last(tmp_path / "a"), last(tmp_path / "b")
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])


def test_a_small_shared_memory(monkeypatch, capsys):
    """As many workers as have room in /dev/shm, said in a line: 4 batches are ready, and 2 on the
    way."""
    usage, batch = shutil.disk_usage("/dev/shm"), 32 * 3 * 256**2
    for free, workers in ((2**36, 8), (64 * 2**20, 1), (80 * 2**20, 2), (2**20, 0)):
        monkeypatch.setattr(S.shutil, "disk_usage", lambda path: usage._replace(free=free))
        assert S.fitting_workers(8, batch) == workers
        assert ("/dev/shm" in capsys.readouterr().out) == (workers < 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(S.shutil, "disk_usage", lambda path: usage._replace(free=80 * 2**20))
    assert S.fitting_workers(8, batch) == 1


class Stuck(torch.utils.data.Dataset):
    """Data that stop coming after a few."""
    classes, resolution = ["a"], 32
    labels = torch.zeros(100, dtype=torch.int64)

    def __len__(self):
        return 100

    def __getitem__(self, i):
        time.sleep(0.0 if i < 50 else 1000)
        return torch.zeros(3, 32, 32, dtype=torch.uint8), 0


@pytest.mark.parametrize("asked, message", [(False, "no batch for"), (True, "stopped while")])
def test_a_loader_that_stops_is_an_error(asked, message):
    """No batch within --loader_timeout, or a signal in the wait: one line, not a wait for good."""
    cfg = replace(train.Config(), batch=4, micro_batch=4, workers=1, loader_timeout=2)

    class Stop:
        pass

    stop = Stop()
    stop.asked = (time.time() - 100) * asked
    batches = train.batches_of(Stuck(), cfg, 0, 1, CPU, stop=stop)
    begin = time.time()
    with pytest.raises(ValueError, match=message):
        for _ in range(30):
            next(batches)
    assert time.time() - begin < 30
    for child in torch.multiprocessing.active_children():
        child.kill()                                    # as `friendly` does


def test_nothing_hangs_after_an_error(tmp_path):
    """Data workers ignore signals: a command that ends with an error does not wait for them."""
    data = tmp_path / "data/a"
    data.mkdir(parents=True)
    for i in range(151):
        (data / f"{i}.png").write_bytes(b"no image")
    begin = time.time()
    done = execute(*SMALL, "--steps=3", *WORDS, f"--data={data.parent}", "--workers=1",
                   f"--out={tmp_path / 'run'}", ok=False)
    assert done.returncode == 2 and time.time() - begin < 60
    assert "a hundred images in a row cannot be read" in done.stderr


def test_a_dead_worker_is_one_line(tmp_path):
    """Killed by the system (memory, /dev/shm): said like other mistakes."""
    class Deadly(Stuck):
        def __getitem__(self, i):
            os.kill(os.getpid(), 9)

    cfg = replace(train.Config(), batch=4, micro_batch=4, workers=1)
    with pytest.raises(ValueError, match="a data worker has died"):
        next(train.batches_of(Deadly(), cfg, 0, 1, CPU))


def test_settings_are_checked_before_the_first_stage(tmp_path):
    """The small teacher on images without labels: said at once, not after the first stage."""
    data = tree(tmp_path / "data", ["cat"])
    done = execute("--preset=tiny", f"--data={data}", f"--out={tmp_path / 'run'}", ok=False)
    assert done.returncode == 2 and "--teacher=tiny learns from labels" in done.stderr
    assert not (tmp_path / "run/first-stage/metrics.jsonl").exists()


def test_ones_own_images_without_downloads(tmp_path, monkeypatch):
    """The small teacher and the small judge are trained on the labels of any folder; the run
    resumes, is sampled by class name and evaluated against the folder."""
    data = tree(tmp_path / "data", ["cat", "dog", "owl"], each=6, size=(70, 66))
    fit = R.fit
    for module in (R, E):
        monkeypatch.setattr(module, "fit", lambda net, loss, title, steps, batch=64: fit(
            net, loss, title, 3, 8))
    words = (f"--data={data}", "--resolution=64", "--batch=4", "--workers=0", "--log_every=1")
    run(config(tmp_path / "run", *words, "--steps=1"))
    data.rename(tmp_path / "moved")
    words = (f"--data={tmp_path / 'moved'}", *words[1:])
    assert run(config(tmp_path / "run", *words, "--steps=2"))["classes"] == ["cat", "dog", "owl"]
    assert losses(tmp_path / "run")[-1]["align_vae"] != 0
    S.sample(S.Options(str(tmp_path / "run"), classes="owl", count=2, steps=2,
                       out=str(tmp_path / "g.png")))
    E.gen(str(tmp_path / "run"), ref=str(tmp_path / "moved"), count=8, steps=2)
    report, = json.loads((tmp_path / "run/step_0000002.gen.json").read_text())
    assert report["features"] == "tiny" and 0 <= report["values"]["accuracy"] <= 1
    E.align(str(tmp_path / "run"), str(tmp_path / "moved"), count=16)


def test_dry_lists_what_a_run_needs(tmp_path):
    """Each file and download: where it is looked for, and whether it is there."""
    data = tree(tmp_path / "data")
    env = [("TORCH_HOME", str(tmp_path / "hub"))]
    done = execute(f"--data={data}", "--dry=1", f"--out={tmp_path / 'run'}", env=env)
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "there" in lines["data"] and str(data) in lines["data"]
    for name in ("vae", "teacher", "lpips"):
        assert str(tmp_path / "hub") in lines[name] and "missing" in lines[name], done.stdout
    assert not (tmp_path / "run").exists()


def test_a_home_that_cannot_be_written(tmp_path):
    """One line that says what to set, before the small teacher is trained."""
    done = execute("--preset=tiny", f"--out={tmp_path / 'run'}", ok=False,
                   env=[("TORCH_HOME", "/proc/nowhere")])
    assert done.returncode == 2 and "set TORCH_HOME" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_read_only_data_and_no_home(tmp_path):
    """Data that can't be written and a home that isn't there stop no run."""
    data = tree(tmp_path / "data")
    for path in (data, *data.iterdir()):
        path.chmod(0o555)
    done = execute(*SMALL, "--steps=1", *WORDS, f"--data={data}", f"--out={tmp_path / 'run'}",
                   env=[("HOME", "/nonexistent"), ("TORCH_HOME", str(tmp_path / "hub"))])
    assert done.returncode == 0, done.stderr



# ---- Other devices --------------------------------------------------------------

class NoFloat64(TorchDispatchMode):
    """Raises where a tensor of float64 is made, as Apple's GPUs do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if torch.is_tensor(value):
                assert value.dtype != torch.float64, f"{function} makes float64"
        return made


@pytest.mark.parametrize("method", ["repa-e", "naive", "repa"])
def test_without_float64(tmp_path, monkeypatch, method):
    """train_step, the log and Pipeline where `wide` is float32: no float64, and float64's values."""
    import sit as T

    def result():
        cfg = config(tmp_path, f"--method={method}", "--batch=4", "--micro_batch=2",
                     "--latent_norm=auto", *(["--align_vae=0"] if method == "repa" else []))
        data = V.open_images(cfg.data, cfg.resolution)
        nets, cfg, _ = train.build(cfg, data, None, 1, CPU)
        opts = train.make_trainable(cfg, nets, None, 0, 1, CPU)
        for opt in opts.values():
            opt.defaults["fused"] = False               # the gate reads `ok` on the host
        images, labels = V.fetch(data, [0, 1, 2, 3])
        batches = iter([[images[:2], labels[:2]], [images[2:], labels[2:]]])
        r = train.draws(cfg, 0, 0, 1, (8, 8, 8), CPU)
        log = train.Log(tmp_path, 0, CPU)
        pipe = S.Pipeline(nets.vae, nets.ema, data.classes, {}, 0)
        with guard():
            terms, ok = train.train_step(cfg, nets, opts, batches, r)
            log.add(ok, terms)
            pictures = [pipe([1, 2], steps=4, solver=solver, guidance=2.0) for solver in S.SOLVERS]
        assert ok
        return {k: v.item() for k, v in terms.items()}, nets.sit.bn.running_var, pictures

    guard = contextlib.nullcontext
    wide_terms, wide_var, wide_pictures = result()
    for module in (T, S, train):
        monkeypatch.setattr(module, "wide", lambda device: torch.float32)
    guard = NoFloat64
    terms, var, pictures = result()
    # the draws are the CPU's in both
    assert terms == pytest.approx(wide_terms, rel=1e-4, abs=1e-6)
    assert torch.allclose(var, wide_var, rtol=1e-5)
    for a, b in zip(pictures, wide_pictures, strict=True):
        assert (a.int() - b.int()).abs().max() <= 1


def test_statistics_in_float32_far_from_zero(monkeypatch):
    """Two passes: a mean of 1,000 with a variance of 1 keeps its digits, over several batches."""
    import sit as T
    z = torch.randn(3, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0)) + 1000
    found = {}
    for dtype in (torch.float64, torch.float32):
        monkeypatch.setattr(T, "wide", lambda device: dtype)
        bn = T.LatentNorm(2)
        for part in z:
            zn = bn.normalise_batch(part)
            assert zn.var().item() == pytest.approx(1, abs=0.05)
        found[dtype] = bn.batch_statistics()
    for a, b in zip(*found.values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_precision(tmp_path, precision):
    """--precision=bf16: SiT, VAE and teacher run in bfloat16 on a CPU, too; losses follow float32's
    within its rounding. Latent statistics and losses stay in float32."""
    seen = set()

    def spy(module, args, output):
        seen.add(torch.is_autocast_enabled("cpu"))

    with pytest.MonkeyPatch.context() as patch:
        init = torch.nn.Conv2d.__init__

        def hooked(self, *args, **kwargs):
            init(self, *args, **kwargs)
            self.register_forward_hook(spy)

        patch.setattr(torch.nn.Conv2d, "__init__", hooked)
        run(config(tmp_path / "a", "--steps=3", "--log_every=1", f"--precision={precision}",
                   "--gan_start=100000"))
    assert (True in seen) == (precision == "bf16")
    run(config(tmp_path / "b", "--steps=3", "--log_every=1", "--gan_start=100000"))
    for a, b in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
        assert a["vae"] == pytest.approx(b["vae"], rel=0.05 if precision == "bf16" else 1e-6)
