"""Several adapters into one: dense float64 sums, PEFT's own, and every layer kind through its forward."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import headstart as hs
from headstart.errors import BadOption, FileError, HeadstartError, KeyMismatch, UnsupportedLayer, WrongBase
from headstart.linalg.blend import agreed, blend, trimmed
from headstart.testing.cases import Case
from headstart.testing.kinds import KINDS

WIDE, TALL = 24, 16


class Net(nn.Module):
    """Three layers of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDE, TALL), nn.Linear(TALL, WIDE)
        self.words = nn.Embedding(11, WIDE)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(self.first(self.words(ids)))  # type: ignore[no-any-return]


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def adapter(net: nn.Module, folder: Path, seed: int, **fields: Any) -> Path:
    torch.manual_seed(seed)
    model = copy.deepcopy(net)
    hs.adapt(model, hs.LoraConfig(**{"r": 4, "target_modules": ["first", "second", "words"], **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    hs.save(model, folder)
    return folder


@pytest.fixture
def pair(net: nn.Module, tmp_path: Path) -> list[Path]:
    """Two adapters of different ranks, scales and targets."""
    one = adapter(net, tmp_path / "one", 1, lora_alpha=2)
    two = adapter(net, tmp_path / "two", 2, r=3, use_rslora=True, target_modules=["first", "words"])
    return [one, two]


def deltas(folder: Path) -> dict[str, Tensor]:
    """ΔW of every layer, dense in float64, from the files alone (ranks by the tensors, scales by the config)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {
        k.removeprefix("base_model.model."): v.double()
        for k, v in load_file(next(folder.glob("*.safetensors"))).items()
    }
    found = {}
    for name in ("first", "second", "words"):
        ends = ("lora_embedding_A", "lora_embedding_B") if name == "words" else ("lora_A.weight", "lora_B.weight")
        if f"{name}.{ends[0]}" in tensors:
            A, B = (tensors[f"{name}.{end}"] for end in ends)
            patterns = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
            rank = next((v for k, v in patterns[0].items() if k in (name, f"^{name}")), config["r"])
            alpha = next((v for k, v in patterns[1].items() if k in (name, f"^{name}")), config["lora_alpha"])
            assert len(A) == rank
            found[name] = alpha / rank * (B @ A)
    return found


def total(folders: list[Path], weights: list[float]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, delta in deltas(folder).items():
            found[name] = found.get(name, 0) + weight * delta
    return found


@pytest.mark.parametrize("method", ["linear", "cat"])
@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, -2.0]])
def test_the_sum_is_exact(method: str, weights: list[float], pair: list[Path], tmp_path: Path) -> None:
    report = hs.combine(pair, tmp_path / "out", weights=weights, method=method)
    wanted, found = total(pair, weights), deltas(tmp_path / "out")
    assert found.keys() == wanted.keys() == {"first", "second", "words"}
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-7)
    assert report.ranks == {"first": 7, "second": 4, "words": 7}
    assert report.worst == 0


@pytest.mark.parametrize("rank", [1, 5, 9])
def test_svd_is_the_best_of_its_rank(rank: int, pair: list[Path], tmp_path: Path) -> None:
    report = hs.combine(pair, tmp_path / "out", weights=[0.7, 0.3], method="svd", rank=rank)
    found = deltas(tmp_path / "out")
    for name, whole in total(pair, [0.7, 0.3]).items():
        U, S, Vh = torch.linalg.svd(whole)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(found[name], best, rtol=1e-5, atol=1e-6)
        assert report.dropped[name] == pytest.approx(float((S[rank:] ** 2).sum() / (S**2).sum()), abs=1e-6)


@pytest.mark.parametrize("kind", [name for name in KINDS if not name.endswith("dora")])
@pytest.mark.parametrize("method", ["linear", "svd"])
def test_an_adapter_and_itself_are_that_adapter_on_every_kind_of_layer(kind: str, method: str, tmp_path: Path) -> None:
    case = Case("pissa", KINDS[kind])
    adapted = copy.deepcopy(case.trained)
    hs.save(adapted, tmp_path / "one")
    rank = {"rank": 24} if method == "svd" else {}
    hs.combine([tmp_path / "one"] * 2, tmp_path / "out", weights=[0.4, 0.6], method=method, **rank)  # type: ignore[arg-type]
    again = case.model()
    hs.load(again, tmp_path / "out")
    inputs, keywords = KINDS[kind].inputs(), KINDS[kind].keywords()
    with torch.no_grad():
        wanted, found = (_flat(model.eval()(*inputs, **keywords)) for model in (adapted, again))
    torch.testing.assert_close(found, wanted, rtol=1e-3 if method == "svd" else 1e-4, atol=1e-4)


def _flat(output: Any) -> Tensor:
    outputs = output if isinstance(output, tuple) else (output,)
    return torch.cat([y.flatten() for y in outputs if isinstance(y, Tensor)])


# ------------------------------------------------------------------ beside PEFT


@pytest.fixture
def theirs(net: nn.Module, pair: list[Path]) -> Any:
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(pair[0]), adapter_name="one")
    model.load_adapter(str(pair[1]), adapter_name="two")
    return model


def _deltas_of(model: Any, name: str) -> dict[str, Tensor]:
    layers = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in ("first", "second", "words")}
    held = {n: m for n, m in layers.items() if name in m.scaling}
    return {n.rpartition(".")[2]: m.get_delta_weight(name).detach().double() for n, m in held.items()}


@pytest.mark.parametrize(("method", "rank"), [("cat", None), ("svd", 3)])
def test_peft_combines_to_the_same(
    method: str, rank: int | None, theirs: Any, pair: list[Path], tmp_path: Path
) -> None:
    theirs.add_weighted_adapter(["one", "two"], [0.7, 0.3], "both", combination_type=method, svd_rank=rank)
    hs.combine(pair, tmp_path / "out", weights=[0.7, 0.3], method=method, rank=rank)
    found = deltas(tmp_path / "out")
    for name, wanted in _deltas_of(theirs, "both").items():
        torch.testing.assert_close(found[name].T if name == "words" else found[name], wanted, rtol=1e-4, atol=1e-5)


def test_peft_loads_what_was_combined(net: nn.Module, pair: list[Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    hs.combine(pair, tmp_path / "out", weights=[0.7, 0.3])
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "out"), adapter_name="both")
    wanted = total(pair, [0.7, 0.3])
    for name, found in _deltas_of(loaded, "both").items():
        torch.testing.assert_close(found.T if name == "words" else found, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_pefts_on_the_deltas(density: float) -> None:
    merge = pytest.importorskip("peft.utils.merge_utils")
    tensors = [torch.randn(40, 30, dtype=torch.float64) for _ in range(3)]
    for share in (1.0, 0.25):
        theirs = merge.ties(tensors, torch.full((3,), share, dtype=torch.float64), density)
        torch.testing.assert_close(blend(tensors, [share] * 3, "ties", density=density), theirs)


def test_pefts_own_ties_svd(theirs: Any, pair: list[Path], tmp_path: Path) -> None:
    theirs.add_weighted_adapter(
        ["one", "two"], [1.0, 1.0], "both", combination_type="ties_svd", svd_rank=6, density=0.5
    )
    hs.combine(pair, tmp_path / "out", method="ties", rank=6, density=0.5)
    found, wanted = deltas(tmp_path / "out"), _deltas_of(theirs, "both")
    torch.testing.assert_close(found["first"], wanted["first"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["words"].T, wanted["words"], rtol=1e-3, atol=1e-4)


def test_pefts_ties_works_on_the_factors_and_means_something_else(theirs: Any, tmp_path: Path, net: nn.Module) -> None:
    """Signs and sizes of A's and B's elements are not those of the change: the two do not even correlate well."""
    three = adapter(net, tmp_path / "three", 3, lora_alpha=2)
    theirs.load_adapter(str(three), adapter_name="three")
    theirs.add_weighted_adapter(["one", "three"], [1.0, 1.0], "both", combination_type="ties", density=0.5)
    found = _deltas_of(theirs, "both")["first"]
    parts = [_deltas_of(theirs, name)["first"] for name in ("one", "three")]
    ours = blend(parts, [1.0, 1.0], "ties", density=0.5)
    assert (found - ours).norm() > 0.5 * ours.norm()


# ------------------------------------------------------------------ what the methods are


def test_a_negative_weight_votes_for_the_opposite() -> None:
    one = torch.tensor([[2.0, 1.0]])
    assert torch.equal(blend([one, one], [1.0, -3.0], "ties", density=1.0), torch.tensor([[-6.0, -3.0]]))


def test_trimming_keeps_the_largest() -> None:
    delta = torch.tensor([[0.1, -5.0, 0.0], [3.0, -0.2, 4.0]])
    assert torch.equal(trimmed(delta, 0.5), torch.tensor([[0.0, -5.0, 0.0], [3.0, 0.0, 4.0]]))


def test_the_mean_is_over_those_that_agree() -> None:
    columns = [torch.tensor([1.0, 4.0, 0.0, -1.0]), torch.tensor([3.0, -1.0, 0.0, -3.0])]
    assert torch.equal(agreed(columns), torch.tensor([2.0, 4.0, 0.0, -2.0]))


def test_dare_drops_a_share_and_keeps_the_expectation() -> None:
    delta = torch.full((300, 200), 2.0)
    found = blend([delta], [0.5], "dare_linear", density=0.3, seed=1, name="layer")
    assert found.unique().tolist() == [0.0, pytest.approx(1 / 0.3)]
    assert float((found != 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.03)
    again = blend([delta], [0.5], "dare_linear", density=0.3, seed=1, name="layer")
    other = blend([delta], [0.5], "dare_linear", density=0.3, seed=2, name="layer")
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    kept = [blend([delta, delta], w, "dare_linear", density=0.3, name="layer") != 0 for w in ([1, 0], [0, 1])]
    assert not torch.equal(*kept)  # each adapter draws its own


def test_a_merge_of_several_is_the_merge_of_their_combination(net: nn.Module, pair: list[Path], tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file({k: v.clone() for k, v in net.state_dict().items()}, tmp_path / "base" / "model.safetensors")
    before = {k: v.double() for k, v in net.state_dict().items()}
    sums = total(pair, [0.7, 0.3])
    blends = {
        name: [deltas(folder)[name] for folder in pair if name in deltas(folder)]
        for name in ("first", "second", "words")
    }
    for method, given in {"linear": {}, "svd": {"rank": 2}, "ties": {"density": 0.4}}.items():
        hs.merge_checkpoint(tmp_path / "base", pair, tmp_path / method, weights=[0.7, 0.3], method=method, **given)  # type: ignore[arg-type]
        merged = load_file(tmp_path / method / "model.safetensors")
        for name, whole in sums.items():
            if method == "svd":
                U, S, Vh = torch.linalg.svd(whole)
                whole = (U[:, :2] * S[:2]) @ Vh[:2]
            if method == "ties":
                whole = blend(blends[name], [0.7, 0.3][: len(blends[name])], "ties", density=0.4)
            found = merged[f"{name}.weight"].double() - before[f"{name}.weight"]
            torch.testing.assert_close(found, whole.T if name == "words" else whole, rtol=1e-4, atol=1e-6)


def test_experts_apart_in_the_file_are_blended_by_their_tensors(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    base = transformers.MixtralForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    folders, changes = [], []
    for seed in (1, 2):
        fields = {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
        folders.append(adapter(base, tmp_path / f"{seed}", seed, **fields))
        model = copy.deepcopy(base)
        before = model.model.layers[0].mlp.experts.gate_up_proj.detach().double().clone()
        hs.load(model, folders[-1])
        hs.merge(model)
        changes.append(model.model.layers[0].mlp.experts.gate_up_proj.detach().double() - before)
    hs.merge_checkpoint(tmp_path / "base", folders, tmp_path / "out", method="ties", density=0.5)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    for expert in range(3):
        for part, rows in {"w1": slice(0, 12), "w3": slice(12, 24)}.items():
            key = f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"
            wanted = blend([change[expert, rows] for change in changes], [1.0, 1.0], "ties", density=0.5)
            torch.testing.assert_close(new[key].double() - old[key].double(), wanted, rtol=1e-3, atol=1e-5)


@pytest.fixture
def mixture_of_experts() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("ranks", [{"q_proj": 2}, {"q_proj": 4, "experts.down_proj": 1}, {"q_proj": 12}])
@pytest.mark.parametrize("init", ["pissa", True])
def test_experts_of_another_rank_than_the_rest_are_combined(
    init: str | bool, ranks: dict[str, int], mixture_of_experts: Any, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    base, ids = mixture_of_experts, torch.arange(16).reshape(2, 8)
    fields = {
        "r": 3, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "init_lora_weights": init,
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"k_proj": 6, "v_proj": 6, "o_proj": 6, **ranks},
        "alpha_pattern": {"experts.down_proj": 5},
    }  # fmt: skip
    adapter(base, tmp_path / "one", 1, **fields)
    hs.combine([tmp_path / "one"] * 2, tmp_path / "out", weights=[0.25, 0.75])
    alone, ours = copy.deepcopy(base), copy.deepcopy(base)
    hs.load(alone, tmp_path / "one")
    hs.load(ours, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out")).eval()
    wanted = alone(ids).logits
    assert (wanted - base(ids).logits).abs().max() > 0.01
    for model in (ours, theirs):
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_other_parameters_of_one_module_are_combined_on_the_base(mixture_of_experts: Any, tmp_path: Path) -> None:
    both = ["experts.gate_up_proj", "experts.down_proj"]
    folders = [
        adapter(mixture_of_experts, tmp_path / str(i), i, target_modules=["q_proj"], target_parameters=names)
        for i, names in enumerate([both, both[:1]])
    ]
    with pytest.raises(UnsupportedLayer, match="other parameters of 'model"):
        hs.combine(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"target_modules": ["q_proj", "norm"], "exclude_modules": r".*norm"},
    ],
    ids=str,
)
def test_whatever_peft_saves_is_combined_to_what_peft_computes(fields: dict[str, Any], tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    base, ids = transformers.LlamaForCausalLM(config).eval(), torch.arange(16).reshape(2, 8)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, **copy.deepcopy(fields))).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path / "one")
    hs.combine([tmp_path / "one"], tmp_path / "out")
    wanted = theirs(ids).logits
    for folder in ("one", "out"):
        ours = copy.deepcopy(base)
        hs.load(ours, tmp_path / folder)
        torch.testing.assert_close(ours(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out")).eval()
    torch.testing.assert_close(again(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_copies_of_different_embeddings_are_refused(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = transformers.LlamaForCausalLM(config)
        fields = peft.LoraConfig(r=4, target_modules=["embed_tokens"])
        peft.get_peft_model(base, fields).save_pretrained(tmp_path / str(seed))
    with pytest.raises(WrongBase, match="embed_tokens"):
        hs.combine([tmp_path / "1", tmp_path / "2"], tmp_path / "out")


def test_dora_and_modules_in_full_are_weighed_on_the_base(net: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file({k: v.clone() for k, v in net.state_dict().items()}, tmp_path / "base" / "model.safetensors")
    one = adapter(net, tmp_path / "one", 1, use_dora=True, target_modules=["first"], modules_to_save=["second"])
    two = adapter(net, tmp_path / "two", 2, target_modules=["first"], modules_to_save=["second"])
    hs.merge_checkpoint(tmp_path / "base", [one, two], tmp_path / "both", weights=[0.5, 0.25])
    alone = []
    for folder in (one, two):
        hs.merge_checkpoint(tmp_path / "base", folder, tmp_path / f"only {folder.name}")
        alone.append(load_file(tmp_path / f"only {folder.name}" / "model.safetensors"))
    before, both = net.state_dict(), load_file(tmp_path / "both" / "model.safetensors")
    for name in ("first.weight", "second.weight", "second.bias"):
        old = before[name].double()
        wanted = old + 0.5 * (alone[0][name].double() - old) + 0.25 * (alone[1][name].double() - old)
        torch.testing.assert_close(both[name].double(), wanted, rtol=1e-5, atol=1e-6)
        assert not torch.equal(both[name], before[name])


# ------------------------------------------------------------------ what cannot be


def test_what_does_not_go_together_is_named(net: nn.Module, pair: list[Path], tmp_path: Path) -> None:
    other = Net()
    nn.init.normal_(other.first.weight)
    saved = adapter(net, tmp_path / "saved", 3, modules_to_save=["second"], target_modules=["first"])
    refused: list[tuple[list[Path], dict[str, Any], type[HeadstartError], str]] = [
        ([pair[0], adapter(net, tmp_path / "dora", 3, use_dora=True)], {}, UnsupportedLayer, "headstart merge"),
        ([saved, saved], {}, KeyMismatch, "in full"),
        ([pair[0], saved], {"weights": [1, 0.5]}, KeyMismatch, "in full"),
        ([pair[0], adapter(other, tmp_path / "other", 3)], {}, WrongBase, "another base"),
        (pair, {"weights": [1.0]}, BadOption, "one finite number"),
        (pair, {"method": "average"}, BadOption, "choose linear"),
        (pair, {"method": "svd"}, BadOption, "give --rank"),
        (pair, {"rank": 3}, BadOption, "goes with method svd"),
        ([], {}, BadOption, "at least one"),
    ]
    for adapters, given, error, said in refused:
        with pytest.raises(error, match=said):
            hs.combine(adapters, tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()
    hs.combine([pair[0], saved], tmp_path / "out")
    with pytest.raises(FileError, match="exists"):
        hs.combine(pair, tmp_path / "out")
    hs.combine(pair, tmp_path / "out", force=True)


@pytest.mark.parametrize("place", [".", "one"])
def test_an_output_that_would_replace_an_input_is_refused(place: str, net: nn.Module, tmp_path: Path) -> None:
    around = adapter(net, tmp_path / "run", 1)  # An adapter with its checkpoints in folders of its own.
    inputs = [adapter(net, around / name, seed) for seed, name in enumerate(("one", "two"))]
    before = {file: file.read_bytes() for file in around.rglob("*") if file.is_file()}
    with pytest.raises(FileError, match="not apart"):
        hs.combine(inputs, around / place, force=True)
    assert {file: file.read_bytes() for file in around.rglob("*") if file.is_file()} == before


def test_an_output_beside_what_is_read_is_written(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [adapter(net, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    hs.combine(inputs, inputs[0] / "inside")
    assert {file: file.read_bytes() for file in before} == before
    module = importlib.import_module("headstart.files.merging.combine")
    hub = {"owner/one": inputs[0], "owner/two": inputs[1]}
    read = module.read_adapter
    monkeypatch.setattr(module, "read_adapter", lambda name: read(hub[name]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    hs.combine(list(hub), "owner", force=True)  # Names on the hub are no paths.
    assert total([tmp_path / "owner"], [1.0])["first"].norm() > 0


def test_adapters_of_other_shapes_are_refused(pair: list[Path], tmp_path: Path) -> None:
    class Wider(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDE, TALL + 1)

    model = Wider()
    other = adapter(model, tmp_path / "wider", 3, target_modules=["first"])
    with pytest.raises(HeadstartError, match=r"different sizes|another base"):
        hs.combine([pair[0], other], tmp_path / "out")
