"""A safetensors file, written tensor by tensor.

The sizes are learnt on the way: there is room for the header in front, which is filled in at the end, with spaces after
it. What is written goes to the disk while the rest is computed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from headstart.errors import FileError
from headstart.files.merging.shards import NAMES, Stored, memory_of

SENT = 64 << 20  # Bytes after which the disk is told to take them.


class ShardWriter:
    """One safetensors file, written from front to back. What is written goes to the disk while the rest is computed.

    Args:
        path: the file; room: bytes to leave for the header; metadata: what the header says beside the tensors.
        disk: one worker, which waits for the disk so that nobody else has to.
    """

    def __init__(self, path: Path, room: int, metadata: Mapping[str, str], disk: Executor) -> None:
        self.path, self.metadata, self.disk = path, metadata, disk
        self.room = -(-room // 8) * 8
        self.header: dict[str, object] = {}
        self.offset = 0
        self.waiting: list[Future[None]] = []
        self.unsent = 0
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115
        self.file.seek(8 + self.room)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, failed: object, *error: object) -> None:
        self.disk.submit(self.file.close)

    def put(self, part: Tensor) -> None:
        """Some rows of a tensor, after those that were put before."""
        memory = memory_of(part)
        self._write(memory)
        self.offset += len(memory)
        self._send(len(memory))

    def name(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Say what was put last: all of a tensor."""
        self._name(key, NAMES[dtype], shape, self.offset - math.prod(shape) * dtype.itemsize)

    def copy(self, tensors: list[Stored]) -> None:
        """Tensors that lie one after the other in one file, bit by bit."""
        if not tensors:
            return
        with open(tensors[0].file, "rb", buffering=0) as source:
            _copy(source, self.file, tensors[0].start, sum(one.size for one in tensors), tensors[0])
        for one in tensors:
            start = self.offset
            self.offset += one.size
            self._name(one.key, one.kind, one.shape, start)
            self._send(one.size)

    def finish(self) -> None:
        """Write the header. The disk has everything when `waiting` is done."""
        table = {"__metadata__": dict(self.metadata), **self.header} if self.metadata else self.header
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > self.room:
            raise AssertionError(f"{len(text)} bytes of header and room for {self.room}")
        self.file.seek(0)
        self._write(memoryview(self.room.to_bytes(8, "little") + text.ljust(self.room)))
        self.waiting += [self.disk.submit(os.fsync, self.file.fileno()), self.disk.submit(self.file.close)]

    def _name(self, key: str, kind: str, shape: tuple[int, ...], start: int) -> None:
        self.header[key] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, self.offset]}

    def _send(self, size: int) -> None:
        """Let the disk begin, and wait where it is far behind: what it has not taken yet stands in memory."""
        self.unsent += size
        if self.unsent < SENT:
            return
        self.unsent = 0
        for done in self.waiting[:-4]:
            done.result()
        self.waiting = [*self.waiting[-4:], self.disk.submit(os.fsync, self.file.fileno())]

    def _write(self, memory: memoryview) -> None:
        while memory:
            memory = memory[self.file.write(memory) :]


def header_room(keys: Iterable[str], metadata: Mapping[str, str]) -> int:
    """Bytes that are enough for the header of these tensors, wherever they end up and whatever their shapes."""
    shown = {key: {"dtype": "F8_E4M3FN", "shape": [10**9] * 6, "data_offsets": [10**15] * 2} for key in keys}
    return 64 + len(json.dumps({"__metadata__": dict(metadata), **shown}, ensure_ascii=False).encode())


def _copy(source: BinaryIO, target: BinaryIO, start: int, size: int, first: Stored) -> None:
    """Bytes from file to file, by the kernel where it can."""
    source.seek(start)
    left = size
    try:
        while left:
            count = os.copy_file_range(source.fileno(), target.fileno(), min(left, 1 << 30))
            if not count:
                break
            left -= count
    except (AttributeError, OSError):  # Another system; other file systems.
        pass
    buffer = memoryview(bytearray(min(left, 1 << 24)))
    while left:
        count = source.readinto(buffer[: min(left, len(buffer))])  # type: ignore[attr-defined]
        if not count:
            raise FileError(f"{first.file} ends within {first.key!r}: it was cut off while it was read")
        target.write(buffer[:count])
        left -= count
