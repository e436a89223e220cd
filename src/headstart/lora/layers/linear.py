"""LoRA on Linear and transformers' Conv1D, whole or some parts of a fused projection."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headstart.lora import branch as kernels
from headstart.lora import matrix, quantized
from headstart.lora.delta import Branch
from headstart.lora.layers.layer import LoraLayer, frozen_output, swapped_output
from headstart.lora.layouts import Layout

_OutProjection = nn.modules.linear.NonDynamicallyQuantizableLinear


class LoraLinear(LoraLayer):
    """Shapes: x (…, n) → (…, m); lora_A (r, n), lora_B (m, r)."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.active:
            return self.base_layer(*args, **kwargs)  # type: ignore[no-any-return]
        return run(self.base_layer, self.layout, self.branch(), *args, **kwargs)


def run(base: nn.Module, layout: Layout, branch: Branch, *args: Any, **kwargs: Any) -> Tensor:
    """The frozen layer and its branch: fused where the layer is no more than a product with its weight."""
    if layout.own_way:  # a router's scores and choice, a cosine, columns of its own beside, …
        return swapped_output(base, layout, branch, *args, **kwargs)  # type: ignore[no-any-return]
    x = args[0] if args else next(iter(kwargs.values()))
    A, B = layout.dense(branch.A, branch.B)
    frozen = layout.dense(*branch.anchor) if branch.anchor else None
    bias = base._parameters.get("bias")
    if _is_plain(base):
        return kernels.linear(
            x,
            matrix.parameter_of(base) if branch.base is None else branch.base,
            bias,
            A,
            B,
            branch.scaling,
            frozen=frozen,
            dropout=branch.dropout,
            magnitude=branch.magnitude,
            norm=branch.norm,
            transposed=layout.transposed,
        )
    y = frozen_output(base, branch, *args, **kwargs)
    if branch.magnitude is None:
        return kernels.add_branch(y, x, A, B, branch.scaling, frozen=frozen, dropout=branch.dropout)
    y = y if bias is None else y - bias
    y = kernels.add_branch(y, x, A, B, branch.scaling, frozen=frozen, dropout=branch.dropout)
    y = y * branch.ratio().to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def _is_plain(base: nn.Module) -> bool:
    """Whether calling the module is no more than a product with its weight."""
    if type(base) is not nn.Linear and type(base) is not _OutProjection and not matrix.is_conv1d(base):
        return False
    if quantized.is_quantized(base._parameters["weight"]):  # torchao, which keeps the class
        return False
    if "forward" in base.__dict__:  # accelerate's, which fetches an offloaded weight
        return False
    return not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
