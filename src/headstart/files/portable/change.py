"""One layer's change on its way into a file: ΔW = s·B·A, in factors of the rank and dtype that a reader wants.

    folded      s goes into B: exact where s is a power of two
    trimmed     directions that are zero in A or B go
    padded      zero directions come
    truncated   the best approximation of a smaller rank

Every step is measured against the change as it was read, in float64 and without the dense ΔW.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headstart import linalg
from headstart.errors import NotPortable
from headstart.files.adapter import plain_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
# What dropping directions may cost where nothing is to be lost: less than rounding the others to float32.
_NOTHING = 2.0**-25


@dataclass(frozen=True)
class Change:
    """What an adapter does to one layer.

    Attributes:
        path: the layer's name as PEFT writes it.
        A: (r, n), or (r, n, *k) for a convolution; B: (m, r), or (m, r, 1, …).
        scaling: s.
        embedding: whether the layer is a lookup. magnitude: DoRA's.
    """

    path: str
    A: Tensor
    B: Tensor
    scaling: float = 1.0
    embedding: bool = False
    magnitude: Tensor | None = None

    @property
    def name(self) -> str:
        """The layer's name in the unwrapped model."""
        return plain_name(self.path)

    @property
    def rank(self) -> int:
        return len(self.A)

    @property
    def is_matrix(self) -> bool:
        """Whether this is no convolution."""
        return self.A.ndim == 2

    def with_factors(self, A: Tensor, B: Tensor, scaling: float = 1.0) -> Change:
        """The same layer with a pair (r, n), (m, r), shaped as the layer's factors are."""
        A = A.reshape(len(A), *self.A.shape[1:])
        return replace(self, A=A, B=B.reshape(len(B), len(A), *self.B.shape[2:]), scaling=scaling)

    def product(self) -> tuple[Tensor, Tensor]:
        """A (r, n) and s·B (m, r) in float64."""
        return self.A.flatten(1).double(), self.B.flatten(1).double() * self.scaling


def trimmed(change: Change) -> Change:
    """Without the directions that are zero, of which one stays where there is no other."""
    A, B = change.A.flatten(1), change.B.flatten(1)
    alive = (A != 0).any(1) & (B != 0).any(0)
    if bool(alive.all()):
        return change
    alive[0] |= not bool(alive.any())
    return change.with_factors(A[alive], B[:, alive], change.scaling)


def padded(change: Change, rank: int) -> Change:
    """With zero directions up to a rank."""
    A, B, more = change.A.flatten(1), change.B.flatten(1), rank - change.rank
    A = torch.cat([A, A.new_zeros(more, A.shape[1])])
    return change.with_factors(A, torch.cat([B, B.new_zeros(len(B), more)], 1), change.scaling)


def stored(change: Change, rank: int, dtype: torch.dtype) -> Change:
    """The change with s = 1, of at most this rank and in this dtype, by the route that loses less.

    Raises:
        NotPortable: if a value is beyond the dtype.
    """
    if change.rank > rank:
        return _checked(_recompressed(change, rank, dtype))
    A, B = change.product()
    direct = change.with_factors(*_cast(A, B, dtype))
    # Factors that nearly cancel, as [B | −B₀]·[A ; A₀] do, lose more than their own rounding.
    if error_of(change, direct) > 2 * _ROUNDING[dtype]:
        again = _recompressed(change, min(change.rank, A.shape[1], len(B)), dtype)
        direct = min(direct, again, key=lambda new: error_of(change, new))
    return _checked(direct)


def exact_dtype(change: Change) -> torch.dtype:
    """The smallest dtype that holds the factors as they are, with s folded in."""
    own = torch.promote_types(change.A.dtype, change.B.dtype)
    if own in _ROUNDING and bool(torch.equal((folded := change.product()[1]).to(own).double(), folded)):
        return own
    return torch.float32


def shortest(change: Change) -> Change:
    """The change at its true rank; itself where it has that already."""
    change = trimmed(change)
    spectrum = _core(*change.product())
    tails = (spectrum**2).flip(0).cumsum(0).flip(0).sqrt()
    rank = max(1, int((tails > _NOTHING * float(tails[0])).sum()))
    return change if rank == change.rank else _recompressed(change, rank, torch.float32)


def error_of(old: Change, new: Change) -> float:
    """‖ΔW − ΔW′‖ / ‖ΔW‖, Frobenius."""
    (A, B), (A2, B2) = old.product(), new.product()
    size = _norm(A, B)
    if len(A) <= len(A2) and torch.equal(A2[: len(A)].to(old.A.dtype), old.A.flatten(1)):
        # The same directions: their differences are small numbers, and cancel nothing.
        wide = B2.new_zeros(B2.shape)
        wide[:, : len(A)] = B
        apart = _gram_norm(A2, B2 - wide)
    else:
        apart = _norm(torch.cat([A2, A]), torch.cat([B2, -B], 1))
    if size == 0:
        return 0.0 if apart == 0 else math.inf
    return apart / size


def size_of(change: Change) -> float:
    """‖ΔW‖, Frobenius."""
    return _norm(*change.product())


def _recompressed(change: Change, rank: int, dtype: torch.dtype) -> Change:
    A, B = change.product()
    B, A, _ = linalg.recompress(B, A, rank)
    return change.with_factors(*_cast(A, B, dtype))


def _cast(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dtype == torch.float16 and bool(A.any()) and bool(B.any()):
        # Its small numbers are coarse: by a power of two, which is exact, the factors meet in the middle.
        even = 2.0 ** round(0.5 * math.log2(float(B.abs().max()) / float(A.abs().max())))
        A, B = A * even, B / even
    return linalg.rounded(A, dtype), linalg.rounded(B, dtype)


def _checked(change: Change) -> Change:
    if not bool(change.A.isfinite().all() and change.B.isfinite().all()):
        raise NotPortable(f"{change.name!r} has values beyond {change.A.dtype}: choose dtype float32 or bfloat16")
    return change


def _core(A: Tensor, B: Tensor) -> Tensor:
    """The singular values of B·A."""
    RB, RA = torch.linalg.qr(B, "r").R, torch.linalg.qr(A.T, "r").R
    spectrum: Tensor = torch.linalg.svdvals(RB @ RA.T)
    return spectrum


def _norm(A: Tensor, B: Tensor) -> float:
    RB, RA = torch.linalg.qr(B, "r").R, torch.linalg.qr(A.T, "r").R
    return float((RB @ RA.T).norm())


def _gram_norm(A: Tensor, B: Tensor) -> float:
    return math.sqrt(max(0.0, float(((B.T @ B) * (A @ A.T)).sum())))
