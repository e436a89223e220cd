"""What a stranger's config and metadata may say: each field of the kind that it must be, or refused by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from headstart.errors import AdapterFormatError, nearest

VERSION = 1
_Check = Callable[[Any], bool]


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _rank(value: Any) -> bool:
    return _integer(value) and 0 < value < 1 << 31


def _number(value: Any) -> bool:
    # Not math.isfinite, which overflows on the long integers that JSON may hold.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _probability(value: Any) -> bool:
    return _number(value) and 0 <= value < 1


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _list(check: _Check) -> _Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _table(check: _Check) -> _Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _range(value: Any) -> bool:
    return _list(_integer)(value) and len(value) == 2


def _recipe(value: Any) -> bool:
    kinds = {"bits": _rank, "quant_type": _text, "blocksize": _integer, "nested": _flag}
    tables = {"samples": _table(_list(_number)), "taken": _list(_text)}
    checks = {**kinds, **tables}
    return isinstance(value, dict) and all(check(value.get(name)) for name, check in checks.items())


_CONFIG: dict[str, tuple[_Check, str]] = {
    "r": (_rank, "a positive integer"),
    "lora_alpha": (_number, "a finite number; without it the scale is unknown"),
    "lora_dropout": (_probability, "a probability below 1"),
    "use_dora": (_flag, "true or false"),
    "use_rslora": (_flag, "true or false"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "rank_pattern": (_table(_rank), "a table of positive integers"),
    "alpha_pattern": (_table(_number), "a table of finite numbers"),
    "modules_to_save": (_list(_text), "a list of names"),
    "target_parameters": (_list(_text), "a list of names"),
    "task_type": (_text, "a word"),
}
_REQUIRED = ("r", "lora_alpha")
_ORIGIN: dict[str, tuple[_Check, str]] = {
    "format": (lambda value: _rank(value) and value <= VERSION, f"at most {VERSION}: upgrade headstart to read it"),
    "strategy": (_text, "a word"),
    "options": (_table(lambda value: True), "a table"),
    "seed": (_integer, "an integer"),
    "anchored": (_table(_rank), "a table of ranks"),
    "frozen": (_table(lambda value: value in ("A", "B", "AB")), "a table of 'A', 'B' or 'AB'"),
    "parts": (_table(_list(_range)), "a table of row ranges"),
    "base": (_table(_list(lambda value: isinstance(value, int | float))), "a table of lists of numbers"),
    "quantized": (_list(_recipe), "a list of recipes"),
    "cores": (_list(_text), "a list of names"),
    "adapter_config": (_table(lambda value: True), "a table"),
}
# Fields that change what the tensors mean, and that we do not serve: silence would be a wrong function.
UNSERVED = (
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
)
# Fields that say where the tensors came from, or what their names say already.
_SILENT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dtype",  # these three of ms-swift's: what the factors trained in, and rates
    "lora_ga_config",
    "lorap_emb_lr",
    "lorap_lr_ratio",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
)
# Starts of PEFT that replace the base's weights: A and B alone do not say what the adapter means.
_MUTATING = re.compile(r"pissa|pissa_niter_\d+|olora|corda|lora_ga|loftq")
_MEANING = re.compile(r"init|lora|dora|alpha|rank|scal")


def check_config(config: Mapping[str, Any], path: Path, ours: bool) -> None:
    """Refuse a config that is no plain LoRA's, or whose fields cannot be meant.

    Args:
        config: what the file says; path: where it stands; ours: whether headstart wrote it.
    """
    if config.get("peft_type") != "LORA":
        raise AdapterFormatError(f"{path} is of type {config.get('peft_type')!r}: only LORA adapters are read")
    for name, (check, wanted) in _CONFIG.items():
        value = config.get(name)
        # PEFT writes null for what is not set.
        if not check(value) and (value is not None or name in _REQUIRED):
            raise AdapterFormatError(f"{path}: {name!r} is {_short(value)}, not {wanted}")
    for name in UNSERVED:
        if config.get(name):
            raise AdapterFormatError(f"{path}: {name}={config[name]!r} is not served: load it with PEFT")
    check_start(config, path, ours)
    for table in ("rank_pattern", "alpha_pattern"):
        for key in config.get(table) or {}:
            _check_pattern(key, path)
    for name in config:
        _check_unknown(name, config[name], path)


def check_start(config: Mapping[str, Any], path: Path, ours: bool) -> None:
    """Refuse factors that stand on weights which their start replaced."""
    if is_mutating(config, ours):
        raise AdapterFormatError(
            f"{path}: a start with {config['init_lora_weights']!r} replaced the base's weights, and these factors mean "
            "nothing on the original base. Convert it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def is_mutating(config: Mapping[str, Any], ours: bool) -> bool:
    """Whether the factors stand on weights that their start replaced. Ours never do."""
    init = config.get("init_lora_weights", True)
    return not ours and isinstance(init, str) and _MUTATING.fullmatch(init.lower()) is not None


def check_origin(origin: Mapping[str, Any], where: str) -> None:
    """Refuse metadata whose fields cannot be meant."""
    for name, (check, wanted) in _ORIGIN.items():
        if name in origin and not check(origin[name]):
            raise AdapterFormatError(f"{where}: {name!r} is {_short(origin[name])}, not {wanted}")


def _check_unknown(name: str, value: Any, path: Path) -> None:
    """A field of a version to come: it may pass where it is empty, or where its name says nothing of our matter."""
    known = (*_CONFIG, *UNSERVED, *_SILENT)
    if name in known or not value:
        return
    near = nearest(name, known, count=1)
    if near or _MEANING.search(name):
        raise AdapterFormatError(f"{path}: {name!r} is {_short(value)}, and unknown: it may change the function{near}")
    warnings.warn(f"{path}: the unknown field {name!r} is ignored", stacklevel=2)


def _check_pattern(key: str, path: Path) -> None:
    """A pattern from a file: short, and without the repetition that takes for ever to match."""
    if len(key) > 300 or re.search(r"\)\s*[*+{?]", key) or len(re.findall(r"[*+?{]", key)) > 3:
        raise AdapterFormatError(f"{path}: the pattern {key[:60]!r} is too complex to be trusted")
    try:
        re.compile(key)
    except re.error as error:
        raise AdapterFormatError(f"{path}: the pattern {key!r} is malformed: {error}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
