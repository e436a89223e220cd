"""How much data there is, from a bounded look at it: rows, tokens, how long a row is. No row is checked here."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.errors import DataError

ROWS, BYTES = 200, 4 << 20  # that are looked at, at most
LETTERS = 4.0  # a token, where there is no tokenizer at hand: English text, within a third
STDLIB = (4000, 130.0)  # rows and tokens of 'stdlib', the standard library's docstrings
IN_MEMORY = "batches in memory"


@dataclass(frozen=True)
class Sample:
    """What a look at the data showed.

    Attributes:
        name: of the file. rows: that it holds, None for a dataset on the hub.
        tokens: of a row, on average; longest: of nine rows in ten.
        counted: whether a tokenizer counted, or letters were divided.
        exact: whether all rows were counted, or their number follows from the file's size.
    """

    name: str
    rows: int | None
    tokens: float | None
    longest: int | None
    counted: bool = False
    exact: bool = False

    @property
    def total(self) -> float | None:
        return None if self.rows is None or self.tokens is None else self.rows * self.tokens

    def __str__(self) -> str:
        if self.name == IN_MEMORY:
            return self.name
        if self.rows is None or self.tokens is None:
            return f"{self.name}: a dataset on the hub, not looked at"
        about = "" if self.exact else "about "
        by = "counted" if self.counted else "guessed from its letters"
        total = self.rows * self.tokens
        return f"{self.name}: {about}{self.rows:,} rows of {self.tokens:.0f} tokens ({by}), {total:,.0f} in all"


def look(data: str, tokenizer: Path | None = None) -> Sample:
    """Look at the beginning of a file.

    Args:
        data: as `headstart tune --data` takes it.
        tokenizer: a tokenizer.json to count with.

    Raises:
        DataError: if there is no such file, or nothing in it.
    """
    if data == "stdlib":
        return Sample(data, *STDLIB, 300)
    path = Path(data).expanduser()
    kinds = {".jsonl": _lines, ".ndjson": _lines, ".json": _array, ".txt": _text, ".csv": _table, ".tsv": _table}
    if not path.is_file():
        written_as_path = path.suffix in (*kinds, ".parquet") or path.is_absolute() or data.startswith((".", "~"))
        if written_as_path and not path.is_dir():
            raise DataError(f"no data at {data!r}: check the path")
        return Sample(data, None, None, None)
    if path.suffix == ".parquet":
        texts, count = _parquet(path)
        return _sample(path, texts, count, True, tokenizer)
    if path.suffix not in kinds:
        raise DataError(f"cannot tell what {str(path)!r} is: name it {', '.join([*kinds, '.parquet'])}")
    try:
        with path.open("rb") as file:
            head = file.read(BYTES)
            head += b"" if path.suffix == ".json" else file.readline(16 * BYTES)  # Elsewhere a line ends a row.
        whole = len(head) == path.stat().st_size
        rows = list(kinds[path.suffix](head.decode("utf-8-sig", "replace"), path, whole))
    except (ValueError, RecursionError, csv.Error) as problem:
        raise DataError(f"cannot read {str(path)!r}: {problem}") from None
    count = len(rows) if whole else round(len(rows) * path.stat().st_size / len(head))
    return _sample(path, rows, count, whole, tokenizer)


def _sample(path: Path, texts: list[str], count: int, exact: bool, tokenizer: Path | None) -> Sample:
    if not texts:
        raise DataError(f"{str(path)!r} holds no rows: give it at least one")
    if not any(map(str.strip, texts)):
        raise DataError(f"{str(path)!r} holds no text in its first {len(texts):,} rows: name a file with some")
    step = max(1, len(texts) // ROWS)
    lengths, counted = _lengths(texts[::step][:ROWS], tokenizer)
    lengths.sort()
    return Sample(path.name, count, statistics.fmean(lengths), round(lengths[int(0.9 * (len(lengths) - 1))]), counted,
                  exact)  # fmt: skip


def _lengths(texts: list[str], tokenizer: Path | None) -> tuple[list[float], bool]:
    if tokenizer is not None:
        try:
            from tokenizers import Tokenizer

            encoder = Tokenizer.from_file(str(tokenizer))
            encoder.no_truncation()
            encoder.no_padding()
            return [float(len(found.ids)) for found in encoder.encode_batch(texts)], True
        except Exception:  # The library raises plain ones: a file of another version is no reason to stop.
            pass
    return [len(text) / LETTERS for text in texts], False


def _words(value: Any) -> Iterator[str]:
    """All text in a row: what is not trained on is read all the same."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _words(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _words(inner)


def _lines(text: str, path: Path, whole: bool) -> Iterator[str]:
    # A string in JSON may hold other ends of lines as they are, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield " ".join(_words(json.loads(line)))
            except ValueError:
                raise ValueError(f"line {number} is no JSON: mend or delete it") from None


def _array(text: str, path: Path, whole: bool) -> Iterator[str]:
    """A list of rows, at the top or in an object; or lines, whatever the file is called. The last row may be cut."""
    if text.lstrip()[:1] not in ("[", "{"):
        raise ValueError("it is no list of rows")
    try:
        found = json.loads(text)
    except ValueError:
        if _is_lines(text):
            yield from _lines(text if whole else text.rpartition("\n")[0], path, whole)
            return
        if whole:
            raise
        found = list(_whole_rows(text))
    for row in found if isinstance(found, list) else next((v for v in found.values() if isinstance(v, list)), []):
        yield " ".join(_words(row))


def _is_lines(text: str) -> bool:
    """Whether an object follows the first one."""
    text = text.lstrip()
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return False
    return text[0] == "{" and text[end:].lstrip()[:1] == "{"


def _whole_rows(text: str) -> Iterator[Any]:
    """Those of a list that is cut somewhere: at the top, or the first one in an object."""
    decoder, place = json.JSONDecoder(), _past(text, 0)
    place = _past(text, place + (text[place : place + 1] == "{"))
    try:
        while text[place : place + 1] != "[":  # A key, or what else the object holds.
            place = _past(text, decoder.raw_decode(text, place)[1])
        place += 1
        while True:
            row, place = decoder.raw_decode(text, _past(text, place))
            yield row
    except ValueError:
        return


def _past(text: str, place: int) -> int:
    """The place of the next key or value."""
    while place < len(text) and text[place] in " \t\r\n,:":
        place += 1
    return place


def _text(text: str, path: Path, whole: bool) -> Iterator[str]:
    yield from (part for part in text.split("\n\n" if "\n\n" in text else "\n") if part.strip())


def _table(text: str, path: Path, whole: bool) -> Iterator[str]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    longest = csv.field_size_limit(len(text) + 1)  # A cell may hold a whole document.
    try:
        next(rows, None)
        yield from (" ".join(row) for row in rows if row)
    finally:
        csv.field_size_limit(longest)


def _parquet(path: Path) -> tuple[list[str], int]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{str(path)!r} needs pyarrow: pip install headstart[train]") from None
    try:
        file = parquet.ParquetFile(path)
        rows = next(file.iter_batches(batch_size=ROWS), None)
    except Exception as problem:  # pyarrow's own errors.
        raise DataError(f"cannot read {str(path)!r}: {' '.join(str(problem).split())[:200]}") from None
    return [" ".join(_words(row)) for row in rows.to_pylist()] if rows is not None else [], file.metadata.num_rows
