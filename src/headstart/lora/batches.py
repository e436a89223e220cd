"""What a batch is to a model: a mapping, a tuple or a tensor, and which of its tokens count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import CalibrationError

PIECE = 2048  # tokens of a batch that go through a language model at once, where its loss is asked for


def moved(batch: Any, device: torch.device) -> Any:
    """The batch on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return _like(batch, [moved(value, device) for value in batch])
    return batch


def _like(batch: Any, values: list[Any]) -> Any:
    """A list or a tuple of other values; a named tuple takes them one by one."""
    return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)


def first_row(batch: Any) -> Any:
    """The batch with one row of each of its tensors; as it is where they do not have as many rows as each other."""
    rows = {len(value) for value in tensors(batch) if value.ndim}
    if len(rows) != 1 or any(not value.ndim for value in tensors(batch)):
        return batch
    if isinstance(batch, Mapping):
        return {name: value[:1] if isinstance(value, Tensor) else value for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return _like(batch, [value[:1] if isinstance(value, Tensor) else value for value in batch])
    return batch[:1]


def tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    return [value for value in values if isinstance(value, Tensor)]


def check(batch: Any) -> None:
    """Refuse a row of a dataset where a model is to be given a batch. What is of a class of its own, the model knows.

    Raises:
        CalibrationError: if it holds no tensor, or token ids of one dimension.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if (isinstance(ids, Tensor) and ids.ndim == 1) or not _may_be_batch(batch):
        what = f"({', '.join(map(str, batch))}) " if isinstance(batch, Mapping) else ""
        raise CalibrationError(
            f"data yields a {type(batch).__name__} {what}that is no batch of tensors: put rows together and make "
            "tensors of them, as a DataLoader with a collator does"
        )


def _may_be_batch(batch: Any) -> bool:
    if isinstance(batch, Mapping):
        return any(map(_may_be_batch, batch.values()))
    if isinstance(batch, tuple | list):
        return any(map(_may_be_batch, batch))
    return type(batch).__module__ not in ("builtins", "numpy")


def rows(batch: Any) -> int:
    """How many rows a batch has."""
    return next((len(value) for value in tensors(batch) if value.ndim), 1)


def mask(batch: Any) -> Tensor | None:
    """Which tokens count, (b, s): those that are no padding and carry a label. None where all of them do."""
    return _counting(batch, "attention_mask", "labels")


def masks(batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """The same of an encoder's tokens, which carry no labels, and of a decoder's, which may read the same ones."""
    own = [batch.get(name) for name in ("decoder_attention_mask", "labels")] if isinstance(batch, Mapping) else []
    told = any(isinstance(values, Tensor) and values.ndim == 2 for values in own)
    encoder = _counting(batch, "attention_mask")
    return encoder, _counting(batch, "decoder_attention_mask", "labels") if told else encoder


def _counting(batch: Any, padding: str, labels: str = "") -> Tensor | None:
    if not isinstance(batch, Mapping):
        return None
    kept, given = batch.get(padding), batch.get(labels)
    found = kept.bool() if isinstance(kept, Tensor) and kept.ndim == 2 else None
    if isinstance(given, Tensor) and given.ndim == 2 and (found is None or given.shape == found.shape):
        found = given != -100 if found is None else found & (given != -100)
    return None if found is None or bool(found.all()) else found


def counted(rows: Tensor, shape: Sequence[int], kept: Tensor | None) -> Tensor:
    """The rows of the tokens that count, where these are rows of tokens: (b, s, …), or (s, b, …) in some models.

    Args:
        rows: (T, n), made of a tensor of this shape; kept: (b, s).
    """
    if kept is None or len(rows) != kept.numel():
        return rows
    turned = tuple(shape[:2]) == tuple(reversed(kept.shape)) != tuple(kept.shape)
    return rows[(kept.T if turned else kept).reshape(-1).to(rows.device)]


def tokens(batch: Any) -> int:
    """How many tokens of a batch count; its rows where it holds no tokens."""
    kept = mask(batch)
    if kept is not None:
        return int(kept.sum())
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids.numel() if isinstance(ids, Tensor) else rows(batch)


def labelled(model: nn.Module, batch: Any) -> float:
    """How many tokens a model's own loss is the mean of."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.ndim < 2:
        return float(rows(batch))
    return float((labels[:, 1:] if predicts_next(model) else labels).ne(-100).sum())


def predicts_next(model: nn.Module) -> bool:
    """Whether it is a language model of transformers, whose own loss is a mean over the tokens of all rows."""
    return type(model).__name__.endswith(("CausalLM", "LMHeadModel"))


def is_two_sided(model: nn.Module) -> bool:
    """Whether it is a model of transformers whose decoder reads what an encoder made of other tokens."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def pieces(model: nn.Module, batch: Any) -> list[Any]:
    """The batch by as many rows as hold `PIECE` tokens, where the model's loss says the same of these, weighted.

    A language model's logits stand whole in float32, and twice more on their way to the loss: of a large batch that is
    more than all the rest of a pass. Rows without a label have no mean, and nothing to add to it.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not predicts_next(model) or not isinstance(ids, Tensor) or not isinstance(labels, Tensor):
        return [batch]
    each = max(1, PIECE // max(1, ids.shape[-1]))
    if ids.ndim != 2 or ids.shape != labels.shape or {len(t) if t.ndim else 0 for t in tensors(batch)} != {len(ids)}:
        return [batch]
    cut = [
        {name: value[start : start + each] if isinstance(value, Tensor) else value for name, value in batch.items()}
        for start in range(0, len(ids), each)
    ]
    return [batch] if len(cut) == 1 else [piece for piece in cut if labelled(model, piece)] or [batch]


def peeked(data: Iterable[Any], name: str) -> tuple[Any, Iterator[Any]]:
    """The first batch, and an iterator that still begins with it.

    Raises:
        CalibrationError: if there is none.
    """
    if isinstance(data, str | Mapping | Tensor) or not isinstance(data, Iterable):
        raise CalibrationError(f"{name} is a {type(data).__name__}: pass an iterable of batches, as [batch]")
    stream = iter(data)
    for first in stream:
        return first, chain([first], stream)
    raise CalibrationError(f"{name} holds no batch: check the dataset and its filters")


def count_of(data: Iterable[Any], limit: int) -> int:
    """How many batches are read, as far as it is known: a loader of a stream has a length only by name."""
    try:
        return min(limit, len(data)) if isinstance(data, Sized) else limit
    except TypeError:
        return limit


def shown(stream: Iterator[Any], limit: int, progress: bool) -> Iterator[Any]:
    """At most `limit` batches, behind a progress bar where one is wanted and tqdm is installed."""
    bounded = islice(stream, limit)
    if not progress:
        return bounded
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return bounded
    return iter(tqdm(bounded, desc="calibrating", unit="batch", total=limit))
