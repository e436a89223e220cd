"""An advice in words, for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from headstart.choose.machine import duration, size

if TYPE_CHECKING:
    from headstart.choose.facts import Facts
    from headstart.choose.recommendation import Advice, Recommendation

WIDTH = 110


def told(advice: Advice) -> str:
    """All of it: the facts, the ranking, what to run, what was ruled out, what else to know."""
    best = advice.best
    lines = [_facts(advice.facts), ""]
    for place, each in enumerate(advice.ranked, start=1):
        lines += [*_recommended(place, each), ""]
    if best.estimate.outline.causal:
        lines += ["run it", f"  {best.command}", "", "or, as a file for --config"]
        lines += [f"  {line}" for line in best.yaml.splitlines()]
    else:
        lines += ["run it", f"  {best.command}"]
    lines += ["", "ruled out"]
    lines += _grouped(advice.ruled_out)
    lines += ["", "to know", *(line for note in advice.notes for line in _wrapped("- ", note))]
    return "\n".join(lines)


def _facts(facts: Facts) -> str:
    outline = facts.outline
    found = [f"{outline.kind}, {outline.parameters / 1e6:,.0f} M parameters"]
    found += [f"{facts.quantised.replace('bit', '-bit')} weights"] if facts.quantised else []
    found += [str(facts.data)] if facts.data is not None else ["no data"]
    found += [f"{facts.planned_steps:,} steps"] if facts.planned_steps is not None else []
    found += [f"at most {size(facts.memory)}"] if facts.memory is not None else []
    found += [f"served by {facts.serve}"] if facts.serve else []
    return "\n".join(textwrap.wrap("; ".join(found), WIDTH))


def _recommended(place: int, each: Recommendation) -> Iterator[str]:
    fits = "" if each.fits else "   DOES NOT FIT"
    yield f"{place}. {each.init}   ({each.confidence} confidence){fits}"
    yield from _wrapped("   because  ", each.because)
    yield from _wrapped("   source   ", each.source)
    rows = [("rate", f"{each.rate.value:g}", each.rate.reason, each.rate.source, each.rate.confidence)]
    for name in ("rank", "scaling", "targets"):
        value, rule = each.choices[name]
        because = rule.because
        if name == "rank" and isinstance(rule.choose, int) and value != rule.choose:
            because += f"; {rule.choose} would be over the share, the memory or the engine's limit"
        rows.append((name, str(value), because, rule.source, rule.confidence))
    if place == 1:
        for name, value, because, source, confidence in rows:
            yield from _wrapped(f"   {name:<8} ", f"{value}   ({confidence}) {because} [{source}]")
    else:
        yield f"   rate     {each.rate.value:g}, rank {each.choices['rank'][0]}"
    yield from _wrapped("   memory   ", _memory(each))
    if each.estimate.time is not None:
        time, training = each.estimate.time, each.estimate.time.training
        run = f"{duration(time.step)} a step" if training is None else f"{duration(training)} of training"
        yield from _wrapped(
            "   time     ", f"{duration(time.init)} of init, {run}; within a factor of {time.speed.factor:g}"
        )


def _memory(each: Recommendation) -> str:
    memory, setting = each.estimate.memory, each.estimate.setting
    batch = f"batches of {setting.batch_size} × {setting.max_length}"
    extra = f", accumulated {setting.gradient_accumulation} times" if setting.gradient_accumulation > 1 else ""
    extra += ", with gradient checkpointing" if setting.gradient_checkpointing else ""
    share = 100 * each.estimate.trainable / each.estimate.total
    return (
        f"{size(memory.init)} at init, {size(memory.training)} in training; {batch}{extra}; "
        f"{each.estimate.trainable:,} numbers train ({share:.2f} %)"
    )


def _grouped(ruled_out: dict[str, tuple[str, str]]) -> Iterator[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for init, why in ruled_out.items():
        groups.setdefault(why, []).append(init)
    for (because, source), inits in groups.items():
        yield from _wrapped("- ", f"{', '.join(inits)}: {because} [{source}]")


def _wrapped(first: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip
