"""The folder of a run: what lies where, whose turn it is, and writes that are there whole or not at all.

run.yaml        the resolved config
metrics.jsonl   one line a log, as it happens
checkpoints/    what an interrupted run goes on from
loss.png
adapter/        PEFT's format and a model card; written last, so that its presence means: finished
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.errors import BadOption, FileError, OutputBusy
from headstart.files.atomic import write_text
from headstart.files.folder import write_folder
from headstart.tune.recipe import RunConfig, read, resolve

__all__ = ["FREE_TO_CHANGE", "Folder", "read_metrics", "write_folder"]

# What a resumed run may change without ending elsewhere than the uninterrupted one.
FREE_TO_CHANGE = {"advice", "output", "resume", "report_to", "threads", "save_every", "log_every", "eval_every"}


@dataclass(frozen=True)
class Folder:
    """Where a run writes."""

    path: Path

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def recipe(self) -> Path:
        return self.path / "run.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written whole: the trainer's state is the last file of one."""
        whole = [path.parent for path in self.checkpoints.glob("checkpoint-*/trainer_state.json")]
        return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def start(self, config: RunConfig) -> Path | None:
        """The checkpoint to go on from, or None for a run from the beginning. Nothing is written.

        Raises:
            FileError: if the folder holds a finished run, or the checkpoint asked for is none.
            BadOption: if it holds an interrupted run of another config.
        """
        if self.adapter.exists():
            raise FileError(f"{str(self.path)!r} holds a finished run: choose another --output, or delete it")
        if config.resume is not None:
            chosen = Path(config.resume)
            if not (chosen / "trainer_state.json").is_file():
                last = self.last_checkpoint()
                raise FileError(f"{config.resume!r} is no checkpoint" + (f": there is {str(last)!r}" if last else ""))
            return chosen
        last = self.last_checkpoint()
        if last is not None:
            self._same_run(config)
        return last

    def recorded(self) -> RunConfig:
        """The config that run.yaml holds."""
        return resolve(read(self.recipe))

    def _same_run(self, config: RunConfig) -> None:
        free = FREE_TO_CHANGE | {name for name in ("dtype", "learning_rate") if getattr(config, name) == "auto"}
        free |= {"advice"} if config.learning_rate == "auto" else set()
        before, now = (each.model_dump(exclude=free) for each in (self.recorded(), config))
        changed = [f"{name} was {before[name]!r}" for name in now if now[name] != before[name]]
        if changed:
            raise BadOption(
                f"{str(self.path)!r} holds an interrupted run of another config ({', '.join(changed)}): go on with "
                f"--config {self.recipe}, or choose another --output"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; the lock dies with the process, however that dies.

        Raises:
            OutputBusy: if another process holds it.
        """
        from filelock import FileLock, Timeout

        try:
            stood = self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise FileError(
                f"cannot write to {str(self.path)!r} ({problem.strerror}): choose another --output"
            ) from None
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise OutputBusy(f"another run is writing to {str(self.path)!r}: choose another --output") from None
        try:
            yield
        finally:
            with suppress(OSError):
                if os.listdir(self.path) == [".lock"]:  # Refused before anything was written.
                    (self.path / ".lock").unlink()  # While it is held: later it may be another run's.
                    if not stood:
                        self.path.rmdir()
            lock.release()

    def check_space(self, size: int) -> None:
        """Refuse now what would fail when the run is done.

        Raises:
            FileError: if the disk has fewer bytes left.
        """
        free = shutil.disk_usage(self.path).free
        if size > free:
            raise FileError(f"{str(self.path)!r} has {free / 1e9:.2f} GB left, the run writes {size / 1e9:.2f} GB")

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines after a checkpoint's step: a resumed run writes them again."""
        kept = [line for line in read_metrics(self.metrics) if line["step"] <= step and "train_runtime" not in line]
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; the last may be cut short by a crash and is then left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise FileError(f"{path}:{number} is no JSON: delete the line") from None
    return found
