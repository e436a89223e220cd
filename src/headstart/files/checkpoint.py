"""A model's adapter ↔ a folder in PEFT's format, both ways.

Saved, an adapter is plain LoRA on the original weights: anchored layers become rank 2r, [A ; A₀] and [B | −B₀], with
the factors' own bits, so that loading here resumes exactly where saving left off, and loading anywhere else computes
the same function.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import AdapterFormatError, KeyMismatch, NoTarget, WrongBase, nearest
from headstart.files import quantized_base
from headstart.files.adapter import (
    REPORT,
    AdapterFile,
    Entry,
    few,
    no_file_at,
    plain_name,
    read_adapter,
    scale_of,
    scales,
    write_adapter,
)
from headstart.files.fields import VERSION
from headstart.files.quantized_base import sample
from headstart.lora import adapt, matrix, merge, quantized
from headstart.lora.adapt import Adapter
from headstart.lora.config import Holders, LoraConfig, Target, check_rank, holders_of
from headstart.lora.delta import Branch, plain_lora
from headstart.lora.layers import LoraEmbedding, LoraExperts, LoraLayer, Start, TrainedModule, frozen_module
from headstart.lora.rebase import Base
from headstart.lora.report import InitReport

# Names of modules that wrapping put there.
_INNER = re.compile(r"\.(lora_[AB]|trained|original_module)(\.|$)")
OUTPUT = ".base_layer.out_proj"  # of an attention


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
    adapter = adapt.adapter_of(model)
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
    if misread := [name for name, layer in layers.items() if _is_misread(frozen_module(layer))]:
        warnings.warn(
            f"PEFT ignores dilation and padding_mode: it will compute something else for {few(misread)}. "
            "Load this adapter with headstart, or merge it",
            stacklevel=2,
        )
    if said := quantized_base.warning(_bases(layers)):
        warnings.warn(said, stacklevel=2)
    extras = _extras(adapter)
    sharded = any(matrix.is_sharded(factor) for layer in layers.values() for factor in layer.factors)
    if not sharded or torch.distributed.get_rank() == 0:
        taken = quantized_base.taken_from(_bases(layers))
        write_adapter(Path(path), entries, config, extras, origin, {REPORT: adapter.report.to_json()}, taken)
    return dropped if rank is not None else {}


def _is_misread(module: nn.Module) -> bool:
    """Whether PEFT's own layer would convolve otherwise than the frozen one does."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    return module.padding_mode != "zeros" or any(step != 1 for step in module.dilation)


def _entry(name: str, layer: LoraLayer, rank: int | None) -> tuple[Entry, float]:
    A, B = (matrix.whole(factor.detach()) for factor in layer.plain_factors)
    (A, B), file_rank, lost = plain_lora(layer.layout, Branch(A, B, layer.scaling, layer.anchor), layer.rank, rank)
    A, B = layer.layout.to_file(A, B)
    file_rank *= layer.layout.copies
    alpha = layer.scaling * file_rank
    magnitude = None if layer.magnitude is None else matrix.whole(layer.magnitude)
    if magnitude is not None and isinstance(layer.layout, matrix.Convolution):
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


def outputs_scaled(entries: Mapping[str, Entry], attentions: Iterable[str], factor: float) -> list[Entry]:
    """PEFT adds the change of an attention's output projection twice, at its attention's scale: files hold half of it.

    Args:
        attentions: paths of the adapted attentions; factor: 0.5 for what is written, 2 for what was read.
    """
    found = dict(entries)
    for path in attentions:
        inner = f"{path}{OUTPUT}"
        if inner in found:
            rank, alpha = found[path].rank, found[path].alpha
            found[inner] = replace(found[inner], B=factor * found[inner].B, rank=rank, alpha=alpha)
    return list(found.values())


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
    return sorted(last if set(_ending_in(last, names)) == set(kept) else kept)


def _ending_in(ends: Iterable[str], names: Iterable[str]) -> list[str]:
    """The modules that PEFT means by modules_to_save: it goes by the end of a name, dot or no dot."""
    return [name for name in names if name and name.endswith(tuple(ends))]


def _extras(adapter: Adapter) -> dict[str, Tensor]:
    """Modules that trained in full, and biases."""
    found: dict[str, Tensor] = {}
    if not adapter.biases and not adapter.config.modules_to_save:
        return found
    for name, module in adapter.model.named_modules():
        if isinstance(module, TrainedModule):
            found |= {f"{name}.{key}": matrix.whole(value) for key, value in module.trained.state_dict().items()}
    for name, parameter in adapter.model.named_parameters():
        if adapt.base_name(name) in adapter.biases:
            found[name.replace(".original_module.", ".")] = matrix.whole(parameter.detach())
    return found


def _provenance(report: InitReport, layers: Mapping[str, LoraLayer], truncated: bool) -> dict[str, Any]:
    return provenance(
        report,
        anchored={} if truncated else {n: layer.rank for n, layer in layers.items() if layer.anchor is not None},
        frozen={n: letters for n, layer in layers.items() if (letters := _frozen(layer))},
        weights={n: layer.original_values for n, layer in layers.items()},
        bases=_bases(layers),
        parts={n: spans for n, layer in layers.items() if (spans := _ranges(layer))},
    )


def provenance(
    report: InitReport,
    anchored: Mapping[str, int],
    frozen: Mapping[str, str],
    weights: Mapping[str, Callable[[], Tensor]],
    bases: quantized_base.Bases,
    parts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the metadata says about an adapter's origin, by the layers' paths.

    Args:
        anchored: the rank of the layers whose first r rows and columns are the trained factors, the others anchors.
        frozen: the factors that do not train. weights: what reads the base's. bases: those that are quantised.
        parts: the row ranges of fused projections.
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
    }


def _bases(layers: Mapping[str, LoraLayer]) -> dict[str, tuple[Base, Callable[[], Tensor]]]:
    """The quantised bases that the factors of some layers make up for."""
    found = ((name, layer, layer.base) for name, layer in layers.items())
    return {name: (base, layer.frozen_values) for name, layer, base in found if base is not None}


def _ranges(layer: LoraLayer) -> list[tuple[int, int]]:
    return list(layer.layout.ranges) if isinstance(layer.layout, matrix.Parts) else []


def _frozen(layer: LoraLayer) -> str:
    return "".join(name for name, factor in zip("AB", layer.factors, strict=True) if not factor.requires_grad)


def load(model: nn.Module, path: str | Path, *, trainable: bool = False, strict: bool = True) -> Adapter:
    """Put a saved adapter on its base model: headstart's own, or anybody's in PEFT's format.

    Args:
        model: the base, unchanged and not adapted.
        path: the folder, or a name on the hub.
        trainable: whether to go on training it. Anchored starts resume with their anchors.
        strict: refuse an adapter of another base, and tensors that are left over.

    Returns:
        The adapter, installed.

    Raises:
        AdapterFormatError, KeyMismatch, WrongBase, NoTarget: before the model is changed.
    """
    adapt.check_plain(model)
    plan = plan_load(model, read_adapter(path), strict)
    adapter = adapt.install(model, plan.config, plan.starts, plan.report)
    _fill(adapter, plan.extras)
    if not trainable:
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
    return adapter


@dataclass(frozen=True)
class Plan:
    """What a file puts on a model, checked against it: the config, the starts, the other tensors, the report."""

    config: LoraConfig
    starts: list[tuple[Target, Start]]
    extras: dict[str, Tensor]
    report: InitReport


def plan_load(model: nn.Module, file: AdapterFile, strict: bool = True) -> Plan:
    """Check a file against a plain model. Changes nothing."""
    config = config_of(file, [name for name, _ in model.named_modules()])
    sites, holders = sites_of(model, file), holders_of(model)
    starts = []
    # The innermost of nested layers first, as they were installed.
    attentions = [path for path, (module, _) in sites.items() if isinstance(module, nn.MultiheadAttention)]
    entries = outputs_scaled(file.entries, attentions, 2)
    for entry in sorted(entries, key=lambda entry: -entry.path.count("base_layer.")):
        path = entry.path
        target = target_of(entry, *sites[path], file, holders[sites[path][0]])
        starts.append((target, start_of_entry(entry, target, file, config.lora_dropout)))
    if strict:
        _check_complete(model, {module for module, _ in sites.values()}, file)
        held = {path for path, site in sites.items() if quantized.is_quantized(matrix.parameter_of(*site))}
        check_bases({path: partial(matrix.values, *site) for path, site in sites.items()}, held, file)
    biases = set(adapt.trained_biases(model, starts, config))
    return Plan(config, starts, _checked_extras(model, file, config, biases, strict), report_of(file))


def report_of(file: AdapterFile) -> InitReport:
    """What a file says about how it was started."""
    found = file.provenance
    return InitReport(
        strategy=str(found.get("strategy", "loaded")),
        options=dict(found.get("options", {})),
        seed=int(found.get("seed", 0)),
        layers=(),
        seconds=0.0,
    )


def config_of(file: AdapterFile, modules: Sequence[str]) -> LoraConfig:
    """The part of the file's config that the adapter keeps, for a model with modules of these names."""
    given = file.config
    return LoraConfig(
        r=int(given["r"]),
        lora_alpha=float(given["lora_alpha"]),
        lora_dropout=float(given.get("lora_dropout") or 0.0),
        target_modules=sorted({entry.name for entry in file.entries.values()}),
        use_dora=bool(given.get("use_dora")),
        bias=given.get("bias") or "none",
        modules_to_save=_ending_in(given.get("modules_to_save") or (), modules) or None,
        task_type=given.get("task_type"),
    )


def sites_of(model: nn.Module, file: AdapterFile) -> dict[str, tuple[nn.Module, str]]:
    """The module and the parameter that each entry adapts."""
    found: dict[str, tuple[nn.Module, str]] = {}
    names = dict(model.named_modules(remove_duplicate=False))
    wanted = [str(name) for name in file.config.get("target_parameters") or ()]
    for path in file.entries:
        name = plain_name(path)
        module = names.get(name)
        if module is None or not name:
            raise NoTarget(f"{file.folder} adapts {name!r}, which this model does not have{nearest(name, names)}")
        own = [w for w in module._parameters if any(_suffix(t, f"{name}.{w}") for t in wanted)]
        # PEFT nests one wrapper for each parameter of a module, the first that the module registers innermost.
        depth = path.split(".").count("base_layer")
        parameter = own[::-1][depth] if depth < len(own) else "weight"
        if (module, parameter) in found.values():
            raise KeyMismatch(f"{file.folder} adapts {parameter!r} of {name!r} twice: merge the two in their framework")
        found[path] = module, parameter
    return found


def _check_complete(model: nn.Module, adapted: set[nn.Module], file: AdapterFile) -> None:
    """Refuse a file of PEFT's without a layer that its plain list of targets names. Ours name every layer."""
    wanted, narrowed = file.config.get("target_modules"), ("exclude_modules", "layers_to_transform", "modules_to_save")
    if file.provenance or not isinstance(wanted, list) or any(file.config.get(name) for name in narrowed):
        return
    meant = [(n, m) for n, m in model.named_modules() if any(_suffix(str(entry), n) for entry in wanted)]
    missing = [name for name, module in meant if module not in adapted]
    if missing:
        raise KeyMismatch(
            f"{file.folder} has no tensors for {few(missing)}, which its target_modules name: it is incomplete, or of "
            "another base. Pass strict=False to load what there is"
        )


def _suffix(entry: str, name: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def target_of(entry: Entry, module: nn.Module, parameter: str, file: AdapterFile, holders: Holders = ()) -> Target:
    """The weight that an entry adapts."""
    layout = matrix.layout(module, parameter, file.provenance.get("parts", {}).get(entry.path))
    full = f"{entry.name}.{parameter}"
    bare = any(_suffix(str(wanted), full) for wanted in file.config.get("target_parameters") or ())
    file_rank, alpha = scale_of(full, file.config) if bare else (entry.rank, entry.alpha)
    rank, scaling = file_rank // layout.copies, alpha / file_rank
    name = full if bare else entry.name
    return Target(name, module, holders, parameter, layout, rank, scaling * rank, scaling)


def start_of_entry(entry: Entry, target: Target, file: AdapterFile, dropout: float) -> Start:
    """The start that an entry holds, its anchors apart again.

    Raises:
        KeyMismatch: if its shapes are not those of the target.
    """
    weight = matrix.parameter_of(target.module, target.parameter)
    _check_shapes(entry, target, matrix.outline(target.module, target.parameter), file)
    A, B = target.layout.from_file(entry.A, entry.B)
    anchor, rank = None, target.rank
    if entry.path in file.provenance.get("anchored", {}):
        rank = int(file.provenance["anchored"][entry.path])
        if target.rank != 2 * rank:
            raise AdapterFormatError(f"{file.folder}: {entry.path!r} of rank {target.rank} has anchors of rank {rank}")
        halves = [_halves(a, b) for a, b in target.layout.unpack(A, B)]
        A, B = target.layout.pack([trained for trained, _ in halves])
        anchor = target.layout.pack([anchors for _, anchors in halves])
    device = torch.device("cpu") if weight.is_meta else weight.device
    magnitude = entry.magnitude
    return Start(
        A=_factor(A, device),
        B=_factor(B, device),
        rank=rank,
        alpha=target.scaling * rank,
        scaling=target.scaling,
        anchor=None if anchor is None else (_factor(anchor[0], device), _factor(anchor[1], device)),
        frozen=frozenset(file.provenance.get("frozen", {}).get(entry.path, "")),
        dropout=dropout,
        base=quantized_base.base_of(entry.path, target, file),
        magnitude=None if magnitude is None else _factor(magnitude.flatten(), device),
    )


def _factor(tensor: Tensor, device: torch.device) -> Tensor:
    """A factor as the layers hold it: float32, of its own memory."""
    return tensor.to(device, torch.float32, copy=True).contiguous()


def _halves(A: Tensor, B: Tensor) -> tuple[matrix.Pair, matrix.Pair]:
    rank = A.shape[0] // 2
    return (A[:rank], B[:, :rank]), (A[rank:], -B[:, rank:])


def _check_shapes(entry: Entry, target: Target, weight: Tensor, file: AdapterFile) -> None:
    """Compare the file's shapes with those that the layer would write itself."""
    blocks = target.layout.blocks(weight)
    try:
        rank = target.layout.block_rank(target.rank)
    except ValueError:
        rank = target.rank
    like = [
        (weight.new_empty((rank, b.shape[1]), device="meta"), weight.new_empty((len(b), rank), device="meta"))
        for b in blocks
    ]
    A, B = target.layout.to_file(*target.layout.pack(like))
    dense = isinstance(target.layout, matrix.Convolution)  # PEFT's grouped convolutions see every channel
    for letter, found, wanted in (("A", entry.A, A), ("B", entry.B, B)):
        if found.shape != wanted.shape and not (dense and letter == "A" and found.numel() == wanted.numel()):
            raise KeyMismatch(
                f"{file.folder}: {letter} of {entry.name!r} has shape {tuple(found.shape)}, "
                f"this model's layer needs {tuple(wanted.shape)}: another base, or a wrong rank in the config"
            )
    layout = target.layout
    rows = layout.out_features if isinstance(layout, matrix.Parts) else sum(map(len, blocks))
    if entry.magnitude is not None and entry.magnitude.numel() != rows:
        raise KeyMismatch(f"{file.folder}: the magnitude of {entry.name!r} has {entry.magnitude.numel()} elements")


def check_bases(weights: Mapping[str, Callable[[], Tensor]], held: set[str], file: AdapterFile) -> None:
    """Refuse another base model, or another quantised form of it.

    Args:
        weights: what reads the adapted weights, by the layer's path; held: those that the model itself holds quantised.
    """
    known = held & {path for path, _, _ in quantized_base.recipes_of(file)}
    check_base({path: read for path, read in weights.items() if path not in known}, file)
    quantized_base.check_held({path: weights[path] for path in known}, file)


def check_base(weights: Mapping[str, Callable[[], Tensor]], file: AdapterFile) -> None:
    """Refuse another base model: the same shapes, other values.

    Args:
        weights: what reads the adapted weights, by the layer's path.
    """
    samples: Mapping[str, Any] = file.provenance.get("base", {})
    pairs: list[tuple[float, float]] = []
    for path, values in samples.items():
        if path in weights:
            pairs += zip(values, sample(weights[path]()), strict=False)
    # A quantised or rounded copy of the base differs by a few percent, another model by more than all of it.
    if (distance := quantized_base.apart(pairs)) > 0.5:
        raise WrongBase(
            f"{file.folder} was made for another base: sampled weights differ by {distance:.0%} of their size. "
            "Load that base, or pass strict=False if you mean this one"
        )


def _checked_extras(
    model: nn.Module, file: AdapterFile, config: LoraConfig, biases: set[str], strict: bool
) -> dict[str, Tensor]:
    """The tensors beside the factors that the config accounts for, by the names of the plain model."""
    # Tied weights under all their names: files hold either.
    state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    kept: dict[str, Tensor] = {}
    foreign = []
    for key, value in file.extras.items():
        name = plain_name(key)
        here = state.get(name)
        saved = any(
            f".{name}".rpartition(".")[0].endswith(f".{m}") or f".{m}." in f".{name}"
            for m in config.modules_to_save or ()
        )
        copied = key.endswith(".base_layer.weight")
        if here is None or not (saved or name in biases or copied):
            foreign.append(key)
        elif here.shape != value.shape:
            raise KeyMismatch(f"{file.folder}: {key!r} has shape {tuple(value.shape)}, the model's {tuple(here.shape)}")
        elif copied and not saved:
            _check_copy(key, value, here, file)
        else:
            kept[name] = value
    if foreign and (strict or any(plain_name(key) in state for key in foreign)):
        raise KeyMismatch(
            f"{file.folder} holds tensors that belong to no adapter: {few(sorted(foreign))}. An adapter must not "
            "replace the base's weights; remove them from the file"
        )
    # PEFT's versions differ in the biases that they save.
    needed = set(biases) if file.provenance else set()
    for module in config.modules_to_save or ():
        needed |= {f"{module}.{name}" for name, _ in model.get_submodule(module).named_parameters()}
    if needed - set(kept):
        raise KeyMismatch(f"{file.folder}: bias or modules_to_save: no tensor for {few(sorted(needed - set(kept)))}")
    return kept


def _check_copy(key: str, value: Tensor, here: Tensor, file: AdapterFile) -> None:
    """PEFT saves the embeddings that it adapts: harmless where they are the model's own."""
    if not torch.allclose(value.float(), here.detach().float().cpu(), rtol=0.02, atol=1e-3):
        raise WrongBase(
            f"{file.folder}: {key!r} is not the model's own embedding: this adapter needs the base it was trained on, "
            "with its vocabulary"
        )


def _fill(adapter: Adapter, extras: Mapping[str, Tensor]) -> None:
    """Copy the loaded values into the modules and biases that train in full."""
    own: dict[str, Tensor] = {
        name.replace(".trained.", "."): p for name, p in adapter.model.named_parameters() if ".trained." in f".{name}"
    }
    own |= {name.replace(".trained.", "."): b for name, b in adapter.model.named_buffers() if ".trained." in f".{name}"}
    own |= adapter.trained_biases()
    with torch.no_grad():
        for name, value in extras.items():
            own[name].copy_(value)
