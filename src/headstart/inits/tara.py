r"""TaRA: the part of W that the task's inputs reach and its loss cares about.

    Σ_y·W·Σ_x = U·S·Vᵀ                                                W: (m, n)
    Σ_x = E[x·xᵀ] + c·mean σ·I, Σ_y = E[δ·δᵀ] + c·mean σ·I            Σ_x: (n, n), Σ_y: (m, m)
    s·B₀·A₀ = Σ_y⁻¹·U_r·S_r·V_rᵀ·Σ_x⁻¹ = Σ_y⁻¹·U_r·U_rᵀ·Σ_y·W
    y  = W·x + s·(B·A − B₀·A₀)·x

δ is the gradient of the layer's output. The output is unchanged at step zero, and s·B₀·A₀ is the best approximation of
W of rank r if an error counts by how it changes the loss on the task. With Σ_y = I it is CorDA, with both it is PiSSA.

V_rᵀ·Σ_x⁻¹ = S_r⁻¹·U_rᵀ·Σ_y·W, so that of the two inverses one solve with r columns remains.

Task-aware rank-r adaptation, "TaRA" (POSTECH, 2026), read in full text; no reference repository was found.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.errors import TooLittleData
from headstart.inits.blocks import times
from headstart.inits.checks import check_above_zero, check_fit, check_rows, check_values
from headstart.inits.split import split_product
from headstart.inits.strategy import Factors, register
from headstart.inits.weighted import Weighted, damped, leading
from headstart.statistics import InputSpectrum, Moments


@register(
    "tara",
    paper="https://scholar.google.com/scholar?q=TaRA+task-aware+low-rank+adaptation",
    fact="the part of W that inputs reach and the loss cares about",
)
def tara(
    weight: Float[Tensor, "m n"],
    inputs: Moments | InputSpectrum,
    output_gradients: Moments,
    rank: int,
    scaling: float,
    generator: torch.Generator,
    damping: float = 0.01,
) -> Factors:
    """The r leading triplets of W between the metrics of its inputs and of its output gradients.

    Args:
        weight: W, of any float dtype and layout; it is never copied whole.
        inputs: Σ_x; output_gradients: Σ_y, of the same tokens.
        rank: r, at most min(m, n).
        scaling: s > 0; the product s·B₀·A₀ does not depend on it.
        generator: starts the iteration. The result depends on it below the tolerance only.
        damping: c, of the mean singular value of each metric. The paper finds less of it harmful.

    Returns:
        Anchored factors with s·B₀·A₀ = Σ_y⁻¹·U_r·U_rᵀ·Σ_y·W. Where that has fewer than r directions, the rest of B₀ is
        zero and the rest of A₀ is not, so that all of them train.

    Raises:
        BadRank, BadAlpha, BadOption, NonFiniteWeight, MetaWeight, TooLittleData, NoSignal: as their names say.

    Example:
        >>> inputs, gradients = Moments.empty(3), Moments.empty(3)
        >>> inputs.add(torch.diag(torch.tensor([1.0, 1.0, 2.0])))
        >>> gradients.add(torch.diag(torch.tensor([1.0, 3.0, 1.0])))
        >>> start = tara(torch.eye(3), inputs, gradients, 2, 1.0, torch.Generator().manual_seed(0))
        >>> (start.B @ start.A).diagonal().round(decimals=4).tolist()
        [0.0, 1.0, 1.0]
    """
    check_above_zero("damping", damping)
    check_fit(weight, rank)
    check_values(weight)
    check_rows(inputs, rank)
    check_rows(output_gradients, rank, "output gradients")
    m, n = weight.shape
    ridge = damping * output_gradients.energy / m
    right = damped(inputs.metric(), damping * inputs.energy / n)
    left = damped(output_gradients.metric(), ridge)
    U, facts = leading(Weighted(weight, right, left), rank, generator)
    sigma_y = output_gradients.dense()
    sigma_y.diagonal().add_(ridge)
    L, failed = torch.linalg.cholesky_ex(sigma_y)
    if failed:
        raise TooLittleData(
            f"{output_gradients.count} tokens leave Σ_y singular: give more data, or raise damping={damping}"
        )
    B = torch.cholesky_solve(U, L)
    # Deviation: an even split of the product. The paper's, √S on both sides, leaves both factors the units of their
    # metric: output gradients of 1e-4 make B a hundred million times A.
    return split_product(B, times(weight.T, left(U)).T, scaling, generator, facts)
