"""LoRA on Conv1d, Conv2d and Conv3d."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.lora import matrix
from headstart.lora.layers.layer import LoraLayer, dora_ratio


class LoraConv(LoraLayer):
    """Conv1d, 2d and 3d: A convolves as the frozen layer does, B is a 1×1 convolution behind it.

    Shapes: x (N, n, *) → (N, m, *); A (r, n/g, *k), B (m, r/g, 1, …).
    """

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        if not self.active:
            return y
        bias = self.base_layer._parameters["bias"]
        if self.magnitude is not None and bias is not None:
            y = y - self._per_channel(bias, y)
        seen = F.dropout(x, self._dropout(), training=True) if self._dropout() else x
        A, B = self.factors
        if self.anchor:
            A0, B0 = self.anchor
            out = self._branch(seen, A, B - B0) + self._branch(seen, A - A0, B0)
        else:
            out = self._branch(seen, A, B)
        y = torch.add(y, out, alpha=self.scaling)
        if self.magnitude is None:
            return y
        y = y * self._per_channel(dora_ratio(self.magnitude.flatten(), self.row_norms()), y)
        return y if bias is None else y + self._per_channel(bias, y)

    def _branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        base: Any = self.base_layer
        assert isinstance(self.layout, matrix.Convolution)
        groups = 1 if self.layout.is_dense(A) else base.groups
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(base.kernel_size)]
        padding = base.padding
        if base.padding_mode != "zeros":
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        h = convolve(x, A.to(x.dtype), None, base.stride, padding, base.dilation, groups)
        return convolve(h, B.to(h.dtype), groups=base.groups)

    def _per_channel(self, values: Tensor, y: Tensor) -> Tensor:
        return values.to(y.dtype).reshape(-1, *(1,) * len(self.base_layer.kernel_size))  # type: ignore[arg-type]
