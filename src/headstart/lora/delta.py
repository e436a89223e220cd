"""What a branch does to a weight: the change as low-rank pairs, folded in, as a plain LoRA, and DoRA's row norms.

    plain       ΔW = s·B·A
    anchored    ΔW = s·(B·A − B₀·A₀) = s·[B − B₀ | B₀]·[A ; A − A₀]     zero to the bit where nothing was trained
    exported    ΔW = s·[B | −B₀]·[A ; A₀]                               the factors' own bits, rank 2r

Functions of tensors and a layout: both shells call them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from headstart import linalg
from headstart.lora import matrix, quantized
from headstart.lora.layouts import Layout, Pair, Parts


@dataclass(frozen=True)
class Branch:
    """What runs beside a frozen weight.

    Attributes:
        A, B: the factors, as the layout stores them; scaling: s.
        anchor: (A₀, B₀), stored alike, where the start must not move the function.
        dropout: the probability that holds now, zero in evaluation.
        magnitude, norm: DoRA's m and ‖W + ΔW‖, (m,).
        base: what stands in W's place, as W is stored.
    """

    A: Tensor
    B: Tensor
    scaling: float
    anchor: Pair | None = None
    dropout: float = 0.0
    magnitude: Tensor | None = None
    norm: Tensor | None = None
    base: Tensor | None = None

    def pairs(self, layout: Layout) -> list[Pair]:
        """The blocks' (A, B) with s·B·A the change of each block, without gradients."""
        found = layout.unpack(self.A.detach(), self.B.detach())
        if self.anchor is None:
            return found
        anchors = layout.unpack(*self.anchor)
        return [difference(pair, anchor) for pair, anchor in zip(found, anchors, strict=True)]

    def ratio(self) -> Tensor:
        """DoRA's m/‖W + ΔW‖. A zero row has no direction: its output stays what it is."""
        assert self.magnitude is not None and self.norm is not None
        return torch.where(self.norm == 0, torch.ones_like(self.norm), self.magnitude.flatten() / self.norm)

    def with_norm(self, norm: Tensor) -> Branch:
        return replace(self, norm=norm)


def difference(factors: Pair, anchor: Pair | None) -> Pair:
    """One pair whose product is B·A − B₀·A₀."""
    if anchor is None:
        return factors
    (A, B), (A0, B0) = factors, anchor
    return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)


def plain_lora(layout: Layout, branch: Branch, rank: int, to_rank: int | None = None) -> tuple[Pair, int, float]:
    """The stored tensors of a plain LoRA with the same change, its rank, and the share of the energy it drops.

    Args:
        rank: of the branch; to_rank: of the result. Left out, the result is exact: of rank 2r where anchored.
    """
    if to_rank is not None:
        smaller = [linalg.recompress(B, A, layout.block_rank(to_rank)) for A, B in branch.pairs(layout)]
        packed = layout.pack([(A, B) for B, A, _ in smaller])
        return packed, to_rank, max(dropped for _, _, dropped in smaller)
    factors = branch.A.detach(), branch.B.detach()
    if branch.anchor is None:
        return factors, rank, 0.0
    pairs = zip(layout.unpack(*factors), layout.unpack(*branch.anchor), strict=True)
    both = [(torch.cat([A, A0]), torch.cat([B, -B0], dim=1)) for (A, B), (A0, B0) in pairs]
    return layout.pack(both), 2 * rank, 0.0


def effective_weight(layout: Layout, weight: Tensor, branch: Branch) -> Tensor:
    """W + ΔW, under DoRA m/‖W + ΔW‖ ⊙ (W + ΔW), differentiable in the factors."""
    weight = weight if branch.base is None else branch.base
    A, B = branch.A, branch.B
    if branch.anchor is None:
        change = layout.product(A, B)
    else:
        A0, B0 = branch.anchor
        change = layout.product(A, B - B0) + layout.product(A - A0, B0)
    changed = torch.add(weight, change, alpha=branch.scaling)
    if branch.magnitude is not None:
        gain = branch.ratio()
        changed = changed * (gain if layout.transposed else gain.reshape(-1, *(1,) * (weight.ndim - 1)))
    return changed.to(weight.dtype)


def merged_weight(layout: Layout, weight: Tensor, branch: Branch) -> Tensor:
    """A new tensor: the weight with the branch folded in, every element rounded once."""
    if branch.magnitude is not None:
        return _merged_dora(*_whole(layout, branch), weight)
    if weight.dtype == torch.float64:  # The anchor is subtracted in it, too.
        branch = replace(branch, A=branch.A.double(), B=branch.B.double())
    pairs = branch.pairs(layout)
    blocks = layout.blocks(weight)
    if len(blocks) == 1 and blocks[0].numel() == weight.numel():
        ((A, B),) = pairs
        whole = _add(blocks[0], B, A, branch.scaling)
        return (whole.T if layout.transposed else whole).reshape_as(weight)
    merged = weight.clone(memory_format=torch.contiguous_format)
    for block, (A, B) in zip(layout.blocks(merged), pairs, strict=True):
        block.copy_(_add(block, B, A, branch.scaling))
    return merged


def fold(layout: Layout, weight: Tensor, branch: Branch) -> None:
    """The same written into a float32 or float64 weight, by one operation: an interrupt finds all of it or nothing."""
    block, *more = layout.blocks(weight)
    within = block.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    if more or not within or branch.magnitude is not None:
        weight.copy_(merged_weight(layout, weight, branch))
        return
    if weight.dtype == torch.float64:
        branch = replace(branch, A=branch.A.double(), B=branch.B.double())
    ((A, B),) = branch.pairs(layout)
    block.addmm_(B.to(weight.dtype), A.to(weight.dtype), alpha=branch.scaling)


def _add(weight: Tensor, B: Tensor, A: Tensor, scaling: float) -> Tensor:
    """W + s·B·A, walking the weight in the order in which it lies in memory."""
    if weight.stride(-1) != 1 and weight.stride(0) == 1:
        return linalg.add_lowrank(weight.T, A.T, B.T, scaling).T
    return linalg.add_lowrank(weight, B, A, scaling)


def _merged_dora(layout: Layout, branch: Branch, weight: Tensor) -> Tensor:
    """m/‖W + ΔW‖ ⊙ (W + ΔW), in float64 by blocks of rows, rounded once."""
    ratio = branch.ratio().detach().double()
    merged = weight.clone(memory_format=torch.contiguous_format)
    done = 0
    for block, (A, B) in zip(layout.blocks(merged), branch.pairs(layout), strict=True):
        for start in range(0, len(block), 256):
            rows = slice(start, start + 256)
            summed = torch.addmm(block[rows].double(), B[rows].double(), A.double(), alpha=branch.scaling)
            block[rows] = linalg.rounded(summed * ratio[done + start : done + start + len(summed), None], block.dtype)
        done += len(block)
    return merged


@dataclass
class NormCache:
    """Row norms that hold as long as the tensors they came from are unchanged. Copies start empty."""

    key: tuple[tuple[int, int], ...] = ()
    norms: Tensor | None = None
    squared_key: tuple[int, int] = (0, -1)
    squared: list[Tensor] = field(default_factory=list)
    factors: Pair | None = None

    def remember(self, branch: Branch) -> None:
        """Keep the factors on the CPU, where comparing them later costs next to nothing."""
        on_cpu = branch.A.device.type == "cpu"
        self.factors = (branch.A.detach().clone(), branch.B.detach().clone()) if on_cpu else None

    def overwritten(self, branch: Branch) -> bool:
        """Whether a factor was written to behind its version counter. Not asked on devices where it would wait."""
        return self.factors is not None and not all(map(torch.equal, self.factors, (branch.A, branch.B)))

    def __deepcopy__(self, memo: dict[int, object]) -> NormCache:
        return NormCache()

    def __reduce__(self) -> tuple[type[NormCache], tuple[()]]:
        return NormCache, ()


def row_norms(
    layout: Layout,
    weight: Tensor,
    branch: Branch,
    cache: NormCache,
    training: bool,
    read: Callable[[], Tensor] | None = None,
) -> Tensor:
    """‖W + ΔW‖ of every row of the matrix view, (m,), float32; never through a dense ΔW.

    Args:
        weight: by which the cache is kept; read: its values, asked for when they are needed, where it holds codes.
    """
    read = read or weight.detach
    sources = (weight, branch.A, branch.B)
    layout, branch = _whole(layout, branch)
    if matrix.is_hollow(weight):
        return torch.cat([block.new_empty(len(block), dtype=torch.float32) for block in layout.blocks(read())])
    if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in sources):
        return _row_norms(layout, read(), branch, None)
    key = tuple(map(_stamp, sources))
    # In training, optimisers may write through .data, which no version counter sees.
    if training or cache.norms is None or cache.key != key or cache.overwritten(branch):
        values = read()
        if cache.squared_key != key[0]:
            cache.squared = [linalg.row_norms_squared(block) for block in layout.blocks(values)]
            cache.squared_key = key[0]
        cache.norms, cache.key = _row_norms(layout, values, branch, cache.squared), key
        cache.remember(branch)
    return cache.norms


def _stamp(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor is replaced or written to. Those of torchao have no memory of their own."""
    return id(tensor) if quantized.is_quantized(tensor) else tensor.data_ptr(), tensor._version


def _row_norms(layout: Layout, weight: Tensor, branch: Branch, squared: list[Tensor] | None) -> Tensor:
    blocks = layout.blocks(weight)
    known: list[Tensor | None] = [*squared] if squared is not None else [None] * len(blocks)
    norms = [
        linalg.lowrank_row_norms(block, B, A, branch.scaling, squared=square)
        for block, (A, B), square in zip(blocks, branch.pairs(layout), known, strict=True)
    ]
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def _whole(layout: Layout, branch: Branch) -> tuple[Layout, Branch]:
    """A fused projection as one matrix: DoRA has a magnitude for its untouched rows too."""
    if not isinstance(layout, Parts):
        return layout, branch
    A, B = layout.dense(branch.A, branch.B)
    anchor = layout.dense(*branch.anchor) if branch.anchor else None
    return Layout(transposed=layout.transposed), replace(branch, A=A, B=B, anchor=anchor)
