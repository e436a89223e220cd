"""Rates: the prediction against the movement it stands for, the search against a loss whose best step is known."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import headstart as hs
from headstart.errors import AdapterState, BadOption, CalibrationError
from headstart.lora.rate_search import SHARE
from headstart.lora.rates import Rate, Reach, multiplier
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
    step=st.floats(1e-6, 1e2), scaling=st.floats(0.01, 100), A=st.floats(1e-4, 10), B=st.floats(0, 100),
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
    assert multiplier([same]) == pytest.approx(multiplier([alone]))


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


class Regression(nn.Module):
    """One Linear, squared error: along a step of B alone the loss is a parabola."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(N, M, bias=False)


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model.linear(x) - y).square().mean()  # type: ignore[operator]


def data() -> list[tuple[Tensor, Tensor]]:
    X = inputs(512)
    target = torch.randn(N, M, generator=torch.Generator().manual_seed(5)) / 8
    return [(x, x @ target) for x in X.split(128)]


def best_first_step(adapted: Regression, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Of loss(B − η·sign g), in float64 from the normal equations."""
    A, B = (factor.detach().double() for factor in adapted.linear.factors)
    scaling = 1.0
    X, Y = (torch.cat(parts).double() for parts in zip(*batches, strict=True))
    W = adapted.linear.base_layer.weight.detach().double()
    residual = X @ (W + scaling * B @ A).T - Y
    sign = (residual.T @ X @ A.T).sign()
    moved = scaling * X @ A.T @ sign.T
    return float((residual * moved).sum() / moved.square().sum())


def test_the_search_finds_the_best_first_step() -> None:
    adapted, batches = Regression(), data()
    hs.adapt(adapted, hs.LoraConfig(r=R, lora_alpha=R, target_modules=["linear"]))
    rate = hs.search_rate(adapted, batches[:1], loss=squared)
    assert rate == pytest.approx(SHARE * best_first_step(adapted, batches[:1]), rel=1e-3)
    assert "loss at" in rate.reason


@pytest.mark.parametrize("near", [1e-7, 0.9])
def test_the_search_finds_it_from_far_away(near: float) -> None:
    adapted, batches = Regression(), data()
    hs.adapt(adapted, hs.LoraConfig(r=R, lora_alpha=R, target_modules=["linear"]))
    near_by = hs.search_rate(adapted, batches, loss=squared, near=1e-2)
    assert hs.search_rate(adapted, batches, loss=squared, near=near) == pytest.approx(near_by, rel=1e-2)


def test_the_model_comes_back_as_it_was() -> None:
    adapted = Regression().train()
    hs.adapt(adapted, hs.LoraConfig(r=R, init_lora_weights="pissa", target_modules=["linear"]))
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    flags = {name: p.requires_grad for name, p in adapted.named_parameters()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    hs.search_rate(adapted, data(), loss=squared)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    assert {name: p.requires_grad for name, p in adapted.named_parameters()} == flags
    assert all(p.grad is None for p in adapted.parameters())
    assert adapted.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_fails_half_way_leaves_the_model_as_it_was() -> None:
    adapted = Regression()
    hs.adapt(adapted, hs.LoraConfig(r=R, target_modules=["linear"]))
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    calls = iter([squared, squared, squared, squared])

    def failing(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return next(calls)(model, batch)

    with pytest.raises(StopIteration):
        hs.search_rate(adapted, data(), loss=failing)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def endless() -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield data()[0]


def test_endless_data_is_read_to_the_bound() -> None:
    adapted = Regression()
    hs.adapt(adapted, hs.LoraConfig(r=R, target_modules=["linear"]))
    assert hs.search_rate(adapted, endless(), loss=squared, batches=2) > 0


def test_what_cannot_be_searched_is_named() -> None:
    adapted = Regression()
    with pytest.raises(AdapterState, match="no factor"):
        hs.search_rate(adapted.requires_grad_(False), data(), loss=squared)
    hs.adapt(adapted, hs.LoraConfig(r=R, target_modules=["linear"]))
    with pytest.raises(CalibrationError, match="no batch"):
        hs.search_rate(adapted, [], loss=squared)
    with pytest.raises(CalibrationError, match="not finite"):
        hs.search_rate(adapted, data(), loss=lambda model, batch: squared(model, batch) * math.nan)
    with pytest.raises(CalibrationError, match="no gradient"):
        hs.search_rate(adapted, data(), loss=lambda model, batch: squared(model, batch) * 0)


def test_a_rate_is_a_float_that_says_why() -> None:
    rate = Rate(2e-4, "because")
    assert rate * 2 == 4e-4
    assert rate.reason == "because"
    assert torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=rate).param_groups[0]["lr"] == 2e-4
