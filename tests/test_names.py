"""The names that others may import: the table "Public names" of tests/README.md.

    python -m pytest tests/test_names.py
"""
import importlib
import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent / "README.md").read_text()
SECTION = README.partition("\n## Public names\n")[2].partition("\n## ")[0]
FIRST_CELLS = re.findall(r"^\| *(`[^|]*?) *\|", SECTION, re.M)
NAMES = [name for cell in FIRST_CELLS for name in re.findall(r"`([^`]*)`", cell)]


@pytest.mark.parametrize("name", NAMES)
def test_public_name(name):
    """A name that the table promises is there: a change that removes one is seen."""
    module, _, attribute = name.partition(".")
    assert hasattr(importlib.import_module(module), attribute), f"{name} is gone"


def test_table():
    """Each row is read (but the head and the line below it), no name stands there twice, and every
    file of the project has some: otherwise the test above could be empty."""
    rows = [line for line in SECTION.splitlines() if line.startswith("|")]
    assert len(FIRST_CELLS) == len(rows) - 2
    assert all(re.fullmatch(r"\w+\.\w+", name) for name in NAMES)
    assert len(set(NAMES)) == len(NAMES)
    modules = {name.partition(".")[0] for name in NAMES}
    assert modules == {"vae", "sit", "repa", "sample", "evaluate", "train"}
