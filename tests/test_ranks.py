"""Rank budgets: the greedy choice against every choice there is, and the names that PEFT reads."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import headstart as hs
from headstart.errors import BadOption, MissingStatistic
from headstart.lora.ranks import (
    Allocation,
    allocate,
    explained_variance,
    gradient_energy,
    importance_of,
    in_proportion,
)
from headstart.lora.targets import matches_pattern, targets
from headstart.statistics import GradientSpectrum, GradientSum, Moments


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def best_of_all(
    scores: dict[str, list[float]], costs: dict[str, int], budget: int, low: int = 0, high: int | None = None
) -> float:
    """The most value that any ranks within the budget hold."""
    choices = [range(low, min(len(q), len(q) if high is None else high) + 1) for q in scores.values()]
    held = [
        math.fsum(sum(q[:r]) for q, r in zip(scores.values(), ranks, strict=True))
        for ranks in itertools.product(*choices)
        if sum(c * r for c, r in zip(costs.values(), ranks, strict=True)) <= budget
    ]
    return max(held)


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, list[float]], dict[str, int], int, int, int]:
    layers = draw(st.integers(1, 4))
    values = st.lists(st.floats(0, 1, allow_nan=False), min_size=1, max_size=4)
    scores = {f"l{i}": sorted(draw(values), reverse=True) for i in range(layers)}
    costs = {name: draw(st.integers(1, 9)) for name in scores}
    low = draw(st.integers(0, 1))
    high = draw(st.integers(1, 4))
    least = low * sum(costs.values())
    return scores, costs, draw(st.integers(least, least + 40)), low, high


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problem=problems())
def test_greedy_is_the_best_up_to_one_item(
    problem: tuple[dict[str, list[float]], dict[str, int], int, int, int],
) -> None:
    scores, costs, budget, low, high = problem
    found = allocate(scores, costs, budget, minimum=low, maximum=high)
    best = best_of_all(scores, costs, budget, low, high)
    assert found.value <= best + 1e-9
    assert found.value >= best - max(max(q) for q in scores.values()) - 1e-9
    assert found.parameters == sum(costs[name] * r for name, r in found.ranks.items()) <= budget
    assert all(low <= r <= min(high, len(scores[name])) for name, r in found.ranks.items())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=problems())
def test_greedy_is_the_best_where_ranks_cost_the_same(
    problem: tuple[dict[str, list[float]], dict[str, int], int, int, int],
) -> None:
    scores, costs, budget, low, high = problem
    components = low * len(scores) + budget % 8
    found = allocate(scores, costs, components, minimum=low, maximum=high, count="components")
    ones = dict.fromkeys(scores, 1)
    assert found.value == pytest.approx(best_of_all(scores, ones, components, low, high))
    assert sum(found.ranks.values()) <= components


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=problems())
def test_no_rank_that_fits_is_left_over(
    problem: tuple[dict[str, list[float]], dict[str, int], int, int, int],
) -> None:
    scores, costs, budget, low, high = problem
    found = allocate(scores, costs, budget, minimum=low, maximum=high)
    left = budget - found.parameters
    assert all(costs[n] > left or r == min(high, len(scores[n])) for n, r in found.ranks.items())


def test_components_are_handed_out_as_peft_hands_them_out() -> None:
    """EVA's rule: the leading components of all layers together, whatever their width."""
    shares = {"a": [0.5, 0.2, 0.1], "b": [0.3, 0.25, 0.05], "c": [0.04, 0.03, 0.02]}
    ranked = sorted(((q, n) for n, qs in shares.items() for q in qs), reverse=True)[:5]
    wanted = {name: sum(n == name for _, n in ranked) for name in shares}
    found = allocate(shares, {"a": 100, "b": 10, "c": 10}, 5, count="components")
    assert found.ranks == wanted == {"a": 3, "b": 2, "c": 0}
    assert found.left_out == ["c"]
    assert found.parameters == 320


def test_equals_go_to_the_layer_named_first() -> None:
    ranks = allocate({"b": [1.0, 1.0], "a": [1.0, 1.0]}, {"a": 1, "b": 1}, 3).ranks
    assert list(ranks.items()) == [("b", 2), ("a", 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"costs": {"a": 1}}, "scores and costs name different layers: \\['b'\\]"),
        ({"scores": {"a": [1.0, 2.0], "b": [1.0]}}, "the scores of 'a' rise or are NaN"),
        ({"scores": {"a": [1.0, math.nan], "b": [1.0]}}, "the scores of 'a' rise or are NaN"),
        ({"minimum": 2}, "'b' has scores for 1 ranks, and minimum=2 asks for more"),
        ({"minimum": 1, "budget": 4}, "a rank of 1 everywhere takes 5 of a budget of 4"),
        ({"minimum": -1}, "choose 0 ≤ minimum ≤ maximum"),
        ({"maximum": 0}, "choose 0 ≤ minimum ≤ maximum"),
        ({"count": "component"}, "did you mean 'components'"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, object], message: str) -> None:
    arguments = {"scores": {"a": [1.0, 0.5], "b": [1.0]}, "costs": {"a": 2, "b": 3}, "budget": 9}
    arguments.update({k: v for k, v in changes.items() if k in arguments})
    options = {k: v for k, v in changes.items() if k not in arguments}
    with pytest.raises(BadOption, match=message):
        allocate(**arguments, **options)  # type: ignore[arg-type]


def test_in_proportion_is_goras_rule() -> None:
    importance = {"a": 6.0, "b": 3.0, "c": 1.0, "d": 0.0}
    costs = {"a": 100, "b": 100, "c": 400, "d": 100}
    found = in_proportion(importance, costs, rank=8, minimum=4, maximum=32)
    budget = 8 * 700
    free = {n: math.floor(budget * i / 10 / costs[n]) for n, i in importance.items()}
    assert free == {"a": 33, "b": 16, "c": 1, "d": 0}
    assert found.ranks == {"a": 32, "b": 16, "c": 4, "d": 4}
    assert found.parameters == 3200 + 1600 + 1600 + 400
    smooth = in_proportion(importance, costs, rank=8, power=0.5, minimum=0, maximum=99)
    assert smooth.ranks == {"a": 24, "b": 12, "c": 2, "d": 0}


@pytest.mark.parametrize("importance", [{"a": 0.0, "b": 0.0}, {"a": -1.0, "b": 2.0}, {"a": math.nan, "b": 1.0}])
def test_in_proportion_needs_importance(importance: dict[str, float]) -> None:
    with pytest.raises(BadOption, match="importances sum to"):
        in_proportion(importance, {"a": 1, "b": 1}, rank=2)


# ------------------------------------------------------------------ names


NAMES = ["model.layers.1.q_proj", "encoder.model.layers.1.q_proj", "model.layers.11.q_proj", "modelXlayers.1.q_proj"]


def test_patterns_name_one_layer_each() -> None:
    ranks = {name: i + 1 for i, name in enumerate(NAMES)}
    rank_pattern, alpha_pattern = Allocation(ranks, 0).patterns(8, 16.0)
    for name, rank in ranks.items():
        hits = [key for key in rank_pattern if matches_pattern(key, name)]
        assert [rank_pattern[key] for key in hits] == [rank]
        assert [alpha_pattern[key] / rank for key in hits] == [2.0]


def test_peft_reads_the_patterns_as_we_do() -> None:
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    rank_pattern, _ = Allocation({name: i + 1 for i, name in enumerate(NAMES)}, 0).patterns(8, 16.0)
    for i, name in enumerate(NAMES):
        assert rank_pattern[get_pattern_key(rank_pattern.keys(), name)] == i + 1


def test_the_scaling_of_every_layer_stays() -> None:
    allocation = Allocation({"a": 2, "b": 8, "c": 32, "d": 0}, 0)
    _, alphas = allocation.patterns(8, 16.0)
    assert {re.sub(r"\W", "", key): alpha / allocation.ranks[key[1:]] for key, alpha in alphas.items()} == {
        "a": 2.0,
        "c": 2.0,
    }
    _, alphas = allocation.patterns(8, 16.0, use_rslora=True)
    for key, alpha in alphas.items():
        assert alpha / math.sqrt(allocation.ranks[key[1:]]) == pytest.approx(16 / math.sqrt(8))


# ------------------------------------------------------------------ values


def test_explained_variance_is_that_of_the_centred_rows() -> None:
    X = torch.randn(300, 12, generator=seeded()) * torch.linspace(2, 0.1, 12) + 3
    inputs = Moments.empty(12)
    inputs.add(X)
    S = torch.linalg.svdvals((X - X.mean(0)).double())
    wanted = (S**2 / (S**2).sum())[:5]
    assert explained_variance(inputs, 5) == pytest.approx(wanted.tolist(), rel=1e-4)


def test_gradient_energy_is_the_share_of_what_is_known() -> None:
    G = torch.randn(10, 14, generator=seeded())
    S2 = torch.linalg.svdvals(G.double()) ** 2
    exact = GradientSum(G, seeded(), count=3.0)
    assert gradient_energy(exact, 4, seeded()) == pytest.approx((S2 / S2.sum())[:4].tolist(), rel=1e-4)
    kept = GradientSpectrum.empty(10, 14, 10, seeded())
    kept.add_dense(G)
    kept.count = 3.0
    assert gradient_energy(kept, 4, seeded()) == pytest.approx((S2 / S2.sum())[:4].tolist(), rel=1e-4)
    assert gradient_energy(GradientSum.empty(3, 4, 1, seeded()), 2, seeded()) == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_importance_is_the_mean_of_weight_times_gradient(dtype: torch.dtype) -> None:
    W, G = torch.randn(30, 20, generator=seeded()).to(dtype), torch.randn(30, 20, generator=seeded(1))
    found = importance_of(W, GradientSum(G * 4, seeded(), count=4.0))
    assert found == pytest.approx(float((W.double() * G).abs().mean()), rel=1e-6)


# ------------------------------------------------------------------ on a model


def test_a_redistributed_config_adapts_with_its_ranks_and_saves_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8), nn.Linear(8, 16))
    config = hs.LoraConfig(r=4, lora_alpha=8, init_lora_weights="eva")
    data = [torch.randn(64, 16) for _ in range(2)]
    known = hs.calibrate(model, config, data)
    changed, allocation = hs.redistribute(model, config, known, maximum=8)
    spent = 4 * (32 + 24 + 24)
    assert allocation.parameters <= spent
    assert len(set(allocation.ranks.values())) > 1
    adapter = hs.adapt(model, changed, calibration=known)
    assert {name: layer.rank for name, layer in adapter.layers().items()} == {
        name: rank for name, rank in allocation.ranks.items() if rank
    }
    assert all(layer.scaling == 2.0 for layer in adapter.layers().values())
    assert adapter.count()[0] == allocation.parameters
    hs.save(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(written["rank_pattern"].values()) == sorted(r for r in allocation.ranks.values() if r != written["r"])


@pytest.mark.parametrize("rule", ["gradient", "gora"])
def test_gradients_share_the_budget_too(rule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    with torch.no_grad():
        model[2].weight *= 1e-3  # So that the first layer hardly matters to the loss.
    config = hs.LoraConfig(r=4, init_lora_weights="lora_one")
    known = hs.calibrate(model, config, [torch.randn(64, 16)], loss=lambda m, b: m(b).square().mean())
    _, allocation = hs.redistribute(model, config, known, rule=rule, minimum=1)
    assert allocation.parameters <= 4 * (32 + 24) or rule == "gora"
    assert min(allocation.ranks.values()) >= 1


def test_a_layer_that_is_worth_nothing_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    config = hs.LoraConfig(r=2, target_modules=["0", "1"])
    scores = {"0": [3.0, 2.0, 1.0, 1.0], "1": [0.0, 0.0, 0.0, 0.0]}
    changed, allocation = hs.redistribute(model, config, scores=scores)
    assert allocation.left_out == ["1"]
    assert list(hs.adapt(model, changed).layers()) == ["0"]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_layer_keeps_the_scaling_that_a_pattern_gave_it(use_rslora: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    patterns = {"alpha_pattern": {"1": 32}, "rank_pattern": {"2": 6}, "use_rslora": use_rslora}
    config = hs.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "1", "2"], **patterns)
    scores = {"0": [9.0, 8, 7, 6, 5, 4], "1": [3.5, 3, 2, 0], "2": [3.2, 2.9, 0, 0]}
    before = {target.name: target.scaling for target in targets(model, config)}
    changed, allocation = hs.redistribute(model, config, scores=scores, budget=16 * 10)
    assert allocation.ranks == {"0": 6, "1": 2, "2": 2}
    found = {target.name: target for target in targets(model, changed)}
    assert {name: target.rank for name, target in found.items()} == allocation.ranks
    assert {name: target.scaling for name, target in found.items()} == pytest.approx(before)


@pytest.mark.parametrize("excluded", [None, ["other"], "oth.*"])
def test_a_layer_without_a_rank_takes_no_other_of_a_longer_name_with_it(excluded: Any) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "sub": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    model["other"] = nn.Linear(4, 4)
    config = hs.LoraConfig(r=2, target_modules="all-linear", exclude_modules=excluded)
    scores = {"fc": [0.0, 0.0], "sub.fc": [3.0, 2.0]} | ({} if excluded else {"other": [0.0]})
    changed, allocation = hs.redistribute(model, config, scores=scores, budget=16)
    assert allocation.ranks["sub.fc"] == 2
    assert [target.name for target in targets(model, changed)] == ["sub.fc"]


def test_scores_of_ones_own_reach_to_four_times_the_rank_by_default() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    config = hs.LoraConfig(r=2, target_modules=["0", "1"])
    scores = {"0": [float(32 - i) for i in range(32)], "1": [1.0, 0.5]}
    assert hs.redistribute(model, config, scores=scores, budget=64 * 20)[1].ranks == {"0": 8, "1": 2}
    assert hs.redistribute(model, config, scores=scores, budget=64 * 20, maximum=20)[1].ranks == {"0": 20, "1": 0}


def test_goras_ranks_fit_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 3))
    config = hs.LoraConfig(r=3, init_lora_weights="gora")
    known = hs.calibrate(model, config, [torch.randn(20, 4)], loss=lambda m, b: m(b).square().mean())
    changed, allocation = hs.redistribute(model, config, known, rule="gora", minimum=4)
    assert allocation.ranks == {"0": 4, "1": 3}
    assert hs.adapt(model, changed, calibration=known).count()[0] == allocation.parameters == 4 * 68 + 3 * 67


def test_what_cannot_be_shared_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    config = hs.LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva")
    known = hs.calibrate(model, config, [torch.randn(8, 4)])
    with pytest.raises(BadOption, match="'eva'"):
        hs.redistribute(model, config, known, rule="evo")
    with pytest.raises(MissingStatistic, match="gradient"):
        hs.redistribute(model, config, known, rule="gora")
    with pytest.raises(MissingStatistic, match="calibrate"):
        hs.redistribute(model, config)
    with pytest.raises(BadOption, match="budget"):
        hs.redistribute(model, config, known, rule="gora", budget=100)
    with pytest.raises(BadOption, match="no layer is given a rank: the cheapest takes 8 parameters a rank"):
        hs.redistribute(model, config, known, budget=7)
