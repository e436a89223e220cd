"""torch's transformer encoders, whose fast path reads the weights of their layers and never calls them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from headstart.lora.layers.layer import LoraLayer

_OFF: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoder: ("use_nested_tensor", False),
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
}


@dataclass(frozen=True)
class Switch:
    """An attribute that keeps an encoder off its fast path, and what it was before."""

    encoder: nn.Module
    name: str
    off: Any
    before: Any

    def set(self, off: bool) -> None:
        self.encoder.__dict__[self.name] = self.off if off else self.before


def switches(model: nn.Module, adapted: type[nn.Module] = LoraLayer) -> Iterator[Switch]:
    """The switches of every encoder that holds an adapted layer: off while the adapter is to take part."""
    for module in model.modules():
        for kind, (name, off) in _OFF.items():
            holds = isinstance(module, kind) and any(isinstance(inner, adapted) for inner in module.modules())
            if holds and name in module.__dict__:
                yield Switch(module, name, off, module.__dict__[name])
