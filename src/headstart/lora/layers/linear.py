"""LoRA on Linear and transformers' Conv1D, whole or some parts of a fused projection."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headstart.lora import branch, matrix
from headstart.lora.layers.layer import LoraLayer, dora_ratio


class LoraLinear(LoraLayer):
    """Linear and transformers' Conv1D, whole or some parts of a fused projection.

    Shapes: x (…, n) → (…, m).
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        if not self.active:
            return base(x, *args, **kwargs)  # type: ignore[no-any-return]
        A, B = self.layout.dense(*self.factors)
        frozen = self.layout.dense(*self.anchor) if self.anchor else None
        norm = None if self.magnitude is None else self.row_norms()
        if _is_plain(base):
            return branch.linear(
                x,
                self.weight_parameter,
                base._parameters["bias"],
                A,
                B,
                self.scaling,
                frozen=frozen,
                dropout=self._dropout(),
                magnitude=self.magnitude,
                norm=norm,
                transposed=self.layout.transposed,
            )
        y = base(x, *args, **kwargs)
        if norm is None:
            return branch.add_branch(y, x, A, B, self.scaling, frozen=frozen, dropout=self._dropout())
        bias = base._parameters.get("bias")
        y = y if bias is None else y - bias
        y = branch.add_branch(y, x, A, B, self.scaling, frozen=frozen, dropout=self._dropout())
        return self._rescale(y, norm, bias)

    def _rescale(self, y: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
        y = y * dora_ratio(self.magnitude, norm).to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)


def _is_plain(base: nn.Module) -> bool:
    """Whether calling the module is no more than a product with its weight, so that it may be fused."""
    if type(base) is not nn.Linear and not matrix.is_conv1d(base) and type(base) is not _OutProjection:
        return False
    return not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)


_OutProjection = nn.modules.linear.NonDynamicallyQuantizableLinear
