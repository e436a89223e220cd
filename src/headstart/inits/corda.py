r"""CorDA: the directions of W that matter on data, to learn in them or to keep clear of them.

    W·C = U·S·Vᵀ, C = E[x·xᵀ]                                         W: (m, n), C: (n, n)
    s·B₀·A₀ = U_Q·S_Q·V_Qᵀ·C⁻¹ = Q·Qᵀ·W                               Q: (m, r), columns of U
    y  = W·x + s·(B·A − B₀·A₀)·x

The output is unchanged at step zero. "ipm" (instruction-previewed) takes the r leading left vectors as Q: data of the
task to learn, and training begins in what W does with it. "kpm" (knowledge-preserved) takes the r trailing ones: data
of the knowledge to keep, and training stays where it has least to say.

V_Qᵀ·C⁻¹ = S_Q⁻¹·U_Qᵀ·W, so that no inverse is needed, and the product is a projection of W. The leading Q come from
products with W and C alone, the trailing ones from a triangular factor of W·C.

Yang, Li, Zhou, Song, Wu, Nie, Ghanem (2024), "CorDA: Context-Oriented Decomposition Adaptation of Large Language
Models for Task-Aware Parameter-Efficient Fine-tuning", arXiv 2406.05223 (NeurIPS 2024), section 3. The reference
repository and PEFT divide each sample's inputs by |max x|, add 0.01, 0.02, 0.04… of C's mean diagonal until C can be
inverted in float32, and write the residual into the weight; PEFT takes one sample a batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.inits.blocks import times
from headstart.inits.checks import check_above_zero, check_choice, check_fit, check_rows, check_values
from headstart.inits.split import split_product
from headstart.inits.strategy import Factors, register
from headstart.inits.weighted import Weighted, damped, leading, trailing
from headstart.statistics import InputSpectrum, Moments


@register(
    "corda",
    paper="https://arxiv.org/abs/2406.05223",
    fact="the part of W that is most, or least, used on data",
    preserving={"mode": "kpm"},
)
def corda(
    weight: Float[Tensor, "m n"],
    inputs: Moments | InputSpectrum,
    rank: int,
    scaling: float,
    generator: torch.Generator,
    mode: str = "ipm",
    damping: float = 0.01,
) -> Factors:
    """The projection of W onto the leading or trailing left vectors of W·C.

    Args:
        weight: W, of any float dtype and layout; it is never copied whole, except into W·C for "kpm".
        inputs: C. For "kpm", of the data to preserve; its whole C is needed there.
        rank: r, at most min(m, n).
        scaling: s > 0; the product s·B₀·A₀ does not depend on it.
        generator: starts the iteration. The result depends on it below the tolerance only.
        mode: "ipm" learns from the inputs, "kpm" preserves what they need.
        damping: what is added to C, of its mean diagonal. Without it, "kpm" would sort directions by rounding.

    Returns:
        Anchored factors with s·B₀·A₀ = Q·Qᵀ·W. Where that has fewer than r directions, the rest of B₀ is zero and the
        rest of A₀ is not, so that all of them train.

    Raises:
        BadRank, BadAlpha, BadOption, NonFiniteWeight, MetaWeight, TooLittleData, NoSignal: as their names say.
        MissingStatistic: if "kpm" is asked of inputs of which only the leading directions were kept.

    Example:
        >>> inputs = Moments.empty(4)
        >>> inputs.add(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
        >>> W = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        >>> generator = torch.Generator().manual_seed(0)
        >>> for mode in ("ipm", "kpm"):
        ...     start = corda(W, inputs, 2, 0.5, generator, mode)
        ...     (0.5 * start.B @ start.A).diagonal().abs().round(decimals=4).tolist()
        [0.0, 0.0, 2.0, 1.0]
        [4.0, 3.0, 0.0, 0.0]
    """
    check_choice("mode", mode, ("ipm", "kpm"))
    check_above_zero("damping", damping, or_zero=True)
    check_fit(weight, rank)
    check_values(weight)
    check_rows(inputs, rank)
    # Deviation: damped once, by the reference's first value. It doubles it for the sake of an inverse.
    ridge = damping * inputs.energy / inputs.features
    if mode == "ipm":
        Q, facts = leading(Weighted(weight, damped(inputs.metric(), ridge)), rank, generator)
    else:
        C = inputs.dense()
        C.diagonal().add_(ridge)
        Q, facts = trailing(times(weight, C), rank, generator)
    # Deviation: an even split of the product. The paper's, √S on both sides, leaves A C⁻¹ and with it the scale of the
    # data; with "kpm" it is 1e3 to 1e8 times B.
    return split_product(Q, times(weight.T, Q).T, scaling, generator, facts)
