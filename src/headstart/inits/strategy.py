"""What a strategy is: a pure function from one weight matrix to two factors.

The names of its parameters are its contract, as in pytest fixtures:

    given     weight (m, n) or shape (m, n) alone, rank, scaling, generator, kind
    needed    whatever `statistics.py` defines
    options   everything else, each with a default; the user sets them in `init_options`

A strategy that takes `shape` never reads the weight, and so works on the meta device.
`kind` is "linear", "embedding" or "conv": the same matrix, for the rules that differ between them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from headstart import statistics
from headstart.errors import BadOption, MissingStatistic, UnknownInit, nearest

GIVEN = ("weight", "shape", "rank", "scaling", "generator", "kind")


@dataclass(frozen=True)
class Factors:
    """A start: the branch adds s·B·A, or s·(B·A − B₀·A₀) where it is anchored.

    Attributes:
        A: (r, n).
        B: (m, r).
        anchored: the function must not move at step zero although B·A ≠ 0. The layer keeps frozen copies
            of both factors and subtracts their product, so the weight is never written to.
        frozen: the factors that do not train, "A" or "B".
        facts: what the strategy found out, for the init report (certificates, routes, effective ranks).
    """

    A: Float[Tensor, "r n"]
    B: Float[Tensor, "m r"]
    anchored: bool = False
    frozen: frozenset[str] = frozenset()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Strategy:
    """A registered start and what its signature says about it."""

    name: str
    function: Callable[..., Factors]
    paper: str
    fact: str
    preset: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics without which it cannot start."""
        return tuple(name for name in self.parameters if name in statistics.NAMES)

    @property
    def options(self) -> dict[str, Any]:
        """Its own options, with their defaults."""
        return {
            name: parameter.default
            for name, parameter in self.parameters.items()
            if name not in GIVEN and name not in statistics.NAMES
        }

    @property
    def reads_weight(self) -> bool:
        return "weight" in self.parameters

    @property
    def divides_by_scaling(self) -> bool:
        """Whether it takes a root of 1/s, so that s must be positive."""
        return "scaling" in self.parameters

    def check_options(self, given: Mapping[str, Any]) -> None:
        """Refuse what the function does not take, before anything is touched."""
        for name in given:
            if name not in self.options:
                known = ", ".join(self.options) or "it has none"
                raise BadOption(
                    f"{self.name!r} has no option {name!r}{nearest(name, self.options)} (its options: {known})"
                )

    def start(self, given: Mapping[str, Any], options: Mapping[str, Any]) -> Factors:
        """Call the function with what its signature asks for.

        Raises:
            MissingStatistic: if it needs a statistic that `given` does not hold.
            BadOption: if an option is not one of its own.
        """
        self.check_options(options)
        absent = [name for name in self.needs if name not in given]
        if absent:
            raise MissingStatistic(f"{self.name!r} needs {', '.join(absent)}: pass calibration data (data=...)")
        wanted = {name: given[name] for name in self.parameters if name in given}
        return self.function(**wanted, **options)


_registry: dict[str, Strategy] = {}


def register(
    name: str, paper: str, fact: str, **preset: Any
) -> Callable[[Callable[..., Factors]], Callable[..., Factors]]:
    """Name a strategy. The function itself stays an ordinary function.

    Args:
        name: what users write in `init_lora_weights`.
        paper: where it is published.
        fact: one line, for tables: what it does and what it costs.
        preset: config fields that belong to it, for `LoraConfig.preset(name)`.
    """

    def enter(function: Callable[..., Factors]) -> Callable[..., Factors]:
        if name in _registry:
            raise BadOption(f"two strategies are called {name!r}: rename the second")
        _registry[name] = Strategy(name, function, paper, fact, preset)
        return function

    return enter


def names() -> list[str]:
    """All registered strategies, in the order of their registration."""
    return list(_registry)


def get(spelling: str | bool) -> tuple[Strategy, dict[str, Any]]:
    """The strategy of a spelling, ours or PEFT's, and the options that the spelling carries.

    Args:
        spelling: a registered name, `True` (Kaiming), `False` (random), or "pissa_niter_N".

    Raises:
        UnknownInit: with the nearest name.
    """
    if spelling is True:
        return _registry["kaiming"], {}
    if spelling is False:
        return _registry["random"], {}
    if isinstance(spelling, str):
        if fast := re.fullmatch(r"pissa_niter_(\d+)", spelling):
            return _registry["pissa"], {"niter": int(fast[1])}
        if spelling in _registry:
            return _registry[spelling], {}
    raise UnknownInit(
        f"no init is called {spelling!r}{nearest(str(spelling), _registry)} (known: {', '.join(_registry)})"
    )
