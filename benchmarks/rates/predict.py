"""What is known of each cell before the run: at step zero from the factors, and after twenty steps from the trials."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import headstart as hs
from benchmarks.rates.sweep import Bench, Cell
from headstart.lora.rate_search import BATCHES, tried
from headstart.lora.rates import multiplier, width

TRAVELS = (4.0, 8.0, 12.0, 16.0, 32.0)
TRIAL_STEPS = 20


class Predictions:
    """A file of what was found about each cell, {**cell, …}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def has(self, cell: Cell) -> bool:
        return any({k: line[k] for k in asdict(cell)} == asdict(cell) for line in self.lines)

    def add(self, cell: Cell, found: dict[str, Any]) -> None:
        line = {**asdict(cell), **found}
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def predict(bench: Bench, cell: Cell, base: float) -> dict[str, Any]:
    """Everything that is known at step zero: the multipliers by travel, the layers' width, the run's length.

    Args:
        base: the best rate of plain LoRA on this task, as the sweep found it.
    """
    adapter = bench.start(cell)
    try:
        reaches = [reach for layer in adapter.report.layers for reach in layer.reaches]
        return {
            "base": base,
            "steps": bench.task.steps,
            "width": round(width(reaches), 1),
            "multipliers": {f"{travel:g}": round(multiplier(reaches, base, travel), 4) for travel in TRAVELS},
        }
    finally:
        hs.remove(bench.task.model)


def probe(bench: Bench, cell: Cell, near: float) -> dict[str, Any]:
    """The losses that the trials of `search_rate` end at, by rate.

    Args:
        near: where the trials begin: predicted with constants that were fitted on the other tasks.
    """
    bench.start(cell)
    try:
        batches = bench.task.batches(BATCHES, 2000 + cell.seed)
        begin = time.perf_counter()
        losses = tried(bench.task.model, batches, near, bench.task.loss, TRIAL_STEPS)
        seconds = time.perf_counter() - begin
    finally:
        hs.remove(bench.task.model)
    trials = [[float(f"{rate:.4g}"), float(f"{loss:.5g}")] for rate, loss in sorted(losses.items())]
    return {"near": float(f"{near:.4g}"), "trials": trials, "s": round(seconds, 1)}
