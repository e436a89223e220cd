"""Seven ways in which a file can be wrong, and every verb that reads one: a named error, nothing run or written."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import headstart as hs
from headstart.errors import AdapterFormatError, HeadstartError, KeyMismatch, NoTarget, WrongBase

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FIRST = "base_model.model.blocks.0.lora_A.weight"


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24))}).eval()


def _retensored(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / TENSORS)), folder / TENSORS, {"format": "pt"})


class _Trap:
    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.mkdir, ("trapped",)


def truncated(folder: Path) -> None:
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[: len(data) // 2])


def huge_header(folder: Path) -> None:
    """A gigabyte of header is promised, and the file is as long as that: it takes no disk."""
    with open(folder / TENSORS, "wb") as file:
        file.write(struct.pack("<Q", 1 << 30) + b"{" + b" " * 100)
        file.truncate((1 << 30) + 8)


def wrong_shape(folder: Path) -> None:
    _retensored(folder, lambda t: {n: v[:, :7].contiguous() if n == FIRST else v for n, v in t.items()})


def extra_key(folder: Path) -> None:
    _retensored(folder, lambda t: {**t, "base_model.model.blocks.0.weight": torch.zeros(32, 24)})


def only_a_pickle(folder: Path) -> None:
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Trap()))


def a_name_that_climbs(folder: Path) -> None:
    _retensored(folder, lambda t: {n.replace("blocks.0", "../../../etc/passwd"): v for n, v in t.items()})


def a_link_out(folder: Path) -> None:
    os.replace(folder / TENSORS, folder.parent / "elsewhere")
    (folder / TENSORS).symlink_to(folder.parent / "elsewhere")


def another_base(folder: Path) -> None:
    other = model(7)
    hs.adapt(other, hs.LoraConfig(r=8, init_lora_weights="pissa"))
    hs.save(other, folder)


def _bank(adapter: Path, place: Path) -> None:
    hs.AdapterBank(model()).load("x", adapter)


VERBS: dict[str, Callable[[Path, Path], object]] = {
    "load": lambda adapter, place: hs.load(model(), adapter),
    "export": lambda adapter, place: hs.export(adapter, place / "out", "portable", base=model()),
    "merge": lambda adapter, place: hs.merge_checkpoint(place / "base", adapter, place / "out"),
    "combine": lambda adapter, place: hs.combine([adapter, place / "good"], place / "out"),
    "bank": _bank,
    "inspect": lambda adapter, place: hs.inspect(adapter, model()),
    "doctor": lambda adapter, place: hs.doctor(adapter, model()),
}

# What is refused, by which name; and what is told: these two verbs are for looking at bad files.
REFUSED: dict[Callable[[Path], None], type[HeadstartError]] = {
    truncated: AdapterFormatError,
    huge_header: AdapterFormatError,
    wrong_shape: KeyMismatch,
    extra_key: KeyMismatch,
    only_a_pickle: AdapterFormatError,
    a_name_that_climbs: NoTarget,
    another_base: WrongBase,
}
DIFFERENTLY: dict[tuple[str, Callable[[Path], None]], type[HeadstartError] | str] = {
    ("combine", a_name_that_climbs): KeyMismatch,  # no model is there that could have such a module
    ("export", a_name_that_climbs): KeyMismatch,
    ("inspect", wrong_shape): "(16, 7)",
    ("inspect", extra_key): "blocks.0.weight",
    ("inspect", a_name_that_climbs): "names that no module has",
    ("doctor", truncated): "damaged",
    ("doctor", huge_header): "cut off",
    ("doctor", wrong_shape): "not of this base: 'blocks.0'",
    ("doctor", extra_key): "blocks.0.weight",
    ("doctor", a_name_that_climbs): "names that no module has",
    ("doctor", another_base): "made for another base",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, an adapter of it, and the same adapter to spoil."""
    (tmp_path / "base").mkdir()
    save_file(model().state_dict(), tmp_path / "base" / "model.safetensors")
    for name in ("good", "bad"):
        adapted = model()
        hs.adapt(adapted, hs.LoraConfig(r=8, init_lora_weights="pissa"))
        hs.save(adapted, tmp_path / name)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


def _standing(place: Path) -> dict[str, int]:
    return {str(path.relative_to(place)): path.lstat().st_size for path in sorted(place.rglob("*"))}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("verb", VERBS)
def test_a_file_that_is_wrong_is_named_and_nothing_comes_of_it(
    verb: str, spoil: Callable[[Path], None], place: Path
) -> None:
    spoil(place / "bad")
    before, wanted = _standing(place), DIFFERENTLY.get((verb, spoil), REFUSED[spoil])
    if isinstance(wanted, str):
        told: Any = VERBS[verb](place / "bad", place)
        assert wanted in json.dumps(json.loads(told.to_json()), ensure_ascii=False)
        assert verb != "doctor" or not told.healthy
    else:
        with pytest.raises(wanted) as caught:
            VERBS[verb](place / "bad", place)
        assert type(caught.value) is wanted
    assert _standing(place) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("verb", VERBS)
def test_the_same_file_unspoilt_is_taken(verb: str, place: Path) -> None:
    assert VERBS[verb](place / "bad", place) is not False
    assert verb not in ("export", "merge", "combine") or (place / "out").is_dir()


@pytest.mark.parametrize("profile", ["portable", "compact", "mlx", "kohya"])
def test_a_name_that_climbs_is_never_exported(profile: str, place: Path) -> None:
    a_name_that_climbs(place / "bad")
    with pytest.raises(KeyMismatch, match="names that no module has"):
        hs.export(place / "bad", place / "out", profile)
    assert not (place / "out").exists()


def test_a_link_out_of_the_folder_is_told(place: Path) -> None:
    """Reading through it does no harm, and the hub's own cache is made of links: only the doctor minds."""
    a_link_out(place / "bad")
    assert "is a link to" in hs.doctor(place / "bad", model()).faults[0].what
