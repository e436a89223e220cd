"""A comparison as an object: its table, its verdict, its files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.choose.trials.plan import Plan, words
from headstart.choose.trials.result import Arm, Measured
from headstart.choose.trials.verdict import Verdict, saved_steps, verdict, worth_it
from headstart.errors import AdapterFormatError
from headstart.files.atomic import text_writer, write_files
from headstart.lora.config import LoraConfig

FORMAT = "headstart comparison 1"


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        measured: the runs, and what was measured beside them.
        configs: the arms' configs; facts: what the report shows of the model and the data.
    """

    measured: Measured
    configs: Mapping[str, LoraConfig]
    facts: Mapping[str, Any]

    @property
    def arms(self) -> list[Arm]:
        """The results of each arm, the baseline first."""
        return self.measured.arms

    @property
    def verdict(self) -> Verdict:
        """What it says, in words."""
        return verdict(self.measured)

    @property
    def rows(self) -> list[dict[str, str]]:
        """The table, a row an arm: columns and cells as text."""
        return [_row(arm, self.measured) for arm in self.arms]

    @property
    def table(self) -> str:
        """The same as aligned text."""
        rows = self.rows
        lines = [list(rows[0]), *(list(row.values()) for row in rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """As results.json holds it; docs/howto/compare.md says what each part is."""
        found = self.measured
        spent, full = found.steps_tuning
        return {
            "format": FORMAT,
            "facts": dict(self.facts),
            "verdict": dataclasses.asdict(self.verdict),
            "table": self.rows,
            "arms": [_arm_dict(arm, found, self.configs[arm.name]) for arm in self.arms],
            "plan": {
                **found.plan.to_dict(),
                "predicted_seconds": found.plan.seconds,
                "doubts": found.plan.doubts,
                "alike": found.plan.alike,
            },
            "time": {
                "seconds": found.seconds,
                "share_training": found.share_training,
                "step_seconds": found.step_seconds,
                "tuning_steps": spent,
                "full_grid_steps": full,
                "saved": 1 - spent / full if full else 0.0,
            },
            "base": dict(found.base),
            "starts": found.starts,
            "crashed": dict(found.crashed),
            "stopped": found.stopped,
            "runs": [{"key": key, **outcome} for key, outcome in found.outcomes.items() if key != "plan"],
            "rehearsal": found.outcomes.get("plan", {}).get("seconds", {}),
        }

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(_plain(self.to_dict()), indent=1, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """One self-contained page, which works offline."""
        from headstart.choose.report import page

        return page(_plain(self.to_dict()))

    def save(self, folder: str | Path) -> None:
        """Write results.json and report.html into a folder, both or neither."""
        writers = {"report.html": text_writer(self.to_html()), "results.json": text_writer(self.to_json())}
        write_files(Path(folder), writers)

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read a results.json, or the folder that holds it.

        Raises:
            AdapterFormatError: if the file is something else.
        """
        path = Path(path)
        path = path / "results.json" if path.is_dir() else path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.get("format") != FORMAT:
                raise AdapterFormatError(f"{path} is no comparison of this version: compare again")
            fields = {f.name for f in dataclasses.fields(Plan)}
            plan = Plan.from_dict({k: v for k, v in values["plan"].items() if k in fields})
            measured = Measured(
                plan,
                values["base"],
                values["starts"],
                {arm["name"]: arm["trainable"] for arm in values["arms"]},
                {"plan": {"seconds": values["rehearsal"]}} | {run.pop("key"): run for run in values["runs"]},
                values["crashed"],
                values["stopped"],
            )
            configs = {arm["name"]: LoraConfig.from_dict(arm["config"]) for arm in values["arms"]}
            return cls(measured, configs, values["facts"])
        except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise AdapterFormatError(f"{path} is no comparison: {error}") from error

    def __str__(self) -> str:
        return f"{self.table}\n\n{self.verdict}"


def _row(arm: Arm, found: Measured) -> dict[str, str]:
    base = found.baseline
    difference, steps = arm.difference, saved_steps(arm, found)
    row = {
        "start": arm.name,
        "rate": "none" if arm.rate is None else f"{arm.rate:.2g}",
        "loss": "–" if arm.loss is None else f"{arm.loss:.4f}",
        f"against {base.name}": "baseline" if arm is base else "–",
        "95 % interval": "",
        "p": "",
        "steps sooner": "" if arm is base or steps is None else f"{steps:+d}",
        "start takes": words(arm.cost),
        "verdict": "",
    }
    if difference is not None:
        row[f"against {base.name}"] = f"{difference.mean:+.4f}"
        row["95 % interval"] = f"{difference.low:+.4f} to {difference.high:+.4f}"
        row["p"] = f"{difference.p:.3f}" if difference.p >= 0.001 else "< .001"
    row["verdict"] = judged(arm, found)
    return row


def judged(arm: Arm, found: Measured) -> str:
    """An arm's verdict in a word or two."""
    if arm is found.baseline:
        return ""
    if arm.loss is None:
        return "crashed" if arm.crashed else "diverged" if arm.diverged and not found.stopped else "not run"
    if arm.difference is None:
        return "too few seeds"
    if not verdict(found).conclusive:
        return "no conclusion"
    if not arm.difference.told:
        return "no difference"
    if arm.difference.mean > 0:
        return "worse"
    return "better, worth it" if worth_it(arm, found) else "better"


def _arm_dict(arm: Arm, found: Measured, config: LoraConfig) -> dict[str, Any]:
    values = {field.name: getattr(arm, field.name) for field in dataclasses.fields(arm)}
    return {
        **values,
        "difference": None if arm.difference is None else dataclasses.asdict(arm.difference),
        "loss": arm.loss,
        "interval": arm.interval,
        "kept": arm.kept,
        "judged": judged(arm, found),
        "saved_steps": saved_steps(arm, found),
        "worth_it": worth_it(arm, found),
        "trainable": found.trainable[arm.name],
        "config": dataclasses.asdict(config),
    }


def _plain(value: Any) -> Any:
    """For JSON, which has no infinity: what is not finite becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | bool) or value is None else str(value)
