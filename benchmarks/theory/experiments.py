"""One function a theorem. Each takes its sizes, so that the tests run it smaller, and returns a table and curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.theory import setting
from benchmarks.theory.setting import DOUBLE, Linear, Relu, Step, descend, seeded, spread

Curves = dict[str, list[float]]
DIVERGED = 1e6


@dataclass(frozen=True)
class Result:
    """What an experiment found.

    Attributes:
        header, rows: its table.
        x, curves: by panel, one value for each x, or fewer where a run diverged.
        facts: single numbers.
    """

    header: list[str]
    rows: list[list[Any]]
    x: list[float]
    curves: dict[str, Curves]
    facts: dict[str, float] = field(default_factory=dict)


def theorem_3_2_alignment(
    d: int = 100,
    steps: int = 1500,
    sizes: Sequence[float] = (1, 1e-1, 1e-2, 1e-3, 1e-4),
    seeds: Sequence[int] = (0, 1, 2),
) -> Result:
    """Plain LoRA turns A towards the gradient's right singular vectors, if A₀ is small enough (Theorem 3.2).

    B stays within the gradient's left singular vectors from the first step on (Theorem 3.1). N = 16·d, r = 8, r* = 4,
    η = 1/64; the angle is ‖(I − V·Vᵀ)·V₄(A)‖, between the four leading directions of A and of G. The facts say how
    much of B was ever outside, and how far the samples turn the directions of G from those of Δ.
    """
    angles: dict[float, list[list[float]]] = {size: [] for size in sizes}
    risks: dict[float, list[list[float]]] = {size: [] for size in sizes}
    leak, turned = 0.0, 0.0
    for seed in seeds:
        problem = Linear.draw(d, 16 * d, torch.ones(4, dtype=DOUBLE), seed)
        G = -problem.gradient(torch.zeros(d, d, dtype=DOUBLE))
        U, _, Vt = torch.linalg.svd(G)
        off = torch.eye(d, dtype=DOUBLE) - Vt[:4].T @ Vt[:4]
        turned = max(turned, _norm(torch.linalg.svd(problem.change)[2][:4] @ off))
        for size in sizes:
            start = setting.random(8, G.shape, math.sqrt(size), seeded(seed + 1000))
            seen = list(islice(descend(problem.gradient, start, 1 / 64), 0, steps + 1, 10))
            angles[size].append([_norm(torch.linalg.svd(A, full_matrices=False)[2][:4] @ off) for A, _, _ in seen])
            risks[size].append([problem.risk(change) for _, _, change in seen])
            leak = max(leak, *(_norm(B - U[:, :4] @ (U[:, :4].T @ B)) / _norm(B) for _, B, _ in seen[1:]))
    header = ["α²", *(f"angle, seed {seed}" for seed in seeds), *(f"risk, seed {seed}" for seed in seeds)]
    rows = [[size, *map(min, angles[size]), *(risk[-1] for risk in risks[size])] for size in sizes]
    panels = {"angle": angles, "risk": risks}
    curves = {name: {f"α² = {size:g}": found[size][0] for size in sizes} for name, found in panels.items()}
    return Result(header, rows, list(range(0, steps + 1, 10)), curves, {"leak": leak, "turned": turned})


def theorem_3_3_spectral_start(d: int = 100, ratios: Sequence[int] = (2, 4, 8, 16, 32, 64), seed: int = 0) -> Result:
    """How near one gradient comes to Δ: as near as the samples' second moment is to the identity (Theorem 3.3)."""
    errors, moments = [], []
    for ratio in ratios:
        problem = Linear.draw(d, ratio * d, _four(), seed)
        start = setting.spectral(-problem.gradient(torch.zeros(d, d, dtype=DOUBLE)), 4)
        errors.append(_norm(start.B @ start.A - problem.change) / _norm(problem.change))
        moments.append(_norm(problem.moment - torch.eye(d, dtype=DOUBLE)))
    rows = [list(row) for row in zip(ratios, errors, moments, strict=True)]
    curves = {"error at step zero": {"‖B₀A₀ − Δ‖/‖Δ‖": errors, "‖C − I‖": moments}}
    return Result(["N/d", "‖B₀A₀ − Δ‖/‖Δ‖", "‖C − I‖"], rows, list(ratios), curves)


def linear_convergence(d: int = 100, steps: int = 100, seed: int = 0) -> Result:
    """The risk of every start, by plain and by preconditioned descent. N = 16·d, r = 8, r* = 4, η = 0.5, λ = 10⁻³."""
    problem = Linear.draw(d, 16 * d, _four(), seed)
    G = -problem.gradient(torch.zeros(d, d, dtype=DOUBLE))
    starts = {
        "LoRA-One, spectral": setting.spectral(G, 8),
        "LoRA-One, Algorithm 1": setting.algorithm_1(G, 8, gamma=4),
        "LoRA-One, January 2025": setting.january(G, 8, gamma=4),
        "LoRA-GA": setting.lora_ga(G, 8, gamma=4),
        "plain LoRA": setting.random(8, G.shape, d**-0.5, seeded(seed + 1000)),
    }
    curves: dict[str, Curves] = {}
    for name, damping in {"preconditioned": 1e-3, "plain descent": None}.items():
        curves[name] = {
            start: _follow(descend(problem.gradient, factors, 0.5, damping), problem.risk, steps)
            for start, factors in starts.items()
        }
        curves[name]["LoRA-SB"] = _follow(setting.lora_sb(problem.gradient, G, 8, 0.5), problem.risk, steps)
    marks = [mark for mark in (0, 1, 2, 5, 10, 20, 50, 100) if mark <= steps]
    rows = [[name, start, *_at(curve, marks)] for name, panel in curves.items() for start, curve in panel.items()]
    header = ["descent", "start", *(f"step {mark}" for mark in marks)]
    return Result(header, rows, list(range(steps + 1)), curves, floors(problem, starts["LoRA-GA"], G))


def floors(problem: Linear, anchored: setting.Start, G: Tensor) -> dict[str, float]:
    """The least risk that a start can reach, whatever the optimizer.

    LoRA-GA has to hold B₀·A₀ and learn Δ with r directions: what is beyond the r-th singular value of B₀·A₀ + Δ stays.
    LoRA-SB has to stay within the gradient's rows, which samples turned away from those of Δ.
    """
    beyond = torch.linalg.svdvals(anchored.B @ anchored.A + problem.change)[len(anchored.A) :]
    U, _, Vt = torch.linalg.svd(G)
    rank = len(anchored.A)
    within = U[:, :rank] @ (U[:, :rank].T @ problem.change @ Vt[:rank].T) @ Vt[:rank]
    return {"LoRA-GA": float(beyond.square().sum()) / 2, "LoRA-SB": problem.risk(within)}


def condition_number(
    d: int = 100, conditions: Sequence[int] = (1, 3, 10, 30, 100), seed: int = 0, limit: int = 5000
) -> Result:
    """Steps to a risk of 10⁻¹⁰ as κ = λ₁/λ_r* grows. N = 64·d, r = r* = 4, η = 0.5; from B = 0 with a damping λ."""
    arms: dict[str, tuple[str, float | None]] = {
        "spectral, plain descent": ("spectral", None),
        "spectral, preconditioned": ("spectral", 0.0),
        "random, plain descent": ("random", None),
        "random, preconditioned, λ = 10⁻³": ("random", 1e-3),
        "random, preconditioned, λ = 10⁻⁶": ("random", 1e-6),
    }
    rows: list[list[Any]] = []
    for condition in conditions:
        problem = Linear.draw(d, 64 * d, spread(condition), seed)
        G = -problem.gradient(torch.zeros(d, d, dtype=DOUBLE))
        starts = {"spectral": setting.spectral(G, 4)}
        starts["random"] = setting.random(4, G.shape, d**-0.5, seeded(seed + 1000))
        paths = [descend(problem.gradient, starts[start], 0.5, damping) for start, damping in arms.values()]
        rows.append([condition, *(_steps_to(1e-10, path, problem, limit) for path in paths)])
    columns = {name: [row[i + 1] for row in rows] for i, name in enumerate(arms)}
    table = [[condition, *(f"> {limit}" if n is None else n for n in found)] for condition, *found in rows]
    return Result(["κ", *arms], table, list(conditions), {"steps to a risk of 10⁻¹⁰": columns})


def theorem_4_2_relu(d: int = 30, samples: int = 8000, steps: int = 80, seed: int = 0) -> Result:
    """Behind a ReLU: ‖B·A − Δ‖ falls by a factor that does not know κ (Theorem 4.2). r = r* = 4, γ = 2, η = 0.8."""
    curves: dict[str, Curves] = {}
    for condition in (1, 10):
        problem = Relu.draw(d, samples, spread(condition), seed)
        G = -problem.gradient(torch.zeros(d, d, dtype=DOUBLE))
        spectral, random = setting.spectral(G, 4, 2.0), setting.random(4, G.shape, d**-0.5, seeded(seed + 1000))
        arms = {
            "spectral, preconditioned": descend(problem.gradient, spectral, 0.8, 0.0),
            "spectral, plain descent": descend(problem.gradient, spectral, 0.8),
            "random, preconditioned": descend(problem.gradient, random, 0.8, 1e-3),
            "random, plain descent": descend(problem.gradient, random, 0.8),
        }
        curves[f"κ = {condition}"] = {name: _follow(path, problem.error, steps) for name, path in arms.items()}
    marks = [mark for mark in (0, 1, 5, 10, 20, 40, 80) if mark <= steps]
    rows = [
        [panel, *name.split(", "), *_at(curve, marks)] for panel, arms in curves.items() for name, curve in arms.items()
    ]
    header = ["", "start", "descent", *(f"step {mark}" for mark in marks)]
    return Result(header, rows, list(range(steps + 1)), curves)


EXPERIMENTS: dict[str, Callable[[], Result]] = {
    "alignment": theorem_3_2_alignment,
    "spectral_start": theorem_3_3_spectral_start,
    "convergence": linear_convergence,
    "condition": condition_number,
    "relu": theorem_4_2_relu,
}


def _four() -> Tensor:
    return torch.tensor([4, 3, 2, 1], dtype=DOUBLE) / 4


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def _follow(path: Iterator[Step], measure: Callable[[Tensor], float], steps: int) -> list[float]:
    """The measure before each step and after the last, as far as it stays finite."""
    found: list[float] = []
    for _, _, change in islice(path, steps + 1):
        found.append(measure(change))
        if not found[-1] < DIVERGED:
            return found[:-1]
    return found


def _at(curve: Sequence[float], marks: Sequence[int]) -> list[float | str]:
    return [curve[mark] if mark < len(curve) else "diverged" for mark in marks]


def _steps_to(target: float, path: Iterator[Step], problem: Linear, limit: int) -> int | None:
    """The first step at which the risk is below the target, if any."""
    return next(
        (step for step, (_, _, change) in enumerate(islice(path, limit)) if problem.risk(change) < target), None
    )
