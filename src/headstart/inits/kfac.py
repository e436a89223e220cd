r"""K-FAC frames: train r² numbers between the main directions of a layer's inputs and of its output gradients.

    E[x·xᵀ] = V·Λ·Vᵀ, E[δ·δᵀ] = U·M·Uᵀ, Λ and M descending            x: (n,), δ: (m,)
    B = U_r, A = V_rᵀ, both frozen                                    B: (m, r), A: (r, n)
    R₀ = 0                                                            R: (r, r)
    y = W·x + s·B·R·A·x

The output is unchanged at step zero. Every gradient of W is a sum of δ·xᵀ, so where the inputs lie mostly in V_r and
the output gradients in U_r, so do the gradients of all batches and, as far as the two stay what they are, of all steps;
the leading directions of one mean gradient (LoRA-SB) hold those that the first batches agree on. U and V are the axes
in which K-FAC approximates the Fisher matrix of W, and AdamW on R scales every pair of them by itself.

Headstart's own: the core of LoRA-XS (Bałazy, Banaei, Aberer, Tabor, 2024, arXiv 2405.17604), which takes the axes of W,
between the axes of K-FAC (Martens, Grosse, 2015, arXiv 1503.05671, section 3). docs/gap.md has the figures.
"""

from __future__ import annotations

from headstart.inits.checks import check_rank, check_rows
from headstart.inits.split import certified
from headstart.inits.strategy import Factors, register
from headstart.statistics import InputSpectrum, Moments


@register(
    "kfac",
    paper="https://arxiv.org/abs/1503.05671",
    fact="main axes of inputs and output gradients, frozen; r² numbers train",
)
def kfac(inputs: Moments | InputSpectrum, output_gradients: Moments, shape: tuple[int, int], rank: int) -> Factors:
    """The r leading directions on either side, and a core of zeros.

    Args:
        inputs: E[x·xᵀ]; output_gradients: E[δ·δᵀ], each of at least r tokens.
        shape: (m, n) of the weight seen as a matrix.
        rank: r, at most min(m, n).

    Returns:
        Factors with Bᵀ·B = A·Aᵀ = I, both frozen, and a core of zeros. `facts` hold which share of the inputs' and of
        the output gradients' energy the directions have.

    Raises:
        BadRank, TooLittleData, NoSignal: as their names say.

    Example:
        >>> import torch
        >>> inputs, gradients = Moments.empty(3), Moments.empty(2)
        >>> inputs.add(torch.diag(torch.tensor([1.0, 5.0, 2.0])))
        >>> gradients.add(torch.diag(torch.tensor([1.0, 3.0])))
        >>> start = kfac(inputs, gradients, (2, 3), 1)
        >>> start.A.abs().tolist(), start.B.abs().tolist()
        ([[0.0, 1.0, 0.0]], [[0.0], [1.0]])
    """
    check_rank(shape, rank, min(shape))
    check_rows(inputs, rank)
    check_rows(output_gradients, rank, "output gradients")
    right, left = inputs.leading(rank), output_gradients.leading(rank)
    A, B = right.V.T.float(), left.V.float()
    facts = {
        **certified(right),
        "inputs_held": float(right.S.sum()) / inputs.energy,
        "gradients_held": float(left.S.sum()) / output_gradients.energy,
    }
    return Factors(A, B, frozen=frozenset("AB"), core=A.new_zeros(rank, rank), facts=facts)
