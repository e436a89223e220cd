"""LoRA on MultiheadAttention: a branch on its input projection; its output projection is a LoRA layer of its own.

Queries, keys and values are projected here, and torch's attention is called with identities for its own projections:
exact in every dtype, where folding the branch into the weight would round it away in bf16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.lora import branch as kernels
from headstart.lora.delta import Branch
from headstart.lora.layers.layer import LoraLayer, Start
from headstart.lora.layouts import Layout


class LoraAttention(LoraLayer):
    """Shapes: those of nn.MultiheadAttention; lora_A (r, d), lora_B (3d, r)."""

    def __init__(self, base: nn.Module, layout: Layout, start: Start, parameter: str = "weight") -> None:
        super().__init__(base, layout, start, parameter)
        # TransformerEncoderLayer's fast path reads the frozen weights past this module; False keeps it off.
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        base = self.base_layer
        assert isinstance(base, nn.MultiheadAttention)
        options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        output = base.out_proj
        if not self.active and not (isinstance(output, LoraLayer) and output.active):
            return base(query, key, value, *options)  # type: ignore[no-any-return]
        return run(base, self.layout, self.branch() if self.active else None, query, key, value, *options)


def run(
    base: nn.MultiheadAttention,
    layout: Layout,
    branch: Branch | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The frozen attention with the branch in its input projection."""
    turned = base.batch_first and query.dim() == 3
    q, k, v = (_project(base, branch, x, i) for i, x in enumerate((query, key, value)))
    if turned:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    identity = torch.eye(base.embed_dim, dtype=q.dtype, device=q.device)
    out, weights = F.multi_head_attention_forward(
        q,
        k,
        v,
        base.embed_dim,
        base.num_heads,
        None,
        None,
        base.bias_k,
        base.bias_v,
        base.add_zero_attn,
        base.dropout,
        identity,
        None,
        training=base.training,
        key_padding_mask=_additive(key_padding_mask, q),
        need_weights=need_weights,
        attn_mask=_additive(attn_mask, q),
        use_separate_proj_weight=True,
        q_proj_weight=identity,
        k_proj_weight=identity,
        v_proj_weight=identity,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )
    out = base.out_proj(out)
    return out.transpose(0, 1) if turned else out, weights


def _project(base: nn.MultiheadAttention, branch: Branch | None, x: Tensor, index: int) -> Tensor:
    """The queries, the keys or the values."""
    weight = base.in_proj_weight if branch is None or branch.base is None else branch.base
    assert weight is not None
    rows = slice(index * base.embed_dim, (index + 1) * base.embed_dim)
    bias = None if base.in_proj_bias is None else base.in_proj_bias[rows]
    if branch is None:
        return F.linear(x, weight[rows], bias)
    frozen = (branch.anchor[0], branch.anchor[1][rows]) if branch.anchor else None
    return kernels.linear(
        x,
        weight[rows],
        bias,
        branch.A,
        branch.B[rows],
        branch.scaling,
        frozen=frozen,
        dropout=branch.dropout,
    )


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A boolean mask as the -inf mask that attention adds; a float mask as it is."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
