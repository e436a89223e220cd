"""What rounding takes from an update when it is folded into a weight: measured, and told.

‖W′ − (W + Δ)‖ / ‖Δ‖                           W′: what is stored, W + Δ: what was meant, in float64
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from headstart.files.merging.folding import Change, Rows
from headstart.lora.merge import MergeReport

SAMPLED = 64  # Rows of a tensor on which the loss is measured.
TOLERATED = 0.1  # The share of an update that may be lost without a word of advice.


@dataclass(frozen=True)
class CheckpointReport(MergeReport):
    """What a merge of a checkpoint wrote.

    Attributes:
        lost: by layer, the share of the update that rounding took, ‖W′ − (W + Δ)‖/‖Δ‖, on evenly spaced rows; over all
            rows where the weight is quantised anew: above 1 the error is larger than the update.
        dropped: by layer, the share of ‖Δ‖² that `--rank` cut off, where something was cut.
        dtype: of the changed weights; size: bytes written; untied: whether the head is a weight of its own from now on.
        how: "streamed", or why the model had to be loaded.
    """

    dropped: Mapping[str, float] = field(default_factory=dict)
    dtype: str = ""
    size: int = 0
    untied: bool = False
    how: str = "streamed"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        told = {"dtype": self.dtype, "how": self.how, "size": self.size, "untied": self.untied, "advice": self.advice}
        return {**told, "lost": dict(self.lost), "dropped": dict(self.dropped)}

    @property
    def median(self) -> float:
        found = sorted(self.lost.values())
        return found[len(found) // 2] if found else 0.0

    @property
    def advice(self) -> str | None:
        """What to do where too much was lost."""
        bad = [name for name, lost in self.lost.items() if lost > TOLERATED]
        if not bad:
            return None
        said = f"{len(bad)} of {len(self.lost)} layers lost more than {TOLERATED:.0%} of their update to rounding"
        if self.dtype in ("bfloat16", "float16"):
            return (
                f"{said}: --dtype float32 keeps it, in twice the space; or serve the adapter unmerged, losing nothing"
            )
        return f"{said}: --dtype bfloat16 writes floats; or serve the adapter unmerged on the quantised base"


Loss = tuple[float, float]  # Σ‖W′ − (W + Δ)‖², Σ‖Δ‖²


def measure(change: Change, W: Tensor, new: Tensor, rows: Rows, some: Sequence[Rows]) -> Loss:
    """What rounding did to some of the rows.

    Args:
        W, new: before and after; rows: of the parameter; some: ranges of them, counted from the first.
    """
    error = update = 0.0
    for start, stop in some:
        old = W[start:stop]
        exact = change.wanted(old, (rows[0] + start, rows[0] + stop))
        error += float((new[start:stop].double() - exact).square().sum())
        update += float((exact - old.double()).square().sum())
    return error, update


class Losses:
    """The sums behind a report, while a checkpoint is written."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.dropped: dict[str, float] = {}
        self.kinds: Counter[str] = Counter()

    def enter(self, label: str, found: Loss) -> None:
        """Add what `measure` found."""
        sums = self.sums.setdefault(label, [0.0, 0.0])
        sums[0] += found[0]
        sums[1] += found[1]

    def drop(self, label: str, share: float) -> None:
        """Enter what a rank cut off."""
        if share:
            self.dropped[label] = max(share, self.dropped.get(label, 0.0))

    def report(self, size: int, untied: bool) -> CheckpointReport:
        """The shares, by layer."""
        lost = {label: math.sqrt(error / update) if update else 0.0 for label, (error, update) in self.sums.items()}
        kind = self.kinds.most_common(1)[0][0] if self.kinds else ""
        return CheckpointReport(lost, dict(self.dropped), kind, size, untied)


def picked(start: int, stop: int, total: int, count: int = 16, height: int = SAMPLED // 16) -> list[Rows]:
    """Evenly spaced rows of all, by small ranges: those within [start, stop), counted from its beginning."""
    if total <= count * height:
        return [(0, stop - start)]
    starts = [k * (total - height) // (count - 1) for k in range(count)]
    return [(at - start, min(at + height, stop) - start) for at in starts if start <= at < stop]


def every(total: int, height: int = 256) -> list[Rows]:
    """All rows, by ranges."""
    return [(start, min(start + height, total)) for start in range(0, total, height)]
