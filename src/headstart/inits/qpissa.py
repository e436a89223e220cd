r"""QPiSSA: train the principal components at full precision, quantise what is left.

    s·B_t·A_t = U_r·S_r·V_rᵀ of W − Q_{t−1},  Q₀ = 0                  W, Q: (m, n)
    Q_t       = q(W − s·B_t·A_t),             t = 1 … T               B: (m, r), A: (r, n)
    y = Q_T·x + s·B·A·x

LoftQ from the other side: the first step takes W's largest directions away, and what remains has smaller outliers and
loses less in being quantised.

Meng, Wang, Zhang (2024), "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
arXiv 2404.02948, section 4 and appendix; the iteration is that of the reference repository, MuLabPKU/PiSSA,
`utils/init_qpissa.py`.
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
    "qpissa",
    paper="https://arxiv.org/abs/2404.02948",
    fact="PiSSA on a quantised residual: the base becomes what the r largest directions leave, quantised",
)
def qpissa(
    weight: Float[Tensor, "m n"],
    rank: int,
    scaling: float,
    generator: torch.Generator,
    quantize: Callable[[Tensor], Tensor],
    kind: str = "linear",
    num_iter: int = 5,
) -> Factors:
    """The principal directions and the quantised rest of W, fitted to each other.

    Args:
        weight: W, of any float dtype and layout.
        rank: r, at most min(m, n).
        scaling: s > 0; the product s·B·A does not depend on it.
        generator: starts the decompositions.
        quantize: q, from a matrix to what is left of it in its own dtype.
        kind: "linear", "conv" or "embedding", for a layer that is left as plain quantisation has it.
        num_iter: T.

    Returns:
        Factors that replace the weight by q(W − s·B·A), a base of their own that has to travel with them. `remaining`
        in the facts is ‖W − Q − s·B·A‖/‖W − q(W)‖, never above 1; at 1 the layer has q(W) and B = 0.

    Raises:
        BadRank, BadAlpha, BadOption, NonFiniteWeight, SVDError: as their names say.

    Example:
        >>> W = torch.tensor([[8.5, 0.0], [0.0, 1.0]])
        >>> start = qpissa(W, rank=1, scaling=2.0, generator=torch.Generator().manual_seed(0), quantize=torch.round)
        >>> (2.0 * start.B @ start.A).round(decimals=4).abs().tolist()
        [[8.5, 0.0], [0.0, 0.0]]
    """

    def steps() -> Iterator[Step]:
        residual = weight.float()
        for _ in range(num_iter):
            spectrum = leading(residual, rank, generator)
            taken = pair(spectrum)
            Q = quantize(less(weight, taken))
            yield Step(spectrum, taken, Q)
            residual = weight.float() - Q.float()

    check_count(num_iter)
    # Deviation: the step of the smallest error is kept instead of the last, since the error need not fall.
    return best(weight, quantize(weight), steps(), scaling, kaiming(tuple(weight.shape), rank, generator, kind))
