"""How long the first step should be, where a start moves the function: tried on data, without gradients.

    s·B·A  →  η·s·B·A = s·(√η·B)·(√η·A)                               η over a grid, 0 among it

LoRA-One, LoRA-SB, GoRA and LoRA-DA start with a step of the gradient whose length is a convention of their papers. The
reference of LoRA-One holds an unused search over η; GoRA's calls one "adaptive".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import AdapterState, BadOption, CalibrationError
from headstart.lora import batches as reading
from headstart.lora.calls import Calls, Loss
from headstart.lora.layers import LoraLayer, lora_layers
from headstart.lora.observe import undisturbed

STEPS = (16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625)


@dataclass(frozen=True)
class Searched:
    """What a line search found.

    Attributes:
        step: η, by which the product was multiplied.
        losses: the mean loss for each η that was tried; 0 is the base.
    """

    step: float
    losses: Mapping[float, float]

    def __str__(self) -> str:
        tried = ", ".join(f"{step:g}: {loss:.4f}" for step, loss in sorted(self.losses.items()))
        return f"step × {self.step:g} (mean loss at each: {tried})"


def search_step(
    model: nn.Module, data: Iterable[Any], *, loss: Loss | None = None, steps: Sequence[float] = STEPS, batches: int = 4
) -> Searched:
    """Scale the product B·A of every branch by the one factor that gives the least loss on data, in place.

    Args:
        model: just adapted, natively or as a PeftModel, with a start that moves the function.
        data: batches as `calibrate` takes them; better not those that the start was made from.
        loss: as for `calibrate`.
        steps: the factors to try; none of them is taken that is worse than the base.
        batches: at most so many are read.

    Returns:
        The factor, and the losses at all of them. Where no step helps, the factor is the least of them, because at 0
        a product of two zeros would never train.

    Raises:
        AdapterState: if nothing moves the function: there is nothing to scale.
        CalibrationError: no batch, no loss, or a loss of the base that is not finite.
    """
    if not steps or any(isinstance(step, bool) or not 0 < step < math.inf for step in steps):
        raise BadOption(f"steps are {steps!r}: choose numbers above 0")
    factors = list(_factors(model))
    if not factors:
        raise AdapterState("no branch moves the function at step zero, so there is no step to scale")
    magnitudes = list(_magnitudes(model))
    _, stream = reading.peeked(data, "data")
    seen = list(reading.shown(stream, batches, progress=False))
    with undisturbed(model), torch.no_grad():
        calls = Calls(model, loss, True, ())
        losses = {step: _mean(calls, seen, factors, magnitudes, step) for step in (0.0, *steps)}
        if not math.isfinite(losses[0.0]):
            raise CalibrationError(f"the base's own loss on this data is {losses[0.0]}: look at the data")
        best = min(steps, key=lambda step: losses[step] if math.isfinite(losses[step]) else math.inf)
        if not losses[best] < losses[0.0]:
            best = min(steps)
        _scale(factors, magnitudes, best)
    return Searched(best, losses)


Factors = Sequence[tuple[Tensor, float]]
Magnitudes = Sequence[tuple[Tensor, LoraLayer]]


def _mean(calls: Calls, seen: Sequence[Any], factors: Factors, magnitudes: Magnitudes, step: float) -> float:
    total = weight = 0.0
    with _scaled(factors, magnitudes, step):
        for batch in seen:
            value, count = calls.forward(batch)
            if value is None:
                raise CalibrationError("the model returns no loss: put labels into the batches, or pass loss=")
            total, weight = total + float(value) * count, weight + count
    return total / weight if weight else math.nan


@contextmanager
def _scaled(factors: Factors, magnitudes: Magnitudes, step: float) -> Iterator[None]:
    changed = [tensor for tensor, _ in (*factors, *magnitudes)]
    before = [tensor.clone() for tensor in changed]
    try:
        _scale(factors, magnitudes, step)
        yield
    finally:
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)


def _scale(factors: Factors, magnitudes: Magnitudes, step: float) -> None:
    for factor, power in factors:
        factor.mul_(step**power)
    for magnitude, layer in magnitudes:
        norm = layer.branch().norm
        assert norm is not None
        magnitude.copy_(norm)


def _magnitudes(model: nn.Module) -> Iterator[tuple[Tensor, LoraLayer]]:
    """DoRA's row norms, which are those of the weight with the step: a shorter step has others."""
    native = [(layer.magnitude, layer) for _, layer in lora_layers(model)]
    if not native and any("lora_magnitude_vector" in name for name, _ in model.named_parameters()):
        raise AdapterState("the magnitudes of a PeftModel's DoRA belong to the step as it is: search without use_dora")
    yield from ((magnitude, layer) for magnitude, layer in native if magnitude is not None)


def _factors(model: nn.Module) -> Iterator[tuple[Tensor, float]]:
    """What to scale by which power of η: a core whole, two factors by halves. Anchored branches do not move."""
    parameters = dict(model.named_parameters())
    for name, A in parameters.items():
        head, found, tail = name.partition("lora_A")
        if not found:
            head, found, tail = name.partition("lora_embedding_A")
        B = parameters.get(f"{head}{found[:-1]}B{tail}") if found else None
        if B is None:
            continue
        layer: Any = model.get_submodule(head.rstrip("."))
        if any(key.startswith("anchor_A") and value is not None for key, value in layer._buffers.items()):
            continue
        cores = [p for key, p in layer._parameters.items() if key.startswith("lora_core") and p is not None]
        if cores:
            yield from ((core, 1.0) for core in cores)
        elif bool(A.any()) and bool(B.any()):
            yield from ((A, 0.5), (B, 0.5))
