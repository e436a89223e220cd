r"""MiCA: learn what to write into the output directions that W uses least.

    W = U·S·Vᵀ, S descending, p = min(m, n)                           W: (m, n)
    B  = U_{p−r+1..p}, frozen                                         B: (m, r)
    A₀ = 0                                                            A₀: (r, n)
    y  = W·x + s·B·A·x

The output is unchanged at step zero, only A trains, and nothing that it learns can leave the minor subspace.

Rüdiger, Raschka (2026), "MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning", arXiv 2604.01694; PEFT has it
as `init_lora_weights="mica"`. Half the rank and twice the learning rate of a LoRA that works are advised.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.inits.split import certified
from headstart.inits.strategy import Factors, register
from headstart.linalg import bottomk_svd


@register("mica", paper="https://arxiv.org/abs/2604.01694", fact="smallest left vectors as a frozen B; a float64 Gram")
def mica(weight: Float[Tensor, "m n"], rank: int, generator: torch.Generator) -> Factors:
    """The r trailing left singular vectors as a frozen B, and A = 0.

    Args:
        weight: W, of any float dtype and layout.
        rank: r, at most min(m, n).
        generator: draws directions of W's null space, where W has fewer than min(m, n) of its own.

    Returns:
        Factors with B₀ᵀ·B₀ = I, B frozen, and B₀·A₀ = 0 exactly.

    Raises:
        BadRank, NonFiniteWeight, MetaWeight: as their names say.

    Example:
        >>> W = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        >>> start = mica(W, rank=2, generator=torch.Generator())
        >>> start.B.square().sum(dim=1).round(decimals=4).tolist(), start.frozen
        ([0.0, 0.0, 1.0, 1.0], frozenset({'B'}))
    """
    # Deviation: B is float32, where PEFT rounds it to the weight's dtype and loses its orthonormality in bfloat16.
    spectrum = bottomk_svd(weight, rank, generator=generator)
    B = spectrum.U.float()
    return Factors(B.new_zeros(rank, weight.shape[1]), B, frozen=frozenset("B"), facts=certified(spectrum))
