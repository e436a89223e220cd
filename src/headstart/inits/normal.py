r"""Normal: LoRA's start with the noise that transformers themselves are initialised with.

    A₀ ~ N(0, 0.02²)                                                  A₀: (r, n)
    B₀ = 0                                                            B₀: (m, r)
    y  = W·x + s·B·A·x

The output is unchanged at step zero, and the noise is of one size for every layer and rank: 2.2 times Kaiming's
at n = 4096. It comes as a recipe, so the rest of the recipe is its preset: r = 16, α = 16, dropout 0.05.

Zhao, Zhou, Li, Wen (2024), "Large Language Models" (LLMBook), the LoRA layer of the code that goes with chapter 7;
and Hu et al. (2021), arXiv 2106.09685, section 4.1, whose Gaussian A it makes concrete.
"""

from __future__ import annotations

import torch

from headstart.inits.checks import check_above_zero
from headstart.inits.strategy import Factors, register


@register(
    "normal",
    paper="https://llmbook-zh.github.io",
    fact="normal A of size 0.02, zeros in B; free",
    r=16,
    lora_alpha=16,
    lora_dropout=0.05,
)
def normal(shape: tuple[int, int], rank: int, generator: torch.Generator, std: float = 0.02) -> Factors:
    """Normal A of one standard deviation and zero B.

    Args:
        shape: (m, n) of the weight seen as a matrix.
        rank: r.
        generator: draws the noise.
        std: its standard deviation.

    Returns:
        Factors with B₀·A₀ = 0 exactly.

    Raises:
        BadOption: if std is not above 0.

    Example:
        >>> start = normal((3, 1000), 4, torch.Generator().manual_seed(0))
        >>> print(f"{start.A.std():.3f} {start.B.norm():.0f}")
        0.020 0
    """
    check_above_zero("std", std)
    m, n = shape
    return Factors(A=torch.randn(rank, n, generator=generator) * std, B=torch.zeros(m, rank))
