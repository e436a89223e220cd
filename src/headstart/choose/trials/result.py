"""What a comparison found: the raw runs, and what follows from them.

Only the plan, the base's losses, the starts and the runs are measured. Everything else (differences, intervals, steps
saved, the verdict) is worked out from them here, so that a saved comparison can be read again by a later version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from headstart.choose.trials.intervals import Difference, band, differences
from headstart.choose.trials.plan import Plan
from headstart.choose.trials.study import Outcome
from headstart.choose.trials.worker import losses

SMOOTH = 0.1  # of a run: what a learning curve is averaged over before steps are read off it
Curve = list[list[float]]


@dataclass(frozen=True)
class Arm:
    """One arm's results.

    Attributes:
        name: of the arm; rate: its best, or None where none was found; at_edge: whether no larger or smaller one was
            tried, and which.
        losses: by seed, on the validation batches; preserved: likewise, on what is not to be forgotten.
        difference: to the baseline, None for the baseline itself and where fewer than two seeds are paired.
        curve: [step, mean, low, high] of the training loss over seeds.
        reached: the step at which its mean curve has come down to the baseline's last training loss.
        cost: seconds of its start, calibration included, a mean over seeds.
        diverged: the rates at which it diverged; crashed: what went wrong, in words.
        search: what was tried: rate, steps, loss.
    """

    name: str
    rate: float | None
    at_edge: str
    losses: Mapping[int, float]
    preserved: Mapping[int, float]
    difference: Difference | None
    curve: Curve
    reached: int | None
    cost: float
    diverged: tuple[float, ...]
    crashed: tuple[str, ...]
    search: tuple[Mapping[str, Any], ...]

    @property
    def loss(self) -> float | None:
        return math.fsum(self.losses.values()) / len(self.losses) if self.losses else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the mean loss, over seeds."""
        return band(list(self.losses.values())) if self.losses else None

    @property
    def kept(self) -> float | None:
        """The mean loss on what is not to be forgotten."""
        return math.fsum(self.preserved.values()) / len(self.preserved) if self.preserved else None


@dataclass(frozen=True)
class Measured:
    """What the runs of a comparison left behind.

    Attributes:
        plan: what was to be run; base: the base's own losses on the three kinds of batches.
        starts: by arm, its layers' pictures; trainable: by arm, parameters.
        outcomes: by job, as they stand in the study; stopped: why something is left to do.
        crashed: by arm, why it could not begin.
    """

    plan: Plan
    base: Mapping[str, float | None]
    starts: Mapping[str, Sequence[Mapping[str, Any]]]
    trainable: Mapping[str, int]
    outcomes: Mapping[str, Outcome]
    crashed: Mapping[str, str]
    stopped: str = ""

    @cached_property
    def arms(self) -> list[Arm]:
        """The arms, the baseline first."""
        names = self.plan.arms
        finals = {name: self._finals(name) for name in names}
        baseline = finals[names[0]]
        shared = {name: [seed for seed in sorted(runs) if seed in baseline] for name, runs in finals.items()}
        pairs = {n: [finals[n][s]["value"] - baseline[s]["value"] for s in shared[n]] for n in names[1:]}
        told = differences({name: found for name, found in pairs.items() if len(found) > 1})
        curves = {name: _mean_curve([run["curve"] for run in runs.values()]) for name, runs in finals.items()}
        goal = _smoothed(curves[names[0]])[-1][1] if curves[names[0]] else None
        return [self._arm(n, finals[n], told.get(n), curves[n], goal) for n in names]

    @property
    def baseline(self) -> Arm:
        return self.arms[0]

    def _finals(self, arm: str) -> dict[int, Outcome]:
        """The finished final runs of an arm, by seed."""
        runs = [o for o in self.outcomes.values() if o.get("kind") == "final" and o["arm"] == arm]
        return {run["seed"]: run for run in runs if run["value"] is not None}

    def lost(self, arm: str) -> int:
        """How many of an arm's final runs diverged or crashed."""
        finals = (o for o in self.outcomes.values() if o.get("kind") == "final" and o["arm"] == arm)
        return sum(run["value"] is None for run in finals)

    def _arm(
        self, name: str, runs: Mapping[int, Outcome], told: Difference | None, curve: Curve, goal: float | None
    ) -> Arm:
        own = [o for o in self.outcomes.values() if o.get("arm") == name]
        ladder, found = self.plan.ladder(name), losses(self.plan, self.outcomes, name)
        winner = ladder.winner(found)
        tried = sorted({place for _, place in found})
        edge = "" if winner is None or len(tried) < 2 else {tried[0]: "low", tried[-1]: "high"}.get(winner, "")
        costs = [sum(run["cost"].values()) for run in runs.values()]
        keep = {seed: run["preserved"] for seed, run in runs.items() if run.get("preserved") is not None}
        return Arm(
            name=name,
            rate=None if winner is None else self.plan.rate(name, winner),
            at_edge=edge,
            losses={seed: runs[seed]["value"] for seed in sorted(runs)},
            preserved=keep,
            difference=told,
            curve=curve,
            reached=_first_below(curve, goal),
            cost=sum(costs) / len(costs) if costs else 0.0,
            diverged=tuple(sorted({o["rate"] for o in own if o.get("diverged")})),
            crashed=tuple(o["error"] for o in own if o.get("error")),
            search=tuple(_tried(o) for o in own if o["kind"] == "tune"),
        )

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Where the time of all workers went."""
        found: dict[str, float] = {}
        for outcome in self.outcomes.values():
            for name, spent in outcome.get("seconds", {}).items():
                found[name] = found.get(name, 0.0) + spent
        return found

    @property
    def share_training(self) -> float:
        """Of the workers' time, what was spent in training steps."""
        return self.seconds.get("training", 0.0) / max(1e-9, sum(self.seconds.values()))

    @property
    def steps_tuning(self) -> tuple[int, int]:
        """The steps that the searches took, and those of full grids."""
        tuned = [o for o in self.outcomes.values() if o.get("kind") == "tune"]
        full = sum(self.plan.ladder(arm).covered * self.plan.steps for arm in self.plan.arms)
        return sum(int(o.get("steps", 0)) for o in tuned), full

    @property
    def step_seconds(self) -> float:
        """A training step, as all runs took it."""
        steps = sum(int(o.get("steps", 0)) for o in self.outcomes.values())
        return self.seconds.get("training", 0.0) / steps if steps else self.plan.timing.step


def _tried(outcome: Outcome) -> dict[str, Any]:
    kept = {name: outcome.get(name) for name in ("rate", "rung", "step", "diverged", "error")}
    return {**kept, "loss": outcome["value"]}


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over seeds and its interval, at the points that all curves have."""
    if not curves:
        return []
    found = []
    for points in zip(*curves, strict=False):
        values = [value for _, value in points]
        found.append([points[0][0], math.fsum(values) / len(values), *band(values)])
    return found


def _smoothed(curve: Curve) -> Curve:
    """Running means over a tenth of the run."""
    width = max(1, round(SMOOTH * len(curve)))
    means = [point[1] for point in curve]
    return [
        [point[0], math.fsum(means[max(0, i - width + 1) : i + 1]) / min(width, i + 1)] for i, point in enumerate(curve)
    ]


def _first_below(curve: Curve, goal: float | None) -> int | None:
    smooth = _smoothed(curve)
    width = max(1, round(SMOOTH * len(curve)))
    if goal is None:
        return None
    return next((int(step) for step, value in smooth[width - 1 :] if value <= goal), None)
