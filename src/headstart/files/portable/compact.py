"""compact: PEFT's format, in as few numbers as the change has.

Every layer keeps its true rank, in patterns that PEFT and vLLM (0.33 and later) read. What is no low-rank change, a
DoRA's magnitudes, biases, modules that trained in full, is kept as it is. Factors that are as small as they can be
keep their own bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from headstart.errors import NotPortable
from headstart.files.adapter import Entry, scales, write_adapter
from headstart.files.peft_rules import OUTPUT
from headstart.files.portable.change import DTYPES, Change, shortest, stored
from headstart.files.portable.parcel import Parcel, refuse_groups

# What says where the factors came from, not what they mean.
_SPENT = ("eva_config", "corda_config", "lora_ga_config", "loftq_config", "runtime_config")


def refuse(parcel: Parcel) -> None:
    """It holds whatever PEFT's format holds."""


def write(parcel: Parcel, changes: Sequence[Change], origin: Mapping[str, Any], out: Path) -> None:
    entries = [Entry(c.path, c.A, c.B, c.rank, c.scaling * c.rank, c.magnitude, c.embedding) for c in changes]
    config = {name: value for name, value in parcel.config.items() if name not in _SPENT}
    targets = config.get("target_modules")
    fields = {
        **config,
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        **scales(entries),
    }
    write_adapter(out, entries, fields, parcel.extras, origin)


def changes(parcel: Parcel, rank: int | None, dtype: str) -> list[Change]:
    """Every change at its true rank, or a smaller one that was asked for, and in a dtype that was asked for."""
    if rank is not None or dtype != "auto":
        refuse_groups(parcel, "compact with a rank or a dtype")
    return [_smallest(parcel, change, rank, dtype) for change in parcel.changes]


def _smallest(parcel: Parcel, change: Change, rank: int | None, dtype: str) -> Change:
    # PEFT gives an attention and its output projection one rank and one scale.
    attention = f"{change.path}{OUTPUT}" in parcel.file.entries or change.path.endswith(OUTPUT)
    free = change.B.shape[1] == change.rank and not attention
    short = shortest(change) if free else change
    best = min(change, short, key=_bytes)
    if dtype == "auto" and (rank is None or best.rank <= rank):
        return best
    if attention:
        raise NotPortable(
            f"{change.name!r} is part of an attention, whose rank and dtype stay: leave out rank and dtype"
        )
    return stored(short, min(short.rank, rank or short.rank), DTYPES.get(dtype, torch.float32))


def _bytes(change: Change) -> int:
    return change.A.numel() * change.A.element_size() + change.B.numel() * change.B.element_size()
