"""What an advice says: one start with everything that goes with it, and all of them ranked."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headstart.choose import costs
from headstart.choose.estimate import Estimate
from headstart.choose.facts import Facts
from headstart.choose.rate import Rate
from headstart.choose.rules import Rule

if TYPE_CHECKING:
    from headstart.lora.config import LoraConfig


@dataclass(frozen=True)
class Recommendation:
    """One start, with everything that goes with it.

    Attributes:
        init: its name. because, source, confidence: of the init.
        choices: by question ("rank", "scaling", "targets", "decay"), the answer and the rule that gave it.
        rate: the learning rate. estimate: memory and time.
        fits: whether it fits the memory limit. fields: of `headstart tune`, what differs from its defaults.
    """

    init: str
    because: str
    source: str
    confidence: str
    choices: dict[str, tuple[Any, Rule]] = field(repr=False)
    rate: Rate
    estimate: Estimate = field(repr=False)
    fits: bool
    fields: dict[str, Any]

    def lora_config(self, **changes: Any) -> LoraConfig:
        """The same for `headstart.adapt`."""
        from headstart.lora.config import LoraConfig

        return LoraConfig.from_dict({**self._lora(), **changes})

    def _lora(self) -> dict[str, Any]:
        taken = ("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "init_options")
        return {"init_lora_weights": self.init} | {name: self.fields[name] for name in taken if name in self.fields}

    @property
    def command(self) -> str:
        """What to paste; for a model that writes no text, the config for Python."""
        if not self.estimate.outline.causal:
            inner = ", ".join(f"{name}={value!r}" for name, value in self._lora().items())
            seen = "preserved" if "calibration" in self.fields else "batches"
            given = f", data={seen}" * bool(self._needs) + ", preserve=preserved" * ("preserve" in self.fields)
            return f"hs.adapt(model, hs.LoraConfig({inner}){given})"
        words = ["headstart tune"]
        for name, value in self.fields.items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                words.append(f"{flag} {shlex.quote(_flat(value))}")
        return " ".join(words)

    @property
    def yaml(self) -> str:
        """The same as a file for `headstart tune --config`."""
        return "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in self.fields.items())

    @property
    def _needs(self) -> tuple[str, ...]:
        return costs.start_of(self.init).needs

    def to_dict(self) -> dict[str, Any]:
        choices = {
            name: {"choose": value, "because": rule.because, "source": rule.source, "confidence": rule.confidence}
            for name, (value, rule) in self.choices.items()
        }
        return {
            "init": self.init,
            "because": self.because,
            "source": self.source,
            "confidence": self.confidence,
            "choices": choices,
            "rate": vars(self.rate),
            "estimate": self.estimate.to_dict(),
            "fits": self.fits,
            "fields": self.fields,
            "command": self.command,
            "yaml": self.yaml,
        }


@dataclass(frozen=True)
class Advice:
    """What is advised, best first, and what is not.

    Attributes:
        facts: what it is based on. ranked: recommendations.
        ruled_out: of every other start, why not, and the source. notes: what else to know.
    """

    facts: Facts = field(repr=False)
    ranked: tuple[Recommendation, ...]
    ruled_out: dict[str, tuple[str, str]]
    notes: tuple[str, ...]

    @property
    def best(self) -> Recommendation:
        return self.ranked[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        facts = self.facts
        return {
            "facts": {
                "model": facts.outline.kind,
                "parameters": facts.outline.parameters,
                "read": facts.outline.read,
                "dtype": self.best.estimate.setting.dtype,
                "quantised": facts.quantised,
                "memory": facts.memory,
                "data": None if facts.data is None else {**vars(facts.data), "total": facts.data.total},
                "steps": facts.planned_steps,
                "preserve": facts.preserve,
                "serve": facts.serve,
                "sweep": facts.sweep,
            },
            "ranked": [each.to_dict() for each in self.ranked],
            "ruled_out": {n: {"because": b, "source": s} for n, (b, s) in self.ruled_out.items()},
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """For programs."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def __str__(self) -> str:
        from headstart.choose.wording import told

        return told(self)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={inner}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        # One name without a comma would be read as an expression for a whole name.
        return ",".join(map(str, value)) if len(value) > 1 else rf"(.*\.)?{re.escape(value[0])}"
    return str(value)
