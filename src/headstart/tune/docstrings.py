"""Real text that every machine has: the functions of Python's own standard library and what they say they do.

A pair is the source of a function without its docstring, and the first sentence of that docstring. The files are read
with `ast` and never imported. What is held out is whole modules, so that nothing of a held-out file is trained on.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHORTEST, LONGEST = 40, 500
QUESTION = "{source}\n\n# In one sentence, what does this function do?\n#"
# Tests, and packages whose docstrings are dialogs, generated, or absent in some installations.
SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "site-packages", "dist-packages"}
SKIPPED |= {"ensurepip", "pydoc_data", "__pycache__", "config"}


@dataclass(frozen=True)
class Pair:
    """A function and what it does."""

    module: str
    name: str
    source: str
    sentence: str


@functools.cache
def pairs() -> tuple[Pair, ...]:
    """All of them, in one order on every machine with the same Python."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Pair] = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if not SKIPPED & set(parts) and not parts[-1].startswith("test_"):
            for pair in _pairs_of(path, ".".join(parts)):
                found.setdefault(pair.source, pair)
    return tuple(found.values())


def is_held_out(module: str, share: float = 0.1) -> bool:
    """Whether a module is kept for evaluation: decided by its name alone, so that it never changes sides."""
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _pairs_of(path: Path, module: str) -> Iterator[Pair]:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, UnicodeDecodeError, SyntaxError):  # bad_coding.py and its like are broken on purpose
        return
    lines = source.split("\n")  # As ast counts them: some modules have form feeds.
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            sentence = first_sentence(ast.get_docstring(node) or "")
            bare = _without_docstring(node, lines)
            if sentence and SHORTEST <= len(bare) <= LONGEST:
                yield Pair(module, node.name, bare, sentence)


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The text of the function as it stands in the file, dedented, comments and all."""
    docstring, end = node.body[0], node.end_lineno or node.lineno
    if docstring.lineno == node.lineno or len(node.body) == 1:  # one line, or nothing left to describe
        return ""
    kept = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno or docstring.lineno : end]
    return "\n".join(line[node.col_offset :].rstrip() for line in kept if line.strip())


def first_sentence(docstring: str) -> str:
    """Up to the first full stop that ends a sentence, or the first paragraph; one line of 15 to 200 characters."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph)[0]
    is_prose = sentence[:1].isupper() and " " in sentence and ">>>" not in sentence
    return sentence if is_prose and 15 <= len(sentence) <= 200 else ""
