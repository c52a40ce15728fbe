"""Every command of the README is run, in its order, in one folder.

First letter by letter as far as that goes without a GPU, ImageNet and downloads: train.py's with --dry=1, which checks
all that needs no model. Then for real: the same words, and behind them settings that make the networks, the images and
the number of steps small. What is a download is a local file of the same kind.
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import study
import train
from sample import parse
from test_repa import HUBCONF
from vae import VAE, Shapes, VAEConfig, fetch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MORE = (ROOT / "tests/README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README + MORE, re.S)      # (kind, text)


def commands():
    """The lines of all bash blocks that call python or torchrun, without comments."""
    lines = "\n".join(text for kind, text in BLOCKS if kind == "bash").replace("\\\n", " ").splitlines()
    lines = [" ".join(shlex.split(line, comments=True)) for line in lines if line and not line.startswith("#")]
    return [line.split(" && ")[-1].replace(".venv/bin/python", "python") for line in lines]


COMMANDS = [line for line in dict.fromkeys(commands()) if "pytest" not in line and "tests/" not in line]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the six files, and under the names that the README uses small images, a reference of ADM's kind,
    a stand-in for DINOv2, and a narrow VAE with latent-diffusion's names."""
    home = tmp_path_factory.mktemp("readme")
    for name in ("vae", "sit", "repa", "sample", "train", "evaluate"):
        shutil.copy(ROOT / f"{name}.py", home)
    for first, folder in ((0, "imagenet/train"), (900, "imagenet/val"), (1800, "my-images")):
        images, labels = fetch(Shapes(32, first=first), range(40))
        for i, (image, label) in enumerate(zip(images, labels)):
            path = home / folder / Shapes.classes[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    shutil.copytree(home / "my-images" / "star", home / "photos")
    (home / "dinov2").mkdir()
    (home / "dinov2/hubconf.py").write_text(HUBCONF + 'dinov2_vitl14 = make("dinov2_vitl14", 1024)\n')
    for name, d in (("dinov2_vitb14", 768), ("dinov2_vitl14", 1024)):
        shapes = {"cls_token": (1, 1, d), "pos_embed": (1, 1370, d), "patch_embed.weight": (d, 3, 14, 14),
                  "patch_embed.bias": (d,), "norm.weight": (d,), "norm.bias": (d,)}
        torch.save({key: torch.randn(shape) for key, shape in shapes.items()}, home / f"{name}.pth")
    torch.save(VAE(VAEConfig(ch=32, ch_mult=(1, 1))).state_dict(), home / "narrow.pt")
    execute(home, "evaluate.py", "ref", "imagenet/train", "--out=VIRTUAL_imagenet256_labeled.npz", "--features=tiny",
            "--resolution=32")
    return home


def execute(home, *words, ranks=1):
    """A script of the project in that folder, on one thread -> what it printed."""
    start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                 f"--nproc_per_node={ranks}"]
    done = subprocess.run([*start, *words], cwd=home, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def small(script, words):
    """What to put behind a command's words, so that it takes seconds and no download."""
    if script == "train.py" and words[0] in ("pack", "encode"):
        return {"pack": ["--resolution=32"], "encode": ["--batch=8"]}[words[0]]
    if script == "train.py":
        cfg = parse(train.Config, words, train.PRESETS)
        more = dict(resolution=32, steps=2, first_stage=min(cfg.first_stage, 2), batch=4, micro_batch=2, workers=0,
                    projector_width=16, disc_ch=8, gan_start=0, lpips=0,
                    preview_steps=2, align_depth=0)
        if cfg.vae != "tiny":
            more["vae"] = "tiny" if cfg.trains_vae else "runs/repa-e"
        if cfg.teacher != "tiny":
            more |= dict(teacher_repo="dinov2", teacher_weights=f"{cfg.teacher}.pth")
        if cfg.trains_sit:
            more["sit"] = "2-32-2/2"
        return [f"--{key}={value}" for key, value in more.items()]
    if script == "sample.py" and words[0] == "export":
        return []
    if script == "sample.py":
        return ["--steps=2", "--batch=2"] + ["--count=4"] * ("--classes" not in " ".join(words))
    more = {"gen": ["--features=tiny", "--steps=2"], "ref": ["--features=tiny", "--resolution=32"],
            "recon": ["--features=tiny", "--resolution=32"],
            "align": ["--repo=dinov2", "--weights=dinov2_vitb14.pth"]}[words[0]]
    return [*more, f"--count={12 if words[0] == 'align' else 4}", "--batch=2"]


LOCAL = {"--classes=207,360": "--classes=2,3", "hf:REPA-E/e2e-vavae-hf": "runs/repa-e",
         "hf:REPA-E/sit-repae-sdvae/checkpoints/0400000.pt": "runs/repa-e"}


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line, world):
    """It ends with exit code 0, in the world that the commands before it have left."""
    ranks = 2 if line.startswith("torchrun") else 1
    words = shlex.split(line)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, words = words[at], words[at + 1 :]
    if script == "train.py" and words[0].startswith("--"):
        execute(world, script, *words, "--dry=1")
    local = LOCAL | ({"runs/repa-e": "narrow.pt"} if words[0] == "export" else {})      # no format has tiny's VAE
    execute(world, script, *(local.get(word, word) for word in words), *small(script, words), ranks=ranks)


def test_python_blocks(world):
    """They run behind the commands, in the same folder."""
    code = "\n".join(text for kind, text in BLOCKS if kind == "python")
    assert "torch.uint8 2 3 32 32" in execute(world, "-c", f"{code}\nprint(images.dtype, *images.shape)")


def test_study(tmp_path):
    """Two short runs, measured and drawn; a second call finds them done."""
    words = ["tests/study.py", f"--out={tmp_path}", "--only=repa-e", *"--seeds=1 --jobs=1 --steps=2 --first=2".split(),
             "--every=2", "--count=12"]
    first, again = execute(ROOT, *words), execute(ROOT, *words)
    assert "repa-e, seed 0: " in first and "seed 0: " not in again and again in first
    row, = json.loads((tmp_path / "study.json").read_text())["repa-e"]["0"]
    assert row["step"] == 2 and row["FD-tiny"] > 0 and row["PSNR"] > 0 and len(row["CKNNA of blocks at t = 0.25"]) == 4
    assert {path.stem for path in tmp_path.glob("*.png")} == {f"study-{name}" for name in (
        "curves", "depth", "collapse", "latents", "samples")}


def test_table_of_the_study():
    """The table is what the study has measured, to the last digit, and the README's rows are of it."""
    table = study.table(json.loads((ROOT / ".github/study.json").read_text()))
    assert table in MORE
    rows = {line.split("|")[1]: line for line in table.splitlines()}
    short = [line for line in README.splitlines() if line.split("|")[1:2] and line.split("|")[1] in rows
             and "±" in line]
    assert len(short) == 5
    for line in short:
        name, distance, accuracy, cknna, variance = line.split("|")[1:6]
        cells = rows[name].split("|")
        assert [distance, accuracy, cknna, variance] == [cells[2], cells[4], cells[7], cells[9]], name
