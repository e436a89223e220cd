"""The rows of one batch: which adapter each goes to, and the factors that they are multiplied with."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from headstart.lora.bank.held import Held, Piece, Site
from headstart.lora.bank.products import Bundle, add, bundle, check_rows, likeness


class Route:
    """A batch's rows and their adapters, as these were when the route was opened.

    The factors are stacked once for each layer, at its first forward, and kept while the route is open: a generation
    stacks them for its prompt and reuses them for every token.

    Attributes:
        stated: how many rows were routed; None for all of a batch of any size.
        rows: how many different blocks a batch is read as, 1 where all rows go to one adapter.
        copies: how many rows of a forward may stand for each.
    """

    def __init__(self, adapters: Sequence[Held | None], copies: int, stated: int | None) -> None:
        alike = len({id(held) for held in adapters}) == 1
        adapters = adapters[:1] if alike else adapters
        self.stated, self.rows, self.copies = stated, len(adapters), copies
        self.groups: dict[int, tuple[Held, list[int]]] = {}
        for row, held in enumerate(adapters):
            if held is not None:
                self.groups.setdefault(id(held), (held, []))[1].append(row)
        self._bundles: dict[Hashable, list[Bundle]] = {}

    def apply(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """A layer's output with every row's own branch."""
        key = site.module, y.dtype, y.device
        bundles = self._bundles.get(key)
        if bundles is None:
            bundles = self._bundles[key] = self._stacked(site, y)
        if not bundles:
            return y
        check_rows(site, x, self.rows, self.copies)
        return add(site, bundles, x, y, self.rows)

    def fits(self, sizes: Sequence[int]) -> bool:
        """Whether one of these first dimensions can be that of the batch."""
        return self.stated is None or self.stated in sizes or self.stated * self.copies in sizes

    def _stacked(self, site: Site, like: Tensor) -> list[Bundle]:
        alike: dict[Hashable, list[tuple[Piece, list[int]]]] = {}
        for held, rows in self.groups.values():
            if (piece := held.pieces.get(site.module)) is not None:
                alike.setdefault((likeness(site, piece), len(rows)), []).append((piece, rows))
        return [self._bundle(site, [p for p, _ in found], [r for _, r in found], like) for found in alike.values()]

    def _bundle(self, site: Site, pieces: list[Piece], rows: list[list[int]], like: Tensor) -> Bundle:
        order = [row for own in rows for row in own]
        index = None if order == list(range(self.rows)) else torch.tensor(order).to(like.device, non_blocking=True)
        return bundle(site, pieces, index, like)


def first_dimensions(args: Sequence[object], kwargs: dict[str, object]) -> list[int]:
    """The first dimensions of the tensors that a forward was given; of those with two dimensions, where there are."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
    return [t.shape[0] for t in tensors if t.ndim > 1] or [t.shape[0] for t in tensors]
