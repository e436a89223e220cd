"""The command line: one subcommand a verb.

Nothing heavy is imported here, so that help and a mistake in a flag are answered at once. A `HeadstartError` ends in
one line on stderr and exit code 2; HEADSTART_DEBUG=1 shows where it came from.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from typing import Annotated

import typer

from headstart.errors import BadOption, ConfigError, HeadstartError, UnknownField

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# typer exports no name for its usage errors, only this one kind of them.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for programs.")]
Model = "A hub name, a local folder, a GGUF file, or 'smollm2'."


def main() -> None:
    """The entry point: every deliberate error becomes one line and an exit code."""
    try:
        sys.exit(app(prog_name="headstart", standalone_mode=False) or 0)
    except typer.Abort:  # What older versions of typer make of Ctrl-C; newer ones return 130.
        sys.exit(130)
    except HeadstartError as error:
        if os.environ.get("HEADSTART_DEBUG"):
            raise
        _fail(type(error).__name__, str(error))
    except UsageError as error:  # A flag that does not exist is told like a field that does not exist.
        message = error.format_message()  # type: ignore[attr-defined]
        _fail((UnknownField if message.startswith("No such") else ConfigError).__name__, message)


def _fail(kind: str, message: str) -> None:
    print(f"{kind}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """LoRA whose heart is initialization: fine-tune a language model with the start of your choice."""
    if version:
        from headstart import __version__

        print(f"headstart {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def tune(context: typer.Context) -> None:
    """Fine-tune a model; `headstart tune --help` lists its fields."""
    from headstart.tune.command import app as fields

    raise typer.Exit(fields(context.args, prog_name="headstart tune", standalone_mode=False) or 0)


@app.command()
def demo(
    model: Annotated[str, typer.Option(help=Model)] = "smollm2",
    output: Annotated[str | None, typer.Option(help="Folder to write to; a new one where left out.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all of them where left out.")] = None,
) -> None:
    """Teach SmolLM2 to write docstrings, from Python's own standard library, in minutes on a CPU."""
    from headstart.tune.command import quiet

    quiet()
    from headstart.tune.demo import run_demo
    from headstart.tune.watch import Interrupted

    try:
        run_demo(model, output, threads)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help=Model)],
    adapter: Annotated[str, typer.Argument(help="An adapter in PEFT's format: a folder or a hub name.")],
    out: Annotated[str, typer.Option(help="The folder to make.")],
    dtype: Annotated[str, typer.Option(help="auto (the base's), float32, bfloat16 or float16.")] = "auto",
    as_json: Json = False,
) -> None:
    """Fold an adapter into its base, and save an ordinary model."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise BadOption(f"dtype is {dtype!r}: choose auto, float32, bfloat16 or float16")
    from headstart.tune.command import quiet

    quiet()
    from headstart.tune.merging import merge as fold

    report, kept = fold(base, adapter, out, dtype)
    if as_json:
        print(json.dumps({"output": out, "dtype": kept, "lost": dict(report.lost)}))
        return
    for name, lost in report.lost.items() if report.worst > 0 else ():
        print(f"{name}: rounding to {kept} took {lost:.2%} of the update")
    print(f"{len(report.lost)} layers merged into {out} ({kept}; at worst {report.worst:.2%} of an update lost)")


@app.command()
def inits(as_json: Json = False) -> None:
    """The starts: what each needs, whether it is anchored, what it costs, where it is published."""
    from headstart.tune.facts import table

    rows = table()
    if as_json:
        print(json.dumps(rows))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("init", "needs", "anchored", "trains", "options", "what it is, and its cost", "paper"):
        shown.add_column(title, overflow="fold")
    for row in rows:
        shown.add_row(
            row["name"],
            ", ".join(row["needs"]) or "nothing",
            "yes" if row["anchored"] else "no",
            row["trains"],
            ", ".join(row["options"]),
            row["fact"],
            row["paper"].removeprefix("https://"),
        )
    Console(width=None if sys.stdout.isatty() else 180).print(shown)


@app.command()
def explain(name: Annotated[str, typer.Argument(help="A start, as `headstart inits` lists it.")]) -> None:
    """A start's own file: the mathematics, and how to call it."""
    from headstart.inits import get

    function = inspect.unwrap(get(name)[0].function)
    print(inspect.getdoc(inspect.getmodule(function)))
    print(f"\n{function.__name__}{inspect.signature(function)}\n")
    print(inspect.getdoc(function))


if __name__ == "__main__":
    main()
