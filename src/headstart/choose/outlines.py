"""From whatever a user means by a model to its outline: a name, a folder, a config, or the model itself."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.choose import families
from headstart.choose.shapes import Outline
from headstart.errors import BadOption
from headstart.files import source as sources

if TYPE_CHECKING:
    from torch import nn

    Model = str | Path | Mapping[str, Any] | nn.Module | Any


def outline_of(model: Model, dtype: str | None = None) -> Outline:
    """The outline of a model, without torch where its config says enough.

    Args:
        model: a folder, a hub name, 'smollm2', a GGUF file; a config.json, or what stands in one; a transformers
            config; a module.
        dtype: of the weights, where it is not the checkpoint's own.

    Raises:
        FileError: where there is no such model, or nothing that can be read as one.
    """
    if isinstance(model, Outline):
        return model
    if isinstance(model, Mapping):
        return _of_fields(model, dtype)
    if isinstance(model, str | Path):
        path = Path(model).expanduser()
        if path.is_file() and path.suffix == ".json":
            return _of_fields(sources.read_config(path), dtype)
        source = sources.find(str(model))
        fields = sources.config_of(source)
        if fields is not None:
            return _of_fields(fields, dtype)
        from headstart.choose.trace import outline_of_source

        return outline_of_source(source, dtype)
    if "torch" in sys.modules and isinstance(model, sys.modules["torch"].nn.Module):
        return _of_module(model, dtype)
    config: Any = model
    if callable(getattr(config, "to_dict", None)) and hasattr(config, "model_type"):
        return families.outline(config.to_dict()) or _traced_config(config, dtype)
    raise BadOption(f"a model is a name, a folder, a config or a module, not {type(model).__name__}")


def _of_fields(fields: Mapping[str, Any], dtype: str | None) -> Outline:
    known = families.outline(fields)
    if known is not None:
        return known
    from headstart.choose.trace import outline_of_fields

    return outline_of_fields(fields, dtype)


def _traced_config(config: Any, dtype: str | None) -> Outline:
    from headstart.choose.trace import outline_of_config

    return outline_of_config(config, dtype)


def _of_module(model: nn.Module, dtype: str | None) -> Outline:
    """By its layers; what a pass keeps is counted from its config where that describes this very module."""
    from headstart.choose.trace import outline_of_module

    read = outline_of_module(model, dtype)
    config: Any = getattr(model, "config", None)
    if not callable(getattr(config, "to_dict", None)):
        return read
    known = families.outline({**config.to_dict(), "architectures": [type(model).__name__]})
    if known is None:
        return read
    # A head or a pooler that this one was built without costs nothing in a pass.
    there = {(matrix.name, matrix.m, matrix.n) for matrix in read.matrices}
    kept = [m for m in known.matrices if not m.linear or m.calls or (m.name, m.m, m.n) in there]
    if {(m.name, m.m, m.n) for m in kept if m.linear} != {(m.name, m.m, m.n) for m in read.matrices if m.linear}:
        return read
    return dataclasses.replace(
        known, parameters=read.parameters, matrices=tuple(kept), dtype=read.dtype, quantised=read.quantised
    )
