"""A base and an adapter folder into one ordinary model folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import headstart
from headstart.errors import FileError
from headstart.tune import models
from headstart.tune.folder import write_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge(base: str, adapter: str, out: str, dtype: str = "auto") -> tuple[headstart.MergeReport, str]:
    """Fold an adapter into its base and write the result with its tokenizer.

    Args:
        base: what `headstart tune --model` takes.
        adapter: a folder in PEFT's format, or a hub name.
        out: a folder that does not exist yet; it appears whole or not at all.
        dtype: of the merged weights; "auto" is the base's own.

    Returns:
        What rounding took away by layer, and the dtype that the merged weights have.

    Raises:
        HeadstartError: before `out` is made.
    """
    if Path(out).exists():
        raise FileError(f"{out!r} exists: choose another --out, or delete it first")
    source = models.unpacked(models.find(base))
    model = models.load(source, dtype)
    headstart.load(model, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It advises what the next line does.
        report = headstart.merge(model)
    _untie(model)
    tokenizer = models.tokenizer_of(source)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_folder(Path(out), fill)
    return report, str(model.dtype).removeprefix("torch.")


def _untie(model: PreTrainedModel) -> None:
    """Embedding and head that learnt different things are two weights from now on, and the config must say so."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
