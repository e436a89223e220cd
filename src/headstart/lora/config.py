"""What to adapt and how: `LoraConfig`, and its resolution against a model into `Target`s.

The fields carry the names that PEFT's users know. The config stays at the shell: everything below takes values.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from headstart.errors import (
    BadAlpha,
    BadOption,
    BadRank,
    NoTarget,
    TargetError,
    UnknownField,
    UnsupportedLayer,
    nearest,
)
from headstart.inits import strategy
from headstart.lora import matrix

_EXPRESSIONS = ("target_modules", "exclude_modules", "layers_pattern")  # may be one expression, too
Holders = tuple[tuple[nn.Module, str], ...]


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter: which layers, of what rank, started how.

    Args:
        r: rank of every layer that `rank_pattern` does not name.
        lora_alpha: α; the branch is scaled by s = α/r, or α/√r with `use_rslora`.
        lora_dropout: probability of dropping an input element on the branch, in training.
        target_modules: "all-linear" (every Linear and Conv1D but the output embedding); a list of full names or
            suffixes; or one regular expression that matches full names.
        exclude_modules: the same, taken away.
        init_lora_weights: the strategy, by its name or by PEFT's spelling (`headstart inits` lists them).
        init_options: the strategy's own options.
        init_fallback: for a strategy that looks at data, the init of layers about which the data says nothing (an
            expert that is never chosen); left out, such a layer is an error.
        use_rslora: scale by α/√r.
        use_dora: train the norm of every output row apart from its direction (DoRA).
        bias: the biases that train: "none", "all" of the model, or "lora_only", those of adapted layers.
        modules_to_save: modules that train in full and are saved with the adapter, by name or suffix.
        rank_pattern: rank by name: a regular expression that matches a suffix of the full name at a dot; the first
            that matches holds.
        alpha_pattern: the same for α.
        layers_to_transform: indices of the layers to adapt, with a list of targets.
        layers_pattern: the name of the list that those indices count, where it is not the first numbered one.
        target_parameters: bare parameters to adapt, (m, n) or (experts, m, n), by name or suffix.
        parts: for fused projections, by name or suffix: a flag for each equal part, or the row ranges to adapt.
        task_type: what PEFT calls the task ("CAUSAL_LM", …); written into the saved config. "SEQ_CLS" and "TOKEN_CLS"
            train the classification head too.
        clip_rank: lower a rank that does not fit a weight instead of refusing it; the report says where.
        seed: of every random start. The same seed, model and names give the same start on any machine.

    Raises:
        ConfigError: where a value cannot be meant; it says which and what to choose.

    Example:
        >>> LoraConfig(r=16, init_lora_weights="pissa").init_lora_weights
        'pissa'
        >>> LoraConfig.preset("normal", use_rslora=True).lora_dropout
        0.05
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    init_lora_weights: str | bool = True
    init_options: Mapping[str, Any] = field(default_factory=dict)
    init_fallback: str | bool | None = None
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None
    parts: Mapping[str, Sequence[object]] = field(default_factory=dict)
    task_type: str | None = None
    clip_rank: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_kinds()
        check_rank("r", self.r)
        for name, rank in self.rank_pattern.items():
            check_rank(f"rank_pattern[{name!r}]", rank)
        for name, alpha in [("lora_alpha", self.lora_alpha), *self.alpha_pattern.items()]:
            self._check_alpha(name, alpha)
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            raise BadOption(f"lora_dropout is {self.lora_dropout!r}: choose a probability from 0 up to, not with, 1")
        if self.bias not in ("none", "all", "lora_only"):
            raise BadOption(f"bias is {self.bias!r}: choose 'none', 'all' or 'lora_only'")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise BadOption(f"seed is {self.seed!r}: choose an integer")
        self._check_options()
        if self.init_fallback is not None and strategy.get(self.init_fallback)[0].needs:
            raise BadOption(f"init_fallback {self.init_fallback!r} looks at data itself: choose 'kaiming' or 'pissa'")
        self._check_combinations()

    @property
    def strategy(self) -> strategy.Strategy:
        return strategy.get(self.init_lora_weights)[0]

    @property
    def options(self) -> dict[str, Any]:
        """The strategy's options: those that its spelling carries, then `init_options`."""
        return {**strategy.get(self.init_lora_weights)[1], **self.init_options}

    @classmethod
    def preset(cls, name: str | bool, **changes: Any) -> LoraConfig:
        """The config that a strategy's authors use with it, with your changes."""
        return cls.from_dict({"init_lora_weights": name, **strategy.get(name)[0].preset, **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """A config from a mapping; a key that is no field is refused with the nearest name."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise UnknownField(f"LoraConfig has no field {name!r}{nearest(name, known)}")
        return cls(**values)

    def scaling(self, rank: int, alpha: float) -> float:
        """s of a layer."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _check_alpha(self, name: str, alpha: object) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise BadAlpha(f"{name} is {alpha!r}: choose a finite number")
        if alpha <= 0 and self.strategy.divides_by_scaling:
            raise BadAlpha(f"{name} is {alpha}: {self.strategy.name!r} divides by s and needs a positive one")

    def _check_options(self) -> None:
        for name, said in strategy.get(self.init_lora_weights)[1].items():
            given = self.init_options.get(name, said)
            if given != said:
                raise BadOption(
                    f"init_lora_weights {self.init_lora_weights!r} says {name}={said!r} and init_options says "
                    f"{name}={given!r}: leave one of them out"
                )
        self.strategy.check_options(self.options)

    def _check_combinations(self) -> None:
        patterned = isinstance(self.target_modules, str)
        if self.layers_to_transform is not None and patterned:
            raise BadOption("layers_to_transform needs a list of target_modules: write the layers into the expression")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise BadOption("layers_pattern says where layers_to_transform counts: give both")
        if self.target_parameters and self.lora_dropout:
            raise BadOption("target_parameters have no inputs to drop: set lora_dropout=0")
        if self.target_parameters and self.use_dora:
            raise BadOption("use_dora is not defined for target_parameters: leave one of them out")
        for name in _EXPRESSIONS:
            value = vars(self)[name]
            if isinstance(value, str):
                _check_expression(name, value)
        for name in ("rank_pattern", "alpha_pattern"):
            for key in vars(self)[name]:
                _check_expression(name, key)

    def _check_kinds(self) -> None:
        for name in ("rank_pattern", "alpha_pattern", "parts", "init_options"):
            if not isinstance(vars(self)[name], Mapping):
                raise BadOption(f"{name} is {vars(self)[name]!r}: choose a mapping")
        for name in (*_EXPRESSIONS, "modules_to_save", "target_parameters"):
            value = vars(self)[name]
            if value is None and name != "target_modules":
                continue
            several = not isinstance(value, str) and isinstance(value, Collection)
            names = value if several else [value] if name in _EXPRESSIONS else [None]
            if not all(isinstance(one, str) for one in names):
                raise BadOption(f"{name} is {value!r}: choose a list of names")
        for name in ("use_rslora", "use_dora", "clip_rank"):
            if not isinstance(vars(self)[name], bool):  # "false" is true
                raise BadOption(f"{name} is {vars(self)[name]!r}: choose True or False")


def check_rank(name: str, rank: object) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise BadRank(f"{name} is {rank!r}: choose an integer of at least 1")


def _check_expression(name: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise BadOption(f"{name} {value!r} is no regular expression: {error}") from error


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
    layout: matrix.Layout
    rank: int
    alpha: float
    scaling: float


def targets(model: nn.Module, config: LoraConfig) -> list[Target]:
    """Every weight that the config names in this model, in the model's order.

    Raises:
        NoTarget: if a target, an exclusion, a pattern or a part matches nothing; it names what is near.
        UnsupportedLayer: if what it matches cannot be adapted.
        BadRank: if a start takes more directions from a weight than it has, and `clip_rank` is off.
    """
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
