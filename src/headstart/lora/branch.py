r"""The LoRA branch as pure functions of (x, W, factors); no module is known here.

    y = W·x + b + s·B·A·d(x)                                         W: (m, n)   A: (r, n)   B: (m, r)
    y = W·x + b + s·(B·A − B₀·A₀)·d(x)          anchored                        A₀: (r, n)  B₀: (m, r)
    y = g·(W·x + s·B·A·d(x)) + b                DoRA: g = magnitude / norm                     g: (m,)

`d` is dropout, one draw for both pairs. Tokens are rows in the code: Y = X·Wᵀ.

The anchored difference is one pair of rank 2r, and not the obvious one:

    B·A − B₀·A₀ = [B − B₀ | B₀] · [A ; A − A₀]                       (m, 2r) · (2r, n)

At step zero two of its four blocks are zero, so the branch adds nothing, to the bit, in every dtype. And what training
moved is rounded to bf16 as the small thing that it is: [B | −B₀]·[A ; A₀], or two products of rank r, round the large A
and A₀, and lose any change below 2⁻⁹ of an entry. PiSSA's factors of a (2816, 1024) weight, each entry moved by 0.1 %,
1024 tokens (relative error of the branch; how many outputs a step-zero branch changes; CPU milliseconds of the branch):

                                     float32                      bfloat16
    this pair                        3e-7    0 %    6.8 ms        0.003    0 %   15.3 ms
    [B | −B₀]·[A ; A₀]               3e-4   23 %    7.1 ms        2.4      0 %   13.7 ms
    two products                     3e-4   17 %   11.8 ms        2.7     13 %   18.4 ms

What a step keeps for its backward: x itself (the tensor that q, k and v share, no copy), h = A·x, r wide, and what
dropout dropped. Under DoRA also the output, which the next operation mostly keeps anyway (`_read_back`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

# Rows of X and of W that are copied to float32 at a time (`_multiply_wide`).
TOKENS, ROWS = 1024, 512

# Below this many tokens, casting W to float32 costs more than the slow 16-bit product that it avoids.
FEW_TOKENS = 32

# g stays this far from zero, so that the backward can divide the output by it (`_read_back`).
SMALLEST_GAIN = 2.0**-64


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
    dropped, s = _draw(x, dropout, scaling)
    A0, B0 = frozen or (None, None)
    gain = None if magnitude is None or norm is None else _gain(magnitude, norm)
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
    dropped, s = _draw(x, dropout, scaling)
    A0, B0 = frozen or (None, None)
    return _fused(y.dtype, s, y, x, None, None, A, B, A0, B0, None, dropped)


def _ordinary(*tensors: Tensor) -> bool:
    """Whether they hold plain memory: no compiler's, and of no subclass that only F.linear knows how to multiply.

    FakeTensor counts as plain: whoever traces what a step keeps wants to see what a real one would.
    """
    plain = (Tensor, FakeTensor)
    return not torch.compiler.is_compiling() and all(type(t.detach()) in plain and not t.is_meta for t in tensors)


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
    gain = None if magnitude is None or norm is None else _gain(magnitude, norm)
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
            h = _kept(X, dropped) @ down.t()
            if W is None:
                assert base is not None
                torch.addmm(_rows(base, dtype), h, up.t(), out=Y)
            elif gain is None or not gain_asks:
                _multiply((X, h), (W, up), Y, gain=gain, bias=bias)
            elif _read_back(bias, dtype):
                _multiply((X, h), (W, up), Y, gain=_nonzero(gain))
                Z, output = Y.data, _Watch(Y)
            else:
                Z = _multiply((X, h), (W, up), torch.empty_like(Y))
                _rescale(Z, gain, bias, Y)
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
                    Z = _multiply((X, _kept(X, dropped) @ down.t()), (W, up), torch.empty_like(Z))
                dgain = _column_dots(dY, Z, gain.dtype)
                if intact:
                    dgain /= _nonzero(gain)
            if gain is not None:
                dY = _rescale(dY, gain, None, torch.empty_like(dY))
            if B_asks:
                dB = (dY.t() @ h).to(B.dtype) * ctx.s
            if A_asks or x_asks:
                dh = dY @ up
            if A_asks:
                dAx = dh if A0 is None else dh[:, : len(A)] + dh[:, len(A) :]
                dA = (dAx.t() @ _kept(_rows(x, ctx.dtype), dropped)).to(A.dtype)
            if x_asks:
                dX = dY.new_empty(len(dY), A.shape[1])
                if W is None:
                    _zero_(torch.mm(dh, down, out=dX), dropped)
                elif dropped is None:
                    _multiply((dY, dh), (W.t(), down.t()), dX)
                else:
                    _multiply((dY,), (W.t(),), dX).add_(_zero_(dh @ down, dropped))
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
    """`down` (R, n) and `up` (m, R), with up·down = s·(B·A − B₀·A₀). Subtracted and scaled before they are cast."""
    if A0 is not None and B0 is not None:
        A, B = torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)
    return A.to(dtype), (B if s == 1 else B * s).to(dtype)


# --- DoRA's gain -----------------------------------------------------------------------------------------------------


def _gain(magnitude: Float[Tensor, " m"], norm: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """magnitude / norm; a zero row has no direction to rescale, and no gradient."""
    norm = norm.detach()
    zero = norm == 0
    return (magnitude / norm.masked_fill(zero, 1)).masked_fill(zero, 1)


def _nonzero(gain: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    return gain.masked_fill(gain.abs() < SMALLEST_GAIN, SMALLEST_GAIN)


def _read_back(bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether z = W·x + s·B·A·x comes back from y = g·z by a division.

    Then the output is kept in z's place, which costs nothing wherever the next operation keeps it too. Not from under
    a bias, that may be much larger than z, and not in float16, where a small g·z loses its digits.
    """
    return bias is None and dtype != torch.float16


class _Watch:
    """Tells whether a later operation overwrote `y` in place, as ReLU(inplace=True) may after any linear layer.

    Autograd would raise; the backward can do better and compute z again. The watch shares y's version counter, and
    holds none of its memory.
    """

    def __init__(self, y: Tensor) -> None:
        self.counter = y.detach()
        self.counter.data = y.new_empty(0)
        self.start = self.counter._version

    def changed(self) -> bool:
        return self.counter._version != self.start


def _slabs(*tensors: Float[Tensor, "T m"]) -> Iterator[tuple[Tensor, ...]]:
    """Some rows at a time: the float32 copies that are made of them stay small, and on a CPU in its cache."""
    return zip(*(t.split(64 if t.is_cpu else 4096) for t in tensors), strict=True)


def _rescale(z: Float[Tensor, "T m"], gain: Tensor, bias: Tensor | None, out: Float[Tensor, "T m"]) -> Tensor:
    """g·z + b, rounded once."""
    for rows, into in _slabs(z, out):
        if bias is None:
            torch.mul(rows, gain, out=into)
        else:
            torch.addcmul(bias, rows, gain, out=into)
    return out


def _column_dots(a: Float[Tensor, "T m"], b: Float[Tensor, "T m"], dtype: torch.dtype) -> Float[Tensor, " m"]:
    total = a.new_zeros(a.shape[1], dtype=dtype)
    for x, y in _slabs(a, b):
        total += (x.to(dtype) * y).sum(0)
    return total


# --- Dropout ---------------------------------------------------------------------------------------------------------


def _draw(x: Tensor, p: float, scaling: float) -> tuple[Tensor | None, float]:
    """What to drop of x, from the global generator; and s divided by the share that stays.

    A bool mask; or, on a CPU, where a random number for each entry costs half as much as the layer's product, the
    dropped positions alone. The gaps between them are geometric, so p·|x| draws do: 3 ms instead of 25 for 1024 × 2816
    entries and p = 0.05, and 0.2 bytes an entry.
    """
    if p == 0:
        return None, scaling
    s = scaling / (1 - p) if p < 1 else 0.0
    if not x.is_cpu or p > 0.25:
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(p), s
    mean = x.numel() * p
    draws = int(mean + 8 * math.sqrt(mean) + 16)
    gaps = (
        torch.rand(draws, dtype=torch.float32, device=x.device)
        .neg_()
        .add_(1)
        .log_()
        .div_(math.log1p(-p))
        .floor_()
        .add_(1)
    )
    positions = gaps.cumsum(0, dtype=torch.int64).sub_(1)
    positions = positions[: int(torch.searchsorted(positions, x.numel()))]
    return positions.to(torch.int32) if x.numel() < 2**31 else positions, s


def _kept(X: Tensor, dropped: Tensor | None) -> Tensor:
    return X if dropped is None else _zero_(X.clone(memory_format=torch.contiguous_format), dropped)


def _zero_(X: Tensor, dropped: Tensor | None) -> Tensor:
    if dropped is None:
        return X
    if dropped.dtype == torch.bool:
        return X.masked_fill_(dropped.view_as(X), 0)
    X.view(-1).index_fill_(0, dropped.long(), 0)
    return X


# --- The large product -----------------------------------------------------------------------------------------------


def _multiply(
    left: tuple[Tensor, ...],
    right: tuple[Tensor, ...],
    out: Float[Tensor, "T m"],
    *,
    gain: Float[Tensor, " m"] | None = None,
    bias: Float[Tensor, " m"] | None = None,
) -> Tensor:
    """out = gain·Σᵢ leftᵢ·rightᵢᵀ + bias, with leftᵢ: (T, kᵢ) and rightᵢ: (m, kᵢ)."""
    if out.is_cpu and len(out) >= FEW_TOKENS and _emulated(out.dtype):
        return _multiply_wide(left, right, out, gain, bias)
    (first, *others), (W, *factors) = left, right
    W = W.to(out.dtype)
    if bias is None or gain is not None:
        torch.mm(first, W.t(), out=out)
    else:
        torch.addmm(bias.to(out.dtype), first, W.t(), out=out)
    for a, b in zip(others, factors, strict=True):
        out.addmm_(a, b.t())
    return out if gain is None else _rescale(out, gain, bias, out)


def _multiply_wide(
    left: tuple[Tensor, ...], right: tuple[Tensor, ...], out: Tensor, gain: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The same as float32 products of copied tiles, for a CPU that has to emulate 16-bit ones.

    There [X | h]·[W | B]ᵀ is a single product, four times as fast, and everything is rounded once. The copies are a few
    percent of the work and bounded by `TOKENS` and `ROWS`.
    """
    width = sum(a.shape[1] for a in left)
    L = out.new_empty(min(TOKENS, len(out)), width, dtype=torch.float32)
    R = out.new_empty(min(ROWS, out.shape[1]), width, dtype=torch.float32)
    if right[0].stride(0) == 1:
        R = R.view(width, -1).t()  # as W lies in memory: a copy that transposes costs as much as the product
    for t in range(0, len(out), TOKENS):
        tokens = _side_by_side([a[t : t + TOKENS] for a in left], L)
        for i in range(0, out.shape[1], ROWS):
            tile = tokens @ _side_by_side([b[i : i + ROWS] for b in right], R).t()
            if gain is not None:
                tile *= gain[i : i + ROWS]
            if bias is not None:
                tile += bias[i : i + ROWS]
            out[t : t + TOKENS, i : i + ROWS] = tile
    return out


def _side_by_side(parts: list[Tensor], buffer: Tensor) -> Tensor:
    return torch.cat(parts, dim=1, out=buffer[: len(parts[0])])


@functools.cache
def _emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies `dtype` in software. Known for x86, and to PyTorch versions that can tell."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    native = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}.get(dtype, ())
    return capabilities.get("architecture") == "x86_64" and bool(native) and not any(map(capabilities.get, native))
