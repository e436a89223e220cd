"""bitsandbytes' weights in a checkpoint: which tensors make up one, the numbers they stand for, and the way back.

4 bits    <layer>.weight, .weight.absmax, .weight.quant_map, .weight.quant_state.bitsandbytes__nf4, …nested…
8 bits    <layer>.weight, <layer>.SCB, <layer>.weight_format
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import AdapterFormatError, Unstreamable
from headstart.files.merging.shards import Checkpoint, Stored, read_whole
from headstart.lora import quantized

_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Packed:
    """One quantised weight.

    Attributes:
        codes: the tensor that carries the layer's name; others: what belongs to it, by the end of the name.
        shape: of the numbers, (out, in); bits: 4 or 8.
    """

    codes: Stored
    others: Mapping[str, Stored]
    shape: tuple[int, ...]
    bits: int

    def parameter(self) -> nn.Parameter:
        """The weight as bitsandbytes holds it."""
        library = _library()
        data = read_whole(self.codes)
        if self.bits == 8:
            scales = read_whole(self.others["SCB"])
            return library.Int8Params(data, requires_grad=False, CB=data, SCB=scales)  # type: ignore[no-any-return]
        stats = {end: read_whole(one) for end, one in self.others.items()}
        return library.Params4bit.from_prequantized(data, stats, device="cpu")  # type: ignore[no-any-return]

    def values(self) -> Tensor:
        """The numbers, in the dtype that the layer computes them in."""
        return quantized.values(self.parameter(), nn.Module())

    def tensors(self, parameter: Any) -> dict[str, Tensor]:
        """A weight that was quantised anew, as it is stored: the tensors by their full names."""
        if self.bits == 8:
            return {self.codes.key: parameter.data, self.others["SCB"].key: parameter.SCB}
        state = parameter.quant_state.as_dict(packed=True)
        return {self.codes.key: parameter.data, **{f"{self.codes.key}.{end}": value for end, value in state.items()}}


def packed_weights(checkpoint: Checkpoint) -> dict[str, Packed]:
    """The quantised weights of a checkpoint, by their names."""
    found: dict[str, Packed] = {}
    for key, stored in checkpoint.tensors.items():
        if _STATE in key:
            name = key[: key.index(_STATE)]
            found[name] = _four(checkpoint, name, stored)
        elif key.endswith(".SCB") and f"{key[:-3]}weight" in checkpoint.tensors:
            codes = checkpoint.tensors[f"{key[:-3]}weight"]
            ends = {"SCB": stored}
            form = checkpoint.tensors.get(f"{key[:-3]}weight_format")
            if form is not None:
                ends["weight_format"] = form
                _check_format(form)
            found[codes.key] = Packed(codes, ends, codes.shape, 8)
    return found


def _four(checkpoint: Checkpoint, name: str, state: Stored) -> Packed:
    if name not in checkpoint.tensors:
        raise AdapterFormatError(f"{state.file}: {state.key!r} describes {name!r}, which is not there")
    try:
        said = json.loads(bytes(read_whole(state).tolist()))
        shape = tuple(int(size) for size in said["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterFormatError(f"{state.file}: {state.key!r} describes no quantised weight: {error}") from error
    prefix = f"{name}."
    others = {key[len(prefix) :]: one for key, one in checkpoint.tensors.items() if key.startswith(prefix)}
    return Packed(checkpoint.tensors[name], others, shape, 4)


def _check_format(form: Stored) -> None:
    # 0 is rows; the others are orders of old GPU kernels.
    if form.numel == 1 and int(read_whole(form)) != 0:
        raise Unstreamable(f"{form.file}: {form.key!r} is of an order that only a GPU of its kind reads")


def _library() -> Any:
    try:
        import bitsandbytes.nn as library
    except ImportError as error:
        raise Unstreamable("to read a quantised base, install bitsandbytes: pip install 'headstart[quant]'") from error
    return library


def numbers(checkpoint: Checkpoint, packed: Mapping[str, Packed], key: str) -> Tensor:
    """A tensor's numbers, quantised or not."""
    return packed[key].values() if key in packed else read_whole(checkpoint.tensors[key])


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return torch.empty(shape, device="meta").numel() * dtype.itemsize
