"""mlx: the folder that mlx-lm trains and loads.

    adapters.safetensors     <layer>.lora_a (n, r), <layer>.lora_b (r, m), and DoRA's <layer>.m (m,)
    adapter_config.json      fine_tune_type, num_layers, lora_parameters: rank, scale, dropout, keys

Layers inside blocks are named by their place in the block, the others in full. A block that the adapter leaves alone
gets a pair of mlx's own, with B = 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from headstart.errors import NotPortable
from headstart.files import atomic
from headstart.files.adapter import CONFIG, METADATA, separate
from headstart.files.portable.change import Change
from headstart.files.portable.parcel import Parcel, refuse_convolutions, refuse_embeddings, refuse_extras
from headstart.files.tensors import write_tensors

TENSORS = "adapters.safetensors"
_IN_BLOCK = re.compile(r"(?:language_model\.)?model\.layers\.(\d+)\.(.+)")
_OUTSIDE = re.compile(r"(?:language_model\.)?(model\.embed_tokens|lm_head)")


def refuse(parcel: Parcel) -> None:
    refuse_extras(parcel, "mlx")
    refuse_convolutions(parcel, "mlx")
    for change in parcel.changes:
        if ".experts." in change.name:
            raise NotPortable(f"mlx: {change.name!r}: mlx-lm stacks experts into one layer: merge the adapter")
        if not _IN_BLOCK.fullmatch(change.name) and not _OUTSIDE.fullmatch(change.name):
            raise NotPortable(
                f"mlx: mlx-lm has another name for {change.name!r}: merge the adapter, and convert the model"
            )
    if _may_be_tied(parcel):
        why = "where the head is tied to it, mlx changes both: pass a base that does not tie them, or merge"
        refuse_embeddings(parcel, "mlx", why)
    if any(change.embedding and change.magnitude is not None for change in parcel.changes):
        refuse_embeddings(parcel, "mlx", "a DoRA of a lookup means something else in mlx: merge it")


def _may_be_tied(parcel: Parcel) -> bool:
    config = getattr(parcel.base, "config", None)
    return config is None or bool(config.get_text_config().tie_word_embeddings)


def write(parcel: Parcel, changes: Sequence[Change], origin: Mapping[str, Any], out: Path) -> None:
    tensors = {key: separate(value) for change in changes for key, value in _tensors(change).items()}
    metadata = {"format": "mlx", METADATA: json.dumps(dict(origin), sort_keys=True)}
    text = json.dumps(_config(parcel, changes), indent=4, sort_keys=True) + "\n"
    writers: dict[str, atomic.Writer] = {
        TENSORS: lambda path: write_tensors(path, tensors, metadata),
        CONFIG: atomic.text_writer(text),
    }
    atomic.write_files(out, writers, size=sum(t.numel() * t.element_size() for t in tensors.values()))


def _tensors(change: Change) -> dict[str, Tensor]:
    found = {f"{change.name}.lora_a": change.A.T, f"{change.name}.lora_b": change.B.T}
    if change.magnitude is not None:
        found[f"{change.name}.m"] = change.magnitude.flatten()
    return found


def _config(parcel: Parcel, changes: Sequence[Change]) -> dict[str, Any]:
    inside = [hit for change in changes if (hit := _IN_BLOCK.fullmatch(change.name))]
    outside = {change.name for change in changes if not _IN_BLOCK.fullmatch(change.name)}
    return {
        "model": parcel.config.get("base_model_name_or_path"),
        "fine_tune_type": "dora" if any(change.magnitude is not None for change in changes) else "lora",
        "num_layers": _blocks(parcel, [int(hit[1]) for hit in inside]),
        "lora_parameters": {
            "rank": changes[0].rank,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": sorted({hit[2] for hit in inside} | outside),
        },
    }


def _blocks(parcel: Parcel, indices: Sequence[int]) -> int:
    """How many blocks from the last one back mlx gives factors to."""
    if not indices:
        return 0
    config = getattr(parcel.base, "config", None)
    return -1 if config is None else int(config.get_text_config().num_hidden_layers) - min(indices)
