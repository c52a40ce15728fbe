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
from dataclasses import asdict
from pathlib import Path

import pytest

import evaluate
import train
from sample import parse
from vae import VAES, Shapes, save_png

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = [(kind, text) for kind, text in re.findall(r"```(bash|python)\n(.*?)```", README, re.S)]


def commands():
    """The lines of all bash blocks that call python or torchrun, without comments."""
    lines = "\n".join(text for kind, text in BLOCKS if kind == "bash").replace("\\\n", " ").splitlines()
    lines = [" ".join(shlex.split(line, comments=True)) for line in lines if line and not line.startswith("#")]
    return [line.split(" && ")[-1].replace(".venv/bin/python", "python") for line in lines]


COMMANDS = [line for line in dict.fromkeys(commands()) if "pytest" not in line and "tests/" not in line]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the six files, small images under the names that the README uses, and a reference."""
    home = tmp_path_factory.mktemp("readme")
    for name in ("vae", "sit", "repa", "sample", "train", "evaluate"):
        shutil.copy(ROOT / f"{name}.py", home)
    for first, folder in ((0, "imagenet/train"), (900, "imagenet/val"), (1800, "my-images")):
        images, labels = Shapes(32, first=first)[range(40)]
        for i, (image, label) in enumerate(zip(images, labels)):
            path = home / folder / Shapes.classes[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(path, image)
    shutil.copytree(home / "my-images" / "star", home / "photos")
    for name in ("VIRTUAL_imagenet256_labeled.npz", "REF.npz"):
        execute(home, "evaluate.py", "ref", "imagenet/train", f"--out={name}", "--features=tiny", "--resolution=32")
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
    """What to put behind a command's words, so that it takes seconds."""
    if script == "train.py":
        cfg = parse(train.Config, words, train.PRESETS)
        tiny = cfg.data == "tiny"
        more = dict(resolution=32, steps=2, first_stage=min(cfg.first_stage, 2), batch=4, micro_batch=2, workers=0,
                    projector_width=16, disc_ch=8, disc_warmup=min(cfg.disc_warmup, 1), gan_start=0, lpips=0,
                    preview_steps=2, log_every=1, align_depth=0, teacher_repo="", teacher_weights="")
        if cfg.sit != "none":
            more["sit"] = "2-32-2/2"
        if not tiny or cfg.teacher == "none":
            more |= dict(teacher="none", repa_sit=0, repa_vae=0)        # the small teacher knows shapes only
        elif cfg.teacher != "tiny":
            more["teacher"] = "tiny"
        if not cfg.train_vae or cfg.init:
            more["vae"] = "runs/repa-e"
        elif cfg.vae not in VAES or cfg.vae != "tiny":
            more["vae"] = "tiny"
        return [f"--{key}={value}" for key, value in more.items()]
    if script == "sample.py":
        return ["--count=4", "--steps=2", "--batch=2"] if "--classes" not in " ".join(words) else ["--steps=2"]
    if script == "evaluate.py":
        opt = parse(evaluate.Options, words)
        more = {"gen": ["--features=tiny", "--steps=2"], "ref": ["--features=tiny", "--resolution=32"],
                "recon": ["--features=tiny"], "align": ["--teacher=none"]}[opt.command]
        return [*more, "--count=4", "--batch=2"]
    return {"pack": ["--resolution=32"], "encode": ["--batch=8"]}.get(words[0], [])


LOCAL = {"hf:REPA-E/e2e-vavae-hf": "runs/repa-e", "hf:REPA-E/sit-repae-sdvae/checkpoints/0400000.pt": "runs/repa-e"}


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line, world):
    """It ends with exit code 0, in the world that the commands before it have left."""
    ranks = 2 if line.startswith("torchrun") else 1
    words = shlex.split(line)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, words = words[at], words[at + 1 :]
    if script == "train.py":
        execute(world, script, *words, "--dry=1")
    extra = small(script, words)
    execute(world, script, *(LOCAL.get(word, word) for word in words), *extra, ranks=ranks)
