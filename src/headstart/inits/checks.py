"""What a start refuses: a rank, a scaling, a weight, an option or a statistic that it cannot be built from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from headstart.errors import BadAlpha, BadOption, BadRank, MetaWeight, NonFiniteWeight, NoSignal, TooLittleData, nearest
from headstart.statistics import InputSpectrum, Moments


def check_fit(weight: Tensor, rank: int) -> None:
    """A weight with values, and no more directions asked of it than it has."""
    check_rank(tuple(weight.shape), rank, min(weight.shape))
    if weight.is_meta:
        raise MetaWeight(f"this start reads the values of a {tuple(weight.shape)} weight: load it first")


def check_rank(shape: tuple[int, ...], rank: int, largest: int) -> None:
    """No more directions than there are."""
    if not 1 <= rank <= largest:
        raise BadRank(f"rank {rank} does not fit a {shape} weight: choose 1 to {largest}")


def check_scaling(scaling: float) -> None:
    """A scaling that can be divided by, and whose root can be taken."""
    if not (0 < scaling < math.inf):
        raise BadAlpha(f"scaling is {scaling} and this start divides by it: choose a lora_alpha above 0")


def check_finite(weight: Tensor, result: Tensor) -> None:
    """A weight without NaN or infinity, seen from a result that every one of its elements entered."""
    if not bool(torch.isfinite(result).all()):
        count = int((~torch.isfinite(weight)).sum())
        found = f"holds {count} NaN or infinite values: repair it" if count else "overflows float32: scale it down"
        raise NonFiniteWeight(f"a {tuple(weight.shape)} weight {found}")


def check_values(weight: Tensor) -> None:
    """A weight without NaN or infinity, before a statistic is multiplied into it."""
    check_finite(weight, weight.detach().sum(dtype=torch.float64))


def check_choice(option: str, chosen: str, choices: Sequence[str]) -> None:
    """One of the words that an option knows."""
    if chosen not in choices:
        raise BadOption(
            f"{option} is {chosen!r}{nearest(str(chosen), choices)} (choose {', '.join(map(repr, choices))})"
        )


def check_above_zero(option: str, value: float, *, or_zero: bool = False) -> None:
    if not (0 < value < math.inf or (or_zero and value == 0)):
        raise BadOption(f"{option} is {value!r}: choose {'0 or more' if or_zero else 'a number above 0'}")


def check_rows(rows: Moments | InputSpectrum, needed: int, what: str = "inputs") -> None:
    """A layer that ran, on as many tokens as there are directions to find."""
    if not rows.count:
        raise NoSignal(f"no {what} were seen: leave this layer out, or give data that runs it")
    if rows.count < needed:
        raise TooLittleData(f"{rows.count} tokens cannot show {needed} directions: give more data, or lower the rank")
    if not rows.energy > 0:
        raise NoSignal(f"the {what} are all zero: leave this layer out, or give data that it does something with")
