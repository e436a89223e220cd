"""Which learning rates to train how far: successive halving along the schedule of one whole run.

    rung        1/8    1/4    1/2     1        of the run's steps
    trained      6      5      3      2        rates, where the grid is ours: factors of two round a centre
                 every  the    the    the
                 second best   best   best     the 5 of rung two are the best one's nearest, inside the grid or past it

A rate that goes on is not trained anew: it continues. So every arm costs 3.4 runs and has been searched over eleven
rates (a full grid costs eleven); a list of n rates costs about n/2. All arms pay the same.

Jamieson, Talwalkar (2016), "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

Losses = Mapping[tuple[int, int], float]  # by rung and rate
REACH = 5  # factors of two that the grid covers on each side of its centre


@dataclass(frozen=True)
class Ladder:
    """The rungs of one arm's search.

    Attributes:
        steps: how far each rung trains.
        keep: how many rates each rung trains at most.
        first: the rates of the first rung, by their place in the grid.
        widens: whether the second rung takes the nearest of the best instead of the best.
        covered: how many rates a full grid would train to the end.
    """

    steps: tuple[int, ...]
    keep: tuple[int, ...]
    first: tuple[int, ...]
    covered: int
    widens: bool = False

    @classmethod
    def around(cls, steps: int) -> Ladder:
        """Factors of two round a centre, whose place is 0."""
        first = tuple(range(-REACH, REACH + 1, 2))
        return cls(_parts(steps, 8, 4, 2, 1), (len(first), 5, 3, 2), first, 2 * REACH + 1, widens=True)

    @classmethod
    def through(cls, steps: int, count: int) -> Ladder:
        """A list of rates, from which half and then a quarter go on."""
        first = tuple(range(count))
        if count < 3:
            return cls((steps,), (count,), first, count)
        keep = (count, math.ceil(count / 2), max(2, math.ceil(count / 4)))
        return cls(_parts(steps, 4, 2, 1), keep, first, count)

    def entrants(self, rung: int, losses: Losses) -> list[int] | None:
        """The rates that a rung trains; None while the rung before it is not finished."""
        if rung == 0:
            return list(self.first)
        before = self.entrants(rung - 1, losses)
        if before is None or any((rung - 1, rate) not in losses for rate in before):
            return None
        alive = [rate for rate in before if math.isfinite(losses[rung - 1, rate])]
        best = sorted(alive, key=lambda rate: (losses[rung - 1, rate], rate))
        if self.widens and rung == 1 and best:
            hopeless = set(before) - set(alive)
            return [rate for rate in range(best[0] - 2, best[0] + 3) if rate not in hopeless]
        return sorted(best[: self.keep[rung]])

    def due(self, losses: Losses) -> list[tuple[int, int]]:
        """What is to be trained now, as (rung, rate); nothing once there is a winner, or none can be."""
        for rung in range(len(self.steps)):
            rates = self.entrants(rung, losses)
            missing = [(rung, rate) for rate in rates or [] if (rung, rate) not in losses]
            if missing or not rates:
                return missing
        return []

    def finished(self, losses: Losses) -> bool:
        """Whether nothing is left to train, with a winner or without."""
        return not self.due(losses)

    def winner(self, losses: Losses) -> int | None:
        """The best rate of the last rung; None before it is finished, or where no rate got there."""
        last = len(self.steps) - 1
        rates = self.entrants(last, losses)
        found = {rate: losses.get((last, rate)) for rate in rates or []}
        known = {rate: loss for rate, loss in found.items() if loss is not None and math.isfinite(loss)}
        if len(found) > sum(loss is not None for loss in found.values()) or not known:
            return None
        return min(known, key=lambda rate: (known[rate], rate))

    def trained(self, losses: Losses) -> int:
        """The steps behind these losses: a rate that went on was not trained anew."""
        furthest: dict[int, int] = {}
        for rung, rate in losses:
            furthest[rate] = max(furthest.get(rate, 0), self.steps[rung])
        return sum(furthest.values())

    @property
    def cost(self) -> int:
        """The most steps that the search takes."""
        fresh = [self.steps[0] * len(self.first)]
        for rung in range(1, len(self.steps)):
            # Of the five nearest of the best, every second was in the first rung; two of them at the grid's end.
            gone_on = 2 if self.widens and rung == 1 else self.keep[rung]
            fresh.append(self.keep[rung] * self.steps[rung] - gone_on * self.steps[rung - 1])
        return sum(fresh)


def _parts(steps: int, *shares: int) -> tuple[int, ...]:
    """Fractions of a run, as steps that rise; a run too short for all of them has fewer rungs of one length."""
    return tuple(max(1, round(steps / share)) for share in shares)
