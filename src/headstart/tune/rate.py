"""`--lr auto`: plain LoRA's rate, searched on the run's own data, times what the start makes of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headstart.lora.adapt import adapt, remove
from headstart.lora.config import LoraConfig
from headstart.lora.rate_search import search_rate
from headstart.lora.rates import PLAIN_RANK, Rate
from headstart.lora.report import InitReport
from headstart.tune import data
from headstart.tune.calibration import batches
from headstart.tune.recipe import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTO = "auto"
BATCHES = 6


def plain_rate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: data.Rows, config: RunConfig, lora: LoraConfig
) -> Rate:
    """What plain LoRA on the same layers wants; the model comes back as it was.

    Raises:
        CalibrationError: as `headstart.search_rate`.
    """
    plain = LoraConfig(
        r=PLAIN_RANK,
        lora_alpha=PLAIN_RANK,
        clip_rank=True,
        target_modules=lora.target_modules,
        exclude_modules=lora.exclude_modules,
        layers_to_transform=lora.layers_to_transform,
        seed=lora.seed,
    )
    adapt(model, plain)
    try:
        return search_rate(model, batches(model, tokenizer, rows, config, BATCHES), batches=BATCHES)
    finally:
        remove(model)


def settled(config: RunConfig, plain: Rate, report: InitReport) -> RunConfig:
    """The config with the number, and why."""
    fits = report.learning_rate(plain)
    why = f"rate {fits:.2e}: {fits.reason}; that one is {plain.reason}"
    advice = why if config.advice is None else f"{config.advice}; {why}"
    return config.model_copy(update={"learning_rate": float(f"{fits:.3g}"), "advice": advice})
