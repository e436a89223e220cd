"""Whether a model is the base that an adapter was made for, by numbers sampled from its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from headstart.errors import WrongBase
from headstart.files import quantized_base
from headstart.files.adapter import AdapterFile
from headstart.files.quantized_base import sample


def check_bases(weights: Mapping[str, Callable[[], Tensor]], held: set[str], file: AdapterFile) -> None:
    """Refuse another base model, or another quantised form of it.

    Args:
        weights: what reads the adapted weights, by the layer's path; held: those that the model itself holds quantised.
    """
    known = held & {path for path, _, _ in quantized_base.recipes_of(file)}
    check_base({path: read for path, read in weights.items() if path not in known}, file)
    quantized_base.check_held({path: weights[path] for path in known}, file)


def check_base(weights: Mapping[str, Callable[[], Tensor]], file: AdapterFile) -> None:
    """Refuse another base model: the same shapes, other values.

    Args:
        weights: what reads the adapted weights, by the layer's path.
    """
    samples: Mapping[str, Any] = file.provenance.get("base", {})
    pairs: list[tuple[float, float]] = []
    for path, values in samples.items():
        if path in weights:
            pairs += zip(values, sample(weights[path]()), strict=False)
    # A quantised or rounded copy of the base differs by a few percent, another model by more than all of it.
    if (distance := quantized_base.apart(pairs)) > 0.5:
        raise WrongBase(
            f"{file.folder} was made for another base: sampled weights differ by {distance:.0%} of their size. "
            "Load that base, or pass strict=False if you mean this one"
        )


def check_copy(key: str, value: Tensor, here: Tensor, file: AdapterFile) -> None:
    """PEFT saves the embeddings that it adapts: harmless where they are the model's own."""
    if not torch.allclose(value.float(), here.detach().float().cpu(), rtol=0.02, atol=1e-3):
        raise WrongBase(
            f"{file.folder}: {key!r} is not the model's own embedding: this adapter needs the base it was trained on, "
            "with its vocabulary"
        )
