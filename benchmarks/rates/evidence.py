"""Which starts help on real tasks, each at its own tuned rate: `headstart.compare` on the tasks of the sweep.

    python -m benchmarks.rates.evidence --task trec

Several processes may share a task, and what was cut goes on: the study lies in a database beside the results. Each
task's numbers go to benchmarks/results/evidence, its page to docs/evidence.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

import headstart as hs
from benchmarks.rates.sweep import LONGER
from benchmarks.rates.tasks import HEAD_RATE, TASKS, Task
from headstart.files.atomic import text_writer, write_files

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGES = ROOT / "benchmarks" / "results" / "evidence", ROOT / "docs" / "evidence"
RANK, SEEDS = 16, 3
ARMS = ("kaiming", "gaussian", "pissa", "olora", "milora", "eva", "lora_ga", "lora_one")
TITLES = {
    "trec": "Which start for MiniLM on kinds of questions?",
    "mnist": "Which start for digits that lie on their side?",
    "shakespeare": "Which start for Shakespeare, byte by byte?",
    "mbpp": "Which start for SmolLM2 on small programs?",
    "shakespeare_long": "LoRA-One or plain LoRA for Shakespeare, in runs of 320 steps?",
}
LONG = ("mbpp", "gsm8k")  # A run takes a minute and more: fewer arms.
FEW = ("kaiming", "pissa", "eva", "lora_one")
PAIR = ("kaiming", "lora_one")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates.evidence", description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="all of them where left out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of one file a task, and of the studies")
    parser.add_argument("--pages", type=Path, default=PAGES, help="folder of one page a task")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for name in given.task or list(TASKS):
        given.results.mkdir(parents=True, exist_ok=True)
        found = compared(name, TASKS[name](given.data), f"sqlite:///{given.results / name}.db")
        write_files(given.results, {f"{name}.json": text_writer(found.to_json())})
        write_files(given.pages, {f"{name}.html": text_writer(found.to_html())})
        print(found)


def compared(name: str, task: Task, storage: str) -> hs.Comparison:
    """Every start on a task, as long as the task's runs are."""
    heads = sorted({leaf.split(".")[0] for leaf, p in task.model.named_parameters() if p.requires_grad})
    task.model.requires_grad_(False)

    def config(init: str) -> hs.LoraConfig:
        return hs.LoraConfig(
            r=RANK, lora_alpha=RANK, init_lora_weights=init, target_modules=task.targets, clip_rank=True,
            modules_to_save=heads or None,
        )  # fmt: skip

    chosen = PAIR if name.endswith(LONGER) else FEW if name in LONG else ARMS
    arms = {init: config(init) for init in chosen}
    facts = {
        **({"title": TITLES[name]} if name in TITLES else {}),
        "data": task.name,
        "batch_size": task.batch_size,
        "command": f"python -m benchmarks.rates.evidence --task {name}",
        "metric": "held-out loss",
    }
    return hs.compare(
        task.model, task.loss, lambda seed: task.batches(task.steps, seed), list(task.held_out), arms,
        steps=task.steps, seeds=SEEDS, storage=storage, optimizer=_optimizer, facts=facts, watch=_watch,
        say=lambda line: print(line, flush=True),
    )  # fmt: skip


def _optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """The factors at the rate that is tried, a head at one of its own."""
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    factors = [p for name, p in learning.items() if "lora_" in name]
    groups = [{"params": factors, "lr": rate}]
    if len(factors) < len(learning):
        groups.append({"params": [p for name, p in learning.items() if "lora_" not in name], "lr": HEAD_RATE})
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _watch(line: str, done: int, total: int) -> None:
    print(f"{done} of {total}: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
