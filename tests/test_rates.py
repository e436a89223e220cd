"""Rates: the prediction against the movement it stands for, the trials against Adam written out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.rates.predict import TRAVELS
from benchmarks.rates.verdict import noise, swept, tables
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import headstart as hs
from headstart.errors import AdapterState, BadOption, CalibrationError
from headstart.lora.rate_search import BATCHES, CLIFF, JUDGES, TRIAL, settled, tried
from headstart.lora.rates import PLAIN_TIMES_WIDTH, Rate, Reach, multiplier
from headstart.statistics import Moments

M, N, R = 48, 64, 16  # At r = 16 the product of two random steps counts in full.


def factors(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(R, N, generator=generator) / 5, torch.randn(M, R, generator=generator) / 7


def inputs(rows: int = 4096) -> Tensor:
    """Rows whose energy lies in a few directions."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, N, generator=generator) * torch.linspace(3, 0.1, N)


@pytest.mark.parametrize("trained", ["AB", "A", "B"])
@pytest.mark.parametrize("step", [1e-3, 0.05, 1.0])
def test_moved_is_what_random_steps_of_this_length_do(trained: str, step: float) -> None:
    A, B = factors()
    X, scaling = inputs(), 0.7
    moments = Moments.empty(N)
    moments.add(X)
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(60):
        dA, dB = (step * torch.randn(F.shape, generator=generator).sign() for F in (A, B))
        moved_A, moved_B = (A + dA if "A" in trained else A), (B + dB if "B" in trained else B)
        change = scaling * (moved_B @ moved_A - B @ A).double()
        found.append(float((X[:500].double() @ change.T).square().sum() / X[:500].double().square().sum()))
    expected = sum(found) / len(found)
    assert Reach.of(A, B, scaling, trained, moments).moved(step) == pytest.approx(expected, rel=0.12)


def test_the_inputs_matter_to_a_start_that_looks_for_them() -> None:
    X = inputs()
    moments = Moments.empty(N)
    moments.add(X)
    A = torch.eye(N)[:R]  # The directions of the most energy.
    B = torch.zeros(M, R)
    share = X.square().mean(0)[:R].sum() / X.square().mean(0).sum()
    assert pytest.approx(float(share), rel=1e-4) == Reach.of(A, B, 1.0, inputs=moments).A
    assert pytest.approx(R / N) == Reach.of(A, B, 1.0).A


@settings(deadline=None)
@given(
    step=st.floats(1e-6, 1e2), scaling=st.floats(0.01, 100), A=st.floats(1e-4, 10),
    B=st.just(0.0) | st.floats(1e-6, 100),
    trained=st.sampled_from(["AB", "A", "B"]),
)  # fmt: skip
def test_step_is_the_inverse_of_moved(step: float, scaling: float, A: float, B: float, trained: str) -> None:
    reach = Reach(M, N, R, scaling, A, B, trained)
    moved = reach.moved(step)
    if moved > 0:
        assert reach.step(moved) == pytest.approx(step, rel=1e-6)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96, bias=False), nn.Tanh(), nn.Linear(96, 32, bias=False))


def test_plain_lora_has_the_rate_of_plain_lora() -> None:
    adapter = hs.adapt(model(), hs.LoraConfig(r=16, lora_alpha=16))
    rate = adapter.learning_rate(base=3e-4)
    assert rate == pytest.approx(3e-4, rel=0.1)
    assert isinstance(rate, float)
    assert "kaiming" in rate.reason


def test_a_start_of_large_factors_has_a_smaller_rate_and_a_smaller_scale_a_larger_one() -> None:
    found = {}
    for name, fields in {
        "pissa": {"init_lora_weights": "pissa"},
        "olora": {"init_lora_weights": "olora"},
        "quarter": {"lora_alpha": 4},
        "four": {"lora_alpha": 64},
    }.items():
        config = hs.LoraConfig(**{"r": 16, "lora_alpha": 16, **fields})  # type: ignore[arg-type]
        found[name] = hs.adapt(model(), config).learning_rate(base=1e-3)
    assert found["pissa"] < 1e-3 / 2
    assert found["olora"] < 1e-3 / 2
    assert found["four"] < 1e-3 < found["quarter"]


def test_the_product_of_scale_and_factor_decides_not_their_shares() -> None:
    """A of plain LoRA doubled at half the scale: B's step reaches as far as before."""
    plain = Reach.plain(M, N)
    same = Reach(M, N, 16, 0.5, 4 * plain.A, 0.0, "B")
    alone = Reach(M, N, 16, 1.0, plain.A, 0.0, "B")
    assert multiplier([same], 1e-3) == pytest.approx(multiplier([alone], 1e-3))


def test_the_report_carries_the_reaches_and_peft_s_shell_the_same_rate() -> None:
    from headstart.peft import get_peft_model

    config = hs.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["0", "2"])
    native = hs.adapt(model(), config)
    shell = get_peft_model(model(), config)
    assert shell.init_reports["default"].learning_rate(1e-3) == pytest.approx(native.learning_rate(1e-3))
    assert [set(layer["reaches"][0]) >= {"A", "B"} for layer in native.report.to_dict()["layers"]] == [True, True]


@pytest.mark.parametrize("base", [0, -1e-4, math.inf, math.nan])
def test_a_base_that_is_no_rate_is_refused(base: float) -> None:
    with pytest.raises(BadOption, match="base is"):
        hs.adapt(model(), hs.LoraConfig(r=2)).learning_rate(base)


@pytest.mark.parametrize("steps", [0, -5, 1.5, True])
def test_a_run_of_no_such_number_of_steps_is_refused(steps: Any) -> None:
    with pytest.raises(BadOption, match="steps is"):
        hs.adapt(model(), hs.LoraConfig(r=2)).learning_rate(steps=steps)


def test_a_start_that_moves_nothing_at_any_rate_has_plain_lora_s() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    assert hs.adapt(model, hs.LoraConfig(r=4, lora_alpha=0)).learning_rate(base=1e-3) == 1e-3


def test_without_a_base_plain_lora_s_rate_falls_with_the_width() -> None:
    wide = nn.Sequential(nn.Linear(512, 128, bias=False), nn.Linear(128, 2048, bias=False))
    rate = hs.adapt(wide, hs.LoraConfig(r=16, lora_alpha=16)).learning_rate()
    assert rate == pytest.approx(PLAIN_TIMES_WIDTH / 128, rel=0.1)
    assert "width of 128" in rate.reason


class Regression(nn.Module):
    """One Linear and its squared error."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(N, M, bias=False)


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model.linear(x) - y).square().mean()  # type: ignore[operator]


def data(count: int = BATCHES) -> list[tuple[Tensor, Tensor]]:
    X = inputs(64 * count)
    target = torch.randn(N, M, generator=torch.Generator().manual_seed(5)) / 8
    return [(x, x @ target) for x in X.split(64)]


def started(init: str = "kaiming") -> Regression:
    adapted = Regression()
    hs.adapt(adapted, hs.LoraConfig(r=R, lora_alpha=R, init_lora_weights=init, target_modules=["linear"]))
    return adapted


def trained(adapted: Regression, rate: float, batches: list[tuple[Tensor, Tensor]], steps: int) -> None:
    """Adam and its clipping as they are defined, in float64, by hand: an oracle of a trial."""
    W = adapted.linear.base_layer.weight.detach().double()
    A, B = (factor.detach().double().requires_grad_() for factor in adapted.linear.factors)
    means, squares = [[torch.zeros_like(factor) for factor in (A, B)] for _ in range(2)]
    for index in range(steps):
        x, y = (part.double() for part in batches[index % len(batches)])
        gradients = torch.autograd.grad((x @ (W + B @ A).T - y).square().mean(), (A, B))
        norm = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
        step = rate * (1 - index / steps)
        with torch.no_grad():
            for factor, gradient, mean, square in zip((A, B), gradients, means, squares, strict=True):
                gradient = gradient * min(1.0, 1.0 / norm)
                mean.mul_(0.9).add_(0.1 * gradient)
                square.mul_(0.999).add_(0.001 * gradient.square())
                unbiased = (square / (1 - 0.999 ** (index + 1))).sqrt()
                factor -= step * mean / (1 - 0.9 ** (index + 1)) / (unbiased + 1e-8)
    with torch.no_grad():
        for target, factor in zip(adapted.linear.factors, (A, B), strict=True):
            target.copy_(factor)


def test_a_trial_is_adam_falling_to_zero_judged_on_what_it_has_not_seen() -> None:
    batches = data()
    losses = tried(started(), batches, 1e-2, squared)
    assert len(losses) == 3
    for rate, found in losses.items():
        adapted = started()
        trained(adapted, rate, batches[:-JUDGES], TRIAL)
        with torch.no_grad():
            expected = sum(float(squared(adapted, batch)) for batch in batches[-JUDGES:]) / JUDGES
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("steps", [14, 20, 40])
def test_the_trials_cost_what_they_may(steps: int) -> None:
    spent = 0.0

    def counted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal spent
        spent += 1 if torch.is_grad_enabled() else 1 / 3
        return squared(model, batch)

    rate = hs.search_rate(started(), data(), near=1e-2, loss=counted, steps=steps)
    assert 0 < spent <= steps + 1e-9
    assert f"cost {spent:.0f} training steps" in rate.reason


@settings(deadline=None)
@given(
    bottom=st.floats(-3, 3), bend=st.floats(0.01, 0.1), doubt=st.floats(0, 0.2), first=st.integers(-2, 0)
)  # fmt: skip
def test_between_the_trials_and_the_prediction_the_sum_is_least(
    bottom: float, bend: float, doubt: float, first: int
) -> None:
    """Against the same sum on a fine grid, for losses that are a parabola."""
    places = [first, first + 1, first + 2]
    near = 2e-3
    losses = {near * 2.0**place: 1 + bend * (place - bottom) ** 2 for place in places}
    least = min(losses.values())
    grid = [first + index / 1000 for index in range(2001)]
    best = min(grid, key=lambda place: (1 + bend * (place - bottom) ** 2) / least + doubt * place**2)
    if max(losses.values()) / least < 1 + CLIFF:
        assert math.log2(settled(losses, near, doubt) / near) == pytest.approx(best, abs=2e-3)


def test_a_cliff_is_not_believed_to_be_a_slope() -> None:
    """How high the loss is past the rate that diverges moves nothing."""
    found = [settled({1e-3: 1.2, 3e-3: 1.0, 9e-3: high}, 3e-3) for high in (5.0, 1e6, math.inf)]
    assert found[0] == found[1] == found[2]
    assert 1e-3 < found[0] < 3e-3


def test_trials_that_do_not_differ_leave_the_prediction() -> None:
    assert settled({1e-3: 0.7, 3e-3: 0.7, 9e-3: 0.7}, 3e-3) == pytest.approx(3e-3)
    assert settled({1e-3: 0.0, 3e-3: 0.0, 9e-3: 0.0}, 3e-3) == pytest.approx(3e-3)


def test_losses_below_zero_are_ordered_too() -> None:
    assert settled({1e-3: -1.0, 3e-3: -1.4, 9e-3: -2.0}, 3e-3) > 3e-3


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("wrong", [1 / 6, 6])
def test_the_trials_correct_a_prediction(init: str, wrong: float) -> None:
    batches = data()
    middle = 0.02 if init == "kaiming" else 0.01
    right, found = (
        hs.search_rate(started(init), batches, near=near, loss=squared, steps=40) for near in (middle, middle * wrong)
    )
    assert abs(math.log(found / right)) < 0.65 * abs(math.log(wrong))


def test_the_model_comes_back_as_it_was() -> None:
    adapted = started("pissa").train()
    adapted.linear.factors[0].grad = torch.ones_like(adapted.linear.factors[0])
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    flags = {name: p.requires_grad for name, p in adapted.named_parameters()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    hs.search_rate(adapted, data(), near=1e-2, loss=squared)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    assert {name: p.requires_grad for name, p in adapted.named_parameters()} == flags
    gradients = [p.grad for p in adapted.parameters() if p.grad is not None]
    assert len(gradients) == 1
    assert torch.equal(gradients[0], torch.ones_like(gradients[0]))
    assert adapted.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("calls", [0, 1, 3, TRIAL, TRIAL + JUDGES + 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_the_model_as_it_was(calls: int, error: type[BaseException]) -> None:
    adapted = started("pissa")
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    left = iter(range(calls))

    def failing(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if next(left, None) is None:
            raise error
        return squared(model, batch)

    with pytest.raises(error):
        hs.search_rate(adapted, data(), near=1e-2, loss=failing)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    assert all(p.grad is None for p in adapted.parameters())


def test_a_rate_that_diverges_is_left() -> None:
    rate = hs.search_rate(started(), data(), near=10.0, loss=squared, steps=80)
    assert rate < 0.3


def test_endless_data_is_read_to_the_bound_and_little_data_is_repeated() -> None:
    read = 0

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal read
        while True:
            read += 1
            yield data(1)[0]

    assert hs.search_rate(started(), endless(), near=1e-2, loss=squared) > 0
    assert read == BATCHES
    assert hs.search_rate(started(), data(1), near=1e-2, loss=squared) > 0


def test_what_cannot_be_searched_is_named() -> None:
    plain = Regression().requires_grad_(False)
    with pytest.raises(AdapterState, match="no factor"):
        hs.search_rate(plain, data(), near=1e-2, loss=squared)
    with pytest.raises(CalibrationError, match="no batch"):
        hs.search_rate(started(), [], near=1e-2, loss=squared)
    with pytest.raises(CalibrationError, match="not finite"):
        hs.search_rate(started(), data(), near=1e-2, loss=lambda model, batch: squared(model, batch) * math.nan)
    with pytest.raises(CalibrationError, match="no gradient"):
        hs.search_rate(started(), data(), near=1e-2, loss=lambda model, batch: squared(model, batch) * 0)
    with pytest.raises(CalibrationError, match="no gradient"):
        hs.search_rate(started(), data(), near=1e-2, loss=lambda model, batch: batch[0].mean())
    for near in (0, -1e-3, math.nan, math.inf):
        with pytest.raises(BadOption, match="near is"):
            hs.search_rate(started(), data(), near=near, loss=squared)
    for steps in (0, 13, math.nan):
        with pytest.raises(BadOption, match="pass 14 or more"):
            hs.search_rate(started(), data(), near=1e-2, loss=squared, steps=steps)


def _process(rank: int, folder: str) -> None:
    """One process of two, with batches of its own: the second's inputs are twice as large."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own = [(x * (1 + rank), y) for x, y in data(2 * BATCHES)[rank::2]]
    losses = tried(started(), own, 1e-2, squared)
    (Path(folder) / str(rank)).write_text(json.dumps(list(losses.items())))
    torch.distributed.destroy_process_group()


def test_processes_that_see_other_batches_share_their_rate(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, args=(str(tmp_path),), nprocs=2)
    one, other = (dict(json.loads((tmp_path / str(rank)).read_text())) for rank in (0, 1))
    assert one == other
    alone = tried(started(), data(2 * BATCHES)[::2], 1e-2, squared)
    assert one.keys() == alone.keys()
    assert all(one[rate] > loss for rate, loss in alone.items())


def test_a_rate_is_a_float_that_says_why() -> None:
    rate = Rate(2e-4, "because")
    assert rate * 2 == 4e-4
    assert rate.reason == "because"
    assert torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=rate).param_groups[0]["lr"] == 2e-4


def sweep(task: str, init: str, best: int, seed: int = 0, worse: float = 0.0) -> list[dict[str, Any]]:
    """The losses of a cell whose best rate is a point of the grid."""
    cell = {"task": task, "init": init, "rank": 16, "scaling": 1.0, "seed": seed}
    return [
        {**cell, "step": step, "rate": 2e-3 * 2.0**step, "loss": 1 + worse + 0.1 * (step - best) ** 2}
        for step in range(best - 2, best + 3)
    ]


def foretold(task: str, init: str, base: float, width: float, factor: float) -> dict[str, Any]:
    cell = {"task": task, "init": init, "rank": 16, "scaling": 1.0, "seed": 0}
    return {
        **cell,
        "base": base,
        "steps": 72,
        "width": width,
        "multipliers": {f"{travel:g}": factor for travel in TRAVELS},
    }


def test_the_page_s_verdict_counts_what_holds() -> None:
    """Two tasks, of which the second's plain LoRA wants four times what its width says."""
    lines = [*sweep("a", "kaiming", 0), *sweep("a", "pissa", -1), *sweep("b", "kaiming", 2), *sweep("b", "pissa", -2)]
    predictions = [
        foretold("a", "kaiming", 2e-3, 100, 1.0),
        foretold("a", "pissa", 2e-3, 100, 0.5),
        foretold("b", "kaiming", 8e-3, 100, 1.0),
        foretold("b", "pissa", 8e-3, 100, 0.5),
    ]
    trials = [
        {**predictions[1], "near": 1e-3, "trials": [[1e-3 / 3, 1.1], [1e-3, 1.0], [3e-3, 1.1]]},
        {**predictions[3], "near": 1e-3, "trials": [[1e-3 / 3, 1.1], [1e-3, 1.0], [3e-3, 1.1]]},
    ]
    rows = tables(lines, predictions, trials)["verdict"]["rows"]
    # Known: a's PiSSA exactly, b's eight times too high. Guessed from the other's width: a's four times too high, b's
    # plain LoRA four times too low, its PiSSA twice too high. Tried: a's exactly, b's twice too high.
    assert rows[0] == ["a", "1 of 1", "1 of 1", "0 of 2", "0 of 2", "1 of 1", "1 of 1"]
    assert rows[1] == ["b", "0 of 1", "0 of 1", "1 of 2", "0 of 2", "1 of 1", "0 of 1"]
    assert rows[2] == ["all", "1 of 2", "1 of 2", "1 of 4", "0 of 4", "2 of 2", "1 of 2"]


def test_the_page_s_noise_is_what_two_seeds_differ_by() -> None:
    lines = [*sweep("a", "kaiming", 0), *sweep("a", "kaiming", 0, seed=1, worse=0.2)]
    (cell,) = swept(lines).values()
    assert cell.loss == pytest.approx(1.1)
    row = noise(lines, ["a"])["rows"][0]
    assert row[:2] == ["a", 5]
    assert row[2] == "+18.2%"  # 0.2 / 1.1, at the two rates beside the best.
    assert row[3:] == ["2 of 2", "2 of 2"]
