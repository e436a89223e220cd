"""Names and patterns → which weights, at which rank and α. PEFT's own matching is the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import headstart as hs
from headstart.errors import BadOption, BadRank, NoTarget, UnsupportedLayer
from headstart.lora.config import LoraConfig
from headstart.lora.targets import targets

Maker = Callable[[], nn.Module]
Chosen = dict[str, tuple[int, float, float]]


def ours(model: nn.Module, **fields: Any) -> Chosen:
    found = targets(model, LoraConfig.from_dict(fields))
    return {target.name: (target.rank, float(target.alpha), target.scaling) for target in found}


def theirs(model: nn.Module, **fields: Any) -> Chosen:
    import peft
    from peft.tuners.lora import LoraLayer

    fields.setdefault("target_modules", "all-linear")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**fields))
    layers = [(n, m) for n, m in wrapped.base_model.model.named_modules() if isinstance(m, LoraLayer)]
    return {n: (m.r["default"], float(m.lora_alpha["default"]), m.scaling["default"]) for n, m in layers}


LLAMA: list[dict[str, Any]] = [
    {},
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    {"target_modules": ["model.layers.1.self_attn.k_proj"]},
    {"target_modules": ["self_attn.k_proj", "mlp.up_proj"]},
    {"target_modules": ["1.self_attn.o_proj"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": r".*\.q_proj"},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": r"model\.layers\.0\..*_proj"},
    {"target_modules": r".*layers\.[01]\.mlp\.(gate|up)_proj"},
    {"exclude_modules": ["q_proj"]},
    {"exclude_modules": ["model.layers.0.mlp.up_proj", "o_proj"]},
    {"exclude_modules": r".*layers\.1\..*"},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*k_proj"},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1]},
    {"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["mlp"], "target_modules": "all-linear"},
    {"r": 4, "lora_alpha": 16},
    {"r": 4, "lora_alpha": 16, "use_rslora": True},
    {"rank_pattern": {"q_proj": 2}},
    {"rank_pattern": {"q_proj": 2, "model.layers.0.self_attn.q_proj": 3}},
    {"rank_pattern": {"model.layers.0.self_attn.q_proj": 3, "q_proj": 2}},
    {"rank_pattern": {"self_attn.(q|k)_proj": 5}},
    {"rank_pattern": {r"layers\.1\.mlp\..*": 6}},
    {"rank_pattern": {r"^model\.layers\.0\.mlp\.down_proj": 7}},
    {"rank_pattern": {".*_proj": 3, "q_proj": 2}},
    {"alpha_pattern": {"v_proj": 32}},
    {"alpha_pattern": {"v_proj": 1.5, ".*": 3}},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 5}},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {".*q_proj": 5}},
    {"rank_pattern": {".*": 4}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True},
    {"rank_pattern": {"mlp.up_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}, "layers_to_transform": 1,
     "target_modules": ["up_proj", "q_proj"]},
]  # fmt: skip
GPT2: list[dict[str, Any]] = [
    {},
    {"target_modules": ["c_attn"]},
    {"target_modules": ["c_proj"]},
    {"target_modules": ["attn.c_proj"]},
    {"target_modules": ["mlp.c_proj", "wte"]},
    {"target_modules": r".*\.h\.0\..*c_.*"},
    {"target_modules": ["c_fc"], "layers_to_transform": [1], "layers_pattern": "h"},
    {"target_modules": ["c_fc"], "layers_to_transform": [1]},
    {"rank_pattern": {"c_proj": 3, "attn.c_proj": 5}, "alpha_pattern": {"mlp.c_proj": 1}},
    {"exclude_modules": ["attn.c_proj"]},
    {"target_modules": ["lm_head", "c_attn"]},
]
BERT: list[dict[str, Any]] = [
    {},
    {"target_modules": ["query", "value"]},
    {"target_modules": ["dense"]},
    {"target_modules": ["attention.output.dense", "classifier"]},
    {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]},
    {"target_modules": ["query"], "modules_to_save": ["classifier"]},
    {"target_modules": "all-linear", "modules_to_save": ["classifier", "pooler"]},
    {"target_modules": ["dense"], "layers_to_transform": [0]},
    {"target_modules": ["word_embeddings", "key"]},
    {"rank_pattern": {"output.dense": 3, "attention.output.dense": 2}},
]
TABLE = [*(("llama", c) for c in LLAMA), *(("gpt2", c) for c in GPT2), *(("bert", c) for c in BERT)]


@pytest.mark.parametrize(("name", "fields"), TABLE, ids=[f"{n}-{i}" for i, (n, _) in enumerate(TABLE)])
@pytest.mark.filterwarnings("ignore")
def test_the_same_weights_as_in_peft(name: str, fields: dict[str, Any], request: pytest.FixtureRequest) -> None:
    make: Maker = request.getfixturevalue(name)
    assert ours(make(), **fields) == theirs(make(), **fields)


@pytest.mark.filterwarnings("ignore")
def test_the_same_parameters_as_in_peft() -> None:
    from headstart.testing import Both, Experts

    def make() -> nn.Module:
        return Both(Experts)

    for names in (["up"], ["left.down"], ["up", "down"], ["right.up", "left.down"]):
        for patterns in ({}, {"left.up": 2}, {"up": 3, "left.*": 2}):
            fields = {"target_parameters": names, "target_modules": [], "rank_pattern": patterns}
            if any(key == "left.up" for key in patterns) and not any(n == "up" for n in names):
                continue  # matches nothing: PEFT warns, we refuse
            if "up" in patterns and not any(n.endswith("up") for n in names):
                continue
            found = ours(make(), **fields)
            wrapped = theirs(make(), **fields)
            # PEFT names the wrapper, we name the parameter.
            assert sorted(found.values()) == sorted(wrapped.values())
            assert {name.rpartition(".")[0] for name in found} == {name.partition(".")[0] for name in wrapped}


def test_adapting_installs_what_targets_says(llama: Maker) -> None:
    config = LoraConfig(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3}, use_rslora=True)
    model = llama()
    wanted = {target.name: (target.rank, target.scaling) for target in targets(model, config)}
    adapter = hs.adapt(model, config)
    assert {name: (layer.rank, layer.scaling) for name, layer in adapter.layers().items()} == wanted


# ------------------------------------------------------------------ what matches nothing


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 4)}) for _ in "ab")
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.experts = nn.ParameterDict({"up": nn.Parameter(torch.zeros(2, 4, 8))})


NOTHING: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["qeury"]}, r"'qeury' matches no module; did you mean 'query'"),
    ({"target_modules": ["query", "valeu"]}, r"'valeu' matches no module; did you mean 'value'"),
    ({"target_modules": ["uery"]}, r"'uery' matches no module; did you mean 'query'"),
    ({"target_modules": r".*\.qeury"}, r"matches no module; did you mean 'query'"),
    ({"target_modules": "query"}, r"'query' matches no module"),  # an expression matches whole names
    ({"target_modules": ["query"], "exclude_modules": ["values"]}, r"exclude_modules 'values'.*'value'"),
    ({"target_modules": ["query"], "exclude_modules": ["query"]}, r"no module is left after exclude_modules"),
    ({"target_modules": ["query"], "modules_to_save": ["nrom"]}, r"modules_to_save 'nrom'.*'norm'"),
    ({"target_modules": ["query"], "rank_pattern": {"qery": 2}}, r"rank_pattern key 'qery'.*'query'"),
    ({"target_modules": ["query"], "rank_pattern": {"value": 2}}, r"rank_pattern key 'value' matches no adapted layer"),
    ({"target_modules": ["query"], "alpha_pattern": {"uery": 2}}, r"alpha_pattern key 'uery'"),
    ({"target_modules": ["query"], "parts": {"vlaue": (True, False)}}, r"parts key 'vlaue'"),
    ({"target_modules": ["query"], "layers_to_transform": [0, 7]}, r"\[7\] matches no layer.*\[0, 1\]"),
    ({"target_modules": [], "target_parameters": ["experts.pu"]}, r"'experts.pu' matches no parameter; did you mean"),
    ({"target_modules": []}, "no module is left"),
]


@pytest.mark.parametrize(("fields", "said"), NOTHING, ids=range(len(NOTHING)))
def test_what_matches_nothing_names_what_is_near(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(NoTarget, match=said):
        hs.adapt(Net(), LoraConfig.from_dict({"r": 2, **fields}))


def test_a_model_without_linears_is_told_so() -> None:
    with pytest.raises(NoTarget, match="'all-linear' finds no Linear"):
        hs.adapt(nn.Sequential(nn.Conv1d(4, 4, 1)), LoraConfig(r=2))


UNSERVED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"target_modules": ["norm"]}, UnsupportedLayer, r"LayerNorm.*layer 'norm'"),
    ({"target_modules": ["attention.out_proj"]}, UnsupportedLayer, r"target 'attention' instead"),
    ({"target_modules": ["attention"], "use_dora": True}, UnsupportedLayer, r"layer 'attention'"),
    (
        {"target_modules": ["value"], "parts": {"value": (True, False, True)}},
        BadOption,
        r"4 rows.*layer 'layers.0.value'",
    ),
    ({"target_modules": ["value"], "parts": {"value": ((2, 1),)}}, BadOption, r"layer 'layers.0.value'"),
    ({"target_modules": ["value"], "parts": {"value": ((0, 9),)}}, BadOption, r"within 0 to 4"),
    ({"target_modules": ["attention"], "parts": {"attention": (True, True)}}, UnsupportedLayer, "Linear or Conv1D"),
    (
        {"target_modules": ["value"], "r": 5, "init_lora_weights": "pissa"},
        BadRank,
        r"rank 5 does not fit.*choose 1 to 4.*layer 'layers.0.value'",
    ),
]


@pytest.mark.parametrize(("fields", "error", "said"), UNSERVED, ids=range(len(UNSERVED)))
def test_what_cannot_be_adapted_says_where_and_what_instead(
    fields: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        hs.adapt(Net(), LoraConfig.from_dict({"r": 2, **fields}))


# ------------------------------------------------------------------ matters of structure


def test_noise_may_be_of_any_rank() -> None:
    model = Net().eval()
    x = torch.randn(3, 8)
    wanted = model.layers[0]["value"](x)  # type: ignore[index,operator]
    hs.adapt(model, LoraConfig(r=6, target_modules=["value"]))
    assert torch.equal(model.layers[0]["value"](x), wanted)  # type: ignore[index,operator]


def test_a_rank_too_large_is_clipped_where_allowed() -> None:
    adapter = hs.adapt(Net(), LoraConfig(r=6, target_modules=["query", "value"], clip_rank=True))
    assert {name: layer.rank for name, layer in adapter.layers().items()} == {
        "layers.0.query": 6, "layers.0.value": 4, "layers.1.query": 6, "layers.1.value": 4,
    }  # fmt: skip
    assert [layer.rank for layer in adapter.report.layers] == [6, 4, 6, 4]


def test_a_module_under_two_names_gets_one_adapter() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": shared, "again": nn.ModuleList([shared]), "other": nn.Linear(8, 8)})
    adapter = hs.adapt(model, LoraConfig(r=2, init_lora_weights=False))
    assert len(adapter.layers()) == 2
    assert model["first"] is model["again"][0]  # type: ignore[index]
    hs.remove(model)
    assert model["first"] is shared
    assert model["again"][0] is shared  # type: ignore[index]


def test_layers_are_in_the_order_of_the_model_whatever_the_order_of_the_targets(llama: Maker) -> None:
    wanted = ["v_proj", "q_proj", "down_proj"]
    found = [list(ours(llama(), target_modules=order)) for order in itertools.permutations(wanted)]
    assert all(names == found[0] for names in found)


def test_attention_brings_its_output_projection() -> None:
    adapter = hs.adapt(Net(), LoraConfig(r=2, target_modules=["attention"]))
    assert [name.replace("base_layer.", "") for name in adapter.layers()] == ["attention", "attention.out_proj"]


def test_all_linear_leaves_the_projection_of_an_attention_alone() -> None:
    adapter = hs.adapt(Net(), LoraConfig(r=2))
    assert not any("attention" in name for name in adapter.layers())
