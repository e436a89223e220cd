"""What all LoRA layers share: the factors, their change of the weight, and the way in and out of it.

    y = W·x + s·B·A·d(x)                          d: dropout, in training
    y = W·x + s·(B·A − B₀·A₀)·d(x)                anchored: the function at step zero is the base's
    y = m/‖W + s·B·A‖ ⊙ (W·x + s·B·A·d(x))        DoRA, m: (m,), norms by row

A layer holds its frozen module as `base_layer`, whose weight is never written to. The parameters carry the names of
PEFT's files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headstart import linalg
from headstart.errors import AdapterState
from headstart.lora import matrix
from headstart.lora.matrix import Layout, Pair


@dataclass(frozen=True)
class Start:
    """The stored tensors that a layer begins with, and how it uses them.

    Attributes:
        A, B: the factors, as the layout stores them.
        anchor: frozen copies of both where the start must not move the function.
        rank, alpha, scaling: of the layer.
        frozen: the factors that do not train.
        dropout: on the branch, in training.
        magnitude: DoRA's row norms, (m,).
    """

    A: Tensor
    B: Tensor
    rank: int
    alpha: float
    scaling: float
    anchor: Pair | None = None
    frozen: frozenset[str] = frozenset()
    dropout: float = 0.0
    magnitude: Tensor | None = None


class Factor(nn.Module):
    """A parameter called `weight`, so that its name in a state dict is PEFT's."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


@dataclass
class Cache:
    """Row norms that hold as long as the tensors they came from are unchanged."""

    key: tuple[tuple[int, int], ...] = ()
    norms: Tensor | None = None
    squares: Tensor | None = None
    squares_key: tuple[int, int] = (0, -1)

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return Cache()

    def __reduce__(self) -> tuple[type[Cache], tuple[()]]:
        return Cache, ()


@dataclass
class Merged:
    """The parameter that a merge took out, so that an unmerge can put back the same bits."""

    original: list[nn.Parameter] = field(default_factory=list)


class LoraLayer(nn.Module):
    """What all kinds share: the factors, their change of the weight, and the way in and out of it."""

    base_layer: nn.Module

    def __init__(self, base: nn.Module, layout: Layout, start: Start, parameter: str = "weight") -> None:
        super().__init__()
        self.base_layer = base
        self.layout = layout
        self.parameter_name = matrix.weight_name(frozen_module(base), parameter)
        self.rank, self.alpha, self.scaling, self.dropout = start.rank, start.alpha, start.scaling, start.dropout
        self.enabled = True
        self._cache = Cache()
        self._merged = Merged()
        self._hold(start.A, start.B)
        for name, factor in zip("AB", self.factors, strict=True):
            factor.requires_grad_(name not in start.frozen)
        anchor_A, anchor_B = start.anchor or (None, None)
        self.register_buffer("anchor_A", anchor_A)
        self.register_buffer("anchor_B", anchor_B)
        self.anchor_A: Tensor | None
        self.anchor_B: Tensor | None
        magnitude = None if start.magnitude is None else nn.Parameter(start.magnitude)
        self.register_parameter("lora_magnitude_vector", magnitude)
        for module in self.modules():
            if module is self or isinstance(module, Factor):
                module.training = base.training

    def _hold(self, A: Tensor, B: Tensor) -> None:
        self.lora_A, self.lora_B = Factor(A), Factor(B)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B, as they are stored."""
        return self.lora_A.weight, self.lora_B.weight

    @property
    def anchor(self) -> Pair | None:
        """A₀ and B₀, as they are stored."""
        return None if self.anchor_A is None or self.anchor_B is None else (self.anchor_A, self.anchor_B)

    @property
    def magnitude(self) -> nn.Parameter | None:
        return self._parameters["lora_magnitude_vector"]

    @property
    def active(self) -> bool:
        """Whether the branch takes part in the forward.

        Raises:
            AdapterState: if the layer is merged and about to be trained.
        """
        if self._merged.original:
            if self.training and torch.is_grad_enabled():
                raise AdapterState("this layer is merged, its factors would get no gradient: unmerge(model) first")
            return False
        return self.enabled

    @property
    def weight_parameter(self) -> nn.Parameter:
        """The frozen weight (the merged one while merged)."""
        weight = frozen_module(self.base_layer)._parameters[self.parameter_name]
        assert weight is not None
        return weight

    @property
    def original(self) -> nn.Parameter:
        """The frozen weight, merged or not."""
        return self._merged.original[0] if self._merged.original else self.weight_parameter

    def change(self) -> list[Pair]:
        """The blocks' (A, B) with s·B·A the change of each block.

        Anchored, B·A − B₀·A₀ = [B − B₀ | B₀]·[A ; A − A₀]: zero to the bit where nothing was trained.
        """
        pairs = self.layout.unpack(*(factor.detach() for factor in self.factors))
        if self.anchor is None:
            return pairs
        anchors = self.layout.unpack(*self.anchor)
        return [
            (torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1))
            for (A, B), (A0, B0) in zip(pairs, anchors, strict=True)
        ]

    def plain_factors(self, rank: int | None = None) -> tuple[Tensor, Tensor, int, float]:
        """The stored tensors of a plain LoRA that makes the same change, its rank, and the energy it drops.

        Anchored, it is the exact [A ; A₀], [B | −B₀] of rank 2r: the factors' own bits. With `rank`, it is the best
        of that rank.
        """
        if rank is not None:
            smaller = [linalg.recompress(B, A, self.layout.block_rank(rank)) for A, B in self.change()]
            A, B = self.layout.pack([(A, B) for B, A, _ in smaller])
            return A, B, rank, max(dropped for _, _, dropped in smaller)
        A, B = (factor.detach() for factor in self.factors)
        if self.anchor is None:
            return A, B, self.rank, 0.0
        pairs = zip(self.layout.unpack(A, B), self.layout.unpack(*self.anchor), strict=True)
        both = [(torch.cat([A, A0]), torch.cat([B, -B0], dim=1)) for (A, B), (A0, B0) in pairs]
        return *self.layout.pack(both), 2 * self.rank, 0.0

    def merged_weight(self) -> Tensor:
        """A new tensor: the weight with the branch folded in, each element rounded once."""
        weight = self.original.detach()
        changes = self.change()
        if self.magnitude is not None:
            ratio = self.magnitude.detach().float() / self.row_norms()
            return _rescaled(self.layout, weight, changes, self.scaling, one_where_undefined(ratio))
        blocks = self.layout.blocks(weight)
        if len(blocks) == 1 and blocks[0].numel() == weight.numel():
            ((A, B),) = changes
            merged = _oriented_add(blocks[0], B, A, self.scaling)
            return (merged.T if self.layout.transposed else merged).reshape_as(weight)
        merged = weight.clone()
        for new, (A, B) in zip(self.layout.blocks(merged), changes, strict=True):
            new.copy_(_oriented_add(new, B, A, self.scaling))
        return merged

    def row_norms(self) -> Tensor:
        """‖W + s·B·A‖ of every row, (m,), float32; never through a dense B·A."""
        weight = self.original.detach()
        sources = (weight, *self.factors)
        if torch.compiler.is_compiling() or any(t.is_inference() for t in sources):
            return self._row_norms(weight, None)
        squares_key = (weight.data_ptr(), weight._version)
        if self._cache.squares_key != squares_key:
            self._cache.squares = torch.cat([linalg.row_norms_squared(b) for b in self.layout.blocks(weight)])
            self._cache.squares_key = squares_key
        key = tuple((t.data_ptr(), t._version) for t in sources)
        # In training, optimisers may write through .data, which no version counter sees.
        if self.training or self._cache.key != key or self._cache.norms is None:
            self._cache.norms, self._cache.key = self._row_norms(weight, self._cache.squares), key
        return self._cache.norms

    def _row_norms(self, weight: Tensor, squares: Tensor | None) -> Tensor:
        blocks = self.layout.blocks(weight)
        parts = [None] * len(blocks) if squares is None else torch.split(squares, [len(b) for b in blocks])
        norms = [
            linalg.lowrank_row_norms(block, B, A, self.scaling, squared=part)
            for block, (A, B), part in zip(blocks, self.change(), parts, strict=True)
        ]
        return norms[0] if len(norms) == 1 else torch.cat(norms)

    def merge(self, weight: Tensor) -> None:
        """Put a merged weight in the place of the frozen one, which is kept for `unmerge`."""
        if not self._merged.original:
            self._merged.original.append(self.weight_parameter)
        frozen_module(self.base_layer)._parameters[self.parameter_name] = nn.Parameter(weight, requires_grad=False)

    def unmerge(self) -> None:
        """Put the frozen weight back: the same parameter, the same bits."""
        if self._merged.original:
            frozen_module(self.base_layer)._parameters[self.parameter_name] = self._merged.original.pop()

    @property
    def merged(self) -> bool:
        return bool(self._merged.original)

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def __getattr__(self, name: str) -> Any:
        # Models read `layer.weight.dtype`, `layer.in_features`, …: the frozen module answers.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def extra_repr(self) -> str:
        words = [f"rank={self.rank}", f"scaling={self.scaling:.4g}"]
        words += [f"dropout={self.dropout:g}"] if self.dropout else []
        words += ["anchored"] if self.anchor is not None else []
        words += ["dora"] if self.magnitude is not None else []
        words += ["merged"] if self.merged else [] if self.enabled else ["disabled"]
        return ", ".join(words)


def frozen_module(module: nn.Module) -> nn.Module:
    """The frozen module below any number of LoRA layers."""
    while isinstance(module, LoraLayer):
        module = module.base_layer
    return module


def difference(factors: Pair, anchor: Pair | None) -> Pair:
    """One pair whose product is B·A − B₀·A₀, and zero to the bit where nothing was trained."""
    if anchor is None:
        return factors
    (A, B), (A0, B0) = factors, anchor
    return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)


def dora_ratio(magnitude: Tensor | None, norm: Tensor) -> Tensor:
    assert magnitude is not None
    return one_where_undefined(magnitude / norm)


def one_where_undefined(ratio: Tensor) -> Tensor:
    # A zero row has magnitude 0 and norm 0: its direction is undefined, its output stays what it is.
    return torch.where(ratio.isfinite(), ratio, torch.ones_like(ratio))


def _oriented_add(weight: Tensor, B: Tensor, A: Tensor, scaling: float) -> Tensor:
    """W + s·B·A, walking the weight in the order in which it lies in memory."""
    if weight.stride(-1) != 1 and weight.stride(0) == 1:
        return linalg.add_lowrank(weight.T, A.T, B.T, scaling).T
    return linalg.add_lowrank(weight, B, A, scaling)


def _rescaled(layout: Layout, weight: Tensor, changes: list[Pair], scaling: float, ratio: Tensor) -> Tensor:
    """DoRA folded in: ratio ⊙ (W + s·B·A), in float64 by blocks of rows, rounded once."""
    merged = weight.clone()
    done = 0
    for new, (A, B) in zip(layout.blocks(merged), changes, strict=True):
        A64 = A.double()
        for start in range(0, len(new), 256):
            rows = slice(start, min(start + 256, len(new)))
            summed = torch.addmm(new[rows].double(), B[rows].double(), A64, alpha=scaling)
            new[rows] = (summed * ratio[done + rows.start : done + rows.stop, None]).to(new.dtype)
        done += len(new)
    return merged
