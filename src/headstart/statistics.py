r"""Fixed-size running summaries of a layer's inputs and output gradients.

    Moments             Σ x·xᵀ, Σ x and the count                     x: (n,)
    InputSpectrum       V·S²·Vᵀ ≈ Σ x·xᵀ, of rank k, and Σ x          V: (n, k), where n × n is too big
    Squares             Σ δ²                                          δ: (m,)
    GradientSpectrum    U·S·Vᵀ ≈ G = Σ δ·xᵀ, of rank k                U: (m, k), V: (n, k)
    GradientSum         G itself                                      (m, n)

Each has a size known before the first row, takes rows in batches, and merges with another of its kind, so that the
processes of a distributed run may each see a part of the data. `NAMES` are the parameter names by which a strategy
asks for one, and what each stands for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.errors import MissingStatistic
from headstart.linalg import Spectrum, named_generator, recompress, thin_qr, topk_svd

if TYPE_CHECKING:
    from typing_extensions import Self

NAMES = {
    "inputs": "Moments or InputSpectrum of the layer's inputs",
    "preserved": "Moments of the layer's inputs on the data to preserve",
    "gradient": "GradientSpectrum or GradientSum of the weight",
    "output_gradients": "Moments of the gradient of the layer's outputs",
    "output_squares": "Squares of the gradient of the layer's outputs",
}
ROWS = 128  # of a second moment in one product: thin enough that little above the diagonal is computed
SPARE = 8  # columns beyond the rank with which a running spectrum looks for what it has not seen


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
class _Symmetric:
    """C as an operator. In float64: outlier features leave the 16th eigenvalue 4e-4 of the first, squared 1e-7."""

    moments: Moments | InputSpectrum
    centred: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.moments.features, self.moments.features

    dtype = torch.float64

    @property
    def device(self) -> torch.device:
        return self.moments.sum.device

    @property
    def floor(self) -> float:
        return torch.finfo(torch.float32).eps * self.moments.energy

    def matmul(self, Y: Tensor) -> Tensor:
        return self.moments.times(Y.double(), centred=self.centred)

    rmatmul = matmul


def _leading(moments: Moments | InputSpectrum, k: int, centred: bool) -> Spectrum:
    return topk_svd(_Symmetric(moments, centred), k, generator=named_generator(0, "leading", "inputs"))


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
    def mean(self) -> Float[Tensor, " m"]:
        """E[δ²], float64."""
        return self.sum / self.count


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
            self._merge(((D.t() @ X).mul_(weight),))
        else:
            self._merge((D.t(), X), weight)

    def add_dense(self, G: Float[Tensor, "m n"]) -> None:
        """Add a gradient that exists already."""
        self._merge((G.detach().float(),))

    def merge(self, other: GradientSpectrum) -> None:
        """Add another's sum."""
        self._merge((other.U * other.S, other.V.t()))
        self.count += other.count

    def _merge(self, more: tuple[Tensor, ...], weight: float = 1.0) -> None:
        """U·S·Vᵀ + weight·∏ more, at rank k."""
        k, (m, n) = len(self.S), self.shape
        fresh = not bool(self.S.any())
        width = min(k + SPARE, m, n)
        probe = torch.randn(n, width if fresh else width - k, generator=self.generator).to(self.V.device)
        basis = probe if fresh else torch.cat([self.V, probe], dim=1)
        known = self.U * self.S
        for _ in range(2 if fresh else 1):
            Q, _ = thin_qr(_times(more, basis * weight).addmm_(known, self.V.t() @ basis))
            rows = _times_left(Q.t() * weight, more).addmm_(Q.t() @ known, self.V.t())
            basis, R = thin_qr(rows.t())
        left, S, right = torch.linalg.svd(R.t())
        self.U, self.S, self.V = (Q @ left[:, :k]).contiguous(), S[:k], (basis @ right[:k].t()).contiguous()

    def split(self) -> None:
        """Remember what half of the data gave, at half the rank and half the precision, for `overlap`."""
        kept = max(1, len(self.S) // 2)
        self.first = (self.U * self.S)[:, :kept].bfloat16(), self.V[:, :kept].bfloat16()

    def overlap(self, rank: int) -> float | None:
        """How much of one half's top-r subspaces the other half's share, from 0 to 1: the noise of this gradient."""
        if self.first is None:
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


def of_rows(
    X: Float[Tensor, "T n"], D: Float[Tensor, "T m"], preserved: Float[Tensor, "P n"], generator: torch.Generator
) -> dict[str, Any]:
    """Every statistic of a layer whose inputs, and the gradients of whose outputs, are known as rows.

    Example:
        >>> known = of_rows(torch.eye(3), torch.eye(3), torch.eye(3), torch.Generator())
        >>> sorted(known) == sorted(NAMES), known["gradient"].dense().diagonal().tolist()
        (True, [0.333..., 0.333..., 0.333...])
    """
    known: dict[str, Any] = {"inputs": Moments.empty(X.shape[1]), "preserved": Moments.empty(X.shape[1])}
    known |= {"output_gradients": Moments.empty(D.shape[1]), "output_squares": Squares.empty(D.shape[1])}
    for name, rows in (("inputs", X), ("preserved", preserved), ("output_gradients", D), ("output_squares", D)):
        known[name].add(rows)
    known["gradient"] = GradientSum(D.t() @ X, generator, count=float(len(X)))
    known["gradient"].largest = known["gradient"].norm()
    return known


def _spans(features: int) -> list[tuple[int, int]]:
    return list(pairwise([*range(0, features, ROWS), features]))


def _times(factors: tuple[Tensor, ...], Y: Tensor) -> Tensor:
    for factor in reversed(factors):
        Y = factor @ Y
    return Y


def _times_left(Y: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    for factor in factors:
        Y = Y @ factor
    return Y


def _basis(columns: Tensor) -> Tensor:
    return thin_qr(columns)[0]


def _sides(halves: list[tuple[Tensor, Tensor, float]]) -> list[tuple[Tensor, Tensor]]:
    (B1, A1, _), (B2, A2, _) = halves
    return [(B1, B2), (A1.t(), A2.t())]
