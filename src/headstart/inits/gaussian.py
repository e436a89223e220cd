r"""Gaussian: LoRA's start with normal noise whose size depends on the rank alone.

    A₀ ~ N(0, 1/r²)                                                   A₀: (r, n)
    B₀ = 0                                                            B₀: (m, r)
    y  = W·x + s·B·A·x

The output is unchanged at step zero. The paper asks for a Gaussian A without naming its size; at r = 8 this one
is 0.125, fourteen times Kaiming's at n = 4096, and the learning rate that fits is smaller to match.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen (2021), "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv 2106.09685, section 4.1; the size 1/r is that of PEFT's `init_lora_weights="gaussian"`.
"""

from __future__ import annotations

import torch

from headstart.inits.strategy import Factors, register


@register("gaussian", paper="https://arxiv.org/abs/2106.09685", fact="normal A of size 1/r, zeros in B; free")
def gaussian(shape: tuple[int, int], rank: int, generator: torch.Generator) -> Factors:
    """Normal A of standard deviation 1/r and zero B.

    Args:
        shape: (m, n) of the weight seen as a matrix.
        rank: r.
        generator: draws the noise.

    Returns:
        Factors with B₀·A₀ = 0 exactly.

    Example:
        >>> start = gaussian((3, 1000), 4, torch.Generator().manual_seed(0))
        >>> print(f"{start.A.std():.2f} {start.B.norm():.0f}")
        0.25 0
    """
    # Deviation: PEFT ignores this name on an embedding and starts it as `kaiming`; here it means one thing everywhere.
    m, n = shape
    return Factors(A=torch.randn(rank, n, generator=generator) / rank, B=torch.zeros(m, rank))
