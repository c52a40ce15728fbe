"""What only time shows: kills at any moment, dead ranks, other numbers of ranks, long runs.

    python tests/endurance.py kill --count=100      # SIGKILL: a third inside a write, a sixth
    #                                                 between the two renames of a save
    python tests/endurance.py worlds                # 1 -> 2 -> 1 ranks between resumes
    python tests/endurance.py deadrank              # one of two ranks is killed in the middle
    python tests/endurance.py soak --steps=2000     # memory, open files, processes of a long run

Each runs train.py in new processes, prints a table, then what was wrong, and ends with code 1 if
anything was. --seed=N draws other moments. tests/test_endurance.py runs a small sample of each.
Linux only: it reads /proc.
"""
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import repa  # noqa: E402
import train  # noqa: E402
from sample import parse  # noqa: E402

# the whole joint step, small: random VAE, SiT of 2 blocks, a teacher trained for 3 steps, GAN on;
# some saves write state.pt alone, some a snapshot too
SMALL = ("--preset=tiny --sit=2-32-2/2 --align_depth=1 --batch=8 --disc_ch=8 --projector_width=32 "
         "--gan_start=0 --preview_steps=2 --first_stage=0 --steps=24 --log_every=1 --save_every=3 "
         "--snapshot_every=5 --preview_every=12").split()
STATES = "state.pt", "state.prev.pt"


# ---- A run of train.py in a process of its own ----------------------------------

def launch(words):
    """`train.py words` with a quick teacher and what the environment asks for.

    SLOW: seconds that the write of a checkpoint takes. GAP: seconds between the two renames of a
    save, while the file MARK is there. ORDER: a file that gets the images in the order of use.
    """
    slow, gap, order = float(os.environ["SLOW"]), float(os.environ["GAP"]), os.environ["ORDER"]
    mark = Path(os.environ["MARK"])
    train_it = repa.train_tiny_teacher
    repa.train_tiny_teacher = lambda net, draw: train_it(net, draw, steps=3)
    plain_save, plain_replace, plain_order = torch.save, os.replace, train.Order

    def slow_save(content, file, **kwargs):
        if not hasattr(file, "write"):
            return plain_save(content, file, **kwargs)
        buffer = io.BytesIO()
        plain_save(content, buffer, **kwargs)
        for part in np.array_split(np.frombuffer(buffer.getvalue(), np.uint8), 20):
            time.sleep(slow / 20)
            file.write(part.tobytes())

    def slow_replace(source, target):
        plain_replace(source, target)
        if Path(target).name == "state.prev.pt":
            mark.touch()
            time.sleep(gap)
            mark.unlink()

    class RecordedOrder(plain_order):
        def __iter__(self):
            for n, rows in enumerate(super().__iter__()):       # one micro-batch is a step here
                if self.purpose == "epoch":
                    with open(order, "a") as file:
                        file.write(json.dumps([self.first_step + n, self.rank, rows]) + "\n")
                yield rows

    if slow:
        torch.save = slow_save
    if gap:
        os.replace = slow_replace
    if order:
        train.Order = RecordedOrder
    sys.argv = ["train.py", *words]
    train.main()


class Life:
    """A process that trains (or torchrun, with ranks > 0), from its start to its end; its output
    is in OUT.log."""

    def __init__(self, out, *words, ranks=0, restarts=0, slow=0.0, gap=0.0, order=""):
        torchrun = []
        if ranks:
            torchrun = ["-m", "torch.distributed.run", "--standalone",
                        f"--nproc_per_node={ranks}", f"--max_restarts={restarts}"]
        self.out, self.log, self.begin = Path(out), Path(f"{out}.log"), time.time()
        self.name, self.mark = f"{out} {self.begin}", Path(f"{out}.between")
        self.mark.unlink(missing_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
               "TORCH_HOME": str(self.out.parent / "torch"), "SLOW": str(slow), "GAP": str(gap),
               "MARK": str(self.mark), "ORDER": str(order), "ENDURANCE": self.name}
        command = [sys.executable, *torchrun, __file__, "train", *SMALL, f"--out={out}", *words]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)

    def living(self):
        """{pid: environment} of this life's processes that are still there: ranks, workers too."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                pairs = (entry / "environ").read_text(errors="replace").split("\0")
                env = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                if env.get("ENDURANCE") == self.name:
                    found[int(entry.name)] = env
        return found

    def between(self):
        """[the mark] while this life is between the two renames of a save, else []."""
        return [self.mark] if self.mark.exists() else []

    def writing(self):
        """The checkpoints that this life has opened and not yet written to their end."""
        found = []
        for path in [path for folder in folders(self.out) for path in folder.glob("*.tmp")]:
            with suppress(FileNotFoundError):
                if path.stat().st_mtime >= self.begin - 0.02 and not self.between():
                    found.append(path)
        return found

    def until(self, condition, seconds=120, pause=0.005):
        """Waits until condition() or the process's end -> the seconds that took."""
        begin = time.time()
        while not condition() and self.process.poll() is None:
            if time.time() > begin + seconds:
                for pid in self.living():
                    os.kill(pid, signal.SIGKILL)
                raise TimeoutError(f"{self.out} stood still for {seconds} s: {self.tail()}")
            time.sleep(pause)
        return time.time() - begin

    def until_nth(self, files, nth):
        """Waits until the nth of the files that come and go in the list files() is there."""
        seen, count = set(), 0

        def there():
            nonlocal seen, count
            now = set(files())
            count += len(now - seen)
            seen = now
            return now and count >= nth

        self.until(there, pause=0.001)

    def finish(self):
        """Waits for the end, which must be a good one."""
        self.until(lambda: False)
        if self.process.returncode:
            raise RuntimeError(f"{self.out} ended with code {self.process.returncode}: "
                               f"{self.tail()}")
        return self

    def gone(self, seconds=40):
        """Seconds until no process of this life is left (at most `seconds`)."""
        begin = time.time()
        while self.living() and time.time() < begin + seconds:
            self.process.poll()
            time.sleep(0.02)
        return time.time() - begin

    def tail(self):
        return self.log.read_text()[-3000:]


class Table(dict):
    """What is printed, and what was wrong."""

    def __init__(self):
        self.wrong = []

    def expect(self, good, otherwise):
        self.wrong += [] if good else [str(otherwise)]


# ---- Files ----------------------------------------------------------------------

def folders(out):
    """The folders of a run that are there: its first stage's, then its own."""
    return [folder for folder in (Path(out) / "first-stage", Path(out)) if folder.is_dir()]


def checkpoints(folder):
    """The files that a run's folder promises to be whole: states and snapshots."""
    states = [Path(folder) / name for name in STATES]
    return [file for file in states if file.exists()] + sorted(Path(folder).glob("step_*.pt"))


def damage(path):
    """What is wrong with a checkpoint: it loads, and no byte has changed since it was written."""
    try:
        torch.load(path, weights_only=True)
        return zipfile.ZipFile(path).testzip()
    except Exception as error:
        return repr(error)


def newest(folder):
    """The step that a run's folder resumes from, 0 if there is none."""
    for file in (Path(folder) / name for name in STATES):
        if file.exists() and not damage(file):
            return torch.load(file, weights_only=True, mmap=True)["steps"]
    return 0


def lines(folder):
    """The lines of a folder's metrics.jsonl that are complete."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def starts(folder, skip=0):
    """The steps that the processes in a folder began at, without the first `skip` lines."""
    return [line["from_step"] for line in lines(folder)[skip:] if "from_step" in line]


def content(out):
    """Each leaf of all checkpoints of a run and of its first stage: {where: tensor or other}; not
    the folder's name."""
    def leaves(tree, where):
        if not isinstance(tree, (dict, list, tuple)):
            return {} if where.endswith(("/config/out", "/config/vae")) else {where: tree}
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in leaves(value, f"{where}/{key}").items()}

    found = {}
    for path in [path for folder in folders(out) for path in checkpoints(folder)]:
        found |= leaves(torch.load(path, weights_only=True), str(path.relative_to(out)))
    return found


def differences(a, b):
    """Where two contents are not the same keys and bits."""
    def same(x, y):
        if torch.is_tensor(x) and torch.is_tensor(y):
            return torch.equal(x, y)
        return type(x) is type(y) and x == y

    return [where for where in sorted({*a, *b})
            if where not in a or where not in b or not same(a[where], b[where])]


# ---- The four tests -------------------------------------------------------------

def kill(root, count: int = 100, steps: int = 24, seed: int = 0):
    """`count` kills by SIGKILL, runs started anew until then. Each ends with the bits of one that
    was left alone, in all its files."""
    rng, table = random.Random(seed), Table()
    kills, inside, gaps, resumed, from_prev, finished, slowest = 0, 0, 0, 0, 0, 0, 0.0
    words, out = (f"--steps={steps}", f"--first_stage={steps // 3}"), root / "run"
    slow, gap, both = 0.3, 0.3, (out / "first-stage", out)
    torn = None             # the folder that the last kill left with state.prev.pt alone
    missed = 0              # whole runs in a row that gave no moment to aim at
    whole = Life(root / "whole", *words)
    first_line = whole.until(lambda: lines(root / "whole/first-stage"))
    truth = content(whole.finish().out)
    while kills < count or out.exists():
        had = [len(lines(folder)) for folder in both]
        before = [newest(folder) for folder in both]
        again, aim, nth = out.exists(), "", rng.randint(1, 4)
        if kills < count:
            aim = "write" if 3 * inside <= kills else "gap" if 6 * gaps <= kills else "line"
        line = rng.randint(0, steps * 4 // 3 - sum(before) + 4)     # of metrics.jsonl: kill there
        life = Life(out, *words, slow=slow * (aim == "write"), gap=gap * (aim == "gap"))

        def written():
            return sum(len(lines(folder)) for folder in both) - sum(had)

        if not aim:
            life.finish()
        elif aim == "write":                            # inside the nth file, anywhere in it
            life.until_nth(life.writing, nth)
            time.sleep(rng.uniform(0, slow))
        elif aim == "gap":                              # between the renames of the nth save
            life.until_nth(life.between, nth)
            time.sleep(rng.uniform(0, gap / 2))
        elif line == 0:                                 # while it starts
            time.sleep(rng.uniform(0, first_line))
        else:
            took = life.until(written)
            slowest = max(slowest, took * again)
            life.until(lambda: written() >= line)
            time.sleep(rng.uniform(0, 0.1))
        life.process.kill()
        code = life.process.wait()
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"kill {kills}: a restart ended with code {code}: {life.tail()}")
        missed = 0 if code else missed + (bool(aim) and not again)
        if missed == 3:
            raise RuntimeError(f"three runs went by without a {aim} to kill them in")
        if code:
            kills, inside = kills + 1, inside + bool(life.writing())
            gaps += bool(life.between())

        begun = [starts(folder, n) for folder, n in zip(both, had)]
        for folder, step, froms in zip(both, before, begun):
            for path in checkpoints(folder):
                bad = damage(path)
                table.expect(not bad, f"kill {kills}: {path}: {bad}")
            now = newest(folder)
            table.expect(now >= step, f"kill {kills}: {folder} went back from {step} to {now}")
            table.expect(froms in ([], [step]),
                         f"kill {kills}: {folder} held {step}, went on from {froms}")
            said = f"state.pt is missing: resuming from {folder / 'state.prev.pt'}"
            said = said in life.log.read_text()
            if froms:
                table.expect(said == (folder == torn), f"kill {kills}: {folder}, without state.pt: "
                             f"{folder == torn}, resumed from state.prev.pt: {said}")
                from_prev += said
        resumed += any(froms and froms[0] for froms in begun)
        torn = next((folder for folder in both if (folder / "state.prev.pt").exists()
                     and not (folder / "state.pt").exists()), None)
        table.expect(torn or not life.between(), f"kill {kills}: not between the renames")
        if code == 0:
            finished += 1
            for where in differences(truth, content(out)):
                table.expect(False, f"run {finished} differs in {where}")
            for path in whole.out.glob("**/*.png"):
                other = out / path.relative_to(whole.out)
                table.expect(other.exists() and path.read_bytes() == other.read_bytes(),
                             f"run {finished}: {other}")
            left = [str(path) for folder in both for path in folder.glob("*.tmp")]
            table.expect(not left, f"run {finished} leaves {left}")
            shutil.rmtree(out)
        print(f"{kills} kills, {inside} inside a write, {gaps} between renames, "
              f"{finished} finished runs", end="\r", file=sys.stderr)
    table.update({
        "kills": kills, "of them inside the write of a checkpoint": inside,
        "of them between the renames of a save": gaps, "restarts that resumed": resumed,
        "of them from state.prev.pt": from_prev, "finished runs": finished,
        "tensors and settings compared in each": len(truth),
        "slowest restart, to its first line": f"{slowest:.1f} s"})
    return table


def worlds(root, seed: int = 0, tolerance: float = 1e-4):
    """4 steps each on 1, 2 and 1 ranks against 12 on one: the same images step by step, the same
    losses to rounding. GAN off: its BatchNorm sees a rank's own images."""
    words, table, worst = ("--gan=0", "--save_every=4", f"--seed={seed}"), Table(), {}
    alone = Life(root / "one", *words, "--steps=12", order=root / "one.order")
    for steps, ranks in ((4, 0), (8, 2), (12, 0)):
        Life(root / "mixed", *words, f"--steps={steps}", ranks=ranks,
             order=root / "mixed.order").finish()
    alone.finish()
    drawn = [sorted(json.loads(line) for line in (root / f"{name}.order").read_text().splitlines())
             for name in ("one", "mixed")]
    one, mixed = ([(step, i) for step, _, rows in order for i in rows] for order in drawn)
    table.expect(len(one) == 12 * 8 and one == mixed, "the images or their order differ")
    begun = [(line["world_size"], line["from_step"]) for line in lines(root / "mixed")
             if "world_size" in line]
    table.expect(begun == [(1, 0), (2, 4), (1, 8)], f"ran as (ranks, first step) {begun}")
    one, mixed = ([line for line in lines(root / name) if "step" in line]
                  for name in ("one", "mixed"))
    table.expect(len(one) == len(mixed) == 12,
                 f"{len(one)} and {len(mixed)} lines of losses, expected 12")
    for a, b in zip(one, mixed):
        table.expect(a.keys() == b.keys(), f"step {a['step']}: other terms")
        for key in a.keys() & b.keys() - {"ms", "data_ms"}:
            error, part = abs(a[key] - b[key]) / max(abs(a[key]), 1e-6), (a["step"] - 1) // 4 * 4
            worst[part] = max(worst.get(part, (0, "")), (error, key))
            table.expect(error <= tolerance, f"step {a['step']}: {key} {a[key]} and {b[key]}")
    table["images in the same order"] = len(drawn[0]) * 8
    for n, (error, key) in worst.items():
        table[f"largest relative difference, steps {n + 1} to {n + 4}"] = f"{error:.1e} ({key})"
    return table


def deadrank(root, seed: int = 0, bound: float = 15.0, steps: int = 24):
    """SIGKILL for one of two ranks: all end soon, torchrun names it, and its restart ends like an
    undisturbed run."""
    rng, table, run, words = random.Random(seed), Table(), root / "run", f"--steps={steps}"
    two = content(Life(root / "whole", words, ranks=2).finish().out)
    moments = (rng.randint(4, steps // 3 + 1), rng.randint(steps // 2 + 2, steps * 3 // 4))
    for restarts, step in enumerate(moments):           # the second goes on from the first
        life, rank = Life(run, words, ranks=2, restarts=restarts), rng.randint(0, 1)
        life.until(lambda: any(line.get("step", 0) >= step for line in lines(run)))
        ranks = {int(env["RANK"]): pid for pid, env in life.living().items() if "RANK" in env}
        os.kill(ranks[rank], signal.SIGKILL)
        begin = time.time()
        life.until(lambda: ranks[1 - rank] not in life.living(), seconds=60)
        if not restarts:
            life.gone()
        took = time.time() - begin
        what = f"rank {rank} of 2 killed at step {step}, {restarts} restarts"
        code = (life.finish() if restarts else life).process.wait()
        output = life.log.read_text()
        names = re.search(rf"exitcode: -9\) local_rank: {rank} \(pid: {ranks[rank]}\)", output)
        table.expect(took < bound, f"{what}: the other was there for {took:.0f} s")
        table.expect(bool(code) != bool(restarts), f"{what}: torchrun ended with code {code}")
        table.expect(names, f"{what}: the output does not name it: {life.tail()}")
        errors = [line for line in output.splitlines() if line.startswith("error")]
        table.expect(len(errors) <= 1 and all("if a process is gone" in e for e in errors), errors)
        table.expect("RuntimeError:" not in output, f"{what}: a traceback of the other")
        table[what] = f"the rest gone after {took:.1f} s (bound {bound:.0f}), code {code}"
    begun, ours = starts(run), content(run)
    table.expect(len(begun) == 3 and begun == sorted({*begun}), f"started at steps {begun}")
    table.expect(newest(run) == steps, f"ended at step {newest(run)}")
    for where in differences(two, ours):
        table.expect(False, f"differs in {where}")
    table.update({"started at steps": begun, "ended at step": newest(run),
                  "tensors and settings compared": len(two)})
    return table


def soak(root, steps: int = 2000, workers: int = 2, seed: int = 0):
    """A long run on a folder of images, after a kill: its memory, open files and processes, looked
    at all the time."""
    rng, table, samples = np.random.default_rng(seed), Table(), []
    every = max(10, steps // 40)
    for i in range(40):
        path = root / "images" / f"class-{i % 4}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    words = (f"--data={root / 'images'} --workers={workers} --align_sit=0 --align_vae=0 "
             f"--log_every={every // 10} --steps={steps} --save_every={every} "
             f"--snapshot_every={4 * every} --preview_every={every}").split()
    killed = Life(root / "run", *words)
    killed.until((root / "run/state.pt").exists)
    killed.process.kill()
    killed.process.wait()
    had = len(lines(root / "run"))
    life = Life(root / "run", *words)                       # at once, beside the dead one's workers
    orphans = []                                            # when the last of those is gone

    def look():
        if not orphans and not killed.living():
            orphans.append(time.time() - life.begin)
        with suppress(OSError, KeyError, TypeError, IndexError):    # not yet training; or half gone
            mib = {pid: int(re.search(r"VmRSS:\s+(\d+)",
                                      Path(f"/proc/{pid}/status").read_text())[1]) / 1024
                   for pid in life.living()}
            own, files = mib.pop(life.process.pid), len(os.listdir(f"/proc/{life.process.pid}/fd"))
            step = lines(root / "run")[had:][-1]["step"]
            samples.append((step, own, sum(mib.values()), files, len(mib)))

    life.until(look, seconds=3600, pause=min(0.1, steps / 20000))   # never true: until the end
    left = life.gone(10)
    shared = [name for name in os.listdir("/dev/shm") if f"_{life.process.pid}_" in name]
    first = starts(root / "run")[-1]
    quarters = [[s for s in samples if q <= 4 * (s[0] - first) / (steps - first) < q + 1]
                for q in range(4)]
    own, others = ([median(s[i] for s in quarter) for quarter in quarters] for i in (1, 2))
    files = [min(s[3] for s in quarter) for quarter in quarters]    # those open all the time
    counts = sorted({s[4] for quarter in quarters for s in quarter})
    drift = max(abs(m[3] / m[2] - 1) for m in (own, others) if m[2])
    table.expect(life.process.returncode == 0, f"ended with an error: {life.tail()}")
    table.expect(first >= every and len(starts(root / "run")) == 2,
                 f"started at steps {starts(root / 'run')}")
    table.expect(drift < 0.02 or steps < 500, f"memory drifts by {100 * drift:.1f}%")
    table.expect(len({*files[1:]}) == 1, f"open files {files}")
    table.expect(counts == [workers], f"{counts} workers, expected {workers}")
    table.expect(not life.living() and not shared,
                 f"left after the end: {[*life.living()]} {shared}")
    table.expect(orphans and orphans[0] < 15, f"workers outlived a kill by {orphans or 'all'} s")
    table.update({"steps": newest(root / "run"), "looks": len(samples)})
    for what, values in (("RSS, median", own),
                         ("RSS, highest", [max(s[1] for s in q) for q in quarters]),
                         ("workers' RSS, median", others)):
        table[f"{what}, MiB, in each quarter"] = " ".join(f"{m:.1f}" for m in values)
    table.update({
        "drift of the medians over the second half": f"{100 * drift:.2f}%",
        "files always open, in each quarter": files, "workers": counts,
        "gone after the end, after a kill": f"{left:.1f} s, {sum(orphans):.1f} s"})
    return table


def main():
    commands = {f.__name__: f for f in (kill, worlds, deadrank, soak)}
    if sys.argv[1:2] == ["train"]:
        return launch(sys.argv[2:])
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    root = Path(tempfile.mkdtemp(prefix="endurance-"))
    table = parse(partial(commands[sys.argv[1]], root), sys.argv[2:])
    for label, value in (table | {"differences": len(table.wrong)}).items():
        print(f"{label:50s} {value}")
    if table.wrong:
        sys.exit("\n".join([f"WRONG, see {root}:", *table.wrong[:20]]))
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
