"""One run of one arm: put its start into the base, train, judge, take it out. The base comes back to the bit.

Every run of a seed sees the same batches in the same order and the same dropout masks, whatever its arm and rate. A
run may stop on the way and go on later: what it has trained is kept apart from the base.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from headstart.choose.trials.clock import Clock
from headstart.choose.trials.order import Order, Train
from headstart.errors import BadOption
from headstart.lora import batches as reading
from headstart.lora.adapt import install, measured, remove
from headstart.lora.adapter import Adapter
from headstart.lora.calls import told
from headstart.lora.config import LoraConfig
from headstart.lora.layers import Start
from headstart.lora.report import InitReport
from headstart.lora.starts import prepare
from headstart.lora.targets import Target

Loss = Callable[[nn.Module, Any], Any]
MakeOptimizer = Callable[[nn.Module, float], Optimizer]
WARMUP = 0.03
CLIP = 1.0
LOOK_EVERY = 8  # steps between looks at the losses, each of which waits for the device
EXPLODED = 1.5  # times the loss that a run began with


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        model: the base; loss: from the model and a batch to its mean loss, or to that and how many it is a mean of.
        train: batches, or a function from a seed to batches.
        preserve: batches for the starts that ask what is not to be forgotten.
        calibration_batches: of a seed's own order, for the starts that look at data.
        optimizer: from the model and a rate to an optimizer of what trains; AdamW where it is left out.
    """

    model: nn.Module
    loss: Loss
    train: Train
    preserve: Sequence[Any] = ()
    calibration_batches: int = 8
    optimizer: MakeOptimizer | None = None

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters() if not p.is_meta), torch.device("cpu"))


@dataclass
class Prepared:
    """An arm's start for one seed, ready to be put in any number of times; and the seconds that it took."""

    config: LoraConfig
    starts: list[tuple[Target, Start]]
    report: InitReport
    calibration: float = 0.0
    init: float = 0.0


@dataclass
class Run:
    """A run of one arm: what it is, how far it has come, and what it needs to go on.

    Attributes:
        prepared: its start; rate: at the top of its schedule; seed: of its batches; steps: of the whole run.
        losses: of every step so far, each before its update.
        failed: why it is not worth going on, in words.
    """

    prepared: Prepared
    rate: float
    seed: int
    steps: int
    losses: list[float] = field(default_factory=list)
    learned: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    failed: str = ""

    @property
    def step(self) -> int:
        return len(self.losses)


def start_of(setting: Setting, config: LoraConfig, seed: int, draw: int) -> Prepared:
    """Compute an arm's start. The model comes back untouched.

    Args:
        seed: whose first batches a start that looks at data looks at; draw: the seed of what is random in it.
    """
    config = replace(config, seed=draw)
    began = time.perf_counter()
    known = None
    if config.strategy.needs:
        order = Order(setting.train, seed)
        data = [order[place] for place in range(setting.calibration_batches)]
        if config.strategy.looks_at_preserved(config.init_options):
            data = list(setting.preserve)
        options: dict[str, Any] = {"loss": setting.loss, "batches": len(data)}
        if "preserved" in config.strategy.needs:
            options["preserve"] = setting.preserve or None
        known = measured(setting.model, config, data, **options)
    calibrated = time.perf_counter()
    with torch.no_grad():
        starts, report = prepare(setting.model, config, known)
    return Prepared(config, starts, report, calibrated - began, time.perf_counter() - calibrated)


@contextmanager
def installed(model: nn.Module, prepared: Prepared) -> Iterator[Adapter]:
    """The model with a fresh copy of a start, in training mode; afterwards the base, whatever happened."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    devices = sorted({p.device.index or 0 for p, _ in gradients if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        adapter = install(model, prepared.config, [(t, _copy(s)) for t, s in prepared.starts], prepared.report)
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            model.train()
            yield adapter
        finally:
            remove(model)
            for module, training in modes:
                module.training = training
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


def _copy(start: Start) -> Start:
    """A start with tensors of its own: training writes to them."""
    return replace(
        start,
        A=start.A.clone(),
        B=start.B.clone(),
        core=None if start.core is None else start.core.clone(),
        magnitude=None if start.magnitude is None else start.magnitude.clone(),
    )


@contextmanager
def trained(setting: Setting, run: Run, to: int, clock: Clock) -> Iterator[None]:
    """Train a run up to a step. Within, what it has learned is in the model; afterwards it is in the run alone."""
    with installed(setting.model, run.prepared) as adapter:
        optimizer = _restored(setting, run)
        with clock("training"):
            _train(setting, adapter, optimizer, run, to)
        yield
        _keep(adapter, optimizer, run)


def _restored(setting: Setting, run: Run) -> Optimizer:
    """The optimizer; it and the model are as the run left them."""
    optimizer = (setting.optimizer or _adamw)(setting.model, run.rate)
    with torch.no_grad():
        named = dict(setting.model.named_parameters()) | dict(setting.model.named_buffers())
        for name, value in {**run.learned, **run.buffers}.items():
            named[name].copy_(value)
    if run.optimizer:
        optimizer.load_state_dict(run.optimizer)
    for group in optimizer.param_groups:
        group.setdefault("peak", group["lr"])
    return optimizer


def _adamw(model: nn.Module, rate: float) -> Optimizer:
    learning = [p for p in model.parameters() if p.requires_grad]
    if not learning:
        raise BadOption("nothing trains in this arm: its start freezes all factors")
    return torch.optim.AdamW(learning, lr=rate, weight_decay=0.0)


def _train(setting: Setting, adapter: Adapter, optimizer: Optimizer, run: Run, to: int) -> None:
    order = Order(setting.train, run.seed)
    pending: list[Tensor] = []
    learning = adapter.parameters()
    for step in range(run.step, to):
        # Each step has its own seed: masks are the same for every arm, and for a run that went on later.
        torch.manual_seed(7_919 * run.seed + step)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, run.steps)
        batch = reading.moved(order[step], setting.device)
        value, _ = told(setting.loss(setting.model, batch), reading.rows(batch))
        value.backward()
        torch.nn.utils.clip_grad_norm_(learning, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pending.append(value.detach())
        if len(pending) == LOOK_EVERY or step == to - 1:
            run.losses += torch.stack(pending).float().tolist()
            pending = []
            run.failed = wrong_with(run.losses)
            if run.failed:
                return


def schedule(step: int, steps: int) -> float:
    """A linear warm-up and a cosine to zero, as `headstart tune` has them by default."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def wrong_with(losses: Sequence[float]) -> str:
    """Why a run with these losses is not worth going on with, or nothing."""
    for step, loss in enumerate(losses):
        if not math.isfinite(loss):
            return f"the loss is {loss} at step {step + 1}"
    first = sum(losses[:2]) / len(losses[:2])
    last = losses[-LOOK_EVERY:]
    if len(losses) > LOOK_EVERY and min(last) > EXPLODED * max(first, 1e-6):
        return f"the loss rose from {first:.3g} to {sum(last) / len(last):.3g} by step {len(losses)}"
    return ""


def _keep(adapter: Adapter, optimizer: Optimizer, run: Run) -> None:
    """Copy what the run has learned out of the model, in the CPU's memory."""
    model = adapter.model
    run.learned = {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters() if p.requires_grad}
    run.buffers = {
        f"{name}.{key}".lstrip("."): buffer.detach().to("cpu", copy=True)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for key, buffer in module.named_buffers(recurse=False)
    }
    run.optimizer = _on_cpu(optimizer.state_dict())


def _on_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    return [_on_cpu(value) for value in state] if isinstance(state, list) else state


@torch.no_grad()
def evaluate(model: nn.Module, loss: Loss, batches: Sequence[Any], device: torch.device) -> float:
    """The mean loss over batches, weighted by what each is a mean of."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total, weight = 0.0, 0.0
    try:
        for batch in batches:
            batch = reading.moved(batch, device)
            value, count = told(loss(model, batch), reading.rows(batch))
            total += float(value) * count
            weight += count
    finally:
        for module, training in modes:
            module.training = training
    return total / weight if weight else math.nan
