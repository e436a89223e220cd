"""Casts between bfloat16 and float64 in one pass each, compiled by numba where that is installed.

torch goes through float32 and back, a pass over memory at a time, and rounds twice. What is written here is as exact as
what torch does without it, and a third of the work: worth the seconds of compiling where a whole model is merged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WORTH = 1 << 28  # Numbers from which on loading numba pays.
# The last 38 of a float64's 52 digits. The other 14 exceed the 10 of a half type by the two that the proof needs, and
# are so few that float32 holds them also where bfloat16 is subnormal.
CUT = (1 << 38) - 1


@dataclass(frozen=True)
class Casts:
    """Two loops over contiguous tensors on the CPU, which let other threads run.

    Attributes:
        widen: (bfloat16, float64 to write). narrow: (float64, bfloat16 to write), each number rounded once.
    """

    widen: Callable[[Tensor, Tensor], None]
    narrow: Callable[[Tensor, Tensor], None]


_loaded: list[Casts] = []


def prepare(numbers: int) -> None:
    """Have the loops where so many numbers are to be changed, if it is worth it and numba is there."""
    if numbers >= WORTH and not _loaded and (casts := load()) is not None:
        _loaded.append(casts)


def ready() -> Casts | None:
    """The loops, if they are loaded."""
    return _loaded[0] if _loaded else None


@functools.lru_cache
def load() -> Casts | None:
    """Compile them, or take them from where numba keeps what it has compiled; None without numba."""
    try:
        import numba
        import numpy as np
    except ImportError:
        return None
    cut, keep = np.uint64(CUT), np.uint64(~CUT & (1 << 64) - 1)
    half, low, quiet = np.uint32(16), np.uint32(0x7FFF), np.uint16(0x7FC0)
    one, magnitude, infinity = np.uint32(1), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)

    # Loops of one statement on arrays of their own: those become vector instructions.

    def widen(old: Any, wide: Any) -> None:
        bits = np.empty(old.shape[1], np.uint32)
        single = bits.view(np.float32)
        for i in range(len(old)):
            source, target = old[i], wide[i]
            for j in range(len(source)):
                bits[j] = np.uint32(source[j]) << half
            for j in range(len(source)):
                target[j] = single[j]

    def narrow(wide: Any, new: Any) -> None:
        odd = np.empty(wide.shape[1], np.uint64)
        cut_off = odd.view(np.float64)
        bits = np.empty(wide.shape[1], np.uint32)
        single = bits.view(np.float32)
        for i in range(len(wide)):
            source, target = wide[i], new[i]
            for j in range(len(source)):
                odd[j] = (((source[j] & cut) + cut) | source[j]) & keep
            for j in range(len(source)):
                single[j] = cut_off[j]
            for j in range(len(source)):
                nearest = (bits[j] + low + ((bits[j] >> half) & one)) >> half
                target[j] = quiet if (bits[j] & magnitude) > infinity else np.uint16(nearest)

    def compiled(loop: Any, signature: str) -> Any:
        try:
            return numba.njit(signature, nogil=True, cache=True)(loop)
        except RuntimeError:  # Nowhere to keep it.
            return numba.njit(signature, nogil=True)(loop)

    def words(x: Tensor) -> Any:
        return x.detach().view(torch.int16).numpy().view(np.uint16)

    widening = compiled(widen, "void(uint16[:,::1], float64[:,::1])")
    narrowing = compiled(narrow, "void(uint64[:,::1], uint16[:,::1])")
    return Casts(
        lambda old, wide: widening(words(old), wide.numpy()),
        lambda wide, new: narrowing(wide.numpy().view(np.uint64), words(new)),
    )
