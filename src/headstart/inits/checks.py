"""What a start refuses: a rank, a scaling or a weight that it cannot be built from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headstart.errors import BadAlpha, BadRank, MetaWeight, NonFiniteWeight


def check_fit(weight: Tensor, rank: int) -> None:
    """A weight with values, and no more directions asked of it than it has."""
    if not 1 <= rank <= min(weight.shape):
        raise BadRank(f"rank {rank} does not fit a {tuple(weight.shape)} weight: choose 1 to {min(weight.shape)}")
    if weight.is_meta:
        raise MetaWeight(f"this start reads the values of a {tuple(weight.shape)} weight: load it first")


def check_scaling(scaling: float) -> None:
    """A scaling that can be divided by, and whose root can be taken."""
    if not (0 < scaling < math.inf):
        raise BadAlpha(f"scaling is {scaling} and this start divides by it: choose a lora_alpha above 0")


def check_finite(weight: Tensor, result: Tensor) -> None:
    """A weight without NaN or infinity, seen from a result that every one of its elements entered."""
    if not bool(torch.isfinite(result).all()):
        count = int((~torch.isfinite(weight)).sum())
        found = f"holds {count} NaN or infinite values: repair it" if count else "overflows float32: scale it down"
        raise NonFiniteWeight(f"a {tuple(weight.shape)} weight {found}")
