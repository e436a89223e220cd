"""Layers that are used in a way of their own: with a forward that scales, offsets, pads, normalises, or never called.

What holds for them is what holds everywhere: the output is that of the same model with W + s·B·A in its weight.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import headstart as hs
from headstart.errors import AdapterState, CalibrationError, UnsupportedLayer
from headstart.lora import matrix
from headstart.lora.layers import LoraLayer, lora_layers
from headstart.lora.layers.read import is_read
from headstart.testing import fingerprint


class Scaled(nn.Embedding):
    """As BART's: the scale is a number."""

    embed_scale: float

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class Positions(nn.Embedding):
    """As BART's and OPT's: positions are counted here, from an offset."""

    def forward(self, input: Tensor, past: int = 0) -> Tensor:
        return super().forward(torch.arange(past, past + input.shape[1]) + 2)


class Standardized(nn.Conv2d):
    """As BiT's: the weight is normalised, and the padding is found in the forward."""

    def forward(self, input: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(F.pad(input, (1, 1, 1, 1)), weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Router(nn.Linear):
    """As Llama 4's: scores, and what they were made from."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        scores = super().forward(input)
        return scores.softmax(-1), scores


class Cosine(nn.Linear):
    """Scores by angle: rows of the right shape, and no product with the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class Widened(nn.Linear):
    """As Idefics': columns of its own beside."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return torch.cat([y, y.square()], -1)


class Gained(nn.Linear):
    """A gain that begins at one, as a plain product would."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.gain = nn.Parameter(torch.ones(out_features))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.gain


class Product(nn.Linear):
    """As Falcon's: a forward of its own that gives what torch's gives."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class DropConnect(nn.Linear):
    """Drops weights, in training alone."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, F.dropout(self.weight, 0.2, self.training), self.bias)


class Uncalled(nn.Module):
    """As WavLM's attention and Mamba's mixer: the weights of layers are read."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.convolution = nn.Linear(4, 6), nn.Conv1d(6, 6, 3, groups=2)

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(input, self.layer.weight, self.layer.bias)
        return F.conv1d(y.mT, self.convolution.weight, self.convolution.bias, groups=2)


class Model(nn.Module):
    def __init__(self, layer: nn.Module, **given: Any) -> None:
        super().__init__()
        self.layer, self.given = layer, given

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x, **self.given)
        return y[0] * y[1] if isinstance(y, tuple) else y


def scaled() -> nn.Module:
    layer = Scaled(11, 6, padding_idx=1)
    layer.embed_scale = 7.5
    return Model(layer)


def gained(gain: float) -> nn.Module:
    layer = Gained(4, 3)
    layer.gain.data.fill_(gain)
    return Model(layer)


IDS, ROWS, IMAGES = torch.randint(0, 11, (2, 5)), torch.randn(2, 5, 4), torch.randn(2, 4, 6, 6)
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "scaled": (scaled, IDS, ["layer"]),
    "positions": (lambda: Model(Positions(11, 6), past=3), IDS, ["layer"]),
    "standardized": (lambda: Model(Standardized(4, 6, 3, groups=2)), IMAGES, ["layer"]),
    "router": (lambda: Model(Router(4, 3)), ROWS, ["layer"]),
    "cosine": (lambda: Model(Cosine(4, 3)), ROWS, ["layer"]),
    "widened": (lambda: Model(Widened(4, 3)), ROWS, ["layer"]),
    "gained": (lambda: gained(3.0), ROWS, ["layer"]),
    "product": (lambda: Model(Product(4, 3)), ROWS, ["layer"]),
    "uncalled": (Uncalled, ROWS, ["layer", "convolution"]),
}


def dense(layer: LoraLayer) -> Tensor:
    """W + s·(B·A − B₀·A₀) in float64, by the blocks of the weight; under DoRA with rows of the norms m."""
    weight = layer.original_values().double().clone()
    anchors = [None] * len(layer.layout.blocks(weight)) if layer.anchor is None else layer.layout.unpack(*layer.anchor)
    pairs = layer.layout.unpack(*(factor.detach() for factor in layer.factors))
    blocks = layer.layout.blocks(weight)
    for block, (A, B), anchor in zip(blocks, pairs, anchors, strict=True):
        change = B.double() @ A.double()
        block += layer.scaling * (change if anchor is None else change - anchor[1].double() @ anchor[0].double())
    if layer.magnitude is not None:
        gains = (layer.magnitude.detach().double() / torch.cat([block.norm(dim=1) for block in blocks])).split(
            [len(block) for block in blocks]
        )
        for block, gain in zip(blocks, gains, strict=True):
            block *= gain[:, None]
    return weight.float()


@pytest.mark.filterwarnings("ignore:PEFT ignores")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("case", CASES)
def test_the_output_is_that_of_the_changed_weight(case: str, init: str, dora: bool, tmp_path: Path) -> None:
    make, x, names = CASES[case]
    base = make().eval()
    model = copy.deepcopy(base)
    hs.adapt(model, hs.LoraConfig(r=2, init_lora_weights=init, use_dora=dora, target_modules=names))
    torch.testing.assert_close(model(x), base(x))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    wanted = copy.deepcopy(base)
    for name, layer in lora_layers(model):
        wanted.get_submodule(name).weight = nn.Parameter(dense(layer))
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    model.eval()
    assert not torch.allclose(model(x), base(x), rtol=1e-2)
    torch.testing.assert_close(model(x), wanted(x), rtol=1e-4, atol=1e-4)
    hs.save(model, tmp_path)
    again = copy.deepcopy(base)
    hs.load(again, tmp_path)
    torch.testing.assert_close(again(x), wanted(x), rtol=1e-4, atol=1e-4)
    hs.merge(model)
    torch.testing.assert_close(model(x), wanted(x), rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_called_answers_with_its_own_frozen_weight() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.to(self.layer.weight.dtype))

    model = Called()
    hs.adapt(model, hs.LoraConfig(r=2, init_lora_weights="orthogonal"))
    assert model.layer.weight is model.layer.base_layer.weight


@pytest.mark.parametrize("layer", [Standardized(4, 6, 3), Cosine(4, 3)])
def test_dropout_is_refused_where_it_has_no_place(layer: nn.Module) -> None:
    model = Model(layer)
    with pytest.raises(UnsupportedLayer, match="lora_dropout=0"):
        hs.adapt(model, hs.LoraConfig(r=2, lora_dropout=0.1, target_modules=["layer"]))
    assert model.layer is layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_is_known_for_a_product_by_what_it_gives(dtype: torch.dtype, training: bool) -> None:
    """A product keeps its branch beside it, with dropout and a sight of its inputs."""
    state = torch.get_rng_state()
    for layer, expected in (
        (Product(64, 48), False),
        (nn.Linear(64, 48), False),
        (Cosine(64, 48), True),
        (Widened(64, 48), True),
        (Router(64, 48), True),
        (gained(1.0).layer, True),
        (DropConnect(64, 48), True),
    ):
        torch.set_rng_state(state)
        assert matrix.layout(layer.to(dtype).train(training)).own_way == expected, layer
        assert layer.training == training
        assert torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):
        assert matrix.layout(Widened(64, 48)).own_way
        assert not matrix.layout(Product(64, 48)).own_way


@pytest.mark.parametrize("kind", [Product, Router, Cosine])
def test_the_inputs_of_a_linear_are_seen_whatever_it_makes_of_them(kind: type[nn.Linear]) -> None:
    model, inputs = Model(kind(4, 3)), torch.randn(6, 4)
    weight = model.layer.weight
    wanted = torch.autograd.grad(model(inputs).square().mean(), [weight])[0]
    configs = [hs.LoraConfig(r=2, init_lora_weights=init, target_modules=["layer"]) for init in ("eva", "lora_one")]
    found = hs.calibrate(model, configs, [inputs], loss=lambda m, x: m(x).square().mean(), dense=True).layers["layer"]
    torch.testing.assert_close(found["inputs"][0].dense().float(), inputs.T @ inputs / 6)
    torch.testing.assert_close(found["gradient"][0].dense(), wanted)
    assert model.layer.weight is weight


def test_inputs_alone_are_asked_of_a_router_beside_layers_whose_gradients_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Model(Router(4, 3)))
    configs = [
        hs.LoraConfig(r=2, init_lora_weights="eva", target_modules=["layer"]),
        hs.LoraConfig(r=2, init_lora_weights="lora_one", target_modules=["0"]),
    ]
    found = hs.calibrate(model, configs, [ROWS], loss=lambda m, x: m(x).square().mean())
    assert {name: set(kinds) for name, kinds in found.layers.items()} == {"0": {"gradient"}, "1.layer": {"inputs"}}


def test_what_a_router_puts_out_is_no_output_of_its_weight() -> None:
    config = hs.LoraConfig(r=2, init_lora_weights="kfac", target_modules=["layer"])
    with pytest.raises(UnsupportedLayer, match="exclude it"):
        hs.calibrate(Model(Router(4, 3)), config, [ROWS], loss=lambda m, x: m(x).square().mean())


def test_a_linear_that_is_given_other_rows_than_it_multiplies_is_named() -> None:
    class Halved(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input[..., ::2])

    config = hs.LoraConfig(r=2, init_lora_weights="eva", target_modules=["layer"])
    with pytest.raises(CalibrationError, match="given rows of 8, and multiplies 4: exclude it"):
        hs.calibrate(Model(Halved(4, 3)), config, [torch.randn(5, 8)])


def test_a_disabled_model_reads_the_original_of_what_trains_in_full() -> None:
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():  # torch's fast path, which reads the weights
        before = encoder(x)
        adapter = hs.adapt(encoder, hs.LoraConfig(r=2, target_modules=["1"], modules_to_save=["norm1"]))
        for parameter in adapter.parameters():
            parameter.add_(1)
        assert not torch.allclose(encoder(x), before)
        with adapter.disabled():
            assert torch.equal(encoder(x), before)


def test_a_list_that_is_never_called_cannot_train_in_full() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "several": nn.ModuleList([nn.Linear(4, 4)])})
    with pytest.raises(UnsupportedLayer, match="'several' is a list that is never called"):
        hs.adapt(model, hs.LoraConfig(r=2, target_modules=["first"], modules_to_save=["several"]))


def test_what_lies_in_a_module_that_trains_in_full_trains_with_it(tmp_path: Path) -> None:
    head = nn.Sequential()
    head.add_module("head", nn.Linear(4, 2))
    base = nn.Sequential()
    base.add_module("body", nn.Linear(4, 4))
    base.add_module("head", head)
    model, x = copy.deepcopy(base), torch.randn(3, 4)
    adapter = hs.adapt(model, hs.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.5)
    hs.save(model, tmp_path)
    hs.load(base, tmp_path)
    torch.testing.assert_close(base(x), model(x))


def test_a_causal_hint_without_a_mask_is_refused_as_by_torch() -> None:
    model, x = nn.Sequential(nn.MultiheadAttention(8, 2)), torch.randn(3, 2, 8)
    hs.adapt(model, hs.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        model[0](x, x, x, is_causal=True)


def test_gradients_of_single_samples_are_those_of_a_loop() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    adapter = hs.adapt(model, hs.LoraConfig(r=2, init_lora_weights="orthogonal"))
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (row,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x)
    for i, row in enumerate(x):
        wanted = torch.autograd.grad(model(row).square().sum(), adapter.parameters())
        for gradient, name in zip(wanted, trained, strict=True):
            torch.testing.assert_close(found[name][i], gradient)


def test_saving_tells_where_peft_takes_other_norms(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    hs.adapt(model, hs.LoraConfig(r=2, use_dora=True, target_modules=["0"]))
    with pytest.warns(UserWarning, match="groups under DoRA"):
        hs.save(model, tmp_path)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.attention = nn.Embedding(11, 8), nn.MultiheadAttention(8, 2)
        self.first, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        return self.head(self.first(h + self.attention(h, h, h, need_weights=False)[0]).relu())


def several() -> nn.Module:
    """Adapted, and trained a little."""
    torch.manual_seed(0)
    model = Several()
    names = ["table", "attention", "first"]
    config = hs.LoraConfig(r=2, target_modules=names, init_lora_weights="pissa", modules_to_save=["head"], bias="all")
    with torch.no_grad():
        for parameter in hs.adapt(model, config).parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def interrupted_at(moment: int, call: Callable[[], object]) -> bool:
    """Whether a call was interrupted, at the moment-th line of a merge that it runs."""
    left = itertools.count(1)

    def on_line(frame: FrameType, event: str, _: object) -> Any:
        if event == "line" and next(left) == moment:
            sys.settrace(None)
            raise KeyboardInterrupt
        return on_line

    def on_call(frame: FrameType, event: str, _: object) -> Any:
        place = frame.f_code.co_filename
        return (
            on_line if place.endswith(("lora/merge.py", "lora/adapt.py", "layers/layer.py", "quantized.py")) else None
        )

    tracer = sys.gettrace()
    try:
        sys.settrace(on_call)
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(tracer)
    return False


@pytest.mark.parametrize("reversible", [True, False])
def test_an_interrupt_at_any_line_of_a_merge_leaves_the_model_as_it_was(reversible: bool) -> None:
    model = several()
    before, bits = model(IDS), fingerprint(model)
    for moment in itertools.count(1, 7):
        if not interrupted_at(moment, lambda: hs.merge(model, reversible=reversible)):
            break
        if all(layer.merged for _, layer in lora_layers(model)):  # all was done
            break
        assert torch.equal(model(IDS), before)
        assert fingerprint(model) == bits
    assert moment > 100


def test_an_interrupt_at_any_line_of_an_unmerge_loses_no_weight() -> None:
    adapted = several()
    before = adapted(IDS)
    hs.merge(adapted, reversible=True)
    for moment in itertools.count(1):
        model = copy.deepcopy(adapted)
        if not interrupted_at(moment, lambda model=model: hs.unmerge(model)):
            break
        with contextlib.suppress(AdapterState):  # where all was done
            hs.unmerge(model)
        assert torch.equal(model(IDS), before)
    assert moment > 20


def test_a_merge_in_two_steps_gives_the_flags_back_too() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    hs.adapt(model, hs.LoraConfig(r=2))
    hs.merge(model, reversible=True)
    hs.merge(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_pefts_copies_of_a_tied_bias_are_one(tmp_path: Path) -> None:
    import peft
    from transformers import BertConfig, BertForMaskedLM

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    base = BertForMaskedLM(BertConfig(vocab_size=20, **shape)).eval()
    config = peft.LoraConfig(r=2, target_modules=["query"], bias="all", init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    hs.load(base, tmp_path)
    ids = torch.randint(0, 20, (2, 5))
    torch.testing.assert_close(base(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "normal", "random", "init_ab", "orthogonal"])
def test_a_default_dtype_changes_no_start(init: str, dtype: torch.dtype) -> None:
    base = nn.Sequential(nn.Linear(6, 4), nn.Embedding(5, 4))
    found = []
    for default in (torch.float32, dtype):
        model = copy.deepcopy(base)
        torch.set_default_dtype(default)
        try:
            hs.adapt(model, hs.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=init))
        finally:
            torch.set_default_dtype(torch.float32)
        found.append([(p.dtype, p) for p in model.parameters()])
    for (kind, wanted), (other, parameter) in zip(*found, strict=True):
        assert kind == other == torch.float32
        assert torch.equal(wanted, parameter)


def test_trained_biases_are_saved_from_a_disabled_model(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 3))
    model, x = copy.deepcopy(base), torch.randn(2, 4)
    adapter = hs.adapt(model, hs.LoraConfig(r=2, bias="lora_only"))
    with torch.no_grad():
        model[0].bias.add_(1)
    with adapter.disabled(), adapter.disabled():
        hs.save(model, tmp_path)
        assert torch.equal(model(x), base(x))
    hs.load(base, tmp_path)
    assert torch.equal(base(x), model(x))


def test_lazy_layers_are_refused_until_they_have_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(AdapterState, match="run one batch"):
        hs.adapt(model, hs.LoraConfig(r=2))
    model(torch.randn(2, 3))
    hs.adapt(model, hs.LoraConfig(r=2))


def test_a_linear_takes_its_input_by_name_as_torch_does() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    hs.adapt(model, hs.LoraConfig(r=2, init_lora_weights="orthogonal"))
    assert torch.equal(model[0](input=x), model[0](x))


@pytest.mark.parametrize("name", ["positions", "standardized", "router", "cosine", "widened"])
def test_a_gradient_start_sees_the_gradient_of_the_weight_and_not_of_what_the_forward_made_of_it(name: str) -> None:
    make, inputs, targets = CASES[name]
    model = make()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - 0.5).square().mean()

    config = hs.LoraConfig(r=2, target_modules=targets, init_lora_weights="lora_one")
    found = hs.calibrate(model, config, [inputs], loss=loss, dense=True)
    assert all(not p.requires_grad or p.grad is None for p in model.parameters())
    weight = model.get_parameter("layer.weight")
    (wanted,) = torch.autograd.grad(loss(model, inputs), [weight])
    layout = next(iter(hs.adapt(model, config, calibration=found).layers().values())).layout
    for statistic, block in zip(found.layers["layer"]["gradient"], layout.blocks(wanted), strict=True):
        assert torch.allclose(statistic.dense(), block, atol=1e-6 * float(wanted.abs().max()))


class Tied(nn.Module):
    """A lookup with a forward of its own, whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = Guessed(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.tokens(ids).tanh())
        return y


class Guessed(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


def test_each_use_of_a_tied_weight_has_its_own_gradient() -> None:
    """A change of one layer's weight is no change of the other's."""
    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(11).reshape(1, 11)
    untied = copy.deepcopy(model)
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    weight = model.tokens.weight

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids)[0], ids[0].flip(0))

    config = hs.LoraConfig(r=2, init_lora_weights="lora_one", target_modules=["tokens", "head"])
    found = hs.calibrate(model, config, [ids], loss=loss, dense=True).layers
    loss(untied, ids).backward()
    for name, wanted in (("tokens", untied.tokens.weight.grad), ("head", untied.head.weight.grad)):
        assert wanted is not None
        gradient = found[name]["gradient"][0].dense()
        torch.testing.assert_close(gradient.T if name == "tokens" else gradient, wanted)
    assert model.tokens.weight is model.head.weight is weight
    assert weight.grad is None


class Guarded(nn.Module):
    """As T5's: the layer is called, and its weight is asked for what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(self.layer.weight, Tensor) and self.layer.weight is not None:
            input = input.to(self.layer.weight.dtype)
        return self.layer(input)


class Wrapped(Uncalled):
    """The weights are read within a function, a property and a static method."""

    @property
    def kernel(self) -> Tensor:
        return self.convolution.weight

    def forward(self, input: Tensor) -> Tensor:
        y = (lambda x: F.linear(x, self.layer.weight, self.layer.bias))(input)
        return F.conv1d(y.mT, self.kernel, self.convolution.bias, groups=2)


def test_a_weight_counts_as_read_where_its_values_are() -> None:
    for model, leaf, expected in (
        (Guarded(), "layer", False),
        (Wrapped(), "layer", True),
        (Wrapped(), "convolution", True),
        (Uncalled(), "layer", True),
        (Uncalled(), "convolution", True),
        (Model(nn.Linear(4, 6)), "layer", False),
    ):
        assert is_read(model.get_submodule(leaf), [(model, leaf)]) == expected, (model, leaf)


def test_a_decorator_that_is_no_function_is_passed_over() -> None:
    class Decorated(Guarded):
        @functools.wraps(functools.partial(print))
        def forward(self, input: Tensor) -> Tensor:
            return self.layer(input)

    model = Decorated()
    hs.adapt(model, hs.LoraConfig(r=2, target_modules=["layer"]))
    assert model(ROWS).shape == (2, 5, 6)


def test_gradients_of_what_a_model_reads_are_those_of_the_weight() -> None:
    model = Uncalled()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - 0.5).square().mean()

    config = hs.LoraConfig(r=2, target_modules=["layer"], init_lora_weights="lora_one")
    found = hs.calibrate(model, config, [ROWS], loss=loss, dense=True).layers["layer"]["gradient"][0]
    (wanted,) = torch.autograd.grad(loss(model, ROWS), [model.layer.weight])
    assert torch.allclose(found.dense(), wanted, atol=1e-6 * float(wanted.abs().max()))


def test_a_gradient_start_refuses_a_layer_that_a_hook_makes_put_out_more_than_rows() -> None:
    model = Model(nn.Linear(4, 3))
    model.layer.register_forward_hook(lambda module, args, y: (y, y))
    config = hs.LoraConfig(r=2, target_modules=["layer"], init_lora_weights="lora_one")
    with pytest.raises(CalibrationError, match="'layer' puts out a tuple"):
        hs.calibrate(model, config, [ROWS], loss=lambda m, x: m(x).square().mean())


def test_a_scaled_lookup_that_has_rows_of_its_own_is_not_only_scaled() -> None:
    """As T5Gemma2's, which puts a parameter into the rows of one token."""

    class Replaced(Scaled):
        def __init__(self) -> None:
            super().__init__(11, 6)
            self.embed_scale, self.own = 3.0, nn.Parameter(torch.full((6,), 9.0))

        def forward(self, input: Tensor) -> Tensor:
            return torch.where((input == 2)[..., None], self.own, super().forward(input))

    model = Model(Replaced())
    hs.adapt(model, hs.LoraConfig(r=2, target_modules=["layer"], init_lora_weights="random"))
    y = model(ids := torch.arange(11)[None]).detach()
    assert torch.equal(y[0, 2], torch.full((6,), 9.0))
    hs.merge(model)
    torch.testing.assert_close(model(ids), y)
