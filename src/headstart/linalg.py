r"""The few decompositions that starts are made of, each with a statement of what was reached.

    W ≈ U·diag(S)·Vᵀ                                        U: (m, k), S: (k,), V: (n, k)
    N = W·Wᵀ or Wᵀ·W, whichever is smaller                  N: (d, d), d = min(m, n)

The leading triplets come from block Lanczos on N with full reorthogonalisation. N is never formed: one step is one
sweep over W in blocks, `Z += W_b·(W_bᵀ·X)`, each block cast once, so that the memory is the basis and one block.
The projected matrix is solved in float64. The last sweep gives the other side, and the residuals that are reported.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.errors import BadOption, BadRank, MetaWeight, NonFiniteWeight, SVDError

BLOCK = 1 << 20  # numbers of W that are cast at a time
SMALL = 128  # a side up to here is solved densely in float64
TINY = 2.0**-60  # products of W outside [TINY, 1/TINY] make it rescaled


class Operator(Protocol):
    """A matrix W that is known by its products alone."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def matmul(self, X: Tensor) -> Tensor:
        """W·X."""
        ...

    def rmatmul(self, Y: Tensor) -> Tensor:
        """Wᵀ·Y."""
        ...


@dataclass(frozen=True)
class Certificate:
    """What a decomposition reached.

    Attributes:
        residual: the largest ‖Wᵀuᵢ − sᵢvᵢ‖/sᵢ or ‖Wvᵢ − sᵢuᵢ‖/sᵢ over the triplets that are not zero.
        error: an estimate of the largest relative error of a singular value.
        energy: the share of ‖W‖² (Frobenius) that the triplets hold; None where W is known by products alone.
        energy_loss: an estimate of what they miss of the k best triplets' energy, as a share of it.
        gap: (s_k − s_{k+1})/s_k, or None where s_{k+1} is unknown or s_k is zero. A small gap means that the
            k-th direction is ill-determined by W itself.
        rank: how many of the k singular values are not zero at the precision of the input.
        route: how it was computed.
        passes: sweeps over W.
    """

    residual: float
    error: float
    energy: float | None
    energy_loss: float
    gap: float | None
    rank: int
    route: str
    passes: int


@dataclass(frozen=True)
class Spectrum:
    """k singular triplets, W ≈ U·diag(S)·Vᵀ, largest first. S[rank:] is zero; U and V are orthonormal always.

    float32, or float64 for a float64 W. S is float64 also where float32 cannot hold it (weights near 1e38 or 1e-40).
    """

    U: Float[Tensor, "m k"]
    S: Float[Tensor, " k"]
    V: Float[Tensor, "n k"]
    certificate: Certificate

    @property
    def T(self) -> Spectrum:
        """The triplets of Wᵀ."""
        return replace(self, U=self.V, V=self.U)


def named_generator(seed: int, strategy: str, name: str) -> torch.Generator:
    """Randomness that depends on what is drawn for, not on when or where.

    Example:
        >>> torch.rand(1, generator=named_generator(0, "pissa", "h.0"))
        tensor([0.8180])
    """
    digest = hashlib.sha256(f"{seed}\0{strategy}\0{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ------------------------------------------------------------------ the matrix, seen from its short side


class _Dense:
    """A weight as N = W·Wᵀ or Wᵀ·W of its short side, divided by a power of two where its squares need that."""

    def __init__(self, weight: Tensor) -> None:
        if weight.is_meta:
            raise MetaWeight(f"the singular values of a {tuple(weight.shape)} weight need its values: load it first")
        self.weight = weight
        self.exponent = 0
        self.wide = weight.shape[0] <= weight.shape[1]
        self.short, self.long = sorted(weight.shape)
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.device = weight.device

    @property
    def scale(self) -> float:
        """What the products see W divided by."""
        return 2.0**self.exponent

    def rescale(self) -> bool:
        """Bring max|W| to [1/2, 1). False for a zero weight."""
        low, high = (float(bound) for bound in torch.aminmax(self.weight))
        if not (math.isfinite(low) and math.isfinite(high)):
            count = int((~torch.isfinite(self.weight)).sum())
            raise NonFiniteWeight(
                f"a {tuple(self.weight.shape)} weight holds {count} NaN or infinite values: repair it"
            )
        largest = max(-low, high)
        self.exponent = 0 if TINY < largest < 1 / TINY else math.frexp(largest)[1]
        return largest > 0

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Slices along the long side, with W there as (short, c) if wide, else (c, short), in `dtype` and scaled."""
        W = self.weight
        if W.dtype == dtype and self.exponent == 0 and W.stride(1) == 1 and W.stride(0) >= W.shape[1]:
            yield slice(0, self.long), W
            return
        step = min(max(1, BLOCK // self.short), self.long)
        buffer = torch.empty(step * self.short, dtype=dtype, device=self.device)
        for start in range(0, self.long, step):
            part = slice(start, min(start + step, self.long))
            source = W[:, part] if self.wide else W[part]
            block = buffer[: source.numel()].view(source.shape).copy_(source)
            if self.exponent:  # In two factors: 2^140 alone is infinite in float32.
                half = -self.exponent // 2
                block.mul_(2.0**half).mul_(2.0 ** (-self.exponent - half))
            yield part, block

    def normal(self, X: Tensor, image: Tensor | None = None) -> Tensor:
        """X·N for rows X (b, short); fills `image` (b, long) with the rows of X on the other side."""
        Z, across = X.new_zeros(X.shape[::-1] if self.wide else X.shape), X.t().contiguous()
        for part, block in self.blocks(X.dtype):
            Y = X @ block if self.wide else (block @ across).t().contiguous()
            Z = Z.addmm_(block, Y.t().contiguous()) if self.wide else Z.addmm_(Y, block)
            if image is not None:
                image[:, part] = Y
        return Z.t() if self.wide else Z

    def gram(self, dtype: torch.dtype) -> Tensor:
        """N itself."""
        G = torch.zeros(self.short, self.short, dtype=dtype, device=self.device)
        for _, block in self.blocks(dtype):
            G = G.addmm_(block, block.t()) if self.wide else G.addmm_(block.t(), block)
        return G

    def energy(self) -> float:
        return sum(float(torch.linalg.vector_norm(block)) ** 2 for _, block in self.blocks(self.dtype))

    def dense(self) -> Tensor:
        """W in float64, scaled, its short side first."""
        W = torch.cat([block.clone() for _, block in self.blocks(torch.float64)], dim=int(self.wide))
        return W if self.wide else W.t()


class _Implicit:
    """The same view of a matrix that is known by its products."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        m, n = operator.shape
        self.wide = m <= n
        self.short, self.long = min(m, n), max(m, n)
        self.dtype = torch.float64 if operator.dtype == torch.float64 else torch.float32
        self.device = operator.device
        self.scale = 1.0

    def rescale(self) -> bool:
        probe = torch.randn(1, self.short, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)
        largest = float(self._across(probe).abs().max())
        if not math.isfinite(largest):
            raise NonFiniteWeight(f"a {tuple(self.operator.shape)} operator gives NaN or infinite products: repair it")
        self.scale = 2.0 ** math.frexp(largest)[1]
        return largest > 0

    def _across(self, X: Tensor) -> Tensor:
        X = X.to(self.dtype).t()
        return (self.operator.rmatmul(X) if self.wide else self.operator.matmul(X)).t() / self.scale

    def normal(self, X: Tensor, image: Tensor | None = None) -> Tensor:
        Y = self._across(X)
        if image is not None:
            image.copy_(Y)
        Z = (self.operator.matmul(Y.t()) if self.wide else self.operator.rmatmul(Y.t())).t() / self.scale
        return Z.to(X.dtype)

    def gram(self, dtype: torch.dtype) -> Tensor:
        W = self.dense().to(dtype)
        return W @ W.t()

    def energy(self) -> None:
        return None

    def dense(self) -> Tensor:
        return self._across(torch.eye(self.short, device=self.device)).double()


_Matrix = _Dense | _Implicit


# ------------------------------------------------------------------ leading triplets


def topk_svd(
    operator: Tensor | Operator,
    k: int,
    *,
    generator: torch.Generator,
    tolerance: float = 1e-4,
    niter: int | None = None,
) -> Spectrum:
    """The k leading singular triplets of W, with a certificate.

    Args:
        operator: a matrix of any float dtype, or anything with products (`Operator`).
        k: from 1 to min(m, n).
        generator: where the start block comes from (CPU). The global random state is neither read nor moved.
        tolerance: the relative error allowed in a singular value; the energy may miss a hundredth of it.
        niter: instead of a tolerance, the effort: at least the accuracy of `torch.svd_lowrank(q=k, niter=niter)`, for
            a fraction of its cost. The certificate tells what was reached.

    Raises:
        BadRank, BadOption: if k or niter make no sense for W.
        NonFiniteWeight, MetaWeight: if W has no usable values.
        SVDError: if no route reaches the tolerance.

    Example:
        >>> W = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
        >>> topk_svd(W, 2, generator=named_generator(0, "example", "W")).S
        tensor([3., 2.])
    """
    _check(operator.shape, k)
    if niter is not None and niter < 0:
        raise BadOption(f"niter is {niter}: choose 0 or more rounds, or None for a certificate")
    if isinstance(operator, Tensor) and operator.stride(0) < operator.stride(1):  # Its columns are contiguous.
        return topk_svd(operator.t(), k, generator=generator, tolerance=tolerance, niter=niter).T
    with torch.no_grad():
        matrix = _Dense(operator) if isinstance(operator, Tensor) else _Implicit(operator)
        if not matrix.rescale():
            return _zero(matrix, k, generator)
        start = _start(matrix, k, generator)
        for route in _routes(matrix, k):
            spectrum = route(matrix, k, start, tolerance, niter)
            if niter is not None or _holds(spectrum.certificate, tolerance):
                return spectrum
    raise SVDError(
        f"no route reached the tolerance {tolerance:g} for the {k} leading triplets of a "
        f"{tuple(operator.shape)} weight ({spectrum.certificate}): allow more, or choose a smaller k"
    )


Route = Callable[[_Matrix, int, Tensor, float, int | None], Spectrum]


def _check(shape: tuple[int, ...], k: int) -> None:
    if len(shape) != 2:
        raise BadOption(f"a weight of shape {tuple(shape)} is no matrix: reshape it to (out, in)")
    if not 1 <= k <= min(shape):
        raise BadRank(f"rank {k} does not fit a {tuple(shape)} weight: choose 1 to {min(shape)}")


def _routes(matrix: _Matrix, k: int) -> list[Route]:
    """From cheap to certain."""
    dense: list[Route] = [_gram_route, _svd_route]
    if matrix.short <= SMALL:
        return dense
    if matrix.short <= 2 * SMALL or 6 * k > matrix.short:
        return [_gram32_route, *dense] if matrix.dtype == torch.float32 else dense
    if matrix.dtype == torch.float64 or isinstance(matrix, _Implicit):
        return [_lanczos_route, *dense]
    return [_lanczos_route, _lanczos64_route, *dense]


def _holds(certificate: Certificate, tolerance: float) -> bool:
    return certificate.energy_loss <= tolerance / 100 and certificate.error <= tolerance


def _start(matrix: _Matrix, k: int, generator: torch.Generator) -> Tensor:
    """Orthonormal random rows, as many as one block of the iteration."""
    width = min(16 if k <= 24 or matrix.short <= 1024 else 32, max(1, matrix.short // 4))
    noise = torch.randn(matrix.short, width, generator=generator, dtype=torch.float64)
    start: Tensor = torch.linalg.qr(noise)[0]
    return start.t().to(matrix.dtype).to(matrix.device).contiguous()


class _Lanczos:
    """An orthonormal basis of the block Krylov space of N, and N on it.

    N·Qᵀ = Qᵀ·T + (new block)ᵀ·coupling                   Q: (K, d) in rows, T: (K, K)
    """

    def __init__(self, start: Tensor, room: int) -> None:
        self.block = start
        self.Q = start.new_empty(room, start.shape[1])
        self.T = torch.zeros(0, 0, dtype=torch.float64)
        self.rows: list[Tensor] = []  # Of T, since it was last put together.
        self.size = 0
        self.coupling = start

    def absorb(self, Z: Tensor) -> None:
        """One step, given Z = N applied to the current block."""
        b = len(Z)
        if self.size + b > len(self.Q):
            self.Q = torch.cat([self.Q, torch.empty_like(self.Q)])
        self.Q[self.size : self.size + b] = self.block
        self.size += b
        known, near = self.Q[: self.size], self.Q[max(0, self.size - 2 * b) : self.size]
        # In exact arithmetic N couples a block to its two neighbours alone.
        H = Z @ near.t()
        columns, R = torch.linalg.qr(torch.addmm(Z, H, near, alpha=-1).t())
        # Then against everything, on unit columns: one that was only rounding becomes a fresh direction.
        fix = columns.t() @ known.t()
        columns, again = torch.linalg.qr(torch.addmm(columns.t(), fix, known, alpha=-1).t())
        row = R.t() @ fix
        row[:, -len(near) :] += H
        self.rows.append(row)
        self.coupling, self.block = again @ R, columns.t()

    def ritz(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """All Ritz values, largest first; the k leading vectors (K, k) in the basis, and their residual norms."""
        T, start = torch.zeros(self.size, self.size, dtype=torch.float64), len(self.T)
        T[:start, :start] = self.T
        for row in self.rows:
            T[row.shape[1] - len(row) : row.shape[1], : row.shape[1]] = row
        self.T, self.rows = T, []
        theta, Y = torch.linalg.eigh(T, UPLO="L")
        theta, Y = theta.flip(0), Y[:, -k:].flip(1)
        coupling = self.coupling.to("cpu", torch.float64)
        return theta, Y, torch.linalg.vector_norm(coupling @ Y[-coupling.shape[1] :], dim=0)


def _lanczos_route(matrix: _Matrix, k: int, start: Tensor, tolerance: float, niter: int | None) -> Spectrum:
    d, b = matrix.short, len(start)
    limit = 3 * d // 4
    basis = _Lanczos(start, min(limit, 6 * k + 8 * b) + b)
    seen: list[tuple[int, float, float]] = []  # (size, Σθ, log of Σr²/θ as a share) at each check
    check = k + b if niter is None else min(limit, _size(niter, k, b))
    growth = 4.0
    while True:
        basis.absorb(matrix.normal(basis.block))
        if basis.size < check:
            continue
        theta, Y, residuals = basis.ritz(k)
        head = theta[:k].clamp_min(torch.finfo(start.dtype).eps * theta[0])
        total = float(head.sum())
        share = float((residuals**2 / head).sum()) / total
        if seen and share < seen[-1][2]:
            growth = min(10.0, max(1.0, (total - seen[-1][1]) / total / (seen[-1][2] - share)))
        resolved = head > 1e-6 * head[0]
        worst = float(torch.where(resolved, residuals / head, 0.0).max()) ** 2
        if niter is not None or basis.size >= limit:
            break
        excess = max(growth * share / (tolerance / 100), growth * worst / 2 / tolerance)
        if excess <= 1:
            break
        if not seen:
            check = max(basis.size + b, 2 * k + 4 * b)
        else:
            slope = math.log(seen[-1][2] / share) / (basis.size - seen[-1][0]) if share < seen[-1][2] else 0.0
            ahead = math.log(excess) / slope / 1.15 if slope > 0 else math.inf
            check = basis.size + int(min(max(ahead, b), 0.4 * basis.size + b))
        seen.append((basis.size, total, share))
    if niter is None and basis.size >= limit:
        return _gram_route(matrix, k, start, tolerance, niter)
    X = Y.t().to(start.device, start.dtype) @ basis.Q[: basis.size]
    route = f"block Lanczos, {str(start.dtype)[6:]}, {basis.size // b} x {b}"
    steps = basis.size // b
    del basis
    X = torch.addmm(X, X @ X.t(), X, beta=1.5, alpha=-0.5)  # Orthonormal to rounding.
    return _finish(matrix, X, theta[k : k + 1], growth, route, steps)


def _size(niter: int, k: int, b: int) -> int:
    """How large a Krylov space in blocks of b holds what `niter` rounds of subspace iteration find."""
    degree = 1 + math.ceil(math.sqrt(niter))
    return max(k + int(degree * math.sqrt(k * b)), degree * b)


def _lanczos64_route(matrix: _Matrix, k: int, start: Tensor, tolerance: float, niter: int | None) -> Spectrum:
    return _lanczos_route(matrix, k, torch.linalg.qr(start.double().t())[0].t(), tolerance, niter)


def _gram_route(matrix: _Matrix, k: int, start: Tensor, tolerance: float, niter: int | None) -> Spectrum:
    theta, X = torch.linalg.eigh(matrix.gram(torch.float64))
    return _finish(matrix, X[:, -k:].flip(1).t().contiguous(), theta.flip(0)[k : k + 1], 1.0, "float64 Gram", 1)


def _gram32_route(matrix: _Matrix, k: int, start: Tensor, tolerance: float, niter: int | None) -> Spectrum:
    theta, X = torch.linalg.eigh(matrix.gram(torch.float32))
    return _finish(matrix, X[:, -k:].flip(1).t().contiguous(), theta.flip(0)[k : k + 1], 4.0, "float32 Gram", 1)


def _svd_route(matrix: _Matrix, k: int, start: Tensor, tolerance: float, niter: int | None) -> Spectrum:
    X, S, _ = torch.linalg.svd(matrix.dense(), full_matrices=False)
    return _finish(matrix, X[:, :k].t().contiguous(), S[k : k + 1] ** 2, 1.0, "float64 SVD", 1)


def _finish(
    matrix: _Matrix, X: Tensor, following: Tensor, growth: float, route: str, passes: int, top: float = 0.0
) -> Spectrum:
    """The triplets in the span of the orthonormal rows X (k, short), and how good they are.

    Args:
        top: the largest singular value of W where it is not among them: what is zero is measured against it.
        following: the (k+1)-th eigenvalue of N as far as it is known, or nothing.
        growth: what a squared residual is multiplied by to estimate the error of an eigenvalue.
    """
    k = len(X)
    image = X.new_empty(k, matrix.long)
    NX = matrix.normal(X, image)
    long, R = torch.linalg.qr(image.t())
    P, S, Qh = torch.linalg.svd(R.to("cpu", torch.float64))
    rank = int((8 * torch.finfo(matrix.dtype).eps * max(float(S[0]), top) < S).sum())
    P, Qh = P.to(X.device, X.dtype), Qh.to(X.device, X.dtype)
    short, other = Qh @ X, P.t() @ long.t()
    found = S[:rank, None].to(X.device, X.dtype)
    # W·v from the same pass; Wᵀ·u − s·v is zero by construction.
    error = (Qh[:rank] @ NX) / found - found * short[:rank]
    relative = torch.linalg.vector_norm(error, dim=1).to("cpu", torch.float64) / S[:rank]
    squares = S[:rank] ** 2
    total, held = matrix.energy(), float(squares.sum())
    certificate = Certificate(
        residual=float(relative.max()) if rank else 0.0,
        error=growth / 2 * float(relative.max()) ** 2 if rank else 0.0,
        energy=None if total is None else min(1.0, held / total),
        energy_loss=growth * float((relative**2 * squares).sum()) / held if rank else 0.0,
        gap=max(0.0, 1.0 - math.sqrt(max(0.0, float(following[0]))) / float(S[k - 1]))
        if rank == k and len(following)
        else None,
        rank=rank,
        route=route,
        passes=passes + 1,
    )
    S[rank:] = 0.0
    U, V = (short, other) if matrix.wide else (other, short)
    U, V = U.to(matrix.dtype).t(), V.to(matrix.dtype).t()
    sign = _signs(U, V)
    return Spectrum((U * sign).contiguous(), _rescaled(S, matrix), (V * sign).contiguous(), certificate)


def _rescaled(S: Tensor, matrix: _Matrix) -> Tensor:
    """S times the scale, in the working dtype where that can hold it."""
    info = torch.finfo(matrix.dtype)
    S = (S * matrix.scale).to(matrix.device)
    return S if float(S[0]) > info.max or 0 < float(S[0]) < info.tiny else S.to(matrix.dtype)


def _signs(U: Tensor, V: Tensor) -> Tensor:
    """±1 for each triplet: the sign of ⟨u, z⟩ + ⟨v, z⟩ for a fixed random z, the same for W and Wᵀ."""
    z = torch.randn(max(len(U), len(V)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = z.to(U.device, U.dtype)
    return torch.where(z[: len(U)] @ U + z[: len(V)] @ V < 0, -1.0, 1.0).to(U.dtype)


def _zero(matrix: _Matrix, k: int, generator: torch.Generator) -> Spectrum:
    sides = [torch.randn(side, k, generator=generator, dtype=torch.float64) for side in (matrix.short, matrix.long)]
    short, long = (torch.linalg.qr(side)[0].to(matrix.device, matrix.dtype) for side in sides)
    U, V = (short, long) if matrix.wide else (long, short)
    certificate = Certificate(0.0, 0.0, 1.0, 0.0, None, 0, "zero", 1)
    return Spectrum(U, torch.zeros(k, dtype=matrix.dtype, device=matrix.device), V, certificate)


# ------------------------------------------------------------------ trailing triplets


def bottomk_svd(weight: Tensor, k: int, *, generator: torch.Generator) -> Spectrum:
    """The k smallest of the min(m, n) singular triplets, largest of them first: the tail of a full SVD.

    Randomised methods and float32 cannot see them (a condition of 5e4 squares to 3e9): this is a float64 Gram.

    Raises:
        BadRank, NonFiniteWeight, MetaWeight: as `topk_svd`.
    """
    _check(weight.shape, k)
    with torch.no_grad():
        matrix = _Dense(weight)
        if not matrix.rescale():
            return _zero(matrix, k, generator)
        theta, X = torch.linalg.eigh(matrix.gram(torch.float64))
        tail, top = X[:, :k].flip(1).t().contiguous(), math.sqrt(float(theta[-1]))
        return _finish(matrix, tail, theta[:0], 1.0, "float64 Gram", 1, top)


# ------------------------------------------------------------------ thin factors


def thin_qr(columns: Float[Tensor, "m r"]) -> tuple[Float[Tensor, "m q"], Float[Tensor, "q r"]]:
    """Q with orthonormal columns and R upper triangular with a diagonal that is not negative, q = min(m, r).

    Q is orthonormal also where the columns are dependent or zero.
    """
    work = columns if columns.dtype == torch.float64 else columns.float()
    Q, R = torch.linalg.qr(work)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R.dtype)
    return Q * sign, sign[:, None] * R


def recompress(
    B: Float[Tensor, "m k"], A: Float[Tensor, "k n"], rank: int
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"], float]:
    """The best factors of B·A of a smaller (or larger) rank, and the share of ‖B·A‖² that they drop.

    Two thin QRs and the SVD of a (k, k) core, in float64: B·A is never formed. The spectrum is split evenly; rank
    beyond that of B·A is filled with zeros.
    """
    _check((B.shape[0], A.shape[1]), rank)
    with torch.no_grad():
        QB, RB = torch.linalg.qr(B.double())
        QA, RA = torch.linalg.qr(A.double().t())
        U, S, Vh = torch.linalg.svd(RB @ RA.t(), full_matrices=False)
        kept = min(rank, len(S))
        root = S[:kept].sqrt()
        sign = _signs(QB @ U[:, :kept], QA @ Vh[:kept].t())
        small_B, small_A = B.new_zeros(B.shape[0], rank), A.new_zeros(rank, A.shape[1])
        small_B[:, :kept] = (QB @ (U[:, :kept] * (root * sign))).to(B.dtype)
        small_A[:kept] = ((Vh[:kept] * (root * sign)[:, None]) @ QA.t()).to(A.dtype)
        energy = float((S**2).sum())
        return small_B, small_A, float((S[kept:] ** 2).sum()) / energy if energy else 0.0


# ------------------------------------------------------------------ a low-rank change of a weight


def add_lowrank(
    W: Float[Tensor, "m n"], B: Float[Tensor, "m r"], A: Float[Tensor, "r n"], scaling: float
) -> Float[Tensor, "m n"]:
    """W + s·B·A as a new tensor of W's dtype, without the dense product.

    For float16 and bfloat16 every element is the exact sum rounded once, to nearest even: the sum is bracketed in
    float32, and the few elements whose bracket straddles two results are computed again in float64.
    """
    with torch.no_grad():
        if W.dtype in (torch.float32, torch.float64):
            return torch.addmm(W, B.to(W.dtype), A.to(W.dtype), alpha=scaling)
        out = torch.empty(W.shape, dtype=W.dtype, device=W.device)
        low_B, low_A = B.float() * scaling, A.float()
        eps = torch.finfo(torch.float32).eps
        across = torch.linalg.vector_norm(low_A, dim=0) * (eps * (A.shape[0] + 4))
        along = torch.linalg.vector_norm(low_B, dim=1)
        step = max(1, (BLOCK // 4) // W.shape[1])
        for start in range(0, W.shape[0], step):
            rows = slice(start, start + step)
            sums = torch.addmm(W[rows].float(), low_B[rows], low_A)
            low, high = torch.aminmax(sums)
            margin = torch.outer(along[rows], across).add_(2 * eps * torch.maximum(low.abs(), high.abs()))
            below, above = (sums - margin).to(W.dtype), (sums + margin).to(W.dtype)
            unsure = torch.nonzero(below != above, as_tuple=True)
            if 8 * len(unsure[0]) > below.numel():
                exact = torch.addmm(W[rows].double(), B[rows].double(), A.double(), alpha=scaling)
                below = _round_once(exact, W.dtype)
            elif len(unsure[0]):
                i, j = unsure
                product = (B[rows].double()[i] * A.t().double()[j]).sum(1)
                below[i, j] = _round_once(W[rows][i, j].double() + scaling * product, W.dtype)
            out[rows] = below
        return out


def _round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 → a half type in one rounding. A plain cast goes through float32 and rounds twice."""
    near = x.float()
    bits = near.view(torch.int32)
    error = x.abs() - near.abs().double()
    # Round to odd: an inexact float32 gets its last bit set, so that no false tie is left for the second rounding.
    shift = torch.sign(error).nan_to_num().int() * (bits & 1 == 0)
    return (bits + shift).view(torch.float32).to(dtype)


def row_norms_squared(W: Float[Tensor, "m n"]) -> Float[Tensor, " m"]:
    """‖Wᵢ‖² per row in float64: what `lowrank_row_norms` can be given once for a frozen weight."""
    with torch.no_grad():
        return torch.cat([(block.double() ** 2).sum(1) for _, block in _row_blocks(W)])


def lowrank_row_norms(
    W: Float[Tensor, "m n"],
    B: Float[Tensor, "m r"],
    A: Float[Tensor, "r n"],
    scaling: float,
    squared: Float[Tensor, " m"] | None = None,
) -> Float[Tensor, " m"]:
    """‖Wᵢ + s·(B·A)ᵢ‖ per row, without B·A.

        ‖Wᵢ‖² + 2s·⟨(W·Aᵀ)ᵢ, Bᵢ⟩ + s²·⟨(B·A·Aᵀ)ᵢ, Bᵢ⟩

    Rows in which the three cancel more than a hundredfold are computed directly.

    Args:
        squared: `row_norms_squared(W)`, where the caller keeps it.
    """
    with torch.no_grad():
        squared = row_norms_squared(W) if squared is None else squared.double()
        low_A, wide_B = A.to(torch.promote_types(W.dtype, torch.float32)), B.double()
        WA = torch.cat([block @ low_A.t() for _, block in _row_blocks(W)]).double()
        cross = 2 * scaling * (WA * wide_B).sum(1)
        moved = scaling**2 * ((wide_B @ (A.double() @ A.double().t())) * wide_B).sum(1)
        norms = squared + cross + moved
        doubtful = torch.nonzero(100 * norms < squared + moved).flatten()
        for rows in doubtful.split(max(1, (BLOCK // 4) // W.shape[1])):
            direct = torch.addmm(W[rows].double(), wide_B[rows], A.double(), alpha=scaling)
            norms[rows] = (direct**2).sum(1)
        return norms.clamp_min(0).sqrt().float()


def _row_blocks(W: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, BLOCK // W.shape[1])
    for start in range(0, W.shape[0], step):
        rows = slice(start, start + step)
        yield rows, W[rows].float() if W.dtype != torch.float64 else W[rows]
