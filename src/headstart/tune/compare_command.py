"""`headstart compare` at the terminal: flags in, a table and a verdict out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from headstart.errors import BadOption
from headstart.tune.command import quiet
from headstart.tune.recipe import read, resolve

OWN = ("inits", "budget", "ranks", "rates", "seeds", "steps", "storage", "out")  # the others are fields of a run
Watch = Callable[[str, int, int], None]


def answer(given: Mapping[str, Any]) -> int:
    """Compare what the flags say; the exit code."""
    flags = {name: value for name, value in given.items() if value is not None and name not in ("config", "as_json")}
    fields = {name: value for name, value in flags.items() if name not in OWN}
    config = resolve(read(given["config"]) if given["config"] else {}, fields)
    own = {name: flags[name] for name in OWN if name in flags}
    own["inits"] = _listed(own["inits"], "inits", str)
    for name, kind in (("ranks", int), ("rates", float)):
        if name in own:
            own[name] = _listed(own[name], name, kind)
    quiet()
    from headstart.tune.comparing import Question, run

    question = Question(**own, command=command(given))
    say = _to_stderr if given["as_json"] else print
    try:
        with _progress() as watch:
            found = run(question, config, say, watch)
    except KeyboardInterrupt:
        print(f"\nstopped; nothing that is done is lost. To go on: {question.command}", file=sys.stderr)
        return 130
    if given["as_json"]:
        print(found.to_json())
    else:
        _show(found.rows)
        print(f"\n{found.verdict}\n\nwrote {question.out}/results.json  {question.out}/report.html")
    return 0


def command(given: Mapping[str, Any]) -> str:
    """What to type for the same comparison."""
    words = ["headstart", "compare"]
    for name, value in given.items():
        if value is not None and name != "as_json":
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _listed(text: str, name: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        raise BadOption(f"{name} is {text!r}: write values with commas between them") from None


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(rows: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    colours = {"better": "green", "worse": "red", "diverged": "red", "crashed": "red"}
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for place, title in enumerate(rows[0]):
        shown.add_column(title, justify="right" if 0 < place < len(rows[0]) - 1 else "left", overflow="fold")
    for row in rows:
        *cells, last = row.values()
        colour = colours.get(last.split(",")[0])
        shown.add_row(*cells, f"[{colour}]{last}[/]" if colour else last)
    Console(width=None if sys.stdout.isatty() else 150).print("", shown)


@contextmanager
def _progress() -> Iterator[Watch]:
    """A bar over all steps where somebody looks, a line a job where nobody does."""
    if not sys.stderr.isatty():
        yield lambda line, done, total: _to_stderr(f"{done:>6}/{total} {line}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.completed}/{task.total} steps"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.description}", markup=False), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def watch(line: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description=line)

        yield watch
