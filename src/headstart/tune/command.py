"""`headstart tune` as a command of its own: one flag for each field of `RunConfig`, generated from it.

Apart from cli.py because building a hundred flags takes longer than every other command's help.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
import yaml

from headstart.tune.recipe import RunConfig, read, resolve

SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    # PEFT and TRL write --lora_alpha, the shell's custom is --lora-alpha: both are understood.
    "token_normalize_func": lambda token: token.replace("_", "-"),
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=SETTINGS)
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for programs.")]
Command = Callable[..., None]


def with_flags(config: type[RunConfig]) -> Callable[[Command], Command]:
    """Give a command one option for each field; it receives all of them, None where not given."""

    def enter(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = [_flag(name, panel) for panel, names in config.panels().items() for name in names]
        command.__signature__ = signature.replace(parameters=[*own, *fields])  # type: ignore[attr-defined]
        return command

    return enter


SHORT = {"init": ["--init-lora-weights"], "learning_rate": ["--lr"]}


def _flag(name: str, panel: str) -> inspect.Parameter:
    field = RunConfig.model_fields[name]
    spelling, is_switch = name.replace("_", "-"), field.annotation is bool
    notes = [", ".join(get_args(field.annotation))] if get_origin(field.annotation) is Literal else []
    if not (field.is_required() or field.default in (None, {}) or is_switch):
        notes.append(f"default {field.default}")
    names = [f"--{spelling}/--no-{spelling}" if is_switch else f"--{spelling}"]
    settings = typer.Option(
        *names,
        *SHORT.get(name, []),
        help=" ".join([str(field.description), *([f"({'; '.join(notes)})"] if notes else [])]),
        metavar=None if is_switch else _metavar(field.annotation),
        rich_help_panel=panel,
        show_default=False,
    )
    kind = Annotated[bool | None if is_switch else str | None, settings]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def _metavar(annotation: Any) -> str:
    kinds = {str: "text", int: "whole", float: "number", bool: "text"}
    found = [kinds.get(arm, "yaml") for arm in _arms(annotation) - {type(None)}]
    if get_origin(annotation) is Literal:
        return "text"
    return found[0] if len(set(found)) == 1 else "number or auto" if "number" in found else "yaml"


def _arms(annotation: Any) -> set[Any]:
    """The types that a value may have."""
    if get_origin(annotation) is Annotated:
        return _arms(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_arms, get_args(annotation)))
    return {annotation}


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were set, as values."""
    return {
        name: value if isinstance(value, bool) else parsed(value, RunConfig.model_fields[name].annotation)
        for name, value in flags.items()
        if value is not None
    }


def parsed(text: str, annotation: Any) -> Any:
    """A flag's text as a config file would have it.

    Text stays text; what may be absent knows `none`; a mapping may be written `niter=16,tolerance=1e-3`.
    """
    arms = _arms(annotation)
    if text == "none" and type(None) in arms:
        return None
    if arms <= {str, type(None)} or get_origin(annotation) is Literal:
        return text
    if get_origin(annotation) is dict and "=" in text:
        pairs = [pair.partition("=") for pair in text.split(",")]
        return {key.strip(): yaml.safe_load(value) for key, _, value in pairs}
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # A regular expression that is no YAML.
        return text


@app.command()
@with_flags(RunConfig)
def tune(
    config: Annotated[str | None, typer.Option(help="A YAML file of the fields below; flags override it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and what it takes.")] = False,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Fine-tune a model: adapter/, run.yaml, metrics.jsonl, loss.png and a model card."""
    run = resolve(read(config) if config else {}, given(flags))
    quiet()
    if dry_run:
        _forecast(run, as_json)
        return
    from headstart.tune.train import run as train
    from headstart.tune.watch import Interrupted

    try:
        finished = train(run, lambda line: print(line, file=sys.stderr if as_json else sys.stdout, flush=True))
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(130) from None
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(vars(finished)) if as_json else finished)


def _forecast(run: RunConfig, as_json: bool) -> None:
    from headstart.tune.auto import followed
    from headstart.tune.memory import forecast

    run = followed(run)
    found = forecast(run)
    if as_json:
        print(json.dumps({"config": run.model_dump(mode="json"), **found.to_dict()}))
    else:
        print(f"{run.to_yaml()}\n{found}")


def quiet() -> None:
    """Keep the libraries' own bars and notes off the screen; HEADSTART_DEBUG=1 lets them speak."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.get("HEADSTART_DEBUG"):
        return
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", module=r"(transformers|trl|peft|torch|accelerate|huggingface_hub|datasets)\b")
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
