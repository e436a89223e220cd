"""LoRA on Conv1d, Conv2d and Conv3d: A convolves as the frozen layer does, B is a 1×1 convolution behind it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.lora.delta import Branch
from headstart.lora.layers.layer import LoraLayer, frozen_output, swapped_output
from headstart.lora.layouts import Convolution, Layout


class LoraConv(LoraLayer):
    """Shapes: x (N, n, *) → (N, m, *); lora_A (r, n/g, *k), lora_B (m, r/g, 1, …)."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.active:
            return self.base_layer(*args, **kwargs)  # type: ignore[no-any-return]
        return run(self.base_layer, self.layout, self.branch(), *args, **kwargs)


def run(base: Any, layout: Layout, branch: Branch, *args: Any, **kwargs: Any) -> Tensor:
    """The frozen convolution and its branch."""
    if layout.own_way:
        return swapped_output(base, layout, branch, *args, **kwargs)  # type: ignore[no-any-return]
    return _convolved(base, layout, branch, *args, **kwargs)


def _convolved(base: Any, layout: Layout, branch: Branch, input: Tensor) -> Tensor:
    y = frozen_output(base, branch, input)
    if branch.magnitude is not None and base.bias is not None:
        y = y - _per_channel(base, base.bias, y)
    seen = F.dropout(input, branch.dropout) if branch.dropout else input
    if branch.anchor is None:
        out = _two(base, layout, seen, branch.A, branch.B)
    else:
        A0, B0 = branch.anchor
        out = _two(base, layout, seen, branch.A, branch.B - B0) + _two(base, layout, seen, branch.A - A0, B0)
    y = torch.add(y, out, alpha=branch.scaling)
    if branch.magnitude is None:
        return y
    y = y * _per_channel(base, branch.ratio(), y)
    return y if base.bias is None else y + _per_channel(base, base.bias, y)


def _two(base: Any, layout: Layout, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """B ∗ (A ∗ x)."""
    assert isinstance(layout, Convolution)
    groups = 1 if layout.is_dense(A) else base.groups
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(base.kernel_size)]
    padding = base.padding
    if base.padding_mode != "zeros":
        x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
    h = convolve(x, A.to(x.dtype), None, base.stride, padding, base.dilation, groups)
    return convolve(h, B.to(h.dtype), groups=base.groups)


def _per_channel(base: Any, values: Tensor, y: Tensor) -> Tensor:
    return values.to(y.dtype).reshape(-1, *(1,) * len(base.kernel_size))
