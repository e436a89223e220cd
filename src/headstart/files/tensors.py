"""Writing safetensors so that equal contents are equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file; the same tensors and metadata always give the same bytes.

    Args:
        tensors: contiguous ones on the CPU that share no memory.

    Raises:
        OSError: if the place is full or cannot be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, dict(metadata))
    except SafetensorError as error:  # a full disk, a quota
        raise OSError(str(error)) from error
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """The library orders the tensors by itself; the entries of the metadata come in any order, of a hash table."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # The same entries in another order: the same length, but for the padding that follows.
        if len(text) > size:
            raise OSError(f"the header of {path} grew while it was sorted")
        file.seek(8)
        file.write(text.ljust(size))
