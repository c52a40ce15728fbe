"""tests/gpu.py on a CPU: every phase but the authors' step runs, in small shapes.

    python -m pytest tests/test_gpu.py
"""
import json
import os
import subprocess
import sys

from test_train import ROOT, quick_teacher

assert quick_teacher        # its teacher of three steps is found by the script's runs, too


def execute(*words):
    """The script in a new process on one thread, without a GPU."""
    return subprocess.run(
        [sys.executable, "tests/gpu.py", *words], cwd=ROOT, capture_output=True, text=True,
        timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def test_all_phases_on_a_cpu(tmp_path):
    """Float32 gradients agree, a resumed run goes on exactly, and each phase reports something."""
    done = execute("--small", f"--out={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    phases = json.loads((tmp_path / "gpu.json").read_text())["phases"]
    assert list(phases) == ["gradients", "step", "frozen", "sampling", "runs", "micro", "ddp"]
    assert all(phase["state"] == "done" and phase["values"] for phase in phases.values())
    for name, phase in phases.items():
        for what in phase["values"]:
            assert what in done.stdout.split("CPU, torch")[-1], name

    def value(phase, what):
        return phases[phase]["values"][what][0]
    for kind in ("float32 eager", "float32 compiled"):
        assert value("gradients", f"{kind}, all") < 1e-4
        assert value("gradients", f"{kind}, worst tensor") < 1e-3
    assert value("gradients", "float32, compiled farther than eager") == 0
    assert 0.001 < value("gradients", "bf16 compiled, all") < 0.5
    assert value("step", "graph breaks") == value("step", "graphs after the first call") == 0
    assert value("runs", "resumed, largest difference") == 0
    assert value("runs", "deterministic, weights that differ") == 0
    assert value("ddp", "graphs, alone") == value("ddp", "graphs, in DDP") > 0
    assert value("ddp", "gradients") < 1e-6 and value("ddp", "optimize_ddp") is False


def test_a_phase_that_fails_does_not_stop_the_next(tmp_path):
    """An empty folder is no checkout of the authors' code: exit code 1, and frozen still runs."""
    done = execute("peer", "frozen", "--small", f"--peer={tmp_path}", f"--out={tmp_path}")
    phases = json.loads((tmp_path / "gpu.json").read_text())["phases"]
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert phases["peer"]["state"] == "failed" and phases["frozen"]["state"] == "done"
    assert phases["frozen"]["values"]["speed"][0] > 0


def test_unknown_words_are_refused_in_one_line(tmp_path):
    for word in ("gradient", "--speed=1", "peer"):
        done = execute("step", word, "--small", f"--out={tmp_path}")
        assert done.returncode == 1 and word in done.stderr
        assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_no_phase_begins_after_the_limit(tmp_path):
    done = execute("--small", "--limit=0", f"--out={tmp_path}")
    assert done.returncode == 0 and done.stdout.count("no time for") == 7
    assert json.loads((tmp_path / "gpu.json").read_text())["phases"] == {}
