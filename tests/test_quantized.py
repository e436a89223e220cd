"""Quantised bases, and the two starts that quantise: against bitsandbytes itself, PEFT, and dense NumPy."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import headstart as hs
import headstart.peft
from headstart.errors import (
    AdapterState,
    BadOption,
    KeyMismatch,
    MetaWeight,
    NonFiniteWeight,
    UnsupportedLayer,
    WrongBase,
)
from headstart.files.residual import subtract
from headstart.inits import strategy as registry
from headstart.inits.loftq import loftq
from headstart.inits.qpissa import qpissa
from headstart.lora import matrix, quantized
from headstart.lora.quantized import Recipe, recipe
from headstart.lora.report import InitReport
from headstart.testing import PEFT, Case, Kind, fingerprint, laws, violations
from headstart.testing.kinds import Both
from oracles import Matrix

bnb = pytest.importorskip("bitsandbytes", reason="quantised layers need the extra headstart[quant]")

pytestmark = pytest.mark.filterwarnings(
    "ignore:this adapter makes up for what quantising its base lost", "ignore:`torch_dtype` is deprecated"
)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of inputs that it casts to float16

M, N = 64, 128
PLAIN = [name for name in hs.strategies() if not registry.get(name)[0].quantizes]
ITERATED = [("loftq", {}), ("loftq", {"num_iter": 3}), ("qpissa", {}), ("qpissa", {"quant_type": "fp4"})]


class Net(nn.Module):
    """Two layers, the second without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(N, M), nn.Linear(M, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))  # type: ignore[no-any-return]


def linear4bit(m: int = M, n: int = N, bias: bool = True, **options: Any) -> nn.Module:
    options = {"compute_dtype": torch.float32, "quant_type": "nf4", "compress_statistics": False, **options}
    return bnb.nn.Linear4bit(n, m, bias=bias, **options)  # type: ignore[no-any-return]


def linear8bit(m: int = M, n: int = N, bias: bool = True) -> nn.Module:
    return bnb.nn.Linear8bitLt(n, m, bias=bias, has_fp16_weights=False)  # type: ignore[no-any-return]


def pack(model: nn.Module, make: Callable[..., nn.Module], device: str | torch.device = "cpu") -> nn.Module:
    """The model with its Linears quantised, as a loader does it."""
    for name, layer in list(model.named_children()):
        if type(layer) is nn.Linear:
            packed = make(layer.out_features, layer.in_features, layer.bias is not None)
            packed.load_state_dict(layer.state_dict())
            setattr(model, name, packed)
        else:
            pack(layer, make, device)
    return model.to(device).eval()


BITS = {"4": linear4bit, "8": linear8bit}


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, N)


def config(init: str, **fields: Any) -> hs.LoraConfig:
    return hs.LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": init, **fields})


def trained(adapter: hs.Adapter) -> nn.Module:
    """As after some steps: every factor moved."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * noise.to(parameter.device))
    return adapter.model


def apart(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


# ------------------------------------------------------------------ the border


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "nf4": linear4bit,
    "fp4": lambda: linear4bit(quant_type="fp4"),
    "nf4, double": lambda: linear4bit(compress_statistics=True),
    "nf4, stored as bf16": lambda: linear4bit(quant_storage=torch.bfloat16),
    "int8": linear8bit,
}


@pytest.mark.parametrize("kind", LAYERS)
def test_values_are_what_the_layer_multiplies_with(kind: str, device: torch.device) -> None:
    layer = LAYERS[kind]().to(device)
    weight = layer.weight
    assert quantized.is_quantized(weight)
    assert matrix.outline(layer).shape == (M, N)
    assert quantized.elements(weight) == M * N
    unit = torch.eye(N, device=device)
    for _ in range(2):  # before and after the first forward, which moves the scales of 8-bit layers
        values = matrix.values(layer).float()
        assert values.shape == (M, N)
        product = layer.train()(unit) - layer.bias
        assert apart(product.T, values) < (1e-6 if device.type == "cpu" else 1e-2)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_recipe_makes_the_same_values(kind: str, device: torch.device) -> None:
    layer, W = LAYERS[kind](), torch.randn(M, N)
    layer.weight.data = W.clone()
    layer.to(device)
    assert torch.equal(matrix.values(layer), quantized.recipe_of(layer.weight).image(W.to(device)))


def test_values_have_the_dtype_that_was_quantised() -> None:
    layer = linear4bit(compute_dtype=torch.bfloat16).bfloat16().to("cpu")
    assert matrix.values(layer).dtype == matrix.outline(layer).dtype == torch.bfloat16


def test_a_layer_that_bitsandbytes_turned_around_for_the_cpu_is_read_right() -> None:
    convert = bnb.functional._convert_weight_packed_for_cpu
    for double in (False, True):
        layer = linear4bit(compress_statistics=double).to("cpu")
        before, weight = matrix.values(layer), layer.weight
        scales = (before.view(-1, 64).abs().amax(1, keepdim=True)).bfloat16().float()
        wanted = (before.view(-1, 64) / before.view(-1, 64).abs().amax(1, keepdim=True) * scales).view(M, N)
        weight.data, weight.quant_state = convert(weight.data, weight.quant_state)
        assert matrix.values(layer).dtype == torch.float32
        assert apart(matrix.values(layer), wanted) < 1e-6
        assert quantized.recipe_of(weight).nested == double
        again = quantized.requantized(weight, before)
        assert apart(quantized.values(again, layer), before) < 5e-3


@pytest.mark.parametrize("make", BITS.values())
def test_a_layer_that_is_not_quantised_yet_is_refused(make: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(make())
    with pytest.raises(UnsupportedLayer, match=r"not quantised yet.*layer '0'"):
        hs.adapt(model, config("pissa"))


@pytest.mark.parametrize("bits", BITS)
def test_what_is_put_back_is_the_same_to_the_bit(bits: str, net: Net, x: Tensor) -> None:
    for ran in (False, True):
        model = pack(copy.deepcopy(net), BITS[bits])
        wanted = model(x) if ran else copy.deepcopy(model)(x)
        layer: Any = model.up
        before, state = layer.weight, fingerprint(model)
        quantized.put(layer, "weight", quantized.requantized(before, torch.randn(M, N)))
        assert apart(model(x), wanted) > 0.5
        quantized.put(layer, "weight", before)
        assert layer.weight is before
        assert fingerprint(model) == state
        assert torch.equal(model(x), wanted)
        assert torch.equal(matrix.values(layer), matrix.values(layer))


# ------------------------------------------------------------------ the laws, on quantised layers


def quantised_kind(name: str, make: Callable[..., nn.Module], **fields: Any) -> Kind:
    return Kind(
        name=name,
        make=lambda: Both(lambda: make(24, 64)),
        inputs=lambda: (torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)),),
        fields={"target_modules": ["left", "right"], **fields},
    )


KINDS = {
    kind.name: kind
    for kind in [
        quantised_kind("linear4bit", linear4bit),
        quantised_kind("linear4bit_dora", linear4bit, use_dora=True),
        quantised_kind("linear8bit", linear8bit),
        quantised_kind("linear8bit_dora", linear8bit, use_dora=True),
        quantised_kind(
            "linear4bit_parts", linear4bit, parts={"left": (True, False, True), "right": (True, True, False)}
        ),
    ]
}
# A merged layer is quantised anew; 8-bit layers round their inputs in evaluation and not in training.
LAWS = [law for law in laws.LAWS if law not in (laws.merged_computes_the_same, laws.odd_weights_are_served_or_refused)]
LAWS_8BIT = [
    law for law in LAWS if law not in (laws.every_mode_computes_the_branch, laws.the_function_is_kept_at_step_zero)
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", PLAIN)
def test_every_start_obeys_the_laws_on_a_quantised_layer(init: str, kind: str, device: torch.device) -> None:
    found = violations(Case(init, KINDS[kind], device=device), LAWS_8BIT if "8bit" in kind else LAWS)
    assert not [f"{law.__name__}: {said}" for law, said in found]


@pytest.mark.parametrize("kind", ["linear4bit", "linear4bit_dora", "linear8bit", "linear8bit_dora"])
@pytest.mark.parametrize("init", ["kaiming", "pissa", "mica"])
def test_starts_obey_the_laws_on_a_quantised_layer_in_a_peft_model(init: str, kind: str) -> None:
    pytest.importorskip("peft")
    found = violations(Case(init, KINDS[kind], shell=PEFT), LAWS_8BIT if "8bit" in kind else LAWS)
    assert not [f"{law.__name__}: {said}" for law, said in found]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", PLAIN)
def test_the_function_of_an_8_bit_layer_is_kept_in_either_mode(
    init: str, dora: bool, net: Net, x: Tensor, device: torch.device
) -> None:
    model, x = pack(net, linear8bit, device), x.to(device)
    wanted = [model.train(mode)(x) for mode in (True, False)]
    known = {}
    if needs := registry.get(init)[0].needs:
        data = [torch.randn(8, N, device=device) for _ in range(4)]
        known = {"data": data, "loss": lambda model, batch: model(batch).square().mean()}
        known |= {"preserve": data[:1]} if "preserved" in needs else {}
    adapter = hs.adapt(model, config(init, use_dora=dora), **known)
    if Case(init, KINDS["linear4bit"]).preserves:
        for mode, before in zip((True, False), wanted, strict=True):
            assert apart(model.train(mode)(x), before) < (3e-7 if dora else 1e-12)
    with adapter.disabled():
        assert torch.equal(model.train()(x), wanted[0])


@pytest.mark.parametrize("bits", BITS)
def test_the_start_is_that_of_the_quantised_weight(bits: str, net: Net) -> None:
    """The same as on a float model that holds the dequantised numbers."""
    model = pack(copy.deepcopy(net), BITS[bits])
    with torch.no_grad():
        for name in ("up", "down"):
            net.get_submodule(name).weight.copy_(matrix.values(model.get_submodule(name)))
    found, wanted = hs.adapt(model, config("pissa")), hs.adapt(net, config("pissa"))
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [layer.shape for layer in found.report.layers] == [(M, N), (N, M)]
    assert found.count() == wanted.count()


# ------------------------------------------------------------------ merging


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_a_merge_reports_the_error_of_quantising_anew(bits: str, dora: bool, net: Net, x: Tensor) -> None:
    model = pack(net, BITS[bits])
    originals = {name: matrix.values(model.get_submodule(name)).double() for name in ("up", "down")}
    trained(hs.adapt(model, config("pissa", use_dora=dora)))
    wanted, state = model(x), fingerprint(model)
    merged = {name: model.get_submodule(name).merged_weight() for name in originals}
    report = hs.merge(model, reversible=True)
    for name, W in originals.items():
        new = merged[name].detach()
        if bits == "4":
            image = bnb.functional.dequantize_4bit(
                *bnb.functional.quantize_4bit(new, blocksize=64, quant_type="nf4", compress_statistics=False)
            )
        else:
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(new.half())
            image = codes.float() * scales[:, None] / 127
        error = (image.double() - new.double()).norm() / (new.double() - W).norm()
        assert report.lost[name] == pytest.approx(float(error), rel=1e-5)
        assert apart(matrix.values(model.get_submodule(name).base_layer), image) < 1e-6
    assert 0 < report.worst < 1
    assert apart(model(x), wanted) < (0.3 if bits == "4" else 0.03)
    assert all(quantized.is_quantized(layer.weight_parameter) for _, layer in hs.lora.layers.lora_layers(model))
    hs.unmerge(model)
    assert torch.equal(model(x), wanted)
    assert fingerprint(model) == state
    hs.merge(model)
    assert [type(m) for m in model.children()] == [type(BITS[bits]()), type(BITS[bits]())]


@pytest.mark.parametrize("bits", BITS)
def test_disabling_a_merged_quantised_model_gives_the_base(bits: str, net: Net, x: Tensor) -> None:
    model = pack(net, BITS[bits])
    wanted = model(x)
    adapter = hs.adapt(model, config("pissa"))
    trained(adapter)
    hs.merge(model, reversible=True)
    moved = model(x)
    with adapter.disabled():
        assert torch.equal(model(x), wanted)
    assert torch.equal(model(x), moved)
    assert torch.equal(hs.remove(model)(x), wanted)


# ------------------------------------------------------------------ whole models, and PEFT on the same base


@pytest.fixture(params=BITS)
def loaded(request: pytest.FixtureRequest, checkpoint: Path) -> Callable[[], Any]:
    """A function that loads the tiny Llama in 4 or 8 bits, as everybody does."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if request.param == "4":
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    else:
        how = BitsAndBytesConfig(load_in_8bit=True)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=how, dtype=torch.float32)

    return load


IDS = torch.tensor([[1, 17, 40, 9, 77, 2]])


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora"])
def test_an_adapter_of_a_quantised_model_means_the_same_to_peft(
    init: str, loaded: Callable[[], Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = loaded()
    wanted = model(IDS).logits
    adapter = hs.adapt(model, config(init))
    assert len(adapter.layers()) == 14
    assert all(quantized.is_quantized(m.original) for m in adapter.layers().values())
    assert torch.equal(model(IDS).logits, wanted)
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    after = trained(adapter).eval()(IDS).logits
    hs.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(loaded(), tmp_path).eval()
    assert apart(theirs(IDS).logits, after) < 1e-5
    assert torch.equal(hs.load(loaded(), tmp_path).model(IDS).logits, after)
    assert torch.equal(hs.remove(model)(IDS).logits, wanted)


@pytest.mark.parametrize("dora", [False, True])
def test_a_peft_model_of_a_quantised_base(dora: bool, loaded: Callable[[], Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from headstart.peft import get_peft_model

    base = loaded()
    wanted = base(IDS).logits
    model = get_peft_model(base, config("pissa", use_dora=dora))
    assert any("bit" in type(module).__name__ and hasattr(module, "lora_A") for module in model.modules())
    assert apart(model(IDS).logits, wanted) < (2e-7 if dora else 1e-12)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    after = model(IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, wanted)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(loaded(), tmp_path).eval()
    assert apart(theirs(IDS).logits, after) < 1e-5
    model.merge_adapter()
    assert not torch.equal(model(IDS).logits, after)
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, after)
    assert torch.equal(model.unload()(IDS).logits, wanted)


def test_an_adapter_of_a_float_model_loads_on_its_quantised_copy_and_on_no_other(net: Net, tmp_path: Path) -> None:
    hs.save(trained(hs.adapt(copy.deepcopy(net), config("pissa"))), tmp_path)
    for make in BITS.values():
        hs.load(pack(copy.deepcopy(net), make), tmp_path)
    with pytest.raises(WrongBase):
        hs.load(pack(Net(), linear4bit), tmp_path)


# ------------------------------------------------------------------ LoftQ and QPiSSA, in NumPy


# The sixteen numbers of NF4, from the paper on QLoRA (appendix E).
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def nf4(W: Matrix) -> Matrix:
    """The nearest of the sixteen numbers, times the largest of each 64."""
    blocks = W.reshape(-1, 64)
    scale = np.abs(blocks).max(1, keepdims=True)
    codes = np.array(NF4)
    nearest = np.abs(blocks[:, :, None] / scale[:, :, None] - codes).argmin(-1)
    return (codes[nearest] * scale).reshape(W.shape)


def int8(W: Matrix) -> Matrix:
    scale = np.abs(W).max(1, keepdims=True)
    return np.rint(W / scale * 127) * scale / 127


ORACLES = {4: nf4, 8: int8}


def truncated(W: Matrix, r: int) -> Matrix:
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vt[:r]


def errors_of_loftq(W: Matrix, r: int, q: Callable[[Matrix], Matrix], count: int) -> list[float]:
    """Algorithm 1, with what it leaves after each step."""
    low, found = np.zeros_like(W), []
    for _ in range(count):
        Q = q(W - low)
        low = truncated(W - Q, r)
        found.append(float(np.linalg.norm(W - Q - low) / np.linalg.norm(W - q(W))))
    return found


def errors_of_qpissa(W: Matrix, r: int, q: Callable[[Matrix], Matrix], count: int) -> list[float]:
    rest, found = W, []
    for _ in range(count):
        low = truncated(rest, r)
        Q = q(W - low)
        rest = W - Q
        found.append(float(np.linalg.norm(rest - low) / np.linalg.norm(W - q(W))))
    return found


def weight(m: int = 96, n: int = M, decay: float = 0.97) -> Tensor:
    """A spectrum like that of trained weights: not flat, and not short."""
    W = torch.randn(m, n, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return ((U * S * decay ** torch.arange(len(S))) @ Vh).float() * 0.05


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_quantiser_is_the_papers(bits: int) -> None:
    W = torch.randn(48, M).half().float()  # bitsandbytes rounds to float16 before int8
    found, wanted = recipe(bits).image(W).double().numpy(), ORACLES[bits](W.double().numpy())
    assert (np.abs(found - wanted) < 1e-6).mean() > 0.999  # but for ties, which either side may take
    assert np.abs(found - wanted).max() < 0.2 * np.abs(wanted).max()


def test_blocks_may_straddle_rows(device: torch.device) -> None:
    W = torch.randn(96, 32)
    found = recipe(4).image(W.to(device)).cpu().double().numpy()
    assert (np.abs(found - nf4(W.double().numpy())) < 1e-6).mean() > 0.999


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("start", "oracle"), [(loftq, errors_of_loftq), (qpissa, errors_of_qpissa)])
def test_what_remains_is_what_the_paper_leaves(start: Any, oracle: Any, bits: int, count: int) -> None:
    W, s = weight(), 0.5
    found = start(W, 8, s, generator(), recipe(bits).image, num_iter=count)
    wanted = oracle(W.double().numpy(), 8, ORACLES[bits], count)
    # Some codes of the two quantisers differ, and later steps build on them.
    assert found.facts["remaining"] == pytest.approx(min(1.0, *wanted), rel=0.01 if count == 1 else 0.03)
    remaining = (W - found.base - s * found.B @ found.A).norm() / (W - recipe(bits).image(W)).norm()
    assert found.facts["remaining"] == pytest.approx(float(remaining), rel=1e-5)
    A, B = found.taken
    assert torch.equal(found.base, recipe(bits).image(torch.addmm(W, B, A, alpha=-1.0)))


def test_loftq_takes_the_best_approximation_of_the_error() -> None:
    W, r = weight(), 8
    E = (W - recipe(4).image(W)).double()
    S = torch.linalg.svdvals(E)
    best = float((S[r:] ** 2).sum().sqrt() / E.norm())
    found = loftq(W, r, 2.0, generator(), recipe(4).image)
    assert best <= found.facts["remaining"] + 1e-6 < best * (1 + 1e-4)


@pytest.mark.parametrize("start", [loftq, qpissa])
@pytest.mark.parametrize("bits", [4, 8])
def test_more_steps_never_leave_more(start: Any, bits: int) -> None:
    W = weight()
    left = [start(W, 8, 1.0, generator(), recipe(bits).image, num_iter=n).facts["remaining"] for n in range(1, 7)]
    assert all(after <= before for before, after in itertools.pairwise(left))
    assert left[0] <= 1


@pytest.mark.parametrize("start", [loftq, qpissa])
def test_the_scaling_is_accounted_for(start: Any) -> None:
    W, r = weight(), 8
    starts = {s: start(W, r, s, generator(), recipe(4).image) for s in (0.5, 1.0, 4.0)}
    for s, found in starts.items():
        assert apart(s * found.B @ found.A, starts[1.0].B @ starts[1.0].A) < 1e-5
        assert torch.equal(found.base, starts[1.0].base)


def test_loftq_is_pefts_where_s_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT moves the weight to a GPU; here "cuda" is the CPU."""
    loftq_utils = pytest.importorskip("peft.utils.loftq_utils")
    if not torch.cuda.is_available():
        move = torch.Tensor.to

        def stay(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            places = {"cuda": "cpu", torch.device("cuda"): "cpu"}
            args = tuple(places.get(a, a) if isinstance(a, str | torch.device) else a for a in args)
            kwargs = {k: places.get(v, v) if isinstance(v, str | torch.device) else v for k, v in kwargs.items()}
            return move(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "to", stay)
        monkeypatch.setattr(loftq_utils, "clear_device_cache", lambda: None)
    W = weight()
    for count in (1, 3):
        base, A, B = loftq_utils.loftq_init(W, 4, 8, num_iter=count)
        found = loftq(W, 8, 1.0, generator(), recipe(4).image, num_iter=count)
        assert apart(found.base, base.cpu()) < (1e-6 if count == 1 else 0.02)
        theirs, ours = (
            float((W - b.cpu() - (Q @ P).cpu()).norm()) for b, Q, P in ((base, B, A), (found.base, found.B, found.A))
        )
        assert ours == pytest.approx(theirs, rel=1e-4 if count == 1 else 2e-3)


def test_peft_forgets_the_scaling() -> None:
    """With α ≠ r its correction has the wrong strength: at s = 4 the start is worse than none."""
    W, r, s = weight(), 8, 4.0
    one = loftq(W, r, 1.0, generator(), recipe(4).image)
    lost = (W - one.base).norm()
    assert (W - one.base - s * one.B @ one.A).norm() > lost
    assert loftq(W, r, s, generator(), recipe(4).image).facts["remaining"] < 1


@pytest.mark.parametrize("bad", [0, -1, True, 1.5])
def test_the_number_of_steps_is_checked(bad: Any, net: Net) -> None:
    with pytest.raises(BadOption, match=r"num_iter.* is .*: choose an integer"):
        hs.adapt(net, config("loftq", init_options={"num_iter": bad}))


# ------------------------------------------------------------------ on a float model


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("init", "options"), ITERATED)
def test_a_float_model_computes_with_the_quantised_base_until_the_adapter_is_removed(
    init: str, options: dict[str, Any], dora: bool, net: Net, x: Tensor
) -> None:
    wanted, before = net(x), fingerprint(net)
    plain = copy.deepcopy(net)
    with torch.no_grad():
        for linear in (plain.up, plain.down):
            linear.weight.copy_(recipe(4, options.get("quant_type", "nf4")).image(linear.weight))
    frozen = copy.deepcopy(net).requires_grad_(False)(x)
    adapter = hs.adapt(net, config(init, init_options=options, use_dora=dora))
    closer = [f["remaining"] < 1 for layer in adapter.report.layers for f in layer.facts]
    assert all(closer)
    assert all(not layer.anchored for layer in adapter.report.layers)
    for name, layer in adapter.layers().items():
        start = layer.base_weight + layer.scaling * layer.factors[1] @ layer.factors[0]
        original = layer.original
        lost = (plain.get_submodule(name).weight - original).norm()
        assert float((start - original).detach().norm() / lost.detach()) < 1
    trained(adapter)
    moved = net(x)
    with adapter.disabled():
        assert torch.equal(net(x), frozen)
    hs.merge(net, reversible=True)
    assert apart(net(x), moved) < 1e-5
    hs.unmerge(net)
    assert torch.equal(net(x), moved)
    assert torch.equal(hs.remove(net)(x), wanted)
    assert fingerprint(net) == before


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("init", "options"), ITERATED[:3])
def test_peft_on_the_recipes_base_computes_the_same(
    init: str, options: dict[str, Any], bits: int, dora: bool, net: Net, x: Tensor, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    options = {**options, "bits": bits}
    model = trained(hs.adapt(copy.deepcopy(net), config(init, init_options=options, use_dora=dora)))
    with pytest.warns(UserWarning, match=f"{bits}-bit .*load it on that base"):
        hs.save(model, tmp_path)
    assert torch.equal(hs.load(copy.deepcopy(net), tmp_path).model(x), model(x))
    base = pack(subtract(copy.deepcopy(net), tmp_path), BITS[str(bits)])
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    # In evaluation an 8-bit layer rounds its inputs, too.
    theirs.train(bits == 8)
    assert apart(theirs(x), model(x)) < 1e-5
    assert apart(hs.load(base, tmp_path).model.train(bits == 8)(x), model(x)) < 1e-5
    (found,) = json.loads(metadata(tmp_path)["headstart"])["quantized"]
    assert found["bits"] == bits
    assert set(found["samples"]) == {"up", "down"}
    own_base = init == "qpissa" or "num_iter" in options
    assert (tmp_path / "quantized_base.safetensors").is_file() == bool(found["taken"]) == own_base


def metadata(folder: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return file.metadata()  # type: ignore[no-any-return]


def test_a_peft_model_carries_the_quantised_base(net: Net, x: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from headstart.peft import from_pretrained, get_peft_model

    wanted = net(x)
    model = get_peft_model(net, config("qpissa"))
    after = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), wanted)
    model.save_pretrained(tmp_path)
    again = from_pretrained(copy.deepcopy(model.unload()), tmp_path)
    assert torch.equal(again(x), after)
    again.merge_adapter()
    assert apart(again(x), after) < 1e-5
    again.unmerge_adapter()
    again.add_adapter("other", config("pissa"))
    again.base_model.set_adapter(["default", "other"])
    with pytest.raises(AdapterState, match="'default' stands on a quantised base of its own"):
        again(x)
    with pytest.raises(AdapterState, match="'default' stands on a quantised base of its own"):
        again.merge_adapter(["default", "other"])
    assert torch.equal(again.unload()(x), wanted)


def test_a_layer_that_would_be_made_worse_is_left_as_it_was_and_named(net: Net, x: Tensor) -> None:
    with torch.no_grad():
        net.up.weight.copy_(recipe(4).image(net.up.weight))  # quantising it again loses nothing
    adapter = hs.adapt(net, config("loftq"))
    up, down = adapter.layers()["up"], adapter.layers()["down"]
    assert not up.factors[1].any()
    assert down.factors[1].any()
    assert up.factors[0].any()
    assert torch.equal(up.base_weight, up.original)
    said = str(adapter.report)
    assert "up: left as plain quantisation has it" in said
    assert "down:" not in said
    trained(adapter)
    assert net(x).isfinite().all()


def test_bad_weights_are_refused_and_the_model_is_left_alone(net: Net) -> None:
    with torch.no_grad():
        net.down.weight[3, 5] = float("nan")
    before = fingerprint(net)
    for init in ("loftq", "qpissa"):
        with pytest.raises(NonFiniteWeight, match="layer 'down'"):
            hs.adapt(net, config(init))
    with pytest.raises(MetaWeight):
        hs.adapt(copy.deepcopy(net).to("meta"), config("loftq"))
    assert fingerprint(net) == before


@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"quant_type": "nf3"}, {"bits": "4"}, {"bits": 8.5}, {"blocksize": 64}]
)
def test_a_recipe_that_does_not_exist_is_refused(options: dict[str, Any], net: Net) -> None:
    with pytest.raises(BadOption):
        hs.adapt(net, config("loftq", init_options=options))


def test_options_of_a_recipe_are_no_other_starts(net: Net) -> None:
    with pytest.raises(BadOption, match="'pissa' has no option 'bits'"):
        config("pissa", init_options={"bits": 4})


def test_without_bitsandbytes_the_start_says_what_to_install(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    with pytest.raises(BadOption, match=r"pip install 'headstart\[quant\]'"):
        hs.adapt(net, config("loftq"))


# ------------------------------------------------------------------ on a model that is quantised already


@pytest.fixture
def original(net: Net, tmp_path: Path) -> Path:
    """A folder with the float weights."""
    from safetensors.torch import save_file

    folder = tmp_path / "original"
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("init", ["loftq", "qpissa"])
def test_factors_on_a_quantised_base_make_up_for_what_it_lost(
    init: str, bits: str, net: Net, original: Path, x: Tensor, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = pack(copy.deepcopy(net), BITS[bits]).train()
    base, before = model(x), fingerprint(model)
    adapter = hs.adapt(model, config(init, init_options={"original": str(original)}))
    for name, layer in adapter.layers().items():
        W = net.get_submodule(name).weight.detach().double().numpy()
        E = W - matrix.values(layer.base_layer).double().numpy()
        A, B = (factor.detach().double().numpy() for factor in layer.factors)
        assert np.linalg.norm(layer.scaling * B @ A - truncated(E, 4)) < 0.02 * np.linalg.norm(truncated(E, 4))
        assert layer.base.weight is None
        assert layer.base.recipe.bits == int(bits)
    assert apart(model(x), net(x)) < apart(base, net(x))
    trained(adapter)
    after = model(x)
    with pytest.warns(UserWarning, match=f"{bits}-bit"):
        hs.save(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(pack(copy.deepcopy(net), BITS[bits]), tmp_path / "adapter").train()
    assert apart(theirs(x), after) < 1e-5
    assert apart(hs.load(copy.deepcopy(net), tmp_path / "adapter").model(x), after) < 1e-5  # made from the recipe
    assert str(original) not in json.dumps(metadata(tmp_path / "adapter"))
    hs.remove(model)
    assert torch.equal(model(x), base)
    assert fingerprint(model) == before


def test_a_start_on_a_quantised_base_needs_the_float_weights(net: Net) -> None:
    model = pack(net, linear4bit)
    before = fingerprint(model)
    with pytest.raises(BadOption, match=r"quantised already.*init_options=\{'original'.*layer 'up', init 'loftq'"):
        hs.adapt(model, config("loftq"))
    assert fingerprint(model) == before


def test_an_original_that_does_not_fit_is_refused(net: Net, original: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = pack(copy.deepcopy(net), linear4bit)

    def refused(folder: Path, match: str, **options: Any) -> None:
        with pytest.raises(BadOption, match=match):
            hs.adapt(model, config("loftq", init_options={"original": folder, **options}))

    refused(tmp_path / "nowhere", "gives no 'up.weight'")
    save_file({"up.weight": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    refused(tmp_path, r"holds 'up.weight' as \(3, 4\), the model \(64, 128\)")
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    refused(tmp_path, "gives no 'up.weight'")
    save_file({"a.up.weight": torch.zeros(M, N), "b.up.weight": torch.zeros(M, N)}, tmp_path / "model.safetensors")
    refused(tmp_path, "2 tensors of that name")
    refused(original, "quantised already .4-bit nf4 in blocks of 64.: leave bits out", bits=8)


def test_originals_are_found_in_shards_and_under_a_prefix(net: Net, x: Tensor, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"model.up.weight": net.up.weight.detach()}, tmp_path / "a.safetensors")
    save_file({"model.down.weight": net.down.weight.detach()}, tmp_path / "b.safetensors")
    files = {"model.up.weight": "a.safetensors", "model.down.weight": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    model = pack(copy.deepcopy(net), linear4bit)
    found = hs.adapt(model, config("loftq", init_options={"original": tmp_path}))
    wanted = hs.adapt(net, config("loftq"))
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        assert apart(a, b) < 1e-6


def test_the_recipe_may_be_said_again(net: Net, original: Path) -> None:
    model = pack(net, lambda *shape: linear4bit(*shape, compress_statistics=True))
    options = {"original": original, "bits": 4, "quant_type": "nf4"}
    (recipes,) = {layer.recipe for layer in hs.adapt(model, config("loftq", init_options=options)).layers().values()}
    assert recipes == Recipe(4, "nf4", 64, nested=True)


def test_a_layer_that_the_loader_left_alone_is_left_alone(net: Net, original: Path) -> None:
    model = nn.ModuleDict(
        {"up": net.up, "down": nn.Sequential(pack(nn.Sequential(copy.deepcopy(net.down)), linear4bit)[0])}
    )
    model["down"] = model["down"][0]
    adapter = hs.adapt(model, config("loftq", init_options={"original": original}, target_modules=["up", "down"]))
    assert adapter.layers()["up"].base is None
    assert not adapter.layers()["up"].factors[1].any()
    assert adapter.layers()["down"].base is not None
    assert adapter.layers()["down"].factors[1].any()


def test_gpt2s_turned_weights_are_found(gpt2: Callable[[], Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    gpt2().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        dtype=torch.float32,
    )
    adapter = hs.adapt(model, config("loftq", init_options={"original": tmp_path}))
    remaining = [f["remaining"] for layer in adapter.report.layers for f in layer.facts]
    assert len(remaining) == 8
    assert max(remaining) < 1
    # Against the weights the wrong way round, where they are square, nothing would fit.
    lost = {name: matrix.values(layer.base_layer) for name, layer in adapter.layers().items()}
    for name, block in gpt2().named_modules():
        if name in lost:
            assert apart(lost[name], block.weight.T) < 0.3  # where blocks straddle rows, bitsandbytes' CPU kernel errs


# ------------------------------------------------------------------ files


def test_an_adapter_of_another_quantised_base_is_refused(net: Net, tmp_path: Path) -> None:
    hs.save(trained(hs.adapt(copy.deepcopy(net), config("qpissa"))), tmp_path)
    for make, match in (
        (linear4bit, "makes up for another quantised base.*headstart.files.residual.subtract"),
        (linear8bit, "made for a 4-bit nf4 in blocks of 64 base, and 'down' is 8-bit int8 by rows"),
        (lambda *shape: linear4bit(*shape, quant_type="fp4"), "'down' is 4-bit fp4"),
    ):
        model = pack(copy.deepcopy(net), make)
        before = fingerprint(model)
        with pytest.raises(WrongBase, match=match):
            hs.load(model, tmp_path)
        assert fingerprint(model) == before
    hs.load(pack(copy.deepcopy(net), linear4bit), tmp_path, strict=False)


def test_a_base_that_is_doubly_quantised_is_near_enough(net: Net, x: Tensor, tmp_path: Path) -> None:
    model = trained(hs.adapt(copy.deepcopy(net), config("loftq")))
    hs.save(model, tmp_path)
    double = pack(net, lambda *shape: linear4bit(*shape, compress_statistics=True))
    assert apart(hs.load(double, tmp_path).model(x), model(x)) < 0.02


def test_a_lost_or_damaged_second_file_is_refused(net: Net, tmp_path: Path) -> None:
    hs.save(trained(hs.adapt(copy.deepcopy(net), config("qpissa"))), tmp_path)
    file = tmp_path / "quantized_base.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-50], b"", None):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        with pytest.raises((KeyMismatch, hs.errors.AdapterFormatError), match="quantized_base"):
            hs.load(copy.deepcopy(net), tmp_path)


def test_a_truncated_adapter_keeps_its_base(net: Net, x: Tensor, tmp_path: Path) -> None:
    model = trained(hs.adapt(copy.deepcopy(net), config("qpissa")))
    dropped = hs.save(model, tmp_path, rank=3)
    assert 0 < max(dropped.values()) < 0.6
    small = hs.load(copy.deepcopy(net), tmp_path)
    assert all(
        torch.equal(layer.base_weight, model.get_submodule(n).base_weight) for n, layer in small.layers().items()
    )


def test_subtracting_leaves_other_models_alone(net: Net, tmp_path: Path) -> None:
    hs.save(trained(hs.adapt(copy.deepcopy(net), config("loftq"))), tmp_path)
    before = fingerprint(net)
    assert fingerprint(subtract(net, tmp_path)) == before  # nothing was taken from it
    hs.save(trained(hs.adapt(copy.deepcopy(net), config("qpissa"))), tmp_path)
    other = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(hs.errors.NoTarget):
        subtract(other, tmp_path)


def test_the_report_tells_what_remains(net: Net) -> None:
    report: InitReport = hs.adapt(net, config("qpissa", init_options={"num_iter": 2})).report
    facts = json.loads(report.to_json())["layers"][0]["facts"][0]
    assert 0 < facts["remaining"] < 1
    assert facts["step"] in (1, 2)


# ------------------------------------------------------------------ torchao


def torchao(kind: str, model: nn.Module) -> nn.Module:
    pytest.importorskip("torchao", reason="these weights need torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    made = {"int8": Int8WeightOnlyConfig(), "int8 by groups": Int8WeightOnlyConfig(granularity=PerGroup(32))}
    made["int4"] = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(model, made[kind])
    return model


RECIPES = {"int8": Recipe(8, "int8", 0), "int8 by groups": Recipe(8, "int8", 32), "int4": Recipe(4, "int4", 32)}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", RECIPES)
def test_a_torchao_model_is_adapted_merged_and_saved(
    kind: str, dora: bool, net: Net, x: Tensor, tmp_path: Path
) -> None:
    model = torchao(kind, copy.deepcopy(net))
    wanted = model(x)
    assert quantized.recipe_of(model.up.weight) == RECIPES[kind]
    assert torch.equal(matrix.values(model.up), model.up.weight.dequantize())
    adapter = hs.adapt(model, config("pissa", use_dora=dora))
    assert apart(model(x), wanted) < 2e-7
    after = trained(adapter)(x)
    hs.save(model, tmp_path)
    assert torch.equal(hs.load(torchao(kind, copy.deepcopy(net)), tmp_path).model(x), after)
    originals = {name: layer.original_values() for name, layer in adapter.layers().items()}
    merged = {name: layer.merged_weight().detach() for name, layer in adapter.layers().items()}
    report = hs.merge(model, reversible=True)
    for name, new in merged.items():
        lone = nn.Sequential(nn.Linear(*reversed(new.shape), bias=False))
        lone[0].weight.data = new.clone()
        image = torchao(kind, lone)[0].weight.dequantize()
        assert report.lost[name] == pytest.approx(
            float((image - new).norm() / (new - originals[name]).norm()), rel=1e-4
        )
    assert type(adapter.layers()["up"].weight_parameter) is type(adapter.layers()["up"].original)
    hs.unmerge(model)
    assert torch.equal(model(x), after)
    assert torch.equal(hs.remove(model)(x), wanted)


def test_a_torchao_weight_that_only_multiplies_is_read_by_its_products(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torchao("int8", net)
    wanted = model.up.weight.dequantize()
    monkeypatch.delattr(type(model.up.weight), "dequantize")
    assert apart(matrix.values(model.up), wanted) < 1e-6


def test_a_torchao_weight_that_cannot_be_made_again_is_not_merged(net: Net, x: Tensor) -> None:
    pytest.importorskip("torchao", reason="these weights need torchao")
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.quant_primitives import MappingType

    quantize_(net, IntxWeightOnlyConfig(weight_dtype=torch.int4, mapping_type=MappingType.ASYMMETRIC))
    after = trained(hs.adapt(net, config("pissa")))(x)
    with pytest.raises(UnsupportedLayer, match="cannot be quantised anew: load the adapter on the float model"):
        hs.merge(net)
    assert torch.equal(net(x), after)


# ------------------------------------------------------------------ blocks that bitsandbytes turns


def turn(model: nn.Module) -> nn.Module:
    """As bitsandbytes leaves a model that was evaluated on a CPU with bf16 products."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = True
            layer.weight.data, layer.quant_state = _convert_weight_packed_for_cpu(layer.weight.data, layer.quant_state)
    return model


def held(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    layers = [layer for layer in model.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    return [(layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()) for layer in layers]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("native", [True, False])
def test_turned_blocks_are_turned_back_for_as_long_as_they_are_adapted(
    native: bool, nested: bool, net: Net, x: Tensor
) -> None:
    model = turn(pack(net, lambda *a, **k: linear4bit(*a, **k, compress_statistics=nested)))
    before = held(model)
    up, down = (quantized.values(layer.weight, layer) for layer in (model.up, model.down))
    chosen = config("pissa", target_modules=["up"])  # bitsandbytes' product with `down` would pass no gradient on
    adapted = hs.adapt(model, chosen).model if native else headstart.peft.get_peft_model(model, chosen)
    x.requires_grad_()
    y = adapted(x)
    wanted = torch.tanh(x @ up.T + model.up.bias) @ down.T
    torch.testing.assert_close(y, wanted)
    y.square().sum().backward()
    found, x.grad = x.grad, None
    wanted.square().sum().backward()
    torch.testing.assert_close(found, x.grad)
    hs.remove(adapted) if native else adapted.unload()
    assert all(layer.support_avx512bf16_for_cpu for layer in (model.up, model.down))
    for (codes, scales), (known, rounded) in zip(held(turn(model)), before, strict=True):
        assert torch.equal(codes, known)
        assert torch.equal(scales, rounded)


def test_a_4bit_layer_whose_weight_is_no_4bit_one_is_left_alone(net: Net, x: Tensor) -> None:
    """As FSDP and whoever dequantises by hand leave them."""
    model = turn(pack(net, linear4bit))
    model.down._parameters["weight"] = nn.Parameter(torch.zeros(N, M), requires_grad=False)
    hs.adapt(model, config("pissa", target_modules=["up"]))
    assert not quantized._is_turned(model.up.weight.quant_state)
    hs.remove(model)
    assert model.up.support_avx512bf16_for_cpu
    assert model.down.support_avx512bf16_for_cpu


def test_a_calibration_of_turned_blocks_sees_the_gradients_through_them(net: Net, x: Tensor) -> None:
    model = turn(pack(net, linear4bit))
    up, down = (quantized.values(layer.weight, layer) for layer in (model.up, model.down))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()  # type: ignore[no-any-return]

    found = hs.calibrate(model, config("lora_one", target_modules=["up"]), [x], loss=loss, dense=True)
    weight = up.clone().requires_grad_()
    (wanted,) = torch.autograd.grad((torch.tanh(x @ weight.T + model.up.bias) @ down.T).square().mean(), [weight])
    assert apart(found.layers["up"]["gradient"][0].dense(), wanted) < 1e-5
    assert model.up.support_avx512bf16_for_cpu


def test_training_goes_on_after_an_evaluation(net: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs with bf16 products, where bitsandbytes turns the blocks itself."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no bf16 products")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", has_avx512bf16)
    model = pack(net, linear4bit)
    adapter = hs.adapt(model, config("orthogonal", target_modules=["up"]))
    gradients = []
    for _ in range(2):
        model.train()(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in adapter.parameters()])  # type: ignore[union-attr]
        for parameter in adapter.parameters():
            parameter.grad = None
        with torch.no_grad():
            model.eval()(x)
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)
        assert bool(first.any())
