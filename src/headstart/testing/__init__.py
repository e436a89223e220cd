"""The laws that every start obeys on every kind of layer, for yours as for ours: `check_strategy("mine")`.

    a start     has the shapes asked for, is pure and repeats, whatever was started before it;
                s·B₀·A₀ is the same for every α; one matrix gets one adapter however it is stored;
                zero, deficient and strided weights are served, NaN is refused by name
    a model     computes its old function at step zero, where the start says so; trains nothing but the adapter;
                computes one function in every mode; is the base to the bit when disabled, unmerged or removed;
                merges to what it computed; and is what it was when loaded on a fresh base

Each law is a function of a `Case`, made of plain assertions. A shell is a way to put adapters into a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from headstart.errors import BadOption, nearest
from headstart.inits import strategy as registry
from headstart.inits.strategy import Strategy
from headstart.testing.cases import Case, fingerprint, train
from headstart.testing.kinds import KINDS, Both, Experts, Kind
from headstart.testing.laws import LAWS, MODEL_LAWS, ROUNDING_LAWS, START_LAWS, Law, violations
from headstart.testing.shells import NATIVE, PEFT, Native, Peft, Shell

__all__ = [
    "DTYPES",
    "KINDS",
    "LAWS",
    "MODEL_LAWS",
    "NATIVE",
    "PEFT",
    "ROUNDING_LAWS",
    "START_LAWS",
    "Both",
    "Case",
    "Experts",
    "Kind",
    "Law",
    "Native",
    "Peft",
    "Shell",
    "check_strategy",
    "fingerprint",
    "registered",
    "train",
    "violations",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_strategy(
    strategy: str | Strategy,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    dtypes: Sequence[torch.dtype] = DTYPES,
    device: str | torch.device = "cpu",
    shell: Shell = NATIVE,
) -> None:
    """Every law over a strategy, on every kind of layer and dtype that this machine computes.

    Args:
        strategy: the name of a registered one, or a `Strategy`.
        kinds: names from `KINDS`.
        dtypes: of the weights.
        device: where to run.
        shell: how models are adapted.

    Raises:
        AssertionError: listing every law that is broken, and where.

    Example:
        >>> check_strategy("pissa", kinds=["linear"], dtypes=[torch.float32])
    """
    for kind in kinds:
        if kind not in KINDS:
            raise BadOption(f"no kind of layer is called {kind!r}{nearest(kind, KINDS)} (known: {', '.join(KINDS)})")
    with registered(strategy) as name:
        cases = [Case(name, KINDS[kind], dtype, torch.device(device), shell) for kind in kinds for dtype in dtypes]
        broken = [f"{law.__name__} ({case}): {said}" for case in cases for law, said in violations(case)]
    if broken:
        raise AssertionError(f"{len(broken)} laws are broken:\n" + "\n".join(broken))


@contextmanager
def registered(strategy: str | Strategy) -> Iterator[str]:
    """The strategy's name, with the strategy in the registry for as long as it is looked at."""
    if isinstance(strategy, str) or strategy.name in registry.names():
        yield registry.get(strategy if isinstance(strategy, str) else strategy.name)[0].name
        return
    registry._registry[strategy.name] = strategy
    try:
        yield strategy.name
    finally:
        del registry._registry[strategy.name]
