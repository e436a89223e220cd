"""`export`: an adapter folder into one of the files that travel, with the error of the conversion measured."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headstart.errors import BadOption, FileError, nearest
from headstart.files.adapter import CONFIG, TENSORS, few, no_file_at
from headstart.files.fields import VERSION
from headstart.files.portable import compact, everywhere, kohya, llama_cpp, mlx
from headstart.files.portable.change import DTYPES, Change, error_of, exact_dtype, padded, size_of, stored, trimmed
from headstart.files.portable.parcel import Parcel, misread, open_parcel
from headstart.lora.config import check_rank

Write = Callable[[Parcel, Sequence[Change], Mapping[str, Any], Path], None]


@dataclass(frozen=True)
class Profile:
    """One kind of file.

    Attributes:
        refuse: raises NotPortable for what it has no place for; write: puts it there.
        files: the names of what it writes into a folder, or of its only file. single: whether it is that.
        stranger: a file that it must not stand beside, since both kinds have an adapter_config.json.
        rank: the rank of all layers; None where each has its own.
    """

    refuse: Callable[[Parcel], None]
    write: Write
    files: tuple[str, ...]
    single: bool = False
    stranger: str | None = None
    rank: Callable[[Parcel, Sequence[Change]], int] | None = None
    notes: Callable[[Parcel, Sequence[Change]], list[str]] = lambda parcel, changes: []


def _largest(parcel: Parcel, changes: Sequence[Change]) -> int:
    return max(change.rank for change in changes)


PROFILES: Mapping[str, Profile] = {
    "portable": Profile(
        refuse=everywhere.refuse,
        write=everywhere.write,
        files=(TENSORS, CONFIG),
        stranger=mlx.TENSORS,
        rank=everywhere.rank_for,
        notes=everywhere.notes,
    ),
    "compact": Profile(compact.refuse, compact.write, (TENSORS, CONFIG), stranger=mlx.TENSORS),
    "gguf": Profile(llama_cpp.refuse, llama_cpp.write, ("adapter.gguf",), single=True, rank=_largest),
    "mlx": Profile(mlx.refuse, mlx.write, (mlx.TENSORS, CONFIG), stranger=TENSORS, rank=_largest),
    "kohya": Profile(kohya.refuse, kohya.write, ("adapter.safetensors",), single=True),
}


@dataclass(frozen=True)
class Export:
    """What was written, and what it cost.

    Attributes:
        profile: the one asked for; path: the folder or the file; bytes: its size.
        layers: how many it changes; rank: the largest; dtype: of the factors.
        error: ‖ΔW − ΔW′‖ / ‖ΔW‖ over all layers together; worst: over the one that lost most; worst_layer: its name.
        errors: by layer.
        notes: what whoever loads it must know.
    """

    profile: str
    path: str
    bytes: int
    layers: int
    rank: int
    dtype: str
    error: float
    worst: float
    worst_layer: str
    errors: Mapping[str, float]
    notes: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.layers} layers, rank {self.rank}, {self.dtype}, {_sized(self.bytes)}",
            "error of the conversion: " + self._said(),
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _said(self) -> str:
        if self.worst == 0:
            return "none, every number is exact"
        return f"{self.error:.1e} of the change (at worst {self.worst:.1e}, in {self.worst_layer})"


def export(
    adapter: str | Path,
    out: str | Path,
    profile: str = "portable",
    *,
    base: nn.Module | None = None,
    initial: str | Path | None = None,
    rank: int | None = None,
    dtype: str = "auto",
    prefix: str | None = None,
) -> Export:
    """Write an adapter so that another program means the same by it.

    Args:
        adapter: a folder in PEFT's format, anybody's, or a hub name.
        out: the folder to write, or the file for "gguf" and "kohya".
        profile: "portable" for every engine that reads PEFT's format, "compact" for PEFT and vLLM in as few numbers as
            possible, "gguf" for llama.cpp, "mlx" for mlx-lm, "kohya" for diffusion front ends.
        base: the model it is for. "gguf" needs its architecture; the others are checked against it. Where the adapter
            replaced the base's weights, its values are needed, too.
        initial: for an adapter that replaced its base's weights: the folder of it that was saved before training.
        rank: of the written factors; where a layer's is larger, its best approximation, with the error stated.
        dtype: of the factors, "float32", "bfloat16" or "float16"; "auto" keeps the file's own where that is exact.
        prefix: of kohya's names.

    Returns:
        What was written, and the error of it, which stands in the file's metadata too.

    Raises:
        NotPortable: if the adapter holds something that the profile has no place for; it says what, and what to do.
        HeadstartError: before anything is written.
    """
    kind = _profile(profile, dtype, rank, prefix)
    parcel = dataclasses.replace(open_parcel(adapter, base, initial), prefix=prefix)
    target = _place(Path(out), kind, parcel)
    kind.refuse(parcel)
    changes = compact.changes(parcel, rank, dtype) if profile == "compact" else _uniform(parcel, kind, rank, dtype)
    report = _report(profile, target, parcel, changes, [*kind.notes(parcel, changes), *_misread(parcel)])
    kind.write(parcel, changes, _origin(parcel, report), target)
    folder, files = (target.parent, (target.name,)) if kind.single else (target, kind.files)
    return dataclasses.replace(report, bytes=sum((folder / name).stat().st_size for name in files))


def _misread(parcel: Parcel) -> list[str]:
    found = misread(parcel)
    said = "engines ignore dilation, padding_mode, a forward of the layer's own, and that a model reads a weight"
    again = f"{said}: they will compute something else for {few(found)}. Merge it, or load it with headstart"
    return [again] if found else []


def _sized(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _profile(name: str, dtype: str, rank: int | None, prefix: str | None) -> Profile:
    if name not in PROFILES:
        raise BadOption(f"profile is {name!r}: choose {', '.join(PROFILES)}{nearest(name, PROFILES, 1)}")
    if dtype not in ("auto", *DTYPES):
        raise BadOption(f"dtype is {dtype!r}: choose auto, {', '.join(DTYPES)}")
    if rank is not None:
        check_rank("rank", rank)
    if prefix is not None and name != "kohya":
        raise BadOption(f"a prefix is what kohya's names begin with, and the profile is {name!r}: leave it out")
    return PROFILES[name]


def _place(out: Path, kind: Profile, parcel: Parcel) -> Path:
    """Where the profile's file or folder goes, which must not be where the adapter came from."""
    if kind.single:
        name = kind.files[0]
        out = out if out.suffix == Path(name).suffix else out / name
        taken = out.parent.resolve() == parcel.file.folder.resolve() and out.name == TENSORS
    else:
        no_file_at(out)
        if (out / "config.json").exists():
            raise FileError(f"{out} holds a model, with which an adapter there would be loaded: choose another folder")
        taken = out.resolve() == parcel.file.folder.resolve()
    if taken:
        raise FileError(f"{out} holds the adapter that is read: choose another place for the export")
    if kind.stranger and (out / kind.stranger).exists():
        raise FileError(f"{out} holds an adapter of another kind ({kind.stranger}): choose another folder")
    return out


def _uniform(parcel: Parcel, kind: Profile, rank: int | None, dtype: str) -> list[Change]:
    """The changes with s folded in, of one dtype, and of one rank where the profile wants that."""
    changes = [trimmed(change) for change in parcel.changes]
    chosen = functools.reduce(torch.promote_types, map(exact_dtype, changes)) if dtype == "auto" else DTYPES[dtype]
    if kind.rank is None:
        return [stored(change, rank or change.rank, chosen) for change in changes]
    wide = rank or kind.rank(parcel, changes)
    return [padded(stored(change, wide, chosen), wide) for change in changes]


def _report(profile: str, target: Path, parcel: Parcel, changes: Sequence[Change], notes: Sequence[str]) -> Export:
    pairs = list(zip(parcel.changes, changes, strict=True))
    errors = {old.name: 0.0 if old is new else error_of(old, new) for old, new in pairs}
    sizes = {old.name: size_of(old) for old, _ in pairs if errors[old.name]}
    lost = math.hypot(*(errors[name] * size for name, size in sizes.items()))
    whole = math.hypot(*(sizes.get(old.name) or size_of(old) for old, _ in pairs)) if lost else 1.0
    worst = max(errors, key=lambda name: errors[name])
    dtypes = {str(change.A.dtype).removeprefix("torch.") for change in changes}
    return Export(
        profile=profile,
        path=str(target),
        bytes=0,
        layers=len(changes),
        rank=max(change.rank for change in changes),
        dtype=" and ".join(sorted(dtypes)),
        error=lost / whole,
        worst=errors[worst],
        worst_layer=worst,
        errors=errors,
        notes=notes,
    )


def _origin(parcel: Parcel, report: Export) -> dict[str, Any]:
    """What the file says about itself: two digits of each error, so that rounding elsewhere gives the same bytes."""
    kept = ("strategy", "options", "seed", "base")
    return {
        "format": VERSION,
        **{name: parcel.file.provenance[name] for name in kept if name in parcel.file.provenance},
        "export": {
            "profile": report.profile,
            "dtype": report.dtype,
            "error": float(f"{report.error:.1e}"),
            "worst": float(f"{report.worst:.1e}"),
            "worst_layer": report.worst_layer if report.worst else None,
        },
    }
