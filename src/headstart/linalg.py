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
        energy: the share of ‖W‖² (Frobenius) that the triplets hold; None where W is known by products alone.
        energy_loss: an estimate of what they miss of the k best triplets' energy, as a share of it.
        gap: (s_k − s_{k+1})/s_k, or None where s_{k+1} is unknown or s_k is zero. A small gap means that the
            k-th direction is ill-determined by W itself.
        rank: how many of the k singular values are not zero at the precision of the input.
        route: how it was computed.
        passes: sweeps over W.
    """

    residual: float
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
        >>> torch.rand(1, generator=named_generator(0, "pissa", "h.0")).item()  # doctest: +ELLIPSIS
        0....
    """
    digest = hashlib.sha256(f"{seed}\0{strategy}\0{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ------------------------------------------------------------------ the matrix, seen from its short side


class _Dense:
    """A weight as N = W·Wᵀ or Wᵀ·W of its short side, scaled by a power of two to max|W| in [1/2, 1)."""

    def __init__(self, weight: Tensor) -> None:
        if weight.is_meta:
            raise MetaWeight(f"the singular values of a {tuple(weight.shape)} weight need its values: load it first")
        low, high = (float(bound) for bound in torch.aminmax(weight))
        if not math.isfinite(low + high) and not (math.isfinite(low) and math.isfinite(high)):
            count = int((~torch.isfinite(weight)).sum())
            raise NonFiniteWeight(f"a {tuple(weight.shape)} weight holds {count} NaN or infinite values: repair it")
        self.weight = weight
        self.largest = max(abs(low), abs(high))
        self.exponent = math.frexp(self.largest)[1]
        self.wide = weight.shape[0] <= weight.shape[1]
        self.short, self.long = sorted(weight.shape)
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.device = weight.device

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Slices along the long side, with W there as (short, c) if wide, else (c, short), in `dtype` and scaled."""
        W, step = self.weight, max(1, BLOCK // self.short)
        plain = W.dtype == dtype and W.stride(1) == 1 and W.stride(0) >= W.shape[1]
        if plain and abs(self.exponent) < 30:
            yield slice(0, self.long), W
            return
        buffer = torch.empty(min(step, self.long) * self.short, dtype=dtype, device=self.device)
        for start in range(0, self.long, step):
            part = slice(start, min(start + step, self.long))
            source = W[:, part] if self.wide else W[part]
            block = buffer[: source.numel()].view(source.shape).copy_(source)
            if abs(self.exponent) >= 30:  # In two factors: 2^140 alone is infinite in float32.
                half = -self.exponent // 2
                block.mul_(2.0**half).mul_(2.0 ** (-self.exponent - half))
            yield part, block

    @property
    def scale(self) -> float:
        """What `blocks` divided by."""
        return 2.0**self.exponent if abs(self.exponent) >= 30 else 1.0

    def normal(self, X: Tensor, image: Tensor | None = None) -> Tensor:
        """X·N for rows X (b, short); fills `image` (b, long) with the rows of X on the other side."""
        Z = X.new_zeros(X.shape[::-1] if self.wide else X.shape)
        for part, block in self.blocks(X.dtype):
            Y = X @ block if self.wide else (block @ X.t()).t().contiguous()
            Z = Z.addmm_(block, Y.t()) if self.wide else Z.addmm_(Y, block)
            if image is not None:
                image[:, part] = Y
        return Z.t() if self.wide else Z

    def gram(self) -> Tensor:
        """N itself, in float64."""
        G = torch.zeros(self.short, self.short, dtype=torch.float64, device=self.device)
        for _, block in self.blocks(torch.float64):
            G = G.addmm_(block, block.t()) if self.wide else G.addmm_(block.t(), block)
        return G

    def squared_norm(self) -> float:
        return sum(float(torch.linalg.vector_norm(block)) ** 2 for _, block in self.blocks(self.dtype))

    def dense(self) -> Tensor:
        """W in float64, scaled, its short side first."""
        W = torch.cat([block.clone() for _, block in self.blocks(torch.float64)], dim=int(self.wide))
        return W if self.wide else W.t()


class _Implicit:
    """The same view of a matrix that is known by its products."""

    def __init__(self, operator: Operator, generator: torch.Generator) -> None:
        self.operator = operator
        m, n = operator.shape
        self.wide = m <= n
        self.short, self.long = min(m, n), max(m, n)
        self.dtype = torch.float64 if operator.dtype == torch.float64 else torch.float32
        self.device = operator.device
        probe = torch.randn(1, self.short, generator=generator, dtype=torch.float64).to(self.device, self.dtype)
        self.largest = float(self._across(probe).abs().max())
        if not math.isfinite(self.largest):
            raise NonFiniteWeight(f"a {m, n} operator gives NaN or infinite products: repair its weight")
        self.scale = 2.0 ** math.frexp(self.largest)[1] if self.largest > 0 else 1.0

    def _across(self, X: Tensor) -> Tensor:
        return (self.operator.rmatmul(X.t()) if self.wide else self.operator.matmul(X.t())).t()

    def _back(self, Y: Tensor) -> Tensor:
        return (self.operator.matmul(Y.t()) if self.wide else self.operator.rmatmul(Y.t())).t()

    def normal(self, X: Tensor, image: Tensor | None = None) -> Tensor:
        Y = self._across(X) / self.scale
        if image is not None:
            image.copy_(Y)
        return self._back(Y) / self.scale

    def gram(self) -> Tensor:
        W = self.dense()
        return W @ W.t()

    def squared_norm(self) -> None:
        return None

    def dense(self) -> Tensor:
        eye = torch.eye(self.short, dtype=self.dtype, device=self.device)
        return self._across(eye).double() / self.scale


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
    if isinstance(operator, Tensor) and operator.stride(0) < operator.stride(1):  # Its rows lie in memory as columns.
        return topk_svd(operator.t(), k, generator=generator, tolerance=tolerance, niter=niter).T
    with torch.no_grad():
        matrix = _Dense(operator) if isinstance(operator, Tensor) else _Implicit(operator, generator)
        if matrix.largest == 0.0:
            return _zero(matrix, k, generator)
        for route in _routes(matrix, k, niter):
            spectrum = route(matrix, k, generator, tolerance, niter)
            if niter is not None or _holds(spectrum.certificate, tolerance):
                return spectrum
    raise SVDError(
        f"no route reached the tolerance {tolerance:g} for the {k} leading triplets of a {tuple(operator.shape)} weight "
        f"({spectrum.certificate}): allow more, or choose a smaller k"
    )


Route = Callable[[_Matrix, int, torch.Generator, float, int | None], Spectrum]


def _check(shape: tuple[int, ...], k: int) -> None:
    if len(shape) != 2:
        raise BadOption(f"a weight of shape {tuple(shape)} is no matrix: reshape it to (out, in)")
    if not 1 <= k <= min(shape):
        raise BadRank(f"rank {k} does not fit a {tuple(shape)} weight: choose 1 to {min(shape)}")


def _routes(matrix: _Matrix, k: int, niter: int | None) -> list[Route]:
    dense: list[Route] = [_gram_route, _svd_route]
    if matrix.short <= SMALL or 4 * k > matrix.short:
        return dense
    double = [] if matrix.dtype == torch.float64 else [_lanczos64]
    return [_lanczos, *double, *dense]


def _holds(certificate: Certificate, tolerance: float) -> bool:
    return certificate.energy_loss <= tolerance / 100 and certificate.residual <= math.sqrt(tolerance)


def _lanczos(matrix: _Matrix, k: int, generator: torch.Generator, tolerance: float, niter: int | None) -> Spectrum:
    return _krylov(matrix, k, generator, tolerance, niter, matrix.dtype)


def _lanczos64(matrix: _Matrix, k: int, generator: torch.Generator, tolerance: float, niter: int | None) -> Spectrum:
    return _krylov(matrix, k, generator, tolerance, niter, torch.float64)


def _width(k: int) -> int:
    return 8 if k <= 8 else 16 if k <= 32 else 32 if k <= 64 else 64


def _krylov(
    matrix: _Matrix, k: int, generator: torch.Generator, tolerance: float, niter: int | None, dtype: torch.dtype
) -> Spectrum:
    d, b = matrix.short, min(_width(k), matrix.short // 4)
    limit = d // 2 + b
    budget = None if niter is None else min(limit, k + math.ceil(2.5 * k * math.sqrt(niter)))
    start = torch.randn(b, d, generator=generator, dtype=torch.float64).to(matrix.device, dtype)
    Q = torch.empty(min(limit, 8 * k + 128) + 2 * b, d, dtype=dtype, device=matrix.device)
    T = torch.zeros(limit + 2 * b, limit + 2 * b, dtype=torch.float64, device=matrix.device)
    Q[:b] = torch.linalg.qr(start.t())[0].t()
    size, passes = 0, 0
    next_check = max(2 * k, k + 2 * b)
    while True:
        block = Q[size : size + b]
        Z = matrix.normal(block)
        size, passes = size + b, passes + 1
        known = Q[:size]
        H = Z @ known.t()
        Z = Z.addmm(H, known, alpha=-1)
        first, R1 = torch.linalg.qr(Z.t())
        # Again, on unit columns: a column that was only rounding is a fresh direction now, orthogonal to the rest.
        fix = first.t() @ known.t()
        second, R2 = torch.linalg.qr((first.t().addmm(fix, known, alpha=-1)).t())
        T[size - b : size, :size] = (H + R1.t() @ fix).double()
        coupling = (R2 @ R1).double()
        if size + 2 * b > Q.shape[0]:
            Q = torch.cat([Q, torch.empty_like(Q)])
        Q[size : size + b] = second.t()
        if budget is not None:
            if size < budget:
                continue
        elif size < next_check and size < limit:
            continue
        part = T[:size, :size].tril()
        theta, Y = torch.linalg.eigh(part, UPLO="L")
        theta, Y = theta.flip(0), Y.flip(1)
        residuals = torch.linalg.vector_norm(coupling @ Y[size - b :, :k], dim=0)
        scaled = residuals / theta[:k].clamp_min(1e-300)
        worst = float(torch.where(theta[:k] > 1e-11 * theta[0], scaled, 0.0).max())
        if budget is not None or worst <= 0.3 * math.sqrt(tolerance) or size >= limit:
            break
        next_check = max(size + b, int(1.15 * size))
    X = (Y[:, :k].t().to(dtype) @ Q[:size]).contiguous()
    del Q
    name = f"block Lanczos, {'float64' if dtype == torch.float64 else 'float32'}, {size // b} x {b}"
    return _finish(matrix, torch.linalg.qr(X.t())[0].t().contiguous(), theta[k : k + 1], name, passes)


def _gram_route(matrix: _Matrix, k: int, generator: torch.Generator, tolerance: float, niter: int | None) -> Spectrum:
    theta, X = torch.linalg.eigh(matrix.gram())
    return _finish(matrix, X.flip(1)[:, :k].t().contiguous(), theta.flip(0)[k : k + 1], "float64 Gram", 1)


def _svd_route(matrix: _Matrix, k: int, generator: torch.Generator, tolerance: float, niter: int | None) -> Spectrum:
    X, S, _ = torch.linalg.svd(matrix.dense(), full_matrices=False)
    return _finish(matrix, X[:, :k].t().contiguous(), S[k : k + 1] ** 2, "float64 SVD", 1)


def _finish(matrix: _Matrix, X: Tensor, following: Tensor, route: str, passes: int) -> Spectrum:
    """The triplets in the span of the orthonormal rows X (k, short), and how good they are.

    Args:
        following: the (k+1)-th eigenvalue of N as far as it is known, or nothing.
    """
    k = X.shape[0]
    image = X.new_empty(k, matrix.long)
    NX = matrix.normal(X, image)
    long, R = torch.linalg.qr(image.t())
    P, S, Qh = torch.linalg.svd(R.double())
    short, image_side = Qh.to(X.dtype) @ X, (long @ P.to(X.dtype)).t()
    eps = torch.finfo(matrix.dtype).eps
    rank = int((S > 8 * eps * S[0]).sum())
    Sr = S[:rank]
    error = (Qh[:rank].to(X.dtype) @ NX) / Sr[:, None].to(X.dtype) - Sr[:, None].to(X.dtype) * short[:rank]
    relative = torch.linalg.vector_norm(error, dim=1).double() / Sr
    residual = float(relative.max()) if rank else 0.0
    best = float((Sr**2).sum())
    loss = float((relative**2 * Sr**2).sum()) / best if rank else 0.0
    total = matrix.squared_norm()
    gap = None
    if len(following) and rank == k:
        gap = max(0.0, 1.0 - math.sqrt(max(0.0, float(following[0]))) / float(S[k - 1]))
    certificate = Certificate(residual, None if not total else best / total, loss, gap, rank, route, passes + 1)
    S = torch.cat([Sr, S.new_zeros(k - rank)])
    U, V = (short, image_side) if matrix.wide else (image_side, short)
    U, V = U.to(matrix.dtype).t(), V.to(matrix.dtype).t()
    sign = _signs(U, V)
    return Spectrum((U * sign).contiguous(), _fit(S, matrix), (V * sign).contiguous(), certificate)


def _fit(S: Tensor, matrix: _Matrix) -> Tensor:
    """S times the scale, in the working dtype where that can hold it."""
    info = torch.finfo(matrix.dtype)
    S = S * matrix.scale
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
    certificate = Certificate(0.0, 1.0, 0.0, None, 0, "zero", 1)
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
        if matrix.largest == 0.0:
            return _zero(matrix, k, generator)
        theta, X = torch.linalg.eigh(matrix.gram())
        return _finish(matrix, X[:, :k].flip(1).t().contiguous(), theta[:0], "float64 Gram", 1)


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
        low_A, wide_B = A.float(), B.double()
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
