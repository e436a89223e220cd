r"""Block Lanczos with full reorthogonalisation: the leading eigenvectors of N from products with it.

    Q·N = T·Q + couplingᵀ·(next block), in the last rows              Q: (K, d), T: (K, K), blocks: (b, d)
    T = Y·diag(θ)·Yᵀ                                                  Ritz values θ, vectors Yᵀ·Q
    rᵢ = ‖coupling · (last b entries of yᵢ)‖                          the residual of a Ritz pair, without a product

T is solved in float64. A Ritz value falls short of its eigenvalue by rᵢ²/(θᵢ − μ), where μ belongs to what is not
found yet; `growth` estimates θᵢ/(θᵢ − μ) from how much the sum of the θᵢ still grew while the residuals fell. Where
all of N's spectrum is narrow, as an orthogonal W's is, θᵢ − μ is at most its width, which the Ritz values span.

Musco, Musco (2015), "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value Decomposition",
arXiv 1504.05477: any block width reaches the accuracy, and narrow blocks need the fewest products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SAME = 1e-5  # Ritz values this close, relatively, are one.
KEPT = 0.1  # What the second orthogonalisation leaves at least of a unit column, or a third would be needed.


@dataclass(frozen=True)
class Candidate:
    """A subspace that may do.

    Attributes:
        rows: orthonormal, (k + b, d): the k leading Ritz vectors, and the newest block, which N was not applied to.
        following: the (k+1)-th Ritz value, or nothing.
        residuals: ‖x·N − θ·x‖ of the k Ritz vectors, which the newest block makes smaller.
        growth: what a squared residual is multiplied by to estimate the error of an eigenvalue.
        steps: products with N so far.
    """

    rows: Tensor
    following: Tensor
    residuals: Tensor
    growth: float
    steps: int


class Basis:
    """An orthonormal basis of the Krylov space, and N on it."""

    def __init__(self, start: Tensor, room: int) -> None:
        self.block = start
        self.Q = start.new_empty(room, start.shape[1])
        self.size = 0
        self.coupling = start
        self.kept = start.new_ones(())
        self.T = torch.zeros(0, 0, dtype=torch.float64)
        self._columns: list[Tensor] = []  # Of T, since it was last put together.

    def absorb(self, Z: Tensor) -> None:
        """One step, given Z = (current block)·N."""
        b = len(Z)
        if self.size + b > len(self.Q):
            self.Q = torch.cat([self.Q, torch.empty_like(self.Q)])
        self.Q[self.size : self.size + b] = self.block
        self.size += b
        known, near = self.Q[: self.size], self.Q[max(0, self.size - 2 * b) : self.size]
        # In exact arithmetic N couples a block to its two neighbours alone.
        H = near @ Z.t()
        columns, R = torch.linalg.qr(torch.addmm(Z, H.t(), near, alpha=-1).t())
        # Then against everything, on unit columns: one that was only rounding becomes a fresh direction.
        fix = known @ columns
        columns, again = torch.linalg.qr(torch.addmm(columns.t(), fix.t(), known, alpha=-1).t())
        self.kept = torch.minimum(self.kept, again.diagonal().abs().min())
        column = fix @ R
        column[-len(near) :] += H
        self._columns.append(column)
        self.coupling, self.block = again @ R, columns.t()

    def exhausted(self) -> bool:
        """Whether N has no more directions, and what was left of its products lay in the basis already."""
        return float(self.kept) < KEPT

    def ritz(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """All θ, largest first, the k leading Y, (K, k), and their residuals; on the CPU."""
        T, done = torch.zeros(self.size, self.size, dtype=torch.float64), len(self.T)
        T[:done, :done] = self.T
        for column in self._columns:
            T[: len(column), len(column) - column.shape[1] : len(column)] = column
        self.T, self._columns = T, []
        theta, Y = torch.linalg.eigh(T, UPLO="U")
        Y = Y[:, -k:].flip(1)
        coupling = self.coupling.to("cpu", torch.float64)
        return theta.flip(0), Y, torch.linalg.vector_norm(coupling @ Y[-len(coupling) :], dim=0)

    def candidate(self, Y: Tensor, following: Tensor, residuals: Tensor, growth: float) -> Candidate:
        X = Y.t().to(self.Q.device, self.Q.dtype) @ self.Q[: self.size]
        X = torch.addmm(X, X @ X.t(), X, beta=1.5, alpha=-0.5)  # Orthonormal to rounding.
        return Candidate(torch.cat([X, self.block]), following, residuals, growth, self.size // len(self.block))


class Progress:
    """How far the k leading Ritz values are, and when it is worth asking again."""

    def __init__(self, tolerance: float, floor: float, width: int) -> None:
        self.tolerance, self.floor, self.width = tolerance, floor, width
        self._grown, self.growth, self.slope, self.excess = 4.0, 4.0, 0.0, math.inf
        self._last = (width, 0.0, 1.0)  # One random block knows nothing.

    def observe(self, size: int, ritz: Tensor, residuals: Tensor) -> None:
        theta = ritz[: len(residuals)]
        head = theta.clamp_min(self.floor * theta[0])
        total = float(head.sum())
        share = float((residuals**2 / head).sum()) / total
        worst = float(((residuals / head) * (theta > self.floor * theta[0])).max()) ** 2
        before, held, missing = self._last
        if held and missing - share > 1e-5:  # Else rounding decides.
            self._grown = min(10.0, max(1.0, (total - held) / total / (missing - share)))
        self.growth = max(self._grown, _least_growth(ritz, len(theta)))
        self.slope = math.log(missing / share) / (size - before) if 0 < share < missing else 0.0
        self._last = (size, total, share)
        self.excess = self.growth * max(share / (self.tolerance / 100), worst / 2 / self.tolerance)

    def enough(self) -> bool:
        """Whether the tolerance is met once the newest block counts too, with a factor of two to spare."""
        return 2 * self.excess * math.exp(-self.slope * self.width) <= 1

    def next(self, size: int) -> int:
        """The size at which it may be enough. Convergence speeds up, so the last slope is too flat."""
        ahead = math.log(2 * self.excess) / (1.6 * self.slope) - self.width if self.slope > 0 else math.inf
        return size + max(self.width, int(min(ahead, 0.6 * size)))


def search(
    product: Callable[[Tensor], Tensor], start: Tensor, k: int, limit: int, tolerance: float
) -> Iterator[Candidate]:
    """Subspaces that seem to hold the k leading eigenvectors, each better than the one before; none past `limit`,
    nor where N has fewer directions than the basis.

    Args:
        product: X ↦ X·N for rows X.
        start: orthonormal rows, (b, d).
        limit: of the size of the basis.
        tolerance: of a singular value; the energy may miss a hundredth of it.
    """
    b = len(start)
    basis = Basis(start, min(limit, 5 * k + 8 * b) + b)
    progress = Progress(tolerance, 1e-6 if start.dtype == torch.float32 else 1e-12, b)
    check = min(limit, 2 * k + 5 * b)
    while basis.size < limit:
        basis.absorb(product(basis.block))
        if basis.size < check:
            continue
        if basis.exhausted():
            return
        theta, Y, residuals = basis.ritz(k)
        progress.observe(basis.size, theta, residuals)
        if progress.enough():
            if _hides_copies(theta, k, b):
                return
            yield basis.candidate(Y, theta[k : k + 1], residuals, progress.growth)
            check = basis.size + b
        else:
            check = min(limit, progress.next(basis.size))


def budgeted(product: Callable[[Tensor], Tensor], start: Tensor, k: int, steps: int) -> Candidate | None:
    """The subspace after a fixed number of products; None where N has fewer directions than that."""
    basis = Basis(start, steps * len(start))
    for _ in range(steps):
        basis.absorb(product(basis.block))
    if basis.exhausted():
        return None
    theta, Y, residuals = basis.ritz(k)
    growth = max(4.0, _least_growth(theta, k)) if basis.size >= 2 * k else 4.0  # Of few, the least is not N's.
    return basis.candidate(Y, theta[k : k + 1], residuals, growth)


def _least_growth(ritz: Tensor, k: int) -> float:
    """What θ_k/(θ_k − μ) is at least, by the width of the spectrum below θ_k as far as it is known."""
    last, width = max(0.0, float(ritz[k - 1])), float(ritz[k - 1] - ritz[-1])
    # The power is for the crowd at θ_k: of semicircles and uniform spectra, as of orthogonal weights in bfloat16.
    return 2 * math.pow(last / max(width, 1e-12 * float(ritz[0])), 1.5)


def _hides_copies(theta: Tensor, k: int, width: int) -> bool:
    """Whether a multiple eigenvalue fills the block, so that more copies of it may displace the smaller ones."""
    if k <= width:
        return False
    top = theta[: k - width]
    return bool(((top - theta[width - 1 : k - 1] <= SAME * top) & (top - theta[k - 1] > SAME * top)).any())
