"""What a start that looks at data gets to see in a run: the trainer's own batches, of its data or of other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from headstart.lora.adapt import measured
from headstart.lora.calibration import Calibration
from headstart.lora.config import LoraConfig
from headstart.tune import data
from headstart.tune.recipe import RunConfig
from headstart.tune.trainer import tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def calibrated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: data.Rows,
    config: RunConfig,
    lora: LoraConfig,
    progress: bool = False,
) -> Calibration | None:
    """What the run's start needs to know; None where it needs nothing.

    Raises:
        HeadstartError: as `headstart.calibrate`.
    """
    if not lora.strategy.needs:
        return None
    options: dict[str, Any] = {"batches": config.calibration_batches, "progress": progress}
    if config.preserve is not None:
        options["preserve"] = batches(
            model, tokenizer, other(config.preserve, config, tokenizer), config, config.calibration_batches
        )
    seen = rows if config.calibration is None else other(config.calibration, config, tokenizer)
    return measured(model, lora, batches(model, tokenizer, seen, config, config.calibration_batches), **options)


def other(name: str, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> data.Rows:
    """Other data than the run's, all of it, its columns found by their usual names."""
    columns = ("text_column", "prompt_column", "completion_column", "messages_column")
    changes = {"data": name, "eval_data": None, "eval_split": None, "eval_fraction": 0.0, "subset": None}
    return data.prepare(config.model_copy(update={**changes, **dict.fromkeys(columns)}), tokenizer)


def batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: data.Rows, config: RunConfig, count: int
) -> Iterable[Any]:
    """So many of the trainer's batches, in an order of the seed's."""
    chosen = rows.train.shuffle(seed=config.seed).select(range(min(len(rows.train), count * config.batch_size)))
    return tokenized(model, tokenizer, chosen, rows.assistant_only, config)
