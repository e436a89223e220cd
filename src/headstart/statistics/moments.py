r"""The inputs of a layer, and the gradients of its outputs, row by row.

Moments             Σ x·xᵀ, Σ x and the count                     x: (n,)
InputSpectrum       V·S²·Vᵀ ≈ Σ x·xᵀ, of rank k, and Σ x          V: (n, k), where n × n is too big
Squares             Σ δ²                                          δ: (m,)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.errors import MissingStatistic
from headstart.linalg import Spectrum, named_generator, topk_svd

if TYPE_CHECKING:
    from typing_extensions import Self

Metric = Callable[[Tensor], Tensor]

ROWS = 192  # of a second moment in one product: little above the diagonal, and from 1024 features on the fastest
UNPACKED = 1 << 23  # numbers of a second moment that may stand in float64 while its directions are sought


@dataclass
class Moments:
    """The second moment and the mean of rows.

    Attributes:
        lower: Σ x·xᵀ in blocks of rows, each up to its diagonal: a little more than half of (n, n). float32.
        sum: Σ x, (n,), float64.
        count: the rows that were added.

    Example:
        >>> moments = Moments.empty(2)
        >>> moments.add(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        >>> moments.dense().tolist()
        [[5.0, 6.0], [6.0, 8.0]]
    """

    lower: list[Tensor]
    sum: Float[Tensor, " n"]
    count: int = 0
    known: dict[tuple[int, bool], Spectrum] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def empty(cls, features: int, device: torch.device | str = "cpu") -> Self:
        blocks = [torch.zeros(stop - start, stop, device=device) for start, stop in _spans(features)]
        return cls(blocks, torch.zeros(features, dtype=torch.float64, device=device))

    @property
    def features(self) -> int:
        return len(self.sum)

    def add(self, X: Float[Tensor, "T n"]) -> None:
        """Count rows in. Half-precision rows are multiplied in float32: a bfloat16 sum has negative eigenvalues."""
        X = X.detach().float()
        for (start, stop), block in zip(_spans(self.features), self.lower, strict=True):
            block.addmm_(X[:, start:stop].t(), X[:, :stop])
        self.sum += X.sum(0)
        self.count += len(X)
        self.known.clear()

    def merge(self, other: Moments) -> None:
        """Count another's rows in."""
        for block, more in zip(self.lower, other.lower, strict=True):
            block += more
        self.sum += other.sum
        self.count += other.count
        self.known.clear()

    @property
    def mean(self) -> Float[Tensor, " n"]:
        """μ = E[x], float64."""
        return self.sum / self.count

    @property
    def energy(self) -> float:
        """E[‖x‖²]."""
        return float(self.diagonal().sum())

    def diagonal(self) -> Float[Tensor, " n"]:
        """E[x²], float64."""
        spans = _spans(self.features)
        own = [block[:, start:].diagonal() for (start, _), block in zip(spans, self.lower, strict=True)]
        return torch.cat(own).double() / self.count

    def dense(self, *, centred: bool = False) -> Float[Tensor, "n n"]:
        """C = E[x·xᵀ], or the covariance C − μ·μᵀ, in float64."""
        C = torch.empty(self.features, self.features, dtype=torch.float64, device=self.sum.device)
        for (start, stop), block in zip(_spans(self.features), self.lower, strict=True):
            C[start:stop, :stop] = block
            C[:start, start:stop] = block[:, :start].t()
        C /= self.count
        return C.addr_(self.mean, self.mean, alpha=-1) if centred else C

    def times(self, Y: Float[Tensor, "n k"], *, centred: bool = False) -> Float[Tensor, "n k"]:
        """C·Y, or the covariance times Y, in Y's dtype; C is not unpacked."""
        Z = torch.zeros_like(Y)
        for (start, stop), block in zip(_spans(self.features), self.lower, strict=True):
            block = block.to(Y.dtype)
            Z[start:stop] += block @ Y[:stop]
            Z[:start] += block[:, :start].t() @ Y[start:stop]
        Z /= self.count
        mean = self.mean.to(Y.dtype)
        return Z - torch.outer(mean, mean @ Y) if centred else Z

    def metric(self, *, centred: bool = False) -> Metric:
        """Y ↦ C·Y, or the covariance times Y, in float64 and many times: C is unpacked once, where it is small."""
        if self.features**2 > UNPACKED:
            return lambda Y: self.times(Y.double(), centred=centred)
        C = self.dense(centred=centred)
        return lambda Y: C @ Y.double()

    def leading(self, k: int, *, centred: bool = False) -> Spectrum:
        """The k leading eigenvectors V of C, or of the covariance, and its eigenvalues S.

        They are found once: layers that share their inputs ask for the same.
        """
        if (k, centred) not in self.known:
            self.known[k, centred] = _leading(self, k, centred)
        return self.known[k, centred]


@dataclass
class InputSpectrum:
    """The k leading directions of rows, where their second moment is too big to keep.

    Attributes:
        V: (n, k), orthonormal; S: (k,), so that Σ x·xᵀ ≈ V·S²·Vᵀ.
        sum: Σ x, (n,); squares: Σ‖x‖²; count: the rows that were added.
    """

    V: Float[Tensor, "n k"]
    S: Float[Tensor, " k"]
    sum: Float[Tensor, " n"]
    generator: torch.Generator
    squares: float = 0.0
    count: int = 0

    @classmethod
    def empty(cls, features: int, rank: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Self:
        k = min(rank, features)
        V, S = torch.zeros(features, k, device=device), torch.zeros(k, device=device)
        return cls(V, S, torch.zeros(features, dtype=torch.float64, device=device), generator)

    def add(self, X: Float[Tensor, "T n"]) -> None:
        """Count rows in."""
        X = X.detach().float()
        self.sum += X.sum(0)
        self.squares += float(torch.linalg.vector_norm(X)) ** 2
        self._stack(X)
        self.count += len(X)

    def merge(self, other: InputSpectrum) -> None:
        """Count another's rows in."""
        self._stack((other.V * other.S).t())
        self.sum += other.sum
        self.squares += other.squares
        self.count += other.count

    def _stack(self, X: Tensor) -> None:
        rows = torch.cat([(self.V * self.S).t(), X])
        k = len(self.S)
        found = topk_svd(rows, min(k, *rows.shape), generator=self.generator, niter=2)
        self.S = torch.nn.functional.pad(found.S.float(), (0, k - len(found.S)))
        self.V = torch.nn.functional.pad(found.V, (0, k - len(found.S)))

    @property
    def features(self) -> int:
        return len(self.sum)

    @property
    def mean(self) -> Float[Tensor, " n"]:
        return self.sum / self.count

    @property
    def energy(self) -> float:
        """E[‖x‖²]."""
        return self.squares / self.count

    def times(self, Y: Float[Tensor, "n k"], *, centred: bool = False) -> Float[Tensor, "n k"]:
        """C·Y, or the covariance times Y."""
        V = self.V.to(Y.dtype)
        Z = V @ ((self.S.to(Y.dtype) ** 2 / self.count)[:, None] * (V.t() @ Y))
        mean = self.mean.to(Y.dtype)
        return Z - torch.outer(mean, mean @ Y) if centred else Z

    def metric(self, *, centred: bool = False) -> Metric:
        """Y ↦ C·Y, or the covariance times Y, in float64."""
        return lambda Y: self.times(Y.double(), centred=centred)

    def leading(self, k: int, *, centred: bool = False) -> Spectrum:
        """The k leading eigenvectors V of C, or of the covariance, and its eigenvalues S."""
        return _leading(self, k, centred)

    def dense(self, *, centred: bool = False) -> Tensor:
        raise MissingStatistic(
            f"only the leading directions of these {self.features} inputs were kept: calibrate with "
            "exact_inputs=True, or with a larger memory limit"
        )

    diagonal = dense


@dataclass
class Squares:
    """The mean square of every feature of rows: sum = Σ δ², (m,), float64."""

    sum: Float[Tensor, " m"]
    count: int = 0

    @classmethod
    def empty(cls, features: int, device: torch.device | str = "cpu") -> Self:
        return cls(torch.zeros(features, dtype=torch.float64, device=device))

    def add(self, D: Float[Tensor, "T m"]) -> None:
        """Count rows in."""
        self.sum += torch.linalg.vector_norm(D.detach().float(), dim=0).double() ** 2
        self.count += len(D)

    def merge(self, other: Squares) -> None:
        self.sum += other.sum
        self.count += other.count

    @property
    def features(self) -> int:
        return len(self.sum)

    @property
    def mean(self) -> Float[Tensor, " m"]:
        """E[δ²], float64."""
        return self.sum / self.count


@dataclass
class _Symmetric:
    """C as an operator. In float64: outlier features leave the 16th eigenvalue 4e-4 of the first, squared 1e-7."""

    moments: Moments | InputSpectrum
    matmul: Metric
    dtype = torch.float64

    @property
    def shape(self) -> tuple[int, int]:
        return self.moments.features, self.moments.features

    @property
    def device(self) -> torch.device:
        return self.moments.sum.device

    @property
    def floor(self) -> float:
        return torch.finfo(torch.float32).eps * self.moments.energy

    @property
    def rmatmul(self) -> Metric:
        return self.matmul


def _leading(moments: Moments | InputSpectrum, k: int, centred: bool) -> Spectrum:
    C = _Symmetric(moments, moments.metric(centred=centred))
    return topk_svd(C, k, generator=named_generator(0, "leading", "inputs"))


def _spans(features: int) -> list[tuple[int, int]]:
    return list(pairwise([*range(0, features, ROWS), features]))
