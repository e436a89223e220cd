"""What a merge says on the terminal: a bar while it runs, and then what rounding took."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from headstart.files.merging.stream import CheckpointReport

SHOWN = 5


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr, where that is a terminal: call it with what is done, and with all there is."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def merged_lines(report: CheckpointReport, out: str) -> list[str]:
    """The report in words: the layers that lost most, the sum of it, and what to do."""
    worst = sorted(report.lost, key=lambda name: -report.lost[name])
    lines = []
    for name in worst[:SHOWN] if report.worst >= 1e-4 else ():
        lines.append(f"{name}: rounding to {report.dtype} took {report.lost[name]:.2%} of the update")
    if lines and len(worst) > SHOWN:
        lines.append(f"… and {len(worst) - SHOWN} layers that lost less; --json lists them all")
    for name, dropped in sorted(report.dropped.items(), key=lambda one: -one[1])[:1]:
        lines.append(f"--rank dropped at worst {dropped:.2%} of a change's energy ({name})")
    if report.untied:
        lines.append("the embedding and the head are two weights now, and config.json says so")
    if report.how != "streamed":
        lines.append(report.how)
    lost = f"of the update, rounding took {report.median:.2%} in the middle layer, {report.worst:.2%} in the worst"
    lines.append(f"{len(report.lost)} layers merged into {out} ({report.dtype}; {lost})")
    return [*lines, *([report.advice] if report.advice else [])]
