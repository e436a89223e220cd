"""The command line: one subcommand a verb.

Nothing heavy is imported here, so that help and a mistake in a flag are answered at once. A `HeadstartError` ends in
one line on stderr and exit code 2; HEADSTART_DEBUG=1 shows where it came from.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from headstart.errors import BadOption, ConfigError, HeadstartError, UnknownField

if TYPE_CHECKING:
    from torch import nn

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
Quantised = Annotated[bool, typer.Option("--quantised", help="The frozen matrices in 4 bits; 8 with --bits 8.")]
Bits = Annotated[int, typer.Option(help="Of quantised weights, 4 or 8.")]
Tflops = Annotated[float | None, typer.Option(help="The device's dense peak; left out, this CPU is measured.")]


def main() -> None:
    """The entry point: every deliberate error becomes one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # A terminal that has no arrow gets a question mark, and no traceback.
            stream.reconfigure(errors="replace")
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


Weights = Annotated[str | None, typer.Option(help="One number for each adapter, as 0.7,0.3; 1 where left out.")]
Method = Annotated[str, typer.Option(help="linear, cat (the same sum), svd, ties, dare_linear or dare_ties.")]
Density = Annotated[float, typer.Option(help="Of ties and dare: the share of the elements that is kept.")]
Seed = Annotated[int, typer.Option(help="Of what dare drops.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a model or an adapter that stands at --out.")]


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help=Model)],
    adapters: Annotated[list[str], typer.Argument(help="Adapters in PEFT's format: folders or hub names.")],
    out: Annotated[str, typer.Option(help="The folder to make.")],
    dtype: Annotated[str, typer.Option(help="auto (the base's), float32, bfloat16 or float16.")] = "auto",
    weights: Weights = None,
    method: Method = "linear",
    rank: Annotated[int | None, typer.Option(help="Of svd: the rank of the sum.")] = None,
    density: Density = 0.5,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fold adapters into their base, shard by shard, and save an ordinary model."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise BadOption(f"dtype is {dtype!r}: choose auto, float32, bfloat16 or float16")
    given = _numbers("weights", weights)
    from headstart.tune.command import quiet

    quiet()
    from headstart.tune.merging import merge as fold
    from headstart.tune.progress import merged_lines, progress

    mixture = {"weights": given, "method": method, "rank": rank, "density": density, "seed": seed}
    with progress("merging") as tick:
        report = fold(base, adapters, out, dtype, force=force, progress=tick, **mixture)
    print(json.dumps({"output": out, **report.to_dict()}) if as_json else "\n".join(merged_lines(report, out)))


@app.command()
def combine(
    adapters: Annotated[list[str], typer.Argument(help="Adapters in PEFT's format: folders or hub names.")],
    out: Annotated[str, typer.Option(help="The folder to make.")],
    weights: Weights = None,
    method: Method = "linear",
    rank: Annotated[int | None, typer.Option(help="Of svd, ties and dare: the rank of the result.")] = None,
    density: Density = 0.5,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make one adapter that does what several do together, without their base."""
    given = _numbers("weights", weights)
    from headstart.files.merging.combine import combine as join

    report = join(adapters, out, weights=given, method=method, rank=rank, density=density, seed=seed, force=force)
    if as_json:
        print(json.dumps({"output": out, **report.to_dict()}))
        return
    print(report.summary(out))


def _numbers(name: str, text: str | None) -> list[float] | None:
    """Numbers with commas between them."""
    try:
        return None if text is None else [float(word) for word in text.split(",")]
    except ValueError:
        raise BadOption(f"{name} is {text!r}: give numbers with commas between them, as 0.7,0.3") from None


@app.command()
def export(
    adapter: Annotated[str, typer.Argument(help="An adapter in PEFT's format: a folder or a hub name.")],
    out: Annotated[str, typer.Option(help="The folder to write; for gguf and kohya, the file.")],
    profile: Annotated[str, typer.Option(help="portable, compact, gguf, mlx or kohya.")] = "portable",
    base: Annotated[str | None, typer.Option(help=f"What it is for; gguf asks for it. {Model}")] = None,
    initial: Annotated[
        str | None, typer.Option(help="Where the start replaced the base's weights: the adapter saved before training.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the written factors; larger ones are truncated.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the file's own, or float32), float32, bfloat16, float16.")] = "auto",
    prefix: Annotated[str | None, typer.Option(help="Of kohya's names, as lora_unet, lora_te1 or lora_te2.")] = None,
    as_json: Json = False,
) -> None:
    """Write an adapter so that another program means the same by it, and say what the conversion cost."""
    from headstart.tune.command import quiet

    quiet()
    from headstart.tune.exporting import export as send

    report = send(adapter, out, profile, base, initial=initial, rank=rank, dtype=dtype, prefix=prefix)
    print(json.dumps(report.to_dict()) if as_json else report)


@app.command()
def doctor(
    adapter: Annotated[str, typer.Argument(help="Any adapter: a folder, a .safetensors file, or a hub name.")],
    base: Annotated[str | None, typer.Option(help=f"What it is for, to measure on. {Model}")] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="Must be well: peft, vllm, sglang, lorax, llama.cpp, mlx, diffusers or kohya. Repeatable."),
    ] = None,
    restore: Annotated[
        str | None, typer.Option(help="A folder to write: an unconverted PiSSA or OLoRA, mended. Needs --base.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Which engines load an adapter, which refuse it, and which load it and compute something else.

    Exit code 0: well in the engines asked about. 1: something is wrong, and said. 2: no adapter, or a mistaken flag.
    """
    from headstart.files.doctor.examine import doctor as examine

    if restore is not None and base is None:
        raise BadOption("--restore computes what the base lost: pass --base")
    model = _base(base)
    if restore is not None and model is not None:
        from headstart.files.doctor.restore import restore as mend

        adapter = str(mend(adapter, model, restore))
    found = examine(adapter, model, engines=engine, base_name=base or "BASE")
    if as_json:
        print(found.to_json())
    else:
        from headstart.files.doctor.printed import print_diagnosis

        print_diagnosis(found)
    raise typer.Exit(0 if found.healthy else 1)


@app.command("inspect")
def anatomy(
    adapter: Annotated[str, typer.Argument(help="Any adapter: a folder, a .safetensors file, or a hub name.")],
    base: Annotated[str | None, typer.Option(help=f"What it is for, to measure against. {Model}")] = None,
    html: Annotated[str | None, typer.Option(help="A file: write everything as one page, too.")] = None,
    as_json: Json = False,
) -> None:
    """Norms, spectra and effective ranks of an adapter, layer by layer, and what made it."""
    from headstart.files.doctor.anatomy import inspect as take_apart

    found = take_apart(adapter, _base(base))
    if html is not None:
        from pathlib import Path

        from headstart.files.atomic import write_text
        from headstart.files.doctor.page import to_html

        write_text(Path(html), to_html(found))
    if as_json:
        print(found.to_json())
        return
    from headstart.files.doctor.printed import print_anatomy

    print_anatomy(found)


def _base(name: str | None) -> nn.Module | None:
    """A base model to look at, in the dtype that its weights are stored in."""
    if name is None:
        return None
    from headstart.tune.command import quiet

    quiet()
    from headstart.tune import models

    return models.viewed(models.find(name))


@app.command()
def compare(
    model: Annotated[str, typer.Option(help=Model)],
    data: Annotated[str, typer.Option(help="A file, a hub name, or 'stdlib', as `headstart tune` takes it.")],
    inits: Annotated[str, typer.Option(help="The starts, the baseline first.")] = "kaiming,pissa,lora_one,eva",
    budget: Annotated[str | None, typer.Option(help="A time such as 30min or 2h.")] = None,
    ranks: Annotated[str | None, typer.Option(help="Ranks to cross the starts with, as 8,64.")] = None,
    rates: Annotated[str | None, typer.Option(help="Rates to try; left out, 11 round each start's own.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs that each arm is judged by; left out, 3 to 5.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of a run; left out, what the budget buys, or 200.")] = None,
    preserve: Annotated[str | None, typer.Option(help="Data that is not to be forgotten.")] = None,
    storage: Annotated[str | None, typer.Option(help="A database for several machines, as Optuna names it.")] = None,
    out: Annotated[str, typer.Option(help="Folder for results.json, report.html, study.db.")] = "headstart-compare",
    batch_size: Annotated[int | None, typer.Option(help="Rows a step.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a row.")] = None,
    target_modules: Annotated[str | None, typer.Option(help="As `headstart tune` takes it.")] = None,
    config: Annotated[str | None, typer.Option(help="A YAML file of `headstart tune`'s other fields.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all of them where left out.")] = None,
    as_json: Json = False,
) -> None:
    """Which start is best here, each at its own rate: a table, a verdict, results.json and report.html."""
    given = dict(locals())
    from headstart.tune.compare_command import answer

    raise typer.Exit(answer(given))


@app.command()
def estimate(
    model: Annotated[str, typer.Option(help=f"{Model} Or a config.json.")],
    init: Annotated[str, typer.Option(help="The start; `headstart inits` lists them.")] = "kaiming",
    r: Annotated[int, typer.Option("--r", help="Rank.")] = 16,
    target_modules: Annotated[str, typer.Option(help="'all-linear', names, or a regular expression.")] = "all-linear",
    exclude_modules: Annotated[str | None, typer.Option(help="Names or a regular expression.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch", help="Rows a forward pass.")] = 8,
    max_length: Annotated[int, typer.Option("--max-length", "--length", help="Tokens a row.")] = 1024,
    gradient_accumulation: Annotated[int, typer.Option(help="Forward passes a step.")] = 1,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the frozen weights; auto: the checkpoint's own.")] = "auto",
    quantised: Quantised = False,
    bits: Bits = 4,
    optimizer: Annotated[str, typer.Option(help="adamw, lora_plus, preconditioned, adamw_8bit or sgd.")] = "adamw",
    calibration_batches: Annotated[int, typer.Option(help="Read by a start that looks at data.")] = 16,
    loss: Annotated[str, typer.Option(help="tiled, as `headstart tune`; whole, as a plain loop.")] = "tiled",
    steps: Annotated[int | None, typer.Option(help="Of the run, for its time.")] = None,
    tflops: Tflops = None,
    as_json: Json = False,
) -> None:
    """The memory and time that an init and a run take, from the model's config alone."""
    given = dict(locals())
    from headstart.choose.command import estimated

    print(estimated(given))


@app.command()
def advise(
    model: Annotated[str, typer.Option(help=f"{Model} Or a config.json.")],
    data: Annotated[str | None, typer.Option(help="What it will learn, as `headstart tune` takes it.")] = None,
    memory: Annotated[str | None, typer.Option(help="The limit, such as 16GB.")] = None,
    quantised: Quantised = False,
    bits: Bits = 4,
    preserve: Annotated[str | None, typer.Option(help="Data of what is not to be forgotten.")] = None,
    serve: Annotated[str | None, typer.Option(help="peft, vllm, sglang, lorax, llama.cpp, ollama or mlx.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of the run; left out, one pass over the data.")] = None,
    sweep: Annotated[int, typer.Option(help="How many runs you can afford to find the rate.")] = 1,
    trainable: Annotated[int | None, typer.Option(help="Numbers that may train at most.")] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank, where it is settled.")] = None,
    target_modules: Annotated[str | None, typer.Option(help="Where they are settled.")] = None,
    exclude_modules: Annotated[str | None, typer.Option(help="Names or a regular expression.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", "--batch", help="Rows a step.")] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", "--length", help="Tokens a row.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the frozen weights.")] = None,
    tflops: Tflops = None,
    as_json: Json = False,
) -> None:
    """Which init, rank, targets and rate, with reasons: in a second, and without training."""
    given = dict(locals())
    from headstart.choose.command import advised

    print(advised(given))


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
