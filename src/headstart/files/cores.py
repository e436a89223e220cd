r"""The trained core of an adapter that has one, in its folder: what A was before the core was multiplied into it.

    metadata "cores"             the layers that have one
    trained_core.safetensors     <layer>.A, <layer>.core: A and R, as the layer stores them

Everyone reads R·A as A. Without the two apart nothing of such an adapter could go on training: its factors are frozen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from headstart.errors import KeyMismatch
from headstart.files.adapter import CORES, AdapterFile, few
from headstart.files.header import read_header
from headstart.lora.layouts import Layout, Pair


def tensors_of(cores: Mapping[str, Pair]) -> dict[str, Tensor]:
    """The file's tensors, from each layer's A and core."""
    return {f"{path}.{name}": t for path, pair in cores.items() for name, t in zip(("A", "core"), pair, strict=True)}


def core_of(path: str, file: AdapterFile, layout: Layout, A: Tensor, B: Tensor) -> Pair | None:
    """A layer's A and core, where the folder has them.

    Args:
        A, B: as the layer stores them, the core multiplied into A; in the dtype of the file.

    Raises:
        KeyMismatch: if they are damaged, or another adapter's.
    """
    from safetensors import SafetensorError, safe_open

    place = file.folder / CORES
    if path not in file.provenance.get("cores", ()) or not place.is_file():
        return None
    try:
        read_header(place)
        with safe_open(place, "pt") as found:
            alone, core = (found.get_tensor(f"{path}.{name}").float() for name in ("A", "core"))
        whole, _ = layout.with_core(alone, B.float(), core)
        # The product was rounded when it was stored.
        error = torch.linalg.vector_norm(whole - A.float()) if whole.shape == A.shape else math.inf
        same = float(error) <= max(1e-4, 4 * torch.finfo(A.dtype).eps) * float(torch.linalg.vector_norm(A.float()))
    except (OSError, SafetensorError, RuntimeError, ValueError, IndexError) as error:
        raise KeyMismatch(f"{place} is damaged, or of another adapter ({error}): copy the whole folder") from error
    if not same:
        raise KeyMismatch(
            f"{place} holds another core of {path!r} than the adapter beside it, as after a save that was interrupted: "
            "take the last whole checkpoint, or load this one without training it"
        )
    return alone, core


def check_trains(file: AdapterFile) -> None:
    """Refuse to go on training where nothing would train.

    Raises:
        KeyMismatch: if the cores between frozen factors are not there.
    """
    known = file.provenance.get("cores", ()) if (file.folder / CORES).is_file() else ()
    lost = [
        path for path, letters in file.provenance.get("frozen", {}).items() if letters == "AB" and path not in known
    ]
    if lost:
        raise KeyMismatch(
            f"{file.folder} has no {CORES} with what trained in {few(sorted(lost))}: copy the whole folder, if it was "
            "saved with one, or load it without training it"
        )
