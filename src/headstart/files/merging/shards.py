"""A checkpoint of safetensors on disk: where every tensor lies, and rows of one without the rest.

8 bytes    length of the header
header     {"name": {"dtype": "BF16", "shape": [m, n], "data_offsets": [start, stop]}, …}
data       the tensors, one after the other
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from headstart.errors import AdapterFormatError, FileError, KeyMismatch, Unstreamable
from headstart.files.adapter import TENSORS, few
from headstart.files.header import LARGEST_HEADER, parse_object, read_header

INDEX = ".index.json"
LARGEST_INDEX = 64 << 20
STANDARD = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        file: its shard; key: its name there; kind: the format's name of its dtype; start, size: its bytes.
    """

    file: Path
    key: str
    kind: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in torch.

        Raises:
            Unstreamable: if it is one whose numbers are not read here, such as those of eight bits.
        """
        if self.kind not in DTYPES:
            raise Unstreamable(f"{self.file}: {self.key!r} holds {self.kind}, which is only copied")
        return DTYPES[self.kind]

    @property
    def is_float(self) -> bool:
        return DTYPES.get(self.kind) in FLOATS

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """How many numbers follow one another in a row of the first dimension."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model on disk.

    Attributes:
        folder: where it lies; index: the file that names the shards, if there is one.
        tensors: by key; metadata: by shard. stamps: size and time of every shard, by which a change is noticed.
    """

    folder: Path
    index: Path | None
    tensors: Mapping[str, Stored]
    metadata: Mapping[Path, Mapping[str, str]]
    stamps: Mapping[Path, tuple[int, int]] = field(default_factory=dict)

    def in_order(self, file: Path) -> list[Stored]:
        """The tensors of a shard as they lie in it."""
        return sorted((one for one in self.tensors.values() if one.file == file), key=lambda one: one.start)

    def check_unchanged(self) -> None:
        """Refuse a checkpoint that somebody wrote to meanwhile."""
        changed = [file.name for file, stamp in self.stamps.items() if _stamp(file) != stamp]
        if changed:
            raise FileError(f"{few(changed)} of {self.folder} changed while they were read: run this again")


def open_checkpoint(path: Path) -> Checkpoint:
    """Read what a folder of safetensors says it holds. No tensor is read.

    Raises:
        Unstreamable: if there are no safetensors.
        KeyMismatch, AdapterFormatError: a shard or a tensor that the index names is not there, or a file is damaged.
    """
    index = _index_of(path)
    if index is not None:
        return _gathered(path, index, _indexed(index))
    single = path / STANDARD
    if not single.is_file():
        found = [file for file in sorted(path.glob("*.safetensors")) if file.name != TENSORS]
        if len(found) != 1:
            said = f"{len(found)} of them and no index" if found else "none"
            raise Unstreamable(f"{path} has no {STANDARD} (safetensors there: {said})")
        single = found[0]
    return _gathered(path, None, {single: None})


def _index_of(folder: Path) -> Path | None:
    if (folder / STANDARD).is_file():  # As transformers chooses, where there are both.
        return None
    if (folder / f"{STANDARD}{INDEX}").is_file():
        return folder / f"{STANDARD}{INDEX}"
    found = sorted(folder.glob(f"*.safetensors{INDEX}"))
    return found[0] if len(found) == 1 else None


def _indexed(index: Path) -> dict[Path, set[str] | None]:
    """The keys that the index promises of each shard."""
    if index.stat().st_size > LARGEST_INDEX:
        raise AdapterFormatError(f"{index} is larger than {LARGEST_INDEX >> 20} MiB: this is no index")
    table = parse_object(index.read_text(encoding="utf-8"), str(index)).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise AdapterFormatError(f"{index} has no weight_map of names")
    wanted: dict[Path, set[str] | None] = {}
    for key, name in table.items():
        if Path(name).name != name:
            raise AdapterFormatError(f"{index}: {name!r} is no file of this folder")
        keys = wanted.setdefault(index.parent / name, set())
        assert keys is not None
        keys.add(key)
    missing = [file.name for file in wanted if not file.is_file()]
    if missing:
        raise KeyMismatch(f"{index} names {few(missing)}, which are not there: download the whole checkpoint")
    return wanted


def _gathered(folder: Path, index: Path | None, wanted: Mapping[Path, set[str] | None]) -> Checkpoint:
    tensors: dict[str, Stored] = {}
    metadata: dict[Path, Mapping[str, str]] = {}
    for file, keys in wanted.items():
        found, metadata[file] = _stored(file)
        lost = sorted((keys or set()) - found.keys())
        if lost:
            raise KeyMismatch(f"{file} has no {few(lost)}, which the index promises: download it again")
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise KeyMismatch(f"{folder} holds {few(twice)} in more than one shard")
        tensors |= found
    return Checkpoint(folder, index, tensors, metadata, {file: _stamp(file) for file in wanted})


def _stored(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    metadata = read_header(file).metadata
    try:
        with safe_open(file, framework="pt"), open(file, "rb") as raw:  # The format's own checks, first.
            length = int.from_bytes(raw.read(8), "little")
            assert length <= LARGEST_HEADER
            header = parse_object(raw.read(length).decode("utf-8"), f"the header of {file}")
    except SafetensorError as error:
        raise AdapterFormatError(f"{file} is damaged: {error}") from error
    header.pop("__metadata__", None)
    found = {}
    for key, entry in header.items():
        start, stop = entry["data_offsets"]
        found[key] = Stored(file, key, entry["dtype"], tuple(entry["shape"]), 8 + length + start, stop - start)
    return found, metadata


def _stamp(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_size, state.st_mtime_ns


# ------------------------------------------------------------------ reading


def read_rows(stored: Stored, columns: int, start: int, stop: int) -> Tensor:
    """Some of a tensor's numbers, seen as rows of so many columns."""
    found = torch.empty((stop - start, columns), dtype=stored.dtype)
    with open(stored.file, "rb", buffering=0) as file:
        file.seek(stored.start + start * columns * stored.dtype.itemsize)
        _fill(file, memory_of(found), stored)
    return found


def read_whole(stored: Stored) -> Tensor:
    """A tensor in its own shape."""
    return read_rows(stored, stored.numel, 0, 1).reshape(stored.shape) if stored.numel else torch.empty(stored.shape)


def row_ranges(stored: Stored, columns: int, size: int) -> Iterator[tuple[int, int]]:
    """The rows of so many columns, in ranges of about so many bytes."""
    rows = stored.numel // columns if columns else 0
    step = max(1, size // max(1, columns * stored.dtype.itemsize))
    yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


def _fill(file: BinaryIO, memory: memoryview, stored: Stored) -> None:
    while memory:
        count = file.readinto(memory)  # type: ignore[attr-defined]
        if not count:
            raise FileError(f"{stored.file} ends within {stored.key!r}: it was cut off while it was read")
        memory = memory[count:]


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, to read into or to write from. The tensor must outlive them."""
    assert tensor.is_contiguous()
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")
