"""A model's adapter, written as a folder in PEFT's format.

Saved, an adapter is plain LoRA on the original weights: anchored layers become rank 2r, [A ; A₀] and [B | −B₀], with
the factors' own bits, so that loading here resumes exactly where saving left off, and loading anywhere else computes
the same function.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart.files import cores, quantized_base
from headstart.files.adapter import CORES, REPORT, TAKEN, Entry, few, no_file_at, plain_name, scales, write_adapter
from headstart.files.fields import VERSION
from headstart.files.peft_rules import OUTPUT, ending_in, is_misread, outputs_scaled
from headstart.files.quantized_base import sample
from headstart.lora import matrix, merge
from headstart.lora.adapter import Adapter, adapter_of, base_name
from headstart.lora.config import check_rank
from headstart.lora.delta import Branch, plain_lora
from headstart.lora.layers import LoraEmbedding, LoraExperts, LoraLayer, TrainedModule, frozen_module
from headstart.lora.layouts import Convolution, Pair, Parts
from headstart.lora.rebase import Base
from headstart.lora.report import InitReport

# Names of modules that wrapping put there.
_INNER = re.compile(r"\.(lora_[AB]|trained|original_module)(\.|$)")


def save(model: nn.Module, path: str | Path, *, rank: int | None = None) -> dict[str, float]:
    """Save a model's adapter as a folder that PEFT, and whatever reads PEFT's format, loads on the original base.

    Args:
        model: an adapted model, merged reversibly or not. Where it is sharded, every process must call, and the
            first one writes.
        path: the folder; its other files are left alone.
        rank: the rank of the saved factors. Left out, everything is exact, and anchored layers take rank 2r;
            given, each layer's change is truncated to its best approximation of that rank.

    Returns:
        The share of the change's energy ‖ΔW‖² that was dropped, by layer; empty where `rank` is left out.

    Raises:
        AdapterState: if the model has no adapter. FileError, OutputBusy: if the folder cannot be written;
            what stood there is untouched.
    """
    adapter = adapter_of(model)
    no_file_at(Path(path))
    layers = adapter.layers()
    if rank is not None:
        check_rank("rank", rank)
        merge.check_finite(layers, "truncated")
    found = {name: _entry(name, layer, rank) for name, layer in layers.items()}
    dropped = {name: lost for name, (_, lost) in found.items()}
    entries = outputs_scaled({name: entry for name, (entry, _) in found.items()}, _attentions(layers), 0.5)
    config = {**_fields(adapter, layers), **scales(entries, _pattern_names(layers))}
    origin = _provenance(adapter.report, layers, truncated=rank is not None)
    if misread := [
        name
        for name, layer in layers.items()
        if is_misread(frozen_module(layer), layer.layout.own_way or layer.read, config["use_dora"])
    ]:
        warnings.warn(
            "PEFT ignores dilation and padding_mode, groups under DoRA, a forward of the layer's own, and that a model "
            f"reads a weight: it will compute something else for {few(misread)}. Load this adapter with headstart, or "
            "merge it",
            stacklevel=2,
        )
    if said := quantized_base.warning(_bases(layers)):
        warnings.warn(said, stacklevel=2)
    extras = _extras(adapter)
    trained = {} if rank is not None else _cores(layers)
    sharded = any(matrix.is_sharded(factor) for layer in layers.values() for factor in layer.factors)
    if not sharded or torch.distributed.get_rank() == 0:
        beside = {TAKEN: quantized_base.taken_from(_bases(layers)), CORES: cores.tensors_of(trained)}
        write_adapter(Path(path), entries, config, extras, origin, {REPORT: adapter.report.to_json()}, beside)
    return dropped if rank is not None else {}


def _entry(name: str, layer: LoraLayer, rank: int | None) -> tuple[Entry, float]:
    A, B = (matrix.whole(factor.detach()) for factor in layer.plain_factors)
    (A, B), file_rank, lost = plain_lora(layer.layout, Branch(A, B, layer.scaling, layer.anchor), layer.rank, rank)
    A, B = layer.layout.to_file(A, B)
    file_rank *= layer.layout.copies
    alpha = layer.scaling * file_rank
    magnitude = None if layer.magnitude is None else matrix.whole(layer.magnitude)
    if magnitude is not None and isinstance(layer.layout, Convolution):
        magnitude = magnitude.reshape(1, -1, *(1,) * len(layer.layout.kernel))
    return Entry(name, A, B, file_rank, alpha, magnitude, isinstance(layer, LoraEmbedding)), lost


def _pattern_names(layers: Mapping[str, LoraLayer]) -> dict[str, str]:
    """What PEFT matches rank_pattern against, where it is not the layer's name."""
    outputs = {f"{name}{OUTPUT}": plain_name(name) for name in _attentions(layers)}
    return {**_parameter_names(layers), **outputs}


def _parameter_names(layers: Mapping[str, LoraLayer]) -> dict[str, str]:
    return {
        name: f"{plain_name(name)}.{layer.parameter_name}"
        for name, layer in layers.items()
        if isinstance(layer, LoraExperts)
    }


def _attentions(layers: Mapping[str, LoraLayer]) -> set[str]:
    return {name for name, layer in layers.items() if isinstance(frozen_module(layer), nn.MultiheadAttention)}


def _fields(adapter: Adapter, layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """PEFT's config but for the scales."""
    config = adapter.config
    parameters = sorted(_parameter_names(layers).values())
    modules = [plain_name(n) for n, layer in layers.items() if not isinstance(layer, LoraExperts)]
    attention = _attentions(layers)
    modules = [n for n in modules if n.removesuffix(".out_proj") not in attention or n in attention]
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "base_model_name_or_path": adapter.model.__dict__.get("name_or_path") or _name(adapter.model),
        "target_modules": _shortest(modules, adapter.model),
        "modules_to_save": _saved_names(adapter.model) or None,
        "bias": config.bias,
        "lora_dropout": config.lora_dropout,
        "use_dora": config.use_dora,
        "use_rslora": False,
        "fan_in_fan_out": any(matrix.is_conv1d(frozen_module(layer)) for layer in layers.values()),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return {**fields, "target_parameters": parameters} if parameters else fields


def _name(model: nn.Module) -> str | None:
    """Where a transformers model came from."""
    name = getattr(model, "name_or_path", None)
    return name if isinstance(name, str) and name else None


def _shortest(modules: Sequence[str], model: nn.Module) -> list[str]:
    """The targets as suffixes where these select the same modules, otherwise as full names; sorted."""
    wanted = set(modules)
    suffixes = {name.rsplit(".", 1)[-1] for name in modules}
    everywhere = {plain_name(name) for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in suffixes}
    inside = {n for n in everywhere if n.split(".")[-1] not in ("base_layer", "lora_A", "lora_B")}
    return sorted(suffixes if inside == wanted else wanted)


def _saved_names(model: nn.Module) -> list[str]:
    """The modules that trained in full: by their last names where PEFT takes these for no other module, sorted."""
    names = [plain_name(name) for name, _ in model.named_modules() if not _INNER.search(f".{name}")]
    kept = [plain_name(name) for name, module in model.named_modules() if isinstance(module, TrainedModule)]
    last = {name.rsplit(".", 1)[-1] for name in kept}
    return sorted(last if set(ending_in(last, names)) == set(kept) else kept)


def _extras(adapter: Adapter) -> dict[str, Tensor]:
    """Modules that trained in full, and biases."""
    found: dict[str, Tensor] = {}
    if not adapter.biases and not adapter.config.modules_to_save:
        return found
    for name, module in adapter.model.named_modules():
        if isinstance(module, TrainedModule):
            found |= {f"{name}.{key}": matrix.whole(value) for key, value in module.trained.state_dict().items()}
    for name, parameter in adapter.model.named_parameters():
        if base_name(name) in adapter.biases:
            bias = adapter.aside.get(base_name(name), parameter.detach())
            found[name.replace(".original_module.", ".")] = matrix.whole(bias)
    return found


def _provenance(report: InitReport, layers: Mapping[str, LoraLayer], truncated: bool) -> dict[str, Any]:
    return provenance(
        report,
        anchored={} if truncated else {n: layer.rank for n, layer in layers.items() if layer.anchor is not None},
        # Truncated, what was between frozen factors is plain LoRA.
        frozen={
            n: f for n, layer in layers.items() if (f := _frozen(layer)) and not (truncated and layer.core is not None)
        },
        weights={n: layer.original_values for n, layer in layers.items()},
        bases=_bases(layers),
        parts={n: spans for n, layer in layers.items() if (spans := _ranges(layer))},
        cores=[] if truncated else [name for name, layer in layers.items() if layer.core is not None],
    )


def _cores(layers: Mapping[str, LoraLayer]) -> dict[str, Pair]:
    """A and the core of the layers that train one."""
    found = ((name, layer.factors[0], layer.core) for name, layer in layers.items())
    return {n: (matrix.whole(A.detach()), matrix.whole(core.detach())) for n, A, core in found if core is not None}


def provenance(
    report: InitReport,
    anchored: Mapping[str, int],
    frozen: Mapping[str, str],
    weights: Mapping[str, Callable[[], Tensor]],
    bases: quantized_base.Bases,
    parts: Mapping[str, Any] | None = None,
    cores: Sequence[str] = (),
) -> dict[str, Any]:
    """What the metadata says about an adapter's origin, by the layers' paths.

    Args:
        anchored: the rank of the layers whose first r rows and columns are the trained factors, the others anchors.
        frozen: the factors that do not train. weights: what reads the base's. bases: those that are quantised.
        parts: the row ranges of fused projections. cores: the layers that train a core.
    """
    quantised = quantized_base.described(bases)
    return {
        "format": VERSION,
        "strategy": report.strategy,
        "options": {name: value for name, value in report.options.items() if value is not None and name != "original"},
        "seed": report.seed,
        "anchored": dict(anchored),
        "frozen": dict(frozen),
        "parts": dict(parts or {}),
        "base": {name: sample(read()) for name, read in weights.items()},
        **({"quantized": quantised} if quantised else {}),
        **({"cores": list(cores)} if cores else {}),
    }


def _bases(layers: Mapping[str, LoraLayer]) -> dict[str, tuple[Base, Callable[[], Tensor]]]:
    """The quantised bases that the factors of some layers make up for."""
    found = ((name, layer, layer.base) for name, layer in layers.items())
    return {name: (base, layer.frozen_values) for name, layer, base in found if base is not None}


def _ranges(layer: LoraLayer) -> list[tuple[int, int]]:
    return list(layer.layout.ranges) if isinstance(layer.layout, Parts) else []


def _frozen(layer: LoraLayer) -> str:
    return "".join(name for name, factor in zip("AB", layer.factors, strict=True) if not factor.requires_grad)
