"""What can be refused of a run before anything is loaded, by `headstart tune` and by its --dry-run alike."""

from __future__ import annotations

from headstart.errors import BadOption, MissingStatistic
from headstart.inits.small import on_a_small_matrix
from headstart.inits.strategy import QUANTIZER
from headstart.lora.config import LoraConfig
from headstart.lora.quantized import recipe
from headstart.tune import models, reading
from headstart.tune.recipe import RunConfig


def check(config: RunConfig, lora: LoraConfig) -> None:
    """Refuse what cannot become a run.

    Raises:
        BadOption: if an option of the start cannot have its value, data is given for a start that looks at none, an
            optimizer is for factors that do not train, or a tracker is not installed.
        MissingStatistic: if a start needs data that is not given.
        DataError: if a path leads nowhere.
        FileError: if there is no such model, or it is an encoder.
    """
    needs = lora.strategy.needs
    for name, wanted in (("calibration", bool(needs)), ("preserve", "preserved" in needs)):
        if getattr(config, name) is not None and not wanted:
            raise BadOption(f"init {config.init!r} has no use for --{name}: leave it out")
    if "preserved" in needs and config.preserve is None:
        raise MissingStatistic(
            f"init {config.init!r} weighs the data against data that is not to be forgotten: pass --preserve"
        )
    start = on_a_small_matrix(lora.strategy, lora.options)  # Which refuses values that an option cannot have.
    if lora.strategy.quantizes:
        recipe(**{name: lora.options.get(name, QUANTIZER[name]) for name in ("bits", "quant_type")})
    if config.optimizer != "adamw" and start.core is not None:
        raise BadOption(
            f"optimizer {config.optimizer!r} is for factors, and init {config.init!r} trains the numbers between them "
            "alone: choose adamw"
        )
    for name in ("data", "eval_data", "calibration", "preserve"):
        place = getattr(config, name)
        if place is not None:
            reading.check_place(place)
    _check_trackers(config)
    models.check_causal(models.find(config.model))


def _check_trackers(config: RunConfig) -> None:
    wanted = {config.report_to} if isinstance(config.report_to, str) else set(config.report_to)
    if not wanted - {"none", "all"}:
        return
    from transformers.integrations import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    for name in wanted - {"none", "all", *installed}:
        here = f"there is: {', '.join(installed)}" if installed else "there is none"
        raise BadOption(f"report_to names {name!r}, which is not installed here ({here}): pip install it")
