r"""What an adapter is made of: the size and the spectrum of every layer's change, and what made it.

    ΔW = s·B·A = Q_B·(s·R_B·R_Aᵀ)·Q_Aᵀ                    Q_B: (m, r), Q_A: (n, r), from two thin QRs

so that the singular values of ΔW are those of an (r, r) core, in float64. The effective rank is exp of the entropy of
the spectrum: r equal values give r, a single one gives 1 (Roy, Vetterli (2007), "The effective rank").
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import AdapterFormatError, HeadstartError
from headstart.files.adapter import REPORT
from headstart.files.doctor.deviation import Block, Placed, bare, check_values, placed
from headstart.files.doctor.survey import Layer, Survey, survey
from headstart.files.header import read_json
from headstart.files.peft_rules import OUTPUT

_SHARE = 0.99  # of the energy, by which the needed rank is counted


@dataclass(frozen=True)
class LayerAnatomy:
    """One layer's change.

    Attributes:
        name: the layer; shape: (m, n) of one matrix; rank: of its factors; scaling: s; experts: how many matrices.
        norm: ‖ΔW‖; norm_A, norm_B: of the factors. relative: ‖ΔW‖ / ‖W‖, None without the base.
        spectrum: the singular values of ΔW, of the matrix that moved furthest.
        effective_rank: exp of their entropy; needed_rank: how many hold 99 % of ‖ΔW‖².
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    norm: float
    norm_A: float
    norm_B: float
    spectrum: tuple[float, ...]
    effective_rank: float
    needed_rank: int
    relative: float | None = None
    experts: int = 0


@dataclass(frozen=True)
class Anatomy:
    """An adapter, taken apart.

    Attributes:
        place: where it lies; format: how it is written; made: what made it, as far as the folder tells.
        parameters: of the factors; size: of the file in bytes; layers: in the model's order.
        extras: tensors beside the factors; unread: layers that could not be measured, and why.
    """

    place: str
    format: str
    made: Mapping[str, Any]
    parameters: int
    size: int
    layers: tuple[LayerAnatomy, ...]
    extras: tuple[str, ...]
    unread: Mapping[str, str]

    @property
    def norm(self) -> float:
        """‖ΔW‖ over all layers."""
        return math.sqrt(sum(layer.norm**2 for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "norm": self.norm}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def inspect(path: str | Path, base: nn.Module | None = None) -> Anatomy:
    """Measure every layer's change. The folder is not trusted, and not changed.

    Args:
        path: a folder in PEFT's or mlx's format, a .safetensors file of kohya's or diffusers', or a hub name.
        base: the model that the adapter is for; with it, changes are also measured against the weights.

    Returns:
        The anatomy. Layers that cannot be measured are named in it.

    Raises:
        AdapterFormatError: if there is no adapter, or its file is damaged.
        WrongBase: if it was made for another base.

    Example:
        >>> inspect("adapter/").layers[0].effective_rank  # doctest: +SKIP
        5.3
    """
    seen = survey(path)
    if seen.fatal is not None:
        raise AdapterFormatError(f"{seen.fatal.what}: {seen.fatal.repair}")
    layers, unread = [], {fault.what: fault.repair for fault in seen.faults}
    model, seated = base if seen.dialect.name == "PEFT" else None, dict[str, Placed]()
    for layer in sorted(map(partial(_as_added, seen), seen.layers.values()), key=_in_order):
        try:
            seated[layer.path] = bare(seen, layer) if model is None else placed(seen, layer, model)
            layers.append(_measured(seen, seated[layer.path]))
        except (HeadstartError, RuntimeError, ValueError) as error:
            unread[layer.name] = str(error)
    check_values(seen, seated)
    numbers = sum(math.prod(seen.tensors[layer.keys[slot]][0]) for layer in seen.layers.values() for slot in "AB")
    made = _made(seen)
    return Anatomy(str(seen.place), seen.dialect.name, made, numbers, seen.size, tuple(layers), seen.extras, unread)


def _as_added(seen: Survey, layer: Layer) -> Layer:
    """PEFT adds the change of an attention's output projection twice, at its attention's scale: files hold half."""
    attention = seen.layers.get(layer.path.removesuffix(OUTPUT))
    if attention is None or attention is layer or seen.dialect.name != "PEFT":
        return layer
    return replace(layer, scaling=2 * attention.scaling)


def _in_order(layer: Layer) -> tuple[object, ...]:
    """By number where names hold numbers: layers.2 before layers.10."""
    return tuple(
        (0, int(part), "") if part.isdecimal() and len(part) < 9 else (1, 0, part) for part in layer.name.split(".")
    )


def _measured(seen: Survey, there: Placed) -> LayerAnatomy:
    layer = there.layer
    spectra = [spectrum(block.B, block.A) for block in there.blocks]
    norms = [float(S.norm()) for S in spectra]
    if not all(map(math.isfinite, norms)):
        raise AdapterFormatError("NaN or infinity in its factors")
    furthest = max(range(len(norms)), key=lambda i: norms[i])
    S, block = spectra[furthest], there.blocks[furthest]
    norm = math.sqrt(sum(n * n for n in norms))
    A, B = seen.pair(layer)
    return LayerAnatomy(
        name=layer.name,
        shape=(len(block.B), block.A.shape[1]),
        rank=layer.rank,
        scaling=layer.scaling,
        norm=norm,
        norm_A=float(A.double().norm()),
        norm_B=float(B.double().norm()),
        spectrum=tuple(S.tolist()),
        effective_rank=effective_rank(S),
        needed_rank=needed_rank(S),
        relative=_relative(there.blocks, norm),
        experts=len(there.blocks) if len(there.blocks) > 1 else 0,
    )


def _relative(blocks: tuple[Block, ...], norm: float) -> float | None:
    whole = math.sqrt(sum(float(block.W.float().norm()) ** 2 for block in blocks))
    return norm / whole if whole else None


def spectrum(B: Tensor, A: Tensor) -> Tensor:
    """The singular values of B·A, largest first, in float64: as many as B has columns, without the dense product."""
    R_B = torch.linalg.qr(B.double(), mode="r").R
    R_A = torch.linalg.qr(A.double().T, mode="r").R
    if not bool(R_B.isfinite().all() & R_A.isfinite().all()):
        return torch.full((1,), math.nan, dtype=torch.float64)
    found: Tensor = torch.linalg.svdvals(R_B @ R_A.T)
    return found


def effective_rank(S: Tensor) -> float:
    """exp of the entropy of S/ΣS; zero for a change that is none."""
    total = float(S.sum())
    if not total:
        return 0.0
    p = S / total
    return math.exp(float(torch.special.entr(p).sum()))


def needed_rank(S: Tensor, share: float = _SHARE) -> int:
    """How many of the largest values hold this share of the energy."""
    energy = S.square()
    total = float(energy.sum())
    return int((energy.cumsum(0) < share * total * (1 - 1e-12)).sum()) + 1 if total else 0


# ------------------------------------------------------------------ what made it


def _made(seen: Survey) -> dict[str, Any]:
    """The start, the rate and the data: as headstart wrote them down, or as the config hints."""
    config, given = seen.raw, seen.provenance
    found: dict[str, Any] = {"base": config.get("base_model_name_or_path")}
    if "strategy" in given:
        anchored = given.get("anchored") or {}
        found |= {"start": given["strategy"], "options": given.get("options") or {}, "seed": given.get("seed")}
        found |= {"told by": "headstart's metadata", "anchored layers": len(anchored)}
    elif seen.dialect.name == "PEFT" and config:
        told = {"true": "kaiming", "false": "random"}.get(seen.init, seen.init)
        found |= {"start": told, "told by": f"init_lora_weights={seen.init}"}
    for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "peft_version"):
        if config.get(name):
            found[name] = config[name]
    folder = seen.file.parent
    report = _small_json(folder / REPORT)
    found |= {f"init {name}": report[name] for name in ("seconds", "data") if report.get(name)}
    return {name: value for name, value in (found | _run(folder)).items() if value not in (None, {}, [])}


def _small_json(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except AdapterFormatError:
        return {}


def _run(folder: Path) -> dict[str, Any]:
    """What `headstart tune` wrote one folder up: run.yaml, read as plain data."""
    file = folder.parent / "run.yaml"
    try:
        import yaml

        if not file.is_file() or file.stat().st_size > 1 << 20:
            return {}
        run = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (ImportError, OSError, UnicodeDecodeError, RecursionError):
        return {}
    except yaml.YAMLError:
        return {}
    wanted = ("learning_rate", "optimizer", "lr_scheduler", "epochs", "steps", "batch_size", "data", "seed")
    # Words and numbers only: YAML can say a list of lists of lists in a few bytes.
    plain = isinstance(run, dict) and {name: run.get(name) for name in wanted}
    return {name: value for name, value in (plain or {}).items() if isinstance(value, str | int | float)}
