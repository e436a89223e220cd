"""LoRA on Embedding: the branch looks up the columns of A. Dropout does not apply to indices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.errors import UnsupportedLayer
from headstart.lora import matrix
from headstart.lora.delta import Branch, difference
from headstart.lora.layers.layer import LoraLayer, Start, frozen_output, swapped_output
from headstart.lora.layouts import Layout


class LoraEmbedding(LoraLayer):
    """Shapes: ids (…) → (…, m); lora_embedding_A (r, V), lora_embedding_B (m, r)."""

    def __init__(self, base: nn.Module, layout: Layout, start: Start, parameter: str = "weight") -> None:
        if isinstance(base, nn.Embedding) and base.max_norm is not None:
            raise UnsupportedLayer("an Embedding with max_norm writes to its weight in every forward: set it to None")
        super().__init__(base, layout, start, parameter)

    def _hold(self, A: Tensor, B: Tensor) -> None:
        self.lora_embedding_A, self.lora_embedding_B = nn.Parameter(A), nn.Parameter(B)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_embedding_A, self.lora_embedding_B

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.active:
            return self.base_layer(*args, **kwargs)  # type: ignore[no-any-return]
        return run(self.base_layer, self.layout, self.branch(), *args, **kwargs)


def run(base: Any, layout: Layout, branch: Branch, *args: Any, **kwargs: Any) -> Tensor:
    """The frozen lookup and its branch."""
    if layout.own_way:
        # Indices are not dropped anywhere.
        return swapped_output(base, layout, replace(branch, dropout=0.0), *args, **kwargs)  # type: ignore[no-any-return]
    return _looked_up(base, branch, *args, **kwargs)


def _looked_up(base: Any, branch: Branch, input: Tensor) -> Tensor:
    y = frozen_output(base, branch, input)
    A, B = difference((branch.A, branch.B), branch.anchor)
    rows = F.embedding(input, A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
    out = F.linear(rows.to(y.dtype), B.to(y.dtype))
    scale = matrix.embed_scale(base)
    if scale is not None:
        out = out * (scale.to(out.dtype) if isinstance(scale, Tensor) else scale)
    y = torch.add(y, out, alpha=branch.scaling)
    return y if branch.magnitude is None else y * branch.ratio().to(y.dtype)
