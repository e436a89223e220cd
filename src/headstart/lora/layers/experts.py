"""LoRA on a bare parameter of any module, such as the stacked experts of a mixture: (m, n) or (e, m, n).

The module runs with W + s·B·A in the parameter's place; the sum is rounded to the weight's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headstart.lora.delta import Branch
from headstart.lora.layers.layer import LoraLayer
from headstart.lora.matrix import Layout


class LoraExperts(LoraLayer):
    """Shapes: lora_A (r, n), lora_B (m, r), or (e, r, n) and (e, m, r)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.base_layer(*args, **kwargs)
        path = f"{'base_layer.' * _depth(self.base_layer)}{self.parameter_name}"
        weight = effective_weight(self.layout, self.weight_parameter, self.branch())
        return torch.func.functional_call(self.base_layer, {path: weight}, args, kwargs)


def effective_weight(layout: Layout, weight: Tensor, branch: Branch) -> Tensor:
    """W + ΔW, differentiable in the factors."""
    weight = weight if branch.base is None else branch.base
    A, B = branch.A, branch.B
    if branch.anchor is None:
        change = B @ A
    else:
        A0, B0 = branch.anchor
        change = (B - B0) @ A + B0 @ (A - A0)
    change = change.mT if layout.transposed else change
    return torch.add(weight, change, alpha=branch.scaling).to(weight.dtype)


def _depth(module: nn.Module) -> int:
    return 1 + _depth(module.base_layer) if isinstance(module, LoraLayer) else 0
