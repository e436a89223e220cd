r"""The leading triplets of a gradient, as every start that reads one takes them.

    G = E[δ·xᵀ] ≈ U·S·Vᵀ                                              G: (m, n), U: (m, k), S: (k,), V: (n, k)

A gradient is zero where a layer took no part in the loss, and of low rank where there were few tokens: singular values
below a millionth of the first are rounding, and count as zero.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.errors import NoSignal
from headstart.statistics import GradientSpectrum, GradientSum

ROUNDING = 1e-6  # of the largest singular value

Gradient = GradientSpectrum | GradientSum


def leading(
    gradient: Gradient, k: int, generator: torch.Generator
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "n k"]]:
    """U, S and V of the mean gradient, S zero beyond its rank.

    Raises:
        NoSignal: if there is no gradient.
    """
    U, S, V = gradient.leading(k, generator)
    check_signal(S)
    return U, torch.where(ROUNDING * S[0] < S, S, 0.0), V


def check_signal(values: Tensor) -> None:
    """A gradient that is not zero, seen from its singular values or from itself."""
    if not bool(values.any()):
        raise NoSignal(
            "the gradient is zero: leave this layer out, or give data whose loss reaches it (an expert that no token "
            "chose, or a layer behind the loss, has none)"
        )


def quality(gradient: Gradient, rank: int) -> dict[str, Any]:
    """For the init report: how much of its leading directions one half of the data shares with the other."""
    overlap = gradient.overlap(rank)
    return {} if overlap is None else {"overlap": overlap}
