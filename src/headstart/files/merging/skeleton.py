"""A checkpoint as the model that it holds, without reading it: modules of the right kinds, and where their rows lie.

    transformers knows the architecture    its classes on the meta device, its names for the tensors
    it does not                            modules by the names of the tensors, kinds by the shapes of the adapter

The weights are views of the mapped files: who looks at a few numbers reads a few pages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import UntypedStorage, nn

from headstart.errors import KeyMismatch, Unstreamable
from headstart.files.adapter import AdapterFile
from headstart.files.header import read_json
from headstart.files.merging.inferred import inferred
from headstart.files.merging.packed import Packed
from headstart.files.merging.shards import Checkpoint
from headstart.lora import matrix

SETTINGS = "config.json"


@dataclass(frozen=True)
class Place:
    """Where rows of a parameter lie: a tensor's key, and the number of the first row there."""

    key: str
    first: int = 0


@dataclass(frozen=True)
class Skeleton:
    """A model without its memory.

    Attributes:
        model: its modules. places: by the name of a parameter or buffer, where it lies; none where the file has it in
            another form, or not at all.
        turned: keys of quantised weights whose float form is stored the other way round.
        known: whether transformers knows the architecture.
    """

    model: nn.Module
    places: Mapping[str, Sequence[Place]]
    turned: frozenset[str]
    known: bool

    def key_for(self, name: str, like: Place) -> str:
        """A key under which a tensor of this name is found again, where another one's is known."""
        prefix = str(getattr(self.model, "base_model_prefix", "")) + "."
        short = name.removeprefix(prefix)
        return name if not self.known or like.key.startswith(prefix) else short


def skeleton(checkpoint: Checkpoint, packed: Mapping[str, Packed], files: Sequence[AdapterFile]) -> Skeleton:
    """The model of a checkpoint, for these adapters.

    Raises:
        Unstreamable: if its settings name a quantisation that is not read here.
        UnsupportedLayer, KeyMismatch: if the kind of an adapted layer cannot be told, or a shape is another.
    """
    settings = read_json(checkpoint.folder / SETTINGS) if (checkpoint.folder / SETTINGS).is_file() else {}
    _check_quantization(settings.get("quantization_config"), checkpoint.folder)
    skipped = {one.key for weight in packed.values() for one in weight.others.values()}
    keys = [key for key in checkpoint.tensors if key not in skipped]
    wanted = {entry.name for file in files for entry in file.entries.values()}
    model = _architecture(checkpoint.folder, settings, wanted)
    known = model is not None
    if model is None:
        shapes = {key: packed[key].shape if key in packed else checkpoint.tensors[key].shape for key in keys}
        model = inferred(shapes, files)
        places: dict[str, list[Place]] = {key: [Place(key)] for key in keys}
    else:
        places = _placed(model, checkpoint, packed, keys)
    turned = _put(model, checkpoint, packed, places)
    return Skeleton(model, places, turned, known)


def _check_quantization(said: Any, folder: Path) -> None:
    method = str(said.get("quant_method", "bitsandbytes")) if isinstance(said, dict) else None
    if method is not None and method != "bitsandbytes":
        raise Unstreamable(f"{folder} is quantised by {method}")


# ------------------------------------------------------------------ by the architecture


def _architecture(folder: Path, settings: Mapping[str, Any], wanted: Iterable[str]) -> nn.Module | None:
    """The model on the meta device; nothing of the folder is executed."""
    try:
        import transformers
    except ImportError:
        return None
    if not settings.get("model_type"):
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None
    classes: list[Any] = [getattr(transformers, name, None) for name in _named(settings)]
    if type(config) in transformers.AutoModelForCausalLM._model_mapping:
        classes.append(transformers.AutoModelForCausalLM.from_config)
    first = None
    for make in filter(None, classes):
        with torch.device("meta"):
            model: nn.Module = make(config)
        if set(wanted) <= {name for name, _ in model.named_modules()}:
            return model
        first = first or model
    return first


def _named(settings: Mapping[str, Any]) -> list[str]:
    names = settings.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _placed(
    model: nn.Module, checkpoint: Checkpoint, packed: Mapping[str, Packed], keys: Sequence[str]
) -> dict[str, list[Place]]:
    state = model.state_dict()
    found: dict[str, list[Place]] = {}
    several: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    renamed, converters = _renamed(model, keys, state)
    for key, (name, pattern) in renamed.items():
        if pattern is not None:
            several[name][pattern].append(key)
        elif name in state:
            found[name] = [Place(key)]
    for name, groups in several.items():
        shape = tuple(state[name].shape) if name in state else ()
        found[name] = _stacked(groups, converters, shape, checkpoint)
    return found


def _renamed(
    model: Any, keys: Sequence[str], state: dict[str, Any]
) -> tuple[dict[str, tuple[str, str | None]], Mapping[str, Any]]:
    """By key, the model's name for it, and the pattern by which several become one; and the rules by pattern."""
    prefix = model.base_model_prefix
    try:
        import transformers.core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4, where the names are those of the file but for the prefix
        tried = {key: (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")) for key in keys}
        return {key: (next((n for n in names if n in state), key), None) for key, names in tried.items()}, {}
    mapping: Any = get_model_conversion_mapping
    rules: list[Any] = mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
    joining = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
    order: Any = loading.dot_natural_key
    named = {k: loading.rename_source_key(k, renamings, joining, prefix, state) for k in sorted(keys, key=order)}
    return named, {pattern: rule for rule in joining for pattern in rule.source_patterns}


def _stacked(
    groups: Mapping[str, Sequence[str]], rules: Mapping[str, Any], shape: tuple[int, ...], checkpoint: Checkpoint
) -> list[Place]:
    """Experts that lie one by one in the file, and below one another in the model: (e, Σmᵢ, n)."""
    rule = rules[next(iter(groups))]
    steps = [(type(step).__name__, vars(step).get("dim")) for step in rule.operations]
    if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]) or len(shape) != 3:
        return []
    found, above = [], 0
    for pattern in rule.source_patterns:
        keys = groups.get(pattern, ())
        sizes = {checkpoint.tensors[key].shape for key in keys}
        if len(keys) != shape[0] or len(sizes) != 1 or (size := sizes.pop())[-1] != shape[2] or len(size) != 2:
            return []
        found += [Place(key, expert * shape[1] + above) for expert, key in enumerate(keys)]
        above += size[0]
    return found if above == shape[1] else []


# ------------------------------------------------------------------ values


def _put(
    model: nn.Module, checkpoint: Checkpoint, packed: Mapping[str, Packed], places: Mapping[str, Sequence[Place]]
) -> frozenset[str]:
    """Let the parameters be views of the files; those that are quantised become the Linears that they will be."""
    turned = set()
    for name, found in places.items():
        key = found[0].key if len(found) == 1 else None
        if key in packed:
            owner, _, leaf = name.rpartition(".")
            parent = model.get_submodule(owner.rpartition(".")[0])
            before = parent._modules[owner.rpartition(".")[2]]
            if leaf != "weight" or before is None:
                raise Unstreamable(f"{checkpoint.folder}: {key!r} is quantised, and no layer's weight")
            if matrix.is_conv1d(before):
                turned.add(str(key))
            m, n = packed[str(key)].shape
            linear = nn.Linear(n, m, bias=before._parameters.get("bias") is not None, device="meta")
            if linear._parameters["bias"] is not None:
                linear._parameters["bias"] = before._parameters["bias"]
            parent._modules[owner.rpartition(".")[2]] = linear
    _map(model, checkpoint, packed, places)
    return frozenset(turned)


def _map(
    model: nn.Module, checkpoint: Checkpoint, packed: Mapping[str, Packed], places: Mapping[str, Sequence[Place]]
) -> None:
    # safetensors would look at each tensor, and the system would bring in the megabytes around.
    files = {file: UntypedStorage.from_file(str(file), False, file.stat().st_size) for file in checkpoint.metadata}
    owners: dict[int, list[tuple[dict[str, Any], str]]] = defaultdict(list)
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for leaf, tensor in table.items():
                if tensor is not None:
                    owners[id(tensor)].append((table, leaf))
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, found in places.items():
        stored = checkpoint.tensors[found[0].key] if len(found) == 1 else None
        before = named.get(name)
        if stored is None or before is None or stored.key in packed:
            continue
        if stored.shape != tuple(before.shape):
            raise KeyMismatch(
                f"{stored.file}: {stored.key!r} has shape {stored.shape}, and its config makes it "
                f"{tuple(before.shape)}: config and tensors are of different models"
            )
        if not stored.is_float:
            continue
        bytes_of = files[stored.file][stored.start : stored.start + stored.size]
        value = torch.empty(0, dtype=stored.dtype).set_(bytes_of, 0, stored.shape)  # type: ignore[call-overload]
        value = nn.Parameter(value, requires_grad=False) if isinstance(before, nn.Parameter) else value
        for table, leaf in owners[id(before)]:  # One for all that share it, as before.
            if table[leaf] is before:
                table[leaf] = value
