"""Run topics and write one JSON file for each: the facts of the machine, then the rows."""

from __future__ import annotations

import os

# Before torch is imported: CPU seconds of one thread compare, those of many wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import datetime
import importlib
import json
import platform
import warnings
from pathlib import Path
from typing import Any

TOPICS = (
    "decompositions",
    "models",
    "training_step",
    "lifecycle",
    "recompress",
    "calibration",
    "bank",
    "estimate",
    "merging",
)

RESULTS = Path(__file__).parent / "results"


def facts() -> dict[str, Any]:
    """What the numbers depend on."""
    from importlib.metadata import version

    import torch

    import headstart

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "headstart": headstart.__version__,
        **{name: version(name) for name in ("torch", "peft", "transformers")},
        "python": platform.python_version(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def show(row: dict[str, Any]) -> None:
    """One row on the terminal."""
    numbers = [f"{name} {row[name]:.3g}" for name in ("ours_cpu_s", "peer_cpu_s", "ratio") if row[name] is not None]
    numbers += [f"{name} {row[name]:.3g}" for name in ("ours_mb", "peer_mb", "memory_ratio") if row[name] is not None]
    met = {True: "met", False: "NOT MET", None: ""}[row["met"]]
    print(f"  {row['work']}: {', '.join(numbers)}  [{row['target']}] {met} {row['note']}".rstrip(), flush=True)


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """The facts and the rows, as JSON."""
    text = json.dumps({**facts(), "rows": rows}, indent=1, ensure_ascii=False) + "\n"
    (folder / f"{name}.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure headstart beside PEFT.")
    parser.add_argument("topics", nargs="*", metavar="topic", help=f"some of: {', '.join(TOPICS)} (all of them)")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer repetitions")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    given = parser.parse_args()
    unknown = set(given.topics) - set(TOPICS)
    if unknown:
        parser.error(f"no topic {', '.join(sorted(unknown))}: choose from {', '.join(TOPICS)}")

    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    warnings.simplefilter("ignore")
    given.out.mkdir(parents=True, exist_ok=True)
    for topic in given.topics or TOPICS:
        print(topic, flush=True)
        rows = []
        for row in importlib.import_module(f"benchmarks.{topic}").rows("quick" if given.quick else "full"):
            show(row)
            rows.append(row)
        write(given.out, topic, rows)


if __name__ == "__main__":
    main()
