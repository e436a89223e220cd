"""One engine's reading of an adapter: the rules that it meets, the scale that it applies, and how far off that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from headstart.files.doctor.deviation import REPEATS, Placed, Reader, deviation, started
from headstart.files.doctor.diagnosis import RANKED, Finding, Reading
from headstart.files.doctor.engines import MERGE, OTHER, PORTABLE, RULES, Effect, Engine, Verdict
from headstart.files.doctor.stranger import PEFT
from headstart.files.doctor.survey import Survey
from headstart.lora.layouts import Pair


class Starts:
    """What the base lost to the start, by layer and block, computed once for all engines."""

    def __init__(self, seen: Survey, there: Mapping[str, Placed], repeats: Mapping[str, float]) -> None:
        self.seen, self.there, self.repeats = seen, there, repeats

    @property
    def exact(self) -> bool:
        """Whether the base alone says what the start was."""
        return self.seen.init in ("pissa", "olora")

    @cached_property
    def pairs(self) -> dict[str, dict[int, Pair]]:
        found: dict[str, dict[int, Pair]] = {}
        for name, value in self.repeats.items():
            if value > REPEATS:
                layer = self.seen.layers[name]
                found[name] = {
                    index: started(block, self.seen.init, layer.rank, layer.scaling)
                    for index, block in enumerate(self.there[name].blocks)
                }
        return found


# ------------------------------------------------------------------ one engine


def reading(
    engine: Engine,
    seen: Survey,
    there: Mapping[str, Placed],
    lost: Starts,
    hidden: Finding | None,
    words: Mapping[str, str],
) -> Reading:
    if seen.dialect.name not in engine.reads:
        out = "fixed.safetensors" if engine.profile == "kohya" else "fixed/"
        wanted = (
            OTHER.format(profile=engine.profile, out=out, **words) if seen.dialect is PEFT and not seen.fatal else ""
        )
        because = f"it reads {' and '.join(engine.reads)} files, and this is {seen.dialect.name}'s format"
        return Reading(engine, (Finding(Verdict.FOREIGN, because, wanted),))
    if seen.fatal:
        return Reading(engine, (Finding(Verdict.REFUSES, seen.fatal.what, seen.fatal.repair),))
    findings = [*_ruled(engine, seen, words), *([hidden] if hidden else [])]
    ratios = _ratios(engine, seen)
    if ratios:
        fields = [f"{name}={seen.config[name]!r:.60}" for name in engine.blind if seen.config.get(name)]
        because = f"it does not see {', '.join(fields) or 'the scale'}, and scales {_range(ratios.values())}"
        repair = _fit(PORTABLE, seen).replace("{adapter}", words["adapter"]).replace("{base}", words["base"])
        findings.append(Finding(Verdict.DIFFERS, because, repair, "its formula of the scale"))
    findings.sort(key=lambda f: -RANKED.index(f.verdict))
    errors = _errors(seen, there, findings, ratios, lost)
    estimated = any(f.effect is Effect.PLAIN_START for f in findings) and bool(errors) and not lost.exact
    return Reading(engine, tuple(findings), ratios, errors, estimated)


def _ruled(engine: Engine, seen: Survey, words: Mapping[str, str]) -> list[Finding]:
    told = []
    for rule in RULES:
        found = rule.when(seen) if engine.key in rule.engines else ()
        if found:
            because = rule.because.replace("{found}", _some(found))
            repair = words["unchange"] if rule.repair == "{unchange}" else _fit(rule.repair, seen)
            layers = tuple(found) if rule.effect not in (None, Effect.PLAIN_START) else tuple(seen.layers)
            filled = repair.replace("{adapter}", words["adapter"]).replace("{base}", words["base"])
            told.append(Finding(rule.verdict, because, filled, rule.source, rule.effect, layers))
    return told


def _fit(repair: str, seen: Survey) -> str:
    """A portable file has no place for more than factors: where there is more, a merge."""
    more = seen.extras or any("magnitude" in layer.keys for layer in seen.layers.values())
    return MERGE if repair == PORTABLE and more else repair


def _some(found: Sequence[str]) -> str:
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more


def _ratios(engine: Engine, seen: Survey) -> dict[str, float]:
    """The engine's scale over the right one, where the two differ."""
    if not engine.blind:
        return {}
    found = {}
    for name, layer in seen.layers.items():
        ratio = engine.scale(seen, layer) / layer.scaling if layer.scaling else math.inf
        if not math.isclose(ratio, 1.0, rel_tol=1e-6):
            found[name] = ratio
    return found


def _range(ratios: Iterable[float]) -> str:
    low, high = min(ratios := list(ratios)), max(ratios)
    return f"{low:.3g}×" if math.isclose(low, high, rel_tol=1e-3) else f"{low:.3g}× to {high:.3g}×"


def _errors(
    seen: Survey, there: Mapping[str, Placed], findings: Sequence[Finding], ratios: Mapping[str, float], lost: Starts
) -> dict[str, float]:
    """By layer, how far the engine's change is from the trained one, where that is known and not zero."""
    if any(finding.verdict is Verdict.REFUSES for finding in findings):
        return {}
    effects: dict[str, set[Effect]] = {}
    for finding in findings:
        for name in finding.layers if finding.effect else ():
            effects.setdefault(name, set()).add(finding.effect)  # type: ignore[arg-type]
    found = {}
    for name in {**ratios, **effects}:
        own = effects.get(name, set())
        if name not in there:
            continue
        plain = Effect.PLAIN_START in own
        reader = Reader(ratios.get(name, 1.0), Effect.DROPPED in own, Effect.NO_MAGNITUDE in own, plain)
        error = deviation(there[name], reader, lost.pairs.get(name, {}) if plain else {})
        if error is not None and error > 1e-9:
            found[name] = error
    return found
