"""PEFT's LoRA layers with our branch: the class of an injected layer is exchanged for one of these.

Each is a subclass of the PEFT layer that it replaces, so that everything PEFT knows about it stays true.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners import lora
from torch import nn

from headstart.errors import UnsupportedLayer
from headstart.lora import delta
from headstart.lora.layers import attention, convolution, embedding, linear
from headstart.peft.shell import ShellLayer


class ShellLinear(ShellLayer, lora.Linear):
    run = staticmethod(linear.run)


class ShellEmbedding(ShellLayer, lora.Embedding):
    run = staticmethod(embedding.run)
    lora_embedding_A: Any
    lora_embedding_B: Any

    def key(self, letter: str, adapter: str) -> str:
        return f"lora_embedding_{letter}.{adapter}"

    def stored(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]

    def present(self) -> Any:
        return self.lora_embedding_A


class ShellConv1d(ShellLayer, lora.layer.Conv1d):
    run = staticmethod(convolution.run)


class ShellConv2d(ShellLayer, lora.layer.Conv2d):
    run = staticmethod(convolution.run)


class ShellConv3d(ShellLayer, lora.layer.Conv3d):
    run = staticmethod(convolution.run)


class ShellAttention(ShellLayer, lora.layer.MultiheadAttention):
    """PEFT registers the base's weights anew whenever modules are listed; here they stay the parameters they are."""

    run = staticmethod(attention.run)

    def _restore_weights(self) -> None:
        return None

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.MultiheadAttention:
        base = self.get_base_layer()
        assert isinstance(base, nn.MultiheadAttention)
        output = cast(ShellLayer, base.out_proj)
        if merge:
            self.merge(safe_merge, adapter_names)
            output.merge(safe_merge, adapter_names)
        base._modules["out_proj"] = output.get_base_layer()
        return base


class ParamWrapper(ShellLayer, lora.layer.ParamWrapper):
    """A bare parameter, swapped in for the forward. PEFT asks for it by the name of its class, so it has PEFT's."""

    parameter_name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        present = [name for name in self.active_adapters if name in self.present()]
        if self.disable_adapters or self.merged or len(present) != 1 or kwargs.get("adapter_names") is not None:
            return super().forward(*args, **kwargs)
        path = f"{'base_layer.' * _depth(self.base_layer)}{self.parameter_name}"
        weight = delta.effective_weight(self.layout, self.original, self.branch(present[0]))
        kwargs.pop("adapter_names", None)
        return torch.func.functional_call(self.base_layer, {path: weight}, args, kwargs)


def _depth(module: nn.Module) -> int:
    return 1 + _depth(module.base_layer) if isinstance(module, lora.layer.ParamWrapper) else 0


_SHELLS: dict[type[nn.Module], type[ShellLayer]] = {
    lora.Linear: ShellLinear,
    lora.Embedding: ShellEmbedding,
    lora.layer.Conv1d: ShellConv1d,
    lora.layer.Conv2d: ShellConv2d,
    lora.layer.Conv3d: ShellConv3d,
    lora.layer.ParamWrapper: ParamWrapper,
}


def _shell_of(kind: type[nn.Module]) -> type[ShellLayer] | None:
    """Our class for one of PEFT's. For quantised layers it is made when one is met: PEFT imports a library for each."""
    quantised = kind.__name__ in ("Linear4bit", "Linear8bitLt", "TorchaoLoraLinear")
    if kind not in _SHELLS and quantised and kind.__module__.startswith("peft."):
        _SHELLS[kind] = type(f"Shell{kind.__name__}", (ShellLayer, kind), {"run": staticmethod(linear.run)})
    return _SHELLS.get(kind)


def is_served(layer: nn.Module) -> bool:
    """Whether we have a class for one of PEFT's layers."""
    return _shell_of(type(layer)) is not None


def exchange(layer: nn.Module) -> ShellLayer:
    """Give a freshly injected PEFT layer our class.

    Raises:
        UnsupportedLayer: if PEFT made it of a kind that we do not serve, such as a quantised one.
    """
    if isinstance(layer, ShellLayer):
        return layer
    shell = _shell_of(type(layer))
    if shell is None:
        raise UnsupportedLayer(f"PEFT serves this layer with {type(layer).__name__}, which headstart does not")
    layer.__class__ = shell
    assert isinstance(layer, ShellLayer)
    return layer
