"""`auto`: the advice followed on a model as it stands, with the rate found on its data, and what that cost.

advise      init, rank, scaling and targets, from the model's shapes and the length of the run
calibrate   the start, from a few batches where it looks at data
search      the rate, from the start's own prediction and a few trial steps; nothing is swept
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

from headstart.choose import costs
from headstart.choose.advise import advise
from headstart.choose.machine import duration
from headstart.choose.recommendation import Advice
from headstart.choose.samples import IN_MEMORY, Sample
from headstart.errors import BadOption
from headstart.lora.adapt import adapt, remove
from headstart.lora.adapter import Adapter
from headstart.lora.calls import Loss
from headstart.lora.config import LoraConfig
from headstart.lora.rate_search import BATCHES, check_trials, search_rate
from headstart.lora.rates import Rate

AUTO = "auto"


@dataclass(frozen=True)
class Auto:
    """An adapter that was chosen, installed and given its rate.

    Attributes:
        adapter: in the model, ready to train. advice: that was followed; its first place.
        rate: the peak rate of AdamW, with its `reason`.
        seconds: that each part took: "advice", "start" (with its calibration), "rate".
        steps: what the start and the rate looked at, in training steps.
    """

    adapter: Adapter
    advice: Advice
    rate: Rate
    seconds: Mapping[str, float]
    steps: float

    @property
    def config(self) -> LoraConfig:
        """What was chosen: the init, rank, scaling and targets."""
        return self.adapter.config

    def __str__(self) -> str:
        best, config = self.advice.best, self.config
        scaling = "rsLoRA" if config.use_rslora else "plain scaling"
        spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self.seconds.items())
        return "\n".join(
            [
                f"auto: {best.init}, r = {config.r}, α = {config.lora_alpha:g} ({scaling}), "
                f"{len(self.adapter.layers())} matrices ({best.confidence} confidence)",
                f"  because  {best.because} [{best.source}]",
                f"  rate     {self.rate:.2e}: {self.rate.reason}",
                f"  trains   {self.adapter}",
                f"  cost     {spent}; about {self.steps:.0f} training steps",
            ]
        )


def auto(
    model: nn.Module,
    data: Iterable[Any],
    *,
    loss: Loss | None = None,
    preserve: Iterable[Any] | None = None,
    steps: int | None = None,
    trials: float = 20,
    calibration_batches: int = 8,
    changes: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Auto:
    """Choose init, rank, scaling, targets and rate for a model and its data, and install the adapter.

    Args:
        model: any module; its frozen weights are never written to.
        data: batches as `headstart.calibrate` takes them, as large as those of training. At most
            `calibration_batches` and eight more are read; the rate is found on others than the start where there are.
        loss: as for `calibrate`.
        preserve: batches of what is not to be forgotten; at most `calibration_batches` are read.
        steps: of the run, where it is known: short runs gain from a start.
        trials: what the search of the rate may cost, in training steps; 0 takes the prediction.
        calibration_batches: that a start that looks at data looks at.
        changes: further fields of `LoraConfig`, as {"modules_to_save": ["head"]}.
        facts: of `headstart.advise`: r, trainable, memory, serve, target_modules, exclude_modules, quantised, …

    Returns:
        The adapter with its rate, the reasons and the cost; print it.

    Raises:
        HeadstartError: as `advise`, `adapt` and `search_rate`; the model is then as it was.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        >>> batches = [torch.randn(32, 64) for _ in range(16)]
        >>> found = auto(model, batches, loss=lambda model, x: (model(x) - x.sin()).square().mean(), steps=50)
        >>> found.config.init_lora_weights, found.config.r, found.rate > 0
        ('kfac', 9, True)
    """
    if isinstance(data, str | Mapping | Tensor) or not isinstance(data, Iterable):
        raise BadOption(f"data is a {type(data).__name__}: pass an iterable of batches, as [batch]")
    if preserve is not None and (isinstance(preserve, str | Mapping) or not isinstance(preserve, Iterable)):
        raise BadOption(f"preserve is a {type(preserve).__name__}: pass an iterable of batches, as [batch]")
    if trials:
        check_trials(trials, "trials")
    seconds: dict[str, float] = {}
    with _timed("advice", seconds):
        advice = followed(model, steps=steps, preserve=preserve is not None, **facts)
        start = costs.start_of(advice.best.init)
        # A layer that the batches do not reach starts as plain LoRA; among cores it would train too many numbers.
        fallback = {"init_fallback": "kaiming"} if start.needs and start.trains == "AB" else {}
        config = advice.best.lora_config(clip_rank=True, **{**fallback, **(changes or {})})
    looks = calibration_batches if start.needs else 0
    seen = list(islice(data, looks + BATCHES))
    if not seen:
        raise BadOption("data holds no batch: pass the batches of training")
    looked, options = seen[:looks], dict[str, Any]()
    if preserve is not None and start.needs:
        kept = list(islice(preserve, looks))
        if config.strategy.looks_at_preserved(config.init_options):
            looked = kept
        elif "preserved" in start.needs:
            options["preserve"] = kept
    with _timed("start", seconds):
        adapter = adapt(model, config, data=looked, loss=loss, **options) if start.needs else adapt(model, config)
    try:
        with _timed("rate", seconds):
            rate = adapter.learning_rate(steps=steps)
            if trials:
                rate = search_rate(model, seen[looks:] or seen, near=rate, loss=loss, steps=trials)
    except BaseException:
        remove(model)
        raise
    return Auto(adapter, advice, rate, seconds, min(looks, len(seen)) + trials)


def followed(model: nn.Module, *, steps: int | None = None, **facts: Any) -> Advice:
    """The advice for a model in memory with batches at hand.

    Raises:
        HeadstartError: as `headstart.advise`.
    """
    return advise(model, Sample(IN_MEMORY, None, None, None), steps=steps, timed=False, **facts)


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began
