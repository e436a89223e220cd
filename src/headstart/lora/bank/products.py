r"""The branches of several adapters at one layer, as batched products over the rows that are theirs.

    y[rows] += bmm(bmm(x[rows], Aᵀ), B)           x: (g, t, n)   A: (g, r, n)   B: (g, r, m)

A `Bundle` is g adapters with equally many rows each; every row is read as t tokens. Adapters of other ranks join with
zeros up to the next power of two, so that a mixed batch takes few products; nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from headstart.errors import BadRoute
from headstart.lora import matrix
from headstart.lora.bank.held import Piece, Site
from headstart.lora.layouts import Convolution


@dataclass(frozen=True)
class Bundle:
    """Adapters that are multiplied together.

    Attributes:
        rows: which rows of the batch, the first adapter's first; None where these are all rows in order.
        A: stacked, but for an embedding, whose tables are not copied. B: stacked, s folded in.
        gain: DoRA's, (g, m).
    """

    rows: Tensor | None
    A: Tensor | tuple[Tensor, ...]
    B: Tensor
    gain: Tensor | None

    def pick(self, x: Tensor) -> Tensor:
        """The rows of this bundle."""
        return x if self.rows is None else x.index_select(0, self.rows)


def likeness(site: Site, piece: Piece) -> Hashable:
    """Pieces that are alike in this can share a bundle."""
    if site.layout.kind == "linear":
        return 1 << (piece.A.shape[0] - 1).bit_length(), piece.gain is None
    return piece.A.shape, piece.gain is None


def bundle(site: Site, pieces: Sequence[Piece], rows: Tensor | None, like: Tensor) -> Bundle:
    """Pieces that are alike, stacked in the dtype and on the device of what they are added to."""
    As, Bs = ([t.to(like.device) for t in factors] for factors in zip(*((p.A, p.B) for p in pieces), strict=True))
    A = tuple(As) if site.layout.kind == "embedding" else _stack(As).to(like.dtype)
    B = _stack(Bs).to(like.dtype)
    if any(piece.scale != 1 for piece in pieces):
        scales = torch.tensor([piece.scale for piece in pieces], dtype=torch.float32).to(like.device)
        B = (B * scales.view(-1, *(1,) * (B.ndim - 1))).to(like.dtype)
    gains = [piece.gain.to(like.device) for piece in pieces if piece.gain is not None]
    return Bundle(rows, A, B, torch.stack(gains) if gains else None)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(list(tensors))
    return pad_sequence(list(tensors), batch_first=True)


def add(site: Site, bundles: Sequence[Bundle], x: Tensor, y: Tensor, rows: int) -> Tensor:
    """The layer's output with the branches on their rows. Written into y, unless autograd or a view forbids it.

    Args:
        rows: how many the batch is routed as. Each is a block of x's and y's first dimension.
    """
    y = y.clone() if y.requires_grad and torch.is_grad_enabled() else y
    if site.layout.kind == "conv":
        seen, out = (t.view(rows, -1, *t.shape[1:]) for t in (x, y))
    else:
        y = y.contiguous()
        ends = () if site.layout.kind == "embedding" else x.shape[-1:]
        seen, out = x.reshape(rows, -1, *ends), y.view(rows, -1, y.shape[-1])
    for one in bundles:
        _add(site, one, seen, out)
    return y


def _add(site: Site, one: Bundle, x: Tensor, y: Tensor) -> None:
    count = len(one.B)
    if site.layout.kind == "conv":
        change = _conv(site, one, x)
    else:
        h = _looked_up(site, one, x) if site.layout.kind == "embedding" else _down(one, x, y.dtype)
        if one.rows is None and one.gain is None:
            y.view(count, -1, y.shape[-1]).baddbmm_(h, one.B)
            return
        change = torch.bmm(h, one.B)
    if one.gain is not None:
        change = _rescaled(site, one, y, change)
    change = change.reshape(-1, *y.shape[1:]).to(y.dtype)
    if one.rows is None:
        y += change
    else:
        y.index_add_(0, one.rows, change)


def _down(one: Bundle, x: Tensor, dtype: torch.dtype) -> Tensor:
    assert isinstance(one.A, Tensor)
    picked = one.pick(x)
    return torch.bmm(picked.reshape(len(one.B), -1, x.shape[-1]).to(dtype), one.A.mT)


def _looked_up(site: Site, one: Bundle, ids: Tensor) -> Tensor:
    picked = one.pick(ids).reshape(len(one.B), -1)
    h = torch.stack([F.embedding(own, table) for own, table in zip(picked, one.A, strict=True)]).to(one.B.dtype)
    scale = matrix.embed_scale(site.module)
    return h if scale is None else h * (scale.to(h.dtype) if isinstance(scale, Tensor) else scale)


def _conv(site: Site, one: Bundle, x: Tensor) -> Tensor:
    """The adapters as groups of one convolution."""
    base: Any = site.module
    assert isinstance(one.A, Tensor) and isinstance(site.layout, Convolution)
    count, size, channels = len(one.B), len(site.layout.kernel), x.shape[2]
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[size]
    picked = one.pick(x).reshape(count, -1, *x.shape[2:]).to(one.B.dtype)
    side_by_side = picked.transpose(0, 1).reshape(picked.shape[1], count * channels, *x.shape[3:])
    padding = base.padding
    if base.padding_mode != "zeros":
        side_by_side = F.pad(side_by_side, base._reversed_padding_repeated_twice, mode=base.padding_mode)
        padding = 0
    groups = 1 if site.layout.is_dense(one.A[0]) else base.groups
    h = convolve(side_by_side, one.A.flatten(0, 1), None, base.stride, padding, base.dilation, count * groups)
    y = convolve(h, one.B.flatten(0, 1), groups=count * base.groups)
    return y.view(len(y), count, -1, *y.shape[2:]).transpose(0, 1)


def _rescaled(site: Site, one: Bundle, y: Tensor, change: Tensor) -> Tensor:
    """What turns y into g·(y − b + change) + b: DoRA, computed in float32."""
    assert one.gain is not None
    wide = torch.promote_types(y.dtype, torch.float32)
    before = one.pick(y).reshape(change.shape).to(wide)
    ends = (1,) * (len(site.layout.kernel) if isinstance(site.layout, Convolution) else 0)
    gain = one.gain.view(len(one.gain), 1, -1, *ends).to(wide)
    bias = site.module._parameters.get("bias")
    z = before if bias is None else before - bias.view(-1, *ends).to(wide)
    z = (z + change.to(wide)) * gain
    return (z if bias is None else z + bias.view(-1, *ends).to(wide)) - before


def check_rows(site: Site, x: Tensor, rows: int, copies: int) -> None:
    """Refuse an input whose first dimension is not the batch.

    Raises:
        BadRoute: naming the layer.
    """
    if rows == 1:
        return
    lead = x.shape[0] if x.ndim else 1
    flat = x.ndim == (1 if isinstance(site.module, nn.Embedding) else 2)
    conv = isinstance(site.layout, Convolution) and x.ndim != len(site.layout.kernel) + 2
    if not conv and (lead in (rows, rows * copies) or (flat and lead and lead % rows == 0)):
        return
    raise BadRoute(
        f"{site.name!r} was given a {tuple(x.shape)} input in a batch that is routed as {rows} rows"
        f"{f' × {copies}' if copies > 1 else ''}: it does not see the batch row by row. Route these rows one adapter "
        "at a time, or leave this layer out of the adapters"
    )
