"""Starts that look at data, beside PEFT's: float32, 32 batches of 4 × 256 tokens, r = 8 on every Linear.

What a start costs is held against the bare forward passes over the same batches, and its memory against those, or,
where gradients are asked for, against the training step of a plain LoRA on the same layers; it is what torch holds of
what it allocates, to the byte, over two batches. Five batches are run; the others are counted at what the median of
those took after the first. PEFT's CorDA takes one row at a time and gets the same tokens as 1 × 1024; its EVA goes
through the data until its directions rest, here after two rows.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import peft
import torch
from torch import Tensor, nn

import headstart as hs
from benchmarks.measure import Arm, Call, Cost, Row, Scale, Target, in_child, once, row
from benchmarks.subjects import config, models, peft_config

sys.modules.setdefault("attr", dataclasses)  # type: ignore[arg-type]  # PEFT's CorDA imports it undeclared.
RANK = 8
STARTS = ("eva", "corda", "lora_ga", "lora_one")
Batch = dict[str, Tensor]
Batches = list[Batch]
Work = Callable[[nn.Module, Iterable[Batch]], object]


def rows(scale: Scale) -> Iterator[Row]:
    for name, make in models(scale):
        base = make(torch.float32)
        count, run, tokens = {"full": (32, 5, (4, 256)), "quick": (8, 3, (2, 64)), "toy": (4, 2, (1, 16))}[scale]
        yield from _starts(base, name, _Pass(base, _data(base, run, tokens), count))


def _starts(base: nn.Module, name: str, given: _Pass) -> Iterator[Row]:
    size = sum(p.numel() * p.element_size() for p in base.parameters()) / 1e6
    work = f"{name}, {given.count} batches of {given.shape[0]} × {given.shape[1]}"
    bare = given.cost(_forwards)
    step = in_child(_step(base, given.batches[0]), exact=True)
    ours = {init: given.cost(_ours(init)) for init in STARTS}

    eva = _peft_eva(given) if name.startswith("SmolLM2") else Cost()
    note = "PEFT's, by the token that it read" if eva.cpu else ""
    yield _beside(f"EVA, {work}", ours["eva"], eva, bare, 1.5, note=note)
    yield _beside(f"CorDA, {work}", ours["corda"], given.cost(_peft_corda), bare, 2.0, 0.5 * size)
    theirs = given.cost(_peft_lora_ga)
    for init in ("lora_ga", "lora_one"):
        yield _beside(f"{init} beside LoRA-GA, {work}", ours[init], theirs, None, 0.85, 0.2 * size, step)
    together = given.cost(_together)
    dearest = max(ours.values(), key=lambda cost: cost.cpu or 0.0)
    yield row(
        f"EVA, CorDA, LoRA-GA and LoRA-One from one pass, beside the dearest, {work}",
        together,
        dearest,
        Target(time=1.5),
        "both headstart's",
    )


@dataclass(frozen=True)
class _Pass:
    """Batches of which some are run, and the others counted at what the median of those took.

    Attributes:
        base: each piece of work gets a copy. batches: that are run, more than one. count: that the cost is told for.
    """

    base: nn.Module
    batches: Batches
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.batches[0]["input_ids"].shape
        return rows, columns

    def cost(self, work: Work) -> Cost:
        """Of work on all of them. The first is not counted on: it meets cold caches and empty statistics."""
        # Shared, because a child writes it.
        seconds = torch.zeros(len(self.batches) + 1, dtype=torch.float64).share_memory_()
        spent = in_child(self.arm(work, _Watched(self.batches, seconds))).cpu or 0.0
        each = float(seconds.diff()[1:].median())
        memory = in_child(self.arm(work, self.batches[:2]), exact=True)
        return dataclasses.replace(memory, cpu=spent + (self.count - len(self.batches)) * each)

    def arm(self, work: Work, data: Iterable[Batch]) -> Arm:
        """Work on some of them."""

        def arm() -> Call:
            model = copy.deepcopy(self.base)
            return lambda: work(model, data)

        return arm


@dataclass(frozen=True)
class _Watched:
    """Batches that note when each is asked for."""

    batches: Batches
    seconds: Tensor

    def __iter__(self) -> Iterator[Batch]:
        for i, batch in enumerate(self.batches):
            self.seconds[i] = time.process_time()
            yield batch
        self.seconds[len(self.batches)] = time.process_time()


def _beside(
    work: str,
    ours: Cost,
    peer: Cost,
    bare: Cost | None,
    limit: float,
    memory: float | None = None,
    passes: Cost | None = None,
    note: str = "",
) -> Row:
    """Against the peer, or against the bare forwards where the target is about them.

    The memory is what comes on top of the adapter that stays, and of what the passes themselves take.
    """
    also: dict[str, bool] = {}
    if bare is not None and bare.cpu and ours.cpu:
        also[f"{ours.cpu / bare.cpu:.2f}× the forwards ≤ {limit}"] = ours.cpu <= limit * bare.cpu
        theirs = f"PEFT {peer.cpu / bare.cpu:.1f}× the forwards" if peer.cpu else ""
        note = "; ".join(filter(None, [note, theirs]))
    passes = passes or bare
    if memory is not None and None not in (ours.peak, ours.kept) and passes is not None and passes.peak is not None:
        more = max(0.0, (ours.peak or 0.0) - (ours.kept or 0.0) - passes.peak)
        also[f"{more:.0f} MB more ≤ {memory:.0f}"] = more <= memory
    return row(work, ours, peer, Target(time=limit if bare is None else None, also=also), note)


def _data(model: nn.Module, count: int, tokens: tuple[int, int]) -> Batches:
    """Ids that a language model would write: its own samples would take too long, so words of its vocabulary's head."""
    generator = torch.Generator().manual_seed(0)
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator, union-attr, assignment]
    # Zipf's law: the k-th word is drawn with probability 1/k.
    chances = 1.0 / torch.arange(1, vocabulary + 1)
    drawn = [torch.multinomial(chances, tokens[0] * tokens[1], True, generator=generator) for _ in range(count)]
    return [{"input_ids": ids.view(tokens), "labels": ids.view(tokens)} for ids in drawn]


@torch.no_grad()
def _forwards(model: nn.Module, data: Iterable[Batch]) -> None:
    for batch in data:
        model(input_ids=batch["input_ids"], use_cache=False)


def _step(base: nn.Module, batch: Batch) -> Arm:
    """The training step of a plain LoRA: what whoever trains the adapter has the memory for."""

    def arm() -> Call:
        hs.adapt(base, config(r=RANK))
        return lambda: base.train()(**batch, use_cache=False).loss.backward()

    return arm


def _ours(init: str) -> Work:
    return lambda base, data: hs.adapt(base, config(init=init, r=RANK), data=data)


def _together(base: nn.Module, data: Iterable[Batch]) -> None:
    configs = [config(init=init, r=RANK) for init in STARTS]
    found = hs.calibrate(base, configs, data)
    for chosen in configs:
        hs.adapt(base, chosen, calibration=found)
        hs.remove(base)


def _peft_eva(given: _Pass) -> Cost:
    """Two batches of one row each: it goes through the data until its directions rest, at half a minute a batch."""
    parts = [{name: rows[:1] for name, rows in batch.items()} for batch in given.batches[:2]]

    def work(base: nn.Module, batches: Iterable[Batch]) -> None:
        data = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]
        eva = peft.EvaConfig(rho=1.0, tau=1e-9)  # The directions may rest after two batches.
        model = peft.get_peft_model(base, peft_config("eva", RANK, eva_config=eva), low_cpu_mem_usage=True)
        peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)

    cost = once(given.arm(work, parts))
    return dataclasses.replace(cost, cpu=(cost.cpu or 0.0) * given.count * given.shape[0] / len(parts))


def _peft_corda(base: nn.Module, data: Iterable[Batch]) -> None:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    @torch.no_grad()
    def run() -> None:
        for batch in data:
            base(input_ids=batch["input_ids"].view(1, -1), use_cache=False)

    chosen = peft_config("corda", RANK, corda_config=CordaConfig(corda_method="ipm"))
    preprocess_corda(base, chosen, run_model=run)
    peft.get_peft_model(base, chosen)


def _peft_lora_ga(base: nn.Module, data: Iterable[Batch]) -> None:
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    def step() -> None:
        for batch in data:
            base(**batch, use_cache=False).loss.backward()

    chosen = peft_config("lora_ga", RANK, lora_ga_config=LoraGAConfig())
    preprocess_loraga(base, chosen, step)
    peft.get_peft_model(base, chosen)
