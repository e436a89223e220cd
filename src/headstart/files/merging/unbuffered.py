"""A file written from front to back, past the system's cache where the file system lets that happen.

Through the cache, every byte is copied once more, pages are found for it, and others must leave: four to six times the
work for the system. Past it, the disk reads a block of memory itself, while the next one is filled.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue

BLOCK = 8 << 20  # Bytes that are written at a time.
BLOCKS = 3  # One is filled, and two wait for the disk.
ALIGNED = 4096  # What addresses in memory and in the file are multiples of.
SYNCED = 64 << 20  # Bytes after which the disk is told to take them, where the cache is in between.
_PRIVATE = () if sys.platform == "win32" else (mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,)


class Disk:
    """A thread that waits for the disk, so that nobody else has to, and the blocks that it writes from.

    After a write that failed there is no other: who asks for a block is told, and so is every file that is finished.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "headstart-disk")
        self.free: SimpleQueue[mmap.mmap] = SimpleQueue()
        self.made = 0
        self.failed: BaseException | None = None

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.shutdown()

    def block(self) -> mmap.mmap:
        """One to fill, as soon as one is free.

        Raises:
            OSError: of a block that could not be written, as soon as that is known.
        """
        if self.free.empty() and self.made < BLOCKS:
            self.made += 1
            self.free.put(mmap.mmap(-1, BLOCK, *_PRIVATE))
        block = self.free.get()
        self._check()
        return block

    def submit(self, write: Callable[[mmap.mmap], None], block: mmap.mmap) -> Future[None]:
        """Have a block written after those before it."""

        def act() -> None:
            try:
                self._check()
                write(block)
            except BaseException as error:
                self.failed = error
                raise
            finally:
                self.free.put(block)

        return self.thread.submit(act)

    def _check(self) -> None:
        if self.failed is not None:
            raise self.failed


class Unbuffered:
    """One new file.

    Args:
        path: the file; start: where the first byte goes, a multiple of `ALIGNED`. What is before it comes last.
    """

    def __init__(self, path: Path, start: int, disk: Disk) -> None:
        assert not start % ALIGNED
        self.disk, self.place = disk, start
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self.file: int | None = os.open(path, flags, 0o666)
        self.direct = _past_the_cache(path)
        self.block: mmap.mmap | None = None
        self.used = self.unsynced = 0

    def room(self) -> memoryview:
        """Where the next bytes may be put, at least one; `took` says how many were."""
        if self.block is None:
            self.block = self.disk.block()
        return memoryview(self.block)[self.used :]

    def took(self, count: int) -> None:
        """So many bytes of the room are written."""
        self.used += count
        if self.block is not None and self.used == len(self.block):
            self.disk.submit(partial(self._write, self.used, self.place), self.block)
            self.place, self.used, self.block = self.place + self.used, 0, None

    def write(self, memory: memoryview) -> None:
        """Bytes after those that were written before."""
        while memory:
            room = self.room()
            count = min(len(room), len(memory))
            # Other threads run meanwhile, as they do not while Python copies.
            ctypes.memmove(_address(room), _address(memory), count)
            self.took(count)
            memory = memory[count:]

    def finish(self, front: bytes) -> Future[None]:
        """The rest, and what stands before `start`, and no more. The disk has everything when the result is there."""
        used, place = self.used, self.place

        def write(block: mmap.mmap) -> None:
            whole = used // ALIGNED * ALIGNED
            self._write(whole, place, block)
            assert self.file is not None
            _put(self.file, memoryview(block[whole:used]), place + whole)
            _put(self.file, memoryview(front), 0)
            os.fsync(self.file)

        done = self.disk.submit(write, self.disk.block() if self.block is None else self.block)
        self.close()
        return done

    def close(self) -> None:
        """Give the file back, after all that waits. A second time is none."""
        self.disk.thread.submit(self._close)

    # -------------------------------------------------------------- at the disk

    def _write(self, size: int, place: int, block: mmap.mmap) -> None:
        with memoryview(block) as whole, whole[:size] as memory:
            if self.direct is not None:
                try:
                    return _put(self.direct, memory, place)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    os.close(self.direct)
                    self.direct = None
            assert self.file is not None
            _put(self.file, memory, place)
        self.unsynced += size
        if self.unsynced >= SYNCED:
            self.unsynced = 0
            os.fsync(self.file)

    def _close(self) -> None:
        for one in (self.direct, self.file):
            if one is not None:
                os.close(one)
        self.direct = self.file = None


def _past_the_cache(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except (AttributeError, OSError):  # Another system; a file system in memory.
        return None


def _put(file: int, memory: memoryview, place: int) -> None:
    while memory:
        os.lseek(file, place, os.SEEK_SET)
        count = os.write(file, memory)
        memory, place = memory[count:], place + count


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
