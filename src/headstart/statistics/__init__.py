r"""Fixed-size running summaries of a layer's inputs and output gradients.

    Moments             Σ x·xᵀ, Σ x and the count                     x: (n,)
    InputSpectrum       V·S²·Vᵀ ≈ Σ x·xᵀ, of rank k, and Σ x          V: (n, k), where n × n is too big
    Squares             Σ δ²                                          δ: (m,)
    GradientSpectrum    U·S·Vᵀ ≈ G = Σ δ·xᵀ, of rank k                U: (m, k), V: (n, k)
    GradientSum         G itself                                      (m, n)

Each has a size known before the first row, takes rows in batches, and merges with another of its kind, so that the
processes of a distributed run may each see a part of the data. `NAMES` are the parameter names by which a strategy
asks for one, and what each stands for.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.statistics.gradient import GradientSpectrum, GradientSum
from headstart.statistics.moments import InputSpectrum, Metric, Moments, Squares

__all__ = ["NAMES", "GradientSpectrum", "GradientSum", "InputSpectrum", "Metric", "Moments", "Squares", "of_rows"]

NAMES = {
    "inputs": "Moments or InputSpectrum of the layer's inputs",
    "preserved": "Moments of the layer's inputs on the data to preserve",
    "gradient": "GradientSpectrum or GradientSum of the weight",
    "output_gradients": "Moments of the gradient of the layer's outputs",
    "output_squares": "Squares of the gradient of the layer's outputs",
}


def of_rows(
    X: Float[Tensor, "T n"], D: Float[Tensor, "T m"], preserved: Float[Tensor, "P n"], generator: torch.Generator
) -> dict[str, Any]:
    """Every statistic of a layer whose inputs, and the gradients of whose outputs, are known as rows.

    Example:
        >>> known = of_rows(torch.eye(3), torch.eye(3), torch.eye(3), torch.Generator())
        >>> sorted(known) == sorted(NAMES), known["gradient"].dense().diagonal().tolist()
        (True, [0.333..., 0.333..., 0.333...])
    """
    known: dict[str, Any] = {"inputs": Moments.empty(X.shape[1]), "preserved": Moments.empty(X.shape[1])}
    known |= {"output_gradients": Moments.empty(D.shape[1]), "output_squares": Squares.empty(D.shape[1])}
    for name, rows in (("inputs", X), ("preserved", preserved), ("output_gradients", D), ("output_squares", D)):
        known[name].add(rows)
    known["gradient"] = GradientSum(D.t() @ X, generator, count=float(len(X)))
    known["gradient"].largest = known["gradient"].norm()
    return known
