"""Where the time of a worker goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by the name of what they go to; `rest` takes what no name claimed."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self._spent[name] = self._spent.get(name, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """The seconds by name since the last reading; the count starts anew."""
        whole, spent = time.perf_counter() - self._began, self._spent
        self._began, self._spent = time.perf_counter(), {}
        return {**spent, "rest": max(0.0, whole - sum(spent.values()))}
