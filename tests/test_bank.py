"""A bank: every row of a mixed batch equals the model with that row's adapter alone; outside a route it is the base."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headstart as hs
from conftest import Maker
from headstart.errors import (
    AdapterFormatError,
    AdapterState,
    BadOption,
    BadRoute,
    NoTarget,
    UnsupportedLayer,
    WrongBase,
)

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 9},
    "rslora": {"r": 6, "lora_alpha": 8, "use_rslora": True},
    "pissa": {"r": 4, "init_lora_weights": "pissa"},
    "olora": {"r": 8, "init_lora_weights": "olora", "lora_alpha": 16},
    "dora": {"r": 3, "use_dora": True},
    "dora pissa": {"r": 2, "use_dora": True, "init_lora_weights": "pissa"},
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"down_proj": 20}},
    "one layer": {"r": 1, "target_modules": ["layers.1.self_attn.v_proj"]},
    "embedding": {"r": 5, "target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "embedding dora": {"r": 2, "target_modules": ["embed_tokens"], "use_dora": True},
}
ROWS = ["pissa", None, "plain", "dora", "embedding", "rslora", "plain", "one layer", "olora", "embedding dora"]
ROWS += ["dora pissa", "patterns", None, "embedding", "pissa", "plain"]


def trained(model: nn.Module, size: float = 0.1, **fields: Any) -> nn.Module:
    """The model with an adapter that changes what it computes."""
    adapter = hs.adapt(model, hs.LoraConfig(**fields))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(llama: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    for name, fields in ADAPTERS.items():
        hs.save(trained(llama(), **fields), root / name)
    return root


def bank_of(model: nn.Module, folder: Path, *names: str) -> hs.AdapterBank:
    bank = hs.AdapterBank(model)
    for name in names or ADAPTERS:
        bank.load(name, folder / name)
    return bank


def tokens(rows: int, length: int = 6) -> Tensor:
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(1))


def alone(llama: Maker, folder: Path, name: str | None, dtype: torch.dtype = torch.float32) -> Any:
    """The model with one adapter, without a bank."""
    model = llama().to(dtype)
    return model if name is None else hs.load(model, folder / name).model


def error(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


# --- what a row computes


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str)
@torch.no_grad()
def test_every_row_is_the_model_with_its_adapter_alone(
    dtype: torch.dtype, most: float, llama: Maker, folder: Path
) -> None:
    model = llama().to(dtype)
    ids = tokens(len(ROWS))
    before = model(ids).logits
    with bank_of(model, folder) as bank, bank.route(ROWS):
        mixed = model(ids).logits
    for row, name in enumerate(ROWS):
        if name is None:
            assert torch.equal(mixed[row], before[row])
            continue
        expected = alone(llama, folder, name, dtype)(ids).logits[row]
        assert error(mixed[row], expected) < most, name
        assert error(before[row], expected) > 10 * most or name == "one layer"


@torch.no_grad()
def test_in_bf16_a_row_is_as_near_to_the_exact_one_as_the_adapter_alone(llama: Maker, folder: Path) -> None:
    model, ids = llama().bfloat16(), tokens(len(ROWS))
    with bank_of(model, folder) as bank, bank.route(ROWS):
        mixed = model(ids).logits.double()
    for row, name in enumerate(ROWS):
        # The weights as bf16 has them, everything else in float64.
        exact = alone(llama, folder, name, torch.bfloat16).double()(ids).logits[row]
        single = alone(llama, folder, name, torch.bfloat16)(ids).logits[row].double()
        assert error(mixed[row], exact) < 1.5 * error(single, exact) + 1e-3, name


@torch.no_grad()
def test_peft_agrees(llama: Maker, folder: Path) -> None:
    peft = pytest.importorskip("peft")
    names = ["plain", "rslora", "pissa", "olora", "patterns", "one layer"]
    model, ids = llama(), tokens(len(names))
    with bank_of(model, folder, *names) as bank, bank.route(names):
        mixed = model(ids).logits
    theirs = peft.PeftModel.from_pretrained(llama(), folder / names[0], adapter_name=names[0].replace(" ", "_"))
    for name in names[1:]:
        theirs.load_adapter(folder / name, adapter_name=name.replace(" ", "_"))
    theirs.eval()
    expected = theirs(ids, adapter_names=[name.replace(" ", "_") for name in names]).logits
    assert error(mixed, expected) < 1e-5


@torch.no_grad()
def test_an_adapter_that_peft_wrote(llama: Maker, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear", use_rslora=True))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    theirs.eval()
    model, ids = llama(), tokens(2)
    before = model(ids).logits
    bank = hs.AdapterBank(model)
    bank.load("theirs", tmp_path)
    with bank.route([None, "theirs"]):
        mixed = model(ids).logits
    assert torch.equal(mixed[0], before[0])
    assert error(mixed[1], theirs(ids).logits[1]) < 1e-5


@torch.no_grad()
def test_a_short_step_from_an_anchored_start_survives_bf16(tmp_path: Path) -> None:
    """[B | −B₀]·[A ; A₀], as the file has it, would lose it: the bank subtracts before it rounds."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64, bias=False))
    hs.save(trained(copy.deepcopy(base), size=1e-4, r=8, init_lora_weights="pissa"), tmp_path)
    x = torch.randn(2, 5, 64)
    change = hs.load(copy.deepcopy(base), tmp_path).model(x) - base(x)
    model = copy.deepcopy(base).bfloat16()
    bank = hs.AdapterBank(model)
    bank.load("a", tmp_path)
    piece = bank._adapters["a"].pieces[model[0]]
    assert piece.A.dtype == piece.B.dtype == torch.bfloat16
    assert error((x @ piece.A.float().T @ piece.B.float())[1], change[1]) < 0.01


@pytest.mark.parametrize("names", [["a"] * 6, ["a", "b"] * 3, ["b", "b", None, "a", "a", "a"], "a", None])
@torch.no_grad()
def test_rows_that_share_an_adapter_are_multiplied_together(
    names: Any, llama: Maker, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = llama(), tokens(6)
    bank = hs.AdapterBank(model)
    bank.load("a", folder / "plain")
    bank.load("b", folder / "rslora")
    products: list[int] = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, y: products.append(len(x)) or bmm(x, y))
    with bank.route(names):
        mixed = model(ids).logits
    assert max(products, default=0) <= len({names} if isinstance(names, str) or names is None else set(names) - {None})
    monkeypatch.undo()
    listed = [names] * 6 if isinstance(names, str) or names is None else names
    for row, name in enumerate(listed):
        expected = alone(llama, folder, {"a": "plain", "b": "rslora", None: None}[name])(ids).logits[row]
        assert error(mixed[row], expected) < 1e-5


@torch.no_grad()
def test_conv1d_of_transformers(gpt2: Maker, tmp_path: Path) -> None:
    model, ids = gpt2(), tokens(3)
    expected = {None: model(ids).logits}
    bank = hs.AdapterBank(model)
    fused = {"r": 2, "target_modules": ["c_attn"], "parts": {"c_attn": (True, False, True)}}
    for name, fields in {"a": {"r": 3}, "parts": fused}.items():
        expected[name] = trained(one := gpt2(), **fields)(ids).logits
        hs.save(one, tmp_path / name)
        bank.load(name, tmp_path / name)
    with bank.route(["parts", None, "a"]):
        mixed = model(ids).logits
    for row, name in enumerate(["parts", None, "a"]):
        assert error(mixed[row], expected[name][row]) < 1e-5
        assert name is None or error(mixed[row], expected[None][row]) > 1e-3


@torch.no_grad()
def test_an_embedding_that_scales_what_it_looks_up(tmp_path: Path) -> None:
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    base = nn.Sequential(gemma.Gemma3TextScaledWordEmbedding(32, 8, 0, embed_scale=3.0))
    hs.save(one := trained(copy.deepcopy(base), r=2, target_modules=["0"]), tmp_path)
    ids = torch.randint(1, 32, (3, 5))
    before = base(ids)
    bank = hs.AdapterBank(base)
    bank.load("a", tmp_path)
    with bank.route(["a", None, "a"]):
        mixed = base(ids)
    assert torch.equal(mixed[1], before[1])
    assert error(mixed[::2], one(ids)[::2]) < 1e-5 < 1e-3 < error(before[::2], one(ids)[::2])


class Numbered(nn.Embedding):
    """As BART's: the scale is a number."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.embed_scale = 2.5

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class Doubled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input)


@torch.no_grad()
def test_a_lookup_is_scaled_by_a_number_too_and_any_other_of_its_own_is_refused(tmp_path: Path) -> None:
    ids = torch.randint(1, 16, (3, 5))
    for kind in (Numbered, Doubled):
        base = nn.Sequential(kind(32, 8))
        hs.save(one := trained(copy.deepcopy(base), r=2, target_modules=["0"]), tmp_path / kind.__name__)
        bank = hs.AdapterBank(base)
        if kind is Doubled:
            with pytest.raises(UnsupportedLayer, match="'0' is a Doubled with a forward of its own"):
                bank.load("a", tmp_path / "Doubled")
            continue
        bank.load("a", tmp_path / "Numbered")
        with bank.route(["a"] * 3):
            assert error(base(ids), one(ids)) < 1e-5 < 1e-3 < error(Numbered.forward(base[0], ids), one(ids))


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (6, 9)),
    "2d stride dilation": (lambda: nn.Conv2d(6, 8, 3, stride=2, dilation=2, padding="valid", bias=False), (6, 9, 9)),
    "2d reflect": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (6, 7, 7)),
    "2d groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), (6, 7, 7)),
    "3d": (lambda: nn.Conv3d(2, 4, 2), (2, 3, 3, 3)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@torch.no_grad()
def test_convolutions(kind: str, tmp_path: Path) -> None:
    make, shape = CONVOLUTIONS[kind]
    base = nn.Sequential(make(), nn.ReLU())
    x = torch.randn(6, *shape)
    model = copy.deepcopy(base)
    bank = hs.AdapterBank(model)
    expected = {None: base(x)}
    fields: dict[str, dict[str, Any]] = {"a": {"r": 2}, "b": {"r": 4}, "c": {"r": 2, "init_lora_weights": "pissa"}}
    fields["d"] = {"r": 2, "use_dora": True}
    for name, given in fields.items():
        one = trained(copy.deepcopy(base), target_modules=["0"], clip_rank=True, **given)
        expected[name] = one(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT would ignore dilation and padding_mode.
            hs.save(one, tmp_path / name)
        bank.load(name, tmp_path / name)
    names = ["a", "b", None, "a", "c", "d"]
    with bank.route(names):
        mixed = model(x)
    for row, name in enumerate(names):
        assert error(mixed[row], expected[name][row]) < 1e-5, name
        assert name is None or error(mixed[row], expected[None][row]) > 1e-3


@pytest.mark.parametrize("shape", [(4, 8), (4, 3, 8), (4, 3, 2, 8), (12, 8)])
@torch.no_grad()
def test_inputs_of_any_shape_whose_rows_come_first(shape: tuple[int, ...], tmp_path: Path) -> None:
    base = nn.Linear(8, 5)
    model = nn.Sequential(base)
    hs.save(trained(copy.deepcopy(model), r=2), tmp_path)
    x = torch.randn(shape)
    change = hs.load(copy.deepcopy(model), tmp_path).model(x) - model(x)
    bank = hs.AdapterBank(model)
    bank.load("a", tmp_path)
    before = model(x)
    with bank.route(["a", None, "a", None]):
        mixed = model[0](x)  # past the model, which would want four rows
    blocks = (mixed - before).reshape(4, -1), change.reshape(4, -1)
    assert error(blocks[0][::2], blocks[1][::2]) < 1e-5
    assert not blocks[0][1::2].any()


@torch.no_grad()
def test_a_module_that_stands_in_two_places(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(self.first(x).relu())
            return out

    base, x = Twice(), torch.randn(3, 6)
    hs.save(one := trained(copy.deepcopy(base), r=2, target_modules=["first"]), tmp_path)
    bank = hs.AdapterBank(base)
    bank.load("a", tmp_path)
    with bank.route([None, "a", "a"]):
        assert error(base(x)[1:], one(x)[1:]) < 1e-5


def test_gradients_reach_the_input(llama: Maker, folder: Path) -> None:
    model = llama()
    embedded = model.get_input_embeddings()(tokens(2)).detach().requires_grad_()
    with bank_of(model, folder, "plain", "dora") as bank, bank.route(["dora", "plain"]):
        (mixed,) = torch.autograd.grad(model(inputs_embeds=embedded).logits.square().sum(), embedded)
    for row, name in enumerate(["dora", "plain"]):
        one = alone(llama, folder, name)
        (single,) = torch.autograd.grad(one(inputs_embeds=embedded).logits.square().sum(), embedded)
        assert error(mixed[row], single[row]) < 1e-4


@torch.no_grad()
def test_a_quantised_base(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    four = bnb.nn.Linear4bit(64, 64, bias=True, compute_dtype=torch.float32, quant_type="nf4")
    four.load_state_dict(nn.Linear(64, 64).state_dict())
    base = nn.Sequential(four).to("cpu")
    x = torch.randn(4, 3, 64)
    bank, expected = hs.AdapterBank(base), {None: base(x)}
    for name, fields in {"a": {"r": 4}, "dora": {"r": 2, "use_dora": True}}.items():
        hs.save(trained(base_of(base), **fields), tmp_path / name)
        expected[name] = hs.load(base_of(base), tmp_path / name).model(x)
        bank.load(name, tmp_path / name)
    with bank.route(["a", None, "dora", "a"]):
        mixed = base(x)
    for row, name in enumerate(["a", None, "dora", "a"]):
        assert error(mixed[row], expected[name][row]) < 1e-5 if name else torch.equal(mixed[row], expected[None][row])


def base_of(quantised: nn.Sequential) -> nn.Module:
    """Another model with the same codes."""
    return nn.Sequential(copy.deepcopy(quantised[0]))


# --- generation


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 1},
        {"use_cache": False},
    ],
    ids=str,
)
def test_generation_is_that_of_each_adapter_alone(options: dict[str, Any], llama: Maker, folder: Path) -> None:
    names = ["pissa", None, "plain", "dora", "pissa"]
    model, ids = llama(), tokens(len(names))
    given = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    with bank_of(model, folder, "pissa", "plain", "dora") as bank:
        out = bank.generate(names, ids, **given)
    copies = options.get("num_return_sequences", 1)
    assert len(out) == copies * len(names)
    different = 0
    for row, name in enumerate(names):
        expected = alone(llama, folder, name).generate(ids[row : row + 1], **{**given, "attention_mask": None})
        found = out[row * copies : (row + 1) * copies, : expected.shape[1]]
        assert torch.equal(found, expected), name
        different += not torch.equal(
            expected, llama().generate(ids[row : row + 1], **{**given, "attention_mask": None})
        )
    assert different >= 3


def test_beams_in_the_generation_config_count_too(llama: Maker, folder: Path) -> None:
    model: Any = llama()
    model.generation_config.num_beams = 2
    ids = tokens(2)
    bank = bank_of(model, folder, "plain")
    out = bank.generate(["plain", None], ids, max_new_tokens=3, do_sample=False)
    assert len(out) == 2
    with pytest.raises(BadRoute, match="2 rows are routed, and the batch has 4"), bank.route(["plain", None]):
        model.generate(ids, max_new_tokens=3, do_sample=False)
    with bank.route(["plain", None], copies=2):
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), out)


def test_an_encoder_decoder_generates_with_beams(tmp_path: Path) -> None:
    """Its encoder sees the prompts once, its decoder once for each beam."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    base: Any = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ).eval()
    model, ids = copy.deepcopy(base), torch.randint(3, 64, (2, 5))
    hs.save(one := trained(copy.deepcopy(base), size=0.5, r=2), tmp_path)
    bank = hs.AdapterBank(model)
    bank.load("a", tmp_path)
    given = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    out = bank.generate(["a", None], ids, **given)
    for row, single in enumerate([one, base]):
        expected = single.generate(ids[row : row + 1], **given)
        assert torch.equal(out[row : row + 1, : expected.shape[1]], expected)


# --- routes


@torch.no_grad()
def test_outside_a_route_and_after_an_error_it_is_the_base(llama: Maker, folder: Path) -> None:
    model, ids = llama(), tokens(2)
    before = model(ids).logits
    bank = bank_of(model, folder, "plain", "dora")
    with bank.route(["plain", "dora"]):
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"), bank.route(["plain", "dora"]):
        model(ids)
    handle.remove()
    assert torch.equal(model(ids).logits, before)
    bank.close()


@torch.no_grad()
def test_routes_nest_and_the_inner_one_holds(llama: Maker, folder: Path) -> None:
    model, ids = llama(), tokens(2)
    bank = bank_of(model, folder, "plain", "dora")
    with bank.route(["plain", None]):
        outer = model(ids).logits
        with bank.route(None):
            assert torch.equal(model(ids).logits, llama()(ids).logits)
        assert torch.equal(model(ids).logits, outer)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["plain", "palin"], "no adapter 'palin'; did you mean 'plain'"),
        (["plain"], "1 rows are routed, and the batch has 2"),
        (["plain", None, None], "3 rows are routed, and the batch has 2"),
        ([], "no row is routed"),
        ([3, "plain"], "no adapter 3"),
    ],
)
def test_a_wrong_route_is_named(names: Any, message: str, llama: Maker, folder: Path) -> None:
    model = llama()
    bank = bank_of(model, folder, "plain")
    with pytest.raises(BadRoute, match=message), bank.route(names):
        model(tokens(2))
    bank.close()


def test_a_layer_that_does_not_see_the_rows_is_named(tmp_path: Path) -> None:
    class Positions(nn.Module):
        """Adds a projection of one table for all rows, as relative attention does."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.project = nn.Parameter(torch.randn(1, 4, 6)), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.project(self.table)
            return out

    base, x = Positions(), torch.randn(2, 4, 6)
    hs.save(one := trained(copy.deepcopy(base), r=2), tmp_path)
    bank = hs.AdapterBank(base)
    bank.load("a", tmp_path)
    with pytest.raises(BadRoute, match=r"'project' was given a \(1, 4, 6\) input"), bank.route(["a", None]):
        base(x)
    with bank.route(["a", "a"]):
        assert error(base(x), one(x)) < 1e-5


@pytest.mark.parametrize("copies", [0, 1.5, True])
def test_copies_is_a_count(copies: Any, llama: Maker) -> None:
    with pytest.raises(BadOption, match="copies"), hs.AdapterBank(llama()).route("a", copies=copies):
        pass


# --- adapters come and go


@torch.no_grad()
def test_a_route_keeps_the_adapters_that_it_was_opened_with(llama: Maker, folder: Path) -> None:
    model, ids = llama(), tokens(2)
    bank = bank_of(model, folder, "plain", "dora")
    gone = weakref.ref(bank._adapters["plain"])
    with bank.route(["plain", "dora"]):
        before = model(ids).logits
        bank.remove("plain")
        bank.load("dora", folder / "rslora", replace=True)
        bank.load("embedding", folder / "embedding")  # reaches layers that none did before
        assert torch.equal(model(ids).logits, before)
        assert gone() is not None
    gc.collect()
    assert gone() is None
    assert bank.names == ("dora", "embedding")
    with bank.route([None, "dora"]):
        assert error(model(ids).logits[1], alone(llama, folder, "rslora")(ids).logits[1]) < 1e-5
    with pytest.raises(BadRoute, match="no adapter 'plain'"), bank.route("plain"):
        pass


def test_threads_have_their_own_routes_while_adapters_come_and_go(llama: Maker, folder: Path) -> None:
    model, ids = llama(), tokens(2)
    bank = bank_of(model, folder, "plain", "pissa")
    with torch.no_grad():
        expected = {name: alone(llama, folder, name)(ids).logits for name in ("plain", "pissa", None)}
    problems: list[object] = []
    stop = threading.Event()

    @torch.no_grad()
    def serve(names: list[str | None]) -> None:
        while not stop.is_set():
            with bank.route(names):
                found = model(ids).logits
            problems.extend(n for row, n in enumerate(names) if error(found[row], expected[n][row]) > 1e-5)

    rows: list[list[str | None]] = [["plain", "pissa"], [None, "plain"], ["pissa", None]]
    threads = [threading.Thread(target=serve, args=(names,)) for names in rows]
    for thread in threads:
        thread.start()
    try:
        for turn in range(4):
            bank.load(f"other {turn}", folder / "embedding")
            bank.load("plain", folder / "plain", replace=True)
            bank.remove(f"other {turn}")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not problems
    bank.close()


@torch.no_grad()
def test_close_leaves_the_model_as_it_was(llama: Maker, folder: Path) -> None:
    model, ids = llama(), tokens(2)
    before, state, modules = model(ids).logits, copy.deepcopy(model.state_dict()), list(model.modules())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    bank = bank_of(model, folder)
    assert list(model.modules()) == modules
    with bank.route("plain"):
        model(ids)
        with pytest.raises(AdapterState, match="1 routes are open"):
            bank.close()
    bank.close()
    bank.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model(ids).logits, before)
    for call in (lambda: bank.load("plain", folder / "plain"), lambda: bank.route("plain").__enter__()):
        with pytest.raises(AdapterState, match="closed"):
            call()


def test_a_bank_that_is_dropped_leaves_a_plain_model(llama: Maker, folder: Path) -> None:
    model = llama()
    bank_of(model, folder, "plain")
    gc.collect()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- memory


def test_a_bank_holds_what_the_files_hold(folder: Path, llama: Maker) -> None:
    """No rank pays for another one's, and a narrower layer needs no wider factors."""
    from safetensors.torch import load_file

    for dtype, share in ((torch.float32, 1.0), (torch.bfloat16, 0.5)):
        bank = hs.AdapterBank(llama().to(dtype))
        size = 0
        for name in ("plain", "patterns", "pissa", "one layer"):
            bank.load(name, folder / name)
            file = load_file(folder / name / "adapter_model.safetensors")
            size += sum(t.numel() * t.element_size() for t in file.values())
        assert bank.nbytes == share * size
        tensors = [t for held in bank._adapters.values() for piece in held.pieces.values() for t in piece.tensors]
        stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        assert sum(stored.values()) == bank.nbytes


@torch.no_grad()
def test_a_narrow_file_stays_narrow_on_a_wide_base(llama: Maker, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    hs.save(trained(llama(), r=4, lora_alpha=10), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    model, ids = llama(), tokens(3)
    bank = hs.AdapterBank(model)
    bank.load("a", tmp_path)
    assert bank.nbytes == sum(2 * t.numel() for t in load_file(path).values())
    with bank.route([None, "a", "a"]):
        assert error(model(ids).logits[1:], hs.load(llama(), tmp_path).model(ids).logits[1:]) < 1e-5


# --- what is refused


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, 4, 4))


def test_what_a_bank_cannot_serve_is_named(llama: Maker, tmp_path: Path) -> None:
    model = llama()
    hs.save(trained(llama(), r=2, target_modules=["q_proj"], modules_to_save=["norm"]), tmp_path / "in full")
    with_bias = nn.Sequential(nn.Linear(4, 4))
    hs.save(trained(copy.deepcopy(with_bias), r=2, bias="all"), tmp_path / "bias")
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    hs.save(trained(copy.deepcopy(attention), r=2, target_modules=["attn"]), tmp_path / "attention")
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    hs.save(trained(copy.deepcopy(encoder), r=2, target_modules=["linear1"]), tmp_path / "encoder")
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])})
    hs.save(trained(copy.deepcopy(experts), r=2), tmp_path / "experts")
    bare = nn.ModuleDict({"inner": Experts()})
    hs.save(trained(copy.deepcopy(bare), r=2, target_modules=[], target_parameters=["weights"]), tmp_path / "bare")
    for base, name, message in (
        (bare, "bare", "'inner.weights' is a bare parameter"),
        (model, "in full", "replaces 'model.norm.weight' of the base"),
        (with_bias, "bias", "of the base, which a bank shares"),
        (attention, "attention", "'attn.out_proj' stands in an nn.MultiheadAttention"),
        (encoder, "encoder", "'0.linear1' stands in an nn.TransformerEncoderLayer"),
        (experts, "experts", "'experts.0' is an expert"),
    ):
        bank = hs.AdapterBank(base)
        with pytest.raises(UnsupportedLayer, match=message):
            bank.load(name, tmp_path / name)
        assert not bank.names
        assert not any(module._forward_hooks for module in base.modules())


def test_bad_files_and_names_change_nothing(llama: Maker, folder: Path, tmp_path: Path) -> None:
    model = llama()
    bank = bank_of(model, folder, "plain")
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    (tmp_path / "empty").mkdir()
    other = llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter))
    hs.save(trained(other, r=2), tmp_path / "other base")
    hs.save(trained(nn.Sequential(nn.Linear(3, 3)), r=2), tmp_path / "other model")
    for path, kind in (("empty", AdapterFormatError), ("other base", WrongBase), ("other model", NoTarget)):
        with pytest.raises(kind):
            bank.load("x", tmp_path / path)
    with pytest.raises(AdapterState, match="holds an adapter 'plain'"):
        bank.load("plain", folder / "dora")
    for name in ("", None, 3):
        with pytest.raises(BadOption, match="a name that is a string"):
            bank.load(name, folder / "dora")  # type: ignore[arg-type]
    with pytest.raises(BadRoute, match=r"no adapter 'x' \(it holds 'plain'\)"):
        bank.remove("x")
    assert bank.names == ("plain",)
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


def test_a_model_that_is_adapted_already_has_no_place_for_a_bank(llama: Maker) -> None:
    with pytest.raises(AdapterState, match="has an adapter already"):
        hs.AdapterBank(trained(llama(), r=2))


def test_a_model_without_generate_is_told_so() -> None:
    with pytest.raises(BadOption, match="no generate"):
        hs.AdapterBank(nn.Sequential(nn.Linear(2, 2))).generate([None])
