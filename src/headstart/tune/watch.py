"""What watches a run while it trains: the progress bar, the lines of metrics.jsonl, and the wish to stop."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from headstart.errors import HeadstartError
from headstart.tune.folder import Folder, read_metrics


class Diverged(HeadstartError, ArithmeticError):
    """The loss is no number any more."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and did so after a checkpoint."""

    def __init__(self, checkpoint: str, step: int, command: str) -> None:
        super().__init__(f"stopped after step {step}; checkpoint {checkpoint}\nto go on: {command}")


class Recorder(TrainerCallback):
    """Every log line into metrics.jsonl as it happens, with the tokens per second of the steps alone.

    Attributes:
        seconds: spent in training steps, before an interruption and after; evaluation is not counted.
        tokens: trained on, likewise.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        trained = [line for line in read_metrics(folder.metrics) if "seconds" in line]
        self.seconds = float(trained[-1]["seconds"]) if trained else 0.0
        self.tokens = self._earlier = int(trained[-1]["num_tokens"]) if trained else 0
        self._began = time.perf_counter()
        self._logged = self.seconds, self.tokens

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._began
        if state.global_step >= state.max_steps:  # What the whole run came to is always told.
            control.should_log = True

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._record(state.global_step, logs)
        loss = logs.get("loss", logs.get("eval_loss", 0.0))
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} at step {state.global_step}: lower --learning-rate (now {args.learning_rate:g}), "
                "or try --dtype float32"
            )

    def _record(self, step: int, logs: dict[str, Any]) -> None:
        logs.pop("total_flos", None)
        if "num_tokens" in logs and "loss" in logs:  # TRL counts from zero in a resumed run.
            self.tokens = self._earlier + int(logs["num_tokens"])
            logs |= {"num_tokens": self.tokens, "seconds": round(self.seconds, 2)}
            seconds, tokens = self._logged
            logs["tokens_per_second"] = round((self.tokens - tokens) / max(self.seconds - seconds, 1e-9), 1)
            self._logged = self.seconds, self.tokens
        with self.folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **logs}) + "\n")


class Progress(ProgressCallback):
    """transformers' bar, with the loss and the tokens per second beside it instead of a line for each log."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self.training_bar.update(state.global_step)
            self.current_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, shown in (("loss", "loss"), ("eval_loss", "held out"), ("tokens_per_second", "tok/s")):
            if logs and name in logs:
                self._shown[shown] = f"{logs[name]:.0f}" if shown == "tok/s" else f"{logs[name]:.3f}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._shown)


class Lines(TrainerCallback):
    """The same for a log file: about twenty lines a run, and one for each evaluation."""

    def __init__(self) -> None:
        self._next = 0

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        text = f"step {state.global_step}/{state.max_steps}"
        if "eval_loss" in logs:
            print(f"{text}  held out {logs['eval_loss']:.3f}", file=sys.stderr, flush=True)
        elif "loss" in logs and state.global_step >= self._next:
            self._next = state.global_step + max(1, state.max_steps // 20)
            text += f"  loss {logs['loss']:.3f}  {logs['tokens_per_second']:.0f} tok/s"
            print(text, file=sys.stderr, flush=True)


class Interruption(TrainerCallback):
    """Ctrl-C and SIGTERM end a run after the step under way, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the two signals, and give them back whatever happens."""
        if threading.current_thread() is not threading.main_thread():  # Only the main thread may ask for signals.
            yield
            return
        heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._hear) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step (again: at once)", file=sys.stderr, flush=True)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._agreed(args) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.stopped = True

    def _agreed(self, args: TrainingArguments) -> bool:
        """All processes stop at one step, whichever of them heard the signal."""
        if args.world_size == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=args.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked.item())
