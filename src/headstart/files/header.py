"""Reading files that a stranger may have written: sizes bounded, nothing executed, every oddity named."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.errors import AdapterFormatError

LARGEST_JSON = 1 << 20
LARGEST_HEADER = 100 << 20


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds: names and shapes, and its metadata."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 1 MiB, without duplicate keys.

    Raises:
        AdapterFormatError: saying what is wrong with it.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise AdapterFormatError(f"{path} is larger than 1 MiB: this is no adapter config")
        return parse_object(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise AdapterFormatError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AdapterFormatError(f"{path} is not UTF-8 text: {error}") from error


def parse_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object; what is none, is nested too deep or names a key twice is refused."""
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, where))
    except RecursionError as error:
        raise AdapterFormatError(f"{where} is nested too deep") from error
    except ValueError as error:  # JSONDecodeError, or an integer of too many digits
        raise AdapterFormatError(f"{where} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{where} holds a {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = sorted({key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1})
        raise AdapterFormatError(f"{where} names {', '.join(map(repr, twice))} twice")
    return found


def read_header(path: Path) -> Header:
    """The header of a safetensors file. The format's own checks follow when its tensors are read.

    Raises:
        AdapterFormatError: if it is truncated, too large, malformed, or names a tensor twice.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(LARGEST_HEADER, size - 8):
                raise AdapterFormatError(f"{path} is no safetensors file, or it is cut off")
            raw = file.read(length)
        header = parse_object(raw.decode("utf-8"), f"the header of {path}")
    except OSError as error:
        raise AdapterFormatError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AdapterFormatError(f"the header of {path} is not UTF-8") from error
    metadata = header.pop("__metadata__", {})
    try:
        shapes = {name: tuple(int(n) for n in entry["shape"]) for name, entry in header.items()}
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise AdapterFormatError(f"the header of {path} describes a tensor without a shape") from error
    return Header(shapes, metadata if isinstance(metadata, dict) else {})


def odd_names(names: Iterable[str]) -> list[str]:
    """The names of tensors that no module has, and that could lead elsewhere if they were taken for paths."""
    return [name for name in names if re.search(r"[/\\\x00-\x1f]|\.\.|^\.|^$", name)]
