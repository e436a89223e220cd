"""What a comparison says, in words: which differences are larger than the noise of the seeds, and what is worth it."""

from __future__ import annotations

from dataclasses import dataclass

from headstart.choose.trials.plan import FEWEST_SEEDS, words
from headstart.choose.trials.result import Arm, Measured


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        headline: in a sentence or two; lines: one for each arm; cautions: what to keep in mind.
        conclusive: whether there were runs enough to tell anything.
    """

    headline: str
    lines: tuple[str, ...]
    cautions: tuple[str, ...]
    conclusive: bool

    def __str__(self) -> str:
        return "\n".join([self.headline, *(f"- {line}" for line in (*self.lines, *self.cautions))])


def verdict(found: Measured) -> Verdict:
    """Judge a comparison."""
    doubts = _doubts(found)
    others = found.arms[1:]
    lines = tuple(_line(arm, found) for arm in others)
    headline = f"No conclusion: {'; '.join(doubts)}." if doubts else _headline(found)
    return Verdict(headline, lines, tuple(_cautions(found)), not doubts)


def _doubts(found: Measured) -> list[str]:
    """Why nothing can be concluded."""
    doubts = [doubt for doubt in found.plan.doubts if "do not fit" not in doubt]
    paired = [len(arm.difference.pairs) if arm.difference else 0 for arm in found.arms[1:] if arm.rate is not None]
    if found.stopped and min(paired, default=0) < FEWEST_SEEDS:
        doubts.append(f"{found.stopped} before every arm had {FEWEST_SEEDS} finished seeds")
    elif found.plan.seeds >= FEWEST_SEEDS and found.baseline.rate is not None and max(paired, default=0) < FEWEST_SEEDS:
        doubts.append(f"no arm finished {FEWEST_SEEDS} seeds that {found.baseline.name} finished, too")
    if found.baseline.rate is None and not found.stopped:
        doubts.append(f"the baseline, {found.baseline.name}, has no rate at which it trains")
    return doubts


def _headline(found: Measured) -> str:
    base = found.baseline.name
    better = [arm for arm in found.arms[1:] if _told(arm) and _gain(arm) > 0]
    worse = [arm for arm in found.arms[1:] if _told(arm) and _gain(arm) < 0]
    if not better and not worse:
        return f"No difference from {base} is larger than the noise of the seeds."
    parts = []
    if better:
        better.sort(key=_gain, reverse=True)
        worth = [arm.name for arm in better if worth_it(arm, found)]
        verb = "beats" if len(better) == 1 else "beat"
        parts.append(f"{_list([arm.name for arm in better])} {verb} {base} by more than the noise of the seeds")
        if len(better) == 1:
            parts[-1] += ", and repays its cost" if worth else ", but does not repay its cost in time"
        else:
            who = "all" if len(worth) == len(better) else _list(worth) if worth else "none"
            parts[-1] += f"; {who} {'repay their' if len(worth) > 1 else 'repays its'} cost"
    if worse:
        verb = "is" if len(worse) == 1 else "are"
        parts.append(f"{_list([arm.name for arm in worse])} {verb} worse than {base}")
    return ". ".join(parts) + "."


def worth_it(arm: Arm, found: Measured) -> bool:
    """Whether an arm that is better saves more time on the way to the baseline's loss than its start costs."""
    return _told(arm) and _gain(arm) > 0 and saved_seconds(arm, found) > arm.cost - found.baseline.cost


def saved_steps(arm: Arm, found: Measured) -> int | None:
    """The steps by which an arm is sooner at the baseline's last training loss."""
    if arm.reached is None or found.baseline.reached is None:
        return None
    return found.baseline.reached - arm.reached


def saved_seconds(arm: Arm, found: Measured) -> float:
    """The time that those steps take."""
    return (saved_steps(arm, found) or 0) * found.step_seconds


def _line(arm: Arm, found: Measured) -> str:
    if arm.loss is None:
        return f"{arm.name}: {_why_nothing(arm, found)}"
    if arm.difference is None:
        return f"{arm.name}: loss {arm.loss:.4f}; too few seeds to compare"
    difference = arm.difference
    size = f"{abs(difference.mean):.3g} {'lower' if difference.mean < 0 else 'higher'} than {found.baseline.name}"
    interval = f"{difference.low:+.3g} to {difference.high:+.3g}"
    if not difference.told:
        if all(value == 0 for value in difference.pairs):
            return f"{arm.name}: the same as {found.baseline.name}, to the bit"
        return f"{arm.name}: no difference told ({interval})"
    said = f"{arm.name}: loss {size} ({interval})"
    if difference.mean > 0:
        return said
    steps, cost = saved_steps(arm, found), arm.cost - found.baseline.cost
    if steps is None or steps <= 0:
        return f"{said}; it is not sooner at {found.baseline.name}'s last training loss"
    price = f"its start costs {words(cost)} more" if cost > 0.05 else "its start costs no more"
    return f"{said}; {steps} of {found.plan.steps} steps sooner there ({words(saved_seconds(arm, found))}), {price}"


def _why_nothing(arm: Arm, found: Measured) -> str:
    if arm.crashed:
        return f"crashed: {arm.crashed[0]}"
    if arm.diverged and arm.rate is None and not found.stopped:
        return f"diverged at every rate it was tried at ({_rates(arm)})"
    return found.stopped or "no run finished"


def _cautions(found: Measured) -> list[str]:
    cautions = []
    for arm in found.arms:
        if arm.at_edge:
            beyond = "above" if arm.at_edge == "high" else "below"
            cautions.append(
                f"{arm.name}'s best rate, {arm.rate:.2g}, is the {arm.at_edge}est that was tried: its true best may "
                f"lie {beyond} it; pass --rates that reach further"
            )
        if arm.rate is not None and len({each["rate"] for each in arm.search}) == 1:
            cautions.append(
                f"{arm.name} was tried at {arm.rate:.2g} alone, which may suit others better: pass more --rates"
            )
        if arm.diverged and arm.loss is not None:
            cautions.append(f"{arm.name} diverged at {_rates(arm)}")
        if arm.crashed and arm.loss is not None:
            cautions.append(f"{arm.name}: {len(arm.crashed)} runs crashed ({arm.crashed[0]})")
        if (lost := found.lost(arm.name)) and arm.loss is not None:
            cautions.append(
                f"{arm.name} did not finish {lost} of {lost + len(arm.losses)} runs at {arm.rate:.2g}: its loss is "
                "that of the others, and may flatter it"
            )
    if not found.plan.alike:
        steps = ", ".join(f"{arm.name} {found.plan.ladder(arm.name).cost}" for arm in found.arms)
        cautions.append(f"the searches took unlike numbers of steps ({steps}): give every arm as many rates")
    cautions += [f"{name} could not begin: {error}" for name, error in found.crashed.items()]
    unsure = [arm.difference.width for arm in found.arms[1:] if arm.difference and not arm.difference.told]
    if unsure and max(unsure) > 0:
        cautions.append(f"a difference below {max(unsure):.2g} could not have been told with {found.plan.seeds} seeds")
    if found.stopped:
        cautions.append(f"not all was run: {found.stopped}; the same command goes on")
    share = found.share_training
    if share < 0.9 and found.seconds:
        rest = {name: spent for name, spent in found.seconds.items() if name != "training"}
        largest = max(rest, key=lambda name: rest[name])
        cautions.append(
            f"{share:.0%} of the time was training; {largest} took {rest[largest] / sum(found.seconds.values()):.0%}"
        )
    return cautions


def _told(arm: Arm) -> bool:
    return arm.difference is not None and arm.difference.told


def _gain(arm: Arm) -> float:
    return -arm.difference.mean if arm.difference else 0.0


def _rates(arm: Arm) -> str:
    return ", ".join(f"{rate:.2g}" for rate in arm.diverged)


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
