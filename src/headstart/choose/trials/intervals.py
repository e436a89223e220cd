"""Differences between runs that share a seed and the order of their data.

    d_i = loss(arm, seed i) − loss(baseline, seed i)                        i = 1 … n
    mean d ± t(1 − α/2k', n − 1) · sd(d)/√n

k' is Holm's divisor. The differences are tested in the order of their p-values, the first of k at α/k, the next at
α/(k−1), …, until one is not told from zero; that one and all after it keep its divisor. So an interval leaves out
zero exactly where Holm's procedure finds a difference, and all findings together are wrong in at most α of all runs.

Holm (1979), "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6(2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALPHA = 0.05


@dataclass(frozen=True)
class Difference:
    """How far an arm is from the baseline, over the seeds that both finished.

    Attributes:
        mean: negative where the arm is better; low, high: its interval, corrected for the number of arms.
        p: corrected likewise; told: whether it is larger than the noise of the seeds.
        pairs: the difference of each seed.
    """

    mean: float
    low: float
    high: float
    p: float
    told: bool
    pairs: tuple[float, ...]

    @property
    def width(self) -> float:
        """Half the interval: a difference below it could not have been told."""
        return (self.high - self.low) / 2


def differences(pairs: Mapping[str, Sequence[float]], alpha: float = ALPHA) -> dict[str, Difference]:
    """What the paired differences of several arms to one baseline say, corrected for their number.

    Args:
        pairs: by arm, the difference of each seed. An arm with fewer than two says nothing: its interval is infinite.
    """
    raw = {name: _p_value(values) for name, values in pairs.items()}
    order = sorted(raw, key=lambda name: raw[name])
    found: dict[str, Difference] = {}
    divisor, corrected, stopped = len(order), 0.0, False
    for place, name in enumerate(order):
        divisor = divisor if stopped else len(order) - place
        corrected = min(1.0, max(corrected, (len(order) - place) * raw[name]))
        stopped = stopped or raw[name] * divisor >= alpha
        mean, half = _mean(pairs[name]), _half_width(pairs[name], alpha / divisor)
        found[name] = Difference(mean, mean - half, mean + half, corrected, not stopped, tuple(pairs[name]))
    return {name: found[name] for name in pairs}


def band(values: Sequence[float], alpha: float = ALPHA) -> tuple[float, float]:
    """A mean's interval over seeds; the mean alone where there is one seed."""
    mean = _mean(values)
    half = _half_width(values, alpha) if len(values) > 1 else 0.0
    return mean - half, mean + half


def spread(values: Sequence[float]) -> float:
    """The standard deviation over seeds; 0 for one."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _p_value(values: Sequence[float]) -> float:
    from scipy.stats import t

    error = spread(values) / math.sqrt(max(1, len(values)))
    if len(values) < 2 or error == 0:  # Equal in every seed: the same run twice, or a quantity that no seed moves.
        return 1.0 if len(values) < 2 or _mean(values) == 0 else 0.0
    return float(2 * t.sf(abs(_mean(values)) / error, len(values) - 1))


def _half_width(values: Sequence[float], alpha: float) -> float:
    from scipy.stats import t

    if len(values) < 2:
        return math.inf
    return float(t.isf(alpha / 2, len(values) - 1)) * spread(values) / math.sqrt(len(values))
