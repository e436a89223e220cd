"""What numba compiles, where it is installed and there is enough to do for it to pay."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

WORTH = 1 << 29  # Numbers from which on loading numba pays.
AddLowRank = Callable[[Tensor, Tensor, Tensor, Tensor], None]  # `compiled.add_lowrank`

_loaded: list[AddLowRank] = []


def prepare(numbers: int) -> None:
    """Have the loop where so many numbers are to be changed, if it is worth it and numba is there."""
    if numbers >= WORTH and not _loaded and (found := load()) is not None:
        _loaded.append(found)


def ready() -> AddLowRank | None:
    """What adds, if it is loaded."""
    return _loaded[0] if _loaded else None


@functools.lru_cache
def load() -> AddLowRank | None:
    """Compile it, or take it from where numba keeps what it has compiled; None without numba."""
    try:
        from headstart.linalg.compiled import add_lowrank
    except ImportError:
        return None
    return add_lowrank
