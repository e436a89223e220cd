r"""EVA: look where the inputs vary most.

    Σ  = E[(x − μ)·(x − μ)ᵀ] = V·Λ·Vᵀ, Λ descending                   x, μ: (n,), Σ: (n, n)
    A₀ = V_rᵀ                                                         A₀: (r, n)
    B₀ = 0                                                            B₀: (m, r)
    y  = W·x + s·B·A·x

The output is unchanged at step zero, and of all A with orthonormal rows this one gives B the largest expected gradient:
E‖∂L/∂B‖² grows with tr(A·Σ·Aᵀ). The shares λᵢ/tr Σ of the explained variance say how many directions a layer is worth;
`headstart.lora.ranks` hands out a rank budget by them.

Paischer, Hauzenberger, Schmied, Alkin, Deisenroth, Hochreiter (2024), "Parameter Efficient Fine-tuning via Explained
Variance Adaptation", arXiv 2410.07170 (NeurIPS 2025), section 3 and theorem 3.2. The reference repository and PEFT go
through the data with an incremental PCA, batch by batch, until the directions no longer turn.
"""

from __future__ import annotations

import torch

from headstart.errors import NoSignal
from headstart.inits.checks import check_rank, check_rows
from headstart.inits.split import certified
from headstart.inits.strategy import Factors, register
from headstart.statistics import InputSpectrum, Moments


@register("eva", paper="https://arxiv.org/abs/2410.07170", fact="the r main directions of the inputs in A, zeros in B")
def eva(
    inputs: Moments | InputSpectrum,
    shape: tuple[int, int],
    rank: int,
    whiten: bool = False,
) -> Factors:
    """The r leading principal directions of the inputs as A, and B = 0.

    Args:
        inputs: Σ and μ, of more than r tokens.
        shape: (m, n) of the weight seen as a matrix.
        rank: r, at most n.
        whiten: divide row i by √σᵢ, where σᵢ = √(N·λᵢ) is a singular value of the N centred rows, as the reference
            does. The rows are then the smaller, the more tokens there were.

    Returns:
        Factors with A₀·A₀ᵀ = I and B₀ = 0. `facts["explained"]` holds the shares λᵢ/tr Σ.

    Raises:
        BadRank, TooLittleData: as their names say.
        NoSignal: if the layer never ran, or always saw the same.

    Example:
        >>> inputs = Moments.empty(3)
        >>> inputs.add(torch.tensor([[9.0, 0, 4], [9, 0, -4], [9, 3, 0], [9, -3, 0]]))
        >>> start = eva(inputs, (5, 3), 2)
        >>> start.A.abs().round(decimals=4).tolist()
        [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
        >>> [round(share, 2) for share in start.facts["explained"]]
        [0.64, 0.36]
    """
    m, n = shape
    check_rank(shape, rank, n)
    check_rows(inputs, rank + 1)  # one is spent on the mean
    # Deviation: the exact covariance of all tokens, where an incremental PCA of rank 2r depends on their order.
    found = inputs.leading(rank, centred=True)
    varying = inputs.energy - float(inputs.mean @ inputs.mean)
    if not varying > 1e-6 * inputs.energy:
        raise NoSignal("the inputs are always the same: leave this layer out, or give data in which they vary")
    A = found.V.T.float()
    if whiten:
        sigma = (found.S * inputs.count).sqrt().float()
        # Deviation: a direction without variance keeps its length, where the reference divides by zero.
        A = A / torch.where(sigma > 0, sigma.sqrt(), 1.0)[:, None]
    facts = {**certified(found), "explained": (found.S / varying).tolist()}
    return Factors(A, A.new_zeros(m, rank), facts=facts)
