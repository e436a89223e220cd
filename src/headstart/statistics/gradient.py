r"""The gradient of a weight, summed over micro-batches.

GradientSpectrum    U·S·Vᵀ ≈ G = Σ δ·xᵀ, of rank k                U: (m, k), V: (n, k)
GradientSum         G itself                                      (m, n)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.errors import MissingStatistic
from headstart.linalg import recompress, thin_qr, topk_svd

if TYPE_CHECKING:
    from typing_extensions import Self

SPARE = 8  # columns beyond the rank with which a running spectrum looks for what it has not seen


@dataclass
class GradientSpectrum:
    """The leading part of a weight's gradient G = Σ δ·xᵀ, merged micro-batch by micro-batch at rank k.

    Every merge multiplies the sum so far by the directions that it knows and a few random ones: one step of subspace
    iteration, which goes on from batch to batch. Measured on SmolLM2 with 12 micro-batches: 0.996 to 0.9999 of the
    exact top-r energy at k = 4r, as much as two power iterations for every micro-batch, at half their cost.

    Attributes:
        U: (m, k), S: (k,), V: (n, k); count: what G is divided by for its mean (tokens with a loss).
        first: U·S and V of the first half of the data, where `split` was called.
        largest: the largest singular value of any layer's mean gradient, where all of them are known.
    """

    U: Float[Tensor, "m k"]
    S: Float[Tensor, " k"]
    V: Float[Tensor, "n k"]
    generator: torch.Generator
    count: float = 0.0
    first: tuple[Tensor, Tensor] | None = None
    largest: float | None = None

    @classmethod
    def empty(cls, m: int, n: int, rank: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Self:
        k = min(rank, m, n)
        zeros = (torch.zeros(m, k, device=device), torch.zeros(k, device=device), torch.zeros(n, k, device=device))
        return cls(*zeros, generator)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.U), len(self.V)

    def add(self, D: Float[Tensor, "T m"], X: Float[Tensor, "T n"], weight: float = 1.0) -> None:
        """Add weight·Dᵀ·X, which is formed only where that is cheaper than multiplying by its two factors."""
        D, X = D.detach().float(), X.detach().float()
        (m, n), T = self.shape, len(D)
        if m * n * T < 2 * (T * (m + n) - m * n) * (len(self.S) + SPARE):
            self._merge(None, (D.t() @ X).mul_(weight))
        else:
            self._merge(D, X, weight)

    def add_dense(self, G: Float[Tensor, "m n"]) -> None:
        """Add a gradient that exists already."""
        self._merge(None, G.detach().float())

    def merge(self, other: GradientSpectrum) -> None:
        """Add another's sum."""
        self._merge((other.U * other.S).t(), other.V.t())
        self.count += other.count

    def _merge(self, D: Tensor | None, X: Tensor, weight: float = 1.0) -> None:
        """U·S·Vᵀ + weight·Dᵀ·X, or + X itself, at rank k."""
        k, (m, n) = len(self.S), self.shape
        fresh = not bool(self.S.any())
        width = min(k + SPARE, m, n)
        probe = torch.randn(n, width if fresh else width - k, generator=self.generator).to(self.V.device)
        basis = probe if fresh else torch.cat([self.V, probe], dim=1)
        known = (self.U * self.S).t()
        for _ in range(2 if fresh else 1):
            Q, _ = thin_qr(_columns(D, X, basis * weight).addmm_((self.V.t() @ basis).t(), known).t())
            basis, R = thin_qr(_rows(D, X, Q * weight).addmm_((known @ Q).t(), self.V.t()).t())
        left, S, right = torch.linalg.svd(R.t())
        self.U, self.S, self.V = (Q @ left[:, :k]).contiguous(), S[:k], (basis @ right[:k].t()).contiguous()

    def split(self) -> None:
        """Remember what half of the data gave, at half the rank and half the precision, for `overlap`."""
        self.first = self._half()

    def _half(self) -> tuple[Tensor, Tensor]:
        kept = max(1, len(self.S) // 2)
        return (self.U * self.S)[:, :kept].bfloat16(), self.V[:, :kept].bfloat16()

    def overlap(self, rank: int) -> float | None:
        """How much of one half's top-r subspaces the other half's share, from 0 to 1: the noise of this gradient.

        None where the layer was reached in one of the halves alone.
        """
        if self.first is None or not self.first[0].any() or torch.equal(self.first[0], self._half()[0]):
            return None
        first, V = (half.float() for half in self.first)
        rank = min(rank, first.shape[1], int((self.S / self.S[0].clamp_min(1e-30)).gt(1e-5).sum()))
        if rank == 0:
            return None
        whole = torch.cat([self.U * self.S, -first], dim=1), torch.cat([self.V, V], dim=1).t()
        halves = [recompress(B, A, rank) for B, A in ((first, V.t()), whole)]
        cosines = [torch.linalg.svdvals(_basis(one).t() @ _basis(other)) for one, other in _sides(halves)]
        return float(torch.cat(cosines).square().mean())

    def leading(self, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, k), S (k,), V (n, k) of the mean gradient. Directions beyond its rank have S = 0."""
        if k > len(self.S):
            raise MissingStatistic(f"the gradient was kept at rank {len(self.S)}, and {k} directions are asked of it")
        return self.U[:, :k], self.S[:k] / max(self.count, 1e-30), self.V[:, :k]

    def norm(self) -> float:
        """The largest singular value of the mean gradient."""
        return float(self.S[0]) / max(self.count, 1e-30)

    def dense(self) -> Float[Tensor, "m n"]:
        """The mean gradient, as far as it is known."""
        return (self.U * (self.S / max(self.count, 1e-30))) @ self.V.t()


@dataclass
class GradientSum:
    """A weight's gradient itself, for who has the memory.

    Attributes:
        total: G, (m, n), float32; count and largest: as in `GradientSpectrum`.
    """

    total: Float[Tensor, "m n"]
    generator: torch.Generator
    count: float = 0.0
    largest: float | None = None

    @classmethod
    def empty(cls, m: int, n: int, rank: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Self:
        return cls(torch.zeros(m, n, device=device), generator)

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.total.shape
        return m, n

    def add(self, D: Float[Tensor, "T m"], X: Float[Tensor, "T n"], weight: float = 1.0) -> None:
        self.total.addmm_(D.detach().float().t(), X.detach().float(), alpha=weight)

    def add_dense(self, G: Float[Tensor, "m n"]) -> None:
        self.total += G.detach()

    def merge(self, other: GradientSum) -> None:
        self.total += other.total
        self.count += other.count

    def split(self) -> None:
        """Nothing: half of the data is not kept apart."""

    def overlap(self, rank: int) -> float | None:
        return None

    def leading(self, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, k), S (k,), V (n, k) of the mean gradient."""
        found = topk_svd(self.total, k, generator=generator)
        return found.U, found.S / max(self.count, 1e-30), found.V

    def norm(self) -> float:
        """The largest singular value of the mean gradient."""
        return float(torch.linalg.matrix_norm(self.total, 2)) / max(self.count, 1e-30)

    def dense(self) -> Float[Tensor, "m n"]:
        """The mean gradient."""
        return self.total / max(self.count, 1e-30)


# Dᵀ·X between thin factors: the long sides stay in rows, as they lie in memory, and a QR takes the result as it is.


def _columns(D: Float[Tensor, "T m"] | None, X: Float[Tensor, "T n"], Y: Float[Tensor, "n k"]) -> Float[Tensor, "k m"]:
    """(Dᵀ·X·Y)ᵀ; without D, (X·Y)ᵀ."""
    return Y.t() @ X.t() if D is None else (X @ Y).t() @ D


def _rows(D: Float[Tensor, "T m"] | None, X: Float[Tensor, "T n"], Q: Float[Tensor, "m k"]) -> Float[Tensor, "k n"]:
    """Qᵀ·Dᵀ·X; without D, Qᵀ·X."""
    return (Q.t() if D is None else (D @ Q.contiguous()).t()) @ X


def _basis(columns: Tensor) -> Tensor:
    return thin_qr(columns)[0]


def _sides(halves: list[tuple[Tensor, Tensor, float]]) -> list[tuple[Tensor, Tensor]]:
    (B1, A1, _), (B2, A2, _) = halves
    return [(B1, B2), (A1.t(), A2.t())]
