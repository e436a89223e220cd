"""Any layer's weight as matrices of shape (out, in): the only border between storage and mathematics.

    Linear             weight (m, n)               one block: W
    Conv1D, Embedding  weight (n, m)               one block: Wᵀ
    Conv1d/2d/3d       weight (m, n/g, *k)         g blocks of (m/g, n/g·∏k)
    fused projection   weight (m, n), row ranges   one block a range: W[start:stop]
    experts            weight (e, m, n)            e blocks of (m, n)
    attention          in_proj_weight (3d, d)      one block

Every block is a view: what is written to it is written to the weight.
A `Layout` also says how the blocks' factors are stored as two tensors, and how those tensors stand in PEFT's files.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from headstart.errors import BadOption, BadRank, UnsupportedLayer
from headstart.lora import quantized

Pair = tuple[Tensor, Tensor]
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """One matrix, stored as it is (m, n) or transposed (n, m). The factors are stored as they are."""

    transposed: bool = False
    kind: str = "linear"

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


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a Linear that stores (in, out). Imports nothing."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means this module."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def runs_its_own_way(module: nn.Module) -> bool:
    """Whether a lookup or a convolution has a forward of its own: it offsets, pads, normalises, … as it likes.

    No branch beside it follows that. A lookup that is only scaled (`embed_scale`) is none of these; one that has other
    parameters too puts them into its rows.
    """
    kind = next((k for k in (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, k)), None)
    if kind is None or type(module).forward is kind.forward or quantized.is_quantized(module._parameters["weight"]):
        return False
    return not isinstance(module, nn.Embedding) or embed_scale(module) is None or len(module._parameters) > 1


def embed_scale(module: nn.Module) -> Tensor | float | None:
    """What a lookup multiplies its rows with, as Gemma's (a buffer) and BART's (a number) do."""
    scale: Tensor | float | None = module._buffers.get("embed_scale", module.__dict__.get("embed_scale"))
    return scale


def layout(module: nn.Module, parameter: str = "weight", parts: Sequence[object] | None = None) -> Layout:
    """How this layer's weight is seen as matrices.

    Args:
        module: the frozen layer, or the module that owns `parameter`.
        parameter: the parameter's name where a bare parameter is adapted.
        parts: for a fused projection, one flag for each of the equal parts, or the row ranges to adapt.

    Raises:
        UnsupportedLayer: if no layout is known for it.
        BadOption: if `parts` does not describe its rows.
    """
    if parts is not None:
        return _parts(module, parts)
    if parameter != "weight" or not (isinstance(module, _KINDS) or is_conv1d(module)):
        return _experts(module, parameter)
    if isinstance(module, nn.MultiheadAttention):
        if not module._qkv_same_embed_dim:
            raise UnsupportedLayer("attention with separate key or value widths has no single input projection")
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            raise UnsupportedLayer("an adapted attention is not called itself, so its hooks would be lost: remove them")
        return Layout()
    if isinstance(module, nn.Embedding):
        return Layout(transposed=True, kind="embedding")
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Convolution(groups=module.groups, channels=module.in_channels, kernel=tuple(module.kernel_size))
    return Layout(transposed=is_conv1d(module))


_KINDS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


def _experts(module: nn.Module, parameter: str) -> Layout:
    weight = module._parameters.get(parameter)
    if quantized.is_quantized(weight):
        raise UnsupportedLayer(f"a quantised {parameter!r} of {type(module).__name__} is not served: load it in bf16")
    if weight is None:
        raise UnsupportedLayer(
            f"{type(module).__name__} is no layer that can be adapted: choose a Linear, Conv1D, Embedding, "
            "Conv1d/2d/3d or MultiheadAttention, or name a parameter in target_parameters"
        )
    if weight.ndim == 2:
        return Layout()
    if weight.ndim == 3:
        # transformers marks the experts that store (e, in, out) with this flag.
        return Experts(transposed=bool(module.__dict__.get("is_transposed", False)), count=weight.shape[0])
    raise UnsupportedLayer(
        f"{type(module).__name__} holds {parameter!r} of shape {tuple(weight.shape)}: only matrices (m, n) and stacks "
        "of them (e, m, n) can be adapted"
    )


def _parts(module: nn.Module, parts: Sequence[object]) -> Parts:
    if not is_linear(module):
        raise UnsupportedLayer(f"`parts` needs a Linear or Conv1D, not {type(module).__name__}")
    transposed = is_conv1d(module)
    rows = outline(module).shape[1 if transposed else 0]
    if not isinstance(parts, Sequence) or not (all(map(_is_flag, parts)) or all(map(_is_range, parts))):
        raise BadOption(f"parts {parts!r} are neither flags of equal parts nor row ranges (start, stop)")
    if all(map(_is_flag, parts)):
        if not parts or rows % len(parts):
            raise BadOption(f"{rows} rows cannot be split into {len(parts)} equal parts: give row ranges instead")
        size = rows // len(parts)
        ranges = tuple((i * size, (i + 1) * size) for i, wanted in enumerate(parts) if wanted)
    else:
        ranges = tuple((start, stop) for start, stop in cast(Ranges, parts))
    ends = [0, *(edge for span in ranges for edge in span), rows]
    if not ranges or sorted(ends) != ends or any(a == b for a, b in ranges):
        raise BadOption(f"parts {ranges} are not ascending, separate row ranges within 0 to {rows}")
    return Parts(transposed=transposed, ranges=ranges, out_features=rows)


def _is_flag(part: object) -> bool:
    return isinstance(part, bool)


def _is_range(part: object) -> bool:
    return isinstance(part, Sequence) and len(part) == 2 and all(type(edge) is int for edge in part)


def parameter_of(module: nn.Module, parameter: str = "weight") -> nn.Parameter:
    """The parameter that holds the layer's weight."""
    name = weight_name(module, parameter)
    weight = module._parameters.get(name)
    if weight is None:
        raise UnsupportedLayer(
            f"{type(module).__name__} computes its {name!r} anew (a parametrization?): remove it before adapting"
        )
    return weight


def outline(module: nn.Module, parameter: str = "weight") -> Tensor:
    """A tensor of the weight's shape, without its values where these are quantised."""
    weight = parameter_of(module, parameter)
    return quantized.outline(weight) if quantized.is_quantized(weight) else weight.detach()


def values(module: nn.Module, parameter: str = "weight") -> Tensor:
    """The weight's values, and a copy of them where they are quantised."""
    return dense(parameter_of(module, parameter), module)


def dense(weight: nn.Parameter, module: nn.Module) -> Tensor:
    """The values of a parameter that a module holds, or held before a merge."""
    return quantized.values(weight, module) if quantized.is_quantized(weight) else weight.detach()


def stored(weight: Tensor, like: nn.Parameter) -> nn.Parameter:
    """A weight as a frozen parameter, quantised where `like` is."""
    quantised = quantized.is_quantized(like)
    return quantized.requantized(like, weight) if quantised else nn.Parameter(weight, requires_grad=False)


def weight_name(module: nn.Module, parameter: str = "weight") -> str:
    """What the module calls the parameter that holds its weight."""
    return "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else parameter


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, as FSDP2 makes parameters. Imports nothing."""
    library = sys.modules.get("torch.distributed.tensor")
    return library is not None and isinstance(tensor, library.DTensor)


def is_hollow(tensor: Tensor) -> bool:
    """Whether this has a shape and no values, on the meta device or in a trace. Imports nothing."""
    library = sys.modules.get("torch._subclasses.fake_tensor")
    return tensor.is_meta or (library is not None and isinstance(tensor, library.FakeTensor))


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, which every process must ask for at once; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def largest_rank(shapes: Sequence[torch.Size]) -> int:
    """The largest rank that every block of these shapes can have."""
    return min(min(shape) for shape in shapes)
