"""LoRA layers: a frozen module and a low-rank branch beside it, one class for each kind of module."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from headstart.lora import matrix
from headstart.lora.layers.attention import LoraAttention
from headstart.lora.layers.convolution import LoraConv
from headstart.lora.layers.embedding import LoraEmbedding
from headstart.lora.layers.experts import LoraExperts
from headstart.lora.layers.layer import LoraLayer, Start, frozen_module
from headstart.lora.layers.linear import LoraLinear
from headstart.lora.layers.trained import TrainedModule
from headstart.lora.layouts import Convolution, Experts, Layout

__all__ = [
    "LoraAttention",
    "LoraConv",
    "LoraEmbedding",
    "LoraExperts",
    "LoraLayer",
    "LoraLinear",
    "Start",
    "TrainedModule",
    "frozen_module",
    "lora_layers",
    "wrap",
]


def wrap(base: nn.Module, layout: Layout, start: Start, parameter: str = "weight") -> LoraLayer:
    """The LoRA layer for this frozen module."""
    kind = frozen_module(base)
    if isinstance(layout, Experts) or parameter != "weight":
        return LoraExperts(base, layout, start, parameter)
    if isinstance(kind, nn.MultiheadAttention):
        return LoraAttention(base, layout, start)
    if isinstance(kind, nn.Embedding):
        return LoraEmbedding(base, layout, start)
    if isinstance(layout, Convolution):
        return LoraConv(base, layout, start)
    if matrix.is_linear(kind):
        return LoraLinear(base, layout, start)
    return LoraExperts(base, layout, start, parameter)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Every LoRA layer of a model with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
