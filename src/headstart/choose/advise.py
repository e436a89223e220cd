"""Which init, rank, targets and rate: facts in, advice with reasons out, in a second and without training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.choose import costs
from headstart.choose.estimate import predict
from headstart.choose.facts import CONDITIONS, PROPERTIES, Engine, Facts
from headstart.choose.fitting import fitted
from headstart.choose.machine import Speed, bytes_of, duration, size, speed
from headstart.choose.outlines import outline_of
from headstart.choose.rate import rate_of
from headstart.choose.recommendation import Advice, Recommendation
from headstart.choose.rules import EXCLUSIONS, RULES, TUNED, TUNED_SOURCE, Question, Rule
from headstart.choose.samples import Sample, look
from headstart.choose.setting import Setting
from headstart.errors import BadOption, HeadstartError, UnknownField
from headstart.files import source as sources

if TYPE_CHECKING:
    from headstart.choose.outlines import Model

ALPHA = 16  # with rsLoRA


def advise(
    model: Model,
    data: str | Path | Sample | None = None,
    *,
    memory: int | str | None = None,
    preserve: str | Path | bool = False,
    serve: str | None = None,
    steps: int | None = None,
    sweep: int = 1,
    trainable: int | None = None,
    tflops: float | None = None,
    timed: bool = True,
    **fields: Any,
) -> Advice:
    """Rank the starts for a model, its data and what one wants of the result.

    Args:
        model: as `headstart.estimate` takes it.
        data: what it will learn, a file as `headstart tune --data` takes it; a bounded part of it is looked at.
        memory: the limit, in bytes or as "16GB".
        preserve: data of what is not to be forgotten.
        serve: the engine that will load the adapter.
        steps: of the run; left out, one pass over the data.
        sweep: how many runs you can afford to find the rate.
        trainable: numbers that may train at most.
        tflops: the device's dense peak, for the time; left out, this CPU is measured.
        fields: of `Setting`, what is settled already: r, batch_size, max_length, dtype, quantised, target_modules, …

    Raises:
        FileError, DataError, ConfigError: for a model, data or a fact that cannot be used.

    Example:
        >>> config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        ...           "num_attention_heads": 32, "vocab_size": 32000, "dtype": "bfloat16"}
        >>> best = advise(config, steps=400, timed=False).best
        >>> best.init, best.fields["r"], best.confidence
        ('pissa', 32, 'medium')
    """
    if "init" in fields:
        raise UnknownField("an advice has no field 'init': that is what it finds")
    for name, count in (("steps", steps), ("sweep", sweep), ("trainable", trainable)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise BadOption(f"{name} is {count!r}: choose an integer of at least 1")
    setting = Setting.of({**fields, "steps": steps})
    outline = outline_of(model, None if setting.dtype == "auto" else setting.dtype)
    seen = _look(data, model)
    for path in (preserve,) if isinstance(preserve, str | Path) else ():
        look(str(path))
    if seen is not None and seen.longest is not None and "max_length" not in fields:
        longest = 2 ** math.ceil(math.log2(max(1, seen.longest)))
        setting = dataclasses.replace(setting, max_length=min(1024, max(64, longest)))
    setting = setting.settled(outline)
    if "target_modules" not in fields and outline.convolutional:
        setting = dataclasses.replace(
            setting, target_modules=[m.name for m in outline.matrices if m.linear or m.convolution]
        )
    facts = Facts(
        outline=outline,
        setting=setting,
        memory=_limit(memory),
        quantised=setting.quantised,
        data=seen,
        steps=steps,
        preserve=bool(preserve),
        serve=serve,
        sweep=sweep,
        trainable=trainable,
        rank_given="r" in fields,
    )
    named = {"model": model if isinstance(model, str | Path) else "MODEL", "data": data, "preserve": preserve}
    words = {name: str(value) for name, value in named.items() if isinstance(value, str | Path)}
    return advised(facts, words, speed(setting.dtype, tflops) if timed else None)


def _limit(memory: int | str | None) -> int | None:
    if isinstance(memory, bool) or (isinstance(memory, int) and memory < 1):
        raise BadOption(f"memory is {memory!r}: give bytes, or a size such as '16GB'")
    return memory if memory is None or isinstance(memory, int) else bytes_of(memory)


def _look(data: str | Path | Sample | None, model: Any) -> Sample | None:
    if data is None or isinstance(data, Sample):
        return data
    tokenizer = None
    if isinstance(model, str | Path) and not str(model).endswith(".json"):
        tokenizer = sources.find(str(model)).file("tokenizer.json")
    return look(str(data), tokenizer)


def advised(facts: Facts, words: dict[str, str] | None = None, rate: Speed | None = None) -> Advice:
    """Walk the table.

    Args:
        facts: what it looks at. words: what the user called the model, the data and what to preserve.
        rate: of the machine, for times.
    """
    words = {"model": "MODEL", "data": "DATA", **(words or {})}
    held = {name for name, holds in CONDITIONS.items() if holds(facts)}
    out = {init: why for init in costs.STARTS if (why := excluded(init, held))}
    ranked: list[Recommendation] = []
    for rule in answering("init", held):
        if rule.choose not in out and rule.choose not in [each.init for each in ranked]:
            try:
                ranked.append(_recommendation(rule, facts, held, words, rate))
            except HeadstartError as problem:
                out[rule.choose] = (str(problem), "this model")
    if not ranked:
        raise BadOption("; ".join(f"{init}: {why}" for init, (why, _) in out.items() if init == "kaiming"))
    ranked.sort(key=lambda each: not each.fits)  # What does not fit comes last; the order is otherwise the table's.
    for init in costs.STARTS:
        if init not in out and init not in [each.init for each in ranked]:
            out[init] = ("nothing here speaks for it over what is ranked", "the table of rules")
    return Advice(facts, tuple(ranked), out, tuple(_notes(facts, ranked)))


def answering(question: Question, held: set[str]) -> Iterator[Rule]:
    """The rules for a question whose conditions hold, in the table's order."""
    return (rule for rule in RULES if rule.question == question and held.issuperset(rule.when))


def excluded(init: str, held: set[str]) -> tuple[str, str] | None:
    """Why a start is ruled out, and the source."""
    start = costs.start_of(init)
    for row in EXCLUSIONS:
        covers = PROPERTIES[row.starts](start) if isinstance(row.starts, str) else init in row.starts
        if covers and held.issuperset(row.when):
            return row.because, row.source
    return None


def _recommendation(
    rule: Rule, facts: Facts, held: set[str], words: dict[str, str], rate: Speed | None
) -> Recommendation:
    chosen = {question: next(answering(question, held)) for question in ("rank", "scaling", "targets", "decay")}
    extra = dict(rule.fields)
    estimate, fits = fitted(rule.choose, chosen["rank"], facts, rate)
    setting = estimate.setting
    alpha, rslora, s = _scaling(chosen["scaling"], setting.r, facts)
    lr = rate_of(rule.choose, setting.r, s, facts.outline.hidden, facts.planned_steps)
    fields: dict[str, Any] = {"model": words["model"], "data": words["data"], "init": rule.choose}
    if _quantised_elsewhere(facts):
        fields["model"] = "QUANTISED"
        if costs.start_of(rule.choose).base:
            fields["init_options"] = {"original": words["model"] if Path(words["model"]).is_dir() else "ORIGINAL"}
    fields |= {name: _filled(value, words) for name, value in extra.items()}
    fields |= {"r": setting.r, "lora_alpha": alpha, "use_rslora": rslora, "target_modules": setting.target_modules}
    if setting.exclude_modules is not None:
        fields["exclude_modules"] = setting.exclude_modules
    fields |= {"learning_rate": lr.value, "batch_size": setting.batch_size, "max_length": setting.max_length}
    if setting.gradient_accumulation > 1:
        fields["gradient_accumulation"] = setting.gradient_accumulation
    if setting.gradient_checkpointing:
        fields["gradient_checkpointing"] = True
    if chosen["decay"].choose:
        fields["weight_decay"] = chosen["decay"].choose
    if facts.steps is not None:
        fields["steps"] = facts.steps
    answers = {"rank": setting.r, "scaling": f"s = {s:.3g}, α = {alpha:g}{', rsLoRA' * rslora}"}
    answers |= {"targets": setting.target_modules, "decay": chosen["decay"].choose}
    choices = {question: (answers[question], found) for question, found in chosen.items()}
    return Recommendation(rule.choose, rule.because, rule.source, rule.confidence, choices, lr, estimate, fits, fields)


def _quantised_elsewhere(facts: Facts) -> bool:
    """Whether the run needs another checkpoint than the one that was looked at: weights are taken as they are."""
    return facts.quantised is not None and facts.outline.quantised is None and facts.outline.causal


def _scaling(rule: Rule, r: int, facts: Facts) -> tuple[float, bool, float]:
    """α, whether rsLoRA, and s."""
    s = ALPHA / math.sqrt(r)
    if rule.choose == "rslora":
        return ALPHA, True, s
    alpha = float(f"{s * r:.6g}")
    if facts.engine is not None and facts.engine.whole_alpha:
        alpha = float(round(alpha))
    return alpha, False, alpha / r


def _filled(value: Any, words: dict[str, str]) -> Any:
    """A field with the user's own names in it."""
    return value.format(preserve=words.get("preserve", "PRESERVE")) if isinstance(value, str) else value


def _served(engine: Engine, best: Recommendation) -> Iterator[str]:
    """What an engine is to be told of the rank, or cannot take."""
    rank = best.fields["r"] * (2 if costs.start_of(best.init).anchored else 1)
    if engine.rank is not None and rank > engine.rank:
        yield f"the engine takes ranks up to {engine.rank}, and this is {rank}: headstart export --rank {engine.rank}"
    elif engine.note:
        known = [8, 16, 32, 64, 128, 256, 320, 512]
        yield engine.note.format(rank=next((k for k in known if k >= rank), rank))


def _notes(facts: Facts, ranked: Iterable[Recommendation]) -> Iterator[str]:
    best = next(iter(ranked))
    yield f"{TUNED} ({TUNED_SOURCE})"
    yield "--lr auto tries rates about the predicted one on your data, for twenty training steps in all: surer"
    if not best.fits and facts.memory is not None:
        need = size(best.estimate.memory.peak)
        text = f"nothing fits {size(facts.memory)}: the least takes {need}"
        if facts.quantised is None:
            packed = dataclasses.replace(best.estimate.setting, quantised="4bit")
            text += f"; quantised to 4 bits, {size(predict(facts.outline, packed).memory.peak)} (--quantised)"
        yield text
    if facts.trainable is not None and (trained := best.estimate.trainable) > facts.trainable:
        text = f"{trained:,} numbers train, over the {facts.trainable:,} that you named"
        yield f"{text}: choose a smaller rank, or fewer matrices (--target-modules)"
    if facts.engine is not None:
        yield from _served(facts.engine, best)
    if _quantised_elsewhere(facts):
        text = "headstart tune takes weights as they are stored: QUANTISED stands for a checkpoint that is quantised"
        yield text + (", and original for the folder of its float weights" if costs.start_of(best.init).base else "")
    if facts.planned_steps is None:
        yield "the length of the run is unknown, which decides about the init: pass --data or --steps"
    if facts.outline.read == "modules":
        yield "this model could not be traced: memory of activations is a rough count"
    if costs.start_of(best.init).base:
        yield "the adapter is right only on the quantised base that this start makes: keep the two together"
    if best.estimate.time is not None and best.estimate.time.init > 0.2 * (best.estimate.time.training or math.inf):
        yield f"its init takes {duration(best.estimate.time.init)}, over a fifth of the run: calibrate on fewer batches"
