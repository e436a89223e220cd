r"""GoRA: B begins as the gradient step that a random A allows.

    A₀ ~ U(−1/√n, 1/√n)                                               A₀: (r, n)
    B₀ = −(γ/s)·√(n/r)·G·A₀⁺, G = E[∂L/∂W]                            B₀: (m, r), G: (m, n)
    y  = W·x + s·B·A·x

s·B₀·A₀ = −γ·√(n/r)·G·P, with P the projection onto the rows of A₀. A random P keeps r/n of the energy of G, so that the
root makes the step as long as −γ·G, a full one of rate γ. The output does move at step zero, downhill. The other half
of the paper shares a rank budget among the layers by mean |W∘G|: `headstart.lora.ranks`.

He, Ye, Ren, Yuan, Zhou, Ju, Chen (2025), "GoRA: Gradient-driven Adaptive Low Rank Adaptation", arXiv 2502.12171
(NeurIPS 2025), section 3. The reference repository hhnqqq/MyTransformers has lost the minus sign in its current
version, but still measures its error against −γ·G; its first release has it.
"""

from __future__ import annotations

import torch

from headstart.inits.checks import check_above_zero, check_rank, check_scaling
from headstart.inits.gradients import Gradient, check_signal
from headstart.inits.kaiming import kaiming
from headstart.inits.strategy import Factors, register


@register("gora", paper="https://arxiv.org/abs/2502.12171", fact="noise in A, the gradient step that it allows in B")
def gora(gradient: Gradient, rank: int, scaling: float, generator: torch.Generator, gamma: float = 0.05) -> Factors:
    """Kaiming's A, and the B that brings B·A nearest to a step against the gradient.

    Args:
        gradient: G. A random A sees its tail as well as its head: kept at rank 4r, B is off by 4 to 34 % of its length
            (measured on SmolLM2), all of it missing and none of it wrong; exact, by nothing.
        rank: r, at most min(m, n).
        scaling: s > 0; the product s·B₀·A₀ does not depend on it.
        generator: draws A.
        gamma: γ, the rate of the step.

    Returns:
        Factors that are not anchored and point downhill, ⟨B₀·A₀, G⟩ ≤ 0.

    Raises:
        BadRank, BadAlpha, BadOption, NoSignal: as their names say.

    Example:
        >>> from headstart.statistics import GradientSum
        >>> generator = torch.Generator().manual_seed(0)
        >>> gradient = GradientSum(torch.eye(2), generator, count=1.0)
        >>> start = gora(gradient, 2, 4.0, generator, gamma=0.5)
        >>> (4.0 * start.B @ start.A).diagonal().round(decimals=4).tolist()
        [-0.5, -0.5]
    """
    check_scaling(scaling)
    check_above_zero("gamma", gamma)
    check_rank(gradient.shape, rank, min(gradient.shape))
    m, n = gradient.shape
    G = gradient.dense()
    check_signal(G)
    A = kaiming((m, n), rank, generator).A.to(G.device)
    step = -gamma / scaling * (n / rank) ** 0.5
    # Deviation: a QR least-squares solution, where the reference inverts A·Aᵀ + 1e-8·I.
    Q, R = torch.linalg.qr(A.double().T)
    B = step * torch.linalg.solve_triangular(R, (G @ Q.float()).double().T, upper=True).T
    return Factors(A, B.float())
