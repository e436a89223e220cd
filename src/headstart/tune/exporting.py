"""An adapter folder and the name of its base into a file that travels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import headstart
from headstart.files.portable import parcel
from headstart.tune import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export(adapter: str, out: str, profile: str, base: str | None = None, **options: Any) -> headstart.Export:
    """`headstart.export`, with a base as `headstart tune --model` takes one.

    Its weights are loaded where they are needed: for an adapter that replaced them, or that holds copies of them.
    """
    return headstart.export(adapter, out, profile, base=None if base is None else _model(base, adapter), **options)


def _model(base: str, adapter: str) -> PreTrainedModel:
    source = models.find(base)
    return models.load(source) if parcel.needs_values(adapter) else models.skeleton(source, "float32")
