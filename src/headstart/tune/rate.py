"""`--lr auto`: the rate that the start predicts, confirmed by short trial runs on the run's own data."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from headstart.lora.rate_search import BATCHES, search_rate
from headstart.lora.rates import Rate
from headstart.tune import data
from headstart.tune.calibration import batches
from headstart.tune.recipe import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headstart.peft.model import ShellModel

AUTO = "auto"


def searched(model: ShellModel, tokenizer: PreTrainedTokenizerBase, rows: data.Rows, config: RunConfig) -> Rate:
    """What fits the run's start, at a cost of `config.rate_steps`; the model comes back as it was.

    Raises:
        CalibrationError: as `headstart.search_rate`.
    """
    near = model.init_reports["default"].learning_rate(steps=config.steps_for(len(rows.train)))
    if not config.rate_steps:
        return near
    base = cast("PreTrainedModel", model.get_base_model())
    seen = batches(base, tokenizer, rows, config, BATCHES)
    found = search_rate(model, seen, near=near, steps=config.rate_steps)
    return Rate(found, f"{found.reason}; the prediction is {near.reason}")


def settled(config: RunConfig, rate: Rate) -> RunConfig:
    """The config with the number, and why."""
    why = f"rate {rate:.2e}: {rate.reason}"
    advice = why if config.advice is None else f"{config.advice}; {why}"
    return config.model_copy(update={"learning_rate": float(f"{rate:.3g}"), "advice": advice})
