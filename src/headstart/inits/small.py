"""What a start does, asked of it on a small matrix: the one place where this is known is its own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from headstart import statistics
from headstart.inits.strategy import Factors, Strategy


def on_a_small_matrix(strategy: Strategy, options: Mapping[str, Any]) -> Factors:
    """Its start on a random 8×8 matrix at rank 2: whether it is anchored, and what it freezes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 8, generator=generator)
    given = {"weight": weight, "shape": (8, 8), "rank": 2, "scaling": 1.0, "kind": "linear", "generator": generator}
    X, D, preserved = (torch.randn(64, 8, generator=generator) for _ in range(3))
    given["quantize"] = torch.round
    return strategy.start({**given, **statistics.of_rows(X, D, preserved, generator)}, options)
