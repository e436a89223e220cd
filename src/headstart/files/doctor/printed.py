"""A diagnosis and an anatomy on a terminal. What a stranger wrote is shown without its control characters."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from headstart.files.doctor.anatomy import Anatomy
from headstart.files.doctor.diagnosis import Diagnosis, Finding, Reading
from headstart.files.doctor.engines import Verdict
from headstart.files.doctor.page import grid, share, shown

if TYPE_CHECKING:
    from rich.console import Console

_COLOURS = {Verdict.LOADS: "green", Verdict.FOREIGN: "", Verdict.DIFFERS: "yellow", Verdict.REFUSES: "red"}


def printable(text: object) -> str:
    """A text in which nothing commands the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def console() -> Console:
    """The terminal's own width; elsewhere one that a log can hold."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False, emoji=False)


def how_far(error: float) -> str:
    """A relative error in words: a share of the update, or how many times it."""
    if error == float("inf"):
        return "all of an update that is zero"
    return f"{error:.3g}× the update" if error >= 1.995 else f"{error:.2%} of the update"


# ------------------------------------------------------------------ the doctor


def print_diagnosis(found: Diagnosis) -> None:
    """Verdicts by engine, then the reasons and what to do about them."""
    from rich.table import Table
    from rich.text import Text

    out, seen = console(), found.survey
    ranks = sorted({layer.rank for layer in seen.layers.values()})
    rank = f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
    start = f", init_lora_weights {seen.init}" if seen.dialect.name == "PEFT" else ""
    out.print(printable(f"{seen.place}: {seen.dialect.name}'s format, {len(seen.layers)} layers{rank}{start}"))
    if found.repeats:
        middle = sorted(found.repeats.values())[len(found.repeats) // 2]
        out.print(f"measured on the base: the factors repeat {max(middle, 0):.0%} of its own weights' directions")
    for fault in found.faults:
        out.print()
        out.print(Text(printable(f"wrong in any engine: {fault.what}"), style="red"))
        out.print(printable(f"    → {fault.repair}"), soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("engine", "verdict", "off by, at worst"):
        table.add_column(title)
    for reading in found.readings:
        said = Text(reading.verdict.value, _COLOURS[reading.verdict])
        if found.faults and reading.verdict is Verdict.LOADS:
            said = Text("loads what is wrong", _COLOURS[Verdict.DIFFERS])
        table.add_row(reading.engine.title, said, printable(_off(reading)))
    out.print()
    out.print(table)
    for (because, repair), readings in _reasons(found.readings).items():
        out.print()
        out.print(printable(f"{', '.join(reading.engine.title for reading in readings)}: {because}"))
        if repair:
            out.print(printable(f"    → {repair}"), soft_wrap=True)  # A command is copied whole.
    ill = [r.engine.title for r in found.readings if r.engine.key in found.asked and r.verdict is not Verdict.LOADS]
    out.print()
    told = (
        f"not well in {', '.join(ill)}" if ill else "not well" if found.faults else "well in every engine asked about"
    )
    out.print(Text(told, style="green" if found.healthy else "red"))


def _off(reading: Reading) -> str:
    if reading.verdict is not Verdict.DIFFERS:
        return ""
    if reading.worst is None:
        return "unknown without the base" if any(f.effect for f in reading.findings) else "unknown"
    name, error = reading.worst
    # An estimated start is worth its order of magnitude.
    return f"{f'roughly {error:,.0f}×' if reading.estimated and error >= 2 else how_far(error)} ({name})"


def _reasons(readings: Sequence[Reading]) -> dict[tuple[str, str], list[Reading]]:
    """The engines by what they have in common to say."""
    found: dict[tuple[str, str], list[Reading]] = {}
    for reading in readings:
        for finding in reading.findings:
            found.setdefault((_because(finding), finding.repair), []).append(reading)
    return found


def _because(finding: Finding) -> str:
    return f"{finding.because} (to know)" if finding.verdict is Verdict.LOADS else finding.because


# ------------------------------------------------------------------ the anatomy


def print_anatomy(found: Anatomy) -> None:
    """What made it, one line a kind of layer through the depth of the model, and the layers that moved most."""
    from rich.table import Table

    out = console()
    size = f"{found.parameters:,} numbers, {found.size / 1e6:.1f} MB"
    out.print(printable(f"{found.place}: {found.format}'s format, {len(found.layers)} layers, {size}"))
    for name, value in found.made.items():
        out.print(printable(f"  {name.replace('_', ' ')}: {shown(value)}"))
    for what, why in found.unread.items():
        out.print(printable(f"  not measured: {what}: {why}"), style="red")
    if not found.layers:
        return
    measured = any(layer.relative is not None for layer in found.layers)
    title = "‖ΔW‖/‖W‖" if measured else "‖ΔW‖"
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("kind", "layers", "rank", title, "effective rank", "through the depth")
    for column in columns:
        table.add_column(column, justify="left" if column in ("kind", "through the depth") else "right")
    top = max(map(share, found.layers))
    _, rows = grid(found.layers)
    for row in rows:
        sizes, ranks = [share(cell) for cell in row.layers], [cell.effective_rank for cell in row.layers]
        table.add_row(
            printable(row.kind),
            str(len(row.layers)),
            _span([cell.rank for cell in row.layers], "{}"),
            _span(sizes, "{:.3g}"),
            _span(ranks, "{:.1f}"),
            "".join(bar(share(cell) / top) if cell and top else " " for cell in row.cells),
        )
    out.print()
    out.print(table)
    out.print()
    most = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("moved most", title, "largest σ", "effective rank", "99 % in", "spectrum"):
        most.add_column(column, justify="left" if column in ("moved most", "spectrum") else "right")
    for layer in sorted(found.layers, key=lambda layer: -share(layer))[:8]:
        steps = layer.spectrum[:: -(-len(layer.spectrum) // 32)]
        most.add_row(
            printable(layer.name),
            f"{share(layer):.3g}",
            f"{layer.spectrum[0]:.3g}",
            f"{layer.effective_rank:.1f} of {layer.rank}",
            str(layer.needed_rank),
            "".join(bar(value / layer.spectrum[0]) if layer.spectrum[0] else " " for value in steps),
        )
    out.print(most)


def _span(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def bar(height: float) -> str:
    """A number from 0 to 1 as a block of that height."""
    return "▁▂▃▄▅▆▇█"[min(7, max(0, round(8 * height) - 1))]
