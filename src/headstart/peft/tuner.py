"""PEFT's LoraModel, which switches, merges and unloads adapters, made exact."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from headstart.errors import AdapterState, NonFiniteWeight
from headstart.lora import quantized
from headstart.lora.adapter import base_name
from headstart.lora.layers.encoder import Switch, switches
from headstart.peft.inject import take_apart
from headstart.peft.shell import ShellLayer, shell_layers


class Originals:
    """What unloading puts back besides the modules, and disabling for a while.

    Attributes:
        flags: `requires_grad` of the base's parameters.
        biases: of the biases that train, the base's values by their name in the base.
        switches: what keeps torch's encoders from computing past the layers.
        blocks: the 4-bit layers that bitsandbytes is kept from turning around.
    """

    def __init__(self, model: nn.Module) -> None:
        self.flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.biases: dict[str, Tensor] = {}
        self.switches: list[Switch] = []
        self.blocks: list[nn.Module] = []
        # While the adapters are disabled: what enabling puts back.
        self.trained: dict[str, Tensor] = {}
        self.asleep: list[tuple[nn.Parameter, bool]] = []


class ShellTuner(lora.LoraModel):
    """What `PeftModel.base_model` is here."""

    model: nn.Module
    originals: Originals

    def settle(self, biases: Mapping[str, nn.Parameter], trainable: bool) -> None:
        """After an injection: let these biases train, and keep encoders and 4-bit layers from what has no gradient."""
        for name, parameter in biases.items():
            self.originals.biases.setdefault(name, parameter.detach().clone())
            parameter.requires_grad_(trainable)
        self._switch(off=False)
        self.originals.switches = list(switches(self.model, ShellLayer))
        self._switch(off=True)
        self.originals.blocks += quantized.turning(self.model)
        quantized.keep_blocks(self.originals.blocks)

    def biases(self) -> dict[str, nn.Parameter]:
        """The biases that train, by name."""
        return {n: p for n, p in self.model.named_parameters() if base_name(n) in self.originals.biases}

    def trained_biases(self) -> dict[str, Tensor]:
        """Their trained values, also while the adapters are disabled."""
        return {name: self.originals.trained.get(name, bias) for name, bias in self.biases().items()}

    def _switch(self, off: bool) -> None:
        for switch in self.originals.switches:
            switch.set(off)

    def disable_adapter_layers(self) -> None:
        """Until `enable_adapter_layers` the model is the base model to the bit, the biases that train included."""
        kept = self.originals
        if not kept.asleep:
            kept.asleep = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
            self._switch(off=False)
            for name, bias in self.biases().items():
                # Through .data: a graph that waits for its backward does not mind a value that comes back.
                kept.trained[name], bias.data = bias.data, kept.biases[base_name(name)].to(bias)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias")
            super().disable_adapter_layers()

    def enable_adapter_layers(self) -> None:
        super().enable_adapter_layers()
        kept = self.originals
        if kept.asleep:
            self._switch(off=True)
            for name, bias in self.biases().items():
                bias.data = kept.trained.pop(name)
            for parameter, flag in kept.asleep:
                parameter.requires_grad_(flag)
            kept.asleep = []

    def set_adapter(self, adapter_name: str | list[str], *args: Any, **kwargs: Any) -> None:
        super().set_adapter(adapter_name, *args, **kwargs)
        # While disabled: enabling lets the adapters train that are active then.
        inner = {p for name, p in self.named_parameters() if ".lora_" in name or ".modules_to_save." in name}
        self.originals.asleep = [(p, flag) for p, flag in self.originals.asleep if p not in inner]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the weights: every layer, or none.

        Raises:
            NonFiniteWeight: if a factor holds NaN or infinity. AdapterState: if an adapter is no product of factors.
        """
        layers = self._layers()
        _check_mergeable(layers, adapter_names)
        before = [(layer, layer.held(), list(layer.merged_adapters)) for layer in layers]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except BaseException:
            for layer, weight, names in before:
                layer.merged_again(weight, names)
            raise

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The model with the adapters folded in, made of its own modules."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            self.merge_adapter(adapter_names, safe_merge)
        flags = {id(parameter): flag for parameter, flag in self.originals.flags}
        for layer in self._layers():
            weight = layer.get_base_layer()._parameters[layer.weight_name]
            if weight is not None and weight is not layer.original:
                weight.requires_grad_(flags.get(id(layer.original), False))
        self._leave(trained=True)
        # PEFT's own housekeeping, with nothing left to merge.
        return super().merge_and_unload()

    def unload(self) -> nn.Module:
        """The base model again, to the bit, its flags and biases included."""
        self.enable_adapter_layers()
        for layer in self._layers():
            layer.unmerge()
        for name, bias in self.biases().items():
            bias.data = self.originals.biases[base_name(name)].to(bias)
        self._leave(trained=False)
        return super().unload()

    def _leave(self, trained: bool) -> None:
        take_apart(self.model, trained)
        for parameter, flag in self.originals.flags:
            parameter.requires_grad_(flag)
        self._switch(off=False)
        quantized.release_blocks(self.originals.blocks)
        self.originals.blocks = []
        self.model.__dict__.pop("peft_config", None)  # which 0.18 leaves behind

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around a forward that mixes adapters within a batch. Should it fail, PEFT's hooks do not stay behind."""
        mixed = kwargs.get("adapter_names")
        self._refuse_anchored(set(mixed or ()))
        hooks = [(module, set(module._forward_pre_hooks)) for module in self.modules()] if mixed else []
        try:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
        finally:
            for module, known in hooks:
                for key in set(module._forward_pre_hooks) - known:
                    module._forward_pre_hooks.pop(key)
                    module._forward_pre_hooks_with_kwargs.pop(key, None)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Refuses anchored adapters: PEFT would combine the factors and forget the anchors."""
        self._refuse_anchored(adapters)
        super().add_weighted_adapter(adapters, *args, **kwargs)

    def _refuse_anchored(self, adapters: Iterable[str]) -> None:
        for adapter in adapters:
            for _, layer in shell_layers(self.model, adapter):
                if reason := layer.unmixable(adapter):
                    raise AdapterState(reason)

    def _layers(self) -> list[ShellLayer]:
        return [module for module in self.model.modules() if isinstance(module, ShellLayer)]


def _check_mergeable(layers: Iterable[ShellLayer], adapters: Sequence[str] | None) -> None:
    for layer in layers:
        for adapter in layer.active_adapters if adapters is None else adapters:
            if reason := layer.unmergeable(adapter):
                raise AdapterState(reason)
            factors = layer.stored(adapter) if adapter in layer.present() else ()
            if not all(bool(torch.isfinite(factor.detach().sum())) for factor in factors):
                raise NonFiniteWeight(f"a factor of {adapter!r} holds NaN or infinity: it cannot be merged")
