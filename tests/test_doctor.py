"""The doctor against PEFT itself, dense float64, the engines' published formulas, and files that a stranger mangled."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import random
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import headstart as hs
from headstart.errors import AdapterFormatError, BadOption, HeadstartError, WrongBase
from headstart.files.doctor.anatomy import inspect
from headstart.files.doctor.deviation import Block, repetition
from headstart.files.doctor.engines import ENGINES, KEYS, RULES, Verdict
from headstart.files.doctor.examine import doctor
from headstart.files.doctor.restore import restore

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SERVERS = ("peft", "vllm", "sglang", "lorax", "llama.cpp")
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa", "lora_alpha": 16},
    "pissa_niter": {"init_lora_weights": "pissa_niter_2"},
    "olora": {"init_lora_weights": "olora", "lora_alpha": 16},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "dora": {"use_dora": True},
    "pissa_dora": {"init_lora_weights": "pissa", "use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 1.5}},
    "uneven": {"rank_pattern": {"layers.0.self_attn.q_proj": 16}},
    "narrow": {"r": 4, "lora_alpha": 4},
    "saved": {"modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj", "v_proj"]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "biased": {"lora_bias": True},
    "last_layer": {"layers_to_transform": [1]},
    "queries": {"target_modules": ["q_proj"]},
    "regex": {"target_modules": r".*\.(q_proj|v_proj)"},
    "rank_32": {"r": 32, "lora_alpha": 32},
    "head": {"target_modules": ["lm_head", "q_proj", "v_proj"]},
}


MEASURED = ("pissa", "pissa_niter", "olora", "dora")


def _ids() -> Tensor:
    return torch.arange(24).reshape(2, 12) * 7 % 200 + 3


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(_ids()).logits.double()  # type: ignore[no-any-return]


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


class Made:
    """Adapters that PEFT trained and saved, each with the outputs and the merged weights that it had."""

    def __init__(self, root: Path, base: Callable[[], nn.Module]) -> None:
        self.root, self.base = root, base
        self.logits: dict[str, Tensor] = {}
        self.merged: dict[str, dict[str, Tensor]] = {}

    def folder(self, name: str) -> Path:
        """A folder that PEFT wrote. Read only: `copied` gives one to mangle."""
        place = self.root / name
        if not place.exists():
            torch.manual_seed(1)
            fields: dict[str, Any] = {"r": 8, "lora_alpha": 8, "target_modules": TARGETS, **FIELDS[name]}
            model = peft.get_peft_model(self.base(), peft.LoraConfig(task_type="CAUSAL_LM", **fields))
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
            for _ in range(2):
                model(_ids(), labels=_ids()).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            self.logits[name] = _logits(model)
            model.save_pretrained(place)
            if name in MEASURED:
                merged = model.merge_and_unload()
                self.merged[name] = {n: p.detach().double() for n, p in merged.named_parameters()}
        return place

    def copied(self, name: str, to: Path) -> Path:
        source = self.folder(name)
        to.mkdir(parents=True, exist_ok=True)
        for file in (CONFIG, TENSORS):
            (to / file).write_bytes((source / file).read_bytes())
        return to


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llama: Callable[[], nn.Module]) -> Made:
    def base() -> nn.Module:
        model = llama()
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # type: ignore[union-attr, operator]
        with torch.no_grad():  # Weights with a spectrum, as trained ones have.
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    U, S, V = torch.linalg.svd(parameter, full_matrices=False)
                    parameter.copy_((U * S * torch.linspace(2, 0.2, len(S))) @ V)
        return model

    return Made(tmp_path_factory.mktemp("adapters"), base)


def changed(folder: Path, **fields: Any) -> Path:
    """The folder with other fields in its config; None takes a field away."""
    config = {**json.loads((folder / CONFIG).read_text()), **fields}
    (folder / CONFIG).write_text(json.dumps({n: v for n, v in config.items() if v is not None}))
    return folder


def retensored(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    save_file(change(load_file(folder / TENSORS)), folder / TENSORS, {"format": "pt"})
    return folder


def verdicts(folder: Path, **options: Any) -> dict[str, Verdict]:
    found = doctor(folder, **options)
    return {reading.engine.key: reading.verdict for reading in found.readings}


# ------------------------------------------------------------------ PEFT itself is the oracle


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_said_of_peft_is_what_peft_does(name: str, made: Made) -> None:
    folder = made.folder(name)
    said = doctor(folder)["peft"].verdict
    try:
        loaded = _logits(peft.PeftModel.from_pretrained(made.base(), folder))
    except Exception:
        assert said is Verdict.REFUSES
        return
    # LoRA-GA without gradients started plain: what PEFT does to a true one is in the rule, and cannot be made here.
    if name != "lora_ga":
        assert (_apart(loaded, made.logits[name]) < 1e-5) == (said is Verdict.LOADS)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("plain", {"target_modules": ["q_proj", "mlp.down_proj"]}),
        ("plain", {"exclude_modules": ["down_proj"]}),
        ("plain", {"layers_to_transform": [0]}),
        ("plain", {"layers_to_transform": 1, "layers_pattern": "layers"}),
        ("plain", {"use_dora": True}),
        ("dora", {"use_dora": False}),
    ],
)
def test_a_config_of_other_layers_than_the_files_is_told(
    name: str, fields: dict[str, Any], made: Made, tmp_path: Path
) -> None:
    folder = changed(made.copied(name, tmp_path / "odd"), **fields)
    assert doctor(made.folder(name))["peft"].verdict is Verdict.LOADS
    assert doctor(folder)["peft"].verdict is Verdict.DIFFERS
    assert _apart(_logits(peft.PeftModel.from_pretrained(made.base(), folder)), made.logits[name]) > 1e-5


def test_a_module_that_the_file_should_hold_is_told_and_peft_misses_it(made: Made, tmp_path: Path) -> None:
    folder = made.copied("saved", tmp_path)
    assert doctor(folder)["peft"].verdict is Verdict.LOADS
    retensored(folder, lambda t: {n: v for n, v in t.items() if "lora_" in n})
    assert doctor(folder)["peft"].verdict is Verdict.REFUSES
    with pytest.raises(KeyError):
        peft.PeftModel.from_pretrained(made.base(), folder)


def test_a_module_that_is_saved_by_the_end_of_its_name_is_found(made: Made, tmp_path: Path) -> None:
    folder = changed(made.copied("saved", tmp_path), modules_to_save=["head"])  # PEFT saves lm_head for it
    assert doctor(folder)["peft"].verdict is Verdict.LOADS


@pytest.mark.parametrize("held", ["score", "classifier"])
def test_one_head_of_a_classifier_is_enough(held: str, made: Made, tmp_path: Path) -> None:
    folder = changed(made.copied("plain", tmp_path), modules_to_save=["classifier", "score"])
    assert doctor(folder)["peft"].verdict is Verdict.REFUSES
    retensored(folder, lambda t: {**t, f"base_model.model.{held}.weight": torch.ones(2, 32)})
    assert doctor(folder)["peft"].verdict is Verdict.LOADS


def test_blocks_that_layers_to_transform_counts_are_well(made: Made, tmp_path: Path) -> None:
    for i, fields in enumerate(
        ({"layers_to_transform": [0, 1]}, {"layers_to_transform": [0, 1], "layers_pattern": []})
    ):
        folder = changed(made.copied("plain", tmp_path / str(i)), **fields)
        assert doctor(folder)["peft"].verdict is Verdict.LOADS
        assert _apart(_logits(peft.PeftModel.from_pretrained(made.base(), folder)), made.logits["plain"]) < 1e-5


def test_peft_refuses_what_is_said_to_be_refused(made: Made, tmp_path: Path) -> None:
    for fields in ({"init_lora_weights": "lora_one"}, {"init_lora_weights": "corda"}, {"r": 5}):
        folder = changed(made.copied("plain", tmp_path / str(fields.get("r", fields))), **fields)
        assert doctor(folder)["peft"].verdict is Verdict.REFUSES, fields
        with pytest.raises((ValueError, RuntimeError)):
            peft.PeftModel.from_pretrained(made.base(), folder)


def test_a_base_weight_in_the_file_is_told_and_peft_does_take_it(made: Made, tmp_path: Path) -> None:
    key = "base_model.model.model.norm.weight"
    folder = retensored(made.copied("plain", tmp_path), lambda t: {**t, key: torch.full((32,), 7.0)})
    assert doctor(folder)["peft"].verdict is Verdict.DIFFERS
    assert key in doctor(folder)["peft"].findings[0].because
    loaded = peft.PeftModel.from_pretrained(made.base(), folder)
    assert torch.equal(loaded.get_submodule("base_model.model.model.norm").weight, torch.full((32,), 7.0))


# ------------------------------------------------------------------ by how much


def _weights(made: Made, name: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By layer: W, the trained change, and s·B·A, all dense, from PEFT's own merge."""
    folder, base = made.folder(name), dict(made.base().named_parameters())
    tensors, config = load_file(folder / TENSORS), json.loads((folder / CONFIG).read_text())
    found = {}
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            W = base[f"{layer}.weight"].detach().double()
            B = tensors[key.replace("lora_A", "lora_B")].double()
            plain = config["lora_alpha"] / config["r"] * B @ A.double()
            found[layer] = W, made.merged[name][f"{layer}.weight"] - W, plain
    return found


@pytest.mark.parametrize("name", ["pissa", "olora", "dora"])
def test_the_measured_error_is_that_of_the_dense_weights(name: str, made: Made) -> None:
    found = doctor(made.folder(name), made.base())["lorax"]
    assert found.verdict is Verdict.DIFFERS
    for layer, (_, true, plain) in _weights(made, name).items():
        assert found.errors[layer] == pytest.approx(float((plain - true).norm() / true.norm()), rel=2e-3), layer
    assert found.worst is not None
    assert found.worst[1] == max(found.errors.values())
    assert not found.estimated


def test_an_estimated_start_is_called_so_and_is_of_the_right_size(made: Made) -> None:
    found = doctor(made.folder("pissa_niter"), made.base())["sglang"]
    assert found.estimated
    for layer, (_, true, plain) in _weights(made, "pissa_niter").items():
        wanted = float((plain - true).norm() / true.norm())
        assert wanted / 4 < found.errors[layer] < 4 * wanted, layer


def test_the_scales_of_the_engines_are_those_that_were_measured(made: Made, tmp_path: Path) -> None:
    """One adapter with all three of rsLoRA and the patterns; the ratios are those that were read off the engines."""
    patterns = {"rank_pattern": {"q_proj": 4, "v_proj": 2}, "alpha_pattern": {"down_proj": 4}}
    torch.manual_seed(1)
    fields: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = peft.get_peft_model(made.base(), peft.LoraConfig(use_rslora=True, **patterns, **fields))
    for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    found = doctor(tmp_path)
    prefix, names = "model.layers.0.", ("mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj")
    wanted = {"sglang": (1.41, 0.25, 0.18), "llama.cpp": (1.41, 0.5, 0.71), "lorax": (4.0, 0.71, 0.5)}
    for engine, ratios in wanted.items():
        assert [found[engine].ratios.get(prefix + n, 1.0) for n in names] == pytest.approx(ratios, abs=0.006), engine
    assert found["vllm"].verdict is found["peft"].verdict is Verdict.LOADS
    # Without a base: a wrong scale alone is as wrong as it is far from 1.
    assert found["lorax"].errors[f"{prefix}mlp.down_proj"] == pytest.approx(3.0)
    assert found["lorax"].worst is not None
    assert found["lorax"].worst[1] == pytest.approx(3.0)


def test_lorax_scales_by_the_padded_rank_of_the_kind_before(made: Made, tmp_path: Path) -> None:
    """α/r for the first kind; then r is what the kind before was padded to, 8 or a multiple of 16."""
    patterns = {"rank_pattern": {"k_proj": 2, "down_proj": 20}}
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 4, "target_modules": TARGETS}
    peft.get_peft_model(made.base(), peft.LoraConfig(**patterns, **fields)).save_pretrained(tmp_path)
    found = doctor(tmp_path)["lorax"]
    # kind: (rank that it divides by, rank that is right)
    wanted = {"q_proj": (4, 4), "k_proj": (8, 2), "v_proj": (8, 4), "down_proj": (8, 20)}
    for kind, (theirs, ours) in wanted.items():
        ratios = [found.ratios.get(name, 1.0) for name in doctor(tmp_path).survey.layers if name.endswith(kind)]
        assert ratios == pytest.approx([ours / theirs] * 2), kind
    assert doctor(made.folder("narrow"))["lorax"].ratios.keys() == {
        name for name in doctor(made.folder("narrow")).survey.layers if not name.endswith("q_proj")
    }


def test_scale_and_magnitude_together_match_dense_float64() -> None:
    from headstart.files.doctor.deviation import Placed, Reader, deviation
    from headstart.files.doctor.survey import Layer

    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((9, 7), (3, 7), (9, 3)))
    m = torch.rand(9, generator=generator, dtype=torch.float64) + 0.5
    there = Placed(Layer("x", {}, 3, 3, 1.0, (9, 7), "F64"), (Block(W, A, B, m),))

    def dora(change: Tensor) -> Tensor:
        return m[:, None] * (W + change) / (W + change).norm(dim=1, keepdim=True) - W

    true, U = dora(B @ A), B @ A
    for reader, engine in (
        (Reader(0.3, no_magnitude=True), 0.3 * U),
        (Reader(0.3), dora(0.3 * U)),
        (Reader(dropped=True, no_magnitude=True), 0 * U),
    ):
        assert deviation(there, reader, {}) == pytest.approx(float((engine - true).norm() / true.norm()), rel=1e-9)
    A0, B0 = torch.randn(2, 7, generator=generator).double(), torch.randn(9, 2, generator=generator).double()
    plain = Placed(there.layer, (Block(W, A, B),))
    wanted = float((0.7 * U - (U - B0 @ A0)).norm() / (U - B0 @ A0).norm())
    assert deviation(plain, Reader(0.7, plain_start=True), {0: (A0, B0)}) == pytest.approx(wanted, rel=1e-9)
    assert deviation(plain, Reader(plain_start=True), {}) is None


# ------------------------------------------------------------------ starts that live in a changed base


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        *((n, False) for n in ("plain", "gaussian", "orthogonal")),
        *((n, True) for n in ("pissa", "pissa_niter", "olora")),
    ],
)
def test_factors_repeat_the_base_where_the_start_is_still_in_them(name: str, holds: bool, made: Made) -> None:
    repeats = doctor(made.folder(name), made.base()).repeats
    assert len(repeats) == 8
    assert all((value > 0.9) == holds and (value < 0.35) != holds for value in repeats.values()), repeats


@pytest.mark.parametrize("init", ["pissa", "olora", "milora", "eva", "lora_one", "lora_ga"])
def test_what_we_save_never_needs_a_changed_base(init: str, made: Made, tmp_path: Path) -> None:
    model = made.base()
    batches = [{"input_ids": _ids(), "labels": _ids()}] * 4
    data = batches if init in ("eva", "lora_one", "lora_ga") else None
    adapter = hs.adapt(model, hs.LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=init), data=data)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    hs.save(model, tmp_path)
    found = doctor(tmp_path, made.base())
    assert found.healthy, [f.what for f in found.faults]
    assert {found[key].verdict for key in SERVERS} == {Verdict.LOADS}


def test_a_start_that_the_config_hides_is_found_on_the_base(made: Made, tmp_path: Path) -> None:
    folder = changed(made.copied("pissa", tmp_path), init_lora_weights=True)
    assert doctor(folder).healthy  # nothing in the file tells
    found = doctor(folder, made.base())
    assert not found.healthy
    assert "repeat the base's own weights" in found.faults[0].what
    assert {found[key].verdict for key in SERVERS} == {Verdict.DIFFERS}


def test_a_conversion_whose_config_was_not_changed_is_found(made: Made, tmp_path: Path) -> None:
    folder = changed(made.copied("plain", tmp_path), init_lora_weights="pissa")
    assert "do not hold such a start" in doctor(folder, made.base()).faults[0].what


@pytest.mark.parametrize("name", ["pissa", "olora", "pissa_dora"])
def test_restored_is_what_was_trained_here_and_in_peft(name: str, made: Made, tmp_path: Path) -> None:
    folder = made.folder(name)
    restore(folder, made.base(), tmp_path / "fixed")
    assert _apart(_logits(peft.PeftModel.from_pretrained(made.base(), tmp_path / "fixed")), made.logits[name]) < 1e-5
    ours = made.base()
    hs.load(ours, tmp_path / "fixed")
    assert _apart(_logits(ours), made.logits[name]) < 1e-5
    if name != "pissa_dora":
        assert doctor(tmp_path / "fixed", made.base()).healthy


def test_nothing_is_restored_that_does_not_follow_from_the_base(made: Made, tmp_path: Path) -> None:
    for name in ("plain", "pissa_niter", "lora_ga"):
        with pytest.raises(AdapterFormatError, match="follow from a base"):
            restore(made.folder(name), made.base(), tmp_path / "fixed")
    other = made.base()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    with pytest.raises(WrongBase, match="does not hold a pissa start"):
        restore(made.folder("pissa"), other, tmp_path / "fixed")
    assert not (tmp_path / "fixed").exists()


# ------------------------------------------------------------------ the table


def test_the_table_is_whole() -> None:
    for rule in RULES:
        assert rule.engines
        assert set(rule.engines) <= set(KEYS)
        assert rule.because
        assert rule.source
        assert rule.repair or rule.verdict is Verdict.LOADS, rule.because
        assert not rule.because.endswith("."), rule.because
    assert len({engine.key for engine in ENGINES}) == len(ENGINES)


def _fired(folder: Path) -> set[tuple[str, str]]:
    return {(key, f.source) for key in SERVERS for f in doctor(folder)[key].findings}


def test_every_rule_about_peft_folders_is_met_by_some_folder(made: Made, tmp_path: Path) -> None:
    """A rule that nothing meets would be a line of prose."""
    folders = [made.folder(name) for name in FIELDS]
    odd: dict[str, dict[str, Any]] = {
        "corda": {"init_lora_weights": "corda"}, "loftq": {"init_lora_weights": "loftq"},
        "unknown": {"init_lora_weights": "lora_one"}, "bias": {"bias": "all"}, "alpha": {"lora_alpha": None},
        "left out": {"target_modules": ["q_proj"]}, "no magnitudes": {"use_dora": True},
        "unsaved": {"modules_to_save": ["norm"]},
        "alora": {"alora_invocation_tokens": [1]}, "rank": {"r": 5}, "base": {"base_model_name_or_path": None},
    }  # fmt: skip
    folders += [changed(made.copied("plain", tmp_path / name), **fields) for name, fields in odd.items()]
    folders.append(changed(made.copied("dora", tmp_path / "untold"), use_dora=False))
    layer = "base_model.model.model.layers.0."
    more: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
        "norm": lambda t: {**t, f"{layer}input_layernorm.weight": torch.ones(32)},
        "half": lambda t: {n: v for n, v in t.items() if not n.startswith(f"{layer}mlp.down_proj.lora_B")},
        "bare": lambda t: {n.removeprefix("base_model.model."): v for n, v in t.items()},
        "wide": lambda t: {n: torch.ones((600, 32) if "lora_A" in n else (len(v), 600)) for n, v in t.items()},
    }  # fmt: skip
    folders += [retensored(made.copied("plain", tmp_path / name), change) for name, change in more.items()]
    tokens = made.copied("plain", tmp_path / "added")
    (tokens / "added_tokens.json").write_text("{}")
    met = set().union(*map(_fired, [*folders, tokens]))
    unmet = [r for r in RULES if not any((key, r.source) in met for key in r.engines) and r.engines[0] in SERVERS]
    assert not unmet, [rule.because for rule in unmet]


def test_plain_lora_is_well_everywhere_and_commands_are_filled_in(made: Made) -> None:
    found = doctor(made.folder("plain"))
    assert found.healthy
    assert found["mlx"].verdict is Verdict.FOREIGN
    assert found["mlx"].findings[0].repair == f"headstart export {made.folder('plain')} --profile mlx --out fixed/"
    for name in FIELDS:
        for reading in doctor(made.folder(name)).readings:
            assert not re.search(r"[{]\w+[}]", "".join(f.repair + f.because for f in reading.findings))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("dora", {"vllm": "refuses", "sglang": "refuses", "llama.cpp": "refuses", "lorax": "differs"}),
        ("pissa", {"peft": "loads", "vllm": "refuses", "sglang": "differs", "llama.cpp": "differs"}),
        ("lora_ga", {"peft": "differs", "vllm": "differs", "sglang": "differs"}),
        ("rslora", {"vllm": "loads", "sglang": "differs", "lorax": "loads", "llama.cpp": "differs"}),
        ("uneven", {"vllm": "loads", "lorax": "refuses", "sglang": "refuses"}),
        ("narrow", {"vllm": "loads", "lorax": "differs", "sglang": "loads", "llama.cpp": "loads"}),
        ("patterns", {"vllm": "loads", "sglang": "refuses", "lorax": "differs", "llama.cpp": "differs"}),
        ("saved", {"peft": "loads", "vllm": "refuses", "sglang": "differs", "llama.cpp": "refuses"}),
        ("embeddings", {"vllm": "loads", "lorax": "differs"}),
        ("tokens", {"vllm": "refuses", "lorax": "differs", "llama.cpp": "refuses"}),
        ("biased", {"vllm": "refuses"}),
        ("last_layer", {"vllm": "loads", "lorax": "differs"}),
        ("queries", {"vllm": "loads", "sglang": "refuses"}),
        ("regex", {"vllm": "loads", "sglang": "refuses"}),
        ("rank_32", {"vllm": "loads", "sglang": "loads"}),
    ],
)
def test_verdicts(name: str, wanted: dict[str, str], made: Made) -> None:
    found = verdicts(made.folder(name))
    assert {key: found[key].name.lower() for key in wanted} == wanted


def test_only_the_engines_asked_about_count(made: Made) -> None:
    assert not doctor(made.folder("dora")).healthy
    assert doctor(made.folder("dora"), engines=["peft"]).healthy
    assert not doctor(made.folder("plain"), engines=["mlx"]).healthy
    with pytest.raises(BadOption, match="did you mean 'vllm'"):
        doctor(made.folder("plain"), engines=["vlm"])


# ------------------------------------------------------------------ other formats


def test_mlx_and_kohya_files_are_known(made: Made, tmp_path: Path) -> None:
    A, B = torch.randn(4, 32), torch.randn(48, 4)
    mlx = tmp_path / "mlx"
    mlx.mkdir()
    save_file(
        {"m.layers.0.q.lora_a": A.T.contiguous(), "m.layers.0.q.lora_b": B.T.contiguous()}, mlx / "adapters.safetensors"
    )
    settings = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 4, "scale": 0.5, "dropout": 0}}
    (mlx / CONFIG).write_text(json.dumps(settings))
    found = doctor(mlx)
    assert found.healthy
    assert found["mlx"].verdict is Verdict.LOADS
    assert found["peft"].verdict is Verdict.FOREIGN
    assert inspect(mlx).layers[0].norm == pytest.approx(0.5 * float((B @ A).norm()), rel=1e-5)
    file = tmp_path / "pictures.safetensors"
    name = "lora_unet_down_blocks_0_attn1_to_q"
    kohya = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(2.0)}
    save_file(kohya, file)
    found = doctor(file)
    assert found.healthy
    assert found["kohya"].verdict is found["diffusers"].verdict is Verdict.LOADS
    assert inspect(file).layers[0].norm == pytest.approx(0.5 * float((B @ A).norm()), rel=1e-5)


def test_a_file_for_a_pipeline_of_diffusers_is_known_by_its_names(tmp_path: Path) -> None:
    A, B = torch.randn(4, 32), torch.randn(48, 4)
    for part in ("transformer.single_transformer_blocks.0.attn.to_q", "unet.mid_block.attn1.to_q"):
        file = tmp_path / "flux.safetensors"
        save_file({f"{part}.lora_A.weight": A, f"{part}.lora_B.weight": B}, file)
        found = doctor(file)
        assert (found.survey.dialect.name, found.survey.place) == ("diffusers", file)
        assert found.healthy
        assert found["diffusers"].verdict is Verdict.LOADS
    gpt2 = "transformer.h.0.attn.c_attn"
    save_file({f"{gpt2}.lora_A.weight": A, f"{gpt2}.lora_B.weight": B}, file)
    assert doctor(file).survey.dialect.name == "PEFT"


@pytest.mark.parametrize("part", ["hada_w1_a", "lokr_w1"])
def test_another_method_is_called_one(part: str, tmp_path: Path) -> None:
    save_file(
        {f"lora_unet_x.{part}": torch.randn(4, 4), "lora_unet_x.alpha": torch.ones(())}, tmp_path / "x.safetensors"
    )
    found = doctor(tmp_path / "x.safetensors")
    assert "LoHa, LoKr" in found.faults[0].what
    assert found["kohya"].verdict is Verdict.REFUSES


def test_what_is_named_as_a_repair_can_be_done(made: Made, tmp_path: Path) -> None:
    """An export that would be refused is no repair."""
    for name in ("dora", "saved", "narrow"):
        folder = made.folder(name)
        lorax = doctor(folder, base_name="BASE")["lorax"]
        portable = any("--profile portable" in finding.repair for finding in lorax.findings)
        assert lorax.findings
        assert portable == (name == "narrow")
        if not portable:
            assert any(finding.repair == f"headstart merge BASE {folder} --out merged/" for finding in lorax.findings)
            with pytest.raises(HeadstartError):
                hs.export(folder, tmp_path / "fixed")
    stated = changed(made.copied("plain", tmp_path / "stated"), r=4)
    repairs = [finding.repair for finding in doctor(stated)["peft"].findings]
    assert any("rank into the config" in repair for repair in repairs)
    cut = made.copied("plain", tmp_path / "cut")
    (cut / TENSORS).write_bytes((cut / TENSORS).read_bytes()[:999])
    assert doctor(cut)["mlx"].findings[0].repair == ""


# ------------------------------------------------------------------ the wrong base


def test_another_base_is_named_by_its_layer(made: Made, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaForCausalLM(LlamaConfig(vocab_size=259, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2))  # fmt: skip
    told = doctor(made.folder("plain"), wide).faults[0].what
    assert "model.layers." in told
    assert "another base" in told
    assert "does not have" in doctor(made.folder("plain"), nn.Sequential(nn.Linear(3, 3))).faults[0].what
    model = made.base()
    hs.adapt(model, hs.LoraConfig(r=8, target_modules=TARGETS))
    hs.save(model, tmp_path)
    other = made.base()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter))
    assert doctor(tmp_path, made.base()).healthy
    assert "another base" in doctor(tmp_path, other).faults[0].what


# ------------------------------------------------------------------ mangled files


def _raw(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    (folder / TENSORS).write_bytes(change((folder / TENSORS).read_bytes()))
    return folder


def _header(change: Callable[[dict[str, Any]], str]) -> Callable[[bytes], bytes]:
    def mangled(data: bytes) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        text = change(json.loads(data[8 : 8 + size])).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return mangled


def _with(name: str, **fields: Any) -> Callable[[dict[str, Any]], str]:
    def change(header: dict[str, Any]) -> str:
        first = sorted(n for n in header if n != "__metadata__")[0]
        header[first] |= fields
        return json.dumps(header)

    return change


def _renamed(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda t: {**t, name: torch.ones(2)}


def _poisoned(value: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = sorted(tensors)[0]
        tensors[name].view(-1)[3] = value
        return tensors

    return change


def _state_dict(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(r"(lora_[AB])", r"\1.default", name): value for name, value in tensors.items()}


def _reshaped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v[:3].contiguous() if n.endswith("0.mlp.down_proj.lora_A.weight") else v for n, v in tensors.items()}


def _linked(folder: Path) -> Path:
    target = folder.parent / "elsewhere.safetensors"
    os.replace(folder / TENSORS, target)
    (folder / TENSORS).symlink_to(target)
    return folder


def _text(text: str) -> Callable[[Path], Path]:
    def change(folder: Path) -> Path:
        (folder / CONFIG).write_text(text)
        return folder

    return change


MANGLED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (lambda f: _raw(f, lambda d: d[: len(d) // 2]), "damaged|cut off"),
    "cut in the header": (lambda f: _raw(f, lambda d: d[:100]), "cut off"),
    "empty": (lambda f: _raw(f, lambda d: b""), "cut off"),
    "a header of 2^63 bytes": (lambda f: _raw(f, lambda d: struct.pack("<Q", 1 << 63) + d[8:]), "cut off"),
    "trailing bytes": (lambda f: _raw(f, lambda d: d + b"more"), "damaged"),
    "overlapping offsets": (lambda f: _raw(f, _header(_with("", data_offsets=[0, 8]))), "damaged"),
    "offsets past the end": (lambda f: _raw(f, _header(_with("", data_offsets=[0, 1 << 40]))), "damaged"),
    "a shape that overflows": (lambda f: _raw(f, _header(_with("", shape=[1 << 62, 1 << 62]))), "damaged"),
    "a negative shape": (lambda f: _raw(f, _header(_with("", shape=[-1, 4]))), "damaged|shape"),
    "no such dtype": (lambda f: _raw(f, _header(_with("", dtype="F33"))), "damaged"),
    "a list for a header": (lambda f: _raw(f, _header(lambda h: "[1]")), "not an object"),
    "a header that nests": (lambda f: _raw(f, _header(lambda h: "[" * 100_000)), "nested|JSON"),
    "a name twice": (lambda f: _raw(f, _header(lambda h: json.dumps(h)[:-1] + ',"x":{},"x":{}}')), "twice"),
    "NaN": (lambda f: retensored(f, _poisoned(math.nan)), "NaN or infinity"),
    "infinity": (lambda f: retensored(f, _poisoned(math.inf)), "NaN or infinity"),
    "half a pair": (lambda f: retensored(f, lambda t: dict(sorted(t.items())[1:])), "half a pair"),
    "shapes that do not multiply": (lambda f: retensored(f, _reshaped), "do not multiply"),
    "integers": (lambda f: retensored(f, lambda t: {n: v.int() for n, v in t.items()}), "no floating-point"),
    "names of a state dict": (lambda f: retensored(f, _state_dict), "as in a state_dict"),
    "no factors": (lambda f: retensored(f, lambda t: {"x": torch.ones(2)}), "no LoRA factors"),
    "a name that climbs": (lambda f: retensored(f, _renamed("../../etc/passwd")), "names that no module has"),
    "a name with a slash": (lambda f: retensored(f, _renamed("/abs.weight")), "names that no module has"),
    "a link out of the folder": (_linked, "is a link to"),
    "no config": (lambda f: ((f / CONFIG).unlink(), f)[1], "the scale is unknown"),
    "no JSON": (_text("{r: 4"), "no JSON"),
    "JSON that nests": (_text("[" * 100_000), "nested|JSON"),
    "a list": (_text("[]"), "not an object"),
    "a huge config": (_text(json.dumps({"r": 4, "x": "y" * (1 << 20)})), "larger than 1 MiB"),
    "not UTF-8": (lambda f: ((f / CONFIG).write_bytes(b"\xff\xfe{}"), f)[1], "not UTF-8"),
    "no alpha": (lambda f: changed(f, lora_alpha=None), "no lora_alpha"),
    "no rank": (lambda f: changed(f, r=None), "no r"),
    "a rank of zero": (lambda f: changed(f, r=0), "positive integer"),
    "a rank that is a word": (lambda f: changed(f, r="four"), "positive integer"),
    "an alpha of 1e400": (_text('{"peft_type":"LORA","r":4,"lora_alpha":1e400}'), "finite number"),
    "an integer of 5000 digits": (_text('{"peft_type":"LORA","r":4,"lora_alpha":1' + "0" * 5000 + "}"), "JSON|finite"),
    "a pattern that takes for ever": (lambda f: changed(f, rank_pattern={"(a+)+b": 4}), "too complex"),
    "a pattern that is none": (lambda f: changed(f, alpha_pattern={"[": 4}), "malformed"),
    "a field of tomorrow": (lambda f: changed(f, lora_scaling_kind="cubic"), "may change the function"),
}  # fmt: skip


@pytest.mark.parametrize("name", MANGLED)
def test_what_is_mangled_is_told_and_never_raised(name: str, made: Made, tmp_path: Path) -> None:
    mangle, wanted = MANGLED[name]
    folder = mangle(made.copied("plain", tmp_path / "adapter"))
    before = sorted((p.name, p.read_bytes()) for p in folder.iterdir())
    for base in (None, made.base()):
        found = doctor(folder, base)
        assert not found.healthy
        assert re.search(wanted, " ".join(f.what for f in found.faults)), [f.what for f in found.faults]
        assert json.loads(found.to_json())["healthy"] is False
    assert sorted((p.name, p.read_bytes()) for p in folder.iterdir()) == before


def test_a_hub_snapshot_links_to_its_blobs(made: Made, tmp_path: Path) -> None:
    """The cache of the hub is made of links, and these are no escape."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1234"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name in (CONFIG, TENSORS):
        (blobs / name).write_bytes((made.folder("plain") / name).read_bytes())
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert doctor(snapshot).healthy


class _Trap:
    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.mkdir, ("trapped",)


def test_a_pickle_is_refused_unopened(tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / CONFIG).write_bytes((made.folder("plain") / CONFIG).read_bytes())
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(AdapterFormatError, match=r"pickle, which may run anything and is not opened: .*weights_only"):
        doctor("adapter")
    assert not Path("trapped").exists()


def test_what_is_no_adapter_is_refused(tmp_path: Path, made: Made) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    ia3 = changed(made.copied("plain", tmp_path / "ia3"), peft_type="IA3")
    os.mkfifo(tmp_path / "empty" / TENSORS)
    made.copied("plain", tmp_path / "several" / "first")
    for place, wanted in (
        (tmp_path / "empty", "no adapter"),
        (tmp_path / "several", "pass one of its folders: 'first'"),
        (tmp_path / "nowhere", "neither a folder"),
        (tmp_path / "model.gguf", "GGUF"),
        (ia3, "only LORA adapters"),
        (Path("a\0b"), "cannot look|neither"),
    ):
        for look in (doctor, inspect):
            with pytest.raises(AdapterFormatError, match=wanted):
                look(place)


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_random_bytes_crash_nothing(file: str, made: Made, tmp_path: Path) -> None:
    """120 copies with some bytes set, cut out, doubled or put in, most of them where the header is."""
    source = (made.folder("patterns") / file).read_bytes()
    folder, generator = made.copied("patterns", tmp_path), random.Random(0)
    ends = min(len(source), 6000)
    for _ in range(120):
        data = bytearray(source)
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(ends)
            kind = generator.randrange(4)
            if kind == 0:
                data[at : at + 1] = bytes([generator.randrange(256)])
            elif kind == 1:
                del data[at : at + generator.randint(1, 40)]
            elif kind == 2:
                data[at:at] = data[at : at + generator.randint(1, 40)]
            else:
                data[at:at] = generator.choice([b"}", b"]", b'"', b"null", b"-1", b"1e99", b"9" * 30, b"\0"])
        (folder / file).write_bytes(data)
        for look in (doctor, inspect):
            try:
                look(folder).to_json()
            except HeadstartError:
                continue


# ------------------------------------------------------------------ the command line


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    from headstart import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["headstart", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    said = capsys.readouterr()
    return int(stopped.value.code or 0), said.out, said.err


def test_exit_codes_and_output(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "doctor", str(made.folder("plain")))
    assert code == 0
    assert "well in every engine asked about" in out
    code, out, _ = _run(capsys, "doctor", str(made.folder("rslora")))
    assert code == 1
    assert "use_rslora=True" in out
    assert "--profile portable" in out
    code, out, _ = _run(capsys, "doctor", str(made.folder("rslora")), "--engine", "vllm")
    assert code == 0
    code, out, _ = _run(capsys, "doctor", str(made.folder("rslora")), "--json")
    assert code == 1
    assert json.loads(out)["engines"]["sglang"]["worst"]["relative_error"] == pytest.approx(1 - 8**-0.5)
    faulty = changed(made.copied("plain", tmp_path / "faulty"), init_lora_weights="pissa")
    made.base().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    code, out, _ = _run(capsys, "doctor", str(faulty), "--base", str(tmp_path / "base"))
    assert code == 1
    assert "loads what is wrong" in out
    assert not re.search(r"^\S.*  loads$", out, re.MULTILINE), "no engine is said to be well"
    code, out, err = _run(capsys, "doctor", str(tmp_path / "nowhere"))
    assert (code, out) == (2, "")
    assert err.startswith("AdapterFormatError: ")
    assert err.count("\n") == 1
    assert _run(capsys, "doctor", str(made.folder("pissa")), "--restore", str(tmp_path / "x"))[0] == 2


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_on_disk_is_looked_at_and_not_loaded(
    tied: bool, made: Made, llama: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headstart.tune import models

    base: Any = llama() if tied else made.base()
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    source = models.find(str(tmp_path / "base"))
    loaded: Any = models.load(source)
    with monkeypatch.context() as patch:
        patch.setattr(models, "load", lambda *_, **__: pytest.fail("loaded"))
        seen: Any = models.viewed(source)
    assert seen.config._name_or_path == loaded.config._name_or_path
    there, wanted = dict(seen.named_parameters()), dict(loaded.named_parameters())
    assert there.keys() == wanted.keys()  # tied as the model ties them
    assert all(torch.equal(there[name], wanted[name]) for name in wanted)
    for name in ("pissa", "dora", "plain"):
        found, expected = (doctor(made.folder(name), model) for model in (seen, loaded))
        assert json.loads(found.to_json()) == json.loads(expected.to_json())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_base_on_disk_takes_no_memory(tmp_path: Path) -> None:
    """Of its own: pages of files are the system's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from headstart.files.merging.mapped import mapped

    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=80_000, num_hidden_layers=1, tie_word_embeddings=False, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path)

    def own() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

    before = own()
    model = mapped(tmp_path)
    assert all(bool(value.isfinite().all()) for value in model.parameters() if value.numel() < 1e6)
    assert float(dict(model.named_parameters())["lm_head.weight"].norm()) > 0
    assert own() - before < 40  # of 164 MiB


def test_a_base_that_its_files_hold_otherwise_is_loaded(made: Made, tmp_path: Path) -> None:
    from headstart.tune import models

    base: Any = made.base()
    base.save_pretrained(tmp_path / "base")
    torch.save(base.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "base" / "model.safetensors").unlink()
    found = models.viewed(models.find(str(tmp_path / "base")))
    assert torch.equal(dict(found.named_parameters())["lm_head.weight"], base.lm_head.weight)


def test_the_base_is_loaded_and_the_start_restored(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made.base().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    adapter, base, fixed = str(made.folder("pissa")), str(tmp_path / "base"), str(tmp_path / "fixed")
    code, out, _ = _run(capsys, "doctor", adapter, "--base", base)
    assert code == 1
    assert "× the update" in out
    assert f"headstart doctor {adapter} --base {base} --restore fixed/" in out
    code, out, _ = _run(capsys, "doctor", adapter, "--base", base, "--restore", fixed)
    assert code == 0
    assert fixed.rsplit("/", 1)[-1] in out


def test_a_stranger_cannot_command_the_terminal(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    escape = "base_model.model.\x1b[2Jlayer[bold].lora_A.weight"
    folder = retensored(made.copied("plain", tmp_path / "a b;c"), lambda t: {**t, escape: torch.ones(4, 8)})
    code, out, _ = _run(capsys, "doctor", str(folder))
    assert code == 1
    assert "\x1b" not in out
    assert "a b;c'" in out  # quoted in the commands that are to be copied


def test_examining_changes_no_model_and_no_random_state(made: Made) -> None:
    model = made.base()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    doctor(made.folder("pissa"), model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_repetition_of_nothing_is_nothing() -> None:
    W = torch.randn(6, 5, dtype=torch.float64)
    assert repetition(Block(W, torch.randn(2, 5).double(), torch.zeros(6, 2).double())) == 0.0
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    padded = torch.cat([U[:, :2], torch.zeros(6, 2).double()], 1)  # zero columns reach nothing
    assert repetition(Block(W, torch.cat([S[:2, None] * V[:2], torch.ones(2, 5).double()]), padded)) == pytest.approx(
        1.0
    )


def test_warnings_of_files_are_findings(made: Made, tmp_path: Path) -> None:
    folder = changed(made.copied("plain", tmp_path), some_new_switch=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert doctor(folder).healthy
