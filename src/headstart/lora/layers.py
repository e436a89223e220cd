"""LoRA layers: a frozen module and a low-rank branch beside it.

    y = W·x + s·B·A·d(x)                          d: dropout, in training
    y = W·x + s·(B·A − B₀·A₀)·d(x)                anchored: the function at step zero is the base's
    y = m/‖W + s·B·A‖ ⊙ (W·x + s·B·A·d(x))        DoRA, m: (m,), norms by row

Each class serves one kind of frozen module and holds it as `base_layer`, whose weight is never written to.
The parameters carry the names of PEFT's files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart import linalg
from headstart.errors import AdapterState, UnsupportedLayer
from headstart.lora import branch, matrix
from headstart.lora.matrix import Layout, Pair


@dataclass(frozen=True)
class Start:
    """The stored tensors that a layer begins with, and how it uses them.

    Attributes:
        A, B: the factors, as the layout stores them.
        anchor: frozen copies of both where the start must not move the function.
        rank, alpha, scaling: of the layer.
        frozen: the factors that do not train.
        dropout: on the branch, in training.
        magnitude: DoRA's row norms, (m,).
    """

    A: Tensor
    B: Tensor
    rank: int
    alpha: float
    scaling: float
    anchor: Pair | None = None
    frozen: frozenset[str] = frozenset()
    dropout: float = 0.0
    magnitude: Tensor | None = None


class Factor(nn.Module):
    """A parameter called `weight`, so that its name in a state dict is PEFT's."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


@dataclass
class Cache:
    """Row norms that hold as long as the tensors they came from are unchanged."""

    key: tuple[tuple[int, int], ...] = ()
    norms: Tensor | None = None
    squares: Tensor | None = None
    squares_key: tuple[int, int] = (0, -1)

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return Cache()

    def __reduce__(self) -> tuple[type[Cache], tuple[()]]:
        return Cache, ()


@dataclass
class Merged:
    """The parameter that a merge took out, so that an unmerge can put back the same bits."""

    original: list[nn.Parameter] = field(default_factory=list)


class LoraLayer(nn.Module):
    """What all kinds share: the factors, their change of the weight, and the way in and out of it."""

    base_layer: nn.Module

    def __init__(self, base: nn.Module, layout: Layout, start: Start, parameter: str = "weight") -> None:
        super().__init__()
        self.base_layer = base
        self.layout = layout
        self.parameter_name = matrix.weight_name(matrix_owner(base), parameter)
        self.rank, self.alpha, self.scaling, self.dropout = start.rank, start.alpha, start.scaling, start.dropout
        self.enabled = True
        self._cache = Cache()
        self._merged = Merged()
        self._hold(start.A, start.B)
        for name, factor in zip("AB", self.factors, strict=True):
            factor.requires_grad_(name not in start.frozen)
        anchor_A, anchor_B = start.anchor or (None, None)
        self.register_buffer("anchor_A", anchor_A)
        self.register_buffer("anchor_B", anchor_B)
        self.anchor_A: Tensor | None
        self.anchor_B: Tensor | None
        magnitude = None if start.magnitude is None else nn.Parameter(start.magnitude)
        self.register_parameter("lora_magnitude_vector", magnitude)
        for module in self.modules():
            if module is self or isinstance(module, Factor):
                module.training = base.training

    def _hold(self, A: Tensor, B: Tensor) -> None:
        self.lora_A, self.lora_B = Factor(A), Factor(B)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B, as they are stored."""
        return self.lora_A.weight, self.lora_B.weight

    @property
    def anchor(self) -> Pair | None:
        """A₀ and B₀, as they are stored."""
        return None if self.anchor_A is None or self.anchor_B is None else (self.anchor_A, self.anchor_B)

    @property
    def magnitude(self) -> nn.Parameter | None:
        return self.lora_magnitude_vector

    @property
    def active(self) -> bool:
        """Whether the branch takes part in the forward.

        Raises:
            AdapterState: if the layer is merged and about to be trained.
        """
        if self._merged.original:
            if self.training and torch.is_grad_enabled():
                raise AdapterState("this layer is merged, its factors would get no gradient: unmerge(model) first")
            return False
        return self.enabled

    @property
    def weight_parameter(self) -> nn.Parameter:
        """The frozen weight (the merged one while merged)."""
        weight = matrix_owner(self.base_layer)._parameters[self.parameter_name]
        assert weight is not None
        return weight

    @property
    def original(self) -> nn.Parameter:
        """The frozen weight, merged or not."""
        return self._merged.original[0] if self._merged.original else self.weight_parameter

    def change(self) -> list[Pair]:
        """The blocks' (A, B) with s·B·A the change of each block.

        Anchored, B·A − B₀·A₀ = [B − B₀ | B₀]·[A ; A − A₀]: zero to the bit where nothing was trained.
        """
        pairs = self.layout.unpack(*(factor.detach() for factor in self.factors))
        if self.anchor is None:
            return pairs
        anchors = self.layout.unpack(*self.anchor)
        return [
            (torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1))
            for (A, B), (A0, B0) in zip(pairs, anchors, strict=True)
        ]

    def plain_factors(self, rank: int | None = None) -> tuple[Tensor, Tensor, int, float]:
        """The stored tensors of a plain LoRA that makes the same change, its rank, and the energy it drops.

        Anchored, it is the exact [A ; A₀], [B | −B₀] of rank 2r: the factors' own bits. With `rank`, it is the best
        of that rank.
        """
        if rank is not None:
            smaller = [linalg.recompress(B, A, self.layout.block_rank(rank)) for A, B in self.change()]
            A, B = self.layout.pack([(A, B) for B, A, _ in smaller])
            return A, B, rank, max(dropped for _, _, dropped in smaller)
        A, B = (factor.detach() for factor in self.factors)
        if self.anchor is None:
            return A, B, self.rank, 0.0
        pairs = zip(self.layout.unpack(A, B), self.layout.unpack(*self.anchor), strict=True)
        both = [(torch.cat([A, A0]), torch.cat([B, -B0], dim=1)) for (A, B), (A0, B0) in pairs]
        return *self.layout.pack(both), 2 * self.rank, 0.0

    def merged_weight(self) -> Tensor:
        """A new tensor: the weight with the branch folded in, each element rounded once."""
        weight = self.original.detach()
        changes = self.change()
        if self.magnitude is not None:
            ratio = self.magnitude.detach().float() / self.row_norms()
            return _rescaled(self.layout, weight, changes, self.scaling, _one_where_undefined(ratio))
        blocks = self.layout.blocks(weight)
        if len(blocks) == 1 and blocks[0].numel() == weight.numel():
            ((A, B),) = changes
            merged = _oriented_add(blocks[0], B, A, self.scaling)
            return (merged.T if self.layout.transposed else merged).reshape_as(weight)
        merged = weight.clone()
        for new, (A, B) in zip(self.layout.blocks(merged), changes, strict=True):
            new.copy_(_oriented_add(new, B, A, self.scaling))
        return merged

    def row_norms(self) -> Tensor:
        """‖W + s·B·A‖ of every row, (m,), float32; never through a dense B·A."""
        weight = self.original.detach()
        sources = (weight, *self.factors)
        if torch.compiler.is_compiling() or any(t.is_inference() for t in sources):
            return self._row_norms(weight, None)
        squares_key = (weight.data_ptr(), weight._version)
        if self._cache.squares_key != squares_key:
            self._cache.squares = torch.cat([linalg.row_norms_squared(b) for b in self.layout.blocks(weight)])
            self._cache.squares_key = squares_key
        key = tuple((t.data_ptr(), t._version) for t in sources)
        # In training, optimisers may write through .data, which no version counter sees.
        if self.training or self._cache.key != key or self._cache.norms is None:
            self._cache.norms, self._cache.key = self._row_norms(weight, self._cache.squares), key
        return self._cache.norms

    def _row_norms(self, weight: Tensor, squares: Tensor | None) -> Tensor:
        blocks = self.layout.blocks(weight)
        parts = [None] * len(blocks) if squares is None else squares.split([len(b) for b in blocks])
        norms = [
            linalg.lowrank_row_norms(block, B, A, self.scaling, squared=part)
            for block, (A, B), part in zip(blocks, self.change(), parts, strict=True)
        ]
        return norms[0] if len(norms) == 1 else torch.cat(norms)

    def merge(self, weight: Tensor) -> None:
        """Put a merged weight in the place of the frozen one, which is kept for `unmerge`."""
        if not self._merged.original:
            self._merged.original.append(self.weight_parameter)
        matrix_owner(self.base_layer)._parameters[self.parameter_name] = nn.Parameter(weight, requires_grad=False)

    def unmerge(self) -> None:
        """Put the frozen weight back: the same parameter, the same bits."""
        if self._merged.original:
            matrix_owner(self.base_layer)._parameters[self.parameter_name] = self._merged.original.pop()

    @property
    def merged(self) -> bool:
        return bool(self._merged.original)

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def __getattr__(self, name: str) -> Any:
        # Models read `layer.weight.dtype`, `layer.in_features`, …: the frozen module answers.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def extra_repr(self) -> str:
        words = [f"rank={self.rank}", f"scaling={self.scaling:.4g}"]
        words += [f"dropout={self.dropout:g}"] if self.dropout else []
        words += ["anchored"] if self.anchor is not None else []
        words += ["dora"] if self.magnitude is not None else []
        words += ["merged"] if self.merged else [] if self.enabled else ["disabled"]
        return ", ".join(words)


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
                base._parameters["weight"],
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
        y = y * _ratio(self.magnitude, norm).to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)


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
        out = self._branch(ids, *_difference(self.factors, self.anchor), y)
        y = torch.add(y, out, alpha=self.scaling)
        return y if self.magnitude is None else y * _ratio(self.magnitude, self.row_norms()).to(y.dtype)

    def _branch(self, ids: Tensor, A: Tensor, B: Tensor, y: Tensor) -> Tensor:
        base = self.base_layer
        assert isinstance(base, nn.Embedding)
        rows = F.embedding(ids, A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq).to(y.dtype)
        out = F.linear(rows, B.to(y.dtype))
        # Gemma's embeddings multiply what they look up.
        scale = base._buffers.get("embed_scale")
        return out if scale is None else out * scale.to(out.dtype)


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
        y = y * self._per_channel(_ratio(self.magnitude.flatten(), self.row_norms()), y)
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


class LoraAttention(LoraLayer):
    """MultiheadAttention: the branch on its input projection; its output projection is a LoraLinear of its own.

    Queries, keys and values are projected here, and torch's attention is called with identities for its own
    projections: exact in every dtype, where folding the branch into the weight would round it away in bf16.
    Shapes: those of nn.MultiheadAttention; A (r, d), B (3d, r).
    """

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
        if not self.active and not _is_active(base.out_proj):
            return base(  # type: ignore[no-any-return]
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = (self._project(x, i) for i, x in enumerate((query, key, value)))
        batched = query.dim() == 3
        if base.batch_first and batched:
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
            training=self.training,
            key_padding_mask=_additive(key_padding_mask, q),
            need_weights=need_weights,
            attn_mask=_additive(attn_mask, q),
            use_separate_proj_weight=True,
            q_proj_weight=identity,
            k_proj_weight=identity,
            v_proj_weight=identity,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal and attn_mask is not None,
        )
        out = base.out_proj(out)
        return out.transpose(0, 1) if base.batch_first and batched else out, weights

    def _project(self, x: Tensor, index: int) -> Tensor:
        base = self.base_layer
        assert isinstance(base, nn.MultiheadAttention) and base.in_proj_weight is not None
        rows = slice(index * base.embed_dim, (index + 1) * base.embed_dim)
        bias = None if base.in_proj_bias is None else base.in_proj_bias[rows]
        if not self.active:
            return F.linear(x, base.in_proj_weight[rows], bias)
        A, B = self.factors
        frozen = (self.anchor[0], self.anchor[1][rows]) if self.anchor else None
        return branch.linear(
            x, base.in_proj_weight[rows], bias, A, B[rows], self.scaling, frozen=frozen, dropout=self._dropout()
        )


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


class TrainedModule(nn.Module):
    """A module that trains in full beside the adapter (`modules_to_save`): a copy, with the original kept."""

    def __init__(self, original: nn.Module, trained: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.trained = trained.requires_grad_(True)
        self.enabled = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.trained if self.enabled else self.original_module)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "trained":
                raise
            return getattr(super().__getattr__("trained"), name)


def _difference(factors: Pair, anchor: Pair | None) -> Pair:
    """One pair whose product is B·A − B₀·A₀, and zero to the bit where nothing was trained."""
    if anchor is None:
        return factors
    (A, B), (A0, B0) = factors, anchor
    return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)


def wrap(base: nn.Module, layout: Layout, start: Start, parameter: str = "weight") -> LoraLayer:
    """The LoRA layer for this frozen module."""
    kind = matrix_owner(base)
    if isinstance(layout, matrix.Experts) or parameter != "weight":
        return LoraExperts(base, layout, start, parameter)
    if isinstance(kind, nn.MultiheadAttention):
        return LoraAttention(base, layout, start)
    if isinstance(kind, nn.Embedding):
        return LoraEmbedding(base, layout, start)
    if isinstance(layout, matrix.Convolution):
        return LoraConv(base, layout, start)
    if matrix.is_linear(kind):
        return LoraLinear(base, layout, start)
    return LoraExperts(base, layout, start, parameter)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Every LoRA layer of a model with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def matrix_owner(module: nn.Module) -> nn.Module:
    """The frozen module below any number of LoRA layers."""
    while isinstance(module, LoraLayer):
        module = module.base_layer
    return module


def _depth(module: nn.Module) -> int:
    return 1 + _depth(module.base_layer) if isinstance(module, LoraLayer) else 0


def _is_active(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) and module.active


def _is_plain(base: nn.Module) -> bool:
    """Whether calling the module is no more than a product with its weight, so that it may be fused."""
    if type(base) is not nn.Linear and not matrix.is_conv1d(base) and type(base) is not _OutProjection:
        return False
    return not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)


_OutProjection = nn.modules.linear.NonDynamicallyQuantizableLinear


def _ratio(magnitude: Tensor | None, norm: Tensor) -> Tensor:
    assert magnitude is not None
    return _one_where_undefined(magnitude / norm)


def _one_where_undefined(ratio: Tensor) -> Tensor:
    # A zero row has magnitude 0 and norm 0: its direction is undefined, its output stays what it is.
    return torch.where(ratio.isfinite(), ratio, torch.ones_like(ratio))


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A boolean mask as the -inf mask that attention adds; a float mask as it is."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


def _oriented_add(weight: Tensor, B: Tensor, A: Tensor, scaling: float) -> Tensor:
    """W + s·B·A, walking the weight in the order in which it lies in memory."""
    if weight.stride(-1) != 1 and weight.stride(0) == 1:
        return linalg.add_lowrank(weight.T, A.T, B.T, scaling).T
    return linalg.add_lowrank(weight, B, A, scaling)


def _rescaled(layout: Layout, weight: Tensor, changes: list[Pair], scaling: float, ratio: Tensor) -> Tensor:
    """DoRA folded in: ratio ⊙ (W + s·B·A), in float64 by blocks of rows, rounded once."""
    merged = weight.clone()
    done = 0
    for new, (A, B) in zip(layout.blocks(merged), changes, strict=True):
        A64 = A.double()
        for start in range(0, len(new), 256):
            rows = slice(start, min(start + 256, len(new)))
            summed = torch.addmm(new[rows].double(), B[rows].double(), A64, alpha=scaling)
            new[rows] = (summed * ratio[done + rows.start : done + rows.stop, None]).to(new.dtype)
        done += len(new)
    return merged
