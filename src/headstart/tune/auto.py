"""init="auto": a run that follows the advice, and writes down that it did and why."""

from __future__ import annotations

from typing import Any

import torch

from headstart.choose.advise import advise
from headstart.choose.machine import memory_here
from headstart.choose.recommendation import Advice
from headstart.choose.samples import look
from headstart.tune import models
from headstart.tune.folder import Folder
from headstart.tune.recipe import RunConfig, resolve

AUTO = "auto"

# What the advice is asked about unless the user has settled it.
SETTLED = ("r", "target_modules", "exclude_modules")
PLANNED = ("batch_size", "max_length", "gradient_accumulation", "gradient_checkpointing", "optimizer")


def followed(config: RunConfig, folder: Folder | None = None) -> RunConfig:
    """The config with everything filled in that the advice decides; one that names its start comes back as it is.

    What the config sets itself stays. An interrupted run goes on with the advice that it began with.

    Raises:
        HeadstartError: as `headstart.advise`.
    """
    if config.init != AUTO:
        return config
    given = config.model_dump(exclude_unset=True)
    if folder is not None and folder.recipe.exists() and folder.last_checkpoint() is not None:
        before = folder.recorded()
        if before.advice is not None:
            return resolve({**before.model_dump(), **given, "init": before.init, "advice": before.advice})
    settled = {name: given[name] for name in SETTLED if name in given}
    planned = {name: getattr(config, name) for name in PLANNED}
    advice = advise(
        config.model,
        config.data,
        memory=_memory(),
        preserve=config.preserve or False,
        steps=_steps(config),
        timed=False,
        dtype=models.trained_dtype(models.find(config.model), config.dtype),
        **settled,
        **planned,
    )
    own = {name for name in given if name != "init"}
    fields = {name: value for name, value in advice.best.fields.items() if name not in own | {"model", "data", "steps"}}
    if "learning_rate" in fields and config.optimizer == "adamw":
        fields["learning_rate"] = AUTO  # Searched on the data: surer than what the advice knows before it has any.
    return resolve({**given, **fields, "advice": reason(advice)})


def reason(advice: Advice) -> str:
    """Why, in one line."""
    best = advice.best
    return f"headstart advise chose {best.init} ({best.confidence} confidence): {best.because} [{best.source}]"


def _steps(config: RunConfig) -> int | None:
    if config.steps is not None:
        return config.steps
    rows = look(config.data).rows
    if rows is None:
        return None
    return config.steps_for(rows)


def _memory() -> int | None:
    """Of the accelerator, or what is free of this machine's."""
    device: Any = torch.accelerator.current_accelerator()
    if device is not None and device.type == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return memory_here() if device is None else None
