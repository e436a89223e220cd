"""What the engines' own code makes of our files: parsers from their wheels, llama.cpp's names and rows, mlx itself."""

from __future__ import annotations

import copy
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import headstart as hs
from engine_sources import executed, functions, source, stubbed
from headstart.files.adapter import TENSORS
from headstart.testing import Case, Kind

pytestmark = pytest.mark.filterwarnings("ignore")


def ids() -> Tensor:
    return torch.arange(24).reshape(2, 12) * 7 % 50 + 3


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.2,
        )
    )  # fmt: skip


def case(init: str = "pissa", **fields: Any) -> Case:
    """An adapter that every engine but vLLM misreads as it is: two ranks, two alphas, rsLoRA."""
    keywords = {"input_ids": ids(), "return_dict": False, "use_cache": False}
    own = {
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
        **fields,
    }
    return Case(init, Kind(f"engines_{'_'.join(own)}", llama, tuple, lambda: keywords, own))


@pytest.fixture(scope="module")
def trained() -> Case:
    return case()


@pytest.fixture(scope="module")
def portable(trained: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("portable")
    hs.save(trained.trained, folder / "saved")
    hs.export(folder / "saved", folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def changes(trained: Case) -> dict[str, Tensor]:
    return merged(trained)


def merged(case: Case) -> dict[str, Tensor]:
    """ΔW of every layer: what merging in float64 does to the base's weights."""
    model, base = copy.deepcopy(case.trained).double(), case.model().double()
    before = {name: module.weight.detach().clone() for name, module in base.named_modules() if _has_weight(module)}
    hs.merge(model)
    after = {name: module.weight.detach() for name, module in model.named_modules() if _has_weight(module)}
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding)


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, change in wanted.items():
        assert float((found[name].double() - change).norm() / change.norm()) <= 1e-6, name


# ------------------------------------------------------------------ vLLM


@pytest.fixture(scope="module")
def vllm() -> SimpleNamespace:
    """Its config parser and its parser of names; two stubs are all that they need."""
    pytest.importorskip("regex", reason="vLLM's parser needs the package regex")
    helper = source("vllm", "vllm/lora/peft_helper.py")
    utils = source("vllm", "vllm/lora/utils.py")
    logger = SimpleNamespace(info_once=lambda *message: None)
    with stubbed(
        vllm={}, vllm__config={}, vllm__config__lora={"LoRAConfig": object},
        vllm__logger={"init_logger": lambda name: logger},
    ):  # fmt: skip
        parsed = executed(helper)
    names = functions(utils, "parse_fine_tuned_lora_name", "is_base_embedding_weights")
    return SimpleNamespace(helper=parsed["PEFTHelper"], name=names["parse_fine_tuned_lora_name"])


def by_vllm(vllm: SimpleNamespace, folder: Path, max_rank: int) -> dict[str, Tensor]:
    """ΔW as vLLM reads a folder, in the order of its loader."""
    helper = vllm.helper.from_local_dir(str(folder), None)
    helper.validate_legal(SimpleNamespace(max_lora_rank=max_rank))
    pairs: dict[str, dict[bool, Tensor]] = {}
    for key, tensor in load_file(folder / TENSORS).items():
        name, is_a = vllm.name(key)
        pairs.setdefault(name, {})[is_a] = tensor.double()
    found = {}
    for name, pair in pairs.items():
        rank, scaling = helper.get_rank_and_scaling(name)
        assert len(pair[True]) == rank
        found[name] = scaling * pair[False] @ pair[True]
    return found


def test_vllm_reads_what_was_trained(
    vllm: SimpleNamespace, trained: Case, portable: Path, changes: dict[str, Tensor], tmp_path: Path
) -> None:
    agree(by_vllm(vllm, portable, 16), changes)
    hs.export(portable.parent / "saved", tmp_path, "compact")
    agree(by_vllm(vllm, tmp_path, 16), changes)


def test_vllm_refuses_what_we_mend(vllm: SimpleNamespace, tmp_path: Path) -> None:
    """Its parser is no rubber stamp: PEFT's own PiSSA is refused, and the export of it is not."""
    base = case().model()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(str(tmp_path / "a"))
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        by_vllm(vllm, tmp_path / "a", 16)
    hs.export(tmp_path / "a", tmp_path / "b", base=base)
    by_vllm(vllm, tmp_path / "b", 16)


def test_vllm_has_the_ranks_that_we_pad_to() -> None:
    from headstart.files.portable.everywhere import RANKS

    text = source("vllm", "vllm/config/lora.py").read_text(encoding="utf-8")
    listed = re.search(r"MaxLoRARanks = Literal\[([\d, ]+)\]", text)
    assert listed
    assert set(RANKS) | {1} == {int(rank) for rank in listed[1].split(",")}


# ------------------------------------------------------------------ SGLang


def test_sglang_reads_what_was_trained(portable: Path, changes: dict[str, Tensor]) -> None:
    parsed = executed(source("sglang", "sglang/srt/lora/lora_config.py"))["LoRAConfig"](str(portable))
    loader = source("sglang", "sglang/srt/lora/lora.py").read_text(encoding="utf-8")
    assert "self.scaling: float = self.config.lora_alpha / self.config.r\n" in loader
    utils = source("sglang", "sglang/srt/lora/utils.py")
    from collections.abc import Iterable
    from typing import Union

    targets = functions(utils, "get_normalized_target_modules", Union=Union, Iterable=Iterable)
    assert targets["get_normalized_target_modules"](parsed.target_modules) == {"qkv_proj", "down_proj"}
    assert isinstance(parsed.target_modules, list)
    assert not parsed.use_dora
    tensors = load_file(portable / TENSORS)
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")]
    scaling = parsed.lora_alpha / parsed.r
    found = {
        n: scaling * tensors[f"{n}.lora_B.weight"].double() @ tensors[f"{n}.lora_A.weight"].double() for n in names
    }
    agree({name.removeprefix("base_model.model."): change for name, change in found.items()}, changes)
    assert {len(tensors[f"{n}.lora_A.weight"]) for n in names} == {parsed.r}


# ------------------------------------------------------------------ llama.cpp


def by_llama_cpp(path: Path) -> tuple[Any, dict[str, tuple[Tensor, Tensor, float]]]:
    """The file as the runtime reads it: A, B and the scale α/r of every weight, by its name in the base's GGUF."""
    gguf = pytest.importorskip("gguf", reason="the extra headstart[gguf]")
    reader = gguf.GGUFReader(path)
    alpha = float(reader.get_field("adapter.lora.alpha").contents())
    tensors = {
        t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type).reshape(tuple(reversed(t.shape.tolist()))))
        for t in reader.tensors
    }
    names = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    assert {f"{name}.lora_{x}" for name in names for x in "ab"} == set(tensors)
    pairs = {n: (tensors[f"{n}.lora_a"].double(), tensors[f"{n}.lora_b"].double()) for n in names}
    return reader, {n: (a, b, alpha / b.shape[-1]) for n, (a, b) in pairs.items()}


def test_llama_cpp_finds_the_keys_that_it_asks_for(trained: Case, portable: Path, tmp_path: Path) -> None:
    hs.export(portable.parent / "saved", tmp_path / "x.gguf", "gguf", base=trained.model())
    reader, _ = by_llama_cpp(tmp_path / "x.gguf")
    said = {key: reader.get_field(key).contents() for key in ("general.type", "general.architecture", "adapter.type")}
    assert said == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    origin = json.loads(reader.get_field("headstart.origin").contents())
    assert origin["export"]["profile"] == "gguf"
    hs.export(portable.parent / "saved", tmp_path / "y.gguf", "gguf", base=trained.model())
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()


# transformers' reader undoes what llama.cpp's converter does: an oracle of names and rows for whole models.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_llama_cpp_changes_the_weights_that_were_trained(family: str, dtype: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    wide = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    shape = gpt2 if family == "gpt2" else wide
    config = AutoConfig.for_model(family, vocab_size=53, tie_word_embeddings=False, **shape)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    model = copy.deepcopy(base)
    fields = {"target_modules": ["c_attn", "c_proj", "c_fc"]} if family == "gpt2" else {}
    hs.adapt(model, hs.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **fields))
    hs.save(model, tmp_path / "a")
    hs.export(tmp_path / "a", tmp_path / "x.gguf", "gguf", base=base, dtype=dtype)
    hs.merge(model)

    processor = TENSOR_PROCESSORS.get(family, TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(base, processor, family)
    after, before = model.state_dict(), base.state_dict()
    _, found = by_llama_cpp(tmp_path / "x.gguf")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {names[name] for name in found} == changed
    for name, (a, b, scale) in found.items():
        change = processor.process((scale * b @ a).numpy(), name=name, tensor_key_mapping={}, parsed_parameters={})
        wanted = (after[names[name]] - before[names[name]]).double()
        apart = torch.from_numpy(np.array(change.weights)) - wanted
        assert float(apart.norm() / wanted.norm()) <= (1e-5 if dtype == "float32" else 6e-3), name


def test_the_rows_are_those_of_a_real_gguf(smollm2: Any, tmp_path: Path) -> None:
    """B = W·Q, A = Qᵀ: in the base's own GGUF, written by llama.cpp, the same product of its own rows must stand."""
    gguf = pytest.importorskip("gguf")
    from headstart.tune import models

    found = models.find("smollm2")
    assert found.gguf
    stored = {t.name: t for t in gguf.GGUFReader(Path(found.place) / found.gguf).tensors}
    model = smollm2()
    adapter = hs.adapt(
        model,
        hs.LoraConfig(
            r=8,
            lora_alpha=8,
            init_lora_weights=True,
            layers_to_transform=[0, 29],
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ),
    )
    generator = torch.Generator().manual_seed(0)
    basis = {n: torch.linalg.qr(torch.randn(n, 8, generator=generator)).Q for n in (576, 1536)}
    for layer in adapter.layers().values():
        A, B = layer.factors
        W = layer.base_layer.weight.detach()
        with torch.no_grad():
            A.copy_(basis[W.shape[1]].T)
            B.copy_(W @ basis[W.shape[1]])
    hs.save(model, tmp_path / "a")
    hs.export(tmp_path / "a", tmp_path / "x.gguf", "gguf", base=models.skeleton(found, "float32"))
    _, pairs = by_llama_cpp(tmp_path / "x.gguf")
    assert len(pairs) == 14
    for name, (a, b, scale) in pairs.items():
        own = torch.tensor(gguf.dequantize(stored[name].data, stored[name].tensor_type)).double()
        Q = basis[own.shape[1]].double()
        assert torch.allclose(scale * b, own @ Q, atol=1e-5), name
        assert torch.allclose(a, Q.T)


def test_a_lookup_is_turned_for_llama_cpp(tmp_path: Path) -> None:
    chosen = case("gaussian", target_modules=["embed_tokens", "lm_head"], rank_pattern={}, alpha_pattern={})
    hs.save(chosen.trained, tmp_path / "a")
    hs.export(tmp_path / "a", tmp_path / "x.gguf", "gguf", base=chosen.model())
    _, pairs = by_llama_cpp(tmp_path / "x.gguf")
    wanted = merged(chosen)
    a, b, scale = pairs["token_embd.weight"]  # rows of a are looked up, then multiplied with b
    assert float((scale * a @ b.T - wanted["model.embed_tokens"]).norm() / wanted["model.embed_tokens"].norm()) <= 1e-6
    a, b, scale = pairs["output.weight"]
    assert float((scale * b @ a - wanted["lm_head"]).norm() / wanted["lm_head"].norm()) <= 1e-6


# ------------------------------------------------------------------ mlx


MLX = [
    case(),
    case("kaiming", layers_to_transform=[1], layers_pattern="layers"),
    case("kaiming", use_dora=True),
    case(
        "gaussian", target_modules=["embed_tokens", "lm_head", "o_proj"], rank_pattern={"o_proj": 2}, alpha_pattern={}
    ),
]


class Wrapped:
    """What mlx puts round a layer: its factors' shapes, as `from_base` makes them."""

    kind = "lora"

    def __init__(self, layer: nn.Linear | nn.Embedding, r: int, scale: float) -> None:
        m, n = layer.weight.shape
        ends = (m, n) if isinstance(layer, nn.Embedding) else (n, m)
        self.scale, self.lookup = scale, isinstance(layer, nn.Embedding)
        self.shapes = {"lora_a": (ends[0], r), "lora_b": (r, ends[1])}
        self.shapes |= {"m": (m,)} if self.kind == "dora" else {}

    @classmethod
    def from_base(cls, layer: Any, r: int, dropout: float, scale: float) -> Wrapped:
        return cls(layer, r, scale)


class WrappedDora(Wrapped):
    kind = "dora"


class Blocks:
    """A torch model with the few methods of an mlx model that its loader calls."""

    def __init__(self, base: nn.Module, prefix: str = "", root: Blocks | None = None) -> None:
        self.base, self.prefix, self.wrapped = base, prefix, root.wrapped if root else {}
        if root is None:
            self.layers = [Blocks(base, f"model.layers.{i}.", self) for i in range(3)]

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        found = [(n.removeprefix(self.prefix), m) for n, m in self.base.named_modules() if n.startswith(self.prefix)]
        return [(name, module) for name, module in found if name]

    def update_modules(self, tree: dict[str, Wrapped]) -> None:
        self.wrapped |= {self.prefix + name: layer for name, layer in tree.items()}

    def parameters(self) -> dict[str, SimpleNamespace]:
        shapes = [(n, leaf, s) for n, layer in self.wrapped.items() for leaf, s in layer.shapes.items()]
        return {f"{name}.{leaf}": SimpleNamespace(shape=shape) for name, leaf, shape in shapes}

    def load_weights(self, weights: list[tuple[str, Tensor]], strict: bool) -> None:
        self.loaded = dict(weights)


@pytest.fixture(scope="module")
def mlx_lm() -> Any:
    """mlx-lm's own loader, on stubs of mlx that know shapes alone."""
    tuner = source("mlx-lm", "mlx_lm/tuner/utils.py")
    nothing = type("Nothing", (), {})
    kinds = {"Linear": nn.Linear, "Embedding": nn.Embedding, "Module": nn.Module}
    with stubbed(
        mlx={}, mlx__core={"load": load_file},
        mlx__nn={**kinds, "QuantizedLinear": nothing, "QuantizedEmbedding": nothing}, mlx__optimizers={},
        mlx__utils={"tree_flatten": lambda tree: list(tree.items()), "tree_unflatten": dict},
        mlx_lm={}, mlx_lm__cli_ui={"rprint": print}, mlx_lm__models={}, mlx_lm__tuner={},
        mlx_lm__models__switch_layers={"QuantizedSwitchLinear": nothing, "SwitchLinear": nothing},
        mlx_lm__utils={"get_total_parameters": len},
        mlx_lm__tuner__dora={"DoRAEmbedding": WrappedDora, "DoRALinear": WrappedDora},
        mlx_lm__tuner__lora={"LoRAEmbedding": Wrapped, "LoRALinear": Wrapped, "LoRASwitchLinear": Wrapped},
    ):  # fmt: skip
        return executed(tuner, "mlx_lm.tuner")["load_adapters"]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("index", range(len(MLX)))
def test_mlx_finds_every_layer_and_shape(index: int, given: bool, mlx_lm: Any, tmp_path: Path) -> None:
    if index == 3 and not given:
        pytest.skip("lookups ask for the base")
    chosen = MLX[index]
    hs.save(chosen.trained, tmp_path / "a")
    hs.export(tmp_path / "a", tmp_path / "b", "mlx", base=chosen.model() if given else None)
    model = Blocks(chosen.model())
    mlx_lm(model, str(tmp_path / "b"))  # raises for a name or a shape that does not fit
    found = {}
    for name, layer in model.wrapped.items():
        if f"{name}.lora_a" in model.loaded:
            product = layer.scale * model.loaded[f"{name}.lora_a"].double() @ model.loaded[f"{name}.lora_b"].double()
            found[name] = product if layer.lookup else product.T
    assert len(model.loaded) == len(found) * (3 if MLX[index].config.use_dora else 2)
    if not chosen.config.use_dora:
        agree(found, merged(chosen))


@pytest.mark.parametrize("index", range(len(MLX)))
@pytest.mark.parametrize("given", [True, False])
def test_mlx_computes_the_same(index: int, given: bool, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    tuner = pytest.importorskip("mlx_lm.tuner.utils", reason="mlx-lm is not installed")
    from mlx_lm.models.llama import Model, ModelArgs

    chosen, base = MLX[index], MLX[index].model()
    hs.save(chosen.trained, tmp_path / "a")
    if index == 3 and not given:
        pytest.skip("lookups ask for the base")
    hs.export(tmp_path / "a", tmp_path / "b", "mlx", base=base if given else None)
    config: Any = base.config
    model = Model(
        ModelArgs(
            model_type="llama", hidden_size=32, num_hidden_layers=3, intermediate_size=48, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=config.rms_norm_eps, vocab_size=53, tie_word_embeddings=False,
        )
    )  # fmt: skip
    model.load_weights([(name, mx.array(value.numpy())) for name, value in base.state_dict().items()])
    tuner.load_adapters(model, str(tmp_path / "b"))
    model.eval()
    found = torch.tensor(np.array(model(mx.array(ids().numpy()))))
    wanted = chosen.outputs(chosen.trained)[0]
    assert float((found - wanted).norm() / wanted.norm()) <= 5e-6


# ------------------------------------------------------------------ diffusion front ends


class Unet(nn.Module):
    """Some layers of a UNet, under diffusers' names."""

    def __init__(self) -> None:
        super().__init__()
        attention = nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_out": nn.ModuleList([nn.Linear(8, 8)])})
        block = nn.ModuleDict({"transformer_blocks": nn.ModuleList([nn.ModuleDict({"attn1": attention})])})
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"attentions": nn.ModuleList([block])})])
        self.mid_block = nn.ModuleDict({"resnets": nn.ModuleList([nn.ModuleDict({"conv1": nn.Conv2d(8, 8, 3)})])})


# A layer, and what diffusers calls its factors after reading kohya's names.
_ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LAYERS = {
    f"{_ATTENTION}.to_q": f"unet.{_ATTENTION}.processor.to_q_lora",
    f"{_ATTENTION}.to_out.0": f"unet.{_ATTENTION}.processor.to_out_lora",
    "mid_block.resnets.0.conv1": "unet.mid_block.resnets.0.conv1.lora",
}


def test_diffusers_reads_kohyas_names_and_scales(tmp_path: Path) -> None:
    converter = source("diffusers", "diffusers/loaders/lora_conversion_utils.py")
    utils = {
        "logging": SimpleNamespace(get_logger=logging.getLogger),
        "is_peft_version": lambda *_: True,
        "state_dict_all_zero": lambda *_: False,
    }
    with stubbed(diffusers={}, diffusers__utils=utils, diffusers__loaders={}):
        convert = executed(converter, "diffusers.loaders")["_convert_non_diffusers_lora_to_diffusers"]
    base = Unet()
    model = copy.deepcopy(base)
    names = ["to_q", "to_out.0", "conv1"]
    config = hs.LoraConfig(r=4, lora_alpha=6, target_modules=names, rank_pattern={"to_q": 2}, init_lora_weights=False)
    hs.adapt(model, config)
    hs.save(model, tmp_path / "a")
    hs.export(tmp_path / "a", tmp_path / "x.safetensors", "kohya")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata()["ss_network_module"] == "networks.lora"
        assert file.metadata()["ss_network_dim"] == "Dynamic"
    hs.merge(model)
    found, alphas = convert(load_file(tmp_path / "x.safetensors"))
    assert set(found) == {f"{name}.{way}.weight" for name in LAYERS.values() for way in ("down", "up")}
    for layer, name in LAYERS.items():
        down, up = (found[f"{name}.{way}.weight"].flatten(1) for way in ("down", "up"))
        alpha = next(value for key, value in alphas.items() if key.startswith(name.removesuffix(".lora")))
        wanted = model.get_submodule(layer).weight - base.get_submodule(layer).weight
        assert torch.allclose((alpha / len(down) * up @ down).reshape(wanted.shape), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "given", "wanted"),
    [
        (
            ["text_model.encoder.layers.0.self_attn.q_proj"],
            None,
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        ),
        (["text_model.encoder.layers.0.mlp.fc1"], "lora_te2", "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        (["transformer_blocks.3.attn.to_k"], None, "lora_unet_transformer_blocks_3_attn_to_k"),
    ],
)
def test_kohyas_names(names: list[str], given: str | None, wanted: str, tmp_path: Path) -> None:
    from test_portable import write_pair

    write_pair(tmp_path / "a", torch.randn(4, 9), torch.randn(7, 4), name=names[0])
    hs.export(tmp_path / "a", tmp_path / "x.safetensors", "kohya", prefix=given)
    keys = set(load_file(tmp_path / "x.safetensors"))
    assert keys == {f"{wanted}.{end}" for end in ("alpha", "lora_down.weight", "lora_up.weight")}
