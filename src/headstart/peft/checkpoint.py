"""One adapter of a PeftModel ↔ a folder in PEFT's format."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict
from torch import Tensor, nn

from headstart.errors import KeyMismatch
from headstart.files import cores, quantized_base
from headstart.files.adapter import (
    CORES,
    PREFIX,
    REPORT,
    TAKEN,
    AdapterFile,
    Entry,
    few,
    plain_name,
    read_adapter,
    scales,
    write_adapter,
)
from headstart.files.bases import check_bases
from headstart.files.load import start_of_entry, target_of
from headstart.files.peft_rules import OUTPUT, embeddings, outputs_scaled
from headstart.files.save import provenance
from headstart.lora import matrix, quantized
from headstart.lora.delta import Branch, plain_lora
from headstart.lora.layers import Start
from headstart.lora.report import InitReport
from headstart.peft.layers import ParamWrapper, ShellAttention, ShellEmbedding
from headstart.peft.shell import ShellLayer, shell_layers
from headstart.peft.tuner import ShellTuner

State = Mapping[str, Tensor]
# Keys of PEFT's that are no extras: factors, and what PEFT wraps.
_INNER = re.compile(r"\.lora_|\.anchor_|\.base_weight_|\.taken_|\.original_module\.|\.modules_to_save\.")


def _tuner(model: PeftModel) -> ShellTuner:
    return cast(ShellTuner, model.base_model)


def save(
    model: PeftModel, adapter: str, folder: Path, report: InitReport, rank: int | None, embeddings: Any, state: State
) -> None:
    """Write an adapter that headstart started; from `state` where parameters are sharded and were gathered there."""
    base = _tuner(model).model
    layers = dict(shell_layers(base, adapter))
    attentions = [name for name, layer in layers.items() if isinstance(layer, ShellAttention)]
    found = {name: _entry(name, layer, adapter, rank, state) for name, layer in layers.items()}
    entries = outputs_scaled(found, attentions, 0.5)
    anchored = {name: layer.rank(adapter) for name, layer in layers.items() if layer.anchor(adapter) is not None}
    found_bases = ((name, layer, layer.base(adapter)) for name, layer in layers.items())
    bases = {name: (b, partial(layer.frozen_values, adapter)) for name, layer, b in found_bases if b is not None}
    if said := quantized_base.warning(bases):
        warnings.warn(said, stacklevel=3)
    cored = [name for name, layer in layers.items() if layer.core(adapter) is not None]
    gathered = {} if rank else {name: _gathered(name, layers[name], adapter, state) for name in cored}
    apart = {name: (A, core) for name, (A, _, core) in gathered.items() if core is not None}
    origin = provenance(
        report,
        anchored={} if rank else anchored,
        frozen={n: f for n, layer in layers.items() if (f := layer.frozen(adapter)) and not (rank and n in cored)},
        weights={name: layer.original_values for name, layer in layers.items()},
        bases=bases,
        cores=list(apart),
    )
    names = {n: f"{plain_name(n)}.{m.parameter_name}" for n, m in layers.items() if isinstance(m, ParamWrapper)}
    names |= {f"{name}{OUTPUT}": plain_name(name) for name in attentions}
    fields = {**_fields(model, adapter), **scales(entries, names)}
    extras = _extras(model, adapter, embeddings, state)
    beside = {TAKEN: quantized_base.taken_from(bases), CORES: cores.tensors_of(apart)}
    write_adapter(folder, entries, fields, extras, origin, {REPORT: report.to_json()}, beside)


def _gathered(name: str, layer: ShellLayer, adapter: str, state: State) -> tuple[Tensor, Tensor, Tensor | None]:
    """A, B and the core, as the layer stores them."""

    def whole(key: str, tensor: Tensor) -> Tensor:
        found = state.get(f"{PREFIX}{name}.{key}")
        return matrix.whole(tensor.detach()) if found is None else found

    stored = zip("AB", layer.stored(adapter), strict=True)
    A, B = layer.layout.from_file(*(whole(layer.key(letter, adapter), factor) for letter, factor in stored))
    core = layer.core(adapter)
    return A, B, None if core is None else whole(f"lora_core_{adapter}", core)


def _entry(name: str, layer: ShellLayer, adapter: str, rank: int | None, state: State) -> Entry:
    A, B, core = _gathered(name, layer, adapter, state)
    if core is not None:
        A, B = layer.layout.with_core(A, B, core)
    branch = Branch(A, B, layer.scaling[adapter], layer.anchor(adapter))
    (A, B), file_rank, _ = plain_lora(layer.layout, branch, layer.rank(adapter), rank)
    A, B = layer.layout.to_file(A, B)
    magnitude = layer.magnitude(adapter)
    if magnitude is not None:
        found = state.get(f"{PREFIX}{name}.lora_magnitude_vector.{adapter}.weight")
        magnitude = matrix.whole(magnitude) if found is None else found
    return Entry(name, A, B, file_rank, branch.scaling * file_rank, magnitude, isinstance(layer, ShellEmbedding))


def _fields(model: PeftModel, adapter: str) -> dict[str, Any]:
    """PEFT's config as it writes it, but for the scales."""
    values = dict(model.peft_config[adapter].to_dict())
    values.pop("runtime_config", None)
    fields: dict[str, Any] = json.loads(json.dumps(values, default=_plain))
    base = _tuner(model).model
    kept = [name for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    wanted = {m for m in fields["modules_to_save"] or () if any(name.endswith(m) for name in kept)}
    fields["modules_to_save"] = sorted(wanted) or None
    fields["base_model_name_or_path"] = fields["base_model_name_or_path"] or _source(base)
    if fields["task_type"] is None:  # by which PEFT's AutoPeftModel finds the model's class
        fields["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return {**fields, "use_rslora": False, "init_lora_weights": True, "inference_mode": True}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _source(model: nn.Module) -> str | None:
    """Where a transformers model came from."""
    name = getattr(model, "name_or_path", None)
    return name if isinstance(name, str) and name else None


def _extras(model: PeftModel, adapter: str, embeddings: Any, state: State) -> dict[str, Tensor]:
    """Modules that trained in full, embeddings of another size than the base's, and biases."""
    tuner = _tuner(model)
    if embeddings == "auto" and any(isinstance(m, ShellEmbedding) for _, m in shell_layers(tuner.model, adapter)):
        embeddings = False  # PEFT would copy a base embedding that is not trained
    found = get_peft_model_state_dict(
        model, state_dict=dict(state) or None, adapter_name=adapter, save_embedding_layers=embeddings
    )
    named = {key.removeprefix(PREFIX): value for key, value in found.items() if not _INNER.search(key)}
    # PEFT's versions differ in the biases that they train and save.
    biases = tuner.trained_biases() if cast(LoraConfig, model.peft_config[adapter]).bias != "none" else {}
    return {**named, **{name: state.get(f"{PREFIX}{name}", bias.detach()) for name, bias in biases.items()}}


def resume(model: PeftModel, adapter: str, path: Any) -> Any:
    """Put a saved adapter into the one that headstart started with the same config, to the bit.

    Raises:
        AdapterFormatError, KeyMismatch, WrongBase: before anything is changed.
    """
    file = read_adapter(path)
    cores.check_trains(file)
    base = _tuner(model).model
    layers = dict(shell_layers(base, adapter))
    if set(layers) != set(file.entries):
        odd = sorted(set(layers) ^ set(file.entries))
        raise KeyMismatch(f"{file.folder} and the model disagree about {few(odd)}: resume with the same targets")
    held = {path for path, layer in layers.items() if quantized.is_quantized(layer.original)}
    check_bases({path: layer.original_values for path, layer in layers.items()}, held, file)
    attentions = [path for path, layer in layers.items() if isinstance(layer, ShellAttention)]
    starts = {e.path: _start(layers[e.path], file, e, adapter) for e in outputs_scaled(file.entries, attentions, 2)}
    extras = {plain_name(name): value for name, value in file.extras.items()}
    _check_extras(model, adapter, extras, file)
    for path, layer in layers.items():
        layer.enter(adapter, starts[path], layer.layout, layer.weight_name)
    fill(model, adapter, extras)
    return torch.nn.modules.module._IncompatibleKeys([], [])


def _start(layer: ShellLayer, file: AdapterFile, entry: Entry, adapter: str) -> Start:
    """What the file holds for a layer, checked against what the layer is."""
    parameter = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    target = target_of(entry, layer.get_base_layer(), parameter, file)
    start = start_of_entry(entry, target, file, 0.0, apart=True)
    here = layer.rank(adapter), layer.anchor(adapter) is not None, layer.core(adapter) is not None
    there = start.rank, start.anchor is not None, start.core is not None
    if here != there or not math.isclose(start.scaling, layer.scaling[adapter], rel_tol=1e-9):
        raise KeyMismatch(
            f"{file.folder}: rank, scale or anchoring of {entry.path!r} is not the model's: use the same config"
        )
    return start


def fill(model: PeftModel, adapter: str, extras: Mapping[str, Tensor]) -> None:
    """Copy saved values into the modules and biases that train beside an adapter."""
    slots = _slots(model, adapter)
    with torch.no_grad():
        for name, value in extras.items():
            slots[name].copy_(value)


def _slots(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Where the values beside the factors belong, by their names in the base. No adapter replaces other weights."""
    base, own = _tuner(model).model, f"modules_to_save.{adapter}."
    beside = {id(tensor) for tensor in (*_tuner(model).biases().values(), *embeddings(base))}
    found: dict[str, Tensor] = {}
    for name, tensor in (*base.named_parameters(remove_duplicate=False), *base.named_buffers()):
        if own in name or (id(tensor) in beside and "original_module." not in name):
            found[plain_name(name.replace(own, ""))] = tensor
    return found


def _check_extras(model: PeftModel, adapter: str, extras: Mapping[str, Tensor], file: AdapterFile) -> None:
    slots = _slots(model, adapter)
    odd = [name for name, value in extras.items() if name not in slots or slots[name].shape != value.shape]
    if odd:
        raise KeyMismatch(f"{file.folder} holds tensors that this model has no place for: {few(sorted(odd))}")
