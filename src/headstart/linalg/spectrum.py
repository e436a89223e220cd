r"""From a subspace to singular triplets, and what can be said about them.

    Wᵀ·Xᵀ = V·diag(S)·P,  U = Xᵀ·Pᵀ                                   X: (p, d), orthonormal rows on the short side
    residual = ‖W·vᵢ − sᵢ·uᵢ‖                                         Wᵀ·uᵢ − sᵢ·vᵢ is zero by construction

One more sweep gives both. The values are those of W itself, not roots of those of N, and so lose nothing to squaring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.linalg.sides import Sides


@dataclass(frozen=True)
class Certificate:
    """What a decomposition reached.

    Attributes:
        residual: the largest ‖Wᵀuᵢ − sᵢvᵢ‖/sᵢ or ‖Wvᵢ − sᵢuᵢ‖/sᵢ over the triplets that are not zero; where `niter`
            says how far to go, mostly an estimate: what it was before the last block of directions.
        error: an estimate of the largest relative error of a singular value.
        energy: the share of ‖W‖² (Frobenius) that the triplets hold; None where W is known by products alone.
        energy_loss: an estimate of what they miss of the k best triplets' energy, as a share of it.
        gap: (s_k − s_{k+1})/s_k, or None where s_{k+1} is unknown or s_k is zero. A small gap means that W itself
            leaves the k-th direction ill-determined.
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


def spectrum_in(
    sides: Sides,
    X: Tensor,
    k: int,
    following: Tensor,
    growth: float,
    route: str,
    passes: int,
    top: float = 0.0,
    residuals: Tensor | None = None,
) -> Spectrum:
    """The k leading triplets in the span of the orthonormal rows X, (p, d) with p ≥ k, and how good they are.

    Args:
        following: the (k+1)-th eigenvalue of N as far as it is known, or nothing.
        growth: what a squared residual is multiplied by to estimate the error of an eigenvalue.
        route, passes: for the certificate.
        top: the largest singular value of W where it is not among them: what is zero is measured against it.
        residuals: ‖uᵢ·N − sᵢ²·uᵢ‖ where an estimate will do and half of the sweep can be saved; else they are measured.
    """
    if residuals is None:
        image = X.new_empty(len(X), sides.long)
        NX = sides.normal(X, image)
    else:
        image = sides.across(X)
    Q, R = torch.linalg.qr(image.t())
    del image
    left, values, right = torch.linalg.svd(R.to("cpu", torch.float64))
    S = values[:k]
    zero = max(8 * torch.finfo(sides.dtype).eps * max(top, float(S[0])), sides.floor / sides.scale)
    rank = int((zero < S).sum())
    P, turn = left[:, :k].to(X.device, X.dtype), right[:k].to(X.device, X.dtype)
    short, long = (turn @ X).t(), Q @ P
    if residuals is None:
        found = S[:rank].to(X.device, X.dtype)
        error = (turn[:rank] @ NX).t() / found - short[:, :rank] * found
        relative = torch.linalg.vector_norm(error, dim=0).to("cpu", torch.float64) / S[:rank]
    else:
        relative = residuals[:rank] / S[:rank] ** 2
    next_value = max([0.0, *following.tolist(), *(values[k : k + 1] ** 2).tolist()])
    energy, held = sides.energy(), float((S**2).sum())
    certificate = Certificate(
        residual=float(relative.max()) if rank else 0.0,
        error=growth / 2 * float(relative.max()) ** 2 if rank else 0.0,
        energy=None if energy is None else min(1.0, held / energy),
        energy_loss=growth * float(((relative * S[:rank]) ** 2).sum()) / held if rank else 0.0,
        gap=max(0.0, 1 - math.sqrt(next_value) / float(S[-1])) if rank == k and len(following) else None,
        rank=rank,
        route=route,
        passes=passes + 1,
    )
    S[rank:] = 0.0
    return _canonical(sides, short, S, long, certificate)


def zero_spectrum(sides: Sides, k: int, generator: torch.Generator) -> Spectrum:
    """Of a zero matrix: any orthonormal directions."""
    short, long = (_orthonormal(side, k, generator).to(sides.device, sides.dtype) for side in (sides.short, sides.long))
    certificate = Certificate(0.0, 0.0, 1.0, 0.0, None, 0, "zero", 1)
    return _canonical(sides, short, torch.zeros(k, dtype=torch.float64), long, certificate)


def signs(U: Tensor, V: Tensor) -> Tensor:
    """±1 for each triplet: the sign of ⟨u, z⟩ + ⟨v, z⟩, z fixed and patternless; so W and Wᵀ get the same."""
    z = torch.arange(1, max(len(U), len(V)) + 1, dtype=torch.float64).square().cos().to(U.dtype).to(U.device)
    return torch.where(z[: len(U)] @ U + z[: len(V)] @ V < 0, -1.0, 1.0).to(U.dtype)


def _orthonormal(side: int, k: int, generator: torch.Generator) -> Tensor:
    columns: Tensor = torch.linalg.qr(torch.randn(side, k, generator=generator, dtype=torch.float64))[0]
    return columns


def _canonical(sides: Sides, short: Tensor, S: Tensor, long: Tensor, certificate: Certificate) -> Spectrum:
    """In the sides' dtype, with fixed signs and the true scale."""
    short, long = short.to(sides.dtype), long.to(sides.dtype)
    sign = signs(short, long)
    short, long = (short * sign).contiguous(), (long * sign).contiguous()
    S, info = S * sides.scale, torch.finfo(sides.dtype)
    if S[0] == 0 or info.tiny <= float(S[0]) <= info.max:
        S = S.to(sides.dtype)
    U, V = (short, long) if sides.wide else (long, short)
    return Spectrum(U, S.to(sides.device), V, certificate)
