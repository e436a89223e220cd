r"""LoRA-SB: fix the subspace of the first full step, and train only the r² numbers in its middle.

    D = −η·sign(G) = U·S·Vᵀ, G = Σ ∂L/∂W                              D: (m, n)
    B = U_r, A = V_rᵀ, both frozen                                    B: (m, r), A: (r, n)
    R₀ = S_r/s                                                        R: (r, r)
    y = W·x + s·B·R·A·x

D is the first step that Adam would make in every weight; s·B·R₀·A is its best part of rank r. The output does move at
step zero. With orthonormal B and A, the gradient of R is that of W seen from the subspace, whose size needs no tuning;
but training never leaves the subspace, so it must hold what the task needs: r is large (96 in the paper), and still
r² is little.

Ponkshe, Singhal, Gorbunov, Tumanov, Horvath, Vepakomma (2024), "Initialization using Update Approximation is a Silver
Bullet for Extremely Efficient Low-Rank Fine-Tuning", arXiv 2411.19557, section 3. The reference repository
RaghavSinghal10/lora-sb takes the sum of 50 samples and sets α = r, so that s = 1.
"""

from __future__ import annotations

import torch

from headstart.inits.checks import check_above_zero, check_rank, check_scaling
from headstart.inits.gradients import Gradient, check_signal, quality
from headstart.inits.split import certified
from headstart.inits.strategy import Factors, register
from headstart.linalg import topk_svd


@register("lora_sb", paper="https://arxiv.org/abs/2411.19557", fact="the space of Adam's first step; r² numbers train")
def lora_sb(gradient: Gradient, rank: int, scaling: float, generator: torch.Generator, eta: float = 3e-7) -> Factors:
    """The r leading triplets of Adam's first step, of which only the middle trains.

    Args:
        gradient: G. The sign of a small element survives no truncation: an exact gradient gives the paper's start, one
            kept at rank 4r a subspace with 0.89 to 0.96 of its energy (measured on SmolLM2, r from 8 to 64).
        rank: r, at most min(m, n).
        scaling: s > 0; the product s·B·R₀·A does not depend on it.
        generator: starts the iteration. The result depends on it below the tolerance only.
        eta: η, the first step of a weight: the learning rate over the number of warm-up steps. The default is the
            reference's, 1e-4 over 2 % of 16 667 steps.

    Returns:
        Factors with Bᵀ·B = A·Aᵀ = I, both frozen, a core, and s·B·R₀·A = U_r·S_r·V_rᵀ.

    Raises:
        BadRank, BadAlpha, BadOption, NoSignal: as their names say.

    Example:
        >>> from headstart.statistics import GradientSum
        >>> generator = torch.Generator().manual_seed(0)
        >>> gradient = GradientSum(torch.tensor([[5.0, -1.0], [-2.0, 7.0]]), generator, count=1.0)
        >>> start = lora_sb(gradient, 1, 2.0, generator, eta=0.5)
        >>> (2.0 * start.B @ start.core @ start.A).round(decimals=4).tolist()
        [[-0.5, 0.5], [0.5, -0.5]]
    """
    check_scaling(scaling)
    check_above_zero("eta", eta)
    check_rank(gradient.shape, rank, min(gradient.shape))
    G = gradient.dense()
    check_signal(G)
    # What a merge leaves where the gradient is zero is no direction.
    rounding = torch.finfo(torch.float32).eps * float(G.abs().max())
    D = torch.where(G.abs() > rounding, -G.sign(), 0.0)
    found = topk_svd(D, rank, generator=generator)
    core = torch.diag(found.S * (eta / scaling))
    # Deviation: float32, where the reference rounds U and V to bfloat16, and B and A are no longer orthonormal.
    facts = {**certified(found), **quality(gradient, rank)}
    return Factors(found.V.T, found.U, frozen=frozenset("AB"), core=core, facts=facts)
