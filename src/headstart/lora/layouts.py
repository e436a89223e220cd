"""How blocks (out, in) lie in a weight, and their factors in two tensors: as a layer holds them, and in PEFT's files.

    Linear             weight (m, n)               one block: W
    Conv1D, Embedding  weight (n, m)               one block: Wᵀ
    Conv1d/2d/3d       weight (m, n/g, *k)         g blocks of (m/g, n/g·∏k)
    fused projection   weight (m, n), row ranges   one block a range: W[start:stop]
    experts            weight (e, m, n)            e blocks of (m, n)
    attention          in_proj_weight (3d, d)      one block

Every block is a view: what is written to it is written to the weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headstart.errors import BadRank, UnsupportedLayer

Pair = tuple[Tensor, Tensor]
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """One matrix, stored as it is (m, n) or transposed (n, m). The factors are stored as they are.

    Attributes:
        own_way: whether the layer does something else with its weight than others of its kind. No branch beside it
            follows that: it runs with the changed weight in its weight's place.
    """

    transposed: bool = False
    kind: str = "linear"
    own_way: bool = False

    @property
    def copies(self) -> int:
        """How many times the configured rank stands in the stored tensors."""
        return 1

    def blocks(self, weight: Tensor) -> list[Tensor]:
        """Views of the weight, each (m, n)."""
        return [weight.T if self.transposed else weight]

    def block_rank(self, rank: int) -> int:
        """The rank of one block where the layer as a whole is given `rank`."""
        return rank

    def reading(self, module: nn.Module) -> tuple[object, ...]:
        """How the rows of an input are read: layers that read the same input alike multiply the same rows."""
        return ()

    def input_rows(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        """What each block multiplies, (T, n), from the layer's input."""
        return [x.reshape(-1, x.shape[-1])]

    def output_rows(self, module: nn.Module, y: Tensor) -> list[Tensor]:
        """What each block gives, (T, m), from the layer's output or its gradient."""
        return [y.reshape(-1, y.shape[-1])]

    def pack(self, pairs: Sequence[Pair]) -> Pair:
        """The blocks' (A, B) → the two stored tensors."""
        ((A, B),) = pairs
        return A, B

    def unpack(self, A: Tensor, B: Tensor) -> list[Pair]:
        """The two stored tensors → the blocks' (A, B)."""
        return [(A, B)]

    def with_core(self, A: Tensor, B: Tensor, core: Tensor) -> Pair:
        """The stored tensors of B·R·A, from a core R (blocks, r, r). Differentiable."""
        return self.pack([(R @ a, b) for R, (a, b) in zip(core, self.unpack(A, B), strict=True)])

    def dense(self, A: Tensor, B: Tensor) -> Pair:
        """The stored tensors as one pair (k, n), (m, k) for the forward. Differentiable."""
        return A, B

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        """B·A, as the weight is stored. Differentiable."""
        A, B = self.dense(A, B)
        return (B @ A).mT if self.transposed else B @ A

    def to_file(self, A: Tensor, B: Tensor) -> Pair:
        """The stored tensors as PEFT writes them."""
        return A, B

    def from_file(self, A: Tensor, B: Tensor) -> Pair:
        """What PEFT wrote → the stored tensors."""
        return A, B


@dataclass(frozen=True)
class Convolution(Layout):
    """g independent matrices (m/g, n/g·∏k). A: (r, n/g, *k), B: (m, r/g, 1, …), as grouped convolutions read them."""

    groups: int = 1
    channels: int = 1
    kernel: tuple[int, ...] = (1,)
    kind: str = "conv"

    def blocks(self, weight: Tensor) -> list[Tensor]:
        return list(weight.reshape(self.groups, weight.shape[0] // self.groups, -1))

    def block_rank(self, rank: int) -> int:
        if rank % self.groups:
            raise BadRank(
                f"rank {rank} cannot be shared among {self.groups} groups: choose a multiple of {self.groups}, "
                "or leave this layer out"
            )
        return rank // self.groups

    def reading(self, module: nn.Module) -> tuple[object, ...]:
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        edges = tuple(module._reversed_padding_repeated_twice)
        return self.groups, self.kernel, tuple(module.stride), tuple(module.dilation), edges, module.padding_mode

    def input_rows(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        x = x if x.ndim == len(self.kernel) + 2 else x[None]
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        for i, size in enumerate(self.kernel):
            x = x.unfold(2 + i, (size - 1) * module.dilation[i] + 1, module.stride[i])[..., :: module.dilation[i]]
        rows = x.movedim(1, len(self.kernel) + 1)  # (b, *out, c, *k)
        rows = rows.reshape(-1, self.groups, self.channels // self.groups * math.prod(self.kernel))
        return list(rows.unbind(1))

    def output_rows(self, module: nn.Module, y: Tensor) -> list[Tensor]:
        y = y if y.ndim == len(self.kernel) + 2 else y[None]
        rows = y.movedim(1, -1)
        return list(rows.reshape(-1, self.groups, rows.shape[-1] // self.groups).unbind(1))

    def pack(self, pairs: Sequence[Pair]) -> Pair:
        A = torch.cat([A for A, _ in pairs])
        B = torch.cat([B for _, B in pairs])
        ones = (1,) * len(self.kernel)
        return A.reshape(len(A), self.channels // self.groups, *self.kernel), B.reshape(*B.shape, *ones)

    def unpack(self, A: Tensor, B: Tensor) -> list[Pair]:
        if self.is_dense(A):
            raise UnsupportedLayer(
                f"this adapter of a convolution with {self.groups} groups mixes the groups, as PEFT's do: "
                "it cannot be written as a change of the weight (use it unmerged)"
            )
        a = A.reshape(self.groups, A.shape[0] // self.groups, -1)
        b = B.reshape(self.groups, B.shape[0] // self.groups, -1)
        return list(zip(a, b, strict=True))

    def is_dense(self, A: Tensor) -> bool:
        """Whether A sees all channels although the layer is grouped: what PEFT trains, and what cannot be merged."""
        return self.groups > 1 and A.shape[1] == self.channels

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        whole = torch.cat([b @ a for a, b in self.unpack(A, B)])
        return whole.reshape(len(whole), self.channels // self.groups, *self.kernel)

    def to_file(self, A: Tensor, B: Tensor) -> Pair:
        if self.groups == 1 or self.is_dense(A):
            return A, B
        rank, width = A.shape[0] // self.groups, self.channels // self.groups
        full = A.new_zeros(A.shape[0], self.channels, *self.kernel)
        for g in range(self.groups):
            rows, columns = slice(g * rank, (g + 1) * rank), slice(g * width, (g + 1) * width)
            full[rows, columns] = A[rows]
        return full, B

    def from_file(self, A: Tensor, B: Tensor) -> Pair:
        if not self.is_dense(A):
            return A, B
        rank, width = A.shape[0] // self.groups, self.channels // self.groups
        spans = [(slice(g * rank, (g + 1) * rank), slice(g * width, (g + 1) * width)) for g in range(self.groups)]
        own = torch.cat([A[rows, columns] for rows, columns in spans])
        # Only where the file holds nothing outside the groups are the two forms the same adapter.
        return (own, B) if torch.equal(self.to_file(own, B)[0], A) else (A, B)


@dataclass(frozen=True)
class Parts(Layout):
    """Some row ranges of a fused projection, each with factors of its own (loralib's MergedLinear).

    A: (k·r, n), B: (Σ mᵢ, r): the parts below one another. As one pair, B is block-structured: (m, k·r).
    """

    ranges: Ranges = ()
    out_features: int = 0

    @property
    def copies(self) -> int:
        return len(self.ranges)

    def blocks(self, weight: Tensor) -> list[Tensor]:
        (whole,) = super().blocks(weight)
        return [whole[start:stop] for start, stop in self.ranges]

    def input_rows(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        return super().input_rows(module, x) * self.copies

    def output_rows(self, module: nn.Module, y: Tensor) -> list[Tensor]:
        (whole,) = super().output_rows(module, y)
        return [whole[:, start:stop] for start, stop in self.ranges]

    def pack(self, pairs: Sequence[Pair]) -> Pair:
        return torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs])

    def unpack(self, A: Tensor, B: Tensor) -> list[Pair]:
        sizes = [stop - start for start, stop in self.ranges]
        return list(zip(A.chunk(self.copies), torch.split(B, sizes), strict=True))

    def dense(self, A: Tensor, B: Tensor) -> Pair:
        rank = B.shape[1]
        full = B.new_zeros(self.out_features, A.shape[0])
        for i, ((start, stop), (_, part)) in enumerate(zip(self.ranges, self.unpack(A, B), strict=True)):
            full[start:stop, i * rank : (i + 1) * rank] = part
        return A, full

    def to_file(self, A: Tensor, B: Tensor) -> Pair:
        return self.dense(A, B)

    def from_file(self, A: Tensor, B: Tensor) -> Pair:
        rank = A.shape[0] // self.copies
        return A, torch.cat([B[s:e, i * rank : (i + 1) * rank] for i, (s, e) in enumerate(self.ranges)])


@dataclass(frozen=True)
class Experts(Layout):
    """e matrices in one parameter, (e, m, n) or (e, n, m). A: (e, r, n), B: (e, m, r)."""

    count: int = 1

    def blocks(self, weight: Tensor) -> list[Tensor]:
        return list(weight.mT if self.transposed else weight)

    def pack(self, pairs: Sequence[Pair]) -> Pair:
        return torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])

    def unpack(self, A: Tensor, B: Tensor) -> list[Pair]:
        return list(zip(A, B, strict=True))

    def to_file(self, A: Tensor, B: Tensor) -> Pair:
        return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)

    def from_file(self, A: Tensor, B: Tensor) -> Pair:
        return A.reshape(self.count, -1, A.shape[1]), B.reshape(len(B), -1, self.count).permute(2, 0, 1).contiguous()
