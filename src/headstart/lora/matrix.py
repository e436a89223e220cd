"""Any layer's weight as matrices of shape (out, in): the only border between storage and mathematics.

Which matrices those are, `layouts.py` says; here are the modules that hold them: which layout they have, whether they
are called as their kind is, and how a weight is read and put, sharded, quantised or without values.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.errors import BadOption, UnsupportedLayer
from headstart.lora import quantized
from headstart.lora.layouts import Convolution, Experts, Layout, Parts, Ranges


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a Linear that stores (in, out). Imports nothing."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means this module."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _runs_its_own_way(module: nn.Module) -> bool:
    """Whether a forward of the layer's own offsets, pads, normalises, … as it likes.

    A lookup that is only scaled (`embed_scale`) does not; one that has other parameters too puts them into its rows.
    """
    kind = next((kind for kind in _CALLED if isinstance(module, kind)), None)
    if kind is None or type(module).forward is kind.forward or quantized.is_quantized(module._parameters.get("weight")):
        return False
    if isinstance(module, nn.Embedding):
        return embed_scale(module) is None or len(module._parameters) > 1
    return not (isinstance(module, nn.Linear) and _is_a_product(module))


def _is_a_product(module: nn.Linear) -> bool:
    """Whether W·x + b is all that the forward of a Linear gives: tried once, with two rows, as in training.

    What more it may hold, a gain or a mask, may be without effect today and not tomorrow. Without values only the
    shape is told.
    """
    weight = module._parameters["weight"]
    if weight is None or len(module._parameters) > 2 or module._buffers or module._modules:
        return False
    if is_sharded(weight):
        return True
    with torch.no_grad():
        try:
            x = weight.new_ones(1, 2, weight.shape[1]).cumsum(-1).sin()
            x[:, 1] *= 2
            with _training(module):
                found = type(module).forward(module, x)
        except Exception:  # whatever it asks for beside rows
            return False
        wanted = F.linear(x, weight, module.bias)
        if not isinstance(found, Tensor) or found.shape != wanted.shape:
            return False
        return is_hollow(weight) or bool((found - wanted).norm() <= 0.01 * wanted.norm())


@contextmanager
def _training(module: nn.Linear) -> Iterator[None]:
    """The layer trains, whatever the mode it is found in; the mode and the random state come back."""
    mode, weight = module.training, module.weight
    devices = [weight.device.index or 0] if weight.is_cuda else []
    with torch.random.fork_rng(devices=devices, enabled=not is_hollow(weight)):
        module.training = True
        try:
            yield
        finally:
            module.training = mode


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
    own_way = parameter == "weight" and _runs_its_own_way(module)
    if parts is not None:
        return _parts(module, parts, own_way)
    if parameter != "weight" or not (isinstance(module, _KINDS) or is_conv1d(module)):
        return _experts(module, parameter)
    if isinstance(module, nn.MultiheadAttention):
        if not module._qkv_same_embed_dim:
            raise UnsupportedLayer("attention with separate key or value widths has no single input projection")
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            raise UnsupportedLayer("an adapted attention is not called itself, so its hooks would be lost: remove them")
        return Layout()
    if isinstance(module, nn.Embedding):
        return Layout(transposed=True, kind="embedding", own_way=own_way)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        kernel = tuple(module.kernel_size)
        return Convolution(groups=module.groups, channels=module.in_channels, kernel=kernel, own_way=own_way)
    return Layout(transposed=is_conv1d(module), own_way=own_way)


_CALLED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KINDS = (*_CALLED, nn.MultiheadAttention)


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


def _parts(module: nn.Module, parts: Sequence[object], own_way: bool) -> Parts:
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
    return Parts(transposed=transposed, ranges=ranges, out_features=rows, own_way=own_way)


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
