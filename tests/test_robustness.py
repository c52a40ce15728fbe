"""What a run survives: polite stops, a full disk, a second run in its folder, changed data; and what it warns of.

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
from test_train import (ROOT, SMALL, UNREAD, assert_equal, config, execute, last_pair, make_tree, quick_teacher, run,
                        torchrun)

import train
import vae as V
from sample import parse
from train import PRESETS, Config

assert quick_teacher        # a fixture for every test here, too


def begin(*words, launcher=()):
    """The real command in the background; returns when it has trained a step."""
    out = next(word for word in words if word.startswith("--out=")).removeprefix("--out=")
    process = subprocess.Popen([sys.executable, *launcher, "train.py", *SMALL, *words], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while not (Path(out) / "metrics.jsonl").exists() or '"step"' not in (Path(out) / "metrics.jsonl").read_text():
        assert process.poll() is None and time.time() < deadline, process.stdout.read()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_polite_stop(tmp_path, number):
    """A signal ends the run after its step: saved, exit code 0, the command to go on; and it goes on, bit for bit."""
    words = ("--steps=60", "--log_every=1", "--save_every=1000", f"--out={tmp_path / 'run'}")
    process = begin(*words)
    process.send_signal(number)
    asked = time.time()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "To go on: the same command" in output and "Traceback" not in output, output
    assert time.time() - asked < 30
    stopped, = train.checkpoints(tmp_path / "run")
    assert 0 < stopped < 60
    execute(*SMALL, *words)
    execute(*SMALL, *words[:3], f"--out={tmp_path / 'whole'}")      # bits are equal at an equal number of threads
    for a, b in zip(last_pair(tmp_path / "run"), last_pair(tmp_path / "whole")):
        assert_equal(a, b)


def test_polite_stop_on_two_ranks_with_workers(tmp_path):
    """One rank gets the signal, with its data workers; all save the same step, and nothing is left running."""
    data = make_tree(tmp_path / "images")
    words = (f"--data={data}", "--workers=1", "--batch=4", "--teacher=none", "--repa_sit=0", "--repa_vae=0",
             "--steps=3000", "--log_every=1", "--save_every=1000", f"--out={tmp_path / 'run'}")
    process = begin(*words, launcher=torchrun(2))
    ranks = children(process.pid)
    family = [pid for rank in ranks for pid in children(rank)]
    assert len(ranks) == 2 and len(family) >= 2
    for pid in (ranks[1], *children(ranks[1])):         # as a scheduler does: to all processes of a machine
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and output.count("To go on: the same command") == 1, output
    assert len(train.checkpoints(tmp_path / "run")) == 1
    time.sleep(0.5)
    assert not [pid for pid in (*ranks, *family) if Path(f"/proc/{pid}/cmdline").exists()
                and b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def children(pid):
    """Process numbers of a process's children that run train.py."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_second_signal_ends_at_once(monkeypatch):
    """Within 3 s a second signal is the same one again (schedulers and launchers repeat it); later it is impatience."""
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


def test_full_disk(tmp_path):
    """A disk that takes no checkpoint: said each time, the last good one stays, training goes on, and it is tried
    again; where the last chance fails, the run ends in one line."""
    out = tmp_path / "run"
    execute(*SMALL, "--steps=3", f"--out={out}")
    good = {path.name: path.read_bytes() for path in out.glob("step_*.pt")}
    limit = (out / "step_0000003.pt").stat().st_size // 2           # the kernel refuses to let a file grow beyond this
    done = subprocess.run([sys.executable, "train.py", *SMALL, "--steps=9", f"--out={out}"], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.stdout.count("could not write the checkpoint of step 6") == 1, done.stdout + done.stderr
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert {path.name: path.read_bytes() for path in out.glob("step_*")} == good and not list(out.glob("*.tmp"))
    assert "step 0000009/0000009" in done.stdout                    # it went on to the end
    execute(*SMALL, "--steps=9", f"--out={out}")
    assert train.checkpoints(out)[-1] == 9


def test_no_room_is_refused_before_the_first_step(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: usage._replace(free=10**5))
    with pytest.raises(ValueError, match="no room for a checkpoint"):
        run(config(tmp_path / "run"))


def test_two_runs_in_one_folder(tmp_path):
    """The second is told who holds the folder; a lock whose process was killed is nobody's."""
    words = ("--steps=3000", "--log_every=1", f"--out={tmp_path / 'run'}")
    process = begin(*words)
    second = execute(*SMALL, *words, ok=False)
    line, = second.stderr.strip().splitlines()
    assert second.returncode == 2 and f"in use by process {process.pid} on" in line, second.stderr
    process.kill()
    process.communicate()
    execute(*SMALL, "--steps=2", "--save_every=1", f"--out={tmp_path / 'run'}")


def test_other_data_is_refused(tmp_path):
    """A resume on data that are no longer the same (a class more) is an error, not another experiment."""
    data = make_tree(tmp_path / "images")
    words = (f"--data={data}", "--workers=0", "--teacher=none", "--repa_sit=0", "--repa_vae=0", "--batch=2")
    run(config(tmp_path / "run", *words, "--steps=1"))
    (data / "cat/0.png").unlink()
    with pytest.raises(ValueError, match="is not what .*run was trained on"):
        run(config(tmp_path / "run", *words, "--steps=2"))


def test_warnings_of_collapse_and_discriminator(tmp_path, capfd):
    """Latents without variance, and a discriminator that always wins, are said in the log line."""
    cfg = parse(Config, [*SMALL, f"--out={tmp_path}"], PRESETS)
    log = train.Log(tmp_path, 0, torch.device("cpu"))

    def line(z_var, disc):
        terms = {"vae": 1.0, "l1": 1.0, "kl": 1.0, "disc": disc, "z_var": z_var, "norm_vae": 1.0, "norm_disc": 1.0}
        log.add(torch.tensor(True), {name: torch.tensor(value) for name, value in terms.items()})
        log.flush(1, cfg, torch.zeros(2))
        return capfd.readouterr().out
    assert "WARNING" not in line(1.0, 0.8)
    assert "latents collapse" in line(0.001, 0.8) and "discriminator" in line(1.0, 0.001)
    assert "discriminator" in line(1.0, 7.0)


def test_a_log_is_enough_to_run_it_again(tmp_path):
    """Its first line holds settings, versions, threads, git revision and the data's fingerprint; the same command twice
    gives the same bits."""
    pairs = []
    for name in "ab":
        execute(*SMALL, "--steps=3", f"--out={tmp_path / name}")
        pairs.append(last_pair(tmp_path / name))
    for a, b in zip(*pairs):
        assert_equal(a, b)
    first = json.loads((tmp_path / "a/metrics.jsonl").read_text().splitlines()[0])
    assert {"config", "versions", "git", "data", "threads", "world", "images"} <= first.keys()
    assert first["data"] == pairs[0][0]["data"] and first["config"]["seed"] == 0


def test_second_signal_in_a_real_process(tmp_path):
    """Impatience, 3 s after the first signal, ends a run that is still saving; what it wrote is no checkpoint."""
    life = endurance.Life(tmp_path / "run", "--save_every=1000", "--steps=3000", slow=60)
    life.until(lambda: endurance.lines(tmp_path / "run"))
    life.process.send_signal(signal.SIGTERM)
    asked = time.time()
    life.until(life.writing)
    time.sleep(max(0.0, asked + 3.1 - time.time()))
    assert life.process.poll() is None
    life.process.send_signal(signal.SIGTERM)
    assert life.process.wait(10) == 1
    assert train.checkpoints(tmp_path / "run") == [] and life.gone() < 10


@pytest.mark.parametrize("where", ["images", "latents", "gradient"])
def test_nan_anywhere_skips_the_step(tmp_path, monkeypatch, where):
    """(And in a loss: test_train.) Weights, both BatchNorms' statistics, averages and optimizers stay, and the log
    counts it."""
    before = run(config(tmp_path / "run", "--steps=2", "--save_every=1", "--log_every=1", "--vae_ema=0.9"))
    poison, to_float, sample, parallel = iter([float("nan")]), train.to_float, V.VAE.sample, train.parallel
    if where == "images":
        monkeypatch.setattr(train, "to_float", lambda x: to_float(x) * next(poison, 1.0))
    elif where == "latents":
        monkeypatch.setattr(V.VAE, "sample", staticmethod(lambda *moments: sample(*moments) * next(poison, 1.0)))
    else:
        def poisoned(network, *args):
            if isinstance(network, train.SiT):
                network.blocks[0].attn.proj.bias.register_hook(lambda gradient: gradient * next(poison, 1.0))
            return parallel(network, *args)
        monkeypatch.setattr(train, "parallel", poisoned)
    after = run(config(tmp_path / "run", "--steps=3", "--save_every=1", "--log_every=1", "--vae_ema=0.9"))
    assert next(poison, None) is None                   # it was there
    assert_equal(before[0], after[0], skip=("config", "steps", *UNREAD))
    assert_equal(before[1], after[1], skip=("steps", "skipped"))
    assert after[1]["skipped"].tolist() == [1, 1]
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["skipped"] == 1


def test_nan_on_one_rank_skips_the_step_on_both(tmp_path):
    """One of two ranks has a NaN in its second step: no rank takes it, and they stay replicas."""
    script = tmp_path / "poisoned.py"
    script.write_text("import os, train\n"
                      "calls, real = [], train.reconstruction_loss\n"
                      "def loss(*args):\n"
                      "    calls.append(1)\n"
                      "    return real(*args) * (float('nan') if (os.environ['RANK'], len(calls)) == ('1', 2) else 1)\n"
                      "train.reconstruction_loss = loss\n"
                      "train.main()\n")
    done = subprocess.run([sys.executable, *torchrun(2), str(script), *SMALL, "--steps=3", "--save_every=1", "--keep=9",
                           f"--out={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    first, second, third = ([torch.load(tmp_path / f"run/step_000000{n}{half}.pt", weights_only=True)
                             for half in ("", ".resume")] for n in (1, 2, 3))
    assert_equal(first[0], second[0], skip=("config", "steps", *UNREAD))
    assert_equal(first[1], second[1], skip=("steps", "skipped"))
    assert second[1]["skipped"].tolist() == [1, 1] and third[1]["skipped"].tolist() == [1, 0]


def test_resuming_names_what_has_changed(tmp_path, capsys):
    """Other data, architecture, batch or seed: refused, with the differences; other changes are listed."""
    cfg = config(tmp_path / "run", "--steps=1")
    run(cfg)
    for key, value in (("data", "images"), ("sit", "3-32-2/2"), ("resolution", 64), ("batch", 4), ("seed", 1),
                       ("train_vae", False), ("latent_norm", "fixed"), ("hflip", True)):
        with pytest.raises(ValueError) as caught:
            train.load_pair(replace(cfg, **{key: value}), 0)
        assert f"{key} was {getattr(cfg, key)!r}, is {value!r}" in str(caught.value) and "\n" not in str(caught.value)
    train.load_pair(replace(cfg, lr_sit=0.5, steps=9), 0)
    assert "changed: steps 1 -> 9, lr_sit 0.002 -> 0.5\n" in capsys.readouterr().out


def test_half_a_pair_is_cleaned_up(tmp_path):
    """Killed between the removal of an old pair's two files, a run leaves one half; the next save removes it."""
    run(config(tmp_path / "run", "--steps=2", "--save_every=1"))
    (tmp_path / "run/step_0000001.pt").unlink()
    assert train.checkpoints(tmp_path / "run") == [2]
    run(config(tmp_path / "run", "--steps=3", "--save_every=1"))
    assert sorted(path.name for path in (tmp_path / "run").glob("step_*")) == [
        "step_0000002.pt", "step_0000002.resume.pt", "step_0000003.pt", "step_0000003.resume.pt"]


def test_read_only_folder(tmp_path):
    """A run's folder that has become read-only is refused before the first step, with the last checkpoint untouched."""
    out = tmp_path / "run"
    execute(*SMALL, "--steps=1", f"--out={out}")
    lines = (out / "metrics.jsonl").read_text()
    out.chmod(0o555)
    # root may write everywhere, but for the capability (1) that this takes away (24: PR_CAPBSET_DROP)
    done = subprocess.run([sys.executable, "train.py", *SMALL, "--steps=2", f"--out={out}"], cwd=ROOT, text=True,
                          capture_output=True, preexec_fn=lambda: ctypes.CDLL(None).prctl(24, 1, 0, 0, 0))
    out.chmod(0o755)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"cannot write to --out={out} (Permission denied): name another folder" in done.stderr
    assert train.checkpoints(out) == [1] and (out / "metrics.jsonl").read_text() == lines


def test_deterministic_option(tmp_path):
    """--deterministic asks PyTorch for algorithms that give the same bits (on a CPU they do anyway)."""
    code = ("import os, sys, torch, train\n"
            "train.run = lambda *args: print('asked:', torch.are_deterministic_algorithms_enabled(), "
            "os.environ.get('CUBLAS_WORKSPACE_CONFIG'))\n"
            "train.main()")
    for value, expected in (("1", "asked: True :4096:8"), ("0", "asked: False None")):
        done = subprocess.run([sys.executable, "-c", code, *SMALL, f"--deterministic={value}", f"--out={tmp_path}"],
                              cwd=ROOT, capture_output=True, text=True)
        assert expected in done.stdout, done.stdout + done.stderr
    execute(*SMALL, "--steps=1", "--deterministic=1", f"--out={tmp_path / 'run'}")     # no algorithm is missing
    assert train.checkpoints(tmp_path / "run") == [1]
