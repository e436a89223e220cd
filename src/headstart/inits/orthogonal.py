r"""Orthogonal: both factors are noise, in two halves of the rank that do not meet.

    Q = qr(N(0, 1))                                                   Q: (r, r), orthogonal
    B₀ = N(0, 1)·Q_even/10                                            B₀: (m, r) from (m, r/2)·(r/2, r)
    A₀ = Q_oddᵀ·N(0, 1)/10                                            A₀: (r, n) from (r, r/2)·(r/2, n)
    y  = W·x + s·(B·A − B₀·A₀)·x

Rows of Q are orthogonal, so Q_even·Q_oddᵀ = 0 and B₀·A₀ = 0: the output is unchanged at step zero, and unlike in
Kaiming's start both factors receive a gradient from the first step. The factors are of rank r/2 each and of a size
that does not depend on the width of the layer, eight times Kaiming's at n = 4096.

datta0 (2024), https://datta0.github.io/posts/rethink-lora-init, "Orthogonal initialisation"; PEFT has it as
`init_lora_weights="orthogonal"`.
"""

from __future__ import annotations

import torch

from headstart.errors import BadRank
from headstart.inits.strategy import Factors, register
from headstart.linalg import thin_qr


@register(
    "orthogonal",
    paper="https://datta0.github.io/posts/rethink-lora-init",
    fact="noise in both factors whose product is zero; free",
)
def orthogonal(shape: tuple[int, int], rank: int, generator: torch.Generator) -> Factors:
    """Two noises on complementary halves of a random basis of the rank.

    Args:
        shape: (m, n) of the weight seen as a matrix.
        rank: r, even.
        generator: draws the basis, then A, then B.

    Returns:
        Anchored factors whose product is zero but for rounding, and that rounding is subtracted. An export that is
        truncated to rank r loses nothing else.

    Raises:
        BadRank: if r is odd.

    Example:
        >>> start = orthogonal((300, 100), 4, torch.Generator().manual_seed(0))
        >>> print(f"{start.A.norm():.1f} {start.B.norm():.1f} {(start.B @ start.A).norm() < 1e-6}")
        1.4 2.5 True
    """
    m, n = shape
    if rank % 2:
        raise BadRank(f"rank {rank} is odd and 'orthogonal' halves it: choose {rank + 1}")
    Q, _ = thin_qr(torch.randn(rank, rank, generator=generator))
    odd, even = Q[0::2], Q[1::2]
    A = odd.T @ torch.randn(rank // 2, n, generator=generator) / 10
    B = torch.randn(m, rank // 2, generator=generator) @ even / 10
    # Deviation: anchored. The product is zero on paper; in bfloat16 PEFT's moves the output by 0.9 %.
    return Factors(A, B, anchored=True)
