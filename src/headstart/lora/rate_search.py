"""The learning rate that fits a start, found on data: short trial runs from it, all on the same batches.

    trial(η) = the loss on batches held back, after K steps of AdamW from η, falling evenly to zero
    rate     = argmin over η of  trial(η) / min trial + λ·log₂²(η / near)

Trials this short are noisy, and where they hardly differ the prediction from the factors (`near`) is the better guide;
where they do, it may be four times off. So leaving it costs λ. The first trial runs at `near`, the others a fixed
factor apart, downhill; between them a parabola stands for the trials. Three trials of K = 6 steps, each judged on two
batches, are twenty training steps, where a forward pass counts as a third of one. docs/rates.md has the figures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import AdapterState, BadOption, CalibrationError
from headstart.lora import batches as reading
from headstart.lora import reduce
from headstart.lora.calls import Calls, Loss
from headstart.lora.observe import undisturbed
from headstart.lora.rates import Rate

TRIAL, JUDGES = 6, 2  # Steps of a trial; batches that judge it.
COST = TRIAL + JUDGES / 3
BATCHES = TRIAL + JUDGES
APART = 3.0  # Between the rates of two trials.
DOUBT = 0.07  # λ: the share of the loss that a rate twice as far from the prediction has to gain. Fitted.
CLIFF = 0.5  # A trial that ends this share above the least fell off: how far says nothing, and nobody goes near it.
CLIP = 1.0  # The norm at which trainers clip the gradient.


def search_rate(
    model: nn.Module, data: Iterable[Any], *, near: float, loss: Loss | None = None, steps: float = 20
) -> Rate:
    """The peak rate of AdamW that fits a start, from short trial runs. The model comes back as it was.

    The factors train in the trials, and nothing else: modules that are trained whole stay as they are.

    Args:
        model: just adapted, natively or as a PeftModel.
        data: batches as `calibrate` takes them, as large as those of training: eight are read.
        near: what the start's factors predict, `adapter.learning_rate()`.
        loss: as for `calibrate`.
        steps: what the trials may cost, in training steps; a trial costs 6⅔.

    Returns:
        A float with a `reason`, which names the losses.

    Raises:
        AdapterState: if no factor trains. BadOption: a rate that is none, or too few steps for two trials.
        CalibrationError: no batch, no loss, a loss that is not finite, or no gradient.

    Example:
        >>> from headstart import LoraConfig, adapt
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
        >>> batches = [torch.randn(32, 16) for _ in range(8)]
        >>> near = adapt(model, LoraConfig(r=4, init_lora_weights="pissa")).learning_rate()
        >>> rate = search_rate(model, batches, near=near, loss=lambda model, x: model(x).square().mean())
        >>> near / 10 < rate < near * 10
        True
    """
    losses = tried(model, data, near, loss, steps)
    shown = ", ".join(f"{rate:.1e}: {value:.4g}" for rate, value in sorted(losses.items()))
    return Rate(
        settled(losses, near),
        f"{len(losses)} trials of {TRIAL} steps about the prediction of {near:.1e} ended at losses of {shown}; they "
        f"cost {len(losses) * COST:.0f} training steps",
    )


def tried(
    model: nn.Module, data: Iterable[Any], near: float, loss: Loss | None = None, steps: float = 20
) -> dict[float, float]:
    """The trials alone: the loss after each, by its rate. The arguments are those of `search_rate`."""
    if not 0 < near < math.inf:
        raise BadOption(f"near is {near!r}: pass the rate that the start predicts, adapter.learning_rate()")
    check_trials(steps)
    factors = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
    if not factors:
        raise AdapterState("no factor of this model trains: adapt it first, or load with trainable=True")
    _, stream = reading.peeked(data, "data")
    seen = list(reading.shown(stream, BATCHES, progress=False))
    judges = seen[-JUDGES:]
    trained = seen[:-JUDGES] or seen
    with undisturbed(model), _returning(factors) as back:
        calls = Calls(model, loss, True, ())
        for factor in factors:
            factor.requires_grad_(True)

        def trial(rate: float) -> float:
            back()
            ended = _End()
            with reduce.together():
                if _descend(calls, trained, factors, rate):
                    ended.look(calls, judges)
                else:
                    ended.loss = math.inf
            reduce.total(ended, "loss", "weight")  # Processes that see other batches end with the same rate.
            return ended.mean

        losses = _walk(trial, float(near), int(steps / COST + 1e-9))
    if not any(map(math.isfinite, losses.values())):
        raise CalibrationError(f"the loss on this data is not finite, not even at a rate of {min(losses):.0e}")
    return losses


def check_trials(steps: float, field: str = "steps") -> None:
    """Refuse a cost that pays for no search.

    Raises:
        BadOption: if it is less than two trials.
    """
    if not 2 * COST <= steps < math.inf:
        raise BadOption(
            f"{field} is {steps}: two trials of {COST:.1f} are the least, so pass {math.ceil(2 * COST)} or more"
        )


@contextmanager
def _returning(factors: Sequence[nn.Parameter]) -> Iterator[Callable[[], None]]:
    """A function that sets the factors back to where they were, which happens at the end in any case."""
    before = [factor.detach().clone() for factor in factors]

    def back() -> None:
        with torch.no_grad():
            for factor, start in zip(factors, before, strict=True):
                factor.copy_(start)

    try:
        yield back
    finally:
        back()


def _descend(calls: Calls, seen: Sequence[Any], factors: Sequence[nn.Parameter], peak: float) -> bool:
    """A trial's steps; whether the loss stayed finite."""
    optimizer = torch.optim.AdamW(factors, lr=peak, weight_decay=0.0)
    for index, batch in enumerate(itertools.islice(itertools.cycle(seen), TRIAL)):
        value = _asked(calls.forward(batch)[0])
        if not math.isfinite(float(value.detach())):
            return False
        gradients = torch.autograd.grad(value, list(factors), allow_unused=True) if value.requires_grad else ()
        if index == 0 and not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
            raise CalibrationError("the loss on this data has no gradient: check that the batches carry labels")
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = gradient
        nn.utils.clip_grad_norm_(factors, CLIP)
        optimizer.param_groups[0]["lr"] = peak * (1 - index / TRIAL)
        optimizer.step()
    return True


@dataclass
class _End:
    """Where a trial ended: the sum of the losses, and how many they are; inf where it diverged."""

    loss: float = 0.0
    weight: float = 0.0

    @torch.no_grad()
    def look(self, calls: Calls, seen: Sequence[Any]) -> None:
        for batch in seen:
            value, count = calls.forward(batch)
            self.loss, self.weight = self.loss + float(_asked(value)) * count, self.weight + count

    @property
    def mean(self) -> float:
        return self.loss / self.weight if math.isfinite(self.loss) and self.weight else math.inf


def _asked(value: Tensor | None) -> Tensor:
    if value is None:
        raise CalibrationError("the model returns no loss: put labels into the batches, or pass loss=")
    return value


def _walk(trial: Callable[[float], float], near: float, count: int) -> dict[float, float]:
    """At most so many trials, downhill from `near` until the best has a worse one on both sides."""
    losses = {0: trial(near)}
    while len(losses) < count:
        best = min(losses, key=lambda place: (losses[place], place))
        place = next((place for place in (best - 1, best + 1) if place not in losses), None)
        if place is None:
            break
        losses[place] = trial(near * APART**place)
    return {near * APART**place: value for place, value in losses.items()}


def settled(losses: Mapping[float, float], near: float, doubt: float = DOUBT) -> float:
    """The rate between what the trials say and what was predicted."""
    rates, least = sorted(losses), min(losses.values())
    x = [math.log2(rate / near) for rate in rates]
    y = [min((losses[rate] - least) / abs(least), CLIFF) if least else CLIFF * (losses[rate] > 0) for rate in rates]
    first = min(max(y.index(min(y)) - 1, 0), max(len(y) - 3, 0))
    x, y = x[first : first + 3], y[first : first + 3]
    slope, bend = _parabola(x, y)
    best = x[y.index(min(y))]
    if bend + doubt <= 0:
        return near * math.pow(2, best)
    place = (bend * (x[0] + x[1]) - slope) / (2 * (bend + doubt))
    low, high = (end if loss < CLIFF else (best + end) / 2 for end, loss in ((x[0], y[0]), (x[-1], y[-1])))
    return near * math.pow(2, min(max(place, low), high))


def _parabola(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Newton's coefficients: the slope of the first two points, and what the third adds."""
    slope = (y[1] - y[0]) / (x[1] - x[0])
    return slope, ((y[2] - y[1]) / (x[2] - x[1]) - slope) / (x[2] - x[0]) if len(x) == 3 else 0.0
