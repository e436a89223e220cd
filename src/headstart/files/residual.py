"""The float model whose quantised weights are the base of a LoftQ or QPiSSA adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from headstart.files.adapter import read_adapter
from headstart.files.load import sites_of, target_of
from headstart.files.quantized_base import taken_of
from headstart.lora import matrix, rebase


def subtract(model: nn.Module, path: str | Path) -> nn.Module:
    """Turn W into W − B·A, in place, where an adapter took B·A from it before quantising.

    Saved, and loaded in the adapter's recipe, the model is what the adapter was trained on.

    Args:
        model: the float model that the adapter was started on, not adapted.
        path: the adapter's folder.

    Returns:
        The same model; unchanged where nothing was taken from it.

    Raises:
        KeyMismatch, NoTarget: if it is another model; it is unchanged then.
    """
    file = read_adapter(path)
    sites, found = sites_of(model, file), []
    for entry in file.entries.values():
        target = target_of(entry, *sites[entry.path], file)
        taken = taken_of(entry.path, target, file)
        if taken is not None:
            weight = matrix.parameter_of(target.module, target.parameter)
            found.append((weight, rebase.subtracted(weight.detach(), target.layout, taken)))
    with torch.no_grad():
        for weight, rest in found:
            weight.copy_(rest)
    return model
