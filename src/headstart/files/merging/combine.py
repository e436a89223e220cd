"""Several adapters into one, without their base: the weighted sum, exact or of a smaller rank; TIES and DARE.

    ΔW = Σ wᵢ·sᵢ·Bᵢ·Aᵢ = [w₁s₁·B₁ | w₂s₂·B₂ | …]·[A₁ ; A₂ ; …]            exact, of rank Σ rᵢ

Adapters of different ranks, scales and targets go together: a layer that one of them leaves alone is the others'.

    factors.py          one layer: factors in, factors out
    combined_file.py    what is written of them
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headstart.errors import BadOption, KeyMismatch, UnsupportedLayer, WrongBase
from headstart.files.adapter import COPY, AdapterFile, few, plain_name, read_adapter, scales, write_adapter
from headstart.files.bases import check_copy
from headstart.files.folder import check_apart, check_free, write_folder
from headstart.files.header import odd_names
from headstart.files.merging.combined_file import entries_of, fields_of, pattern_names, provenance_of
from headstart.files.merging.factors import Factors, check_alike, check_parameters, combined, factors_of
from headstart.files.peft_rules import saved_modules
from headstart.files.quantized_base import apart
from headstart.linalg.blend import SPARSE, check_method


@dataclass(frozen=True)
class CombineReport:
    """What became of several adapters.

    Attributes:
        ranks: of the combined adapter, by layer. dropped: by layer, the share of ‖ΔW‖² that a rank cut off.
    """

    ranks: Mapping[str, int]
    dropped: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        return max(self.dropped.values(), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"ranks": dict(self.ranks), "dropped": dict(self.dropped)}

    def summary(self, out: str) -> str:
        """In words."""
        ranks = sorted(set(self.ranks.values()))
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        lines = [f"{len(self.ranks)} layers combined into {out} ({shown})"]
        if self.worst > 0:
            name = max(self.dropped, key=lambda layer: self.dropped[layer])
            lines.append(f"the rank dropped at worst {self.worst:.2%} of a change's energy ({name})")
        return "\n".join(lines)


def combine(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: str = "linear",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    force: bool = False,
) -> CombineReport:
    """Write one adapter that does what several do together, in PEFT's format.

    Args:
        adapters: folders in PEFT's format, or hub names.
        out: a folder that does not exist yet; it appears whole or not at all.
        weights: one for each; 1 where left out.
        method: "linear" or "cat", the exact weighted sum, whose rank is the sum of the ranks; "svd", its best
            approximation of `rank`; "ties", "dare_linear", "dare_ties", cut to `rank` too, because their result has
            none: by default the largest of the adapters.
        density: the share of the elements that TIES keeps, or DARE does not drop; seed: of what DARE drops.
        force: replace an adapter that stands at `out`.

    Returns:
        The ranks, and what a truncation dropped.

    Raises:
        UnsupportedLayer, KeyMismatch: DoRA's magnitudes, modules trained in full by more than one, other shapes.
        WrongBase: if they were made for different bases.
        BadOption: weights, ranks or methods that cannot be meant. Nothing is written then.
    """
    check_method(method, density, rank, truncates=method in SPARSE)
    given = checked_weights(weights, len(adapters))
    # What is not here is a name on the hub.
    check_apart(Path(out), [path for path in map(Path, adapters) if path.expanduser().exists()], inside=True)
    check_free(Path(out), force)
    files = [read_adapter(path) for path in adapters]
    _check(files, given)
    found: dict[str, tuple[Factors, float]] = {}
    for path in dict.fromkeys(path for file in files for path in file.entries):
        terms = [(w, factors_of(file, path)) for w, file in zip(given, files, strict=True) if path in file.entries]
        check_alike(path, [factors for _, factors in terms])
        found[path] = combined(path, terms, method, rank, density, seed)
    entries = entries_of(files, {path: factors for path, (factors, _) in found.items()})
    config = {**fields_of(files, entries), **scales(entries, pattern_names(files, entries))}
    origin = provenance_of(files, given, method)
    extras = {name: value for file in files for name, value in file.extras.items()}
    write_folder(Path(out), lambda folder: write_adapter(folder, entries, config, extras, origin), force=force)
    cut = {plain_name(path): dropped for path, (_, dropped) in found.items()} if method in ("svd", *SPARSE) else {}
    return CombineReport({entry.name: entry.rank for entry in entries}, cut)


def checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """One finite weight for each adapter."""
    if not count:
        raise BadOption("there is no adapter: name at least one")
    found = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(found) != count or not all(map(math.isfinite, found)):
        raise BadOption(f"weights are {weights!r} for {count} adapters: give one finite number for each")
    return found


# ------------------------------------------------------------------ what cannot be


def _check(files: Sequence[AdapterFile], weights: Sequence[float]) -> None:
    owners: dict[str, AdapterFile] = {}
    for file, weight in zip(files, weights, strict=True):
        if file.config.get("use_dora"):
            raise UnsupportedLayer(
                f"{file.folder} is DoRA, whose change depends on the base: `headstart merge` the adapters into it"
            )
        if file.provenance.get("quantized"):
            raise UnsupportedLayer(f"{file.folder} stands on a quantised base of its own: it combines with nothing")
        _check_names(file)
        for name in file.extras:
            if name.endswith(COPY):
                if name in owners:
                    check_copy(name, file.extras[name], owners[name].extras[name], file)
                owners[name] = file
                continue
            if name in owners or weight != 1:
                who = (
                    f"{owners[name].folder} and {file.folder} both train" if name in owners else f"{file.folder} trains"
                )
                raise KeyMismatch(
                    f"{who} {name!r} in full. What a share of that is, the base says: `headstart merge` them into it"
                )
            owners[name] = file
    for path in dict.fromkeys(path for file in files for path in file.entries):
        check_parameters(path, files)
    _check_bases(files)


def _check_names(file: AdapterFile) -> None:
    """Refuse tensors that no module has, or that the config does not tell of."""
    if odd := odd_names([*file.entries, *file.extras]):
        raise KeyMismatch(f"{file.folder} holds names that no module has: {few(odd)}")
    saved = saved_modules(file)
    biases = file.config.get("bias") not in (None, "none") or bool(file.config.get("lora_bias"))
    foreign = [
        name
        for name in (plain_name(key) for key in file.extras if not key.endswith(COPY))
        # PEFT goes by the end of a module's name, dot or no dot.
        if not (biases and name.endswith(".bias")) and not any(f"{module}." in name for module in saved)
    ]
    if foreign:
        raise KeyMismatch(
            f"{file.folder} holds tensors that belong to no adapter: {few(sorted(foreign))}. Name them in "
            "modules_to_save if they were trained, or take them out of the file"
        )


def _check_bases(files: Sequence[AdapterFile]) -> None:
    """Refuse adapters whose samples of the base differ; say so where only the names do."""
    known: dict[str, tuple[AdapterFile, Sequence[float]]] = {}
    for file in files:
        pairs: list[tuple[float, float]] = []
        for path, values in file.provenance.get("base", {}).items():
            if path in known:
                pairs += zip(known[path][1], values, strict=False)
            known.setdefault(path, (file, values))
        if apart(pairs) > 0.5:
            raise WrongBase(f"{file.folder} was made for another base than {files[0].folder}: they do not add up")
    names = sorted({str(name) for file in files if (name := file.config.get("base_model_name_or_path"))})
    if len(names) > 1:
        warnings.warn(f"the adapters name different bases: {few(names)}", stacklevel=3)
