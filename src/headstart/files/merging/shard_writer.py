"""A safetensors file, written tensor by tensor.

The sizes are learnt on the way: there is room for the header in front, which is filled in at the end, with spaces after
it. What is written goes to the disk while the rest is computed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from headstart.errors import FileError
from headstart.files.merging.shards import NAMES, Stored, memory_of
from headstart.files.merging.unbuffered import ALIGNED, Disk, Unbuffered


class ShardWriter:
    """One safetensors file, written from front to back.

    Args:
        path: the file; room: bytes to leave for the header; metadata: what the header says beside the tensors.
    """

    def __init__(self, path: Path, room: int, metadata: Mapping[str, str], disk: Disk) -> None:
        self.metadata = metadata
        self.room = -(-(8 + room) // ALIGNED) * ALIGNED - 8
        self.header: dict[str, object] = {}
        self.offset = 0
        self.file = Unbuffered(path, 8 + self.room, disk)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, failed: object, *error: object) -> None:
        self.file.close()

    def put(self, part: Tensor) -> None:
        """Some rows of a tensor, after those that were put before."""
        memory = memory_of(part)
        self.file.write(memory)
        self.offset += len(memory)

    def name(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Say what was put last: all of a tensor."""
        self._name(key, NAMES[dtype], shape, self.offset - math.prod(shape) * dtype.itemsize)

    def copy(self, tensors: list[Stored]) -> None:
        """Tensors that lie one after the other in one file, bit by bit."""
        if not tensors:
            return
        first, left = tensors[0], sum(one.size for one in tensors)
        with open(first.file, "rb", buffering=0) as source:
            source.seek(first.start)
            while left:
                count = source.readinto(self.file.room()[:left])
                if not count:
                    raise FileError(f"{first.file} ends within {first.key!r}: it was cut off while it was read")
                self.file.took(count)
                left -= count
        for one in tensors:
            start = self.offset
            self.offset += one.size
            self._name(one.key, one.kind, one.shape, start)

    def finish(self) -> Future[None]:
        """Write the header. The disk has everything when the result is there."""
        table = {"__metadata__": dict(self.metadata), **self.header} if self.metadata else self.header
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > self.room:
            raise AssertionError(f"{len(text)} bytes of header and room for {self.room}")
        return self.file.finish(self.room.to_bytes(8, "little") + text.ljust(self.room))

    def _name(self, key: str, kind: str, shape: tuple[int, ...], start: int) -> None:
        self.header[key] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, self.offset]}


def header_room(keys: Iterable[str], metadata: Mapping[str, str]) -> int:
    """Bytes that are enough for the header of these tensors, wherever they end up and whatever their shapes."""
    shown = {key: {"dtype": "F8_E4M3FN", "shape": [10**9] * 6, "data_offsets": [10**15] * 2} for key in keys}
    return 64 + len(json.dumps({"__metadata__": dict(metadata), **shown}, ensure_ascii=False).encode())
