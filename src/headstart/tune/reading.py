"""Rows out of a local file, a folder, or a dataset on the hub; and in words, why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from headstart.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
SEPARATORS = {".csv": ",", ".tsv": "\t"}
KNOWN = (*READERS, *SEPARATORS)


def read(data: str, split: str = "train", subset: str | None = None) -> Dataset:
    """The rows of a local file, a local folder, or a dataset on the hub."""
    path = check_place(data)
    name = str(path) if path.is_dir() else data
    rows = _read_file(path) if path.is_file() else _read_named(name, split, subset)
    if len(rows) == 0:
        raise DataError(f"{data!r} holds no rows: give it at least one")
    return rows


def check_place(data: str) -> Path:
    """Refuse what can only be a path, where nothing is."""
    path = Path(data).expanduser()
    is_path = path.suffix in KNOWN or path.is_absolute() or data.startswith((".", "~"))
    if is_path and not path.exists():
        raise DataError(f"no data at {data!r}: check the path")
    return path


def _read_file(path: Path) -> Dataset:
    from datasets import Split, load_dataset

    if path.suffix not in KNOWN:
        raise DataError(f"cannot tell what {str(path)!r} is: name it {', '.join(KNOWN)}")
    if path.stat().st_size == 0:
        raise DataError(f"{str(path)!r} is empty: give it at least one row")
    try:
        if path.suffix in SEPARATORS:
            return _read_csv(path)
        # In a text file the paragraphs are the rows, or the lines where nothing separates paragraphs.
        by_paragraph = path.suffix == ".txt" and b"\n\n" in path.read_bytes().replace(b"\r\n", b"\n")
        options = {"sample_by": "paragraph" if by_paragraph else "line"} if path.suffix == ".txt" else {}
        rows = load_dataset(READERS[path.suffix], data_files=str(path), split=Split.TRAIN, **options)
        if READERS[path.suffix] == "json" and any(map(_is_time, rows.features.values())):
            return _as_written(path)
    except Exception as problem:  # Each reader has its own errors; all of them mean that the file is malformed.
        raise DataError(f"cannot read {str(path)!r}: {_malformed_line(path) or _reason(problem)}") from problem
    return rows.filter(lambda text: bool(text.strip()), input_columns="text") if path.suffix == ".txt" else rows


def _read_csv(path: Path) -> Dataset:
    """Such a file knows no types: "7" is text, and an empty cell is empty."""
    import pandas  # type: ignore[import-untyped]
    from datasets import Dataset

    rows = pandas.read_csv(path, sep=SEPARATORS[path.suffix], dtype=str, keep_default_na=False)
    if not isinstance(rows.index, pandas.RangeIndex):  # pandas would take the first cells for names of the rows.
        raise ValueError("the rows have more cells than the header has names: name every column")
    return Dataset.from_pandas(rows)


def _is_time(kind: object) -> bool:
    return str(getattr(kind, "dtype", "")).startswith("timestamp")


def _as_written(path: Path) -> Dataset:
    """The rows of a JSON file in which a column holds dates only: text, which the reader takes for points in time."""
    from datasets import Dataset

    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    keys = dict.fromkeys(key for row in rows for key in row)  # Dataset.from_list takes the first row's alone.
    return Dataset.from_dict({key: [row.get(key) for row in rows] for key in keys})


def _read_named(data: str, split: str, subset: str | None) -> Dataset:
    from datasets import Dataset, load_dataset

    try:
        rows = load_dataset(data, subset, split=split)
    except Exception as problem:  # From 404 to a missing subset: the library's own words say which.
        raise DataError(f"cannot load {data!r} (split {split!r}): {_reason(problem)}") from problem
    if not isinstance(rows, Dataset):
        raise DataError(f"{data!r} gives {type(rows).__name__}: name one split with --split")
    return rows


def _reason(problem: BaseException) -> str:
    cause = problem.__cause__ or problem
    return " ".join(str(cause).split())[:300] or type(cause).__name__


def _malformed_line(path: Path) -> str | None:
    """The first line of a JSONL file that is no JSON object."""
    if path.suffix not in (".jsonl", ".ndjson"):
        return None
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is no JSON object: write one {{...}} a line"
            except ValueError as problem:
                return f"line {number} is no JSON ({problem}): mend or delete it"
    return None
