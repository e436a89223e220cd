r"""An adapter as a bank holds it: its factors and nothing else, at the size that they have in their file.

    ΔW = B·A                    s is folded into B
    ΔW = [B − B₀ | B₀]·[A ; A − A₀]               anchored, so that bf16 rounds the change and not the start
    g = m/‖W + ΔW‖              DoRA: a constant, since nothing trains here

Factors are kept in their file's dtype, or in the layer's where that is narrower: the forward would round them to it
anyway. All of an adapter lies in one piece of memory, which goes back to the system with the adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headstart.errors import UnsupportedLayer
from headstart.lora import delta, matrix
from headstart.lora.delta import Branch, NormCache
from headstart.lora.layers import Start
from headstart.lora.layers.read import is_read
from headstart.lora.layouts import Convolution, Experts, Layout, Pair
from headstart.lora.targets import Target


@dataclass(frozen=True)
class Site:
    """A layer of the base that adapters reach.

    Attributes:
        name: in the model; module: the layer, which stays where it is; layout: its weight as matrices.
    """

    name: str
    module: nn.Module
    layout: Layout


@dataclass(frozen=True)
class Piece:
    """One adapter's branch at one layer.

    Attributes:
        A: (r, n); of an embedding (V, r), of a convolution (r, n/g, *k).
        B: (r, m); of a convolution (m, r/g, 1, …).
        scale: what is left of s, 1 where it is folded into B.
        gain: DoRA's g, (m,).
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0
    gain: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [self.A, self.B] if self.gain is None else [self.A, self.B, self.gain]


@dataclass(frozen=True)
class Held:
    """An adapter in a bank: its pieces by the layer that they belong to."""

    pieces: Mapping[nn.Module, Piece]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for piece in self.pieces.values() for t in piece.tensors)


def hold(
    model: nn.Module, starts: Iterable[tuple[Target, Start]], dtype: torch.dtype | None
) -> tuple[list[Site], Held]:
    """An adapter's starts as a bank holds them, and the layers that they reach. Changes nothing.

    Args:
        dtype: of the adapter's file.

    Raises:
        UnsupportedLayer: naming a layer that a bank cannot serve.
    """
    sites, pieces = [], []
    with torch.inference_mode(False), torch.no_grad():
        for target, start in starts:
            _check(model, target, start)
            sites.append(Site(target.name, target.module, target.layout))
            pieces.append(_piece(target, start, dtype or start.A.dtype))
    return sites, Held(dict(zip((site.module for site in sites), _together(pieces), strict=True)))


def _check(model: nn.Module, target: Target, start: Start) -> None:
    """Refuse layers whose inputs do not come as the rows of the batch, and those that are never called."""
    module, reason = target.module, None
    if isinstance(target.layout, Experts) or target.parameter != "weight":
        reason = "is a bare parameter, which no row passes through"
    elif isinstance(module, nn.MultiheadAttention):
        reason = "is an nn.MultiheadAttention, which reads its weight without calling a layer"
    elif "experts" in target.name.split("."):
        reason = "is an expert, which sees the tokens that a router sends it and not the rows of the batch"
    elif target.layout.own_way:
        reason = f"is a {type(module).__name__} with a forward of its own, which a branch beside it does not follow"
    elif is_read(module, target.holders):
        reason = "has a weight that the model reads, and rows are routed where a layer is called"
    elif isinstance(module, nn.Embedding) and module.max_norm is not None:
        reason = "is an Embedding with max_norm, which writes to its weight in every forward"
    elif around := next((m for m in _around(model, target.name) if isinstance(m, _READERS)), None):
        reason = f"stands in an nn.{type(around).__name__}, which may read its weight without calling it"
    elif start.base is not None and start.base.weight is not None:
        reason = "needs a quantised base of its own: load the model quantised as the adapter says"
    if reason is not None:
        raise UnsupportedLayer(
            f"{target.name!r} {reason}: a bank cannot route it. Serve this adapter alone, with headstart.load"
        )


_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def _around(model: nn.Module, name: str) -> Iterable[nn.Module]:
    """The modules that a module stands in, from the model inwards."""
    for part in name.split(".")[:-1]:
        yield model
        model = model.get_submodule(part)
    yield model


def _piece(target: Target, start: Start, dtype: torch.dtype) -> Piece:
    layout, s = target.layout, start.scaling
    A, B = _factors(layout, start)
    own = matrix.parameter_of(target.module).dtype
    narrow = own if own in _FLOATS and own.itemsize <= dtype.itemsize else dtype
    # What is held narrower than it is computed with takes s there: rounding s·B here would lose digits of B.
    fold = own not in _FLOATS or narrow.itemsize >= own.itemsize
    B = B * s if fold else B
    if layout.kind == "embedding":
        A, B = A.T, B.T
    elif not isinstance(layout, Convolution):
        B = B.T
    return Piece(A.to(narrow), B.to(narrow), 1.0 if fold else s, _gain(target, start))


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _factors(layout: Layout, start: Start) -> Pair:
    """One pair, as the layout stores it, whose product is the whole change."""
    if isinstance(layout, Convolution):
        if start.anchor is None:
            return start.A, start.B
        return layout.pack(Branch(start.A, start.B, start.scaling, start.anchor).pairs(layout))
    anchor = layout.dense(*start.anchor) if start.anchor else None
    return delta.difference(layout.dense(start.A, start.B), anchor)


def _gain(target: Target, start: Start) -> Tensor | None:
    if start.magnitude is None:
        return None
    branch = Branch(start.A, start.B, start.scaling, start.anchor, magnitude=start.magnitude)
    norms = delta.row_norms(target.layout, matrix.values(target.module), branch, NormCache(), training=False)
    return branch.with_norm(norms).ratio().float()


def _together(pieces: Sequence[Piece]) -> list[Piece]:
    """The same pieces as views of one buffer for each dtype and device."""
    tensors = [tensor for piece in pieces for tensor in piece.tensors]
    places = dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors)
    moved: dict[int, Tensor] = {}
    for place in places:
        here = [tensor for tensor in tensors if (tensor.dtype, tensor.device) == place]
        buffer = torch.cat([tensor.reshape(-1) for tensor in here])
        for tensor, part in zip(here, buffer.split([tensor.numel() for tensor in here]), strict=True):
            moved[id(tensor)] = part.view(tensor.shape)
    return [
        Piece(moved[id(p.A)], moved[id(p.B)], p.scale, None if p.gain is None else moved[id(p.gain)]) for p in pieces
    ]
