r"""A weight between two metrics, known by its products.

    M = L·W·R                                                         L: (m, m), W: (m, n), R: (n, n), L and R symmetric

For the leading directions M is not formed: a product with it is one with each of the three, W in blocks. In float64,
because the spectrum of M falls as fast as those of the three together: on SmolLM2 the 16th singular value of W·C is
3e-4 of the first, whose square float32 no longer resolves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.errors import SVDError
from headstart.inits.blocks import times
from headstart.inits.split import certified
from headstart.linalg import topk_svd
from headstart.statistics import Metric

TOLERANCE = 1e-10  # of a singular value: the directions of this space are good to its root


def damped(metric: Metric, ridge: float) -> Metric:
    """X ↦ (C + ridge·I)·X."""
    return lambda X: metric(X).add_(X, alpha=ridge)


@dataclass(frozen=True)
class Weighted:
    """L·W·R as an operator, where L and R give their products."""

    weight: Tensor
    right: Metric
    left: Metric = lambda X: X
    dtype = torch.float64

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.weight.shape
        return m, n

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def matmul(self, X: Tensor) -> Tensor:
        return self.left(times(self.weight, self.right(X)))

    def rmatmul(self, Y: Tensor) -> Tensor:
        return self.right(times(self.weight.T, self.left(Y)))


def leading(weighted: Weighted, k: int, generator: torch.Generator) -> tuple[Float[Tensor, "m k"], dict[str, Any]]:
    """The k leading left singular vectors of M, and how they were found."""
    try:
        found = topk_svd(weighted, k, generator=generator, tolerance=TOLERANCE)
    except SVDError:
        # Some of the k are only the rounding of W, which no iteration resolves and no product depends on.
        M = weighted.matmul(torch.eye(weighted.shape[1], dtype=torch.float64, device=weighted.device))
        return torch.linalg.svd(M, full_matrices=False).U[:, :k], {"route": "float64 SVD"}
    return found.U, {**certified(found), "energy": None}


def trailing(M: Float[Tensor, "m n"], k: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
    """The k trailing left singular vectors of M, by the inverse of its triangular factor.

    W·C has conditions around 1e8, which a Gram matrix would square.
    """
    tall = M.shape[0] >= M.shape[1]
    Q, R = torch.linalg.qr(M if tall else M.T)
    pivots = R.diagonal()
    smallest = max(float(R.abs().max()) * torch.finfo(R.dtype).eps, torch.finfo(torch.float32).tiny)
    pivots[pivots.abs() < smallest] = smallest  # A null direction becomes an enormous one of the inverse.
    try:
        found = topk_svd(_Inverse(R), k, generator=generator, tolerance=TOLERANCE)
    except SVDError:  # Some of the k are null directions and some are not.
        return torch.linalg.svd(M, full_matrices=False).U[:, -k:], {"route": "float64 SVD"}
    return Q @ found.V if tall else found.U, {"route": f"inverse, {found.certificate.route}"}


@dataclass(frozen=True)
class _Inverse:
    """R⁻¹ as an operator."""

    R: Tensor
    dtype = torch.float64

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.R), len(self.R)

    @property
    def device(self) -> torch.device:
        return self.R.device

    def matmul(self, X: Tensor) -> Tensor:
        solved: Tensor = torch.linalg.solve_triangular(self.R, X, upper=True)
        return solved

    def rmatmul(self, Y: Tensor) -> Tensor:
        solved: Tensor = torch.linalg.solve_triangular(self.R.T, Y, upper=False)
        return solved
