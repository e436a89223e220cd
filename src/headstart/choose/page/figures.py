"""The pictures of a comparison, from results.json as a mapping. Each is drawn for a width, wide or narrow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any
from unicodedata import east_asian_width

from headstart.choose.page.canvas import Canvas
from headstart.choose.page.scales import Scale

Results = Mapping[str, Any]


def differences(results: Results, width: int) -> str:
    """Each arm against the baseline: the seeds as dots, the mean, its interval."""
    base, *others = results["arms"]
    rows = [(i, arm) for i, arm in enumerate(others, start=1) if arm["difference"]]
    if not rows:
        return ""
    ends = [v for _, arm in rows for v in (arm["difference"]["low"], arm["difference"]["high"]) if v is not None]
    ends += [pair for _, arm in rows for pair in arm["difference"]["pairs"]]
    narrow = width < 500
    left, step = (14, 62) if narrow else (196, 46)
    x = Scale.of([*ends, 0.0])
    canvas = Canvas(width, 30 + step * len(rows) + 44, x, Scale(0, len(rows)), "differences to the baseline", left)
    canvas.axes(f"loss minus that of {_short(base['name'], 20)}: left is better", "", upright=False)
    canvas.rule((0, 0), (0, len(rows)), "zero")
    for row, (series, arm) in enumerate(rows):
        found, y = arm["difference"], len(rows) - row - (0.64 if narrow else 0.5)
        place = canvas.place(0, y)[1]
        if narrow:
            canvas.text(left, place - 18, arm["name"], "name")
        else:
            canvas.text(left - 14, place + 4, _short(arm["name"], 20), "name end")
        if found["low"] is not None:
            canvas.whisker((found["low"], y), (found["high"], y), series, "" if found["told"] else "faint")
        for seed, pair in enumerate(found["pairs"], start=1):
            at = canvas.place(pair, y)
            canvas.mark(at[0], at[1] + 11, series, f"{arm['name']}, seed {seed}: {pair:+.4f}", 2.4, "seed")
        canvas.dot(found["mean"], y, series, f"{arm['name']}: {found['mean']:+.4f}", 6)
    return str(canvas)


def curves(results: Results, width: int) -> str:
    """Training loss against the step, a mean over seeds with its interval."""
    arms = [(i, arm) for i, arm in enumerate(results["arms"]) if arm["curve"]]
    if not arms:
        return ""
    steps = results["plan"]["steps"]
    smooth = {i: _running(arm["curve"]) for i, arm in arms}
    means = [point[1] for points in smooth.values() for point in points]
    y = Scale.of(means, logarithmic=min(means) > 0 and max(means) > 5 * min(means))
    canvas = Canvas(width, 300 if width < 500 else 380, Scale(0, steps, whole=True), y, "learning curves")
    canvas.axes("training step", "loss" + (" (logarithmic)" if y.logarithmic else ""))
    for i, points in smooth.items():
        canvas.band([(p[0], p[2], p[3]) for p in points], i)
    for i, arm in arms:
        points = smooth[i]
        canvas.line([(p[0], p[1]) for p in points], i)
        every = max(1, len(points) // 5)
        for point in points[every - 1 :: every]:
            canvas.dot(point[0], point[1], i, f"{arm['name']}, step {point[0]:.0f}: {point[1]:.4f}", 4)
    return str(canvas)


def rates(results: Results, arm: Mapping[str, Any], series: int) -> str:
    """One arm's search: loss on the tuning batches against the rate, a line for each rung."""
    every = [t for other in results["arms"] for t in other["search"] if t["loss"] is not None]
    if not every or not arm["search"]:
        return ""
    values = [t["loss"] for t in every]
    y = Scale.of(values, logarithmic=min(values) > 0 and max(values) > 4 * min(values))
    x = Scale.of([t["rate"] for t in arm["search"]], logarithmic=True)
    canvas = Canvas(340, 240, x, y, f"loss against rate for {arm['name']}", 48)
    canvas.axes("learning rate", "loss")
    rungs = sorted({t["rung"] for t in arm["search"]})
    for rung in rungs:
        tried = sorted((t for t in arm["search"] if t["rung"] == rung), key=lambda t: float(t["rate"]))
        depth = f"rung{min(3, 3 - (len(rungs) - 1 - rungs.index(rung)))}"
        canvas.line([(t["rate"], t["loss"]) for t in tried if t["loss"] is not None], series, depth)
        for t in tried:
            if t["loss"] is None:
                at = canvas.place(t["rate"], y.high)
                canvas.text(at[0], at[1] + 12, "×", "failed middle")
                continue
            best = rung == rungs[-1] and t["rate"] == arm["rate"]
            canvas.dot(t["rate"], t["loss"], series, f"{t['rate']:.2g}, {t['step']} steps: {t['loss']:.4f}",
                       6.5 if best else 3.4, "best" if best else depth)  # fmt: skip
    return str(canvas)


def costs(results: Results, width: int) -> str:
    """What an arm gains against what its start costs."""
    base, *others = results["arms"]
    arms = [(i, a) for i, a in enumerate(others, start=1) if a["difference"]]
    if not arms:
        return ""
    gains = [(i, a, -a["difference"]["mean"], a["cost"]) for i, a in arms]
    ends = [-v for _, a in arms for v in (a["difference"]["low"], a["difference"]["high"]) if v is not None]
    x = Scale.of([cost for *_, cost in gains] + [base["cost"]], zero=True)
    canvas = Canvas(width, 280, x, Scale.of([*ends, 0.0]), "gain against cost")
    canvas.axes("seconds that the start takes, calibration included", "loss gained")
    canvas.rule((0, 0), (x.high, 0), "zero")
    labels = []
    for series, arm, gain, cost in gains:
        low, high = -arm["difference"]["high"], -arm["difference"]["low"]
        canvas.whisker((cost, low), (cost, high), series, "thin")
        canvas.dot(cost, gain, series, f"{arm['name']}: {gain:+.4f} for {cost:.2f} s", 6)
        labels.append((arm["name"], *canvas.place(cost, gain)))
    _label(canvas, labels)
    return str(canvas)


def forgetting(results: Results, width: int) -> str:
    """What was learned against what was forgotten."""
    before = results["base"]
    arms = [(i, a) for i, a in enumerate(results["arms"]) if a["kept"] is not None and a["loss"] is not None]
    if not arms or before.get("preserved") is None:
        return ""
    found = [(i, a, before["judging"] - a["loss"], a["kept"] - before["preserved"]) for i, a in arms]
    x, y = Scale.of([p[2] for p in found]), Scale.of([p[3] for p in found])
    canvas = Canvas(width, 300, x, y, "learned against forgotten")
    canvas.axes("learned: how far the loss on the new data fell", "forgotten: how far the loss on the old data rose")
    if y.low < 0 < y.high:
        canvas.rule((x.low, 0), (x.high, 0), "zero")
    for i, arm, learned, forgot in found:
        canvas.dot(learned, forgot, i, f"{arm['name']}: learned {learned:.4f}, forgot {forgot:+.4f}", 7)
    _label(canvas, [(arm["name"], *canvas.place(learned, forgot)) for _, arm, learned, forgot in found])
    return str(canvas)


def moved(results: Results, width: int) -> str:
    """How large the starts are beside the weights, layer by layer."""
    return _layers(results, "moved", width)


def captured(results: Results, width: int) -> str:
    """How much of the weights' energy the starts read, layer by layer."""
    return _layers(results, "captured", width)


def _layers(results: Results, which: str, width: int) -> str:
    """Where the starts point: one number of each layer, in the model's order."""
    starts = [(i, results["starts"].get(arm["name"], [])) for i, arm in enumerate(results["arms"])]
    values = {i: [layer[which] for layer in found] for i, found in starts if any(layer[which] for layer in found)}
    if not values:
        return ""
    count = max(map(len, values.values()))
    percent = which == "captured"
    every = [v for found in values.values() for v in found if v]
    y = Scale.of(every, not percent, zero=percent, percent=percent)
    canvas = Canvas(
        width, 250 if width < 500 else 290, Scale(0.5, count + 0.5, whole=True), y, f"{which}, layer by layer", 60
    )
    titles = {"moved": "‖s·B₀A₀‖ / ‖W‖ (logarithmic)", "captured": "share of ‖W‖² that A₀ reads"}
    canvas.axes("layer, in the model's order", titles[which])
    names = dict(starts)
    for i, found in values.items():
        points = [(place, value) for place, value in enumerate(found, start=1) if value]
        canvas.line(points, i, "thin")
        every_nth = 1 if count <= 40 else math.ceil(count / 20)
        for place, value in points[::every_nth]:
            says = f"{results['arms'][i]['name']}, {names[i][place - 1]['layer']}: {value:.3g}"
            canvas.dot(place, value, i, says, 3.4 if count > 40 else 4.2)
    return str(canvas)


def _running(curve: Sequence[Sequence[float]]) -> list[list[float]]:
    """The curve and its band as running means over a twentieth of it, so that noise of single batches is not drawn."""
    width = max(1, round(len(curve) / 20))
    found = []
    for i in range(len(curve)):
        near = curve[max(0, i - width + 1) : i + 1]
        found.append([curve[i][0], *(math.fsum(point[k] for point in near) / len(near) for k in (1, 2, 3))])
    return found


def _label(canvas: Canvas, labels: list[tuple[str, float, float]]) -> None:
    """Names beside their points, moved apart where they would lie on one another."""
    taken: list[tuple[float, float, float]] = []
    for name, x, y in sorted(labels, key=lambda label: label[2]):
        text = _short(name, 22)
        size = 8.2 * sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)
        start = x + 12 if x + 12 + size < canvas.right else max(4.0, x - 12 - size)
        free = [y + 4 + step for step in (0, 16, -16, 32, -32, 48, -48, 64, 80, 96)]
        place = next((p for p in free if not any(_touch(start, size, p, other) for other in taken)), free[0])
        taken.append((start, size, place))
        canvas.text(start, place, text, "name")


def _touch(start: float, size: float, place: float, other: tuple[float, float, float]) -> bool:
    return abs(place - other[2]) < 16 and start < other[0] + other[1] and other[0] < start + size


def _short(name: str, most: int) -> str:
    widths = [2 if east_asian_width(letter) in "WF" else 1 for letter in name]
    if sum(widths) <= most:
        return name
    return name[: sum(width < most for width in accumulate(widths))] + "…"
