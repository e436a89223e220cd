"""A weight a few lines of its memory at a time, and products with it, so that it is never copied whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 1 << 17  # numbers that are cast at a time


def blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns, and the weight there in `dtype`: whole rows, or whole columns where it is stored by columns.

    Example:
        >>> [(rows, tuple(block.shape)) for rows, _, block in blocks(torch.ones(3, 1 << 16), torch.float32)]
        [(slice(0, 2, None), (2, 65536)), (slice(2, 3, None), (1, 65536))]
    """
    m, n = weight.shape
    by_columns = weight.stride(0) < weight.stride(1)
    lines, length = (n, m) if by_columns else (m, n)
    step = max(1, BLOCK // length)
    for start in range(0, lines, step):
        part, whole = slice(start, min(start + step, lines)), slice(0, length)
        rows, columns = (whole, part) if by_columns else (part, whole)
        yield rows, columns, weight[rows, columns].detach().to(dtype)


def times(weight: Float[Tensor, "m n"], X: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
    """W·X in X's dtype; `times(W.T, Y).T` is Yᵀ·W."""
    product = X.new_zeros(weight.shape[0], X.shape[1])
    for rows, columns, block in blocks(weight, X.dtype):
        product[rows].addmm_(block, X[columns])
    return product
