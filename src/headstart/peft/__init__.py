"""The same on a real `PeftModel`, for Trainer, TRL and everyone who knows `get_peft_model`.

>>> from headstart.peft import get_peft_model                                            # doctest: +SKIP
>>> model = get_peft_model(model, LoraConfig(r=16), init="pissa")                        # doctest: +SKIP

PEFT's injection, config, hub and trainer integration; our factors, our anchoring, our forward, our files. The base is
never written to, so `disable_adapter()` is exactly the base model, and what is saved is plain LoRA.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import peft
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, ModulesToSaveWrapper
from torch import nn

from headstart.errors import BadOption
from headstart.files.adapter import PREFIX, read_adapter
from headstart.files.checkpoint import plan_load
from headstart.lora import adapt, matrix
from headstart.lora.config import LoraConfig, Target, targets, with_heads
from headstart.lora.layers import Start
from headstart.lora.report import InitReport
from headstart.peft.layers import exchange as exchange_layer
from headstart.peft.model import ShellModel
from headstart.peft.model import exchange as exchange_model

__all__ = ["from_pretrained", "get_peft_model"]

# Fields of PEFT's config that change what is computed, and that we do not serve.
_UNSERVED = (
    "lora_bias",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "trainable_token_indices",
    "monteclora_config",
    "kasa_config",
    "velora_config",
    "arrow_config",
    "megatron_config",
    "ensure_weight_tying",
)


def get_peft_model(
    model: nn.Module,
    config: LoraConfig | peft.LoraConfig,
    init: str | bool | None = None,
    init_options: Mapping[str, Any] | None = None,
    seed: int | None = None,
    adapter_name: str = "default",
) -> ShellModel:
    """A real PeftModel whose adapter was started by headstart.

    Args:
        model: the base, changed in place as PEFT does.
        config: ours or PEFT's.
        init: the strategy; left out, the config's.
        init_options: its options; left out, the config's.
        seed: of its random draws; left out, the config's.
        adapter_name: PEFT's name for the adapter.

    Returns:
        The model, which Trainer and TRL accept. `init_reports[adapter_name]` says how it was started.

    Raises:
        ConfigError, TargetError, WeightError: before anything is changed.
    """
    own = with_heads(model, _own_config(model, config))
    changes: dict[str, Any] = {"init_lora_weights": init, "init_options": init_options, "seed": seed}
    own = dataclasses.replace(own, **{name: value for name, value in changes.items() if value is not None})
    if own.parts:
        raise BadOption("PEFT has no fused parts: use headstart.adapt for `parts`, or target the whole projection")
    adapt.check_plain(model)
    began = time.perf_counter()
    chosen = targets(model, own)
    started = [adapt.start_of(target, own) for target in chosen]
    layers = tuple(report for _, report in started)
    report = InitReport(own.strategy.name, own.options, own.seed, layers, time.perf_counter() - began)
    starts = [(target, start) for target, (start, _) in zip(chosen, started, strict=True)]
    return _inject(model, own, starts, report, adapter_name)


def from_pretrained(
    model: nn.Module, path: str | Path, *, is_trainable: bool = False, adapter_name: str = "default"
) -> ShellModel:
    """A PeftModel with a saved adapter, anchors included, so that training it goes on where it was.

    Args:
        model: the base. path: the folder, or a name on the hub.

    Raises:
        AdapterFormatError, KeyMismatch, WrongBase: before anything is changed.
    """
    adapt.check_plain(model)
    plan = plan_load(model, read_adapter(path))
    wrapped = _inject(model, plan.config, plan.starts, plan.report, adapter_name, inference=not is_trainable)
    if plan.extras:
        named = {f"{PREFIX}{name}": value for name, value in plan.extras.items()}
        peft.set_peft_model_state_dict(wrapped, named, adapter_name=adapter_name)
    return wrapped


def _inject(
    model: nn.Module,
    config: LoraConfig,
    starts: list[tuple[Target, Start]],
    report: InitReport,
    adapter_name: str,
    inference: bool = False,
) -> ShellModel:
    """PEFT's injection, then our starts. Should PEFT refuse, the model is taken apart again."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    peft_config = _peft_config(model, config, [target for target, _ in starts], inference)
    try:
        wrapped = peft.get_peft_model(model, peft_config, adapter_name=adapter_name)
        injected = _injected(cast(nn.Module, wrapped.base_model.model))
        for target, start in starts:
            layer = exchange_layer(injected[target.module, target.parameter])
            layer.enter(adapter_name, start, target.layout, target.parameter)
    except BaseException:
        _take_apart(model)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    return exchange_model(wrapped, adapter_name, report)


def _injected(model: nn.Module) -> dict[tuple[nn.Module, str], nn.Module]:
    """PEFT's layers by what they adapt."""
    found: dict[tuple[nn.Module, str], nn.Module] = {}
    for module in model.modules():
        if isinstance(module, lora.LoraLayer):
            name = module.parameter_name if isinstance(module, lora.layer.ParamWrapper) else "weight"
            found[module.get_base_layer(), name] = module
    return found


def _take_apart(model: nn.Module) -> None:
    """Put the modules back that an unfinished injection has replaced."""
    for parent in list(model.modules()):
        for leaf, child in parent._modules.items():
            while isinstance(child, BaseTunerLayer | ModulesToSaveWrapper):
                wrapped = isinstance(child, ModulesToSaveWrapper)
                child = parent._modules[leaf] = child.original_module if wrapped else child.base_layer


def _own_config(model: nn.Module, config: LoraConfig | peft.LoraConfig) -> LoraConfig:
    """PEFT's config as ours; what we do not serve is refused."""
    if isinstance(config, LoraConfig):
        return config
    odd = [name for name in _UNSERVED if getattr(config, name, None) not in (None, False)]
    if odd:
        raise BadOption(f"{', '.join(odd)} of PEFT's LoraConfig is not served here: use peft.get_peft_model")
    names = {f.name for f in dataclasses.fields(LoraConfig)}
    given: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    values = {name: value for name, value in given.items() if name in names}
    values["target_modules"] = _peft_targets(model, config)
    for name, value in values.items():
        if isinstance(value, set):
            values[name] = sorted(value)
    task = config.task_type
    values["task_type"] = task.value if isinstance(task, peft.TaskType) else task
    return LoraConfig.from_dict(values)


def _peft_targets(model: nn.Module, config: peft.LoraConfig) -> Any:
    """PEFT's choice where the config leaves the targets out: its table of architectures, then every Linear."""
    if config.target_modules is not None:
        return config.target_modules
    if config.target_parameters:
        return []
    kind = getattr(getattr(model, "config", None), "model_type", "")
    return TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(str(kind), "all-linear")


def _peft_config(model: nn.Module, config: LoraConfig, chosen: list[Target], inference: bool) -> peft.LoraConfig:
    """A config by which PEFT adapts exactly these weights, with these ranks and scales."""
    modules = {t.module: t.name for t in chosen if not _is_bare(t)}
    inside = {m.out_proj for m in modules if isinstance(m, nn.MultiheadAttention)}
    odd = {f"^{re.escape(t.name)}": t for t in chosen if (t.rank, t.alpha) != (config.r, config.lora_alpha)}
    bare = [target.name for target in chosen if _is_bare(target)]
    extra: dict[str, Any] = {"target_parameters": bare} if bare else {}
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=cast(int, config.lora_alpha),  # any number, in fact
        lora_dropout=config.lora_dropout,
        target_modules=[name for module, name in modules.items() if module not in inside],
        bias=config.bias,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=list(config.modules_to_save) if config.modules_to_save else None,
        rank_pattern={key: target.rank for key, target in odd.items()},
        alpha_pattern={key: target.alpha for key, target in odd.items()},
        fan_in_fan_out=any(matrix.is_conv1d(module) for module in modules),
        task_type=config.task_type or _task(model),
        inference_mode=inference,
        **extra,
    )


def _is_bare(target: Target) -> bool:
    """Whether PEFT must be given the parameter's name instead of the module's."""
    return not isinstance(target.module, nn.MultiheadAttention) and target.name.endswith(f".{target.parameter}")


def _task(model: nn.Module) -> str | None:
    """PEFT's task for a language model, which its generate() goes by."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if name.endswith("ForConditionalGeneration") else None
