"""LoRA on a bare parameter of any module, such as the stacked experts of a mixture: (m, n) or (e, m, n).

The module runs with W + s·B·A in the parameter's place; the sum is rounded to the weight's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from headstart.lora import delta
from headstart.lora.layers.layer import LoraLayer


class LoraExperts(LoraLayer):
    """Shapes: lora_A (r, n), lora_B (m, r), or (e, r, n) and (e, m, r)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.base_layer(*args, **kwargs)
        path = f"{'base_layer.' * _depth(self.base_layer)}{self.parameter_name}"
        weight = delta.effective_weight(self.layout, self.weight_parameter, self.branch())
        return torch.func.functional_call(self.base_layer, {path: weight}, args, kwargs)


def _depth(module: nn.Module) -> int:
    return 1 + _depth(module.base_layer) if isinstance(module, LoraLayer) else 0
