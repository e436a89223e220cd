"""Files written past the system's cache: the bytes, whatever their sizes, and what a disk may answer."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headstart.files.merging import unbuffered
from headstart.files.merging.unbuffered import ALIGNED, BLOCK, Disk, Unbuffered


@pytest.fixture
def disk() -> Iterator[Disk]:
    with Disk() as found:
        yield found


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of a few pages, so that there are many."""
    monkeypatch.setattr(unbuffered, "BLOCK", 2 * ALIGNED)
    return 2 * ALIGNED


def written(path: Path, disk: Disk, parts: list[bytes], front: bytes = b"front") -> bytes:
    file = Unbuffered(path, ALIGNED, disk)
    for part in parts:
        file.write(memoryview(bytearray(part)))
    file.finish(front.ljust(ALIGNED)).result()
    file.close()
    return path.read_bytes()


def random_parts(sizes: list[int]) -> list[bytes]:
    draw = random.Random(0)
    return [draw.randbytes(size) for size in sizes]


@pytest.mark.parametrize(
    "sizes",
    [[], [0], [1], [ALIGNED], [ALIGNED - 1, 2], [2 * ALIGNED], [2 * ALIGNED + 1], [10 * ALIGNED, 3, 7 * ALIGNED - 5]],
)
@pytest.mark.usefixtures("small")
def test_what_is_written_stands_in_the_file(tmp_path: Path, disk: Disk, sizes: list[int]) -> None:
    parts = random_parts(sizes)
    assert written(tmp_path / "f", disk, parts) == b"front".ljust(ALIGNED) + b"".join(parts)


def test_whole_blocks_are_written_too(tmp_path: Path, disk: Disk) -> None:
    parts = random_parts([3 * BLOCK + 17, BLOCK, 5])
    assert written(tmp_path / "f", disk, parts) == b"front".ljust(ALIGNED) + b"".join(parts)


def test_the_files_of_a_disk_share_its_blocks(tmp_path: Path, disk: Disk, small: int) -> None:
    parts = [random_parts([3 * small + i]) for i in range(9)]
    files = [Unbuffered(tmp_path / str(i), ALIGNED, disk) for i in range(len(parts))]
    for file, (part,) in zip(files, parts, strict=True):
        file.write(memoryview(bytearray(part)))
        file.finish(b"")
    for file in files:
        file.close()
    disk.thread.shutdown()
    assert [(tmp_path / str(i)).read_bytes()[ALIGNED:] for i in range(len(parts))] == [part for (part,) in parts]
    assert 1 <= disk.made <= unbuffered.BLOCKS


def test_a_longer_file_that_stood_there_is_replaced(tmp_path: Path, disk: Disk) -> None:
    (tmp_path / "f").write_bytes(b"x" * 5 * ALIGNED)
    assert written(tmp_path / "f", disk, [b"new"]) == b"front".ljust(ALIGNED) + b"new"


@pytest.mark.usefixtures("small")
def test_bytes_may_be_put_where_they_will_be_written_from(tmp_path: Path, disk: Disk) -> None:
    (part,) = random_parts([5 * ALIGNED + 3])
    file, left = Unbuffered(tmp_path / "f", ALIGNED, disk), memoryview(part)
    while left:
        room = file.room()
        count = min(len(room), 1000, len(left))
        room[:count] = left[:count]
        del room
        file.took(count)
        left = left[count:]
    file.finish(b"").result()
    file.close()
    assert (tmp_path / "f").read_bytes()[ALIGNED:] == part


@pytest.mark.parametrize("refused", ["open", "write"])
def test_a_file_system_that_knows_only_its_cache_gets_the_same_bytes(
    refused: str, tmp_path: Path, disk: Disk, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, direct = os.write, set[int]()
    if refused == "open":
        monkeypatch.setattr(unbuffered, "_past_the_cache", lambda path: None)
    else:
        opened = unbuffered._past_the_cache

        def remember(path: Path) -> int | None:
            if (found := opened(path)) is not None:
                direct.add(found)
            return found

        def write(file: int, memory: memoryview) -> int:
            if file in direct:
                raise OSError(errno.EINVAL, "not here")
            return real(file, memory)

        monkeypatch.setattr(unbuffered, "_past_the_cache", remember)
        monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(unbuffered, "SYNCED", small)
    parts = random_parts([9 * ALIGNED + 1, 20])
    assert written(tmp_path / "f", disk, parts)[ALIGNED:] == b"".join(parts)


class Writes:
    """What stands in for `os.write`: `answer` says how many bytes are taken, or raises."""

    def __init__(self, answer: Callable[[int, int], int]) -> None:
        self.real, self.answer, self.count = os.write, answer, 0

    def __call__(self, file: int, memory: memoryview) -> int:
        self.count += 1
        return self.real(file, memory[: self.answer(self.count, len(memory))])


def full(first: int) -> Callable[[int, int], int]:
    """A disk on which only this write finds no room."""

    def answer(count: int, size: int) -> int:
        if count == first:
            raise OSError(errno.ENOSPC, "no space left")
        return size

    return answer


@pytest.mark.usefixtures("small")
def test_a_full_disk_is_told_with_the_next_block(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", Writes(full(1)))
    file = Unbuffered(tmp_path / "f", ALIGNED, disk)
    file.write(memoryview(bytearray(2 * ALIGNED)))
    disk.thread.submit(int).result()  # The block is written by now.
    with pytest.raises(OSError, match="no space left"):
        file.write(memoryview(bytearray(1)))
    file.close()


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5])
@pytest.mark.usefixtures("small")
def test_one_block_that_failed_is_told_at_the_end(
    failing: int, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unbuffered, "BLOCKS", 9)
    go = threading.Event()
    disk.thread.submit(go.wait)  # Nothing is written before all is handed over.
    monkeypatch.setattr(os, "write", Writes(full(failing)))  # Three blocks, what is left, and the front.
    file = Unbuffered(tmp_path / "f", ALIGNED, disk)
    file.write(memoryview(bytearray(6 * ALIGNED + 1)))
    done = file.finish(b"front")
    go.set()
    with pytest.raises(OSError, match="no space left"):
        done.result()


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.usefixtures("small")
def test_a_disk_may_take_less_than_it_is_given(
    refused: bool, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refused:
        monkeypatch.setattr(unbuffered, "_past_the_cache", lambda path: None)
    parts = random_parts([5 * ALIGNED + 77])
    writes = Writes(lambda count, size: max(1, size // 3))
    monkeypatch.setattr(os, "write", writes)
    assert written(tmp_path / "f", disk, parts)[ALIGNED:] == parts[0]
    assert writes.count > 20


@pytest.mark.parametrize("refused", [False, True])
def test_the_disk_is_asked_to_keep_what_it_took(
    refused: bool, tmp_path: Path, disk: Disk, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refused:
        monkeypatch.setattr(unbuffered, "_past_the_cache", lambda path: None)
    monkeypatch.setattr(unbuffered, "SYNCED", 2 * small)
    done: list[str] = []
    put, sync = unbuffered._put, os.fsync
    monkeypatch.setattr(unbuffered, "_put", lambda *given: done.append("put") or put(*given))
    monkeypatch.setattr(os, "fsync", lambda file: done.append("sync") or sync(file))
    written(tmp_path / "f", disk, random_parts([4 * small]))
    if unbuffered._past_the_cache(tmp_path / "f") is not None:
        assert done == ["put"] * 7 + ["sync"]
    else:
        assert done == ["put", "put", "sync"] * 2 + ["put"] * 3 + ["sync"]


@pytest.mark.usefixtures("small")
def test_a_file_that_is_finished_is_closed(tmp_path: Path, disk: Disk) -> None:
    files = [Unbuffered(tmp_path / str(i), ALIGNED, disk) for i in range(3)]
    for file in files:
        file.write(memoryview(bytearray(1)))
        file.finish(b"").result()
        disk.thread.submit(int).result()
        assert file.file is None
        assert file.direct is None
        file.close()


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has a cache before every disk")
@pytest.mark.usefixtures("small")
def test_a_disk_writes_whole_pages_from_memory(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    put = unbuffered._put
    monkeypatch.setattr(unbuffered, "_put", lambda file, memory, place: seen.append(file) or put(file, memory, place))
    file = Unbuffered(tmp_path / "f", ALIGNED, disk)
    if file.direct is None:
        pytest.skip("this file system has no such writes")
    direct, plain = file.direct, file.file
    file.write(memoryview(bytearray(5 * ALIGNED + 1)))
    file.finish(b"").result()
    assert seen == [direct, direct, direct, plain, plain]
    file.close()
