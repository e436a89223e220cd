r"""LoRA-One: one step of full fine-tuning, cut to rank r, is the start.

    −G = U·S·Vᵀ, G = E[∂L/∂W]                                         G: (m, n)
    B₀ = U_r·√(S_r/S₁)/√γ                                             B₀: (m, r)
    A₀ = √(S_r/S₁)·V_rᵀ/√γ                                            A₀: (r, n)
    y  = W·x + s·B·A·x

The output does move at step zero, downhill: s·B₀·A₀ = −(s/γ)·G_r/S₁ is the best rank-r part of a gradient step, whose
length is s/γ in the spectral norm of every layer, whatever the scale of its gradient. α therefore scales the step, and
nothing compensates for it. Aligned with the gradient from the start, LoRA need not find its subspace first.

Zhang, Liu, Chen (2025), "LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models,
Provably and Efficiently", arXiv 2502.01235 (ICML 2025), algorithm 1, which is also what the reference repository
YuanheZ/LoRA-One does since June 2025. Four more definitions stand under this name:

    paper, theory ("Spectral-init")     g·U·S·Vᵀ as s·B₀·A₀/s         normalize="none", gamma=1/g
    README, in words                    a step of −s·G_r/γ            normalize="none"
    README, formula                     U·S/√γ and S·Vᵀ/√γ            normalize="none", variant="squared"
    code of January 2025                m^¼/√γ·(U, Vᵀ), anchored      variant="orthonormal"
"""

from __future__ import annotations

import torch

from headstart.errors import MissingStatistic
from headstart.inits.checks import check_above_zero, check_choice, check_rank
from headstart.inits.gradients import Gradient, leading, quality
from headstart.inits.split import split, with_fresh_directions
from headstart.inits.strategy import Factors, register

NORMALIZE = ("layer", "global", "none")
VARIANTS = ("algorithm1", "squared", "orthonormal")


@register("lora_one", paper="https://arxiv.org/abs/2502.01235", fact="a gradient step of rank r, normalised by layer")
def lora_one(
    gradient: Gradient,
    rank: int,
    generator: torch.Generator,
    gamma: float = 128.0,
    normalize: str = "layer",
    variant: str = "algorithm1",
) -> Factors:
    """The r leading triplets of the negative gradient, split evenly.

    Args:
        gradient: G, kept at a rank of r at least; the reference takes 8 examples.
        rank: r, at most min(m, n).
        generator: draws directions where G has fewer than r of them.
        gamma: γ, which divides the step.
        normalize: what S is divided by: "layer" this layer's S₁, "global" the largest S₁ of all layers, so that they
            keep their proportions, "none" nothing.
        variant: "algorithm1" √S in both factors, "squared" S in both, "orthonormal" no S at all and anchored.

    Returns:
        Factors that are not anchored and point downhill, ⟨B₀·A₀, G⟩ < 0. Where G has fewer than r directions, the rest
        of B₀ is zero and the rest of A₀ is random, so that all of them train. "orthonormal" is anchored.

    Raises:
        BadRank, BadOption, NoSignal: as their names say.
        MissingStatistic: if "global" is asked of one layer alone.

    Example:
        >>> from headstart.statistics import GradientSum
        >>> generator = torch.Generator().manual_seed(0)
        >>> gradient = GradientSum(torch.diag(torch.tensor([8.0, 4.0, 2.0])), generator, count=1.0)
        >>> start = lora_one(gradient, 2, generator, gamma=4.0)
        >>> (start.B @ start.A).diagonal().round(decimals=4).tolist(), start.anchored
        ([-0.25, -0.125, 0.0], False)
    """
    check_choice("normalize", normalize, NORMALIZE)
    check_choice("variant", variant, VARIANTS)
    check_above_zero("gamma", gamma)
    check_rank(gradient.shape, rank, min(gradient.shape))
    # Deviation: G is the mean over tokens, at rank 4r or exact. The reference means over batches, sums in bfloat16, and
    # takes an SVD of 512 columns and 16 iterations, which is the same subspace for 270 times the cost.
    U, S, V = leading(gradient, rank, generator)
    facts = {"effective_rank": int((S > 0).sum()), "largest": float(S[0]), **quality(gradient, rank)}
    V = with_fresh_directions(V, S, generator)
    if variant == "orthonormal":
        size = torch.full_like(S, gradient.shape[0] ** 0.25 / gamma**0.5)
        B, A = split(U, size, V)
        return Factors(A, B, anchored=True, facts=facts)
    share = S / _unit(gradient, normalize, float(S[0]))
    B, A = split(-U, (share if variant == "squared" else share.sqrt()) / gamma**0.5, V)
    return Factors(A, B, facts=facts)


def _unit(gradient: Gradient, normalize: str, own: float) -> float:
    """What a singular value of one is."""
    if normalize == "none":
        return 1.0
    if normalize == "layer":
        return own
    if gradient.largest is None:
        raise MissingStatistic(
            "normalize='global' needs the largest gradient of all layers: start them together with adapt(data=...), "
            "or choose normalize='layer'"
        )
    return gradient.largest
