r"""MiLoRA: train the minor singular components, keep the principal ones as they are.

    W = U·S·Vᵀ, S descending, p = min(m, n)                           W: (m, n)
    B₀ = U_{p−r+1..p}·√(S_{p−r+1..p}/s)                               B₀: (m, r)
    A₀ = √(S_{p−r+1..p}/s)·V_{p−r+1..p}ᵀ                              A₀: (r, n)
    y  = W·x + s·(B·A − B₀·A₀)·x

The output is unchanged at step zero, and the new task is learned in directions that the pretrained knowledge
hardly uses.

Wang, Li, Wang, Chen, Chen (2024), "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM
Finetuning", arXiv 2406.09044, section 3. The reference repository takes a full SVD and writes the principal part
into the weight; its scripts compare against a LoRA of twice the scaling.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.inits.split import split_evenly
from headstart.inits.strategy import Factors, register
from headstart.linalg import bottomk_svd


@register("milora", paper="https://arxiv.org/abs/2406.09044", fact="the r smallest singular triplets; a float64 Gram")
def milora(weight: Float[Tensor, "m n"], rank: int, scaling: float, generator: torch.Generator) -> Factors:
    """The r trailing singular triplets, split evenly between A and B.

    Args:
        weight: W, of any float dtype and layout.
        rank: r, at most min(m, n).
        scaling: s > 0; the product s·B₀·A₀ does not depend on it.
        generator: draws directions of W's null space, where W has fewer than min(m, n) of its own.

    Returns:
        Anchored factors with s·B₀·A₀ = Σ sᵢ·uᵢ·vᵢᵀ over the r smallest triplets. Where those are zero, B₀ is zero and
        A₀ is not but W·A₀ᵀ is, so that all of them train and read what W does not.

    Raises:
        BadRank, BadAlpha, NonFiniteWeight, MetaWeight: as their names say.

    Example:
        >>> W = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        >>> start = milora(W, rank=2, scaling=2.0, generator=torch.Generator())
        >>> (2.0 * start.B @ start.A).diagonal().round(decimals=4).abs().tolist()
        [0.0, 0.0, 2.0, 1.0]
    """
    # Deviation: the weight stays as it is and the frozen pair is subtracted; see `pissa`.
    return split_evenly(bottomk_svd(weight, rank, generator=generator), scaling)
