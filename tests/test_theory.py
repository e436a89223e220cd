"""LoRA-One's theorems at a smaller size: what docs/theory/lora-one.md claims."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.theory.experiments")


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.theory.setting")


def test_the_smaller_the_random_start_the_closer_it_aligns(experiments: Any) -> None:
    found = experiments.theorem_3_2_alignment(d=40, steps=600, sizes=(1, 1e-2, 1e-4), seeds=(0,))
    angles = [row[1] for row in found.rows]
    assert angles == sorted(angles, reverse=True)
    assert angles[0] > 0.9
    assert angles[-1] < 0.3
    assert found.facts["leak"] < 1e-12, "Theorem 3.1: B stays within the gradient's left singular vectors"


def test_the_spectral_start_is_as_near_as_the_samples_allow(experiments: Any) -> None:
    found = experiments.theorem_3_3_spectral_start(d=40, ratios=(4, 16, 64, 256))
    for (_, error, moment), (_, better, _) in zip(found.rows, found.rows[1:], strict=False):
        assert better < 0.7 * error
        assert error < moment


def test_lora_one_converges_linearly_where_lora_ga_and_lora_sb_stop(experiments: Any) -> None:
    found = experiments.linear_convergence(d=40)
    preconditioned, plain = found.curves["preconditioned"], found.curves["plain descent"]
    for start in ("LoRA-One, spectral", "LoRA-One, Algorithm 1", "plain LoRA"):
        assert preconditioned[start][-1] < 1e-20
        for before, after in zip(preconditioned[start][5:55:10], preconditioned[start][15:65:10], strict=True):
            assert after < 0.02 * before, "a factor each step"
    for start in ("LoRA-One, spectral", "LoRA-One, Algorithm 1"):
        assert plain[start][-1] < 1e-6
    for start, floor in found.facts.items():
        end = preconditioned[start][-1]
        assert floor <= end < 1.2 * floor, start
        assert end > 1e-2
        assert end == pytest.approx(preconditioned[start][50], rel=1e-3), "it stopped"


def test_the_condition_number_costs_steps_only_without_the_preconditioner(experiments: Any) -> None:
    found = experiments.condition_number(d=40, conditions=(1, 10, 100), limit=2000)
    steps = dict(zip(found.header, zip(*found.rows, strict=True), strict=True))
    assert max(steps["spectral, preconditioned"]) - min(steps["spectral, preconditioned"]) <= 2
    first, second, third = steps["spectral, plain descent"]
    assert 4 * first < second < third / 4
    assert max(steps["random, preconditioned, λ = 10⁻⁶"]) < 30
    assert steps["random, plain descent"][-1] == "> 2000"


def test_behind_a_relu_the_factor_a_step_does_not_know_the_condition(experiments: Any) -> None:
    found = experiments.theorem_4_2_relu(d=16, samples=4000, steps=40)
    for panel in found.curves.values():
        curve = panel["spectral, preconditioned"]
        assert curve[0] < 0.15
        for t, error in enumerate(curve):
            assert error <= (1 - 0.8 / 4) ** t * curve[0], "Theorem 4.2's factor"
    ends = [panel["spectral, plain descent"][-1] for panel in found.curves.values()]
    assert ends[1] > 1e4 * ends[0], "which plain descent does know"


def test_the_starts_have_the_products_that_their_papers_give(setting: Any) -> None:
    G = torch.randn(12, 12, dtype=torch.float64)
    U, S, Vt = torch.linalg.svd(G)
    best = (U[:, :3] * S[:3]) @ Vt[:3]
    for start, wanted in {
        "spectral": (setting.spectral(G, 3, 2.0), 2 * best),
        "algorithm 1": (setting.algorithm_1(G, 3, 128.0), best / S[0] / 128),
        "january": (setting.january(G, 3, 16.0), 12**0.5 / 16 * U[:, :3] @ Vt[:3]),
        "lora_ga": (setting.lora_ga(G, 3, 16.0), 12**0.5 / 16 * U[:, 3:6] @ Vt[:3]),
    }.values():
        torch.testing.assert_close(start.B @ start.A, wanted)


@pytest.mark.parametrize("name", ["linear", "relu"])
def test_the_gradients_are_those_of_the_loss(name: str, setting: Any) -> None:
    spectrum = torch.tensor([1.0, 0.5], dtype=torch.float64)
    problem = {"linear": setting.Linear, "relu": setting.Relu}[name].draw(6, 50, spectrum, 3)
    change = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    if name == "linear":
        loss = torch.trace((change - problem.change) @ problem.moment @ (change - problem.change).T) / 2
    else:
        layer = [torch.relu(problem.inputs @ (problem.weight + delta).T) for delta in (change, problem.change)]
        loss = (layer[0] - layer[1]).square().sum() / 2 / 50
    (wanted,) = torch.autograd.grad(loss, change)
    torch.testing.assert_close(problem.gradient(change.detach()), wanted)


def test_the_page_shows_what_the_command_writes() -> None:
    page = (ROOT / "docs" / "theory" / "lora-one.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks" / "results" / "theory.json").read_text(encoding="utf-8"))
    assert set(re.findall(r"\((\w+)\.svg\)", page)) == found["experiments"].keys()
    for name in found["experiments"]:
        assert (ROOT / "docs" / "theory" / f"{name}.svg").exists()


def test_a_picture_is_the_same_to_the_byte(experiments: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw = importlib.import_module("benchmarks.theory.pictures").draw
    result = experiments.theorem_3_3_spectral_start(d=10, ratios=(2, 4))
    for name in ("one", "two"):
        draw("spectral_start", result, tmp_path / f"{name}.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
