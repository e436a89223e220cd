"""What lies beside the weights of a checkpoint: copied, and what a merge made untrue said anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from headstart.files.adapter import CONFIG, TENSORS
from headstart.files.header import parse_object
from headstart.files.merging.shards import INDEX
from headstart.files.merging.skeleton import SETTINGS

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data")


def companions(folder: Path) -> list[Path]:
    """The files that belong to the model and are no weights: not its card, and not what lies there besides."""
    own = [file for file in sorted(folder.iterdir()) if file.is_file()]
    for inner in sorted(folder.iterdir()):
        files = sorted(file for file in inner.rglob("*") if file.is_file()) if inner.is_dir() else []
        if not any(file.name == SETTINGS or file.name.endswith(_WEIGHTS) for file in files):
            own += files
    skipped = (CONFIG, TENSORS, SETTINGS, "README.md")
    return [
        file
        for file in own
        if file.name not in skipped
        and not file.name.endswith((*_WEIGHTS, INDEX))
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def copy(source: Path, target: Path) -> None:
    """Copy them."""
    for file in companions(source):
        there = target / file.relative_to(source)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, there)


def write_index(source: Path, folder: Path, places: Mapping[str, str], size: int) -> None:
    """The index of the new shards.

    Args:
        source: the old one; places: the shard of every tensor; size: of all tensors.
    """
    metadata = parse_object(source.read_text(encoding="utf-8"), str(source)).get("metadata")
    metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
    table = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
    (folder / source.name).write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_settings(source: Path, folder: Path, dtype: torch.dtype | None, untied: bool) -> None:
    """The model's config, if there is one.

    Args:
        dtype: of all weights from now on, as floats; untied: whether the head is a weight of its own from now on.
    """
    if not (source / SETTINGS).is_file():
        return
    text = (source / SETTINGS).read_text(encoding="utf-8")
    if dtype is not None or untied:
        settings = parse_object(text, str(source / SETTINGS))
        if dtype is not None:
            settings.pop("quantization_config", None)
            _name_dtype(settings, str(dtype).removeprefix("torch."))
        if untied:
            settings["tie_word_embeddings"] = False
            for part in settings.values():
                if isinstance(part, dict) and "tie_word_embeddings" in part:
                    part["tie_word_embeddings"] = False
        text = json.dumps(settings, indent=2) + "\n"
    (folder / SETTINGS).write_text(text, encoding="utf-8")


def _name_dtype(settings: dict[str, Any], name: str) -> None:
    """The dtype of the weights in a config and in the configs within it."""
    named = [key for key in ("dtype", "torch_dtype") if key in settings]
    for key in named or ["dtype"]:
        settings[key] = name
    for part in settings.values():
        if isinstance(part, dict) and ("dtype" in part or "torch_dtype" in part):
            _name_dtype(part, name)
