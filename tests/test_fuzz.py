"""A small sample of tests/fuzz.py: damaged files for every reader.

    python -m pytest tests/test_fuzz.py
"""
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import fuzz  # noqa: E402


def test_damaged_files():
    """Three damages of each reader's files: no traceback, hang, crash, executed code, allocation
    or wrong load."""
    cases = range(3 * len(fuzz.READERS))
    results = fuzz.fuzz(cases, seed=1)
    assert fuzz.failures(results, 1) == []
    assert Counter(name for _, name, *_ in results) == dict.fromkeys(fuzz.READERS, 3)
    assert sum(outcome == "refused" for *_, outcome, _ in results) > len(cases) / 2


def test_what_was_once_loaded_wrongly_or_ended_in_a_traceback():
    """Optimizer states, statistics, references, cached hub files and claims of tensors, by seed
    and case."""
    cases = (13, 17, 40, 44, 57, 61, 66, 67, 85, 99, 105, 128, 145, 151, 187, 188, 277, 296, 340,
             438, 450, 473)
    assert fuzz.failures(fuzz.fuzz(cases, seed=602), 602) == []


def test_a_damaged_state_beside_a_whole_one():
    """Nothing of a state.pt with damaged bytes is used: the run goes on from state.prev.pt, to the
    same bits. Without that the damaged file is refused."""
    plans = {fuzz.plan(5, case)[:2]: case for case in range(21 * len(fuzz.READERS))}
    expected = {"resume, one before": "correct", "resume": "refused"}
    cases = [plans[name, how] for name in expected for how in ("truncated", "1000 bits", "empty")]
    results = fuzz.fuzz(cases, seed=5)
    for _, name, _, _, outcome, _ in results:
        assert outcome == expected[name], results
