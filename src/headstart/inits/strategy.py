"""What a strategy is: a pure function from one weight matrix to two factors.

The names of its parameters are its contract, as in pytest fixtures:

    given     weight (m, n) or shape (m, n) alone, rank, scaling, generator, kind, quantize
    needed    whatever `statistics` defines
    options   everything else, each with a default; the user sets them in `init_options`

A strategy that takes `shape` never reads the weight, and so works on the meta device.
`kind` is "linear", "embedding" or "conv": the same matrix, for the rules that differ between them.
`quantize` maps a matrix to what is left of it after quantising it. A strategy that takes it has the options of
`QUANTIZER` beside its own; they say which matrix and which map it is given.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headstart import statistics
from headstart.errors import BadOption, MissingStatistic, UnknownInit, nearest

GIVEN = ("weight", "shape", "rank", "scaling", "generator", "kind", "quantize")

# bits 4 or 8; quant_type "nf4" or "fp4" of 4 bits; original: for a model that is quantised already, the folder of its
# float checkpoint.
QUANTIZER: Mapping[str, Any] = {"bits": 4, "quant_type": "nf4", "original": None}

# What an option may be, by the name of its type, and how to say it. A flag is no number.
_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "int": (lambda value: isinstance(value, int) and not isinstance(value, bool), "an integer"),
    "float": (lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number"),
    "str": (lambda value: isinstance(value, str), "a word"),
}


@dataclass(frozen=True)
class Factors:
    """A start: the branch adds s·B·A, or s·(B·A − B₀·A₀) where it is anchored.

    Attributes:
        A: (r, n).
        B: (m, r).
        anchored: the function must not move at step zero although B·A ≠ 0. The layer keeps frozen copies
            of both factors and subtracts their product, so the weight is never written to.
        frozen: the factors that do not train, "A" or "B".
        core: (r, r), where a trained matrix stands between the two: the branch adds s·B·core·A.
        base: (m, n), what is to replace the frozen weight: quantize(W − B·A) for the pair (A, B) in `taken`.
        facts: what the strategy found out, for the init report (certificates, routes, effective ranks).
    """

    A: Float[Tensor, "r n"]
    B: Float[Tensor, "m r"]
    anchored: bool = False
    frozen: frozenset[str] = frozenset()
    core: Float[Tensor, "r r"] | None = None
    base: Float[Tensor, "m n"] | None = None
    taken: tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Strategy:
    """A registered start and what its signature says about it."""

    name: str
    function: Callable[..., Factors]
    paper: str
    fact: str
    preset: Mapping[str, Any] = field(default_factory=dict)
    scales: bool = False
    preserving: Mapping[str, Any] | None = None

    @functools.cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return dict(inspect.signature(self.function).parameters)

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics without which it cannot start."""
        return tuple(name for name in self.parameters if name in statistics.NAMES)

    @property
    def options(self) -> dict[str, Any]:
        """Its own options, with their defaults, and the quantiser's where it has one."""
        own = {
            name: parameter.default
            for name, parameter in self.parameters.items()
            if name not in GIVEN and name not in statistics.NAMES
        }
        return {**own, **QUANTIZER} if self.quantizes else own

    @property
    def reads_weight(self) -> bool:
        return "weight" in self.parameters

    @property
    def quantizes(self) -> bool:
        """Whether it fits its factors to a quantised weight, which replaces the frozen one."""
        return "quantize" in self.parameters

    @property
    def divides_by_scaling(self) -> bool:
        """Whether it takes a root of 1/s, so that s must be positive."""
        return "scaling" in self.parameters

    def looks_at_preserved(self, options: Mapping[str, Any]) -> bool:
        """Whether with these options its `inputs` are those of the data to preserve, and it looks at no other data."""
        if self.preserving is None:
            return False
        return {**self.options, **options}.items() >= self.preserving.items()

    def check_options(self, given: Mapping[str, Any]) -> None:
        """Refuse what the function does not take, before anything is touched."""
        options = self.options
        for name, value in given.items():
            if name not in options:
                known = ", ".join(options) or "it has none"
                raise BadOption(f"{self.name!r} has no option {name!r}{nearest(name, options)} (its options: {known})")
            self._check_kind(name, value, options[name])

    def _check_kind(self, name: str, value: Any, default: Any) -> None:
        """A value is of the type of its default; where that is None, also of the type that a plain annotation names."""
        kind, choose = type(default).__name__, ""
        if default is None and name in self.parameters:
            kind, choose = str(self.parameters[name].annotation).removesuffix(" | None"), "None or "
        if kind in _KINDS and not (default is None and value is None):
            fits, said = _KINDS[kind]
            if not fits(value):
                raise BadOption(
                    f"option {name!r} of {self.name!r} is {value!r}: choose {choose}{said} (the default is {default!r})"
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
        with _plain_defaults():
            return self.function(**wanted, **{name: options[name] for name in options if name in self.parameters})


@contextmanager
def _plain_defaults() -> Iterator[None]:
    """What a strategy draws is float32 on the CPU, whatever the user's defaults are: the same start everywhere."""
    before = torch.get_default_dtype()
    # A device as a context intercepts every operation, and takes as long as the small ones do.
    elsewhere = torch.get_default_device().type != "cpu"
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu") if elsewhere else nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


_registry: dict[str, Strategy] = {}


def register(
    name: str,
    paper: str,
    fact: str,
    *,
    scales: bool = False,
    preserving: Mapping[str, Any] | None = None,
    **preset: Any,
) -> Callable[[Callable[..., Factors]], Callable[..., Factors]]:
    """Name a strategy. The function itself stays an ordinary function.

    Args:
        name: what users write in `init_lora_weights`.
        paper: where it is published.
        fact: one line, for tables: what it does and what it costs.
        scales: whether s·B₀·A₀ grows with s although the function takes `scaling`, because its paper has it so.
        preserving: the options with which its `inputs` are those of what is to be preserved, {} for always; None where
            they are those of what is to be learnt.
        preset: config fields that belong to it, for `LoraConfig.preset(name)`.
    """

    def enter(function: Callable[..., Factors]) -> Callable[..., Factors]:
        if name in _registry:
            raise BadOption(f"two strategies are called {name!r}: rename the second")
        _registry[name] = Strategy(name, function, paper, fact, preset, scales, preserving)
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
