"""TRL's trainer for a run: what each field of the config is called there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PrinterCallback, TrainerState
from trl import SFTConfig, SFTTrainer

from headstart.errors import BadOption, DataError, UnsupportedLayer
from headstart.lora.optim import PreconditionedAdamW, lora_plus_groups, preconditioned_groups
from headstart.tune import data
from headstart.tune.folder import Folder
from headstart.tune.recipe import RunConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Trainer(SFTTrainer):
    """SFTTrainer without the model card that it drafts into every checkpoint.

    Attributes:
        left_out: rows in which truncation left no token with a loss.
    """

    left_out = 0

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Ours is written once, beside the finished adapter."""

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """As transformers has it, but for a run of one step: a warm-up begins at zero, so it would learn nothing."""
        if num_training_steps == 1:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The moments and the place on the schedule are the checkpoint's; rates, decay and damping are this run's.

        Raises:
            BadOption: if the checkpoint is of another optimizer.
        """
        if checkpoint is None or self.optimizer is None:
            return
        own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.optimizer.param_groups]
        schedule: Any = self.lr_scheduler
        rates = list(schedule.base_lrs)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as problem:
            raise BadOption(
                f"{checkpoint!r} is of another optimizer ({problem}): pass the --optimizer that its run had"
            ) from None
        schedule.base_lrs = rates
        here = [rate * at(schedule.last_epoch) for rate, at in zip(rates, schedule.lr_lambdas, strict=True)]
        schedule._last_lr = here  # which the log of the next step states
        for group, kept, rate in zip(self.optimizer.param_groups, own, here, strict=True):
            group.update(kept, lr=rate)

    def stand_at(self, checkpoint: Path) -> None:
        """Be where a run ended whose last step this checkpoint holds: `train` would take one more."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.callback_handler.on_train_end(self.args, self.state, self.control)


def build_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: data.Rows,
    config: RunConfig,
    resuming: bool = False,
) -> Trainer:
    """TRL's trainer for this run, with our progress instead of its own.

    Raises:
        UnsupportedLayer, DataError: where TRL cannot train this.
    """
    _check(model)
    evaluates = rows.held_out is not None
    arguments = SFTConfig(
        output_dir=str(Folder(Path(config.output)).checkpoints),
        num_train_epochs=config.epochs,
        max_steps=config.steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=float(config.learning_rate),
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        max_length=config.max_length,
        packing=config.packing,
        eval_packing=False,
        assistant_only_loss=rows.assistant_only,
        gradient_checkpointing=config.gradient_checkpointing,
        # The weights have the dtype of the run and the factors stay float32; autocast would only add casts.
        bf16=False,
        use_cpu=not torch.accelerator.is_available(),  # Or processes on CPUs would not know of each other.
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval_every or 0.1,
        eval_on_start=evaluates and not resuming,
        save_steps=config.save_every or 0.1,
        save_total_limit=2,
        report_to=config.report_to,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=_optimizer(model, config, arguments),
    )
    trainer.remove_callback(PrinterCallback)
    prepared = len(cast(Dataset, trainer.train_dataset))
    trainer.left_out = 0 if config.packing else len(rows.train) - prepared
    if prepared == 0 or (evaluates and len(cast(Dataset, trainer.eval_dataset)) == 0):
        raise DataError(f"no row has a token to learn within max_length={config.max_length}: raise --max-length")
    return trainer


def tokenized(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    assistant_only: bool,
    config: RunConfig,
) -> Iterable[dict[str, Tensor]]:
    """Batches as the trainer makes them, for a model that is not trained: padded, not packed, with labels.

    Raises:
        DataError: if every row is longer than what fits.
    """
    arguments = SFTConfig(
        output_dir=str(Folder(Path(config.output)).checkpoints),
        per_device_train_batch_size=config.batch_size,
        max_length=config.max_length,
        assistant_only_loss=assistant_only,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=False,
        use_cpu=not torch.accelerator.is_available(),  # Or processes on CPUs would not know of each other.
        seed=config.seed,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    own = vars(model).get("forward")
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    if own is None:
        vars(model).pop("forward", None)  # TRL's, which it gives every model that it trains.
    if not len(cast(Dataset, trainer.train_dataset)):  # Refused before torch's loader does, in other words.
        raise DataError(f"no row has a token to learn within max_length={config.max_length}: raise --max-length")
    return cast("Iterable[dict[str, Tensor]]", trainer.get_train_dataloader())


def _optimizer(model: PeftModel, config: RunConfig, arguments: SFTConfig) -> tuple[type[Optimizer], Any] | None:
    """The optimizer and its arguments, the parameter groups among them; None for the trainer's own AdamW."""
    rate, decay = float(config.learning_rate), config.weight_decay
    if config.optimizer == "adamw":
        return None
    if config.optimizer == "preconditioned":
        groups = preconditioned_groups(model, rate, decay)
        return PreconditionedAdamW, {"params": groups, "damping": config.damping}
    adamw, settings = SFTTrainer.get_optimizer_cls_and_kwargs(arguments)
    return adamw, {**settings, "params": lora_plus_groups(model, rate, config.lora_plus_ratio, weight_decay=decay)}


def _check(model: PeftModel) -> None:
    """Refuse in our words, and before anything is written, what TRL and transformers would refuse."""
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise UnsupportedLayer(
            "TRL reads the head's weight past its adapter, which would never train: take the head out of "
            "target_modules, or put it into modules_to_save"
        )


def trainable_line(model: PeftModel) -> str:
    """In PEFT's own words."""
    trainable, total = model.get_nb_trainable_parameters()
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}"
