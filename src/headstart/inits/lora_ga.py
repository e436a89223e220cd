r"""LoRA-GA: begin so that the first step of LoRA resembles the first step of full fine-tuning.

    G  = E[∂L/∂W] = U·S·Vᵀ                                            G: (m, n)
    B₀ = m^¼/√γ·U_{r+1..2r}                                           B₀: (m, r)
    A₀ = m^¼/√γ·V_{1..r}ᵀ                                             A₀: (r, n)
    y  = W·x + s·(B·A − B₀·A₀)·x

The output is unchanged at step zero, and its first change, s²·(B₀·B₀ᵀ·G + G·A₀ᵀ·A₀), holds the 2r leading directions of
G: the best that factors of rank r can do. Both factors are orthonormal but for their size, which the singular values
do not enter.

Wang, Yu, Li (2024), "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000 (NeurIPS 2024),
theorems 3.1 and 3.2. The reference repository Outsider565/LoRA-GA writes W − s·B₀·A₀ into the weight. PEFT's
`init_lora_weights="lora_ga"` is another start: it multiplies B by the singular values of G and leaves A at length one,
so that B follows the scale of the loss, and for a language model is nearly zero.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.inits.checks import check_above_zero, check_choice, check_fit, check_scaling, check_values
from headstart.inits.gradients import Gradient, leading, quality
from headstart.inits.strategy import Factors, register
from headstart.linalg import topk_svd

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "gd", "unit", "weights")


@register(
    "lora_ga",
    paper="https://arxiv.org/abs/2407.05000",
    fact="the 2r main directions of the gradient, anchored",
    scales=True,
)
def lora_ga(
    weight: Float[Tensor, "m n"],
    gradient: Gradient,
    rank: int,
    scaling: float,
    generator: torch.Generator,
    direction: str = "ArB2r",
    scale: str = "stable",
    gamma: float = 16.0,
) -> Factors:
    """Two halves of the 2r leading singular directions of the gradient.

    Args:
        weight: W, of any float dtype and layout; its values are used with scale "weights" alone.
        gradient: G, kept at a rank of 2r at least.
        rank: r, at most min(m, n).
        scaling: s > 0. Unlike in most anchored starts, s·B₀·A₀ grows with it, as in the paper.
        generator: draws the halves where direction is "random".
        direction: which of the 2r directions A and B get: "ArB2r" the first and the second half, "A2rBr" the second
            and the first, "ArBr" the even and the odd, "random".
        scale: of both factors: "stable" m^¼/√γ, "gd" 1/s, "unit" 1, "weights" the mean of √(σᵢ(W)/s) over i ≤ r.
        gamma: γ of "stable": the larger, the smaller the start.

    Returns:
        Anchored factors with A₀·A₀ᵀ and B₀ᵀ·B₀ multiples of I, so that every direction trains.

    Raises:
        BadRank, BadAlpha, BadOption, NonFiniteWeight, MetaWeight, NoSignal: as their names say.

    Example:
        >>> from headstart.statistics import GradientSum
        >>> generator = torch.Generator().manual_seed(0)
        >>> gradient = GradientSum(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])), generator, count=1.0)
        >>> start = lora_ga(torch.zeros(4, 4), gradient, 2, 1.0, generator, scale="unit")
        >>> start.A.abs().round(decimals=4).tolist(), start.B.T.abs().round(decimals=4).tolist()
        ([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    """
    check_choice("direction", direction, DIRECTIONS)
    check_choice("scale", scale, SCALES)
    check_above_zero("gamma", gamma)
    check_scaling(scaling)
    check_fit(weight, rank)
    check_values(weight)
    m, n = weight.shape
    # Deviation: where a weight has fewer than 2r directions the halves overlap; the reference fails there.
    U, S, V = leading(gradient, min(2 * rank, m, n), generator)
    own, other = _halves(direction, rank, len(S), generator)
    size = _size(scale, weight, rank, scaling, gamma, generator)
    # Deviation: G is the mean over tokens, the reference's over batches. Its scale does not matter here.
    facts = {"effective_rank": int((S > 0).sum()), "size": size, **quality(gradient, rank)}
    return Factors((size * V[:, own]).T, size * U[:, other], anchored=True, facts=facts)


def _halves(direction: str, rank: int, known: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which of the known directions A gets, and which B."""
    order = torch.arange(known)
    if direction == "random":
        # Deviation: none from the reference. PEFT gives both factors the same half.
        order = torch.randperm(known, generator=generator)
    if direction == "ArBr" and known == 2 * rank:
        return order[1::2], order[0::2]
    first, second = order[:rank], order[-rank:]
    return (second, first) if direction == "A2rBr" else (first, second)


def _size(scale: str, weight: Tensor, rank: int, scaling: float, gamma: float, generator: torch.Generator) -> float:
    """The length of a row of A and of a column of B."""
    if scale == "weights":
        return float((topk_svd(weight, rank, generator=generator).S / scaling).sqrt().mean())
    sizes: dict[str, float] = {"stable": weight.shape[0] ** 0.25 / gamma**0.5, "gd": 1 / scaling, "unit": 1.0}
    return sizes[scale]
