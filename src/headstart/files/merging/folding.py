"""What adapters change a stored parameter to, by ranges of its rows: all of it is never there at once.

    W′ = W + L·R                     low rank: rows [a, b) of a weight, L: (b − a, k), R: (k, columns)
    W′ = m/‖W + ΔW‖ ⊙ (W + ΔW)       DoRA: norms over a row, or over a column where the weight is stored (in, out)
    W′ = V                           a module that was trained in full
    W′ = W + Σ wᵢ·(Wᵢ′ − W)          several adapters
    W′ = W + Δ                       TIES and DARE, whose Δ looks at all of the weight

W is the parameter as it is stored, seen as rows of its last dimension (of all but the first, for convolutions).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from headstart import linalg
from headstart.linalg import blend
from headstart.lora.delta import difference
from headstart.lora.layers import Start
from headstart.lora.layouts import Experts, Layout, Parts

Rows = tuple[int, int]
Read = Callable[[int, int], Tensor]  # some rows of W


class Change(Protocol):
    """What becomes of a parameter."""

    def wanted(self, W: Tensor, rows: Rows) -> Tensor:
        """The new rows in float64, from the old ones."""

    def fold(self, W: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        """The same in a dtype, every element rounded once."""


class _Rounded:
    def wanted(self, W: Tensor, rows: Rows) -> Tensor:
        raise NotImplementedError

    def fold(self, W: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        return linalg.rounded(self.wanted(W, rows), dtype)


@dataclass(frozen=True)
class Piece:
    """A product that is added to some rows."""

    rows: Rows
    left: Tensor
    right: Tensor

    def cut(self, rows: Rows) -> Piece:
        """The part of it within other rows."""
        start, stop = max(rows[0], self.rows[0]), min(rows[1], self.rows[1])
        return Piece((start, stop), self.left[start - self.rows[0] : stop - self.rows[0]], self.right)


@dataclass(frozen=True)
class LowRank(_Rounded):
    """Products that are added to rows. No two pieces share a row."""

    pieces: Sequence[Piece]

    def wanted(self, W: Tensor, rows: Rows) -> Tensor:
        new = W.to(torch.float64, copy=True)
        for piece, part in self._within(new, rows):
            part.addmm_(piece.left.double(), piece.right.double())
        return new

    def fold(self, W: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        if dtype.itemsize < W.element_size() or (dtype != W.dtype and dtype.itemsize == 2):
            return super().fold(W, rows, dtype)
        if len(self.pieces) == 1 and (inside := self.pieces[0].cut(rows)).rows == rows:
            return linalg.add_lowrank(W.to(dtype), inside.left, inside.right, 1.0)
        new = W.to(dtype, copy=True)
        for piece, part in self._within(new, rows):
            part.copy_(linalg.add_lowrank(part, piece.left, piece.right, 1.0))
        return new

    def _within(self, new: Tensor, rows: Rows) -> Iterator[tuple[Piece, Tensor]]:
        for piece in self.pieces:
            if piece.rows[0] < rows[1] and rows[0] < piece.rows[1]:
                inside = piece.cut(rows)
                yield inside, new[inside.rows[0] - rows[0] : inside.rows[1] - rows[0]]


@dataclass(frozen=True)
class Dora(_Rounded):
    """A low-rank change, and the norms that the rows of the (out, in) matrix had learnt to have."""

    change: LowRank
    magnitude: Tensor
    norms: Tensor | None = field(default=None)

    def wanted(self, W: Tensor, rows: Rows) -> Tensor:
        summed = self.change.wanted(W, rows)
        norms = summed.norm(dim=1) if self.norms is None else self.norms
        magnitude = self.magnitude.double()
        magnitude = magnitude[rows[0] : rows[1]] if self.norms is None else magnitude
        # A zero row has no direction, and stays what it is.
        ratio = torch.where(norms == 0, torch.ones_like(norms), magnitude / norms)
        return summed * (ratio[:, None] if self.norms is None else ratio)


@dataclass(frozen=True)
class Replaced(_Rounded):
    """Other values."""

    values: Tensor

    def wanted(self, W: Tensor, rows: Rows) -> Tensor:
        return self.values[rows[0] : rows[1]].double()


@dataclass(frozen=True)
class Sum(_Rounded):
    """What several adapters change, weighted."""

    terms: Sequence[tuple[float, Change]]

    def wanted(self, W: Tensor, rows: Rows) -> Tensor:
        old = W.double()
        return old + sum((weight * (term.wanted(W, rows) - old) for weight, term in self.terms), torch.zeros_like(old))


@dataclass(frozen=True)
class Added(_Rounded):
    """A dense change of the rows from `first` on."""

    delta: Tensor
    first: int = 0

    def wanted(self, W: Tensor, rows: Rows) -> Tensor:
        return W.double() + self.delta[rows[0] - self.first : rows[1] - self.first].double()


# ------------------------------------------------------------------ from an adapter


def change_of(start: Start, layout: Layout, ranges: Sequence[Rows], read: Read) -> Change:
    """What one adapter makes of a parameter.

    Args:
        ranges: of all its rows; read: what reads them, asked only where a norm goes over all of them.
    """
    change = LowRank(pieces_of(start, layout, (ranges[0][0], ranges[-1][1]) if ranges else (0, 0)))
    if start.magnitude is None:
        return change
    if not layout.transposed:
        return Dora(change, start.magnitude)
    squares = sum((change.wanted(read(*rows), rows) ** 2).sum(0) for rows in ranges)
    assert isinstance(squares, Tensor)
    return Dora(change, start.magnitude, squares.sqrt())


def pieces_of(start: Start, layout: Layout, within: Rows) -> list[Piece]:
    """The products that an adapter adds to some rows of the parameter, as it is stored."""
    A, B, anchor = start.A, start.B, start.anchor
    if isinstance(layout, Parts) and (layout.transposed or start.magnitude is not None):
        (A, B), anchor = layout.dense(A, B), anchor and layout.dense(*anchor)
        layout = Layout(transposed=layout.transposed)
    pairs = layout.unpack(A, B)
    anchors = [None] * len(pairs) if anchor is None else layout.unpack(*anchor)
    found, above = [], 0
    for i, (pair, other) in enumerate(zip(pairs, anchors, strict=True)):
        height = pair[0].shape[1] if layout.transposed else len(pair[1])
        rows = layout.ranges[i] if isinstance(layout, Parts) else (above, above + height)
        above += height
        if rows[0] < within[1] and within[0] < rows[1]:  # Of many experts, a tensor of the file is one.
            a, b = difference(pair, other)
            left, right = b.double() * start.scaling, a
            found.append(Piece(rows, right.T, left.T) if layout.transposed else Piece(rows, left, right))
    return found


def columns_of(layout: Layout, shape: Sequence[int]) -> int:
    """The width of the rows that `pieces_of` speaks of."""
    if isinstance(layout, Experts):
        return shape[-1]
    width = 1
    for size in shape[1:]:
        width *= size
    return width


# ------------------------------------------------------------------ several


@dataclass(frozen=True)
class Mixture:
    """How several adapters become one change.

    Attributes:
        method: one of `blend.METHODS`; rank: where svd cuts; density, seed: of TIES and DARE.
    """

    method: str = "linear"
    rank: int | None = None
    density: float = 0.5
    seed: int = 0

    def combined(
        self, name: str, terms: Sequence[tuple[float, Change]], ranges: Sequence[Rows], read: Read
    ) -> tuple[Change, float]:
        """One change, and the share of the energy that a rank cut off."""
        if self.method in blend.SPARSE:
            return Added(self._blended(name, terms, ranges, read), ranges[0][0] if ranges else 0), 0.0
        plain = [(weight, term) for weight, term in terms if isinstance(term, LowRank)]
        if len(plain) < len(terms):
            return (terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else Sum(terms)), 0.0
        pieces = joined(plain)
        if self.rank is None:
            return LowRank(pieces), 0.0
        return _truncated(pieces, self.rank)

    def _blended(self, name: str, terms: Sequence[tuple[float, Change]], ranges: Sequence[Rows], read: Read) -> Tensor:
        parts: list[list[Tensor]] = [[] for _ in terms]
        for rows in ranges:
            W = read(*rows)
            for found, (_, term) in zip(parts, terms, strict=True):
                found.append((term.wanted(W, rows) - W.double()).float())
        deltas = [torch.cat(found) if found else torch.empty(0) for found in parts]
        weights = [weight for weight, _ in terms]
        return blend.blend(deltas, weights, self.method, density=self.density, seed=self.seed, name=name)


def joined(terms: Sequence[tuple[float, LowRank]]) -> list[Piece]:
    """The pieces of several changes as one list, in which no two share a row."""
    every = [(weight, piece) for weight, term in terms for piece in term.pieces]
    cuts = sorted({edge for _, piece in every for edge in piece.rows})
    found = []
    for rows in itertools.pairwise(cuts):
        inside = [(w, p.cut(rows)) for w, p in every if p.rows[0] <= rows[0] and rows[1] <= p.rows[1]]
        if len(inside) == 1 and inside[0][0] == 1:
            found.append(inside[0][1])
        elif inside:
            left = torch.cat([weight * piece.left.double() for weight, piece in inside], dim=1)
            found.append(Piece(rows, left, torch.cat([piece.right.double() for _, piece in inside])))
    return found


def _truncated(pieces: Sequence[Piece], rank: int) -> tuple[LowRank, float]:
    found, worst = [], 0.0
    for piece in pieces:
        largest = min(len(piece.left), piece.right.shape[1])
        left, right, dropped = linalg.recompress(piece.left.double(), piece.right.double(), min(rank, largest))
        found.append(Piece(piece.rows, left, right))
        worst = max(worst, dropped)
    return LowRank(found), worst
