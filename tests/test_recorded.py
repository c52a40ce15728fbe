"""Five steps of every method against the losses that were recorded when the random streams were last changed.

    python -m pytest tests/test_recorded.py
    python tests/test_recorded.py           # compares bits, which hold on one kind of CPU and version of torch
    python tests/test_recorded.py --write   # records anew: only where a change of the numbers is meant

Small shapes, one thread, float32. What differs in the first step is another computation; what differs in the fifth
alone may be rounding.
"""
import json
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import repa  # noqa: E402
import vae as V  # noqa: E402
from test_train import config, run  # noqa: E402

RECORDED = Path(__file__).with_name("recorded.json")
CASES = {
    "repa-e": ["--gan_start=0"],
    "repa-e, fixed statistics": ["--gan_start=0", "--latent_norm=fixed", "--vae_ema=0.9"],
    "repa-e, options": ["--gan_start=0", "--gan_adaptive=1", "--recon_loss=l2", "--hflip=1", "--micro_batch=4",
                        "--path=cosine", "--weighting=uniform"],
    "repa": ["--preset=tiny,repa"],
    "sit": ["--preset=tiny,sit"],
    "naive": ["--preset=tiny,naive", "--gan_start=0"],
    "vae": ["--method=vae", "--gan_start=2"],
    "f8d4": ["--vae=f8d4", "--resolution=64", "--sit=2-32-2/1", "--batch=2", "--gan_start=0"],
    "tiny": ["--sit=6-192-3/2", "--align_depth=3", "--projector_width=256", "--batch=32", "--gan_start=0"],
}
IGNORED = ("step", "ms", "data_ms", "skipped", "GiB")


@pytest.fixture(autouse=True, scope="module")
def untrained_teacher():
    """The tiny teacher as it is initialised: training would depend on the number of threads."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TORCH_HOME=folder):
        with mock.patch.object(repa, "train_tiny_teacher", lambda net, draw: 0.0):
            for resolution in (32, 64):
                repa.load_tiny_teacher(V.Shapes(resolution).draw)
        yield


def losses(name):
    """-> each logged term of the five steps, a list of dicts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run(config(folder, *CASES[name], "--steps=5", "--log_every=1", "--save_every=5"))
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()[1:]
    finally:
        torch.set_num_threads(threads)
    return [{key: value for key, value in json.loads(line).items() if key not in IGNORED} for line in lines]


@pytest.mark.parametrize("name", CASES)
def test_losses_are_the_recorded_ones(name):
    """Every logged term: the first step to 1e-6, the fifth to 1e-4, relative."""
    recorded, now = json.loads(RECORDED.read_text())[name], losses(name)
    assert len(now) == len(recorded) == 5
    for step, rel in ((0, 1e-6), (4, 1e-4)):
        assert now[step] == pytest.approx(recorded[step], rel=rel, abs=1e-9)


if __name__ == "__main__":
    with contextmanager(untrained_teacher.__wrapped__)():
        found = {name: losses(name) for name in CASES}
    if "--write" in sys.argv:
        RECORDED.write_text(json.dumps(found, indent=0) + "\n")
    else:
        recorded = json.loads(RECORDED.read_text())
        for name in CASES:
            print(f"{name}: {'equal' if recorded[name] == found[name] else 'DIFFERENT'}")
