"""A weight a tile at a time, and products with it, so that it is never copied whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

# As the weight lies in memory: a product with that many lines runs fast, and what it adds to stays in the cache.
LINES, LENGTH = 128, 2048


def blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns, and the weight there in `dtype`, in tiles.

    Example:
        >>> [(rows, tuple(tile.shape)) for rows, _, tile in blocks(torch.ones(200, 3), torch.float32)]
        [(slice(0, 128, None), (128, 3)), (slice(128, 200, None), (72, 3))]
    """
    m, n = weight.shape
    by_columns = weight.stride(0) < weight.stride(1)
    tall, wide = (LENGTH, LINES) if by_columns else (LINES, LENGTH)
    for left in range(0, n, wide):
        columns = slice(left, min(left + wide, n))
        for top in range(0, m, tall):
            rows = slice(top, min(top + tall, m))
            yield rows, columns, weight[rows, columns].detach().to(dtype)


def times(weight: Float[Tensor, "m n"], X: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
    """W·X in X's dtype; `times(W.T, Y).T` is Yᵀ·W."""
    product = X.new_zeros(weight.shape[0], X.shape[1])
    for rows, columns, block in blocks(weight, X.dtype):
        product[rows].addmm_(block, X[columns])
    return product
