"""What a run survives: polite stops, a full disk, a second run in its folder, changed data; and
what it warns of.

    python -m pytest tests/test_robustness.py
"""
import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import endurance
import pytest
import torch
from test_train import (ROOT, SMALL, UNREAD, assert_equal, config, execute, last, make_tree,
                        quick_teacher, run, torchrun)

import train
import sample
import vae as V
from sample import parse
from train import PRESETS, Config

assert quick_teacher        # a fixture for every test here, too


def environment(**more):
    """Of a process of one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def begin(*words, launcher=()):
    """The real command in the background; returns when it has trained a step."""
    out = next(word for word in words if word.startswith("--out=")).removeprefix("--out=")
    command = [sys.executable, *launcher, "train.py", *SMALL, *words]
    process = subprocess.Popen(command, cwd=ROOT, text=True, env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline, log = time.time() + 120, Path(out) / "metrics.jsonl"
    while not log.exists() or '"step"' not in log.read_text():
        assert process.poll() is None and time.time() < deadline, process.stdout.read()
        time.sleep(0.02)
    return process


def names(out, pattern="*.pt"):
    """Names of the files in a run's folder."""
    return sorted(path.name for path in Path(out).glob(pattern))


# ---- Signals --------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_polite_stop(tmp_path, number):
    """A signal ends the run after its step: saved, exit code 0, the command to go on; and it goes
    on, bit for bit."""
    out = tmp_path / "run"
    words = ("--steps=30", "--log_every=1", "--save_every=1000")
    process = begin(*words, f"--out={out}")
    process.send_signal(number)
    asked = time.time()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in output, output
    assert "To go on: the same command" in output
    assert time.time() - asked < 30
    stopped = last(out)["steps"]
    assert 0 < stopped < 30
    assert names(out) == ["state.pt", f"step_{stopped:07d}.pt"]
    execute(*SMALL, *words, f"--out={out}")
    execute(*SMALL, *words, f"--out={tmp_path / 'whole'}")      # equal bits: as many threads
    assert_equal(last(out), last(tmp_path / "whole"))


def test_polite_stop_on_two_ranks_with_workers(tmp_path):
    """One rank gets the signal, with its data workers; all stop after the same step, it is saved,
    and nothing is left running."""
    data = make_tree(tmp_path / "images")
    words = (f"--data={data}", "--workers=1", "--batch=4", "--align_sit=0", "--align_vae=0",
             "--steps=3000", "--log_every=1", "--save_every=1000", "--snapshot_every=1000",
             f"--out={tmp_path / 'run'}")
    process = begin(*words, launcher=torchrun(2))
    ranks = children(process.pid)
    family = [pid for rank in ranks for pid in children(rank)]
    assert len(ranks) == 2 and len(family) >= 2
    for pid in (ranks[1], *children(ranks[1])):         # a scheduler: all processes of a machine
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and output.count("To go on: the same command") == 1, output
    stopped = last(tmp_path / "run")["steps"]
    assert names(tmp_path / "run") == ["state.pt", f"step_{stopped:07d}.pt"]
    time.sleep(0.5)
    assert not [pid for pid in (*ranks, *family) if trains(pid)]


def trains(pid):
    """Is this a process that runs train.py?"""
    path = Path(f"/proc/{pid}/cmdline")
    return path.exists() and b"train.py" in path.read_bytes()


def children(pid):
    """Process numbers of a process's children that run train.py."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if trains(child)]


def test_second_signal_ends_at_once(monkeypatch):
    """Within 3 s a second signal is the same one again (schedulers and launchers repeat it); later
    it is impatience."""
    left = []
    monkeypatch.setattr(train.os, "_exit", left.append)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        stop = train.PoliteStop(1)
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() and not left
        stop.asked -= 4
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [1]
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


def test_second_signal_in_a_real_process(tmp_path):
    """Impatience, 3 s after the first signal, ends a run that is still saving; what it wrote is no
    checkpoint."""
    life = endurance.Life(tmp_path / "run", "--save_every=1000", "--snapshot_every=1000",
                          "--steps=3000", slow=60)
    life.until(lambda: endurance.lines(tmp_path / "run"))
    life.process.send_signal(signal.SIGTERM)
    asked = time.time()
    life.until(life.writing)
    time.sleep(max(0.0, asked + 3.1 - time.time()))
    assert life.process.poll() is None
    life.process.send_signal(signal.SIGTERM)
    assert life.process.wait(10) == 1
    assert names(tmp_path / "run") == [] and life.gone() < 10


# ---- The disk -------------------------------------------------------------------

@pytest.mark.parametrize("snapshots", [False, True])
def test_full_disk(tmp_path, snapshots):
    """A disk that takes no checkpoint, or a snapshot and no state: said each time, the last good
    state stays, training goes on, and it is tried again; where the last chance fails, the run ends
    in one line."""
    out = tmp_path / "run"
    execute(*SMALL, "--steps=3", f"--out={out}")
    good = {name: (out / name).read_bytes() for name in names(out)}
    assert good.keys() == {"state.pt", "step_0000003.pt"}
    limit = len(good["step_0000003.pt"]) * (1.1 if snapshots else 0.5)
    assert limit < len(good["state.pt"])
    limit = (int(limit),) * 2               # the kernel lets no file grow beyond this
    done = subprocess.run(
        [sys.executable, "train.py", *SMALL, "--steps=9", "--snapshot_every=6", f"--out={out}"],
        cwd=ROOT, text=True, capture_output=True, env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    said = done.stdout + done.stderr
    assert said.count("could not write state.pt of step 6 (File too large)") == 1, said
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, said
    assert "step 0000009/0000009" in done.stdout                    # it went on to the end
    assert {name: (out / name).read_bytes() for name in good} == good
    more = ["step_0000006.pt", "step_0000009.pt"] if snapshots else []
    assert names(out) == sorted([*good, *more]) and names(out, "*.tmp") == []
    execute(*SMALL, "--steps=9", f"--out={out}")
    assert last(out)["steps"] == 9


@pytest.mark.parametrize("extra, at_most", [
    ((), 1.5), (("--vae_ema=0.9",), 1.5), (("--method=vae",), 1.5),
    (("--method=repa",), 4.0)])             # a frozen VAE counts as if it were trained
def test_no_room_is_refused_before_the_first_step(tmp_path, monkeypatch, extra, at_most):
    """A disk must hold three states (one of them while it is written) and a snapshot; states that
    are there already count as room. The estimate is no less than what a run writes, nor much
    more."""
    out = tmp_path / "run"
    run(config(out, "--steps=2", "--save_every=1", *extra))
    sizes = {name: (out / name).stat().st_size for name in names(out)}
    assert sizes.keys() == {"state.pt", "state.prev.pt", "step_0000002.pt"}
    held = sizes["state.pt"] + sizes["state.prev.pt"]
    written = 3 * sizes["state.pt"] + sizes["step_0000002.pt"]
    too_few = written - 200_000             # a file's directory is not estimated
    usage = shutil.disk_usage(tmp_path)

    def with_room(free, folder):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
        return run(config(folder, "--steps=3", *extra))

    for free, folder in ((too_few, tmp_path / "new"), (too_few - held, out)):
        with pytest.raises(ValueError, match=r"no room for the run's checkpoints of [\d.]+ GB"):
            with_room(free, folder)
    assert with_room(int(at_most * written), tmp_path / "new")["steps"] == 3
    assert with_room(int(at_most * written) - held, out)["steps"] == 3


def test_leftovers_of_a_kill_are_harmless(tmp_path):
    """Killed while it writes, a run leaves state.tmp and step_N.tmp: nothing reads them, and the
    next save replaces them."""
    out = tmp_path / "run"
    run(config(out, "--steps=2", "--save_every=1"))
    for name in ("state.tmp", "step_0000003.tmp"):
        (out / name).write_bytes((out / "state.pt").read_bytes()[:99_999])
    assert sample.find_checkpoint(str(out)) == out / "step_0000002.pt"
    after = run(config(out, "--steps=3", "--save_every=1"))
    assert names(out, "*.tmp") == []
    assert names(out) == ["state.prev.pt", "state.pt", "step_0000002.pt", "step_0000003.pt"]
    assert_equal(after, run(config(tmp_path / "whole", "--steps=3", "--save_every=1")))


def test_a_damaged_state_never_takes_the_place_of_the_whole_one(tmp_path, monkeypatch):
    """A run that went on from state.prev.pt, beside a damaged state.pt, keeps a whole state through
    each rename of its next saves."""
    out = tmp_path / "run"
    run(config(out, "--steps=2", "--save_every=1"))
    (out / "state.pt").write_bytes((out / "state.pt").read_bytes()[:-1000])
    replace_file, whole = os.replace, []

    def look(source, target):
        replace_file(source, target)
        states = [out / name for name in endurance.STATES if (out / name).exists()]
        whole.append(not all(endurance.damage(file) for file in states))

    monkeypatch.setattr(train.os, "replace", look)
    after = run(config(out, "--steps=4", "--save_every=1"))
    assert len(whole) >= 4 and all(whole), whole
    assert_equal(after, run(config(tmp_path / "straight", "--steps=4", "--save_every=1")))


def test_read_only_folder(tmp_path):
    """A run's folder that has become read-only is refused before the first step, with its files
    untouched."""
    out = tmp_path / "run"
    execute(*SMALL, "--steps=1", f"--out={out}")
    before = {name: (out / name).read_bytes() for name in names(out, "*")}
    assert {"state.pt", "step_0000001.pt", "metrics.jsonl"} <= before.keys()
    out.chmod(0o555)
    # root may write everywhere, but for the capability (1) that this takes away (24:
    # PR_CAPBSET_DROP)
    done = subprocess.run([sys.executable, "train.py", *SMALL, "--steps=2", f"--out={out}"],
                          cwd=ROOT, text=True, capture_output=True, env=environment(),
                          preexec_fn=lambda: ctypes.CDLL(None).prctl(24, 1, 0, 0, 0))
    out.chmod(0o755)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    message = f"cannot write to --out={out} (Permission denied): name another folder"
    assert message in done.stderr
    assert {name: (out / name).read_bytes() for name in names(out, "*")} == before


# ---- The folder and its settings ------------------------------------------------

def test_two_runs_in_one_folder(tmp_path):
    """The second is told who holds the folder; a lock whose process was killed is nobody's."""
    words = ("--steps=3000", "--log_every=1", f"--out={tmp_path / 'run'}")
    process = begin(*words)
    second = execute(*SMALL, *words, ok=False)
    line, = second.stderr.strip().splitlines()
    assert second.returncode == 2, second.stderr
    assert f"in use by process {process.pid} on" in line, second.stderr
    process.kill()
    process.communicate()
    execute(*SMALL, "--steps=2", "--save_every=1", f"--out={tmp_path / 'run'}")


def test_other_data_is_refused(tmp_path):
    """A resume on data that are no longer the same (an image less) is an error, not another
    experiment."""
    data = make_tree(tmp_path / "images")
    words = (f"--data={data}", "--workers=0", "--align_sit=0", "--align_vae=0", "--batch=2")
    run(config(tmp_path / "run", *words, "--steps=1"))
    (data / "cat/0.png").unlink()
    with pytest.raises(ValueError, match="is not what .*run was trained on"):
        run(config(tmp_path / "run", *words, "--steps=2"))


def test_resuming_names_what_has_changed(tmp_path, capsys):
    """Other architecture, method, batch or seed: refused, with the differences; other
    changes are listed."""
    cfg = config(tmp_path / "run", "--steps=1")
    run(cfg)
    for key, value in (("sit", "3-32-2/2"), ("resolution", 64), ("batch", 4),
                       ("seed", 1), ("method", "repa"), ("latent_norm", "fixed"), ("hflip", True),
                       ("teacher", "dinov2_vitb14"), ("path", "cosine")):
        with pytest.raises(ValueError) as caught:
            train.load_state(replace(cfg, **{key: value}), 0)
        assert f"{key} was {getattr(cfg, key)!r}, is {value!r}" in str(caught.value)
        assert "\n" not in str(caught.value)
    train.load_state(replace(cfg, lr_sit=0.5, steps=9), 0)
    assert "changed: steps 1 -> 9, lr_sit 0.002 -> 0.5\n" in capsys.readouterr().out


def test_a_log_is_enough_to_run_it_again(tmp_path):
    """Its first line holds settings, versions, threads, git revision and the data's fingerprint;
    the same command twice gives the same bits."""
    for name in "ab":
        execute(*SMALL, "--steps=3", "--gan_start=0", f"--out={tmp_path / name}")
    state = last(tmp_path / "a")
    assert_equal(state, last(tmp_path / "b"))
    first = json.loads((tmp_path / "a/metrics.jsonl").read_text().splitlines()[0])
    assert {"config", "versions", "git", "data", "threads", "world_size", "images"} <= first.keys()
    assert first["data"] == state["data"] and first["config"]["seed"] == 0


def test_deterministic_option(tmp_path):
    """--deterministic asks PyTorch for algorithms that give the same bits (on a CPU they do
    anyway)."""
    code = ("import os, sys, torch, train\n"
            "train.run = lambda *args: print('asked:', "
            "torch.are_deterministic_algorithms_enabled(), "
            "os.environ.get('CUBLAS_WORKSPACE_CONFIG'))\n"
            "train.main()")
    for value, expected in (("1", "asked: True :4096:8"), ("0", "asked: False None")):
        words = (f"--deterministic={value}", f"--out={tmp_path}")
        done = subprocess.run([sys.executable, "-c", code, *SMALL, *words], cwd=ROOT, text=True,
                              capture_output=True)
        assert expected in done.stdout, done.stdout + done.stderr
    out = tmp_path / "run"
    execute(*SMALL, "--steps=1", "--gan_start=0", "--deterministic=1", f"--out={out}")
    assert last(out)["steps"] == 1                      # no algorithm is missing


# ---- Values that are not finite, and warnings -----------------------------------

@pytest.mark.parametrize("where", ["images", "latents", "gradient"])
def test_nan_anywhere_skips_the_step(tmp_path, monkeypatch, where):
    """(And in a loss: test_train.) Weights, SiT's statistics, averages and optimizers stay, and
    the log counts it."""
    words = ("--save_every=1", "--log_every=1", "--vae_ema=0.9", "--gan_start=0")
    before = run(config(tmp_path / "run", "--steps=2", *words))
    poison = iter([float("nan")])
    to_float, sample, parallel = train.to_float, V.VAE.sample, train.parallel
    if where == "images":
        monkeypatch.setattr(train, "to_float", lambda x: to_float(x) * next(poison, 1.0))
    elif where == "latents":
        def poisoned_sample(*moments):
            return sample(*moments) * next(poison, 1.0)

        monkeypatch.setattr(V.VAE, "sample", staticmethod(poisoned_sample))
    else:
        def poisoned(network, *args):
            if isinstance(network, train.SiT):
                bias = network.blocks[0].attn.proj.bias
                bias.register_hook(lambda gradient: gradient * next(poison, 1.0))
            return parallel(network, *args)

        monkeypatch.setattr(train, "parallel", poisoned)
    after = run(config(tmp_path / "run", "--steps=3", *words))
    assert next(poison, None) is None                   # it was there
    assert_equal(before, after, skip=("config", "steps", "skipped", *UNREAD))
    assert before["skipped"].tolist() == [0, 0] and after["skipped"].tolist() == [1, 1]
    logged = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert logged["skipped"] == 1


POISONED = """import os, shutil, train
calls, reconstruction_loss, save = [], train.reconstruction_loss, train.save_state

def poisoned_loss(*args):
    calls.append(1)
    nan = (os.environ["RANK"], len(calls)) == ("1", 2)
    return reconstruction_loss(*args) * (float("nan") if nan else 1)

def save_and_keep(cfg, nets, opts, step, *rest):
    save(cfg, nets, opts, step, *rest)
    shutil.copy(f"{cfg.out}/state.pt", f"{cfg.out}/kept-{step}.pt")

train.reconstruction_loss, train.save_state = poisoned_loss, save_and_keep
train.main()
"""


def test_nan_on_one_rank_skips_the_step_on_both(tmp_path):
    """One of two ranks has a NaN in its second step: no rank takes it, and they stay replicas."""
    script, out = tmp_path / "poisoned.py", tmp_path / "run"
    script.write_text(POISONED)
    words = ("--steps=3", "--save_every=1", "--gan_start=0", f"--out={out}")
    done = subprocess.run([sys.executable, *torchrun(2), str(script), *SMALL, *words], cwd=ROOT,
                          capture_output=True, text=True, env=environment(PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stdout + done.stderr
    first, second, third = (torch.load(out / f"kept-{n}.pt", weights_only=True) for n in (1, 2, 3))
    assert_equal(first, second, skip=("config", "steps", "skipped", *UNREAD))
    assert second["skipped"].tolist() == [1, 1] and third["skipped"].tolist() == [1, 0]
    assert not torch.equal(second["model"]["final_layer.linear.bias"],
                           third["model"]["final_layer.linear.bias"])


def test_warnings_of_collapse_and_discriminator(tmp_path, capfd):
    """Latents without variance, and a discriminator that always wins, are said in the log line."""
    cfg = parse(Config, [*SMALL, f"--out={tmp_path}"], PRESETS)
    log = train.Log(tmp_path, 0, torch.device("cpu"))

    def line(z_var, disc):
        terms = {"vae": 1.0, "l1": 1.0, "kl": 1.0, "disc": disc, "z_var": z_var, "norm_vae": 1.0,
                 "norm_disc": 1.0}
        log.add(torch.tensor(True), {name: torch.tensor(value) for name, value in terms.items()})
        log.flush(1, cfg, torch.zeros(2))
        return capfd.readouterr().out

    assert "WARNING" not in line(1.0, 0.8)
    assert "latents collapse" in line(0.001, 0.8) and "discriminator" in line(1.0, 0.001)
    assert "discriminator" in line(1.0, 7.0)
