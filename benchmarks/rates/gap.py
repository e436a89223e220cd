"""Half of the gap: `auto` beside plain LoRA r = 8 and full fine-tuning, each of the two at its own best rate.

    gap closed = (plain − auto)/(plain − full), of the losses on held-out batches

All take equal steps on the same batches; a head that the task trains anyway trains in all three and is counted in none.
`auto` gets no sweep: it runs once, at the rate that it finds itself. Every run is one line of a file.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import headstart as hs
from benchmarks.rates.sweep import FACTOR, descend, schedule
from benchmarks.rates.tasks import HEAD_RATE, TASKS, Task

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "rates"
RANK = 8
# Where the walks over the rates begin.
PLAIN = {"trec": 4e-3, "mnist": 16e-3, "shakespeare": 16e-3, "mbpp": 4e-3, "gsm8k": 4e-3}
FULL = {"trec": 1e-4, "mnist": 2e-3, "shakespeare": 1.2e-3, "mbpp": 5e-5, "gsm8k": 5e-5}
CALIBRATION = 8
Line = dict[str, Any]


class Gap:
    """A task with its base loaded once, and the lines of its runs."""

    def __init__(self, task: Task, path: Path) -> None:
        self.task, self.path = task, path
        self.head = [name for name, p in task.model.named_parameters() if p.requires_grad]
        self.fresh = {name: p.detach().clone() for name, p in task.model.named_parameters() if name in self.head}
        self.total = sum(p.numel() for p in task.model.parameters())
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def of(self, arm: str, seed: int) -> dict[float, Line]:
        """Rate → line."""
        return {x["rate"]: x for x in self.lines if (x["task"], x["arm"], x["seed"]) == (self.task.name, arm, seed)}

    def add(self, arm: str, seed: int, rate: float, loss: float, trained: int, **more: Any) -> None:
        line = {"task": self.task.name, "arm": arm, "seed": seed, "rate": float(f"{rate:.4g}"), "loss": round(loss, 4)}
        line |= {"trainable": trained, "share": round(trained / self.total, 4), **more}
        self.lines.append(line)
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def plain(self, rate: float, seed: int) -> None:
        config = hs.LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=self.task.targets, clip_rank=True, seed=seed
        )  # fmt: skip
        adapter = hs.adapt(self.task.model, config)
        trained = adapter.count()[0]
        try:
            self.add("plain", seed, rate, self.fit(self.task.model, adapter.parameters(), rate, seed), trained)
        finally:
            self.restore()

    def full(self, rate: float, seed: int) -> None:
        model = copy.deepcopy(self.task.model).requires_grad_(True)
        rest = [p for name, p in model.named_parameters() if name not in self.head]
        self.add("full", seed, rate, self.fit(model, rest, rate, seed), sum(p.numel() for p in rest))

    def auto(self, seed: int) -> None:
        excluded = sorted({name.rpartition(".")[0] for name in self.head}) or None
        facts: dict[str, Any] = {} if excluded is None else {"exclude_modules": excluded}
        batches = self.task.batches(2 * CALIBRATION, 1000 + seed)
        found = hs.auto(
            self.task.model, batches, loss=self.task.loss, steps=self.task.steps, changes={"seed": seed}, **facts
        )
        print(found, flush=True)
        trained, config = found.adapter.count()[0], found.config
        chosen = f"{config.strategy.name}, r = {config.r}"
        began = time.perf_counter()
        try:
            loss = self.fit(self.task.model, found.adapter.parameters(), float(found.rate), seed)
        finally:
            self.restore()
        seconds = {name: round(value, 1) for name, value in found.seconds.items()}
        run = round(time.perf_counter() - began, 1)
        self.add("auto", seed, found.rate, loss, trained, chosen=chosen, cost=seconds, cost_steps=found.steps, run=run)

    def restore(self) -> None:
        hs.remove(self.task.model)
        named = dict(self.task.model.named_parameters())
        with torch.no_grad():
            for name, value in self.fresh.items():
                named[name].copy_(value)

    def fit(self, model: nn.Module, parameters: list[nn.Parameter], peak: float, seed: int) -> float:
        """Train, and the held-out loss: AdamW, a warm-up over a tenth of the steps, then a cosine to zero."""
        task = self.task
        head = [p.requires_grad_(True) for name, p in model.named_parameters() if name in self.head]
        groups = [{"params": parameters, "peak": peak}, {"params": head, "peak": HEAD_RATE}]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        torch.manual_seed(seed)  # Of the model's own dropout.
        for index, batch in enumerate(task.batches(task.steps, seed)):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(index, task.steps)
            if not math.isfinite(descend(model, task, optimizer, batch)):
                return math.inf
        model.eval()
        with torch.no_grad():
            return sum(float(task.loss(model, batch)) for batch in task.held_out) / len(task.held_out)

    def walk(self, arm: str, run: Callable[[float, int], None], start: float, seed: int) -> None:
        """Rates a factor of two apart, until the best has a worse one on both sides; other seeds take the best."""
        if seed:
            known = {rate: line["loss"] for rate, line in self.of(arm, 0).items()}
            if known and not self.of(arm, seed):
                run(min(known, key=lambda rate: known[rate]), seed)
            return
        place = 0
        while True:
            done = {round(math.log(rate / start, FACTOR)): x["loss"] for rate, x in self.of(arm, seed).items()}
            wanted = [near for near in (place, place - 1, place + 1) if near not in done]
            if wanted:
                run(float(f"{start * FACTOR ** wanted[0]:.4g}"), seed)
                continue
            best = min(done, key=lambda near: (done[near], near))
            if best == place:
                return
            place = best


def table(lines: list[Line]) -> dict[str, Any]:
    """One row a task: the best of both sides, what `auto` did, and what it cost."""
    rows = []
    for task in dict.fromkeys(line["task"] for line in lines):
        mine = [line for line in lines if line["task"] == task]
        for seed in sorted({line["seed"] for line in mine}):
            arms = {
                arm: [x for x in mine if x["arm"] == arm and x["seed"] == seed] for arm in ("plain", "full", "auto")
            }
            if not all(arms.values()):
                continue
            plain, full = (min(arms[arm], key=lambda line: line["loss"]) for arm in ("plain", "full"))
            auto = arms["auto"][-1]
            gap = plain["loss"] - full["loss"]
            closed = f"{(plain['loss'] - auto['loss']) / gap:.0%}" if gap > 0 else "no gap"
            cost = f"{sum(auto['cost'].values()):.0f} s, {auto['cost_steps']:.0f} steps; its run {auto['run']:.0f} s"
            rows.append([
                task, seed, f"{plain['loss']:.3f} ({plain['rate']:.1e})", f"{full['loss']:.3f} ({full['rate']:.1e})",
                f"{auto['loss']:.3f} ({auto['rate']:.1e})", closed, auto["chosen"], f"{auto['share']:.2%}", cost,
            ])  # fmt: skip
    header = ["task", "seed", "plain r = 8", "full", "auto", "gap closed", "it chose", "trains", "it cost"]
    return {"header": header, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates.gap", description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--task", action="append", choices=list(PLAIN), help="trec, mnist and shakespeare if left out")
    parser.add_argument("--seed", type=int, action="append", help="0 where left out")
    parser.add_argument("--auto", action="store_true", help="auto's runs alone")
    parser.add_argument("--tables", action="store_true", help="write the page's table; no run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of gap.jsonl")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    path = given.results / "gap.jsonl"
    if not given.tables:
        for name in given.task or ["trec", "mnist", "shakespeare"]:
            gap = Gap(TASKS[name](given.data), path)
            for seed in given.seed or [0]:
                if not gap.of("auto", seed):
                    gap.auto(seed)
                if not given.auto:
                    gap.walk("plain", gap.plain, PLAIN[name], seed)
                    gap.walk("full", gap.full, FULL[name], seed)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (given.results / "gap.json").write_text(json.dumps(table(lines), ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
