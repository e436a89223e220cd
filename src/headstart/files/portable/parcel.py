"""Any adapter folder, as changes of the original base's weights, with all that is no such change beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from headstart.errors import BadOption, KeyMismatch, NotPortable
from headstart.files.adapter import COPY, AdapterFile, Entry, few, plain_name, read_adapter
from headstart.files.fields import is_mutating
from headstart.files.header import odd_names
from headstart.files.load import plan_load, sites_of
from headstart.files.peft_rules import OUTPUT, is_misread, outputs_scaled
from headstart.files.portable.change import Change
from headstart.files.portable.start import changes_of
from headstart.lora import matrix
from headstart.lora.layers.read import is_read
from headstart.lora.targets import holders_of


@dataclass(frozen=True)
class Parcel:
    """An adapter on its way.

    Attributes:
        file: as it was read; changes: what it does to the layers; extras: its other tensors, by name.
        base: the model it is for, where it was given. Its weights may be on the meta device.
        prefix: of kohya's names, where it was given.
    """

    file: AdapterFile
    changes: Sequence[Change]
    extras: Mapping[str, Tensor]
    base: nn.Module | None = None
    prefix: str | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        return self.file.config


def open_parcel(adapter: str | Path, base: nn.Module | None = None, initial: str | Path | None = None) -> Parcel:
    """Read a folder, and check it against the base where there is one.

    Raises:
        NotPortable: if its factors alone do not say what it does to the original base.
        AdapterFormatError, KeyMismatch, WrongBase, NoTarget: as `headstart.load` does.
    """
    file = read_adapter(adapter, mutated=True)
    if odd := odd_names(file.entries):
        raise KeyMismatch(f"{file.folder} holds names that no module has: {few(odd)}")
    if file.provenance.get("quantized"):
        raise NotPortable(
            f"{file.folder} makes up for what quantising its base lost, and says nothing about the float weights: load "
            "it with headstart.load, and merge it there"
        )
    if file.config.get("target_parameters"):
        raise NotPortable(
            f"{file.folder} adapts bare parameters ({few(file.config['target_parameters'])}), which every engine "
            "stores in its own way: pass it on as it is saved, or merge it"
        )
    extras = file.extras if base is None else _kept(file, plan_load(base, file).extras)
    attentions = [path for path in file.entries if f"{path}{OUTPUT}" in file.entries]
    entries = outputs_scaled(file.entries, attentions, 1.0)
    for entry in entries:
        _check_rank(entry, file)
    changes = [Change(e.path, e.A, e.B, e.alpha / e.rank, e.embedding, e.magnitude) for e in entries]
    if is_mutating(file.config, bool(file.provenance)):
        changes = changes_of(file, changes, base, None if initial is None else _initial(initial, changes))
    elif initial is not None:
        raise BadOption(f"{file.folder} did not replace its base's weights: leave out `initial`")
    return Parcel(file, sorted(changes, key=lambda change: change.name), extras, base)


def _kept(file: AdapterFile, checked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are the adapter's own, by the names of its file: PEFT knows no others."""
    own = {id(value) for value in checked.values()}
    return {name: value for name, value in file.extras.items() if id(value) in own}


def misread(parcel: Parcel) -> list[str]:
    """The layers, as far as the base is known, that PEFT and whoever follows it run otherwise than the base does."""
    if parcel.base is None:
        return []
    holders, dora = holders_of(parcel.base), bool(parcel.config.get("use_dora"))
    return sorted(
        plain_name(path)
        for path, (module, parameter) in sites_of(parcel.base, parcel.file).items()
        if is_misread(module, matrix.layout(module, parameter).own_way or is_read(module, holders[module]), dora)
    )


def needs_values(adapter: str | Path) -> bool:
    """Whether the base's weights are wanted, and not its shapes alone."""
    file = read_adapter(adapter, mutated=True)
    if odd := odd_names(file.entries):
        raise KeyMismatch(f"{file.folder} holds names that no module has: {few(odd)}")
    return is_mutating(file.config, bool(file.provenance)) or any(name.endswith(COPY) for name in file.extras)


def _initial(folder: str | Path, changes: Iterable[Change]) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors that the adapter started with, from a folder that was saved before training."""
    entries = read_adapter(folder, mutated=True).entries
    shapes = {change.path: (change.A.shape, change.B.shape) for change in changes}
    if {path: (entry.A.shape, entry.B.shape) for path, entry in entries.items()} != shapes:
        raise KeyMismatch(f"{folder} is no start of this adapter: other layers, or other ranks")
    return {path: (entry.A, entry.B) for path, entry in entries.items()}


def _check_rank(entry: Entry, file: AdapterFile) -> None:
    ranks = len(entry.A), entry.B.shape[1]
    if ranks[0] != ranks[1] and entry.A.ndim == 2:
        raise KeyMismatch(f"{file.folder}: {entry.name!r} has A of rank {ranks[0]} and B of rank {ranks[1]}")
    if ranks[0] != entry.rank:
        raise KeyMismatch(
            f"{file.folder}: {entry.name!r} has factors of rank {ranks[0]}, and the config says {entry.rank}: its "
            "scale is unknown"
        )


# ------------------------------------------------------------------ what a profile may refuse


def refuse_dora(parcel: Parcel, profile: str) -> None:
    if any(change.magnitude is not None for change in parcel.changes):
        raise NotPortable(
            f"{parcel.file.folder} is a DoRA, and {profile} has no place for its magnitudes: merge it into its base "
            "(headstart merge), or use the profile compact, which PEFT reads, or mlx"
        )


def refuse_convolutions(parcel: Parcel, profile: str) -> None:
    if found := [change.name for change in parcel.changes if not change.is_matrix]:
        raise NotPortable(f"{profile} has no place for convolutions ({few(found)}): use the profile compact or kohya")


def refuse_groups(parcel: Parcel, profile: str) -> None:
    """Factors of a convolution whose groups PEFT mixes in its own way."""
    found = [c.name for c in parcel.changes if c.B.shape[1] != c.rank]
    if found:
        raise NotPortable(f"{profile} has no place for grouped convolutions ({few(found)}): merge them")


def refuse_embeddings(parcel: Parcel, profile: str, why: str) -> None:
    if found := [change.name for change in parcel.changes if change.embedding]:
        raise NotPortable(f"{profile}: {few(found)}: {why}")


def refuse_extras(parcel: Parcel, profile: str) -> None:
    """Refuse whatever is no low-rank change: nothing is dropped in silence."""
    names, trained = sorted(parcel.extras), parcel.config.get("bias", "none") != "none"
    biases = [plain_name(name) for name in names if trained and name.endswith(".bias")]
    copies = [name for name in names if name.endswith(COPY)]
    if copies and not biases:
        raise NotPortable(
            f"{parcel.file.folder} holds copies of its base's weights ({few(copies)}): pass the base, and they are "
            "left out where they are its own"
        )
    if names:
        what = f"biases ({few(biases)})" if biases else f"whole modules ({few(names)})"
        raise NotPortable(
            f"{parcel.file.folder} trained {what}, for which {profile} has no place: merge the adapter into its base "
            "(headstart merge), or use the profile compact, which PEFT reads"
        )
