"""LoRA on Embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.errors import UnsupportedLayer
from headstart.lora.layers.layer import LoraLayer, Start, difference, dora_ratio
from headstart.lora.matrix import Layout


class LoraEmbedding(LoraLayer):
    """Embedding: the branch looks up the columns of A. Dropout does not apply to indices.

    Shapes: ids (…) → (…, m); lora_embedding_A (r, V), lora_embedding_B (m, r).
    """

    def __init__(self, base: nn.Module, layout: Layout, start: Start, parameter: str = "weight") -> None:
        assert isinstance(base, nn.Embedding)
        if base.max_norm is not None:
            raise UnsupportedLayer("an Embedding with max_norm writes to its weight in every forward: set it to None")
        super().__init__(base, layout, start, parameter)

    def _hold(self, A: Tensor, B: Tensor) -> None:
        self.lora_embedding_A, self.lora_embedding_B = nn.Parameter(A), nn.Parameter(B)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_embedding_A, self.lora_embedding_B

    def forward(self, ids: Tensor) -> Tensor:
        base = self.base_layer
        assert isinstance(base, nn.Embedding)
        y: Tensor = base(ids)
        if not self.active:
            return y
        out = self._branch(ids, *difference(self.factors, self.anchor), y)
        y = torch.add(y, out, alpha=self.scaling)
        return y if self.magnitude is None else y * dora_ratio(self.magnitude, self.row_norms()).to(y.dtype)

    def _branch(self, ids: Tensor, A: Tensor, B: Tensor, y: Tensor) -> Tensor:
        base = self.base_layer
        assert isinstance(base, nn.Embedding)
        rows = F.embedding(ids, A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq).to(y.dtype)
        out = F.linear(rows, B.to(y.dtype))
        # Gemma's embeddings multiply what they look up.
        scale = base._buffers.get("embed_scale")
        return out if scale is None else out * scale.to(out.dtype)
