"""W + L·R for a W in bfloat16, every element the float64 sum rounded once, by a loop that numba compiles.

Every number is read and written once, and is in registers while it is summed and rounded: torch has no operation that
does so, and takes five passes over memory. Importing this needs numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from headstart.linalg.lowrank import CUT

TILE = 1 << 16  # Numbers whose change stays in the cache until it is added.

# numba keeps what it compiled for as long as this file is as it was.
_cut, _kept = np.uint64(CUT), np.uint64(~CUT & (1 << 64) - 1)
_half, _below_half, _one = np.uint32(16), np.uint32(0x7FFF), np.uint32(1)
_magnitude, _infinity, _quiet = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000), np.uint32(0x7FC0)
# numba widens what it computes with, unless told after every operation, and wide numbers are slow ones.
_short, _long = np.uint32, np.uint64


def add_lowrank(out: Tensor, W: Tensor, left: Tensor, right: Tensor) -> None:
    """out = W + left·right. Other threads run meanwhile.

    Args:
        out, W: (m, n), bfloat16, contiguous, on the CPU; left: (m, r) and right: (r, n), float64.
    """
    tall = max(1, TILE // W.shape[1])
    spare = torch.empty(min(tall, len(W)), W.shape[1], dtype=torch.float64, device=W.device)
    for new, old, b in zip(out.split(tall), W.split(tall), left.split(tall), strict=True):
        _add(_words(old), spare[: len(old)].addmm_(b, right, beta=0).numpy(), _words(new))


def _words(x: Tensor) -> Any:
    return x.detach().view(torch.int16).numpy().view(np.uint16)


# ------------------------------------------------------------------ the loop


def _same_bits(source: Any, target: Any, kind: ir.Type) -> Any:
    """The bits of a number read as those of another type."""

    @intrinsic
    def cast(context: Any, x: Any) -> Any:
        del context, x

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            del context, signature
            return builder.bitcast(arguments[0], kind)

        return target(source), generate

    return cast


_as_single = _same_bits(types.uint32, types.float32, ir.FloatType())
_single_bits = _same_bits(types.float32, types.uint32, ir.IntType(32))
_as_double = _same_bits(types.uint64, types.float64, ir.DoubleType())
_double_bits = _same_bits(types.float64, types.uint64, ir.IntType(64))


def _add_rows(old: Any, change: Any, new: Any) -> None:
    for i in range(len(old)):
        source, target, moved = old[i], new[i], change[i]
        for j in range(len(source)):
            number = np.float64(_as_single(_short(_short(source[j]) << _half)))
            bits = _double_bits(number + moved[j])
            # Rounded to odd, which float32 holds; from there to the nearest, ties to even. See `lowrank`.
            odd = _long((_long(_long(bits & _cut) + _cut) | bits) & _kept)
            single = _single_bits(np.float32(_as_double(odd)))
            nearest = _short(_short(_short(single + _below_half) + _short(_short(single >> _half) & _one)) >> _half)
            target[j] = np.uint16(_quiet if _short(single & _magnitude) > _infinity else nearest)


def _made(loop: Callable[..., None], signature: str) -> Any:
    try:
        return numba.njit(signature, nogil=True, cache=True)(loop)
    except RuntimeError:  # Nowhere to keep it.
        return numba.njit(signature, nogil=True)(loop)


_add = _made(_add_rows, "void(uint16[:, ::1], float64[:, ::1], uint16[:, ::1])")
