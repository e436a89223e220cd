"""Small models, each around one kind of layer: what the laws are checked on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Kind:
    """A small model around one kind of layer.

    Attributes:
        name: of the kind.
        make: the model; inputs: its positional arguments, and keywords: the others.
        fields: of the config, targets included.
        peft: whether PEFT adapts this kind at all.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    keywords: Callable[[], dict[str, Any]] = dict
    fields: Mapping[str, Any] = field(default_factory=dict)
    peft: bool = True


class Both(nn.Module):
    """Two layers of a kind that see the same inputs, with both outputs."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.left, self.right = make(), make()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.left(*args, **kwargs), self.right(*args, **kwargs)


class One(nn.Module):
    """One layer and no more."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.left = make()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.left(*args, **kwargs)


class Tied(nn.Module):
    """An embedding and a head that share one parameter, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.right.weight = self.left.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.right(self.left(ids))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Three experts in two parameters, stored (e, out, in), or (e, in, out) with transformers' flag."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = torch.randn(3, 8, 12), torch.randn(3, 12, 8)
        self.up = nn.Parameter(up.mT.contiguous() if is_transposed else up)
        self.down = nn.Parameter(down.mT.contiguous() if is_transposed else down)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up.mT, self.down.mT) if self.is_transposed else (self.up, self.down)
        return (torch.tanh(x @ up.mT) @ down.mT).sum(0)


class Bare(nn.Module):
    """One matrix that is no Linear's."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


def transformers_conv1d(m: int, n: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(m, n)


def _floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _ids() -> tuple[Tensor, ...]:
    return (torch.tensor([[1, 4, 4, 9], [0, 2, 10, 3]]),)


def _kind(
    name: str, make: Callable[[], nn.Module], *shape: int, dora: bool = False, peft: bool = True, **fields: Any
) -> list[Kind]:
    """The kind, and with `dora` the same kind under DoRA."""
    plain = Kind(
        name=name,
        make=lambda: Both(make),
        inputs=(lambda: (_floats(*shape),)) if shape else _ids,
        fields={"target_modules": ["left", "right"], **fields},
        peft=peft,
    )
    weighted = replace(plain, name=f"{name}_dora", fields={**plain.fields, "use_dora": True})
    return [plain, weighted] if dora else [plain]


def _attention(name: str, batch_first: bool, keywords: Callable[[], dict[str, Any]], cross: bool = False) -> Kind:
    query, key, value = _floats(3, 5, 8), _floats(3, 6 if cross else 5, 8), _floats(3, 6 if cross else 5, 8).flip(-1)
    inputs = tuple(x if batch_first else x.transpose(0, 1) for x in ((query, key, value) if cross else (query,) * 3))
    return Kind(
        name=name,
        make=lambda: One(lambda: nn.MultiheadAttention(8, 2, batch_first=batch_first)),
        inputs=lambda: inputs,
        keywords=keywords,
        fields={"target_modules": ["left"]},
    )


def _causal() -> dict[str, Any]:
    return {"attn_mask": torch.ones(5, 5).triu(1).bool(), "need_weights": False, "is_causal": True}


def _padded() -> dict[str, Any]:
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 5 + [True]])
    return {"key_padding_mask": padding, "average_attn_weights": False}


class Encoder(nn.Module):
    """torch's encoder, whose fast path reads the weights of its layers and never calls them."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y = self.encoder(x, src_key_padding_mask=padding)
        return y.masked_fill(padding[..., None], 0.0)  # type: ignore[no-any-return]


def _encoder(name: str, *wanted: str) -> Kind:
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    return Kind(name, Encoder, lambda: (_floats(2, 5, 8), padding), fields={"target_modules": list(wanted)})


def _parameters(name: str, make: Callable[[], nn.Module], *wanted: str) -> Kind:
    return Kind(
        name=name,
        make=lambda: Both(make),
        inputs=lambda: (_floats(5, 12),),
        fields={"target_modules": [], "target_parameters": list(wanted)},
    )


_PARTS = {"left": (True, False, True), "right": ((8, 17), (17, 27))}

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in [
        *_kind("linear", lambda: nn.Linear(12, 8), 2, 5, 12, dora=True),
        *_kind("linear_without_bias", lambda: nn.Linear(8, 12, bias=False), 5, 8),
        *_kind("conv1d_transformers", lambda: transformers_conv1d(8, 12), 2, 5, 12, dora=True),
        *_kind("embedding", lambda: nn.Embedding(11, 8), dora=True),
        *_kind("embedding_padded", lambda: nn.Embedding(11, 8, padding_idx=0)),
        *_kind("conv1d", lambda: nn.Conv1d(6, 8, 3, stride=2, padding=2, dilation=2), 2, 6, 9, dora=True),
        *_kind("conv2d", lambda: nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 2)), 2, 3, 7, 6, dora=True),
        *_kind("conv2d_1x1", lambda: nn.Conv2d(12, 8, 1, bias=False), 2, 12, 3, 3),
        *_kind("conv2d_same", lambda: nn.Conv2d(4, 8, 3, padding="same", dilation=2), 2, 4, 6, 5),
        *_kind("conv2d_grouped", lambda: nn.Conv2d(8, 8, 3, groups=2, padding=1), 2, 8, 4, 4),
        *_kind("conv1d_reflect", lambda: nn.Conv1d(6, 8, 3, padding=1, padding_mode="reflect"), 2, 6, 7, dora=True),
        *_kind("conv2d_circular", lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), 2, 4, 5, 5),
        *_kind("conv3d", lambda: nn.Conv3d(2, 8, 2, padding=1, stride=2), 2, 2, 3, 4, 3, dora=True),
        Kind("tied", Tied, _ids, fields={"target_modules": ["left", "right"]}),
        Kind("tied_head", Tied, _ids, fields={"target_modules": ["right"]}),
        _attention("attention", False, _padded, cross=True),
        _attention("attention_batch_first", True, _causal),
        _encoder("encoder", "self_attn", "linear1", "linear2"),
        _encoder("encoder_attention", "self_attn"),
        _encoder("encoder_linear", "linear2"),
        *_kind("parts", lambda: nn.Linear(12, 27), 5, 12, peft=False, parts=_PARTS),
        *_kind("parts_conv1d", lambda: transformers_conv1d(27, 12), 5, 12, dora=True, peft=False, parts=_PARTS),
        _parameters("parameter", Bare, "matrix"),
        _parameters("experts", Experts, "up", "down"),
        _parameters("experts_transposed", partial(Experts, is_transposed=True), "down", "up"),
    ]
}
