"""Run the sweep's missing pieces; `--task` and `--seed` choose among them, and several processes may share them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.rates.predict import Predictions, predict, probe
from benchmarks.rates.sweep import Bench, Runs, cells, walk
from benchmarks.rates.tasks import TASKS
from benchmarks.rates.verdict import family, guessed, key, swept, tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "rates"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates", description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="all of them where left out")
    parser.add_argument("--seed", type=int, action="append", help="0 where left out")
    parser.add_argument("--predict", action="store_true", help="predict what was swept, instead")
    parser.add_argument("--probe", action="store_true", help="run the trials of what was predicted, instead")
    parser.add_argument("--tables", action="store_true", help="judge the predictions, write the page's tables; no run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of one file a task")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    chosen = given.task or list(TASKS)
    if given.tables:
        return write_tables(given.results, chosen)
    for name in chosen:
        bench = Bench(TASKS[name](given.data))
        if given.predict:
            foresee(name, bench, given.results)
        elif given.probe:
            attempt(name, bench, given.results)
        else:
            runs = Runs(given.results / f"{name}.jsonl", like=given.results / f"{family({'task': name})}.jsonl")
            for seed in given.seed or [0]:
                for cell in cells(name, seed):
                    walk(bench, cell, runs)


def foresee(name: str, bench: Bench, folder: Path) -> None:
    """Predict every cell that was swept, from the best rate of plain LoRA."""
    found = swept(Runs(folder / f"{name}.jsonl").lines)
    predictions = Predictions(folder / f"{name}.predicted.jsonl")
    base = found[(name, "kaiming", 16, 1.0)].best
    for cell in cells(name):
        if key(asdict(cell)) in found and not predictions.has(cell):
            predictions.add(cell, predict(bench, cell, base))
            print(predictions.lines[-1], flush=True)


def attempt(name: str, bench: Bench, folder: Path) -> None:
    """Run the trials of every cell that was predicted, about what the other tasks' constants predict."""
    every = [line for task in TASKS for line in Predictions(folder / f"{task}.predicted.jsonl").lines]
    found = swept([line for task in TASKS for line in Runs(folder / f"{task}.jsonl").lines])
    trials = Predictions(folder / f"{name}.trials.jsonl")
    mine = {key(line): line for line in every if line["task"] == name}
    others = [line for line in every if family(line) != family({"task": name})]
    for cell in cells(name):
        line = mine.get(key(asdict(cell)))
        if line is not None and not trials.has(cell):
            trials.add(cell, probe(bench, cell, guessed(line, others, found)))
            print(trials.lines[-1], flush=True)


def write_tables(folder: Path, tasks: Sequence[str]) -> None:
    """Judge what is there."""
    lines = [line for name in tasks for line in Runs(folder / f"{name}.jsonl").lines]
    predictions, trials = (
        [line for name in tasks for line in Predictions(folder / f"{name}.{kind}.jsonl").lines]
        for kind in ("predicted", "trials")
    )
    found = tables(lines, predictions, trials)
    (folder.parent / "rates.json").write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in ("verdict", "noise"):
        for row in [found[name]["header"], *found[name]["rows"]]:
            print(*row, sep="\t")
    print(found["constants"])


if __name__ == "__main__":
    main()
