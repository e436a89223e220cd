"""LoRA on a bare parameter, such as the stacked experts of a mixture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headstart.lora.layers.layer import LoraLayer


class LoraExperts(LoraLayer):
    """A bare parameter of any module, such as the stacked experts of a mixture: (m, n) or (e, m, n).

    The module runs with W + s·B·A in the parameter's place; the sum is rounded to the weight's dtype.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.base_layer(*args, **kwargs)
        path = f"{'base_layer.' * _depth(self.base_layer)}{self.parameter_name}"
        return torch.func.functional_call(self.base_layer, {path: self._effective()}, args, kwargs)

    def _effective(self) -> Tensor:
        weight = self.weight_parameter
        A, B = self.factors
        if self.anchor:
            A0, B0 = self.anchor
            change = (B - B0) @ A + B0 @ (A - A0)
        else:
            change = B @ A
        change = change.mT if self.layout.transposed else change
        return torch.add(weight, change, alpha=self.scaling).to(weight.dtype)


def _depth(module: nn.Module) -> int:
    return 1 + _depth(module.base_layer) if isinstance(module, LoraLayer) else 0
