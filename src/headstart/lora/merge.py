"""Fold an adapter into the weights, and take it back: computed for every layer first, put in after."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headstart import linalg
from headstart.errors import AdapterState, BadOption, MetaWeight, NonFiniteWeight
from headstart.lora import delta, matrix, quantized
from headstart.lora.adapter import Adapter, adapter_of, put_back, take_out
from headstart.lora.layers import LoraLayer, frozen_module
from headstart.lora.targets import Holders, holders_of


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        lost: by layer, the share of the update that rounding to the weight's dtype took away, ‖(W' − W) − Δ‖/‖Δ‖,
            measured on sampled rows. A quantised weight is quantised anew, and the error of that is what is lost, over
            all rows: above 1 it is larger than the update.
    """

    lost: Mapping[str, float]

    @property
    def worst(self) -> float:
        return max(self.lost.values(), default=0.0)


def merge(model: nn.Module, *, reversible: bool = False, in_place: bool = False) -> MergeReport:
    """Fold the adapter into the weights.

    In float16 and bfloat16 every element is the float64 sum, rounded once. In float32 it is a chain of
    multiply-adds, wrong by a few ulp of its terms. With DoRA it is computed in float64 and then cast.

    The merged weights are new tensors, which are all there before the first is put in: a merge needs memory for one
    more copy of the adapted weights, and a reversible one keeps both. What shares a weight with an adapted layer keeps
    its own. `in_place` goes layer by layer through the weights themselves, and needs memory for one layer.

    Args:
        model: an adapted model.
        reversible: keep the adapter and the frozen weights, so that `unmerge(model)` restores the same bits.
            Otherwise the adapter is gone, and the model is made of its own modules again.
        in_place: write into the frozen weights, also for whoever else holds them outside of this model. Interrupted, it
            leaves some layers merged and the others adapted: the outputs are the same, the first ones' weights gone.

    Returns:
        How much of the update survived the rounding, by layer.

    Raises:
        BadOption: if it is to be reversible and in place. AdapterState: if there is no adapter. MetaWeight: if a weight
            is not loaded. NonFiniteWeight: if a factor is not finite. Nothing is changed then.
    """
    if reversible and in_place:
        raise BadOption("a merge in place keeps nothing to go back to: leave reversible or in_place out")
    adapter = adapter_of(model)
    layers = {name: layer for name, layer in adapter.layers().items() if not layer.merged}
    if reversible and not layers:
        warnings.warn("the model is merged already, and nothing was done: unmerge(model) first", stacklevel=2)
    if any(matrix.is_sharded(layer.original) for layer in layers.values()):
        raise AdapterState("the model is sharded: save the adapter, and merge it into the whole base")
    if hollow := [name for name, layer in layers.items() if matrix.is_hollow(layer.original)]:
        raise MetaWeight(f"the weight of {hollow[0]!r} is not loaded: load the model before you merge")
    linalg.prepare(sum(layer.original.numel() for layer in layers.values()))
    undone = nullcontext() if in_place else put_back(adapter)
    with torch.no_grad(), undone:
        check_finite(layers, "merged")
        shared, lost = _shared(model, layers), dict.fromkeys(layers, 0.0)
        if in_place:
            # What stands inside another first: attention calls its own projections through our layer alone.
            places = holders_of(adapter.model)
            for name in reversed(layers):
                lost[name] = _folded(adapter, layers[name], places[layers[name]], name in shared)
        else:
            found = {name: _merged(layer) for name, layer in layers.items()}
            lost = {name: share for name, (_, share) in found.items()}
            for name, layer in layers.items():
                layer.merge(found[name][0])
        if shared:
            warnings.warn(
                f"{', '.join(shared)} shared a weight with other modules and has one of its own now; "
                "where the model's config says that they are tied (tie_word_embeddings), set it to False before saving",
                stacklevel=2,
            )
        if not reversible:
            _settle(adapter, {**adapter.layers(), **layers}.values())
    return MergeReport(lost)


def _settle(adapter: Adapter, layers: Iterable[LoraLayer]) -> None:
    """Make a merge final. The layers go with the frozen weights that they keep: until then there is a way back."""
    flags = {id(parameter): flag for parameter, flag in adapter.flags}
    for layer in layers:
        layer.weight_parameter.requires_grad_(flags.get(id(layer.original), False))
    take_out(adapter, keep_trained=True)


def check_finite(layers: Mapping[str, LoraLayer], purpose: str) -> None:
    """Refuse factors that hold NaN or infinity."""
    for name, layer in layers.items():
        tensors = layer.factors if layer.magnitude is None else (*layer.factors, layer.magnitude)
        if not all(math.isfinite(float(tensor.detach().abs().sum())) for tensor in tensors):
            raise NonFiniteWeight(f"a factor holds NaN or infinity: this adapter cannot be {purpose} (layer {name!r})")


def _merged(layer: LoraLayer) -> tuple[nn.Parameter, float]:
    """The merged parameter, and the share of the update that it lost."""
    weight = layer.merged_weight()
    parameter = matrix.stored(weight, like=layer.original)
    if not quantized.is_quantized(parameter):
        return parameter, _lost(layer, weight)
    module = frozen_module(layer)
    update = torch.linalg.vector_norm(weight.double() - layer.frozen_values().double())
    error = torch.linalg.vector_norm(matrix.dense(parameter, module).double() - weight.double())
    return parameter, float(error / update) if update else 0.0


def _folded(adapter: Adapter, layer: LoraLayer, places: Holders, shared: bool) -> float:
    """Fold one layer into its own weight, and put the module in its place that stood there before the adapter."""
    weight, lost = layer.original, 0.0
    version = weight._version
    try:
        if shared or quantized.is_quantized(weight) or not _writable(weight):
            parameter, lost = _merged(layer)
            adapter.flags += [(parameter, flag) for known, flag in adapter.flags if known is weight]
            layer.merge(parameter)
        elif weight.dtype in (torch.float32, torch.float64) and layer.base_weight is None:
            delta.fold(layer.layout, weight, layer.branch())
        else:
            parameter, lost = _merged(layer)
            weight.copy_(parameter)
    finally:  # Also where an interrupt came after the weight was written to, for the branch is in it now.
        layer.forget_original()
        if layer.weight_parameter is not weight or weight._version != version:
            adapter.release(layer, places)
    return lost


def _writable(weight: Tensor) -> bool:
    """Whether every number has a place of its own, which an expanded one has not."""
    return all(stride or size < 2 for stride, size in zip(weight.stride(), weight.shape, strict=True))


def _lost(layer: LoraLayer, merged: Tensor, rows: int = 16) -> float:
    """The share of the update that rounding took, on evenly spaced rows of the first block."""
    block, new = layer.layout.blocks(layer.frozen_values())[0], layer.layout.blocks(merged)[0]
    if layer.magnitude is not None or block.dtype in (torch.float32, torch.float64):
        return 0.0
    A, B = layer.branch().pairs(layer.layout)[0]
    index = torch.linspace(0, len(block) - 1, min(rows, len(block)), device=block.device).long()
    exact = layer.scaling * (B[index].double() @ A.double())
    size = exact.norm()
    return float(((new[index].double() - block[index].double()) - exact).norm() / size) if size else 0.0


def _shared(model: nn.Module, layers: Mapping[str, LoraLayer]) -> list[str]:
    """The layers whose frozen weight is also somebody else's."""
    count: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                count[id(parameter)] = count.get(id(parameter), 0) + 1
    return [name for name, layer in layers.items() if count.get(id(layer.original), 0) > 1]


def unmerge(model: nn.Module) -> None:
    """Put the frozen weights back, bit by bit, after `merge(model, reversible=True)`.

    Raises:
        AdapterState: if there is no adapter, or it is not merged.
    """
    layers = adapter_of(model).layers()
    if not any(layer.merged for layer in layers.values()):
        raise AdapterState("nothing is merged here: merge(model, reversible=True) first")
    for layer in layers.values():
        layer.unmerge()
