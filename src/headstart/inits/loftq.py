r"""LoftQ: quantise the base, and start from what that lost.

    Q_t       = q(W − s·B_{t−1}·A_{t−1}),   B₀·A₀ = 0                 W, Q: (m, n)
    s·B_t·A_t = U_r·S_r·V_rᵀ of W − Q_t,    t = 1 … T                 B: (m, r), A: (r, n)
    y = Q_T·x + s·B·A·x

The output starts closer to that of W than under QLoRA, whose B = 0 leaves the whole error of quantisation to be learnt.

Li, Yu, Liang, He, Karampatziakis, Chen, Zhao (2023), "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language
Models", arXiv 2310.08659, algorithm 1. The reference repository and PEFT forget s, and so apply the correction at the
wrong strength wherever α ≠ r; both take full decompositions, on a GPU alone. T = 5 in the paper and 1 in PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.inits.kaiming import kaiming
from headstart.inits.quantization import Step, best, check_count, leading, less, pair
from headstart.inits.strategy import Factors, register


@register(
    "loftq",
    paper="https://arxiv.org/abs/2310.08659",
    fact="the r largest directions of what quantising W loses; the base becomes the quantised W",
)
def loftq(
    weight: Float[Tensor, "m n"],
    rank: int,
    scaling: float,
    generator: torch.Generator,
    quantize: Callable[[Tensor], Tensor],
    kind: str = "linear",
    num_iter: int = 1,
) -> Factors:
    """The leading directions of the quantisation error, split evenly between A and B.

    Args:
        weight: W, of any float dtype and layout.
        rank: r, at most min(m, n).
        scaling: s > 0; the product s·B·A does not depend on it.
        generator: starts the decompositions.
        quantize: q, from a matrix to what is left of it in its own dtype.
        kind: "linear", "conv" or "embedding", for a layer that is left as plain quantisation has it.
        num_iter: T. With 1 the base is q(W), which every loader makes by itself; with more it is a base of its own,
            that has to travel with the adapter.

    Returns:
        Factors that replace the weight by q(W − s·B'·A'), with B'·A' in `taken`. `remaining` in the
        facts is ‖W − Q − s·B·A‖/‖W − q(W)‖, never above 1; at 1 the layer has B = 0.

    Raises:
        BadRank, BadAlpha, BadOption, NonFiniteWeight, SVDError: as their names say.

    Example:
        >>> W = torch.tensor([[1.25, 0.75], [0.75, 1.25]])
        >>> start = loftq(W, rank=1, scaling=0.5, generator=torch.Generator().manual_seed(0), quantize=torch.round)
        >>> (0.5 * start.B @ start.A).round(decimals=4).tolist()
        [[0.25, -0.25], [-0.25, 0.25]]
        >>> f"{start.facts['remaining']:.4f}"
        '0.0000'
    """

    def steps() -> Iterator[Step]:
        taken = None
        for _ in range(num_iter):
            Q = plain if taken is None else quantize(less(weight, taken))
            spectrum = leading(weight.float() - Q.float(), rank, generator)
            yield Step(spectrum, taken, Q)
            taken = pair(spectrum)

    check_count(num_iter)
    plain = quantize(weight)
    # Deviation: the step of the smallest error is kept instead of the last, since the error need not fall.
    return best(weight, plain, steps(), scaling, kaiming(tuple(weight.shape), rank, generator, kind))
