"""Comparisons: the search, the statistics, the budget, one base for all, what is found and what is not."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headstart as hs
from headstart.choose.trials import training
from headstart.choose.trials.halving import Ladder
from headstart.choose.trials.intervals import differences
from headstart.choose.trials.order import Order
from headstart.choose.trials.plan import Plan, Timing, fitted, seconds_of
from headstart.errors import AdapterFormatError, BadOption, CalibrationError, DataError, FileError, HeadstartError

pytest.importorskip("optuna", reason="comparisons need the extra headstart[compare]")
pytest.importorskip("scipy", reason="comparisons need the extra headstart[compare]")

Batch = tuple[Tensor, Tensor]


def network() -> nn.Module:
    """A small network that a random teacher has changed in a rank-4 way."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 6))


def task(model: nn.Module, batches: int = 24, noise: float = 0.05) -> list[Batch]:
    """What the network would say if each of its weights had moved by a product of rank 4."""
    teacher = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in teacher:
            if isinstance(layer, nn.Linear):
                m, n = layer.weight.shape
                layer.weight += (
                    0.5 * (torch.randn(m, 4, generator=generator) @ torch.randn(4, n, generator=generator)) / n**0.5
                )
        inputs = torch.randn(batches, 16, 24, generator=generator)
        targets = teacher(inputs)
        return list(zip(inputs, targets + noise * torch.randn(targets.shape, generator=generator), strict=True))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def compared(arms: dict[str, Any], steps: int = 32, **options: Any) -> hs.Comparison:
    model = network()
    data = task(model)
    return hs.compare(model, loss, data[:12], data[12:], arms, steps=steps, **options)


PLAIN = hs.LoraConfig(r=4, lora_alpha=4)
PISSA = hs.LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa")
FROZEN_HEAD = hs.LoraConfig(r=1, lora_alpha=1, target_modules=["4"])
RATES = [2e-3, 8e-3, 3.2e-2]


# --- the search of rates


def played(ladder: Ladder, loss_of: Any) -> tuple[int | None, int]:
    """The winner and the steps of a search in which `loss_of(rate, rung)` is what a run gives."""
    losses: dict[tuple[int, int], float] = {}
    while due := ladder.due(losses):
        for rung, rate in due:
            losses[rung, rate] = loss_of(rate, rung)
    return ladder.winner(losses), ladder.trained(losses)


@pytest.mark.parametrize("best", range(-6, 7))
def test_the_search_finds_the_best_of_a_valley(best: int) -> None:
    ladder = Ladder.around(800)
    winner, steps = played(ladder, lambda rate, rung: abs(rate - best) + 1 / (rung + 1))
    assert winner == best
    assert steps <= ladder.cost <= 0.33 * ladder.covered * 800


@pytest.mark.parametrize("count", [5, 7, 9, 12])
def test_a_list_of_rates_is_searched_at_three_fifths_of_its_cost_or_less(count: int) -> None:
    ladder = Ladder.through(400, count)
    for best in range(count):
        winner, steps = played(ladder, lambda rate, rung, best=best: abs(rate - best))
        assert winner == best
        assert steps <= ladder.cost <= 0.6 * count * 400


def test_every_arm_is_given_the_same_number_of_steps() -> None:
    ladder = Ladder.through(100, 7)
    generator = random.Random(0)
    spent = {played(ladder, lambda rate, rung: generator.random())[1] for _ in range(20)}
    assert spent == {ladder.cost}


def test_rates_that_diverge_are_not_trained_further() -> None:
    reached = []

    def loss_of(rate: int, rung: int) -> float:
        reached.append((rate, rung))
        return math.inf if rate > 0 else -rate

    winner, _ = played(Ladder.around(80), loss_of)
    assert winner == 0 or winner == -1
    assert not [1 for rate, rung in reached if rate in (1, 3, 5) and rung > 0]
    assert played(Ladder.around(80), lambda rate, rung: math.inf)[0] is None


# --- statistics


def test_intervals_and_p_values_are_those_of_the_textbook() -> None:
    """n = 5 paired differences, by hand: t(0.975, 4) = 2.776445."""
    values = [0.1, 0.3, 0.2, 0.4, 0.0]
    found = differences({"a": values})["a"]
    half = 2.776445 * statistics.stdev(values) / math.sqrt(5)
    assert found.mean == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half), rel=1e-5)
    scipy_stats = pytest.importorskip("scipy.stats")
    assert found.p == pytest.approx(scipy_stats.ttest_1samp(values, 0).pvalue)


def test_an_interval_leaves_out_zero_exactly_where_holm_finds_a_difference() -> None:
    generator = random.Random(3)
    told = 0
    for _ in range(200):
        pairs = {str(i): [generator.gauss(0.8 * i, 1) for _ in range(5)] for i in range(4)}
        for difference in differences(pairs).values():
            assert difference.told == (difference.low > 0 or difference.high < 0) == (difference.p < 0.05)
            told += difference.told
    assert 50 < told < 700


def test_at_most_one_comparison_in_twenty_of_equal_arms_finds_anything() -> None:
    """The family-wise error over four equal arms, in 200 comparisons: 5 % and three standard errors."""
    generator = random.Random(4)
    wrong = 0
    for _ in range(200):
        baseline = [generator.gauss(0, 1) for _ in range(5)]
        arms = {str(i): [generator.gauss(0, 1) - b for b in baseline] for i in range(4)}
        wrong += any(difference.told for difference in differences(arms).values())
    assert wrong / 200 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


# --- the same for all


def test_a_seed_is_one_order_and_every_epoch_another() -> None:
    batches = list(range(10))
    first, again, other = (Order(batches, seed) for seed in (1, 1, 2))
    epoch = [first[i] for i in range(10)]
    assert sorted(epoch) == batches
    assert epoch == [again[i] for i in range(10)] != [other[i] for i in range(10)]
    assert epoch != [first[i] for i in range(10, 20)]
    assert [first[i] for i in range(10)] == epoch  # Asked again, after another epoch.


def test_a_stream_is_read_again_where_it_ends_and_where_a_run_goes_on() -> None:
    order = Order(lambda seed: iter(range(seed, seed + 3)), 5)
    assert [order[i] for i in range(7)] == [5, 6, 7, 5, 6, 7, 5]
    assert order[1] == 6
    with pytest.raises(CalibrationError, match="no batch"):
        Order(lambda seed: iter(()), 0)[0]


def test_a_run_that_stops_and_goes_on_is_the_run_that_does_not() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.Dropout(0.2), nn.BatchNorm1d(24), nn.Linear(24, 6))
    data = [(x, x[:, :6]) for x in torch.randn(5, 16, 24)]
    setting = training.Setting(model, loss, data)
    config = hs.LoraConfig(r=4, lora_dropout=0.1, modules_to_save=["3"], target_modules=["0"])
    prepared = training.start_of(setting, config, 0, 0)
    clock = training.Clock()
    learned = []
    for stops in ([12], [3, 7, 12]):
        run = training.Run(prepared, 1e-2, 3, 12)
        for stop in stops:
            with training.trained(setting, run, stop, clock):
                pass
        learned.append((run.losses, run.learned, run.buffers))
    assert learned[0][0] == learned[1][0]
    for part in (1, 2):
        assert learned[0][part].keys() == learned[1][part].keys() != set()
        assert all(torch.equal(learned[0][part][name], learned[1][part][name]) for name in learned[0][part])


def test_the_base_comes_back_to_the_bit() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Dropout(0.1), nn.Linear(24, 6))
    model.eval()
    model[3].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones(24, 24)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [(x, x[:, :6]) for x in torch.randn(8, 16, 24)]
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    arms = {
        "kaiming": "kaiming",
        "lora_one": hs.LoraConfig(r=4, init_lora_weights="lora_one"),
        "pissa": hs.LoraConfig(r=2, init_lora_weights="pissa", bias="all"),
    }
    hs.compare(model, loss, data, data[:4], arms, steps=4, seeds=2, rates=[1e-2])
    assert torch.equal(torch.rand(1), drawn), "the random state moved"
    assert not model.training
    assert not model[3].weight.requires_grad
    assert model[0].weight.requires_grad
    assert torch.equal(model[0].weight.grad, torch.ones(24, 24))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_batch_that_judges_tunes() -> None:
    seen: dict[str, set[float]] = {"train": set(), "eval": set()}
    kinds: list[tuple[float, bool]] = []

    def watched(model: nn.Module, batch: Batch) -> Tensor:
        mark = float(batch[0][0, 0])
        seen["train" if model.training else "eval"].add(mark)
        kinds.append((mark, model.training))
        return loss(model, batch)

    model = network()
    data = task(model)
    judging = {float(x[0, 0]) for x, _ in data[13::2]}
    told: list[int] = []
    hs.compare(
        model, watched, data[:12], data[12:], {"a": PLAIN, "b": PISSA}, steps=8, seeds=2, rates=RATES,
        watch=lambda line, done, total: told.append(len(kinds)) if line.startswith("tuning") else None,
    )  # fmt: skip
    rehearsed = next(i for i, (_, trains) in enumerate(kinds) if trains)
    tuned = {mark for mark, _ in kinds[rehearsed : max(told)]}
    assert judging
    assert not judging & tuned, "a batch that judges was seen while rates were tuned"
    assert not judging & seen["train"]
    assert judging <= seen["eval"]


# --- what is found


def test_the_same_start_twice_is_no_difference() -> None:
    found = compared({"kaiming": PLAIN, "kaiming again": PLAIN}, seeds=5, rates=RATES)
    again = found.arms[1]
    assert again.difference is not None
    assert not again.difference.told
    assert again.difference.low < 0 < again.difference.high
    assert any(again.difference.pairs), "the two arms draw their starts apart: equal to the bit would test nothing"
    assert "No difference" in found.verdict.headline
    assert found.verdict.conclusive


def test_a_planted_better_arm_is_found_and_a_worse_one_too() -> None:
    arms = {"plain": PLAIN, "again": PLAIN, "wide": hs.LoraConfig(r=16, lora_alpha=16), "crippled": FROZEN_HEAD}
    found = compared(arms, seeds=5, rates=RATES)
    told = {arm.name: arm.difference for arm in found.arms[1:]}
    assert told["wide"].told
    assert told["wide"].high < 0
    assert told["crippled"].told
    assert told["crippled"].low > 0
    assert not told["again"].told
    assert "wide beats plain" in found.verdict.headline
    assert [row["verdict"].split(",")[0] for row in found.rows] == ["", "no difference", "better", "worse"]


def test_pruning_keeps_the_winner_of_the_full_grid_and_saves_two_fifths_of_its_steps() -> None:
    model = network()
    data = task(model)
    setting = training.Setting(model, loss, data[:12])
    rates = [2.0**k * 1e-3 for k in range(7)]
    found = hs.compare(
        model,
        loss,
        data[:12],
        data[12:],
        {"a": PLAIN, "b": hs.LoraConfig(r=4, init_lora_weights="olora")},
        steps=32,
        seeds=1,
        rates=rates,
    )
    spent, full = found.measured.steps_tuning
    assert full == 2 * 7 * 32
    assert spent <= 0.6 * full
    for index, (arm, config) in enumerate(found.configs.items()):
        ends = {}
        prepared = training.start_of(setting, config, 0, index)
        for rate in rates:
            with training.trained(setting, training.Run(prepared, rate, 0, 32), 32, training.Clock()):
                ends[rate] = training.evaluate(model, loss, data[12::2], torch.device("cpu"))
        best = min(ends, key=lambda rate: ends[rate])
        assert found.arms[index].rate == pytest.approx(best), f"{arm}: {ends}"


def test_a_rate_at_which_an_arm_diverges_is_reported_as_such() -> None:
    found = compared({"a": PLAIN, "b": PISSA}, seeds=3, rates=[1e-2, 1e12])
    assert all(arm.diverged == (1e12,) for arm in found.arms)
    assert [arm.rate for arm in found.arms] == [1e-2, 1e-2]
    assert any("diverged at 1e+12" in line for line in found.verdict.cautions)
    lost = compared({"a": PLAIN, "b": PISSA}, seeds=3, rates={"a": [1e-2], "b": [1e12]})
    assert lost.arms[1].loss is None
    assert lost.rows[1]["verdict"] == "diverged"
    assert "diverged at every rate" in str(lost.verdict)


def test_a_crash_does_not_lose_the_others() -> None:
    calls = {"count": 0}

    def fragile(model: nn.Module, batch: Batch) -> Tensor:
        if model.training and any(name.endswith("lora_magnitude_vector") for name, _ in model.named_parameters()):
            calls["count"] += 1
            if calls["count"] > 20:
                raise RuntimeError("out of memory, say")
        return loss(model, batch)

    model = network()
    data = task(model)
    arms = {"a": PLAIN, "b": PISSA, "dora": hs.LoraConfig(r=4, use_dora=True)}
    found = hs.compare(model, fragile, data[:12], data[12:], arms, steps=8, seeds=3, rates=RATES)
    assert [arm.loss is not None for arm in found.arms] == [True, True, False]
    assert "RuntimeError: out of memory, say" in found.arms[2].crashed[0]
    assert found.rows[2]["verdict"] == "crashed"
    assert found.arms[1].difference is not None
    hs.adapt(model, PLAIN)  # Nothing was left in it.


def test_what_is_forgotten_is_measured() -> None:
    model = network()
    data = task(model)
    kept = [(x, model(x).detach()) for x in torch.randn(4, 16, 24)]
    arms = {"plain": PLAIN, "sc_lora": hs.LoraConfig(r=4, init_lora_weights="sc_lora")}
    found = hs.compare(model, loss, data[:12], data[12:], arms, steps=8, seeds=2, rates=[1e-2], preserve=kept)
    assert found.measured.base["preserved"] == 0
    assert all(arm.kept is not None and arm.kept > 0 for arm in found.arms)
    with pytest.raises(BadOption, match="not to be forgotten"):
        compared(arms)


@pytest.mark.parametrize("options", [{"init_lora_weights": "lora_null", "init_options": {"mode": "frozen"}},
                                     {"init_lora_weights": "corda", "init_options": {"mode": "kpm"}}])  # fmt: skip
def test_a_start_that_protects_looks_at_what_is_to_be_preserved(options: dict[str, Any]) -> None:
    config, model = hs.LoraConfig(r=4, **options), network()
    data = task(model)
    kept = [(x * torch.linspace(0.1, 3, 24), model(x)) for x in torch.randn(8, 16, 24)]
    found = training.start_of(training.Setting(model, loss, data, kept, 4), config, seed=1, draw=0).starts[0][1].A
    wanted, other = (
        hs.adapt(network(), config, data=seen, loss=loss).layers()["0"].lora_A.weight for seen in (kept, data)
    )
    torch.testing.assert_close(found, wanted.detach())
    assert not torch.allclose(found, other, atol=1e-2)
    with pytest.raises(BadOption, match="not to be forgotten"):
        compared({"plain": PLAIN, "protects": config})


# --- time, and interruptions


def test_a_budget_buys_steps_and_seeds() -> None:
    def bought(budget: float, **given: int) -> Plan:
        plan = Plan(("a", "b", "c"), 1, 1, dict.fromkeys("abc", 1e-3), timing=Timing(1.0, 1.0, 2.0, 3.0), budget=budget)
        return fitted(plan, given.get("steps"), given.get("seeds"))

    large, middle, small = bought(20_000), bought(2500), bought(100)
    assert large.seeds == 5
    assert large.steps > 500
    assert not large.doubts
    assert middle.seeds == 3
    assert 60 < middle.steps < 200
    assert not middle.doubts
    assert small.doubts
    for plan in (large, middle):
        assert 0.8 * plan.budget < plan.seconds < plan.budget
    assert bought(20_000, steps=30, seeds=4).steps == 30


@pytest.mark.parametrize(
    ("said", "seconds"), [("90s", 90), ("30 min", 1800), ("1h30m", 5400), (5, 5), ("2 hours", 7200)]
)
def test_a_budget_is_a_time(said: str | float, seconds: float) -> None:
    assert seconds_of(said) == seconds


@pytest.mark.parametrize("wrong", ["", "30", "min", "0s", "-5min", "1parsec", True, 0, math.nan])
def test_what_is_no_time_is_refused(wrong: Any) -> None:
    with pytest.raises(BadOption, match="budget"):
        seconds_of(wrong)


def test_a_budget_too_small_says_so_before_and_after() -> None:
    told: list[str] = []
    found = compared({"a": PLAIN, "b": PISSA}, steps=None, budget=0.01, say=told.append)
    assert any("too small for a conclusion" in line for line in told)
    assert found.verdict.headline.startswith("No conclusion")
    assert not found.verdict.conclusive


def test_no_conclusion_is_drawn_from_two_seeds() -> None:
    found = compared({"a": PLAIN, "b": FROZEN_HEAD}, seeds=2, rates=[1e-2])
    assert not found.verdict.conclusive
    assert "2 seeds" in found.verdict.headline
    assert found.rows[1]["verdict"] == "no conclusion"


SCRIPT = """
import json, sys
sys.path[:0] = {paths!r}
import headstart as hs
import test_compare as t

hs_model = t.network(); data = t.task(hs_model)
found = hs.compare(hs_model, t.loss, data[:12], data[12:], {{"a": t.PLAIN, "b": t.PISSA}}, steps=16, seeds=3,
                   rates=t.RATES, storage=sys.argv[1], watch=lambda line, done, total: print(line, flush=True))
print("RESULT", json.dumps([[arm.rate, arm.losses] for arm in found.arms]))
"""


def script(tmp_path: Path) -> list[str]:
    here = Path(__file__).resolve().parent
    file = tmp_path / "work.py"
    file.write_text(SCRIPT.format(paths=[str(here), str(here.parent / "src")]))
    return [sys.executable, str(file), f"sqlite:///{tmp_path}/study.db"]


def results(output: str) -> Any:
    return json.loads(next(line for line in output.splitlines() if line.startswith("RESULT"))[7:])


def trials(tmp_path: Path) -> Sequence[Any]:
    import optuna

    storage = f"sqlite:///{tmp_path}/study.db"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    command = script(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as killed:
        assert killed.stdout is not None
        for line, _ in zip(killed.stdout, range(5), strict=False):
            assert line.startswith("tuning")
        killed.send_signal(signal.SIGKILL)
    done_before = sum(trial.state.name == "COMPLETE" for trial in trials(tmp_path))
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    jobs = [trial.user_attrs["key"] for trial in trials(tmp_path) if trial.state.name == "COMPLETE"]
    assert 0 < done_before < len(jobs)
    assert len(jobs) == len(set(jobs)), "a job was counted twice"
    assert not [trial for trial in trials(tmp_path) if trial.state.name == "RUNNING"]
    assert finished.stdout.count("\n") < 1 + len(jobs), "what was done was done again"
    whole = compared({"a": PLAIN, "b": PISSA}, steps=16, seeds=3, rates=RATES)
    expected = [[arm.rate, {str(seed): value for seed, value in arm.losses.items()}] for arm in whole.arms]
    assert results(finished.stdout) == [[rate, pytest.approx(losses)] for rate, losses in expected]


def test_another_question_is_not_answered_from_a_storage_that_holds_one(tmp_path: Path) -> None:
    model = network()
    data = task(model)
    storage = f"sqlite:///{tmp_path}/study.db"
    told: list[str] = []

    def ask(model: nn.Module = model, loss: Any = loss, judging: Any = data[12:]) -> hs.Comparison:
        told.clear()
        arms = {"a": PLAIN, "b": PISSA}
        return hs.compare(
            model, loss, data[:12], judging, arms, steps=4, seeds=1, rates=[1e-2], storage=storage, say=told.append
        )

    first = ask()
    assert ask().arms[0].losses == first.arms[0].losses
    assert any("going on" in line for line in told)
    with pytest.raises(BadOption, match="another loss, model or data"):
        ask(loss=lambda model, batch: (model(batch[0]) - batch[1]).abs().mean())
    other = copy.deepcopy(model)
    other[4].weight.data *= 3
    for changes in ({"model": other}, {"judging": [*data[12:], *data[:2]]}, {"judging": [*data[12:23], data[0]]}):
        found = ask(**changes)
        assert not any("going on" in line for line in told)
        assert found.arms[0].losses != first.arms[0].losses


def test_a_loss_that_draws_is_known_again(tmp_path: Path) -> None:
    model = network()
    data = task(model)
    told: list[str] = []

    def drawing(model: nn.Module, batch: Batch) -> Tensor:
        return loss(model, batch) * (0.5 + torch.rand(()))

    for seed in (1, 2):
        torch.manual_seed(seed)
        hs.compare(
            model, drawing, data[:12], data[12:], {"a": PLAIN, "b": PISSA}, steps=4, seeds=1, rates=[1e-2],
            storage=f"sqlite:///{tmp_path}/study.db", say=told.append,
        )  # fmt: skip
    assert any("going on" in line for line in told)


def test_every_batch_that_is_held_names_the_study_however_it_is_nested() -> None:
    model = network()
    model[4].register_parameter("spare", nn.Parameter(torch.empty(3, device="meta")))  # Held elsewhere.
    data = [{"pair": [x, {"y": y}]} for x, y in task(model)]
    other = copy.deepcopy(data)
    other[7]["pair"][1]["y"] += 1

    def nested(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, (batch["pair"][0], batch["pair"][1]["y"]))

    names = [
        hs.compare(
            model, nested, train[:12], data[12:], {"a": FROZEN_HEAD, "b": PLAIN}, steps=4, seeds=1, rates=[1e-2]
        ).facts["study"]
        for train in (data, data, other)
    ]
    assert names[0] == names[1] != names[2]


def two(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return loss(model, batch), model(batch[0])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (two, r"a tensor of shape \(\) and a tensor of shape \(16, 6\)"),
        (lambda model, batch: {"loss": loss(model, batch)}, "a dict"),
        (lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1), r"of shape \(16,\)"),
        (lambda model, batch: None, "a NoneType"),
    ],
)
def test_a_loss_that_is_none_is_named(wrong: Any, says: str) -> None:
    model = network()
    data = task(model)
    with pytest.raises(CalibrationError, match=says):
        hs.compare(model, wrong, data[:12], data[12:], {"a": PLAIN, "b": PISSA}, steps=4, seeds=1, rates=[1e-2])


def test_a_base_without_a_finite_loss_is_refused_before_anything_is_trained() -> None:
    model = network()
    data = task(model)
    for wrong in (lambda model, batch: loss(model, batch) * math.nan, lambda model, batch: (loss(model, batch), 0.0)):
        with pytest.raises(BadOption, match="tuning batches is nan before anything is trained"):
            hs.compare(model, wrong, data[:12], data[12:], {"a": PLAIN, "b": PISSA}, steps=4, seeds=1, rates=[1e-2])


def test_runs_that_were_lost_are_told_and_nothing_is_concluded_of_none(tmp_path: Path) -> None:
    arms = {"a": PLAIN, "b": hs.LoraConfig(r=16, lora_alpha=16)}
    compared(arms, steps=20, seeds=4, rates=[1e-2]).save(tmp_path)
    held = json.loads((tmp_path / "results.json").read_text())

    def without(arm: str, seeds: set[int]) -> hs.Comparison:
        runs = json.loads(json.dumps(held))
        for run in runs["runs"]:
            if run["kind"] == "final" and run["arm"] == arm and run["seed"] in seeds:
                run |= {"value": None, "diverged": "the loss rose"}
        (tmp_path / "results.json").write_text(json.dumps(runs))
        return hs.Comparison.load(tmp_path)

    some = without("b", {2})
    assert some.verdict.conclusive
    assert any("b did not finish 1 of 4 runs at 0.01" in line for line in some.verdict.cautions)
    none = without("a", {1, 2, 3})
    assert not none.verdict.conclusive
    assert "no arm finished 3 seeds that a finished, too" in none.verdict.headline
    assert none.rows[1]["verdict"] == "too few seeds"


def test_a_best_rate_at_the_end_of_a_short_list_is_told() -> None:
    options: dict[str, Any] = {"steps": 12, "seeds": 1}
    two = compared({"a": PLAIN, "b": PLAIN}, rates=[1e-5, 1e-2], **options)
    assert [arm.at_edge for arm in two.arms] == ["high", "high"]
    assert any("a's best rate, 0.01, is the highest that was tried" in line for line in two.verdict.cautions)
    turned = compared({"a": PLAIN, "b": PLAIN}, rates=[1e-2, 1e-5], **options)
    assert [arm.at_edge for arm in turned.arms] == ["high", "high"]
    one = compared({"a": PLAIN, "b": PISSA}, rates={"a": [1e-2], "b": [1e-3, 3e-3, 1e-2, 3e-2]}, **options)
    alone = [line for line in one.verdict.cautions if "alone, which may suit others better" in line]
    assert len(alone) == 1
    assert alone[0].startswith("a was tried at 0.01")


def test_searches_of_unlike_cost_are_told() -> None:
    options: dict[str, Any] = {"steps": 4, "seeds": 1}
    unlike = compared({"a": PLAIN, "b": PISSA}, rates={"a": [1e-2]}, **options)
    assert any("unlike numbers of steps (a 4, b " in line for line in unlike.verdict.cautions)
    assert "the same number of steps" not in unlike.to_html()
    alike = compared({"a": PLAIN, "b": PISSA}, rates=[1e-2], **options)
    assert not any("unlike" in line for line in alike.verdict.cautions)
    assert "the same number of steps" in alike.to_html()


def test_two_workers_share_the_jobs(tmp_path: Path) -> None:
    model = network()
    data = task(model)
    shares: dict[str, list[str]] = {"one": [], "two": []}
    found: dict[str, hs.Comparison] = {}

    def work(name: str) -> None:
        own = copy.deepcopy(model)
        found[name] = hs.compare(
            own, slow, data[:12], data[12:], {"a": PLAIN, "b": PISSA}, steps=8, seeds=3, rates=RATES,
            storage=f"sqlite:///{tmp_path}/study.db", watch=lambda line, done, total: shares[name].append(line),
        )  # fmt: skip

    threads = [threading.Thread(target=work, args=(name,)) for name in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(shares.values()), "one of them did everything"
    assert len(set(shares["one"] + shares["two"])) == len(shares["one"]) + len(shares["two"]), "a job was done twice"
    assert found["one"].rows == found["two"].rows


def slow(model: nn.Module, batch: Batch) -> Tensor:
    time.sleep(0.001)
    return loss(model, batch)


def test_ctrl_c_gives_the_job_back(tmp_path: Path) -> None:
    model = network()
    data = task(model)
    lines: list[str] = []

    def interrupted(line: str, done: int, total: int) -> None:
        lines.append(line)

    def until(model: nn.Module, batch: Batch) -> Tensor:
        if len(lines) == 3:
            raise KeyboardInterrupt
        return loss(model, batch)

    question: dict[str, Any] = {"steps": 8, "seeds": 2, "rates": RATES, "storage": f"sqlite:///{tmp_path}/study.db"}
    arms = {"a": PLAIN, "b": PISSA}
    with pytest.raises(KeyboardInterrupt):
        hs.compare(model, until, data[:12], data[12:], arms, watch=interrupted, **question)
    states = [trial.state.name for trial in trials(tmp_path)]
    assert states.count("FAIL") == 1
    assert "RUNNING" not in states
    lines.append("again")
    found = hs.compare(model, until, data[:12], data[12:], arms, watch=interrupted, **question)
    assert all(len(arm.losses) == 2 for arm in found.arms)


# --- files, and what cannot be meant


def test_a_comparison_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    found = compared({"a": PLAIN, "b": PISSA}, seeds=3, rates=[1e-2, 1e12])
    found.save(tmp_path / "out")
    again = hs.Comparison.load(tmp_path / "out")
    assert again.table == found.table
    assert str(again.verdict) == str(found.verdict)
    assert again.to_json() == found.to_json()
    assert again.to_html() == found.to_html()
    held = json.loads((tmp_path / "out" / "results.json").read_text())
    assert held["format"] == "headstart comparison 1"
    assert 0 < held["time"]["share_training"] < 1
    (tmp_path / "out" / "results.json").write_text('{"format": "headstart comparison 99"}')
    with pytest.raises(AdapterFormatError, match="this version"):
        hs.Comparison.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arms": {"a": "kaiming"}}, "at least two"),
        ({"arms": {"a": "kaiming", "b": "pisa"}}, "did you mean 'pissa'"),
        ({"arms": {"a": "kaiming", "b|c": "pissa"}}, "without"),
        ({"arms": {"a": PLAIN, "b": hs.LoraConfig(r=500, init_lora_weights="pissa")}}, "arm 'b'"),
        ({"steps": 0}, "steps"),
        ({"seeds": True}, "seeds"),
        ({"rates": [0.0]}, "rates"),
        ({"rates": [1e-3, 1e-3]}, "differ"),
        ({"rates": {"c": [1e-3]}}, "no arm"),
        ({"budget": "soon"}, "budget"),
        ({"validation": []}, "validation holds no batch"),
        ({"validation": [1]}, "two or more"),
        ({"train": []}, "train holds no batch"),
        ({"calibration_batches": 0}, "calibration_batches"),
        ({"storage": "nonsense://here"}, "storage"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_is_changed(changes: dict[str, Any], says: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    data = task(model, 8)
    given = {"train": data[:4], "validation": data[4:], "arms": {"a": PLAIN, "b": PISSA}, "steps": 4, "seeds": 1}
    given |= changes
    with pytest.raises(HeadstartError, match=says):
        hs.compare(model, loss, given.pop("train"), given.pop("validation"), given.pop("arms"), **given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_is_adapted_already_is_refused() -> None:
    model = network()
    hs.adapt(model, PLAIN)
    with pytest.raises(HeadstartError, match="adapter already"):
        hs.compare(model, loss, [1], [1, 2], {"a": PLAIN, "b": PLAIN})


# --- the command


def test_the_command_compares_and_goes_on(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    from headstart.tune.compare_command import answer

    rows = [{"prompt": f"The square of {i} is", "completion": f" {i * i}."} for i in range(60)]
    data = tmp_path / "squares.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {
        "model": str(checkpoint), "data": str(data), "inits": "kaiming,kaiming,auto", "budget": None, "ranks": None,
        "rates": "1e-3,1e-2", "seeds": 2, "steps": 4, "preserve": str(data), "storage": None, "as_json": False,
        "out": str(tmp_path / "out"), "batch_size": 4, "max_length": 64, "target_modules": None, "config": None,
        "threads": None,
    }  # fmt: skip
    assert answer(given) == 0
    shown = capsys.readouterr().out
    assert "kaiming #2" in shown
    assert "No conclusion" in shown
    assert "95 % interval" in shown
    held = json.loads((tmp_path / "out" / "results.json").read_text())
    assert held["facts"]["command"].startswith("headstart compare --model")
    assert [arm["name"] for arm in held["arms"]] == ["kaiming", "kaiming #2", "auto"]
    assert "r =" in held["facts"]["auto is"]
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
    assert answer({**given, "as_json": True}) == 0, "the same command goes on, and finds all done"
    captured = capsys.readouterr()
    assert json.loads(captured.out)["arms"] == held["arms"]
    assert "jobs are done" in captured.err
    with pytest.raises(FileError, match="another comparison"):
        answer({**given, "steps": 5})
    with pytest.raises(BadOption, match="at least two starts"):
        answer({**given, "inits": "kaiming", "out": str(tmp_path / "other")})
    data.write_text("".join(json.dumps({"prompt": "word " * 99, "completion": str(i)}) + "\n" for i in range(40)))
    with pytest.raises(DataError, match="no row has a token to learn within max_length=64"):
        answer({**given, "preserve": None, "out": str(tmp_path / "other")})
