"""Run every experiment; write the numbers and the pictures."""

from __future__ import annotations

import os

# Before torch is imported: the matrices are small.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import dataclasses
import datetime
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.theory.experiments import EXPERIMENTS, Result
from benchmarks.theory.pictures import draw

ROOT = Path(__file__).resolve().parents[2]


def rounded(value: Any) -> Any:
    """Four digits of every float, wherever it stands."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def show(name: str, result: Result, seconds: float) -> None:
    print(f"{name}: {seconds:.1f} CPU seconds")
    for row in [result.header, *result.rows]:
        print("  " + "  ".join(f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.theory", description="Run LoRA-One's theorems.")
    parser.add_argument("--numbers", type=Path, default=ROOT / "benchmarks" / "results" / "theory.json")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "theory", help="folder for them")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    given.pictures.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    begin = time.process_time()
    for name, experiment in EXPERIMENTS.items():
        start = time.process_time()
        result = experiment()
        show(name, result, time.process_time() - start)
        draw(name, result, given.pictures / f"{name}.svg")
        found[name] = rounded(dataclasses.asdict(result))
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_seconds": round(time.process_time() - begin),
    }
    text = json.dumps({**facts, "experiments": found}, ensure_ascii=False) + "\n"
    given.numbers.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
