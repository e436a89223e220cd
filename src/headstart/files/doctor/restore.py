r"""Give an adapter back what its start took out of the base.

    file       s·B·A           on W − s·B₀·A₀, which is nowhere
    restored   s·[B | −B₀]·[A ; A₀]   on W

PiSSA's and OLoRA's B₀·A₀ follow from W, to rounding, so that an adapter which PEFT saved unconverted can be mended with
nothing but its base: of rank 2r, plain LoRA for every engine, and anchored again for `headstart.load`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from headstart.errors import AdapterFormatError, FileError, WrongBase
from headstart.files.adapter import PREFIX, Entry, no_file_at, scales, write_adapter
from headstart.files.doctor.deviation import REPEATS, placed, repetition, started
from headstart.files.doctor.survey import Layer, Survey, survey
from headstart.files.fields import VERSION

_RESTORED = ("pissa", "olora")


def restore(path: str | Path, base: nn.Module, out: str | Path) -> Path:
    """Write an unconverted PiSSA or OLoRA adapter as plain LoRA of rank 2r on the original base.

    Args:
        path: the adapter's folder, as PEFT saved it; it is left alone.
        base: the model that it was trained on, in the dtype that it was trained in, not adapted.
        out: the folder to write.

    Returns:
        The folder.

    Raises:
        AdapterFormatError: if it is no such adapter, or one with faults.
        WrongBase: if the factors do not hold such a start of this base. KeyMismatch, NoTarget: if they do not fit it.
    """
    seen = survey(path)
    if seen.faults:
        raise AdapterFormatError(f"{path}: {seen.faults[0].what}: {seen.faults[0].repair}")
    if seen.init not in _RESTORED or seen.provenance:
        raise AdapterFormatError(
            f"{path} was started with init_lora_weights={seen.init}: only {' and '.join(_RESTORED)} follow from a base"
        )
    no_file_at(Path(out))
    if Path(out).resolve() == seen.file.parent.resolve():
        raise FileError(f"{out} is the adapter itself: choose another folder")
    entries = [_entry(seen, layer, base) for layer in seen.layers.values()]
    config: dict[str, Any] = {**seen.raw, **scales(entries), "use_rslora": False, "init_lora_weights": True}
    extras = {name.removeprefix(PREFIX): seen.read(name) for name in seen.extras}
    anchored = {layer.path: layer.rank for layer in seen.layers.values()}
    origin = {"format": VERSION, "strategy": seen.init, "options": {}, "seed": 0, "anchored": anchored}
    write_adapter(Path(out), entries, config, extras, origin)
    return Path(out)


def _entry(seen: Survey, layer: Layer, base: nn.Module) -> Entry:
    there = placed(seen, layer, base)
    if len(there.blocks) != 1:
        raise AdapterFormatError(f"{layer.name!r} holds several matrices, and PEFT starts none of these so")
    (block,) = there.blocks
    if (cosine := repetition(block)) < REPEATS:
        raise WrongBase(
            f"{layer.name!r} does not hold a {seen.init} start of this base (cosine {cosine:.2f}, near 1 expected): "
            "pass the base that it was trained on; or the adapter was converted already"
        )
    A0, B0 = started(block, seen.init, layer.rank, layer.scaling)
    size = (A0.norm(dim=1) / layer.scaling).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    A, B = seen.pair(layer)
    wide = torch.cat([A.float(), (A0 / layer.scaling / size[:, None]).float()])
    tall = torch.cat([B.float(), -(B0 * size).float()], dim=1)
    rank = 2 * layer.rank
    magnitude = seen.read(layer.keys["magnitude"]) if "magnitude" in layer.keys else None
    return Entry(layer.path, wide, tall, rank, layer.scaling * rank, magnitude)
