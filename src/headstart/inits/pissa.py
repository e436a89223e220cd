r"""PiSSA: train the principal singular components, freeze the rest.

    W = U·S·Vᵀ                                                        W: (m, n)
    B₀ = U_r·√(S_r/s)                                                 B₀: (m, r)
    A₀ = √(S_r/s)·V_rᵀ                                                A₀: (r, n)
    y  = W·x + s·(B·A − B₀·A₀)·x

The output is unchanged at step zero, and the largest directions of W receive the gradient.

Meng, Wang, Zhang (2024), "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
arXiv 2404.02948, section 3. The reference repository and PEFT write the residual W − s·B₀·A₀ into the weight, and
their fast mode (`pissa_niter_N`) is a randomised SVD with no spare column, which misses the last directions.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.inits.split import split_evenly
from headstart.inits.strategy import Factors, register
from headstart.linalg import topk_svd


@register("pissa", paper="https://arxiv.org/abs/2404.02948", fact="the r largest singular triplets; a certified SVD")
def pissa(
    weight: Float[Tensor, "m n"],
    rank: int,
    scaling: float,
    generator: torch.Generator,
    niter: int | None = None,
    tolerance: float = 1e-4,
) -> Factors:
    """The r leading singular triplets, split evenly between A and B.

    Args:
        weight: W, of any float dtype and layout; it is never copied whole.
        rank: r, at most min(m, n).
        scaling: s > 0; the product s·B₀·A₀ does not depend on it.
        generator: starts the iteration. The result depends on it below the tolerance only.
        niter: PEFT's spelling `pissa_niter_N`: at least the accuracy of N power iterations, and no certificate asked.
        tolerance: relative error allowed in a singular value, where niter is None.

    Returns:
        Anchored factors with s·B₀·A₀ = U_r·S_r·V_rᵀ, the best rank-r approximation of W. Where W has fewer directions
        than r, the rest of B₀ is zero and the rest of A₀ is not, so that all of them train.

    Raises:
        BadRank, BadAlpha, BadOption, NonFiniteWeight, MetaWeight, SVDError: as their names say.

    Example:
        >>> W = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        >>> start = pissa(W, rank=2, scaling=2.0, generator=torch.Generator().manual_seed(0))
        >>> (2.0 * start.B @ start.A).diagonal().round(decimals=4).abs().tolist()
        [4.0, 3.0, 0.0, 0.0]
        >>> f"{start.facts['energy']:.3f}"
        '0.833'
    """
    # Deviation: the weight stays as it is and the frozen pair is subtracted, because a residual written into a
    # half-precision weight rounds it a second time, and breaks whatever else shares that weight.
    return split_evenly(topk_svd(weight, rank, generator=generator, tolerance=tolerance, niter=niter), scaling)
