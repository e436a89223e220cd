"""One training step and one evaluation forward: ours, natively and in the PEFT shell, beside PEFT's.

A random Llama, batch 4 × 256, r = 16 on every Linear. Memory is the exact peak of the allocator over one step,
parameters excluded: the running sum of the profiler's allocation events. A CPU without bf16 products emulates them, and
that dominates every step; there ours replaces them by float32 ones, and one row shows the step without that.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import peft
import torch
from torch import Tensor, nn

import headstart as hs
import headstart.peft
from benchmarks.measure import Cost, Row, Scale, Target, allocated, cpu_seconds, row
from benchmarks.subjects import config, llama, peft_config
from headstart.lora.branch import product

Run = Callable[[nn.Module, Tensor], None]


@dataclass(frozen=True)
class Contest:
    """A piece of work for two models, each given as `who` adapts it and `what` is special about it."""

    work: str
    ours: str
    peer: str
    run: Run
    target: Target


def step(model: nn.Module, ids: Tensor) -> None:
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()


def step_emulated(model: nn.Module, ids: Tensor) -> None:
    with mock.patch.object(product, "_emulated", return_value=False):
        step(model, ids)


@torch.no_grad()
def forward(model: nn.Module, ids: Tensor) -> None:
    model.eval()
    model(input_ids=ids)


CONTESTS: dict[torch.dtype, list[Contest]] = {
    torch.bfloat16: [
        Contest("step", "native", "peft", step, Target(0.72, 0.68)),
        Contest("step, bf16 products left to the CPU", "native", "peft", step_emulated, Target(0.72, 0.68)),
        Contest("step, PEFT shell", "shell", "peft", step, Target(0.72, 0.68)),
        Contest("step, dropout 0.05", "native dropout", "peft dropout", step, Target(0.65, 0.6)),
        Contest("step, dropout 0.05, PEFT shell", "shell dropout", "peft dropout", step, Target(0.65, 0.6)),
        Contest("step, anchored beside unanchored", "native anchored", "native", step, Target(1.05)),
        Contest("step, DoRA", "native dora", "peft dora", step, Target(0.45, 0.5)),
        Contest("forward", "native", "peft", forward, Target(1)),
        Contest("forward, DoRA", "native dora", "peft dora", forward, Target(1)),
        Contest("forward, DoRA beside LoRA", "native dora", "native", forward, Target(1.3)),
    ],
    torch.float32: [
        Contest("step", "native", "peft", step, Target(1)),
        Contest("step, PEFT shell", "shell", "peft", step, Target(1)),
        Contest("step, DoRA", "native dora", "peft dora", step, Target(1)),
        Contest("forward", "native", "peft", forward, Target(1)),
    ],
}

FORWARDS = 3  # for each step: they are short, and differ by less.

SPECIAL: dict[str, dict[str, Any]] = {
    "": {},
    "dropout": {"lora_dropout": 0.05},
    "dora": {"use_dora": True},
    "anchored": {"init": "olora"},
}


def rows(scale: Scale) -> Iterator[Row]:
    tokens, repeats = {"full": ((4, 256), 5), "quick": ((2, 128), 3), "toy": ((1, 8), 1)}[scale]
    for dtype, contests in CONTESTS.items():
        names = dict.fromkeys(name for contest in contests for name in (contest.ours, contest.peer))
        models = {name: _build(name, scale, dtype) for name in names}
        vocabulary = models["native"].get_input_embeddings().num_embeddings
        ids = torch.randint(0, vocabulary, tokens, generator=torch.Generator().manual_seed(1))
        costs = _measured(contests, models, ids, repeats)
        for contest in contests:
            ours, peer = costs[contest.run, contest.ours], costs[contest.run, contest.peer]
            peer_name = "headstart" if contest.peer.startswith("native") else ""
            note = f"the other is {peer_name}'s too" if peer_name else ""
            yield row(f"{contest.work}, {str(dtype)[6:]}", ours, peer, contest.target, note)


def _build(name: str, scale: Scale, dtype: torch.dtype) -> Any:
    base = llama(scale, dtype)
    who, _, what = name.partition(" ")
    if who == "native":
        hs.adapt(base, config(**SPECIAL[what]))
        return base
    get_peft_model = headstart.peft.get_peft_model if who == "shell" else peft.get_peft_model
    return get_peft_model(base, peft_config(**SPECIAL[what]))


def _measured(
    contests: Sequence[Contest], models: dict[str, nn.Module], ids: Tensor, repeats: int
) -> dict[tuple[Run, str], Cost]:
    """The cost of each job, once although several contests need it; the jobs take turns."""
    jobs = dict.fromkeys((contest.run, name) for contest in contests for name in (contest.ours, contest.peer))
    peaks = {(run, name): _peak(run, models[name], ids) for run, name in jobs}  # Warms up, too.
    seconds: dict[tuple[Run, str], list[float]] = {job: [] for job in jobs}
    for _ in range(repeats):
        for run, name in jobs:
            for _ in range(FORWARDS if run is forward else 1):
                models[name].zero_grad(set_to_none=True)
                seconds[run, name].append(cpu_seconds(lambda run=run, name=name: run(models[name], ids)))
    return {job: Cost(statistics.median(taken), peaks[job]) for job, taken in seconds.items()}


def _peak(run: Run, model: nn.Module, ids: Tensor) -> float:
    model.zero_grad(set_to_none=True)
    peak = allocated(lambda: run(model, ids))
    model.zero_grad(set_to_none=True)
    return peak
