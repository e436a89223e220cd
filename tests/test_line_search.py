"""The first step's length, against the loss itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headstart as hs
from headstart.errors import AdapterState, BadOption, CalibrationError
from headstart.lora.line_search import STEPS
from headstart.peft import get_peft_model

W = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
X = [torch.randn(64, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x @ W.T).square().mean()


def base() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 12, bias=False))


def in_native(init: str) -> Any:
    config = hs.LoraConfig(r=2, target_modules=["0"], init_lora_weights=init)
    return hs.adapt(base(), config, data=X[:2], loss=loss).model


def in_peft(init: str) -> Any:
    config = hs.LoraConfig(r=2, target_modules=["0"], init_lora_weights=init)
    return get_peft_model(base(), config, data=X[:2], loss=loss)


@pytest.mark.parametrize("init", ["lora_one", "lora_sb", "gora"])
@pytest.mark.parametrize("adapted", [in_native, in_peft])
def test_the_step_taken_is_the_best_of_those_tried(adapted: Any, init: str) -> None:
    model = adapted(init)
    untouched = copy.deepcopy(model)
    found = hs.search_step(model, X[2:], loss=loss)
    with torch.no_grad():
        after = sum(float(loss(model, x)) for x in X[2:]) / 2
        bare = sum(float(loss(base(), x)) for x in X[2:]) / 2
        moved = untouched(X[2]) - base()(X[2])
        torch.testing.assert_close(model(X[2]) - base()(X[2]), found.step * moved, rtol=1e-4, atol=1e-5)
    assert found.losses[0.0] == pytest.approx(bare, rel=1e-5)
    assert after == pytest.approx(min(found.losses[step] for step in STEPS), rel=1e-4)
    assert after < bare


@pytest.mark.parametrize("init", ["lora_one", "gora"])
def test_doras_magnitudes_go_with_the_step(init: str) -> None:
    config = hs.LoraConfig(
        r=2, target_modules=["0"], init_lora_weights=init, init_options={"gamma": 1.0}, use_dora=True
    )
    model = hs.adapt(base(), config, data=X[:2], loss=loss).model
    untouched = copy.deepcopy(model)
    found = hs.search_step(model, X[2:], loss=loss)
    with torch.no_grad():
        bare = sum(float(loss(base(), x)) for x in X[2:]) / 2
        after = sum(float(loss(model, x)) for x in X[2:]) / 2
        moved = untouched(X[2]) - base()(X[2])
        torch.testing.assert_close(model(X[2]) - base()(X[2]), found.step * moved, rtol=1e-4, atol=1e-5)
    assert found.losses[0.0] == pytest.approx(bare, rel=1e-5)
    assert after == pytest.approx(min(found.losses.values()), rel=1e-4)


def test_doras_magnitudes_in_a_peft_model_are_refused() -> None:
    config = hs.LoraConfig(r=2, target_modules=["0"], init_lora_weights="lora_one", use_dora=True)
    model = get_peft_model(base(), config, data=X[:2], loss=loss)
    with pytest.raises(AdapterState, match="without use_dora"):
        hs.search_step(model, X[2:], loss=loss)


def test_a_step_that_only_harms_is_made_small() -> None:
    model = in_native("lora_one")
    found = hs.search_step(model, X[2:], loss=lambda m, x: (m(x) - base()(x).detach()).square().mean())
    assert found.step == min(STEPS)


def test_a_failure_leaves_the_factors_as_they_were() -> None:
    model = in_native("lora_one")
    before = copy.deepcopy(model.state_dict())

    def failing(model: nn.Module, x: Tensor) -> Tensor:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        hs.search_step(model, X, loss=failing)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_data_without_a_loss_is_named_and_changes_nothing() -> None:
    model = in_native("lora_one")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match="nan"):
        hs.search_step(model, [X[2] * torch.nan], loss=loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_has_no_step_is_refused() -> None:
    model = base()
    hs.adapt(model, hs.LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
    with pytest.raises(AdapterState, match="step"):
        hs.search_step(model, X, loss=loss)
    with pytest.raises(BadOption, match="steps"):
        hs.search_step(in_native("lora_one"), X, loss=loss, steps=[0.0])
