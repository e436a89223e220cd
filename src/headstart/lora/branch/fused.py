"""A layer and its branch, or the branch alone, as one autograd node."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from headstart.lora.branch.dropout import draw, kept, zero_
from headstart.lora.branch.gain import Watch, column_dots, gain_of, nonzero, reads_back, rescale
from headstart.lora.branch.product import multiply


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
        bias: b, outside DoRA's gain.
        A, B: the factors, usually float32; they are cast down to the dtype of the products.
        scaling: s.
        frozen: (A₀, B₀) of an anchored start.
        dropout: the probability that an entry of x is dropped; 0 in evaluation.
        magnitude, norm: DoRA's magnitude and the row norms of W + s·B·A, a constant for autograd (the paper's 4.3).
            A row of norm zero has gain one.
        transposed: `weight` is stored as transformers' Conv1D stores it.

    Returns:
        y, in x's dtype, or autocast's. Differentiable once.
    """
    W = weight.t() if transposed else weight
    dtype = _product_dtype(x)
    # Where the fused pass does not apply, F.linear's own rules, and its errors, do.
    if weight.requires_grad or not _ordinary(x, weight) or (dtype == x.dtype and dtype != weight.dtype):
        return _composed(x, W, bias, A, B, scaling, frozen, dropout, magnitude, norm)
    dropped, s = draw(x, dropout, scaling)
    A0, B0 = frozen or (None, None)
    gain = None if magnitude is None or norm is None else gain_of(magnitude, norm)
    return _fused(dtype, s, None, x, W, bias, A, B, A0, B0, gain, dropped)


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

    The arguments are those of `linear`; the result has y's dtype.
    """
    if not _ordinary(x, y):
        return y + _delta(x.to(y.dtype), A, B, scaling, frozen, dropout)
    dropped, s = draw(x, dropout, scaling)
    A0, B0 = frozen or (None, None)
    return _fused(y.dtype, s, y, x, None, None, A, B, A0, B0, None, dropped)


def _ordinary(*tensors: Tensor) -> bool:
    """Whether they hold plain memory: no compiler's or functorch's, and of no subclass that only F.linear multiplies.

    FakeTensor counts as plain: whoever traces what a step keeps wants to see what a real one would.
    """
    plain = (Tensor, FakeTensor)
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return False
    return all(type(t.detach()) in plain and not t.is_meta for t in tensors)


def _product_dtype(x: Tensor) -> torch.dtype:
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype  # autocast leaves float64 alone
    return torch.get_autocast_dtype(x.device.type)


def _composed(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    frozen: tuple[Tensor, Tensor] | None,
    dropout: float,
    magnitude: Tensor | None,
    norm: Tensor | None,
) -> Tensor:
    """The equations in PyTorch's words: what a compiler fuses by itself, and what gives W a gradient."""
    gain = None if magnitude is None or norm is None else gain_of(magnitude, norm)
    y = F.linear(x, W, bias if gain is None else None)
    y = y + _delta(x.to(y.dtype), A, B, scaling, frozen, dropout)
    if gain is None:
        return y
    return (y * gain if bias is None else torch.addcmul(bias, y, gain)).to(y.dtype)


def _delta(
    x: Tensor, A: Tensor, B: Tensor, scaling: float, frozen: tuple[Tensor, Tensor] | None, dropout: float
) -> Tensor:
    A0, B0 = frozen or (None, None)
    down, up = _pair(A, B, A0, B0, scaling, x.dtype)
    return F.linear(F.linear(F.dropout(x, dropout), down), up)


class _Branch(torch.autograd.Function):
    """`linear`; and `add_branch`, where `base` stands for W·x + b."""

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
        gain: Tensor | None,
        dropped: Tensor | None,
    ) -> Tensor:
        _, _, _, _, _, _, A_asks, B_asks, _, _, gain_asks, _ = ctx.needs_input_grad
        y = x.new_empty(*x.shape[:-1], len(B), dtype=dtype)
        Y, Z, output = y.view(-1, len(B)), None, None
        with _without_autocast(x.device.type):
            X = _rows(x, dtype)
            down, up = _pair(A, B, A0, B0, s, dtype)
            h = kept(X, dropped) @ down.t()
            if W is None:
                assert base is not None
                torch.addmm(_rows(base, dtype), h, up.t(), out=Y)
            elif gain is None or not gain_asks:
                multiply((X, h), (W, up), Y, gain=gain, bias=bias)
            elif reads_back(bias, dtype):
                multiply((X, h), (W, up), Y, gain=nonzero(gain))
                Z, output = Y.data, Watch(Y)
            else:
                Z = multiply((X, h), (W, up), torch.empty_like(Y))
                rescale(Z, gain, bias, Y)
        ctx.dtype, ctx.x_dtype, ctx.s, ctx.output = dtype, x.dtype, s, output
        ctx.save_for_backward(
            x if A_asks or gain_asks else None,
            h[:, : len(A)].contiguous() if B_asks else None,
            *(Z, W, A, B, A0, B0, gain, dropped),
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, Z, W, A, B, A0, B0, gain, dropped = ctx.saved_tensors
        _, _, base_asks, x_asks, _, bias_asks, A_asks, B_asks, _, _, gain_asks, _ = ctx.needs_input_grad
        dx = dbias = dA = dB = dgain = None
        with _without_autocast(dy.device.type):
            dY = _rows(dy, ctx.dtype)
            down, up = _pair(A, B, A0, B0, ctx.s, ctx.dtype)
            if bias_asks:
                dbias = dY.sum(0)
            if gain_asks:
                intact = ctx.output is not None and not ctx.output.changed()
                if ctx.output is not None and not intact:
                    X = _rows(x, ctx.dtype)
                    Z = multiply((X, kept(X, dropped) @ down.t()), (W, up), torch.empty_like(Z))
                dgain = column_dots(dY, Z, gain.dtype)
                if intact:
                    dgain /= nonzero(gain)
            if gain is not None:
                dY = rescale(dY, gain, None, torch.empty_like(dY))
            if B_asks:
                dB = (dY.t() @ h).to(B.dtype) * ctx.s
            if A_asks or x_asks:
                dh = dY @ up
            if A_asks:
                dAx = dh if A0 is None else dh[:, : len(A)] + dh[:, len(A) :]
                dA = (dAx.t() @ kept(_rows(x, ctx.dtype), dropped)).to(A.dtype)
            if x_asks:
                dX = dY.new_empty(len(dY), A.shape[1])
                if W is None:
                    zero_(torch.mm(dh, down, out=dX), dropped)
                elif dropped is None:
                    multiply((dY, dh), (W.t(), down.t()), dX)
                else:
                    multiply((dY,), (W.t(),), dX).add_(zero_(dh @ down, dropped))
                dx = dX.view(*dy.shape[:-1], A.shape[1]).to(ctx.x_dtype)
        return None, None, dy if base_asks else None, dx, None, dbias, dA, dB, None, None, dgain, None


_fused: Callable[..., Tensor] = _Branch.apply


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _rows(x: Tensor, dtype: torch.dtype) -> Float[Tensor, "T n"]:
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _pair(
    A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None, s: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`down` (R, n) and `up` (m, R), with up·down = s·(B·A − B₀·A₀). Subtracted and scaled before being cast down."""
    if dtype == torch.float64:
        A, B = A.double(), B.double()
    if A0 is not None and B0 is not None:
        A, B = torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)
    return A.to(dtype), (B if s == 1 else B * s).to(dtype)
