"""Every tensor of a checkpoint written anew: copied, cast, changed by blocks of rows, or quantised anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.errors import NonFiniteWeight
from headstart.files.merging import beside
from headstart.files.merging.folding import Change, Mixture, Rows
from headstart.files.merging.loss import CheckpointReport, Losses, every, picked
from headstart.files.merging.plan import Edit, Plan, Task
from headstart.files.merging.shard_writer import ShardWriter, header_room
from headstart.files.merging.shards import NAMES, Stored, read_rows, read_whole, row_ranges
from headstart.lora import quantized

BLOCK = 32 << 20  # Bytes of a tensor in memory at once; some copies of it are made on the way.
Progress = Callable[[int, int], None]


class Rewriting:
    """One pass over the shards."""

    def __init__(self, planned: Plan, mixture: Mixture, dtype: torch.dtype | None, progress: Progress | None) -> None:
        self.plan, self.mixture, self.dtype, self.progress = planned, mixture, dtype, progress
        self.checkpoint = planned.checkpoint
        self.others = {one.key: name for name, packed in planned.packed.items() for one in packed.others.values()}
        self.losses = Losses()
        self.written = 0
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
        with ThreadPoolExecutor(1) as disk:
            waiting = [done for file in self.checkpoint.metadata for done in self._shard(file, folder, disk)]
            for done in waiting:
                done.result()
        self.checkpoint.check_unchanged()
        beside.copy(self.checkpoint.folder, folder)
        if self.checkpoint.index is not None:
            beside.write_index(self.checkpoint.index, folder, self.index, self.data)
        beside.write_settings(self.checkpoint.folder, folder, self.dtype, self.plan.untied)

    def _shard(self, file: Path, folder: Path, disk: Executor) -> list[Future[None]]:
        tensors = self.checkpoint.in_order(file)
        names = {task.key for one in tensors for task in self.plan.tasks.get(one.key, ())} | {
            one.key for one in tensors
        }
        metadata = self.checkpoint.metadata[file]
        with ShardWriter(folder / file.name, header_room(names, metadata), metadata, disk) as writer:
            copied: list[Stored] = []
            for stored in tensors:
                if self._is_copied(stored):
                    copied.append(stored)
                    continue
                self._copy(writer, copied)
                for task in self.plan.tasks.get(stored.key, [Task(stored, stored.key)]):
                    self._write(writer, task)
                self._tick(stored.size)
            self._copy(writer, copied)
            writer.finish()
        self.index |= dict.fromkeys(writer.header, file.name)
        self.data += writer.offset
        return writer.waiting

    def _is_copied(self, stored: Stored) -> bool:
        if stored.key in self.plan.tasks or self._belongs(stored) is not None:
            return False
        return self.dtype is None or (not stored.is_float and stored.key not in self.plan.packed)

    def _belongs(self, stored: Stored) -> str | None:
        """The quantised weight that this is a part of, where that one is written anew."""
        owner = self.others.get(stored.key)
        return owner if owner is not None and (self.dtype is not None or owner in self.plan.tasks) else None

    def _copy(self, writer: ShardWriter, tensors: list[Stored]) -> None:
        for run in _runs(tensors):
            writer.copy(run)
            self._tick(sum(one.size for one in run))
        tensors.clear()

    def _write(self, writer: ShardWriter, task: Task) -> None:
        if self._belongs(task.source) is not None:
            return
        if task.source.key in self.plan.packed:
            self._write_packed(writer, task)
        elif task.edit is None:
            self._write_cast(writer, task)
        else:
            self._write_rows(writer, task, task.edit)

    def _write_cast(self, writer: ShardWriter, task: Task) -> None:
        """A tensor that no adapter changes."""
        stored = task.source
        dtype = self.dtype if self.dtype is not None and stored.is_float else stored.dtype
        width = max(1, stored.columns)

        def parts() -> Iterator[Tensor]:
            for start, stop in row_ranges(stored, width, BLOCK):
                yield _checked(read_rows(stored, width, start, stop).to(dtype), stored.key, dtype)

        writer.add(task.key, NAMES[dtype], stored.shape, parts())

    def _write_rows(self, writer: ShardWriter, task: Task, edit: Edit) -> None:
        """A tensor that adapters change, by blocks of rows."""
        stored = task.source
        dtype = self.dtype if self.dtype is not None and stored.is_float else stored.dtype
        ranges = list(row_ranges(stored, edit.columns, BLOCK))
        whole = None if edit.recipe is None else edit.stands_on(read_whole(stored)).reshape(-1, edit.columns)

        def read(start: int, stop: int) -> Tensor:
            return read_rows(stored, edit.columns, start, stop) if whole is None else whole[start:stop].contiguous()

        shifted = [(start + task.first, stop + task.first) for start, stop in ranges]
        change = self._change(edit, shifted, lambda start, stop: read(start - task.first, stop - task.first))

        def parts() -> Iterator[Tensor]:
            total = ranges[-1][1] if ranges else 0
            for (start, stop), rows in zip(ranges, shifted, strict=True):
                W = read(start, stop)
                new = change.fold(W, rows, dtype)
                self.losses.measure(edit.label, change, W, new, rows, picked(start, stop, total))
                yield _checked(new, stored.key, dtype)

        self.losses.kinds[str(dtype).removeprefix("torch.")] += 1
        writer.add(task.key, NAMES[dtype], stored.shape, parts())

    def _write_packed(self, writer: ShardWriter, task: Task) -> None:
        """A quantised weight: quantised anew, or written as numbers."""
        packed = self.plan.packed[task.source.key]
        parameter = packed.parameter()
        W = quantized.values(parameter, torch.nn.Module())
        rows = (0, len(W))
        change = None
        if task.edit is not None:
            change = self._change(task.edit, [rows], lambda start, stop: W[start:stop])
        if self.dtype is not None:
            new = W.to(self.dtype) if change is None else change.fold(W, rows, self.dtype)
            shown = new.T.contiguous() if task.source.key in self.plan.skeleton.turned else new
            writer.add(task.key, NAMES[self.dtype], tuple(shown.shape), iter([_checked(shown, task.key, self.dtype)]))
            self.losses.kinds[str(self.dtype).removeprefix("torch.")] += change is not None
        else:
            assert change is not None
            again: Any = quantized.requantized(parameter, change.fold(W, rows, W.dtype))
            new = quantized.values(again, torch.nn.Module())
            for key, value in packed.tensors(again).items():
                writer.add(key, NAMES[value.dtype], tuple(value.shape), iter([value.contiguous()]))
            form = packed.others.get("weight_format")
            if form is not None:
                writer.copy([form])
            self.losses.kinds[str(quantized.recipe_of(parameter))] += 1
        if change is not None and task.edit is not None:
            self.losses.measure(task.edit.label, change, W, new, rows, every(len(W)))

    def _change(self, edit: Edit, ranges: Sequence[Rows], read: Callable[[int, int], Tensor]) -> Change:
        change, dropped = edit.change(self.mixture, ranges, read)
        self.losses.drop(edit.label, dropped)
        return change

    def _tick(self, size: int) -> None:
        self.written += size
        if self.progress is not None:
            self.progress(self.written, sum(one.size for one in self.checkpoint.tensors.values()))

    def report(self) -> CheckpointReport:
        """What was lost, by layer."""
        return self.losses.report(self.data, self.plan.untied)


def _runs(tensors: Sequence[Stored]) -> Iterator[list[Stored]]:
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
