"""Starts that look at data, beside PEFT's: SmolLM2-135M in float32, batches of 4 × 256 tokens, r = 8 on every Linear.

What a start costs is held against the bare forward passes over the same batches. PEFT's CorDA takes one row at a time
and gets the same tokens as 1 × 1024; its EVA goes through the data until its directions rest, here after two batches.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import peft
import torch
from torch import Tensor, nn

import headstart as hs
from benchmarks.measure import Arm, Call, Cost, Row, Scale, Target, in_child, row
from benchmarks.subjects import config, models, peft_config

sys.modules.setdefault("attr", dataclasses)  # type: ignore[arg-type]  # PEFT's CorDA imports it undeclared.
RANK = 8
STARTS = ("eva", "corda", "lora_ga", "lora_one")
Batches = list[dict[str, Tensor]]


def rows(scale: Scale) -> Iterator[Row]:
    *_, (name, make) = models(scale)
    count, tokens = {"full": (8, (4, 256)), "quick": (2, (2, 64)), "toy": (2, (1, 16))}[scale]
    base = make(torch.float32)
    size = sum(p.numel() * p.element_size() for p in base.parameters()) / 1e6
    data = _data(base, count, tokens)
    work = f"{name}, {count} batches of {tokens[0]} × {tokens[1]}"
    bare = in_child(lambda: lambda: _forwards(base, data))
    frozen = in_child(lambda: lambda: _backwards(base, data))

    ours = {init: in_child(_ours(base, data, init)) for init in STARTS}
    eva = in_child(
        _peft_eva(base, [{name: rows[: max(1, tokens[0] // 2)] for name, rows in batch.items()} for batch in data[:2]])
    )
    share = eva if eva.cpu is None else dataclasses.replace(eva, cpu=eva.cpu * count)  # Half of each of two batches.
    yield _beside(f"EVA, {work}", ours["eva"], share, bare, 1.5, note="PEFT's, by the token that it read")
    yield _beside(f"CorDA, {work}", ours["corda"], in_child(_peft_corda(base, data)), bare, 2.0, 0.5 * size)
    theirs = in_child(_peft_lora_ga(base, data))
    for init in ("lora_ga", "lora_one"):
        yield _beside(f"{init} beside LoRA-GA, {work}", ours[init], theirs, None, 0.85, 0.2 * size, frozen)
    together = in_child(_together(base, data))
    dearest = max(ours.values(), key=lambda cost: cost.cpu or 0.0)
    note = "both headstart's"
    yield row(f"EVA, CorDA, LoRA-GA and LoRA-One from one pass, beside the dearest, {work}", together, dearest,
              Target(time=1.5), note)  # fmt: skip


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
    if bare is not None and bare.cpu and ours.cpu and peer.cpu:
        also[f"{ours.cpu / bare.cpu:.2f}× the forwards ≤ {limit}"] = ours.cpu <= limit * bare.cpu
        note = f"{note + '; ' if note else ''}PEFT {peer.cpu / bare.cpu:.1f}× the forwards"
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
def _forwards(model: nn.Module, data: Batches) -> None:
    for batch in data:
        model(input_ids=batch["input_ids"], use_cache=False)


def _backwards(model: nn.Module, data: Batches) -> None:
    """Forward and backward through frozen weights: what a gradient pass takes at the least."""
    model.requires_grad_(False)
    for batch in data:
        embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()  # type: ignore[operator]
        model(inputs_embeds=embedded, labels=batch["labels"], use_cache=False).loss.backward()


def _ours(base: nn.Module, data: Batches, init: str) -> Arm:
    def arm() -> Call:
        return lambda: hs.adapt(base, config(init=init, r=RANK), data=data)

    return arm


def _together(base: nn.Module, data: Batches) -> Arm:
    def work() -> None:
        configs = [config(init=init, r=RANK) for init in STARTS]
        found = hs.calibrate(base, configs, data)
        for chosen in configs:
            hs.adapt(base, chosen, calibration=found)
            hs.remove(base)

    return lambda: work


def _peft_eva(base: nn.Module, data: Batches) -> Arm:
    def work() -> None:
        given = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in data]
        eva = peft.EvaConfig(rho=1.0, tau=1e-9)  # The directions may rest after two batches.
        model = peft.get_peft_model(base, peft_config("eva", RANK, eva_config=eva), low_cpu_mem_usage=True)
        peft.initialize_lora_eva_weights(model, given, show_progress_bar=False)

    return lambda: work


def _peft_corda(base: nn.Module, data: Batches) -> Arm:
    def work() -> None:
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        @torch.no_grad()
        def run() -> None:
            for batch in data:
                base(input_ids=batch["input_ids"].view(1, -1), use_cache=False)

        chosen = peft_config("corda", RANK, corda_config=CordaConfig(corda_method="ipm"))
        preprocess_corda(base, chosen, run_model=run)
        peft.get_peft_model(base, chosen)

    return lambda: work


def _peft_lora_ga(base: nn.Module, data: Batches) -> Arm:
    def work() -> None:
        from peft.tuners.lora.config import LoraGAConfig
        from peft.tuners.lora.loraga import preprocess_loraga

        def step() -> None:
            for batch in data:
                base(**batch, use_cache=False).loss.backward()

        chosen = peft_config("lora_ga", RANK, lora_ga_config=LoraGAConfig())
        preprocess_loraga(base, chosen, step)
        peft.get_peft_model(base, chosen)

    return lambda: work
