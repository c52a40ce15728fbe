"""A small sample of tests/fuzz.py: damaged files for every reader, each refused in one line or loaded as before.

    python -m pytest tests/test_fuzz.py
"""
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import fuzz  # noqa: E402


def test_damaged_files():
    """Three damages of each reader's files: no traceback, hang, crash, executed code, allocation or wrong load."""
    cases = range(3 * len(fuzz.READERS))
    results = fuzz.fuzz(cases, seed=1)
    assert fuzz.failures(results, 1) == []
    assert Counter(name for _, name, *_ in results) == dict.fromkeys(fuzz.READERS, 3)
    assert sum(outcome == "refused" for *_, outcome, _ in results) > len(cases) / 2


def test_what_was_once_loaded_wrongly_or_ended_in_a_traceback():
    """Optimizer states, statistics, references, cached hub files and claims of tensors, by seed and case."""
    cases = (13, 51, 57, 117, 139, 157, 172, 199, 214, 218, 259, 263, 299, 413, 433, 495, 504, 505, 620, 903)
    assert fuzz.failures(fuzz.fuzz(cases, seed=602), 602) == []
