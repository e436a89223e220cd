"""What is predicted for each cell before any training: from the factors' reach, and for plain LoRA from a search."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import headstart as hs
from benchmarks.rates.sweep import Bench, Cell
from headstart.lora.rate_search import SHARE
from headstart.lora.rates import multiplier

TRAVELS = (4.0, 8.0, 12.0, 16.0, 32.0)
BATCHES = 6


class Predictions:
    """The file of predictions: {**cell, base, multipliers by travel, the best first step}."""

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
    """Everything that is known at step zero.

    Args:
        base: the best rate of plain LoRA on this task, as the sweep found it.
    """
    adapter = bench.start(cell)
    try:
        reaches = [reach for layer in adapter.report.layers for reach in layer.reaches]
        found: dict[str, Any] = {
            "base": base,
            "multipliers": {f"{travel:g}": round(multiplier(reaches, base, travel), 4) for travel in TRAVELS},
        }
        if cell == cell.plain():
            batches = bench.task.batches(BATCHES, 2000 + cell.seed)
            begin = time.perf_counter()
            searched = hs.search_rate(bench.task.model, batches, loss=bench.task.loss)
            seconds = time.perf_counter() - begin
            found |= {"first_step": float(f"{searched / SHARE:.4g}"), "search_s": round(seconds, 1)}
        return found
    finally:
        hs.remove(bench.task.model)
