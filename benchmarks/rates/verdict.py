"""How well the predictions do: against the best rate of every cell, with constants fitted on the other tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rates.predict import TRAVELS
from benchmarks.rates.sweep import CENTRE, FACTOR

Key = tuple[str, str, int, float, int]  # task, init, rank, scaling, seed


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


def swept(lines: Sequence[Mapping[str, Any]]) -> dict[Key, Swept]:
    """The cells that were finished: the best rate has a worse one on both sides."""
    grids: dict[Key, dict[int, float]] = {}
    for line in lines:
        grids.setdefault(key(line), {})[line["step"]] = line["loss"]
    found = {}
    for cell, losses in grids.items():
        step = min(losses, key=lambda step: (losses[step], step))
        if {step - 1, step + 1} <= losses.keys():
            found[cell] = Swept.of(losses)
    return found


def key(line: Mapping[str, Any]) -> Key:
    return (line["task"], line["init"], line["rank"], line["scaling"], line["seed"])


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


def fit_travel(lines: Sequence[Mapping[str, Any]], cells: Mapping[Key, Swept]) -> float:
    """The travel whose multipliers are off the least, in the mean square of the logarithm."""

    def error(travel: float) -> float:
        rates = [(line["base"] * line["multipliers"][f"{travel:g}"], cells[key(line)].best) for line in lines]
        return statistics.fmean(math.log(rate / best) ** 2 for rate, best in rates)

    return min(TRAVELS, key=error)


def fit_share(lines: Sequence[Mapping[str, Any]]) -> float:
    """The share of the best first step that plain LoRA's best rates are, in the median."""
    shares = [line["base"] / line["first_step"] for line in lines if "first_step" in line]
    return statistics.median(shares) if shares else math.nan


def judged(lines: Sequence[Mapping[str, Any]], cells: Mapping[Key, Swept]) -> dict[str, list[Judged]]:
    """Every cell's predictions, with constants fitted on the other tasks: from plain LoRA's best rate, which gets that
    one cell for nothing and leaves it out, and from plain LoRA's searched rate."""
    found: dict[str, list[Judged]] = {"base known": [], "base searched": []}
    for line in lines:
        cell = key(line)
        others = [other for other in lines if family(other) != family(line)] or lines
        factor = line["multipliers"][f"{fit_travel(others, cells):g}"]
        first = next((o["first_step"] for o in lines if "first_step" in o and key(o)[::4] == cell[::4]), math.nan)
        if "first_step" not in line:
            found["base known"].append(Judged.of(cell, cells[cell], line["base"] * factor))
        found["base searched"].append(Judged.of(cell, cells[cell], fit_share(others) * first * factor))
    return found


def family(line: Mapping[str, Any]) -> str:
    """A task at all its lengths."""
    return line["task"].partition("_")[0]  # type: ignore[no-any-return]


def tables(lines: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page shows: every cell, and how many of them are met by which prediction, task by task."""
    cells = swept(lines)
    known = [line for line in predictions if key(line) in cells]
    found = judged(known, cells)
    by_cell = {(name, each.cell): each for name, several in found.items() for each in several}
    rows = []
    for cell in map(key, known):
        row: list[Any] = [*cell[:4], cells[cell].best, cells[cell].loss]
        for name in found:
            each = by_cell.get((name, cell))
            row += [each.rate, each.off, _percent(each.worse)] if each else ["", "", ""]
        rows.append(row)
    tasks = list(dict.fromkeys(cell[0] for cell in map(key, known)))
    columns = [f"{name}: {what}" for name in found for what in ("within 2×", "loss within 1 %")]
    return {
        "constants": {"travel": fit_travel(known, cells), "share": fit_share(known)},
        "cells": {
            "header": ["task", "init", "r", "s", "best rate", "loss", *["predicted", "off by", "loss"] * len(found)],
            "rows": rows,
        },
        "verdict": {
            "header": ["task", *columns],
            "rows": [[task, *_counted(task, found)] for task in [*tasks, "all"]],
        },
    }


def _counted(task: str, found: Mapping[str, Sequence[Judged]]) -> list[str]:
    row = []
    for several in found.values():
        mine = [each for each in several if task in (each.cell[0], "all")]
        for met in (sum(each.off <= 2 for each in mine), sum(each.worse <= 0.01 for each in mine)):
            row.append(f"{met} of {len(mine)}")
    return row


def _percent(share: float) -> str:
    return f"{share:+.1%}" if math.isfinite(share) else "outside"
