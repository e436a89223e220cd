r"""SC-LoRA: write where the new data speaks and the old data is silent.

    M  = (1 − β)·E₊[y·yᵀ] − β·E₋[y·yᵀ], y = W·x                       M: (m, m)
       = W·((1 − β)·C₊ − β·C₋)·Wᵀ                                     W: (m, n), C: (n, n)
    Q  = the r leading eigenvectors of M                              Q: (m, r)
    B₀ = Q                                                            B₀: (m, r)
    A₀ = Qᵀ·W/s                                                       A₀: (r, n)
    y  = W·x + s·(B·A − B₀·A₀)·x

E₊ is the mean over the data to learn, E₋ over the data to preserve. The output is unchanged at step zero, and what the
adapter writes at first lies where the layer's outputs on the one are large and on the other small. β = 0 is the best
approximation of the outputs on the new data, β = 1 cares for the old alone.

Luo, Kuang, Wang, Liu, He (2025), "SC-LoRA: Balancing Efficient Fine-tuning and Knowledge Preservation via
Subspace-Constrained LoRA", arXiv 2505.23724, section 4.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.errors import BadOption
from headstart.inits.blocks import times
from headstart.inits.checks import check_fit, check_rows, check_scaling, check_values
from headstart.inits.strategy import Factors, register
from headstart.statistics import Moments


@register("sc_lora", paper="https://arxiv.org/abs/2505.23724", fact="the outputs of new data less those of old data")
def sc_lora(
    weight: Float[Tensor, "m n"],
    inputs: Moments,
    preserved: Moments,
    rank: int,
    scaling: float,
    generator: torch.Generator,
    beta: float = 0.5,
) -> Factors:
    """The projection of W onto the outputs that the data to learn has and the data to preserve has not.

    Args:
        weight: W, of any float dtype and layout; it is copied whole, in float64, where m > n.
        inputs: C₊, of the data to learn.
        preserved: C₋, of the data to preserve.
        rank: r, at most min(m, n).
        scaling: s > 0; the product s·B₀·A₀ does not depend on it.
        generator: draws directions in which W writes nothing, where M has fewer than r that gain.
        beta: β, from 0 to 1: what preserving weighs. The paper takes 0.5 to 0.9.

    Returns:
        Anchored factors with B₀ᵀ·B₀ = I and s·B₀·A₀ = Q·Qᵀ·W, so that every direction trains.

    Raises:
        BadRank, BadAlpha, BadOption, NonFiniteWeight, MetaWeight, TooLittleData, NoSignal: as their names say.

    Example:
        >>> new, old = Moments.empty(3), Moments.empty(3)
        >>> new.add(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
        >>> old.add(torch.diag(torch.tensor([3.0, 0.0, 1.0])))
        >>> start = sc_lora(torch.eye(3), new, old, 1, 1.0, torch.Generator())
        >>> (start.B @ start.A).diagonal().tolist()
        [0.0, 1.0, 0.0]
    """
    check_scaling(scaling)
    check_fit(weight, rank)
    check_values(weight)
    check_rows(inputs, rank)
    check_rows(preserved, rank, "inputs on the data to preserve")
    if not 0 <= beta <= 1:
        raise BadOption(f"beta is {beta!r}: choose 0 (learn) to 1 (preserve)")
    # Deviation: every token counts by its own size. The reference divides each sample's outputs by |max y|.
    D = inputs.dense().mul_(1 - beta).sub_(preserved.dense(), alpha=beta)
    values, Q = _eigenvectors(weight, D, rank, generator)
    # Deviation: divided by s, in A, so that the branch holds the same for every alpha, and B stays orthonormal.
    A = times(weight.T, Q).T / scaling
    facts = {"effective_rank": int(torch.linalg.matrix_rank(A)), "gains": int((values > 0).sum())}
    return Factors(A.float(), Q.float(), anchored=True, facts=facts)


def _eigenvectors(weight: Tensor, D: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The r largest eigenvalues of W·D·Wᵀ and their vectors, in float64, on the shorter side."""
    m, n = weight.shape
    if m <= n:
        values, vectors = torch.linalg.eigh(times(weight, times(weight, D).T))
        return values[-rank:].flip(0), vectors[:, -rank:].flip(1)
    basis, R = torch.linalg.qr(weight.detach().to(D.dtype))
    values, vectors = torch.linalg.eigh(R @ D @ R.T)
    values, vectors = values[-rank:].flip(0), basis @ vectors[:, -rank:].flip(1)
    # The m − n eigenvalues that the shorter side does not see are zero: they come before the negative ones.
    losing = values <= 0
    unseen = min(int(losing.sum()), m - n)
    if not unseen:
        return values, vectors
    noise = torch.randn(m, unseen, generator=generator).to(D)
    outside, _ = torch.linalg.qr(torch.cat([basis, noise], dim=1))
    order = [vectors[:, ~losing], outside[:, n:], vectors[:, losing]]
    return torch.cat([values[~losing], values.new_zeros(unseen), values[losing]])[:rank], torch.cat(order, 1)[:, :rank]
