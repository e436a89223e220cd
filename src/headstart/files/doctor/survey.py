"""What a folder of adapter weights holds, read without trust and without judgement.

Whatever is odd becomes a `Fault` with a name, and reading goes on as far as it can. The factors are read one layer at a
time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.errors import AdapterFormatError
from headstart.files.adapter import CONFIG, METADATA, PREFIX, few, parameters_in, pattern_name, plain_name, scale_of
from headstart.files.doctor.stranger import (
    DIALECTS,
    DIFFUSERS,
    PEFT,
    Dialect,
    Fault,
    checked,
    find,
    parsed,
    read_config,
    read_tensors,
)
from headstart.lora.layouts import Experts, Pair

_FLOATS = ("F64", "F32", "F16", "BF16")
# Parts of a diffusers pipeline, before names that end as PEFT's do; `transformer.h` is GPT-2's.
_PIPELINE = re.compile(r"(unet|text_encoder(_\d)?|transformer(?!\.h\.))\.").match
_OTHER_KINDS = re.compile(r"\.(hada_w|lokr_w|oft_|on_input$|w_norm$|diff$)").search


@dataclass(frozen=True)
class Layer:
    """One adapted layer as its file has it.

    Attributes:
        path: its name in the file, without the prefix; keys: slot → tensor.
        rank: of the tensors, of one expert where they hold several; stated: the config's.
        scaling: s as the file's own format means it.
        shape: (m, n) of the change; dtype: of A; experts: how many matrices, 0 for a plain layer.
    """

    path: str
    keys: Mapping[str, str]
    rank: int
    stated: int
    scaling: float
    shape: tuple[int, int]
    dtype: str
    experts: int = 0

    @property
    def name(self) -> str:
        return plain_name(self.path)

    @property
    def embedding(self) -> bool:
        return "embedding" in self.keys["A"]


@dataclass(frozen=True)
class Survey:
    """A folder, as far as it could be read.

    Attributes:
        file: the tensors'; config: the fields that can be meant; raw: all of them; provenance: our own metadata.
        tensors: every tensor's shape and dtype; layers: the complete pairs by path; extras: what belongs to none.
    """

    file: Path
    dialect: Dialect
    config: Mapping[str, Any]
    raw: Mapping[str, Any]
    provenance: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    layers: Mapping[str, Layer]
    extras: tuple[str, ...]
    halves: tuple[str, ...]
    faults: tuple[Fault, ...]
    size: int = 0
    neighbours: tuple[str, ...] = ()

    @property
    def place(self) -> Path:
        """What to call it: the folder, or the file where only its own name tells it from others beside it."""
        return self.file.parent if self.file.name in [dialect.file for dialect in DIALECTS] else self.file

    @cached_property
    def _tensor(self) -> Callable[[str], Tensor]:
        from safetensors import safe_open

        file: Any = safe_open(self.file, "pt")
        return lambda name: file.get_tensor(name)

    def read(self, name: str) -> Tensor:
        """One tensor; that its size is bounded has been seen to."""
        return self._tensor(name)

    def pair(self, layer: Layer) -> Pair:
        """A: (r, n) and B: (m, r) as the format writes them, whatever way they stand in the file."""
        A, B = self.read(layer.keys["A"]), self.read(layer.keys["B"])
        return (A.T, B.T) if self.dialect.turned else (A, B)

    def matrices(self, layer: Layer) -> list[Pair]:
        """The pairs of plain matrices: one, or one an expert; kernels are flattened."""
        A, B = self.pair(layer)
        if layer.experts:
            stack = Experts(count=layer.experts)
            return stack.unpack(*stack.from_file(A, B))
        A, B = A.flatten(1), B.flatten(1)
        groups = len(A) // B.shape[1]
        # A grouped convolution's B reads, in each group of rows, the group's own rows of A.
        return [(A, B if groups == 1 else torch.block_diag(*B.chunk(groups)))]

    @property
    def fatal(self) -> Fault | None:
        return next((fault for fault in self.faults if fault.fatal), None)

    @property
    def init(self) -> str:
        """The start that the config names, in lower case: "true" and "false" for what JSON writes so."""
        return str(self.raw.get("init_lora_weights", True)).lower()


def survey(path: str | Path) -> Survey:
    """Read an adapter folder, or one file of tensors, of any origin.

    Raises:
        AdapterFormatError: if there is no adapter: nothing at that place, only a pickle, another kind of adapter.
    """
    file, dialect = find(path)
    faults: list[Fault] = []
    tensors, metadata = read_tensors(file, faults)
    if dialect is None:
        dialect = max(DIALECTS, key=lambda d: sum(_slot(d, name) is not None for name in tensors))
        if dialect is PEFT and all(map(_PIPELINE, tensors)) and not (file.parent / CONFIG).is_file():
            dialect = DIFFUSERS
    provenance = parsed(metadata.get(METADATA, "{}"), f"the metadata of {file}", faults)
    raw = read_config(file, dialect, metadata, faults)
    config = checked(raw, file.parent / CONFIG, bool(provenance), faults) if dialect is PEFT else raw
    if dialect is PEFT and raw.get("peft_type", "LORA") != "LORA":
        raise AdapterFormatError(f"{file.parent} is of type {raw.get('peft_type')!r}: only LORA adapters are judged")
    found = Survey(file, dialect, config, raw, provenance, tensors, {}, (), (), ())
    layers, extras, halves = _layers(found, faults)
    neighbours = tuple(sorted(entry.name for entry in file.parent.iterdir())[:1000])
    size = file.stat().st_size
    return replace(
        found, layers=layers, extras=extras, halves=halves, faults=tuple(faults), size=size, neighbours=neighbours
    )


# ------------------------------------------------------------------ the layers


def _slot(dialect: Dialect, name: str) -> str | None:
    return next((slot for slot in dialect.slots if name.endswith(f".{slot}")), None)


def _layers(found: Survey, faults: list[Fault]) -> tuple[dict[str, Layer], tuple[str, ...], tuple[str, ...]]:
    """The complete pairs, the tensors that belong to no pair, and the paths with half a pair."""
    paths: dict[str, dict[str, str]] = {}
    extras = []
    if others := [name for name in found.tensors if _OTHER_KINDS(name)]:
        told = f"no LoRA but another method's parts (LoHa, LoKr, OFT, …): {few(others)}"
        faults.append(Fault(told, "merge it where it was trained", fatal=True))
        return {}, tuple(found.tensors), ()
    for name in found.tensors:
        slot = _slot(found.dialect, name)
        if slot is None:
            extras.append(name)
            continue
        path = name.removeprefix(PREFIX)[: -len(slot) - 1]
        paths.setdefault(path, {})[found.dialect.slots[slot]] = name
    layers = {}
    halves = sorted(path for path, keys in paths.items() if not {"A", "B"} <= set(keys))
    for path, keys in paths.items():
        if path not in halves:
            try:
                layers[path] = _layer(found, path, keys)
            except AdapterFormatError as error:
                faults.append(Fault(str(error), "save the adapter again"))
    if halves:
        faults.append(Fault(f"half a pair: {few(halves)} (an A without its B, or the reverse)", "save it again"))
    if found.tensors and not paths:
        inside = any(re.search(r"\.lora_[AB]\.[^.]+\.weight$", name) for name in found.tensors)
        told = ": their names hold the adapter's, as in a state_dict" if inside else ""
        faults.append(Fault(f"no LoRA factors among {len(extras)} tensors{told}", "save it by save_pretrained", True))
    return layers, tuple(extras), tuple(halves)


def _layer(found: Survey, path: str, keys: Mapping[str, str]) -> Layer:
    (a, dtype), (b, other) = (found.tensors[keys[slot]] for slot in "AB")
    if dtype not in _FLOATS or other not in _FLOATS:
        raise AdapterFormatError(f"{path!r} holds {dtype} and {other}, no floating-point numbers")
    if len(a) < 2 or len(b) < 2 or 0 in (*a, *b):
        raise AdapterFormatError(f"{path!r}: factors of shapes {a} and {b} are no matrices")
    if found.dialect.turned:
        a, b = a[::-1], b[::-1]
    # Grouped convolutions hold r/groups columns.
    if a[0] != b[1] and (len(a) == 2 or a[0] % b[1]):
        raise AdapterFormatError(f"{path!r}: A {a} and B {b} do not multiply")
    stated, scaling = _scale(found, path, keys, a[0])
    several = parameters_in(path, found.config) and a[0] != stated and a[0] % stated == 0
    experts = a[0] // stated if several else 0
    rank = stated if several else a[0]
    return Layer(path, keys, rank, stated, scaling, (b[0], math.prod(a[1:])), dtype, experts)


def _scale(found: Survey, path: str, keys: Mapping[str, str], rank: int) -> tuple[int, float]:
    """The rank that the file states for a layer, and s."""
    if found.dialect is PEFT:
        stated, alpha = scale_of(pattern_name(path, found.config), found.config)
        return stated, alpha / stated
    if found.dialect.name == "mlx":
        given = found.config.get("lora_parameters")
        scale = given.get("scale") if isinstance(given, dict) else None
        return rank, float(scale) if isinstance(scale, int | float) and math.isfinite(scale) else 1.0
    if "alpha" in keys and math.prod(found.tensors[keys["alpha"]][0]) == 1:
        alpha = float(found.read(keys["alpha"]))
        return rank, alpha / rank if alpha else 1.0
    return rank, 1.0
