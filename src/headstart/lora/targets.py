"""A config resolved against a model: which weights it names, and each one's rank and scale.

Names are matched as PEFT matches them, and what matches nothing is an error that names what is near.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from headstart.errors import AdapterState, BadOption, BadRank, NoTarget, TargetError, UnsupportedLayer, nearest
from headstart.lora import matrix
from headstart.lora.config import LoraConfig
from headstart.lora.layouts import Layout

Holders = tuple[tuple[nn.Module, str], ...]


def with_heads(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """For a classification task, the config with the model's new heads among `modules_to_save`.

    By PEFT's rule, or it would look for them in our files: every module whose name ends in "classifier" or "score".
    """
    if config.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return config
    kept = list(config.modules_to_save or ())
    heads = [name for name, _ in model.named_modules() if name.endswith(("classifier", "score"))]
    kept += [name for name in heads if not any(_suffix(entry, name) for entry in kept)]
    return dataclasses.replace(config, modules_to_save=kept or None)


@dataclass(frozen=True)
class Target:
    """One weight to adapt.

    Attributes:
        name: full name of the module, or of the parameter where a bare one is adapted.
        module: the frozen module that holds the weight.
        holders: every (parent, attribute) under which the module stands in the model.
        parameter: the name of the weight in it.
        layout: its weight as matrices.
        rank: of the layer; alpha: of the layer; scaling: s.
    """

    name: str
    module: nn.Module
    holders: Holders
    parameter: str
    layout: Layout
    rank: int
    alpha: float
    scaling: float


def targets(model: nn.Module, config: LoraConfig) -> list[Target]:
    """Every weight that the config names in this model, in the model's order.

    Raises:
        NoTarget: if a target, an exclusion, a pattern or a part matches nothing; it names what is near.
        UnsupportedLayer: if what it matches cannot be adapted.
        BadRank: if a start takes more directions from a weight than it has, and `clip_rank` is off.
        AdapterState: if the model is wrapped, by which its names are others.
    """
    if inside(model) is not None:
        raise AdapterState(f"{type(model).__name__} wraps the model: adapt it first, then compile or distribute it")
    names = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    holders = holders_of(model)
    chosen = _chosen(model, names, config)
    owners = [(n, module, "weight") for n, module in names.items() if n in chosen]
    bare = _parameters(model, config)
    _check_patterns([n for n, _, _ in (*owners, *bare)], config)

    found, seen = [], set()
    for name, module, parameter in (*owners, *_attention_outputs(owners), *bare):
        if (module, parameter) in seen:
            continue
        seen.add((module, parameter))
        found.append(_target(name, module, holders.get(module, ()), parameter, config))
    return _with_outputs_alike(found)


def inside(model: nn.Module) -> nn.Module | None:
    """The model that `torch.compile` or `DistributedDataParallel` wraps."""
    ddp = isinstance(model, nn.parallel.DistributedDataParallel)
    wrapped = model._modules.get("module" if ddp else "_orig_mod")
    return None if wrapped is None else inside(wrapped) or wrapped


def holders_of(model: nn.Module) -> dict[nn.Module, Holders]:
    """Where each module stands: every (parent, attribute) that leads to it, once."""
    found: dict[nn.Module, dict[tuple[nn.Module, str], None]] = {}
    for parent in model.modules():
        for leaf, module in parent._modules.items():
            if module is not None:
                found.setdefault(module, {})[parent, leaf] = None
    return {module: tuple(places) for module, places in found.items()}


def _target(name: str, module: nn.Module, holders: Holders, parameter: str, config: LoraConfig) -> Target:
    try:
        parts = _first(config.parts, name, _suffix)
        layout = matrix.layout(module, parameter, parts)
        rank = _first(config.rank_pattern, name, matches_pattern) or config.r
        alpha = _first(config.alpha_pattern, name, matches_pattern)
        alpha = config.lora_alpha if alpha is None else alpha
        blocks = layout.blocks(matrix.outline(module, parameter))
        largest = matrix.largest_rank([block.shape for block in blocks])
        if config.clip_rank:
            rank = min(rank, largest * rank // layout.block_rank(rank))
        _check_fit(layout.block_rank(rank), largest, blocks[0].shape, config)
        if not holders:
            raise UnsupportedLayer("the model itself cannot be replaced: put it into a module and adapt that")
        if config.use_dora and isinstance(module, nn.MultiheadAttention):
            raise UnsupportedLayer("use_dora is not defined for attention: exclude it, or leave use_dora out")
        if config.lora_dropout and layout.own_way and layout.kind != "embedding":  # indices are not dropped anywhere
            raise UnsupportedLayer(
                f"{type(module).__name__} has a forward of its own, and its input cannot be dropped on the branch "
                "alone: set lora_dropout=0, or exclude it"
            )
    except (TargetError, BadRank, BadOption) as error:
        raise type(error)(f"{error} (layer {name!r})") from None
    return Target(name, module, holders, parameter, layout, rank, alpha, config.scaling(rank, alpha))


def _check_fit(rank: int, largest: int, shape: Iterable[int], config: LoraConfig) -> None:
    # Noise may be of any rank, as in PEFT: a head of two classes has no room for r = 8. Directions of W are counted.
    if rank > largest and config.strategy.reads_weight:
        raise BadRank(
            f"rank {rank} does not fit a {tuple(shape)} weight: choose 1 to {largest}, "
            f"or set clip_rank=True (init {config.strategy.name!r})"
        )


def _chosen(model: nn.Module, names: Mapping[str, nn.Module], config: LoraConfig) -> set[str]:
    """The names of the modules that target_modules asks for."""
    wanted, excluded = config.target_modules, config.exclude_modules
    attention = [name for name, module in names.items() if isinstance(module, nn.MultiheadAttention)]
    if wanted == "all-linear" or (not isinstance(wanted, str) and list(wanted) == ["all-linear"]):
        head = _output_embedding(model)
        outputs = {f"{name}.out_proj" for name in attention}
        chosen = {n for n, m in names.items() if matrix.is_linear(m) and m is not head and n not in outputs}
        if not chosen and not config.target_parameters:
            raise NoTarget("'all-linear' finds no Linear in this model: name the layers in target_modules")
    else:
        chosen = _select("target_modules", wanted, names, allow_none=bool(config.target_parameters))
        for name in chosen:
            if any(name == f"{parent}.out_proj" and parent not in chosen for parent in attention):
                raise UnsupportedLayer(
                    f"{name!r} is never called by its attention, which reads its weight: target {name[:-9]!r} instead"
                )
        chosen -= {f"{parent}.out_proj" for parent in attention}
    if excluded:
        chosen -= _select("exclude_modules", excluded, names)
    if config.modules_to_save:
        saved = _select("modules_to_save", config.modules_to_save, names)
        for name in saved:
            if isinstance(names[name], nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
                raise UnsupportedLayer(f"modules_to_save {name!r} is a list that is never called: name what it holds")
        chosen -= {n for n in chosen for kept in saved if n == kept or n.startswith(f"{kept}.")}
    if config.layers_to_transform is not None:
        chosen = _in_layers(chosen, config)
    if not chosen and not config.target_parameters:
        raise NoTarget("no module is left after exclude_modules, modules_to_save and layers_to_transform: widen them")
    return chosen


def _select(
    field_name: str, wanted: str | Sequence[str], names: Mapping[str, nn.Module], allow_none: bool = False
) -> set[str]:
    """The names that an expression or a list asks for; every entry must match something."""
    if isinstance(wanted, str):
        chosen = {name for name in names if re.fullmatch(wanted, name)}
        if not chosen and not allow_none:
            raise NoTarget(f"{field_name} {wanted!r} matches no module{near_names(wanted, names)}")
        return chosen
    found: set[str] = set()
    for entry in wanted:
        matched = {name for name in names if _suffix(entry, name)}
        if not matched:
            raise NoTarget(f"{field_name} {entry!r} matches no module{near_names(entry, names)}")
        found |= matched
    return found


def near_names(wanted: str, names: Iterable[str]) -> str:
    """The tail of a message: the nearest names of a model, by their last part or whole."""
    last = {name.rsplit(".", 1)[-1] for name in names} - {""}
    words = re.findall(r"\w+", wanted)
    hint = nearest(wanted, last | set(names)) or (nearest(words[-1], last) if words else "")
    return hint or f" (the model has, for example, {', '.join(sorted(w for w in last if not w.isdigit())[:8])})"


def _suffix(entry: str, name: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def matches_pattern(key: str, name: str) -> bool:
    """PEFT's rule for rank_pattern and alpha_pattern: an expression for a suffix that starts at a dot."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _first(table: Mapping[str, Any], name: str, matches: Any) -> Any:
    return next((value for key, value in table.items() if matches(key, name)), None)


def _check_patterns(names: Sequence[str], config: LoraConfig) -> None:
    for table, matches in (
        ("rank_pattern", matches_pattern),
        ("alpha_pattern", matches_pattern),
        ("parts", _suffix),
    ):
        for key in getattr(config, table):
            if not any(matches(key, name) for name in names):
                raise NoTarget(f"{table} key {key!r} matches no adapted layer{near_names(key, names)}")


def _output_embedding(model: nn.Module) -> nn.Module | None:
    """The head of a transformers model: a Linear, but not one that "all-linear" means."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _attention_outputs(owners: Sequence[tuple[str, nn.Module, str]]) -> list[tuple[str, nn.Module, str]]:
    """Adapting an attention adapts its output projection too, as in PEFT."""
    return [(f"{n}.out_proj", m.out_proj, "weight") for n, m, _ in owners if isinstance(m, nn.MultiheadAttention)]


def _with_outputs_alike(found: Sequence[Target]) -> list[Target]:
    """In PEFT, and so in its files, an attention and its output projection have one rank and one scale."""
    attentions = {f"{t.name}.out_proj": t for t in found if isinstance(t.module, nn.MultiheadAttention)}
    pairs = [(target, attentions.get(target.name, target)) for target in found]
    return [dataclasses.replace(t, rank=like.rank, alpha=like.alpha, scaling=like.scaling) for t, like in pairs]


def _parameters(model: nn.Module, config: LoraConfig) -> list[tuple[str, nn.Module, str]]:
    """The bare parameters that target_parameters asks for."""
    found = []
    owned = {name: name.rpartition(".") for name, _ in model.named_parameters()}
    for entry in config.target_parameters or ():
        matched = [name for name in owned if _suffix(entry, name)]
        if not matched:
            close = difflib.get_close_matches(entry, list(owned) + [o[2] for o in owned.values()], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise NoTarget(f"target_parameters {entry!r} matches no parameter{hint}")
        found += [(name, model.get_submodule(owned[name][0]), owned[name][2]) for name in matched]
    order = {name: i for i, name in enumerate(owned)}
    return sorted(found, key=lambda owner: order[owner[0]])


def _in_layers(chosen: set[str], config: LoraConfig) -> set[str]:
    """Keep what lies in the layers asked for."""
    indices = config.layers_to_transform
    wanted = {indices} if isinstance(indices, int) else set(indices or ())
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    heads = [rf"(?:.*\.)?{pattern}\.(\d+)\." for pattern in patterns] if patterns else [r".*?\.?[^.]*\.(\d+)\."]
    index = {n: int(hit[1]) for n in chosen for head in heads if (hit := re.match(head, n))}
    missing = wanted - set(index.values())
    if missing:
        raise NoTarget(
            f"layers_to_transform {sorted(missing)} matches no layer: the targets lie in {sorted(set(index.values()))}"
        )
    return {name for name in chosen if index.get(name) in wanted}
