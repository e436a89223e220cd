"""Merge adapters into a checkpoint on disk, shard by shard, from safetensors to safetensors.

The model is never made. What no adapter changes is copied by the system; a changed tensor passes through memory in
blocks of rows. Every element of float16 and bfloat16 is the exact sum rounded once, in float32 wrong by a few ulp.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from headstart.errors import BadOption, FileError
from headstart.files.adapter import read_adapter
from headstart.files.folder import check_apart, check_free, write_folder
from headstart.files.merging import plan as planning
from headstart.files.merging.combine import checked_weights
from headstart.files.merging.folding import Mixture
from headstart.files.merging.loss import CheckpointReport
from headstart.files.merging.rewrite import Progress, Rewriting
from headstart.files.merging.shards import open_checkpoint
from headstart.linalg.blend import check_method

__all__ = ["CheckpointReport", "Progress", "merge_checkpoint"]

WORDS = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge_checkpoint(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: str = "linear",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    dtype: str = "auto",
    strict: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> CheckpointReport:
    """Fold one or several adapters into a checkpoint of safetensors, in the memory of some rows of a tensor.

    Args:
        base: a folder with config.json and safetensors: one file or shards, floats or quantised by bitsandbytes.
        adapters: folders in PEFT's format, or hub names.
        out: a folder that does not exist yet; it appears whole or not at all.
        weights: one for each adapter; 1 where left out, as if they were merged one after the other.
        method: "linear" or "cat", the weighted sum; "svd", the same truncated to `rank`; "ties", "dare_linear" or
            "dare_ties" with `density` (see `headstart.linalg.blend`).
        dtype: "auto", every tensor's own: a quantised weight is quantised anew; or that of all weights, as floats.
        strict: refuse an adapter of another base.
        force: replace a model that stands at `out`.
        progress: called with the bytes done and all bytes.

    Returns:
        By layer, what rounding took from the update.

    Raises:
        Unstreamable: if the tensors do not lie there as the model holds them: load it, and `merge` there.
        HeadstartError: if something does not fit or is missing. Nothing is written then.
    """
    paths = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    given = checked_weights(weights, len(paths))
    check_method(method, density, rank, truncates=False)
    if dtype not in WORDS:
        raise BadOption(f"dtype is {dtype!r}: choose {', '.join(WORDS)}")
    source, target = Path(base).expanduser(), Path(out).expanduser()
    check_apart(target, [source, *map(Path, paths)])
    check_free(target, force)
    if not source.is_dir():
        raise FileError(f"{str(source)!r} is no folder: pass the one that holds config.json and the safetensors")
    checkpoint = open_checkpoint(source)
    planned = planning.plan(checkpoint, [read_adapter(path) for path in paths], given, strict)
    merging = Rewriting(planned, Mixture(method, rank, density, seed), WORDS[dtype], progress)
    write_folder(target, merging.fill, size=merging.size(), force=force)
    return merging.report()
