"""The leading and the trailing singular triplets of a weight: which route, when to escalate, when to refuse."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from headstart.errors import BadOption, BadRank, SVDError
from headstart.linalg.lanczos import budgeted, search
from headstart.linalg.lowrank import thin_qr
from headstart.linalg.sides import BLOCK, Dense, Implicit, Operator, Sides
from headstart.linalg.spectrum import Spectrum, spectrum_in, zero_spectrum

SMALL = 128  # A side up to here is solved densely in float64; up to twice that in float32, checked.


def named_generator(seed: int, strategy: str, name: str) -> torch.Generator:
    """Randomness that depends on what is drawn for, not on when, where or in which order.

    Example:
        >>> once, again = (torch.rand(2, generator=named_generator(0, "pissa", "h.0")) for _ in range(2))
        >>> torch.equal(once, again)
        True
    """
    digest = hashlib.sha256(f"{seed}\0{strategy}\0{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


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
        operator: a matrix of any float dtype and layout, or anything with products (`Operator`).
        k: from 1 to min(m, n).
        generator: where the start block comes from (CPU). The global random state is neither read nor moved.
        tolerance: the relative error allowed in a singular value; the energy may miss a hundredth of it.
        niter: instead of a tolerance, the effort: the accuracy of `torch.svd_lowrank(q=k, niter=niter)`, for a
            fraction of its cost. The certificate tells what was reached.

    Raises:
        BadRank, BadOption: if k, tolerance or niter make no sense for W.
        NonFiniteWeight, MetaWeight: if W has no usable values.
        SVDError: if no route reaches the tolerance.

    Example:
        >>> W = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
        >>> topk_svd(W, 2, generator=named_generator(0, "example", "W")).S
        tensor([3., 2.])
    """
    _check(operator.shape, k)
    if not 0 < tolerance < math.inf:
        raise BadOption(f"tolerance is {tolerance}: choose a number above 0")
    if niter is not None and niter < 0:
        raise BadOption(f"niter is {niter}: choose 0 or more rounds, or None for a certificate")
    if isinstance(operator, Tensor) and operator.stride(0) < operator.stride(1):  # Its columns lie together.
        return topk_svd(operator.t(), k, generator=generator, tolerance=tolerance, niter=niter).T
    with torch.no_grad():
        sides = Dense(operator) if isinstance(operator, Tensor) else Implicit(operator)
        if not sides.screen():
            return zero_spectrum(sides, k, generator)
        if niter is not None:
            return _quick(sides, k, generator, niter)
        spectrum = None
        for spectrum in _attempts(sides, k, generator, tolerance):
            reached = spectrum.certificate
            # A float32 space sees nothing below 1e-3 of the largest value: only float64 may say that there is nothing.
            certain = reached.rank == k or sides.dtype == torch.float64 or "float64" in reached.route
            if reached.energy_loss <= tolerance / 100 and reached.error <= tolerance and certain:
                return spectrum
    raise SVDError(
        f"no route reached the tolerance {tolerance:g} for the {k} leading triplets of a {tuple(operator.shape)} weight"
        f" (the last: {spectrum and spectrum.certificate}): allow more, or choose another k"
    )


def bottomk_svd(weight: Tensor, k: int, *, generator: torch.Generator) -> Spectrum:
    """The k smallest of the min(m, n) singular triplets, largest of them first: the tail of a full SVD.

    Randomised methods and float32 cannot see them (a condition of 5e4 squares to 3e9): this is a float64 Gram matrix,
    and of a float64 weight a full SVD. Where singular values are zero, the directions are those of a noise in W's two
    null spaces: W·v = 0 and Wᵀ·u = 0, and no rounding decides which.

    Args:
        generator: draws that noise.

    Raises:
        BadRank, NonFiniteWeight, MetaWeight: as `topk_svd`.
    """
    _check(weight.shape, k)
    with torch.no_grad():
        sides = Dense(weight)
        if not sides.screen():
            return zero_spectrum(sides, k, generator)
        if sides.dtype == torch.float64:
            left, values, _ = torch.linalg.svd(sides.dense(), full_matrices=False)
            X, theta, route = left.flip(1), values.flip(0) ** 2, "float64 SVD"
        else:
            theta, X = torch.linalg.eigh(sides.gram(torch.float64))
            route = "float64 Gram"
        tail, top = X[:, :k].flip(1).t().contiguous(), math.sqrt(float(theta[-1]))
        found = spectrum_in(sides, tail, k, theta[:0], 1.0, route, 1, top)
        return found if found.certificate.rank == k else _with_null_spaces(sides, found, theta, X, generator)


def _with_null_spaces(sides: Dense, found: Spectrum, theta: Tensor, X: Tensor, generator: torch.Generator) -> Spectrum:
    """Directions of W's null spaces for the triplets that are zero, given all of N = X·diag(theta)·Xᵀ, rising."""
    rank, count = found.certificate.rank, len(found.S) - found.certificate.rank
    zero = (8 * torch.finfo(sides.dtype).eps) ** 2 * float(theta[-1])
    null = max(count, int((theta <= zero).sum()))
    short, long = (
        torch.randn(side, count, generator=generator, dtype=torch.float64).to(sides.device)
        for side in (sides.short, sides.long)
    )
    short = X[:, :null] @ (X[:, :null].t() @ short)
    live, values = X[:, null:], theta[null:, None]
    for _ in range(2):  # Less Wᵀ·N⁻¹·W of it; once leaves the rounding of N⁻¹.
        inside = live @ ((live.t() @ sides.back(long.t().contiguous()).t()) / values)
        long = long - sides.across(inside.t().contiguous()).t()
    drawn = [thin_qr(columns)[0].to(sides.dtype) for columns in (short, long)]
    U, V = drawn if sides.wide else reversed(drawn)
    return replace(found, U=torch.cat([found.U[:, :rank], U], 1), V=torch.cat([found.V[:, :rank], V], 1))


def _check(shape: tuple[int, ...], k: int) -> None:
    if len(shape) != 2:
        raise BadOption(f"a weight of shape {tuple(shape)} is no matrix: reshape it to (out, in)")
    if not 1 <= k <= min(shape):
        raise BadRank(f"rank {k} does not fit a {tuple(shape)} weight: choose 1 to {min(shape)}")


def _attempts(sides: Sides, k: int, generator: torch.Generator, tolerance: float) -> Iterator[Spectrum]:
    """From cheap to certain."""
    d = sides.short
    if d > 2 * SMALL and 6 * k <= d:
        yield from _krylov(sides, k, generator, tolerance)
    if d > SMALL and sides.dtype == torch.float32:
        yield _gram(sides, k, torch.float32)
    yield _gram(sides, k, torch.float64)
    X, S, _ = torch.linalg.svd(sides.dense(), full_matrices=False)
    yield spectrum_in(sides, X[:, :k].t().contiguous(), k, S[k : k + 1] ** 2, 1.0, "float64 SVD", 1)


def _krylov(sides: Sides, k: int, generator: torch.Generator, tolerance: float) -> Iterator[Spectrum]:
    """In float32; then, where its candidates did not stand the last sweep, in float64."""
    start = _start(sides, k, generator)
    double = sides.dtype == torch.float32 and isinstance(sides, Dense)
    for block in [start, torch.linalg.qr(start.double().t())[0].t()] if double else [start]:
        failed = 0
        for candidate in search(_product(sides, 8 * k + 80, block.dtype), block, k, 3 * sides.short // 4, tolerance):
            route = f"block Lanczos, {str(block.dtype)[6:]}, {candidate.steps} x {len(block)}"
            yield spectrum_in(sides, candidate.rows, k, candidate.following, candidate.growth, route, candidate.steps)
            failed += 1
            if failed == 2:
                break
        if not failed:
            return  # Slow convergence, which more digits do not help.


def _quick(sides: Sides, k: int, generator: torch.Generator, niter: int) -> Spectrum:
    start = _start(sides, k, generator)
    width = len(start)
    # Krylov polynomials of degree √N do what N rounds do; measured on Gaussian, power-law and language-model weights.
    size = k + 6 + (1 + 1.05 * math.sqrt(niter)) * math.sqrt(max(k, width) * width)
    steps = max(math.ceil(k / width), round(size / width) - 1)
    small = sides.short <= SMALL or (steps + 1) * width > sides.short // 2
    found = None if small else budgeted(_product(sides, steps * width, start.dtype), start, k, steps)
    if found is None:
        return _gram(sides, k, sides.dtype if sides.short > SMALL else torch.float64)
    route = f"block Lanczos, {str(start.dtype)[6:]}, {steps} x {width}"
    # The way back would only measure what the iteration has an estimate of.
    return spectrum_in(sides, found.rows, k, found.following, found.growth, route, steps, residuals=found.residuals)


def _start(sides: Sides, k: int, generator: torch.Generator) -> Tensor:
    """Orthonormal random rows, as many as one block of the iteration."""
    width = 32 if k > 24 else 16
    if sides.short <= 1024:  # A product costs little more than the bookkeeping: narrow blocks need fewer.
        width = 16 if k > 16 else 8
    start = torch.randn(sides.short, width, generator=generator).to(sides.dtype)
    columns: Tensor = torch.linalg.qr(start)[0]
    return columns.t().contiguous().to(sides.device)


def _product(sides: Sides, size: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """X ↦ X·N, through N itself where forming it is cheaper than `size` products with W, and it fits a block."""
    d, long = sides.short, sides.long
    if isinstance(sides, Dense) and d * d <= BLOCK and size * (2 * long - d) > d * long // 2:
        N = sides.gram(dtype)
        return lambda X: X @ N
    return sides.normal


def _gram(sides: Sides, k: int, dtype: torch.dtype) -> Spectrum:
    theta, X = _eigh(sides.gram(dtype)) or torch.linalg.eigh(sides.gram(torch.float64))
    X, growth = X[:, -k:].flip(1).t().contiguous(), 4.0 if X.dtype == torch.float32 else 1.0
    return spectrum_in(sides, X, k, theta.flip(0)[k : k + 1], growth, f"{str(X.dtype)[6:]} Gram", 1)


def _eigh(N: Tensor) -> tuple[Tensor, Tensor] | None:
    """None where LAPACK gives up, or gives NaN: in float32, on some that have many zeros."""
    try:
        theta, X = torch.linalg.eigh(N)
    except RuntimeError:  # a LinAlgError
        return None
    return (theta, X) if bool(X.sum().isfinite()) else None
