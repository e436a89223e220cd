r"""LoRAM: the magnitude of a spectral start without the spectrum.

    Φ_d[i, j] = √(2/(d+1))·sin(i·j·π/(d+1))                           Φ_d: (d, r), orthonormal columns, i, j from 1
    Q[r]  = log r / log min(m, n)                                     the share of W's energy to take
    β⁴    = Q[r]·ν[W]/ν[Φ_m·Φ_nᵀ] = Q[r]·‖W‖²/r                       ν: mean square of the elements
    B₀ = β·Φ_m/√s                                                     B₀: (m, r)
    A₀ = β·Φ_nᵀ/√s                                                    A₀: (r, n)
    y  = W·x + s·(B·A − B₀·A₀)·x

The output is unchanged at step zero. The paper's claim: what PiSSA gains comes from the size of its factors, which
makes the updates large, and not from the singular directions; so any orthonormal basis of that size will do, and a
sine transform costs one pass over W, no seed, and no file.

Zhang, Li, Zhang, Gong, Wang, Hu, Liu, Jiang (2025), "The Primacy of Magnitude in Low-Rank Adaptation",
arXiv 2507.06558 (NeurIPS 2025), the algorithm of its section on LoRAM.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.inits.blocks import blocks
from headstart.inits.checks import check_finite, check_fit, check_scaling
from headstart.inits.split import KAIMING_ROW
from headstart.inits.strategy import Factors, register


@register("loram", paper="https://arxiv.org/abs/2507.06558", fact="sines of the size of W in both factors; one norm")
def loram(weight: Float[Tensor, "m n"], rank: int, scaling: float) -> Factors:
    """The first r sine waves over the outputs and over the inputs, as large as W makes them.

    Args:
        weight: W, of any float dtype and layout; only its norm is used.
        rank: r, at most min(m, n).
        scaling: s > 0; the product s·B₀·A₀ does not depend on it.

    Returns:
        Anchored factors with s·B₀·A₀ = β²·Φ_m·Φ_nᵀ: r equal singular values that hold Q[r] of the energy of W. A zero
        weight gives B₀ = 0 and an A₀ of Kaiming's size, so that it trains.

    Raises:
        BadRank, BadAlpha, NonFiniteWeight, MetaWeight: as their names say.

    Example:
        >>> W = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        >>> start = loram(W, rank=2, scaling=1.0)
        >>> f"{(start.B @ start.A).norm() ** 2 / W.norm() ** 2:.3f} {start.facts['gain']}"
        '0.500 0.5'
    """
    check_fit(weight, rank)
    check_scaling(scaling)
    m, n = weight.shape
    # In float64: the squares of a large weight overflow anything else.
    norm = math.hypot(*(float(torch.linalg.vector_norm(block)) for *_, block in blocks(weight, torch.float64)))
    check_finite(weight, torch.tensor(norm))
    # Deviation: at least 2, because log 1 = 0 would leave a rank-1 adapter with two zero factors, which cannot train.
    gain = math.log(max(rank, 2)) / math.log(max(min(m, n), 2))
    beta = (gain * norm**2 / rank) ** 0.25 / math.sqrt(scaling)
    A = (beta or KAIMING_ROW) * _waves(rank, n)
    B = beta * _waves(m, rank)
    facts = {"effective_rank": rank if beta else 0, "gain": gain}
    return Factors(A.float(), B.float(), anchored=True, facts=facts)


def _waves(rows: int, columns: int) -> Float[Tensor, "rows columns"]:
    """sin(i·j·π/(d+1)) along the longer side, with sum of squares 1."""
    d = max(rows, columns)
    i, j = torch.arange(1, rows + 1, dtype=torch.float64), torch.arange(1, columns + 1, dtype=torch.float64)
    return torch.outer(i, j).mul_(math.pi / (d + 1)).sin_().mul_(math.sqrt(2 / (d + 1)))
