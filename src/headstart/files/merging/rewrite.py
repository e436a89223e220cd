"""Every tensor of a checkpoint written anew: copied, cast, changed by blocks of rows, or quantised anew."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart import linalg
from headstart.errors import NonFiniteWeight
from headstart.files.merging import ahead, beside
from headstart.files.merging.ahead import Once, Step
from headstart.files.merging.folding import Mixture, Rows
from headstart.files.merging.loss import CheckpointReport, Loss, Losses, every, measure, picked
from headstart.files.merging.plan import Edit, Plan, Task
from headstart.files.merging.shard_writer import ShardWriter, header_room
from headstart.files.merging.shards import Stored, read_rows, read_whole, row_ranges
from headstart.files.merging.unbuffered import Disk
from headstart.linalg.blend import SPARSE
from headstart.lora import quantized

BLOCK = 4 << 20  # Bytes of a tensor that one step reads: of larger pieces the system wants the memory back each time.
Progress = Callable[[int, int], None]


class Rewriting:
    """One pass over the shards."""

    def __init__(self, planned: Plan, mixture: Mixture, dtype: torch.dtype | None, progress: Progress | None) -> None:
        self.plan, self.mixture, self.dtype, self.progress = planned, mixture, dtype, progress
        self.checkpoint = planned.checkpoint
        self.others = {one.key: name for name, packed in planned.packed.items() for one in packed.others.values()}
        self.losses = Losses()
        self.written, self.total = 0, sum(one.size for one in self.checkpoint.tensors.values())
        self.index: dict[str, str] = {}
        self.data = 0

    # -------------------------------------------------------------- before

    def size(self) -> int:
        """Bytes that will be written, within a few kilobytes."""
        total = 0
        for stored in self.checkpoint.tensors.values():
            tasks = self.plan.tasks.get(stored.key, [Task(stored, stored.key)])
            total += sum(self._bytes(task.source) for task in tasks)
        return total + sum(file.stat().st_size for file in beside.companions(self.checkpoint.folder)) + (1 << 20)

    def _bytes(self, stored: Stored) -> int:
        if self.dtype is None or not (stored.is_float or stored.key in self.plan.packed):
            return stored.size
        if stored.key in self.others:
            return 0
        shape = self.plan.packed[stored.key].shape if stored.key in self.plan.packed else stored.shape
        return math.prod(shape) * self.dtype.itemsize

    # -------------------------------------------------------------- while

    def fill(self, folder: Path) -> None:
        """Write everything into a folder."""
        waiting: list[Future[None]] = []
        linalg.prepare(sum(task.source.numel for tasks in self.plan.tasks.values() for task in tasks if task.edit))
        with Disk() as disk, ExitStack() as files:
            ahead.run(
                step
                for file in self.checkpoint.metadata
                for step in self._shard(files.enter_context(self._writer(file, folder, disk)), file, waiting)
            )
            for done in waiting:
                done.result()
        self.checkpoint.check_unchanged()
        beside.copy(self.checkpoint.folder, folder)
        if self.checkpoint.index is not None:
            beside.write_index(self.checkpoint.index, folder, self.index, self.data)
        beside.write_settings(self.checkpoint.folder, folder, self.dtype, self.plan.untied)

    def _writer(self, file: Path, folder: Path, disk: Disk) -> ShardWriter:
        tensors = self.checkpoint.in_order(file)
        names = {task.key for one in tensors for task in self._tasks(one)} | {one.key for one in tensors}
        metadata = self.checkpoint.metadata[file]
        return ShardWriter(folder / file.name, header_room(names, metadata), metadata, disk)

    def _tasks(self, stored: Stored) -> Sequence[Task]:
        return self.plan.tasks.get(stored.key, [Task(stored, stored.key)])

    def _shard(self, writer: ShardWriter, file: Path, waiting: list[Future[None]]) -> Iterator[Step[Any]]:
        for copied, run in itertools.groupby(self.checkpoint.in_order(file), self._is_copied):
            for tensors in _adjoining(run) if copied else ([one] for one in run):
                size = sum(one.size for one in tensors)
                if copied:
                    yield Step(partial(_copy, writer, tensors))
                else:
                    for task in self._tasks(tensors[0]):
                        yield from self._steps(writer, task)
                yield Step(partial(self._tick, size))

        def finish(_: None) -> None:
            waiting.append(writer.finish())
            self.index |= dict.fromkeys(writer.header, file.name)
            self.data += writer.offset

        yield Step(finish)

    def _is_copied(self, stored: Stored) -> bool:
        if stored.key in self.plan.tasks or self._belongs(stored) is not None:
            return False
        return self.dtype is None or (not stored.is_float and stored.key not in self.plan.packed)

    def _belongs(self, stored: Stored) -> str | None:
        """The quantised weight that this is a part of, where that one is written anew."""
        owner = self.others.get(stored.key)
        return owner if owner is not None and (self.dtype is not None or owner in self.plan.tasks) else None

    def _steps(self, writer: ShardWriter, task: Task) -> Iterator[Step[Any]]:
        if self._belongs(task.source) is not None:
            return
        if task.source.key in self.plan.packed:
            yield self._packed(writer, task)
        elif task.edit is None:
            yield from self._cast(writer, task)
        else:
            yield from self._rows(writer, task, task.edit)

    def _cast(self, writer: ShardWriter, task: Task) -> Iterator[Step[Any]]:
        """A tensor that no adapter changes."""
        stored, dtype = task.source, self._dtype(task.source)
        width = max(1, stored.columns)

        def cast(start: int, stop: int) -> Tensor:
            return _checked(read_rows(stored, width, start, stop).to(dtype), stored.key, dtype)

        for start, stop in row_ranges(stored, width, BLOCK):
            yield Step(writer.put, partial(cast, start, stop), _held((stop - start) * width))
        yield Step(lambda _: writer.name(task.key, dtype, stored.shape))

    def _rows(self, writer: ShardWriter, task: Task, edit: Edit) -> Iterator[Step[Any]]:
        """A tensor that adapters change, by blocks of rows."""
        stored, dtype, first = task.source, self._dtype(task.source), task.first
        ranges = list(row_ranges(stored, edit.columns, BLOCK))
        total = ranges[-1][1] if ranges else 0
        whole = Once(lambda: edit.stands_on(read_whole(stored)).reshape(-1, edit.columns))

        def read(start: int, stop: int) -> Tensor:
            start, stop = start - first, stop - first
            if edit.recipe is None:
                return read_rows(stored, edit.columns, start, stop)
            return whole()[start:stop].contiguous()

        shifted = [(start + first, stop + first) for start, stop in ranges]
        change = Once(lambda: edit.change(self.mixture, shifted, read))

        def fold(rows: Rows) -> tuple[Tensor, Loss]:
            W, found = read(*rows), change()[0]
            new = _checked(found.fold(W, rows, dtype), stored.key, dtype)
            return new, measure(found, W, new, rows, picked(rows[0] - first, rows[1] - first, total))

        def put(made: tuple[Tensor, Loss]) -> None:
            writer.put(made[0])
            self.losses.enter(edit.label, made[1])

        def name(_: None) -> None:
            writer.name(task.key, dtype, stored.shape)
            self.losses.drop(edit.label, change()[1])
            self.losses.kinds[_word(dtype)] += 1

        # What looks at all of the weight is made, and counted, with its first block.
        more = _held(stored.numel) * len(edit.terms) if self.mixture.method in SPARSE or edit.recipe is not None else 0
        for rows in shifted:
            yield Step(put, partial(fold, rows), _held((rows[1] - rows[0]) * edit.columns) + more)
            more = 0
        yield Step(name)

    def _packed(self, writer: ShardWriter, task: Task) -> Step[Any]:
        """A quantised weight: quantised anew, or written as numbers."""
        packed, edit, mixture = self.plan.packed[task.source.key], task.edit, self.mixture
        turned = task.source.key in self.plan.skeleton.turned

        def work() -> _Packing:
            parameter = packed.parameter()
            W = quantized.values(parameter, torch.nn.Module())
            rows = (0, len(W))
            change, dropped = None, 0.0
            if edit is not None:
                change, dropped = edit.change(mixture, [rows], lambda start, stop: W[start:stop])
            if self.dtype is not None:
                new, kind = W.to(self.dtype) if change is None else change.fold(W, rows, self.dtype), _word(self.dtype)
                shown = _checked(new.T.contiguous() if turned else new, task.key, self.dtype)
                tensors = {task.key: shown}
            else:
                assert change is not None
                again: Any = quantized.requantized(parameter, change.fold(W, rows, W.dtype))
                new, kind = quantized.values(again, torch.nn.Module()), str(quantized.recipe_of(parameter))
                tensors = {key: value.contiguous() for key, value in packed.tensors(again).items()}
            loss = None if change is None else measure(change, W, new, rows, every(len(W)))
            return _Packing(tensors, kind, loss, dropped)

        def put(made: _Packing) -> None:
            for key, value in made.tensors.items():
                writer.put(value)
                writer.name(key, value.dtype, tuple(value.shape))
            form = packed.others.get("weight_format")
            if self.dtype is None and form is not None:
                writer.copy([form])
            if edit is not None and made.loss is not None:
                self.losses.enter(edit.label, made.loss)
                self.losses.drop(edit.label, made.dropped)
                self.losses.kinds[made.kind] += 1

        return Step(put, work, _held(math.prod(packed.shape)))

    def _dtype(self, stored: Stored) -> torch.dtype:
        return self.dtype if self.dtype is not None and stored.is_float else stored.dtype

    def _tick(self, size: int, _: None) -> None:
        self.written += size
        if self.progress is not None:
            self.progress(self.written, self.total)

    def report(self) -> CheckpointReport:
        """What was lost, by layer."""
        return self.losses.report(self.data, self.plan.untied)


@dataclass(frozen=True)
class _Packing:
    """What became of a quantised weight: the tensors to store, what they are, and what that took from the update."""

    tensors: Mapping[str, Tensor]
    kind: str
    loss: Loss | None
    dropped: float


def _copy(writer: ShardWriter, tensors: list[Stored], _: None) -> None:
    writer.copy(tensors)


def _held(numel: int) -> int:
    """Bytes in memory while so many numbers are changed: as they are read and written, and float64 in between."""
    return 32 * numel


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _adjoining(tensors: Iterable[Stored]) -> Iterator[list[Stored]]:
    """Tensors that lie one after the other, together."""
    run: list[Stored] = []
    for one in tensors:
        if run and run[-1].start + run[-1].size != one.start:
            yield run
            run = []
        run.append(one)
    if run:
        yield run


def _checked(new: Tensor, key: str, dtype: torch.dtype) -> Tensor:
    """Refuse what a dtype cannot hold: float16 ends at 65504."""
    if dtype == torch.float16 and not bool(new.isfinite().all()):
        raise NonFiniteWeight(f"{key!r} holds numbers that float16 does not: choose --dtype bfloat16 or float32")
    return new.contiguous()
