"""Bad input, faults and interruptions: each gets its named error, and the model stays what it was, to the bit.

The tables read: what is wrong, how, the error, words of its message.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import headstart as hs
import headstart.peft
from headstart.errors import (
    AdapterFormatError,
    AdapterState,
    BadAlpha,
    BadOption,
    BadRank,
    CalibrationError,
    FileError,
    HeadstartError,
    KeyMismatch,
    MetaWeight,
    NonFiniteWeight,
    NoTarget,
    OutputBusy,
    UnknownField,
    UnknownInit,
    UnsupportedLayer,
    WrongBase,
)
from headstart.files import adapter as format_
from headstart.inits import strategy as registry
from headstart.lora import adapt as lora
from headstart.lora import starts
from headstart.lora.adapter import Adapter, adapter_of
from headstart.lora.layers import LoraLayer

IDS = torch.arange(12).reshape(3, 4)
INSTALLERS = {"adapt": hs.adapt, "get_peft_model": headstart.peft.get_peft_model}
LOADERS = {"load": hs.load, "from_pretrained": headstart.peft.from_pretrained}
NEEDS_FORK = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that is then killed or limited")

pytestmark = pytest.mark.filterwarnings("ignore:.*shared a weight with other modules", "ignore:.*fork")


# ------------------------------------------------------------------ the model, and what it is to the bit


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.down = nn.Linear(16, 16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.v(x + self.q(x))))


class Net(nn.Module):
    """A head tied to the embedding, three blocks, a convolution, an attention, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.mix = nn.Conv1d(16, 16, 1, groups=4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(self.mix(x.mT)).mT)


def net(seed: int = 0) -> Net:
    """A model with mixed flags and modes, a hook and an attribute of its owner's."""
    torch.manual_seed(seed)
    model = Net()
    model.blocks[0].eval()
    model.blocks[1].v.weight.requires_grad_(False)
    model.blocks[1].q.register_forward_hook(lambda module, inputs, output: None)
    model.note = {"mine": [1, 2]}  # type: ignore[assignment]
    return model


def outputs(model: nn.Module, adapted: bool = True) -> Tensor:
    """What the model computes in evaluation; a copy computes it."""
    with torch.no_grad():
        return copy.deepcopy(model).eval()(IDS)  # type: ignore[no-any-return]


def bits(tensor: Tensor) -> object:
    if tensor.is_meta:
        return tuple(tensor.shape), tensor.dtype
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Everything that a failure must not change: values, flags, gradients, modes, types, hooks, attributes, RNG."""
    found: dict[str, object] = {"rng": bits(torch.get_rng_state())}
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"module {name}"] = id(module), type(module)
        for key, value in module.__dict__.items():
            table = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else None
            plain = isinstance(value, bool | int | float | str | tuple | set | None)
            found[f"attribute {name}.{key}"] = value if plain else (id(value), table)
    for name, tensor in itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        gradient = None if tensor.grad is None else (id(tensor.grad), bits(tensor.grad))
        found[f"tensor {name}"] = id(tensor), tensor.requires_grad, gradient, bits(tensor)
    return found


@contextlib.contextmanager
def refused(model: nn.Module, error: type[BaseException], *words: str) -> Iterator[None]:
    """The block raises this very error, which says these words, and the model is what it was."""
    before = fingerprint(model)
    with pytest.raises(error) as caught:
        yield
    assert caught.type is error
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{caught.value!s} does not say {missing}"
    after = fingerprint(model)
    assert {key for key in before | after if before.get(key) != after.get(key)} == set()


def trained(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model after something like training: every trainable number moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def config(**fields: Any) -> hs.LoraConfig:
    return hs.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"], **fields})


# ------------------------------------------------------------------ configuration

PISSA = {"init_lora_weights": "pissa"}
CONFIGS: list[tuple[str, Mapping[str, Any], type[HeadstartError], list[str]]] = [
    ("rank 0", {"r": 0}, BadRank, ["r is 0", "at least 1"]),
    ("a negative rank", {"r": -1}, BadRank, ["r is -1"]),
    ("a fractional rank", {"r": 4.5}, BadRank, ["4.5", "integer"]),
    ("a rank as text", {"r": "8"}, BadRank, ["'8'"]),
    ("a rank that is a truth", {"r": True}, BadRank, ["True"]),
    ("a bad rank in a pattern", {"rank_pattern": {"q": 0}}, BadRank, ["rank_pattern['q']", "0"]),
    ("alpha NaN", {"lora_alpha": math.nan}, BadAlpha, ["nan", "finite"]),
    ("alpha infinite", {"lora_alpha": math.inf}, BadAlpha, ["inf"]),
    ("alpha as text", {"lora_alpha": "16"}, BadAlpha, ["'16'"]),
    ("alpha 0 where s divides", {"lora_alpha": 0, "init_lora_weights": "pissa"}, BadAlpha, ["'pissa'", "positive"]),
    ("alpha < 0 where s divides", {"lora_alpha": -8, "init_lora_weights": "olora"}, BadAlpha, ["'olora'", "-8"]),
    ("a bad alpha in a pattern", {"alpha_pattern": {"q": math.nan}}, BadAlpha, ["q", "finite"]),
    ("dropout above 1", {"lora_dropout": 1.5}, BadOption, ["lora_dropout", "1.5"]),
    ("dropout 1, which drops all", {"lora_dropout": 1.0}, BadOption, ["lora_dropout"]),
    ("dropout NaN", {"lora_dropout": math.nan}, BadOption, ["lora_dropout"]),
    ("dropout as text", {"lora_dropout": "0.1"}, BadOption, ["lora_dropout", "'0.1'"]),
    ("an unknown init", {"init_lora_weights": "pisa"}, UnknownInit, ["'pisa'", "did you mean 'pissa'"]),
    ("no init", {"init_lora_weights": ""}, UnknownInit, ["''", "known:"]),
    ("niter that is no number", {"init_lora_weights": "pissa_niter_x"}, UnknownInit, ["pissa_niter_x"]),
    ("a negative niter", {"init_lora_weights": "pissa_niter_-1"}, UnknownInit, ["pissa_niter_-1"]),
    ("an unknown option", {"init_lora_weights": "pissa", "init_options": {"iter": 3}}, BadOption, ["'iter'", "niter"]),
    ("an option of another init", {"init_options": {"niter": 3}}, BadOption, ["'kaiming'", "'niter'"]),
    ("niter twice", {"init_lora_weights": "pissa_niter_16", "init_options": {"niter": 4}}, BadOption, ["=16", "=4"]),
    ("niter undone", {"init_lora_weights": "pissa_niter_9", "init_options": {"niter": None}}, BadOption, ["=None"]),
    ("niter as text", {**PISSA, "init_options": {"niter": "x"}}, BadOption, ["'niter'", "'pissa'", "'x'", "integer"]),
    ("a fractional niter", {**PISSA, "init_options": {"niter": 4.0}}, BadOption, ["4.0", "None or an integer"]),
    ("niter that is a truth", {**PISSA, "init_options": {"niter": True}}, BadOption, ["True", "default is None"]),
    ("a tolerance as text", {**PISSA, "init_options": {"tolerance": "1e-4"}}, BadOption, ["'1e-4'", "0.0001"]),
    ("no tolerance", {**PISSA, "init_options": {"tolerance": None}}, BadOption, ["tolerance", "a number"]),
    ("a flag as a number", {"init_lora_weights": "init_ab", "init_options": {"reset": 1}}, BadOption, ["or False"]),
    ("an unknown bias", {"bias": "some"}, BadOption, ["'some'", "'lora_only'"]),
    ("a seed as text", {"seed": "0"}, BadOption, ["seed", "integer"]),
    ("a broken expression", {"target_modules": "(q"}, BadOption, ["target_modules", "regular expression"]),
    ("a broken exclusion", {"exclude_modules": "*q"}, BadOption, ["exclude_modules", "regular expression"]),
    ("a broken pattern", {"rank_pattern": {"(q": 4}}, BadOption, ["rank_pattern", "regular expression"]),
    ("layers of an expression", {"target_modules": ".*q", "layers_to_transform": 0}, BadOption, ["list"]),
    ("a layers_pattern alone", {"layers_pattern": "blocks"}, BadOption, ["layers_to_transform"]),
    ("dropout on parameters", {"target_parameters": ["q.weight"], "lora_dropout": 0.1}, BadOption, ["lora_dropout=0"]),
    ("DoRA on parameters", {"target_parameters": ["q.weight"], "use_dora": True}, BadOption, ["use_dora"]),
    ("targets that are no names", {"target_modules": [1, 2]}, BadOption, ["target_modules", "names"]),
    ("targets that are a number", {"target_modules": 3}, BadOption, ["target_modules", "names"]),
    ("a pattern that is a list", {"rank_pattern": ["q"]}, BadOption, ["rank_pattern", "mapping"]),
    ("modules_to_save as one word", {"modules_to_save": "head"}, BadOption, ["modules_to_save", "list"]),
]


@pytest.mark.parametrize(("fields", "error", "words"), [c[1:] for c in CONFIGS], ids=[c[0] for c in CONFIGS])
def test_a_config_that_cannot_be_meant_is_refused_when_it_is_made(
    fields: dict[str, Any], error: type[HeadstartError], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        hs.LoraConfig(**{"target_modules": ["q"], **fields})
    assert caught.type is error
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("init", "options"),
    [
        ("pissa_niter_16", {"niter": 16}),
        ("pissa", {"niter": None, "tolerance": 1}),
        ("init_ab", {"c": 2, "reset": True}),
        ("normal", {"std": 0}),
    ],
)
def test_options_of_their_kind_are_taken(init: str, options: dict[str, Any]) -> None:
    assert hs.LoraConfig(init_lora_weights=init, init_options=options).options == options


def test_a_word_is_checked_and_what_has_no_plain_kind_is_not() -> None:
    def shaped(shape: Any, rank: int, mode: str = "a", table: Any = None, size: float | None = None) -> Any: ...

    mine = registry.Strategy("mine", shaped, "", "")
    mine.check_options({"mode": "b", "table": {"any": "thing"}, "size": 2})
    for wrong in ({"mode": 1}, {"size": "2"}, {"mode": None}):
        with pytest.raises(BadOption, match="'mine'"):
            mine.check_options(wrong)


def test_an_unknown_field_is_named_with_its_nearest() -> None:
    with pytest.raises(UnknownField, match=r"'lora_alfa'; did you mean 'lora_alpha'"):
        hs.LoraConfig.from_dict({"lora_alfa": 8})


def test_alpha_zero_and_below_are_allowed_where_no_start_divides_by_them() -> None:
    for alpha in (0, -8):
        model = net()
        hs.adapt(model, config(lora_alpha=alpha))
        torch.testing.assert_close(outputs(model), outputs(net()))


# ------------------------------------------------------------------ targets and structure

TARGETS: list[tuple[str, Mapping[str, Any], type[HeadstartError], list[str]]] = [
    ("no target matches", {"target_modules": ["query"]}, NoTarget, ["'query'", "no module", "for example"]),
    ("one of several does not", {"target_modules": ["q", "dwn"]}, NoTarget, ["'dwn'", "did you mean 'down'"]),
    ("no module matches the expression", {"target_modules": ".*_query"}, NoTarget, [".*_query"]),
    ("an exclusion matches nothing", {"exclude_modules": ["hed"]}, NoTarget, ["exclude_modules", "'head'"]),
    ("nothing is left", {"exclude_modules": ["q", "v"]}, NoTarget, ["exclude_modules"]),
    ("a saved module matches nothing", {"modules_to_save": ["hed"]}, NoTarget, ["modules_to_save", "'head'"]),
    ("a rank for nothing", {"rank_pattern": {"qq": 4}}, NoTarget, ["rank_pattern", "'qq'"]),
    ("an alpha for nothing", {"alpha_pattern": {"down": 4}}, NoTarget, ["alpha_pattern", "'down'"]),
    ("a layer that is not there", {"layers_to_transform": [0, 7]}, NoTarget, ["[7]", "[0, 1, 2]"]),
    ("a parameter that is not there", {"target_parameters": ["wieght"]}, NoTarget, ["'wieght'", "weight"]),
    ("a rank that does not fit", {**PISSA, "r": 17}, BadRank, ["17", "(16, 16)", "1 to 16", "clip_rank", "0.q"]),
    ("a rank in a pattern that does not", {**PISSA, "rank_pattern": {"v": 64}}, BadRank, ["rank 64", "blocks.0.v"]),
    ("a rank that groups cannot share", {"target_modules": ["mix"], "r": 6}, BadRank, ["6", "multiple of 4", "mix"]),
    ("a layer without a matrix", {"target_modules": ["norm"]}, UnsupportedLayer, ["BatchNorm1d", "norm"]),
    ("a container", {"target_modules": ["blocks"]}, UnsupportedLayer, ["ModuleList", "'blocks'"]),
    ("what attention never calls", {"target_modules": ["out_proj"]}, UnsupportedLayer, ["'attention'"]),
    ("DoRA on attention", {"target_modules": ["attention"], "use_dora": True}, UnsupportedLayer, ["attention"]),
]


@pytest.mark.parametrize("install", INSTALLERS.values(), ids=INSTALLERS)
@pytest.mark.parametrize(("fields", "error", "words"), [c[1:] for c in TARGETS], ids=[c[0] for c in TARGETS])
def test_a_config_that_does_not_fit_the_model_is_refused_before_anything_changes(
    fields: dict[str, Any], error: type[HeadstartError], words: list[str], install: Callable[..., object]
) -> None:
    model = net()
    with refused(model, error, *words):
        install(model, config(**fields))


PARTS: list[tuple[str, object, type[HeadstartError], list[str]]] = [
    ("parts that do not divide the rows", [True, False, True, False, True], BadOption, ["24 rows", "5", "blocks.0.v"]),
    ("no part at all", [], BadOption, ["24 rows"]),
    ("ranges that overlap", [(0, 8), (4, 12)], BadOption, ["ascending"]),
    ("a range outside", [(0, 25)], BadOption, ["0 to 24"]),
    ("an empty range", [(3, 3)], BadOption, ["row ranges"]),
    ("no ranges", ["a", "b"], BadOption, ["row ranges"]),
    ("a range of three", [(0, 4, 8)], BadOption, ["row ranges"]),
    ("a number", 3, BadOption, ["row ranges"]),
]


@pytest.mark.parametrize(("parts", "error", "words"), [c[1:] for c in PARTS], ids=[c[0] for c in PARTS])
def test_parts_that_describe_no_rows_are_refused(parts: Any, error: type[HeadstartError], words: list[str]) -> None:
    model = net()
    with refused(model, error, *words):
        hs.adapt(model, config(target_modules=["v"], parts={"v": parts}))


def parametrized(model: Net) -> None:
    nn.utils.parametrizations.weight_norm(model.blocks[1].q)


def meta(model: Net) -> None:
    model.blocks[1].q.to("meta")


def in_dtype(dtype: torch.dtype) -> Callable[[Net], None]:
    def change(model: Net) -> None:
        weight = model.blocks[1].q.weight.detach()
        stored = (weight * 100).to(dtype) if not dtype.is_floating_point else weight.to(dtype)
        model.blocks[1].q.weight = nn.Parameter(stored, requires_grad=False)

    return change


def holding(value: float) -> Callable[[Net], None]:
    def change(model: Net) -> None:
        with torch.no_grad():
            model.blocks[1].q.weight[3, 5] = value

    return change


def inference(model: Net) -> None:
    with torch.inference_mode():
        model.blocks[1].q.weight = nn.Parameter(torch.randn(16, 16), requires_grad=False)


def adapted_already(model: Net) -> None:
    hs.adapt(model, config())


def adapted_by_peft(model: Net) -> None:
    import peft

    peft.get_peft_model(model, peft.LoraConfig(target_modules=["down"]))


MODELS: list[tuple[str, Callable[[Net], None], Mapping[str, Any], type[HeadstartError], list[str]]] = [
    ("NaN", holding(math.nan), {"init_lora_weights": "pissa"}, NonFiniteWeight, ["1 NaN", "blocks.1.q", "'pissa'"]),
    ("infinity", holding(math.inf), {"init_lora_weights": "olora"}, NonFiniteWeight, ["blocks.1.q", "'olora'"]),
    ("NaN under DoRA", holding(math.nan), {"use_dora": True}, NonFiniteWeight, ["blocks.1.q"]),
    ("no values", meta, {"init_lora_weights": "pissa"}, MetaWeight, ["load it", "'kaiming'", "blocks.1.q"]),
    ("no values under DoRA", meta, {"use_dora": True}, MetaWeight, ["row norms", "blocks.1.q"]),
    ("int8", in_dtype(torch.int8), {}, UnsupportedLayer, ["int8", "quantised", "bf16", "blocks.1.q"]),
    ("uint8", in_dtype(torch.uint8), {"init_lora_weights": "pissa"}, UnsupportedLayer, ["uint8", "blocks.1.q"]),
    ("fp8", in_dtype(torch.float8_e4m3fn), {}, UnsupportedLayer, ["float8_e4m3fn", "blocks.1.q"]),
    ("a parametrized weight", parametrized, {}, UnsupportedLayer, ["parametrization", "blocks.1.q"]),
    ("a weight of inference_mode", inference, {}, AdapterState, ["inference_mode"]),
    ("an adapter", adapted_already, {}, AdapterState, ["remove(model)", "merge(model)"]),
    ("PEFT's layers", adapted_by_peft, {}, AdapterState, ["PEFT", "headstart.peft"]),
]


@pytest.mark.parametrize("install", INSTALLERS.values(), ids=INSTALLERS)
@pytest.mark.parametrize(("spoil", "fields", "error", "words"), [c[1:] for c in MODELS], ids=[c[0] for c in MODELS])
def test_a_model_that_cannot_be_adapted_is_refused_as_it_is(
    spoil: Callable[[Net], None],
    fields: dict[str, Any],
    error: type[HeadstartError],
    words: list[str],
    install: Callable[..., object],
) -> None:
    model = net()
    spoil(model)
    with refused(model, error, *words):
        install(model, config(**fields))


@pytest.mark.parametrize("init", hs.strategies())
def test_nan_in_the_second_layer_is_named_by_every_start_that_reads_it(init: str) -> None:
    model, known = net(), known_of_net(init)
    holding(math.nan)(model)
    if registry.get(init)[0].reads_weight:
        with refused(model, NonFiniteWeight, "blocks.1.q", repr(init)):
            hs.adapt(model, config(init_lora_weights=init), **known)
    else:
        adapter = hs.adapt(model, config(init_lora_weights=init), **known)
        assert all(torch.isfinite(p).all() for p in adapter.parameters())


def known_of_net(init: str) -> dict[str, Any]:
    """What a start that looks at data found while the weights were sound."""
    needs = registry.get(init)[0].needs
    if not needs:
        return {}
    data = [IDS, IDS.flip(-1)]
    preserve = data if "preserved" in needs else None

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).float().square().mean()

    return {"calibration": hs.calibrate(net(), config(init_lora_weights=init), data, preserve=preserve, loss=loss)}


def test_data_that_makes_nan_is_named_by_its_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    data = [torch.randn(8, 4), torch.full((8, 4), math.nan)]
    with refused(model, CalibrationError, "'0'"):
        hs.adapt(model, hs.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="eva"), data=data)


def test_the_model_itself_cannot_be_replaced() -> None:
    model = nn.Linear(4, 4)
    with refused(model, NoTarget, "all-linear"):
        hs.adapt(model, hs.LoraConfig(r=2))


def test_an_embedding_that_renormalises_itself_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(8, 4, max_norm=1.0))
    with refused(model, UnsupportedLayer, "max_norm"):
        hs.adapt(model, hs.LoraConfig(r=2, target_modules=["0", "1"]))


def test_within_inference_mode_nothing_is_adapted() -> None:
    model = net()
    with refused(model, AdapterState, "inference_mode"), torch.inference_mode():
        hs.adapt(model, config())


def test_starts_that_read_no_weight_need_none() -> None:
    model = net()
    meta(model)
    assert not any(parameter.is_meta for parameter in hs.adapt(model, config()).parameters())


def test_a_module_under_two_names_has_one_adapter() -> None:
    model = net()
    model.blocks[2].q = model.blocks[0].q
    before = outputs(model)
    adapter = hs.adapt(model, config(target_modules=["q"], init_lora_weights="pissa"))
    assert len(adapter.layers()) == 2
    assert model.blocks[2].q is model.blocks[0].q
    torch.testing.assert_close(outputs(model), before)
    hs.remove(model)
    assert torch.equal(outputs(model), before)


def test_a_tied_embedding_can_be_adapted_and_the_head_stays_tied() -> None:
    model = net()
    before = outputs(model)
    hs.adapt(model, config(target_modules=["embed"], init_lora_weights="pissa"))
    torch.testing.assert_close(outputs(model), before)
    assert model.head.weight is model.embed.base_layer.weight


def seen(init: str, features: int, size: float) -> dict[str, Any]:
    """Data of some size and a loss, for a start that looks at data."""
    if not registry.get(init)[0].needs:
        return {}
    data = [torch.randn(8, features) * size for _ in range(4)]
    aim = torch.randn(8, 10)
    found: dict[str, Any] = {"data": data, "loss": lambda model, batch: (model(batch) * aim).mean()}
    return {**found, "preserve": data[:2]} if "preserved" in registry.get(init)[0].needs else found


@pytest.mark.parametrize("init", hs.strategies())
@pytest.mark.parametrize("weight", ["zero", "of rank 1", "huge", "tiny", "a view"])
def test_degenerate_weights_start_finite_and_alive(init: str, weight: str) -> None:
    layer = nn.Linear(12, 10, bias=False)
    make: dict[str, Callable[[], Tensor]] = {
        "zero": lambda: torch.zeros(10, 12),
        "of rank 1": lambda: torch.outer(torch.randn(10), torch.randn(12)),
        "huge": lambda: torch.randn(10, 12) * 1e37,
        "tiny": lambda: torch.randn(10, 12) * 1e-40,
        "a view": lambda: torch.randn(24, 20)[::2, ::2].T,
    }
    layer.weight = nn.Parameter(make[weight]())
    model = nn.Sequential(layer)
    size = 1e-37 if weight == "huge" else 1.0
    x = torch.randn(5, 12) * size
    expected = model(x).detach()
    config = hs.LoraConfig(r=4, target_modules=["0"], init_lora_weights=init)
    adapter = hs.adapt(model, config, **seen(init, 12, 1e-15 if weight == "huge" else 1.0))
    A, B = adapter.layers()["0"].factors
    assert bool(A.isfinite().all() and B.isfinite().all())
    assert bool(A.any() or B.any())
    quantizes = registry.get(init)[0].quantizes
    if adapter.report.layers[0].anchored or not (quantizes or bool(A.any() and B.any())):
        torch.testing.assert_close(model(x).detach(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    model(x).sum().backward()
    assert any(bool(parameter.grad.any()) for parameter in adapter.parameters() if parameter.grad is not None)


def test_a_row_of_zeros_under_dora_computes_no_nan() -> None:
    model = net()
    with torch.no_grad():
        model.blocks[0].q.weight[2] = 0
    hs.adapt(model, config(use_dora=True))
    torch.testing.assert_close(outputs(model), outputs(model).nan_to_num())


# ------------------------------------------------------------------ faults on the way

FAULTS = (KeyboardInterrupt, MemoryError, torch.linalg.LinAlgError)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("install", INSTALLERS.values(), ids=INSTALLERS)
def test_a_fault_in_any_layers_start_leaves_the_model_as_it_was(
    install: Callable[..., object], fault: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layers = net(), 6
    for k in range(layers + 1):
        calls = itertools.count()
        start = starts._factors

        def failing(*args: Any, calls: Iterator[int] = calls, start: Any = start, k: int = k) -> Any:
            if next(calls) == k:
                raise fault("here")
            return start(*args)

        with monkeypatch.context() as patch:
            patch.setattr(starts, "_factors", failing)
            if k < layers:
                with refused(model, fault, "here"):
                    install(model, config(init_lora_weights="pissa"))
            else:
                install(model, config(init_lora_weights="pissa"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_while_the_layers_are_built_leaves_the_model_as_it_was(
    fault: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    real = lora.wrap
    for k in range(6):
        calls = itertools.count()

        def failing(*args: Any, calls: Iterator[int] = calls, k: int = k) -> LoraLayer:
            if next(calls) == k:
                raise fault("here")
            return real(*args)

        monkeypatch.setattr(lora, "wrap", failing)
        with refused(model, fault, "here"):
            hs.adapt(model, config(bias="all", modules_to_save=["head"]))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_inside_pefts_injection_leaves_the_model_as_it_was(
    fault: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import LoraModel

    model = net()
    real = LoraModel._create_and_replace
    for k in range(6):
        calls = itertools.count()

        def failing(*args: Any, calls: Iterator[int] = calls, k: int = k, **kwargs: Any) -> Any:
            if next(calls) == k:
                raise fault("here")
            return real(*args, **kwargs)

        monkeypatch.setattr(LoraModel, "_create_and_replace", failing)
        with refused(model, fault, "here"):
            headstart.peft.get_peft_model(model, config(bias="all"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_any_layers_merge_merges_none(fault: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    hs.adapt(model, config(init_lora_weights="pissa"))
    trained(model)
    real = LoraLayer.merged_weight
    for k, reversible in itertools.product(range(6), (True, False)):
        calls = itertools.count()

        def failing(layer: LoraLayer, calls: Iterator[int] = calls, k: int = k) -> Tensor:
            if next(calls) == k:
                raise fault("here")
            return real(layer)

        monkeypatch.setattr(LoraLayer, "merged_weight", failing)
        with refused(model, fault, "here"):
            hs.merge(model, reversible=reversible)


# ------------------------------------------------------------------ the state machine


@pytest.fixture
def adapted() -> Net:
    """A trained adapter on the model."""
    model = net()
    hs.adapt(model, config(init_lora_weights="pissa", bias="all"))
    trained(model)
    return model


STATES: list[tuple[str, Callable[[Net, Path], object], list[str]]] = [
    ("unmerge without a merge", lambda model, _: hs.unmerge(model), ["nothing is merged", "reversible=True"]),
    ("adapt twice", lambda model, _: hs.adapt(model, config()), ["adapter already"]),
    ("adapt other layers", lambda model, _: hs.adapt(model, config(target_modules=["down"])), ["adapter already"]),
    ("a PeftModel on top", lambda model, _: headstart.peft.get_peft_model(model, config()), ["adapter already"]),
    ("load on top", lambda model, path: hs.load(model, path), ["adapter already"]),
    ("from_pretrained on top", lambda model, p: headstart.peft.from_pretrained(model, p), ["adapter already"]),
]


@pytest.mark.parametrize(("act", "words"), [c[1:] for c in STATES], ids=[c[0] for c in STATES])
def test_the_wrong_moment_is_refused(
    act: Callable[[Net, Path], object], words: list[str], adapted: Net, folder: Path
) -> None:
    with refused(adapted, AdapterState, *words):
        act(adapted, folder)


def test_a_wrapped_model_is_served_where_its_adapter_is_and_not_adapted_under_other_names(tmp_path: Path) -> None:
    wrapped = torch.compile(net(), backend="eager")
    with pytest.raises(AdapterState, match="OptimizedModule wraps the model: adapt it first"):
        hs.adapt(wrapped, config())
    model = net()
    adapter = hs.adapt(model, config(init_lora_weights="pissa"))
    wrapped = torch.compile(model, backend="eager")
    hs.save(wrapped, tmp_path)
    assert list(hs.load(net(), tmp_path).layers()) == list(adapter.layers())
    hs.merge(wrapped, reversible=True)
    hs.unmerge(wrapped)
    hs.remove(wrapped)
    with pytest.raises(AdapterState, match="has no adapter"):
        hs.remove(model)


def test_our_peft_model_is_sent_to_its_own_methods(tmp_path: Path) -> None:
    model = headstart.peft.get_peft_model(net(), config(), init="pissa")
    with refused(model, AdapterState, "carries PEFT layers"):
        hs.adapt(model, hs.LoraConfig(r=2))
    for act in (hs.merge, hs.remove, lambda model: hs.save(model, tmp_path)):
        with refused(model, AdapterState, "this is a PeftModel", "save_pretrained"):
            act(model)


def test_weights_that_are_not_loaded_are_not_merged() -> None:
    with torch.device("meta"):
        model = net()
    hs.adapt(model, config())
    with pytest.raises(MetaWeight, match="is not loaded: load the model before you merge"):
        hs.merge(model)


@pytest.mark.parametrize("act", [hs.merge, hs.unmerge, hs.remove, lambda model: hs.save(model, "anywhere")])
def test_without_an_adapter_there_is_nothing_to_do(act: Callable[[nn.Module], object]) -> None:
    model = net()
    with refused(model, AdapterState, "Net has no adapter", "adapt(model, config)"):
        act(model)


def test_a_second_merge_does_nothing_and_says_so(adapted: Net) -> None:
    hs.merge(adapted, reversible=True)
    before = fingerprint(adapted)
    with pytest.warns(UserWarning, match="merged already"):
        hs.merge(adapted, reversible=True)
    assert fingerprint(adapted) == before


def test_training_while_merged_is_refused(adapted: Net) -> None:
    hs.merge(adapted, reversible=True)
    adapted.train()
    with pytest.raises(AdapterState, match=r"merged.*unmerge\(model\)"):
        adapted(IDS)


def test_factors_changed_while_merged_do_not_reach_the_weights(adapted: Net) -> None:
    layers = adapter_of(adapted).layers()
    weights = {name: bits(layer.original) for name, layer in layers.items()}
    hs.merge(adapted, reversible=True)
    merged = outputs(adapted)
    with torch.no_grad():
        for layer in layers.values():
            layer.factors[0].add_(1.0)
    assert torch.equal(outputs(adapted), merged)
    hs.unmerge(adapted)
    assert {name: bits(layer.weight_parameter) for name, layer in layers.items()} == weights
    assert not torch.allclose(outputs(adapted), merged)


def base_state(model: nn.Module) -> dict[str, object]:
    tensors = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
    return {name: (bits(tensor), tensor.requires_grad) for name, tensor in tensors}


@pytest.mark.parametrize("merged", [False, True], ids=["", "while merged"])
def test_remove_gives_the_base_back_with_its_flags(adapted: Net, merged: bool) -> None:
    if merged:
        hs.merge(adapted, reversible=True)
    hs.remove(adapted)
    assert base_state(adapted) == base_state(net())
    assert [type(module) for module in adapted.modules()] == [type(module) for module in net().modules()]


def test_saving_while_merged_writes_the_same_adapter(adapted: Net, tmp_path: Path) -> None:
    hs.save(adapted, tmp_path / "before")
    hs.merge(adapted, reversible=True)
    hs.save(adapted, tmp_path / "merged")
    before, merged = load_file(tmp_path / "before" / format_.TENSORS), load_file(tmp_path / "merged" / format_.TENSORS)
    assert {name: bits(tensor) for name, tensor in before.items()} == {n: bits(t) for n, t in merged.items()}
    assert (tmp_path / "before" / format_.CONFIG).read_bytes() == (tmp_path / "merged" / format_.CONFIG).read_bytes()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_factors_that_are_not_finite_are_never_merged(adapted: Net, value: float) -> None:
    with torch.no_grad():
        adapter_of(adapted).layers()["blocks.1.v"].factors[1][0, 0] = value
    for reversible in (True, False):
        with refused(adapted, NonFiniteWeight, "blocks.1.v", "NaN or infinity"):
            hs.merge(adapted, reversible=reversible)


def test_a_disabled_adapter_is_back_after_an_error(adapted: Net) -> None:
    with refused(adapted, ZeroDivisionError), adapter_of(adapted).disabled():
        raise ZeroDivisionError


def test_a_copy_and_a_state_dict_carry_the_adapter(adapted: Net) -> None:
    double = copy.deepcopy(adapted)
    assert torch.equal(outputs(double), outputs(adapted))
    hs.remove(double)
    assert base_state(double) == base_state(net())
    fresh = net(seed=5)
    hs.adapt(fresh, config(init_lora_weights="pissa", bias="all"))
    fresh.load_state_dict(adapted.state_dict(), strict=True)
    assert torch.equal(outputs(fresh), outputs(adapted))


# ------------------------------------------------------------------ files: what is read


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter of the model, as headstart writes it."""
    folder = tmp_path_factory.mktemp("saved")
    with torch.random.fork_rng():
        model = net()
        hs.adapt(model, config(init_lora_weights="pissa", alpha_pattern={"v": 4}))
        hs.save(trained(model), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def expected(path: Path) -> Tensor:
    """What the model computes with the adapter in a folder."""
    model = net()
    hs.load(model, path)
    return outputs(model)


QA = "base_model.model.blocks.0.q.lora_A.weight"


def edit_config(**changes: Any) -> Callable[[Path], None]:
    """Set fields of adapter_config.json; a field set to `...` is taken out."""

    def change(folder: Path) -> None:
        fields = {**json.loads((folder / format_.CONFIG).read_text()), **changes}
        kept = {name: value for name, value in fields.items() if value is not ...}
        (folder / format_.CONFIG).write_text(json.dumps(kept))

    return change


def write_config(text: str | bytes) -> Callable[[Path], None]:
    raw = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / format_.CONFIG).write_bytes(raw) and None


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Rewrite the tensors, with their metadata."""

    def apply(folder: Path) -> None:
        path = folder / format_.TENSORS
        tensors = load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
        change(tensors)
        save_file(tensors, path, metadata)

    return apply


def edit_origin(**changes: Any) -> Callable[[Path], None]:
    """Set fields of what headstart writes into the metadata."""

    def apply(folder: Path) -> None:
        path = folder / format_.TENSORS
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
        metadata["headstart"] = json.dumps({**json.loads(metadata["headstart"]), **changes})
        save_file(load_file(path), path, metadata)

    return apply


def split(path: Path) -> tuple[bytes, bytes]:
    """The header and the data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return raw[8 : 8 + length], raw[8 + length :]


def join(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def edit_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        header, data = split(folder / format_.TENSORS)
        fields = json.loads(header)
        change(fields)
        (folder / format_.TENSORS).write_bytes(join(json.dumps(fields).encode(), data))

    return apply


def edit_entry(**changes: Any) -> Callable[[Path], None]:
    """Change what the header says about one factor."""
    return edit_header(lambda header: header[QA].update(changes))


def edit_bytes(change: Callable[[bytes, bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / format_.TENSORS).write_bytes(change(*split(folder / format_.TENSORS))) and None


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / format_.TENSORS), folder / "adapter_model.bin")
    (folder / format_.TENSORS).unlink()


def without(suffix: str, layer: str = "") -> Callable[[Path], None]:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(suffix) and layer in name]:
            del tensors[name]

    return edit_tensors(drop)


def doubled(layer: str, other: str) -> Callable[[Path], None]:
    """A layer's tensors a second time, under another name."""

    def copy_(tensors: dict[str, Tensor]) -> None:
        tensors |= {name.replace(layer, other): t.clone() for name, t in tensors.items() if layer in name}

    return edit_tensors(copy_)


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))


def added(name: str, *shape: int) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors.update({name: torch.randn(*shape)}))


def into_a_folder(folder: Path) -> None:
    (folder / "adapter").mkdir()
    for name in (format_.CONFIG, format_.TENSORS):
        (folder / name).rename(folder / "adapter" / name)


def one_nan(tensor: Tensor) -> Tensor:
    tensor[0, 0] = math.nan
    return tensor


FILES: list[tuple[str, Callable[[Path], None], type[HeadstartError], list[str]]] = [
    # the folder
    ("no tensors", lambda f: (f / format_.TENSORS).unlink(), AdapterFormatError, ["adapter_model.safetensors"]),
    ("no config", lambda f: (f / format_.CONFIG).unlink(), AdapterFormatError, ["adapter_config.json"]),
    (
        "a run's folder",
        into_a_folder,
        AdapterFormatError,
        ["adapter_config.json", "pass one of its folders: 'adapter'"],
    ),
    ("a pickle alone", pickled, AdapterFormatError, ["pickle", "not loaded", "safetensors"]),
    # the config
    ("an empty config", write_config(""), AdapterFormatError, ["adapter_config.json", "JSON"]),
    ("a cut config", write_config('{"r": 4,'), AdapterFormatError, ["adapter_config.json", "JSON"]),
    ("a config that is a list", write_config("[1]"), AdapterFormatError, ["list", "object"]),
    ("a config that is no text", write_config(b"\xff\xfe\x00"), AdapterFormatError, ["UTF-8"]),
    ("a deep config", write_config('{"a":' * 100_000), AdapterFormatError, ["deep"]),
    ("a huge config", write_config(" " * (1 << 20) + "{}"), AdapterFormatError, ["1 MiB"]),
    ("a number without end", write_config('{"r": ' + "9" * 5000 + "}"), AdapterFormatError, ["JSON"]),
    ("a key twice", write_config('{"r": 4, "r": 8}'), AdapterFormatError, ["'r'", "twice"]),
    ("another method", edit_config(peft_type="IA3"), AdapterFormatError, ["'IA3'", "LORA"]),
    ("no method", edit_config(peft_type=...), AdapterFormatError, ["None", "LORA"]),
    ("no alpha", edit_config(lora_alpha=...), AdapterFormatError, ["'lora_alpha'", "scale is unknown"]),
    ("no rank", edit_config(r=...), AdapterFormatError, ["'r'"]),
    ("alpha as text", edit_config(lora_alpha="16"), AdapterFormatError, ["'lora_alpha'", "'16'"]),
    ("alpha NaN", edit_config(lora_alpha=math.nan), AdapterFormatError, ["'lora_alpha'"]),
    ("rank 0", edit_config(r=0), AdapterFormatError, ["'r'", "0"]),
    ("a fractional rank", edit_config(r=4.5), AdapterFormatError, ["'r'", "4.5"]),
    ("dropout as text", edit_config(lora_dropout="no"), AdapterFormatError, ["lora_dropout", "'no'"]),
    ("dropout 2", edit_config(lora_dropout=2), AdapterFormatError, ["lora_dropout"]),
    ("an unknown bias", edit_config(bias="some"), AdapterFormatError, ["bias", "'some'"]),
    ("patterns as a list", edit_config(rank_pattern=["q"]), AdapterFormatError, ["rank_pattern"]),
    ("a pattern's rank 0", edit_config(rank_pattern={"q": 0}), AdapterFormatError, ["rank_pattern", "'q'"]),
    ("a pattern's rank as text", edit_config(rank_pattern={"q": "x"}), AdapterFormatError, ["rank_pattern", "'x'"]),
    ("a pattern's alpha NaN", edit_config(alpha_pattern={"q": math.nan}), AdapterFormatError, ["alpha_pattern"]),
    ("a broken pattern", edit_config(alpha_pattern={"(q": 1}), AdapterFormatError, ["'(q'", "malformed"]),
    ("modules_to_save as one word", edit_config(modules_to_save="head"), AdapterFormatError, ["modules_to_save"]),
    ("parameters as one word", edit_config(target_parameters="q"), AdapterFormatError, ["target_parameters"]),
    ("DoRA as text", edit_config(use_dora="false"), AdapterFormatError, ["use_dora", "'false'"]),
    ("rsLoRA as text", edit_config(use_rslora="no"), AdapterFormatError, ["use_rslora", "'no'"]),
    ("a bias of B's", edit_config(lora_bias=True), AdapterFormatError, ["lora_bias", "PEFT"]),
    ("an aLoRA", edit_config(alora_invocation_tokens=[1]), AdapterFormatError, ["alora_invocation_tokens"]),
    ("layers replicated", edit_config(layer_replication=[[0, 2]]), AdapterFormatError, ["layer_replication"]),
    ("a future meaning", edit_config(use_superdora=True), AdapterFormatError, ["use_superdora"]),
    ("a misspelt field", edit_config(alpha_patern={"v": 4}), AdapterFormatError, ["alpha_patern", "alpha_pattern"]),
    # the tensors' file
    ("an empty file", lambda f: (f / format_.TENSORS).write_bytes(b"") and None, AdapterFormatError, ["cut off"]),
    ("a header of 2^63 bytes", edit_bytes(lambda h, d: b"\xff" * 7 + b"\x7f" + h + d), AdapterFormatError, ["cut off"]),
    ("a header of 200 MB", edit_bytes(lambda h, d: struct.pack("<Q", 200 << 20) + h + d), AdapterFormatError, []),
    ("a header that is no text", edit_bytes(lambda h, d: join(b"\xff" + h, d)), AdapterFormatError, ["UTF-8"]),
    ("a header that is no JSON", edit_bytes(lambda h, d: join(b"{" + h, d)), AdapterFormatError, ["JSON"]),
    ("a deep header", edit_bytes(lambda h, d: join(b'{"a":' * 100_000, d)), AdapterFormatError, ["deep"]),
    ("a tensor twice", edit_bytes(lambda h, d: join(h.rstrip()[:-1] + b"," + h[1:], d)), AdapterFormatError, ["twice"]),
    ("trailing bytes", edit_bytes(lambda h, d: join(h, d + b"\0" * 8)), AdapterFormatError, ["damaged"]),
    ("missing bytes", edit_bytes(lambda h, d: join(h, d[:-8])), AdapterFormatError, ["damaged"]),
    ("a negative offset", edit_entry(data_offsets=[-8, 0]), AdapterFormatError, ["damaged"]),
    ("offsets that overlap", edit_entry(data_offsets=[16, 528]), AdapterFormatError, []),
    ("a shape that overflows", edit_entry(shape=[2**40, 2**40]), AdapterFormatError, []),
    ("an infinite shape", edit_entry(shape=[math.inf]), AdapterFormatError, ["shape"]),
    ("a shape of words", edit_entry(shape=["a"]), AdapterFormatError, ["shape"]),
    ("an unknown dtype", edit_entry(dtype="F99"), AdapterFormatError, ["damaged"]),
    ("integers", edit_entry(dtype="I32"), AdapterFormatError, [QA, "int32"]),
    ("unsigned numbers", edit_entry(dtype="U32"), AdapterFormatError, []),
    ("complex numbers", edit_entry(dtype="C64", shape=[8, 8]), AdapterFormatError, []),
    ("numbers of 4 bits", edit_entry(dtype="F4", shape=[8, 128]), AdapterFormatError, []),
    ("bare exponents", edit_entry(dtype="F8_E8M0", shape=[8, 64]), AdapterFormatError, ["float8"]),
    ("a tensor that is none", edit_header(lambda h: h.update(x=3)), AdapterFormatError, ["shape"]),
    ("metadata that is none", edit_header(lambda h: h.update(__metadata__=3)), AdapterFormatError, []),
    # what the metadata says
    ("origin that is none", edit_origin(anchored=3), AdapterFormatError, ["anchored"]),
    ("anchors of another rank", edit_origin(anchored={"blocks.0.q": 3}), AdapterFormatError, ["blocks.0.q"]),
    ("anchors of nobody", edit_origin(anchored={"blocks.9.q": 4}), KeyMismatch, ["blocks.9.q"]),
    ("frozen numbers", edit_origin(frozen={"blocks.0.q": [1]}), AdapterFormatError, ["frozen"]),
    ("a base of words", edit_origin(base={"blocks.0.q": ["a"]}), AdapterFormatError, ["base"]),
    ("parts of words", edit_origin(parts={"blocks.0.q": "ab"}), AdapterFormatError, ["parts"]),
    ("a seed of words", edit_origin(seed="x"), AdapterFormatError, ["seed"]),
    ("options of words", edit_origin(options=3), AdapterFormatError, ["options"]),
    ("a config of words", edit_origin(adapter_config=3), AdapterFormatError, ["adapter_config"]),
    # the tensors
    ("no factors", edit_tensors(lambda t: t.clear()), AdapterFormatError, ["no LoRA factors"]),
    ("A without B", without("blocks.1.q.lora_B.weight"), KeyMismatch, ["blocks.1.q", "no B"]),
    ("B without A", without("blocks.1.q.lora_A.weight"), KeyMismatch, ["blocks.1.q", "no A"]),
    ("a layer missing", without("", "blocks.1.q"), KeyMismatch, ["blocks.1.q", "lost"]),
    ("NaN", replaced(QA, one_nan), KeyMismatch, ["NaN", "blocks.0.q.lora_A"]),
    ("beyond float32", replaced(QA, lambda t: t.double() * 1e300), KeyMismatch, ["blocks.0.q.lora_A"]),
    ("an extra key", added("base_model.model.blocks.0.q.lora_C.weight", 4, 4), KeyMismatch, ["lora_C"]),
    ("a key of the base", added("base_model.model.blocks.0.q.weight", 16, 16), KeyMismatch, ["0.q.weight", "base"]),
    ("a bare key of the base", added("head.weight", 32, 16), KeyMismatch, ["head.weight"]),
    ("a bias nobody trained", added("base_model.model.blocks.0.q.bias", 16), KeyMismatch, ["blocks.0.q.bias"]),
    ("another rank", replaced(QA, lambda t: t[:6]), KeyMismatch, ["blocks.0.q", "(6, 16)", "(8, 16)"]),
    ("another width", replaced(QA, lambda t: t[:, :8]), KeyMismatch, ["blocks.0.q", "(8, 8)"]),
    ("a vector", replaced(QA, lambda t: t.flatten()), KeyMismatch, ["blocks.0.q", "(128,)"]),
    ("the wrong r", edit_config(r=4), KeyMismatch, ["wrong rank"]),
    ("a magnitude without DoRA", added(QA.replace("lora_A.weight", "lora_magnitude_vector"), 16), KeyMismatch, ["0.q"]),
    ("DoRA without a magnitude", edit_config(use_dora=True), KeyMismatch, ["no DoRA magnitude"]),
    ("one layer twice", doubled("0.q", "0.q.base_layer"), KeyMismatch, ["blocks.0.q"]),
    ("a layer that is not there", doubled("0.q", "7.q"), NoTarget, ["blocks.7.q"]),
    ("saved modules without tensors", edit_config(modules_to_save=["head"]), KeyMismatch, ["head", "no tensor"]),
]


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize(("spoil", "error", "words"), [c[1:] for c in FILES], ids=[c[0] for c in FILES])
def test_a_file_that_is_not_an_adapter_of_this_model_is_refused_before_anything_changes(
    spoil: Callable[[Path], None],
    error: type[HeadstartError],
    words: list[str],
    load: Callable[..., object],
    folder: Path,
) -> None:
    spoil(folder)
    model = net()
    with refused(model, error, str(folder.name), *words):
        load(model, folder)
    assert not [path for path in folder.parent.iterdir() if path != folder]


def test_a_truncated_file_is_refused_at_every_length(folder: Path) -> None:
    path = folder / format_.TENSORS
    raw, model = path.read_bytes(), net()
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    lengths = {*range(12), *range(12, len(raw), len(raw) // 40), header - 1, header, header + 1, len(raw) - 1}
    before = fingerprint(model)
    for length in sorted(lengths):
        path.write_bytes(raw[:length])
        with pytest.raises(AdapterFormatError, match=r"adapter_model\.safetensors"):
            hs.load(model, folder)
    assert fingerprint(model) == before


DOWN, NORM = "base_model.model.blocks.0.down", "base_model.model.norm.bias"
BIASES: list[tuple[str, Mapping[str, Any], Callable[[Path], None], list[str]]] = [
    ("of a layer that is not adapted", {"bias": "lora_only"}, added(f"{DOWN}.bias", 16), ["down.bias"]),
    ("that is missing", {"bias": "all"}, without("norm.bias"), ["norm.bias"]),
    ("of another shape", {"bias": "all"}, replaced(NORM, lambda t: t[:3]), ["norm.bias", "(3,)"]),
    ("of a saved module, missing", {"modules_to_save": ["norm"]}, without("norm.bias"), ["norm.bias"]),
]


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize(("fields", "spoil", "words"), [c[1:] for c in BIASES], ids=[c[0] for c in BIASES])
def test_a_bias_is_refused(
    fields: dict[str, Any],
    spoil: Callable[[Path], None],
    words: list[str],
    load: Callable[..., object],
    tmp_path: Path,
) -> None:
    model = net()
    hs.adapt(model, config(**fields))
    hs.save(trained(model), tmp_path)
    spoil(tmp_path)
    fresh = net()
    with refused(fresh, KeyMismatch, *words):
        load(fresh, tmp_path)


PLACES: list[tuple[str, Callable[[Path], str | Path]]] = [
    ("nowhere", lambda f: f / "nowhere"),
    ("a file", lambda f: f / format_.TENSORS),
    ("an empty name", lambda f: ""),
    ("a name too long", lambda f: f / ("x" * 5000)),
    ("a name with a zero", lambda f: f"{f}\0x"),
    ("a loop of links", lambda f: (f / "loop").symlink_to(f / "loop") or f / "loop"),
    ("a link to nowhere", lambda f: (f / "link").symlink_to(f / "nowhere") or f / "link"),
    ("a name on a hub that is not reached", lambda f: "nobody/nothing"),
    ("upwards to nowhere", lambda f: "../nothing-of-that-name"),
]


@pytest.mark.parametrize("place", [p for _, p in PLACES], ids=[name for name, _ in PLACES])
def test_a_place_that_holds_no_adapter_is_refused(place: Callable[[Path], str | Path], folder: Path) -> None:
    model, path = net(), place(folder)
    with refused(model, AdapterFormatError):
        hs.load(model, path)


def test_an_adapter_folder_may_be_a_link_and_may_hold_links(folder: Path, tmp_path: Path) -> None:
    """As the hub's cache does. Only the two names of the format are opened, whatever the files say."""
    stored = tmp_path / "blob"
    (folder / format_.TENSORS).rename(stored)
    (folder / format_.TENSORS).symlink_to(stored)
    (tmp_path / "link").symlink_to(folder)
    assert torch.isfinite(expected(tmp_path / "link")).all()


@pytest.mark.parametrize("table", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(.*a){20}", "(?:q?){40}q{40}", ".*.*.*.*.*x", "x" * 400])
def test_a_pattern_that_would_match_for_ever_is_refused_at_once(pattern: str, table: str, folder: Path) -> None:
    edit_config(**{table: {pattern: 8}})(folder)
    model, began = net(), time.perf_counter()
    with refused(model, AdapterFormatError, "too complex"):
        hs.load(model, folder)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
def test_no_expression_of_a_file_is_ever_run_on_the_models_names(field: str, folder: Path) -> None:
    wanted = expected(folder)
    edit_config(**{field: "(([a-z.0-9])+)+[A-Z]"})(folder)
    began = time.perf_counter()
    assert torch.equal(expected(folder), wanted)
    assert time.perf_counter() - began < 5


def test_nothing_named_in_a_file_is_imported(folder: Path) -> None:
    edit_config(auto_mapping={"parent_library": "this", "base_model_class": "x"}, megatron_core="antigravity")(folder)
    expected(folder)
    assert "antigravity" not in sys.modules
    assert "this" not in sys.modules


def test_fields_of_other_versions_without_meaning_for_us_are_let_pass(folder: Path) -> None:
    wanted = expected(folder)
    edit_config(peft_version="9.9", runtime_config={"ephemeral_gpu_offload": False}, qalora_group_size=16)(folder)
    assert torch.equal(expected(folder), wanted)


def test_an_unknown_field_is_warned_of(folder: Path) -> None:
    edit_config(hub_colour="red")(folder)
    with pytest.warns(UserWarning, match="hub_colour"):
        hs.load(net(), folder)


def test_the_config_beside_the_tensors_is_what_holds(folder: Path) -> None:
    """As for every other reader of the format: who edits the scale there means it."""
    wanted = expected(folder)
    edit_config(lora_alpha=100)(folder)
    assert not torch.allclose(expected(folder), wanted)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_an_adapter_of_another_base_is_refused(load: Callable[..., object], folder: Path) -> None:
    model = net(seed=7)
    with refused(model, WrongBase, "another base", "strict=False"):
        load(model, folder)


def test_strict_false_takes_an_adapter_to_another_base(folder: Path) -> None:
    edit_tensors(lambda tensors: tensors.update({"base_model.model.stray": torch.ones(2)}))(folder)
    model = net(seed=7)
    hs.load(model, folder, strict=False)
    assert len(adapter_of(model).layers()) == 6


def test_strict_false_never_overwrites_the_base(folder: Path) -> None:
    added("base_model.model.head.weight", 32, 16)(folder)
    model = net()
    with refused(model, KeyMismatch, "head.weight", "base's weights"):
        hs.load(model, folder, strict=False)


def as_peft_writes(folder: Path) -> None:
    """Without headstart's metadata."""
    save_file(load_file(folder / format_.TENSORS), folder / format_.TENSORS, {"format": "pt"})


def test_a_file_of_pefts_that_lacks_a_layer_is_refused_unless_it_is_meant(folder: Path) -> None:
    as_peft_writes(folder)
    wanted = expected(folder)
    edit_config(exclude_modules=None)(folder)
    assert torch.equal(expected(folder), wanted)
    tensors = {n: t for n, t in load_file(folder / format_.TENSORS).items() if "blocks.1.q" not in n}
    save_file(tensors, folder / format_.TENSORS, {"format": "pt"})
    model = net()
    with refused(model, KeyMismatch, "blocks.1.q", "strict=False"):
        hs.load(model, folder)
    assert len(hs.load(model, folder, strict=False).layers()) == 5


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"])
def test_a_start_of_pefts_that_rewrote_the_base_is_refused(init: str, folder: Path) -> None:
    as_peft_writes(folder)
    edit_config(init_lora_weights=init)(folder)
    model = net()
    with refused(model, AdapterFormatError, repr(init), "path_initial_model_for_weight_conversion"):
        hs.load(model, folder)


# ------------------------------------------------------------------ files: mutations


def semantics(text: bytes) -> object:
    """What a config means, or the bytes themselves where they mean nothing."""
    fields = json.loads(text)
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
    return [fields.get(name) for name in names]


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, dropped, doubled or moved."""
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at, to = rng.randrange(len(changed)), rng.randrange(len(changed))
        kind = rng.randrange(5)
        if kind == 0:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            changed[at] = rng.choice(b'{}[]",:0123456789-.eAB')
        elif kind == 2:
            del changed[at : at + rng.choice((1, 1, 4))]
        elif kind == 3:
            changed[at:at] = changed[to : to + rng.choice((1, 8, 40))]
        else:
            changed[at], changed[to] = changed[to], changed[at]
    return bytes(changed)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("part", ["header", "config"])
def test_mutated_bytes_are_refused_by_name_or_mean_the_same(
    part: str, load: Callable[..., nn.Module], folder: Path
) -> None:
    rng = random.Random(f"{part} {load.__name__}")
    wanted, original = expected(folder), (folder / format_.CONFIG).read_bytes()
    header, data = split(folder / format_.TENSORS)
    model, survived = net(), 0
    before = fingerprint(model)
    for _ in range(50):
        if part == "header":
            (folder / format_.TENSORS).write_bytes(join(mutated(header, rng), data))
        else:
            (folder / format_.CONFIG).write_bytes(mutated(original, rng))
        copied = copy.deepcopy(model)
        state = base_state(copied)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = load(copied, folder)
        except HeadstartError:
            assert base_state(copied) == state
            continue
        survived += 1
        meant = semantics((folder / format_.CONFIG).read_bytes()) if part == "config" else semantics(original)
        if meant == semantics(original):
            computed = outputs(copied if isinstance(found, Adapter) else found)
            torch.testing.assert_close(computed, wanted)
    assert fingerprint(model) == before
    assert survived < 50


# ------------------------------------------------------------------ files: what is written


def in_child(work: Callable[[], object]) -> int:
    """Do this in a process of its own; its exit status, or minus the signal that killed it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except HeadstartError as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(7)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying(function: Callable[..., object], call: int, after: bool) -> Callable[..., object]:
    """The function, and SIGKILL right before or right after its n-th call."""
    calls = itertools.count(1)

    def run(*args: Any, **kwargs: Any) -> object:
        now = next(calls) == call
        if now and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return run


def half_written(tensors: object, path: Path, metadata: object = None) -> None:
    Path(path).write_bytes(b"\0" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(point: str, call: int, after: bool) -> Callable[[], None]:
    """Prepare this process to die at the n-th call of a function of `os`, or in the middle of the tensors."""

    def arm() -> None:
        if point == "save_file":
            safetensors.torch.save_file = half_written
        else:
            setattr(os, point, dying(getattr(os, point), call, after))

    return arm


POINTS = [("save_file", 1, False)]
POINTS += [("fsync", call, False) for call in (1, 2, 3, 4)]
POINTS += [("replace", call, after) for call in (1, 2, 3) for after in (False, True)]
MARK = re.compile(r"^\.headstart-")


@NEEDS_FORK
@pytest.mark.parametrize(("point", "call", "after"), POINTS)
def test_killed_while_saving_the_old_or_the_new_adapter_loads(point: str, call: int, after: bool, folder: Path) -> None:
    old, model = expected(folder), net()
    # Another scale, so that the new tensors under the old config would be neither.
    hs.adapt(model, config(init_lora_weights="pissa", lora_alpha=50))
    new = outputs(trained(model, seed=3))

    def work() -> None:
        killed_at(point, call, after)()
        hs.save(model, folder)

    assert in_child(work) == -signal.SIGKILL
    found = expected(folder)
    assert any(torch.equal(found, one) for one in (old, new))
    hs.save(model, folder)
    assert torch.equal(expected(folder), new)
    assert sorted(path.name for path in folder.iterdir()) == sorted([format_.CONFIG, format_.TENSORS, format_.REPORT])


@NEEDS_FORK
def test_a_file_that_may_not_grow_leaves_the_old_adapter(folder: Path, adapted: Net, capfd: Any) -> None:
    import resource

    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        hs.save(adapted, folder)

    assert in_child(work) == 7
    assert "FileError: cannot write to" in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError, OSError, RuntimeError])
def test_a_fault_while_saving_leaves_the_old_adapter(
    fault: type[BaseException], folder: Path, adapted: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def failing(tensors: object, path: Path, metadata: object = None) -> None:
        Path(path).write_bytes(b"half")
        raise fault("here")

    monkeypatch.setattr(safetensors.torch, "save_file", failing)
    with refused(adapted, FileError if fault is OSError else fault, "here"):
        hs.save(adapted, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_too_little_space_is_seen_before_anything_is_written(
    folder: Path, adapted: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with refused(adapted, FileError, "1,000 bytes left", "needed"):
        hs.save(adapted, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def blocked(folder: Path) -> Path:
    """A folder in which something that is no file bears a file's name."""
    (folder / format_.CONFIG).unlink()
    (folder / format_.CONFIG).mkdir()
    return folder


UNWRITABLE: list[tuple[str, Callable[[Path], Path], list[str]]] = [
    ("a file", lambda f: f / format_.TENSORS, ["is a file", "folder"]),
    ("below a file", lambda f: f / format_.TENSORS / "x", ["cannot write to"]),
    ("a name too long", lambda f: f / ("x" * 5000), ["cannot write to"]),
    ("a link to itself", lambda f: (f / "loop").symlink_to(f / "loop") or f / "loop", ["cannot write to"]),
    ("a folder in a file's place", blocked, ["adapter_config.json", "folder"]),
]


@pytest.mark.parametrize(("place", "words"), [c[1:] for c in UNWRITABLE], ids=[c[0] for c in UNWRITABLE])
def test_a_place_that_cannot_be_written_to_is_refused(
    place: Callable[[Path], Path], words: list[str], folder: Path, adapted: Net
) -> None:
    path = place(folder)
    tensors = (folder / format_.TENSORS).read_bytes()
    with refused(adapted, FileError, *words):
        hs.save(adapted, path)
    assert (folder / format_.TENSORS).read_bytes() == tensors


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(folder: Path, adapted: Net) -> None:
    folder.chmod(0o500)
    try:
        with refused(adapted, FileError, "cannot write to", "nothing was changed"):
            hs.save(adapted, folder)
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("rank", [0, -1, 2.5, "4", True, 64])
def test_a_rank_that_cannot_be_saved_is_refused(rank: Any, adapted: Net, tmp_path: Path) -> None:
    with refused(adapted, BadRank, repr(rank)):
        hs.save(adapted, tmp_path / "new", rank=rank)
    assert not (tmp_path / "new").exists()


def test_factors_that_are_not_finite_cannot_be_truncated(adapted: Net, tmp_path: Path) -> None:
    with torch.no_grad():
        adapter_of(adapted).layers()["blocks.1.v"].factors[1][0, 0] = math.nan
    with refused(adapted, NonFiniteWeight, "blocks.1.v"):
        hs.save(adapted, tmp_path / "new", rank=2)
    assert not (tmp_path / "new").exists()


@NEEDS_FORK
def test_two_writers_do_not_mix(folder: Path, adapted: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused while the first lives, and takes over once it is dead."""
    ready, go = os.pipe(), os.pipe()

    def waiting(tensors: Any, path: Path, metadata: Any = None) -> None:
        os.write(ready[1], b"x")
        os.read(go[0], 1)

    child = os.fork()
    if child == 0:
        safetensors.torch.save_file = waiting
        hs.save(adapted, folder)
        os._exit(0)
    os.read(ready[0], 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with refused(adapted, OutputBusy, f"process {child}", "wait", "another folder"):
        hs.save(adapted, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for end in (*ready, *go):
        os.close(end)
    hs.save(adapted, folder)
    assert torch.equal(expected(folder), outputs(adapted))
    assert not [path for path in folder.iterdir() if MARK.match(path.name)]


@NEEDS_FORK
def test_the_core_works_where_nothing_optional_is_installed(tmp_path: Path) -> None:
    """PEFT, transformers and their like are imported by nothing that a plain model needs."""
    import subprocess

    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("peft", "transformers", "accelerate", "trl", "datasets", "scipy", "huggingface_hub"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch, headstart as hs
for name in ("kaiming", "pissa", "olora"):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    hs.adapt(model, hs.LoraConfig(r=2, init_lora_weights=name))
    hs.save(model, sys.argv[1]); hs.remove(model); hs.load(model, sys.argv[1]); hs.merge(model)
"""
    source = str(Path(hs.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "adapter")],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
