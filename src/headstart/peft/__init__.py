"""The same on a real `PeftModel`, for Trainer, TRL and everyone who knows `get_peft_model`.

>>> from headstart.peft import get_peft_model                                            # doctest: +SKIP
>>> model = get_peft_model(model, LoraConfig(r=16), init="pissa")                        # doctest: +SKIP

PEFT's injection, config, hub and trainer integration; our factors, our anchoring, our forward, our files. The base is
never written to, so `disable_adapter()` is exactly the base model, and what is saved is plain LoRA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
from torch import nn

from headstart.files.adapter import read_adapter
from headstart.files.cores import check_trains
from headstart.files.load import plan_load
from headstart.lora.adapt import check_plain, measured, trained_biases
from headstart.lora.calibration import Calibration
from headstart.lora.config import LoraConfig
from headstart.lora.layers import Start
from headstart.lora.report import InitReport
from headstart.lora.starts import prepare
from headstart.lora.targets import Target, with_heads
from headstart.peft.checkpoint import fill
from headstart.peft.config import own_config, peft_config
from headstart.peft.inject import enter, injection
from headstart.peft.model import ShellModel, exchange
from headstart.peft.tuner import Originals

__all__ = ["from_pretrained", "get_peft_model"]


def get_peft_model(
    model: nn.Module,
    config: LoraConfig | peft.LoraConfig,
    init: str | bool | None = None,
    init_options: Mapping[str, Any] | None = None,
    seed: int | None = None,
    adapter_name: str = "default",
    *,
    data: Iterable[Any] | None = None,
    calibration: Calibration | None = None,
    **options: Any,
) -> ShellModel:
    """A real PeftModel whose adapter was started by headstart.

    Args:
        model: the base, changed in place as PEFT does.
        config: ours or PEFT's.
        init: the strategy; left out, the config's.
        init_options: its options; left out, the config's.
        seed: of its random draws; left out, the config's.
        adapter_name: PEFT's name for the adapter.
        data: batches for a strategy that looks at data, as `headstart.calibrate` takes them.
        calibration: instead of data, what `headstart.calibrate` found.
        options: of `headstart.calibrate`, with data.

    Returns:
        The model, which Trainer and TRL accept. `init_reports[adapter_name]` says how it was started.

    Raises:
        ConfigError, TargetError, WeightError: before anything is changed.
    """
    check_plain(model)
    own = with_heads(model, own_config(model, config))
    changes: dict[str, Any] = {"init_lora_weights": init, "init_options": init_options, "seed": seed}
    own = dataclasses.replace(own, **{name: value for name, value in changes.items() if value is not None})
    known = measured(model, own, data, calibration, **options)
    return _inject(model, own, *prepare(model, own, known), adapter_name)


def from_pretrained(
    model: nn.Module, path: str | Path, *, is_trainable: bool = False, adapter_name: str = "default"
) -> ShellModel:
    """A PeftModel with a saved adapter, anchors included, so that training it goes on where it was.

    Args:
        model: the base.
        path: the folder, or a name on the hub.
        is_trainable: whether to go on training it.
        adapter_name: PEFT's name for the adapter.

    Raises:
        AdapterFormatError, KeyMismatch, WrongBase: before anything is changed.
    """
    check_plain(model)
    file = read_adapter(path)
    if is_trainable:
        check_trains(file)
    plan = plan_load(model, file, apart=is_trainable)
    wrapped = _inject(model, plan.config, plan.starts, plan.report, adapter_name, inference=not is_trainable)
    fill(wrapped, adapter_name, plan.extras)
    return wrapped if is_trainable else wrapped.eval()


def _inject(
    model: nn.Module,
    config: LoraConfig,
    starts: Sequence[tuple[Target, Start]],
    report: InitReport,
    adapter_name: str,
    inference: bool = False,
) -> ShellModel:
    injected = peft_config(model, config, starts, inference)
    biases, originals = trained_biases(model, starts, config), Originals(model)
    with injection(model, injected):
        wrapped = peft.get_peft_model(model, injected, adapter_name=adapter_name)
        enter(model, adapter_name, starts)
    injected.base_model_name_or_path = injected.base_model_name_or_path or None  # 0.18 looks for the hub's ""
    shell = exchange(wrapped, adapter_name, report, originals)
    shell.base_model.settle(biases, trainable=not inference)
    return shell
