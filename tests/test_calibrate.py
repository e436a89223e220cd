"""The pass over the data, against second moments and gradients taken the plain way in float64."""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import socket
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import headstart as hs
from headstart.errors import (
    AdapterState,
    BadOption,
    CalibrationError,
    FileError,
    HeadstartError,
    MetaWeight,
    MissingStatistic,
    NoSignal,
)
from headstart.inits.strategy import Factors, _registry, register
from headstart.lora import batches as reading
from headstart.lora.targets import targets
from headstart.statistics import GradientSpectrum, Moments, Squares

WIDTH = 12


@pytest.fixture(autouse=True)
def _probes() -> Iterator[None]:
    """Strategies that ask for one statistic each, and start nothing."""

    def see_inputs(inputs: Any, shape: tuple[int, int], rank: int) -> Factors:
        return Factors(torch.zeros(rank, shape[1]), torch.zeros(shape[0], rank))

    def see_gradient(gradient: Any, shape: tuple[int, int], rank: int) -> Factors:
        return Factors(torch.zeros(rank, shape[1]), torch.zeros(shape[0], rank))

    probes = {"see_inputs": see_inputs, "see_gradient": see_gradient, "see_all": _see_all}
    for name, probe in probes.items():
        register(name, paper="none", fact="for a test")(probe)
    yield
    for name in probes:
        del _registry[name]


def _see_all(
    inputs: Any, preserved: Any, gradient: Any, output_gradients: Any, output_squares: Any, shape: Any, rank: int
) -> Factors:
    return Factors(torch.zeros(rank, shape[1]), torch.zeros(shape[0], rank))


class Network(nn.Module):
    """Two projections that share an input, one that is used twice, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
        self.twice = nn.Linear(WIDTH, WIDTH, bias=False)
        self.idle = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> dict[str, Any]:
        h = F.relu(self.twice(x), inplace=True)
        h = self.drop(self.twice(torch.tanh(h) + x))
        y = self.q(h).sum(-1) + self.k(h).square().sum(-1)
        if labels is None:
            return {"logits": y}
        return {"loss": F.mse_loss(y[labels != -100], labels[labels != -100].float())}


def batches(count: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    """Of different lengths, with padding and unlabelled tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        x = torch.randn(3, 5 + i, WIDTH, generator=generator)
        labels = torch.randint(0, 4, (3, 5 + i), generator=generator)
        labels[0, : 2 + i] = -100
        found.append({"x": x, "labels": labels})
    return found


def config(init: str, **changes: Any) -> hs.LoraConfig:
    return hs.LoraConfig(**{"r": 3, "target_modules": ["q", "k", "twice"], "init_lora_weights": init, **changes})


def dense(model: Network, data: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean gradients over tokens, and second moments of what counts, all at once and in float64."""
    model = copy.deepcopy(model).double().eval()
    rows: dict[str, list[Tensor]] = {"q": [], "k": [], "twice": []}
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in data:
        keep = (batch["labels"] != -100).flatten()
        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda _, args, __, name=name: rows[name].append(args[0].detach().flatten(0, 1)[keep])  # noqa: B023
            )
            for name in rows
        ]
        total = total + model(batch["x"].double(), batch["labels"])["loss"] * int(keep.sum())
        count += int(keep.sum())
        for hook in hooks:
            hook.remove()
    (total / count).backward()
    gradients = {name: model.get_submodule(name).weight.grad for name in rows}
    moments = {name: torch.cat(X).T @ torch.cat(X) / len(torch.cat(X)) for name, X in rows.items()}
    return gradients, moments


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    return float((found.double() - wanted).norm()) <= tolerance * float(wanted.norm())


@pytest.mark.parametrize("whole", [True, False])
def test_moments_and_gradients_are_those_of_the_plain_way(whole: bool) -> None:
    model, data = Network(), batches()
    gradients, moments = dense(model, data)
    found = hs.calibrate(model, [config("see_inputs", r=8), config("see_gradient", r=8)], data, dense=whole)
    for name in gradients:
        assert close(found.layers[name]["gradient"][0].dense(), gradients[name])
        assert close(found.layers[name]["inputs"][0].dense(), moments[name])
    assert found.tokens == sum(int((b["labels"] != -100).sum()) for b in data)


def test_layers_that_see_the_same_tensor_share_its_moments() -> None:
    found = hs.calibrate(Network(), config("see_inputs"), batches()).layers
    assert found["q"]["inputs"][0] is found["k"]["inputs"][0]
    assert found["q"]["inputs"][0] is not found["twice"]["inputs"][0]
    assert found["twice"]["inputs"][0].count == 2 * found["q"]["inputs"][0].count


def test_inputs_are_shared_only_where_they_are_read_alike() -> None:
    """Two kernels on one image, and projections of one vector in different numbers of parts."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
            self.same = nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.wide(x), self.narrow(x), self.same(x)], dim=1)

    chosen = hs.LoraConfig(r=2, target_modules=["wide", "narrow", "same"], init_lora_weights="see_inputs")
    found = hs.calibrate(Branches(), chosen, [torch.randn(2, 3, 5, 5)]).layers
    assert found["wide"]["inputs"][0] is found["same"]["inputs"][0]
    assert (found["wide"]["inputs"][0].features, found["narrow"]["inputs"][0].features) == (27, 3)

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.gate = nn.Linear(4, 12), nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.gate(x), self.qkv(x)], dim=1)

    parts = {"qkv": [True, True, True], "gate": [True, True]}
    chosen = hs.LoraConfig(r=2, target_modules=["qkv", "gate"], parts=parts, init_lora_weights="see_inputs")
    x = torch.randn(6, 4)
    layers = hs.calibrate(Fused(), chosen, [x]).layers
    assert [len(layers[name]["inputs"]) for name in ("qkv", "gate")] == [3, 2]
    for statistic in (*layers["qkv"]["inputs"], *layers["gate"]["inputs"]):
        assert close(statistic.dense(), (x.T @ x / 6).double())


def test_output_gradients_are_those_of_each_tokens_loss() -> None:
    model, data = Network(), batches(1)
    found = hs.calibrate(model, config("see_all"), data, preserve=batches(2, seed=1)).layers["q"]
    copied, seen = copy.deepcopy(model).double().eval(), []
    copied.q.register_full_backward_hook(lambda _, __, dy: seen.append(dy[0].flatten(0, 1)))
    keep = (data[0]["labels"] != -100).flatten()
    (copied(data[0]["x"].double(), data[0]["labels"])["loss"] * int(keep.sum())).backward()
    D = seen[0][keep]
    assert close(found["output_gradients"][0].dense(), D.T @ D / len(D))
    assert close(found["output_squares"][0].mean, D.square().mean(0))
    assert found["preserved"][0].count == sum(int((b["labels"] != -100).sum()) for b in batches(2, seed=1))


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    "2d, groups, dilation": (nn.Conv2d(4, 6, (3, 2), dilation=2, padding=2, groups=2), (2, 4, 9, 7)),
    "2d, reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "2d, same": (nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 6, 6)),
    "3d": (nn.Conv3d(2, 4, 2, stride=2), (2, 2, 4, 4, 6)),
    "embedding": (nn.Embedding(11, 6), (2, 5)),
    "linear": (nn.Linear(4, 6), (3, 2, 4)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_rows_of_every_kind_give_its_gradient(kind: str) -> None:
    layer, shape = CONVOLUTIONS[kind]
    model = nn.Sequential(copy.deepcopy(layer))
    x = torch.randint(0, 11, shape) if kind == "embedding" else torch.randn(shape)
    aim = torch.randn_like(model(x))
    found = hs.calibrate(
        model,
        hs.LoraConfig(r=2, target_modules=["0"], init_lora_weights="see_gradient"),
        [x],
        loss=lambda model, batch: ((model(batch) * aim).sum(), 1.0),
        dense=True,
    )
    (model(x) * aim).sum().backward()
    (target,) = targets(model, hs.LoraConfig(r=2, target_modules=["0"]))
    blocks = target.layout.blocks(model[0].weight.grad)
    for statistic, block in zip(found.layers["0"]["gradient"], blocks, strict=True):
        assert close(statistic.dense(), block.double())


def test_an_attentions_gradient_is_taken_at_its_weight() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, aim = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    chosen = hs.LoraConfig(r=2, target_modules=["self_attn", "linear1"], init_lora_weights="see_gradient")
    found = hs.calibrate(model, chosen, [x], loss=lambda m, b: ((m(b) * aim).sum(), 1.0), dense=True)
    (model(x) * aim).sum().backward()
    attention: Any = model.self_attn
    assert close(found.layers["self_attn"]["gradient"][0].dense(), attention.in_proj_weight.grad.double())
    assert close(found.layers["self_attn.out_proj"]["gradient"][0].dense(), attention.out_proj.weight.grad.double())


def state(model: nn.Module) -> dict[str, Any]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": hooks,
        "random": torch.random.get_rng_state(),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def prepared() -> Network:
    """With a history: gradients, mixed flags and modes."""
    model = Network().train()
    model(**batches(1)[0])["loss"].backward()
    model.k.eval()
    model.q.weight.requires_grad_(False)
    return model


def broken(batch: int, kind: str) -> Iterator[dict[str, Tensor]]:
    for i, found in enumerate(batches(6)):
        if i == batch and kind == "raises":
            raise OSError("the disk is gone")
        if i == batch and kind == "interrupts":
            raise KeyboardInterrupt
        if i == batch and kind == "nan":
            found["x"][0, 0, 0] = torch.nan
            found["labels"][:] = 1
        yield found


@pytest.mark.parametrize("kind", ["raises", "interrupts", "nan"])
@pytest.mark.parametrize("batch", [0, 3])
def test_whatever_happens_the_model_comes_back(kind: str, batch: int) -> None:
    model = prepared()
    before = state(model)
    with pytest.raises((OSError, KeyboardInterrupt, CalibrationError)):
        hs.adapt(model, config("see_gradient"), data=broken(batch, kind))
    assert same(state(model), before)


def test_a_pass_leaves_no_trace() -> None:
    model = prepared()
    before = state(model)
    hs.calibrate(model, config("see_all"), batches(), preserve=batches(2))
    assert same(state(model), before)


def test_order_and_split_do_not_matter() -> None:
    model, data = Network(), batches()
    one = hs.calibrate(model, config("see_all", r=8), data, preserve=data).layers
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for batch in data[::-1] for i in range(3)]
    other = hs.calibrate(model, config("see_all", r=8), rows, preserve=rows).layers
    for name in one:
        assert close(other[name]["inputs"][0].dense(), one[name]["inputs"][0].dense(), 1e-6)
        assert close(other[name]["gradient"][0].dense(), one[name]["gradient"][0].dense().double(), 1e-4)
        assert close(other[name]["output_squares"][0].mean, one[name]["output_squares"][0].mean, 1e-5)


def numbers(statistic: Any) -> Tensor:
    return statistic.mean if isinstance(statistic, Squares) else statistic.dense()


def test_a_language_model_sees_few_rows_at_a_time_and_all_the_same(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, generator = llama(), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (7, 20), generator=generator)
    padding = torch.ones_like(ids)
    padding[2, 12:] = 0
    labels = ids.masked_fill(padding == 0, -100)
    labels[4] = labels[0, :15] = -100  # A row without a label is no mean of anything.
    data = [{"input_ids": ids, "attention_mask": padding, "labels": labels}, {"input_ids": ids[:1], "labels": ids[:1]}]
    made = config("see_all", target_modules="all-linear", r=16)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda m, args, given: seen.append(len(given["input_ids"])), with_kwargs=True)
    found = []
    for tokens in (1 << 20, 25):
        monkeypatch.setattr(reading, "PIECE", tokens)
        found.append(hs.calibrate(model, made, data, preserve=data))
    unsplit, split_up = [1, 7, 1, 7, 1], [1, *[1] * 6, 1, 7, 1]
    assert seen == [*unsplit, *split_up]
    whole, split = found
    assert (whole.batches, whole.tokens) == (split.batches, split.tokens) == (2, 7 * 20 - 8 - 20 - 15 + 20)
    assert whole.loss is not None
    assert split.loss == pytest.approx(whole.loss, rel=1e-5)
    for name, kinds in whole.layers.items():
        for kind, (one,) in kinds.items():
            (other,) = split.layers[name][kind]
            assert other.count == pytest.approx(one.count)
            assert close(numbers(other), numbers(one), 1e-4), (name, kind)


def test_one_calibration_serves_several_strategies_and_is_saved(tmp_path: Path) -> None:
    model = Network()
    found = hs.calibrate(model, [config("see_inputs"), config("see_gradient")], batches())
    found.save(tmp_path / "c.safetensors")
    again = hs.Calibration.load(tmp_path / "c.safetensors")
    assert again.facts() == found.facts()
    assert str(again) == str(found)
    assert again.layers["q"]["inputs"][0] is again.layers["k"]["inputs"][0]
    for name, kinds in found.layers.items():
        assert torch.equal(again.layers[name]["gradient"][0].dense(), kinds["gradient"][0].dense())
        assert torch.equal(again.layers[name]["inputs"][0].dense(), kinds["inputs"][0].dense())
    hs.adapt(model, config("see_inputs"), calibration=again)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_gradients_of_halves_are_compared() -> None:
    model, same_twice = Network(), batches(2) * 2
    (found,) = hs.calibrate(model, config("see_gradient", r=2), same_twice).layers["q"]["gradient"]
    assert found.overlap(2) > 0.99
    (found,) = hs.calibrate(model, config("see_gradient", r=2), iter(same_twice), batches=4).layers["q"]["gradient"]
    assert found.overlap(2) > 0.99


def test_memory_is_known_before_and_limited() -> None:
    model = Network()
    found = hs.calibrate(model, config("see_all"), batches(), preserve=batches())
    hs.calibrate(model, config("see_all"), batches(), preserve=batches(), memory_limit=found.bytes)
    with pytest.raises(CalibrationError, match="exact_inputs"):
        hs.calibrate(model, config("see_all"), batches(), preserve=batches(), memory_limit=found.bytes // 2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_seen_once(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Network):
        def forward(self, x: Tensor, labels: Tensor | None = None, attention_mask: Any = None) -> dict[str, Any]:
            if not torch.is_grad_enabled():
                return super().forward(x, labels)
            asking = x.detach().requires_grad_() if reentrant else x
            h = checkpoint(lambda x: torch.tanh(self.twice(x)) + x, asking, use_reentrant=reentrant)
            y = checkpoint(lambda h: self.q(h).sum(-1) + self.k(h).square().sum(-1), h, use_reentrant=reentrant)
            keep = labels != -100
            return {"loss": F.mse_loss(y[keep], labels[keep].float())}

    class Plain(Checkpointed):
        def forward(self, x: Tensor, labels: Tensor | None = None, attention_mask: Any = None) -> dict[str, Any]:
            h = torch.tanh(self.twice(x)) + x
            y = self.q(h).sum(-1) + self.k(h).square().sum(-1)
            return {"loss": F.mse_loss(y[labels != -100], labels[labels != -100].float())}

    model, plain = Checkpointed(), Plain()
    plain.load_state_dict(model.state_dict())
    one = hs.calibrate(plain, config("see_all"), batches(), preserve=batches(1)).layers
    other = hs.calibrate(model, config("see_all"), batches(), preserve=batches(1)).layers
    for name in ("q", "k", "twice"):
        assert other[name]["inputs"][0].count == one[name]["inputs"][0].count
        assert close(other[name]["gradient"][0].dense(), one[name]["gradient"][0].dense().double(), 1e-5)


def seq2seq(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=64, decoder_start_token_id=0, pad_token_id=0, **sizes)
        )
    heads = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    widths = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    drops = {"encoder_layerdrop": 0.9, "decoder_layerdrop": 0.9, "activation_dropout": 0.5}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=64, forced_eos_token_id=2, **heads, **widths, **special, **drops)
    )


def pairs_of_tokens(length: int) -> dict[str, Tensor]:
    """Six tokens for the encoder, some of them padding, and so many for the decoder, some without a label."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(3, 64, (2, s), generator=generator) for s in (6, length))
    padding = torch.ones(2, 6, dtype=torch.long)
    padding[0, 3:], labels[1, 1:] = 0, -100
    return {"input_ids": ids, "attention_mask": padding, "labels": labels}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("kind", "length"), [("t5", 6), ("t5", 5), ("bart", 6)])
def test_an_encoders_tokens_and_a_decoders_are_told_apart(kind: str, length: int, checkpointed: bool) -> None:
    batch, model, plain = pairs_of_tokens(length), seq2seq(kind).train(), seq2seq(kind).eval()
    rows: dict[str, Tensor] = {}
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, args, __, name=name: rows.update({name: args[0].detach()}))
    plain(**batch).loss.backward()
    inits = ["see_inputs"]
    if checkpointed:  # Which happens in training, where attention and layers drop.
        model.gradient_checkpointing_enable({"use_reentrant": False})
        inits += ["see_gradient"]
    drops = [dict(vars(module)) for module in model.modules()]
    made = [hs.LoraConfig(r=2, init_lora_weights=init) for init in inits]
    found = hs.calibrate(model, made, [batch], dense=True)
    assert len(found.layers) == (16 if kind == "t5" else 32)
    for name, kinds in found.layers.items():
        across = ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")
        is_encoders = "decoder" not in name or name.endswith(across)
        X = rows[name][batch["attention_mask"].bool() if is_encoders else batch["labels"] != -100].double()
        assert kinds["inputs"][0].count == len(X), name
        assert close(kinds["inputs"][0].dense(), X.T @ X / len(X)), name
        if checkpointed:
            assert close(kinds["gradient"][0].dense(), plain.get_submodule(name).weight.grad.double()), name
    assert [module.training for module in model.modules()] == [True] * len(drops)
    for module, before in zip(model.modules(), drops, strict=True):
        assert {n: v for n, v in vars(module).items() if "drop" in n} == {
            n: v for n, v in before.items() if "drop" in n
        }


def test_tokens_may_come_before_rows() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.q(x.transpose(0, 1))

    x, kept = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = hs.calibrate(
        Turned(),
        hs.LoraConfig(r=2, target_modules=["q"], init_lora_weights="see_inputs"),
        [{"x": x, "attention_mask": kept}],
    )
    X = x[kept.bool()].double()
    assert close(found.layers["q"]["inputs"][0].dense(), X.T @ X / 3)


class Experts(nn.Module):
    """Nine of them; a token sees one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.first = nn.Linear(8, 9, bias=False), nn.ModuleList(nn.Linear(8, 8) for _ in range(9))

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 8)
        chosen, y = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.first):
            mine = torch.where(chosen == i)[0]
            y = y.index_add(0, mine, expert(x[mine])) if len(mine) else y
        return y


def test_experts_that_the_first_row_does_not_reach_are_seen() -> None:
    model = Experts()
    data = [torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    rows = torch.cat(data).reshape(-1, 8)
    chosen = model.router(rows).argmax(-1)
    made = hs.LoraConfig(r=2, target_modules=r"first\.\d", init_lora_weights="see_all")
    found = hs.calibrate(model, made, data, preserve=data, loss=lambda m, b: (m(b).square().sum(), 1.0), dense=True)
    assert set(found.layers) == {f"first.{i}" for i in set(chosen.tolist())}
    model(rows).square().sum().backward()
    for name, kinds in found.layers.items():
        X = rows[chosen == int(name[6:])].double()
        assert kinds["inputs"][0].count == len(X)
        assert close(kinds["inputs"][0].dense(), X.T @ X / len(X))
        assert close(kinds["gradient"][0].dense() * len(data), model.get_submodule(name).weight.grad.double())


class Lookup(nn.Embedding):
    """As Gemma has it."""

    def __init__(self) -> None:
        super().__init__(10, 4, padding_idx=3)
        self.register_buffer("embed_scale", torch.tensor(7.0))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def test_an_embeddings_gradient_is_that_of_its_weight() -> None:
    model, ids = nn.Sequential(Lookup(), nn.Linear(4, 2)), torch.tensor([[3, 1, 1], [3, 9, 0]])
    made = hs.LoraConfig(r=2, target_modules=["0"], init_lora_weights="see_gradient")
    found = hs.calibrate(model, made, [ids], loss=lambda m, b: (m(b).square().sum(), 1.0), dense=True)
    model(ids).square().sum().backward()
    embedding: Any = model[0]
    assert close(found.layers["0"]["gradient"][0].dense(), embedding.weight.grad.T.double())


@pytest.mark.parametrize("init", ["lora_one", "gora", "lora_da", "eva"])
def test_under_autocast_only_the_model_is_in_half_precision(init: str) -> None:
    data, made = [torch.randn(20, 8)], hs.LoraConfig(r=2, init_lora_weights=init)

    def fits(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x).square().mean()

    def started(model: nn.Module) -> list[Tensor]:
        return [
            p.detach() for p in hs.adapt(model, made, data=data, loss=fits, exact_inputs=init != "eva").parameters()
        ]

    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    alone = started(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        within = started(model)
    for one, other in zip(alone, within, strict=True):
        assert close(other, one.double(), 1e-5)


def test_buffers_that_are_replaced_come_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.seen + x.sum(0)
            return self.q(x)

    model = Counting()
    before = model.seen
    hs.calibrate(model, hs.LoraConfig(r=2, target_modules=["q"], init_lora_weights="see_inputs"), [torch.ones(3, 4)])
    assert model.seen is before
    assert not before.any()


Named = collections.namedtuple("Named", "x y")


class Stream(torch.utils.data.IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.ones(6, 4).cumsum(0)


def test_batches_may_be_named_tuples_and_loaders_of_streams() -> None:
    made = hs.LoraConfig(r=2, target_modules=["0"], init_lora_weights="see_gradient")
    named = [Named(torch.ones(3, 4), torch.ones(3, 2))]
    model = nn.Sequential(nn.Linear(4, 2))
    assert hs.calibrate(model, made, named, loss=lambda m, b: (m(b.x) - b.y).square().mean()).batches == 1
    loader = torch.utils.data.DataLoader(Stream(), batch_size=2)
    assert hs.calibrate(model, made, loader, loss=lambda m, b: m(b).square().mean()).batches == 3


@dataclasses.dataclass
class Graph:
    x: Tensor


def test_batches_may_be_of_a_class_of_their_own_and_hold_tuples_that_are_no_names() -> None:
    made = hs.LoraConfig(r=2, target_modules=["0"], init_lora_weights="see_gradient")
    model = nn.Sequential(nn.Linear(4, 2))
    graphs, sized = [Graph(torch.ones(3, 4))], [{"x": torch.ones(3, 4), "size": torch.Size([3, 4])}]
    for data, x in ((graphs, lambda b: b.x), (sized, lambda b: b["x"])):
        loss = lambda m, b, x=x: m(x(b)).square().mean()  # noqa: E731
        assert hs.calibrate(model, made, data, loss=loss).batches == 1


def test_a_wrapper_with_the_config_of_two_sides_needs_no_encoder() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Network()
            self.config = types.SimpleNamespace(is_encoder_decoder=True)

        def forward(self, **batch: Tensor) -> Any:
            return self.inner(**batch)

    assert hs.calibrate(Wrapper(), config("see_inputs"), batches(2)).batches == 2


def test_what_the_config_drops_rests_under_checkpointing() -> None:
    class Dropping(nn.Module):
        gradient_checkpointing: bool

        def __init__(self) -> None:
            super().__init__()
            self.q, self.config = nn.Linear(4, 4), types.SimpleNamespace(layerdrop=0.9)
            self.gradient_checkpointing = True

        def forward(self, x: Tensor) -> Tensor:
            assert not (self.training and self.config.layerdrop > 0)
            return self.q(x)

    model = Dropping()
    made = hs.LoraConfig(r=2, target_modules=["q"], init_lora_weights="see_gradient")
    hs.calibrate(model, made, [torch.ones(2, 4)], loss=lambda m, x: m(x).square().mean())
    assert model.config.layerdrop == 0.9


@pytest.mark.parametrize("reached", [(0, 1), (2, 3)])
def test_halves_of_which_one_has_nothing_are_not_compared(reached: tuple[int, int]) -> None:
    found = GradientSpectrum.empty(6, 5, 4, torch.Generator().manual_seed(0))
    for i in range(4):
        if i == 2:
            found.split()
        if i in reached:
            found.add(torch.randn(8, 6), torch.randn(8, 5))
    assert found.overlap(2) is None


def test_a_loss_may_compare_rows() -> None:
    def preference(m: nn.Module, x: Tensor) -> Tensor:
        better, worse = m(x).chunk(2)
        return -(better - worse).mean().sigmoid().log()

    model, x = nn.Sequential(nn.Linear(4, 2)), torch.randn(6, 4)
    made = hs.LoraConfig(r=2, target_modules=["0"], init_lora_weights="see_gradient")
    found = hs.calibrate(model, made, [x], loss=preference, dense=True)
    preference(model, x).backward()
    assert close(found.layers["0"]["gradient"][0].dense(), model[0].weight.grad.double())


def test_one_batch_has_no_halves() -> None:
    found = hs.calibrate(Network(), config("see_gradient"), batches(1))
    assert found.layers["q"]["gradient"][0].overlap(3) is None


def test_a_frozen_model_and_half_precision_serve_as_well() -> None:
    model = Network().requires_grad_(False)
    wanted = hs.calibrate(model, config("see_gradient", r=8), batches()).layers["twice"]["gradient"][0].dense()
    half = copy.deepcopy(model).bfloat16()
    data = [{**batch, "x": batch["x"].bfloat16()} for batch in batches()]
    found = hs.calibrate(half, config("see_gradient", r=8), data).layers["twice"]["gradient"][0].dense()
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_layers_without_signal_are_named_or_start_as_chosen() -> None:
    chosen = ["q", "idle"]
    with pytest.raises(NoSignal, match="idle"):
        hs.adapt(Network(), config("see_gradient", target_modules=chosen), data=batches())
    model = Network()
    adapter = hs.adapt(model, config("see_gradient", target_modules=chosen, init_fallback="kaiming"), data=batches())
    assert adapter.layers()["idle"].factors[0].abs().sum() > 0
    assert "idle" in str(adapter.report)
    with pytest.raises(BadOption, match="init_fallback"):
        config("see_gradient", init_fallback="see_inputs")


def looping() -> Iterator[dict[str, Tensor]]:
    while True:
        yield from batches(2)


def test_endless_data_is_cut() -> None:
    assert hs.calibrate(Network(), config("see_gradient"), looping(), batches=5).batches == 5


def unlabelled() -> list[dict[str, Tensor]]:
    return [{"x": batch["x"]} for batch in batches()]


def as_row(ids: Any) -> dict[str, Any]:
    return {"input_ids": ids, "labels": ids}


def as_float(model: nn.Module, batch: Any) -> float:
    return float(model(**batch)["loss"])


def by_rows(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"])["logits"].sum(1)


WRONG: dict[str, tuple[type[HeadstartError], str, dict[str, Any]]] = {
    "no batch": (CalibrationError, "no batch", {"data": []}),
    "a batch instead of batches": (CalibrationError, "iterable", {"data": batches()[0]}),
    "no loss": (CalibrationError, "loss", {"data": unlabelled()}),
    "nothing": (MissingStatistic, "data=", {}),
    "no batches": (BadOption, "batches", {"data": batches(), "batches": 0}),
    "rows of lists": (CalibrationError, r"a dict \(input_ids, labels\) that is no batch", {"data": [as_row([1, 2])]}),
    "rows of tensors": (CalibrationError, "DataLoader", {"data": [as_row(torch.ones(3, dtype=torch.long))]}),
    "a loss that is a number": (CalibrationError, "loss= returned a float", {"data": batches(), "loss": as_float}),
    "a loss of every row": (CalibrationError, r"of shape \(3,\)", {"data": batches(), "loss": by_rows}),
    "data to preserve for nobody": (BadOption, "leave preserve= out", {"data": batches(), "preserve": batches()}),
    "an option that nobody takes": (
        BadOption,
        r"'memory'; did you mean 'memory_limit'",
        {"data": batches(), "memory": 1},
    ),
    "a loss of nothing": (CalibrationError, "reaches none", {"data": batches(), "loss": lambda m, b: torch.zeros(())}),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_named_and_changes_nothing(case: str) -> None:
    error, words, given = WRONG[case]
    model = prepared()
    before = state(model)
    with pytest.raises(error, match=words):
        hs.adapt(model, config("see_gradient"), **given)
    assert same(state(model), before)


def test_a_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    def net(*widths: int) -> nn.Module:
        return nn.Sequential(*(nn.Linear(m, n) for m, n in itertools.pairwise(widths)))

    def fits(m: nn.Module, x: Tensor) -> Tensor:
        return m(x).square().mean()

    data, made = [torch.randn(8, 6)], hs.LoraConfig(r=2, init_lora_weights="see_all", target_modules=["0", "1"])
    base = net(6, 8, 4)
    found = hs.calibrate(base, made, data, preserve=data, loss=fits)
    for name, widths, words in (
        ("see_inputs", (6, 9, 4), r"'inputs' of '1' is of size 8, and the weight here is 4 × 9"),
        ("see_gradient", (6, 8, 5), r"'gradient' of '1' is of size \(4, 8\), and the weight here is 5 × 8"),
        ("see_all", (5, 8, 4), r"of '0' is of size 6, and the weight here is 8 × 5"),
    ):
        model = net(*widths)
        before = state(model)
        with pytest.raises(MissingStatistic, match=words):
            hs.adapt(model, dataclasses.replace(made, init_lora_weights=name), calibration=found)
        assert same(state(model), before)
    found.save(tmp_path / "c.safetensors")
    other = net(6, 8, 4)
    before = state(other)
    with pytest.raises(MissingStatistic, match=r"of another model: its weights are \d+% of their norm from those here"):
        hs.adapt(other, made, calibration=hs.Calibration.load(tmp_path / "c.safetensors"))
    assert same(state(other), before)
    with torch.no_grad():
        for weight in base.parameters():
            weight.mul_(1.05)  # As far as training takes it.
    hs.adapt(base.double(), made, calibration=found)
    with pytest.raises(FileError, match="cannot read a calibration"):
        hs.Calibration.load(tmp_path / "gone")


def test_what_cannot_be_calibrated_is_named() -> None:
    with pytest.raises(BadOption, match="no config is given"):
        hs.calibrate(Network(), [], batches())
    with torch.device("meta"):
        hollow = Network()
    with pytest.raises(MetaWeight, match="the weights of 'q' are not loaded"):
        hs.calibrate(hollow, config("see_inputs"), batches())
    adapted = nn.Sequential(nn.Linear(4, 4))
    hs.adapt(adapted, hs.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(AdapterState, match="calibrate before you adapt"):
        hs.calibrate(adapted, hs.LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva"), [torch.ones(4, 4)])


def test_data_for_a_strategy_that_takes_none_is_refused() -> None:
    with pytest.raises(BadOption, match="no data"):
        hs.adapt(Network(), config("pissa"), data=batches())
    with pytest.raises(BadOption, match="no data"):
        hs.calibrate(Network(), config("pissa"), batches())
    found = hs.calibrate(Network(), config("see_inputs"), batches())
    with pytest.raises(MissingStatistic, match="gradient"):
        hs.adapt(Network(), config("see_gradient"), calibration=found)
    with pytest.raises(MissingStatistic, match="preserve"):
        hs.calibrate(Network(), config("see_all"), batches())


def test_sharing_that_changes_is_named() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.one(x) + self.other(x if self.calls < 3 else x * 1)

    with pytest.raises(CalibrationError, match="exclude_modules"):
        hs.calibrate(Fickle(), hs.LoraConfig(r=2, init_lora_weights="see_inputs"), [torch.randn(2, 4)] * 4)


def test_moments_survive_a_mean_that_dwarfs_them() -> None:
    X = torch.randn(4000, 200, dtype=torch.float64)
    X[:, 7] += 300
    moments = Moments.empty(200)
    for part in X.float().split(256):
        moments.add(part)
    assert float((moments.dense(centred=True) - torch.cov(X.T, correction=0)).abs().max()) < 2e-2


# ------------------------------------------------------------------ several processes


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _process(rank: int, world: int, port: int, folder: str, failing: int | None) -> None:
    """One process of a run: its share of the batches, or a failure."""
    torch.set_num_threads(1)
    register("see_all", paper="none", fact="for a test")(_see_all)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = Network()
    own = batches(6)[rank::world]
    if failing is not None and rank == 1:
        own[failing] = {**own[failing], "x": own[failing]["x"] * torch.nan if failing else torch.zeros(2)}
    try:
        found: Any = hs.calibrate(model, config("see_all", r=8), own, preserve=own)
        found.save(Path(folder) / f"{rank}.safetensors")
    except Exception as error:
        (Path(folder) / f"{rank}.error").write_text(str(error))
    torch.distributed.destroy_process_group()


def _run(folder: Path, failing: int | None = None) -> None:
    torch.multiprocessing.spawn(_process, args=(2, _free_port(), str(folder), failing), nprocs=2)


def test_processes_end_with_the_statistics_of_all_the_data(tmp_path: Path) -> None:
    _run(tmp_path)
    torch.manual_seed(0)
    alone = hs.calibrate(Network(), config("see_all", r=8), batches(6), preserve=batches(6))
    both = [hs.Calibration.load(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    assert both[0].tokens == alone.tokens
    assert both[0].loss == pytest.approx(alone.loss)
    for name, kinds in alone.layers.items():
        for kind, (wanted,) in kinds.items():
            (one,), (other,) = (found.layers[name][kind] for found in both)
            assert one.count == wanted.count
            dense = (lambda s: s.mean) if kind == "output_squares" else (lambda s: s.dense())
            assert torch.equal(dense(one), dense(other))
            assert close(dense(one), dense(wanted).double(), 1e-4 if kind == "gradient" else 1e-6)


@pytest.mark.parametrize("failing", [0, 2])
def test_what_fails_in_one_process_fails_in_all(failing: int, tmp_path: Path) -> None:
    """In the probe of the first batch, and in the middle of the pass."""
    _run(tmp_path, failing)
    assert ("nan" in (tmp_path / "1.error").read_text()) == (failing > 0)
    assert "process 1" in (tmp_path / "0.error").read_text()
