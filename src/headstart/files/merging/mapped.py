"""A checkpoint on disk as a model whose weights are views of its files: what is looked at comes in, the rest does not.

The system takes such pages back where it needs the memory. The model is for looking at; it does not compute.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from headstart.errors import Unstreamable
from headstart.files.header import read_json
from headstart.files.merging.packed import packed_weights
from headstart.files.merging.shards import open_checkpoint
from headstart.files.merging.skeleton import SETTINGS, skeleton


def mapped(folder: Path) -> nn.Module:
    """The model of a folder of safetensors.

    Raises:
        Unstreamable: if the files do not hold the parameters as the model does: quantised, experts one by one, or of an
            architecture that transformers does not know. Load it then.
    """
    if not (folder / SETTINGS).is_file() or "model_type" not in read_json(folder / SETTINGS):
        raise Unstreamable(f"{folder} has no {SETTINGS} that names its architecture")
    checkpoint = open_checkpoint(folder)
    if packed := packed_weights(checkpoint):
        raise Unstreamable(f"{folder} is quantised: {next(iter(packed))!r}")
    found = skeleton(checkpoint, {}, [])
    away = [name for name, value in found.model.named_parameters() if value.is_meta]
    if not found.known or away:
        raise Unstreamable(f"{folder} holds {away[0]!r} otherwise" if away else f"{folder} is of no known architecture")
    return found.model.eval()
