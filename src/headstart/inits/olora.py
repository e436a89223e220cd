r"""OLoRA: begin in an orthonormal basis of the weight's own columns.

    W = Q·R                                                           W: (m, n), Q: (m, p), R: (p, n), p = min(m, n)
    B₀ = Q_r                                                          B₀: (m, r)
    A₀ = R_r/s                                                        A₀: (r, n)
    y  = W·x + s·(B·A − B₀·A₀)·x

The output is unchanged at step zero, and B starts orthonormal, so that the gradient of A is well conditioned.

A QR goes through the columns from left to right: Q_r depends on the first r alone, and R_r = Q_rᵀ·W. That is a thin
QR and one product instead of the QR of all of W, a hundredth of its cost. It also shows that the start depends on the
order of the input features, which the paper leaves as it is.

Büyükakyüz (2024), "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775, algorithm 1.
PEFT and the paper use R_r itself and write the residual W − s·Q_r·R_r into the weight.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.inits.blocks import LENGTH, blocks
from headstart.inits.checks import check_finite, check_fit, check_scaling
from headstart.inits.kaiming import kaiming
from headstart.inits.strategy import Factors, register
from headstart.linalg import thin_qr


@register("olora", paper="https://arxiv.org/abs/2406.01775", fact="a basis of the first r columns; a thin QR")
def olora(weight: Float[Tensor, "m n"], rank: int, scaling: float, generator: torch.Generator) -> Factors:
    """The first r columns of Q and the first r rows of R.

    Args:
        weight: W, of any float dtype and layout; it is never copied whole.
        rank: r, at most min(m, n).
        scaling: s > 0; the product s·B₀·A₀ does not depend on it.
        generator: used for a zero weight only, whose A is Kaiming's and whose B is zero.

    Returns:
        Anchored factors with B₀ᵀ·B₀ = I and s·B₀·A₀ = Q_r·Q_rᵀ·W, the part of W that lies in the span of its first r
        columns. Dependent columns leave B₀ orthonormal, so every direction trains.

    Raises:
        BadRank, BadAlpha, NonFiniteWeight, MetaWeight: as their names say.

    Example:
        >>> W = torch.tensor([[3.0, 1.0, 2.0], [4.0, 2.0, 1.0]])
        >>> start = olora(W, rank=1, scaling=1.0, generator=torch.Generator())
        >>> start.B.T.round(decimals=4).tolist(), start.A.round(decimals=4).tolist()
        ([[0.6..., 0.8...]], [[5.0, 2.2..., 2.0]])
    """
    check_fit(weight, rank)
    check_scaling(scaling)
    m, n = weight.shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    Q, _ = thin_qr(weight[:, :rank].detach().to(dtype))
    R = torch.zeros(rank, n, dtype=dtype, device=weight.device)
    for rows, columns, block in blocks(weight, dtype):
        R[:, columns].addmm_(Q[rows].T, block)
    check_finite(weight, R)
    effective = _rank(R)
    facts = {"effective_rank": effective, "route": "thin QR"}
    if not effective:
        return replace(kaiming((m, n), rank, generator), anchored=True, facts=facts)  # As a layer's other blocks are.
    # Deviation: divided by s, so that what the branch holds at step zero is the paper's Q_r·R_r (there s = 1) for every
    # alpha and for rsLoRA; in A, so that B stays orthonormal. PEFT does not divide and holds s times that.
    return Factors(A=(R / scaling).float(), B=Q.float(), anchored=True, facts=facts)


def _rank(R: Float[Tensor, "r n"]) -> int:
    """As `torch.linalg.matrix_rank`; of float32 rows through their float64 Gram matrix, in a tenth of its time."""
    if R.dtype == torch.float64:
        return int(torch.linalg.matrix_rank(R))
    gram = torch.zeros(len(R), len(R), dtype=torch.float64, device=R.device)
    for columns in R.split(LENGTH, dim=1):
        wide = columns.double()
        gram.addmm_(wide, wide.T)
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return int((values > values[-1] * max(R.shape) * torch.finfo(R.dtype).eps).sum())
