"""LoRA on Embedding: the branch looks up the columns of A. Dropout does not apply to indices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.errors import UnsupportedLayer
from headstart.lora.delta import Branch, difference
from headstart.lora.layers.layer import LoraLayer, Start, frozen_output
from headstart.lora.matrix import Layout


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

    def forward(self, ids: Tensor) -> Tensor:
        if not self.active:
            return self.base_layer(ids)  # type: ignore[no-any-return]
        return run(self.base_layer, self.layout, self.branch(), ids)


def run(base: Any, layout: Layout, branch: Branch, ids: Tensor) -> Tensor:
    """The frozen lookup and its branch."""
    y = frozen_output(base, branch, ids)
    A, B = difference((branch.A, branch.B), branch.anchor)
    rows = F.embedding(ids, A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
    out = F.linear(rows.to(y.dtype), B.to(y.dtype))
    # Gemma's embeddings multiply what they look up.
    scale = base._buffers.get("embed_scale")
    y = torch.add(y, out if scale is None else out * scale.to(out.dtype), alpha=branch.scaling)
    return y if branch.magnitude is None else y * branch.ratio().to(y.dtype)
