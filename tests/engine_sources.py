"""The engines' own source files, out of their published wheels: a few kilobytes of each, kept in the cache.

pip says where the wheel of a pinned version lies, wherever it is told to look; of the wheel itself only the wanted
members are read. A test that cannot have its file is skipped, and says why.
"""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import types
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

VERSIONS = {"vllm": "0.33.0", "sglang": "0.5.23", "mlx-lm": "0.32.2", "diffusers": "0.42.0"}
_TARGET = ["--python-version", "3.11", "--implementation", "cp", "--only-binary", ":all:", "--target", "nowhere"]
_PLATFORMS = ["any", *(f"manylinux_2_{minor}_x86_64" for minor in (17, 28, 31, 34, 35))]


def source(package: str, member: str) -> Path:
    """One file of a package's wheel."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "headstart" / "engines"
    place = root / f"{package}-{VERSIONS[package]}" / member
    if not place.is_file():
        try:
            text = _read(package, member)
            place.parent.mkdir(parents=True, exist_ok=True)
            fresh = place.with_name(f"{place.name}.{os.getpid()}")
            fresh.write_bytes(text)
            fresh.replace(place)
        except (OSError, subprocess.SubprocessError, ValueError, KeyError, zipfile.BadZipFile) as problem:
            said = str(problem.stderr).strip() if isinstance(problem, subprocess.CalledProcessError) else str(problem)
            pytest.skip(f"{member} of {package} {VERSIONS[package]} cannot be fetched: {said.splitlines()[-1][:120]}")
    return place


def _read(package: str, member: str) -> bytes:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
    command += ["--retries", "0", "--timeout", "15", "--report", "-", *_TARGET]
    command += [argument for platform in _PLATFORMS for argument in ("--platform", platform)]
    asked = [*command, f"{package}=={VERSIONS[package]}"]
    found = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True).stdout
    url = json.loads(found[found.index("{") :])["install"][0]["download_info"]["url"]
    with zipfile.ZipFile(io.BufferedReader(_Remote(url), 1 << 18)) as wheel:
        return wheel.read(member)


class _Remote(io.RawIOBase):
    """A file on a server, read in pieces."""

    def __init__(self, url: str) -> None:
        self.url, self.place = url, 0
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=15) as answer:
            self.size = int(answer.headers["Content-Length"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def readinto(self, buffer: Any) -> int:
        last = min(self.place + len(buffer), self.size) - 1
        if last < self.place:
            return 0
        asked = urllib.request.Request(self.url, headers={"Range": f"bytes={self.place}-{last}"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            if answer.status != 206:
                raise OSError("the server sends no parts of files")
            piece = answer.read()
        buffer[: len(piece)] = piece
        self.place += len(piece)
        return len(piece)


@contextmanager
def stubbed(**modules: dict[str, Any]) -> Iterator[None]:
    """Modules that a file imports and that do not matter here; underscores stand for dots."""
    names = {name.replace("__", "."): content for name, content in modules.items()}
    with pytest.MonkeyPatch.context() as patch:
        for name, content in names.items():
            stub = types.ModuleType(name)
            vars(stub).update(content)
            patch.setitem(sys.modules, name, stub)
        yield


def executed(path: Path, package: str = "") -> dict[str, Any]:
    """What a file defines."""
    # A module of its own: dataclasses look theirs up.
    module = types.ModuleType(f"engine_{path.stem}")
    module.__package__ = package
    sys.modules[module.__name__] = module
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(module))
    return vars(module)


def functions(path: Path, *names: str, **known: Any) -> dict[str, Any]:
    """Some functions of a file, without the imports round them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kept = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert len(kept) == len(names), f"{path} has other functions now: {names}"
    future = ast.parse("from __future__ import annotations").body
    space = dict(known)
    exec(compile(ast.Module([*future, *kept], []), str(path), "exec"), space)
    return space
