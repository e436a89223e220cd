"""The learning rate that fits a start, found on data: how long the first step of AdamW could be.

    g = ∇loss on some batches;  η₁ = argmin over η of loss(θ − η·sign g) on others;  rate = η₁/2

AdamW's first step is rate·sign g. Its best length on batches that g has not seen is found by doubling and halving, and
a parabola through the best three. It costs about what seven training steps do, and needs no rate to start from. For
plain LoRA the best peak rate of a run is a steady share of it on models that are adapted, not retrained; for other
starts search with plain LoRA, and multiply: `report.learning_rate(base=that)`. docs/rates.md has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import AdapterState, CalibrationError
from headstart.lora import batches as reading
from headstart.lora.calibrate import Calls, Loss
from headstart.lora.observe import undisturbed
from headstart.lora.rates import BASE, Rate

SHARE = 0.5  # Of the best first step. Fitted, docs/rates.md.
LONGEST, SHORTEST = 1.0, 1e-8


def search_rate(
    model: nn.Module, data: Iterable[Any], *, loss: Loss | None = None, batches: int = 6, near: float = BASE
) -> Rate:
    """The peak rate of AdamW that fits a start, from the loss after one step. The model comes back as it was.

    Args:
        model: just adapted, natively or as a PeftModel.
        data: batches as `calibrate` takes them, as large as those of training.
        loss: as for `calibrate`.
        batches: how many are read: two thirds of them for the gradient, the others to judge by.
        near: where the search begins.

    Returns:
        A float with a `reason`, which names the losses.

    Raises:
        AdapterState: if no factor trains. CalibrationError: no batch, no loss, a loss that is not finite, or no
            gradient.
    """
    factors = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
    if not factors:
        raise AdapterState("no factor of this model trains: adapt it first, or load with trainable=True")
    _, stream = reading.peeked(data, "data")
    seen = list(reading.shown(stream, batches, progress=False))
    known = seen[: max(1, round(len(seen) * 2 / 3))]
    unseen = seen[len(known) :] or known
    with undisturbed(model):
        calls = Calls(model, loss, True, ())
        signs = _signs(calls, known, factors)
        with torch.no_grad(), _moving(factors, signs) as move:

            def after(step: float) -> float:
                move(step)
                return _mean(calls, unseen)

            losses = _search(after, near)
    step = _bottom(losses)
    shown = ", ".join(f"{eta:.1e}: {value:.4g}" for eta, value in sorted(losses.items()))
    return Rate(SHARE * step, f"{SHARE:g} × {step:.1e}, the best length of AdamW's first step (loss at {shown})")


def _signs(calls: Calls, seen: Sequence[Any], factors: Sequence[nn.Parameter]) -> list[Tensor]:
    """The sign of the mean gradient: AdamW's first step."""
    sums = [torch.zeros_like(factor) for factor in factors]
    for factor in factors:
        factor.requires_grad_(True)
    for batch in seen:
        value, count = calls.forward(batch)
        gradients = torch.autograd.grad(_asked(value) * count, list(factors), allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total.add_(gradient)
    if not all(bool(total.isfinite().all()) for total in sums):
        raise CalibrationError(
            "the gradient on this data is not finite: look at the data, or load the model in float32"
        )
    if not any(bool(total.any()) for total in sums):
        raise CalibrationError("the loss on this data has no gradient: check that the batches carry labels")
    return [total.sign_() for total in sums]


@contextmanager
def _moving(factors: Sequence[nn.Parameter], signs: Sequence[Tensor]) -> Iterator[Callable[[float], None]]:
    """A function that sets the factors a step of this length from where they were, and their return."""
    before = [factor.detach().clone() for factor in factors]

    def move(step: float) -> None:
        for factor, start, sign in zip(factors, before, signs, strict=True):
            torch.add(start, sign, alpha=-step, out=factor)

    try:
        yield move
    finally:
        for factor, start in zip(factors, before, strict=True):
            factor.copy_(start)


def _mean(calls: Calls, seen: Sequence[Any]) -> float:
    total = weight = 0.0
    for batch in seen:
        value, count = calls.forward(batch)
        total, weight = total + float(_asked(value)) * count, weight + count
    return total / weight if weight and math.isfinite(total) else math.inf


def _asked(value: Tensor | None) -> Tensor:
    if value is None:
        raise CalibrationError("the model returns no loss: put labels into the batches, or pass loss=")
    return value


def _search(loss: Callable[[float], float], near: float) -> dict[float, float]:
    """Losses at steps a factor of two apart, until the least of them has a larger one on both sides."""
    losses = {near: loss(near)}
    best = near
    while SHORTEST < best < LONGEST:
        for step in (2 * best, best / 2):
            if step not in losses:
                losses[step] = loss(step)
                if losses[step] < losses[best]:
                    break
        found = min(losses, key=lambda step: (losses[step], step))
        if found == best:
            break
        best = found
    if not math.isfinite(losses[best]):
        raise CalibrationError(f"the loss on this data is not finite, not even after a step of {best:.0e}")
    return losses


def _bottom(losses: dict[float, float]) -> float:
    """Where the parabola through the least loss and its two neighbours is lowest."""
    best = min(losses, key=lambda step: (losses[step], step))
    left, right = losses.get(best / 2, math.inf), losses.get(2 * best, math.inf)
    if not (math.isfinite(left) and math.isfinite(right)) or left == losses[best] == right:
        return best
    below, above = 2 * (left - losses[best]), right - losses[best]  # Slopes down to it and up from it, times `best`.
    return best * 0.75 * (1 + below / (above + below))
