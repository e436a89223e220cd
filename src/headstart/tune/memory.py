"""What a run will take, before a weight is loaded: the estimate, for a config of `headstart tune`."""

from __future__ import annotations

from headstart.choose.adapted import estimate_adapted
from headstart.choose.estimate import Estimate
from headstart.choose.machine import speed
from headstart.choose.outlines import outline_of
from headstart.choose.setting import Setting
from headstart.lora.config import LoraConfig
from headstart.tune import models
from headstart.tune.beforehand import check
from headstart.tune.recipe import RunConfig


def forecast(config: RunConfig) -> Estimate:
    """Predict a run's memory and time.

    Raises:
        HeadstartError: where the config does not fit the model.
    """
    lora = LoraConfig(**config.lora(), task_type="CAUSAL_LM")
    check(config, lora)
    source = models.find(config.model)
    dtype = models.trained_dtype(source, config.dtype)
    setting = Setting(
        dtype=dtype,
        batch_size=1 if config.packing else config.batch_size,
        max_length=config.max_length,
        gradient_accumulation=config.gradient_accumulation,
        optimizer=config.optimizer,
        gradient_checkpointing=config.gradient_checkpointing,
        calibration_batches=config.calibration_batches,
        steps=config.steps,
    )
    outline = outline_of(config.model, dtype)
    model = models.skeleton(source, dtype)
    models.check_length(model, config.max_length)
    return estimate_adapted(model, lora, outline, setting, speed(dtype))
