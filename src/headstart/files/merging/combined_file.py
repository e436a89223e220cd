"""What is written of several adapters that became one: layers as PEFT stores them, its config, what they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headstart.files.adapter import AdapterFile, Entry, parameters_in, pattern_name, plain_name
from headstart.files.fields import VERSION
from headstart.files.merging.factors import Factors, padded, stacked_in
from headstart.files.peft_rules import OUTPUT, saved_modules


def entries_of(files: Sequence[AdapterFile], found: Mapping[str, Factors]) -> list[Entry]:
    """The layers as PEFT writes them, with s = 1."""
    width = max((f.A.shape[1] for path, f in found.items() if stacked_in(files, path)), default=0)
    made = []
    for path, factors in found.items():
        first = next(file.entries[path] for file in files if path in file.entries)
        stacked = stacked_in(files, path)
        A, B = padded(factors, width) if stacked else (factors.A, factors.B)
        blocks, rank = len(A), A.shape[1]
        if stacked:
            stored_A, stored_B, whole = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1), rank
        else:
            stored_A = A.reshape(blocks * rank, *first.A.shape[1:])
            stored_B = B.reshape(-1, rank, *first.B.shape[2:])
            whole = blocks * rank
        stored = stored_A.float().contiguous(), stored_B.float().contiguous()
        made.append(Entry(path, *stored, whole, float(whole), None, first.embedding))
    return _outputs_alike(made)


def _outputs_alike(entries: list[Entry]) -> list[Entry]:
    """An attention and its output projection have one rank in PEFT: the smaller one is filled with zeros."""
    by_path = {entry.path: entry for entry in entries}
    for path, entry in list(by_path.items()):
        inner = by_path.get(f"{path}{OUTPUT}")
        if inner is None or inner.rank == entry.rank:
            continue
        rank = max(inner.rank, entry.rank)
        for one in (entry, inner):
            A, B = padded(Factors(one.A, one.B), rank)
            by_path[one.path] = Entry(one.path, A, B, rank, float(rank), None, one.embedding)
    return list(by_path.values())


def pattern_names(files: Sequence[AdapterFile], entries: Sequence[Entry]) -> dict[str, str]:
    """What PEFT matches rank_pattern against, where it is not the layer's name."""
    names = {e.path: plain_name(e.path.removesuffix(OUTPUT)) for e in entries if e.path.endswith(OUTPUT)}
    parameters = {"target_parameters": _parameters(files)}
    return names | {e.path: pattern_name(e.path, parameters) for e in entries if parameters_in(e.path, parameters)}


def fields_of(files: Sequence[AdapterFile], entries: Sequence[Entry]) -> dict[str, Any]:
    """PEFT's config but for the scales."""
    first = files[0].config
    parameters = _parameters(files)
    bare = {e.path for e in entries if parameters_in(e.path, {"target_parameters": parameters})}
    named = sorted({e.name for e in entries if e.path not in bare and not e.path.endswith(OUTPUT)})
    targets = _shared_targets(files) or named
    saved = sorted({name for file in files for name in saved_modules(file)})
    fields = {
        "peft_type": "LORA",
        "task_type": first.get("task_type"),
        "base_model_name_or_path": first.get("base_model_name_or_path"),
        "target_modules": targets,
        "modules_to_save": saved or None,
        "bias": next((b for file in files if (b := file.config.get("bias")) not in (None, "none")), "none"),
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": any(bool(file.config.get("fan_in_fan_out")) for file in files),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return {**fields, "target_parameters": parameters} if parameters else fields


_NARROWED = ("exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying")


def _shared_targets(files: Sequence[AdapterFile]) -> list[str] | None:
    """The list of targets that all files have, where it alone says which layers are meant."""
    lists = [file.config.get("target_modules") for file in files]
    found = sorted(lists[0]) if isinstance(lists[0], list) else None
    if any(not isinstance(one, list) or sorted(one) != found for one in lists):
        return None
    return None if any(file.config.get(field) for file in files for field in _NARROWED) else found


def _parameters(files: Sequence[AdapterFile]) -> list[str]:
    return sorted({str(name) for file in files for name in file.config.get("target_parameters") or ()})


def provenance_of(files: Sequence[AdapterFile], weights: Sequence[float], method: str) -> dict[str, Any]:
    base = {path: values for file in reversed(files) for path, values in file.provenance.get("base", {}).items()}
    made_of = [
        {"strategy": file.provenance.get("strategy", "loaded"), "weight": weight}
        for file, weight in zip(files, weights, strict=True)
    ]
    return {"format": VERSION, "strategy": "combined", "options": {"method": method, "of": made_of}, "base": base}
