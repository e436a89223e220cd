"""What to adapt and how: `LoraConfig`; targets.py resolves it against a model.

The fields carry the names that PEFT's users know. The config stays at the shell: everything below takes values.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from headstart.errors import BadAlpha, BadOption, BadRank, UnknownField, nearest
from headstart.inits import strategy

_EXPRESSIONS = ("target_modules", "exclude_modules", "layers_pattern")  # may be one expression, too


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
