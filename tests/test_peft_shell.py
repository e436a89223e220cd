"""headstart.peft: real PeftModels, with our starts, exact in all that PEFT's are used for.

Each law is stated over every kind of layer that PEFT has; `native` is `headstart.adapt` with the same config.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

import headstart as hs
from headstart.errors import (
    AdapterFormatError,
    AdapterState,
    BadOption,
    KeyMismatch,
    MissingStatistic,
    NonFiniteWeight,
    UnsupportedLayer,
)
from headstart.files.adapter import CONFIG, CORES, TENSORS, plain_name, read_adapter
from headstart.inits import strategy as registry
from headstart.peft import from_pretrained, get_peft_model
from headstart.peft.model import ShellModel
from headstart.peft.shell import ShellLayer
from headstart.testing import KINDS, Case, fingerprint, train

PEFT = Version(peft.__version__)
SERVED = [name for name, kind in KINDS.items() if kind.peft]
# Read otherwise by PEFT's own layers, which leave out dilation and padding mode.
MISREAD = {"conv1d", "conv1d_dora", "conv2d_same", "conv1d_reflect", "conv1d_reflect_dora", "conv2d_circular"}
if Version("0.20") > PEFT:
    MISREAD |= {"experts"}  # (e, out, in) without a flag was read as (e, in, out)
EVA = peft.LoraConfig(target_modules=["left"], init_lora_weights="eva", eva_config=peft.EvaConfig())
STARTS = {name: registry.get(name)[0] for name in hs.strategies()}
WEIGHT_BASED = [name for name, start in STARTS.items() if not start.needs and not start.quantizes]

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's own
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),  # at merging
]


def case_of(kind: str, init: str = "pissa", **changes: Any) -> Case:
    return Case(init, KINDS[kind], changes=changes)


def frozen_outputs(case: Case) -> list[Tensor]:
    """What the base computes. Frozen, since torch rounds otherwise where a weight asks for gradients."""
    return case.outputs(case.model().requires_grad_(False))


def native_name(name: str) -> str:
    """A parameter of a PeftModel by the name that it has in the native shell."""
    name = re.sub(r"\.(default|second)\b", "", name.removeprefix("base_model.model."))
    return plain_name(name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"))


def gradients(case: Case, model: nn.Module) -> dict[str, Tensor | None]:
    named = {native_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    loss = torch.stack([y.square().sum() for y in case.outputs(model, grad=True)]).sum()
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def close(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def in_plain_peft(base: nn.Module, folder: Path) -> peft.PeftModel:
    """An adapter as everybody loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, str(folder))


# ------------------------------------------------------------------ starts


@pytest.mark.parametrize("init", WEIGHT_BASED)
@pytest.mark.parametrize("kind", SERVED)
def test_it_is_the_native_adapter_in_a_real_peft_model(kind: str, init: str) -> None:
    case = case_of(kind, init)
    generator = torch.get_rng_state()
    native, model = hs.adapt(case.model(), case.config).model, get_peft_model(case.model(), case.config)
    assert isinstance(model, peft.PeftModel)
    assert torch.equal(generator, torch.get_rng_state())
    assert same(case.outputs(model, grad=True), case.outputs(native, grad=True))
    found, wanted = gradients(case, model), gradients(case, native)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        theirs = found[name]
        assert (theirs is None) == (gradient is None), name
        if theirs is not None and gradient is not None:
            # The factors lie there as PEFT's files hold them: compared as the values that they are, zeros aside.
            a, b = (g[g != 0].flatten().sort().values for g in (theirs, gradient))
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    with model.disable_adapter():
        assert same(case.outputs(model), frozen_outputs(case))
    assert gradients(case, model).keys() == wanted.keys(), "disabling changed what trains"


@pytest.mark.parametrize("kind", SERVED)
def test_disabled_is_the_base_to_the_bit_even_where_biases_train(kind: str) -> None:
    case = case_of(kind, bias="all")
    model: Any = train(case, get_peft_model(case.model(), case.config))
    moved = case.outputs(model)
    native = train(case, hs.adapt(case.model(), case.config).model)
    close(moved, case.outputs(native))
    with model.disable_adapter():
        assert same(case.outputs(model), frozen_outputs(case))
        with model.disable_adapter():
            assert same(case.outputs(model), frozen_outputs(case))
        assert same(case.outputs(model), frozen_outputs(case))
    assert same(case.outputs(model), moved)


def test_inference_models_stay_frozen_after_disabling(tmp_path: Path) -> None:
    case = case_of("linear")
    get_peft_model(case.model(), case.config).save_pretrained(tmp_path)
    model = from_pretrained(case.model(), tmp_path)
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for p in model.parameters())


def test_a_module_in_two_places_is_replaced_in_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    base, x = Twice(), torch.randn(3, 4)
    config = hs.LoraConfig(r=2, init_lora_weights="random", target_modules=["first"])
    native = hs.adapt(copy.deepcopy(base), config).model
    model = get_peft_model(base, config)
    assert torch.equal(model(x), native(x))
    model.unload()
    assert base.first is base.second
    assert type(base.first) is nn.Linear


def test_only_what_is_targeted_is_adapted() -> None:
    """PEFT matches by the end of a name; a name that ends another's must not drag that in."""
    base = nn.ModuleDict({"proj": nn.Linear(4, 4), "block": nn.ModuleDict({"proj": nn.Linear(4, 4)})})
    model = get_peft_model(base, hs.LoraConfig(r=2, target_modules="proj"))
    assert [name for name, _ in model.named_modules() if name.endswith("lora_A")] == ["base_model.model.proj.lora_A"]


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("init", ["pissa", "mica"])
@pytest.mark.parametrize("kind", SERVED)
def test_a_saved_adapter_means_the_same_everywhere(kind: str, init: str, tmp_path: Path) -> None:
    case = case_of(kind, init, use_rslora=True, bias="lora_only")
    model: Any = train(case, get_peft_model(case.model(), case.config))
    wanted = case.outputs(model, grad=True)
    model.save_pretrained(tmp_path)

    resumed = from_pretrained(case.model(), tmp_path, is_trainable=True)
    assert same(case.outputs(resumed, grad=True), wanted)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in resumed.named_parameters() if p.requires_grad} == trained
    fresh = get_peft_model(case.model(), case.config)
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    assert same(case.outputs(fresh, grad=True), wanted)
    resumed.save_pretrained(tmp_path / "again")
    tensors = (read_adapter(folder) for folder in (tmp_path, tmp_path / "again"))
    first, second = ({n: t for e in file.entries.values() for n, t in e.tensors().items()} for file in tensors)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    native = case.model()
    hs.load(native, tmp_path)
    close(case.outputs(native, grad=True), [y.detach() for y in wanted])
    if kind not in MISREAD:
        plain = in_plain_peft(case.model(), tmp_path)
        close([y.detach() for y in case.outputs(plain, grad=True)], [y.detach() for y in wanted])


@pytest.mark.parametrize("kind", ["linear_dora", "embedding", "conv2d", "attention", "experts"])
def test_training_resumes_to_the_bit(kind: str, tmp_path: Path) -> None:
    """Two AdamW steps, saved, two more, against four in one go; the optimizer's own state is torch's affair."""
    case = case_of(kind, "pissa", bias="lora_only")

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            torch.stack([y.square().mean() for y in case.outputs(model, grad=True)]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def begin(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    whole = get_peft_model(case.model(), case.config)
    optimizer = begin(whole)
    steps(whole, optimizer, 2)
    whole.save_pretrained(tmp_path)
    kept = copy.deepcopy(optimizer.state_dict())
    steps(whole, optimizer, 2)
    fresh = get_peft_model(case.model(), case.config)
    for resumed in (fresh, from_pretrained(case.model(), tmp_path, is_trainable=True)):
        optimizer = begin(resumed)
        resumed.load_adapter(tmp_path, "default", is_trainable=True)
        optimizer.load_state_dict(copy.deepcopy(kept))
        steps(resumed, optimizer, 2)
        assert same(case.outputs(resumed), case.outputs(whole))


def test_an_adapter_is_trained_on_in_another_process(tmp_path: Path, llama: Callable[[], Any]) -> None:
    """Nothing that a process remembers is needed: a fresh one continues to the bit."""
    code = """
        import sys, torch
        from test_peft_shell import two_steps
        from headstart.peft import get_peft_model, from_pretrained
        import headstart as hs
        torch.set_num_threads(1)
        folder = sys.argv[1]
        model = get_peft_model(torch.load(folder + "/base.pt", weights_only=False), hs.LoraConfig(r=4), init="pissa")
        model.load_adapter(folder, "default", is_trainable=True)
        optimizer = torch.load(folder + "/optimizer.pt", weights_only=False)
        two_steps(model, optimizer)
        model.save_pretrained(folder + "/after")
    """
    base = llama()
    torch.save(base, tmp_path / "base.pt")
    model = get_peft_model(base, hs.LoraConfig(r=4), init="pissa")
    optimizer = two_steps(model, None)
    model.save_pretrained(tmp_path)
    torch.save(optimizer, tmp_path / "optimizer.pt")
    lines = "\n".join(line.removeprefix(" " * 8) for line in code.splitlines())
    environment = {"PYTHONPATH": ":".join(map(str, sys.path)), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", lines, str(tmp_path)], check=True, env=environment)
    two_steps(model, optimizer)
    model.save_pretrained(tmp_path / "here")
    there, here = (read_adapter(tmp_path / name).entries for name in ("after", "here"))
    for path, entry in here.items():
        assert torch.equal(entry.A, there[path].A)
        assert torch.equal(entry.B, there[path].B)


def two_steps(model: Any, optimizer: Any) -> Any:
    """Two steps of AdamW on fixed tokens, from an optimizer's state where there is one. Returns the state."""
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if optimizer is not None:
        adamw.load_state_dict(copy.deepcopy(optimizer))
    ids = torch.arange(24).reshape(2, 12)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        adamw.step()
        adamw.zero_grad()
    return copy.deepcopy(adamw.state_dict())


def test_modules_that_train_in_full_go_along(bert: Callable[[], Any], tmp_path: Path) -> None:
    ids = torch.arange(16).reshape(2, 8)
    config = hs.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS", bias="all", init_lora_weights="olora")
    native = hs.adapt(bert(), config)
    model = get_peft_model(bert(), config)
    assert isinstance(model, peft.PeftModelForSequenceClassification)
    for adapted in (native.model, model):
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and "lora_" not in name:
                    parameter += 0.1
    wanted = model(ids).logits.detach()
    assert torch.equal(native.model(ids).logits, wanted)
    model.save_pretrained(tmp_path / "shell")
    hs.save(native.model, tmp_path / "native")
    for folder in ("shell", "native"):
        loaded = bert()
        hs.load(loaded, tmp_path / folder)
        assert torch.equal(loaded(ids).logits, wanted), folder
        assert torch.equal(from_pretrained(bert(), tmp_path / folder)(ids).logits, wanted), folder
        torch.testing.assert_close(in_plain_peft(bert(), tmp_path / folder)(ids).logits, wanted, msg=folder)
    fresh = get_peft_model(bert(), config)
    fresh.load_adapter(tmp_path / "shell", "default", is_trainable=True)
    assert torch.equal(fresh(ids).logits, wanted)
    base = bert()(ids).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, base, rtol=0, atol=1e-6)
    assert torch.equal(model.merge_and_unload()(ids).logits.argmax(-1), wanted.argmax(-1))
    plain = peft.get_peft_model(bert(), peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain.save_pretrained(str(tmp_path / "plain"))
    assert torch.equal(from_pretrained(bert(), tmp_path / "plain")(ids).logits, plain.eval()(ids).logits)


def test_heads_of_which_one_names_the_other_train_both(tmp_path: Path) -> None:
    """DistilBERT has a "classifier" and a "pre_classifier", which PEFT takes "classifier" for, too."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 16}
    original = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=40, **sizes)).eval()
    ids = torch.arange(16).reshape(2, 8)
    config = hs.LoraConfig(r=2, target_modules=["q_lin"], task_type="SEQ_CLS", init_lora_weights="pissa")
    native = hs.adapt(copy.deepcopy(original), config).model
    model = get_peft_model(copy.deepcopy(original), config)
    assert isinstance(model, peft.PeftModelForSequenceClassification)
    for adapted in (native, model):
        trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name}
        heads = {re.sub(r"\.(modules_to_save|trained)\.", ".", native_name(name)) for name in trained}
        assert heads == {f"{head}.{leaf}" for head in ("pre_classifier", "classifier") for leaf in ("weight", "bias")}
        for parameter in trained.values():
            parameter.data += 0.1
    wanted = model(ids).logits.detach()
    assert torch.equal(native(ids).logits, wanted)
    model.save_pretrained(tmp_path / "shell")
    hs.save(native, tmp_path / "native")
    for folder in (tmp_path / "shell", tmp_path / "native"):
        assert torch.equal(from_pretrained(copy.deepcopy(original), folder)(ids).logits, wanted)
        torch.testing.assert_close(in_plain_peft(copy.deepcopy(original), folder)(ids).logits, wanted)
    given = hs.LoraConfig(r=2, target_modules=["q_lin"], modules_to_save=["classifier"])
    with pytest.raises(BadOption, match="'pre_classifier' too in PEFT: write more of its name, or name both"):
        get_peft_model(copy.deepcopy(original), given)


def test_a_saved_adapter_can_be_of_a_smaller_rank(tmp_path: Path) -> None:
    case = case_of("linear")
    model: Any = train(case, get_peft_model(case.model(), case.config))
    model.save_pretrained(tmp_path / "exact")
    model.save_pretrained(tmp_path / "small", rank=4)
    exact, small = (read_adapter(tmp_path / name) for name in ("exact", "small"))
    for path, entry in exact.entries.items():
        assert (entry.rank, small.entries[path].rank) == (8, 4)
        assert small.entries[path].A.shape[0] == 4
        full = entry.alpha / entry.rank * entry.B @ entry.A
        less = small.entries[path].alpha / 4 * small.entries[path].B @ small.entries[path].A
        best = torch.linalg.svdvals(full)[4:].square().sum().sqrt()
        torch.testing.assert_close((full - less).norm(), best, rtol=1e-3, atol=1e-5)
    in_plain_peft(case.model(), tmp_path / "small")


def test_a_checkpoint_of_another_config_is_refused_untouched(tmp_path: Path) -> None:
    case = case_of("linear")
    get_peft_model(case.model(), case.but(r=2).config).save_pretrained(tmp_path)
    model = get_peft_model(case.model(), case.config)
    before = fingerprint(model)
    with pytest.raises(KeyMismatch, match="use the same config"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert fingerprint(model) == before


def test_the_hub_finds_all_it_asks_for(llama: Callable[[], Any], tmp_path: Path) -> None:
    model = get_peft_model(llama(), hs.LoraConfig(r=2, init_lora_weights="pissa"))
    model.save_pretrained(tmp_path)
    model.create_or_update_model_card(str(tmp_path))
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(ValueError, match="nobody"):
        model.save_pretrained(tmp_path, selected_adapters=["nobody"])


# ------------------------------------------------------------------ merging and leaving


@pytest.mark.parametrize("kind", SERVED)
def test_merging_and_leaving_are_exact(kind: str) -> None:
    case = case_of(kind, bias="all")
    base = case.model()
    next(base.parameters()).requires_grad_(False)
    untouched = fingerprint(base)
    model: Any = train(case, get_peft_model(base, case.config))
    wanted, before = case.outputs(model), fingerprint(model)
    model.merge_adapter()
    close(case.outputs(model), wanted)
    model.unmerge_adapter()
    assert fingerprint(model) == before
    folded = copy.deepcopy(model).merge_and_unload()
    close(case.outputs(folded), wanted)
    assert [type(module) for module in folded.modules()] == [type(module) for module in case.model().modules()]
    assert model.unload() is base
    assert fingerprint(base) == untouched


def test_a_merge_that_cannot_be_leaves_nothing_merged() -> None:
    case = case_of("linear", "random")
    model = get_peft_model(case.model(), case.config)
    layers = [module for module in model.modules() if isinstance(module, ShellLayer)]
    with torch.no_grad():
        layers[-1].stored("default")[0][0, 0] = float("inf")
    before = fingerprint(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NonFiniteWeight, match="cannot be merged"):
            merge()
        assert fingerprint(model) == before


def test_a_second_merge_that_cannot_be_leaves_the_first() -> None:
    case = case_of("linear", "random")
    model: Any = get_peft_model(case.model(), case.config)
    model.add_adapter("second", hs.LoraConfig(r=2, target_modules=["left", "right"], init_lora_weights="random"))
    layers = [module for module in model.modules() if isinstance(module, ShellLayer)]
    with torch.no_grad():
        for factor in layers[-1].stored("second"):
            factor.fill_(1e25)  # finite, but not their product
    model.merge_adapter(["default"])
    before = fingerprint(model)
    with quiet(), pytest.raises(NonFiniteWeight, match="nothing was merged"):
        model.merge_adapter(["second"], safe_merge=True)
    assert fingerprint(model) == before
    assert [layer.merged_adapters for layer in layers] == [["default"]] * len(layers)
    model.unmerge_adapter()
    close(case.outputs(model), case.outputs(get_peft_model(case.model(), case.config)))


def test_a_merged_layer_is_not_trained() -> None:
    case = case_of("linear")
    model = get_peft_model(case.model(), case.config).train()
    model.merge_adapter()
    with pytest.raises(AdapterState, match="unmerge_adapter"):
        case.outputs(model, grad=True)


# ------------------------------------------------------------------ several adapters


@pytest.mark.parametrize("kind", ["linear", "linear_dora", "embedding", "conv2d", "attention", "experts", "tied"])
def test_a_second_adapter_does_not_disturb_the_first(kind: str) -> None:
    """PEFT's own PiSSA takes the base apart anew and leaves the first adapter wrong by a quarter."""
    if kind == "experts" and Version("0.20") > PEFT:
        pytest.skip("this PEFT adapts parameters once")
    case = case_of(kind)
    model: Any = train(case, get_peft_model(case.model(), case.config))
    first, base = case.outputs(model), frozen_outputs(case)
    model.add_adapter("second", case.config)
    assert same(case.outputs(model), first)
    model.set_adapter("second")
    close(case.outputs(model), base, 1e-5)
    native = hs.adapt(case.model(), case.config).model
    assert gradients(case, native).keys() == gradients(case, model).keys(), "what trains is the second's"
    train(case, model)
    second = case.outputs(model)
    model.set_adapter("default")
    assert same(case.outputs(model), first)
    with model.disable_adapter():
        assert same(case.outputs(model), base)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert same(case.outputs(model), second)
    assert list(model.init_reports) == ["second"]


def test_a_plain_adapter_stands_beside_an_anchored_one(tmp_path: Path) -> None:
    case = case_of("linear")
    model: Any = train(case, get_peft_model(case.model(), case.config))
    first = case.outputs(model)
    model.add_adapter("plain", peft.LoraConfig(r=3, target_modules=["left", "right"], init_lora_weights=False))
    assert same(case.outputs(model), first)
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("plain", tmp_path / "plain")):
        model.set_adapter(name)
        close(case.outputs(in_plain_peft(case.model(), folder)), case.outputs(model))
    model.add_adapter("pissa", peft.LoraConfig(r=3, target_modules=["left"], init_lora_weights="pissa_niter_4"))
    model.set_adapter("pissa")
    close(case.outputs(model), frozen_outputs(case))
    with pytest.raises(MissingStatistic):
        model.add_adapter("eva", EVA)
    assert "eva" not in model.peft_config


@pytest.mark.parametrize("kind", ["linear", "linear_dora", "embedding", "attention", "conv1d_transformers"])
def test_the_config_of_an_adapter_gives_a_copy_of_it(kind: str) -> None:
    """TRL makes its reference of a PeftModel so, and then copies the parameters, but knows of no anchors."""
    case = case_of(kind)
    model: Any = train(case, get_peft_model(case.model(), case.config))
    wanted = case.outputs(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    train(case, model)
    model.set_adapter("ref")
    assert same(case.outputs(model), wanted)
    model.set_adapter("default")
    assert not same(case.outputs(model), wanted)


def test_what_would_forget_the_anchors_is_refused(tmp_path: Path) -> None:
    case = case_of("linear")
    model: Any = train(case, get_peft_model(case.model(), case.config))
    x = case.kind.inputs()[0]
    model.add_adapter("plain", peft.LoraConfig(r=4, target_modules=["left", "right"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    model.eval()
    with pytest.raises(AdapterState, match="'default' has an anchored start"):
        model(x, adapter_names=["default", "plain"])
    with pytest.raises(AdapterState, match="anchored"):
        model(x, adapter_names=["default", "default"])
    with pytest.raises(AdapterState, match="anchored"):
        model.add_weighted_adapter(["default", "plain"], [0.5, 0.5], "both", combination_type="cat")
    model.base_model.set_adapter(["default", "plain"])
    with pytest.raises(AdapterState, match="anchored"):
        model(x)
    model.base_model.set_adapter("default")
    wanted = case.outputs(model)
    # The way out that the message names: loaded again, it is plain LoRA.
    model.load_adapter(tmp_path, "again")
    model.add_weighted_adapter(["again", "plain"], [1.0, 0.0], "both", combination_type="cat")
    model.set_adapter("both")
    close(case.outputs(model), wanted)
    mixed = model(x, adapter_names=["again", "__base__"])
    model.set_adapter("again")
    close([y[0] for y in mixed], [y[0] for y in case.outputs(model)])
    close([y[1] for y in mixed], [y[1] for y in frozen_outputs(case)])


# ------------------------------------------------------------------ a failure leaves no trace


def interrupted_after(function: Callable[..., Any]) -> Callable[..., None]:
    def halfway(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        raise KeyboardInterrupt

    return halfway


@pytest.mark.parametrize("kind", ["linear", "linear_dora", "embedding", "attention", "encoder", "experts", "tied"])
def test_a_failing_injection_leaves_the_model_untouched(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(kind, bias="lora_only")
    base = case.model()
    next(base.parameters()).requires_grad_(False)
    next(base.children()).train()
    handle = base.register_forward_hook(lambda *_: None)
    before = fingerprint(base)
    for place, name in ((peft.tuners.lora.LoraModel, "_replace_module"), (ShellLayer, "enter")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, interrupted_after(getattr(place, name)))
            with pytest.raises(KeyboardInterrupt):
                get_peft_model(base, case.config)
        assert fingerprint(base) == before, name
    handle.remove()
    assert not any(module._forward_hooks for module in base.modules())
    get_peft_model(base, case.config)


def test_a_failing_second_adapter_leaves_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("linear")
    model = get_peft_model(case.model(), case.config)
    before = fingerprint(model)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise UnsupportedLayer("no")

    with monkeypatch.context() as patch:
        patch.setattr(ShellLayer, "enter", fails)
        with pytest.raises(UnsupportedLayer):
            model.add_adapter("second", case.config)
    assert fingerprint(model) == before
    assert list(model.peft_config) == ["default"]
    model.merge_adapter()
    with pytest.raises(AdapterState, match="merged"):
        model.add_adapter("second", case.config)


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        (peft.LoraConfig(target_modules=["left"], lora_bias=True), BadOption, "lora_bias"),
        (peft.LoraConfig(target_modules=["left"], layer_replication=[(0, 1)]), BadOption, "layer_replication"),
        (peft.LoraConfig(target_modules=["left"], inference_mode=True), BadOption, "inference_mode"),
        (EVA, MissingStatistic, "eva"),
        (hs.LoraConfig(target_modules=["left"], modules_to_save=["ight"]), hs.HeadstartError, "ight"),
        (hs.LoraConfig(target_modules=["left"], parts={"left": (True, False)}), BadOption, "parts"),
    ],
)
def test_what_is_not_served_is_refused_untouched(config: Any, error: type[Exception], said: str) -> None:
    base = KINDS["linear"].make()
    before = fingerprint(base)
    with pytest.raises(error, match=said):
        get_peft_model(base, config)
    assert fingerprint(base) == before


def test_a_head_that_peft_would_train_too_is_refused() -> None:
    base = nn.ModuleDict({"head": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4), "body": nn.Linear(4, 4)})
    with pytest.raises(BadOption, match="lm_head"):
        get_peft_model(base, hs.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))


# ------------------------------------------------------------------ PEFT's config and PEFT's people


def test_pefts_config_is_taken_as_it_stands(llama: Callable[[], Any]) -> None:
    model = get_peft_model(llama(), peft.LoraConfig(r=4, task_type="CAUSAL_LM"), init="pissa")
    assert {name.rsplit(".", 1)[-1] for name, _ in shell_names(model)} == {"q_proj", "v_proj"}  # PEFT's table
    assert isinstance(model, peft.PeftModelForCausalLM)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules={"q_proj", "down_proj"}, rank_pattern={"down_proj": 2},
        exclude_modules=["layers.0.mlp.down_proj"], init_lora_weights="pissa_niter_2",
    )  # fmt: skip
    config.use_rslora = True  # with these two, PEFT warns of its own conversion
    model = get_peft_model(llama(), config, seed=3)
    found = {name.removeprefix("base_model.model.model."): layer for name, layer in shell_names(model)}
    assert list(found) == ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"]
    assert [layer.rank("default") for layer in found.values()] == [4, 4, 2]
    assert found["layers.1.mlp.down_proj"].scaling["default"] == 8 / 2**0.5
    assert model.init_reports["default"].options == {"niter": 2}
    assert model.init_reports["default"].seed == 3
    assert isinstance(model, peft.PeftModelForCausalLM), "a language model generates, whatever the config says"
    assert model.generate(input_ids=torch.tensor([[1, 2]]), min_new_tokens=2, max_new_tokens=2).shape == (1, 4)


def shell_names(model: nn.Module) -> list[tuple[str, ShellLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ShellLayer)]


@pytest.mark.parametrize("kind", ["linear_dora", "embedding", "attention", "encoder", "experts", "tied"])
def test_models_are_copied_pickled_and_given_states(kind: str, tmp_path: Path) -> None:
    case = case_of(kind, bias="lora_only")
    model: Any = train(case, get_peft_model(case.model(), case.config))
    wanted = case.outputs(model)
    torch.save(model, tmp_path / "model.pt")
    pickled = torch.load(tmp_path / "model.pt", weights_only=False)
    given = get_peft_model(case.model(), case.config)
    given.load_state_dict(state(model))
    for copied in (copy.deepcopy(model), pickled, given):
        assert isinstance(copied, ShellModel)
        assert same(case.outputs(copied), wanted)
        with copied.disable_adapter():
            assert same(case.outputs(copied), frozen_outputs(case))
        train(case, copied)
        assert same(case.outputs(model), wanted), "the copy shares with the original"
        copied.save_pretrained(tmp_path / "copied")


def test_half_precision_bases_train_in_float32(llama: Callable[[], Any]) -> None:
    base = llama().bfloat16()
    ids = torch.arange(12).reshape(1, 12)
    wanted = base(ids).logits
    model = get_peft_model(base, hs.LoraConfig(r=4, init_lora_weights="pissa"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(model(ids).logits, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()


def test_a_tied_head_is_adapted_without_untying_it(llama: Callable[[], Any]) -> None:
    """PEFT's PiSSA writes to the weight that the embedding shares, and the logits are off by half."""
    base = llama()
    ids = torch.arange(12).reshape(1, 12)
    wanted = base(ids).logits
    model = get_peft_model(
        base, hs.LoraConfig(r=4, target_modules=["lm_head", "embed_tokens"], init_lora_weights="pissa")
    )
    torch.testing.assert_close(model(ids).logits, wanted)
    assert base.lm_head.weight is base.model.embed_tokens.weight


# ------------------------------------------------------------------ PEFT's own adapters, beside ours

IDS = torch.arange(24).reshape(2, 12)


@contextmanager
def quiet() -> Iterator[None]:
    """Around what PEFT warns of for reasons of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def moved(model: Any, only: str = "") -> Any:
    """The same with every trained value of some name away from its start."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and only in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    return model


def logits(model: nn.Module, **keywords: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **keywords).logits  # type: ignore[no-any-return]


def by_peft(base: nn.Module, folder: Path, **fields: Any) -> Tensor:
    """What an adapter computes that PEFT started, trained and saved."""
    with quiet():
        model = moved(peft.get_peft_model(base, peft.LoraConfig(r=4, **fields)))
        model.save_pretrained(str(folder))
    return logits(model)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva", "mica"])
@quiet()
def test_an_adapter_of_pefts_is_loaded_as_it_is(
    init: str, trainable: bool, llama: Callable[[], Any], tmp_path: Path
) -> None:
    """How it was started is past, and asks for no data."""
    if init == "mica" and Version("0.20") > PEFT:
        pytest.skip("this PEFT has no such start")
    fields = {"eva_config": peft.EvaConfig()} if init == "eva" else {}
    wanted = by_peft(llama(), tmp_path, target_modules=["q_proj"], init_lora_weights=init, **fields)
    model = get_peft_model(llama(), hs.LoraConfig(r=2, init_lora_weights="milora"))
    model.load_adapter(str(tmp_path), "theirs", is_trainable=trainable)
    model.set_adapter("theirs")
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", ["olora", "pissa_niter_4"])
@quiet()
def test_an_adapter_that_changed_its_base_is_not_loaded_beside_others(
    init: str, llama: Callable[[], Any], tmp_path: Path
) -> None:
    by_peft(llama(), tmp_path, target_modules=["q_proj"], init_lora_weights=init)
    model = get_peft_model(llama(), hs.LoraConfig(r=2))
    before = fingerprint(model)
    for trainable in (False, True):
        with pytest.raises(AdapterFormatError, match="replaced the base's weights"):
            model.load_adapter(str(tmp_path), "theirs", is_trainable=trainable)
    assert fingerprint(model) == before
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "q_proj"]])
@quiet()
def test_a_layer_that_peft_adds_merges_and_unloads_as_ours_do(targets: list[str], llama: Callable[[], Any]) -> None:
    """PEFT's own writes to the weight that embedding and head share."""
    base = llama()
    before = fingerprint(base)
    model = get_peft_model(base, hs.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.add_adapter("theirs", peft.LoraConfig(r=4, target_modules=targets))
    model.set_adapter("theirs")
    wanted = logits(moved(model))
    torch.testing.assert_close(logits(copy.deepcopy(model).merge_and_unload()), wanted, rtol=1e-4, atol=1e-6)
    model.merge_adapter()
    assert fingerprint(model.unload()) == before


def test_a_branch_with_a_bias_is_computed_and_not_merged() -> None:
    case = case_of("linear")
    model: Any = get_peft_model(case.model(), case.config)
    config = peft.LoraConfig(r=4, target_modules=["left", "right"], lora_bias=True, init_lora_weights=False)
    theirs = peft.get_peft_model(case.model(), config)
    model.add_adapter("biased", config)
    model.set_adapter("biased")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.1)
                model.get_parameter(name.replace(".default.", ".biased.")).fill_(0.1)
    close(case.outputs(model), case.outputs(theirs))
    before = fingerprint(model)
    with pytest.raises(AdapterState, match="lora_bias"):
        model.merge_adapter()
    assert fingerprint(model) == before


@pytest.mark.skipif(Version("0.20") > PEFT, reason="this PEFT knows no variant in a layer that is adapted already")
@quiet()
def test_a_variant_that_peft_cannot_merge_is_not_merged(llama: Callable[[], Any]) -> None:
    model = get_peft_model(llama(), hs.LoraConfig(r=2))
    model.add_adapter("activated", peft.LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[5]))
    model.set_adapter("activated")
    with pytest.raises(AdapterState, match="ALora"):
        model.merge_and_unload()


def test_what_would_change_the_model_beneath_other_adapters_is_refused(llama: Callable[[], Any]) -> None:
    model = get_peft_model(llama(), hs.LoraConfig(r=2))
    with pytest.raises(BadOption, match="layer_replication"):
        model.add_adapter("longer", peft.LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)]))
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("config", ["ours", "pefts", "copy"])
def test_an_adapter_is_added_with_its_values_whatever_peft_would_leave_on_meta(config: str) -> None:
    case = case_of("linear")
    model: Any = train(case, get_peft_model(case.model(), case.config))
    theirs = peft.LoraConfig(r=2, target_modules=["left"], init_lora_weights="pissa")
    configs = {"ours": case.config, "pefts": theirs, "copy": model.peft_config["default"]}
    wanted = case.outputs(model) if config == "copy" else frozen_outputs(case)
    model.add_adapter("second", configs[config], low_cpu_mem_usage=True)
    model.set_adapter("second")
    close(case.outputs(model), wanted)


def test_switching_adapters_while_they_are_disabled_trains_the_one_that_is_active() -> None:
    case = case_of("linear", bias="all")
    model: Any = get_peft_model(case.model(), case.config)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["left"]))
    with model.disable_adapter():
        model.set_adapter("second")
        assert same(case.outputs(model), frozen_outputs(case))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(".second." in name for name in trained)
    assert not any(".default." in name for name in trained)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"init_lora_weights": "eva", "eva_config": peft.EvaConfig(whiten=True)}, "whiten=True"),
        ({"init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig(loftq_bits=8)}, "loftq_bits=8"),
    ],
)
@quiet()
def test_what_pefts_config_of_a_start_says_is_not_dropped(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(BadOption, match=f"{said}.*init_options"):
        get_peft_model(KINDS["linear"].make(), peft.LoraConfig(target_modules=["left"], **fields))
    usual = peft.LoraConfig(target_modules=["left"], init_lora_weights="loftq", loftq_config=peft.LoftQConfig())
    with pytest.raises(hs.HeadstartError, match=r"^(?!.*init_options)"):  # PEFT's defaults are no wish
        get_peft_model(KINDS["linear"].make(), usual, init="eva")


# ------------------------------------------------------------------ what else stands in a folder


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_grew_is_saved_and_found_again(tied: bool, llama: Callable[[], Any], tmp_path: Path) -> None:
    """PEFT saves both embeddings then, one memory under two names where they are tied."""
    base = llama()
    base.config.tie_word_embeddings = tied
    if not tied:
        base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    model = moved(get_peft_model(copy.deepcopy(base), hs.LoraConfig(r=2, target_modules=["q_proj"]), init="pissa"))
    wanted = logits(model)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert set(read_adapter(tmp_path).extras) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert torch.equal(logits(from_pretrained(copy.deepcopy(base), tmp_path)), wanted)
    assert torch.equal(logits(hs.load(copy.deepcopy(base), tmp_path).model), wanted)
    torch.testing.assert_close(logits(in_plain_peft(copy.deepcopy(base), tmp_path)), wanted)
    again = get_peft_model(copy.deepcopy(base), hs.LoraConfig(r=2, target_modules=["q_proj"]), init="pissa")
    again.load_adapter(tmp_path, "default")
    assert torch.equal(logits(again), wanted)
    with torch.no_grad():
        base.model.embed_tokens.weight += 1
    with pytest.raises(hs.HeadstartError, match="vocabulary"):
        from_pretrained(base, tmp_path)


def test_a_checkpoint_that_would_replace_a_weight_of_the_base_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    case = case_of("linear")
    config = case.but(target_modules=["left"]).config
    get_peft_model(case.model(), config).save_pretrained(tmp_path)
    with safe_open(tmp_path / TENSORS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / TENSORS)
    tensors["base_model.model.right.weight"] = torch.zeros(8, 12)
    save_file(tensors, tmp_path / TENSORS, metadata)
    model = get_peft_model(case.model(), config)
    before = fingerprint(model)
    with pytest.raises(KeyMismatch, match="no place for"):
        model.load_adapter(tmp_path, "default")
    assert fingerprint(model) == before


def test_an_argument_that_would_do_nothing_is_refused(tmp_path: Path) -> None:
    case = case_of("linear")
    model = get_peft_model(case.model(), case.config)
    model.save_pretrained(tmp_path)
    with pytest.raises(BadOption, match="subfolder"):
        model.load_adapter(tmp_path, "default", subfolder="elsewhere")
    model.load_adapter(tmp_path, "default", torch_device="cpu", subfolder=None)


@quiet()
def test_pefts_auto_class_finds_a_model_without_a_task(llama: Callable[[], Any], tmp_path: Path) -> None:
    llama().model.save_pretrained(tmp_path / "base")
    from transformers import AutoModel

    base = AutoModel.from_pretrained(tmp_path / "base")
    model = moved(get_peft_model(base, hs.LoraConfig(r=2, target_modules=["q_proj"]), init="pissa")).eval()
    model.save_pretrained(tmp_path / "adapter")
    found = peft.AutoPeftModel.from_pretrained(str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(found(IDS).last_hidden_state, model(IDS).last_hidden_state)


def test_fields_that_say_how_ms_swift_trained_are_read_over(llama: Callable[[], Any], tmp_path: Path) -> None:
    wanted = by_peft(llama(), tmp_path, target_modules=["q_proj"])
    config = json.loads((tmp_path / CONFIG).read_text())
    more = {"lora_dtype": "AUTO", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6}
    (tmp_path / CONFIG).write_text(json.dumps({**config, **more}))
    torch.testing.assert_close(logits(from_pretrained(llama(), tmp_path)), wanted)


# ------------------------------------------------------------------ a core between the factors


def with_core(base: nn.Module) -> ShellModel:
    batches = [{"input_ids": IDS + i, "labels": IDS + i} for i in range(2)]
    return get_peft_model(base, hs.LoraConfig(r=2, target_modules=["q_proj"]), init="lora_sb", data=batches)


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_core_is_saved_apart_and_goes_on_training(llama: Callable[[], Any], tmp_path: Path) -> None:
    """Multiplied into A it would leave two frozen factors, of which nothing trains."""
    model = moved(with_core(llama()))
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(in_plain_peft(llama(), tmp_path)), wanted)
    again = moved(with_core(llama()))
    again.load_adapter(tmp_path, "default", is_trainable=True)
    loaded = from_pretrained(llama(), tmp_path, is_trainable=True)
    native = hs.load(llama(), tmp_path, trainable=True)
    for found in (again, loaded, native.model):
        assert torch.equal(logits(found), wanted)
        assert trained(found) == trained(model) == 2 * 2 * 2
    hs.save(native.model, tmp_path / "native")
    assert (tmp_path / "native" / CORES).read_bytes() == (tmp_path / CORES).read_bytes()
    assert trained(from_pretrained(llama(), tmp_path)) == 0
    model.base_model.set_adapter("default", inference_mode=True)
    assert trained(model) == 0


def test_a_folder_without_its_cores_is_loaded_but_not_trained(llama: Callable[[], Any], tmp_path: Path) -> None:
    model = with_core(llama())
    model.save_pretrained(tmp_path / "other")
    wanted = logits(moved(model))
    model.save_pretrained(tmp_path)
    mine = (tmp_path / CORES).read_bytes()
    (tmp_path / CORES).write_bytes((tmp_path / "other" / CORES).read_bytes())
    with pytest.raises(KeyMismatch, match="another core"):
        from_pretrained(llama(), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(from_pretrained(llama(), tmp_path)), wanted)
    (tmp_path / CORES).write_bytes(mine[:-4])
    with pytest.raises(hs.HeadstartError, match=CORES):
        from_pretrained(llama(), tmp_path, is_trainable=True)
    (tmp_path / CORES).unlink()
    torch.testing.assert_close(logits(from_pretrained(llama(), tmp_path)), wanted)
    before = fingerprint(model)
    for attempt in (
        lambda: model.load_adapter(tmp_path, "default", is_trainable=True),
        lambda: from_pretrained(llama(), tmp_path, is_trainable=True),
        lambda: hs.load(llama(), tmp_path, trainable=True),
    ):
        with pytest.raises(KeyMismatch, match=CORES):
            attempt()
    assert fingerprint(model) == before


def test_a_core_counts_wherever_the_adapter_is_read(llama: Callable[[], Any], tmp_path: Path) -> None:
    model = moved(with_core(llama()))
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    base = llama()
    before = logits(base)
    assert not torch.allclose(wanted, before, atol=1e-3)
    bank = hs.AdapterBank(base)
    bank.load("a", tmp_path / "adapter")
    with bank.route(["a"] * len(IDS)):
        torch.testing.assert_close(logits(base), wanted)
    bank.close()
    base.save_pretrained(tmp_path / "base")
    hs.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(type(base).from_pretrained(tmp_path / "merged")), wanted, atol=1e-4, rtol=1e-4)


def test_a_core_of_a_half_precision_adapter_goes_on_training(llama: Callable[[], Any], tmp_path: Path) -> None:
    adapter = hs.load(llama(), saved(moved(with_core(llama())), tmp_path / "one"), trainable=True)
    hs.save(adapter.model.to(torch.bfloat16), tmp_path / "half")
    assert trained(hs.load(llama().to(torch.bfloat16), tmp_path / "half", trainable=True).model) == 2 * 2 * 2
    hs.save(adapter.model, tmp_path / "small", rank=1)
    assert trained(hs.load(llama(), tmp_path / "small", trainable=True).model) > 0


def saved(model: ShellModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_a_core_is_never_forgotten_in_a_mixture(llama: Callable[[], Any]) -> None:
    model = moved(with_core(llama())).eval()
    model.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterState, match="trains a core"):
        model(input_ids=IDS, adapter_names=["default", "plain"])
    with pytest.raises(AdapterState, match="trains a core"):
        model.add_weighted_adapter(["default", "plain"], [1.0, 1.0], "both", combination_type="cat")
    model.base_model.set_adapter(["default", "plain"])
    with pytest.raises(AdapterState, match="trains a core"):
        model(input_ids=IDS)
