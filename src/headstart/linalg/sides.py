r"""A matrix as its short side sees it.

    N = W·Wᵀ or Wᵀ·W, whichever is smaller                            N: (d, d), d = min(m, n)
    X·N = Σ_b (X·W_b)·W_bᵀ                                            X: (b, d), in rows

N is not formed: its products are one sweep over W in blocks along the long side, each block cast once into the same
buffer, so that a half-precision weight is never copied whole. Vectors lie in rows, as W's own do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from headstart.errors import MetaWeight, NonFiniteWeight

BLOCK = 1 << 20  # Numbers of W that are cast at a time.
SPAN = 192  # Rows of N in one product.
TINY = 2.0**-50  # Outside [TINY, 1/TINY] the squares of a float32 weight need rescaling.


class Operator(Protocol):
    """A matrix W that is known by its products alone.

    It may have a `floor`: singular values below it are noise, and count as zero.
    """

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def matmul(self, X: Tensor) -> Tensor:
        """W·X."""
        ...

    def rmatmul(self, Y: Tensor) -> Tensor:
        """Wᵀ·Y."""
        ...


class Dense:
    """A weight, divided by a power of two where its squares would leave the range of the working dtype."""

    def __init__(self, weight: Tensor) -> None:
        if weight.is_meta:
            raise MetaWeight(f"the singular values of a {tuple(weight.shape)} weight need its values: load it first")
        self.weight = weight
        self.exponent = 0
        self.wide = weight.shape[0] <= weight.shape[1]
        self.short, self.long = sorted(weight.shape)
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.device = weight.device
        self.norm: float | None = None
        self.floor = 0.0

    @property
    def scale(self) -> float:
        """What the products see W divided by."""
        return 2.0**self.exponent

    def screen(self) -> bool:
        """Refuse values that are not finite, and set the scale. False for a zero weight."""
        if self.weight.dtype == self.dtype:
            self.norm = float(torch.linalg.vector_norm(self.weight))
            if TINY < self.norm < 1 / TINY:
                return True
        low, high = (float(bound) for bound in torch.aminmax(self.weight))
        if not (math.isfinite(low) and math.isfinite(high)):
            count = int((~torch.isfinite(self.weight)).sum())
            raise NonFiniteWeight(
                f"a {tuple(self.weight.shape)} weight holds {count} NaN or infinite values: repair it"
            )
        largest, self.norm = max(-low, high), None
        self.exponent = 0 if TINY < largest < 1 / TINY else math.frexp(largest)[1]
        return largest > 0

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Slices along the long side, and W there, (short, c) if wide, else (c, short), in `dtype` and scaled."""
        W = self.weight
        if W.dtype == dtype and self.exponent == 0 and W.stride(1) == 1 and W.stride(0) >= W.shape[1]:
            yield slice(0, self.long), W
            return
        step = min(max(1, BLOCK // self.short), self.long)
        buffer = torch.empty(step * self.short, dtype=dtype, device=self.device)
        for start in range(0, self.long, step):
            part = slice(start, min(start + step, self.long))
            source = W[:, part] if self.wide else W[part]
            block = buffer[: source.numel()].view(source.shape).copy_(source)
            if self.exponent:  # In two factors: 2^140 alone is infinite in float32.
                half = -self.exponent // 2
                block.mul_(2.0**half).mul_(2.0 ** (-self.exponent - half))
            yield part, block

    def across(self, X: Tensor) -> Tensor:
        """What the rows of X are on the other side, (b, long)."""
        image, columns = X.new_empty(len(X), self.long), X.t().contiguous()
        for part, block in self.blocks(X.dtype):
            image[:, part] = X @ block if self.wide else (block @ columns).t()
        return image

    def back(self, Y: Tensor) -> Tensor:
        """What the rows of Y, (b, long), are on the short side, (b, short)."""
        Z = Y.new_zeros(len(Y), self.short)
        for part, block in self.blocks(Y.dtype):
            Z.addmm_(Y[:, part], block.t() if self.wide else block)
        return Z

    def normal(self, X: Tensor, image: Tensor | None = None) -> Tensor:
        """X·N; fills `image`, (b, long), with what the rows of X are on the other side."""
        Z, columns = None, X.t().contiguous()
        for part, block in self.blocks(X.dtype):
            Y = X @ block if self.wide else (block @ columns).t()
            left, right = (block, Y.t()) if self.wide else (Y, block)
            Z = left @ right if Z is None else Z.addmm_(left, right)
            if image is not None:
                image[:, part] = Y
        assert Z is not None  # A weight has at least one block.
        return Z.t() if self.wide else Z

    def gram(self, dtype: torch.dtype) -> Tensor:
        """N itself."""
        N = torch.zeros(self.short, self.short, dtype=dtype, device=self.device)
        spans = [slice(start, min(start + SPAN, self.short)) for start in range(0, self.short, SPAN)]
        for _, block in self.blocks(dtype):
            rows = block if self.wide else block.t()
            for span in spans:  # Up to the diagonal: the rest is the same.
                N[span, : span.stop].addmm_(rows[span], rows[: span.stop].t())
        for span in spans:
            N[: span.start, span] = N[span, : span.start].t()
        return N

    def energy(self) -> float:
        """‖W‖², scaled."""
        if self.norm is not None:
            return self.norm**2
        return sum(float(torch.linalg.vector_norm(block)) ** 2 for _, block in self.blocks(self.dtype))

    def dense(self) -> Tensor:
        """W in float64, scaled, the short side in rows."""
        W = torch.cat([block.clone() for _, block in self.blocks(torch.float64)], dim=int(self.wide))
        return W if self.wide else W.t()


class Implicit:
    """The same view of an operator."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        m, n = operator.shape
        self.wide = m <= n
        self.short, self.long = min(m, n), max(m, n)
        self.dtype = torch.float64 if operator.dtype == torch.float64 else torch.float32
        self.device = operator.device
        self.scale = 1.0
        self.floor = float(getattr(operator, "floor", 0.0))

    def screen(self) -> bool:
        probe = torch.randn(1, self.short, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)
        largest = float(self.across(probe).abs().max())
        if not math.isfinite(largest):
            raise NonFiniteWeight(f"a {tuple(self.operator.shape)} operator gives NaN or infinite products: repair it")
        self.scale = 2.0 ** math.frexp(largest)[1]
        return largest > 0

    def across(self, X: Tensor) -> Tensor:
        columns = X.to(self.dtype).t()
        return (self.operator.rmatmul(columns) if self.wide else self.operator.matmul(columns)).t() / self.scale

    def normal(self, X: Tensor, image: Tensor | None = None) -> Tensor:
        Y = self.across(X)
        if image is not None:
            image.copy_(Y)
        Z = (self.operator.matmul(Y.t()) if self.wide else self.operator.rmatmul(Y.t())).t() / self.scale
        return Z.to(X.dtype)

    def gram(self, dtype: torch.dtype) -> Tensor:
        W = self.dense().to(dtype)
        return W @ W.t()

    def energy(self) -> None:
        return None

    def dense(self) -> Tensor:
        return self.across(torch.eye(self.short, device=self.device)).double()


Sides = Dense | Implicit
