r"""LoRA-DA: begin with the natural gradient, in the directions that the data determines.

    Z  = E[x·xᵀ], d = E[δ²]                                           Z: (n, n), d: (m,)
    Δ  = −Z⁻¹·Gᵀ·diag(1/d), divided by its largest singular value σ   G: (m, n), Δ: (n, m)
    Ω  = −Δ·Δᵀ + β·(Σ 1/dᵢ)/(N·σ²)·Z⁻¹                                Ω: (n, n)
    P  = the r trailing eigenvectors of Ω                             P: (n, r)
    A₀ = Pᵀ/√γ                                                        A₀: (r, n)
    B₀ = Δᵀ·P/√γ                                                      B₀: (m, r)
    y  = W·x + s·B·A·x

δ is the gradient of the layer's output, G the mean gradient, and diag(d) ⊗ Z the Fisher matrix of the layer: −Δᵀ is
where the loss falls per bit, not per unit of weight. Ω weighs what a direction gains against how badly N tokens
determine it. The output does move at step zero. With Z = I, d = 1 and β = 0 this is LoRA-One with all of S in B.

Zhang, Chu, Peng, Li, Luo, Jiang, Huang (2025), "LoRA-DA: Data-Aware Initialization for Low-Rank Adaptation via
Asymptotic Analysis", arXiv 2510.24561 (ICML 2026); reference repository zqy0126/LoRA-DA.
"""

from __future__ import annotations

import torch

from headstart.errors import TooLittleData
from headstart.inits.checks import check_above_zero, check_rank, check_rows
from headstart.inits.gradients import Gradient, check_signal, quality
from headstart.inits.strategy import Factors, register
from headstart.linalg import topk_svd
from headstart.statistics import Moments, Squares


@register("lora_da", paper="https://arxiv.org/abs/2510.24561", fact="a natural gradient step where data determines it")
def lora_da(
    inputs: Moments,
    gradient: Gradient,
    output_squares: Squares,
    rank: int,
    generator: torch.Generator,
    gamma: float = 1024.0,
    beta: float = 0.03,
    damping: float = 0.01,
) -> Factors:
    """The r best directions of the natural gradient.

    Args:
        inputs: Z; gradient: G; output_squares: d, of the same tokens.
        rank: r, at most min(m, n).
        generator: starts the iteration that finds σ.
        gamma: γ, which divides the step.
        beta: β, what a badly determined direction costs.
        damping: what is added to Z and to d, of their means.

    Returns:
        Factors that are not anchored, with A₀·A₀ᵀ = I/γ, so that every direction trains.

    Raises:
        BadRank, BadOption, NoSignal: as their names say.
        TooLittleData: if Z is too singular for its damping.

    Example:
        >>> from headstart.statistics import GradientSum
        >>> inputs, squares = Moments.empty(2), Squares.empty(2)
        >>> inputs.add(torch.diag(torch.tensor([2.0, 1.0])))
        >>> squares.add(torch.ones(2, 2))
        >>> gradient = GradientSum(torch.diag(torch.tensor([3.0, 1.5])), torch.Generator(), count=1.0)
        >>> start = lora_da(inputs, gradient, squares, 1, torch.Generator(), gamma=1.0)
        >>> (start.B @ start.A).diagonal().round(decimals=2).tolist()  # the smaller gradient, but the rarer input
        [0.0, -1.0]
    """
    check_above_zero("gamma", gamma)
    check_above_zero("damping", damping)
    check_above_zero("beta", beta, or_zero=True)
    check_rank(gradient.shape, rank, min(gradient.shape))
    check_rows(inputs, rank)
    G = gradient.dense()
    check_signal(G)
    Z = inputs.dense()
    # Deviation: relative to the means, 0.01 of them. The reference adds 1e-6, in whatever units the loss has: to a Z of
    # around 1 that is next to nothing, and to a d of around 1e-11 so much that its Fisher matrix is I ⊗ Z.
    Z.diagonal().add_(damping * inputs.energy / inputs.features)
    d = output_squares.mean + damping * output_squares.mean.mean()
    L, failed = torch.linalg.cholesky_ex(Z)
    if failed:
        raise TooLittleData(f"{inputs.count} tokens leave Z singular: give more data, or raise damping={damping}")
    delta = -torch.cholesky_solve(G.T.double(), L) / d
    sigma = topk_svd(delta, 1, generator=generator).S[0]
    delta /= sigma
    # Deviation: N is the number of tokens seen, as d is per token. The reference takes the number of training examples.
    cost = beta * (1 / d).sum() / (inputs.count * sigma**2)
    omega = torch.cholesky_inverse(L).mul_(cost).sub_(delta @ delta.T)
    P = torch.linalg.eigh(omega).eigenvectors[:, :rank]
    facts = {"direction": float((delta.T * G).sum() / (delta.norm() * G.norm())), **quality(gradient, rank)}
    return Factors((P / gamma**0.5).T.float(), (delta.T @ P / gamma**0.5).float(), facts=facts)
