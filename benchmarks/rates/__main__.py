"""Run the sweep's missing pieces; `--task` and `--seed` choose among them, and several processes may share them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.rates.predict import Predictions, predict
from benchmarks.rates.sweep import Bench, Runs, cells, walk
from benchmarks.rates.tasks import TASKS
from benchmarks.rates.verdict import swept, tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "rates"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates", description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="all of them where left out")
    parser.add_argument("--seed", type=int, action="append", help="0 where left out")
    parser.add_argument("--predict", action="store_true", help="predict what was swept, instead")
    parser.add_argument("--tables", action="store_true", help="judge the predictions, write the page's tables; no run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of one file a task")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    chosen = given.task or list(TASKS)
    if given.tables:
        return write_tables(given.results, chosen)
    for name in chosen:
        bench = Bench(TASKS[name](given.data))
        runs = Runs(given.results / f"{name}.jsonl")
        for seed in given.seed or [0]:
            if given.predict:
                foresee(bench, runs, Predictions(given.results / f"{name}.predicted.jsonl"), seed)
                continue
            for cell in cells(name, seed):
                walk(bench, cell, runs)


def foresee(bench: Bench, runs: Runs, predictions: Predictions, seed: int) -> None:
    """Predict every cell that was swept, from the best rate of plain LoRA."""
    name = bench.task.name
    found = swept(runs.lines)
    base = found[(name, "kaiming", 16, 1.0, seed)].best
    for cell in cells(name, seed):
        if (cell.task, cell.init, cell.rank, cell.scaling, cell.seed) in found and not predictions.has(cell):
            predictions.add(cell, predict(bench, cell, base))
            print(predictions.lines[-1], flush=True)


def write_tables(folder: Path, tasks: Sequence[str]) -> None:
    """Judge what is there."""
    lines = [line for name in tasks for line in Runs(folder / f"{name}.jsonl").lines]
    predictions = [line for name in tasks for line in Predictions(folder / f"{name}.predicted.jsonl").lines]
    found = tables(lines, predictions)
    (folder.parent / "rates.json").write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")
    for row in found["verdict"]["rows"]:
        print(*row, sep="\t")
    print(found["constants"])


if __name__ == "__main__":
    main()
