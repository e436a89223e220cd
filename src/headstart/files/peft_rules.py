"""What PEFT reads otherwise than one would think."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from headstart.files.adapter import COPY, AdapterFile, Entry, plain_name

OUTPUT = ".base_layer.out_proj"  # of an attention


def outputs_scaled(entries: Mapping[str, Entry], attentions: Iterable[str], factor: float) -> list[Entry]:
    """PEFT adds the change of an attention's output projection twice, at its attention's scale: files hold half of it.

    Args:
        attentions: paths of the adapted attentions; factor: 0.5 for what is written, 2 for what was read.
    """
    found = dict(entries)
    for path in attentions:
        inner = f"{path}{OUTPUT}"
        if inner in found:
            rank, alpha = found[path].rank, found[path].alpha
            found[inner] = replace(found[inner], B=factor * found[inner].B, rank=rank, alpha=alpha)
    return list(found.values())


def is_misread(module: nn.Module, replaced: bool, dora: bool) -> bool:
    """Whether PEFT's own layer computes otherwise than this one does.

    Args:
        replaced: whether the layer runs with W + ΔW in its weight's place, and no branch beside it.
    """
    if replaced:
        return True
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    return (dora and module.groups > 1) or module.padding_mode != "zeros" or any(step != 1 for step in module.dilation)


def embeddings(model: nn.Module) -> list[Tensor]:
    """The weights at a language model's two ends, which PEFT saves in full where the vocabulary has grown."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, name)().weight)
        except (AttributeError, NotImplementedError):  # a model without
            continue
    return found


def saved_modules(file: AdapterFile) -> list[str]:
    """A file's modules_to_save, and with ensure_weight_tying the other end of a tied model: its tensor is there."""
    named = [str(name) for name in file.config.get("modules_to_save") or ()]
    if not named or not file.config.get("ensure_weight_tying"):
        return named
    whole = {plain_name(key): t for key, t in file.extras.items() if key.endswith(".weight") and not key.endswith(COPY)}
    saved = [t for name, t in whole.items() if any(f"{module}." in name for module in named)]
    tied = (name for name, t in whole.items() if any(t is not other and torch.equal(t, other) for other in saved))
    return [*named, *(name.removesuffix(".weight") for name in tied if not any(f"{m}." in name for m in named))]


def ending_in(ends: Iterable[str], names: Iterable[str]) -> list[str]:
    """The modules that PEFT means by modules_to_save: it goes by the end of a name, dot or no dot."""
    return [name for name in names if name and name.endswith(tuple(ends))]
