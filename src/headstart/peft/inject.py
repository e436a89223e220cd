"""PEFT's injection, made to leave no trace where it fails, and our starts in the layers that it made."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from headstart.errors import AdapterState, UnsupportedLayer
from headstart.lora import matrix, quantized
from headstart.lora.layers import Start
from headstart.lora.targets import Target
from headstart.peft.layers import ShellAttention, exchange, is_served
from headstart.peft.shell import ShellLayer

# What PEFT warns of at injection, and what does not hold with our layers.
_UNTRUE = (
    "fan_in_fan_out is set to",  # seen to by the layouts
    "LoRA adapter added to ConvNd layer with groups > 1",  # merged exactly
    "Model has `tie_word_embeddings=True`",  # the shared weight is not written to
    "The following rank_pattern keys did not match",  # they name parameters, which PEFT does not look at
    "The following alpha_pattern keys did not match",
    "Unsupported layer type",  # 0.18, of modules whose parameters are adapted
)


class Snapshot:
    """What stands in a model: its modules, parameters and hooks, their flags and modes. No values."""

    def __init__(self, model: nn.Module) -> None:
        self.flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.states: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        for module in model.modules():
            attributes = module.__dict__
            tables = {name: dict(value) for name, value in attributes.items() if isinstance(value, dict)}
            self.states.append((attributes, dict(attributes), tables))

    def restore_quantized(self) -> None:
        """Put the quantised weights back: PEFT reads one by putting a copy in its place, which loses 8-bit scales."""
        for attributes, _, tables in self.states:
            for name, parameter in tables["_parameters"].items():
                if quantized.is_quantized(parameter):
                    attributes["_parameters"][name] = parameter

    def restore(self) -> None:
        """Put everything back, in place: handles of hooks hold the tables themselves."""
        for attributes, before, tables in self.states:
            attributes.clear()
            attributes.update(before)
            for name, table in tables.items():
                attributes[name].clear()
                attributes[name].update(table)
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)


@contextmanager
def injection(model: nn.Module, config: lora.LoraConfig) -> Iterator[None]:
    """Around PEFT's injection: it is undone where it fails, silent, and draws nothing from the global generator."""
    config._register_custom_module({nn.MultiheadAttention: ShellAttention})
    before = Snapshot(model)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            for message in _UNTRUE:
                warnings.filterwarnings("ignore", re.escape(message))
            yield
        before.restore_quantized()
    except BaseException:
        before.restore()
        raise


def enter(model: nn.Module, adapter: str, starts: Sequence[tuple[Target, Start]]) -> None:
    """Give the layers that PEFT made our class, and each its start."""
    injected = {_adapted(module): module for module in model.modules() if isinstance(module, lora.LoraLayer)}
    for target, start in starts:
        layer = injected.get((target.module, target.parameter))
        if layer is None:
            raise UnsupportedLayer(f"PEFT did not adapt {target.name!r}: adapt it with headstart.adapt")
        exchange(layer).enter(adapter, start, target.layout, target.parameter)
    for target, _ in starts:
        # A module that stands in several places was replaced in one of them.
        occupants = [parent._modules[leaf] for parent, leaf in target.holders]
        wrapper = next(occupant for occupant in occupants if occupant is not target.module)
        for parent, leaf in target.holders:
            parent._modules[leaf] = wrapper


def adopt(model: nn.Module) -> None:
    """Give our class to the layers that PEFT made of its own accord, so that they merge and unload as ours do."""
    for layer in list(model.modules()):
        if isinstance(layer, lora.LoraLayer) and not isinstance(layer, ShellLayer) and is_served(layer):
            module, parameter = _adapted(layer)
            exchange(layer).adopt(matrix.layout(module, parameter), parameter)


def _adapted(layer: Any) -> tuple[nn.Module, str]:
    """What one of PEFT's layers adapts."""
    return layer.get_base_layer(), layer.parameter_name if isinstance(layer, lora.layer.ParamWrapper) else "weight"


def take_apart(model: nn.Module, trained: bool = False) -> None:
    """Put the modules back that PEFT wraps; with `trained`, the trained copies of those that train in full."""
    for parent in list(model.modules()):
        for leaf, child in parent._modules.items():
            parent._modules[leaf] = _unwrapped(child, trained)


def _unwrapped(module: Any, trained: bool) -> Any:
    while isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
        if isinstance(module, ModulesToSaveWrapper):
            active = module.active_adapters if trained else []
            module = module.modules_to_save[active[0]] if active else module.original_module
        else:
            module = vars(module)["_modules"]["base_layer"]
    return module


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The base model as it was before any adapter, to look at.

    Raises:
        AdapterState: if an adapter is merged.
    """
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
        raise AdapterState("an adapter is merged, and a start needs the base's own weights: unmerge_adapter() first")
    before = Snapshot(model)
    take_apart(model)
    try:
        yield model
    finally:
        before.restore()
