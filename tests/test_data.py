"""From files to rows: every format, every shape of data, and every way in which a file can be wrong."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headstart.errors import DataError
from headstart.tune import docstrings
from headstart.tune.recipe import RunConfig, resolve

pytest.importorskip("datasets", reason="the extra headstart[train]")

from headstart.tune import data, reading


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` converts goes where the test's files are."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


PAIRS = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}"} for i in range(20)]
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "a number?"},
    {"role": "assistant", "content": "seven"},
]
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<eos>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<eos>{% endif %}{% endfor %}"
)


def recipe(path: Path | str, **fields: Any) -> RunConfig:
    return resolve({"model": "none", "data": str(path), "eval_fraction": 0, **fields})


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def _parquet(path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([{"question": "a", "answer": "b", "id": 1}] * 3).to_parquet(str(path))


def _bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


FILES: dict[str, tuple[str | Callable[[Path], None], dict[str, str]]] = {
    "pairs.jsonl": ('{"prompt": "a", "completion": "b"}\n' * 3, {"prompt": "a", "completion": "b"}),
    "alpaca.json": ('[{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]', {"prompt": "a"}),
    "gsm.csv": ("question,answer,level\na,b,1\nc,d,2\n", {"prompt": "a", "completion": "b"}),
    "numbers.csv": ("prompt,completion\n1,2\n3,4\n", {"prompt": "1", "completion": "2"}),
    "tabs.tsv": ("input\toutput\na, b\tc\n", {"prompt": "a, b", "completion": "c"}),
    "gsm.parquet": (_parquet, {"prompt": "a", "completion": "b"}),
    "story.txt": ("one\ntwo\n\nthree\n", {"text": "one\ntwo"}),
    "lines.txt": ("one\ntwo\nthree\n", {"text": "one"}),
    "windows.txt": (lambda path: _bytes(path, b"one\r\ntwo\r\n\r\nthree\r\n"), {"text": "one\ntwo"}),
    "dates.jsonl": ('{"prompt": "a", "completion": "2024-01-02"}\n', {"completion": "2024-01-02"}),
    "dates.json": ('[{"prompt": "a", "completion": "2024-01-02T00:00:00Z"}]', {"completion": "2024-01-02T00:00:00Z"}),
    "text.jsonl": ('{"text": "a", "meta": 3}\n', {"text": "a"}),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_read_and_its_columns_recognised(name: str, tmp_path: Path, tokenizer: Any) -> None:
    content, first = FILES[name]
    path = tmp_path / name
    content(path) if callable(content) else write(path, content)
    rows = data.prepare(recipe(path), tokenizer).train
    assert {**rows[0], **first} == rows[0]
    assert set(rows.column_names) in ({"text"}, {"prompt", "completion"})


@pytest.mark.parametrize("name", ["dates.jsonl", "dates.json"])
def test_dates_as_written_stand_beside_every_row_s_columns(name: str, tmp_path: Path) -> None:
    rows = [{"day": "2024-01-02"}, {"day": "2024-01-03", "prompt": "a", "completion": "b"}]
    path = jsonl(tmp_path / name, rows) if name == "dates.jsonl" else write(tmp_path / name, json.dumps(rows))
    read = reading.read(str(path))
    assert read.column_names == ["day", "prompt", "completion"]
    assert read[1] == rows[1]


WRONG: dict[str, tuple[str, str, dict[str, Any]]] = {
    "no.jsonl": ("", "empty", {}),
    "what.xyz": ("a", "cannot tell what .*what.xyz", {}),
    "cut.jsonl": ('{"text": "a"}\n{"text": "b"}\n{"text": "c\n', "line 3 is no JSON", {}),
    "list.jsonl": ('{"text": "a"}\n[1, 2]\n', "line 2 is no JSON object", {}),
    "broken.json": ("{", "cannot read", {}),
    "columns.csv": ("x,y\n1,2\n", "columns are 'x', 'y'; name them with --text-column", {}),
    "half.csv": ("prompt,y\n1,2\n", "needs a completion", {"prompt_column": "prompt"}),
    "both.csv": ("prompt,y\na,b\n", "two kinds", {"prompt_column": "prompt", "text_column": "y"}),
    "absent.csv": ("text\na\n", "no column 'body' in .*: it has 'text'", {"text_column": "body"}),
    "cell.csv": ("prompt,completion\na,b\nc,\n", "row 2 of .*'completion' is empty", {}),
    "ragged.csv": ("prompt,completion\na,b\nc,d,e\n", "Expected 2 fields in line 3, saw 3", {}),
    "shifted.csv": ("prompt,completion\na,b,c\nd,e,f\n", "more cells than the header has names", {}),
    "numbers.jsonl": ('{"prompt": "a", "completion": 3}\n', "row 1 of .*'completion' is int, not text", {}),
    "gaps.jsonl": ('{"text": "a"}\n{"text": " "}\n', "row 2 of .*'text' is empty", {}),
    "null.jsonl": ('{"text": "a"}\n{"text": null}\n', "row 2 of .*'text' is NoneType", {}),
    "few.jsonl": ('{"text": "a"}\n' * 3, "too few rows to split: 0.05 of 3 is 0", {"eval_fraction": 0.05}),
    "silent.jsonl": ('{"messages": [{"role": "user", "content": "a"}]}\n', "no assistant turn", {}),
    "odd.jsonl": ('{"messages": [{"who": "user", "says": "a"}]}\n', r"a message with \['says', 'who'\]", {}),
    "mute.jsonl": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}\n',
        "row 1 of .*a message without content",
        {},
    ),
    "plain.jsonl": ('{"text": "a"}\n', "plain text has no turns", {"as_chat": True}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_wrong_is_told_with_the_place(name: str, tmp_path: Path, tokenizer: Any) -> None:
    content, message, fields = WRONG[name]
    with pytest.raises(DataError, match=message):
        data.prepare(recipe(write(tmp_path / name, content), **fields), tokenizer)


def test_a_wrong_row_is_named_by_its_place_in_the_file_that_holds_it(tmp_path: Path, tokenizer: Any) -> None:
    right, wrong = jsonl(tmp_path / "a.jsonl", PAIRS), jsonl(tmp_path / "b.jsonl", [*PAIRS, {**PAIRS[0], "prompt": ""}])
    with pytest.raises(DataError, match=r"row 21 of .*b.jsonl"):
        data.prepare(recipe(wrong, eval_fraction=0.25), tokenizer)
    with pytest.raises(DataError, match=r"row 21 of .*b.jsonl"):
        data.prepare(recipe(right, eval_data=str(wrong), eval_rows=3), tokenizer)


def test_a_path_to_nothing_is_told_and_never_asked_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data at .*gone.jsonl"):
        reading.read(str(tmp_path / "gone.jsonl"))
    with pytest.raises(DataError, match=r"no data at 'gone.csv'"):
        reading.read("gone.csv")


def test_a_hub_name_that_cannot_be_reached_is_a_data_error() -> None:
    with pytest.raises(DataError, match="cannot load 'nobody/nothing'"):
        reading.read("nobody/nothing")


def test_named_columns_win_over_usual_ones(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b", "body": "c"}])
    assert data.prepare(recipe(path, text_column="body"), tokenizer).train[0] == {"text": "c"}
    swapped = recipe(path, prompt_column="completion", completion_column="prompt")
    assert data.prepare(swapped, tokenizer).train[0] == {"prompt": "b", "completion": "a"}


def test_the_split_keeps_every_row_on_one_side_and_depends_on_the_seed_alone(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "d.jsonl", PAIRS)
    rows = [data.prepare(recipe(path, eval_fraction=0.25, seed=seed), tokenizer) for seed in (1, 1, 2)]
    sides = [({row["prompt"] for row in part.train}, {row["prompt"] for row in part.held_out}) for part in rows]
    assert all(len(train) == 15 and len(held_out) == 5 and not train & held_out for train, held_out in sides)
    assert sides[0] == sides[1] != sides[2]


def test_held_out_data_of_its_own(tmp_path: Path, tokenizer: Any) -> None:
    path, other = jsonl(tmp_path / "d.jsonl", PAIRS), jsonl(tmp_path / "e.jsonl", PAIRS[:7])
    rows = data.prepare(recipe(path, eval_data=str(other), eval_rows=5), tokenizer)
    assert len(rows.train) == 20
    assert len(rows.held_out) == 5
    strange = jsonl(tmp_path / "f.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="held-out data has no column 'prompt'"):
        data.prepare(recipe(path, eval_data=str(strange)), tokenizer)


def test_a_template_without_marks_leaves_the_last_assistant_turn(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"messages": [*CHAT, {"role": "user", "content": "bye"}]}])
    rows = data.prepare(recipe(path), tokenizer)
    assert not rows.assistant_only
    assert rows.train[0] == {"prompt": CHAT[:3], "completion": CHAT[3:]}


def test_a_template_with_marks_keeps_all_assistant_turns(tmp_path: Path, tokenizer: Any) -> None:
    from copy import deepcopy

    marked = deepcopy(tokenizer)
    marked.chat_template = MARKED
    rows = data.prepare(recipe(jsonl(tmp_path / "d.jsonl", [{"messages": CHAT}])), marked)
    assert rows.assistant_only
    assert rows.train[0] == {"messages": CHAT}


def test_sharegpt_and_pairs_become_chat(tmp_path: Path, tokenizer: Any) -> None:
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
    rows = data.prepare(recipe(jsonl(tmp_path / "d.jsonl", [{"conversations": turns}])), tokenizer)
    assert rows.train[0] == {"prompt": CHAT[:1], "completion": CHAT[1:2]}
    pair = [{"prompt": "hello", "completion": " good day"}]
    rows = data.prepare(recipe(jsonl(tmp_path / "e.jsonl", pair), as_chat=True), tokenizer)
    assert rows.train[0] == {"prompt": CHAT[:1], "completion": CHAT[1:2]}


def test_chat_needs_a_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    from copy import deepcopy

    plain = deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        data.prepare(recipe(jsonl(tmp_path / "d.jsonl", [{"messages": CHAT}])), plain)


def test_the_standard_library_gives_thousands_of_pairs_split_by_module() -> None:
    pairs = docstrings.pairs()
    assert len(pairs) > 3000
    held_out = {pair.module for pair in pairs if docstrings.is_held_out(pair.module)}
    assert 0.05 < sum(pair.module in held_out for pair in pairs) / len(pairs) < 0.25
    assert not any(part.startswith("test") for pair in pairs for part in pair.module.split("."))


def test_a_function_is_shown_without_its_docstring() -> None:
    for pair in docstrings.pairs()[::40]:
        assert 40 <= len(pair.source) <= 500
        function = ast.parse(pair.source.strip()).body[0]
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None
        assert pair.sentence not in pair.source


@pytest.mark.parametrize("between", ["\f", "\x0b", "\u2028", "\x85"])
def test_a_module_may_hold_what_else_ends_lines(between: str, tmp_path: Path) -> None:
    text = (
        f'# one{between}\n\n\ndef double(number):\n    """Return a number twice as large."""\n    return 2 * number\n'
    )
    (tmp_path / "m.py").write_text(text, encoding="utf-8")
    (pair,) = docstrings._pairs_of(tmp_path / "m.py", "m")
    assert pair.source == "def double(number):\n    return 2 * number"


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the number of bits. Or none.", "Return the number of bits."),
        ("Return e.g. this one\nover two lines.\n\nMore.", "Return e.g. this one over two lines."),
        ("lower case is no sentence", ""),
        ("Short.", ""),
        (">>> doctest only here to see", ""),
    ],
)
def test_the_first_sentence(docstring: str, sentence: str) -> None:
    assert docstrings.first_sentence(docstring) == sentence


def test_what_is_not_read_and_what_touches_is_told(tmp_path: Path) -> None:
    rows = [{"instruction": "Double it.", "input": str(i), "output": str(2 * i), "id": i} for i in range(3)]
    told = str(data.prepare(recipe(jsonl(tmp_path / "a.jsonl", rows)), None))  # type: ignore[arg-type]
    assert "of its columns 'instruction', 'output' (not 'input')" in told
    assert "nothing stands between prompt and completion ('Double it.0')" in told
    assert str(data.prepare(recipe(jsonl(tmp_path / "b.jsonl", PAIRS)), None)).endswith("loss on the completion")  # type: ignore[arg-type]
