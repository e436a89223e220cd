"""Dropout of a branch's input: what was dropped is kept, the rest is not copied."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw(x: Tensor, p: float, scaling: float) -> tuple[Tensor | None, float]:
    """What to drop of x, from the global generator; and s divided by the share that stays.

    A bool mask; or, on a CPU, where a random number for each entry costs half as much as the layer's product, the
    dropped positions alone. The gaps between them are geometric, so p·|x| draws do: 3 ms instead of 25 for 1024 × 2816
    entries and p = 0.05, and 0.2 bytes an entry.
    """
    if p == 0:
        return None, scaling
    s = scaling / (1 - p) if p < 1 else 0.0
    if not x.is_cpu or p > 0.25:
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(p), s
    mean = x.numel() * p
    draws = int(mean + 8 * math.sqrt(mean) + 16)
    gaps = (
        torch.rand(draws, dtype=torch.float32, device=x.device)
        .neg_()
        .add_(1)
        .log_()
        .div_(math.log1p(-p))
        .floor_()
        .add_(1)
    )
    positions = gaps.cumsum(0, dtype=torch.int64).sub_(1)
    positions = positions[: int(torch.searchsorted(positions, x.numel()))]
    return positions.to(torch.int32) if x.numel() < 2**31 else positions, s


def kept(X: Tensor, dropped: Tensor | None) -> Tensor:
    return X if dropped is None else zero_(X.clone(memory_format=torch.contiguous_format), dropped)


def zero_(X: Tensor, dropped: Tensor | None) -> Tensor:
    if dropped is None:
        return X
    if dropped.dtype == torch.bool:
        return X.masked_fill_(dropped.view_as(X), 0)
    X.view(-1).index_fill_(0, dropped.long(), 0)
    return X
