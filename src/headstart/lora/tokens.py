"""Whose tokens a layer sees, and which of them count: some models have an encoder's besides their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headstart.lora import batches as reading


class Tokens:
    """Which tokens of the batch at hand count, by the layer and what it is given.

    A decoder's layers read its own tokens, but for those of its attention to the encoder: these are given the very
    tensor that the encoder returned. How many tokens there are does not tell them apart where both are as long.
    """

    def __init__(self, model: nn.Module) -> None:
        found = getattr(model, "get_encoder", None)
        encoder = found() if callable(found) and reading.is_two_sided(model) else None
        self._encoder: nn.Module | None = None if encoder is model else encoder
        self._within = set() if self._encoder is None else set(self._encoder.modules())
        self._encoded: Tensor | None = None
        self._masks: tuple[Tensor | None, Tensor | None] = None, None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, what the encoder returns is known again."""
        handle = None if self._encoder is None else self._encoder.register_forward_hook(self._see)
        try:
            yield
        finally:
            self._encoded = None
            if handle is not None:
                handle.remove()

    def begin(self, batch: Any, device: torch.device) -> None:
        """A batch is about to run."""
        found = (reading.mask(batch),) * 2 if self._encoder is None else reading.masks(batch)
        first, second = (None if kept is None else kept.to(device) for kept in found)
        self._masks, self._encoded = (first, second), None

    def mask(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """Which tokens of x count where a layer is given it, (b, s); None where all of them do."""
        encoded = self._encoded
        is_encoders = encoded is not None and (x.data_ptr(), x.shape) == (encoded.data_ptr(), encoded.shape)
        return self._masks[0 if module in self._within or is_encoders else 1]

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        self._encoded = output[0].detach()
