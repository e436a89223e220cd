"""kohya: one file for kohya's trainers, ComfyUI, A1111 and what else draws.

    lora_unet_<path>.lora_down.weight     (r, n) or (r, n, *k), the dots of the path as underscores
    lora_unet_<path>.lora_up.weight       (m, r) or (m, r, 1, 1)
    lora_unet_<path>.alpha                r: readers multiply by α/r

The prefix says which model the path lies in. It is told from the names of diffusers' UNets and transformers, and of
CLIP's text encoders; `prefix` says it where there are two encoders, or another model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.errors import NotPortable
from headstart.files import atomic
from headstart.files.adapter import METADATA, separate
from headstart.files.portable.change import Change
from headstart.files.portable.parcel import (
    Parcel,
    refuse_dora,
    refuse_embeddings,
    refuse_extras,
    refuse_groups,
)
from headstart.files.tensors import write_tensors

_UNET = (
    "down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding",
    "transformer_blocks", "single_transformer_blocks", "joint_blocks", "double_blocks", "single_blocks",
    "input_blocks", "middle_block", "output_blocks", "time_text_embed", "x_embedder", "context_embedder", "proj_out",
)  # fmt: skip


def refuse(parcel: Parcel) -> None:
    refuse_dora(parcel, "kohya")
    refuse_extras(parcel, "kohya")
    refuse_groups(parcel, "kohya")
    refuse_embeddings(parcel, "kohya", "its readers adapt no lookups; leave the embedding out, or merge")
    if parcel.prefix is None:
        prefix_of(parcel)


def prefix_of(parcel: Parcel) -> str:
    """The prefix that the names of the layers speak for."""
    first = {change.name.split(".", 1)[0] for change in parcel.changes}
    if first <= set(_UNET):
        return "lora_unet"
    if first == {"text_model"}:
        return "lora_te"
    raise NotPortable(
        f"kohya: {parcel.changes[0].name!r} is a layer of no UNet and no CLIP text encoder: pass `prefix` (lora_unet, "
        "lora_te, lora_te1, lora_te2)"
    )


def write(parcel: Parcel, changes: Sequence[Change], origin: Mapping[str, Any], out: Path) -> None:
    prefix = parcel.prefix or prefix_of(parcel)
    tensors: dict[str, Tensor] = {}
    for change in changes:
        name = f"{prefix}_{change.name.replace('.', '_')}"
        if f"{name}.alpha" in tensors:
            raise NotPortable(f"kohya: two layers would be called {name!r}: merge the adapter")
        tensors[f"{name}.lora_down.weight"] = separate(change.A)
        tensors[f"{name}.lora_up.weight"] = separate(change.B)
        tensors[f"{name}.alpha"] = torch.tensor(float(change.rank))
    ranks = {change.rank for change in changes}
    dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": dim,
        "ss_network_alpha": dim,
        METADATA: json.dumps(dict(origin), sort_keys=True),
    }
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    atomic.write_files(out.parent, {out.name: lambda path: write_tensors(path, tensors, metadata)}, size=size)
