"""PEFT's config as ours, and ours as the PEFT config that adapts exactly the same weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import peft
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from headstart.errors import BadOption
from headstart.files.fields import UNSERVED, check_start
from headstart.lora import matrix
from headstart.lora.config import LoraConfig
from headstart.lora.layers import Start
from headstart.lora.targets import Target

# Fields of PEFT's config that we do not serve: what no file may say, and what changes nothing in a file.
_UNSERVED = (*UNSERVED, "ensure_weight_tying", "inference_mode")


def own_config(model: nn.Module, config: LoraConfig | peft.LoraConfig) -> LoraConfig:
    """PEFT's config as ours.

    Raises:
        BadOption: if it asks for what we do not serve.
    """
    if isinstance(config, LoraConfig):
        if config.parts:
            raise BadOption("PEFT has no fused parts: use headstart.adapt for `parts`, or target the whole projection")
        return config
    given: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    odd = [name for name in _UNSERVED if given.get(name)]
    if odd:
        raise BadOption(f"{', '.join(odd)} of PEFT's LoraConfig is not served here: use peft.get_peft_model")
    _check_own_options(config)
    given["target_modules"] = _targets(model, config)
    task = config.task_type
    given["task_type"] = task.value if isinstance(task, peft.TaskType) else task
    names = {f.name for f in dataclasses.fields(LoraConfig)}
    values = {name: value for name, value in given.items() if name in names}
    return LoraConfig.from_dict({n: sorted(v) if isinstance(v, set) else v for n, v in values.items()})


def _check_own_options(config: peft.LoraConfig) -> None:
    """PEFT has a config for each of its starts, and its defaults come by themselves: what differs was meant."""
    for name in ("eva_config", "corda_config", "lora_ga_config", "loftq_config"):
        said = getattr(config, name, None)
        if isinstance(said, Mapping):  # PEFT keeps LoftQ's as a table
            values, usual = said, vars(peft.LoftQConfig()) if name == "loftq_config" else said
        else:
            values, usual = ({}, {}) if said is None else (vars(said), vars(type(said)()))
        if odd := {key: value for key, value in values.items() if value != usual.get(key)}:
            told = ", ".join(f"{key}={value!r}" for key, value in odd.items())
            raise BadOption(
                f"{name} says {told}, which headstart does not read: leave it out, and give init_options instead "
                f"(`headstart explain {name.removesuffix('_config')}` names them)"
            )


def check_loaded(config: peft.LoraConfig, folder: str) -> None:
    """Before an adapter's own values are put into it: how it was started is past, unless that changed the base.

    Raises:
        AdapterFormatError: if its factors mean nothing on the original base.
    """
    check_start({"init_lora_weights": config.init_lora_weights}, Path(folder), ours=False)
    if config.init_lora_weights != "mica" or config.inference_mode:  # whose B does not train
        config.init_lora_weights = True


def _targets(model: nn.Module, config: peft.LoraConfig) -> Any:
    """PEFT's choice where the config leaves the targets out: its table of architectures, then every Linear."""
    if config.target_modules is not None:
        return config.target_modules
    if config.target_parameters:
        return []
    kind = getattr(getattr(model, "config", None), "model_type", "")
    return TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(str(kind), "all-linear")


def peft_config(
    model: nn.Module, config: LoraConfig, starts: Sequence[tuple[Target, Start]], inference: bool = False
) -> peft.LoraConfig:
    """A config by which PEFT adapts these weights and no others, with these ranks and scales."""
    _check_kept(model, config)
    chosen = [target for target, _ in starts]
    modules = {t.module: t.name for t in chosen if not is_bare(t)}
    inside = {m.out_proj for m in modules if isinstance(m, nn.MultiheadAttention)}
    usual = (config.r, config.lora_alpha)
    odd = {t.name: s for t, s in starts if t.module not in inside and (s.rank, s.alpha) != usual}
    bare = [target.name for target in chosen if is_bare(target)]
    extra: dict[str, Any] = {"target_parameters": bare} if bare else {}
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=cast(int, config.lora_alpha),  # any number, in fact
        lora_dropout=config.lora_dropout,
        target_modules=_exactly([name for module, name in modules.items() if module not in inside], model),
        bias=config.bias,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=list(config.modules_to_save) if config.modules_to_save else None,
        rank_pattern={f"^{re.escape(name)}": start.rank for name, start in odd.items()},
        alpha_pattern={f"^{re.escape(name)}": start.alpha for name, start in odd.items()},
        fan_in_fan_out=any(matrix.is_conv1d(module) for module in modules),
        task_type=config.task_type or _task(model),
        inference_mode=inference,
        **extra,
    )


def is_bare(target: Target) -> bool:
    """Whether PEFT must be given the parameter's name instead of the module's."""
    return not isinstance(target.module, nn.MultiheadAttention) and target.name.endswith(f".{target.parameter}")


def _exactly(names: list[str], model: nn.Module) -> list[str] | str:
    """The names as a list, or, where PEFT would take one for the end of another module's name, as an expression."""
    ends = tuple(f".{name}" for name in names)
    others = {name for name, _ in model.named_modules()} - set(names)
    return "|".join(map(re.escape, names)) if any(name.endswith(ends) for name in others) else names


def _check_kept(model: nn.Module, config: LoraConfig) -> None:
    """PEFT goes by the end of a name, dot or no dot: "head" would train "lm_head" too, which may be meant."""
    wanted = config.modules_to_save or ()
    for name, _ in model.named_modules():
        odd = [kept for kept in wanted if name.endswith(kept)]
        if odd and not any(name == kept or name.endswith(f".{kept}") for kept in wanted):
            raise BadOption(
                f"modules_to_save {odd[0]!r} means {name!r} too in PEFT: write more of its name, or name both"
            )


def _task(model: nn.Module) -> str | None:
    """PEFT's task for a language model, which its generate() goes by."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if name.endswith("ForConditionalGeneration") else None
