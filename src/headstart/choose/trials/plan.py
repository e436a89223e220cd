"""What a budget buys: how many steps, rates and seeds, and whether any conclusion can come of it.

Every arm is given the same: one search of its rates on a seed of its own, then `seeds` runs at its best rate.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headstart.choose.trials.halving import Ladder
from headstart.errors import BadOption

FEWEST_STEPS = 20  # below, a run is mostly warm-up
FEWEST_SEEDS = 3  # below, no interval is worth looking at
USUAL_SEEDS = 5
USUAL_STEPS = 200
LONG_ENOUGH = 100  # steps that are preferred to a fourth and a fifth seed
USED = 0.92  # of the budget is planned; the rest is for what was timed too low
UNITS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "hour": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Timing:
    """Seconds, as one rehearsal measured them.

    Attributes:
        step: of training. tuning, judging: of one evaluation of each kind.
        start: of all arms' starts for one seed, calibration included.
    """

    step: float
    tuning: float = 0.0
    judging: float = 0.0
    start: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What will be run.

    Attributes:
        arms: their names; the first is the baseline.
        steps: of a whole run; seeds: how many runs an arm is judged by.
        centres: the middle of each arm's grid of rates, where the grid is ours.
        rates: each arm's rates, where they are given.
        timing: what it was made from; budget: in seconds.
    """

    arms: tuple[str, ...]
    steps: int
    seeds: int
    centres: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)
    timing: Timing = Timing(0.0)
    budget: float | None = None

    def ladder(self, arm: str) -> Ladder:
        return Ladder.through(self.steps, len(self.rates[arm])) if arm in self.rates else Ladder.around(self.steps)

    def rate(self, arm: str, place: int) -> float:
        """The rate at a place of an arm's grid."""
        return float(self.rates[arm][place]) if arm in self.rates else self.centres[arm] * 2.0**place

    def steps_of(self, arm: str) -> int:
        """The most steps that an arm takes in all."""
        return self.ladder(arm).cost + self.seeds * self.steps

    @property
    def alike(self) -> bool:
        """Whether all arms are searched at one cost."""
        return len({self.ladder(arm).cost for arm in self.arms}) == 1

    @property
    def seconds(self) -> float:
        """What it is predicted to take on one machine."""
        ladders = [self.ladder(arm) for arm in self.arms]
        judged = sum(sum(min(k, len(ladder.first)) for k in ladder.keep) for ladder in ladders) * self.timing.tuning
        judged += len(self.arms) * self.seeds * self.timing.judging
        training = sum(self.steps_of(arm) for arm in self.arms) * self.timing.step
        return training + judged + self.seeds * self.timing.start

    @property
    def doubts(self) -> list[str]:
        """Why no conclusion can come of it, in words; nothing where one can."""
        found = []
        if self.seeds < FEWEST_SEEDS:
            found.append(f"{self.seeds} seed{'s' * (self.seeds > 1)}: fewer than {FEWEST_SEEDS} tell no noise")
        if self.steps < FEWEST_STEPS:
            found.append(f"{self.steps} steps a run: fewer than {FEWEST_STEPS} are mostly warm-up")
        if self.budget is not None and self.seconds > 1.1 * self.budget:
            found.append(f"predicted {words(self.seconds)} do not fit into {words(self.budget)}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        return cls(**{**values, "arms": tuple(values["arms"]), "timing": Timing(**values["timing"])})

    def __str__(self) -> str:
        count = {arm: self.ladder(arm).covered for arm in self.arms}
        return (
            f"{len(self.arms)} arms, a search over {max(count.values())} rates each, then {self.seeds} seeds of "
            f"{self.steps} steps: {sum(map(self.steps_of, self.arms)):,} steps, about {words(self.seconds)}"
        )


def fitted(plan: Plan, steps: int | None, seeds: int | None) -> Plan:
    """The plan with as many steps and seeds as its budget buys; what is given is kept.

    Fewer seeds are taken rather than runs that are too short, but never fewer than three.
    """
    if plan.budget is None:
        return dataclasses.replace(plan, steps=steps or USUAL_STEPS, seeds=seeds or USUAL_SEEDS)
    choices = [seeds] if seeds else list(range(USUAL_SEEDS, FEWEST_SEEDS - 1, -1))
    for count in choices:
        found = dataclasses.replace(plan, seeds=count, steps=steps or _longest(plan, count))
        enough = found.steps >= LONG_ENOUGH if steps is None else found.seconds <= plan.budget
        if enough:
            return found
    return found


def _longest(plan: Plan, seeds: int) -> int:
    """The most steps a run that the budget allows with so many seeds, between 8 and ten thousand."""
    low, high = 8, 10_000
    while low < high:
        middle = (low + high + 1) // 2
        fits = dataclasses.replace(plan, seeds=seeds, steps=middle).seconds <= USED * (plan.budget or math.inf)
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def needed(plan: Plan) -> float:
    """The smallest budget, in seconds, that a conclusion can come of."""
    least = dataclasses.replace(plan, steps=max(plan.steps, FEWEST_STEPS), seeds=max(plan.seeds, FEWEST_SEEDS))
    return least.seconds / USED


def seconds_of(budget: str | float) -> float:
    """A time in seconds: a number, or "90s", "30min", "1h30m".

    Raises:
        BadOption: if it is none.

    >>> seconds_of("1h30m"), seconds_of(90), seconds_of("30min")
    (5400.0, 90.0, 1800.0)
    """
    wrong = BadOption(f"budget is {budget!r}: choose a time such as '90s', '30min' or '2h'")
    if isinstance(budget, bool):
        raise wrong
    if isinstance(budget, int | float):
        found = float(budget)
    else:
        text = budget.replace(" ", "").lower()
        parts = re.findall(r"(\d+(?:\.\d+)?)([a-z]+)", text)
        if "".join(number + unit for number, unit in parts) != text or not parts:
            raise wrong
        units = [unit if unit in UNITS else unit.removesuffix("s") for _, unit in parts]
        if not set(units) <= set(UNITS):
            raise wrong
        found = sum(float(number) * UNITS[unit] for (number, _), unit in zip(parts, units, strict=True))
    if not (math.isfinite(found) and found > 0):
        raise wrong
    return found


def words(seconds: float) -> str:
    """A time as people say it.

    >>> words(0.042), words(42), words(600), words(5400)
    ('42 ms', '42 s', '10 min', '1.5 h')
    """
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
