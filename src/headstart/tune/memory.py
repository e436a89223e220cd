"""What a run will take, before a weight is loaded.

The model is built where tensors have shapes and no values, and adapted there. Parameters, gradients and Adam's two
moments are counted. Activations are traced: one forward pass over a batch of full rows runs on such tensors, and what
autograd keeps for the backward pass is added up; to this comes one tile of the logits, as TRL computes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from headstart.lora.adapt import Adapter, adapt
from headstart.lora.config import LoraConfig
from headstart.tune import models
from headstart.tune.facts import on_a_small_matrix
from headstart.tune.recipe import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# TRL projects at most so many tokens to so many words of the vocabulary at once, in float32.
TILE = (4096, 32768)


@dataclass(frozen=True)
class Forecast:
    """The parameters of a run, and bytes.

    Attributes:
        weights: of the frozen model.
        adapter: the factors and whatever else trains, and the frozen copies of an anchored start.
        gradients, adam: of what trains.
        activations: kept for the backward pass of one batch of full rows.
    """

    trainable: int
    total: int
    weights: int
    adapter: int
    gradients: int
    adam: int
    activations: int

    @property
    def bytes(self) -> int:
        return self.weights + self.adapter + self.gradients + self.adam + self.activations

    def to_dict(self) -> dict[str, int]:
        """For JSON."""
        return {**dataclasses.asdict(self), "bytes": self.bytes}

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        parts = [(name, getattr(self, name)) for name in ("weights", "adapter", "gradients", "adam", "activations")]
        return "\n".join(
            [
                f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}",
                f"predicted memory: {self.bytes / 1e9:.2f} GB on each device, and the libraries' own",
                *(f"  {name:<12}{size / 1e9:8.3f} GB" for name, size in parts),
                "  counted from the shapes; activations traced through one forward pass over a batch of full rows",
            ]
        )


def forecast(config: RunConfig) -> Forecast:
    """Predict a run's memory.

    Raises:
        HeadstartError: where the config does not fit the model.
    """
    lora = LoraConfig(**config.lora(), task_type="CAUSAL_LM")
    source = models.find(config.model)
    model = models.skeleton(source, models.trained_dtype(source, config.dtype))
    weights = _bytes(model.parameters())
    adapter, anchors = attach(model, lora)
    trained = _bytes(adapter.parameters())
    trainable, total = adapter.count()
    return Forecast(
        trainable=trainable,
        total=total,
        weights=weights,
        adapter=_bytes(model.parameters()) - weights + anchors,
        gradients=trained,
        adam=2 * trained,
        activations=activations(model, config),
    )


def attach(model: nn.Module, lora: LoraConfig) -> tuple[Adapter, int]:
    """Adapt a model without values, with a start that needs none; and the bytes of the anchors or base it would have.

    Which factors train, and whether there are anchors, the start that was asked for says of a small matrix.
    """
    asked = on_a_small_matrix(lora.strategy, lora.options)
    adapter = adapt(model, dataclasses.replace(lora, init_lora_weights="kaiming", init_options={}))
    anchors = 0
    for layer in adapter.layers().values():
        for letter, factor in zip("AB", layer.factors, strict=True):
            factor.requires_grad_(letter not in asked.frozen)
            anchors += _bytes([factor]) if asked.anchored else 0
        if asked.core is not None:
            layer.lora_core = nn.Parameter(layer.factors[0].new_empty(1, layer.rank, layer.rank))
        if asked.base is not None:
            anchors += _bytes([layer.original])
    return adapter, anchors


def activations(model: PreTrainedModel, config: RunConfig) -> int:
    """Bytes that autograd keeps for the backward pass; afterwards the model is good for nothing else."""
    kept: dict[Any, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        return tensor

    rows = 1 if config.packing else config.batch_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        tokens = torch.ones(rows, config.max_length, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = model.base_model(input_ids=tokens, attention_mask=tokens, use_cache=False).last_hidden_state
    shape: Any = model.config.get_text_config()
    total = sum(kept.values())
    if config.gradient_checkpointing:  # The inputs of all blocks, and the inside of one at a time.
        blocks = int(shape.num_hidden_layers)
        total = blocks * _bytes([hidden]) + total // blocks
    return total + 4 * min(rows * config.max_length, TILE[0]) * min(int(shape.vocab_size), TILE[1])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
