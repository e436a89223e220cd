"""From a value to a place on an axis, and where its ticks stand."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`, in values; places run from 0 to 1.

    Attributes:
        logarithmic: whether equal ratios are equally far apart.
        percent: whether the ticks are shares; whole: whether they are whole numbers.
    """

    low: float
    high: float
    logarithmic: bool = False
    percent: bool = False
    whole: bool = False

    @classmethod
    def of(
        cls, values: Iterable[float], logarithmic: bool = False, *, zero: bool = False, percent: bool = False
    ) -> Scale:
        """One that holds all values, with some room."""
        found = [v for v in values if math.isfinite(v) and (v > 0 or not logarithmic)]
        found += [0.0] if zero or not found else []
        low, high = (min(found), max(found)) if found != [0.0] else (0.0, 1.0)
        if logarithmic:
            low, high = (low, high) if low > 0 else (0.1, 1.0)
            room = max(1.12, (high / low) ** 0.05)
            return cls(low / room, high * room, True, percent)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        low = 0.0 if zero and low == 0 else low - room
        return cls(low, high if percent and high == 1 else high + room, False, percent)

    def __call__(self, value: float) -> float:
        """The place of a value, kept inside the axis."""
        if self.logarithmic:
            value = max(value, self.low)
            place = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            place = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, place))

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """At most so many values worth naming, with their names."""
        found = self._decades(most) if self.logarithmic else self._steps(most)
        for digits in (4, 6, 9, 12):  # More where neighbours would have one name.
            names = [self.name(value, digits) for value in found]
            if len(set(names)) == len(names):
                break
        return list(zip(found, names, strict=True))

    def _decades(self, most: int) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for leads in ((1, 2, 5), (1, 3), (1,)):
            found = [lead * 10.0**k for k in range(first, last + 1) for lead in leads]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) <= most:
                break
        stride = max(1, math.ceil(len(found) / most))
        return found[::stride] if len(found) > 1 else self._steps(most)

    def _steps(self, most: int) -> list[float]:
        rough = (self.high - self.low) / max(1, most)
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * lead for lead in (1, 2, 2.5, 5, 10) if size * lead >= rough * (1 - 1e-9))
        step = max(1, math.ceil(step)) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        found = [float(f"{k * step:.12g}") for k in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [value for value in found if value > 0 or not self.logarithmic]

    def name(self, value: float, digits: int = 4) -> str:
        """A value as the axis writes it."""
        if self.percent:
            return f"{100 * value:.{digits - 1}g} %"
        if value and not 1e-3 <= abs(value) < 1e4:
            mantissa, exponent = f"{value:.1e}".split("e")
            return f"{float(mantissa):g}e{int(exponent)}"
        return f"{value:.{digits}g}".replace("-", "−")
