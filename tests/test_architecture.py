"""The floors of the package, read from its imports: each imports only from those below it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "headstart"
MODULES = sorted(PACKAGE.rglob("*.py"))

FLOORS = (
    ("errors",),
    ("linalg",),
    ("statistics",),
    ("inits",),
    ("lora",),
    ("files",),
    ("peft",),
    ("choose", "testing"),
    ("tune",),
    ("cli",),
)
FLOOR = {name: height for height, floor in enumerate(FLOORS) for name in floor}
CORE = ("linalg", "statistics", "inits")

HEAVY = ("transformers", "bitsandbytes", "peft", "trl", "optuna", "plotly", "scipy", "pandas", "typer")
VAGUE = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}


def room(module: Path) -> str:
    """The file or package right below `headstart` that a module belongs to."""
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def title(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


def imports(module: Path) -> Iterator[str]:
    """Full names of all that a module imports, wherever in it, `from a import b` as a.b."""
    package = ["headstart", *module.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*inside, *filter(None, [node.module])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def rooms_used(module: Path) -> set[str]:
    """The rooms of this package that a module imports from."""
    return {name.split(".")[1] for name in imports(module) if name.startswith("headstart.")} & FLOOR.keys()


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_room_stands_on_a_floor() -> None:
    assert {room(module) for module in MODULES} - {"__init__", "__main__"} <= FLOOR.keys()


@pytest.mark.parametrize("module", MODULES, ids=title)
def test_imports_go_downwards(module: Path) -> None:
    here = room(module)
    if here not in FLOOR:
        return  # __init__ gathers from everywhere
    wrong = {other for other in rooms_used(module) if other != here and FLOOR[other] >= FLOOR[here]}
    assert not wrong, f"{title(module)} imports {', '.join(sorted(wrong))}: not below {here!r}"


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in CORE], ids=title)
def test_the_core_knows_no_module_and_no_file(module: Path) -> None:
    outside = ("torch.nn", "pathlib", "os", "io", "shutil", "safetensors", *HEAVY)
    wrong = [name for name in imports(module) if any(name == o or name.startswith(f"{o}.") for o in outside)]
    assert not wrong, f"{title(module)} imports {', '.join(wrong)}"


@pytest.mark.parametrize("module", MODULES, ids=title)
def test_a_module_says_what_it_is(module: Path) -> None:
    assert module.stem not in VAGUE, f"{title(module)}: name it after what it does"
    source = module.read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source)), f"{title(module)} has no docstring"


def test_importing_headstart_loads_nothing_heavy() -> None:
    loaded = json.loads(run_python("import json, sys\nfrom headstart import *\nprint(json.dumps(list(sys.modules)))"))
    assert not set(HEAVY) & set(loaded)


def test_public_names_are_sorted_and_there() -> None:
    names = json.loads(run_python("import json, headstart; print(json.dumps(list(headstart.__all__)))"))
    assert names == sorted(names)
    assert len(names) == len(set(names))
    run_python("from headstart import *")
