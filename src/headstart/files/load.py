"""A folder in PEFT's format, put on its base model: headstart's own, or anybody's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from headstart.errors import AdapterFormatError, KeyMismatch, NoTarget, nearest
from headstart.files import cores, quantized_base
from headstart.files.adapter import COPY, AdapterFile, Entry, few, plain_name, read_adapter, scale_of
from headstart.files.bases import check_bases, check_copy
from headstart.files.peft_rules import embeddings, ending_in, outputs_scaled, saved_modules
from headstart.lora import adapt, matrix, quantized
from headstart.lora.adapter import Adapter
from headstart.lora.config import LoraConfig
from headstart.lora.layers import Start
from headstart.lora.layouts import Convolution, Pair, Parts
from headstart.lora.report import InitReport
from headstart.lora.targets import Holders, Target, holders_of


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
    file = read_adapter(path)
    if trainable:
        cores.check_trains(file)
    plan = plan_load(model, file, strict, apart=trainable)
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


def plan_load(model: nn.Module, file: AdapterFile, strict: bool = True, apart: bool = False) -> Plan:
    """Check a file against a plain model. Changes nothing.

    Args:
        strict: whether it must be of this base, and complete. apart: as in `start_of_entry`.
    """
    config = config_of(file, [name for name, _ in model.named_modules()])
    sites, holders = sites_of(model, file), holders_of(model)
    starts = []
    # The innermost of nested layers first, as they were installed.
    attentions = [path for path, (module, _) in sites.items() if isinstance(module, nn.MultiheadAttention)]
    entries = outputs_scaled(file.entries, attentions, 2)
    for entry in sorted(entries, key=lambda entry: -entry.path.count("base_layer.")):
        path = entry.path
        target = target_of(entry, *sites[path], file, holders[sites[path][0]])
        starts.append((target, start_of_entry(entry, target, file, config.lora_dropout, apart)))
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
        modules_to_save=ending_in(saved_modules(file), modules) or None,
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


def start_of_entry(entry: Entry, target: Target, file: AdapterFile, dropout: float, apart: bool = False) -> Start:
    """The start that an entry holds, its anchors apart again.

    Args:
        apart: whether a core is to stand between the factors, as it does where it goes on training; else R·A is A.

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
    magnitude, core = entry.magnitude, None
    if apart and (found := cores.core_of(entry.path, file, target.layout, A, B)) is not None:
        A, core = found
    return Start(
        A=_factor(A, device),
        B=_factor(B, device),
        rank=rank,
        alpha=target.scaling * rank,
        scaling=target.scaling,
        anchor=None if anchor is None else (_factor(anchor[0], device), _factor(anchor[1], device)),
        frozen=frozenset(file.provenance.get("frozen", {}).get(entry.path, "")),
        core=None if core is None else _factor(core, device),
        dropout=dropout,
        base=quantized_base.base_of(entry.path, target, file),
        magnitude=None if magnitude is None else _factor(magnitude.flatten(), device),
    )


def _factor(tensor: Tensor, device: torch.device) -> Tensor:
    """A factor as the layers hold it: float32, of its own memory."""
    return tensor.to(device, torch.float32, copy=True).contiguous()


def _halves(A: Tensor, B: Tensor) -> tuple[Pair, Pair]:
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
    dense = isinstance(target.layout, Convolution)  # PEFT's grouped convolutions see every channel
    for letter, found, wanted in (("A", entry.A, A), ("B", entry.B, B)):
        if found.shape != wanted.shape and not (dense and letter == "A" and found.numel() == wanted.numel()):
            raise KeyMismatch(
                f"{file.folder}: {letter} of {entry.name!r} has shape {tuple(found.shape)}, "
                f"this model's layer needs {tuple(wanted.shape)}: another base, or a wrong rank in the config"
            )
    layout = target.layout
    rows = layout.out_features if isinstance(layout, Parts) else sum(map(len, blocks))
    if entry.magnitude is not None and entry.magnitude.numel() != rows:
        raise KeyMismatch(f"{file.folder}: the magnitude of {entry.name!r} has {entry.magnitude.numel()} elements")


def _checked_extras(
    model: nn.Module, file: AdapterFile, config: LoraConfig, biases: set[str], strict: bool
) -> dict[str, Tensor]:
    """The tensors beside the factors that the config accounts for, by the names of the plain model."""
    # Tied weights under all their names: files hold either.
    state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    ends = embeddings(model)
    tied = {id(state[name]): name for name in biases}
    kept: dict[str, Tensor] = {}
    foreign = []
    for key, value in file.extras.items():
        name = plain_name(key)
        here = state.get(name)
        name = tied.get(id(here), name)
        saved = any(
            f".{name}".rpartition(".")[0].endswith(f".{m}") or f".{m}." in f".{name}"
            for m in config.modules_to_save or ()
        )
        copied = key.endswith(COPY) or any(here is weight for weight in ends)
        if here is None or not (saved or name in biases or copied):
            foreign.append(key)
        elif here.shape != value.shape:
            raise KeyMismatch(f"{file.folder}: {key!r} has shape {tuple(value.shape)}, the model's {tuple(here.shape)}")
        elif copied and not saved:
            check_copy(key, value, here, file)
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
