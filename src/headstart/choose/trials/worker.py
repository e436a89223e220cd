"""One process that works on a comparison: finds what is due, does it, writes down what came out.

    rehearse   every arm once: its start, two steps, its centre of rates; the base's own losses      → the plan
    tune       an arm's rate on seed 0, up to a rung of its ladder, judged on the tuning batches
    final      an arm at its best rate on seed 1, 2, …, judged on the validation batches

No run that was judged on the validation batches tuned anything, and no seed is used for both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from headstart.choose.trials import training
from headstart.choose.trials.centre import centre
from headstart.choose.trials.clock import Clock
from headstart.choose.trials.halving import Losses
from headstart.choose.trials.plan import Plan, Timing, fitted
from headstart.choose.trials.starts import pictures
from headstart.choose.trials.study import Outcome, Study
from headstart.errors import BadOption, HeadstartError
from headstart.lora.config import LoraConfig

POINTS = 100  # of a learning curve
SAME = 0.01  # how far the base's loss may be from another machine's
PROBED = 2  # tuning batches that it is compared on
Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """Something to do: an arm's rate up to a rung of its search, or an arm on a seed."""

    kind: str
    arm: str
    seed: int = 0
    rung: int = 0
    place: int = 0

    @property
    def key(self) -> str:
        return f"{self.kind}|{self.arm}|{self.seed}|{self.rung}|{self.place}"


def losses(plan: Plan, outcomes: Mapping[str, Outcome], arm: str) -> Losses:
    """What an arm's search has found so far: infinite where it diverged or crashed."""
    found: dict[tuple[int, int], float] = {}
    for key, outcome in outcomes.items():
        kind, name, _, rung, place = key.split("|") if key.count("|") == 4 else ("", "", "", "0", "0")
        if (kind, name) == ("tune", arm):
            value = outcome.get("value")
            found[int(rung), int(place)] = math.inf if value is None else float(value)
    return found


def due(plan: Plan, outcomes: Mapping[str, Outcome]) -> list[Job]:
    """What can be done now: searches first, arm by arm; then seed by seed, so that what is done can be paired."""
    jobs, winners = [], {}
    for arm in plan.arms:
        known = losses(plan, outcomes, arm)
        jobs += [Job("tune", arm, 0, rung, place) for rung, place in plan.ladder(arm).due(known)]
        winners[arm] = plan.ladder(arm).winner(known)
    for seed in range(1, plan.seeds + 1):
        jobs += [Job("final", arm, seed, 0, place) for arm, place in winners.items() if place is not None]
    return [job for job in jobs if job.key not in outcomes]


@dataclass
class Worker:
    """What this process needs to do jobs.

    Attributes:
        setting: what all runs share, but for the number of steps, which the plan says.
        arms: by name; tuning, judging: batches to judge on; preserved: batches to measure forgetting on.
        study: where jobs are claimed and written down; watch: is told of each.
    """

    setting: training.Setting
    arms: Mapping[str, LoraConfig]
    tuning: Sequence[Any]
    judging: Sequence[Any]
    preserved: Sequence[Any]
    study: Study
    watch: Watch
    clock: Clock = field(default_factory=Clock)
    starts: dict[str, training.Prepared] = field(default_factory=dict)
    paused: dict[tuple[str, int], training.Run] = field(default_factory=dict)

    def plan(self, wanted: Plan, steps: int | None, seeds: int | None) -> Outcome:
        """The plan that all workers of this study follow: the one that stands in it, or one made now."""
        while True:
            found = self.study.outcomes().get("plan")
            if found is not None:
                self._check_same(found["probe"])
                return found
            if "plan" not in self.study.running():
                claim = self.study.claim("plan", {})
                if claim is not None:
                    with self.study.alive(claim):
                        outcome = self._rehearse(wanted, steps, seeds)
                        self.study.finish(claim, outcome)
                    return outcome
            time.sleep(0.5)

    def _rehearse(self, wanted: Plan, steps: int | None, seeds: int | None) -> Outcome:
        """Every arm once, so that what cannot work is refused before anything is trained."""
        base, probe = self._judged(), self._probed()
        timing, seconds = dict(base.pop("seconds")), []
        starts, centres, shapes, crashed = {}, {}, {}, {}
        began = time.perf_counter()
        for index, (name, config) in enumerate(self.arms.items()):
            try:
                prepared = training.start_of(self.setting, config, 0, index)
                self.starts[name] = prepared
                with training.installed(self.setting.model, prepared) as adapter:
                    centres[name] = centre(adapter)
                    starts[name] = pictures(adapter)
                    shapes[name] = adapter.count()[0]
                run, clock = training.Run(prepared, centres[name] / 100, 0, 2), Clock()
                for to in (1, 2):
                    clock.read()
                    with training.trained(self.setting, run, to, clock):
                        pass
                seconds.append(clock.read()["training"])
            except HeadstartError as error:
                raise type(error)(f"{error} (arm {name!r})") from error
            except Exception as error:  # Out of memory, a bug: the other arms go on without it.
                crashed[name] = said(error)
        if len(self.arms) - len(crashed) < 2:
            raise BadOption(f"fewer than two arms can be trained: {'; '.join(f'{n}: {e}' for n, e in crashed.items())}")
        begun = sum(p.calibration + p.init for p in self.starts.values())
        measured = Timing(sum(seconds) / len(seconds), timing["tuning"], timing["judging"], begun)
        rates = {name: given for name, given in wanted.rates.items() if name not in crashed}
        arms = tuple(name for name in wanted.arms if name not in crashed)
        found = fitted(Plan(arms, 1, 1, centres, rates, measured, wanted.budget), steps, seeds)
        self.clock.add("init", begun)
        self.clock.add("rehearsal", time.perf_counter() - began - begun)
        return {
            "value": 0.0,
            "plan": found.to_dict(),
            "base": base,
            "probe": probe,
            "starts": starts,
            "trainable": shapes,
            "crashed": crashed,
            "seconds": self.clock.read(),
        }

    def _judged(self) -> Outcome:
        """The base's own losses, and how long it takes to find them."""
        found: Outcome = {}
        seconds: dict[str, float] = {}
        for name in ("tuning", "judging", "preserved"):
            began = time.perf_counter()
            found[name] = value = self._evaluated(name)
            if value is not None and not math.isfinite(value):
                said = f"the base's loss on the {name} batches is {value} before anything is trained"
                raise BadOption(f"{said}: look at them, and at what loss= says it is a mean of")
            seconds[name] = time.perf_counter() - began
            self.clock.add("evaluation", seconds[name])
        return {**found, "seconds": {"tuning": seconds["tuning"], "judging": seconds["judging"] + seconds["preserved"]}}

    def _check_same(self, before: float) -> None:
        """Refuse a study of the same name whose base had another loss: its runs were of something else."""
        now = self._probed()
        if not math.isclose(now, before, rel_tol=SAME, abs_tol=1e-6):
            raise BadOption(
                f"what this storage holds was done with another loss, model or data: the base's loss on the first "
                f"tuning batches was {before:.6g} there and is {now:.6g} here; choose another storage, or another --out"
            )

    def _probed(self) -> float:
        """The base's loss on a few tuning batches, the same in every process: what a loss draws is drawn alike."""
        setting = self.setting
        devices = sorted({p.device.index or 0 for p in setting.model.parameters() if p.device.type == "cuda"})
        with self.clock("evaluation"), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            value = training.evaluate(setting.model, setting.loss, self.tuning[:PROBED], setting.device)
        return value if math.isfinite(value) else 0.0  # A mean of nothing is no number.

    def _evaluated(self, which: str) -> float | None:
        batches = {"tuning": self.tuning, "judging": self.judging, "preserved": self.preserved}[which]
        if not batches:
            return None
        return training.evaluate(self.setting.model, self.setting.loss, batches, self.setting.device)

    def work(self, plan: Plan, deadline: float) -> str:
        """Do what is due until nothing is left, here or elsewhere. Says why, where something is left."""
        pace = plan.timing.step
        while True:
            outcomes = self.study.outcomes()
            busy = self.study.running()
            jobs = [job for job in due(plan, outcomes) if job.key not in busy]
            if not jobs and not any(key != "plan" for key in busy):
                return ""
            if jobs:
                job = self._preferred(jobs, busy)
                seconds = self._steps_of(job, plan) * pace
                if time.perf_counter() + 0.9 * seconds > deadline:
                    return "the budget was used up"
                self._do(job, plan, outcomes)
            elif time.perf_counter() > deadline:
                return "the budget was used up"
            else:
                time.sleep(0.5)

    def _preferred(self, jobs: list[Job], busy: set[str]) -> Job:
        """Tuning before finals; first what goes on from here, then what nobody is at."""
        here = {arm for arm, _ in self.paused}
        elsewhere = {key.split("|")[1] for key in busy if key.startswith("tune|")}
        first = jobs[0].kind

        def strangeness(job: Job) -> int:
            return 0 if job.arm in here else 2 if job.arm in elsewhere else 1

        return min(
            (job for job in jobs if job.kind == first), key=lambda job: strangeness(job) if first == "tune" else 0
        )

    def _steps_of(self, job: Job, plan: Plan) -> int:
        if job.kind == "final":
            return plan.steps
        paused = self.paused.get((job.arm, job.place))
        return plan.ladder(job.arm).steps[job.rung] - (paused.step if paused else 0)

    def _do(self, job: Job, plan: Plan, outcomes: Mapping[str, Outcome]) -> None:
        rate = plan.rate(job.arm, job.place)
        claim = self.study.claim(job.key, {"arm": job.arm, "rate": rate, "seed": job.seed})
        if claim is None:
            return
        with self.study.alive(claim):
            try:
                outcome = self._tuned(job, plan) if job.kind == "tune" else self._finished(job, plan)
            except Exception as error:  # One crash does not lose the others; a run that crashed is not gone on with.
                self.paused.pop((job.arm, job.place), None)
                outcome = {"value": None, "error": said(error), "steps": 0}
            outcome |= {"kind": job.kind, "arm": job.arm, "seed": job.seed, "rate": rate, "place": job.place}
            outcome |= {"seconds": self.clock.read()}
            self.study.finish(claim, outcome)
        done = sum(int(o.get("steps", 0)) for o in outcomes.values()) + outcome["steps"]
        self.watch(told(job, outcome, plan), done, sum(map(plan.steps_of, plan.arms)))

    def _tuned(self, job: Job, plan: Plan) -> Outcome:
        # An arm is searched through before the next: the paused runs of others are not needed, or will be run anew.
        self.paused = {key: run for key, run in self.paused.items() if key[0] == job.arm}
        if job.arm not in self.starts:
            self.starts[job.arm] = self._start(job.arm, 0)
        run = self.paused.get((job.arm, job.place))
        if run is None:
            run = training.Run(self.starts[job.arm], plan.rate(job.arm, job.place), 0, plan.steps)
        outcome = self._run(run, plan.ladder(job.arm).steps[job.rung], "tuning")
        if not run.failed:
            self.paused[job.arm, job.place] = run
        return {**outcome, "rung": job.rung}

    def _finished(self, job: Job, plan: Plan) -> Outcome:
        self.paused.clear()
        prepared = self._start(job.arm, job.seed)
        run = training.Run(prepared, plan.rate(job.arm, job.place), job.seed, plan.steps)
        outcome = self._run(run, plan.steps, "judging", "preserved")
        cost = {"calibration": prepared.calibration, "init": prepared.init}
        return {**outcome, "curve": thinned(run.losses), "cost": cost}

    def _run(self, run: training.Run, to: int, *judged: str) -> Outcome:
        """Train a run up to a step and judge it there. The first judgement is its value."""
        before = run.step
        found: list[float | None] = []
        with training.trained(self.setting, run, to, self.clock), self.clock("evaluation"):
            found = [None if run.failed else self._evaluated(name) for name in judged]
        if found[0] is not None and not math.isfinite(found[0]):
            run.failed = f"the loss on held-out batches is {found[0]}"
        outcome = {"value": None if run.failed else found[0], "diverged": run.failed}
        outcome |= {name: value for name, value in zip(judged[1:], found[1:], strict=True) if not run.failed}
        return {**outcome, "step": run.step, "steps": run.step - before}

    def _start(self, arm: str, seed: int) -> training.Prepared:
        # The start is drawn anew for each seed and each arm: two arms of one kind differ by what is drawn.
        prepared = training.start_of(self.setting, self.arms[arm], seed, 1000 * seed + list(self.arms).index(arm))
        for name, seconds in (("calibration", prepared.calibration), ("init", prepared.init)):
            self.clock.add(name, seconds)
        return prepared


def thinned(values: Sequence[float]) -> list[list[float]]:
    """A curve of at most a hundred points: [step, the mean of the losses up to it since the point before]."""
    width = math.ceil(len(values) / POINTS)
    blocks = [values[i : i + width] for i in range(0, len(values), width)]
    return [[min(len(values), (i + 1) * width), sum(block) / len(block)] for i, block in enumerate(blocks)]


def said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def told(job: Job, outcome: Outcome, plan: Plan) -> str:
    """A job in one line."""
    if outcome.get("error"):
        result = f"crashed: {outcome['error']}"
    elif outcome["value"] is None:
        result = f"diverged: {outcome['diverged']}"
    else:
        result = f"loss {outcome['value']:.4f}"
    if job.kind == "tune":
        return f"tuning {job.arm}: rate {outcome['rate']:.2g}, {outcome.get('step', 0)} steps, {result}"
    return f"{job.arm}, seed {job.seed} of {plan.seeds}: rate {outcome['rate']:.2g}, {result}"
