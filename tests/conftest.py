"""The scripts are imported from the repository's root. With several workers (-n auto) each of them,
and each process that it starts, has one thread; else as many as OMP_NUM_THREADS says."""
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
if os.environ.get("OMP_NUM_THREADS", "").isdigit():
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# several workers take a file each: the long ones first, so that none is left alone with one
LONG = ("test_train", "test_readme", "test_endurance", "test_gpu", "test_cases", "test_fuzz")


def pytest_configure(config):
    config.option.loadscopereorder = False      # xdist's own order is by the number of tests


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))
