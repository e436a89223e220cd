"""What goes wrong with PEFT 0.21.2 and must not go wrong here, natively and through `headstart.peft`.

Where it is cheap the same is done with PEFT alone, and what it does is printed (`pytest -s`): an observation, no claim.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import headstart as hs
from headstart import linalg
from headstart.errors import AdapterState, BadAlpha, BadRank, UnsupportedLayer
from headstart.files.adapter import read_adapter
from headstart.inits import strategy as registry
from headstart.lora.adapter import adapter_of
from headstart.lora.layers import LoraLayer
from headstart.peft import from_pretrained, get_peft_model
from headstart.peft.shell import ShellLayer
from headstart.testing import KINDS, NATIVE, PEFT, Both, Case, Kind, Shell, fingerprint, train

pytestmark = pytest.mark.filterwarnings("ignore")

ANCHORED = ("pissa", "olora", "milora", "loram")
SHELLS = pytest.mark.parametrize("shell", [NATIVE, PEFT], ids=lambda shell: shell.name)
LINEAR = KINDS["linear"]


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """‖found − wanted‖ over ‖wanted‖, all outputs together."""
    a, b = (torch.cat([y.double().flatten() for y in side]) for side in (found, wanted))
    return float((a - b).norm() / b.norm())


def same_bits(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def observe(case: Case, what: str, look: Callable[[], object]) -> None:
    """Print what PEFT alone does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = look()
        except Exception as error:
            found = f"{type(error).__name__}: {str(error)[:80]}"
    said = f"{found:.2g}" if isinstance(found, float) else found
    print(f"PEFT {peft.__version__}, {case.init} on {case.kind.name}: {what}: {said}")


def plain_peft(case: Case, model: nn.Module | None = None, **changes: Any) -> Any:
    """PEFT alone, with its own start of the same name."""
    fields = {"r": 4, "lora_alpha": 8, "init_lora_weights": case.init, **case.kind.fields, **changes}
    return peft.get_peft_model(model or case.model(), peft.LoraConfig(**fields)).eval()


# ------------------------------------------------------------------ 1, 2: the base is never written to


@SHELLS
@pytest.mark.parametrize("init", ANCHORED)
def test_disabling_an_adapter_gives_the_base_to_the_bit(init: str, shell: Shell) -> None:
    case = Case(init, LINEAR, shell=shell)
    base = case.outputs(case.model())
    assert apart(case.outputs(case.trained), base) > 1e-2
    with shell.disabled(case.trained):
        assert same_bits(case.outputs(case.trained), base)
    if init in ("pissa", "olora") and shell is PEFT:
        theirs = plain_peft(case)
        with theirs.disable_adapter():
            observe(case, "disabled, off by", lambda: apart(case.outputs(theirs), base))


@SHELLS
@pytest.mark.parametrize("init", ANCHORED)
def test_removing_an_adapter_gives_the_base_to_the_bit(init: str, shell: Shell) -> None:
    case = Case(init, LINEAR, shell=shell)
    model = case.model()
    before = fingerprint(model)
    removed = shell.remove(train(case, shell.adapt(model, case.config)))
    assert same_bits(case.outputs(removed), case.outputs(case.model()))
    if shell is NATIVE:
        assert fingerprint(removed) == before


def test_deleting_one_of_two_adapters_leaves_the_other_alone() -> None:
    case = Case("pissa", LINEAR, shell=PEFT)
    model: Any = case.trained
    wanted = case.outputs(model)
    model.add_adapter("second", replace(case.config, seed=1))
    model.delete_adapter("second")
    model.set_adapter("default")
    assert same_bits(case.outputs(model), wanted)


@pytest.mark.parametrize("init", ANCHORED)
def test_a_second_adapter_leaves_the_first_alone(init: str) -> None:
    case = Case(init, LINEAR, shell=PEFT)
    model: Any = case.trained
    first = case.outputs(model)
    model.add_adapter("second", replace(case.config, seed=1))
    model.set_adapter("second")
    assert apart(case.outputs(model), case.outputs(case.model())) <= 1e-6
    model.set_adapter("default")
    assert same_bits(case.outputs(model), first)

    def look() -> float:
        theirs = plain_peft(case)
        before = case.outputs(theirs)
        theirs.add_adapter("second", theirs.peft_config["default"])
        return apart(case.outputs(theirs), before)

    if init in ("pissa", "olora"):
        observe(case, "first adapter off after the second by", look)


def test_natively_a_second_adapter_is_refused_and_the_first_stays() -> None:
    case = Case("pissa", LINEAR)
    before = case.outputs(case.trained)
    with pytest.raises(AdapterState, match=r"remove\(model\)"):
        hs.adapt(case.trained, case.config)
    assert same_bits(case.outputs(case.trained), before)


# ------------------------------------------------------------------ 3, 4, 5: the file says all of it


@SHELLS
@pytest.mark.parametrize("init", [*ANCHORED, "pissa_niter_4", "pissa_niter_16"])
def test_an_adapter_reloads_on_the_original_base(init: str, shell: Shell, tmp_path: Path) -> None:
    case = Case(init, LINEAR, shell=shell)
    wanted = case.outputs(case.trained)
    shell.save(case.trained, str(tmp_path))
    torch.manual_seed(99)
    assert apart(case.outputs(hs.load(case.model(), tmp_path).model), wanted) <= 1e-6
    assert apart(case.outputs(from_pretrained(case.model(), tmp_path)), wanted) <= 1e-6
    for low_memory in (False, True):
        theirs = peft.PeftModel.from_pretrained(case.model(), tmp_path, low_cpu_mem_usage=low_memory)
        assert apart(case.outputs(theirs), wanted) <= 1e-5

    def look() -> float:
        trained = train(case, plain_peft(case))
        trained.save_pretrained(tmp_path / "theirs")
        torch.manual_seed(99)
        return apart(
            case.outputs(peft.PeftModel.from_pretrained(case.model(), tmp_path / "theirs")), case.outputs(trained)
        )

    if shell is NATIVE and init in ("pissa_niter_4", "pissa_niter_16"):
        observe(case, "reloaded, off by", look)


def test_loading_decomposes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("pissa", LINEAR)
    hs.save(case.trained, tmp_path)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a decomposition while loading")

    for place, name in [(torch.linalg, "svd"), (torch.linalg, "qr"), (torch.linalg, "eigh"), (linalg, "topk_svd")]:
        monkeypatch.setattr(place, name, refuse)
    hs.load(case.model(), tmp_path)
    from_pretrained(case.model(), tmp_path)


MODULES_TO_SAVE = Kind("saved", lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), LINEAR.inputs,
                       fields={"target_modules": ["0"], "modules_to_save": ["2"]})  # fmt: skip
BIASES = replace(LINEAR, name="biases", fields={**LINEAR.fields, "bias": "lora_only"})


@SHELLS
@pytest.mark.parametrize("kind", [MODULES_TO_SAVE, KINDS["linear_dora"], BIASES], ids=lambda kind: kind.name)
def test_the_plain_form_keeps_all_that_trained(kind: Kind, shell: Shell, tmp_path: Path) -> None:
    """PEFT's conversion drops modules_to_save and DoRA's magnitudes, and fails on biases."""
    case = Case("pissa", kind, shell=shell)
    wanted = case.outputs(case.trained)
    shell.save(case.trained, str(tmp_path))
    assert read_adapter(tmp_path).config["init_lora_weights"] is True
    for loaded in (hs.load(case.model(), tmp_path).model, peft.PeftModel.from_pretrained(case.model(), tmp_path)):
        assert apart(case.outputs(loaded), wanted) <= 1e-5


def test_the_rank_doubles_for_anchored_starts_only(tmp_path: Path) -> None:
    for init, rank in [("pissa", 8), ("kaiming", 4), ("mica", 4), ("orthogonal", None)]:
        case = Case(init, LINEAR)
        hs.save(case.trained, tmp_path / init)
        found = read_adapter(tmp_path / init).config["r"]
        anchored = any(layer.anchor is not None for layer in adapter_of(case.trained).layers().values())
        assert found == (8 if anchored else 4)
        assert rank in (None, found)


# ------------------------------------------------------------------ 6, 7: tied and half-precision weights


@SHELLS
@pytest.mark.parametrize("init", ANCHORED)
@pytest.mark.parametrize("name", ["tied_head", "tied"])
def test_a_tied_head_may_start_anywhere(name: str, init: str, shell: Shell) -> None:
    case = Case(init, KINDS[name], shell=shell)
    base = case.model()
    before, shared = case.outputs(base), base.left.weight.detach().clone()
    adapted = shell.adapt(base, case.config)
    assert apart(case.outputs(adapted), before) <= 1e-6
    weights = [p for n, p in adapted.named_parameters(remove_duplicate=False) if "lora" not in n]
    assert all(torch.equal(weight, shared) for weight in weights)
    if init in ("pissa", "olora") and shell is PEFT and name == "tied_head":
        observe(case, "logits off at step zero by", lambda: apart(case.outputs(plain_peft(case)), before))


@SHELLS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", ANCHORED)
def test_half_precision_loses_nothing_at_the_start(init: str, dtype: torch.dtype, shell: Shell) -> None:
    case = Case(init, LINEAR, dtype, shell=shell)
    adapted = case.adapted()
    assert same_bits(case.outputs(adapted), case.outputs(case.model()))
    factors = [p for n, p in adapted.named_parameters() if "lora_" in n]
    assert all(p.dtype == torch.float32 for p in factors)
    # They hold float32's precision, and are not rounded values in a wider type.
    assert not any(torch.equal(p, p.to(dtype).float()) for p in factors)

    def look() -> float:
        return apart(case.outputs(plain_peft(case)), case.outputs(case.model()))

    if init in ("pissa", "olora") and shell is PEFT:
        observe(case, f"in {dtype}, off at step zero by", look)


# ------------------------------------------------------------------ 14, 15: the decompositions


def test_olora_factorises_the_first_columns_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    real = torch.linalg.qr

    def qr(A: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(A.shape))
        return real(A, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "qr", qr)
    W = torch.randn(96, 64)
    start = registry.get("olora")[0].start({"weight": W, "rank": 4, "scaling": 2.0, "generator": torch.Generator()}, {})
    assert all(columns <= 4 for _, columns in seen)
    Q, R = torch.linalg.qr(W.double())
    assert torch.allclose(2.0 * start.B.double() @ start.A.double(), Q[:, :4] @ R[:4], atol=1e-5)


@pytest.mark.parametrize("spelling", ["pissa", "pissa_niter_4", "pissa_niter_16"])
def test_the_fast_pissa_finds_the_subspace(spelling: str) -> None:
    """Spectrum 1/i, r = 16: without oversampling, four iterations leave the worst angle at a cosine of 0.5."""
    m, r = 384, 16
    S = 1 / torch.arange(1, m + 1).double()
    U, V = (torch.linalg.qr(torch.randn(m, m, dtype=torch.float64))[0] for _ in range(2))
    W = (U * S @ V.T).float()
    strategy, options = registry.get(spelling)
    given = {"weight": W, "rank": r, "scaling": 1.0, "generator": torch.Generator().manual_seed(0)}
    start = strategy.start(given, options)
    found, _ = torch.linalg.qr(start.B.double())
    assert torch.linalg.svdvals(found.T @ U[:, :r]).min() > 0.99
    left = (W.double() - start.B.double() @ start.A.double()).square().sum()
    assert left / S[r:].square().sum() <= 1 + 1e-3
    A, sizes, _ = torch.svd_lowrank(W, q=r, niter=4)
    worst = torch.linalg.svdvals(A.double().T @ U[:, :r]).min()
    print(f"torch.svd_lowrank(q=16, niter=4), as PEFT calls it: worst cosine {worst:.3f}, σ_r {sizes[-1]:.4f}")


# ------------------------------------------------------------------ 16 and the table of layers: every kind is served


@SHELLS
@pytest.mark.parametrize("init", hs.strategies())
@pytest.mark.parametrize("name", ["attention", "experts", "parameter", "embedding", "conv2d", "conv1d_transformers"])
def test_every_start_serves_every_layer_under_its_own_name(name: str, init: str, shell: Shell) -> None:
    """No start is replaced by another, crashes for want of `.weight`, or corrupts the layer."""
    case = Case(init, KINDS[name], shell=shell)
    if not case.runs():  # The inputs of this kind are not seen, and it says so.
        with pytest.raises(UnsupportedLayer, match="exclude it"):
            case.adapted()
        return
    model: Any = case.adapted()
    report = adapter_of(model).report if shell is NATIVE else model.init_reports["default"]
    assert report.strategy == init
    if case.preserves:
        assert apart(case.outputs(model), case.outputs(case.model())) <= 1e-6
    if shell is PEFT and init in ("pissa", "olora", "orthogonal"):

        def look() -> float:
            return apart(case.outputs(plain_peft(case)), case.outputs(case.model()))

        observe(case, "off at step zero by", look)


def test_an_embedding_gets_the_start_that_was_asked_for() -> None:
    started = {
        init: next(iter(Case(init, KINDS["embedding"]).starts().values()))[1].A
        for init in ("gaussian", "pissa", "olora", "orthogonal", "kaiming")
    }
    values = list(started.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


@SHELLS
@pytest.mark.parametrize(("square", "init"), [(s, i) for s in (True, False) for i in ("olora", "pissa", "orthogonal")])
def test_transposed_linears_start_as_linears_do(square: bool, init: str, shell: Shell) -> None:
    """GPT-2's Conv1D: PEFT's OLoRA crashes where the sides differ, and corrupts the layer where they do not."""
    m = 12 if square else 8
    case = Case(
        init, Kind(f"conv1d_{m}", lambda: Both(lambda: Conv1D(m, 12)), LINEAR.inputs, fields=LINEAR.fields), shell=shell
    )
    assert apart(case.outputs(case.adapted()), case.outputs(case.model())) <= 1e-6
    if shell is PEFT:

        def look() -> float:
            return apart(case.outputs(plain_peft(case, fan_in_fan_out=True)), case.outputs(case.model()))

        observe(case, "off at step zero by", look)


@SHELLS
@pytest.mark.parametrize("name", ["conv1d", "conv2d_same", "conv1d_reflect", "conv2d_circular", "conv2d_grouped"])
def test_convolutions_keep_their_dilation_padding_and_groups(name: str, shell: Shell) -> None:
    """What the branch computes is what a changed weight computes: merged and unmerged agree."""
    case = Case("kaiming", KINDS[name], shell=shell)
    wanted = case.outputs(case.trained)
    assert apart(wanted, case.outputs(case.model())) > 1e-2
    shell.merge(case.trained)
    assert apart(case.outputs(case.trained), wanted) <= 1e-5

    def look() -> float:
        theirs = train(case, plain_peft(case, init_lora_weights=True))
        before = case.outputs(theirs)
        theirs.merge_adapter()
        return apart(case.outputs(theirs), before)

    if shell is PEFT:
        observe(case, "merged off by", look)


@SHELLS
def test_attention_never_writes_to_its_weights(shell: Shell) -> None:
    """PEFT merges and unmerges in every forward, and the weights drift."""
    case = Case("kaiming", KINDS["attention_batch_first"], torch.bfloat16, shell=shell)

    def weights(model: nn.Module) -> list[Tensor]:
        return [p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n]

    before, first = weights(case.trained), case.outputs(case.trained)
    for _ in range(50):
        last = case.outputs(case.trained)
    assert same_bits(weights(case.trained), before)
    assert same_bits(last, first)

    def look() -> float:
        theirs = train(case, plain_peft(case, init_lora_weights=True))
        start = weights(theirs)
        for _ in range(50):
            case.outputs(theirs)
        return apart(weights(theirs), start)

    if shell is PEFT:
        observe(case, "weights moved in 50 forwards by", look)


@SHELLS
def test_attention_adds_the_branch_of_its_output_once(shell: Shell) -> None:
    """PEFT adds it twice (huggingface/peft#3774); the scale s of both projections is the one that was asked for."""
    case = Case("kaiming", KINDS["attention"], shell=shell)
    base, trained = case.model(), case.trained
    with torch.no_grad():
        for module in trained.modules():
            if isinstance(module, LoraLayer | ShellLayer):
                branch = module.branch() if isinstance(module, LoraLayer) else module.branch("default")
                assert branch.scaling == 2.0
                twin = next(p for p in base.parameters() if torch.equal(p, module.original))
                twin += branch.scaling * (branch.B @ branch.A)
    assert apart(case.outputs(base), case.outputs(case.trained)) <= 1e-5


@SHELLS
@pytest.mark.parametrize("name", ["experts", "experts_transposed", "parameter", "tied", "conv2d_grouped", "embedding"])
def test_every_kind_of_layer_merges(name: str, shell: Shell) -> None:
    case = Case("pissa", KINDS[name], shell=shell)
    wanted = case.outputs(case.trained)
    folded = shell.fold(case.trained)
    assert apart(case.outputs(folded), wanted) <= 1e-5
    assert not any("lora" in n for n, _ in folded.named_parameters())


# ------------------------------------------------------------------ 17, 18: numbers that cannot be meant


@SHELLS
@pytest.mark.parametrize("init", [*ANCHORED, "mica"])
def test_a_rank_that_a_weight_has_not_is_refused_or_clipped_with_its_scale(
    init: str, shell: Shell, tmp_path: Path
) -> None:
    case = Case(init, LINEAR, shell=shell).but(r=20, lora_alpha=20)
    model = case.model()
    before = fingerprint(model)
    with pytest.raises(BadRank, match=r"1 to 8.*clip_rank"):
        shell.adapt(model, case.config)
    assert fingerprint(model) == before
    clipped = case.but(clip_rank=True)
    wanted = clipped.outputs(clipped.trained)
    shell.save(clipped.trained, str(tmp_path))
    file = read_adapter(tmp_path)
    for entry in file.entries.values():
        assert entry.A.shape[0] == entry.rank
        assert math.isclose(entry.alpha / entry.rank, 20 / 8)
    assert apart(case.outputs(hs.load(case.model(), tmp_path).model), wanted) <= 1e-6


@SHELLS
@pytest.mark.parametrize("alpha", [0, -8.0, math.nan, math.inf])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_alpha_that_a_start_divides_by_is_positive(init: str, alpha: float, shell: Shell) -> None:
    case = Case(init, LINEAR, shell=shell)
    with pytest.raises(BadAlpha, match="lora_alpha"):
        case.but(lora_alpha=alpha).adapted()
    with pytest.raises(BadAlpha, match="left"):
        case.but(alpha_pattern={"left": alpha}).adapted()
    if shell is PEFT and init == "pissa" and alpha == -8.0:
        observe(
            case, "α = −8 gives NaN", lambda: bool(case.outputs(plain_peft(case, lora_alpha=alpha))[0].isnan().any())
        )


# ------------------------------------------------------------------ 19: merging


@SHELLS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_a_merge_rounds_once_and_an_unmerge_restores_the_bits(init: str, dtype: torch.dtype, shell: Shell) -> None:
    case = Case(init, LINEAR, dtype, shell=shell)
    outputs, exact = case.outputs(case.trained), _sums(Case(init, LINEAR, dtype))

    def weights() -> dict[str, Tensor]:
        wanted = {n.rsplit(".", 1)[-1]: m for n, m in case.trained.named_modules()}
        return {side: wanted[side].get_submodule("base_layer").get_parameter("weight") for side in ("left", "right")}

    before = {side: weight.detach().clone() for side, weight in weights().items()}
    shell.merge(case.trained)
    for side, merged in weights().items():
        off, least = (merged.double() - exact[side]).abs(), (exact[side].to(dtype).double() - exact[side]).abs()
        # (float64 goes to float16 by way of float32, and so is at times off by more than the merge.)
        assert (
            bool((off <= least).all()) if dtype != torch.float32 else float(off.max() / exact[side].abs().max()) < 1e-7
        )
    shell.unmerge(case.trained)
    assert all(torch.equal(weight, before[side]) for side, weight in weights().items())
    assert same_bits(case.outputs(case.trained), outputs)


def _sums(case: Case) -> dict[str, Tensor]:
    """W + s·(B·A − B₀·A₀) of every layer, in float64."""
    found = {}
    for name, layer in adapter_of(case.trained).layers().items():
        A, B = (factor.detach().double() for factor in layer.factors)
        A0, B0 = (factor.double() for factor in layer.anchor or (0 * A, 0 * B))
        found[name] = layer.original.detach().double() + layer.scaling * (B @ A - B0 @ A0)
    return found


def test_a_safe_merge_gives_the_bits_of_a_merge() -> None:
    case = Case("pissa", LINEAR, torch.bfloat16, shell=PEFT)
    model: Any = case.trained
    model.merge_adapter()
    merged = {n: p.clone() for n, p in model.named_parameters()}
    model.unmerge_adapter()
    model.merge_adapter(safe_merge=True)
    assert all(torch.equal(p, merged[n]) for n, p in model.named_parameters())

    def look() -> float:
        both = []
        for safe in (False, True):
            torch.manual_seed(0)
            theirs = train(case, plain_peft(case, init_lora_weights=True))
            theirs.merge_adapter(safe_merge=safe)
            both.append(theirs.base_model.model.left.base_layer.weight)
        return float((both[0] != both[1]).float().mean())

    observe(case, "share of elements that a safe merge rounds otherwise", look)


def test_get_peft_model_returns_a_peft_model() -> None:
    """So that whoever asks for one finds all of the above in it."""
    case = Case("pissa", LINEAR)
    assert isinstance(get_peft_model(case.model(), case.config), peft.PeftModel)
