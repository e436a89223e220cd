"""How a batch goes through a model, and its loss back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import CalibrationError
from headstart.lora import batches as reading

Loss = Callable[[nn.Module, Any], Any]


class Calls:
    """How a batch goes through the model, and its loss back where gradients are asked for.

    Attributes:
        by_rows: whether the loss is the model's own, of which it is known what it is a mean of.
    """

    def __init__(self, model: nn.Module, loss: Loss | None, backward: bool, watched: Iterable[nn.Module]) -> None:
        self.model, self.loss, self.backward = model, loss, backward
        asked: Any = getattr(model, "get_output_embeddings", None)
        head = asked() if callable(asked) else None
        self.head_counts = any(module is head for module in watched)
        self.by_rows = backward and loss is None
        self.device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))

    def forward(self, batch: Any) -> tuple[Tensor | None, float]:
        """The mean loss, and the number of tokens that it is the mean of."""
        batch = reading.moved(batch, self.device)
        if self.loss is not None:
            value = self.loss(self.model, batch)
            return told(value, reading.rows(batch)) if self.backward else (None, 0.0)
        reading.check(batch)
        if isinstance(batch, Mapping):
            output = self.model(**(batch if self.backward else self._without_loss(batch)))
        else:
            output = self.model(*batch) if isinstance(batch, tuple | list) else self.model(batch)
        if not self.backward:
            return None, 0.0
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if value is None:
            raise CalibrationError("the model returns no loss: put labels into the batches, or pass loss=")
        return value, reading.labelled(self.model, batch)

    def _without_loss(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Without gradients nobody asks for a language model's loss, nor for its logits, which cost as much.

        A decoder that stands beside an encoder makes its inputs of the labels.
        """
        if not hasattr(self.model, "main_input_name"):
            return dict(batch)
        takes = inspect.signature(self.model.forward).parameters
        few = {"logits_to_keep": 1} if "logits_to_keep" in takes and not self.head_counts else {}
        unused = () if reading.is_two_sided(self.model) else ("labels",)
        return {name: value for name, value in batch.items() if name not in unused} | few


def told(value: Any, rows: int) -> tuple[Tensor, float]:
    """What a user's loss says: a mean, or a mean and what it is the mean of."""
    loss, count = value if isinstance(value, tuple) and len(value) == 2 else (value, rows)
    counted = count.numel() == 1 if isinstance(count, Tensor) else isinstance(count, Real)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not counted:
        what = " and ".join(map(_named, value)) if isinstance(value, tuple) else _named(value)
        raise CalibrationError(
            f"loss= returned {what}: return the mean loss as a tensor of one number, or that and a number of tokens"
        )
    return loss.reshape(()), float(count)


def _named(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
