r"""From singular triplets to two factors: the last step of every start that reads a spectrum.

    M = U·S·Vᵀ                                                        M: (m, n), S: (r,)
    B = U·√(S/s)                                                      B: (m, r)
    A = √(S/s)·Vᵀ                                                     A: (r, n)

so that s·B·A = M whatever the scaling, and both factors weigh the same. Where S is zero both would be zero, and stay
so: each one's gradient is a multiple of the other. There A gets the direction itself, orthogonal to all the others,
with the size of a Kaiming row, √(n·1/(3n)) = 1/√3; B stays zero. The product is the same, and the direction can learn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.inits.checks import check_scaling
from headstart.inits.strategy import Factors
from headstart.linalg import Spectrum, thin_qr

KAIMING_ROW = 3**-0.5
NOTHING = 8 * torch.finfo(torch.float32).eps  # of the largest singular value: what rounding leaves of a zero


def split_evenly(spectrum: Spectrum, scaling: float) -> Factors:
    """Anchored factors with s·B·A = U·S·Vᵀ.

    Example:
        >>> from headstart.linalg import named_generator, topk_svd
        >>> W = torch.diag(torch.tensor([4.0, 1.0, 0.0]))
        >>> start = split_evenly(topk_svd(W, 3, generator=named_generator(0, "example", "W")), scaling=4.0)
        >>> (start.B.norm(dim=0) ** 2 * 4).tolist(), (start.A.norm(dim=1) ** 2).tolist()
        ([4.0, 1.0, 0.0], [1.0, 0.25, 0.333...])
    """
    check_scaling(scaling)
    B, A = split(spectrum.U, (spectrum.S / scaling).sqrt(), spectrum.V)
    return Factors(A, B, anchored=True, facts=certified(spectrum))


def split_product(
    B: Float[Tensor, "m r"],
    A: Float[Tensor, "r n"],
    scaling: float,
    generator: torch.Generator,
    facts: Mapping[str, Any],
) -> Factors:
    """Anchored factors with s·B·A the product of these two, in which both weigh the same.

    A start that takes a metric out again leaves one factor ten thousand times as large as the other, and their
    gradients as different. Two thin QRs and a core of (r, r), in float64, turn any two into the even ones.

    Example:
        >>> B, A = torch.tensor([[1e4], [0.0]]), torch.tensor([[0.0, 3e-4]])
        >>> start = split_product(B, A, 3.0, torch.Generator(), {})
        >>> float(start.B.norm()), float(start.A.norm()), float(3 * (start.B @ start.A)[0, 1])
        (1.0, 1.0, 3.0)
    """
    check_scaling(scaling)
    left, R_left = thin_qr(B.double())
    right, R_right = thin_qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R_left @ R_right.T)
    S = torch.where(NOTHING * S[0] < S, S, 0.0)
    V = with_fresh_directions(right @ Vh.T, S, generator)
    B, A = split(left @ U, (S / scaling).sqrt(), V)
    return Factors(A, B, anchored=True, facts={**facts, "effective_rank": int((S > 0).sum())})


def split(
    U: Float[Tensor, "m r"], size: Float[Tensor, " r"], V: Float[Tensor, "n r"]
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """B = U·size and A = size·Vᵀ in float32; where the size is zero, A is of Kaiming's."""
    A = (V * torch.where(size > 0, size, KAIMING_ROW)).T
    return (U * size).float(), A.float()


def with_fresh_directions(
    V: Float[Tensor, "n r"], S: Float[Tensor, " r"], generator: torch.Generator
) -> Float[Tensor, "n r"]:
    """V, with random directions orthogonal to the others in place of those whose S is zero.

    What stands there otherwise is rounding, or a unit vector that looks at one input alone.
    """
    found, dead = V[:, S > 0], int((S == 0).sum())
    if not dead:
        return V
    noise = torch.randn(len(V), dead, generator=generator).to(V.device, V.dtype)
    basis, _ = thin_qr(torch.cat([found, noise], dim=1))
    return torch.cat([found, basis[:, found.shape[1] :].to(V.dtype)], dim=1)


def certified(spectrum: Spectrum) -> dict[str, Any]:
    """The certificate, as the init report shows it."""
    facts = asdict(spectrum.certificate)
    return {"effective_rank": facts.pop("rank"), **facts}
