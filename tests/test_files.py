"""Files in and out of vae.py: diffusers and the authors as references, packs and caches killed in the middle.

    python -m pytest tests/test_files.py
"""
import copy
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

import vae as V

HERE = Path(V.__file__).resolve().parent
SMALL = V.VAEConfig(z_channels=4, ch=32, ch_mult=(1, 2), num_res_blocks=1)


def small_vae(seed=0, cfg=SMALL):
    torch.manual_seed(seed)
    vae = V.VAE(cfg).eval()
    for p in vae.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return vae


def one_line(error, *words):
    assert "\n" not in str(error.value) and all(str(word) in str(error.value) for word in words), error.value


def command(*words, ranks=0):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return [sys.executable, *torchrun, str(HERE / "vae.py"), *map(str, words)], {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*words, ranks=0):
    line, env = command(*words, ranks=ranks)
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=200)


# ---------------------------------------------------------------------------------------------------------------------
# diffusers.

DOWN, UP = ("DownEncoderBlock2D",), ("UpDecoderBlock2D",)
PUBLISHED = {   # the architecture and factors of each published family, at a small width
    "SD": dict(latent_channels=4, scaling_factor=0.18215),
    "SDXL": dict(latent_channels=4, scaling_factor=0.13025, sample_size=1024),
    "SD3": dict(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                use_post_quant_conv=False),
    "FLUX": dict(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                 use_post_quant_conv=False),
    "e2e-vavae": dict(latent_channels=32, block_out_channels=(32, 32, 64, 64, 128),
                      down_block_types=DOWN * 4 + ("AttnDownEncoderBlock2D",),
                      up_block_types=("AttnUpDecoderBlock2D",) + UP * 4,
                      latents_mean=[i / 10 for i in range(32)], latents_std=[1 + i / 10 for i in range(32)])}


def diffusers_vae(name):
    torch.manual_seed(0)
    base = dict(block_out_channels=(32, 64, 128, 128), layers_per_block=2, norm_num_groups=32,
                down_block_types=DOWN * 4, up_block_types=UP * 4)
    return AutoencoderKL(**{**base, **PUBLISHED[name]}).eval()


@torch.no_grad()
def same(theirs, ours):
    """Moments (which are float32 in any case) and reconstructions agree in float64, relative to their largest value."""
    theirs, ours = (copy.deepcopy(net).double().eval() for net in (theirs, ours))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    posterior, (mean, logvar) = theirs.encode(x).latent_dist, ours.encode(x)
    rec = theirs.decode(posterior.mean).sample
    for a, b, limit in ((mean, posterior.mean, 1e-6), (logvar, posterior.logvar, 1e-6),
                        (ours.decode(posterior.mean), rec, 1e-12)):
        assert (a - b).abs().max() < limit * b.abs().max()


@pytest.mark.parametrize("name", PUBLISHED)
def test_diffusers_folders_load(tmp_path, name):
    """Every family's AutoencoderKL computes the same here, and its factors become the latents' statistics."""
    theirs = diffusers_vae(name)
    theirs.save_pretrained(tmp_path)
    ours, (mean, var), disc = V.load_vae(str(tmp_path))
    same(theirs, ours)
    config, z = theirs.config, torch.randn(1, len(mean), 2, 2)
    if config.latents_std:
        zn = (z - torch.tensor(config.latents_mean)[:, None, None]) / torch.tensor(config.latents_std)[:, None, None]
    else:
        zn = (z - (config.shift_factor or 0)) * config.scaling_factor
    assert torch.allclose((z - mean[:, None, None]) * var.rsqrt()[:, None, None], zn, rtol=1e-5, atol=1e-6)
    assert disc is None


def test_other_forms_of_a_diffusers_vae(tmp_path):
    """.bin, a file alone (no config: no statistics), and the attention's names of 2022 and 2023 give the same VAE."""
    theirs = diffusers_vae("SD")
    theirs.save_pretrained(tmp_path)
    state, reference = load_file(tmp_path / "diffusion_pytorch_model.safetensors"), V.load_vae(str(tmp_path))[0]
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for now, then in old.items():
        state = {key.replace(f".{now}.", f".{then}."): value for key, value in state.items()}
    assert any("proj_attn" in key for key in state) and not any("to_q" in key for key in state)
    for folder in ("bin", "old", "alone"):
        (tmp_path / folder).mkdir()
        shutil.copy(tmp_path / "config.json", tmp_path / folder)
    torch.save(load_file(tmp_path / "diffusion_pytorch_model.safetensors"),
               tmp_path / "bin/diffusion_pytorch_model.bin")
    save_file(state, tmp_path / "old/diffusion_pytorch_model.safetensors", {"format": "pt"})
    shutil.copy(tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "alone/any.safetensors")
    (tmp_path / "alone/config.json").unlink()
    for path, stats in (("bin", True), ("old", True), ("alone/any.safetensors", False)):
        vae, found, _ = V.load_vae(str(tmp_path / path))
        assert all(torch.equal(value, reference.state_dict()[key]) for key, value in vae.state_dict().items())
        assert (found is not None) == stats


@pytest.mark.parametrize("cfg", [SMALL, V.VAEConfig(8, 32, (1, 1, 2), 2, attn_last=True),
                                 V.VAEConfig(16, 32, (1, 2, 2, 2), 2, quant_conv=False)])
def test_export_and_back(tmp_path, cfg):
    """Ours -> diffusers -> ours and ours -> the authors' files -> ours: weights bit by bit, statistics within 1e-6;
    diffusers' own class decodes the same image."""
    vae = small_vae(cfg=cfg)
    mean, var = torch.randn(cfg.z_channels), torch.rand(cfg.z_channels) * 20 + 0.1
    disc = V.Discriminator(8).state_dict()
    torch.save({"vae": vae.state_dict(), "vae_config": {**cfg.__dict__, "ch_mult": list(cfg.ch_mult)},
                "ema": {"bn.running_mean": mean, "bn.running_var": var}, "discriminator": disc},
               tmp_path / "step_0000001.pt")
    out = tmp_path / "mine"
    result = run("export", tmp_path, out)
    assert result.returncode == 0 and "mine" in result.stdout, result.stderr
    theirs = AutoencoderKL.from_pretrained(out).eval()
    same(theirs, vae)
    for path, discs in ((out, None), (out / "mine.pt", disc)):
        back, stats, found = V.load_vae(str(path))
        assert back.cfg == cfg
        assert all(torch.equal(value, vae.state_dict()[key]) for key, value in back.state_dict().items())
        assert torch.allclose(stats[0], mean, rtol=1e-6) and torch.allclose(stats[1], var, rtol=1e-6)
        assert (found is None) == (discs is None) and all(torch.equal(found[key], disc[key]) for key in discs or ())


def test_export_of_a_run_without_snapshots(tmp_path):
    """Before the first snapshot a run's state is exported: state.pt, else state.prev.pt. What only
    the run needs in there (optimizers, the trained SiT) does not matter."""
    out = tmp_path / "mine"
    for seed, name in enumerate(("state.prev.pt", "state.pt")):
        vae = small_vae(seed)
        mean, var = torch.randn(4), torch.rand(4) + 0.1
        file = {"vae": vae.state_dict(), "vae_config": asdict(SMALL), "steps": 1,
                "ema": {"bn.running_mean": mean, "bn.running_var": var}}
        resuming = {"model": {}, "skipped": torch.zeros(2), "opt": {}, "opt_vae": {"state": {}}}
        torch.save(file | resuming, tmp_path / name)
        V.export(str(tmp_path), str(out))
        back, stats, disc = V.load_vae(str(out / "mine.pt"))
        own = vae.state_dict()
        assert all(torch.equal(value, own[key]) for key, value in back.state_dict().items())
        assert torch.allclose(stats[0], mean, rtol=1e-6)
        assert torch.allclose(stats[1], var, rtol=1e-6) and disc is None


def test_what_cannot_be_exported(tmp_path):
    """Published formats have no VAE with patches: one line, and nothing is written."""
    tiny = V.VAES["tiny"]
    torch.save({"vae": V.VAE(tiny).state_dict(), "vae_config": {**tiny.__dict__, "ch_mult": [1]}}, tmp_path / "t.pt")
    result = run("export", tmp_path / "t.pt", tmp_path / "out")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and "patch" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_authors_joint_checkpoint(tmp_path):
    """Their folder (args.json, checkpoints/0400000.pt with a Namespace inside) gives the VAE, bn's statistics and D."""
    vae, (mean, var) = small_vae(), torch.rand(2, 4)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "args.json").write_text("{}")
    torch.save({"model": {}, "ema": {"bn.running_mean": mean, "bn.running_var": var}, "vae": vae.state_dict(),
                "discriminator": {"main.0.weight": mean}, "opt": {}, "args": Namespace(model="SiT-XL/2"), "steps": 4},
               tmp_path / "checkpoints/0400000.pt")
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints/0400000.pt"):
        loaded, stats, disc = V.load_vae(str(path))
        assert loaded.cfg == SMALL and torch.equal(stats[0], mean) and torch.equal(stats[1], var)
        assert torch.equal(loaded.decoder.conv_in.weight, vae.decoder.conv_in.weight) and "main.0.weight" in disc


def test_bad_safetensors(tmp_path):
    """Truncated, foreign or lying files are one line that names the file; a header's claim allocates nothing."""
    state = small_vae().state_dict()
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    V.write_safetensors(path, state)
    assert all(torch.equal(value, state[key]) for key, value in load_file(path).items())        # the package reads it
    assert all(torch.equal(value, state[key]) for key, value in V.read_safetensors(path).items())
    raw = path.read_bytes()
    lie = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for content in (b"", b"\xff" * 8 + b"{}", raw[:-4], raw[:100], b"\x02\0\0\0\0\0\0\0[]", raw.replace(b"F32", b"I13"),
                    len(lie).to_bytes(8, "little") + lie + b"\0" * 16):
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            V.load_vae(str(path))
        one_line(caught, path)
    (tmp_path / "config.json").write_text("{")
    diffusers_vae("SD").save_pretrained(tmp_path / "sd")
    (tmp_path / "sd/config.json").write_text("{")
    with pytest.raises(ValueError) as caught:
        V.load_vae(str(tmp_path / "sd"))
    one_line(caught, "config.json")


# ---------------------------------------------------------------------------------------------------------------------
# Packed images.

@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A tree of 90 images of odd sizes and kinds, and the same with two unreadable ones."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(90):
        folder = root / "good" / ("cat", "dog", "owl")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        size = tuple(rng.integers(20, 90, 2).tolist())
        mode = ("RGB", "L", "RGBA", "CMYK")[i % 4]
        picture = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).resize((size[1], size[0]))
        picture.convert(mode).save(folder / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    shutil.copytree(root / "good", root / "bad")
    for name in ("cat/0.png", "owl/2.png"):
        (root / "bad" / name).write_bytes(b"no image")
    return root


def test_pack_equals_folder(tree, tmp_path):
    """Batch for batch: images, labels, classes; unreadable images are named, counted and left out."""
    result = run("pack", tree / "good", tmp_path / "good.npz", "--resolution=32")
    assert result.returncode == 0 and "90 images, 0 unreadable" in result.stdout, result.stderr
    folder, packed = V.open_images(str(tree / "good"), 32), V.open_images(str(tmp_path / "good.npz"), 32)
    assert packed.classes == folder.classes == ["cat", "dog", "owl"] and len(packed) == len(folder) == 90
    for rows in ([0], [89, 3, 3, 41], range(20)):
        for a, b in zip(packed[rows], folder[rows]):
            assert torch.equal(a, b)
    result = run("pack", tree / "bad", tmp_path / "bad.npz", "--resolution=32")
    assert "88 images, 2 unreadable" in result.stdout and "cat/0.png" in result.stdout and result.returncode == 0
    few = V.Packed(str(tmp_path / "bad.npz"))
    assert [name.split("/")[-1] for name in few.held["unreadable"]] == ["0.png", "2.png"]
    kept = [i for i, name in enumerate(folder.files) if not name.endswith(("/0.png", "/2.png"))]
    for a, b in zip(few[range(88)], folder[kept]):
        assert torch.equal(a, b)
    with np.load(tmp_path / "good.npz") as file:            # any reader of ADM's layout reads it
        assert np.array_equal(file["arr_0"], folder[range(90)][0].permute(0, 2, 3, 1))


def test_pack_killed(tree, tmp_path):
    """Killed in the middle nothing has the name of a whole file; the same command then writes the same bytes."""
    run("pack", tree / "good", tmp_path / "whole.npz", "--resolution=64")
    many = tmp_path / "many"
    for i in range(12):
        shutil.copytree(tree / "good/cat", many / f"class-{i}")
    line, env = command("pack", many, tmp_path / "killed.npz", "--resolution=256")
    process = subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed.npz.tmp").exists() or (tmp_path / "killed.npz.tmp").stat().st_size < 10**6:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed.npz").exists()
    for name in ("killed", "other"):
        assert run("pack", many, tmp_path / f"{name}.npz", "--resolution=256").returncode == 0
    assert (tmp_path / "killed.npz").read_bytes() == (tmp_path / "other.npz").read_bytes()


def test_bad_packs(tree, tmp_path):
    """A changed pixel is noticed when it is read; a file that is no pack, in one line when it is opened."""
    path = tmp_path / "pack.npz"
    V.pack(str(tree / "good"), str(path), 32)
    raw, packed = path.read_bytes(), V.Packed(str(path))
    path.write_bytes(raw[: packed.offset + 5 * 32 * 32 * 3 + 7] + b"\x5a" + raw[packed.offset + 5 * 32 * 32 * 3 + 8 :])
    packed = V.Packed(str(path))
    packed[[4, 6]]
    with pytest.raises(ValueError) as caught:
        packed[[4, 5]]
    one_line(caught, path, "image 5", "checksum")
    x = np.zeros((3, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="8 px, expected 32"):
        np.savez(path, x)
        V.open_images(str(path), 32)
    for arrays, word in ((dict(arr_0=x, arr_1=np.zeros(2, int)), "3 images"), (dict(arr_0=x / 2), "expected uint8"),
                         (dict(arr_0=x[:, :4]), "expected uint8"),
                         (dict(arr_0=x, arr_1=[0, 1, 9], classes=["a", "b"]), "2 classes"),
                         (dict(arr_0=x, arr_1=[-2, 0, 0]), "arr_1")):
        np.savez(path, **arrays)
        with pytest.raises(ValueError) as caught:
            V.Packed(str(path))
        one_line(caught, path, word)
    np.savez_compressed(path, x)
    with pytest.raises(ValueError) as caught:
        V.Packed(str(path))
    one_line(caught, path, "compressed")
    for content in (b"", b"PK", raw[: len(raw) // 2], b"<html>" * 99):
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            V.Packed(str(path))
        one_line(caught, path)


# ---------------------------------------------------------------------------------------------------------------------
# The cache of latents.

@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "vae.pt"
    torch.save(small_vae().state_dict(), path)
    return path


def cache_bytes(folder):
    return {name: (folder / name).read_bytes() for name in ("latents.npy", "checksums.npy", "cache.json")}


def test_cache_equals_encoding(tree, vae_file, tmp_path):
    """Two processes write what one writes; rows are the posterior's moments in float16; half a cache is not used."""
    words = ("encode", vae_file, tree / "good", tmp_path / "two", "--resolution=32", "--batch=16")
    assert run(*words[:3], tmp_path / "one", *words[4:]).returncode == 0
    assert (done := run(*words, ranks=2)).returncode == 0, done.stderr
    vae, data = small_vae(), V.Folder(tree / "good", 32)
    shutil.copytree(tmp_path / "two", tmp_path / "half")
    np.load(tmp_path / "half/checksums.npy", mmap_mode="r+")[:45] = 0
    with pytest.raises(ValueError, match="not complete"):
        V.Cached(data, tmp_path / "half", vae)
    one, two = (V.Cached(data, tmp_path / name, vae) for name in ("one", "two"))
    rows = [7, 80, 7]
    images, labels, moments = one[rows]
    assert torch.equal(images, data[rows][0]) and torch.equal(labels, data[rows][1])
    with torch.no_grad():
        mean, logvar = vae.encode(V.to_float(images))
    assert moments.dtype == torch.float16 and moments.shape == (3, 2, 4, 16, 16)
    assert torch.allclose(moments[:, 0].float(), mean, rtol=1e-3, atol=1e-4)
    assert torch.allclose(moments[:, 1].float(), (logvar / 2).exp(), rtol=1e-3, atol=1e-4)
    assert torch.allclose(two[range(90)][2].float(), one[range(90)][2].float(), rtol=2e-3, atol=1e-4)   # other batches
    images, labels, moments = V.Cached(data, tmp_path / "one", vae, images=False)[rows]
    assert images.numel() == 0 and torch.equal(labels, data[rows][1]) and len(moments) == 3


def test_encode_on_two_ranks_fails_in_one_line(tree, vae_file, tmp_path):
    """Whichever rank it is that finds something wrong says so, alone; random weights, which differ, are refused."""
    packed = tmp_path / "pack.npz"
    V.pack(str(tree / "good"), str(packed), 32)
    raw, start = bytearray(packed.read_bytes()), V.Packed(str(packed)).offset
    raw[start + 80 * 32 * 32 * 3] ^= 1                              # an image of the second rank's half
    packed.write_bytes(raw)
    for words, message in (((vae_file, packed), r"error \(process 1\): .*image 80 is damaged"),
                           (("tiny", tree / "good"), "tiny has random weights.*: name a trained VAE")):
        done = run("encode", *words, tmp_path / "cache", "--resolution=32", ranks=2)
        said = re.findall(r"error(?: .process \d.)?: .*", done.stderr)          # maybe behind a progress bar
        assert done.returncode and len(said) == 1 and re.search(message, said[0]), done.stderr
    done = run("encode", "f8d4", tree / "good", tmp_path / "new")
    assert done.returncode == 2 and "random weights" in done.stderr and not (tmp_path / "new").exists(), done.stderr


def test_full_disk_while_encoding(tree, vae_file, tmp_path, monkeypatch):
    """The cache's blocks are on the disk before anything is mapped, where a full disk would kill the process by a bus
    error; one that has no room for them is one line."""
    V.encode(str(vae_file), str(tree / "good"), str(tmp_path / "cache"), 32)
    size, blocks = (tmp_path / "cache/latents.npy").stat().st_size, (tmp_path / "cache/latents.npy").stat().st_blocks
    assert 512 * blocks >= size
    V.shared_array(tmp_path / "empty.npy", "<f2", (1000, 1000))
    assert 512 * (tmp_path / "empty.npy").stat().st_blocks >= 2 * 10**6          # not a hole

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(V.os, "posix_fallocate", full)
    with pytest.raises(ValueError) as caught:
        V.encode(str(vae_file), str(tree / "good"), str(tmp_path / "other"), 32)
    one_line(caught, tmp_path / "other/latents.npy", "No space left on device", "GB")


def test_cache_killed(tree, vae_file, tmp_path):
    """Killed in the middle and run again: the same bytes as without the kill; rows that were done are not redone."""
    words = ("--resolution=32", "--batch=1")
    assert run("encode", vae_file, tree / "good", tmp_path / "whole", *words).returncode == 0
    line, env = command("encode", vae_file, tree / "good", tmp_path / "killed", *words)
    process = subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checksums = tmp_path / "killed/checksums.npy"
    while not checksums.exists() or checksums.stat().st_size < 4 * 90 or not np.load(checksums)[9]:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = np.load(checksums)
    assert 10 <= np.count_nonzero(done) < 90
    latents = np.load(tmp_path / "killed/latents.npy", mmap_mode="r+")
    latents[3] = 7                          # a mark in a row that was done: it must survive
    latents.flush()
    assert run("encode", vae_file, tree / "good", tmp_path / "killed", *words).returncode == 0
    killed = np.load(tmp_path / "killed/latents.npy", mmap_mode="r+")
    assert (killed[3] == 7).all()
    killed[3] = np.load(tmp_path / "whole/latents.npy")[3]
    killed.flush()
    assert cache_bytes(tmp_path / "killed") == cache_bytes(tmp_path / "whole")


def test_wrong_caches(tree, vae_file, tmp_path):
    """Another VAE, other data, a damaged row or no cache at all: one line each."""
    data, vae = V.Folder(tree / "good", 32), small_vae()
    V.encode(str(vae_file), str(tree / "good"), str(tmp_path / "cache"), 32)
    with pytest.raises(ValueError) as caught:
        V.Cached(data, tmp_path / "cache", small_vae(1))
    one_line(caught, tmp_path / "cache", "another VAE")
    with pytest.raises(ValueError) as caught:
        V.Cached(V.Folder(tree / "good", 64), tmp_path / "cache", vae)
    one_line(caught, tmp_path / "cache", "another data")
    torch.save(small_vae(1).state_dict(), tmp_path / "other.pt")
    result = run("encode", tmp_path / "other.pt", tree / "good", tmp_path / "cache", "--resolution=32")
    assert result.returncode == 2 and "another VAE" in result.stderr and len(result.stderr.splitlines()) == 1
    latents = np.load(tmp_path / "cache/latents.npy", mmap_mode="r+")
    latents[5, 0, 0, 0, 0] += 1
    latents.flush()
    cached = V.Cached(data, tmp_path / "cache", vae)
    cached[[4, 6]]
    with pytest.raises(ValueError) as caught:
        cached[[4, 5]]
    one_line(caught, "row 5")
    for name, content in (("checksums.npy", b""), ("latents.npy", b"no array"), ("cache.json", b"{")):
        folder = tmp_path / f"bad-{name}"
        shutil.copytree(tmp_path / "cache", folder)
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError) as caught:
            V.Cached(data, folder, vae)
        one_line(caught, folder)
    with pytest.raises(ValueError, match="no file at .*nothing/cache.json"):
        V.Cached(data, tmp_path / "nothing", vae)


# ---------------------------------------------------------------------------------------------------------------------
# The picture, and mistakes.

def test_reconstruct(tree, vae_file, tmp_path):
    """Image, reconstruction and latents side by side, and each row's PSNR."""
    result = run("reconstruct", vae_file, tree / "good", f"--out={tmp_path}/grid.png", "--resolution=32", "--count=4")
    assert result.returncode == 0, result.stderr
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    scale = picture.shape[1] // 96
    assert picture.shape == (4 * 32 * scale, 3 * 32 * scale, 3)
    data, vae = V.Folder(tree / "good", 32), small_vae()
    x = data[[0, 30, 59, 89]][0]
    assert np.array_equal(picture[:: scale, :: scale][:32, :32], x[0].permute(1, 2, 0))
    with torch.no_grad():
        rec = V.to_uint8(vae.decode(vae.encode(V.to_float(x))[0]))
    shown = picture[:: scale, :: scale][:32, 32:64].astype(int)
    assert np.abs(shown - rec[0].permute(1, 2, 0).numpy()).max() <= 1
    psnr = 10 * np.log10(255**2 / (x[0].double() - rec[0]).square().mean())
    assert f"row 1: PSNR {psnr:.2f} dB" in result.stdout


def test_principal_colours():
    """Three directions of latents become three colours: a map that varies in one channel only is told by one hue."""
    z = torch.zeros(2, 5, 4, 4)
    z[:, 3] = torch.arange(16.0).view(4, 4)
    z += 1e-3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    colours = V.principal_colours(z, 16).float()
    assert colours.shape == (2, 3, 16, 16)
    red = colours[0, 0, ::4, ::4].flatten()
    assert ((red.diff() >= 0).all() or (red.diff() <= 0).all()) and red.max() - red.min() > 200


def test_mistakes(tmp_path, vae_file):
    """A wrong command, path or value ends with exit code 2 and one line that says what is wrong."""
    for words, word in ((("exprot", "a"), "did you mean export"), ((), "unknown command"),
                        (("pack", tmp_path / "no", "b"), "no data"), (("export", vae_file), "--to"),
                        (("encode", vae_file, tmp_path / "no", tmp_path / "c"), "no data"),
                        (("pack", "a", "b", "--resolution=x"), "whole number"),
                        (("reconstruct", tmp_path / "no.pt", "tiny"), "no file")):
        result = run(*words)
        assert result.returncode == 2 and word in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr


def test_groups_come_from_the_config(tmp_path):
    """guess_config can't see the groups of a GroupNorm: only ours and diffusers' files carry others than 32."""
    theirs = AutoencoderKL(block_out_channels=(32, 64), down_block_types=DOWN * 2, up_block_types=UP * 2,
                           norm_num_groups=8).eval()
    theirs.save_pretrained(tmp_path)
    ours = V.load_vae(str(tmp_path))[0]
    assert ours.cfg.groups == 8
    same(theirs, ours)
