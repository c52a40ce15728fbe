"""Files in and out: diffusers and the authors as references; packs and caches that are killed in
the middle, belong to other data, are damaged, or find no room.

    python -m pytest tests/test_files.py
"""
import copy
import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import sample as S
import train as T
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
    said = str(error.value)
    assert "\n" not in said and all(str(word) in said for word in words), said


def equal(a, b):
    """Two dicts of tensors: the same names, types and bits."""
    return a.keys() == b.keys() and all(
        value.dtype == b[key].dtype and torch.equal(value, b[key]) for key, value in a.items())


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def start(*words, script="train.py", ranks=0):
    """A script in a process of its own, on one thread; by torchrun, if there are ranks."""
    line = [sys.executable]
    if ranks:
        line += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    line += [str(HERE / script), *map(str, words)]
    return subprocess.Popen(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(*words, script="train.py", ranks=0):
    """-> exit code, what it printed."""
    process = start(*words, script=script, ranks=ranks)
    out, err = process.communicate(timeout=300)
    return process.returncode, out + err


def killed(process, halfway):
    """Ends it by SIGKILL as soon as halfway() is true; until then files may be half written."""
    while True:
        assert process.poll() is None, process.communicate()
        try:
            if halfway():
                break
        except (OSError, ValueError, EOFError):
            pass
        time.sleep(0.002)
    process.kill()
    process.communicate()


@pytest.fixture
def cli(monkeypatch, capsys):
    """A script's main on these words, here -> exit code, what it printed."""
    def call(script, *words):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
        code = 0
        try:
            script.main()
        except SystemExit as end:
            code = end.code
        return code, "".join(capsys.readouterr())
    return call


# ---- diffusers, the authors, and back -------------------------------------------

DOWN, UP = ("DownEncoderBlock2D",), ("UpDecoderBlock2D",)
PUBLISHED = {   # the architecture and factors of each published family, at a small width
    "SD": dict(latent_channels=4, scaling_factor=0.18215),
    "SDXL": dict(latent_channels=4, scaling_factor=0.13025, sample_size=1024),
    "SD3": dict(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609,
                use_quant_conv=False, use_post_quant_conv=False),
    "FLUX": dict(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159,
                 use_quant_conv=False, use_post_quant_conv=False),
    "e2e-vavae": dict(latent_channels=32, block_out_channels=(32, 32, 64, 64, 128),
                      down_block_types=DOWN * 4 + ("AttnDownEncoderBlock2D",),
                      up_block_types=("AttnUpDecoderBlock2D",) + UP * 4,
                      latents_mean=[i / 10 for i in range(32)],
                      latents_std=[1 + i / 10 for i in range(32)])}


def diffusers_vae(name):
    torch.manual_seed(0)
    base = dict(block_out_channels=(32, 64, 128, 128), layers_per_block=2, norm_num_groups=32,
                down_block_types=DOWN * 4, up_block_types=UP * 4)
    return AutoencoderKL(**{**base, **PUBLISHED[name]}).eval()


@torch.no_grad()
def same(theirs, ours):
    """Moments (which are float32 in any case) and reconstructions agree in float64, relative to
    their largest value."""
    theirs, ours = (copy.deepcopy(net).double().eval() for net in (theirs, ours))
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, 64, 64, generator=generator).double() * 2 - 1
    posterior, (mean, logvar) = theirs.encode(x).latent_dist, ours.encode(x)
    rec = theirs.decode(posterior.mean).sample
    for a, b, limit in ((mean, posterior.mean, 1e-6), (logvar, posterior.logvar, 1e-6),
                        (ours.decode(posterior.mean), rec, 1e-12)):
        assert (a - b).abs().max() < limit * b.abs().max()


@pytest.mark.parametrize("name", PUBLISHED)
def test_diffusers_folders_load(tmp_path, name):
    """Every family's AutoencoderKL computes the same here, and its factors become the latents'
    statistics."""
    theirs = diffusers_vae(name)
    theirs.save_pretrained(tmp_path)
    ours, (mean, var), disc = S.load_vae(str(tmp_path))
    same(theirs, ours)
    config, z = theirs.config, torch.randn(1, len(mean), 2, 2)
    if config.latents_std:
        shift, std = torch.tensor([config.latents_mean, config.latents_std])[..., None, None]
        zn = (z - shift) / std
    else:
        zn = (z - (config.shift_factor or 0)) * config.scaling_factor
    own = (z - mean[:, None, None]) * var.rsqrt()[:, None, None]
    assert torch.allclose(own, zn, rtol=1e-5, atol=1e-6)
    assert disc is None


def test_other_forms_of_a_diffusers_vae(tmp_path):
    """.bin, a file alone (no config: no statistics), and the attention's names of 2022 and 2023
    give the same VAE."""
    theirs = diffusers_vae("SD")
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    reference = S.load_vae(str(tmp_path))[0].state_dict()
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
    shutil.copy(tmp_path / "diffusion_pytorch_model.safetensors",
                tmp_path / "alone/any.safetensors")
    (tmp_path / "alone/config.json").unlink()
    for path, stats in (("bin", True), ("old", True), ("alone/any.safetensors", False)):
        vae, found, _ = S.load_vae(str(tmp_path / path))
        assert equal(vae.state_dict(), reference)
        assert (found is not None) == stats


@pytest.mark.parametrize("cfg", [SMALL, V.VAEConfig(8, 32, (1, 1, 2), 2, attn_last=True),
                                 V.VAEConfig(16, 32, (1, 2, 2, 2), 2, quant_conv=False)])
def test_export_and_back(tmp_path, cfg, cli):
    """Ours -> diffusers -> ours and ours -> the authors' files -> ours: weights bit by bit,
    statistics within 1e-6; diffusers' own class decodes the same image."""
    vae = small_vae(cfg=cfg)
    mean, var = torch.randn(cfg.z_channels), torch.rand(cfg.z_channels) * 20 + 0.1
    disc = V.Discriminator(8).state_dict()
    content = {"vae": vae.state_dict(), "vae_config": asdict(cfg), "discriminator": disc,
               "ema": {"bn.running_mean": mean, "bn.running_var": var}}
    torch.save(content, tmp_path / "step_0000001.pt")
    out = tmp_path / "mine"
    code, said = cli(S, "export", tmp_path, f"--to={out}")
    assert code == 0 and "mine*.pt" in said, said
    theirs = AutoencoderKL.from_pretrained(out).eval()
    same(theirs, vae)
    for path, expected in ((out, None), (out / "mine.pt", disc)):
        back, stats, found = S.load_vae(str(path))
        assert back.cfg == cfg and equal(back.state_dict(), vae.state_dict())
        assert torch.allclose(stats[0], mean, rtol=1e-6)
        assert torch.allclose(stats[1], var, rtol=1e-6)
        assert equal(found, expected) if expected else found is None


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
        S.export(str(tmp_path), to=str(out))
        back, stats, disc = S.load_vae(str(out / "mine.pt"))
        assert equal(back.state_dict(), vae.state_dict())
        assert torch.allclose(stats[0], mean, rtol=1e-6)
        assert torch.allclose(stats[1], var, rtol=1e-6) and disc is None


def test_export_without_statistics(tmp_path, capsys):
    """A VAE alone has none: both forms load, and the command says so."""
    torch.save(small_vae().state_dict(), tmp_path / "vae.pt")
    S.export(str(tmp_path / "vae.pt"), to=str(tmp_path / "mine"))
    assert "without latents' statistics" in capsys.readouterr().out
    assert S.load_vae(str(tmp_path / "mine/mine.pt"))[1] is None
    assert equal(S.load_vae(str(tmp_path / "mine"))[0].state_dict(), small_vae().state_dict())


def test_export_over_the_files_it_reads(tmp_path):
    """The loaded weights may be mapped from the very files that are written: they stay whole (and
    no bus error ends the process, so it is one of its own)."""
    vae, disc = small_vae(), V.Discriminator(8).state_dict()
    torch.save(vae.state_dict(), tmp_path / "vae.pt")
    torch.save(disc, tmp_path / "vae-discriminator-ckpt.pt")
    saved = {"latents_scale": torch.full((1, 4, 1, 1), 0.5), "latents_bias": torch.ones(1, 4, 1, 1)}
    torch.save(saved, tmp_path / "vae-latents-stats.pt")
    shutil.copytree(tmp_path, tmp_path / "vae")
    words = "export", tmp_path / "vae/vae.pt", f"--to={tmp_path}/vae"
    code, said = run(*words, script="sample.py")
    assert code == 0, said
    back, (mean, var), found = S.load_vae(str(tmp_path / "vae/vae.pt"))
    assert equal(back.state_dict(), vae.state_dict()) and equal(found, disc)
    assert torch.equal(mean, torch.ones(4)) and torch.allclose(var, torch.full((4,), 4.0))


@pytest.mark.parametrize("cfg", [V.VAES["tiny"], replace(SMALL, sigma=0.1)])
def test_what_cannot_be_exported(tmp_path, cfg):
    """Published formats have no VAE with patches or a fixed sigma: refused, nothing is written."""
    torch.save({"vae": V.VAE(cfg).state_dict(), "vae_config": asdict(cfg)}, tmp_path / "t.pt")
    with pytest.raises(ValueError) as caught:
        S.export(str(tmp_path / "t.pt"), to=str(tmp_path / "out"))
    one_line(caught, tmp_path / "t.pt", "patch, sigma")
    assert not (tmp_path / "out").exists()


def test_the_authors_joint_checkpoint(tmp_path):
    """Their folder (args.json, checkpoints/0400000.pt with a Namespace inside) gives the VAE, bn's
    statistics and D."""
    vae, (mean, var) = small_vae(), torch.rand(2, 4)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "args.json").write_text("{}")
    content = {"model": {}, "ema": {"bn.running_mean": mean, "bn.running_var": var},
               "vae": vae.state_dict(), "discriminator": {"main.0.weight": mean}, "opt": {},
               "args": Namespace(model="SiT-XL/2"), "steps": 4}
    file = tmp_path / "checkpoints/0400000.pt"
    torch.save(content, file)
    for path in (tmp_path, tmp_path / "checkpoints", file):
        loaded, stats, disc = S.load_vae(str(path))
        assert loaded.cfg == SMALL and equal(loaded.state_dict(), vae.state_dict())
        assert torch.equal(stats[0], mean) and torch.equal(stats[1], var)
        assert torch.equal(disc["main.0.weight"], mean)


def test_groups_come_from_the_config(tmp_path):
    """Shapes don't show the groups of a GroupNorm: only ours and diffusers' files carry others
    than 32."""
    theirs = AutoencoderKL(block_out_channels=(32, 64), down_block_types=DOWN * 2,
                           up_block_types=UP * 2, norm_num_groups=8).eval()
    theirs.save_pretrained(tmp_path)
    ours = S.load_vae(str(tmp_path))[0]
    assert ours.cfg.groups == 8
    same(theirs, ours)


def test_safetensors(tmp_path):
    """What is written here the package reads, and the reverse, every type that it is read in."""
    state, path = small_vae().state_dict(), tmp_path / "x.safetensors"
    S.write_safetensors(path, state)
    assert equal(load_file(path), state) and equal(S.read_safetensors(path), state)
    kinds = {name: torch.arange(-3, 3).view(2, 3).to(kind)
             for name, kind in S.SAFETENSORS.items()} | {"scalar": torch.tensor(3.0)}
    save_file(kinds, path, {"format": "pt"})
    assert equal(S.read_safetensors(path), kinds)


def test_bad_safetensors(tmp_path):
    """Truncated, foreign or lying files are one line that names the file; a header's claim
    allocates nothing."""
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    S.write_safetensors(path, small_vae().state_dict())
    raw = path.read_bytes()
    lie = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    lie = json.dumps(lie).encode()
    for content in (b"", b"\xff" * 8 + b"{}", raw[:-4], raw[:100], b"\x02\0\0\0\0\0\0\0[]",
                    raw.replace(b"F32", b"I13"),
                    len(lie).to_bytes(8, "little") + lie + b"\0" * 16):
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            S.load_vae(str(path))
        one_line(caught, path)
    diffusers_vae("SD").save_pretrained(tmp_path / "sd")
    (tmp_path / "sd/config.json").write_text("{")
    with pytest.raises(ValueError) as caught:
        S.load_vae(str(tmp_path / "sd"))
    one_line(caught, tmp_path / "sd/config.json")


# ---- Packed images --------------------------------------------------------------

@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A tree of 90 images of odd sizes and kinds, and the same with two unreadable ones."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(90):
        folder = root / "good" / ("cat", "dog", "owl")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        size = tuple(rng.integers(20, 90, 2).tolist())
        mode = ("RGB", "L", "RGBA", "CMYK")[i % 4]
        picture = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        picture.convert(mode).save(folder / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    shutil.copytree(root / "good", root / "bad")
    for name in ("cat/0.png", "owl/2.png"):
        (root / "bad" / name).write_bytes(b"no image")
    return root


def test_pack_equals_folder(tree, tmp_path):
    """Batch for batch: images, labels, classes, and the fingerprint, so that a run or a cache of
    the folder goes on with the pack. A process gets no copy of the images."""
    T.pack(str(tree / "good"), str(tmp_path / "pack"), 32)
    folder, pack = V.open_images(str(tree / "good"), 32), V.open_images(str(tmp_path / "pack"), 32)
    assert pack.classes == folder.classes == ["cat", "dog", "owl"]
    assert len(pack) == len(folder) == 90 and pack.resolution == 32
    for rows in ([0], [89, 3, 3, 41], range(20)):
        for a, b in zip(V.fetch(pack, rows), V.fetch(folder, rows), strict=True):
            assert torch.equal(a, b)
    assert V.fingerprint(pack) == V.fingerprint(folder)
    assert V.fingerprint(pack) != V.fingerprint(V.open_images(str(tree / "good/cat"), 32))
    assert len(pickle.dumps(pack)) < 90 * 32 * 32
    with pytest.raises(ValueError, match="32 px, expected 64"):
        V.open_images(str(tmp_path / "pack"), 64)


def test_unreadable_images(tree, tmp_path, cli):
    """They are named and counted; the next ones take their places, with their labels."""
    code, said = cli(T, "pack", tree / "bad", tmp_path / "pack", "--resolution=32")
    assert code == 0 and "88 images, 2 unreadable" in said, said
    assert str(tree / "bad/cat/0.png") in said and str(tree / "bad/owl/2.png") in said
    assert said.count("cannot read") == 2
    folder, pack = V.Folder(tree / "good", 32), V.open_images(str(tmp_path / "pack"))
    rows = [i + name.endswith(("cat/0.png", "owl/2.png"))
            for i, (name, _) in enumerate(folder.samples)]
    assert len(pack) == 90 and sum(rows) == sum(range(90)) + 2 and pack.classes == folder.classes
    for a, b in zip(V.fetch(pack, range(90)), V.fetch(folder, rows)):
        assert torch.equal(a, b)
    assert torch.equal(pack.labels, folder.labels[rows])


def test_pack_at_the_folders_own_resolution(tree, tmp_path):
    """--resolution=0 is what a folder takes it for: 256, or without classes its first image's."""
    T.pack(str(tree / "good/cat"), str(tmp_path / "pack"), 0)
    pack, folder = V.open_images(str(tmp_path / "pack")), V.Folder(tree / "good/cat")
    assert len(pack) == 30 and pack.resolution == folder.resolution
    assert torch.equal(pack[7][0], folder[7][0])


def test_pack_killed(tree, tmp_path):
    """Killed in the middle it is no pack yet; the same command then writes the files that it writes
    undisturbed, and does not write over a whole pack."""
    many, out = tmp_path / "many", tmp_path / "killed"
    for i in range(12):
        shutil.copytree(tree / "good/cat", many / f"class-{i:02d}")

    def halfway():
        return np.load(out / "images.npy", mmap_mode="r")[10].any()
    killed(start("pack", many, out, "--resolution=256"), halfway)
    assert not np.load(out / "images.npy", mmap_mode="r")[-1].any()
    with pytest.raises(ValueError) as caught:
        V.open_images(str(out), 256)
    one_line(caught, out, "pack the folder again")
    for folder in (out, tmp_path / "other"):
        T.pack(str(many), str(folder))
    assert bytes_of(out) == bytes_of(tmp_path / "other")
    assert bytes_of(out).keys() == {"images.npy", "labels.npy", "classes.json", "files.json"}
    with pytest.raises(ValueError) as caught:
        T.pack(str(many), str(out))
    one_line(caught, out, "is a pack already")


def test_bad_packs(tree, tmp_path):
    """A missing, cut or foreign file in a pack is one line when it is opened."""
    T.pack(str(tree / "good"), str(tmp_path / "pack"), 32)
    for name in ("images.npy", "labels.npy", "classes.json", "files.json"):
        raw = (tmp_path / "pack" / name).read_bytes()
        for content in (b"", raw[: len(raw) // 2], b"<html>" * 99, None):
            folder = tmp_path / "bad"
            shutil.copytree(tmp_path / "pack", folder)
            if content is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(content)
            with pytest.raises(ValueError) as caught:
                V.open_images(str(folder), 32)
            one_line(caught, folder)
            shutil.rmtree(folder)


def test_npz(tmp_path):
    """ADM's layout from any writer: compressed or not, with or without labels and names."""
    path = tmp_path / "x.npz"
    x = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    labels = np.array([2, 0, 1, 1, 2])
    for writer, more, classes in ((np.savez, {}, ["0"]),
                                  (np.savez, dict(arr_1=labels), ["0", "1", "2"]),
                                  (np.savez_compressed, dict(arr_1=labels, classes=["a", "b", "c"]),
                                   ["a", "b", "c"])):
        writer(path, arr_0=x, **more)
        data = V.open_images(str(path), 8)
        assert data.classes == classes and len(data) == 5
        images, found = V.fetch(data, range(5))
        assert np.array_equal(images.permute(0, 2, 3, 1), x)
        assert found.tolist() == (labels.tolist() if more else [0] * 5)


def test_bad_npz(tmp_path):
    """What holds no images of that kind, or is cut, is one line that names the file."""
    path, x = tmp_path / "x.npz", np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(path, arr_0=x)
    raw = path.read_bytes()
    with pytest.raises(ValueError, match="8 px, expected 32"):
        V.open_images(str(path), 32)
    for arrays in (dict(arr_0=x / 2), dict(arr_0=x[0]), dict(arr_0=x[..., :1]), dict(other=x)):
        np.savez(path, **arrays)
        with pytest.raises(ValueError) as caught:
            V.open_images(str(path))
        one_line(caught, path, "ADM's layout")
    for content in (b"", b"PK", raw[: len(raw) // 2], b"<html>" * 99):
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            V.open_images(str(path))
        one_line(caught, path)
    with pytest.raises(ValueError, match="no file at .*absent.npz"):
        V.open_images(str(tmp_path / "absent.npz"))


# ---- The cache of latents -------------------------------------------------------

@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "vae.pt"
    torch.save(small_vae().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def cache(tree, vae_file, tmp_path_factory):
    """The cache of the good images at 32 px, by this VAE."""
    folder = tmp_path_factory.mktemp("cache") / "one"
    T.encode(str(vae_file), str(tree / "good"), str(folder), 32, 16)
    return folder


def test_cache_equals_encoding(tree, cache, tmp_path):
    """Rows are the images, labels and the posterior's moments in float16; a pack of the folder has
    the same cache; a run without a teacher reads no image."""
    vae, data = small_vae(), V.Folder(tree / "good", 32)
    rows = [7, 80, 7]
    images, labels, moments = V.fetch(T.CachedLatents(data, cache, vae), rows)
    assert torch.equal(images, V.fetch(data, rows)[0]) and torch.equal(labels, data.labels[rows])
    with torch.no_grad():
        mean, logvar = vae.encode(V.to_float(images))
    assert moments.dtype == torch.float16 and moments.shape == (3, 2, 4, 16, 16)
    assert torch.allclose(moments[:, 0].float(), mean, rtol=1e-3, atol=1e-4)
    assert torch.allclose(moments[:, 1].float(), (logvar / 2).exp(), rtol=1e-3, atol=1e-4)
    T.pack(str(tree / "good"), str(tmp_path / "pack"), 32)
    packed = T.CachedLatents(V.open_images(str(tmp_path / "pack")), cache, vae)
    for a, b in zip(V.fetch(packed, rows), (images, labels, moments), strict=True):
        assert torch.equal(a, b)
    none, *others = V.fetch(T.CachedLatents(data, cache, vae, images=False), rows)
    assert none.shape == (3, 3, 0, 0)
    assert torch.equal(others[0], labels) and torch.equal(others[1], moments)


def test_cache_of_two_processes(tree, vae_file, cache, tmp_path):
    """Two processes write what one writes (in other batches, so within float16's rounding); half a
    cache is not used."""
    out = tmp_path / "two"
    words = "encode", vae_file, tree / "good", out, "--resolution=32", "--batch=16"
    code, said = run(*words, ranks=2)
    assert code == 0, said
    vae, data = small_vae(), V.Folder(tree / "good", 32)
    one, two = (V.fetch(T.CachedLatents(data, folder, vae), range(90)) for folder in (cache, out))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert torch.allclose(two[2].float(), one[2].float(), rtol=2e-3, atol=1e-4)
    np.load(out / "labels.npy", mmap_mode="r+")[:45] = 0
    with pytest.raises(ValueError) as caught:
        T.CachedLatents(data, out, vae)
    one_line(caught, out, "not complete: run the same train.py encode again")


def test_encode_on_two_processes_names_unreadable_images(tree, vae_file, tmp_path):
    """Once; the next image takes its place, with that one's label."""
    shutil.copytree(tree / "good", tmp_path / "data")
    broken = tmp_path / "data/owl/2.png"                        # of the second process's half
    broken.write_bytes(b"no image")
    code, said = run("encode", vae_file, tmp_path / "data", tmp_path / "cache", "--resolution=32",
                     ranks=2)
    assert code == 0 and said.count("cannot read owl/2.png") == 1, said
    data, vae = V.Folder(tmp_path / "data", 32), S.load_vae(str(vae_file))[0]
    cached = T.CachedLatents(data, tmp_path / "cache", vae, images=False)
    i = data.files.index("owl/2.png")
    _, labels, moments = cached.__getitems__([i, i + 1])
    assert labels[0] == labels[1] and torch.equal(moments[0], moments[1])


def test_random_weights_are_not_encoded(tree, tmp_path):
    """A name of random weights gives others on each process and in each run: refused, and nothing
    is written."""
    for name in V.VAES:
        with pytest.raises(ValueError) as caught:
            T.encode(name, str(tree / "good"), str(tmp_path / "new"), 32)
        one_line(caught, f"{name} has random weights", "name a trained VAE")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system can't reserve blocks")
def test_full_disk(tree, vae_file, cache, tmp_path, monkeypatch):
    """The blocks of a cache or a pack are on the disk before anything is mapped, where a full disk
    would end the process by a bus error; one that has no room is one line that names the file."""
    latents = (cache / "latents.npy").stat()
    assert 512 * latents.st_blocks >= latents.st_size
    S.open_array(tmp_path / "empty.npy", np.float16, (1000, 1000))
    assert 512 * (tmp_path / "empty.npy").stat().st_blocks >= 2 * 10**6         # not a hole

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError) as caught:
        T.encode(str(vae_file), str(tree / "good"), str(tmp_path / "cache"), 32)
    one_line(caught, tmp_path / "cache/latents.npy", "No space left on device")
    with pytest.raises(OSError) as caught:
        T.pack(str(tree / "good"), str(tmp_path / "pack"), 32)
    one_line(caught, tmp_path / "pack/images.npy", "No space left on device")
    monkeypatch.undo()                                          # there is room again
    T.pack(str(tree / "good"), str(tmp_path / "pack"), 32)
    assert len(V.open_images(str(tmp_path / "pack"))) == 90


def test_arrays_of_another_run(tmp_path):
    """What was written stays when an array is opened again; one of another shape is refused."""
    file = tmp_path / "x.npy"
    S.open_array(file, np.uint8, (3, 2))[1] = 7
    assert S.open_array(file, np.uint8, (3, 2)).tolist() == [[0, 0], [7, 7], [0, 0]]
    with pytest.raises(ValueError) as caught:
        S.open_array(file, np.uint8, (4, 2))
    one_line(caught, file, "uint8 [3, 2]), expected uint8 [4, 2]: remove it")


def test_cache_killed(tree, vae_file, tmp_path):
    """Killed in the middle and run again: the same files as without the kill; rows that were done
    are not done again."""
    words = "encode", vae_file, tree / "good"
    more = "--resolution=32", "--batch=1"
    code, said = run(*words, tmp_path / "whole", *more)
    assert code == 0, said
    out = tmp_path / "killed"
    killed(start(*words, out, *more), lambda: np.load(out / "labels.npy")[9])
    done = np.load(out / "labels.npy")
    assert 10 <= np.count_nonzero(done) < 90
    latents = np.load(out / "latents.npy", mmap_mode="r+")
    latents[3] = 7                          # a mark in a row that was done: it must survive
    latents.flush()
    code, said = run(*words, out, *more)
    assert code == 0, said
    latents = np.load(out / "latents.npy", mmap_mode="r+")
    assert (latents[3] == 7).all()
    latents[3] = np.load(tmp_path / "whole/latents.npy")[3]
    latents.flush()
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    assert bytes_of(out).keys() == {"latents.npy", "labels.npy", "cache.json"}


def test_wrong_caches(tree, cache, tmp_path, cli):
    """Another VAE's cache, or that of other data, is neither read nor written to."""
    data, vae, other = V.Folder(tree / "good", 32), small_vae(), small_vae(1)
    with pytest.raises(ValueError) as caught:
        T.CachedLatents(data, cache, other)
    one_line(caught, cache, "another VAE")
    relabelled = V.Folder(tree / "good", 32)
    relabelled.labels = relabelled.labels.flip(0)
    for wrong, what in ((V.Folder(tree / "good", 64), "another resolution"),
                        (V.Folder(tree / "good/cat", 32), "another data"),
                        (relabelled, "another data")):
        with pytest.raises(ValueError) as caught:
            T.CachedLatents(wrong, cache, vae)
        one_line(caught, cache, what)
    torch.save(vae.state_dict(), tmp_path / "same.pt")
    torch.save(other.state_dict(), tmp_path / "other.pt")
    before = bytes_of(cache)
    for name, side in (("other.pt", 32), ("same.pt", 64)):
        words = tmp_path / name, tree / "good", cache, f"--resolution={side}"
        code, said = cli(T, "encode", *words)
        assert code == 2 and "another VAE or of other data" in said and len(said.splitlines()) == 1
    assert bytes_of(cache) == before


def test_damaged_caches(tree, cache, tmp_path):
    """A file of a cache that is damaged or missing is one line when a run starts, not in its first
    step."""
    data, vae = V.Folder(tree / "good", 32), small_vae()
    for name, content in (("labels.npy", b""), ("latents.npy", b"no array"), ("cache.json", b"{"),
                          ("latents.npy", (cache / "latents.npy").read_bytes()[:-1])):
        folder = tmp_path / "bad"
        shutil.copytree(cache, folder)
        for damage in (lambda: (folder / name).write_bytes(content), (folder / name).unlink):
            damage()
            with pytest.raises(ValueError) as caught:
                T.CachedLatents(data, folder, vae)
            one_line(caught, folder, "a cache of train.py encode")
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="no file at .*nothing.cache.json, expected a cache"):
        T.CachedLatents(data, tmp_path / "nothing", vae)


# ---- The picture, and mistakes --------------------------------------------------

def test_picture_of_a_vae(tree, tmp_path):
    """Sixteen images, spread over the data, each with its reconstruction and its latents as
    colors, four triples in a row."""
    data, vae = V.Folder(tree / "good", 32), small_vae()
    evaluate.save_latents(tmp_path / "grid.png", vae, data, torch.device("cpu"))
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape == (4 * 32, 12 * 32, 3)
    cells = picture.reshape(4, 32, 12, 32, 3).swapaxes(1, 2).reshape(16, 3, 32, 32, 3)
    rows = [0, 6, 12, 18, 24, 30, 36, 42, 47, 53, 59, 65, 71, 77, 83, 89]
    x = V.fetch(data, rows)[0]
    with torch.no_grad():
        z = vae.encode(V.to_float(x))[0]
        rec = V.to_uint8(vae.decode(z))
    colors = evaluate.principal_colors(z, 32)
    for i, (expected, limit) in enumerate(((x, 0), (rec, 1), (colors, 1))):
        expected = expected.permute(0, 2, 3, 1).numpy().astype(int)
        assert np.abs(cells[:, i].astype(int) - expected).max() <= limit


def test_principal_colors():
    """Three directions of latents become three colors: a map that varies in one channel only is
    told by one hue."""
    z = torch.zeros(2, 5, 4, 4)
    z[:, 3] = torch.arange(16.0).view(4, 4)
    z += 1e-3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    colors = evaluate.principal_colors(z, 16).float()
    assert colors.shape == (2, 3, 16, 16)
    red = colors[0, 0, ::4, ::4].flatten()
    assert (red.diff() >= 0).all() or (red.diff() <= 0).all()
    assert red.max() - red.min() > 200


def test_mistakes(tree, tmp_path, vae_file, cli):
    """A wrong path, word or value ends with exit code 2 and one line that says what is wrong."""
    no, out, good = tmp_path / "no", tmp_path / "out", tree / "good"
    for script, words, word in (
            (T, ("pack", no, out), f"no data folder at {no}"),
            (T, ("pack", good), "the following arguments are required: out"),
            (T, ("pack", good, out, "--resolution=x"), "--resolution: invalid int value: 'x'"),
            (T, ("encode", vae_file, no, out), f"no data folder at {no}"),
            (T, ("encode", no, good, out, "--resolution=32"), f"no file at {no}"),
            (T, ("encode", vae_file, good, out, "--resolution=33"), "a multiple of 2"),
            (T, ("encode", vae_file, good, out, "--resolutoin=32"), "did you mean --resolution?"),
            (S, ("export", vae_file), "the following arguments are required: --to"),
            (S, ("export", no, f"--to={out}"), f"no file at {no}")):
        code, said = cli(script, *words)
        assert code == 2 and word in said and len(said.splitlines()) == 1, said
        assert said.startswith("error: ") and not out.exists()
