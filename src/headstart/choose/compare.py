"""Arms that differ in their start, each at its own best rate, compared on your model, your loss and your data.

    tune     every arm's rate is searched on a seed of its own, judged on the tuning batches; equal steps for all
    judge    then every arm trains at its best rate on seeds 1, 2, …, judged on batches that tuned nothing
    compare  arms are paired by seed: one seed is one order of the batches and one set of dropout masks

One base is loaded; an arm is put in, trained and taken out, and the base is what it was, to the bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from headstart.choose.auto import AUTO, followed
from headstart.choose.trials.comparison import Comparison
from headstart.choose.trials.order import Order
from headstart.choose.trials.plan import Plan, needed, seconds_of, words
from headstart.choose.trials.result import Measured
from headstart.choose.trials.study import Study
from headstart.choose.trials.training import Loss, MakeOptimizer, Setting
from headstart.choose.trials.worker import Watch, Worker
from headstart.errors import BadOption
from headstart.lora import quantized
from headstart.lora.adapt import check_plain
from headstart.lora.config import LoraConfig
from headstart.lora.targets import with_heads

Arms = Mapping[str, LoraConfig | str | bool] | Sequence[str]
Batches = Iterable[Any] | Callable[[], Iterable[Any]]
FORMAT = 2  # of a study: one of another format is not gone on with


def compare(
    model: nn.Module,
    loss: Loss,
    train: Iterable[Any] | Callable[[int], Iterable[Any]],
    validation: Batches,
    arms: Arms,
    *,
    steps: int | None = None,
    seeds: int | None = None,
    rates: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    budget: str | float | None = None,
    storage: str | None = None,
    preserve: Batches | None = None,
    tuning: Batches | None = None,
    optimizer: MakeOptimizer | None = None,
    calibration_batches: int = 8,
    facts: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
    say: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare starts, each at its own best rate.

    Args:
        model: the base. It comes back as it was, to the bit.
        loss: from the model and a batch to a mean loss, or to a mean loss and how many it is a mean of.
        train: batches, which every seed shuffles in its own way; or a function from a seed to batches.
        validation: batches to judge on. Without `tuning`, every second one of them tunes instead.
        arms: by name, a config, a strategy's name, or "auto", what `headstart.auto` chooses; or a list of the last
            two. The first is the baseline.
        steps: of a run; left out, what the budget buys, or 200.
        seeds: runs that an arm is judged by; left out, 5, or down to 3 where the budget is small.
        rates: to try, for all arms or by arm; left out, eleven factors of two round each start's own centre.
        budget: a time such as "30min", or seconds.
        storage: a database URL as Optuna takes it. Whoever compares the same with the same URL shares the work, and
            what was interrupted goes on. Left out, nothing is kept.
        preserve: batches of what is not to be forgotten: every run is measured on them, and the starts that ask for
            such data are given every second one instead.
        tuning: batches to choose the rates by.
        optimizer: from the model and a rate to an optimizer; AdamW without weight decay where it is left out.
        calibration_batches: how many batches a start that looks at data looks at.
        facts: what the report shows of the model and the data.
        watch: is told of every job: a line, and the steps done and to do.
        say: is given lines for the reader.

    Raises:
        HeadstartError: before anything is trained, where an arm does not fit the model or the data.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        >>> batches = [(x, x.sin()) for x in torch.randn(8, 4, 8)]
        >>> def loss(model, batch):
        ...     return nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> found = compare(model, loss, batches, batches[:4], {"a": "kaiming", "b": "pissa"}, steps=8, seeds=3)
        >>> [arm.name for arm in found.arms], found.verdict.conclusive
        (['a', 'b'], False)
    """
    check_plain(model)
    if not callable(loss):
        raise BadOption(f"loss is a {type(loss).__name__}: pass a function of the model and a batch")
    configs = _configs(model, arms, steps, preserve is not None)
    judging, chosen = _split(_listed(validation, "validation"), None if tuning is None else _listed(tuning, "tuning"))
    kept, given = _preserve(preserve, configs)
    wanted = _wanted(configs, steps, seeds, rates, budget)
    ordered = train if callable(train) or isinstance(train, Sequence) else list(train)
    setting = Setting(model, loss, ordered, given, _whole("calibration_batches", calibration_batches, 1), optimizer)
    asked = (steps, seeds, dict(wanted.rates), wanted.budget, (facts or {}).get("optimizer"))
    first = Order(ordered, 0)[0]
    seen = ordered if isinstance(ordered, list | tuple) else [first]
    name = _name(setting, configs, asked, [seen, judging, chosen, kept, given])
    study = Study(storage, name)
    worker = Worker(setting, configs, chosen, judging, kept, study, watch or _silent)
    say = say or (lambda line: None)
    began = time.perf_counter()
    found = worker.plan(wanted, steps, seeds)
    plan = Plan.from_dict(found["plan"])
    _announce(plan, len(study.outcomes()) - 1, say)
    deadline = began + wanted.budget if wanted.budget is not None else float("inf")
    stopped = worker.work(plan, deadline)
    parts = {key: found[key] for key in ("base", "starts", "trainable", "crashed")}
    measured = Measured(plan, outcomes=study.outcomes(), stopped=stopped, **parts)
    return Comparison(measured, configs, {"study": name, **_about(model), **(facts or {})})


def _configs(model: nn.Module, arms: Arms, steps: int | None, preserve: bool = False) -> dict[str, LoraConfig]:
    if isinstance(arms, list | tuple) and len(set(map(str, arms))) == len(arms):
        arms = {str(name): name for name in arms}
    if not isinstance(arms, Mapping) or len(arms) < 2:
        raise BadOption("arms is a mapping of at least two names to configs or strategies: name what to compare")
    for name in arms:
        if not isinstance(name, str) or not name.strip() or "|" in name:
            raise BadOption(f"an arm is called {name!r}: choose a name without '|'")
    given = {n: c if isinstance(c, LoraConfig) else _named(model, c, steps, preserve) for n, c in arms.items()}
    return {name: with_heads(model, config) for name, config in given.items()}


def _named(model: nn.Module, name: str | bool, steps: int | None, preserve: bool) -> LoraConfig:
    """A start with every other field as it is by default, or what the advice chooses."""
    if name != AUTO:
        return LoraConfig(init_lora_weights=name)
    return followed(model, steps=steps, preserve=preserve).best.lora_config(clip_rank=True)


def _listed(batches: Batches, name: str) -> list[Any]:
    """All batches of a list, an iterable or a function."""
    given = batches() if callable(batches) else batches
    if isinstance(given, str | Mapping | Tensor) or not isinstance(given, Iterable):
        raise BadOption(f"{name} is a {type(given).__name__}: pass an iterable of batches, as [batch]")
    found = list(given)
    if not found:
        raise BadOption(f"{name} holds no batch: check the dataset and its filters")
    return found


def _split(validation: list[Any], tuning: list[Any] | None) -> tuple[list[Any], list[Any]]:
    """The batches to judge on and those to tune on; without any of the latter, every second of the former."""
    if tuning is not None:
        return validation, tuning
    if len(validation) < 2:
        raise BadOption("validation holds one batch, and rates must be tuned on others: pass two or more, or tuning=")
    return validation[1::2], validation[::2]


def _preserve(preserve: Batches | None, configs: Mapping[str, LoraConfig]) -> tuple[list[Any], list[Any]]:
    """The batches on which forgetting is measured, and those that the starts see which ask for some."""
    asking = [
        name
        for name, config in configs.items()
        if "preserved" in config.strategy.needs or config.strategy.looks_at_preserved(config.init_options)
    ]
    if preserve is None:
        if asking:
            raise BadOption(f"arm {asking[0]!r} asks for what is not to be forgotten: pass preserve=, or --preserve")
        return [], []
    found = _listed(preserve, "preserve")
    if not asking:
        return found, []
    if len(found) < 2:
        raise BadOption(f"preserve holds one batch; arm {asking[0]!r} is started on others than it is measured on: two")
    return found[::2], found[1::2]


def _wanted(
    configs: Mapping[str, LoraConfig],
    steps: int | None,
    seeds: int | None,
    rates: Sequence[float] | Mapping[str, Sequence[float]] | None,
    budget: str | float | None,
) -> Plan:
    """What is asked for, checked; steps and seeds are found when a step has been timed."""
    for name, value in (("steps", steps), ("seeds", seeds)):
        if value is not None:
            _whole(name, value, 1)
    given = rates if isinstance(rates, Mapping) else dict.fromkeys(configs, rates) if rates is not None else {}
    for name in given:
        if name not in configs:
            raise BadOption(f"rates names {name!r}, which is no arm (there is: {', '.join(configs)})")
    seconds = None if budget is None else seconds_of(budget)
    return Plan(tuple(configs), 1, 1, rates={n: _rates(r) for n, r in given.items()}, budget=seconds)


def _rates(rates: Any) -> list[float]:
    wrong = BadOption(f"rates is {rates!r}: choose positive numbers that differ, such as [1e-4, 2e-4, 4e-4]")
    if isinstance(rates, str) or not isinstance(rates, Iterable):
        raise wrong
    found = list(rates)
    for rate in found:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not (math.isfinite(rate) and rate > 0):
            raise wrong
    if not found or len(set(found)) < len(found):
        raise wrong
    return sorted(map(float, found))


def _whole(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BadOption(f"{name} is {value!r}: choose an integer of at least {least}")
    return value


def _announce(plan: Plan, done: int, say: Callable[[str], None]) -> None:
    """Say what will be run, how long it takes, and whether anything can come of it."""
    say(f"plan: {plan} ({plan.timing.step:.3g} s a step)")
    if done:
        say(f"going on: {done} jobs are done")
    if plan.doubts:
        say(f"too small for a conclusion: {'; '.join(plan.doubts)}. It takes about {words(needed(plan))} or more")


def _name(setting: Setting, configs: Mapping[str, LoraConfig], asked: Any, batches: Sequence[Sequence[Any]]) -> str:
    """A name for the study: the same for the same question about the same model and data, on any machine.

    The first numbers are looked at of every weight that has some and is not quantised, and of every tensor in the
    batches, however deep it lies there. The loss is not: `Worker.plan` sees it.
    """
    digest = hashlib.sha256()
    shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in setting.model.named_parameters()]
    arms = {name: dataclasses.asdict(config) for name, config in configs.items()}
    counts = [FORMAT, len(setting.train) if isinstance(setting.train, Sequence) else None, *map(len, batches)]
    digest.update(json.dumps([shapes, arms, asked, setting.calibration_batches, counts], default=str).encode())
    weights = (p for p in setting.model.parameters() if not quantized.is_quantized(p))
    for tensor in chain(weights, _tensors(batches)):
        if not tensor.is_meta:
            digest.update(_few(tensor))
    return f"headstart-{digest.hexdigest()[:16]}"


def _tensors(held: Any) -> Iterator[Tensor]:
    """All tensors in lists and mappings, and in what these hold."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping | list | tuple):
        for value in held.values() if isinstance(held, Mapping) else held:
            yield from _tensors(value)


def _few(tensor: Tensor) -> bytes:
    """A tensor's shape and a few of its numbers, as bytes."""
    return f"{tuple(tensor.shape)} {tensor.detach().flatten()[:64].cpu().tolist()}".encode()


def _about(model: nn.Module) -> dict[str, Any]:
    import headstart

    return {
        "headstart": headstart.__version__,
        "torch": torch.__version__,
        "device": str(next(model.parameters()).device),
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "date": time.strftime("%Y-%m-%d"),
    }


def _silent(line: str, done: int, total: int) -> None:
    """Nobody watches."""
