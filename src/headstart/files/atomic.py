"""Writing so that nothing is ever lost: temporary file, fsync, rename; one writer at a time.

A reader, and a process that dies at any moment, sees the old files or the new ones, never a half.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from headstart.errors import FileError, OutputBusy

_MARK = ".headstart-"
Writer = Callable[[Path], None]


def write_files(folder: Path, writers: Mapping[str, Writer], size: int = 0) -> None:
    """Write several files into a folder, all or none; the last one named is the manifest and lands last.

    Args:
        folder: created where it does not exist. Other files in it are left alone.
        writers: file name → a function that writes the file at the path it is given.
        size: bytes that will be needed, checked against the free space first.

    Raises:
        OutputBusy: if another living process writes there.
        FileError: if the place cannot be written to or is too small; what stood there is untouched.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            _sweep(folder)
            _check_space(folder, size)
            _check_names(folder, writers)
            fresh = {name: folder / f"{_MARK}{os.getpid()}-{name}" for name in writers}
            try:
                for name, write in writers.items():
                    write(fresh[name])
                    sync(fresh[name])
                for name, path in fresh.items():
                    os.replace(path, folder / name)
                sync(folder)
            finally:
                for path in fresh.values():
                    path.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"cannot write to {folder}: {error.strerror or error}; nothing was changed") from error


def interrupted(folder: Path, name: str) -> bool:
    """Whether a writer died before this file of its landed."""
    return any(folder.glob(f"{_MARK}[0-9]*-{name}"))


def write_text(path: Path, text: str) -> None:
    """Write one text file, whole or not at all."""
    write_files(path.parent, {path.name: lambda fresh: _put(fresh, text)})


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def text_writer(text: str) -> Writer:
    """A writer for `write_files` that puts this text."""
    return lambda path: _put(path, text)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    path = folder / f"{_MARK}lock"
    for attempt in (1, 2):
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            break
        except FileExistsError:
            owner = _owner(path)
            if attempt == 2 or (owner is not None and alive(owner)):
                raise OutputBusy(
                    f"process {owner} is writing to {folder}: wait for it, or choose another folder"
                ) from None
            path.unlink(missing_ok=True)
    os.write(handle, str(os.getpid()).encode())
    os.close(handle)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _owner(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def alive(process: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sweep(folder: Path) -> None:
    """Delete what a writer that died has left."""
    for path in folder.glob(f"{_MARK}[0-9]*-*"):
        owner = path.name[len(_MARK) :].split("-", 1)[0]
        if not owner.isdigit() or int(owner) == os.getpid() or not alive(int(owner)):
            path.unlink(missing_ok=True)


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise FileError(f"{folder} has {free:,} bytes left and {size:,} are needed; nothing was changed")


def _check_names(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (folder / name).is_dir():
            raise FileError(f"{folder / name} is a folder where a file belongs: move it away; nothing was changed")


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
