"""Several adapters into one, without their base: the weighted sum, exact or of a smaller rank; TIES and DARE.

    ΔW = Σ wᵢ·sᵢ·Bᵢ·Aᵢ = [w₁s₁·B₁ | w₂s₂·B₂ | …]·[A₁ ; A₂ ; …]            exact, of rank Σ rᵢ

Adapters of different ranks, scales and targets go together: a layer that one of them leaves alone is the others'.
A truncation is two thin QRs and a small SVD of these factors; ΔW is never formed but for TIES and DARE, whose result is
of no low rank.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart import linalg
from headstart.errors import BadOption, KeyMismatch, UnsupportedLayer, WrongBase
from headstart.files.adapter import AdapterFile, Entry, few, plain_name, read_adapter, scales, write_adapter
from headstart.files.checkpoint import OUTPUT
from headstart.files.fields import VERSION
from headstart.files.folder import check_free, write_folder
from headstart.files.quantized_base import apart
from headstart.linalg.blend import SPARSE, blend, check_method


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


@dataclass(frozen=True)
class Factors:
    """One layer's change as it stands in a file, in blocks: A (b, k, n), B (b, m, k), with s in B.

    A grouped convolution and a stack of experts have several blocks, everything else one.
    """

    A: Tensor
    B: Tensor

    @property
    def dense(self) -> Tensor:
        return torch.bmm(self.B.double(), self.A.double()).float()


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
    check_free(Path(out), force)
    files = [read_adapter(path) for path in adapters]
    _check(files, given)
    found: dict[str, tuple[Factors, float]] = {}
    for path in dict.fromkeys(path for file in files for path in file.entries):
        terms = [(w, factors_of(file, path)) for w, file in zip(given, files, strict=True) if path in file.entries]
        _check_alike(path, [factors for _, factors in terms])
        found[path] = combined(path, terms, method, rank, density, seed)
    entries = _entries(files, {path: factors for path, (factors, _) in found.items()})
    config = {**_fields(files, entries), **scales(entries, _pattern_names(files, entries))}
    origin = _provenance(files, given, method)
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


# ------------------------------------------------------------------ one layer


def factors_of(file: AdapterFile, path: str) -> Factors:
    """A layer of a file in blocks, with s·B in B's place."""
    entry, scale = file.entries[path], _scale(file, path)
    A, B = entry.A.double(), entry.B.double() * scale
    blocks, rank = _blocks(file, entry), entry.A.shape[0]
    if _is_stack(file, entry):  # A: (e·r, n) expert after expert, B: (m, r·e) with the experts next to one another
        return Factors(A.reshape(blocks, -1, A.shape[1]), B.reshape(len(B), -1, blocks).permute(2, 0, 1))
    return Factors(A.reshape(blocks, rank // blocks, -1), B.reshape(blocks, len(B) // blocks, -1))


def _scale(file: AdapterFile, path: str) -> float:
    # PEFT runs an attention's output projection at the scale of the attention.
    entry = file.entries.get(path.removesuffix(OUTPUT), file.entries[path])
    return entry.alpha / entry.rank


def _is_stack(file: AdapterFile, entry: Entry) -> bool:
    """Whether this is a parameter of several matrices."""
    return bool(file.config.get("target_parameters")) and entry.A.ndim == 2 and entry.A.shape[0] != entry.rank


def _blocks(file: AdapterFile, entry: Entry) -> int:
    """How many matrices there are: of experts, or groups of a convolution."""
    across = entry.rank if _is_stack(file, entry) else entry.B.shape[1]
    if not across or entry.A.shape[0] % across:
        raise KeyMismatch(f"{file.folder}: A and B of {entry.name!r} have no rank in common")
    return int(entry.A.shape[0] // across)


def _check_alike(path: str, terms: Sequence[Factors]) -> None:
    sizes = {(f.A.shape[0], f.A.shape[2], f.B.shape[1]) for f in terms}
    if len(sizes) > 1:
        raise KeyMismatch(f"the adapters see {path!r} as matrices of different sizes: {sorted(sizes)}: other bases?")


def combined(
    path: str, terms: Sequence[tuple[float, Factors]], method: str, rank: int | None, density: float, seed: int
) -> tuple[Factors, float]:
    """One layer's factors, and the share of the energy that they drop."""
    if method in SPARSE:
        weights = [weight for weight, _ in terms]
        delta = blend([f.dense for _, f in terms], weights, method, density=density, seed=seed, name=plain_name(path))
        return _of_rank(delta, rank or max(f.A.shape[1] for _, f in terms), path)
    A = torch.cat([factors.A for _, factors in terms], dim=1)
    B = torch.cat([weight * factors.B for weight, factors in terms], dim=2)
    if method != "svd":
        return Factors(A, B), 0.0
    assert rank is not None
    smaller = [linalg.recompress(b, a, min(rank, len(b), a.shape[1])) for b, a in zip(B, A, strict=True)]
    return Factors(torch.stack([a for _, a, _ in smaller]), torch.stack([b for b, _, _ in smaller])), max(
        dropped for _, _, dropped in smaller
    )


def _of_rank(delta: Tensor, rank: int, path: str) -> tuple[Factors, float]:
    """The best factors of a dense change."""
    pairs, dropped = [], 0.0
    for i, block in enumerate(delta):
        generator = linalg.named_generator(0, "combine", f"{path}:{i}")
        found = linalg.topk_svd(block, min(rank, *block.shape), generator=generator)
        root = found.S.sqrt()
        A, B = (found.V * root).T, found.U * root
        pairs.append((A, B))
        total = float(block.double().square().sum())
        dropped = max(dropped, 1 - float(found.S.double().square().sum()) / total if total else 0.0)
    return Factors(torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])), max(dropped, 0.0)


# ------------------------------------------------------------------ the file


def _entries(files: Sequence[AdapterFile], found: Mapping[str, Factors]) -> list[Entry]:
    """The layers as PEFT writes them, with s = 1."""
    width = max((f.A.shape[1] for path, f in found.items() if _stacked_in(files, path)), default=0)
    made = []
    for path, factors in found.items():
        first = next(file.entries[path] for file in files if path in file.entries)
        stacked = _stacked_in(files, path)
        A, B = _padded(factors, width) if stacked else (factors.A, factors.B)
        blocks, rank = len(A), A.shape[1]
        if stacked:
            stored_A, stored_B, whole = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1), rank
        else:
            stored_A = A.reshape(blocks * rank, *first.A.shape[1:])
            stored_B = B.reshape(-1, rank, *first.B.shape[2:])
            whole = blocks * rank
        stored = stored_A.float().contiguous(), stored_B.float().contiguous()
        made.append(Entry(path, *stored, whole, float(whole), None, first.embedding))
    return _outputs_alike(made)


def _stacked_in(files: Sequence[AdapterFile], path: str) -> bool:
    return any(_is_stack(file, file.entries[path]) for file in files if path in file.entries)


def _padded(factors: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """Zeros up to a rank: PEFT knows one for all the parameters of a module."""
    missing = rank - factors.A.shape[-2]
    return (
        torch.nn.functional.pad(factors.A, (0, 0, 0, missing)),
        torch.nn.functional.pad(factors.B, (0, missing)),
    )


def _outputs_alike(entries: list[Entry]) -> list[Entry]:
    """An attention and its output projection have one rank in PEFT: the smaller one is filled with zeros."""
    by_path = {entry.path: entry for entry in entries}
    for path, entry in list(by_path.items()):
        inner = by_path.get(f"{path}{OUTPUT}")
        if inner is None or inner.rank == entry.rank:
            continue
        rank = max(inner.rank, entry.rank)
        for one in (entry, inner):
            A, B = _padded(Factors(one.A, one.B), rank)
            by_path[one.path] = Entry(one.path, A, B, rank, float(rank), None, one.embedding)
    return list(by_path.values())


def _pattern_names(files: Sequence[AdapterFile], entries: Sequence[Entry]) -> dict[str, str]:
    """What PEFT matches rank_pattern against, where it is not the layer's name."""
    names = {e.path: plain_name(e.path.removesuffix(OUTPUT)) for e in entries if e.path.endswith(OUTPUT)}
    wanted = sorted({str(name) for file in files for name in file.config.get("target_parameters") or ()})
    for entry in entries:
        own = [name for name in wanted if _stacked_in(files, entry.path)]
        if own:
            names[entry.path] = f"{entry.name}.{own[0].rpartition('.')[2]}"
    return names


def _fields(files: Sequence[AdapterFile], entries: Sequence[Entry]) -> dict[str, Any]:
    """PEFT's config but for the scales."""
    first = files[0].config
    parameters = sorted({str(name) for file in files for name in file.config.get("target_parameters") or ()})
    bare = {e.path for e in entries if _stacked_in(files, e.path)}
    lists = [file.config.get("target_modules") for file in files]
    named = sorted({e.name for e in entries if e.path not in bare and not e.path.endswith(OUTPUT)})
    same = all(isinstance(one, list) and sorted(one) == sorted(lists[0]) for one in lists)  # type: ignore[arg-type]
    saved = sorted({str(name) for file in files for name in file.config.get("modules_to_save") or ()})
    fields = {
        "peft_type": "LORA",
        "task_type": first.get("task_type"),
        "base_model_name_or_path": first.get("base_model_name_or_path"),
        "target_modules": sorted(lists[0]) if same else named,  # type: ignore[arg-type]
        "modules_to_save": saved or None,
        "bias": next((b for file in files if (b := file.config.get("bias")) not in (None, "none")), "none"),
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": any(bool(file.config.get("fan_in_fan_out")) for file in files),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return {**fields, "target_parameters": parameters} if parameters else fields


def _provenance(files: Sequence[AdapterFile], weights: Sequence[float], method: str) -> dict[str, Any]:
    base = {path: values for file in reversed(files) for path, values in file.provenance.get("base", {}).items()}
    made_of = [
        {"strategy": file.provenance.get("strategy", "loaded"), "weight": weight}
        for file, weight in zip(files, weights, strict=True)
    ]
    return {"format": VERSION, "strategy": "combined", "options": {"method": method, "of": made_of}, "base": base}


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
        for name in file.extras:
            if name.endswith(".base_layer.weight"):  # PEFT's copy of an embedding of the base
                continue
            if name in owners or weight != 1:
                who = (
                    f"{owners[name].folder} and {file.folder} both train" if name in owners else f"{file.folder} trains"
                )
                raise KeyMismatch(
                    f"{who} {name!r} in full. What a share of that is, the base says: `headstart merge` them into it"
                )
            owners[name] = file
    _check_bases(files)


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
