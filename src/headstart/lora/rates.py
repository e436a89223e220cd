"""The learning rate that fits a start, predicted from how far a step of its factors moves a layer's output.

AdamW moves every entry of A and B by about the rate at each step, whatever the gradient's size; after a while by δ. In
directions that have nothing to do with each other this moves the output W·x of a layer by

    E‖Δy‖² = s²·(δ²·(m·E‖Ax‖² + ‖B‖²·E‖x‖²) + δ⁴·ρ·m·E‖x‖²)                           A: (r, n), B: (m, r)

The first term is B's step under A, the second A's under B, the last their product: plain LoRA lives by it, because its
A is small and its B zero. ρ is r for steps in unrelated directions, and r² for steps that are all alike; in between,
16·(r/16)^1.5, is what sweeps ask for. A start fits a rate at which it moves every output as far as plain LoRA does at
the rate that fits plain LoRA. That one is known (`base`), or guessed: it falls as one over the layers' width,

    base = 1.3 / width                                            width: the geometric mean of min(m, n) over the layers

How the two compare needs no training:

    δ(start) / δ(plain),  both from the same E‖Δy‖²,  δ(plain) = base·steps/5,  their geometric mean over the layers

E‖Ax‖²/E‖x‖² is taken from the layer's input moments where a calibration holds them, and from the weights alone
(C = 1, ‖A‖²/n) where not: too small for a start that looks for the inputs' own directions. `benchmarks/rates` tests all
of it against sweeps; docs/rates.md has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headstart.errors import BadOption

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from headstart.statistics import InputSpectrum, Moments

PLAIN_RANK, PLAIN_SCALING = 16, 1.0
# δ in rates: how far an entry gets, in steps of the peak rate. A fifth of the run, fitted to runs of 24 to 80 steps on
# four tasks (docs/rates.md); outside these it is held at the nearest of them.
STEPS_PER_TRAVEL, NEAREST, TRAVEL, FURTHEST = 5.0, 4.0, 12.0, 16.0
PLAIN_TIMES_WIDTH = 1.3  # Fitted to short runs on four small models; 3.2e-4, about what is usual, at a width of 4096.


class Rate(float):
    """A learning rate, and why.

    Example:
        >>> rate = Rate(1e-3, "a guess")
        >>> print(rate, "because", rate.reason)
        0.001 because a guess
    """

    reason: str

    def __new__(cls, value: float, reason: str) -> Self:
        rate = super().__new__(cls, value)
        rate.reason = reason
        return rate


@dataclass(frozen=True)
class Reach:
    """What decides how far a step of one layer's factors moves its output.

    Attributes:
        m, rank, scaling: of the layer.
        A: E‖Ax‖²/E‖x‖², what A lets through of its input.
        B: ‖B‖_F², what B makes of a step of A.
        n: the width of its input.
        trained: the factors that train, "AB" or one of them; "" where only a core between them does.
    """

    m: int
    n: int
    rank: int
    scaling: float
    A: float
    B: float
    trained: str = "AB"

    @classmethod
    def plain(cls, m: int, n: int, rank: int = PLAIN_RANK, scaling: float = PLAIN_SCALING) -> Self:
        """Of plain LoRA: A uniform in ±1/√n, B zero."""
        rank = min(rank, m, n)
        return cls(m, n, rank, scaling, rank / (3 * n), 0.0)

    @classmethod
    def of(
        cls, A: Tensor, B: Tensor, scaling: float, trained: str = "AB", inputs: Moments | InputSpectrum | None = None
    ) -> Self:
        """Of two factors, (r, n) and (m, r), and what is known about the inputs."""
        energy = 0.0 if inputs is None else inputs.energy
        if inputs is not None and energy > 0:
            let_through = float((A * inputs.times(A.T.to(A.device)).T.to(A)).sum()) / energy
        else:
            let_through = float(A.square().sum()) / A.shape[1]
        return cls(B.shape[0], A.shape[1], A.shape[0], scaling, let_through, float(B.square().sum()), trained)

    def moved(self, step: float) -> float:
        """E‖Δy‖²/E‖x‖² when every entry that trains has moved by `step`."""
        square = step * step
        return square * (self._linear + square * self._product) * self.scaling**2

    def step(self, moved: float) -> float:
        """The step that moves the output so far: the inverse of `moved`."""
        if self.scaling == 0:  # No step moves anything.
            return math.inf
        wanted, q, p = moved / self.scaling**2, self._linear, self._product
        if p == 0:
            return math.sqrt(wanted / q) if q > 0 else math.inf
        return math.sqrt(2 * wanted / (q + math.sqrt(q * q + 4 * p * wanted)))

    @property
    def _linear(self) -> float:
        if not self.trained:  # B·ΔR·A: every entry of the core meets one column of B and one row of A.
            return self.B * self.A
        return self.m * self.A * ("B" in self.trained) + self.B * ("A" in self.trained)

    @property
    def _product(self) -> float:
        return self.m * PLAIN_RANK * (self.rank / PLAIN_RANK) ** 1.5 if self.trained == "AB" else 0.0


def width(reaches: Iterable[Reach]) -> float:
    """Of a model's layers: the geometric mean of the smaller side of each."""
    logs = [math.log(min(reach.m, reach.n)) for reach in reaches]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


def travelled(steps: int | None = None) -> float:
    """How far an entry gets in a run of so many steps, in steps of the peak rate.

    Raises:
        BadOption: if there is no such number of steps.

    Example:
        >>> travelled(40), travelled(10_000), travelled()
        (8.0, 16.0, 12.0)
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise BadOption(f"steps is {steps!r}: choose the optimizer steps of the run, an integer of at least 1")
    return TRAVEL if steps is None else min(max(steps / STEPS_PER_TRAVEL, NEAREST), FURTHEST)


def multiplier(reaches: Iterable[Reach], base: float, travel: float = TRAVEL) -> float:
    """The rate that fits over `base`, the rate that fits plain LoRA (r = 16, s = 1) on the same layers."""
    plain = travel * base
    logs = []
    for reach in reaches:
        fits = reach.step(Reach.plain(reach.m, reach.n).moved(plain))
        if 0 < fits < math.inf:
            logs.append(math.log(fits / plain))
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


def predicted(name: str, reaches: Iterable[Reach], base: float | None = None, steps: int | None = None) -> Rate:
    """The rate of a start, from its layers' reaches and plain LoRA's rate, or a guess of that; and the run's length."""
    layers = list(reaches)
    plain, source = base, ""
    if plain is None:
        plain = float(f"{PLAIN_TIMES_WIDTH / width(layers):.2g}")
        source = f", guessed from the layers' width of {width(layers):.0f}"
    factor = multiplier(layers, plain, travelled(steps))
    return Rate(
        plain * factor,
        f"{factor:.2g} × {plain:g}, the rate of plain LoRA (r = 16, s = 1){source}: a step of {name} moves the "
        f"layers' outputs {1 / factor:.2g} times as far",
    )
