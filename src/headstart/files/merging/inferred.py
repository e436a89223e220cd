"""A model by the names and shapes of its tensors, where nobody knows its architecture.

The adapted layers get modules of the kinds that the adapters take them for, the others are names with parameters.

    (m, n)         Linear; (n, m) Conv1D, by the layers that are not square; Embedding by the adapter's keys
    (m, n, *k)     a convolution, its groups by the channels that A sees
    (e, m, n)      stacked experts, the way round by A and B
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from headstart.errors import UnsupportedLayer
from headstart.files.adapter import AdapterFile, Entry


def inferred(shapes: Mapping[str, tuple[int, ...]], files: Sequence[AdapterFile]) -> nn.Module:
    """A model on the meta device.

    Args:
        shapes: of its tensors, by their names; files: the adapters, whose layers get modules of their kinds.

    Raises:
        UnsupportedLayer: if the kind of a layer, or how it is stored, cannot be told.
    """
    root = nn.Module()
    with torch.device("meta"):
        for file in files:
            turned = _is_turned(file, shapes)
            for entry in file.entries.values():
                made = _kind(entry, shapes, file, turned)
                if made is not None:
                    _module(root, entry.name.rpartition(".")[0]).add_module(entry.name.rpartition(".")[2], made)
        for key, shape in shapes.items():
            path, _, leaf = key.rpartition(".")
            owner = _module(root, path)
            if leaf not in owner._parameters:
                owner.register_parameter(leaf, nn.Parameter(torch.empty(shape), requires_grad=False))
    return root


def _module(root: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    return root


def _is_turned(file: AdapterFile, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the file's matrices are stored (in, out), as those of a Conv1D: by those that are not square."""
    seen = {kind for entry in file.entries.values() if (kind := _orientation(entry, shapes)) is not None}
    said = bool(file.config.get("fan_in_fan_out"))
    if said and len(seen) == 2:
        raise UnsupportedLayer(f"{file.folder}: some layers are stored (in, out) and some (out, in): name the model")
    return next(iter(seen)) if said and len(seen) == 1 else said


def _orientation(entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> bool | None:
    shape = shapes.get(f"{entry.name}.weight", ())
    if entry.embedding or len(shape) != 2 or shape[0] == shape[1] or entry.A.ndim != 2:
        return None
    return shape == (entry.A.shape[1], entry.B.shape[0])


def _kind(entry: Entry, shapes: Mapping[str, tuple[int, ...]], file: AdapterFile, turned: bool) -> nn.Module | None:
    """An empty module of the kind that the adapter takes it for."""
    if f"{entry.name}.in_proj_weight" in shapes:
        width = shapes[f"{entry.name}.in_proj_weight"][1]
        return nn.MultiheadAttention(width, 1, bias=f"{entry.name}.in_proj_bias" in shapes)
    if any(_is_bare(key, file) for key in shapes if key.rpartition(".")[0] == entry.name):
        return _stack(entry.name, shapes, file)
    shape = shapes.get(f"{entry.name}.weight")
    if shape is None:
        return None  # Which whoever looks for it will say.
    bias = f"{entry.name}.bias" in shapes
    if entry.embedding:
        return nn.Embedding(shape[0], shape[1])
    if len(shape) == 2:
        if _orientation(entry, shapes) if shape[0] != shape[1] else turned:
            return _conv1d(shape, entry)
        return nn.Linear(shape[1], shape[0], bias=bias)
    kinds: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    if len(shape) not in kinds or entry.A.ndim != len(shape):
        raise UnsupportedLayer(f"{entry.name!r} of shape {shape} is no layer that is known: name the model")
    channels = entry.A.shape[1]
    groups = max(1, channels // shape[1])
    made: nn.Module = kinds[len(shape)](channels, shape[0], shape[2:], groups=groups, bias=bias)
    return made


def _is_bare(key: str, file: AdapterFile) -> bool:
    """Whether this is a parameter that the adapter names itself."""
    return any(key == name or key.endswith(f".{name}") for name in file.config.get("target_parameters") or ())


def _stack(name: str, shapes: Mapping[str, tuple[int, ...]], file: AdapterFile) -> nn.Module:
    """A module of bare parameters, in the order in which its model must have registered them."""
    keys = [key for key in shapes if key.rpartition(".")[0] == name and _is_bare(key, file)]
    entries = [entry for entry in file.entries.values() if entry.name == name]
    found: list[str] = []
    stored = set()
    # PEFT wraps once for each parameter, the first that was registered innermost.
    for entry in sorted(entries, key=lambda entry: entry.path.count("base_layer")):
        wide, tall = entry.A.shape[1], entry.B.shape[0]
        fits = [key for key in keys if sorted(shapes[key][-2:]) == sorted((wide, tall))]
        if len(fits) != 1 or (wide == tall and len(shapes[fits[0]]) == 3):
            raise UnsupportedLayer(f"how the parameters of {name!r} are stored cannot be told from their shapes")
        found.append(fits[0])
        stored.add(shapes[fits[0]][-2:] == (wide, tall))
    owner: Any = nn.Module()
    owner.is_transposed = stored == {True}
    for key in reversed(found):
        empty = torch.empty(shapes[key])
        owner.register_parameter(key.rpartition(".")[2], nn.Parameter(empty, requires_grad=False))
    return owner  # type: ignore[no-any-return]


def _conv1d(shape: tuple[int, ...], entry: Entry) -> nn.Module:
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError as error:
        raise UnsupportedLayer(
            f"{entry.name!r} is stored (in, out): to read such a layer, install transformers"
        ) from error
    made: nn.Module = Conv1D(shape[1], shape[0])
    return made
