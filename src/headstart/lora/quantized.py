r"""Quantised weights as numbers, and numbers as quantised weights. The only file that knows bitsandbytes and torchao.

    bitsandbytes, 4 bits    packed (m·n/2, 1), a scale for each block       Q = scale·code      code: 16 numbers
    bitsandbytes, 8 bits    (m, n) int8, a scale for each row               Q = scale·int8/127
    torchao                 a tensor subclass of the weight's own shape     Q = its own business

Everything goes by the parameter, whose type says what it is. No library is imported for that: a model that holds such
a parameter has imported it. Only a `Recipe` imports bitsandbytes, because somebody asked for a quantised image.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import BadOption, UnsupportedLayer

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Recipe:
    """How weights are quantised: what an adapter's base must be made by.

    Attributes:
        bits: 4 or 8.
        quant_type: "nf4" or "fp4" of bitsandbytes, "int8" of either library, "int4" of torchao.
        blocksize: how many numbers of a row share a scale; 0 for a whole row.
        nested: whether the scales are quantised too (bitsandbytes' double quantisation).
    """

    bits: int = 4
    quant_type: str = "nf4"
    blocksize: int = 64
    nested: bool = False

    def __str__(self) -> str:
        scales = f"in blocks of {self.blocksize}" if self.blocksize else "by rows"
        return f"{self.bits}-bit {self.quant_type} {scales}{', doubly quantised' if self.nested else ''}"

    def image(self, weight: Tensor) -> Tensor:
        """What is left of a matrix (m, n) after quantising it, in its dtype."""
        functional = _imported_functional()
        given = weight if weight.dtype in _FLOATS else weight.float()
        if self.bits == 8:
            codes, scales, _ = functional.int8_vectorwise_quant(given.contiguous().half())
            return functional.int8_vectorwise_dequant(codes, scales).to(weight.dtype)  # type: ignore[no-any-return]
        # As one row: bitsandbytes 0.50 on a CPU reads wrong scales where a block ends inside a row.
        packed, state = functional.quantize_4bit(
            given.reshape(1, -1),
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            compress_statistics=self.nested,
        )
        return functional.dequantize_4bit(packed, state).reshape(weight.shape).to(weight.dtype)  # type: ignore[no-any-return]


def recipe(bits: int = 4, quant_type: str = "nf4") -> Recipe:
    """bitsandbytes' own recipes: nf4 or fp4 in blocks of 64, int8 by rows.

    Raises:
        BadOption: if there is no such recipe.
    """
    if bits == 8:
        return Recipe(8, "int8", 0)
    if bits != 4 or quant_type not in ("nf4", "fp4"):
        raise BadOption(f"bits={bits!r}, quant_type={quant_type!r}: choose bits 4 with 'nf4' or 'fp4', or bits 8")
    return Recipe(4, quant_type)


def _imported_functional() -> Any:
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise BadOption("to quantise weights, install bitsandbytes: pip install 'headstart[quant]'") from error
    return functional


# ------------------------------------------------------------------ what a parameter is


def is_quantized(parameter: Tensor | None) -> bool:
    """Whether this parameter holds codes, or will, instead of numbers."""
    # Nearly every parameter is of this very type: models ask at every forward.
    if parameter is None or type(parameter) is nn.Parameter or type(parameter) is Tensor:
        return False
    return _is_4bit(parameter) or _is_8bit(parameter) or _is_torchao(parameter)


def _is_4bit(parameter: Tensor) -> bool:
    library = sys.modules.get("bitsandbytes.nn")
    return library is not None and isinstance(parameter, library.Params4bit)


def _is_8bit(parameter: Tensor) -> bool:
    library = sys.modules.get("bitsandbytes.nn")
    return library is not None and isinstance(parameter, library.Int8Params)


def _is_torchao(parameter: Tensor) -> bool:
    library = sys.modules.get("torchao.utils")
    return library is not None and isinstance(parameter, library.TorchAOBaseTensor)


def _state_of(parameter: Any) -> Any:
    """The scales of a 4-bit parameter."""
    if parameter.quant_state is None:
        raise UnsupportedLayer("this layer is 4-bit and not quantised yet: model.to(device) does it")
    return parameter.quant_state


def outline(parameter: Any) -> Tensor:
    """The shape that a quantised weight has as numbers, on the meta device."""
    if _is_4bit(parameter):
        state = _state_of(parameter)
        return torch.empty(state.shape, dtype=state.dtype, device="meta")
    dtype = torch.float32 if parameter.dtype == torch.int8 else parameter.dtype
    return torch.empty(parameter.shape, dtype=dtype, device="meta")


def elements(parameter: Tensor) -> int:
    """How many numbers a parameter stands for."""
    if _is_4bit(parameter) and parameter.quant_state is not None:  # type: ignore[attr-defined]
        return outline(parameter).numel()
    return parameter.numel()


def recipe_of(parameter: Any) -> Recipe:
    """How a quantised parameter was quantised."""
    if _is_4bit(parameter):
        state = _state_of(parameter)
        return Recipe(4, state.quant_type, state.blocksize, _is_nested(state))
    if _is_8bit(parameter):
        return Recipe(8, "int8", 0)
    bits = 4 if "4" in str(vars(parameter).get("target_dtype", type(parameter).__name__)) else 8
    width = int(vars(parameter).get("block_size", (1, 0))[-1])
    return Recipe(bits, f"int{bits}", 0 if width == parameter.shape[-1] else width)


# ------------------------------------------------------------------ codes to numbers


def values(parameter: Any, module: nn.Module) -> Tensor:
    """A quantised weight as numbers: the matrix that its layer multiplies with, a new tensor.

    Args:
        parameter: that `module` holds, or held before `put`.

    Raises:
        UnsupportedLayer: if it is not quantised yet, or of a kind that cannot be read.
    """
    if _is_4bit(parameter):
        return _values_4bit(parameter)
    if _is_8bit(parameter):
        return _values_8bit(parameter, module)
    return _values_torchao(parameter)


def _values_4bit(parameter: Any) -> Tensor:
    functional, state = sys.modules["bitsandbytes.functional"], _state_of(parameter)
    codes, state = _turned_back(parameter.data, state) if _is_turned(state) else (parameter.data, state)
    return functional.dequantize_4bit(codes, state)  # type: ignore[no-any-return]


def turning(model: nn.Module) -> list[nn.Module]:
    """The 4-bit layers whose blocks bitsandbytes turns around, or has turned."""
    return [module for module in model.modules() if module.__dict__.get(_TURNS)]


def keep_blocks(layers: Iterable[nn.Module]) -> None:
    """Keep bitsandbytes from turning the blocks of 4-bit layers around, and turn back those that are.

    On CPUs with bf16 products it turns a layer's at its first evaluation, and multiplies from then on by an operation
    without a gradient: training after an evaluation would end there, with no more than a warning.
    """
    for module in layers:
        module.__dict__[_TURNS] = False
        weight: Any = module._parameters.get("weight")
        if weight is not None and _is_4bit(weight) and _is_turned(weight.quant_state):
            codes, state = _turned_back(weight.data, weight.quant_state)
            weight.data, weight.quant_state.__dict__ = codes, state.__dict__


def release_blocks(layers: Iterable[nn.Module]) -> None:
    """Let the blocks be turned again, at the next evaluation."""
    for module in layers:
        module.__dict__[_TURNS] = True


_TURNS = "support_avx512bf16_for_cpu"


def _is_turned(state: Any) -> bool:
    return state is not None and bool(vars(state).get("packing_format_for_cpu", False))


def _turned_back(codes: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Codes and state as they were, but for scales that were rounded to bf16 and are not nested.

    What bitsandbytes offers does not turn the scales.
    """
    back = copy.copy(state)
    back.original_nested = False
    codes, _ = sys.modules["bitsandbytes.functional"]._convert_weight_packed_for_cpu_inverse(codes, back)
    back.original_nested, back.absmax = state.original_nested, state.absmax.T.reshape(-1).float()
    return codes, back


def _is_nested(state: Any) -> bool:
    return bool(vars(state).get("original_nested", state.nested))


def _values_8bit(parameter: Any, module: Any) -> Tensor:
    if parameter.has_fp16_weights:
        return parameter.data  # type: ignore[no-any-return]
    if parameter.dtype != torch.int8:
        raise UnsupportedLayer("this layer is 8-bit and not quantised yet: model.to(device) does it")
    # The first forward moves the scales from the parameter into the module.
    scales = parameter.SCB if parameter.SCB is not None else module.state.SCB
    return sys.modules["bitsandbytes.functional"].int8_vectorwise_dequant(  # type: ignore[no-any-return]
        parameter.data, scales
    )


def _values_torchao(parameter: Any) -> Tensor:
    with torch.no_grad():
        try:
            return parameter.dequantize()  # type: ignore[no-any-return]
        except (NotImplementedError, AttributeError):
            # Some kinds only multiply: what they make of the unit vectors are their columns.
            unit = torch.eye(parameter.shape[-1], dtype=parameter.dtype, device=parameter.device)
            return nn.functional.linear(unit, parameter).T.contiguous()


# ------------------------------------------------------------------ numbers to codes


def requantized(parameter: Any, weight: Tensor) -> nn.Parameter:
    """A weight quantised in the way of a parameter, to stand in its place (see `put`).

    Raises:
        UnsupportedLayer: if this kind cannot be quantised anew.
    """
    if _is_4bit(parameter):
        state = _state_of(parameter)
        made = type(parameter)(
            weight.to(_dtype_of(state)),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=_is_nested(state),
            quant_type=state.quant_type,
            quant_storage=parameter.quant_storage,
        )
        return made.to(weight.device)  # type: ignore[no-any-return]
    if _is_8bit(parameter):
        return _requantized_8bit(parameter, weight)
    return nn.Parameter(_requantized_torchao(parameter, weight), requires_grad=False)


def _dtype_of(state: Any) -> torch.dtype:
    return vars(state).get("original_dtype", state.dtype)  # type: ignore[no-any-return]


def _requantized_8bit(parameter: Any, weight: Tensor) -> nn.Parameter:
    if parameter.has_fp16_weights:
        return type(parameter)(weight.to(parameter.dtype), requires_grad=False, has_fp16_weights=True)  # type: ignore[no-any-return]
    functional = sys.modules["bitsandbytes.functional"]
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    return type(parameter)(codes, requires_grad=False, CB=codes, SCB=scales)  # type: ignore[no-any-return]


def _requantized_torchao(parameter: Any, weight: Tensor) -> Tensor:
    held, kind = vars(parameter), type(parameter)
    if kind.__name__ == "Int8Tensor" and held.get("act_quant_kwargs") is None:
        granularities = sys.modules["torchao.quantization.granularity"]
        rows, width = held["block_size"]
        granularity = granularities.PerGroup(width) if rows == 1 else granularities.PerTensor()
        return kind.from_hp(weight.to(parameter.dtype), granularity)  # type: ignore[no-any-return]
    if kind.__name__ == "IntxUnpackedToInt8Tensor" and not bool(held["zero_point"].any()):
        return kind.from_hp(weight.to(parameter.dtype), held["block_size"], held["target_dtype"])  # type: ignore[no-any-return]
    raise UnsupportedLayer(
        f"a weight of torchao's {kind.__name__} cannot be quantised anew: load the adapter on the float model and "
        "merge it there"
    )


def put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set a parameter of a module, quantised or not; the one before can be put back, to the bit."""
    before: Any = module._parameters[name]
    state = module.__dict__.get("state")
    if before is not None and _is_8bit(before) and state is not None and state.SCB is not None:
        before.CB, before.SCB = before.data, state.SCB
        state.CB = state.SCB = None
    if "quant_state" in module.__dict__ and _is_4bit(parameter):
        module.__dict__["quant_state"] = parameter.quant_state  # type: ignore[attr-defined]
    module._parameters[name] = parameter
