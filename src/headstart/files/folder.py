"""A whole folder at once: filled under another name, then renamed. A process that dies leaves the old one or none."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from headstart.errors import FileError
from headstart.files import atomic
from headstart.files.adapter import CONFIG

# What shows that a folder holds a model or an adapter, and that replacing it replaces nothing else.
_OURS = ("config.json", CONFIG)


def check_free(path: Path, force: bool) -> None:
    """Refuse a name that is taken; with `force`, only one that holds no model.

    Raises:
        FileError: saying what stands there.
    """
    if path.name in ("", ".."):
        raise FileError(f"{str(path)!r} names no folder to make: choose another --out")
    if not path.exists() and not path.is_symlink():
        return
    if not force:
        raise FileError(f"{str(path)!r} exists: choose another --out, pass --force to replace it, or delete it first")
    model = path.is_dir() and (any((path / name).is_file() for name in _OURS) or any(path.glob("*.safetensors")))
    if path.is_symlink() or not (model or (path.is_dir() and not any(path.iterdir()))):
        raise FileError(f"{str(path)!r} is no folder of a model or an adapter, and is not replaced: choose another")


def check_apart(out: Path, sources: Iterable[Path], *, inside: bool = False) -> None:
    """Refuse an output that is one of the inputs or around one, since replacing it deletes that; or inside one.

    Args:
        inside: whether it may be inside one, where it replaces nothing of the input.
    """
    here = out.resolve()
    for source in sources:
        there = source.expanduser().resolve()
        if here == there or here in there.parents or (there in here.parents and not inside):
            raise FileError(f"{str(out)!r} and the input {str(source)!r} are not apart: choose another --out")


def write_folder(path: Path, fill: Callable[[Path], None], *, size: int = 0, force: bool = False) -> None:
    """Make a folder in one step: `fill` writes into a temporary one beside it, which then takes the name.

    Args:
        size: bytes that will be needed, checked against the free space first.
        force: replace a model or an adapter that has the name already. The old folder stays until the new one is whole.

    Raises:
        FileError: if the name is taken, the place cannot be written to or is too small; nothing is left behind.
    """
    check_free(path, force)
    fresh, old = (path.with_name(f".{path.name}.{os.getpid()}{end}") for end in ("", ".old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise FileError(f"{path.parent} has {free:,} bytes left and {size:,} are needed; nothing was written")
        fresh.mkdir()
        fill(fresh)
        for file in (*filter(Path.is_file, fresh.rglob("*")), fresh):
            atomic.sync(file)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(fresh, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        atomic.sync(path.parent)
    except OSError as problem:
        raise FileError(f"cannot write {str(path)!r}: {problem.strerror or problem}; nothing was changed") from problem
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Delete what a process that was killed has left; what it was about to replace gets its name back."""
    for orphan in sorted(path.parent.glob(f".{glob.escape(path.name)}.*")):
        owner = orphan.name[len(path.name) + 2 :].removesuffix(".old")
        if not owner.isdigit() or (int(owner) != os.getpid() and atomic.alive(int(owner))):
            continue
        if orphan.suffix == ".old" and not path.exists():
            os.replace(orphan, path)
        else:
            shutil.rmtree(orphan, ignore_errors=True)
