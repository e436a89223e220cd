"""Steps that several threads work out ahead, and that one takes in their order.

    reading, computing        every worker, on a step of its own
    writing                   the caller, step after step

torch lets other threads run while it computes. Each worker has one of torch's own threads: several of them on small
blocks would mostly wait for one another, and sums could depend on how many there are.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
MEMORY = 1 << 30  # Bytes that steps may hold together, unless one alone holds more.


@dataclass(frozen=True)
class Step(Generic[T]):
    """A piece of work.

    Attributes:
        then: what is done with the result, in order, in the caller's thread.
        work: what makes the result, in any thread and before its turn; None where there is nothing to make.
        size: bytes that it holds until its turn is over.
    """

    then: Callable[[T], object]
    work: Callable[[], T] | None = None
    size: int = 0


class Once(Generic[T]):
    """A value that whoever needs it first makes, while the others wait."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._lock, self._made = make, threading.Lock(), list[T]()

    def __call__(self) -> T:
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]


def workers() -> int:
    """How many threads torch may use here, and no more than this process has cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), cores))


def run(steps: Iterable[Step[Any]]) -> None:
    """Do all steps, so many at a time as there are workers, within `MEMORY`.

    Raises:
        Whatever a step raises, in its turn: those after it are given up then, and none is left running.
    """
    count, threads = workers(), torch.get_num_threads()
    # glibc learns from what is freed: from now on it keeps so much for the next block, and asks for no new pages.
    torch.empty(16 << 20, dtype=torch.uint8)
    pool = ThreadPoolExecutor(count, "headstart-merge", torch.set_num_threads, (1,))
    waiting: deque[tuple[Step[Any], Future[Any] | None]] = deque()
    held = 0
    try:
        for step in steps:
            while waiting and (
                len(waiting) > 4 * count or held + step.size > MEMORY or waiting[0][1] is None or waiting[0][1].done()
            ):
                held -= _take(waiting)
            waiting.append((step, None if step.work is None else pool.submit(step.work)))
            held += step.size
        while waiting:
            _take(waiting)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)  # New threads take their number from the last that was set anywhere.


def _take(waiting: deque[tuple[Step[Any], Future[Any] | None]]) -> int:
    step, result = waiting.popleft()
    step.then(None if result is None else result.result())
    return step.size
