"""What an estimate says is there: shapes against transformers' own, memory against torch's allocator."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import headstart as hs
from headstart.choose import costs, families
from headstart.choose.estimate import estimate, predict
from headstart.choose.machine import bytes_of, duration, size, speed
from headstart.choose.outlines import outline_of
from headstart.choose.setting import Setting
from headstart.choose.shapes import Outline, leaders
from headstart.errors import BadOption, BadRank, FileError, NoTarget, UnknownField, UnknownInit
from headstart.inits.small import on_a_small_matrix
from headstart.lora.calibrate import calibrate
from headstart.lora.calibration import size as calibrated_size
from headstart.lora.config import LoraConfig
from headstart.lora.targets import targets

LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip

SHAPE = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BERT = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**SHAPE, "head_dim": 16}),
    "llama, biased": ("LlamaForCausalLM", {**SHAPE, "attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("LlamaForCausalLM", {**SHAPE, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", SHAPE),
    "qwen2": ("Qwen2ForCausalLM", SHAPE),
    "qwen3": ("Qwen3ForCausalLM", {**SHAPE, "head_dim": 16}),
    "gemma": ("GemmaForCausalLM", {**SHAPE, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", {**SHAPE, "head_dim": 16}),
    "gemma3_text": ("Gemma3ForCausalLM", {**SHAPE, "head_dim": 16}),
    "phi3": ("Phi3ForCausalLM", SHAPE),
    "mixtral": ("MixtralForCausalLM", {**SHAPE, "num_local_experts": 4, "head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**SHAPE, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
                                          "moe_intermediate_size": 48}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 3, "n_head": 8, "vocab_size": 1000, "bos_token_id": 1,
                                 "eos_token_id": 2}),
    "gpt2, no dropout": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 3, "n_head": 8, "vocab_size": 1000,
                                             "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0,
                                             "attn_pdrop": 0.0, "embd_pdrop": 0.0}),
    "bert": ("BertForSequenceClassification", BERT),
    "bert, bare": ("BertModel", BERT),
    "bert, no dropout": ("BertForSequenceClassification", {**BERT, "attention_probs_dropout_prob": 0.0,
                                                           "hidden_dropout_prob": 0.0}),
    "roberta": ("RobertaForSequenceClassification", {**BERT, "num_labels": 5}),
    "t5": ("T5ForConditionalGeneration", {"d_model": 64, "d_ff": 176, "num_layers": 3, "num_heads": 8, "d_kv": 16,
                                          "vocab_size": 1000, "decoder_start_token_id": 0}),
}  # fmt: skip
ROWS, LENGTH, RANK = 2, 50, 4


def built(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model without values."""
    transformers = pytest.importorskip("transformers")
    name, fields = KNOWN[kind]
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**fields)).to(dtype)
    model.config.architectures = [name]
    return model


def read(model: Any) -> Outline:
    """Its outline, from what its config.json would hold."""
    found = families.outline(json.loads(json.dumps(model.config.to_dict())))
    assert found is not None
    return found


def passed(model: nn.Module) -> dict[Any, int]:
    """The bytes that a forward pass of an adapted model keeps, parameters and views of them excluded."""
    kept: dict[Any, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        own = {parameter.untyped_storage() for parameter in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage() not in own:
                kept[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
            return tensor

        tokens = torch.ones(ROWS, LENGTH, dtype=torch.long)
        config: Any = model.config
        given = {"decoder_input_ids": tokens} if config.is_encoder_decoder else {}
        given |= {"use_cache": False} if hasattr(config, "use_cache") and not given else {}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model(input_ids=tokens, attention_mask=tokens, **given)  # type: ignore[operator]
    return kept


# --- shapes


@pytest.mark.parametrize("kind", KNOWN)
def test_the_outline_is_that_of_the_model(kind: str) -> None:
    model = built(kind)
    found = read(model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    wanted = {t.name: tuple(t.layout.blocks(t.module.weight)[0].shape) for t in targets(model, LoraConfig(r=RANK))}
    assert {each.name: (each.m, each.n) for each in found.chosen("all-linear")} == wanted
    head = model.get_output_embeddings()
    assert found.vocabulary == (0 if head is None else head.out_features)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KNOWN)
def test_what_a_pass_keeps_is_what_a_traced_pass_keeps(kind: str, dtype: str) -> None:
    if kind in ("mixtral", "qwen3_moe") and dtype == "float32":
        pytest.skip("torch traces grouped products in bfloat16 alone")
    model = built(kind, getattr(torch, dtype))
    setting = Setting(r=RANK, dtype=dtype, batch_size=ROWS, max_length=LENGTH)
    predicted = predict(read(model), setting).memory.activations
    hs.adapt(model, LoraConfig(r=RANK, lora_alpha=RANK))
    assert predicted == pytest.approx(sum(passed(model).values()), rel=0.02)


def test_other_architectures_are_traced() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(hidden_size=64, intermediate_size=176, num_hidden_layers=3,
                                        num_attention_heads=8, vocab_size=1000)  # fmt: skip
    found = outline_of(config)
    assert (found.read, found.depth, found.hidden, found.vocabulary) == ("trace", 3, 64, 1000)
    with torch.device("meta"):
        model = transformers.GPTNeoXForCausalLM(config)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    setting = Setting(r=RANK, dtype="float32", batch_size=ROWS, max_length=LENGTH)
    predicted = predict(found, setting).memory.activations
    hs.adapt(model, LoraConfig(r=RANK, lora_alpha=RANK))
    assert predicted == pytest.approx(sum(passed(model).values()), rel=0.05)
    own = predict(outline_of(config.to_dict()), setting)
    assert own.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_what_two_modules_share_is_counted_once() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**BERT, architectures=["BertForMaskedLM"])
    assert outline_of(config).parameters == sum(p.numel() for p in transformers.BertForMaskedLM(config).parameters())


def test_a_trace_and_a_count_agree() -> None:
    """The way for unknown architectures, on a known one."""
    from headstart.choose.trace import outline_of_config

    model = built("llama")
    counted, traced = read(model), outline_of_config(model.config)
    assert traced.read == "trace"
    setting = Setting(r=RANK, dtype="float32", batch_size=ROWS, max_length=LENGTH)
    both = [predict(found, setting).memory for found in (counted, traced)]
    assert both[0].weights == both[1].weights
    assert both[0].activations == pytest.approx(both[1].activations, rel=0.03)
    assert traced.flops(LENGTH) == pytest.approx(counted.flops(LENGTH), rel=0.05)
    assert leaders(counted.chosen("all-linear")) == leaders(traced.chosen("all-linear"))


def test_any_module_has_an_outline(llama: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    found = estimate(model, r=2, batch_size=3, max_length=1, timed=False)
    adapter = hs.adapt(model, LoraConfig(r=2))
    assert (found.trainable, found.total) == adapter.count()
    assert found.outline.read == "modules"
    known = outline_of(llama())
    assert known.read == "config"


# --- costs


def test_the_table_of_starts_says_what_they_are() -> None:
    from headstart.inits import get, names

    assert set(costs.STARTS) == set(names())
    for name in names():
        strategy, start = get(name)[0], costs.STARTS[name]
        seen = on_a_small_matrix(strategy, {})
        trains = "R" * (seen.core is not None) or "".join(sorted(set("AB") - seen.frozen))
        assert (start.needs, start.anchored, start.trains, start.base) == (
            strategy.needs, seen.anchored, trains, seen.base is not None,
        ), name  # fmt: skip
        assert (start.work == "free") == (not strategy.reads_weight and not strategy.needs), name


def test_a_start_that_is_registered_elsewhere_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from headstart.inits import strategy

    monkeypatch.setattr(strategy, "_registry", dict(strategy._registry))
    like = strategy.get("pissa")[0]
    monkeypatch.setitem(strategy._registry, "mine", dataclasses.replace(like, name="mine"))
    assert costs.start_of("mine").anchored
    assert costs.start_of("pissa_niter_4") is costs.STARTS["pissa"]
    assert costs.start_of(True) is costs.STARTS["kaiming"]
    with pytest.raises(UnknownInit, match="did you mean 'pissa'"):
        costs.start_of("pisa")


@pytest.mark.parametrize("init", ["eva", "lora_one", "lora_da", "tara"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_statistics_are_predicted_to_the_byte(init: str, kind: str, llama: Any, bert: Any) -> None:
    model = {"llama": llama, "bert": bert}[kind]()
    tokens = torch.randint(3, 250, (4, 16))
    labels = tokens if kind == "llama" else torch.zeros(4, dtype=torch.long)
    config = LoraConfig(r=2, init_lora_weights=init, exclude_modules=["classifier"] if kind == "bert" else None)
    found = calibrate(model, config, [{"input_ids": tokens, "labels": labels}] * 2)  # Two batches have halves.
    outline = outline_of(model)
    chosen = outline.chosen("all-linear", config.exclude_modules)
    predicted = costs.statistics_bytes(config.strategy.needs, chosen, leaders(chosen), 2)
    halves = costs.halves_bytes(config.strategy.needs, chosen, 2)
    assert predicted + halves == calibrated_size(found.layers)


def test_what_is_known_without_torch_is_what_is_done() -> None:
    from headstart.lora import batches, plan
    from headstart.statistics import Moments, moments

    assert (costs.WIDTH, costs.ROWS, costs.PIECE) == (plan.WIDTH, moments.ROWS, batches.PIECE)
    for features in (64, 192, 193, 1000):
        kept = Moments.empty(features)
        assert costs.moments_bytes(features) == calibrated_size({"layer": {"inputs": [kept]}})


# --- memory, against torch's allocator


def allocated(call: Callable[[], object]) -> float:
    """The most that torch held at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    results: Any = recorded.profiler.kineto_results
    held = peak = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return float(peak)


@pytest.mark.parametrize("init", ["kaiming", "pissa", "lora_one"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_run_takes_what_was_predicted(kind: str, init: str) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 8}
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, vocab_size=512))
    else:
        model = transformers.BertModel(transformers.BertConfig(**shape, vocab_size=512), add_pooling_layer=False)
    tokens = torch.randint(3, 500, (4, 256))
    mask = torch.ones_like(tokens)
    mask[0, -9:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask} | ({"labels": tokens} if kind == "llama" else {})
    config = LoraConfig(r=8, lora_alpha=8, init_lora_weights=init)
    outline = dataclasses.replace(outline_of(model), longest=0)
    setting = Setting(init=init, r=8, dtype="float32", batch_size=4, max_length=256, loss="whole")
    predicted = predict(outline, setting).memory

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return model(**batch).loss if kind == "llama" else model(**batch).last_hidden_state.square().mean()

    def run() -> None:
        options = {"data": [batch], "loss": loss} if config.strategy.needs else {}
        adapter = hs.adapt(model, config, **options)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4)
        for _ in range(2):
            loss(model.train(), batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert predicted.weights == weights
    measured = weights + allocated(run)
    assert predicted.peak == pytest.approx(measured, rel=0.03)


# --- the answer


def test_a_large_model_from_its_config_alone() -> None:
    found = estimate(LLAMA_7B, init="pissa", r=16, batch_size=1, max_length=512, tflops=312)
    assert found.total - found.trainable == 6_738_415_616
    assert found.memory.adapter == 2 * 4 * found.trainable
    assert found.time is not None
    assert found.time.step == pytest.approx(4 * 6.6e9 * 512 / (0.35 * 312e12), rel=0.1)
    less = estimate(LLAMA_7B, quantised=True, timed=False).memory
    more = estimate(LLAMA_7B, timed=False).memory
    assert less.weights < 0.35 * more.weights
    checkpointed = estimate(LLAMA_7B, gradient_checkpointing=True, timed=False).memory
    assert checkpointed.activations < 0.15 * more.activations
    text = str(found)
    assert "predicted memory" in text
    assert "35% of a stated peak of 312 TFLOPS" in text
    assert json.loads(json.dumps(found.to_dict()))["bytes"]["peak"] == found.memory.peak


def test_accumulated_gradients_stand_beside_the_activations() -> None:
    one, two = (estimate(LLAMA_7B, gradient_accumulation=k, timed=False).memory for k in (1, 2))
    assert two.training - one.training == one.gradients


def test_every_setting_moves_what_it_should() -> None:
    plain = estimate(LLAMA_7B, timed=False)
    assert estimate(LLAMA_7B, r=32, timed=False).trainable == 2 * plain.trainable
    assert estimate(LLAMA_7B, target_modules=["q_proj", "v_proj"], timed=False).layers == 64
    assert estimate(LLAMA_7B, target_modules=r".*\.layers\.0\..*", timed=False).layers == 7
    assert estimate(LLAMA_7B, exclude_modules=["down_proj"], timed=False).layers == 6 * 32
    assert estimate(LLAMA_7B, loss="whole", timed=False).memory.loss == 3 * 4 * 8 * 1024 * 32000
    assert estimate(LLAMA_7B, optimizer="sgd", timed=False).memory.adam == 0
    assert estimate(LLAMA_7B, dtype="float32", timed=False).memory.weights == 2 * plain.memory.weights


def test_a_quantised_form_beside_float_weights_is_counted() -> None:
    outline = outline_of(LLAMA_7B)
    held = 2 * sum(matrix.size for matrix in outline.chosen("all-linear"))
    plain, beside = (estimate(LLAMA_7B, init=init, timed=False).memory.weights for init in ("kaiming", "qpissa"))
    assert beside - plain == held
    stored = [estimate(LLAMA_7B, init=i, quantised="4bit", timed=False).memory.weights for i in ("kaiming", "loftq")]
    assert stored[0] == stored[1]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"rank": 8}, UnknownField, "no field 'rank'"),
        ({"max_lenght": 8}, UnknownField, "did you mean 'max_length'"),
        ({"r": 0}, BadRank, "r is 0: choose an integer of at least 1"),
        ({"r": True}, BadRank, "r is True"),
        ({"batch_size": 1.5}, BadOption, "batch_size is 1.5"),
        ({"dtype": "float23"}, BadOption, "did you mean 'float32'"),
        ({"quantised": "3bit"}, BadOption, "choose 4bit, 8bit"),
        ({"init": "pisa"}, UnknownInit, "did you mean 'pissa'"),
        ({"init": "pissa", "r": 5000}, BadRank, r"rank 5000 does not fit a \(4096, 4096\) weight"),
        ({"target_modules": ["q_prj"]}, NoTarget, "did you mean 'q_proj'"),
        ({"exclude_modules": r".*_proj"}, NoTarget, "widen target_modules"),
        ({"tflops": -1}, BadOption, "tflops is -1"),
        ({"tflops": math.inf}, BadOption, "tflops is inf"),
        ({"target_modules": "["}, BadOption, "is no regular expression"),
        ({"target_modules": None}, BadOption, "target_modules is None"),
        ({"exclude_modules": [3]}, BadOption, r"exclude_modules is \[3\]"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        estimate(LLAMA_7B, **fields)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "cannot read"),
        ("config.json", "[1]", "holds list"),
        ("config.json", '{"model_type": "nonsuch"}', "transformers makes no model of this config"),
        ("adapter_config.json", "{}", "is an adapter"),
    ],
)
def test_what_is_no_model_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FileError, match=message):
        estimate(tmp_path)
    with pytest.raises(FileError, match="no model at"):
        estimate(tmp_path / "gone")


def test_a_config_that_leaves_out_a_number_is_completed_by_transformers() -> None:
    pytest.importorskip("transformers")
    brief = {name: value for name, value in KNOWN["qwen2"][1].items() if name != "num_attention_heads"}
    assert families.outline({"model_type": "qwen2", **brief}) is None
    assert outline_of({"model_type": "qwen2", **brief, "num_attention_heads": 8}).read == "config"


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma2", "mistral", "llama", "phi3"])
def test_a_number_of_the_class_is_not_guessed(kind: str) -> None:
    """Without their number, a Qwen2 has 32 groups of keys, and a Llama as many as heads."""
    name, fields = KNOWN[kind]
    brief = {key: value for key, value in fields.items() if key != "num_key_value_heads"}
    known = families.outline({"model_type": kind, "architectures": [name], **brief})
    assert (known is not None) == (kind in ("llama", "phi3"))


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "LlamaModel", "BertLMHeadModel", "GPT2Model"])
def test_a_checkpoint_of_another_class_is_not_taken_for_the_usual_one(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind = {"L": "llama", "B": "bert", "G": "gpt2"}[name[0]]
    model_class = getattr(transformers, name)
    config = model_class.config_class(**KNOWN[kind][1], architectures=[name])
    with torch.device("meta"):
        model = model_class(config)
    found = outline_of(json.loads(config.to_json_string()))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    wanted = {target.name for target in targets(model, LoraConfig(r=1))}
    assert {each.name for each in found.chosen("all-linear")} == wanted


@pytest.mark.parametrize(
    ("packed", "bits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "4bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, "8bit"),
        ({"quant_method": "gptq", "bits": 4}, "4bit"),
        ({"quant_method": "gptq", "bits": 8}, "8bit"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "8bit"),
        ({"quant_method": "fbgemm_fp8"}, "8bit"),
        ({"quant_method": "mxfp4"}, "4bit"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, "8bit"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, "4bit"),
        ({"quant_method": "torchao", "quant_type": {"default": {
            "_type": "Int8DynamicActivationInt4WeightConfig"}}}, "4bit"),
        ({"quant_method": "torchao", "quant_type": {"default": {
            "_type": "Float8DynamicActivationInt4WeightConfig"}}}, "4bit"),
        ({"quant_method": "torchao", "quant_type": "int8_dynamic_activation_int4_weight"}, "4bit"),
        ({"quant_method": "torchao", "quant_type": "int8_dynamic_activation_int8_weight"}, "8bit"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, "8bit"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {
            "weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}}}, "4bit"),
    ],
)  # fmt: skip
def test_the_width_of_quantised_weights_is_read_in_each_quantiser_s_words(packed: dict[str, Any], bits: str) -> None:
    found = families.outline({**LLAMA_7B, "quantization_config": packed})
    assert found is not None
    assert found.quantised == bits
    assert families.stored({"quantization_config": packed})["dtype"] == "bfloat16"


def test_a_checkpoint_that_is_stored_quantised_has_packed_its_experts() -> None:
    experts = {**KNOWN["qwen3_moe"][1], "model_type": "qwen3_moe", "dtype": "bfloat16"}
    whole = families.outline(experts)
    packed = families.outline({**experts, "quantization_config": {"quant_method": "fp8"}})
    assert whole is not None
    assert packed is not None
    held = sum(m.size for m in whole.matrices if m.linear or m.count > 1)
    assert predict(whole, Setting(r=4)).memory.weights == 2 * whole.parameters
    assert predict(packed, Setting(r=4)).memory.weights == 2 * whole.parameters - held
    loaded = predict(whole, Setting(r=4, quantised="8bit")).memory.weights  # bitsandbytes leaves bare parameters.
    assert loaded == 2 * whole.parameters - sum(m.size for m in whole.matrices if m.linear)


def test_a_model_that_cannot_be_traced_says_nothing_of_it(capfd: pytest.CaptureFixture[str]) -> None:
    """torch traces grouped products in bfloat16 alone, and prints a traceback where it cannot."""
    transformers = pytest.importorskip("transformers")
    name, fields = KNOWN["mixtral"]
    config = transformers.MixtralConfig(**{**fields, "attention_dropout": 0.1}, architectures=[name])
    assert outline_of(config, "float32").read == "modules"
    assert "Traceback" not in capfd.readouterr().err


def test_the_commands_load_no_torch(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    code = "import sys\nfrom headstart.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules)"
    for verb in (["estimate", "--init", "lora_one"], ["advise", "--data", "stdlib", "--memory", "24GB"]):
        command = [sys.executable, "-c", code, *verb, "--model", str(tmp_path), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        answer, loaded = done.stdout.splitlines()
        assert loaded == "False"
        assert json.loads(answer)


def test_sizes_and_times_as_people_write_them() -> None:
    written = {"16GB": 16 * 10**9, "80 GiB": 80 * 2**30, "900mb": 9 * 10**8, "24": 24 * 10**9}
    assert {text: bytes_of(text) for text in written} == written
    for wrong in ("much", "-3GB", "0", "GB", "1.2.3GB"):
        with pytest.raises(BadOption, match="write a size"):
            bytes_of(wrong)
    assert [size(count) for count in (1.5e9, 2e6, 500)] == ["1.5 GB", "2 MB", "0.5 kB"]
    assert [duration(s) for s in (0.2, 30, 600, 7200, 1e6)] == ["under a second", "30 s", "10 min", "2 h", "12 days"]
    found = speed("float32", seconds=0.02)
    assert found is None or (found.flops > 1e8 and "measured now" in found.reason)
