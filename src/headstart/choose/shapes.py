"""What a prediction needs to know about a model: its matrices, how many numbers it holds, what a forward pass keeps.

Shapes are m out and n in, as everywhere. Nothing here imports torch: an `Outline` is read from a config.json
(`families.py`) or traced from a model without values (`trace.py`), and everything after sees no difference.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches

from headstart.errors import NoTarget

SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Matrix:
    """One weight (m, n), or a stack of them that one parameter holds.

    Attributes:
        name: of the module, or of the parameter where it is a bare one.
        count: of the stack; used: the share of tokens that pass through each of them.
        shares: the first matrix that multiplies the very same rows, by name.
        keeps: whether the forward pass keeps these rows anyway, so that a branch beside the weight costs none.
        linear: whether "all-linear" means it; convolution: whether it is one's kernel.
        calls: how often a pass goes through it, in passes over all tokens.
    """

    name: str
    m: int
    n: int
    shares: str
    count: int = 1
    used: float = 1.0
    keeps: bool = False
    linear: bool = True
    calls: float = 1.0
    convolution: bool = False

    @property
    def size(self) -> int:
        return self.m * self.n * self.count


@dataclass(frozen=True)
class Kept:
    """Numbers that a forward pass keeps for the backward pass, but what a LoRA branch adds.

    Attributes:
        compute: for each token, in the dtype of the weights; wide: in float32 whatever that is; raised: in float32
            too, but only beside weights of another dtype.
        pairs, wide_pairs, raised_pairs: the same for each pair of tokens of a row.
        mask: for each pair of tokens, where rows are padded.
        bytes: counted as such, for each token (indices).
    """

    compute: float = 0.0
    wide: float = 0.0
    raised: float = 0.0
    pairs: float = 0.0
    wide_pairs: float = 0.0
    raised_pairs: float = 0.0
    mask: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Kept) -> Kept:
        return Kept(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: float) -> Kept:
        return Kept(*(times * value for value in vars(self).values()))

    def total(self, rows: int, length: int, size: int, padded: bool) -> float:
        """Bytes of a batch, with weights of `size` bytes a number."""
        raised = 4 if size < 4 else 0
        token = self.compute * size + self.wide * 4 + self.raised * raised + self.bytes
        pair = self.pairs * size + self.wide_pairs * 4 + self.raised_pairs * raised + self.mask * size * padded
        return rows * length * token + rows * length * length * pair


@dataclass(frozen=True)
class Outline:
    """A model as a prediction sees it.

    Attributes:
        kind: its model type; read: "config", "trace" or "modules", which says how it was found.
        parameters: numbers, shared ones once; extra_bytes: of those that are stored in another dtype.
        matrices: all that a token passes through, but the output embedding.
        depth, hidden: blocks, and the width of what passes between them.
        attention: Σ over blocks of the width of the queries, for the work of attention.
        vocabulary: rows of the output embedding; 0 without one.
        head: the output embedding's name, or a classifier's.
        longest: tokens that fit; 0 where unknown.
        working: numbers a token that the backward pass of one block holds at once, beside what was kept.
        causal: whether it writes text.
    """

    kind: str
    read: str
    parameters: int
    matrices: tuple[Matrix, ...]
    kept: Kept
    depth: int
    hidden: int
    attention: float
    vocabulary: int
    longest: int = 0
    working: float = 0.0
    causal: bool = True
    dtype: str = "float32"
    quantised: str | None = None
    names: tuple[str, ...] = field(default=(), repr=False)

    @property
    def convolutional(self) -> bool:
        """Whether most of its numbers are in convolutions."""
        return 2 * sum(x.size for x in self.matrices if x.convolution) > sum(x.size for x in self.matrices)

    def flops(self, length: int) -> float:
        """Of one forward pass, for each token of a row of `length` tokens."""
        products = sum(2.0 * matrix.size * matrix.used * matrix.calls for matrix in self.matrices)
        # Each token meets all others, or on average half of them: queries with keys, and weights with values.
        return products + 4.0 * self.attention * length * (0.5 if self.causal else 1.0) + self.head_flops

    @property
    def head_flops(self) -> float:
        return 2.0 * self.vocabulary * self.hidden

    def chosen(self, targets: str | Collection[str], exclude: str | Collection[str] | None = None) -> list[Matrix]:
        """The matrices that `target_modules` and `exclude_modules` ask for.

        Raises:
            NoTarget: with what is near.
        """
        if targets == "all-linear" or (not isinstance(targets, str) and list(targets) == ["all-linear"]):
            found = [matrix for matrix in self.matrices if matrix.linear]
        else:
            found = self._named("target_modules", targets)
        excluded = {matrix.name for matrix in self._named("exclude_modules", exclude)} if exclude else set()
        found = [matrix for matrix in found if matrix.name not in excluded]
        if not found:
            raise NoTarget(f"no matrix of this {self.kind} is left to adapt: widen target_modules")
        return found

    def _named(self, field_name: str, wanted: str | Collection[str]) -> list[Matrix]:
        entries = [wanted] if isinstance(wanted, str) else list(wanted)
        found: dict[str, Matrix] = {}
        for entry in entries:
            hits = [matrix for matrix in self.matrices if _matches(entry, matrix.name, isinstance(wanted, str))]
            if not hits:
                hint = self._near(entry, isinstance(wanted, str))
                raise NoTarget(f"{field_name} {entry!r} matches no matrix of this {self.kind}{hint}")
            found |= {matrix.name: matrix for matrix in hits}
        return [matrix for matrix in self.matrices if matrix.name in found]

    def _near(self, wanted: str, expression: bool) -> str:
        last = sorted({matrix.name.rsplit(".", 1)[-1] for matrix in self.matrices})
        if expression and wanted in last:
            return f": text is an expression for whole names, so pass [{wanted!r}]"
        close = get_close_matches(wanted, last, n=1)
        return f"; did you mean {close[0]!r}?" if close else f" (it has {', '.join(last)})"


def _matches(entry: str, name: str, expression: bool) -> bool:
    if expression:
        return re.fullmatch(entry, name) is not None
    return name == entry or name.endswith(f".{entry}")


def leaders(matrices: Iterable[Matrix]) -> dict[str, str]:
    """For every matrix, the first of these that multiplies the same rows."""
    first: dict[str, str] = {}
    return {matrix.name: first.setdefault(matrix.shares, matrix.name) for matrix in matrices}
