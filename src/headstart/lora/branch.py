r"""The LoRA branch as pure functions of (x, W, factors): nothing here knows a module.

    y = W·x + b + s·B·A·d(x)                              plain          W: (m, n)   A: (r, n)   B: (m, r)
    y = W·x + b + s·(B·A − B₀·A₀)·d(x)                    anchored       A₀: (r, n)  B₀: (m, r)
    y = g·(W·x + s·(B·A [− B₀·A₀])·d(x)) + b              DoRA           g = magnitude / norm: (m,)

`d` is dropout, one mask for both pairs. The difference of the anchored case is computed as

    B·A − B₀·A₀ = [B − B₀ | B₀] · [A ; A − A₀]                           ranks: (m, 2r) · (2r, n)

which vanishes to the bit, in every dtype, where nothing has been trained, and casts the small differences down to
bf16 instead of the difference of two large roundings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# g is kept this far from zero, so that the backward can read W·x + s·B·A·x = (y − b) / g back from the output.
TINY = 2.0**-64


def linear(
    x: Float[Tensor, "... n"],
    weight: Float[Tensor, "m n"],
    bias: Float[Tensor, "m"] | None,
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    scaling: float,
    *,
    frozen: tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]] | None = None,
    dropout: float = 0.0,
    magnitude: Float[Tensor, "m"] | None = None,
    norm: Float[Tensor, "m"] | None = None,
    transposed: bool = False,
) -> Float[Tensor, "... m"]:
    """The frozen layer and its branch in one pass."""
    W = weight.t() if transposed else weight
    dtype = _compute_dtype(x)
    gain = None if magnitude is None or norm is None else _gain(magnitude, norm)
    y = F.linear(x, W, bias if gain is None else None)
    y = y + _delta(x.to(dtype), A, B, scaling, frozen, dropout)
    if gain is not None:
        y = (y * gain).to(y.dtype)
        if bias is not None:
            y = y + bias.to(y.dtype)
    return y


def add_branch(
    y: Float[Tensor, "... m"],
    x: Float[Tensor, "... n"],
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    scaling: float,
    *,
    frozen: tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "... m"]:
    """The branch alone, on top of an output that the layer computed itself (quantised, hooked or sharded)."""
    return y + _delta(x.to(_compute_dtype(x)), A, B, scaling, frozen, dropout).to(y.dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _delta(
    x: Tensor, A: Tensor, B: Tensor, scaling: float, frozen: tuple[Tensor, Tensor] | None, dropout: float
) -> Tensor:
    down, up = _pair(A, B, frozen)
    h = F.linear(F.dropout(x, dropout), down.to(x.dtype))
    return F.linear(h, up.to(x.dtype)) * scaling


def _pair(A: Tensor, B: Tensor, frozen: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The two factors of B·A − B₀·A₀."""
    if frozen is None:
        return A, B
    A0, B0 = frozen
    return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)


def _gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = magnitude / norm, and 1 where a row is zero."""
    zero = norm == 0
    return torch.where(zero, 1.0, magnitude / norm.masked_fill(zero, 1.0))
