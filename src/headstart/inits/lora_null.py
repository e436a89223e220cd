r"""LoRA-Null: learn only from what the data to preserve never shows.

    C = E[x·xᵀ] on the data to preserve                               C: (n, n)
    P = the r trailing eigenvectors of C                              P: (n, r)

    mode="v1"        W·P·Pᵀ = U·S·Vᵀ                                  W: (m, n)
                     B₀ = U·√(S/s), A₀ = √(S/s)·Vᵀ                    B₀: (m, r), A₀: (r, n)
                     y  = W·x + s·(B·A − B₀·A₀)·x
    mode="frozen"    A = Pᵀ, frozen, B₀ = 0
                     y  = W·x + s·B·A·x

The output is unchanged at step zero. "v1" trains both factors from there and may drift away. "frozen" keeps what it
promises for ever: A·x stays as small on the preserved data as its trailing eigenvalues say, whatever B learns.

Tang, Hu, Liu, Ding, Zhang, Wu, Zhang (2025), "Put the Space of LoRA Initialization to the Extreme to Preserve
Pre-trained Knowledge" (AAAI 2026; at first "LoRA-Null: Low-Rank Adaptation via Null Space for Large Language Models"),
arXiv 2503.02659. "v1" is `singular_aware` of its repository, "frozen" is `singular_aware_2` trained with a frozen A.
There a full SVD of W·P·Pᵀ is taken; the thin W·P has the same.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.inits.blocks import times
from headstart.inits.checks import check_choice, check_fit, check_rows, check_scaling, check_values
from headstart.inits.split import NOTHING, split
from headstart.inits.strategy import Factors, register
from headstart.statistics import Moments


@register(
    "lora_null",
    paper="https://arxiv.org/abs/2503.02659",
    fact="the r inputs that data uses least; a float64 C",
    preserving={},
)
def lora_null(
    weight: Float[Tensor, "m n"],
    inputs: Moments,
    rank: int,
    scaling: float,
    mode: str = "v1",
) -> Factors:
    """W on the r input directions that the data to preserve uses least, or those directions themselves.

    Args:
        weight: W, of any float dtype and layout; it is never copied whole.
        inputs: C of the data to preserve, not of the data to learn; of many more tokens than n, or the directions that
            are small are those that it happened not to show.
        rank: r, at most min(m, n).
        scaling: s > 0; the product s·B₀·A₀ does not depend on it.
        mode: "v1" or "frozen".

    Returns:
        "v1": anchored factors with s·B₀·A₀ = W·P·Pᵀ. "frozen": A·Aᵀ = I, A frozen, and B₀ = 0. A's rows lie in P in
        both, also where W·P has fewer than r directions and the rest of B₀ is zero. `facts["seen"]` is the share of the
        inputs' energy that P lets through.

    Raises:
        BadRank, BadAlpha, BadOption, NonFiniteWeight, MetaWeight, TooLittleData, NoSignal: as their names say.

    Example:
        >>> inputs = Moments.empty(3)
        >>> inputs.add(torch.diag(torch.tensor([3.0, 0.1, 2.0])))
        >>> start = lora_null(torch.eye(3), inputs, 1, 2.0)
        >>> (2.0 * start.B @ start.A).diagonal().round(decimals=4).tolist()
        [0.0, 1.0, 0.0]
        >>> f"{start.facts['seen']:.4f}"
        '0.0008'
    """
    check_choice("mode", mode, ("v1", "frozen"))
    check_fit(weight, rank)
    check_values(weight)
    check_rows(inputs, rank)
    values, vectors = torch.linalg.eigh(inputs.dense())
    P = vectors[:, :rank]
    facts = {"seen": float(values[:rank].clamp_min(0).sum() / values.sum())}
    if mode == "frozen":
        A = P.T.float()
        return Factors(A, A.new_zeros(len(weight), rank), frozen=frozenset("A"), facts=facts)
    check_scaling(scaling)
    # Deviation: divided by s, and the weight stays as it is; see `pissa`.
    U, S, Vh = torch.linalg.svd(times(weight, P), full_matrices=False)
    S = torch.where(NOTHING * S[0] < S, S, 0.0)
    B, A = split(U, (S / scaling).sqrt(), P @ Vh.T)
    return Factors(A, B, anchored=True, facts={**facts, "effective_rank": int((S > 0).sum())})
