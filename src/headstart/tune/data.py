"""From a file or a hub name to rows that TRL trains on, with the loss where it belongs.

text                    → text                    loss on everything
prompt, completion      → prompt, completion      loss on the completion
messages                → messages                loss on every assistant turn, where the chat template marks them
                        → prompt, completion      loss on the last assistant turn, where it does not
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from headstart.errors import DataError
from headstart.tune import docstrings
from headstart.tune.reading import read
from headstart.tune.recipe import RunConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

EMBEDDED = "stdlib"
MESSAGES = ("messages", "conversations", "conversation", "dialog")
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
)
TEXT = ("text", "content")


@dataclass(frozen=True)
class Columns:
    """What the columns mean: `names` holds one of text, (prompt, completion) or messages, as the data calls them."""

    kind: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """Data, ready for the trainer.

    Attributes:
        train: what is trained on.
        held_out: what is only evaluated, or None.
        loss_on: where the loss is, in words.
        assistant_only: whether the chat template's own marks say where the loss is.
        note: what the reader should know of how the rows were read.
    """

    train: Dataset
    held_out: Dataset | None
    loss_on: str
    assistant_only: bool = False
    note: str = ""

    def __str__(self) -> str:
        held_out = f", {len(self.held_out):,} held out" if self.held_out is not None else ""
        return f"{len(self.train):,} rows{held_out}; loss on {self.loss_on}{self.note}"


def prepare(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Read, check, split and shape the data of a run.

    Raises:
        DataError: saying which file, row or column, and what to do.
    """
    train, held_out = read_both(config)
    columns = find_columns(train, config)
    note = _unread(train, columns)
    # Checked before any is drawn, so that a wrong row is named by its place in the file.
    train = shape(train, columns, config.data)
    if held_out is not None:
        held_out = shape(held_out, columns, config.eval_data or config.data)
    elif config.eval_fraction > 0:
        train, held_out = _split(train, config)
    rows = Rows(train, None if held_out is None else _at_most(held_out, config), "the whole text", note=note)
    if columns.kind == "messages" or config.as_chat:
        return _as_chat(rows, columns.kind, tokenizer)
    if columns.kind != "pair":
        return rows
    return replace(rows, loss_on="the completion", note=rows.note + _touching(rows.train))


def _unread(rows: Dataset, columns: Columns) -> str:
    """The columns of text that no field of the run names, and that are left out."""
    text = [name for name, kind in rows.features.items() if getattr(kind, "dtype", None) in ("string", "large_string")]
    left = [repr(name) for name in text if name not in columns.names]
    return f"; of its columns {', '.join(map(repr, columns.names))} (not {', '.join(left)})" if left else ""


def _touching(pairs: Dataset) -> str:
    """Whether a completion begins where its prompt ends, without a space, as the answer of a chat would."""
    first = pairs[0]
    if first["prompt"][-1:].isspace() or first["completion"][:1].isspace():
        return ""
    seam = repr(first["prompt"][-12:] + first["completion"][:12])
    return f"; nothing stands between prompt and completion ({seam}): for a chat model pass --as-chat"


def read_both(config: RunConfig) -> tuple[Dataset, Dataset | None]:
    """Rows to train on and held-out rows of their own, where there are such, as they stand in the files."""
    if config.data == EMBEDDED:
        return _embedded()
    train = read(config.data, config.split, config.subset)
    if config.eval_data is None and config.eval_split is None:
        return train, None
    return train, read(config.eval_data or config.data, config.eval_split or config.split, config.subset)


def _split(rows: Dataset, config: RunConfig) -> tuple[Dataset, Dataset]:
    count = round(len(rows) * config.eval_fraction)
    if not 0 < count < len(rows):
        raise DataError(
            f"{config.data!r} has too few rows to split: {config.eval_fraction:g} of {len(rows)} is {count}; "
            "pass --eval-fraction 0, or --eval-data"
        )
    parts = rows.train_test_split(test_size=count, seed=config.seed)
    return parts["train"], parts["test"]


def _at_most(rows: Dataset, config: RunConfig) -> Dataset:
    return rows.shuffle(seed=config.seed).select(range(min(config.eval_rows, len(rows))))


def _embedded() -> tuple[Dataset, Dataset]:
    """The standard library's docstrings, held out by module."""
    from datasets import Dataset

    sides: dict[bool, list[dict[str, str]]] = {False: [], True: []}
    for pair in docstrings.pairs():
        row = {"prompt": docstrings.QUESTION.format(source=pair.source), "completion": " " + pair.sentence}
        sides[docstrings.is_held_out(pair.module)].append(row)
    return Dataset.from_list(sides[False]), Dataset.from_list(sides[True])


def find_columns(rows: Dataset, config: RunConfig) -> Columns:
    """Which columns hold what: the user's word, or the usual names.

    Raises:
        DataError: listing the columns there are.
    """
    present = ", ".join(map(repr, rows.column_names))
    named = {
        "text": (config.text_column,),
        "pair": (config.prompt_column, config.completion_column),
        "messages": (config.messages_column,),
    }
    asked = [Columns(kind, names) for kind, names in named.items() if any(names)]  # type: ignore[arg-type]
    usual = [Columns("messages", (name,)) for name in MESSAGES]
    usual += [Columns("pair", names) for names in PAIRS] + [Columns("text", (name,)) for name in TEXT]
    if len(asked) > 1:
        raise DataError("columns of two kinds are named: name text, or prompt and completion, or messages")
    if asked and None in asked[0].names:
        raise DataError(f"a prompt needs a completion: name both columns (the data has {present})")
    for columns in asked or usual:
        if set(columns.names) <= set(rows.column_names):
            return columns
    if asked:
        absent = [name for name in asked[0].names if name not in rows.column_names]
        raise DataError(f"no column {absent[0]!r} in {config.data!r}: it has {present}")
    raise DataError(
        f"cannot tell what to train on in {config.data!r}: its columns are {present}; "
        "name them with --text-column, or --prompt-column and --completion-column, or --messages-column"
    )


def shape(rows: Dataset, columns: Columns, data: str) -> Dataset:
    """The same rows with the trainer's column names and nothing else, every value checked.

    Args:
        data: where they come from, for the message.
    """
    names = {"text": ("text",), "pair": ("prompt", "completion"), "messages": ("messages",)}[columns.kind]
    absent = [name for name in columns.names if name not in rows.column_names]
    if absent:
        raise DataError(f"the held-out data has no column {absent[0]!r}: it has {', '.join(rows.column_names)}")
    rows = rows.select_columns(list(columns.names))
    for number, row in enumerate(rows, start=1):
        for name, value in row.items():
            wrong = _wrong_messages(value) if columns.kind == "messages" else _wrong_text(value)
            if wrong:
                raise DataError(f"row {number} of {data!r}: {name!r} {wrong}")
    # In two goes, or a swap of two names (input → prompt while prompt → ...) would collide.
    return rows.rename_columns({old: f"_{i}" for i, old in enumerate(columns.names)}).rename_columns(
        {f"_{i}": new for i, new in enumerate(names)}
    )


def _wrong_text(value: Any) -> str:
    if not isinstance(value, str):
        return f"is {type(value).__name__}, not text: mend the row, or name another column"
    return "" if value.strip() else "is empty: mend or delete the row"


def _wrong_messages(value: Any) -> str:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return "is no list of messages: write [{'role': 'user', 'content': '...'}, ...]"
    for message in value:
        if not ({"role", "content"} <= set(message) or {"from", "value"} <= set(message)):
            return f"holds a message with {sorted(message)}: each needs 'role' and 'content'"
        if message.get("content", message.get("value")) is None and not message.get("tool_calls"):
            return "holds a message without content: mend or delete the row"
    last = [message.get("role") or message.get("from") for message in value]
    return "" if {"assistant", "gpt"} & set(last) else "has no assistant turn: nothing to learn there"


def _as_chat(rows: Rows, kind: str, tokenizer: PreTrainedTokenizerBase) -> Rows:
    if not tokenizer.chat_template:
        raise DataError("the model has no chat template: take its instruct version, or prompt and completion as text")
    if kind == "text":
        raise DataError("plain text has no turns: drop --as-chat, or name a prompt and a completion column")
    if kind == "pair":
        return replace(_map(rows, _turns_of_pair), loss_on="the assistant's turn")
    rows = _map(rows, _chatml)
    if _marks_assistant_turns(tokenizer):
        return replace(rows, loss_on="the assistant's turns", assistant_only=True)
    return replace(_map(rows, _last_turn), loss_on="the assistant's last turn (the chat template marks no others)")


def _map(rows: Rows, function: Any) -> Rows:
    def shaped(part: Dataset) -> Dataset:
        return part.map(function, remove_columns=part.column_names)

    return replace(rows, train=shaped(rows.train), held_out=shaped(rows.held_out) if rows.held_out else None)


def _turns_of_pair(row: dict[str, str]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"].strip()}],
    }


def _chatml(row: dict[str, Any]) -> dict[str, Any]:
    """ShareGPT's from and value become role and content."""
    roles = {"human": "user", "gpt": "assistant"}
    return {
        "messages": [
            message
            if "role" in message
            else {"role": roles.get(message["from"], message["from"]), "content": message["value"]}
            for message in row["messages"]
        ]
    }


def _last_turn(row: dict[str, Any]) -> dict[str, Any]:
    """What comes before the last assistant turn, and that turn."""
    messages = row["messages"]
    last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
    return {"prompt": messages[:last], "completion": messages[last : last + 1]}


def _marks_assistant_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template says which tokens are the assistant's, by itself or in TRL's version of it."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return True
    try:
        return get_training_chat_template(tokenizer) is not None
    except ValueError:  # TRL knows no version of this template with the marks.
        return False
