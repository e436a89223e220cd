"""How well the predictions do: against the best rate of every cell, with constants fitted on the other tasks."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rates.predict import TRAVELS
from benchmarks.rates.sweep import CENTRE, FACTOR
from headstart.lora.rate_search import settled
from headstart.lora.rates import FURTHEST, NEAREST

Key = tuple[str, str, int, float]  # task, init, rank, scaling
Lines = Sequence[Mapping[str, Any]]
PERIODS = (3.0, 4.0, 5.0, 6.0, 8.0, 12.0)
DOUBTS = (0.02, 0.03, 0.04, 0.05, 0.07, 0.1)
KNOWN, GUESSED, TRIED = "base known", "base guessed", "after trials"


@dataclass(frozen=True)
class Swept:
    """One cell's losses over the grid, and where their parabola is lowest.

    Attributes:
        losses: by grid step; best: its rate, between the grid's points; loss: there.
    """

    losses: Mapping[int, float]
    best: float
    loss: float

    @classmethod
    def of(cls, losses: Mapping[int, float]) -> Swept:
        step = min(losses, key=lambda step: (losses[step], step))
        at, low = _vertex(losses, step)
        return cls(losses, CENTRE * FACTOR**at, low)

    def at(self, rate: float) -> float:
        """The loss at a rate, by the parabola through the nearest three points; inf outside the grid."""
        where = math.log(rate / CENTRE, FACTOR)
        middle = min((s for s in self.losses if {s - 1, s + 1} <= self.losses.keys()), key=lambda s: abs(s - where))
        if abs(where - middle) > 1:
            return math.inf
        left, centre, right = (self.losses[middle + shift] for shift in (-1, 0, 1))
        x = where - middle
        if not math.isfinite(left + right):
            return centre if abs(x) < 0.5 else math.inf
        return centre + 0.5 * (right - left) * x + 0.5 * (left - 2 * centre + right) * x * x


def _vertex(losses: Mapping[int, float], step: int) -> tuple[float, float]:
    left, centre, right = (losses.get(step + shift, math.inf) for shift in (-1, 0, 1))
    bend = left - 2 * centre + right
    if not math.isfinite(bend) or bend <= 0:
        return step, centre
    x = 0.5 * (left - right) / bend
    return step + x, centre - 0.25 * (left - right) * x


def key(line: Mapping[str, Any]) -> Key:
    return (line["task"], line["init"], line["rank"], line["scaling"])


Grids = Mapping[Key, Mapping[int, Mapping[int, float]]]  # cell → seed → grid step → loss


def grids(lines: Lines) -> Grids:
    found: dict[Key, dict[int, dict[int, float]]] = {}
    for line in lines:
        found.setdefault(key(line), {}).setdefault(line["seed"], {})[line["step"]] = line["loss"]
    return found


def bracketed(losses: Mapping[int, float]) -> bool:
    """Whether the best rate has a worse one on both sides."""
    if not losses:
        return False
    step = min(losses, key=lambda step: (losses[step], step))
    return {step - 1, step + 1} <= losses.keys()


def swept(lines: Lines) -> dict[Key, Swept]:
    """The cells that were finished: the mean of their seeds at the rates that all of them ran, or the first seed."""
    found = {}
    for cell, seeds in grids(lines).items():
        common = set.intersection(*(set(losses) for losses in seeds.values()))
        mean = {step: statistics.fmean(losses[step] for losses in seeds.values()) for step in common}
        losses = mean if bracketed(mean) else seeds.get(0, {})
        if bracketed(losses):
            found[cell] = Swept.of(losses)
    return found


@dataclass(frozen=True)
class Judged:
    """One prediction of one cell.

    Attributes:
        rate: that was predicted; off: the factor between it and the best one, at least 1.
        worse: by which share the loss there is above the least one; inf where the sweep does not reach so far.
    """

    cell: Key
    rate: float
    off: float
    worse: float

    @classmethod
    def of(cls, cell: Key, swept: Swept, rate: float) -> Judged:
        return cls(cell, rate, max(rate / swept.best, swept.best / rate), swept.at(rate) / swept.loss - 1)


def multiplier(line: Mapping[str, Any], travel: float, base: float) -> float:
    """Of a start over plain LoRA's `base`: what was noted at the base that the sweep found, at as long a way."""
    way = min(max(travel * base / line["base"], TRAVELS[0]), TRAVELS[-1])
    low, high = next((low, high) for low, high in itertools.pairwise(TRAVELS) if way <= high)
    share = math.log(way / low) / math.log(high / low)
    at = [math.log(line["multipliers"][f"{travel:g}"]) for travel in (low, high)]
    return math.exp(at[0] + share * (at[1] - at[0]))


def known(line: Mapping[str, Any], others: Lines, cells: Mapping[Key, Swept]) -> float:
    """Plain LoRA's best rate on the task times the multiplier."""
    return line["base"] * multiplier(line, way(line, fit_period(others, cells)), line["base"])  # type: ignore[no-any-return]


def guessed(line: Mapping[str, Any], others: Lines, cells: Mapping[Key, Swept]) -> float:
    """The same without having trained: plain LoRA's rate is guessed from the layers' width."""
    base = fit_width(others) / line["width"]
    return base * multiplier(line, way(line, fit_period(others, cells)), base)  # type: ignore[no-any-return]


def way(line: Mapping[str, Any], period: float) -> float:
    """How far the entries of a run get, in steps of its peak rate, if one step in so many counts."""
    return min(max(line["steps"] / period, NEAREST), FURTHEST)  # type: ignore[no-any-return]


def fit_period(lines: Lines, cells: Mapping[Key, Swept]) -> float:
    """The period whose multipliers are off the least, in the mean square of the logarithm."""

    def error(period: float) -> float:
        at = [line["base"] * multiplier(line, way(line, period), line["base"]) for line in lines]
        return statistics.fmean(
            math.log(rate / cells[key(line)].best) ** 2 for rate, line in zip(at, lines, strict=True)
        )

    return min(PERIODS, key=error)


def fit_width(lines: Lines) -> float:
    """Plain LoRA's best rate times the width: the geometric mean over the tasks."""
    by_task = {line["task"]: line["base"] * line["width"] for line in lines}
    return statistics.geometric_mean(by_task.values())


def fit_doubt(lines: Lines, cells: Mapping[Key, Swept]) -> float:
    """What leaving the prediction has to cost for the trials to be off the least."""

    def error(doubt: float) -> float:
        rates = [(tried(line, doubt), cells[key(line)].best) for line in lines]
        return statistics.fmean(math.log(rate / best) ** 2 for rate, best in rates)

    return min(DOUBTS, key=error)


def tried(line: Mapping[str, Any], doubt: float) -> float:
    """What `search_rate` makes of a cell's trials."""
    return settled(dict(line["trials"]), line["near"], doubt)


def judged(lines: Lines, trials: Lines, cells: Mapping[Key, Swept]) -> dict[str, list[Judged]]:
    """Every cell's predictions, with constants fitted on the other tasks. Plain LoRA's best rate gets that one cell for
    nothing, which is left out."""

    def those(lines: Lines, predict: Callable[[Mapping[str, Any], Lines], float]) -> list[Judged]:
        found = []
        for line in lines:
            others = [other for other in lines if family(other) != family(line)] or lines
            found.append(Judged.of(key(line), cells[key(line)], predict(line, others)))
        return found

    return {
        KNOWN: [
            each
            for each in those(lines, lambda line, others: known(line, others, cells))
            if each.cell[1:] != ("kaiming", 16, 1.0)
        ],
        GUESSED: those(lines, lambda line, others: guessed(line, others, cells)),
        TRIED: those(trials, lambda line, others: tried(line, fit_doubt(others, cells))),
    }


def family(line: Mapping[str, Any]) -> str:
    """A task at all its lengths."""
    return line["task"].partition("_")[0]  # type: ignore[no-any-return]


def tables(lines: Lines, predictions: Lines, trials: Lines) -> dict[str, Any]:
    """What the page shows: every cell, and how many of them are met by which prediction, task by task."""
    cells = swept(lines)
    predicted = [line for line in predictions if key(line) in cells]
    trials = [line for line in trials if key(line) in cells]
    found = judged(predicted, trials, cells)
    by_cell = {(name, each.cell): each for name, several in found.items() for each in several}
    rows = []
    for cell in map(key, predicted):
        row: list[Any] = [*cell, cells[cell].best, cells[cell].loss]
        for name in found:
            each = by_cell.get((name, cell))
            row += [each.rate, each.off, _percent(each.worse)] if each else ["", "", ""]
        rows.append(row)
    tasks = list(dict.fromkeys(cell[0] for cell in map(key, predicted)))
    columns = [f"{name}: {what}" for name in found for what in ("within 2×", "loss within 1 %")]
    return {
        "constants": {
            "period": fit_period(predicted, cells),
            "width": fit_width(predicted),
            "doubt": fit_doubt(trials, cells),
        },
        "cells": {
            "header": ["task", "init", "r", "s", "best rate", "loss", *["predicted", "off by", "loss"] * len(found)],
            "rows": rows,
        },
        "verdict": {
            "header": ["task", *columns],
            "rows": [[task, *_counted(task, found)] for task in [*tasks, "all"]],
        },
        "noise": noise(lines, tasks),
    }


def noise(lines: Lines, tasks: Sequence[str]) -> dict[str, Any]:
    """How far apart two seeds are at the same rate, and how well the whole sweep of one seed predicts another's."""
    rows: list[list[Any]] = []
    for task in [*tasks, "all"]:
        apart, swept_by_another = [], []
        for cell, seeds in grids(lines).items():
            if task not in (cell[0], "all"):
                continue
            for one, other in itertools.permutations(seeds.values(), 2):
                both = [step for step in set(one) & set(other) if math.isfinite(one[step] + other[step])]
                apart += [abs(one[step] - other[step]) / min(one[step], other[step]) for step in both]
                if bracketed(one) and bracketed(other):
                    swept_by_another.append(Judged.of(cell, Swept.of(other), Swept.of(one).best))
        if apart:
            pairs = len(swept_by_another)
            close = sum(each.off <= 2 for each in swept_by_another), sum(e.worse <= 0.01 for e in swept_by_another)
            rows.append(
                [task, len(apart) // 2, _percent(statistics.median(apart)), *(f"{met} of {pairs}" for met in close)]
            )
    header = ["task", "rates under two seeds", "losses apart, median", "another seed's sweep: within 2×"]
    return {"header": [*header, "another seed's sweep: loss within 1 %"], "rows": rows}


def _counted(task: str, found: Mapping[str, Sequence[Judged]]) -> list[str]:
    row = []
    for several in found.values():
        mine = [each for each in several if task in (each.cell[0], "all")]
        for met in (sum(each.off <= 2 for each in mine), sum(each.worse <= 0.01 for each in mine)):
            row.append(f"{met} of {len(mine)}")
    return row


def _percent(share: float) -> str:
    return f"{share:+.1%}" if math.isfinite(share) else "outside"
