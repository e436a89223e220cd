"""Merging a checkpoint on disk: every layer kind and architecture against its own forward, dense float64 and PEFT."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import headstart as hs
from headstart.errors import (
    BadOption,
    FileError,
    HeadstartError,
    KeyMismatch,
    NonFiniteWeight,
    NoTarget,
    Unstreamable,
    UnsupportedLayer,
    WrongBase,
)
from headstart.files.merging import ahead, rewrite, shards, unbuffered
from headstart.files.merging.folding import LowRank, Piece
from headstart.linalg import fast
from headstart.lora.delta import Branch
from headstart.lora.layers import lora_layers
from headstart.testing.cases import Case
from headstart.testing.kinds import KINDS

transformers = pytest.importorskip("transformers")
TOKENS = torch.arange(18).reshape(2, 9) % 60
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied)).to(dtype).eval()


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=4)).eval()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def trained(model: nn.Module, size: float = 0.05) -> nn.Module:
    """Factors, biases and modules as if training had moved them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape))
    return model.eval()


def saved(model: Any, folder: Path, **fields: Any) -> Tensor:
    """Adapt a model, save its adapter, and return what it computes."""
    adapted = copy.deepcopy(model)
    hs.adapt(adapted, hs.LoraConfig(**{"r": 4, **fields}))
    trained(adapted)
    hs.save(adapted, folder)
    with torch.no_grad():
        logits: Tensor = adapted(TOKENS).logits
    return logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A Llama in bfloat16, in several shards."""
    llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    saved(llama(dtype=torch.bfloat16), tmp_path / "adapter")
    return tmp_path / "adapter"


# ------------------------------------------------------------------ what it computes

UNTOLD = {"experts", "experts_transposed"}  # (8, 12) one way round is (12, 8) the other


@pytest.mark.parametrize("kind", [name for name in KINDS if name not in UNTOLD])
def test_without_an_architecture_every_kind_of_layer_merges_as_it_computed(kind: str, tmp_path: Path) -> None:
    case = Case("pissa", KINDS[kind])
    adapted = copy.deepcopy(case.trained)
    hs.save(adapted, tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    before = {name: value.contiguous().clone() for name, value in case.model().state_dict().items()}
    save_file(before, tmp_path / "base" / "model.safetensors")
    hs.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = tensors_of(tmp_path / "merged")
    assert {k: (v.shape, v.dtype) for k, v in merged.items()} == {k: (v.shape, v.dtype) for k, v in before.items()}
    plain = case.model()
    if kind.startswith("tied"):
        plain.right.weight = nn.Parameter(plain.right.weight.clone())  # type: ignore[union-attr, operator]
    plain.load_state_dict(merged)
    inputs, keywords = KINDS[kind].inputs(), KINDS[kind].keywords()
    with torch.no_grad():
        wanted, found = (_flat(model.eval()(*inputs, **keywords)) for model in (adapted, plain))
        unchanged = _flat(case.model().eval()(*inputs, **keywords))
    assert (wanted - unchanged).norm() > 1e-2 * wanted.norm()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def _flat(output: Any) -> Tensor:
    outputs = output if isinstance(output, tuple) else (output,)
    return torch.cat([y.flatten() for y in outputs if isinstance(y, Tensor)])


def test_experts_whose_order_the_shapes_do_not_tell_are_refused(tmp_path: Path) -> None:
    case = Case("pissa", KINDS["experts"])
    hs.save(copy.deepcopy(case.trained), tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(dict(case.model().state_dict()), tmp_path / "base" / "model.safetensors")
    with pytest.raises(UnsupportedLayer, match="cannot be told from their shapes"):
        hs.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "pissa": (llama, {"init_lora_weights": "pissa"}),
    "dora": (llama, {"use_dora": True}),
    "patterns": (llama, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "modules to save": (llama, {"modules_to_save": ["embed_tokens"], "bias": "all"}),
    "tied, embedding": (lambda: llama(True), {"target_modules": ["embed_tokens"]}),
    "tied, head": (lambda: llama(True), {"target_modules": ["lm_head", "q_proj"]}),
    "tied, both": (lambda: llama(True), {"target_modules": ["lm_head", "embed_tokens"]}),
    "tied, head in full": (lambda: llama(True), {"modules_to_save": ["lm_head"]}),
    "tied, neither": (lambda: llama(True), {}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "wte"], "use_dora": True, "bias": "all"}),
    "classifier": (bert, {"target_modules": ["query", "dense"], "bias": "lora_only", "task_type": "SEQ_CLS"}),
    "experts": (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}


UNTIED = {"tied, embedding", "tied, head", "tied, both", "tied, head in full", "gpt2"}


@pytest.mark.parametrize("name", CASES)
def test_a_merged_checkpoint_loads_and_computes_what_the_adapted_model_did(name: str, tmp_path: Path) -> None:
    make, fields = CASES[name]
    torch.manual_seed(1)
    model = make()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    wanted = saved(model, tmp_path / "adapter", **fields)
    report = hs.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)
        assert (model(TOKENS).logits - wanted).abs().max() > 1e-2
    assert report.untied == (name in UNTIED)
    assert report.how == "streamed"
    assert 0 < report.worst < 1e-5
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    found = tensors_of(tmp_path / "merged")
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())


def test_names_without_the_models_prefix_as_on_the_hub(tmp_path: Path) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    short = {k.removeprefix("transformer."): v for k, v in tensors_of(tmp_path / "base").items()}
    save_file(short, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    wanted = saved(model, tmp_path / "adapter", target_modules=["c_fc", "wte"])
    hs.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert set(tensors_of(tmp_path / "merged")) == {*short, "lm_head.weight"}
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_pefts_merges_as_peft_merges_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "down_proj"])
    theirs = trained(peft.get_peft_model(model, config))
    theirs.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    hs.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    wanted = theirs.merge_and_unload().state_dict()  # type: ignore[operator]
    for name, value in tensors_of(tmp_path / "merged").items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


def products(adapter: Path) -> dict[str, Tensor]:
    """s·B·A of every layer, dense in float64, from the file alone."""
    config, found = (
        json.loads((adapter / "adapter_config.json").read_text()),
        load_file(adapter / "adapter_model.safetensors"),
    )
    scale = config["lora_alpha"] / config["r"]
    ends = ".lora_A.weight"
    names = [key.removesuffix(ends) for key in found if key.endswith(ends)]
    return {
        name.removeprefix("base_model.model.") + ".weight": scale
        * (found[f"{name}.lora_B.weight"].double() @ found[f"{name}{ends}"].double())
        for name in names
    }


@pytest.mark.parametrize(
    ("dtype", "kept"), [("auto", torch.bfloat16), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_every_element_is_the_exact_sum_rounded_once(
    base: Path, adapter: Path, tmp_path: Path, dtype: str, kept: torch.dtype
) -> None:
    report = hs.merge_checkpoint(base, adapter, tmp_path / "merged", dtype=dtype)
    before, after, deltas = tensors_of(base), tensors_of(tmp_path / "merged"), products(adapter)
    assert {value.dtype for value in after.values()} == {kept}
    for name, delta in deltas.items():
        exact = before[name].double() + delta
        error, bits = (after[name].double() - exact).abs(), after[name].view(torch.int16)
        for step in (-1, 1):
            other = ((bits + step).view(kept).double() - exact).abs()
            assert not bool((other < error).any()), name
        lost = float((after[name].double() - exact).norm() / delta.norm())
        assert report.lost[name.removesuffix(".weight")] == pytest.approx(lost, rel=1e-6), name  # 64 rows or fewer
    for name in before.keys() - deltas.keys():
        assert torch.equal(after[name], before[name].to(kept))


def test_float32_keeps_what_bfloat16_loses(base: Path, tmp_path: Path) -> None:
    adapted = llama(dtype=torch.bfloat16)
    hs.adapt(adapted, hs.LoraConfig(r=4))
    hs.save(trained(adapted, 1e-5), tmp_path / "adapter")
    half = hs.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "half")
    full = hs.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "full", dtype="float32")
    assert half.worst > 0.9
    assert half.advice is not None
    assert "--dtype float32" in half.advice
    assert full.worst < 1e-2
    assert full.advice is None
    settings = json.loads((tmp_path / "full" / "config.json").read_text())
    assert settings["dtype"] == "float32"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype="auto").dtype == torch.float32


def test_what_float16_cannot_hold_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(first := sorted(base.glob("*.safetensors"))[0])
    save_file({name: value * 1e7 for name, value in tensors.items()}, first, {"format": "pt"})
    with pytest.raises(NonFiniteWeight, match="float16"):
        hs.merge_checkpoint(base, adapter, tmp_path / "merged", dtype="float16", strict=False)
    assert not (tmp_path / "merged").exists()


# ------------------------------------------------------------------ quantised by bitsandbytes

QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4, doubly": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_base(make: Callable[[], Any], name: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = make().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "float")
    how = transformers.BitsAndBytesConfig(**QUANTISED[name])
    packed = type(model).from_pretrained(tmp_path / "float", quantization_config=how, dtype=torch.bfloat16)
    packed.save_pretrained(tmp_path / "base")
    saved(packed, tmp_path / "adapter")

    again = hs.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "packed")
    loaded = type(model).from_pretrained(tmp_path / "base", dtype="auto").eval()
    hs.load(loaded, tmp_path / "adapter")
    values = {n: layer.frozen_values() for n, layer in lora_layers(loaded)}
    pairs = {
        n: layer.scaling * sum(B.double() @ A.double() for A, B in _pairs(layer)) for n, layer in lora_layers(loaded)
    }
    hs.merge(loaded)
    merged = type(model).from_pretrained(tmp_path / "packed", dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(merged(TOKENS).logits, loaded(TOKENS).logits)
    assert again.worst > (0.1 if "4" in name else 0.001)

    report = hs.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "floats", dtype="float32")
    assert report.worst < 1e-4
    found = tensors_of(tmp_path / "floats")
    assert set(found) == set(tensors_of(tmp_path / "float"))
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    for layer, Q in values.items():
        wanted = Q.double() + pairs[layer]
        weight = found[f"{layer}.weight"].double()
        torch.testing.assert_close(weight.T if make is gpt2 else weight, wanted, rtol=1e-5, atol=1e-6)


def _pairs(layer: Any) -> list[tuple[Tensor, Tensor]]:
    return Branch(*(f.detach() for f in layer.plain_factors), 1.0, layer.anchor).pairs(layer.layout)


def test_an_adapter_that_stands_on_a_quantised_image_is_given_it(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = llama()
    model.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="makes up for"):
        wanted = saved(model, tmp_path / "adapter", init_lora_weights="qpissa")
    hs.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ memory, files, faults


def test_no_more_than_a_block_of_a_tensor_is_read_at_once(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hs.merge_checkpoint(base, adapter, tmp_path / "whole")
    sizes = []
    real = shards.read_rows

    def watched(stored: Any, columns: int, start: int, stop: int) -> Tensor:
        sizes.append((stop - start) * columns * stored.dtype.itemsize)
        return real(stored, columns, start, stop)

    monkeypatch.setattr(rewrite, "read_rows", watched)
    monkeypatch.setattr(rewrite, "BLOCK", 512)
    hs.merge_checkpoint(base, adapter, tmp_path / "blocks")
    assert len(sizes) > 50
    assert max(sizes) <= 512
    whole, blocks = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "blocks")
    assert all(torch.equal(whole[name], blocks[name]) for name in whole)


@pytest.mark.parametrize(
    "given",
    [{}, {"dtype": "float32"}, {"method": "ties"}, {"method": "svd", "rank": 2}, {"weights": [0.7, -0.2]}],
    ids=str,
)
def test_however_many_work_on_it_the_bytes_are_the_same(
    given: dict[str, Any], base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(llama(dtype=torch.bfloat16), tmp_path / "other", use_dora=given.get("method") is None)
    monkeypatch.setattr(rewrite, "BLOCK", 512)
    found, lost, active = [], [], []
    fold = LowRank.fold

    def watched(*arguments: Any) -> Tensor:
        active.append(threading.get_ident())
        time.sleep(1e-4)
        return fold(*arguments)

    monkeypatch.setattr(LowRank, "fold", watched)
    for count in (1, 3, 8):
        monkeypatch.setattr(ahead, "workers", lambda count=count: count)
        out = tmp_path / f"{count}"
        lost.append(hs.merge_checkpoint(base, [adapter, tmp_path / "other"], out, **given).lost)
        found.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert found[0] == found[1] == found[2]
    assert lost[0] == lost[1] == lost[2]
    assert threading.get_ident() not in active
    if given.get("method") == "svd":
        assert len(set(active)) > 3


def test_compiled_casts_write_the_same_bytes(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(fast, "_loaded", [])
    hs.merge_checkpoint(base, adapter, tmp_path / "plain")
    assert fast.ready() is None
    monkeypatch.setattr(fast, "WORTH", 1)
    monkeypatch.setattr(ahead, "workers", lambda: 3)
    hs.merge_checkpoint(base, adapter, tmp_path / "compiled")
    assert fast.ready() is not None
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "compiled" / file.name).read_bytes() == file.read_bytes()


def test_a_worker_that_fails_ends_all_of_them(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite, "BLOCK", 512)
    monkeypatch.setattr(ahead, "workers", lambda: 4)
    fold, calls = LowRank.fold, itertools.count()

    def failing(*arguments: Any) -> Tensor:
        if next(calls) == 20:
            raise MemoryError("no memory for a block")
        return fold(*arguments)

    monkeypatch.setattr(LowRank, "fold", failing)
    threads = torch.get_num_threads()
    with pytest.raises(MemoryError, match="for a block"):
        hs.merge_checkpoint(base, adapter, tmp_path / "merged")
    assert next(calls) < 60  # of more than a hundred
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("headstart")]
    assert torch.get_num_threads() == threads


def test_steps_end_in_their_order_and_hold_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "workers", lambda: 4)
    monkeypatch.setattr(ahead, "MEMORY", 10)
    drawn = random.Random(0)
    sizes = [drawn.choice([1, 3, 9, 30]) for _ in range(60)]
    lock, held, most, order = threading.Lock(), 0, 0, []

    def work(size: int) -> int:
        nonlocal held, most
        with lock:
            held += size
            most = max(most, held if held != size else 0)  # one alone may be larger
        time.sleep(0.0005 * size)
        return size

    def then(size: int) -> None:
        nonlocal held
        with lock:
            held -= size
        order.append(size)

    ahead.run(ahead.Step(then, partial(work, size), size) for size in sizes)
    assert order == sizes
    assert 3 < most <= 10


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="a call of Linux")
def test_as_many_work_as_torch_may_use_and_the_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads, wanted in ((1, 8, 1), (8, 3, 3), (2, 2, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert ahead.workers() == wanted


def test_a_base_in_float64_is_left_alone_while_it_is_measured(base: Path, tmp_path: Path) -> None:
    model = llama(dtype=torch.float64)
    model.save_pretrained(tmp_path / "wide")
    for name, fields in {"a": {}, "b": {"use_dora": True}}.items():
        saved(model, tmp_path / name, target_modules=["q_proj"], **fields)
    hs.merge_checkpoint(tmp_path / "wide", tmp_path / "a", tmp_path / "merged")
    before, after = tensors_of(tmp_path / "wide")[Q], tensors_of(tmp_path / "merged")[Q]
    torch.testing.assert_close(after, before + products(tmp_path / "a")[Q], rtol=1e-14, atol=1e-16)
    W, piece = before.clone(), Piece((0, 32), torch.ones(32, 1), torch.ones(1, 32))
    assert torch.equal(LowRank([piece]).wanted(W, (0, 32)), before + 1)
    assert torch.equal(W, before)
    hs.merge_checkpoint(tmp_path / "wide", [tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    hs.merge_checkpoint(tmp_path / "wide", tmp_path / "b", tmp_path / "second")
    both, second = (tensors_of(tmp_path / name)[Q] for name in ("both", "second"))
    torch.testing.assert_close(both, second + after - before, rtol=1e-12, atol=1e-14)


def test_the_other_files_come_along(base: Path, adapter: Path, tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(base)
    (base / "README.md").write_text("the base's own card")
    (base / "pytorch_model.bin").write_bytes(b"a pickle")
    shutil.copy(adapter / "adapter_config.json", base)
    (base / "templates").mkdir()
    (base / "templates" / "chat.jinja").write_text("{{ messages }}")
    hs.merge_checkpoint(base, adapter, tmp_path / "merged")
    names = {file.relative_to(base).as_posix() for file in base.rglob("*") if file.is_file()}
    found = {
        file.relative_to(tmp_path / "merged").as_posix() for file in (tmp_path / "merged").rglob("*") if file.is_file()
    }
    assert names - found == {"README.md", "pytorch_model.bin", "adapter_config.json"}
    assert not found - names


Spoil = Callable[[Path, Path], object]


def _edit_index(base: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = base / "model.safetensors.index.json"
    table = json.loads(path.read_text())
    change(table["weight_map"])
    path.write_text(json.dumps(table))


def _rewrite(base: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = change(tensors_of(base))
    for file in (*base.glob("*.safetensors"), base / "model.safetensors.index.json"):
        file.unlink()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def _narrow(base: Path, adapter: Path) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 40}))


Q = "model.layers.0.self_attn.q_proj.weight"
SPOILT: dict[str, tuple[Spoil, type[HeadstartError], str]] = {
    "a shard is gone": (lambda b, a: sorted(b.glob("*.safetensors"))[-1].unlink(), KeyMismatch, "not there"),
    "a shard is cut off": (
        lambda b, a: (f := sorted(b.glob("*.safetensors"))[-1]).write_bytes(f.read_bytes()[:-9]), FileError, "damaged"),
    "the index promises more": (
        lambda b, a: _edit_index(b, lambda m: m.update(extra=next(iter(m.values())))), KeyMismatch, "promises"),
    "the index leaves the folder": (
        lambda b, a: _edit_index(b, lambda m: m.update({Q: "../x.safetensors"})), FileError, "no file of this folder"),
    "a tensor is missing": (
        lambda b, a: _rewrite(b, lambda t: {k: v for k, v in t.items() if k != Q}), KeyMismatch, "no tensor for"),
    "another shape": (_narrow, KeyMismatch, "different models"),
    "another base": (
        lambda b, a: _rewrite(b, lambda t: {k: torch.randn_like(v) for k, v in t.items()}), WrongBase, "another base"),
    "another architecture": (
        lambda b, a: (shutil.rmtree(b), gpt2().save_pretrained(b)), NoTarget, "does not have"),
    "no safetensors": (lambda b, a: [f.unlink() for f in b.glob("*.safetensors*")], Unstreamable, "has no model"),
    "another quantisation": (
        lambda b, a: (b / "config.json").write_text(json.dumps(
            {**json.loads((b / "config.json").read_text()), "quantization_config": {"quant_method": "gptq"}})),
        Unstreamable, "gptq"),
    "a huge index": (
        lambda b, a: (b / "model.safetensors.index.json").write_text(" " * (1 + (64 << 20))), FileError, "MiB"),
    "eight bits": (
        lambda b, a: _rewrite(b, lambda t: {**t, Q: t[Q].to(torch.float8_e4m3fn)}), Unstreamable, "F8_E4M3"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_what_does_not_fit_is_named_before_anything_is_written(
    name: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    spoil, error, said = SPOILT[name]
    spoil(base, adapter)
    with pytest.raises(error, match=said):
        hs.merge_checkpoint(base, adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize("inside", ["base", "base/merged", "adapter", "."])
def test_an_output_that_is_an_input_is_refused(inside: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="not apart"):
        hs.merge_checkpoint(base, adapter, tmp_path / inside, force=True)


@pytest.mark.parametrize("name", [".", ".."])
def test_an_output_without_a_name_is_refused(
    name: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    shutil.copy(base / "config.json", tmp_path / "a/b" / name)
    monkeypatch.chdir(tmp_path / "a/b")
    with pytest.raises(FileError, match="names no folder to make"):
        hs.merge_checkpoint(base, adapter, name, force=True)


def test_an_existing_output_is_replaced_only_where_that_was_asked_for(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(FileError, match="exists" if not force else "no folder of a model"):
            hs.merge_checkpoint(base, adapter, out, force=force)
    assert (out / "diary.txt").read_text() == "mine"
    shutil.rmtree(out)
    hs.merge_checkpoint(base, adapter, out)
    (out / "old.json").write_text("{}")
    hs.merge_checkpoint(base, adapter, out, force=True)
    assert not (out / "old.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "merged"}


def test_a_full_disk_is_noticed_before_the_first_byte(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(file.stat().st_size for file in base.iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size // 2))
    with pytest.raises(FileError, match="bytes left"):
        hs.merge_checkpoint(base, adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_an_interrupted_merge_leaves_what_stood_there(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "merged"
    hs.merge_checkpoint(base, adapter, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(rewrite, "BLOCK", 512)
    for fault in (KeyboardInterrupt, OSError(28, "No space left on device")):
        calls = iter(range(1000))

        def failing(done: int, total: int, fault: Any = fault, calls: Any = calls) -> None:
            if next(calls) == 9:
                raise fault

        with pytest.raises((KeyboardInterrupt, FileError)):
            hs.merge_checkpoint(base, adapter, out, dtype="float32", force=True, progress=failing)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "merged"}


def test_a_killed_merge_leaves_nothing_under_the_final_name(base: Path, adapter: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time, headstart as hs\n"
        "def slow(done, total):\n    print(done, flush=True)\n    time.sleep(0.2)\n"
        "hs.merge_checkpoint(*sys.argv[1:4], progress=slow)"
    )
    words = [sys.executable, "-c", code, str(base), str(adapter), str(tmp_path / "merged")]
    environment = {**os.environ, "PYTHONPATH": str(Path(hs.__file__).parent.parent)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    time.sleep(0.1)
    assert not (tmp_path / "merged").exists()
    assert len(list(tmp_path.glob(".merged.*"))) == 1
    hs.merge_checkpoint(base, adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "merged"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dtype": "int8"}, "choose auto"),
        ({"weights": [1.0, 2.0]}, "one finite number for each"),
        ({"weights": [float("nan")]}, "one finite number for each"),
        ({"method": "mean"}, "choose linear"),
        ({"method": "svd"}, "give --rank"),
        ({"rank": 3}, "goes with method svd"),
        ({"method": "ties", "density": 0.0}, "density"),
    ],
)
def test_mistaken_options_are_refused(
    given: dict[str, Any], said: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadOption, match=said):
        hs.merge_checkpoint(base, adapter, tmp_path / "merged", **given)


def test_pickled_weights_go_through_the_model(base: Path, adapter: Path, tmp_path: Path, tokenizer: Any) -> None:
    from headstart.tune.merging import merge

    tokenizer.save_pretrained(base)
    direct = merge(str(base), str(adapter), str(tmp_path / "streamed"))
    torch.save(tensors_of(base), base / "pytorch_model.bin")
    for file in base.glob("*.safetensors*"):
        file.unlink()
    loaded = merge(str(base), str(adapter), str(tmp_path / "loaded"))
    assert direct.how == "streamed"
    assert loaded.how.startswith("through the model: ")
    left, right = tensors_of(tmp_path / "streamed"), tensors_of(tmp_path / "loaded")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    with pytest.raises(BadOption, match="from file to file only"):
        merge(str(base), [str(adapter)] * 2, str(tmp_path / "ties"), method="ties")


def test_a_disk_that_is_full_at_the_last_byte_leaves_what_stood_there(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "merged"
    hs.merge_checkpoint(base, adapter, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    put, asked = unbuffered._put, []

    def full(file: int, memory: memoryview, place: int) -> None:
        asked.append(place)
        if place == 0:
            raise OSError(errno.ENOSPC, "no space left")
        put(file, memory, place)

    monkeypatch.setattr(unbuffered, "_put", full)
    with pytest.raises(FileError, match="no space left; nothing was changed"):
        hs.merge_checkpoint(base, adapter, out, force=True)
    assert len(asked) > 1
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".") or "merged" in one.name] == ["merged"]
