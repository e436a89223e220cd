"""An adapter folder in PEFT's format, without a model: what is in it, read strictly and written atomically.

    adapter_config.json           how the tensors are meant: rank and α by layer, what else trains
    adapter_model.safetensors     base_model.model.<layer>.lora_A.weight, …lora_B.weight, …

What we write is plain LoRA on the original weights: s = α/r without rsLoRA, `init_lora_weights` true, so that every
reader computes the same function. Where it came from stands in the safetensors metadata, which readers ignore.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.errors import AdapterFormatError, FileError, KeyMismatch
from headstart.files import atomic
from headstart.files.fields import check_config, check_origin
from headstart.files.header import parse_object, read_header, read_json
from headstart.files.tensors import write_tensors

CONFIG, TENSORS, REPORT = "adapter_config.json", "adapter_model.safetensors", "init_report.json"
TAKEN = "quantized_base.safetensors"  # see quantized_base.py
CORES = "trained_core.safetensors"  # see cores.py
PREFIX = "base_model.model."
METADATA = "headstart"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COPY = ".base_layer.weight"  # PEFT saves the embeddings that it adapts
SLOTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}


@dataclass(frozen=True)
class Entry:
    """One layer of an adapter as it stands in a file.

    Attributes:
        path: the layer's name as PEFT writes it, "base_layer" infixes included.
        A, B: the factors in the file's form; rank, alpha: what they are scaled by, s = α/r.
        magnitude: DoRA's, in the file's form.
        embedding: whether it is a lookup, whose keys differ.
    """

    path: str
    A: Tensor
    B: Tensor
    rank: int
    alpha: float
    magnitude: Tensor | None = None
    embedding: bool = False

    def tensors(self) -> dict[str, Tensor]:
        a, b = ("lora_embedding_A", "lora_embedding_B") if self.embedding else ("lora_A.weight", "lora_B.weight")
        found = {f"{PREFIX}{self.path}.{a}": self.A, f"{PREFIX}{self.path}.{b}": self.B}
        if self.magnitude is not None:
            found[f"{PREFIX}{self.path}.lora_magnitude_vector"] = self.magnitude
        return found

    @property
    def name(self) -> str:
        """The layer's name in the unwrapped model."""
        return plain_name(self.path)


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter folder holds.

    Attributes:
        config: PEFT's fields; entries: the layers by path; extras: every other tensor, by name without the prefix;
        provenance: what headstart wrote about its origin, empty for other people's files.
        taken: by path, the pair that was taken from a weight before it was quantised.
    """

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    extras: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    taken: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def plain_name(path: str) -> str:
    """A name without the infixes that wrapping left in it."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def parameters_in(path: str, config: Mapping[str, Any]) -> list[str]:
    """The bare parameters of a module that a config names, by their own names."""
    wanted = [str(name).rpartition(".") for name in config.get("target_parameters") or ()]
    here, modules = f".{plain_name(path)}", config.get("target_modules") or ()
    found = [leaf for owner, _, leaf in wanted if owner and here.endswith(f".{owner}")]
    if found or isinstance(modules, str) or any(here.endswith(f".{module}") for module in modules):
        return found
    return [leaf for owner, _, leaf in wanted if not owner]


def pattern_name(path: str, config: Mapping[str, Any]) -> str:
    """What PEFT matches its patterns against: a layer's name, or that of the bare parameter in it.

    Of several parameters the one that the module registers first, which is that of the gates, is wrapped innermost.
    """
    own = sorted(parameters_in(path, config), key=lambda leaf: "gate" not in leaf)
    return f"{plain_name(path)}.{own[0 if 'base_layer' in path.split('.') else -1]}" if own else plain_name(path)


def scales(entries: Sequence[Entry], names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """r, lora_alpha and the two patterns that say every layer's rank and α.

    Args:
        names: what PEFT matches a pattern against, by path, where it is not the layer's own name.
    """
    named = [((names or {}).get(e.path, e.name), (e.rank, e.alpha)) for e in entries]
    (rank, alpha), _ = Counter(scale for _, scale in named).most_common(1)[0]
    by_leaf: dict[str, set[tuple[int, float]]] = {}
    for name, scale in named:
        by_leaf.setdefault(name.rsplit(".", 1)[-1], set()).add(scale)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, scale in named:
        leaf = name.rsplit(".", 1)[-1]
        if scale == (rank, alpha) and len(by_leaf[leaf]) == 1:
            continue
        key = leaf if len(by_leaf[leaf]) == 1 else f"^{re.escape(name)}"
        # PEFT looks up both tables with the first key that matches in either: they must name the same layers.
        ranks[key], alphas[key] = scale[0], _number(scale[1])
    return {"r": rank, "lora_alpha": _number(alpha), "rank_pattern": ranks, "alpha_pattern": alphas}


def _number(value: float) -> float | int:
    """Integers as integers: some engines parse nothing else."""
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-12) else value


def write_adapter(
    folder: Path,
    entries: Sequence[Entry],
    config: Mapping[str, Any],
    extras: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
    more: Mapping[str, str] | None = None,
    beside: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write an adapter folder, whole or not at all.

    Args:
        folder: where; created if need be.
        entries: its layers; config: PEFT's fields; extras: other tensors by name, without the prefix.
        provenance: plain values about its origin, for the metadata.
        more: other text files to write with it, by name.
        beside: the tensors of further safetensors files, by their names; one without tensors is not written.
    """
    tensors = {key: value for entry in entries for key, value in entry.tensors().items()}
    tensors |= {f"{PREFIX}{name}": value for name, value in extras.items()}
    tensors = _untied({name: separate(value) for name, value in tensors.items()})
    text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
    # The config stands in the metadata too: should a process die between the two renames, nothing is lost.
    metadata = {"format": "pt", METADATA: json.dumps({**provenance, "adapter_config": json.loads(text)})}
    size = sum(t.numel() * t.element_size() for t in tensors.values()) + len(text) + len(metadata[METADATA])
    writers: dict[str, atomic.Writer] = {n: atomic.text_writer(t) for n, t in (more or {}).items()}
    for place, values in (beside or {}).items():
        if values:
            apart = {name: separate(value) for name, value in values.items()}
            writers[place] = partial(write_tensors, tensors=apart, metadata={"format": "pt"})
    writers[TENSORS] = lambda path: write_tensors(path, tensors, metadata)
    writers[CONFIG] = atomic.text_writer(text)
    atomic.write_files(folder, writers, size=size)


def separate(tensor: Tensor) -> Tensor:
    """A tensor that shares memory with no other, as the format demands."""
    tensor = tensor.detach().to("cpu")
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if tensor.is_contiguous() and whole else tensor.clone(memory_format=torch.contiguous_format)


def _untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, tied weights copied: the format lets no two names share memory."""
    found: dict[int, Tensor] = {}
    return {n: t.clone() if found.setdefault(t.data_ptr(), t) is not t else t for n, t in tensors.items()}


def find_adapter(path: str | Path) -> Path:
    """The folder of an adapter: a local one, or one from the hub by its name.

    Raises:
        AdapterFormatError: if there is none; it says what was looked for.
    """
    folder = Path(path)
    if _stands(folder, Path.is_dir):
        for name in (CONFIG, TENSORS):
            if not (folder / name).is_file():
                pickled = (folder / "adapter_model.bin").is_file()
                inside = sorted(each.name for each in folder.iterdir() if (each / TENSORS).is_file())
                hint = f"; pass one of its folders: {few(inside)}" if inside else ""
                hint = "; it has a pickle, which is not loaded: convert it to safetensors" if pickled else hint
                raise AdapterFormatError(f"{folder} has no {name}{hint}")
        return folder
    if _stands(folder) or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise AdapterFormatError(f"{path} is neither a folder with {CONFIG} and {TENSORS} nor a name on the hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise AdapterFormatError(f"{path} is no folder; to load it from the hub, install huggingface_hub") from error
    try:
        return Path(snapshot_download(str(path), allow_patterns=[CONFIG, TENSORS, REPORT, TAKEN, CORES]))
    except Exception as error:
        raise AdapterFormatError(f"{path} is no local folder, and the hub gave none: {error}") from error


def read_adapter(path: str | Path, *, allow_nonfinite: bool = False, mutated: bool = False) -> AdapterFile:
    """Read an adapter folder, strictly. Nothing in it is executed.

    Args:
        mutated: take an adapter that needs a changed base, too. The caller then knows what to do about it.

    Raises:
        AdapterFormatError: malformed, pickled, of another kind, or meant for a changed base.
        KeyMismatch: a factor without its partner, shapes that do not fit each other, or values that are not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = find_adapter(path)
    header = read_header(folder / TENSORS)
    where = f"the metadata of {folder / TENSORS}"
    provenance = parse_object(str(header.metadata.get(METADATA, "{}")), where)
    check_origin(provenance, where)
    config = _config(folder, provenance)
    check_config(config, folder / CONFIG, ours=mutated or bool(provenance))
    try:
        tensors = load_file(folder / TENSORS)
    except SafetensorError as error:
        raise AdapterFormatError(f"{folder / TENSORS} is damaged: {error}") from error
    entries, extras = _sort(tensors, config, folder)
    if not allow_nonfinite:
        # In float32, as they will be used.
        bad = sorted(n for n, t in tensors.items() if t.is_floating_point() and not bool(t.float().isfinite().all()))
        if bad:
            raise KeyMismatch(f"{folder}: NaN or infinity in {few(bad)}")
    named = {path for table in ("anchored", "frozen", "parts", "base") for path in provenance.get(table) or {}}
    if named - set(entries):
        raise KeyMismatch(f"{folder} has lost the tensors of {few(sorted(named - set(entries)))}: save it again")
    return AdapterFile(folder, config, entries, extras, provenance, _taken(folder, provenance))


def _taken(folder: Path, provenance: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """What the second file holds of what the metadata promises."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    paths = [path for recipe in provenance.get("quantized", ()) for path in recipe["taken"]]
    if not paths:
        return {}
    try:
        read_header(folder / TAKEN)
        tensors = load_file(folder / TAKEN)
        found = {path: (tensors[f"{path}.A"], tensors[f"{path}.B"]) for path in paths}
    except (OSError, SafetensorError, KeyError) as error:
        raise KeyMismatch(f"{folder / TAKEN} is missing or damaged ({error}): copy the whole folder") from error
    if not all(bool(tensor.isfinite().all()) for pair in found.values() for tensor in pair):
        raise KeyMismatch(f"{folder / TAKEN} holds NaN or infinity")
    return found


def _config(folder: Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The config beside the tensors; the tensors' own copy where a save died between the two."""
    written = read_json(folder / CONFIG)
    own = provenance.get("adapter_config")
    return dict(own) if own and atomic.interrupted(folder, CONFIG) else written


def _sort(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    slots: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    embeddings = set()
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        slot = next((slot for slot in SLOTS if name.endswith(f".{slot}")), None)
        if (slot or tensor.is_floating_point()) and tensor.dtype not in _FLOATS:
            raise AdapterFormatError(f"{folder / TENSORS}: {key!r} holds {tensor.dtype}: convert it to float32")
        if slot is None:
            extras[name] = tensor
            continue
        path = name[: -len(slot) - 1]
        slots.setdefault(path, {})[SLOTS[slot]] = tensor
        if "embedding" in slot:
            embeddings.add(path)
    if not slots:
        raise AdapterFormatError(f"{folder / TENSORS} holds no LoRA factors")
    entries = {}
    for path, found in slots.items():
        if "A" not in found or "B" not in found:
            raise KeyMismatch(f"{folder}: {path!r} has no {'A' if 'A' not in found else 'B'} (keys missing)")
        if ("magnitude" in found) != bool(config.get("use_dora")):
            odd = "a DoRA magnitude, and use_dora is off" if "magnitude" in found else "no DoRA magnitude"
            raise KeyMismatch(f"{folder}: {path!r} has {odd}: config and tensors are of different adapters")
        rank, alpha = scale_of(pattern_name(path, config), config)
        entries[path] = Entry(path, found["A"], found["B"], rank, alpha, found.get("magnitude"), path in embeddings)
    return entries, extras


def scale_of(name: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """The rank and the α that a config gives a layer, with rsLoRA resolved so that s = α/r."""
    rank = int(_looked_up(config.get("rank_pattern"), name, config["r"]))
    alpha = float(_looked_up(config.get("alpha_pattern"), name, config["lora_alpha"]))
    return rank, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _looked_up(table: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """The value of the first key that matches a suffix of the name which starts at a dot, as in PEFT."""
    return next((v for key, v in (table or {}).items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)


def few(names: Iterable[str], count: int = 4) -> str:
    """The first few names, for a message."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(repr, names[:count])) + more


def no_file_at(path: Path) -> None:
    """Refuse a path where a file stands in the way of a folder."""
    if _stands(path) and not path.is_dir():
        raise FileError(f"{path} is a file: give a folder")


def _stands(path: Path, test: Callable[[Path], bool] = Path.exists) -> bool:
    """Whether something is there. A name that the system cannot even look up is not."""
    try:
        return test(path)
    except (OSError, ValueError):
        return False
