"""Statistics of many processes made one: every process ends with the same, to the bit.

Moments are summed by one collective; spectra are gathered and merged by everyone in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headstart.errors import CalibrationError
from headstart.linalg import named_generator
from headstart.statistics import GradientSpectrum, InputSpectrum


def is_alone() -> bool:
    """Whether this is the only process."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


@contextmanager
def together() -> Iterator[None]:
    """What fails in one process fails in all of them, instead of leaving the others to wait."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
    if not is_alone():
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, None if error is None else f"{type(error).__name__}: {error}")
        failed = [(rank, text) for rank, text in enumerate(told) if text is not None]
        if error is None and failed:
            error = CalibrationError(f"process {failed[0][0]} failed: {failed[0][1]}")
    if error is not None:
        raise error


def agreed(leaders: Mapping[str, str]) -> dict[str, str]:
    """The layer that keeps the inputs of each, where all processes found the same; its own elsewhere.

    A process whose first row reaches fewer layers knows of fewer that share.
    """
    if is_alone():
        return dict(leaders)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, dict(leaders))
    if any(other.keys() != leaders.keys() for other in told):
        raise CalibrationError("the processes differ in their layers: give all of them the same model and config")
    return {name: own if all(other[name] == own for other in told) else name for name, own in leaders.items()}


def union(names: set[str]) -> set[str]:
    """What any process names."""
    if is_alone():
        return names
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, names)
    return set().union(*told)


def total(counts: Any, *names: str) -> None:
    """Sum numbers of an object over the processes, in place."""
    if is_alone():
        return
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, {name: vars(counts)[name] for name in names})
    for name in names:
        setattr(counts, name, sum(other[name] for other in told))


def everywhere(statistics: Mapping[str, Any], seed: int) -> None:
    """Merge every process's statistics, by name, in place."""
    if is_alone():
        return
    for name, statistic in statistics.items():
        if isinstance(statistic, GradientSpectrum | InputSpectrum):
            _merged(statistic, named_generator(seed, "reduce", name))
        else:
            _summed(statistic)


def _summed(statistic: Any) -> None:
    for value in vars(statistic).values():
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, Tensor):
                dist.all_reduce(tensor)
    statistic.count = _sum(statistic.count)


def _merged(statistic: GradientSpectrum | InputSpectrum, generator: torch.Generator) -> None:
    """From nothing, one after the other in the order of the ranks."""
    gathered = {name: _gathered(value) for name, value in vars(statistic).items() if isinstance(value, Tensor)}
    rest: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rest, (statistic.count, getattr(statistic, "squares", 0.0)))
    statistic.generator = generator
    parts = []
    for rank, (count, squares) in enumerate(rest):
        part: Any = object.__new__(type(statistic))
        part.__dict__.update(vars(statistic))
        part.__dict__.update({name: tensors[rank] for name, tensors in gathered.items()}, count=count)
        if isinstance(part, InputSpectrum):
            part.squares = squares
        parts.append(part)
    first, *others = parts
    for other in others:
        first.merge(other)
    statistic.__dict__.update(vars(first), generator=generator)
    if isinstance(statistic, GradientSpectrum):
        statistic.first = None  # Of this process's data alone.


def _gathered(tensor: Tensor) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return found


def _sum(count: float) -> float:
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, count)
    return type(count)(sum(told))
