"""The estimate of a model that can be built without values, with every field of a `LoraConfig` taken at its word.

Where `estimate` counts from shapes, this adapts the model where tensors have no values, counts what trains, and traces
what one forward pass of the adapted model keeps: patterns of ranks, DoRA, dropout and whole modules included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from headstart.choose import costs
from headstart.choose.estimate import Estimate, predict
from headstart.choose.machine import Speed
from headstart.choose.setting import OPTIMIZERS, Setting
from headstart.choose.shapes import Matrix, Outline, leaders
from headstart.inits.small import on_a_small_matrix
from headstart.lora import matrix
from headstart.lora.adapt import adapt
from headstart.lora.adapter import Adapter
from headstart.lora.config import LoraConfig
from headstart.lora.targets import Target, targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def estimate_adapted(
    model: PreTrainedModel, lora: LoraConfig, outline: Outline, setting: Setting, rate: Speed | None = None
) -> Estimate:
    """Predict, and spoil the model.

    Args:
        model: without values. lora: what it is adapted with.
        outline: of the same model. setting: the rest of the run; its init, r and targets are not looked at.
        rate: of the machine.

    Raises:
        HeadstartError: where the config does not fit the model.
    """
    chosen = targets(model, lora)
    start = costs.start_of(lora.init_lora_weights)
    asked = dataclasses.replace(setting, init=lora.init_lora_weights, r=lora.r)
    found = predict(outline, _roughly(outline, asked, start), rate)
    statistics = _statistics(outline, chosen, lora)
    weights = _bytes(model.parameters())
    adapter, anchors = attach(model, lora)
    trained = _bytes(adapter.parameters())
    counted = _bytes(model.parameters()) - weights + anchors
    trainable, total = adapter.count()
    work = [costs.work_of(start.work, *_block(t), t.layout.block_rank(t.rank)) for t in chosen]
    memory = dataclasses.replace(
        found.memory,
        weights=weights,
        adapter=counted,
        gradients=trained,
        adam=OPTIMIZERS[setting.optimizer] * trained // 4,
        activations=activations(model, setting),
        decomposition=max(each.bytes for each in work),
        statistics=statistics,
    )
    return dataclasses.replace(
        found,
        outline=dataclasses.replace(outline, read="trace"),
        setting=asked,
        trainable=trainable,
        total=total,
        layers=len(chosen),
        memory=memory,
    )


def _roughly(outline: Outline, setting: Setting, start: costs.Start) -> Setting:
    """A setting whose time and passes are those of this run: every matrix that has room for the rank."""
    narrow = (
        [m.name for m in outline.matrices if m.linear and setting.r > min(m.m, m.n)] if start.work != "free" else []
    )
    return dataclasses.replace(setting, target_modules="all-linear", exclude_modules=narrow or None)


def _statistics(outline: Outline, chosen: Iterable[Target], lora: LoraConfig) -> int:
    """To the last byte, layer by layer at its own rank."""
    needs = lora.strategy.needs
    if not needs:
        return 0
    known = {each.name: each for each in outline.matrices}
    entries: list[tuple[Matrix, int]] = []
    for target in chosen:
        m, n = _block(target)
        count = len(target.layout.blocks(matrix.outline(target.module, target.parameter)))
        shares = known[target.name].shares if target.name in known else target.name
        entries.append((Matrix(target.name, m, n, shares, count), target.layout.block_rank(target.rank)))
    first = leaders(each for each, _ in entries)
    return sum(
        costs.statistics_bytes(needs, [each], first, rank) + costs.halves_bytes(needs, [each], rank)
        for each, rank in entries
    )


def _block(target: Target) -> tuple[int, int]:
    m, n = target.layout.blocks(matrix.outline(target.module, target.parameter))[0].shape
    return m, n


def attach(model: nn.Module, lora: LoraConfig) -> tuple[Adapter, int]:
    """Adapt a model without values, with a start that needs none; and the bytes of the anchors or base it would have.

    Which factors train, and whether there are anchors, the start that was asked for says of a small matrix.
    """
    asked = on_a_small_matrix(lora.strategy, lora.options)
    adapter = adapt(model, dataclasses.replace(lora, init_lora_weights="kaiming", init_options={}, use_dora=False))
    anchors = 0
    for layer in adapter.layers().values():
        for letter, factor in zip("AB", layer.factors, strict=True):
            factor.requires_grad_(letter not in asked.frozen)
            anchors += _bytes([factor]) if asked.anchored else 0
        if asked.core is not None:
            layer.lora_core = nn.Parameter(layer.factors[0].new_empty(1, layer.rank, layer.rank))
        if lora.use_dora:
            rows = layer.original.shape[1 if layer.layout.transposed else 0]
            layer.lora_magnitude_vector = nn.Parameter(layer.factors[0].new_empty(rows))
        if asked.base is not None:
            anchors += _bytes([layer.original])
    return adapter, anchors


def activations(model: PreTrainedModel, setting: Setting) -> int:
    """Bytes that autograd keeps for the backward pass; afterwards the model is good for nothing else."""
    kept: dict[Any, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        tokens = torch.ones(setting.batch_size, setting.max_length, dtype=torch.long)
        given: Mapping[str, Any] = {"input_ids": tokens, "attention_mask": tokens, "use_cache": False}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = model.base_model(**given).last_hidden_state
    total = sum(kept.values())
    if setting.gradient_checkpointing:  # The inputs of all blocks, and the inside of one at a time.
        blocks = int(model.config.get_text_config().num_hidden_layers)
        total = blocks * _bytes([hidden]) + total // blocks
    return total


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
