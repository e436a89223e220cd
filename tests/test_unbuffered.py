"""Files written past the system's cache: the bytes, whatever their sizes, and what a disk may answer."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
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
    assert disk.made == unbuffered.BLOCKS


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


@pytest.mark.usefixtures("small")
def test_a_full_disk_is_told(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(file: int, memory: memoryview) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "write", write)
    file = Unbuffered(tmp_path / "f", ALIGNED, disk)
    with pytest.raises(OSError, match="no space left"):
        file.write(memoryview(bytearray(100 * ALIGNED)))
    with pytest.raises(OSError, match="no space left"):
        file.finish(b"").result()
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
    direct = file.direct
    file.write(memoryview(bytearray(5 * ALIGNED + 1)))
    file.finish(b"").result()
    assert seen == [direct, direct, direct, file.file, file.file]
    file.close()
