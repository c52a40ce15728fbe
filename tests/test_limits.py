"""The code stays short and plain: limits on the six files.

    python -m pytest tests/test_limits.py
"""
import ast
import io
import tokenize
from pathlib import Path

LINES, TOKENS = 3_260, 36_200       # to be lowered: what is planned must end at 2,900 and 33,000
FILES = ("vae", "sit", "repa", "sample", "evaluate", "train")
EMPTY = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
         tokenize.ENDMARKER}


def tokens_of(source):
    """{line: tokens that start there}, without comments and docstrings; and the functions."""
    tree, docstrings, count = ast.parse(source), set(), {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                docstrings.add(node.body[0].lineno)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in EMPTY and token.start[0] not in docstrings:
            count[token.start[0]] = count.get(token.start[0], 0) + 1
    return count, [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_what_counts():
    """Comments, docstrings and empty lines don't; of a text over several lines the first does."""
    source = ('def f(x):\n    """Two\n    lines."""\n    # a comment\n\n    y = (x +\n'
              '         1)     # two\n    text = """a\n\n    b"""\n    return y, text\n')
    count, (function,) = tokens_of(source)
    assert count == {1: 6, 6: 5, 7: 2, 8: 3, 11: 4} and function.name == "f"


def test_limits():
    """Lines of code, tokens a line, columns, length of functions; the method stands early."""
    lines = total = 0
    for name in FILES:
        source = (Path(__file__).parent.parent / f"{name}.py").read_text()
        count, functions = tokens_of(source)
        lines, total = lines + len(count), total + sum(count.values())
        assert not [n for n, k in count.items() if k > 35], name
        assert all(len(line) <= 100 for line in source.splitlines()), name
        for function in functions:
            span = range(function.lineno, function.end_lineno + 1)
            assert sum(n in count for n in span) <= 60, f"{name}.{function.name}"
        starts = {function.name: function.lineno for function in functions}
        assert name != "train" or starts["vae_loss"] < 220 and starts["train_step"] < 300
    assert lines <= LINES and total <= TOKENS and total / lines <= 11.5, (lines, total)
