"""A small sample of tests/endurance.py, which holds the long runs.

    python -m pytest tests/test_endurance.py
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import endurance  # noqa: E402


def test_killed_runs_end_with_the_same_bits(tmp_path):
    """Twenty kills, some in a checkpoint's write, some between the two renames of a save: every
    file whole, never a step back, resumed from state.prev.pt where state.pt is not there, an
    equal end."""
    table = endurance.kill(tmp_path, count=20, steps=9)
    assert not table.wrong
    assert table["kills"] == 20 and table["finished runs"] >= 1
    assert table["of them inside the write of a checkpoint"] >= 1
    assert table["of them between the renames of a save"] >= 1
    assert table["of them from state.prev.pt"] >= 1


def test_the_number_of_ranks_may_change_between_resumes(tmp_path):
    """1 -> 2 -> 1 ranks see the images of one rank in its order, with its losses."""
    assert not endurance.worlds(tmp_path).wrong


def test_a_dead_rank(tmp_path):
    """SIGKILL for one of two ranks: the other ends soon, torchrun names the dead one, its restart
    ends as if whole."""
    table = endurance.deadrank(tmp_path, steps=12)
    assert not table.wrong
    assert table["ended at step"] == 12 and table["tensors and settings compared"] > 900


def test_no_leaks_in_a_short_run(tmp_path):
    """Open files and workers stay as many; nothing is left after the end or a kill. (Memory:
    endurance.py soak.)"""
    table = endurance.soak(tmp_path, steps=80)
    assert not table.wrong
    files = table["files always open, in each quarter"]
    assert table["workers"] == [2] and len({*files[1:]}) == 1
