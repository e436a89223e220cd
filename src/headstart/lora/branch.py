r"""The LoRA branch as pure functions of (x, W, factors); no module is known here.

    y = W·x + b + s·B·A·d(x)                                         W: (m, n)   A: (r, n)   B: (m, r)
    y = W·x + b + s·(B·A − B₀·A₀)·d(x)          anchored                        A₀: (r, n)  B₀: (m, r)
    y = g·(W·x + s·B·A·d(x)) + b                DoRA: g = magnitude / norm                     g: (m,)

`d` is dropout, one draw for both pairs. Tokens are rows in the code: Y = X·Wᵀ.

The anchored difference is one pair of rank 2r, and not the obvious one:

    B·A − B₀·A₀ = [B − B₀ | B₀] · [A ; A − A₀]                       (m, 2r) · (2r, n)

At step zero two of its four blocks are zero, so the layer's output is the base's, to the bit, in every dtype. And what
training moved is rounded to bf16 as the small thing that it is: [B | −B₀]·[A ; A₀] rounds the large A and A₀ alike, and
loses any change below 2⁻⁹ of an entry. Two separate products of rank r cancel only where both come out of one kernel
alike, and read the output twice.

What a step keeps for its backward: x itself (the tensor that q, k and v share, no copy), h = A·x, r wide, and what
dropout dropped. Under DoRA also the output, which the next operation mostly keeps anyway (`_read_back`).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tokens that a float32 copy is made of at a time, and rows of W: the workspaces stay in cache and small beside a step.
TOKENS, ROWS = 1024, 512

# Below this many tokens, casting W to float32 costs more than the slow bf16 product that it replaces.
FEW_TOKENS = 32

# g stays this far from zero, so that the backward can divide the output by it (`_read_back`).
SMALLEST_GAIN = 2.0**-64

Pair: TypeAlias = tuple[Tensor, Tensor]


def linear(
    x: Float[Tensor, "*tokens n"],
    weight: Float[Tensor, "m n"],
    bias: Float[Tensor, " m"] | None,
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    scaling: float,
    *,
    frozen: tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]] | None = None,
    dropout: float = 0.0,
    magnitude: Float[Tensor, " m"] | None = None,
    norm: Float[Tensor, " m"] | None = None,
    transposed: bool = False,
) -> Float[Tensor, "*tokens m"]:
    """A linear layer and its LoRA branch in one pass.

    Args:
        x: the layer's input. Never cast up, never copied for the backward.
        weight: W, stored (n, m) where `transposed`. Its gradient is computed only if it asks for one.
        bias: b, outside DoRA's gain as in DoRA's own code.
        A, B: the factors, usually float32; they are cast down to the dtype of the products.
        scaling: s.
        frozen: (A₀, B₀) of an anchored start.
        dropout: the probability that an entry of x is dropped; 0 in evaluation.
        magnitude, norm: DoRA's magnitude and the row norms of W + s·B·A, a constant for autograd (the paper's 4.3).
            A row of norm zero has gain one.
        transposed: `weight` is stored as transformers' Conv1D stores it.

    Returns:
        y, in x's dtype, or autocast's. Equal to the frozen layer's output, to the rounding of its product, where
        B·A = B₀·A₀ (or B = 0) and the magnitude is the norm. Differentiable once.
    """
    W = weight.t() if transposed else weight
    autocast = torch.is_autocast_enabled(x.device.type)
    # F.linear's own rules and errors hold wherever the fused pass does not apply.
    if weight.requires_grad or not (autocast or x.dtype == weight.dtype) or torch.compiler.is_compiling():
        return _composed_linear(x, W, bias, A, B, scaling, frozen, dropout, magnitude, norm)
    A0, B0 = frozen or (None, None)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    dropped, s = _draw(x, dropout, scaling)
    y: Tensor = _Branch.apply(dtype, s, None, x, W, bias, A, B, A0, B0, magnitude, norm, dropped)
    return y


def add_branch(
    y: Float[Tensor, "*tokens m"],
    x: Float[Tensor, "*tokens n"],
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    scaling: float,
    *,
    frozen: tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "*tokens m"]:
    """y + s·(B·A − B₀·A₀)·d(x), for a layer that computed its output y itself: quantised, hooked or sharded.

    The arguments are those of `linear`. The result has y's dtype.
    """
    if y.dtype != x.dtype or torch.compiler.is_compiling():
        return y + _composed_branch(x.to(y.dtype), A, B, scaling, frozen, dropout)
    A0, B0 = frozen or (None, None)
    dropped, s = _draw(x, dropout, scaling)
    out: Tensor = _Branch.apply(y.dtype, s, y, x, None, None, A, B, A0, B0, None, None, dropped)
    return out


class _Branch(torch.autograd.Function):
    """`linear`, or `add_branch` where `base` stands for W·x + b."""

    @staticmethod
    def forward(
        ctx: Any,
        dtype: torch.dtype,
        s: float,
        base: Tensor | None,
        x: Tensor,
        W: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        A0: Tensor | None,
        B0: Tensor | None,
        magnitude: Tensor | None,
        norm: Tensor | None,
        dropped: Tensor | None,
    ) -> Tensor:
        _, _, _, x_needs, _, _, A_needs, B_needs, _, _, magnitude_needs, _, _ = ctx.needs_input_grad
        down, up = _pair(A, B, A0, B0, s, dtype)
        X = _rows(x, dtype)
        h = _kept(X, dropped) @ down.t()
        y = x.new_empty(*x.shape[:-1], len(B), dtype=dtype)
        Y, z = y.view(-1, len(B)), None
        if base is not None:
            torch.addmm(_rows(base, dtype), h, up.t(), out=Y)
        elif magnitude is None or norm is None:
            _multiply(Y, (X, h), (W, up), bias=bias)
        else:
            gain = _gain(magnitude, norm)
            if not magnitude_needs or _read_back(bias, dtype):
                _multiply(Y, (X, h), (W, up), gain=gain, bias=bias)
                z = Y.data
            else:
                z = _multiply(torch.empty_like(Y), (X, h), (W, up))
                _rescale(z, gain, bias, out=Y)
        ctx.dtype, ctx.s = dtype, s
        factors_needed = x_needs or A_needs or magnitude_needs
        ctx.save_for_backward(
            x if A_needs or magnitude_needs else None,
            W,
            bias,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError
