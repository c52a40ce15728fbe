"""The paper in miniature: its comparisons and ablations on the tiny world, from one command, on a CPU.

    python tests/study.py                                   # everything: less than two hours on two cores
    python tests/study.py --only=sit,repa,repa-e --seeds=1  # some of it; what is done is not done again
    python tests/study.py --draw_only=1                     # table and figures again, from what is there

Every run sees the same images and takes the same number of SiT steps, all but `scratch` from the same first-stage VAE
of its seed (`second`: from what REPA-E made of it). At
each checkpoint the EMA SiT draws images (ab2, 25 steps, no guidance, random labels), which a classifier judges that
shares nothing with the teacher: Fréchet distance in its features, and how often it sees the class that was asked for.
In --out: a folder for each run, study.json (all values), and the figures; --figures=.github puts those elsewhere.
"""
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY = "--sit=4-128-4/2 --ema=0.99 --preset=tiny"      # a smaller SiT, and an average that short runs can use
VARIANTS = {    # name: (what it is, settings, the run whose VAE it starts from)
    "sit": ("plain SiT, frozen VAE", TINY + ",sit", "vae"),
    "repa": ("REPA, frozen VAE", TINY + ",repa", "vae"),
    "repa-e": ("REPA-E", TINY + " --align_vae=1.5", "vae"),
    "naive": ("diffusion loss into the VAE", TINY + ",naive", "vae"),
    "second": ("REPA on REPA-E's VAE, frozen", TINY + ",repa", "repa-e"),
}
ABLATIONS = {   # with one seed
    "no-align": ("REPA-E, no alignment on the VAE", TINY + " --align_vae=0", "vae"),
    "no-batchnorm": ("REPA-E, fixed statistics", TINY + ",no-batchnorm --align_vae=1.5", "vae"),
    "no-gan": ("REPA-E without GAN", TINY + " --align_vae=1.5 --gan=0", "vae"),
    "scratch": ("REPA-E, VAE from scratch",
                TINY + " --align_vae=1.5 --first_stage=0 --gan_start=0", ""),
}
FIRST = {"vae": ("first stage", "--preset=tiny --method=vae --gan_start=250", "")}
RUNS = FIRST | VARIANTS | ABLATIONS


def run(name, seed, out, steps, first, every, count):
    """Trains one run and measures its checkpoints: -> evaluated.json in its folder, last. Killed: go on there."""
    folder, settings, source = Path(out) / f"{name}-{seed}", RUNS[name][1].split(), RUNS[name][2]
    if (folder / "evaluated.json").exists():
        return
    print(f"{name}, seed {seed}: {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "train.py", f"--seed={seed}", f"--out={folder.absolute()}",
             f"--log_every={math.gcd(every, 50)}", f"--preview_every={10**9}", f"--save_every={every}",
             f"--snapshot_every={every}", f"--steps={first if name in FIRST else steps}"]
    words += [f"--vae={(Path(out) / f'{source}-{seed}').absolute()}"] if source else []
    with open(folder / "log.txt", "a") as log:
        done = subprocess.run(words + settings, cwd=ROOT, stdout=log, stderr=log,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise ValueError(f"{name}, seed {seed} ended with exit code {done.returncode}: see {folder}/log.txt")

    import torch

    import evaluate
    torch.set_num_threads(1)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    log = {line["step"]: line for line in log if "step" in line}
    rows, files = [], sorted(folder.glob("step_???????.pt"))
    for file in files:
        for report in folder.glob(f"{file.stem}.*.json"):
            report.unlink()                             # of an evaluation that was killed
    with open(folder / "log.txt", "a") as screen, redirect_stdout(screen), redirect_stderr(screen):
        if name not in FIRST:
            how = dict(ref="tiny", count=count, steps=25)
            evaluate.gen(str(folder), curve=True, **how)
            evaluate.gen(str(folder), guidance="2", **how)          # of the last snapshot
        for file in files:
            for command in ["recon"] if name in FIRST else ["recon", "align"]:
                evaluate.COMMANDS[command](str(file), "tiny", count=min(count, 500))
    for file in files:
        step = int(file.stem[5:])
        row = {"step": step, "cosine": -log[step]["align_sit"] if "align_sit" in log[step] else None}
        for report in folder.glob(f"{file.stem}.*.json"):
            for entry in json.loads(report.read_text()):
                guided = " at guidance 2" * (entry.get("guidance", 1) > 1)
                row |= {key + guided: value for key, value in entry["values"].items()}
        rows.append(row)
    (folder / "evaluated.json.tmp").write_text(json.dumps(rows))
    (folder / "evaluated.json.tmp").rename(folder / "evaluated.json")
    for file in folder.glob("state*.pt"):
        file.unlink()                                   # the snapshots are all that is needed


def gather(out):
    """{name: {seed: rows of its checkpoints}} of all runs that are complete."""
    results = {}
    for file in sorted(Path(out).glob("*/evaluated.json")):
        name, _, seed = file.parent.name.rpartition("-")
        results.setdefault(name, {})[seed] = json.loads(file.read_text())
    return {name: results[name] for name in RUNS if name in results}


COLUMNS = {     # of the table: title, key, decimals, factor
    "FD": ("FD-tiny", 2, 1), "FD, guidance 2": ("FD-tiny at guidance 2", 2, 1),
    "accuracy %": ("accuracy", 1, 100), "accuracy %, guidance 2": ("accuracy at guidance 2", 1, 100),
    "cosine": ("cosine", 3, 1),
    "CKNNA": ("CKNNA", 3, 1), "PSNR dB": ("PSNR", 2, 1), "spatial variance": ("spatial variance", 3, 1),
    "total variation": ("total variation", 1, 1)}


def value(row, key):
    return max(row["CKNNA of blocks at t = 0.25"]) if key == "CKNNA" else row[key]


def table(results):
    """Markdown: a line for each variant at its last checkpoint, mean and standard deviation where there are seeds."""
    lines = ["| run | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, seeds in results.items():
        if name in FIRST:
            continue
        cells = []
        for key, decimals, factor in COLUMNS.values():
            values = np.array([value(rows[-1], key) for rows in seeds.values()], float) * factor
            spread = f" ± {values.std(ddof=1):.{decimals}f}" if len(values) > 1 else ""
            cells.append("" if np.isnan(values).any() else f"{values.mean():.{decimals}f}{spread}")
        lines.append(f"| {RUNS[name][0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curve(seeds, key):
    """-> steps [K], values [seeds, K]."""
    rows = list(seeds.values())
    return [row["step"] for row in rows[0]], np.array([[value(row, key) for row in one] for one in rows], float)


def draw(results, out, figures):
    """The figures, each from the runs that are there: means over the seeds in a band from the least to the most."""
    Path(figures).mkdir(parents=True, exist_ok=True)
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110,
                         "figure.constrained_layout.use": True})
    colours = dict(zip(VARIANTS, ("tab:gray", "tab:blue", "tab:red", "tab:orange", "tab:green")))
    shown = [name for name in VARIANTS if name in results]

    def lines(axis, key, names, title, log=False):
        for name in names:
            steps, values = curve(results[name], key)
            axis.plot(steps, values.mean(0), "o-", color=colours[name], label=VARIANTS[name][0], markersize=3)
            axis.fill_between(steps, values.min(0), values.max(0), color=colours[name], alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="steps", yscale="log" if log else "linear")
        if log:
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())

    def save(figure, name):
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(Path(figures) / f"{name}.png")
        plt.close(figure)

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
    lines(axes[0], "FD-tiny", shown, "Fréchet distance of samples", log=True)
    lines(axes[1], "accuracy", shown, "share of samples of the right class")
    lines(axes[2], "CKNNA", shown, "alignment with the teacher (CKNNA)")
    save(figure, "study-curves")

    figure, axes = plt.subplots(1, 4, figsize=(10, 2.8))
    for axis, t in zip(axes, (0.0, 0.25, 0.5, 0.75)):
        for name in shown:
            depth = np.array([rows[-1][f"CKNNA of blocks at t = {t}"] for rows in results[name].values()]).mean(0)
            axis.plot(range(1, len(depth) + 1), depth, "o-", color=colours[name], label=VARIANTS[name][0], markersize=3)
        axis.set(title=f"t = {t}", xlabel="block", ylim=(0, None))
    axes[0].set_ylabel("CKNNA with the teacher")
    save(figure, "study-depth")

    joint = [name for name in ("repa-e", "naive") if name in results]
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.8))
    for axis, (key, title) in zip(axes, (("spatial variance", "spatial variance of the latents"),
                                         ("total variation", "total variation of the latents"),
                                         ("PSNR", "reconstruction, PSNR in dB"), ("FD-tiny", "Fréchet distance"))):
        lines(axis, key, joint, title, log=key != "PSNR")
    save(figure, "study-collapse")
    pictures(out, figures, shown)


def pictures(out, figures, shown):
    """Images with their latents' principal components as colors, before and after; samples of the same seeds."""
    import torch
    from PIL import Image, ImageDraw
    from torchvision.utils import make_grid

    from evaluate import HELD_OUT, principal_colors
    from sample import load_pipeline, load_vae
    from vae import Shapes, fetch, to_float

    def labelled(rows, path, scale=2):
        """rows: {title: uint8 [3, h, w]}, under each other with their titles on the left."""
        tiles = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in rows.values()]
        tiles = [tile.resize((tile.width * scale, tile.height * scale), Image.NEAREST) for tile in tiles]
        gap, left = 6, 190
        sheet = Image.new("RGB", (left + tiles[0].width, sum(tile.height + gap for tile in tiles) - gap), "white")
        y = 0
        for title, tile in zip(rows, tiles):
            sheet.paste(tile, (left, y))
            ImageDraw.Draw(sheet).text((4, y + tile.height // 2 - 6), title, fill="black")
            y += tile.height + gap
        sheet.save(path)

    images, _ = fetch(Shapes(32, 10_000, HELD_OUT), range(12))
    rows = {"images": make_grid(images, 12, 0)}
    for name, title in (("vae", "latents before (first stage)"), ("repa-e", "latents after REPA-E"),
                        ("naive", "latents after naive training")):
        if (Path(out) / f"{name}-0" / "evaluated.json").exists():
            vae = load_vae(str(Path(out) / f"{name}-0"))[0].eval()
            with torch.no_grad():
                z = vae.encode(to_float(images))[0]
            rows[title] = make_grid(principal_colors(z, 32), 12, 0)
    labelled(rows, Path(figures) / "study-latents.png")
    labels = [label for label in range(10) for _ in range(2)]
    labelled({VARIANTS[name][0]: make_grid(load_pipeline(Path(out) / f"{name}-0")(labels, 50, "ab2", 2.0), 20, 0)
              for name in shown if (Path(out) / f"{name}-0" / "evaluated.json").exists()},
             Path(figures) / "study-samples.png", 1)


def study(out: str = "runs/study", figures: str = "", only: str = "", seeds: int = 3, steps: int = 1500,
          first: int = 1500, every: int = 500, count: int = 1000, jobs: int = 0, draw_only: bool = False):
    """Runs what is missing, then prints the table and draws. only: names of variants; jobs: runs at a time, each on
    one thread (0: as many as cores); first: steps of the first stage; count: images of an evaluation."""
    names = only.split(",") if only else [*VARIANTS, *ABLATIONS]
    one = partial(run, out=out, steps=steps, first=first, every=every, count=count)
    with ProcessPoolExecutor(jobs or os.cpu_count()) as pool:
        for seed in () if draw_only else range(seeds):
            wanted = [name for name in names if seed == 0 or name in VARIANTS]
            for part in (["vae"], [name for name in wanted if name != "second"], {"second"} & set(wanted)):
                list(pool.map(one, part, [seed] * len(part)))       # each part needs a VAE of the part before
    results = gather(out)
    (Path(out) / "study.json").write_text(json.dumps(results, indent=1))
    print(table(results))
    draw(results, out, figures or out)


if __name__ == "__main__":
    from sample import friendly, parse
    friendly(lambda argv: parse(study, argv))()
