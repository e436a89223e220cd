"""The laws: each a function of a `Case`, made of plain assertions."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from headstart.errors import HeadstartError, NonFiniteWeight, UnsupportedLayer
from headstart.inits import strategy as registry
from headstart.lora import matrix
from headstart.lora.layers import Start
from headstart.lora.layouts import Layout
from headstart.lora.starts import start_of
from headstart.lora.targets import Target, targets
from headstart.testing.cases import RANK, Case, bits, fingerprint, known_of_rows, products, rounding, same, train
from headstart.testing.kinds import transformers_conv1d

LARGER = 2 * RANK


def factors_have_the_shapes_asked_for(case: Case) -> None:
    for name, (target, start) in case.starts().items():
        weight = matrix.outline(target.module, target.parameter)
        device = matrix.parameter_of(target.module, target.parameter).device
        rank = target.layout.block_rank(target.rank)
        pairs = target.layout.unpack(start.A, start.B)
        for block, (A, B) in zip(target.layout.blocks(weight), pairs, strict=True):
            assert A.shape == (rank, block.shape[1]), f"A of {name} is {tuple(A.shape)}, not {(rank, block.shape[1])}"
            assert B.shape == (block.shape[0], rank), f"B of {name} is {tuple(B.shape)}, not {(block.shape[0], rank)}"
        for factor in (start.A, start.B):
            assert factor.dtype == torch.float32, f"a factor of {name} is {factor.dtype}: give float32"
            assert factor.device == device, f"a factor of {name} is on {factor.device}, not {device}"
            assert factor.isfinite().all(), f"a factor of {name} holds NaN or infinity"
        _check_alive(name, target, start)


def _check_alive(name: str, target: Target, start: Start) -> None:
    """The gradient of a column of B is a multiple of the row of A, and the other way round: one must be there.

    A core trains wherever both are.
    """
    for A, B in target.layout.unpack(start.A, start.B):
        moves_B = A.any(dim=1) & ("B" not in start.frozen)
        moves_A = B.any(dim=0) & ("A" not in start.frozen)
        moves_core = A.any(dim=1) & B.any(dim=0) & (start.core is not None)
        dead = int((~(moves_A | moves_B | moves_core)).sum())
        assert not dead, f"{dead} of the {len(A)} directions of {name} can never train: their gradient is zero"


def starts_are_pure(case: Case) -> None:
    model = case.model()
    before, state = fingerprint(model), torch.get_rng_state()
    first = case.starts(model)
    assert fingerprint(model) == before, "the start changed the model: return factors, do not write"
    assert torch.equal(torch.get_rng_state(), state), "the start drew from the global generator: use `generator`"
    torch.rand(1)
    for name, (_, start) in case.starts(model).items():
        again = first[name][1]
        assert torch.equal(start.A, again.A) and torch.equal(start.B, again.B), (
            f"{name} starts differently the second time"
        )
    torch.set_rng_state(state)


def starts_know_no_order(case: Case) -> None:
    together = case.starts()
    for name in together:
        alone = _start_alone(case, name)
        for letter in "AB":
            equal = torch.equal(getattr(alone, letter), getattr(together[name][1], letter))
            assert equal, f"{letter} of {name} depends on what was started before it"


def _start_alone(case: Case, name: str) -> Start:
    """The start of one layer in a model whose other layers are started after it, or not at all."""
    found = {target.name: target for target in targets(case.model(), case.config)}
    return start_of(found[name], case.config, case.calibration)[0]


def scaling_cancels(case: Case) -> None:
    """Where a strategy takes `scaling`, s·B₀·A₀ is what its paper fixes, for every α and with rsLoRA."""
    strategy = registry.get(case.init)[0]
    if "scaling" not in strategy.parameters or strategy.scales:
        return
    wanted = [p for t, s in case.starts().values() for p in products(t, s)]
    for changes in ({"lora_alpha": RANK / 2}, {"lora_alpha": RANK}, {"lora_alpha": 4 * RANK}, {"use_rslora": True}):
        found = [p for t, s in case.but(**changes).starts().values() for p in products(t, s)]
        same(found, wanted, 1e-5, f"s·B₀·A₀ with {changes}")


def storage_does_not_matter(case: Case) -> None:
    """Linear, Conv1D and a 1×1 Conv2d that hold one matrix get one adapter."""
    if case.kind.name != "linear":
        return
    m, n = 12, 8
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(2)).to(case.device, case.dtype)
    forms: dict[str, tuple[nn.Module, Tensor]] = {
        "Linear": (nn.Linear(n, m), W),
        "Conv1d": (nn.Conv1d(n, m, 1), W[..., None]),
        "Conv2d": (nn.Conv2d(n, m, 1), W[..., None, None]),
        "Conv3d": (nn.Conv3d(n, m, 1), W[..., None, None, None]),
    }
    with suppress(ImportError):
        forms["Conv1D"] = (transformers_conv1d(m, n), W.T.contiguous())
    found = {}
    for name, (layer, weight) in forms.items():
        layer.weight = nn.Parameter(weight)
        alike = case.but(target_modules=["layer"])
        ((_, start),) = alike.starts(nn.ModuleDict({"layer": layer}), known_of_rows("layer", m, n)).values()
        found[name] = start.A.reshape(RANK, n), start.B.reshape(m, RANK)
    for name, factors in found.items():
        same(factors, found["Linear"], 1e-5, f"the factors of {name} against those of Linear")


def odd_weights_are_served_or_refused(case: Case) -> None:
    """Zero, deficient and strided weights keep the function and can train; NaN is refused by who reads it."""
    for name, change in _ODD.items():
        model = case.model()
        for target in targets(model, case.config):
            weight = matrix.parameter_of(target.module, target.parameter)
            weight.data = change(weight.detach(), target.layout)
        before, wanted = fingerprint(model), case.outputs(model)
        try:
            starts = case.starts(model)
            adapted = case.adapt(model)
        except HeadstartError as error:
            assert name == "NaN" and isinstance(error, NonFiniteWeight), f"a {name} weight is refused: {error}"
            assert fingerprint(model) == before, f"the refusal of a {name} weight left the model changed"
            continue
        assert name != "NaN" or not registry.get(case.init)[0].reads_weight, "a NaN weight was read and not refused"
        for layer, (target, start) in starts.items():
            _check_alive(f"{layer} ({name} weight)", target, start)
        if name != "NaN":
            if case.preserves:
                same(case.outputs(adapted), wanted, rounding(case, 2), f"step zero on a {name} weight")
            finite = all(y.isfinite().all() for y in case.outputs(train(case, adapted)))
            assert finite, f"training on a {name} weight gives NaN or infinity"


def _deficient(weight: Tensor, layout: Layout) -> Tensor:
    changed = weight.clone()
    for block in layout.blocks(changed):
        block.copy_(torch.outer(block[:, 0], block[0]))
    return changed


def _poisoned(weight: Tensor, layout: Layout) -> Tensor:
    changed = weight.clone()
    layout.blocks(changed)[-1][-1, 0] = float("nan")
    return changed


_ODD: Mapping[str, Callable[[Tensor, Layout], Tensor]] = {
    "zero": lambda weight, _: torch.zeros_like(weight),
    "rank-1": _deficient,
    "strided": lambda weight, _: torch.stack([weight, weight], dim=-1)[..., 0],
    "NaN": _poisoned,
}


# ------------------------------------------------------------------ laws of a model


def the_function_is_kept_at_step_zero(case: Case) -> None:
    if not case.preserves:
        return
    base = case.model()
    wanted = case.outputs(base)
    # DoRA multiplies by a ratio of one and adds the bias itself.
    tolerance = rounding(case, 2 if case.config.use_dora else 1)
    same(case.outputs(case.adapt(base)), wanted, tolerance, "the output at step zero")
    if case.config.target_parameters:
        return
    dropping = case.but(lora_dropout=0.5).adapted().train()
    same(case.outputs(dropping), wanted, tolerance, "the output at step zero, in training with dropout")


def only_the_adapter_trains(case: Case) -> None:
    base = case.model()
    frozen = {name: (parameter, bits(parameter)) for name, parameter in base.named_parameters()}
    adapted = case.adapt(base)
    values = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    assert values, "nothing trains"
    train(case, adapted)
    for name, (parameter, before) in frozen.items():
        assert not parameter.requires_grad and bits(parameter) == before, f"the frozen {name} has moved"
    now = dict(adapted.named_parameters())
    still = [name for name, value in values.items() if torch.equal(now[name], value)]
    assert not still, f"{still} did not move"


def every_mode_computes_the_branch(case: Case) -> None:
    adapted = case.trained
    wanted = [y.detach() for y in case.outputs(adapted, grad=True)]
    with case.shell.disabled(adapted):
        base = case.outputs(adapted)
    moved = any(not torch.equal(a, b) for a, b in zip(wanted, base, strict=True))
    assert moved, "training moved no output: the branch is not computed"
    for mode in (True, False):
        adapted.train(mode)
        what = f"{'training' if mode else 'evaluation'} mode"
        same(case.outputs(adapted), wanted, rounding(case, 8), f"{what} without gradients against with them")
    with torch.inference_mode():
        same(case.outputs(adapted), wanted, rounding(case, 8), "evaluation under inference_mode")


def hooks_are_still_called(case: Case) -> None:
    """Whoever hooked a layer before it was adapted goes on seeing what it puts out, or the layer is refused."""
    model = case.model()
    seen: list[str] = []
    for target in targets(model, case.config):
        target.module.register_forward_hook(lambda *_, name=target.name: seen.append(name))
    try:
        adapted = case.adapt(model)
    except UnsupportedLayer:
        return
    case.outputs(adapted)
    assert set(seen) == {target.name for target in targets(case.model(), case.config)}, "hooks are no longer called"


def disabled_is_the_base(case: Case) -> None:
    # Frozen, because torch chooses some of its kernels by whether a weight requires a gradient.
    adapted, wanted = case.trained, case.outputs(case.model().requires_grad_(False))
    moved = case.outputs(adapted)
    with case.shell.disabled(adapted):
        same(case.outputs(adapted), wanted, 0, "the disabled model against the base")
    same(case.outputs(adapted), moved, 0, "the model enabled again")


def removed_is_the_base(case: Case) -> None:
    case = case.but(bias="all")
    base = case.model()
    next(base.parameters()).requires_grad_(False)
    before, wanted = fingerprint(base), case.outputs(base)
    removed = case.shell.remove(train(case, case.adapt(base)))
    same(case.outputs(removed), wanted, 0, "the model after removal against the base")
    _unchanged(before, fingerprint(removed), "removal")


def merged_computes_the_same(case: Case) -> None:
    adapted = copy.deepcopy(case.trained)
    wanted, before = case.outputs(adapted), fingerprint(adapted)
    # In half precision every element of the merged weight is rounded once.
    tolerance = 1e-5 if case.dtype == torch.float32 else rounding(case, 4)
    case.shell.merge(adapted)
    same(case.outputs(adapted), wanted, tolerance, "the merged model against the forward")
    case.shell.unmerge(adapted)
    same(case.outputs(adapted), wanted, 0, "the unmerged model")
    _unchanged(before, fingerprint(adapted), "merging and unmerging")
    folded = case.shell.fold(adapted)
    same(case.outputs(folded), wanted, tolerance, "the folded model against the forward")
    assert [type(m) for m in folded.modules()] == [type(m) for m in case.model().modules()], (
        "folding left layers behind"
    )


def a_file_means_the_same_on_a_fresh_base(case: Case) -> None:
    _saved_and_loaded(case, case.trained, "saved and loaded")


def a_file_carries_patterns_and_biases(case: Case) -> None:
    found = targets(case.model(), case.config)
    names = [target.name for target in found if not target.name.endswith(".out_proj")]  # scaled as their attention
    ranks, alphas = {names[0]: LARGER}, {names[-1]: 3.0}
    case = case.but(use_rslora=True, rank_pattern=ranks, alpha_pattern=alphas, bias="lora_only")
    _saved_and_loaded(case, case.trained, "saved and loaded, with rsLoRA, patterns and biases")


def _saved_and_loaded(case: Case, adapted: nn.Module, what: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        case.shell.save(adapted, folder)
        loaded = case.shell.load(case.model(), folder)
    same(case.outputs(loaded), case.outputs(adapted), 0, what)


def runs_repeat(case: Case) -> None:
    torch.rand(1)
    same(case.outputs(train(case, case.adapted())), case.outputs(case.trained), 0, "a second run from the same seed")


def _unchanged(before: Mapping[str, object], after: Mapping[str, object], what: str) -> None:
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    assert not changed, f"{what} changed {changed}"


# ------------------------------------------------------------------ all of them

Law = Callable[[Case], None]

START_LAWS: tuple[Law, ...] = (
    factors_have_the_shapes_asked_for,
    starts_are_pure,
    starts_know_no_order,
    scaling_cancels,
    storage_does_not_matter,
)
MODEL_LAWS: tuple[Law, ...] = (
    odd_weights_are_served_or_refused,
    the_function_is_kept_at_step_zero,
    only_the_adapter_trains,
    every_mode_computes_the_branch,
    hooks_are_still_called,
    disabled_is_the_base,
    removed_is_the_base,
    merged_computes_the_same,
    a_file_means_the_same_on_a_fresh_base,
    a_file_carries_patterns_and_biases,
    runs_repeat,
)
LAWS: tuple[Law, ...] = (*START_LAWS, *MODEL_LAWS)
# What half precision can break; the others hold in every dtype or in none.
ROUNDING_LAWS: tuple[Law, ...] = (
    factors_have_the_shapes_asked_for,
    the_function_is_kept_at_step_zero,
    every_mode_computes_the_branch,
    disabled_is_the_base,
    merged_computes_the_same,
    a_file_means_the_same_on_a_fresh_base,
)


def violations(case: Case, laws: Sequence[Law] = LAWS) -> Iterator[tuple[Law, str]]:
    """The laws that a case breaks, each with what it says; none where the base itself does not run."""
    if not case.runs():
        return
    for law in laws:
        if case.dtype not in (torch.float32, torch.float64) and law not in ROUNDING_LAWS:
            continue
        try:
            law(case)
        except AssertionError as error:
            yield law, str(error)
        except Exception as error:  # whatever a stranger's strategy raises is a law that does not hold
            yield law, f"{type(error).__name__}: {error}"
