"""The largest rank and batch that the facts have room for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from headstart.choose import costs
from headstart.choose.estimate import Estimate, predict
from headstart.choose.facts import Facts
from headstart.choose.machine import Speed
from headstart.choose.rules import Rule
from headstart.choose.setting import Setting

LADDER = (64, 32, 16, 8, 4, 2, 1)  # ranks that are tried


def fitted(init: str, rule: Rule, facts: Facts, rate: Speed | None) -> tuple[Estimate, bool]:
    """The largest rank up to the rule's, and the largest batch, that fit; or the smallest of all, which does not.

    Memory is bought with time first (smaller batches, accumulated; checkpointing), and with rank last.
    """
    best: Estimate | None = None
    for r in _ranks(init, rule, facts):
        for changes in _batches(facts.setting):
            setting = _narrowed(facts, facts.with_(init=init, r=r, steps=facts.planned_steps, **changes))
            best = predict(facts.outline, setting, rate)
            if facts.memory is None or best.memory.peak <= facts.memory:
                return best, True
    assert best is not None  # There is a rank, if only of one.
    return best, False


def _ranks(init: str, rule: Rule, facts: Facts) -> Iterator[int]:
    if facts.rank_given:
        yield facts.setting.r
        return
    engine = facts.engine
    limit = engine.rank if engine is not None and engine.rank is not None else math.inf
    if costs.start_of(init).anchored:
        limit /= 2
    limit = min(limit, rule.choose)
    if costs.start_of(init).trains == "R":
        yield from _of_cores(init, int(min(limit, _widest(facts))), facts)
        return
    allowed = [r for r in LADDER if r <= limit]
    small = [r for r in allowed if _trained(init, r, facts) <= facts.budget]
    yield from small or allowed[-1:]


def _of_cores(init: str, largest: int, facts: Facts) -> Iterator[int]:
    """The largest rank of a core, of which r² numbers train, and then half of it, and so on."""
    r = next((r for r in range(largest, 1, -1) if _trained(init, r, facts) <= facts.budget), 1)
    while r:
        yield r
        r //= 2


def _widest(facts: Facts) -> int:
    """The largest rank for which some matrix has room."""
    chosen = facts.outline.chosen(facts.setting.target_modules, facts.setting.exclude_modules)
    return max(min(matrix.m, matrix.n) for matrix in chosen)


def _trained(init: str, r: int, facts: Facts) -> int:
    return predict(facts.outline, _narrowed(facts, facts.with_(init=init, r=r))).trainable


def _batches(setting: Setting) -> Iterator[dict[str, Any]]:
    """Batches with the same rows a step, smaller and smaller, and then with checkpointing."""
    for checkpointing in dict.fromkeys((setting.gradient_checkpointing, True)):
        rows = setting.batch_size
        while rows >= 1:
            steps = math.ceil(setting.batch_size * setting.gradient_accumulation / rows)
            yield {"batch_size": rows, "gradient_accumulation": steps, "gradient_checkpointing": checkpointing}
            rows //= 2


def _narrowed(facts: Facts, setting: Setting) -> Setting:
    """Without matrices that have no room for the rank, such as a head of two classes."""
    if costs.start_of(setting.init).work == "free":
        return setting
    chosen = facts.outline.chosen(setting.target_modules, setting.exclude_modules)
    narrow = [matrix.name for matrix in chosen if setting.r > min(matrix.m, matrix.n)]
    if not narrow or len(narrow) == len(chosen):
        return setting
    already = [setting.exclude_modules] if isinstance(setting.exclude_modules, str) else setting.exclude_modules or []
    return dataclasses.replace(setting, exclude_modules=[*already, *narrow])
