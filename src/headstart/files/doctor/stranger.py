"""The files of a folder that nobody vouches for: found, bounded, parsed, and every oddity named.

Nothing is executed, pickles are not opened, and no link out of the folder is followed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.errors import AdapterFormatError
from headstart.files.adapter import CONFIG, SLOTS, TENSORS, few, find_adapter
from headstart.files.fields import UNSERVED, check_config
from headstart.files.header import LARGEST_JSON, odd_names, parse_object, read_header, read_json

LARGEST_TENSOR = 8 << 30  # bytes: no factor is larger, and a hole in a file may claim to be
DEFAULT = 8  # what PEFT takes for r and lora_alpha where a config does not say
UNPICKLE = (
    "convert it where running it would do no harm: torch.load(file, map_location='cpu', weights_only=True), then "
    "safetensors.torch.save_file(tensors, 'adapter_model.safetensors')"
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Fault:
    """Something that no reader can make right: what, what to do, and whether nothing can be read at all."""

    what: str
    repair: str
    fatal: bool = False


@dataclass(frozen=True)
class Dialect:
    """A way to write an adapter down.

    Attributes:
        name: what it is called; file: how its tensors are usually named; slots: the ends of their names.
        turned: whether the factors stand as (n, r) and (r, m).
    """

    name: str
    file: str
    slots: Mapping[str, str]
    turned: bool = False


PEFT = Dialect("PEFT", TENSORS, SLOTS)
DIFFUSERS = Dialect(
    "diffusers", "pytorch_lora_weights.safetensors", {"lora_A.weight": "A", "lora_B.weight": "B", "alpha": "alpha"}
)
DIALECTS = (
    PEFT,
    Dialect("mlx", "adapters.safetensors", {"lora_a": "A", "lora_b": "B", "m": "magnitude"}, turned=True),
    Dialect("kohya", "", {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha", "dora_scale": "magnitude"}),
    DIFFUSERS,
)


def find(path: str | Path) -> tuple[Path, Dialect | None]:
    place = Path(path)
    try:
        if place.is_file():
            if place.suffix == ".safetensors":
                return place, next((d for d in DIALECTS if d.file == place.name), None)
            raise AdapterFormatError(f"{place} is {_what(place)}: pass a folder, or a .safetensors file")
        if not place.is_dir():
            place = find_adapter(path)
        names = {entry.name for entry in place.iterdir()}
    except AdapterFormatError:
        raise
    except (OSError, ValueError) as error:  # A name with a NUL is a ValueError.
        raise AdapterFormatError(f"cannot look at {str(path)!r}: {error}") from error
    for dialect in DIALECTS:
        if dialect.file in names and (place / dialect.file).is_file():
            return place / dialect.file, dialect
    others = sorted(name for name in names if name.endswith(".safetensors") and (place / name).is_file())
    if len(others) == 1 and CONFIG not in names:
        return place / others[0], None
    for name in sorted(names):
        if Path(name).suffix in (*_PICKLES, ".gguf") and ("adapter" in name or "lora" in name):
            raise AdapterFormatError(f"{place} holds {name!r}, {_what(Path(name))}")
    inside = sorted(name for name in names if (place / name / TENSORS).is_file())
    hint = f"; pass one of its folders: {few(inside)}" if inside else ", and nothing else that is one"
    raise AdapterFormatError(f"{place} holds no adapter: no {TENSORS}{hint}")


def _what(file: Path) -> str:
    if file.suffix in _PICKLES:
        return f"a pickle, which may run anything and is not opened: {UNPICKLE}"
    if file.suffix == ".gguf":
        return "a GGUF file, which llama.cpp alone reads: the doctor looks at what it was converted from"
    return "no file of tensors"


def read_tensors(file: Path, faults: list[Fault]) -> tuple[dict[str, tuple[tuple[int, ...], str]], Mapping[str, Any]]:
    """Shapes and dtypes by name, and the metadata; empty where the file is damaged."""
    from safetensors import SafetensorError, safe_open

    again = "copy or download it again"
    _check_place(file, faults)
    try:
        header = read_header(file)
        found = {}
        with safe_open(file, "pt") as handle:  # Offsets that overlap, leave holes or point outside are refused here.
            for name in header.shapes:
                part = handle.get_slice(name)
                found[name] = (tuple(part.get_shape()), str(part.get_dtype()))
    except AdapterFormatError as error:
        faults.append(Fault(str(error), again, fatal=True))
        return {}, {}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        faults.append(Fault(f"{file} is damaged: {error}", again, fatal=True))
        return {}, {}
    if not found:
        faults.append(Fault(f"{file} holds no tensors", again, fatal=True))
    if odd := odd_names(found):
        faults.append(Fault(f"names that no module has: {few(odd)}", "do not unpack them into files"))
    huge = [n for n, (shape, dtype) in found.items() if math.prod(shape) * _BYTES.get(dtype, 1) > LARGEST_TENSOR]
    if huge:
        faults.append(Fault(f"tensors of more than 8 GiB: {few(huge)}", "this is no adapter", fatal=True))
    return found, header.metadata


def _check_place(file: Path, faults: list[Fault]) -> None:
    """A file that is a link out of its folder. The hub's own cache links to its blobs, and these are next door."""
    folder = file.parent.resolve()
    for name in (file, file.parent / CONFIG):
        target = name.resolve()
        if name.is_symlink() and folder != target.parent and target.parent != folder.parent.parent / "blobs":
            faults.append(Fault(f"{name.name} is a link to {target}", "replace it by the file that it means"))


def read_config(file: Path, dialect: Dialect, metadata: Mapping[str, Any], faults: list[Fault]) -> dict[str, Any]:
    place = file.parent / CONFIG
    if dialect.name == "diffusers":
        return parsed(metadata.get("lora_adapter_metadata", "{}"), f"the metadata of {file}", faults)
    if dialect.name == "kohya":
        return {}
    if not place.is_file():
        faults.append(Fault(f"there is no {CONFIG}: the scale is unknown", "copy it from where the adapter was made"))
        return {}
    try:
        return read_json(place)
    except AdapterFormatError as error:
        faults.append(Fault(str(error), "restore it from where the adapter was made", fatal=True))
        return {}


def parsed(text: object, where: str, faults: list[Fault]) -> dict[str, Any]:
    try:
        if len(str(text)) > 16 * LARGEST_JSON:
            raise AdapterFormatError(f"{where} is larger than 16 MiB")
        return parse_object(str(text), where)
    except AdapterFormatError as error:
        faults.append(Fault(str(error), "it is not used"))
        return {}


def checked(raw: Mapping[str, Any], place: Path, ours: bool, faults: list[Fault]) -> dict[str, Any]:
    """The fields that mean something, each checked by itself; what a start or a variant means is for the engines."""
    sound: dict[str, Any] = {"peft_type": "LORA", "r": DEFAULT, "lora_alpha": DEFAULT}
    kept = {}
    for name, value in raw.items():
        if name in ("peft_type", "init_lora_weights", *UNSERVED):
            kept[name] = value
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check_config({**sound, name: value}, place, ours)
            kept[name] = value
        except AdapterFormatError as error:
            faults.append(Fault(str(error), "correct the field in the config"))
    if raw:
        missing = [name for name in ("r", "lora_alpha") if raw.get(name) is None]
        if missing:
            told = f"the config has no {' and no '.join(missing)}: PEFT takes {DEFAULT}, others refuse"
            faults.append(Fault(told, "write down what it was trained with"))
    return {**sound, **kept}
