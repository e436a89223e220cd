"""The batches of one seed, by their place: the same for every arm, and for a run that stopped and goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from headstart.errors import CalibrationError

Train = Sequence[Any] | Callable[[int], Iterable[Any]]


class Order:
    """A sequence of batches in an order that the seed shuffles, epoch after epoch; or what a function gives for it.

    Args:
        train: batches; or a function from a seed to batches in that seed's order, which are read again when they end.
        seed: of the order.
    """

    def __init__(self, train: Train, seed: int) -> None:
        self.seed = seed
        self._give = None if isinstance(train, Sequence) else train
        given = train if isinstance(train, Sequence) else train(seed)
        self._batches = given if isinstance(given, Sequence) else None
        self._stream: Iterator[Any] = iter(() if self._batches is not None else given)
        self._read = 0
        self._epoch, self._places = -1, [0]
        if self._batches is not None and not len(self._batches):
            raise CalibrationError("train holds no batch: check the dataset and its filters")

    def __getitem__(self, place: int) -> Any:
        if self._batches is None:
            return self._streamed(place)
        epoch, inside = divmod(place, len(self._batches))
        return self._batches[inside if self._give is not None else self._shuffled(epoch)[inside]]

    def _shuffled(self, epoch: int) -> list[int]:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            self._places = torch.randperm(len(self._batches or ()), generator=generator).tolist()
            self._epoch = epoch
        return self._places

    def _streamed(self, place: int) -> Any:
        assert self._give is not None
        if place < self._read:
            self._stream, self._read = iter(self._give(self.seed)), 0
        ended = 0
        while ended < 2:
            for batch in self._stream:
                ended = 0
                self._read += 1
                if self._read > place:
                    return batch
            ended += 1
            self._stream = iter(self._give(self.seed))
        raise CalibrationError(f"train({self.seed}) gives no batch: check the dataset and its filters")
