"""One run from its config to its folder: TRL's trainer, with our start."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback, TrainerState

import headstart
from headstart.files.atomic import write_text
from headstart.lora.config import LoraConfig
from headstart.peft import get_peft_model
from headstart.tune import card, data, models
from headstart.tune.auto import followed
from headstart.tune.beforehand import check
from headstart.tune.calibration import calibrated
from headstart.tune.folder import Folder, read_metrics, write_folder
from headstart.tune.plot import plot_losses
from headstart.tune.rate import AUTO, searched, settled
from headstart.tune.recipe import RunConfig
from headstart.tune.trainer import Trainer, build_trainer, trainable_line
from headstart.tune.watch import Interrupted, Interruption, Lines, Progress, Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from headstart.peft.model import ShellModel

Say = Callable[[str], None]


@dataclass(frozen=True)
class Finished:
    """What a run came to.

    Attributes:
        output: its folder; steps: all of them, also those before an interruption.
        trainable, total: parameters.
        loss: of the last log; held_out_before, held_out_after: at step 0 and at the end, where data was held out.
        seconds, tokens: of training; evaluation is not counted.
    """

    output: str
    steps: int
    trainable: int
    total: int
    loss: float | None
    held_out_before: float | None
    held_out_after: float | None
    seconds: float
    tokens: int

    def __str__(self) -> str:
        rate = self.tokens / self.seconds if self.seconds else 0.0
        steps = f"{self.steps} step{'s' if self.steps != 1 else ''}"
        lines = [f"{steps}, {self.tokens:,} tokens in {self.seconds:.0f} s: {rate:,.0f} tokens/s"]
        if self.held_out_after is not None:
            before = "" if self.held_out_before is None else f"{self.held_out_before:.3f} → "
            lines.append(f"held-out loss {before}{self.held_out_after:.3f}")
        names = ("adapter/", "run.yaml", "metrics.jsonl", "loss.png")
        return "\n".join([*lines, "wrote " + "  ".join(str(Path(self.output)) + "/" + name for name in names)])


def run(config: RunConfig, say: Say = print, watchers: Sequence[TrainerCallback] = ()) -> Finished:
    """Fine-tune, and write `config.output`.

    Args:
        config: the run.
        say: gets each line for the reader; progress goes to stderr.
        watchers: further callbacks of transformers' Trainer.

    Raises:
        HeadstartError: before anything is written, where the config, the model or the data cannot be used.
        Interrupted: after a checkpoint, where Ctrl-C or SIGTERM asked for it.
    """
    folder = Folder(Path(config.output))
    config = followed(config, folder)
    lora = LoraConfig(**config.lora(), task_type="CAUSAL_LM")
    check(config, lora)
    source = models.find(config.model)
    checkpoint = folder.start(config)
    goes_on = checkpoint is not None and config.resume is None
    if goes_on:
        config = _as_begun(config, folder.recorded())
    config = config.model_copy(update={"dtype": models.trained_dtype(source, config.dtype)})
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    is_main = int(os.environ.get("RANK", 0)) == 0
    say = say if is_main else lambda line: None
    with folder.locked() if is_main else nullcontext():
        tokenizer, rows = _ingredients(config, source)
        say(f"data: {config.data}: {rows}")
        if config.advice is not None:
            say(config.advice)
        base = models.load(source, config.dtype, whole=True)
        models.check_length(base, config.max_length)
        known = calibrated(base, tokenizer, rows, config, lora, progress=is_main and sys.stderr.isatty())
        if known is not None:
            say(f"calibration: {known}")
        model = get_peft_model(base, lora, calibration=known)
        del known  # Of no use any more, and as large as the adapter or larger.
        say(trainable_line(model))
        if config.learning_rate == AUTO:
            config = settled(config, searched(model, tokenizer, rows, config))
            say(str(config.advice))
        if is_main:
            folder.check_space(_size_of(model))
        trainer = build_trainer(model, tokenizer, rows, config, resuming=checkpoint is not None)
        if missing := trainer.left_out:
            say(f"{missing} rows are left out: their prompt alone fills max_length={config.max_length}")
        if checkpoint is not None:
            say(f"going on from {checkpoint}")
        recorder = _train(trainer, config, folder, checkpoint, watchers)
        finished = _finished(trainer, recorder, config)
        if trainer.is_world_process_zero():
            plot_losses(read_metrics(folder.metrics), folder.plot, title=f"{Path(source.name).name}, {config.init}")
            write_folder(folder.adapter, lambda path: _save(path, model, config, source, finished))
        trainer.accelerator.wait_for_everyone()
    return finished


def _as_begun(config: RunConfig, before: RunConfig) -> RunConfig:
    """An interrupted run goes on with what `auto` had found."""
    update: dict[str, object] = {"dtype": before.dtype} if config.dtype == "auto" else {}
    if config.learning_rate == AUTO:
        update |= {"learning_rate": before.learning_rate, "advice": before.advice}
    return config.model_copy(update=update)


def _ingredients(config: RunConfig, source: models.Source) -> tuple[PreTrainedTokenizerBase, data.Rows]:
    tokenizer = models.tokenizer_of(models.unpacked(source))
    return tokenizer, data.prepare(config, tokenizer)


def _size_of(model: ShellModel) -> int:
    """Bytes of two checkpoints with Adam's moments, and of an adapter, all of which may carry anchors."""
    return 4 * (2 * (2 + 2) + 2) * model.get_nb_trainable_parameters()[0]


def _train(
    trainer: Trainer, config: RunConfig, folder: Folder, checkpoint: Path | None, watchers: Sequence[TrainerCallback]
) -> Recorder:
    """Train to the end, or to a checkpoint where somebody asked to stop."""
    if trainer.is_world_process_zero():
        _begin(folder, config, checkpoint)
    interruption, recorder = Interruption(), Recorder(folder)
    for watcher in (recorder, interruption, Progress() if sys.stderr.isatty() else Lines(), *watchers):
        trainer.add_callback(watcher)
    with interruption.listening():
        if checkpoint is not None and _is_last(checkpoint, config):
            trainer.stand_at(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if interruption.stopped:
        command = f"headstart tune --config {folder.recipe}"
        raise Interrupted(str(folder.last_checkpoint()), trainer.state.global_step, command)
    if trainer.eval_dataset is not None and not _evaluated_last(trainer):
        trainer.evaluate()
    return recorder


def _is_last(checkpoint: Path, config: RunConfig) -> bool:
    """Whether nothing is left to train: the run died between its last step and its adapter."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    # What was gone on from by name may be the beginning of a longer run.
    end = config.steps or (state.max_steps if config.resume is None else None)
    return end is not None and state.global_step >= end


def _begin(folder: Folder, config: RunConfig, checkpoint: Path | None) -> None:
    """Write the resolved config, and keep of the metrics what the checkpoint knows."""
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1
    kept = config.model_copy(update={"resume": None})  # Or the next interruption would go on from the same place.
    write_text(folder.recipe, kept.to_yaml(f"headstart {headstart.__version__}: headstart tune --config run.yaml"))
    folder.rewind_metrics(step)


def _evaluated_last(trainer: Trainer) -> bool:
    return any("eval_loss" in line and line["step"] == trainer.state.global_step for line in trainer.state.log_history)


def _finished(trainer: Trainer, recorder: Recorder, config: RunConfig) -> Finished:
    lines = read_metrics(recorder.folder.metrics) if trainer.is_world_process_zero() else trainer.state.log_history
    losses = [line["loss"] for line in lines if "loss" in line]
    held_out = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    trainable, total = trainer.accelerator.unwrap_model(trainer.model).get_nb_trainable_parameters()
    return Finished(
        output=config.output,
        steps=trainer.state.global_step,
        trainable=trainable,
        total=total,
        loss=losses[-1] if losses else None,
        held_out_before=held_out.get(0),
        held_out_after=held_out.get(trainer.state.global_step),
        seconds=round(recorder.seconds, 1),
        tokens=recorder.tokens,
    )


def _save(path: Path, model: ShellModel, config: RunConfig, source: models.Source, finished: Finished) -> None:
    """The adapter in PEFT's format, and its card."""
    model.save_pretrained(path)
    write_text(path / "README.md", card.write(config, source, finished, str(model.init_reports["default"])))
