"""The documentation runs: every Python block of a page, in order, and every flag of a command."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import generate
from headstart.inits import strategy

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "index.md"]
PAGES += sorted((ROOT / "docs" / "howto").glob("*.md"))
NEEDS = {"docs/howto/quantized.md": "bitsandbytes"}  # of the extras that not everyone installs
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def workplace(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which the hub name that the pages use is a folder with a tiny model.

    What a page registers is forgotten after it.
    """
    shutil.copytree(checkpoint, tmp_path / HUB_NAME)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(strategy, "_registry", dict(strategy._registry))
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_the_python_of_a_page_runs(page: Path, workplace: Path) -> None:
    if name(page) in NEEDS:
        pytest.importorskip(NEEDS[name(page)])
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, code in blocks(page, "python"):
        # The line numbers in a traceback are those of the page.
        exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), namespace)


def command_lines(page: Path) -> list[list[str]]:
    """The words of every `headstart …` command in a page's shell blocks, without the program's name."""
    joined = [code.replace("\\\n", " ") for _, code in blocks(page, "bash")]
    lines = [line.split("#")[0].split() for code in joined for line in code.splitlines()]
    called = [(words, {"headstart", "headstart.cli"}.intersection(words)) for words in lines]
    return [words[words.index(min(names)) + 1 :] for words, names in called if names]


@pytest.mark.parametrize("page", [page for page in PAGES if command_lines(page)], ids=name)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    known = generate.commands()
    for title, *words in command_lines(page):
        assert title in known, f"there is no `headstart {title}`"
        flags = {word.split("=")[0] for word in words if word.startswith("-")}
        missing = flags - {flag for option in known[title].params for flag in [*option.opts, *option.secondary_opts]}
        assert not missing, f"headstart {title} knows no {', '.join(missing)}"


def test_what_is_generated_is_up_to_date() -> None:
    stale = [name(page) for page, text in generate.generated().items() if page.read_text(encoding="utf-8") != text]
    assert not stale, f"run `python scripts/generate.py`: {', '.join(stale)} differ from the code"
