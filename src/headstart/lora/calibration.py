"""What a pass over the data found: an object that can be looked at, saved and used again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.errors import AdapterFormatError, FileError, MissingStatistic, NoSignal
from headstart.lora.fingerprint import Fingerprint, apart, fingerprint
from headstart.lora.targets import Target
from headstart.statistics import NAMES, GradientSpectrum, GradientSum, InputSpectrum, Moments, Squares

Found = dict[str, dict[str, list[Any]]]  # by layer, by statistic: one for each block of the weight
_KINDS = {kind.__name__: kind for kind in (Moments, InputSpectrum, Squares, GradientSpectrum, GradientSum)}
_FORMAT = "headstart calibration 1"
FARTHEST = 0.5  # ‖W − W′‖/‖W‖. Fine-tuning goes a few per cent.


@dataclass(frozen=True)
class Calibration:
    """The statistics of a model's layers on some data.

    Attributes:
        layers: of every layer that ran, by name of the layer and of the statistic; one for each block of its weight.
        batches, tokens: that were read; loss: its mean over the tokens, where one was asked for.
        seconds: of wall time.
        weights: a few numbers of each weight, by which the model is known again.
    """

    layers: Mapping[str, Mapping[str, Sequence[Any]]]
    batches: int
    tokens: int
    loss: float | None = None
    seconds: float = 0.0
    weights: Fingerprint = field(default_factory=dict)
    _last: dict[str, tuple[Any, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def check_is_of(self, targets: Iterable[Target]) -> None:
        """Refuse another model, whose layers have the same names and sizes.

        Raises:
            MissingStatistic: if most weights are farther from those that it knows than any training takes them.
        """
        distance = apart(self.weights, fingerprint(targets)) if self.weights else 0.0
        if distance > FARTHEST:
            raise MissingStatistic(
                f"the calibration is of another model: its weights are {distance:.0%} of their norm from those here: "
                "calibrate this model"
            )

    def of(self, name: str, needs: Sequence[str], block: int, weight: Tensor) -> dict[str, Any]:
        """What a strategy needs to know about one block of a layer's weight.

        Raises:
            NoSignal: if the layer never ran. MissingStatistic: if something was not collected, or of another weight.
        """
        if name not in self.layers:
            raise NoSignal(
                "the calibration knows nothing of this layer, which its data never reached, or for which it was not "
                "made: exclude it, or set init_fallback"
            )
        found = self.layers[name]
        for need in needs:
            if need not in found:
                raise MissingStatistic(
                    f"the calibration holds no {need!r} ({NAMES[need]}): calibrate for this init too"
                )
        known = {need: self._on(need, found[need][block], weight.device) for need in needs}
        for need, statistic in known.items():
            _check_fits(name, need, statistic, weight)
        return known

    def _on(self, need: str, statistic: Any, device: torch.device) -> Any:
        """A statistic where the weight is: one that was loaded lies on the CPU. Layers in a row share it."""
        if device.type == "meta" or all(tensor.device == device for tensor in tensors(statistic)):
            return statistic
        known, there = self._last.get(need, (None, None))
        if known is not statistic or tensors(there)[0].device != device:
            there = _copied(statistic, device)
            self._last[need] = statistic, there
        return there

    def facts(self) -> dict[str, Any]:
        """What the init report says about the data."""
        return {name: value for name, value in vars(self).items() if name not in ("layers", "weights", "_last")}

    @property
    def bytes(self) -> int:
        """The memory that the statistics take; what layers share is counted once."""
        return size(self.layers)

    def save(self, path: str | Path) -> None:
        """Write it to one safetensors file, whole or not at all. What layers share is written once."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        entries: dict[str, dict[str, Any]] = {}
        keys: dict[int, str] = {}
        for key, statistic in each(self.layers).items():
            keys[id(statistic)] = key
            stored: dict[str, Any] = {}
            for name, value in _state(statistic).items():
                parts = value if isinstance(value, list | tuple) else [value]
                if isinstance(parts[0], Tensor):
                    tensors |= {f"{key}.{name}.{i}": part.contiguous() for i, part in enumerate(parts)}
                    stored[name] = {"tensors": len(parts), "as": type(value).__name__}
                else:
                    stored[name] = {"number": value}
            entries[key] = {"kind": type(statistic).__name__, "fields": stored}
        layers = {n: {k: [keys[id(s)] for s in v] for k, v in found.items()} for n, found in self.layers.items()}
        known = {"facts": self.facts(), "weights": self.weights}
        header = {"format": _FORMAT, "layers": layers, "statistics": entries, **known}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            save_file(tensors, partial, metadata={"headstart": json.dumps(header)})
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            FileError: if there is none. AdapterFormatError: if the file is something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("headstart", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header.get("format") != _FORMAT:
                raise AdapterFormatError(f"{path} is no calibration of this version: calibrate again")
            found = {key: _restored(key, entry, tensors) for key, entry in header["statistics"].items()}
            layers = {n: {k: [found[s] for s in v] for k, v in kinds.items()} for n, kinds in header["layers"].items()}
            return cls(layers, **header["facts"], weights=header.get("weights", {}))
        except OSError as error:
            raise FileError(f"cannot read a calibration at {str(path)!r} ({error}): check the path") from error
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise AdapterFormatError(f"{path} is no calibration: {error}") from error

    def __str__(self) -> str:
        kinds = sorted({kind for found in self.layers.values() for kind in found})
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        return (
            f"{', '.join(kinds)} of {len(self.layers)} layers: {self.batches} batches, {self.tokens:,} tokens{loss}, "
            f"{self.bytes / 2**20:.1f} MB, {self.seconds:.1f} s"
        )


def _check_fits(name: str, need: str, statistic: Any, weight: Tensor) -> None:
    m, n = weight.shape
    expected = {"gradient": (m, n), "inputs": n, "preserved": n}.get(need, m)
    seen = statistic.shape if need == "gradient" else statistic.features
    if seen != expected:
        raise MissingStatistic(
            f"the calibration is of another model: its {need!r} of {name!r} is of size {seen}, and the weight here is "
            f"{m} × {n}: calibrate this model"
        )


def each(layers: Mapping[str, Mapping[str, Sequence[Any]]]) -> dict[str, Any]:
    """Every statistic once, by the first layer, kind and block that has it."""
    found: dict[int, tuple[str, Any]] = {}
    for name, kinds in layers.items():
        for kind, blocks in kinds.items():
            for i, statistic in enumerate(blocks):
                found.setdefault(id(statistic), (f"{name}:{kind}:{i}", statistic))
    return dict(found.values())


def size(layers: Mapping[str, Mapping[str, Sequence[Any]]]) -> int:
    """The bytes of all statistics, what layers share once."""
    return sum(t.numel() * t.element_size() for s in each(layers).values() for t in tensors(s))


def tensors(statistic: Any) -> list[Tensor]:
    """The tensors that a statistic keeps."""
    values = [v if isinstance(v, list | tuple) else [v] for v in _state(statistic).values()]
    return [part for parts in values for part in parts if isinstance(part, Tensor)]


def _copied(statistic: Any, device: torch.device) -> Any:
    moved = {name: _moved(value, device) for name, value in _state(statistic).items()}
    fresh: dict[str, Any] = {"known": {}} if isinstance(statistic, Moments) else {}
    return replace(statistic, **moved, **fresh)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(part.to(device) for part in value) if isinstance(value, list | tuple) else value


def _state(statistic: Any) -> dict[str, Any]:
    """The fields of a statistic but what is of no use once the data was read, or can be found again."""
    return {f.name: getattr(statistic, f.name) for f in fields(statistic) if f.name not in ("generator", "known")}


def _restored(key: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    values: dict[str, Any] = {}
    for name, stored in entry["fields"].items():
        if "number" in stored:
            values[name] = stored["number"]
            continue
        parts = [tensors[f"{key}.{name}.{i}"] for i in range(stored["tensors"])]
        values[name] = parts if stored["as"] == "list" else tuple(parts) if stored["as"] == "tuple" else parts[0]
    kind = _KINDS[entry["kind"]]
    if "generator" in {f.name for f in fields(kind)}:
        values["generator"] = torch.Generator().manual_seed(0)
    return kind(**values)
