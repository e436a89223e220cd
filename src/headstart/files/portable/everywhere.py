"""portable: PEFT's format, reduced to what every engine reads alike.

s is folded into the factors, every layer has one rank R, lora_alpha = R, and there is no pattern, no rsLoRA, no init
that anybody would run again. Where the base is known, layers that an engine expects together (q, k and v; gate and up;
every block) and that the adapter leaves alone get factors of zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headstart.errors import NotPortable
from headstart.files.adapter import Entry, few, write_adapter
from headstart.files.portable.change import Change, padded
from headstart.files.portable.parcel import Parcel, refuse_dora, refuse_extras, refuse_groups
from headstart.lora import matrix

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's --max-lora-rank, and all of the others' too
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")


def refuse(parcel: Parcel) -> None:
    refuse_dora(parcel, "portable")
    refuse_extras(parcel, "portable")
    refuse_groups(parcel, "portable")


def rank_for(parcel: Parcel, changes: Sequence[Change]) -> int:
    """The smallest rank of the engines' that holds every layer."""
    largest = max(change.rank for change in changes)
    rank = next((rank for rank in RANKS if rank >= largest), None)
    if rank is None:
        raise NotPortable(
            f"{parcel.file.folder} is of rank {largest}, and engines serve at most {RANKS[-1]}: pass rank={RANKS[-1]}, "
            "and it is truncated, with the error stated; or merge it into its base"
        )
    return rank


def write(parcel: Parcel, changes: Sequence[Change], origin: Mapping[str, Any], out: Path) -> None:
    rank = changes[0].rank
    if parcel.base is not None:
        changes = [padded(change, rank) for change in completed(changes, parcel.base)]
    entries = [Entry(c.path, c.A, c.B, rank, rank, embedding=c.embedding) for c in changes]
    write_adapter(out, entries, _fields(parcel, changes), {}, origin)


def _fields(parcel: Parcel, changes: Sequence[Change]) -> dict[str, Any]:
    rank = changes[0].rank
    kept = ("task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version")
    return {
        **{name: parcel.config[name] for name in kept if name in parcel.config},
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted({change.name.rsplit(".", 1)[-1] for change in changes}),
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": bool(parcel.config.get("fan_in_fan_out")),
        "init_lora_weights": True,
        "inference_mode": True,
        **_narrowed(parcel, changes),
    }


def _narrowed(parcel: Parcel, changes: Sequence[Change]) -> dict[str, Any]:
    """What keeps PEFT from adapting layers that merely share a suffix. No other engine asks."""
    if parcel.base is None:
        names = ("exclude_modules", "layers_to_transform", "layers_pattern")
        return {name: parcel.config[name] for name in names if parcel.config.get(name)}
    suffixes = {change.name.rsplit(".", 1)[-1] for change in changes}
    own = {change.name for change in changes}
    over = sorted(n for n, _ in parcel.base.named_modules() if n.rsplit(".", 1)[-1] in suffixes and n not in own)
    return {"exclude_modules": over} if over else {}


# ------------------------------------------------------------------ layers that engines expect together


def completed(changes: Sequence[Change], base: nn.Module) -> list[Change]:
    """The changes, and zeros for the layers of the base that stand in a row with one that is adapted."""
    own = {change.name for change in changes}
    rows = _rows(own)
    dtype, added = changes[0].A.dtype, []
    for name, module in base.named_modules():
        if name not in own and _row(name) in rows and matrix.is_linear(module):
            m, n = matrix.layout(module).blocks(matrix.outline(module))[0].shape
            added.append(Change(name, torch.zeros(1, n, dtype=dtype), torch.zeros(m, 1, dtype=dtype)))
    return sorted([*changes, *added], key=lambda change: change.name)


def gaps(changes: Sequence[Change]) -> str | None:
    """Where no base is known: what engines may miss, as far as the names tell."""
    names = {change.name for change in changes}
    blocks: dict[str, set[str]] = {}
    for name in names:
        blocks.setdefault(_row(name), set()).add(".".join(_BLOCK.findall(name)))
    missing = sorted(_rows(names) - set(blocks))
    widest = max(blocks.values(), key=len)
    missing += sorted(row for row, found in blocks.items() if "*" in row and found < widest)
    if not missing:
        return None
    return (
        f"some layers are left alone ({few(missing)}): SGLang and LoRAX expect q, k and v, gate and up, and every "
        "block. Pass the base, and they get factors of zero"
    )


def _rows(names: Iterable[str]) -> set[str]:
    rows = {_row(name) for name in names}
    for row in list(rows):
        stem, _, leaf = row.rpartition(".")
        rows |= {f"{stem}.{other}" for group in _TOGETHER if leaf in group for other in group}
    return rows


def _row(name: str) -> str:
    """A layer's name with its block's number taken out."""
    return _BLOCK.sub("*", name)


def notes(parcel: Parcel, changes: Sequence[Change]) -> list[str]:
    """What whoever serves the file must know."""
    said = []
    rank = changes[0].rank
    if rank > 16:
        flag = next((value for value in RANKS if value >= rank), rank)
        said.append(f"vLLM serves rank {rank} with --max-lora-rank {flag}; its default is 16")
    if embeddings := [change.name for change in changes if change.embedding]:
        said.append(f"LoRAX leaves out lookups ({few(embeddings)})")
    if any(not change.is_matrix for change in changes):
        said.append("convolutions are read by PEFT and diffusers alone")
    if parcel.base is None:
        said += [found] if (found := gaps(changes)) else []
    elif added := len(completed(changes, parcel.base)) - len(changes):
        said.append(f"{added} layers that the adapter leaves alone have factors of zero: engines expect them")
    return said
