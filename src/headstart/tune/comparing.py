"""`headstart compare`: starts on a language model and a dataset, from names to a finished comparison.

The data is read, split and tokenised as `headstart tune` does it; the runs are `headstart.compare`'s.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from headstart.choose.advise import advise
from headstart.choose.compare import compare
from headstart.choose.trials.comparison import Comparison
from headstart.errors import BadOption, DataError, FileError
from headstart.lora import batches as reading
from headstart.lora.config import LoraConfig
from headstart.lora.optim import PreconditionedAdamW, lora_plus_groups, preconditioned_groups
from headstart.tune import data, models
from headstart.tune.calibration import other
from headstart.tune.recipe import RunConfig
from headstart.tune.trainer import tokenized

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST = 10_000  # steps of a run
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Question:
    """What is to be compared.

    Attributes:
        inits: the starts, by name; the first is the baseline. A name that stands twice makes two arms.
        ranks: to cross them with; left out, the run's own.
        rates, steps, seeds, budget, storage: as `headstart.compare` takes them.
        out: folder to write; command: what was typed.
    """

    inits: Sequence[str]
    ranks: Sequence[int] = ()
    rates: Sequence[float] | None = None
    steps: int | None = None
    seeds: int | None = None
    budget: str | None = None
    storage: str | None = None
    out: str = "headstart-compare"
    command: str = ""


def run(question: Question, config: RunConfig, say: Say, watch: Callable[[str, int, int], None]) -> Comparison:
    """Compare, and write results.json and report.html.

    Raises:
        HeadstartError: before anything is trained, where a name, the model or the data cannot be used.
    """
    if config.gradient_accumulation > 1:
        raise BadOption(
            "compare trains one batch a step: set gradient_accumulation to 1 and batch_size as memory allows"
        )
    arms = arms_of(question, config)
    out = Path(question.out)
    _check_folder(out, question.command)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    source = models.find(config.model)
    models.check_causal(source)
    config = config.model_copy(update={"dtype": models.trained_dtype(source, config.dtype)})
    tokenizer = models.tokenizer_of(models.unpacked(source))
    rows, tuned, judged = _rows(config, tokenizer, question.steps)
    say(f"data: {config.data}: {len(rows.train):,} rows to train on, {tuned + judged} batches held out")
    model = models.load(source, config.dtype, whole=True)
    models.check_length(model, config.max_length)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = _Batches.of(model, tokenizer, rows.train, rows.assistant_only, config)
    held_out = _Batches.of(model, tokenizer, rows.held_out, rows.assistant_only, config)
    if len(held_out) < 2:
        raise DataError(f"{len(held_out)} batch is held out, and two are needed: give --eval-data, or more data")
    tuned = max(1, min(tuned, len(held_out) // 3))
    found = compare(
        model,
        loss,
        lambda seed: batches.shuffled(seed, question.steps or LONGEST),
        held_out.first(judged, tuned),
        arms,
        steps=question.steps,
        seeds=question.seeds,
        rates=question.rates,
        budget=question.budget,
        storage=question.storage or _database(out),
        preserve=_preserved(model, tokenizer, config, judged),
        tuning=held_out.first(tuned),
        optimizer=_optimizer(config),
        calibration_batches=config.calibration_batches,
        facts=_facts(question, config, source, rows) | _chosen(arms),
        say=say,
        watch=watch,
    )
    found.save(out)
    return found


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """A language model's own loss, and the tokens that it is the mean of."""
    return model(**batch, use_cache=False).loss, reading.labelled(model, batch)


def arms_of(question: Question, config: RunConfig) -> dict[str, LoraConfig]:
    """The arms by name, the baseline first.

    Raises:
        ConfigError: if a name is no start, or a rank no rank.
    """
    ranks = question.ranks or [config.r]
    arms: dict[str, LoraConfig] = {}
    for rank in ranks:
        for init in question.inits:
            if init == "auto":
                arms.setdefault("auto", _advised(question, config))
                continue
            fields = {**config.lora(), "init_lora_weights": init, "r": rank}
            if "lora_alpha" not in config.model_fields_set:
                fields["lora_alpha"] = rank  # So that s = 1 at every rank.
            if init != config.init:
                fields["init_options"] = {}
            name = init if len(ranks) == 1 else f"{init} r={rank}"
            count = sum(other.partition(" #")[0] == name for other in arms)
            arms[f"{name} #{count + 1}" if count else name] = LoraConfig(**fields, task_type="CAUSAL_LM")
    if len(arms) < 2:
        raise BadOption("there is one arm: name at least two starts in --inits, as kaiming,pissa")
    return arms


def _advised(question: Question, config: RunConfig) -> LoraConfig:
    """What `headstart advise` recommends: init, rank, scaling and targets together."""
    file = config.data if Path(config.data).expanduser().is_file() else None
    settled = {name: getattr(config, name) for name in ("batch_size", "max_length", "dtype")}
    advice = advise(config.model, file, preserve=config.preserve or False, steps=question.steps, timed=False, **settled)
    return advice.best.lora_config(task_type="CAUSAL_LM")


def _rows(config: RunConfig, tokenizer: PreTrainedTokenizerBase, steps: int | None) -> tuple[data.Rows, int, int]:
    """The rows, and how many batches to tune and to judge on: as many as leave nine tenths of the time to training."""
    tuned = min(8, max(2, round(0.06 * (steps or 100))))
    changes: dict[str, Any] = {"eval_rows": 3 * tuned * config.batch_size}
    if "eval_fraction" not in config.model_fields_set:
        changes["eval_fraction"] = 0.2
    rows = data.prepare(config.model_copy(update=changes), tokenizer)
    if rows.held_out is None:
        raise DataError("nothing is held out to judge on: give --eval-data, or an eval_fraction above 0")
    return rows, tuned, 2 * tuned


class _Batches(Sequence[Any]):
    """Tokenised rows as batches, made when they are asked for."""

    def __init__(self, rows: Dataset, collate: Callable[[list[Any]], Any], order: Sequence[int], size: int) -> None:
        self.rows, self.collate, self.order, self.size = rows, collate, order, size

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Any, only: bool, config: RunConfig
    ) -> _Batches:
        loader: Any = tokenized(model, tokenizer, rows, only, config)
        size = min(config.batch_size, len(loader.dataset))
        return cls(loader.dataset, loader.collate_fn, range(len(loader.dataset)), size)

    def __len__(self) -> int:
        return len(self.order) // self.size

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(place)
        chosen = self.order[place * self.size : (place + 1) * self.size]
        return dict(self.collate([self.rows[i] for i in chosen]))

    def first(self, count: int, skipped: int = 0) -> list[Any]:
        """At most so many batches, made now."""
        return [self[i] for i in range(skipped, min(len(self), skipped + count))]

    def shuffled(self, seed: int, steps: int) -> _Batches:
        """The rows in a seed's own order, anew in every epoch, for so many steps."""
        epochs = math.ceil(steps * self.size / len(self.rows))
        generator = torch.Generator().manual_seed(seed)
        order = torch.cat([torch.randperm(len(self.rows), generator=generator) for _ in range(epochs)]).tolist()
        return _Batches(self.rows, self.collate, order, self.size)


def _preserved(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig, count: int
) -> list[Any] | None:
    """Batches of what is not to be forgotten."""
    if config.preserve is None:
        return None
    rows = other(config.preserve, config, tokenizer)
    return _Batches.of(model, tokenizer, rows.train, rows.assistant_only, config).first(2 * count)


def _optimizer(config: RunConfig) -> Callable[[nn.Module, float], Optimizer]:
    def make(model: nn.Module, rate: float) -> Optimizer:
        decay = config.weight_decay
        if config.optimizer == "lora_plus":
            return torch.optim.AdamW(lora_plus_groups(model, rate, config.lora_plus_ratio, weight_decay=decay))
        if config.optimizer == "preconditioned":
            return PreconditionedAdamW(preconditioned_groups(model, rate, decay), damping=config.damping)
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=decay)

    return make


def _optimizer_in_words(config: RunConfig) -> str:
    """With what it is set to, for this is a part of the question."""
    own = {"lora_plus": f", ratio {config.lora_plus_ratio:g}", "preconditioned": f", damping {config.damping:g}"}
    return f"{config.optimizer}, weight decay {config.weight_decay:g}{own.get(config.optimizer, '')}"


def _check_folder(out: Path, command: str) -> None:
    """Refuse a folder that holds another comparison."""
    results = out / "results.json"
    if not results.is_file():
        return
    try:
        held = json.loads(results.read_text(encoding="utf-8")).get("facts", {}).get("command")
    except (OSError, json.JSONDecodeError, AttributeError):
        held = None
    if held != command:
        raise FileError(f"{str(out)!r} holds another comparison ({held or 'of Python'}): choose another --out")


def _database(out: Path) -> str:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise FileError(f"cannot write to {str(out)!r} ({problem.strerror}): choose another --out") from None
    return f"sqlite:///{out.resolve() / 'study.db'}"


def _chosen(arms: Mapping[str, LoraConfig]) -> dict[str, str]:
    """What `auto` stands for."""
    if "auto" not in arms:
        return {}
    config = arms["auto"]
    scaling = "rsLoRA" if config.use_rslora else "plain"
    return {"auto is": f"{config.strategy.name}, r = {config.r}, α = {config.lora_alpha:g} ({scaling} scaling)"}


def _facts(question: Question, config: RunConfig, source: models.Source, rows: data.Rows) -> dict[str, Any]:
    """What the report shows of the model and the data."""
    targets = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)
    name, told = Path(source.name).name, Path(config.data).stem if Path(config.data).suffix else config.data
    return {
        "title": f"Which start for {name} on {told}?",
        "model": source.name,
        "data": config.data,
        "loss on": rows.loss_on,
        "batch": f"{config.batch_size} rows of at most {config.max_length} tokens",
        "targets": targets,
        "rank": ", ".join(map(str, question.ranks or [config.r])),
        "dtype": config.dtype,
        "optimizer": _optimizer_in_words(config),
        "command": question.command,
    }
