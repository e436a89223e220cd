"""A base and adapters into one ordinary model folder: from file to file where that goes, else through the model."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import headstart
from headstart.errors import BadOption, Unstreamable
from headstart.files.folder import write_folder
from headstart.files.merging.combine import combine
from headstart.files.merging.stream import CheckpointReport, Progress, merge_checkpoint
from headstart.linalg.blend import SPARSE
from headstart.tune import models
from headstart.tune.models import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge(
    base: str,
    adapters: str | Sequence[str],
    out: str,
    dtype: str = "auto",
    *,
    force: bool = False,
    progress: Progress | None = None,
    **mixture: Any,
) -> CheckpointReport:
    """Fold adapters into their base and write the result with its tokenizer.

    Args:
        base: what `headstart tune --model` takes.
        adapters: folders in PEFT's format, or hub names.
        out: a folder that does not exist yet; it appears whole or not at all.
        dtype: of the merged weights; "auto" is the base's own.
        force: replace a model that stands at `out`.
        mixture: weights, method, rank, density and seed of `merge_checkpoint`.

    Returns:
        What rounding took away by layer; `how` says whether the model had to be loaded, and why.

    Raises:
        HeadstartError: before `out` is made.
    """
    paths = [adapters] if isinstance(adapters, str) else list(adapters)
    source = models.unpacked(models.find(base))
    try:
        return merge_checkpoint(
            models.local(source), paths, out, dtype=dtype, force=force, progress=progress, **mixture
        )
    except Unstreamable as reason:
        return _through_the_model(source, paths, out, dtype, force, str(reason), mixture)


def _through_the_model(
    source: Source, adapters: Sequence[str], out: str, dtype: str, force: bool, reason: str, mixture: dict[str, Any]
) -> CheckpointReport:
    """The same with the whole model in memory."""
    if mixture.get("method") in SPARSE:
        raise BadOption(f"{mixture['method']} goes from file to file only, and here: {reason}")
    with tempfile.TemporaryDirectory() as place:
        adapter = adapters[0]
        if len(adapters) > 1 or any(weight != 1 for weight in mixture.get("weights") or ()):
            adapter = str(Path(place) / "combined")
            combine(adapters, adapter, **mixture)
        model = models.load(source, dtype, whole=True)
        headstart.load(model, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It advises what the next line does.
        report = headstart.merge(model, in_place=True)
    untied = _untie(model)
    tokenizer = models.tokenizer_of(source)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_folder(Path(out), fill, force=force)
    size = sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
    kept = str(model.dtype).removeprefix("torch.")
    return CheckpointReport(report.lost, {}, kept, size, untied, how=f"through the model: {reason}")


def _untie(model: PreTrainedModel) -> bool:
    """Embedding and head that learnt different things are two weights from now on, and the config must say so."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    if head is None or head.weight is embedding.weight:
        return False
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    return bool(tied)
