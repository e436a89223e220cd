"""What is to be predicted: a run, as far as its memory and time depend on it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headstart.choose.shapes import SIZES, Outline
from headstart.errors import BadOption, BadRank, UnknownField, nearest

# Bytes a number of a quantised matrix, with the scales of its blocks.
PACKED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}

# Bytes of an optimiser's state, for each number that trains in float32.
OPTIMIZERS = {"adamw": 8, "lora_plus": 8, "preconditioned": 8, "adamw_8bit": 2, "sgd": 0}

LOSSES = ("tiled", "whole")


@dataclass(frozen=True)
class Setting:
    """What is to be predicted. The fields are those of `headstart tune`.

    Attributes:
        init: the start; r: the rank of every adapted layer.
        target_modules, exclude_modules: "all-linear", names, or one regular expression.
        dtype: of the frozen weights; "auto": the checkpoint's own.
        quantised: "4bit" or "8bit", of the frozen matrices.
        batch_size, max_length: rows and tokens of a forward pass; gradient_accumulation: passes a step.
        optimizer: one of `OPTIMIZERS`.
        gradient_checkpointing: keep the blocks' inputs alone.
        padded: whether rows are of different lengths, which makes attention keep a mask.
        calibration_batches: of the pass over the data, where the start looks at it.
        loss: "tiled" as TRL computes it, or "whole": every logit at once, as models themselves do.
        steps: of the run, for its time.
    """

    init: str | bool = "kaiming"
    r: int = 16
    target_modules: str | Collection[str] = "all-linear"
    exclude_modules: str | Collection[str] | None = None
    dtype: str = "auto"
    quantised: str | None = None
    batch_size: int = 8
    max_length: int = 1024
    gradient_accumulation: int = 1
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    padded: bool = True
    calibration_batches: int = 16
    loss: str = "tiled"
    steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("r", "batch_size", "max_length", "gradient_accumulation", "calibration_batches", "steps"):
            value = getattr(self, name)
            if name == "steps" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise (BadRank if name == "r" else BadOption)(f"{name} is {value!r}: choose an integer of at least 1")
        choices: dict[str, Sequence[str | None]] = {
            "dtype": ("auto", *SIZES),
            "quantised": (None, *PACKED),
            "optimizer": tuple(OPTIMIZERS),
            "loss": LOSSES,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                words = [word for word in known if word]
                raise BadOption(f"{name} is {value!r}{nearest(str(value), words)} (choose {', '.join(words)})")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    re.compile(value)
                except re.error as error:
                    raise BadOption(f"{name} {value!r} is no regular expression: {error}") from None
            elif value is None and name == "exclude_modules":
                continue
            elif not isinstance(value, Collection) or not all(isinstance(entry, str) for entry in value):
                raise BadOption(f"{name} is {value!r}: pass 'all-linear', names in a list, or an expression")
            elif not isinstance(value, Sequence):  # A set: in one order, and as files and commands hold it.
                object.__setattr__(self, name, sorted(value))

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Setting:
        """A setting from fields; one that does not exist is refused with the nearest name."""
        known = [f.name for f in dataclasses.fields(cls)]
        if isinstance(fields.get("quantised"), bool):
            fields = {**fields, "quantised": "4bit" if fields["quantised"] else None}
        for name in fields:
            if name not in known:
                raise UnknownField(f"an estimate has no field {name!r}{nearest(name, known)}")
        return cls(**fields)

    def settled(self, outline: Outline) -> Setting:
        """With the model's own dtype and quantisation where none is said, and no more tokens than fit."""
        stored = outline.dtype if outline.dtype in SIZES else "float32"
        return dataclasses.replace(
            self,
            dtype=stored if self.dtype == "auto" else self.dtype,
            quantised=self.quantised or outline.quantised,
            max_length=min(self.max_length, outline.longest or self.max_length),
        )
