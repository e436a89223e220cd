"""Every law of `headstart.testing` over every strategy, layer kind, dtype and shell; for every law, a break of it."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import headstart as hs
from headstart import testing
from headstart.errors import BadOption
from headstart.inits import strategy as registry
from headstart.inits.pissa import pissa
from headstart.inits.strategy import Factors, Strategy
from headstart.lora import delta
from headstart.lora.adapter import adapter_of
from headstart.lora.config import LoraConfig
from headstart.lora.layers import LoraLayer, lora_layers
from headstart.testing import (
    KINDS,
    LAWS,
    MODEL_LAWS,
    NATIVE,
    PEFT,
    Case,
    Law,
    Native,
    check_strategy,
    fingerprint,
    laws,
    violations,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*shared a weight with other modules",
    "ignore:The PyTorch API of nested tensors",
    "ignore:PEFT ignores dilation and padding_mode",
)


def broken(case: Case, wanted: Sequence[Law] = LAWS) -> list[str]:
    return [f"{law.__name__} ({case}): {said}" for law, said in violations(case, wanted)]


def dtypes(init: str, kind: str) -> tuple[torch.dtype, torch.dtype]:
    """Full precision, and one of the halves by turns: every start and every kind meets both."""
    turn = hs.strategies().index(init) + list(KINDS).index(kind)
    return torch.float32, (torch.bfloat16, torch.float16)[turn % 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", hs.strategies())
def test_every_start_obeys_the_laws_on_every_kind_of_layer(init: str, kind: str) -> None:
    found = [said for dtype in dtypes(init, kind) for said in broken(Case(init, KINDS[kind], dtype))]
    assert not found, "\n".join(found)


# A start enters a PeftModel as two factors, anchored or not, frozen or not, with or without a product that is zero.
# One of each goes through every law there; the others, through the laws that would see their numbers go wrong.
SORTS = {"kaiming", "pissa", "mica", "random"}
NUMBERS = (laws.the_function_is_kept_at_step_zero, laws.a_file_means_the_same_on_a_fresh_base)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.peft])
@pytest.mark.parametrize("init", hs.strategies())
def test_every_start_obeys_the_laws_in_a_peft_model(init: str, kind: str) -> None:
    full, half = (Case(init, KINDS[kind], dtype, shell=PEFT) for dtype in dtypes(init, kind))
    found = broken(full, MODEL_LAWS) + broken(half, MODEL_LAWS) if init in SORTS else broken(full, NUMBERS)
    assert not found, "\n".join(found)


def test_starts_are_the_same_in_every_process() -> None:
    """Neither the hash seed nor what ran before enters a start."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from test_laws import digest; print(digest())"
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, here], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == digest()


def digest() -> str:
    torch.set_num_threads(1)
    found = hashlib.sha256()
    for init, kind in itertools.product(hs.strategies(), ("linear", "embedding", "conv2d_grouped", "experts")):
        case = Case(init, KINDS[kind])
        for _, start in case.starts().values() if case.runs() else ():
            found.update(start.A.numpy().tobytes() + start.B.numpy().tobytes())
    return found.hexdigest()


# ------------------------------------------------------------------ negative controls: starts


def strategy(function: Callable[..., Factors]) -> Strategy:
    return Strategy(function.__name__, function, paper="", fact="")


def too_large(shape: tuple[int, int], rank: int) -> Factors:
    return Factors(torch.ones(rank + 1, shape[1]), torch.zeros(shape[0], rank + 1))


def half(weight: Any, rank: int) -> Factors:
    return Factors(torch.ones(rank, weight.shape[1]).bfloat16(), torch.zeros(weight.shape[0], rank).bfloat16())


def dead(shape: tuple[int, int], rank: int) -> Factors:
    return Factors(torch.zeros(rank, shape[1]), torch.zeros(shape[0], rank))


def half_dead(shape: tuple[int, int], rank: int) -> Factors:
    A = torch.ones(rank, shape[1])
    A[-1] = 0
    return Factors(A, torch.zeros(shape[0], rank))


def residual(weight: Any, rank: int, scaling: float) -> Factors:
    """PEFT's way: the weight loses what the branch holds."""
    m, n = weight.shape
    A, B = torch.full((rank, n), 0.1), torch.full((m, rank), 0.1)
    weight -= scaling * (B @ A).to(weight.dtype)
    return Factors(A, B)


def global_noise(shape: tuple[int, int], rank: int) -> Factors:
    return Factors(torch.rand(rank, shape[1]), torch.zeros(shape[0], rank))


calls = itertools.count(1)


def counting(shape: tuple[int, int], rank: int) -> Factors:
    return Factors(torch.full((rank, shape[1]), float(next(calls))), torch.zeros(shape[0], rank))


def undivided(weight: Any, rank: int, scaling: float) -> Factors:
    """A PiSSA that forgets s."""
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    root = S[:rank].sqrt()
    return Factors(root[:, None] * Vh[:rank], U[:, :rank] * root, anchored=True)


def by_layout(weight: Any, rank: int) -> Factors:
    """Fills A in the order in which the weight lies in memory."""
    m, n = weight.shape
    first = weight if weight.is_contiguous() else weight.T
    return Factors(first.flatten()[: rank * n].reshape(rank, n).float() + 1, torch.zeros(m, rank))


def by_norm(weight: Any, rank: int) -> Factors:
    """0/0 on a zero weight."""
    m, n = weight.shape
    return Factors((weight / weight.norm()).float()[:1].expand(rank, n).clone(), torch.zeros(m, rank))


def blind(weight: Any, rank: int) -> Factors:
    """Reads a weight and does not see that it is NaN."""
    m, n = weight.shape
    return Factors(weight.float().nan_to_num()[:1].expand(rank, n) + 1, torch.zeros(m, rank))


BROKEN_STARTS = [
    (laws.factors_have_the_shapes_asked_for, too_large),
    (laws.factors_have_the_shapes_asked_for, half),
    (laws.factors_have_the_shapes_asked_for, dead),
    (laws.factors_have_the_shapes_asked_for, half_dead),
    (laws.starts_are_pure, residual),
    (laws.starts_are_pure, global_noise),
    (laws.starts_know_no_order, counting),
    (laws.scaling_cancels, undivided),
    (laws.storage_does_not_matter, by_layout),
    (laws.odd_weights_are_served_or_refused, by_norm),
    (laws.odd_weights_are_served_or_refused, blind),
]


@pytest.mark.parametrize(("law", "start"), BROKEN_STARTS, ids=lambda it: it.__name__)
def test_a_broken_start_fails_its_law(law: Law, start: Callable[..., Factors]) -> None:
    with testing.registered(strategy(start)) as name:
        assert broken(Case(name, KINDS["linear"]), (law,))
    assert not broken(Case("pissa", KINDS["linear"]), (law,))


# ------------------------------------------------------------------ negative controls: shells


class Moving(Native):
    """Forgets the anchors."""

    def adapt(self, model: nn.Module, config: LoraConfig) -> nn.Module:
        super().adapt(model, config)
        for _, layer in lora_layers(model):
            layer.anchor_A = layer.anchor_B = None
        return model


class Destructive(Moving):
    """Moves the anchor into the weight: right at step zero, and wrong for ever after."""

    def adapt(self, model: nn.Module, config: LoraConfig) -> nn.Module:
        super().adapt(model, config)
        for _, layer in lora_layers(model):
            layer.original.data -= layer.merged_weight() - layer.original.data
        return model


class Thawed(Native):
    """Freezes nothing."""

    def adapt(self, model: nn.Module, config: LoraConfig) -> nn.Module:
        return super().adapt(model, config).requires_grad_(True)


class Bypassed(Native):
    """Lets torch's encoders compute past the layers."""

    def adapt(self, model: nn.Module, config: LoraConfig) -> nn.Module:
        super().adapt(model, config)
        adapter_of(model).switch(off=False)
        return model


class Unhooked(Native):
    """Calls no hooks."""

    def adapt(self, model: nn.Module, config: LoraConfig) -> nn.Module:
        for module in model.modules():
            module._forward_hooks.clear()
        return super().adapt(model, config)


class Enabled(Native):
    """Disables nothing."""

    def disabled(self, model: nn.Module) -> AbstractContextManager[object]:
        return nullcontext()


class Forgetful(Native):
    """Leaves the flags as the adapter set them."""

    def remove(self, model: nn.Module) -> nn.Module:
        return super().remove(model).requires_grad_(False)


class Unscaled(Native):
    """Merges B·A for s·B·A."""

    def merge(self, model: nn.Module) -> None:
        for _, layer in lora_layers(model):
            layer.scaling = 1.0
        super().merge(model)


class Sticky(Native):
    """Unmerges by leaving things as they are."""

    def unmerge(self, model: nn.Module) -> None:
        for _, layer in lora_layers(model):
            layer._merged.original.clear()


class Truncating(Native):
    """Saves the first direction alone."""

    def save(self, model: nn.Module, folder: str) -> None:
        hs.save(model, folder, rank=1)


class Patternless(Native):
    """Reads one scale for all layers."""

    def load(self, base: nn.Module, folder: str) -> nn.Module:
        model = super().load(base, folder)
        layers = dict(lora_layers(model)).values()
        for layer in layers:
            layer.scaling = next(iter(layers)).scaling
        return model


class Restless(Native):
    """Another seed for every run."""

    def adapt(self, model: nn.Module, config: LoraConfig) -> nn.Module:
        return super().adapt(model, replace(config, seed=next(calls)))


BROKEN_SHELLS = [
    (laws.the_function_is_kept_at_step_zero, Moving, "linear"),
    (laws.only_the_adapter_trains, Thawed, "linear"),
    (laws.only_the_adapter_trains, Destructive, "linear"),
    (laws.every_mode_computes_the_branch, Bypassed, "encoder_linear"),
    (laws.hooks_are_still_called, Unhooked, "linear"),
    (laws.disabled_is_the_base, Enabled, "linear"),
    (laws.disabled_is_the_base, Destructive, "linear"),
    (laws.removed_is_the_base, Forgetful, "linear"),
    (laws.removed_is_the_base, Destructive, "linear"),
    (laws.merged_computes_the_same, Unscaled, "conv2d"),
    (laws.merged_computes_the_same, Sticky, "linear"),
    (laws.a_file_means_the_same_on_a_fresh_base, Truncating, "embedding"),
    (laws.a_file_means_the_same_on_a_fresh_base, Destructive, "linear"),
    (laws.a_file_carries_patterns_and_biases, Patternless, "linear"),
    (laws.runs_repeat, Restless, "linear"),
]


@pytest.mark.parametrize(("law", "shell", "kind"), BROKEN_SHELLS, ids=lambda it: getattr(it, "__name__", it))
def test_a_broken_shell_fails_its_law(law: Law, shell: type[Native], kind: str) -> None:
    init = "kaiming" if shell is Restless else "pissa"
    assert broken(Case(init, KINDS[kind], shell=shell()), (law,))
    assert not broken(Case(init, KINDS[kind], shell=NATIVE), (law,))


def unrelated(shape: tuple[int, int], rank: int, scaling: float, generator: torch.Generator) -> Factors:
    """A PiSSA of random directions: anchored, and of no use."""
    m, n = shape
    U = torch.linalg.qr(torch.randn(m, rank, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(n, rank, generator=generator)).Q
    return Factors(V.T / scaling, U, anchored=True)


def test_the_laws_cannot_see_which_directions_a_start_takes() -> None:
    """Which is why every spectral start is also held against a dense float64 decomposition."""
    check_strategy(strategy(unrelated), kinds=["linear"])
    W = torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    best = W.norm() ** 2 - torch.linalg.svdvals(W)[:4].square().sum()
    generator = torch.Generator().manual_seed(0)
    found = {
        True: pissa(W.float(), 4, 2.0, generator),
        False: unrelated((40, 30), 4, 2.0, generator),
    }
    for right, factors in found.items():
        left = (W - 2.0 * factors.B.double() @ factors.A.double()).norm() ** 2
        assert (left < best * (1 + 1e-6)) == right


def test_every_law_has_a_break() -> None:
    assert {law for law, *_ in (*BROKEN_STARTS, *BROKEN_SHELLS)} == set(LAWS)


# ------------------------------------------------------------------ moments that no law reaches


@pytest.fixture
def case() -> Case:
    return Case("random", KINDS["linear"])


def test_a_forward_that_somebody_replaced_is_still_called(case: Case) -> None:
    """As accelerate replaces it, to fetch an offloaded weight."""
    model: Any = case.model()
    called, own = [], model.left.forward
    model.left.forward = lambda x: (called.append(x.shape), own(x))[1]
    wanted = case.outputs(case.adapted())
    for a, b in zip(case.outputs(NATIVE.adapt(model, case.config)), wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert called


def test_disabled_is_the_base_while_merged_too(case: Case) -> None:
    base, adapted = case.model().requires_grad_(False), case.adapted()
    NATIVE.merge(adapted)
    merged = case.outputs(adapted)
    with NATIVE.disabled(adapted):
        assert all(map(torch.equal, case.outputs(adapted), case.outputs(base)))
    assert all(map(torch.equal, case.outputs(adapted), merged))


def same_model(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models are made of the same modules and hold the same bits."""
    a, b = one.state_dict(), other.state_dict()
    kinds = [[(name, type(module)) for name, module in model.named_modules()] for model in (one, other)]
    flags = [[(name, p.requires_grad) for name, p in model.named_parameters()] for model in (one, other)]
    return (
        kinds[0] == kinds[1]
        and flags[0] == flags[1]
        and a.keys() == b.keys()
        and all(map(same_bits, a.values(), b.values()))
    )


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_in_place_is_the_same_merge(kind: str, dtype: torch.dtype) -> None:
    case = Case("pissa", KINDS[kind], dtype)
    apart, within = copy.deepcopy(case.trained), copy.deepcopy(case.trained)
    frozen = {name: layer.original for name, layer in lora_layers(within)}
    shared = len(set(map(id, frozen.values()))) < len(frozen)
    wanted = hs.merge(apart).lost
    assert hs.merge(within, in_place=True).lost == pytest.approx(wanted)
    assert same_model(within, apart)
    kept = {id(parameter) for parameter in within.parameters()}
    assert shared or kind.startswith("tied") or all(id(parameter) in kept for parameter in frozen.values())


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["linear", "experts", "attention", "linear_dora"])
def test_an_interrupt_of_a_merge_in_place_leaves_the_outputs_as_they_are(
    kind: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a layer's weight is written to, and right after."""
    case = Case("pissa", KINDS[kind], torch.float64)
    layers = len(dict(lora_layers(case.trained)))
    assert layers > 1
    whole = copy.deepcopy(case.trained)
    hs.merge(whole)
    real = delta.fold
    for k in range(layers):
        model, calls = copy.deepcopy(case.trained), itertools.count()

        def failing(*given: Any, calls: Any = calls, k: int = k) -> None:
            ours = next(calls) == k
            if late or not ours:
                real(*given)
            if ours:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(delta, "fold", failing)
            with pytest.raises(KeyboardInterrupt):
                hs.merge(model, in_place=True)
        assert len(dict(lora_layers(model))) == layers - k - late
        for a, b in zip(case.outputs(model), case.outputs(case.trained), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        hs.merge(model, in_place=True)
        assert same_model(model, whole)


def test_an_interrupt_while_a_shared_weight_is_replaced_loses_no_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("pissa", KINDS["tied"], torch.float64)
    model, whole = copy.deepcopy(case.trained), copy.deepcopy(case.trained)
    hs.merge(whole)

    def interrupted(layer: LoraLayer, weight: nn.Parameter) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LoraLayer, "_put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hs.merge(model, in_place=True)
    for a, b in zip(case.outputs(model), case.outputs(case.trained), strict=True):
        assert torch.equal(a, b)
    hs.merge(model, in_place=True)
    assert same_model(model, whole)


def test_a_merge_in_place_keeps_nothing_to_go_back_to(case: Case) -> None:
    model = case.adapted()
    with pytest.raises(BadOption, match="leave reversible or in_place out"):
        hs.merge(model, reversible=True, in_place=True)
    assert dict(lora_layers(model))


def test_an_interrupt_in_the_commit_leaves_the_model_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    freeze = torch.Tensor.requires_grad_
    for moment in itertools.count(1):
        left, model = itertools.count(1), case.model()
        before = fingerprint(model)

        def interrupted(tensor: Any, *flag: bool, left: Any = left, moment: int = moment) -> Any:
            if next(left) == moment:
                raise KeyboardInterrupt
            return freeze(tensor, *flag)

        monkeypatch.setattr(torch.Tensor, "requires_grad_", interrupted)
        try:
            NATIVE.adapt(model, case.config)
        except KeyboardInterrupt:
            assert fingerprint(model) == before
        else:
            break
        finally:
            monkeypatch.undo()
    assert moment > 4


# ------------------------------------------------------------------ check_strategy


def test_a_strategy_of_your_own_is_checked_and_not_kept() -> None:
    def mine(shape: tuple[int, int], rank: int, generator: torch.Generator) -> Factors:
        return Factors(torch.randn(rank, shape[1], generator=generator), torch.zeros(shape[0], rank))

    before = registry.names()
    check_strategy(strategy(mine), kinds=["linear"], dtypes=[torch.float32])
    assert registry.names() == before


def test_what_is_broken_is_listed_with_its_case() -> None:
    with pytest.raises(AssertionError, match=r"starts_are_pure \(residual on linear, float32, native\)"):
        check_strategy(strategy(residual), kinds=["linear"], dtypes=[torch.float32])


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(BadOption, match=r"'linaer'; did you mean 'linear'"):
        check_strategy("pissa", kinds=["linaer"])


def test_a_start_that_raises_breaks_its_laws() -> None:
    def raising(shape: tuple[int, int], rank: int) -> Factors:
        raise ZeroDivisionError("by design")

    with pytest.raises(AssertionError, match="ZeroDivisionError: by design"):
        check_strategy(strategy(raising), kinds=["linear"], dtypes=[torch.float32])


@pytest.mark.gpu
@pytest.mark.parametrize("init", hs.strategies())
def test_the_laws_hold_on_an_accelerator(init: str) -> None:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    check_strategy(init, device=device)
