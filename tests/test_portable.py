"""Files that travel: what an adapter means is what it meant, whatever it was and wherever it goes."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import headstart as hs
from headstart.errors import (
    AdapterFormatError,
    BadOption,
    BadRank,
    FileError,
    HeadstartError,
    KeyMismatch,
    NotPortable,
    WrongBase,
)
from headstart.files.adapter import CONFIG, METADATA, TENSORS
from headstart.files.header import read_header
from headstart.files.portable.change import Change, error_of, shortest, stored, trimmed
from headstart.inits import get
from headstart.testing import KINDS, Case, Kind
from oracles import orthogonal_matrix

pytestmark = pytest.mark.filterwarnings("ignore")
ENGINE_RANKS = {8, 16, 32, 64, 128, 256, 320, 512}


def ids() -> Tensor:
    return torch.arange(24).reshape(2, 12) * 7 % 50 + 3


def llama(tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2,
        )
    )  # fmt: skip


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=53, n_embd=16, n_layer=2, n_head=4, n_positions=16))


def kind(name: str, make: Callable[[], nn.Module] = llama, **fields: Any) -> Kind:
    keywords = {"input_ids": ids(), "return_dict": False, "use_cache": False}
    return Kind(f"portable_{name}", make, tuple, lambda: keywords, {"task_type": "CAUSAL_LM", **fields})


PATTERNS = kind(
    "patterns",
    target_modules=["q_proj", "v_proj", "down_proj"],
    use_rslora=True,
    rank_pattern={"q_proj": 2, r"^model\.layers\.1\.mlp\.down_proj": 6},
    alpha_pattern={"v_proj": 3, "down_proj": 5},
)
PLAIN = kind("plain", target_modules="all-linear")
SHAPES = [
    PLAIN,
    PATTERNS,
    kind("one_layer", target_modules=["q_proj", "v_proj"], layers_to_transform=[1], layers_pattern="layers"),
    kind("expression", target_modules=r".*\.0\.(self_attn\.q_proj|mlp\.down_proj)"),
    kind("embeddings", target_modules=["embed_tokens", "lm_head", "o_proj"]),
    kind("gpt2", gpt2, target_modules=["c_attn", "c_proj"]),
    KINDS["conv2d"],
    KINDS["attention"],
]
DORA = kind("dora", target_modules=["q_proj", "down_proj"], use_dora=True)
STRATEGIES = [init for init in hs.strategies() if not get(init)[0].quantizes]


def saved(case: Case, folder: Path) -> Path:
    hs.save(case.trained, folder)
    return folder


def outputs(case: Case, model: nn.Module) -> Tensor:
    """In float64, so that what differs is what the files say."""
    keywords = {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in case.kind.keywords().items()
    }
    inputs = [x.double() if x.is_floating_point() else x for x in case.kind.inputs()]
    with torch.no_grad():
        found = copy.deepcopy(model).double()(*inputs, **keywords)
    found = [found] if torch.is_tensor(found) else found
    return torch.cat([y.flatten() for y in found if torch.is_tensor(y)])


def by_peft(case: Case, folder: Path) -> Tensor:
    model = peft.PeftModel.from_pretrained(case.model(), str(folder)).double()
    # In evaluation torch's attention computes past PEFT's layers. Nothing here has dropout.
    return outputs(case, model.train(case.kind.name == "attention"))


def off(case: Case, found: Tensor, wanted: Tensor) -> float:
    """The error as a share of what the adapter changes."""
    change = wanted - outputs(case, case.model())
    assert change.norm() > 1e-3 * wanted.norm()
    return float((found - wanted).norm() / change.norm())


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())  # type: ignore[no-any-return]


# ------------------------------------------------------------------ the function is the same


@pytest.mark.parametrize(
    ("init", "kind"),
    [*((init, PATTERNS) for init in STRATEGIES), *((init, k) for k in SHAPES for init in ("kaiming", "pissa"))],
    ids=lambda value: value.name if isinstance(value, Kind) else value,
)
def test_peft_computes_the_same_from_it(init: str, kind: Kind, tmp_path: Path) -> None:
    case = Case(init, kind)
    saved(case, tmp_path / "a")
    wanted = outputs(case, case.trained)
    for profile in ("portable", "compact"):
        report = hs.export(tmp_path / "a", tmp_path / profile, profile)
        assert report.worst <= 2**-23
        assert off(case, by_peft(case, tmp_path / profile), wanted) <= 1e-6


@pytest.mark.parametrize("scaling", [{"lora_alpha": 0.5}, {"lora_alpha": -3}, {"lora_alpha": 12, "use_rslora": True}])
def test_any_scale_is_folded_in(scaling: dict[str, Any], tmp_path: Path) -> None:
    case = Case("kaiming", PLAIN).but(**scaling)
    hs.export(saved(case, tmp_path / "a"), tmp_path / "b")
    assert off(case, by_peft(case, tmp_path / "b"), outputs(case, case.trained)) <= 1e-6


def test_compact_keeps_what_peft_keeps(tmp_path: Path) -> None:
    kept = kind("kept", target_modules=["q_proj"], modules_to_save=["norm"])
    for case in (Case("kaiming", DORA), Case("pissa", DORA), Case("kaiming", kept)):
        out = tmp_path / case.kind.name / case.init
        hs.export(saved(case, out / "a"), out / "b", "compact")
        assert off(case, by_peft(case, out / "b"), outputs(case, case.trained)) <= 1e-6


def test_compact_keeps_the_biases_of_adapted_layers_for_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = gpt2().eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["c_attn"], bias="all")
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path / "adapter")
    for given in (None, base):
        out = tmp_path / f"out {given is None}"
        hs.export(tmp_path / "adapter", out, "compact", base=given)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(out)).eval()
        torch.testing.assert_close(again(ids()).logits, theirs(ids()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("profile", ["portable", "compact"])
def test_layers_that_engines_run_otherwise_are_named(profile: str, tmp_path: Path) -> None:
    for name, said in {"conv2d_circular": True, "conv2d": False}.items():
        case = Case("kaiming", KINDS[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved(case, tmp_path / name)
        out = tmp_path / f"out {name}"
        report = hs.export(tmp_path / name, out, profile, base=case.model())
        assert any("something else for 'left', 'right'" in note for note in report.notes) is said
        assert (off(case, by_peft(case, out), outputs(case, case.trained)) > 0.1) is said


def test_what_was_exported_loads_here_too(tmp_path: Path) -> None:
    case = Case("pissa", PATTERNS)
    for profile in ("portable", "compact"):
        hs.export(saved(case, tmp_path / "a"), tmp_path / profile, profile)
        model = case.model()
        hs.load(model, tmp_path / profile)
        assert off(case, outputs(case, model), outputs(case, case.trained)) <= 1e-6


# ------------------------------------------------------------------ portable: one meaning


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_portable_leaves_engines_nothing_to_misread(init: str, tmp_path: Path) -> None:
    case = Case(init, PATTERNS)
    hs.export(saved(case, tmp_path / "a"), tmp_path / "b")
    config, tensors = config_of(tmp_path / "b"), load_file(tmp_path / "b" / TENSORS)
    assert config["r"] == config["lora_alpha"]
    assert isinstance(config["lora_alpha"], int)
    assert config["r"] in ENGINE_RANKS
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    assert config["init_lora_weights"] is True
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert {len(t) for name, t in tensors.items() if "lora_A" in name} == {config["r"]}
    assert {t.shape[1] for name, t in tensors.items() if "lora_B" in name} == {config["r"]}


@pytest.mark.parametrize(("rank", "wanted"), [(1, 8), (8, 8), (9, 16), (33, 64), (300, 320)])
def test_the_rank_is_the_next_that_engines_know(rank: int, wanted: int, tmp_path: Path) -> None:
    write_pair(tmp_path / "a", torch.randn(rank, 600), torch.randn(600, rank))
    assert hs.export(tmp_path / "a", tmp_path / "b").rank == wanted


def test_a_power_of_two_costs_nothing(tmp_path: Path) -> None:
    case = Case("kaiming", PLAIN).but(lora_alpha=16)
    report = hs.export(saved(case, tmp_path / "a"), tmp_path / "b")
    assert (report.error, report.worst, set(report.errors.values())) == (0, 0, {0})
    assert "exact" in str(report)


def test_with_the_base_layers_that_engines_expect_together_are_complete(tmp_path: Path) -> None:
    """SGLang stacks q, k and v; LoRAX drops a kind of layer that one block lacks."""
    one = kind("some", target_modules=r".*\.1\.(self_attn\.v_proj|mlp\.up_proj)")
    case = Case("kaiming", one)
    report = hs.export(saved(case, tmp_path / "a"), tmp_path / "b", base=case.model())
    tensors = load_file(tmp_path / "b" / TENSORS)
    for block in "01":
        for leaf in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            A, B = (tensors[f"base_model.model.model.layers.{block}.{leaf}.lora_{x}.weight"] for x in "AB")
            assert bool((B @ A).any()) is (block == "1" and leaf in ("self_attn.v_proj", "mlp.up_proj"))
    assert len(tensors) == 20
    assert any("8 layers" in note for note in report.notes)
    assert off(case, by_peft(case, tmp_path / "b"), outputs(case, case.trained)) <= 1e-6
    alone = hs.export(tmp_path / "a", tmp_path / "c")
    assert any("Pass the base" in note for note in alone.notes)


def test_peft_finds_every_key_and_no_other(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for chosen in SHAPES[2:4]:
        case = Case("kaiming", chosen)
        hs.export(saved(case, tmp_path / chosen.name), tmp_path / "b", base=case.model())
        recwarn.clear()
        peft.PeftModel.from_pretrained(case.model(), str(tmp_path / "b"))
        assert [str(w.message) for w in recwarn if "key" in str(w.message)] == []


@pytest.mark.parametrize("profile", ["portable", "compact", "mlx"])
def test_equal_adapters_give_equal_bytes(profile: str, tmp_path: Path) -> None:
    case = Case("pissa", PATTERNS)
    saved(case, tmp_path / "a")
    for out in "bcde":
        hs.export(tmp_path / "a", tmp_path / out, profile)
    files = [sorted((p.name, p.read_bytes()) for p in (tmp_path / out).iterdir()) for out in "bcde"]
    assert files[0] == files[1] == files[2] == files[3]
    assert len(files[0]) == 2


def test_saving_gives_equal_bytes_too(tmp_path: Path) -> None:
    case = Case("kaiming", PLAIN)
    for out in "bcde":
        saved(case, tmp_path / out)
    assert len({(tmp_path / out / TENSORS).read_bytes() for out in "bcde"}) == 1


def test_a_portable_file_is_its_own_export(tmp_path: Path) -> None:
    hs.export(saved(Case("pissa", PATTERNS), tmp_path / "a"), tmp_path / "b")
    report = hs.export(tmp_path / "b", tmp_path / "c")
    assert report.worst == 0
    first, second = (load_file(tmp_path / x / TENSORS) for x in "bc")
    assert all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())
    assert (tmp_path / "b" / CONFIG).read_bytes() == (tmp_path / "c" / CONFIG).read_bytes()


# ------------------------------------------------------------------ the error is measured, and said


def dense(folder: Path) -> dict[str, Tensor]:
    """ΔW of every layer, from the file alone, in float64."""
    config, tensors = config_of(folder), load_file(folder / TENSORS)
    names = [n.removesuffix(".lora_A.weight") for n in tensors if n.endswith("lora_A.weight")]
    scale = config["lora_alpha"] / config["r"]
    return {n: scale * tensors[f"{n}.lora_B.weight"].double() @ tensors[f"{n}.lora_A.weight"].double() for n in names}


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "float16"}, {"rank": 2}, {"rank": 3, "dtype": "bfloat16"}],
    ids=str,
)
def test_the_error_said_is_the_error_there_is(options: dict[str, Any], tmp_path: Path) -> None:
    case = Case("pissa", PLAIN).but(lora_alpha=7)
    report = hs.export(saved(case, tmp_path / "a"), tmp_path / "b", **options)
    old, new = dense(tmp_path / "a"), dense(tmp_path / "b")
    apart = {n: float((old[n] - new[n]).norm()) for n in old}
    sizes = {n: float(old[n].norm()) for n in old}
    whole = sum(x**2 for x in apart.values()) ** 0.5 / sum(x**2 for x in sizes.values()) ** 0.5
    assert report.error == pytest.approx(whole, rel=1e-3, abs=1e-9)
    assert report.worst == pytest.approx(max(apart[n] / sizes[n] for n in old), rel=1e-3, abs=1e-9)
    for name, error in report.errors.items():
        n = f"base_model.model.{name}"
        assert error == pytest.approx(apart[n] / sizes[n], rel=1e-3, abs=1e-9)
    written = json.loads(read_header(tmp_path / "b" / TENSORS).metadata[METADATA])["export"]
    assert written["error"] == pytest.approx(report.error, rel=0.06)
    assert f"{report.error:.1e}" in str(report)


def test_factors_that_nearly_cancel_lose_no_more_than_others(tmp_path: Path) -> None:
    """[B | −B₀]·[A ; A₀] after little training: rounding the factors one by one loses half of the change."""
    A0, B0 = torch.randn(8, 64), torch.randn(48, 8)
    A, B = A0 + 1e-3 * torch.randn(8, 64), B0 + 1e-3 * torch.randn(48, 8)
    write_pair(tmp_path / "a", torch.cat([A, A0]), torch.cat([B, -B0], 1), alpha=5)
    wanted = dense(tmp_path / "a")["base_model.model.layer"]
    for dtype, allowed in (("float32", 1e-7), ("bfloat16", 4e-3), ("float16", 1e-3)):
        report = hs.export(tmp_path / "a", tmp_path / dtype, dtype=dtype)
        found = dense(tmp_path / dtype)["base_model.model.layer"]
        assert float((found - wanted).norm() / wanted.norm()) <= allowed
        assert report.worst <= allowed


def test_a_smaller_rank_is_the_best_of_that_rank(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", torch.randn(12, 40), torch.randn(30, 12), alpha=9)
    report = hs.export(tmp_path / "a", tmp_path / "b", rank=5)
    spectrum = torch.linalg.svdvals(dense(tmp_path / "a")["base_model.model.layer"])
    best = float(spectrum[5:].norm() / spectrum.norm())
    assert report.error == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_keeps_a_half_precision_that_is_exact_and_no_other(dtype: torch.dtype, tmp_path: Path) -> None:
    A, B = torch.randn(8, 40).to(dtype), torch.randn(30, 8).to(dtype)
    write_pair(tmp_path / "a", A, B, alpha=16)
    assert hs.export(tmp_path / "a", tmp_path / "b").dtype == str(dtype).removeprefix("torch.")
    write_pair(tmp_path / "c", A, B, alpha=7)
    report = hs.export(tmp_path / "c", tmp_path / "d")
    assert report.dtype == "float32"
    assert report.worst <= 1e-7


def test_numbers_beyond_float16_are_refused_or_moved(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", torch.randn(4, 40) * 1e-4, torch.randn(30, 4) * 1e6, alpha=4)
    assert hs.export(tmp_path / "a", tmp_path / "b", dtype="float16").worst < 1e-3
    write_pair(tmp_path / "c", torch.randn(4, 40) * 1e6, torch.randn(30, 4) * 1e6, alpha=4)
    with pytest.raises(NotPortable, match=r"beyond torch\.float16: choose"):
        hs.export(tmp_path / "c", tmp_path / "d", dtype="float16")
    assert not (tmp_path / "d").exists()


# ------------------------------------------------------------------ compact: as few numbers as there are


def test_compact_is_of_the_true_rank(tmp_path: Path) -> None:
    for number, (true, written) in enumerate([(3, 16), (1, 4), (8, 8)]):
        A = torch.randn(written, true) @ torch.randn(true, 40) if true < written else torch.randn(written, 40)
        write_pair(tmp_path / f"{number}a", A, torch.randn(30, written), alpha=9)
        report = hs.export(tmp_path / f"{number}a", tmp_path / f"{number}b", "compact")
        assert report.rank == true
        assert report.worst <= 1e-6 if true < written else report.worst == 0
        size = [(tmp_path / f"{number}{x}" / TENSORS).stat().st_size for x in "ab"]
        assert (size[1] < size[0]) is (true < written) or abs(size[1] - size[0]) < 400


def test_compact_undoes_portable(tmp_path: Path) -> None:
    case = Case("kaiming", PATTERNS)
    hs.export(saved(case, tmp_path / "a"), tmp_path / "b")
    ranks = []
    for source in "ab":
        hs.export(tmp_path / source, tmp_path / f"{source}c", "compact")
        tensors = load_file(tmp_path / f"{source}c" / TENSORS)
        ranks.append({name: len(t) for name, t in tensors.items() if "lora_A" in name})
    assert ranks[0] == ranks[1]
    assert max(ranks[0].values()) == 6


def test_an_untrained_adapter_is_compact_at_rank_one(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", torch.randn(16, 40), torch.zeros(30, 16))
    assert hs.export(tmp_path / "a", tmp_path / "b", "compact").rank == 1
    assert not dense(tmp_path / "b")["base_model.model.layer"].any()


@pytest.mark.parametrize("seed", range(4))
def test_shortest_keeps_every_direction_that_counts(seed: int) -> None:
    torch.manual_seed(seed)
    U, V = (torch.from_numpy(orthogonal_matrix(40, 6, seed + i)) for i in (0, 10))
    S = torch.tensor([1.0, 1e-2, 1e-4, 1e-6, 1e-10, 1e-12], dtype=torch.float64)
    change = Change("x", (S[:, None] * V.T), U)
    short = shortest(change)
    assert short.rank == 4
    assert error_of(change, short) <= 1e-7


def test_zero_directions_are_trimmed_exactly() -> None:
    A, B = torch.randn(6, 9), torch.randn(7, 6)
    A[2], B[:, 4] = 0, 0
    short = trimmed(Change("x", A, B, 0.5))
    assert short.rank == 4
    assert error_of(Change("x", A, B, 0.5), short) < 1e-15
    assert stored(short, 4, torch.float32).scaling == 1


# ------------------------------------------------------------------ adapters that need a changed base


def stranger(case: Case, init: str, folder: Path, initial: Path | None = None) -> Tensor:
    """What PEFT itself trains from a start that replaces the base's weights, saved as its users do."""
    model = peft.get_peft_model(
        case.model(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    )
    if initial:
        model.save_pretrained(str(initial))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(5):
        model(ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(folder))
    return outputs(case, model)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("profile", ["portable", "compact"])
def test_a_start_that_follows_from_the_base_is_made_again(init: str, profile: str, tmp_path: Path) -> None:
    case = Case("kaiming", PLAIN)
    wanted = stranger(case, init, tmp_path / "a")
    assert off(case, by_peft_as_plain(case, tmp_path / "a"), wanted) > 0.5
    hs.export(tmp_path / "a", tmp_path / "b", profile, base=case.model())
    # The base that PEFT trained on was itself rounded to float32.
    assert off(case, by_peft(case, tmp_path / "b"), wanted) <= 2e-5


def by_peft_as_plain(case: Case, folder: Path) -> Tensor:
    """As engines read it that do not look at the start."""
    plain = folder.parent / "plain"
    plain.mkdir()
    (plain / TENSORS).write_bytes((folder / TENSORS).read_bytes())
    (plain / CONFIG).write_text(json.dumps({**config_of(folder), "init_lora_weights": True}))
    return by_peft(case, plain)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_was_saved_is_subtracted(init: str, tmp_path: Path) -> None:
    case = Case("kaiming", PLAIN)
    wanted = stranger(case, init, tmp_path / "a", tmp_path / "initial")
    hs.export(tmp_path / "a", tmp_path / "b", initial=tmp_path / "initial")
    assert off(case, by_peft(case, tmp_path / "b"), wanted) <= 2e-5


def test_a_start_that_cannot_be_known_is_refused(tmp_path: Path) -> None:
    case = Case("kaiming", PLAIN)
    stranger(case, "pissa_niter_4", tmp_path / "a")
    with pytest.raises(NotPortable, match=r"drew at random\. Pass `initial`"):
        hs.export(tmp_path / "a", tmp_path / "b", base=case.model())
    for init, said in (("lora_ga", "made from data"), ("corda", "made from data"), ("loftq", "quantised base")):
        (tmp_path / "a" / CONFIG).write_text(json.dumps({**config_of(tmp_path / "a"), "init_lora_weights": init}))
        with pytest.raises(NotPortable, match=said):
            hs.export(tmp_path / "a", tmp_path / "b", base=case.model())
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**config_of(tmp_path / "a"), "init_lora_weights": "pissa"}))
    with pytest.raises(NotPortable, match="pass the base"):
        hs.export(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_start_of_another_base_is_refused(tmp_path: Path) -> None:
    case = Case("kaiming", PLAIN)
    stranger(case, "pissa", tmp_path / "a")
    torch.manual_seed(7)
    with pytest.raises(WrongBase, match="holds no 'pissa' start of this base"):
        hs.export(tmp_path / "a", tmp_path / "b", base=llama())


def test_another_adapter_is_no_start(tmp_path: Path) -> None:
    case = Case("kaiming", PLAIN)
    stranger(case, "pissa", tmp_path / "a")
    saved(Case("kaiming", PATTERNS), tmp_path / "other")
    with pytest.raises(KeyMismatch, match="no start of this adapter"):
        hs.export(tmp_path / "a", tmp_path / "b", initial=tmp_path / "other")
    with pytest.raises(BadOption, match="leave out `initial`"):
        hs.export(tmp_path / "other", tmp_path / "b", initial=tmp_path / "a")


# ------------------------------------------------------------------ nothing is dropped in silence


def write_pair(folder: Path, A: Tensor, B: Tensor, alpha: float = 8, name: str = "layer", **more: Any) -> Path:
    """An adapter of one layer, as anybody might write it."""
    folder.mkdir(exist_ok=True)
    tensors = {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / TENSORS, {"format": "pt"})
    fields = {"peft_type": "LORA", "r": len(A), "lora_alpha": alpha, "target_modules": [name.rsplit(".", 1)[-1]]}
    (folder / CONFIG).write_text(json.dumps({**fields, **more}))
    return folder


def refusals() -> Iterator[tuple[Kind, str, str, bool]]:
    tied = partial(llama, True)
    others = ("portable", "gguf", "kohya")
    yield from ((DORA, profile, "a DoRA, and", True) for profile in others)
    saves = kind("saves", target_modules=["q_proj"], modules_to_save=["norm"])
    yield from ((saves, profile, "trained whole modules", True) for profile in (*others, "mlx"))
    biases = kind("biases", gpt2, target_modules=["c_attn"], bias="all")
    yield from ((biases, profile, "trained biases", True) for profile in (*others, "mlx"))
    yield from ((KINDS["experts"], p, "bare parameters", False) for p in (*others, "mlx", "compact"))
    yield from ((KINDS["conv2d"], p, "no place for convolutions", False) for p in ("gguf", "mlx"))
    yield from ((KINDS["conv2d_grouped"], p, "grouped convolutions", False) for p in ("portable", "kohya"))
    yield kind("tied_head", tied, target_modules=["lm_head"]), "gguf", "no head to adapt", True
    yield kind("tied_lookup", tied, target_modules=["embed_tokens"]), "gguf", "llama.cpp would change both", True
    yield kind("tied_lookup_mlx", tied, target_modules=["embed_tokens"]), "mlx", "mlx changes both", True
    yield kind("lookup", target_modules=["embed_tokens"]), "mlx", "mlx changes both", False
    yield kind("lookup_kohya", target_modules=["embed_tokens"]), "kohya", "adapt no lookups", True
    yield PLAIN, "gguf", "pass the base", False
    yield PLAIN, "kohya", "pass `prefix`", False
    yield kind("names", gpt2, target_modules=["c_attn"]), "mlx", "another name", True


@pytest.mark.parametrize(
    ("kind", "profile", "said", "given"), list(refusals()), ids=lambda v: getattr(v, "name", str(v))
)
def test_what_has_no_place_is_refused_by_name(kind: Kind, profile: str, said: str, given: bool, tmp_path: Path) -> None:
    case = Case("kaiming", kind)
    saved(case, tmp_path / "a")
    with pytest.raises(NotPortable, match=said):
        hs.export(tmp_path / "a", tmp_path / "b", profile, base=case.model() if given else None)
    assert not (tmp_path / "b").exists()


def test_copies_of_the_base_are_left_out_where_they_are_its_own(tmp_path: Path) -> None:
    """PEFT saves the embeddings that it adapts."""
    case = Case("kaiming", kind("copies", target_modules=["embed_tokens", "lm_head"]))
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"])
    model = peft.get_peft_model(case.model(), config)
    torch.nn.init.normal_(model.base_model.model.lm_head.lora_B["default"].weight)
    torch.nn.init.normal_(model.base_model.model.model.embed_tokens.lora_embedding_B["default"], std=0.1)
    model.save_pretrained(str(tmp_path / "a"))
    assert any("base_layer" in name for name in load_file(tmp_path / "a" / TENSORS))
    with pytest.raises(NotPortable, match="copies of its base's weights"):
        hs.export(tmp_path / "a", tmp_path / "b")
    hs.export(tmp_path / "a", tmp_path / "b", base=case.model())
    assert not any("base_layer" in name for name in load_file(tmp_path / "b" / TENSORS))
    assert off(case, by_peft(case, tmp_path / "b"), outputs(case, model)) <= 1e-6
    torch.manual_seed(5)
    with pytest.raises(WrongBase, match="not the model's own embedding"):
        hs.export(tmp_path / "a", tmp_path / "c", base=llama())


def test_a_rank_that_no_engine_serves_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", torch.randn(520, 600), torch.randn(600, 520))
    with pytest.raises(NotPortable, match="rank 520, and engines serve at most 512: pass rank=512"):
        hs.export(tmp_path / "a", tmp_path / "b")
    assert hs.export(tmp_path / "a", tmp_path / "b", rank=512).rank == 512


def test_a_base_of_other_shapes_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", torch.randn(4, 99), torch.randn(16, 4), name="model.layers.0.self_attn.q_proj")
    with pytest.raises(KeyMismatch, match="has shape"):
        hs.export(tmp_path / "a", tmp_path / "b", base=llama())


def test_factors_of_another_rank_than_the_config_says_are_refused(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", torch.randn(4, 9), torch.randn(7, 4), r=8)
    with pytest.raises(KeyMismatch, match="its scale is unknown"):
        hs.export(tmp_path / "a", tmp_path / "b")
    write_pair(tmp_path / "c", torch.randn(4, 9), torch.randn(7, 5))
    with pytest.raises(KeyMismatch, match="A of rank 4 and B of rank 5"):
        hs.export(tmp_path / "c", tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"profile": "ggml"}, BadOption, "choose portable, compact, gguf"),
        ({"dtype": "int8"}, BadOption, "choose auto, float32"),
        ({"rank": 0}, BadRank, "at least 1"),
        ({"prefix": "lora_te"}, BadOption, "leave it out"),
    ],
)
def test_a_mistaken_option_is_told(options: dict[str, Any], error: type[Exception], said: str, tmp_path: Path) -> None:
    write_pair(tmp_path / "a", torch.randn(4, 9), torch.randn(7, 4))
    with pytest.raises(error, match=said):
        hs.export(tmp_path / "a", tmp_path / "b", **options)


def test_the_source_and_other_kinds_of_files_are_not_overwritten(tmp_path: Path) -> None:
    case = Case("kaiming", PLAIN)
    before = (saved(case, tmp_path / "a") / TENSORS).read_bytes()
    with pytest.raises(FileError, match="holds the adapter that is read"):
        hs.export(tmp_path / "a", tmp_path / "a" / "." / "", "portable")
    with pytest.raises(FileError, match="holds the adapter that is read"):
        hs.export(tmp_path / "a", tmp_path / "a" / TENSORS, "kohya", prefix="lora_te")
    with pytest.raises(FileError, match="another kind"):
        hs.export(saved(case, tmp_path / "b"), tmp_path / "a", "mlx")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(FileError, match="holds a model"):  # transformers would load both
        hs.export(tmp_path / "a", tmp_path / "model", "portable")
    assert [each.name for each in (tmp_path / "model").iterdir()] == ["config.json"]
    hs.export(tmp_path / "a", tmp_path / "m", "mlx")
    with pytest.raises(FileError, match="another kind"):
        hs.export(tmp_path / "a", tmp_path / "m")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match="is a file"):
        hs.export(tmp_path / "a", tmp_path / "file")
    assert (tmp_path / "a" / TENSORS).read_bytes() == before


def test_a_damaged_adapter_leaves_nothing_behind(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", torch.randn(4, 9), torch.randn(7, 4))
    whole = (tmp_path / "a" / TENSORS).read_bytes()
    for damaged in (whole[:-5], b"", b"\xff" * 8 + whole):
        (tmp_path / "a" / TENSORS).write_bytes(damaged)
        with pytest.raises(HeadstartError):
            hs.export(tmp_path / "a", tmp_path / "b")
    write_pair(tmp_path / "a", torch.full((4, 9), float("nan")), torch.randn(7, 4))
    with pytest.raises(KeyMismatch, match="NaN"):
        hs.export(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AdapterFormatError):
        hs.export(tmp_path / "nothing", tmp_path / "b")
    assert not (tmp_path / "b").exists()


# ------------------------------------------------------------------ from the command line


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    pytest.importorskip("typer", reason="the extra headstart[cli]")
    from headstart import cli

    monkeypatch.setattr("sys.argv", ["headstart", "export", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr()
    return int(stopped.value.code or 0), shown.out, shown.err


def test_the_verb_says_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case("pissa", PATTERNS)
    saved(case, tmp_path / "a")
    case.model().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    words = [str(tmp_path / "a"), "--base", str(tmp_path / "base"), "--out"]
    code, out, _ = command(monkeypatch, capsys, *words, str(tmp_path / "b"))
    assert code == 0
    assert "rank 16, float32" in out
    assert "error of the conversion" in out
    assert off(case, by_peft(case, tmp_path / "b"), outputs(case, case.trained)) <= 1e-6
    code, out, _ = command(monkeypatch, capsys, *words, str(tmp_path / "x.gguf"), "--profile", "gguf", "--json")
    assert code == 0
    assert json.loads(out)["layers"] == 6
    code, _, err = command(monkeypatch, capsys, str(tmp_path / "a"), "--out", str(tmp_path / "y"), "--profile", "gguf")
    assert code == 2
    assert err.startswith("NotPortable: gguf names tensors")
    assert err.count("\n") == 1


def test_the_verb_loads_the_weights_where_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case("kaiming", PLAIN)
    wanted = stranger(case, "pissa", tmp_path / "a")
    case.model().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    words = [str(tmp_path / "a"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "b")]
    assert command(monkeypatch, capsys, *words)[0] == 0
    assert off(case, by_peft(case, tmp_path / "b"), wanted) <= 2e-5
