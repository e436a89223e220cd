"""What the doctor has to say: reasons, verdicts by engine, and the whole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headstart.files.doctor.engines import Effect, Engine, Verdict
from headstart.files.doctor.stranger import Fault
from headstart.files.doctor.survey import Survey

RANKED = (Verdict.LOADS, Verdict.FOREIGN, Verdict.DIFFERS, Verdict.REFUSES)


@dataclass(frozen=True)
class Finding:
    """One reason for a verdict: why, what to do, where in the engine it stands, and the layers that it touches."""

    verdict: Verdict
    because: str
    repair: str = ""
    source: str = ""
    effect: Effect | None = None
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What one engine makes of an adapter.

    Attributes:
        engine: which; findings: the reasons, the worst first.
        ratios: by layer, the scale that it applies over the right one, where it differs.
        errors: by layer, ‖ΔW of the engine − ΔW‖ / ‖ΔW‖, where it is known and not zero.
        estimated: whether the start that the errors hold is an estimate.
    """

    engine: Engine
    findings: tuple[Finding, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    estimated: bool = False

    @property
    def verdict(self) -> Verdict:
        return max((f.verdict for f in self.findings), key=RANKED.index, default=Verdict.LOADS)

    @property
    def worst(self) -> tuple[str, float] | None:
        """The layer with the largest error, and the error."""
        return max(self.errors.items(), key=lambda item: item[1], default=None)


@dataclass(frozen=True)
class Diagnosis:
    """What is known about an adapter folder.

    Attributes:
        survey: what it holds; faults: what is wrong whoever reads it; readings: by engine.
        asked: the engines that count for `healthy`; base: whether a base was there to measure on.
        repeats: by layer, how much of the factors repeats the base (`deviation.repetition`), where one was given.
    """

    survey: Survey
    faults: tuple[Fault, ...]
    readings: tuple[Reading, ...]
    asked: tuple[str, ...]
    base: bool = False
    repeats: Mapping[str, float] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Nothing is wrong for the engines that were asked about."""
        well = all(r.verdict is Verdict.LOADS for r in self.readings if r.engine.key in self.asked)
        return well and not self.faults

    def __getitem__(self, key: str) -> Reading:
        return next(reading for reading in self.readings if reading.engine.key == key)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. What is not finite is null."""
        return {
            "adapter": str(self.survey.file.parent),
            "format": self.survey.dialect.name,
            "layers": len(self.survey.layers),
            "init_lora_weights": self.survey.init,
            "healthy": self.healthy,
            "asked": list(self.asked),
            "measured_on_base": self.base,
            "faults": [{"what": f.what, "repair": f.repair} for f in self.faults],
            "repeats_the_base": _finite(self.repeats),
            "engines": {r.engine.key: _plain(r) for r in self.readings},
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def _plain(reading: Reading) -> dict[str, Any]:
    return {
        "engine": reading.engine.title,
        "verdict": reading.verdict.value,
        "findings": [
            {"verdict": f.verdict.value, "because": f.because, "repair": f.repair, "source": f.source}
            for f in reading.findings
        ],
        "scale_ratio": _finite(reading.ratios),
        "relative_error": _finite(reading.errors),
        "estimated": reading.estimated,
        "worst": reading.worst and {"layer": reading.worst[0], "relative_error": _number(reading.worst[1])},
    }


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
