"""Results → one self-contained HTML page. It works offline, on a phone, in print, in light and dark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from headstart.choose.page import figures
from headstart.choose.page.canvas import SERIES, outline
from headstart.choose.trials.plan import words
from headstart.errors import BadOption

WIDE, NARROW = 890, 360
# What else a caller says of the model and the data is shown under its own name.
KNOWN = ("command", "date", "study", "title", "parameters")


def page(results: Mapping[str, Any]) -> str:
    """The page.

    Args:
        results: as results.json holds them.

    Raises:
        BadOption: if jinja2 is missing.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise BadOption("to write the page, install jinja2: pip install 'headstart[compare]'") from error
    place = files("headstart.choose") / "page"
    source = (place / "report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        style=_raw((place / "style.css").read_text(encoding="utf-8")),
        **_values(results),
    )


def _values(results: Mapping[str, Any]) -> dict[str, Any]:
    facts, arms = results["facts"], results["arms"]
    still = [arm["name"] for arm in arms if not any(layer["moved"] for layer in results["starts"].get(arm["name"], []))]
    return {
        "title": facts.get("title") or f"Which start for {facts.get('model', 'this model')}?",
        "facts": {"command": "", "date": "", "study": "", **facts},
        "verdict": results["verdict"],
        "plan": results["plan"],
        "arms": [{"name": arm["name"], "swatch": swatch(i)} for i, arm in enumerate(arms)],
        "rows": results["table"],
        "columns": list(results["table"][0]),
        "level": 95,
        "tiles": _tiles(results),
        "step": words(results["time"]["step_seconds"]),
        "figures": _figures(results),
        "still": ", ".join(still),
        "shown": _shown(facts),
        "time": _time(results["time"]["seconds"]),
        "failures": _failures(results),
        "both": _both,
    }


def _figures(results: Mapping[str, Any]) -> dict[str, Any]:
    drawn: dict[str, Callable[[Mapping[str, Any], int], str]] = {
        "differences": figures.differences,
        "curves": figures.curves,
        "costs": figures.costs,
        "forgetting": figures.forgetting,
        "moved": figures.moved,
        "captured": figures.captured,
    }
    searched = [
        (arm["name"], swatch(i), "no rate" if arm["rate"] is None else f"best {arm['rate']:.2g}", drawing)
        for i, arm in enumerate(results["arms"])
        if (drawing := figures.rates(results, arm, i))
    ]
    return {name: (draw(results, WIDE), draw(results, NARROW)) for name, draw in drawn.items()} | {"rates": searched}


def _both(drawings: tuple[str, str]) -> Any:
    """A figure in its two widths, of which the style sheet shows one."""
    wide, narrow = drawings
    if not wide:
        return ""
    return _raw(f'<figure class="plate"><div class="wide">{wide}</div><div class="narrow">{narrow}</div></figure>')


def _raw(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


def swatch(series: int) -> str:
    """A line with an arm's colour, dashes and mark."""
    place = series % SERIES
    return (
        f'<svg class="swatch" viewBox="0 0 30 16" aria-hidden="true"><path class="line s{place}" d="M1,8L29,8"/>'
        f'<path class="dot s{place}" d="{outline(series, 15, 8, 5)}"/></svg>'
    )


def _tiles(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    plan, time = results["plan"], results["time"]
    runs = sum(len(arm["losses"]) for arm in results["arms"])
    whole = sum(time["seconds"].values())
    return [
        ("arms", str(len(results["arms"])), f"{plan['seeds']} seeds each, {runs} final runs"),
        ("steps a run", f"{plan['steps']:,}", f"{words(time['step_seconds'])} a step"),
        ("time", words(whole), f"{time['share_training']:.0%} of it in training steps"),
        ("rate searches", f"{time['tuning_steps']:,} steps", f"{time['saved']:.0%} fewer than full grids"),
    ]


def _shown(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [(name, str(value)) for name, value in facts.items() if name not in KNOWN and value not in (None, "")]
    size = facts.get("parameters")
    return found + ([("parameters", f"{size:,}")] if isinstance(size, int) else [])


def _time(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    whole = sum(seconds.values()) or 1.0
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    return [{"name": n, "share": round(s / whole, 4), "percent": f"{100 * s / whole:.1f}"} for n, s in parts if s > 0]


def _failures(results: Mapping[str, Any]) -> list[str]:
    found = [f"{name} could not begin: {error}" for name, error in results["crashed"].items()]
    for arm in results["arms"]:
        found += [f"{arm['name']} at {t['rate']:.2g}: {t['diverged']}" for t in arm["search"] if t["diverged"]]
        found += [f"{arm['name']}: {error}" for error in arm["crashed"]]
    return found
