"""DoRA's gain g = magnitude / norm, and z = W·x + s·B·A·x read back from y = g·z."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

# g stays this far from zero, so that the backward can divide the output by it (`reads_back`).
SMALLEST_GAIN = 2.0**-64


def gain_of(magnitude: Float[Tensor, " m"], norm: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """magnitude / norm; a zero row has no direction to rescale, and no gradient."""
    norm = norm.detach()
    zero = norm == 0
    return (magnitude / norm.masked_fill(zero, 1)).masked_fill(zero, 1)


def nonzero(gain: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    return gain.masked_fill(gain.abs() < SMALLEST_GAIN, SMALLEST_GAIN)


def reads_back(bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether z = W·x + s·B·A·x comes back from y = g·z by a division.

    Then the output is kept in z's place, which costs nothing wherever the next operation keeps it too. Not from under
    a bias, that may be much larger than z, and not in float16, where a small g·z loses its digits.
    """
    return bias is None and dtype != torch.float16


class Watch:
    """Tells whether a later operation overwrote `y` in place, as ReLU(inplace=True) may after any linear layer.

    Autograd would raise; the backward can do better and compute z again. The watch shares y's version counter, and
    holds none of its memory.
    """

    def __init__(self, y: Tensor) -> None:
        self.counter = y.detach()
        self.counter.data = y.new_empty(0)
        self.start = self.counter._version

    def changed(self) -> bool:
        return self.counter._version != self.start


def _slabs(*tensors: Float[Tensor, "T m"]) -> Iterator[tuple[Tensor, ...]]:
    """Some rows at a time: the float32 copies that are made of them stay small, and on a CPU in its cache."""
    return zip(*(t.split(64 if t.is_cpu else 4096) for t in tensors), strict=True)


def rescale(z: Float[Tensor, "T m"], gain: Tensor, bias: Tensor | None, out: Float[Tensor, "T m"]) -> Tensor:
    """g·z + b, rounded once."""
    for rows, into in _slabs(z, out):
        if bias is None:
            torch.mul(rows, gain, out=into)
        else:
            torch.addcmul(bias, rows, gain, out=into)
    return out


def column_dots(a: Float[Tensor, "T m"], b: Float[Tensor, "T m"], dtype: torch.dtype) -> Float[Tensor, " m"]:
    total = a.new_zeros(a.shape[1], dtype=dtype)
    for x, y in _slabs(a, b):
        total += (x.to(dtype) * y).sum(0)
    return total
