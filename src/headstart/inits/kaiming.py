r"""Kaiming: LoRA's own start, noise in one factor and zeros in the other.

    A₀ ~ U(−1/√n, 1/√n)                                               A₀: (r, n)
    B₀ = 0                                                            B₀: (m, r)
    y  = W·x + s·B·A·x

The output is unchanged at step zero, the first step moves B alone, and the bound keeps A·x at the size of x
for every width n. An embedding looks its input up instead of multiplying it, so there the roles change:
A₀ = 0 and B₀ ~ N(0, 1), and only the rows of tokens that were seen ever move.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen (2021), "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv 2106.09685, section 4.1; the distributions are those of the reference repository microsoft/LoRA
(`loralib/layers.py`) and of PEFT's `init_lora_weights=True`, where the paper's text says a Gaussian A.
"""

from __future__ import annotations

import torch

from headstart.inits.strategy import Factors, register


@register("kaiming", paper="https://arxiv.org/abs/2106.09685", fact="noise in A, zeros in B: LoRA's own; free")
def kaiming(shape: tuple[int, int], rank: int, generator: torch.Generator, kind: str = "linear") -> Factors:
    """Uniform A of bound 1/√n and zero B, or for an embedding zero A and standard normal B.

    Args:
        shape: (m, n) of the weight seen as a matrix; a convolution has n = in_channels·kernel.
        rank: r. It may exceed min(m, n): nothing here is fitted to the weight.
        generator: draws the noise.
        kind: "linear", "conv" or "embedding".

    Returns:
        Factors with B₀·A₀ = 0 exactly.

    Example:
        >>> start = kaiming((3, 4), 2, torch.Generator().manual_seed(0))
        >>> start.A
        tensor([[-0.0037,  0.2682, -0.4115, -0.3680],
                [-0.1926,  0.1341, -0.0099,  0.3964]])
        >>> start.B.count_nonzero().item()
        0
    """
    m, n = shape
    if kind == "embedding":
        return Factors(A=torch.zeros(rank, n), B=torch.randn(m, rank, generator=generator))
    A = torch.empty(rank, n).uniform_(-(n**-0.5), n**-0.5, generator=generator)
    return Factors(A, B=torch.zeros(m, rank))
