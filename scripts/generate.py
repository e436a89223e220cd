"""Write what the README and the documentation say about the code, from the code.

    python scripts/generate.py            write
    python scripts/generate.py --check    write nothing; fail where something is stale

The table of strategies comes from the registry, the tree from the modules' first lines, the benchmark tables from
benchmarks/results, the command reference from the command line itself. In README.md and the pages of evidence and
theory only what stands between `<!-- name -->` and `<!-- /name -->` is replaced.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from headstart.inits import strategy
from headstart.tune.facts import on_a_small_matrix

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "headstart"
RESULTS = ROOT / "benchmarks" / "results"
THEORY = RESULTS / "theory.json"
RATES = RESULTS / "rates.json"
EVIDENCE = RESULTS / "evidence"  # a comparison a task
TABLES = {THEORY, RATES}  # of pages of their own
NOTE = "<!-- Written by scripts/generate.py: change the code, then run it again. -->\n\n"

# Elsewhere the alphabet rules.
READING_ORDER = (
    "errors",
    "linalg",
    "statistics",
    "inits",
    "strategy",
    "lora",
    "config",
    "matrix",
    "branch",
    "layers",
    "adapt",
    "files",
    "peft",
    "choose",
    "tune",
    "testing",
    "cli",
)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


# --- strategies


def registered() -> list[strategy.Strategy]:
    return [strategy.get(name)[0] for name in strategy.names()]


def first_step(factors: strategy.Factors) -> str:
    """What a start does to the function."""
    if factors.anchored:
        return "kept (anchored)"
    if factors.core is not None:
        return "moves" if factors.core.any() else "kept (core = 0)"
    return "kept (B·A = 0)" if float((factors.B @ factors.A).norm()) < 1e-6 else "moves"


def settings(values: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in values)


def source_link(entry: strategy.Strategy) -> str:
    label = entry.paper.replace("https://arxiv.org/abs/", "arXiv ").removeprefix("https://")
    return f"[{label}]({entry.paper})"


def strategies_table(page: str) -> str:
    """One line a strategy; `page` is where its section stands, seen from the table."""
    header = ["`init_lora_weights`", "what it does", "reads", "function at step zero", "options", "source"]
    rows = []
    for entry in registered():
        reads = ", ".join(entry.needs) or ("the weight" if entry.reads_weight else "the shape")
        name = f"[`{entry.name}`]({page}#{entry.name})"
        rows.append(
            [
                name,
                entry.fact,
                reads,
                first_step(on_a_small_matrix(entry, {})),
                settings(entry.options.items()),
                source_link(entry),
            ]
        )
    return table(header, rows)


def strategies_page() -> str:
    text = (
        f"{NOTE}# Strategies\n\n"
        "Each is one file in `src/headstart/inits`, a pure function from a weight, or its shape, to two factors. "
        "The letters are the same everywhere: W (m, n) is the weight seen as (out, in), r the rank, s the scaling, "
        "A (r, n) and B (m, r) the factors.\n\n"
        "*Kept* means that the adapted model computes the base model's function before the first step: because "
        "B·A = 0, or because the start is *anchored* (see [design](design.md#anchoring)).\n\n"
        f"{strategies_table('')}\n"
        "PEFT's spellings are understood: `True` is `kaiming`, `False` is `random`, `pissa_niter_N` is `pissa` with "
        "`niter=N`.\n"
    )
    for module, group in itertools.groupby(registered(), lambda entry: inspect.getmodule(entry.function)):
        for entry in group:
            factors = on_a_small_matrix(entry, {})
            trained = [letter for letter in "AB" if letter not in factors.frozen]
            facts = [f"**function at step zero** {first_step(factors)}", f"**trains** {', '.join(trained)}"]
            facts += [f"**needs** {', '.join(entry.needs)}"] if entry.needs else []
            facts += [f"**options** {settings(entry.options.items())}"] if entry.options else []
            facts += [f"**preset** {settings(entry.preset.items())}"] if entry.preset else []
            text += f"\n## {entry.name}\n\n{entry.fact[0].upper()}{entry.fact[1:]}. {source_link(entry)}\n\n"
            text += "".join(f"- {fact}\n" for fact in facts)
        text += f"\n{inspect.getdoc(module)}\n"
    return text


# --- the tree


def first_line(module: Path) -> str:
    """The first sentence of a module, as far as it stands on the first line."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n")[0]


def reading_order(path: Path) -> tuple[int, str]:
    known = READING_ORDER.index(path.stem) if path.stem in READING_ORDER else len(READING_ORDER)
    return known, path.name


def branches(folder: Path, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Lines of the tree below a folder, each with its comment."""
    modules = [p for p in folder.glob("*.py") if p.name != "__init__.py"]
    packages = [p for p in folder.iterdir() if p.is_dir() and any(p.glob("*.py"))]
    entries = sorted([*modules, *packages], key=reading_order)
    for entry in entries:
        last = entry == entries[-1]
        stem = f"{prefix}{'└── ' if last else '├── '}{entry.name}"
        if entry.is_dir():
            about = entry / "__init__.py"
            yield f"{stem}/", first_line(about) if about.exists() else ""
            yield from branches(entry, prefix + ("    " if last else "│   "))
        else:
            yield stem, first_line(entry)


def tree() -> str:
    lines = [("src/headstart/", first_line(PACKAGE / "__init__.py")), *branches(PACKAGE)]
    width = max(len(stem) for stem, _ in lines)
    return "```text\n" + "".join(f"{f'{stem:<{width}}  {comment}'.rstrip()}\n" for stem, comment in lines) + "```\n"


# --- benchmarks

COLUMNS = {
    "work": "work",
    "ours_cpu_s": "headstart, CPU s",
    "peer_cpu_s": "PEFT, CPU s",
    "ratio": "ratio",
    "ours_mb": "headstart, MB",
    "peer_mb": "PEFT, MB",
    "memory_ratio": "ratio of memory",
    "target": "target",
    "met": "met",
    "note": "note",
}


def cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value}"


def benchmark_tables(level: str) -> str:
    """Each file of results: its facts, then its rows with the columns that they have."""
    text = ""
    for file in sorted(set(RESULTS.glob("*.json")) - TABLES):
        content = json.loads(file.read_text(encoding="utf-8"))
        facts, rows = ({}, content) if isinstance(content, list) else (content, content["rows"])
        used = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
        lines = [[cell(row.get(name)) for name in used] for row in rows]
        told = ", ".join(f"{name} {value}" for name, value in facts.items() if isinstance(value, str | int | float))
        text += f"{level} {file.stem.replace('_', ' ')}\n\n" + (f"{told}\n\n" if told else "")
        text += table([COLUMNS[name] for name in used], lines) + "\n"
    return text.rstrip("\n") + "\n" if text else "No results are committed yet: `make bench` writes them.\n"


def benchmark_summary() -> str:
    """One line for each file of results: how many of its targets are met, and the spread of its ratios."""
    lines = []
    for file in sorted(set(RESULTS.glob("*.json")) - TABLES):
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        stated = [row["met"] for row in rows if row.get("met") is not None]
        spreads = [spread([row[name] for row in rows if row.get(name)]) for name in ("ratio", "memory_ratio")]
        title = file.stem.replace("_", " ")
        link = f"[{title}](docs/benchmarks.md#{file.stem.replace('_', '-')})"
        lines.append([link, str(len(rows)), f"{sum(stated)} of {len(stated)}", *spreads])
    return table(["what", "rows", "targets met", "CPU time, median (least to most)", "memory"], lines)


def spread(ratios: list[float]) -> str:
    """The median and the range of ratios to PEFT, or nothing."""
    if not ratios:
        return ""
    return f"{statistics.median(ratios):.2g}× ({min(ratios):.2g} to {max(ratios):.2g})"


def benchmarks_page() -> str:
    return (
        f"{NOTE}# Benchmarks\n\n"
        "`make bench` measures headstart and PEFT in one run on one machine and writes `benchmarks/results`, from "
        "which these tables are made. Times are CPU seconds, memory is the peak above what was loaded before; a ratio "
        "below one means that headstart needs less.\n\n"
        f"{benchmark_tables('##')}"
    )


def theory_page() -> str:
    """The page as it stands, with the table of every experiment put between its markers."""
    text = (ROOT / "docs" / "theory" / "lora-one.md").read_text(encoding="utf-8")
    for name, result in json.loads(THEORY.read_text(encoding="utf-8"))["experiments"].items():
        text = between(text, name, table(result["header"], [[cell(value) for value in row] for row in result["rows"]]))
    return text


def rates_page() -> str:
    """The page as it stands, with the tables of the sweep put between its markers."""
    text = (ROOT / "docs" / "rates.md").read_text(encoding="utf-8")
    found = json.loads(RATES.read_text(encoding="utf-8"))
    for name in ("verdict", "noise", "cells"):
        rows = [[cell(value) for value in row] for row in found[name]["rows"]]
        text = between(text, name, table(found[name]["header"], rows))
    return text


def gap_page() -> str:
    """The page as it stands, with the table of `benchmarks.rates.gap` put between its markers."""
    found = json.loads((RESULTS / "rates" / "gap.json").read_text(encoding="utf-8"))
    rows = [[cell(value) for value in row] for row in found["rows"]]
    return between((ROOT / "docs" / "gap.md").read_text(encoding="utf-8"), "gap", table(found["header"], rows))


def evidence_page() -> str:
    """The page as it stands, with the table and the verdict of every comparison put between its markers."""
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    for path in sorted(EVIDENCE.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [list(row.values()) for row in found["table"]]
        said = found["verdict"]["headline"]
        text = between(text, path.stem, f"{said}\n\n{table(list(found['table'][0]), rows)}")
    return text


# --- the command line


def commands() -> dict[str, Any]:
    """The commands by name, as click objects. The flags of `tune` are declared apart, for the others' sake."""
    from typer.main import get_command

    from headstart.cli import app
    from headstart.tune.command import app as tune

    group: Any = get_command(app)
    return {**group.commands, "tune": get_command(tune)}


def cli_page() -> str:
    """Every command with its options, as the command line declares them."""
    text = f"{NOTE}# Command line\n"
    for name, command in commands().items():
        context = command.make_context(f"headstart {name}", [], resilient_parsing=True)
        usage = " ".join([f"headstart {name}", *command.collect_usage_pieces(context)])
        text += f"\n## {name}\n\n{inspect.cleandoc(command.help or '')}\n\n```text\n{usage}\n```\n"
        options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
        for panel, group in itertools.groupby(options, lambda option: option.rich_help_panel):
            text += (f"\n### {panel}\n\n" if panel else "\n") + table(["option", "meaning"], map(option_row, group))
    return text


def option_row(option: Any) -> list[str]:
    flags = ", ".join(f"`{flag}`" for flag in [*option.opts, *option.secondary_opts])
    plain = isinstance(option.default, str | int | float) and not isinstance(option.default, bool)
    default = f" (default {option.default})" if plain and option.default != "" else ""
    return [flags, " ".join((option.help or "").split()) + default]


# --- writing


def between(text: str, name: str, content: str) -> str:
    """The text with what stands between the markers of this name replaced."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise SystemExit(f"generate: the page must hold one {start.strip()} and one {end}")
    head, rest = text.split(start)
    return head + start + content + end + rest.split(end)[1]


def readme() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = between(text, "strategies", strategies_table("docs/strategies.md"))
    text = between(text, "tree", tree())
    return between(text, "benchmarks", benchmark_summary())


def generated() -> dict[Path, str]:
    docs = ROOT / "docs"
    return {
        ROOT / "README.md": readme(),
        docs / "strategies.md": strategies_page(),
        docs / "benchmarks.md": benchmarks_page(),
        docs / "cli.md": cli_page(),
        docs / "theory" / "lora-one.md": theory_page(),
        docs / "rates.md": rates_page(),
        docs / "gap.md": gap_page(),
        docs / "evidence.md": evidence_page(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is stale")
    check = parser.parse_args().check
    stale = []
    for path, text in generated().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(text, encoding="utf-8")
    if check and stale:
        sys.exit(f"stale: {', '.join(stale)}: run `python scripts/generate.py`")
    print(f"written: {', '.join(stale)}" if stale else "everything is up to date")


if __name__ == "__main__":
    main()
