"""One cell of the sweep after the other: a start at a rank on a task, tried at rates a factor of two apart.

A cell begins where the same start did best before, and walks down the loss until the best rate has a worse one on both
sides. Every run is one line of a file, so that a sweep that was cut goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import headstart as hs
from benchmarks.rates.tasks import Task

CENTRE, FACTOR = 2e-3, 2.0
INITS = ("kaiming", "pissa", "lora_one", "olora", "eva", "gaussian", "milora", "lora_ga")
MORE_INITS = ("orthogonal", "corda", "init_ab")
OTHER_RANKS = ("kaiming", "pissa", "lora_one")
CALIBRATION_BATCHES = 8
LONGER = "_long"


@dataclass(frozen=True)
class Cell:
    """What is started: s = 1 unless `scaling` says otherwise."""

    task: str
    init: str
    rank: int = 16
    scaling: float = 1.0
    seed: int = 0

    def plain(self) -> Cell:
        """Plain LoRA on the same task."""
        return Cell(self.task, "kaiming", seed=self.seed)

    def config(self, targets: str) -> hs.LoraConfig:
        return hs.LoraConfig(
            r=self.rank, lora_alpha=self.scaling * self.rank, init_lora_weights=self.init, target_modules=targets,
            seed=self.seed, clip_rank=True,
        )  # fmt: skip


def cells(task: str, seed: int = 0) -> Iterator[Cell]:
    """Eight starts at r = 16, three of them at r = 4 and 64, one at other scales; then three more starts.

    Of a task's longer run the eight alone.
    """
    for init in INITS:
        yield Cell(task, init, seed=seed)
    if task.endswith(LONGER):
        return
    for rank in (4, 64):
        for init in OTHER_RANKS:
            yield Cell(task, init, rank, seed=seed)
    yield Cell(task, "kaiming", 16, 4.0, seed)
    yield Cell(task, "kaiming", 16, 0.25, seed)
    for init in MORE_INITS:
        yield Cell(task, init, seed=seed)


class Runs:
    """The file of runs: {**cell, step of the grid, what came out}."""

    def __init__(self, path: Path, like: Path | None = None) -> None:
        self.path = path
        self.lines = _lines(path)
        self.others = _lines(like) if like else []  # Runs of a task that is alike, to begin near.

    def of(self, cell: Cell) -> dict[int, dict[str, Any]]:
        """Grid step → run."""
        return {line["step"]: line for line in self.lines if {k: line[k] for k in asdict(cell)} == asdict(cell)}

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def guess(self, cell: Cell) -> int:
        """The grid step at which to begin: the best of the nearest cell that was run."""

        def distance(line: dict[str, Any]) -> tuple[Any, ...]:
            apart = (line[name] != getattr(cell, name) for name in ("init", "task", "rank", "scaling"))
            return (*apart, line["loss"])

        return min([*self.lines, *self.others], key=distance, default={"step": 0})["step"]  # type: ignore[no-any-return]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rate(step: int) -> float:
    return CENTRE * FACTOR**step


class Bench:
    """A task with its base loaded once: adapt, train, judge, remove."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.calibrations: dict[tuple[int, int], hs.Calibration] = {}

    def start(self, cell: Cell) -> hs.Adapter:
        config = cell.config(self.task.targets)
        data = {"calibration": self.measured(cell)} if config.strategy.needs else {}
        return hs.adapt(self.task.model, config, **data)  # type: ignore[arg-type]

    def measured(self, cell: Cell) -> hs.Calibration:
        """What every start that looks at data needs, from one pass over training batches."""
        key = (cell.rank, cell.seed)
        if key not in self.calibrations:
            batches = self.task.batches(CALIBRATION_BATCHES, 1000 + cell.seed)
            every = (replace(cell, init=init).config(self.task.targets) for init in (*INITS, *MORE_INITS))
            configs = [config for config in every if config.strategy.needs]
            self.calibrations[key] = hs.calibrate(self.task.model, configs, batches, loss=self.task.loss)
        return self.calibrations[key]

    def optimizer(self, adapter: hs.Adapter, peak: float) -> torch.optim.AdamW:
        return torch.optim.AdamW([{"params": adapter.parameters(), "lr": peak, "peak": peak}], weight_decay=0.0)

    def run(self, cell: Cell, peak: float) -> dict[str, Any]:
        """Train at this peak rate: a warm-up over a tenth of the steps, then a cosine to zero."""
        begin = time.perf_counter()
        torch.manual_seed(cell.seed)  # Of the model's own dropout.
        adapter = self.start(cell)
        started = time.perf_counter() - begin
        try:
            optimizer = self.optimizer(adapter, peak)
            model, steps = self.task.model, self.task.steps
            losses: list[float] = []
            for index, batch in enumerate(self.task.batches(steps, cell.seed)):
                share = schedule(index, steps)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * share
                losses.append(descend(model, self.task, optimizer, batch))
                if not math.isfinite(losses[-1]) or losses[-1] > 4 * losses[0] + 1:
                    return {"loss": None, "losses": _short(losses), "start_s": round(started, 2)}
            loss = self.task.judge()
            seconds = time.perf_counter() - begin
            kept = round(loss, 5) if math.isfinite(loss) else None
            return {"loss": kept, "losses": _short(losses), "start_s": round(started, 2), "s": round(seconds, 1)}
        finally:
            hs.remove(model)


def schedule(index: int, steps: int) -> float:
    warm = max(1, round(0.1 * steps))
    if index < warm:
        return (index + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (index - warm) / (steps - warm)))


def descend(model: nn.Module, task: Task, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> float:
    """One step; the batch's loss before it."""
    model.train()
    loss = task.loss(model, batch)
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return float(loss.detach())


def _short(losses: list[float]) -> list[float]:
    return [float(f"{loss:.4g}") for loss in losses]


def walk(bench: Bench, cell: Cell, runs: Runs, reach: int = 8) -> None:
    """Run rates until the best one has a worse neighbour on both sides."""
    done = runs.of(cell)
    step = runs.guess(cell) if not done else _best(done)
    while True:
        for neighbour in (step, step - 1, step + 1):
            if neighbour not in done:
                found = bench.run(cell, rate(neighbour))
                line = {**asdict(cell), "step": neighbour, "rate": rate(neighbour), **found}
                runs.add({**line, "loss": found["loss"] if found["loss"] is not None else math.inf})
                done = runs.of(cell)
                print(cell, f"{rate(neighbour):.1e}", found["loss"], found.get("s"), flush=True)
                if _best(done) != step:
                    break
        best = _best(done)
        if (best == step and {step - 1, step + 1} <= done.keys()) or abs(best) > reach:
            return
        step = best


def _best(done: dict[int, dict[str, Any]]) -> int:
    return min(done, key=lambda step: (done[step]["loss"], step))
