r"""Random: both factors as a fresh `nn.Linear` would have them. For tests, not for training.

    A₀ ~ U(−1/√n, 1/√n)                                               A₀: (r, n)
    B₀ ~ U(−1/√r, 1/√r)                                               B₀: (m, r)
    y  = W·x + s·B·A·x

The output does change at step zero, and by much: a branch that computes B·A wrongly cannot hide behind B = 0.

PEFT's `init_lora_weights=False`; it has no paper.
"""

from __future__ import annotations

import torch

from headstart.inits.strategy import Factors, register


@register(
    "random",
    paper="https://huggingface.co/docs/peft/developer_guides/lora",
    fact="noise in both factors, the function moves: for tests; free",
)
def random(shape: tuple[int, int], rank: int, generator: torch.Generator) -> Factors:
    """Uniform A of bound 1/√n and uniform B of bound 1/√r.

    Args:
        shape: (m, n) of the weight seen as a matrix.
        rank: r.
        generator: draws the noise, A first.

    Returns:
        Factors that are not anchored: the function moves at step zero.

    Example:
        >>> start = random((300, 100), 4, torch.Generator().manual_seed(0))
        >>> print(f"{start.A.abs().max():.2f} {start.B.abs().max():.2f}")
        0.10 0.50
    """
    # Deviation: PEFT leaves an embedding's two factors at N(0, 1); here the name means one thing everywhere.
    m, n = shape
    A = torch.empty(rank, n).uniform_(-(n**-0.5), n**-0.5, generator=generator)
    B = torch.empty(m, rank).uniform_(-(rank**-0.5), rank**-0.5, generator=generator)
    return Factors(A, B)
