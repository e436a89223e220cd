"""PEFT as the oracle of our files: what it trains we compute, and what we train it computes, for every layer it has."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import headstart as hs
from headstart.files.adapter import CONFIG, TENSORS, read_adapter
from headstart.inits import get
from headstart.lora.adapter import adapter_of
from headstart.lora.targets import matches_pattern
from headstart.testing import KINDS, Both, Case, Experts, Kind, train

pytestmark = pytest.mark.filterwarnings("ignore")

# What PEFT itself computes differently from the frozen layer: it drops dilation and the padding mode of a convolution.
_MISREAD = ("conv1d", "conv1d_dora", "conv2d_same", "conv1d_reflect", "conv1d_reflect_dora", "conv2d_circular")
# Warnings that say nothing about the file. The one about patterns is untrue of target_parameters: were the ranks
# ignored, the tensors would not fit.
_HARMLESS = re.compile(
    r"deprecated|Merging is not supported|pattern keys did not match|fan_in_fan_out|tie_word_embeddings"
)


# ------------------------------------------------------------------ the small models


def _ids() -> Tensor:
    return torch.arange(24).reshape(2, 12) * 7 % 50 + 3


def _llama(tied: bool = True) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2,
        )
    )  # fmt: skip


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=53, n_embd=16, n_layer=2, n_head=4, n_positions=16))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, num_labels=3,
        )
    )  # fmt: skip


def _distilbert() -> nn.Module:
    """Its pre_classifier is a head too: PEFT goes by the end of a name."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=53, dim=16, hidden_dim=24, n_layers=1, n_heads=4, num_labels=3)
    return DistilBertForSequenceClassification(config)


class Mixture(nn.Module):
    """A Linear, and experts that are its neighbours: modules and bare parameters in one adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.experts, self.norm = nn.Linear(12, 12), Experts(), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.experts(self.inner(x)))  # type: ignore[no-any-return]


def _model(name: str, make: Callable[[], nn.Module], **fields: Any) -> Kind:
    """A transformers model under some config."""
    keywords: dict[str, Any] = {"input_ids": _ids(), "return_dict": False}
    if make not in (_bert, _distilbert):
        keywords["use_cache"] = False
    return Kind(name, make, tuple, lambda: keywords, fields)


def _vectors(width: int) -> tuple[Tensor, ...]:
    return (torch.randn(5, width, generator=torch.Generator().manual_seed(1)),)


def _images(*shape: int) -> tuple[Tensor, ...]:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)),)


_SIDES = {"target_modules": ["left", "right"]}
_MORE = [
    Kind("conv1d_plain", lambda: Both(lambda: nn.Conv1d(6, 8, 3, 2, 2)), partial(_images, 2, 6, 9), fields=_SIDES),
    Kind("depthwise", lambda: Both(lambda: nn.Conv2d(4, 8, 3, groups=4)), partial(_images, 2, 4, 5, 5), fields=_SIDES),
    Kind("one_linear", lambda: Both(lambda: nn.Linear(12, 8)), partial(_vectors, 12),
         fields={"target_modules": ["right"], "rank_pattern": {"right": 3}, "alpha_pattern": {"right": 5.0}}),
    Kind("linear_parameter", lambda: Both(lambda: nn.Linear(12, 8)), partial(_vectors, 12),
         fields={"target_modules": [], "target_parameters": ["left.weight"]}),
    Kind("experts_in_another_order", lambda: Both(Experts), partial(_vectors, 12),
         fields={"target_modules": [], "target_parameters": ["right.up", "left.down", "left.up"]}),
    Kind("experts_patterns", lambda: Both(Experts), partial(_vectors, 12),
         fields={"target_modules": [], "target_parameters": ["up", "down"], "use_rslora": True,
                 "rank_pattern": {"up": 2, r"right\.down": 3}, "alpha_pattern": {"left.up": 6}}),
    Kind("mixture", Mixture, partial(_vectors, 12),
         fields={"target_modules": ["inner"], "target_parameters": ["experts.up", "experts.down"],
                 "modules_to_save": ["norm"]}),
    _model("llama", _llama, target_modules="all-linear", task_type="CAUSAL_LM"),
    _model("llama_rslora_patterns", _llama, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True,
           rank_pattern={"q_proj": 2, r"^model\.layers\.1\.mlp\.down_proj": 7},
           alpha_pattern={"v_proj": 3, "down_proj": 5}),
    _model("llama_dora", _llama, target_modules=["q_proj", "down_proj"], use_dora=True),
    _model("llama_tied_both", _llama, target_modules=["embed_tokens", "lm_head"]),
    _model("llama_tied_head", _llama, target_modules=["lm_head"], task_type="CAUSAL_LM"),
    _model("llama_untied_both", partial(_llama, False), target_modules=["embed_tokens", "lm_head", "q_proj"]),
    _model("llama_saved_head", partial(_llama, False), target_modules=["q_proj"], modules_to_save=["lm_head"]),
    _model("llama_saved_norms", _llama, target_modules=["q_proj"], modules_to_save=["input_layernorm", "norm"]),
    _model("llama_one_layer", _llama, target_modules=["q_proj", "v_proj"], layers_to_transform=[1],
           layers_pattern="layers"),
    _model("llama_expression", _llama, target_modules=r".*\.0\.(self_attn\.q_proj|mlp\.down_proj)",
           exclude_modules=["mlp.down_proj"]),
    _model("gpt2", _gpt2, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM"),
    _model("gpt2_dora", _gpt2, target_modules=["c_attn"], use_dora=True),
    _model("gpt2_and_head", _gpt2, target_modules=["c_fc", "lm_head", "wte"]),
    _model("bert", _bert, target_modules=["query", "value"], task_type="SEQ_CLS"),
    _model("bert_more_than_the_head", _bert, target_modules=["query"], modules_to_save=["pooler"], task_type="SEQ_CLS"),
    _model("distilbert", _distilbert, target_modules=["q_lin"], task_type="SEQ_CLS"),
    _model("bert_saved_head", _bert, target_modules="all-linear", exclude_modules=["classifier"],
           modules_to_save=["classifier"]),
    _model("bert_all_biases", _bert, target_modules=["query", "value"], bias="all"),
    _model("bert_own_biases", _bert, target_modules=["query", "value"], bias="lora_only", task_type="SEQ_CLS"),
]  # fmt: skip
MODELS = {kind.name: kind for kind in [*KINDS.values(), *_MORE] if kind.peft and kind.name not in _MISREAD}
WHOLE = [name for name in MODELS if name.startswith(("llama", "gpt2", "bert", "distilbert"))]


def some(names: Iterable[str]) -> list[tuple[str, str]]:
    """A few starts for every kind of layer: plain, anchored, and with a frozen factor; fewer for whole models."""
    return [(init, n) for n in names for init in (("pissa",) if n in WHOLE else ("kaiming", "pissa", "mica"))]


# ------------------------------------------------------------------ both sides


def by_peft(case: Case) -> Any:
    """The case's base under the same config, in PEFT's hands."""
    names = ("r", "lora_alpha", "modules_to_save", "bias", "use_rslora", "use_dora", "task_type", "exclude_modules")
    own = case.config
    # A copy: PEFT writes to the lists that it is given.
    fields = copy.deepcopy({**{name: getattr(own, name) for name in names}, **case.kind.fields})
    return awake(case, peft.get_peft_model(case.model(), peft.LoraConfig(**fields)))


def awake(case: Case, model: nn.Module) -> nn.Module:
    """In evaluation torch's encoders compute past PEFT's layers. These have no dropout."""
    return model.train(case.kind.name.startswith("encoder"))


def read_by_peft(case: Case, folder: Path, base: nn.Module | None = None) -> Any:
    """A saved adapter on a fresh base, in PEFT's hands, which must find every key and no other."""
    with unmistaken():
        return awake(case, peft.PeftModel.from_pretrained(base or case.model(), folder, is_trainable=True))


@contextmanager
def unmistaken() -> Iterator[None]:
    """Fail on whatever PEFT warns of, but for what says nothing about the file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(warning.message) for warning in caught if not _HARMLESS.search(str(warning.message))]
    assert not said, said


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """‖found − wanted‖ over ‖wanted‖, all outputs together."""
    assert [y.shape for y in found] == [y.shape for y in wanted]
    a, b = (torch.cat([y.double().flatten() for y in side]) for side in (found, wanted))
    return float((a - b).norm() / b.norm())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / TENSORS)


def assert_same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    assert [k for k in wanted if found[k].dtype != wanted[k].dtype or not torch.equal(found[k], wanted[k])] == []


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())  # type: ignore[no-any-return]


# ------------------------------------------------------------------ laws of the files


@pytest.mark.parametrize("name", MODELS)
def test_what_peft_trained_computes_the_same_here(name: str, tmp_path: Path) -> None:
    case = Case("kaiming", MODELS[name])
    theirs = train(case, by_peft(case))
    wanted = case.outputs(theirs)
    assert apart(wanted, case.outputs(case.model())) > 1e-3
    theirs.save_pretrained(tmp_path)
    for trainable in (False, True):
        ours = hs.load(case.model(), tmp_path, trainable=trainable).model
        assert apart(case.outputs(ours), wanted) <= 1e-5
        assert any(p.requires_grad for p in ours.parameters()) is trainable


# Those that quantise mean what they say on their quantised base: test_quantized.py.
OTHERS = [init for init in hs.strategies() if init not in ("kaiming", "pissa", "mica") and not get(init)[0].quantizes]


@pytest.mark.parametrize(
    ("init", "name"),
    [*some(MODELS), *((init, "linear") for init in OTHERS)],
)
def test_what_we_trained_computes_the_same_in_peft(init: str, name: str, tmp_path: Path) -> None:
    case = Case(init, MODELS[name])
    wanted = case.outputs(case.trained)
    assert apart(wanted, case.outputs(case.model())) > 1e-3
    hs.save(case.trained, tmp_path)
    assert apart(case.outputs(read_by_peft(case, tmp_path)), wanted) <= 1e-5


@pytest.mark.parametrize(("init", "name"), some([*MODELS, *_MISREAD, "parts", "parts_conv1d", "parts_conv1d_dora"]))
def test_saving_what_was_loaded_writes_the_same_bits(init: str, name: str, tmp_path: Path) -> None:
    case = Case(init, {**KINDS, **MODELS}[name])
    first, second = tmp_path / "first", tmp_path / "second"
    hs.save(case.trained, first)
    hs.save(hs.load(case.model(), first, trainable=True).model, second)
    assert (first / CONFIG).read_bytes() == (second / CONFIG).read_bytes()
    assert (first / TENSORS).read_bytes() == (second / TENSORS).read_bytes()


@pytest.mark.parametrize("name", ["linear", "gpt2", "experts", "attention", "conv2d_grouped", "embedding", "bert"])
def test_peft_writes_what_it_read(name: str, tmp_path: Path) -> None:
    """The same tensors under the same names: nothing of ours is foreign to it, and nothing of its own is missing."""
    case = Case("pissa", MODELS[name])
    hs.save(case.trained, tmp_path / "ours")
    read_by_peft(case, tmp_path / "ours").save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    assert_same_tensors(ours, theirs)


@pytest.mark.parametrize("name", ["linear", "conv1d_transformers", "attention", "experts", "llama_rslora_patterns"])
def test_an_anchored_adapter_resumes_with_its_anchors(name: str, tmp_path: Path) -> None:
    case = Case("pissa", MODELS[name])
    hs.save(case.trained, tmp_path)
    resumed = hs.load(case.model(), tmp_path, trainable=True)
    before, after = adapter_of(case.trained).layers(), resumed.layers()
    for layer_name, layer in before.items():
        assert layer.anchor is not None
        assert after[layer_name].anchor is not None
        pairs = zip(
            (*layer.factors, *layer.anchor), (*after[layer_name].factors, *after[layer_name].anchor), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    ahead, behind = train(case, case.trained), train(case, resumed.model)
    assert apart(case.outputs(behind), case.outputs(ahead)) == 0


# ------------------------------------------------------------------ truncation


@dataclass(frozen=True)
class Probe:
    """A model whose outputs show its whole matrix."""

    make: Callable[[], nn.Module]
    inputs: Tensor
    changes: dict[str, Any] = field(default_factory=dict)


PROBES = {
    "linear": Probe(lambda: nn.Linear(12, 9), torch.eye(12)),
    "conv1d_transformers": Probe(lambda: Conv1D(9, 12), torch.eye(12)),
    "embedding": Probe(lambda: nn.Embedding(12, 9), torch.arange(12)),
    "conv2d": Probe(lambda: nn.Conv2d(3, 9, 2), torch.eye(12).reshape(12, 3, 2, 2)),
}


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora"])
@pytest.mark.parametrize("name", PROBES)
def test_truncation_costs_what_it_reports(name: str, init: str, tmp_path: Path) -> None:
    probe = PROBES[name]
    kind = Kind(f"probe_{name}", lambda: Both(probe.make), lambda: (probe.inputs,), fields=_SIDES)
    case = Case(init, kind)
    for parameter in adapter_of(case.trained).parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # or the change might have a rank below 3
    wanted, base = case.outputs(case.trained), case.outputs(case.model())
    reported = hs.save(case.trained, tmp_path, rank=2)
    assert config_of(tmp_path)["r"] == 2
    found = case.outputs(read_by_peft(case, tmp_path))
    for side, layer in enumerate(("left", "right")):
        change = (wanted[side].double() - base[side].double()).reshape(12, 9)
        left = torch.linalg.svdvals(change)[2:].square().sum() / change.square().sum()
        missing = (found[side].double() - wanted[side].double()).square().sum() / change.square().sum()
        assert 1e-4 < reported[layer] < 1
        assert reported[layer] == pytest.approx(float(left), rel=1e-3)
        assert reported[layer] == pytest.approx(float(missing), rel=1e-3)


@pytest.mark.parametrize("name", ["experts", "conv2d_grouped", "attention", "llama_rslora_patterns", "gpt2"])
def test_a_truncated_adapter_is_plain_lora_of_that_rank(name: str, tmp_path: Path) -> None:
    case = Case("pissa", MODELS[name])
    dropped = hs.save(case.trained, tmp_path, rank=2)
    assert set(dropped) == set(adapter_of(case.trained).layers())
    assert {entry.rank for entry in read_adapter(tmp_path).entries.values()} == {2}
    theirs, ours = read_by_peft(case, tmp_path), hs.load(case.model(), tmp_path).model
    assert apart(case.outputs(ours), case.outputs(theirs)) <= 1e-5
    assert all(layer.anchor is None for layer in adapter_of(ours).layers().values())


@pytest.mark.parametrize("name", ["linear", "experts", "embedding", "llama"])
def test_truncation_to_the_whole_rank_drops_nothing(name: str, tmp_path: Path) -> None:
    case = Case("pissa", MODELS[name])
    assert max(hs.save(case.trained, tmp_path, rank=8).values()) <= 1e-10
    assert apart(case.outputs(read_by_peft(case, tmp_path)), case.outputs(case.trained)) <= 1e-5


# ------------------------------------------------------------------ the config


@pytest.mark.parametrize("name", MODELS)
def test_the_saved_config_says_plain_lora_on_the_original_weights(name: str, tmp_path: Path) -> None:
    case = Case("pissa", MODELS[name])
    hs.save(case.trained, tmp_path)
    config = config_of(tmp_path)
    with unmistaken():
        assert peft.LoraConfig.from_pretrained(tmp_path).peft_type == "LORA"
    assert config["init_lora_weights"] is True
    assert config["use_rslora"] is False
    assert config["inference_mode"] is True
    assert config["target_modules"] == sorted(set(config["target_modules"]))
    transposed = any(type(module).__name__ == "Conv1D" for module in case.model().modules())
    assert config["fan_in_fan_out"] is transposed
    assert config["task_type"] == case.kind.fields.get("task_type")
    # PEFT keeps no field that this file has not, and none is unknown to it.
    assert set(config) <= set(peft.LoraConfig(target_modules=["x"]).to_dict())


@pytest.mark.parametrize(("init", "name"), some(MODELS))
def test_the_saved_scales_are_those_of_the_layers(init: str, name: str, tmp_path: Path) -> None:
    """α/r by PEFT's rule is s of every layer, and r is the rank of its tensors."""
    case = Case(init, MODELS[name])
    hs.save(case.trained, tmp_path)
    config, tensors = config_of(tmp_path), tensors_of(tmp_path)
    bare = set(config.get("target_parameters") or ())
    for path, layer in adapter_of(case.trained).layers().items():
        own = ".".join(part for part in path.split(".") if part != "base_layer")
        named = f"{own}.{layer.parameter_name}"
        matched = named if named in bare else own
        keys = [k for k in [*config["rank_pattern"], *config["alpha_pattern"]] if matches_pattern(k, matched)]
        rank = config["rank_pattern"].get(keys[0], config["r"]) if keys else config["r"]
        alpha = config["alpha_pattern"].get(keys[0], config["lora_alpha"]) if keys else config["lora_alpha"]
        assert math.isclose(alpha / rank, layer.scaling, rel_tol=1e-12)
        B = next(t for key, t in tensors.items() if re.search(rf"\.{re.escape(path)}\.lora_(embedding_)?B", key))
        copies = layer.layout.count if hasattr(layer.layout, "count") else 1
        groups = layer.layout.groups if hasattr(layer.layout, "groups") else 1
        assert B.shape[1] == rank * copies // groups


def test_a_rank_that_all_layers_share_needs_no_patterns(tmp_path: Path) -> None:
    case = Case("pissa", MODELS["llama"]).but(use_rslora=True)
    hs.save(case.trained, tmp_path)
    config = config_of(tmp_path)
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (8, {}, {})
    assert config["lora_alpha"] == pytest.approx(8 * 8 / math.sqrt(4))


def test_the_config_holds_integers_where_they_are_exact(tmp_path: Path) -> None:
    """Ollama parses α as an integer."""
    case = Case("pissa", MODELS["llama"])
    hs.save(case.trained, tmp_path)
    assert '"lora_alpha": 16,' in (tmp_path / CONFIG).read_text()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_targets_are_suffixes_where_these_say_the_same(name: str, tmp_path: Path) -> None:
    """Some engines match nothing else."""
    case = Case("kaiming", MODELS[name])
    hs.save(case.trained, tmp_path)
    assert not any("." in target for target in config_of(tmp_path)["target_modules"])


def test_an_engine_that_knows_plain_lora_finds_nothing_odd(tmp_path: Path) -> None:
    """vLLM's checks: names that end in a factor's, no bias, no DoRA, no start that it would have to convert."""
    case = Case("pissa", MODELS["llama"])
    hs.save(case.trained, tmp_path)
    config, tensors = config_of(tmp_path), tensors_of(tmp_path)
    assert all(re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", key) for key in tensors)
    assert not config["modules_to_save"]
    assert (config["bias"], config["use_dora"], config["init_lora_weights"]) == ("none", False, True)
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in tensors.values())


def test_an_embedding_is_saved_without_a_copy_of_the_base(tmp_path: Path) -> None:
    case = Case("pissa", MODELS["llama_tied_both"])
    hs.save(case.trained, tmp_path)
    assert set(tensors_of(tmp_path)) == {
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.lm_head.lora_B.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.lora_embedding_B",
    }


def test_a_merged_adapter_saves_the_same_file(tmp_path: Path) -> None:
    case = Case("pissa", MODELS["llama"])
    hs.save(case.trained, tmp_path / "before")
    hs.merge(case.trained, reversible=True)
    hs.save(case.trained, tmp_path / "after")
    assert_same_tensors(tensors_of(tmp_path / "before"), tensors_of(tmp_path / "after"))


def test_kinds_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    """A suffix that another, unadapted layer shares is written as a full name."""
    case = Case("pissa", replace(MODELS["llama_expression"], name="llama_expression"))
    hs.save(case.trained, tmp_path)
    assert config_of(tmp_path)["target_modules"] == ["model.layers.0.self_attn.q_proj"]
