"""The strategies that look at data: laws over all of them, an oracle for each, and PEFT where PEFT is right."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oracles
from headstart import inits
from headstart.errors import (
    BadAlpha,
    BadOption,
    BadRank,
    MetaWeight,
    MissingStatistic,
    NonFiniteWeight,
    NoSignal,
    StatisticsError,
    TooLittleData,
)
from headstart.inits.strategy import Factors, Strategy
from headstart.statistics import GradientSpectrum, GradientSum, InputSpectrum, Moments, Squares

ALL = ["eva", "corda", "tara", "sc_lora", "lora_null", "lora_ga", "lora_one", "lora_sb", "kfac", "lora_da", "gora"]
READ_WEIGHT = [name for name in ALL if inits.get(name)[0].reads_weight]
READ_INPUTS = [name for name in ALL if "inputs" in inits.get(name)[0].needs]
READ_GRADIENT = [name for name in ALL if "gradient" in inits.get(name)[0].needs]
MOVING = ["lora_one", "lora_sb", "lora_da", "gora"]  # these change the function at step zero, downhill
SCALED = [name for name in ALL if inits.get(name)[0].divides_by_scaling and name != "lora_ga"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(24, 16), (16, 24), (20, 20), (150, 140)]

RANK = 4
TOKENS = 400


def strategy(name: str) -> Strategy:
    return inits.get(name)[0]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(m: int = 24, n: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A full-rank matrix with a slow spectrum, as trained weights have."""
    S = 1.0 / np.arange(1, min(m, n) + 1) ** 0.7
    return torch.from_numpy(oracles.with_spectrum(m, n, S, seed)).to(dtype)


def rows(features: int, tokens: int = TOKENS, seed: int = 0, size: float = 1.0) -> Tensor:
    """Inputs as layers see them: a fast spectrum, and a mean that is not zero."""
    S = 0.85 ** np.arange(features)
    mixing = oracles.orthogonal_matrix(features, features, seed + 5)
    noise = np.random.default_rng(seed).standard_normal((tokens, features))
    return torch.from_numpy(size * ((noise * S) @ mixing.T + 0.3 * mixing[:, -1])).float()


def moments(X: Tensor) -> Moments:
    found = Moments.empty(X.shape[1])
    for part in X.split(128):
        found.add(part)
    return found


def squares(D: Tensor) -> Squares:
    found = Squares.empty(D.shape[1])
    found.add(D)
    return found


def exact(D: Tensor, X: Tensor) -> GradientSum:
    found = GradientSum.empty(D.shape[1], X.shape[1], 0, seeded())
    found.add(D, X)
    found.count = float(len(X))
    return found


def merged(D: Tensor, X: Tensor, rank: int = RANK) -> GradientSpectrum:
    found = GradientSpectrum.empty(D.shape[1], X.shape[1], 4 * rank, seeded())
    parts = list(zip(D.split(100), X.split(100), strict=True))
    for i, (d, x) in enumerate(parts):
        found.add(d, x)
        if 2 * (i + 1) == len(parts):
            found.split()
    found.count = float(len(X))
    return found


@dataclasses.dataclass
class Layer:
    """A weight and the rows that went through it."""

    W: Tensor
    X: Tensor
    D: Tensor
    old: Tensor

    @property
    def G(self) -> np.ndarray:
        return dense(self.D).T @ dense(self.X) / len(self.X)

    def statistics(self) -> dict[str, Any]:
        return {
            "inputs": moments(self.X),
            "preserved": moments(self.old),
            "gradient": exact(self.D, self.X),
            "output_gradients": moments(self.D),
            "output_squares": squares(self.D),
        }


def layer(m: int = 24, n: int = 16, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> Layer:
    """Output gradients that depend on the inputs, so that their mean product has a spectrum that falls."""
    X = rows(n, tokens)
    target = torch.from_numpy(oracles.with_spectrum(m, n, 0.7 ** np.arange(min(m, n)), seed=9)).float()
    D = 1e-3 * (X @ target.T + 0.1 * rows(m, tokens, seed=3))
    return Layer(weight(m, n, dtype), X, D, rows(n, tokens, seed=1))


def start(
    name: str,
    given: Layer,
    rank: int = RANK,
    scaling: float = 1.0,
    seed: int = 0,
    statistics: dict[str, Any] | None = None,
    **options: Any,
) -> Factors:
    """What a shell does: give everything, let the signature take what it wants."""
    everything = {"weight": given.W, "shape": tuple(given.W.shape), "rank": rank, "scaling": scaling, "kind": "linear"}
    found = given.statistics() if statistics is None else statistics
    return strategy(name).start({**everything, **found, "generator": seeded(seed)}, options)


def dense(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def product(factors: Factors, scaling: float = 1.0) -> np.ndarray:
    core = torch.eye(len(factors.A)) if factors.core is None else factors.core
    return dense(scaling * factors.B.double() @ core.double() @ factors.A.double())


def assert_near(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    """Near in the Frobenius norm, relative to what is wanted."""
    size = float(np.linalg.norm(wanted))
    assert float(np.linalg.norm(found - wanted)) <= tolerance * size, f"off by {np.linalg.norm(found - wanted) / size}"


def projector(columns: np.ndarray) -> np.ndarray:
    Q, _ = np.linalg.qr(columns)
    return Q @ Q.T


def assert_same_space(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-4) -> None:
    """The sine of the largest angle between two column spaces."""
    Q, _ = np.linalg.qr(found)
    sine = np.linalg.norm(Q - projector(wanted) @ Q, 2)
    assert sine <= tolerance, f"off by an angle of {sine}"


def assert_alive(factors: Factors) -> None:
    """Of each direction, one factor is non-zero and the other one trains, or the core between them does."""
    feeds_B = factors.A.norm(dim=1) > 1e-9
    feeds_A = factors.B.norm(dim=0) > 1e-9
    if factors.core is not None:
        assert bool((feeds_A & feeds_B).all())
        return
    if "B" in factors.frozen:
        feeds_B &= False
    if "A" in factors.frozen:
        feeds_A &= False
    assert bool((feeds_A | feeds_B).all())


# ------------------------------------------------------------------ laws over all of them


def test_these_are_all_that_need_data() -> None:
    assert [name for name in inits.names() if inits.get(name)[0].needs] == ALL


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16), (8, 40)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_factors_have_their_shapes_in_float32(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    factors = start(name, layer(*shape, dtype))
    assert factors.A.shape == (RANK, shape[1])
    assert factors.B.shape == (shape[0], RANK)
    tensors = [factors.A, factors.B] + ([] if factors.core is None else [factors.core])
    for tensor in tensors:
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()
        assert not tensor.requires_grad
    assert_alive(factors)


def copies(statistic: Any) -> dict[str, Any]:
    return {k: copy.deepcopy(v) for k, v in vars(statistic).items() if k not in ("generator", "known")}


def assert_unchanged(statistic: Any, before: dict[str, Any]) -> None:
    for field, value in before.items():
        now = vars(statistic)[field]
        pairs = zip(now, value, strict=True) if isinstance(value, list | tuple) else [(now, value)]
        assert all(torch.equal(a, b) if isinstance(b, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("gradient", [exact, merged])
def test_a_start_touches_neither_weight_nor_statistics_nor_the_global_randomness(name: str, gradient: Any) -> None:
    given = layer()
    given.W = nn.Parameter(given.W)
    found = {**given.statistics(), "gradient": gradient(given.D, given.X)}
    before = {key: copies(statistic) for key, statistic in found.items()}
    values, state = given.W.detach().clone(), torch.get_rng_state()
    factors = start(name, given, statistics=found)
    factors.A.add_(1.0)  # nor do the factors share its memory
    factors.B.add_(1.0)
    assert torch.equal(given.W, values)
    assert torch.equal(torch.get_rng_state(), state)
    for key, statistic in found.items():
        assert_unchanged(statistic, before[key])


@pytest.mark.parametrize("name", ALL)
def test_one_seed_gives_one_start(name: str) -> None:
    given = layer()
    first, again = start(name, given), start(name, given)
    assert torch.equal(first.A, again.A)
    assert torch.equal(first.B, again.B)


@pytest.mark.parametrize("name", [name for name in ALL if name not in MOVING])
def test_the_function_is_preserved_at_step_zero(name: str) -> None:
    factors = start(name, layer())
    assert factors.anchored or not product(factors).any()


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("gradient", [exact, merged])
def test_a_start_that_moves_the_function_moves_it_downhill(name: str, gradient: Any) -> None:
    given = layer()
    factors = start(name, given, statistics={**given.statistics(), "gradient": gradient(given.D, given.X)})
    assert not factors.anchored
    assert float((product(factors) * given.G).sum()) < 0


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("name", SCALED)
def test_what_the_branch_holds_does_not_depend_on_alpha(name: str, rank: int) -> None:
    given = layer()
    scalings = [0.5, 1.0, 4.0, 2 / math.sqrt(rank), math.sqrt(rank)]  # alpha r/2, r, 4r; rsLoRA's with alpha 2 and r
    products = [product(start(name, given, rank, s), s) for s in scalings]
    for found in products[1:]:
        assert_near(found, products[0], 1e-6)


@pytest.mark.parametrize("scaling", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", [*SCALED, "lora_ga"])
def test_a_scaling_that_cannot_be_divided_by_is_refused(name: str, scaling: float) -> None:
    if name == "lora_null":  # whose other mode divides by nothing
        assert not start(name, layer(), scaling=scaling, mode="frozen").anchored
    with pytest.raises(BadAlpha, match="choose a lora_alpha above 0"):
        start(name, layer(), scaling=scaling)


@pytest.mark.parametrize("rank", [0, 25, 64])
@pytest.mark.parametrize("name", ALL)
def test_a_rank_that_does_not_fit_is_refused_with_numbers(name: str, rank: int) -> None:
    with pytest.raises(BadRank, match=rf"rank {rank} does not fit a \(24, 16\) weight.*: choose 1 to (16|8)"):
        start(name, layer(), rank)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", READ_WEIGHT)
def test_a_weight_that_is_not_finite_is_refused(name: str, bad: float, dtype: torch.dtype) -> None:
    given = layer(dtype=dtype)
    given.W[5, 9] = given.W[7, 1] = bad
    with pytest.raises(NonFiniteWeight, match="2 NaN or infinite values"):
        start(name, given)


@pytest.mark.parametrize("name", READ_WEIGHT)
def test_a_weight_without_values_is_refused(name: str) -> None:
    given = layer()
    given.W = torch.empty(24, 16, device="meta")
    with pytest.raises(MetaWeight, match="load it first"):
        start(name, given)


@pytest.mark.parametrize("name", [name for name in ALL if name not in READ_WEIGHT])
def test_a_start_that_takes_no_weight_needs_no_values(name: str) -> None:
    given = layer()
    there = start(name, given)
    given.W = torch.empty(24, 16, device="meta")
    assert torch.equal(start(name, given).A, there.A)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)], ids=str)
@pytest.mark.parametrize("name", READ_WEIGHT)
def test_a_zero_weight_gets_a_start_that_trains(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    given = layer(*shape, dtype)
    given.W = torch.zeros(shape, dtype=dtype)
    factors = start(name, given)
    assert_alive(factors)
    if name != "lora_ga":  # which holds the gradient, not the weight
        assert not product(factors).any()
        assert factors.facts["effective_rank"] == 0
    if name in ("corda", "tara", "lora_null"):  # Kaiming's form: B = 0, and A of Kaiming's size and of no one input
        assert factors.A.square().mean().item() == pytest.approx(1 / (3 * shape[1]), rel=0.01)
        assert factors.A.abs().max() < 0.5
    if name == "corda":
        assert_alive(start(name, given, mode="kpm"))


@pytest.mark.parametrize("true_rank", [1, 2, 3])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)], ids=str)
@pytest.mark.parametrize("name", READ_WEIGHT)
def test_a_deficient_weight_leaves_no_dead_direction(name: str, shape: tuple[int, int], true_rank: int) -> None:
    given = layer(*shape)
    given.W = torch.from_numpy(oracles.with_spectrum(*shape, np.arange(true_rank, 0.0, -1.0))).float()
    factors = start(name, given, scaling=2.0)
    assert_alive(factors)
    if name in ("corda", "tara"):  # all of W fits
        assert factors.facts["effective_rank"] == true_rank
        assert_near(product(factors, 2.0), dense(given.W))
    if name == "corda":  # nothing of it does
        tail = start(name, given, mode="kpm")
        assert_alive(tail)
        assert np.abs(product(tail)).max() < 1e-4


LAYOUTS = {
    "transposed": lambda W: W.T.contiguous().T,
    "strided": lambda W: torch.stack([W, torch.full_like(W, math.nan)], 2).flatten(1)[:, ::2],
    "a slice": lambda W: torch.cat([W, torch.full_like(W, math.nan)])[: len(W)],
    "half": lambda W: W.half().float(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", READ_WEIGHT)
def test_a_matrix_has_one_start_however_it_is_stored(name: str, layout: str) -> None:
    given = layer()
    given.W = given.W.half().float()
    wanted = start(name, given)
    given.W = LAYOUTS[layout](given.W) if layout != "half" else given.W.half()
    found = start(name, given)
    torch.testing.assert_close(found.A, wanted.A, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.B, wanted.B, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ data that says too little


@pytest.mark.parametrize("name", READ_INPUTS)
def test_a_layer_that_never_ran_has_no_signal(name: str) -> None:
    given = layer()
    found = {**given.statistics(), "inputs": Moments.empty(16)}
    with pytest.raises(NoSignal, match="no inputs were seen: leave this layer out"):
        start(name, given, statistics=found)


@pytest.mark.parametrize("name", READ_INPUTS)
def test_fewer_tokens_than_directions_are_too_little_data(name: str) -> None:
    given = layer(tokens=RANK - 1)
    with pytest.raises(TooLittleData, match=r"3 tokens cannot show .* directions: give more data, or lower the rank"):
        start(name, given)


@pytest.mark.parametrize("tokens", [RANK + 1, 2 * RANK])
@pytest.mark.parametrize("name", ALL)
def test_a_few_tokens_are_enough_to_start(name: str, tokens: int) -> None:
    factors = start(name, layer(tokens=tokens))
    assert factors.A.isfinite().all()
    assert factors.B.isfinite().all()
    assert_alive(factors)


@pytest.mark.parametrize("name", READ_INPUTS)
def test_inputs_that_are_zero_have_no_signal(name: str) -> None:
    given = layer()
    found = {**given.statistics(), "inputs": moments(torch.zeros(TOKENS, 16))}
    with pytest.raises(NoSignal, match="all zero"):
        start(name, given, statistics=found)


@pytest.mark.parametrize("name", READ_GRADIENT)
@pytest.mark.parametrize("kind", [GradientSum, GradientSpectrum])
def test_a_zero_gradient_has_no_signal(name: str, kind: Any) -> None:
    given = layer()
    never = kind.empty(24, 16, 4 * RANK, seeded())
    zero = kind.empty(24, 16, 4 * RANK, seeded())
    zero.add(torch.zeros(9, 24), torch.ones(9, 16))
    zero.count = 9.0
    for gradient in (never, zero):
        with pytest.raises(NoSignal, match="the gradient is zero: leave this layer out"):
            start(name, given, statistics={**given.statistics(), "gradient": gradient})


@pytest.mark.parametrize("name", READ_GRADIENT)
@pytest.mark.parametrize("kind", [GradientSum, GradientSpectrum])
def test_a_gradient_of_low_rank_leaves_no_dead_direction(name: str, kind: Any) -> None:
    given = layer()
    gradient = kind.empty(24, 16, 4 * RANK, seeded())
    gradient.add(given.D[:2], given.X[:2])
    gradient.count = 2.0
    factors = start(name, given, statistics={**given.statistics(), "gradient": gradient})
    assert_alive(factors)
    if name == "lora_one":
        assert factors.facts["effective_rank"] == 2
        assert not factors.B[:, 2:].any()
        torch.testing.assert_close(factors.A[2:].norm(dim=1), torch.full((2,), 3**-0.5))
        G = dense(given.D[:2]).T @ dense(given.X[:2]) / 2
        assert np.abs(G @ dense(factors.A[2:]).T).max() < 1e-6 * np.linalg.norm(G)
        assert_near(product(factors), oracles.lora_one(G, 2), 1e-4)


def test_every_failure_of_the_data_is_a_statistics_error() -> None:
    given = layer(tokens=2)
    for name in READ_INPUTS:
        with pytest.raises(StatisticsError):
            start(name, given)


@pytest.mark.parametrize("name", ALL)
def test_a_start_without_its_statistic_is_refused(name: str) -> None:
    with pytest.raises(MissingStatistic, match=f"'{name}' needs .*: pass calibration data"):
        start(name, layer(), statistics={})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("corda", {"mode": "kmp"}, "mode is 'kmp'; did you mean 'kpm'"),
        ("lora_null", {"mode": "freeze"}, "mode is 'freeze'; did you mean 'frozen'"),
        ("lora_ga", {"direction": "ArB2R"}, "did you mean 'ArB2r'"),
        ("lora_ga", {"scale": "stabel"}, "did you mean 'stable'"),
        ("lora_ga", {"gamma": 0.0}, "gamma is 0.0: choose a number above 0"),
        ("lora_one", {"normalize": "layers"}, "did you mean 'layer'"),
        ("lora_one", {"variant": "algorithm2"}, "did you mean 'algorithm1'"),
        ("lora_one", {"gamma": -1.0}, "gamma is -1.0"),
        ("lora_sb", {"eta": 0.0}, "eta is 0.0"),
        ("gora", {"gamma": math.nan}, "gamma is nan"),
        ("sc_lora", {"beta": 1.5}, "beta is 1.5: choose 0"),
        ("lora_da", {"beta": -0.1}, "beta is -0.1: choose 0 or more"),
        ("tara", {"damping": 0.0}, "damping is 0.0"),
        ("corda", {"damping": -0.01}, "damping is -0.01: choose 0 or more"),
    ],
)
def test_an_option_without_meaning_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        start(name, layer(), **options)


@pytest.mark.parametrize("name", ALL)
def test_a_strategy_says_what_it_does_and_where_it_is_published(name: str) -> None:
    assert strategy(name).paper.startswith("https://")
    assert 10 < len(strategy(name).fact) <= 80


# ------------------------------------------------------------------ the oracle of each paper


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eva_spans_the_principal_directions(shape: tuple[int, int]) -> None:
    given = layer(*shape)
    factors = start("eva", given)
    V, _, shares = oracles.eva(dense(given.X), RANK)
    assert_same_space(dense(factors.A).T, V)
    torch.testing.assert_close(factors.A @ factors.A.T, torch.eye(RANK), atol=1e-6, rtol=0)
    assert not factors.B.any()
    assert factors.facts["explained"] == pytest.approx(shares.tolist(), rel=1e-4)


def test_eva_whitens_by_roots_of_singular_values() -> None:
    given = layer()
    V, S, _ = oracles.eva(dense(given.X), RANK)
    rows_found = dense(start("eva", given, whiten=True).A)
    assert_near(np.abs(rows_found), np.abs(V.T / np.sqrt(S)[:, None]), 1e-4)


def test_eva_reads_leading_directions_where_the_moment_is_too_big() -> None:
    given = layer(24, 60)
    spectrum = InputSpectrum.empty(60, 8 * RANK, seeded())
    for part in given.X.split(100):
        spectrum.add(part)
    found = start("eva", given, statistics={"inputs": spectrum})
    assert_same_space(dense(found.A).T, dense(start("eva", given).A).T, 1e-2)


def test_eva_fits_a_head_with_fewer_outputs_than_ranks() -> None:
    given = layer(2, 16)
    assert start("eva", given, rank=8).B.shape == (2, 8)


def test_eva_starts_from_a_few_distinct_tokens() -> None:
    given = layer(24, 60, tokens=3)
    given.X = given.X.repeat(30, 1)
    factors = start("eva", given, rank=8, statistics={"inputs": moments(given.X)})
    torch.testing.assert_close(factors.A @ factors.A.T, torch.eye(8), atol=1e-5, rtol=0)
    assert factors.facts["explained"][2] < 1e-6


def test_eva_refuses_inputs_that_never_vary() -> None:
    given = layer()
    with pytest.raises(NoSignal, match="always the same"):
        start("eva", given, statistics={"inputs": moments(torch.ones(50, 16))})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_holds_what_the_paper_fixes(mode: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    given = layer(*shape, dtype)
    wanted = oracles.corda(dense(given.W), dense(given.X), RANK, mode)
    factors = start("corda", given, scaling=0.25, mode=mode)
    # The tail of W·C is as good as C, whose float32 sums are good to 1e-7 of its largest eigenvalue.
    assert_near(product(factors, 0.25), wanted, 1e-5 if mode == "ipm" else 1e-4 if max(shape) < 100 else 2e-3)
    columns = np.linalg.svd(wanted)[0][:, :RANK]
    assert_same_space(dense(factors.B), columns, 1e-4 if mode == "ipm" or max(shape) < 100 else 2e-3)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_weighs_both_factors_the_same(mode: str) -> None:
    factors = start("corda", layer(), mode=mode)
    torch.testing.assert_close(factors.A @ factors.A.T, factors.B.T @ factors.B, atol=1e-6, rtol=1e-4)


def test_corda_forms_the_leading_part_without_the_whole_moment() -> None:
    given = layer(24, 60)
    spectrum = InputSpectrum.empty(60, 8 * RANK, seeded())
    for part in given.X.split(100):
        spectrum.add(part)
    found = start("corda", given, statistics={"inputs": spectrum})
    assert_near(product(found), product(start("corda", given)), 1e-2)
    with pytest.raises(MissingStatistic, match="only the leading directions"):
        start("corda", given, statistics={"inputs": spectrum}, mode="kpm")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tara_holds_what_the_paper_fixes(shape: tuple[int, int]) -> None:
    given = layer(*shape)
    wanted = oracles.tara(dense(given.W), dense(given.X), dense(given.D), RANK)
    factors = start("tara", given, scaling=2.0)
    assert_near(product(factors, 2.0), wanted, 1e-5)
    torch.testing.assert_close(factors.A @ factors.A.T, factors.B.T @ factors.B, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sc_lora_holds_what_the_paper_fixes(shape: tuple[int, int], beta: float) -> None:
    given = layer(*shape)
    wanted = oracles.sc_lora(dense(given.W), dense(given.X), dense(given.old), RANK, beta)
    factors = start("sc_lora", given, scaling=2.0, beta=beta)
    assert_near(product(factors, 2.0), wanted, 1e-4)
    torch.testing.assert_close(factors.B.T @ factors.B, torch.eye(RANK), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_null_holds_what_the_paper_fixes(shape: tuple[int, int]) -> None:
    given = layer(*shape)
    given.X = given.X + 0.05 * torch.randn(given.X.shape, generator=seeded())  # a tail that float32 moments resolve
    wanted = oracles.lora_null(dense(given.W), dense(given.X), RANK)
    assert_near(product(start("lora_null", given, scaling=2.0), 2.0), wanted, 2e-4)
    frozen = start("lora_null", given, mode="frozen")
    assert_near(dense(frozen.A.T @ frozen.A), oracles.null_projector(dense(given.X), RANK), 2e-4)
    assert frozen.frozen == {"A"}
    assert not frozen.B.any()
    passed = np.linalg.norm(dense(given.X) @ dense(frozen.A).T) ** 2 / np.linalg.norm(dense(given.X)) ** 2
    assert frozen.facts["seen"] == pytest.approx(passed, rel=1e-2)


@pytest.mark.parametrize("left", [0, 1, 3])
def test_lora_null_reads_nothing_of_the_data_also_where_the_weight_has_nothing_there(left: int) -> None:
    """Inputs that are always zero, and a weight that was pruned there to fewer than r columns."""
    given = layer(20, 28)
    given.X[:, -RANK:] = 0
    given.W[:, 24 + left :] = 0
    factors = start("lora_null", given)
    assert_alive(factors)
    assert factors.facts["effective_rank"] == left
    assert not factors.B[:, left:].any()
    assert np.linalg.norm(dense(given.X) @ dense(factors.A).T) < 1e-5 * np.linalg.norm(dense(given.X))
    torch.testing.assert_close(factors.A[left:].norm(dim=1), torch.full((RANK - left,), 3**-0.5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_lora_ga_takes_two_halves_of_the_gradient(direction: str, shape: tuple[int, int]) -> None:
    given = layer(*shape)
    U, _, Vt = np.linalg.svd(given.G)
    factors = start("lora_ga", given, direction=direction)
    size = shape[0] ** 0.25 / 4
    halves = {"ArB2r": (slice(0, 4), slice(4, 8)), "A2rBr": (slice(4, 8), slice(0, 4)), "ArBr": (slice(1, 8, 2),
              slice(0, 8, 2))}  # fmt: skip
    if direction in halves:
        own, other = halves[direction]
        assert_near(np.abs(dense(factors.A)), size * np.abs(Vt[own]), 1e-4)
        assert_near(np.abs(dense(factors.B)), size * np.abs(U[:, other]), 1e-4)
    seen = np.concatenate([U[:, :8].T @ dense(factors.B), Vt[:8] @ dense(factors.A).T], axis=1) / size
    assert_near((np.abs(seen) > 0.99).sum(axis=1), np.ones(8))  # each of the 2r directions once, in A or in B


@pytest.mark.parametrize("scaling", [0.5, 2.0])
def test_lora_ga_has_four_scales(scaling: float) -> None:
    given = layer()
    S = np.linalg.svd(dense(given.W), compute_uv=False)
    sizes = {
        "stable": 24**0.25 / 2,
        "gd": 1 / scaling,
        "unit": 1.0,
        "weights": float(np.mean(np.sqrt(S[:RANK] / scaling))),
    }
    for scale, size in sizes.items():
        factors = start("lora_ga", given, scaling=scaling, scale=scale, gamma=4.0)
        for gram in (factors.A @ factors.A.T, factors.B.T @ factors.B):
            torch.testing.assert_close(gram, size**2 * torch.eye(RANK), atol=1e-4, rtol=1e-4)


def test_lora_ga_makes_the_first_step_the_best_one() -> None:
    """Theorem 3.1: of s²·(B·Bᵀ·G + G·Aᵀ·A), the 2r leading terms of G are the nearest to G."""
    given = layer()
    factors = start("lora_ga", given, scale="unit")
    A, B, G = dense(factors.A), dense(factors.B), given.G
    best = np.linalg.norm(G - oracles.pissa(G, 2 * RANK))
    assert np.linalg.norm(G - B @ B.T @ G - G @ A.T @ A) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_one_is_algorithm_1(shape: tuple[int, int]) -> None:
    given = layer(*shape)
    factors = start("lora_one", given)
    assert_near(product(factors), oracles.lora_one(given.G, RANK), 1e-5 if max(shape) < 100 else 1e-3)
    torch.testing.assert_close(factors.A @ factors.A.T, factors.B.T @ factors.B, atol=1e-6, rtol=1e-3)
    assert np.linalg.norm(product(factors), 2) == pytest.approx(1 / 128, rel=1e-5)


def test_lora_one_has_the_other_published_definitions() -> None:
    given = layer()
    G, pairs = given.G, given.statistics()
    U, S, Vt = np.linalg.svd(G)
    step = U[:, :RANK] * S[:RANK] @ Vt[:RANK]
    assert_near(product(start("lora_one", given, normalize="none", gamma=0.5)), -2 * step)  # Spectral-init, γ = 2
    squared = start("lora_one", given, variant="squared", normalize="none", gamma=64.0)
    assert_near(product(squared), -(U[:, :RANK] * S[:RANK] ** 2 @ Vt[:RANK]) / 64)
    old = start("lora_one", given, variant="orthonormal", gamma=16.0)
    assert old.anchored
    assert_near(product(old), 24**0.5 / 16 * U[:, :RANK] @ Vt[:RANK])
    pairs["gradient"].largest = 10 * S[0]
    assert_near(product(start("lora_one", given, statistics=pairs, normalize="global")), -step / (10 * S[0] * 128))
    pairs["gradient"].largest = None
    with pytest.raises(MissingStatistic, match="choose normalize='layer'"):
        start("lora_one", given, statistics=pairs, normalize="global")


def test_lora_one_does_not_see_the_scale_of_the_loss() -> None:
    given = layer()
    wanted = start("lora_one", given)
    given.D = given.D * 1e-4
    torch.testing.assert_close(start("lora_one", given).A, wanted.A, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scaling", [1.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_sb_is_adams_first_step(shape: tuple[int, int], scaling: float) -> None:
    given = layer(*shape)
    factors = start("lora_sb", given, scaling=scaling, eta=1e-3)
    assert_near(product(factors, scaling), oracles.lora_sb(given.G, RANK, 1e-3), 1e-5 if max(shape) < 100 else 5e-3)
    for gram in (factors.A @ factors.A.T, factors.B.T @ factors.B):
        torch.testing.assert_close(gram, torch.eye(RANK), atol=1e-5, rtol=0)
    assert factors.frozen == {"A", "B"}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kfac_spans_the_main_directions_of_both_sides(shape: tuple[int, int]) -> None:
    given = layer(*shape)
    factors = start("kfac", given)
    for found, seen in ((factors.A.T, given.X), (factors.B, given.D)):
        _, S, Vt = np.linalg.svd(dense(seen), full_matrices=False)
        assert_same_space(dense(found), Vt[:RANK].T, 1e-4 if max(shape) < 100 else 2e-3)
        torch.testing.assert_close(found.T @ found, torch.eye(RANK), atol=1e-5, rtol=0)
        held = float((S[:RANK] ** 2).sum() / (S**2).sum())
        assert factors.facts["inputs_held" if seen is given.X else "gradients_held"] == pytest.approx(held, rel=1e-3)
    assert factors.frozen == {"A", "B"}
    assert factors.core is not None
    assert factors.core.shape == (RANK, RANK)
    assert not factors.core.any()


def test_lora_sb_takes_no_direction_from_where_the_gradient_is_zero() -> None:
    given = layer()
    given.D[:, 5:9] = 0
    for gradient in (exact(given.D, given.X), merged(given.D, given.X)):
        factors = start("lora_sb", given, statistics={"gradient": gradient})
        assert factors.B[5:9].abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gora_is_the_step_that_its_noise_allows(shape: tuple[int, int]) -> None:
    given = layer(*shape)
    factors = start("gora", given, scaling=4.0)
    assert_near(product(factors, 4.0), oracles.gora(given.G, dense(factors.A), 0.05))
    assert factors.A.abs().max() <= shape[1] ** -0.5


def test_gora_moves_as_far_as_a_full_step_would() -> None:
    G = torch.randn(200, 300, generator=seeded())
    gradient = GradientSum(G, seeded(), count=1.0)
    given = layer()
    lengths = [
        np.linalg.norm(product(start("gora", given, 32, 1.0, seed, {"gradient": gradient}))) for seed in range(8)
    ]
    assert np.mean(lengths) == pytest.approx(0.05 * float(G.norm()), rel=0.02)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.03, 30.0])
def test_lora_da_is_the_natural_gradient_in_its_directions(shape: tuple[int, int], beta: float) -> None:
    given = layer(*shape)
    space, wanted = oracles.lora_da(dense(given.X), dense(given.D), given.G, RANK, 1024.0, beta, 0.01)
    factors = start("lora_da", given, beta=beta)
    assert_near(1024 * dense(factors.A.T @ factors.A), space, 1e-4)
    assert_near(product(factors), wanted, 1e-4)


def test_tara_refuses_a_moment_that_it_cannot_invert() -> None:
    given = layer(tokens=8)
    with pytest.raises(TooLittleData, match="8 tokens leave Σ_y singular: give more data, or raise damping"):
        start("tara", given, damping=1e-14)


def test_lora_da_refuses_a_moment_that_it_cannot_invert() -> None:
    given = layer(tokens=8)
    with pytest.raises(TooLittleData, match="8 tokens leave Z singular: give more data, or raise damping"):
        start("lora_da", given, damping=1e-14)


# ------------------------------------------------------------------ where two of them are one


def unit_moments(features: int) -> Moments:
    """C = I exactly."""
    return moments(torch.eye(features) * math.sqrt(features))


@pytest.mark.parametrize("name", ["corda", "tara"])
def test_without_a_metric_it_is_pissa(name: str) -> None:
    given = layer()
    found = {"inputs": unit_moments(16), "output_gradients": unit_moments(24)}
    wanted = oracles.pissa(dense(given.W), RANK)
    assert_near(product(start(name, given, statistics=found)), wanted, 1e-5)


def test_preserving_without_a_metric_is_milora() -> None:
    given = layer()
    wanted = oracles.milora(dense(given.W), RANK)
    assert_near(product(start("corda", given, statistics={"inputs": unit_moments(16)}, mode="kpm")), wanted, 1e-5)


def test_tara_without_the_loss_is_corda() -> None:
    given = layer()
    found = {**given.statistics(), "output_gradients": unit_moments(24)}
    assert_near(product(start("tara", given, statistics=found)), product(start("corda", given)), 1e-5)


def test_sc_lora_that_preserves_nothing_approximates_the_outputs_best() -> None:
    given = layer()
    W, X = dense(given.W), dense(given.X)
    found = product(start("sc_lora", given, beta=0.0))
    best = np.linalg.svd(X @ W.T, compute_uv=False)[RANK:]
    assert np.linalg.norm(X @ (W - found).T) == pytest.approx(float(np.linalg.norm(best)), rel=1e-4)


def test_lora_da_without_metrics_is_lora_one() -> None:
    given = layer()
    found = {**given.statistics(), "inputs": unit_moments(16), "output_squares": squares(torch.ones(9, 24))}
    ours = start("lora_da", given, statistics=found, beta=0.0, gamma=128.0)
    one = start("lora_one", given)
    assert_near(product(ours), product(one), 1e-4)
    assert_same_space(dense(ours.A).T, dense(one.A).T)
    assert_near(dense(ours.A @ ours.A.T), np.eye(RANK) / 128, 1e-4)  # but for the split: all of S is in B


@pytest.mark.parametrize("name", MOVING)
def test_the_loss_falls(name: str) -> None:
    """On least squares, a short step of any of them lowers the loss by about ⟨G, s·B·core·A⟩."""
    given = layer()
    W, X = dense(given.W), dense(given.X)
    Y = X @ (W + oracles.with_spectrum(24, 16, 0.7 ** np.arange(16), seed=2)).T

    def loss(change: np.ndarray) -> float:
        return float(np.linalg.norm(X @ (W + change).T - Y) ** 2 / (2 * len(X)))

    D = torch.from_numpy(X @ W.T - Y).float()
    found = {**given.statistics(), "gradient": merged(D, given.X), "output_squares": squares(D)}
    step = product(start(name, given, statistics=found))
    G = dense(D).T @ X / len(X)
    step *= 0.2 * abs(float((G * step).sum())) / np.linalg.norm(X @ step.T) ** 2 * len(X)  # a fifth of the best length
    assert loss(step) < loss(np.zeros_like(W))
    assert loss(step) - loss(0 * step) == pytest.approx(0.9 * float((G * step).sum()), rel=0.01)


# ------------------------------------------------------------------ merged gradients, and their noise


@pytest.mark.parametrize("name", ["lora_one", "lora_ga"])
def test_a_merged_gradient_holds_the_exact_ones_energy(name: str) -> None:
    given = layer(150, 140)
    found = start(name, given, statistics={"gradient": merged(given.D, given.X)}, rank=RANK)
    S = np.linalg.svd(given.G, compute_uv=False)
    Q, _ = np.linalg.qr(dense(found.A).T)
    held = np.linalg.norm(given.G @ Q) ** 2
    assert held >= 0.999 * float((S[:RANK] ** 2).sum())


@pytest.mark.parametrize("name", ["lora_one", "lora_ga", "lora_sb", "lora_da"])
def test_the_overlap_of_two_halves_is_reported(name: str) -> None:
    given = layer()
    found = {**given.statistics(), "gradient": merged(given.D, given.X)}
    assert 0.5 < start(name, given, statistics=found).facts["overlap"] <= 1.0001
    assert "overlap" not in start(name, given).facts


# ------------------------------------------------------------------ PEFT, where it is right


def test_eva_spans_what_pefts_incremental_pca_does() -> None:
    pca = pytest.importorskip("peft.utils.incremental_pca")
    given = layer()
    theirs = pca.IncrementalPCA(n_components=RANK, lowrank=True, lowrank_seed=42)
    theirs.partial_fit(given.X)
    ours = start("eva", given)
    assert_same_space(dense(ours.A).T, dense(theirs.components_).T, 1e-3)
    assert ours.facts["explained"] == pytest.approx(theirs.explained_variance_ratio_.tolist(), rel=1e-3)
    whitened = theirs.components_ / theirs.singular_values_.sqrt()[:, None]
    assert_near(np.abs(dense(start("eva", given, whiten=True).A)), np.abs(dense(whitened)), 1e-3)


def peft_model(given: Layer, **config: Any) -> Any:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(given.W.shape[1], given.W.shape[0], bias=False))
    model[0].weight.data = given.W.clone()
    return model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"], **config)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_holds_what_peft_subtracts_at_batch_size_one(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    # PEFT imports attrs without asking for it; all that it takes from there is a dataclass.
    monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    corda = pytest.importorskip("peft.tuners.lora.corda")
    from peft.tuners.lora.config import CordaConfig

    given = layer()
    model, config = peft_model(given, init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode))
    corda.preprocess_corda(model, config, run_model=lambda: model(given.X[None]))
    theirs = given.W - peft.get_peft_model(model, config).base_model.model[0].base_layer.weight.detach()
    assert_near(product(start("corda", given, scaling=2.0, mode=mode), 2.0), dense(theirs), 1e-3)


def test_pefts_lora_ga_has_our_directions_and_the_scale_of_the_loss() -> None:
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "LoraGAConfig"):
        pytest.skip("this PEFT has no lora_ga")
    given = layer()
    model, config = peft_model(given, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    model[0]._peft_loraga_grad = torch.from_numpy(given.G).float()
    theirs = peft.get_peft_model(model, config).base_model.model[0]
    A, B = theirs.lora_A["default"].weight.detach(), theirs.lora_B["default"].weight.detach()
    ours = start("lora_ga", given, scaling=2.0, scale="unit")
    S = torch.linalg.svdvals(torch.from_numpy(given.G).float())[RANK : 2 * RANK]
    torch.testing.assert_close(A.abs(), ours.A.abs(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(B.abs(), (ours.B * S).abs() * 24**0.25 / 4, atol=1e-5, rtol=1e-2)


# ------------------------------------------------------------------ real weights, inputs and gradients


@pytest.fixture(scope="module")
def real(smollm2: Any) -> dict[str, Layer]:
    """Two layers of SmolLM2 on a thousand tokens of Python: one with outlier inputs, one of the wide kind."""
    tokens = torch.tensor([i * 7919 % 40000 + 100 for i in range(1024)]).reshape(4, 256)
    tokens[:, 1::2] = tokens[:, ::2]  # half of it predictable
    model = smollm2()
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = [args[0].detach().flatten(0, 1)]
            output.register_hook(lambda gradient: seen[name].append(gradient.flatten(0, 1) * len(seen[name][0])))

        return hook

    names = ["model.layers.28.mlp.down_proj", "model.layers.15.mlp.gate_proj"]
    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    model(input_ids=tokens, labels=tokens).loss.backward()
    for handle in handles:
        handle.remove()
    return {n: Layer(model.get_submodule(n).weight.detach(), *seen[n], seen[n][0][:512]) for n in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.layers.28.mlp.down_proj", "model.layers.15.mlp.gate_proj"])
def test_real_layers_agree_with_the_oracles(real: dict[str, Layer], name: str) -> None:
    given, r = real[name], 16
    found = given.statistics()
    W, X = dense(given.W), dense(given.X)
    V, _, _ = oracles.eva(X, r)
    assert_same_space(dense(start("eva", given, r, statistics=found).A).T, V)
    Q = dense(start("corda", given, r, statistics=found).B)
    C = X.T @ X / len(X)
    C += 0.01 * np.mean(np.diag(C)) * np.eye(len(C))
    U, _, _ = np.linalg.svd(W @ C, full_matrices=False)
    assert_same_space(Q, U[:, :r])
    G = given.G
    S = np.linalg.svd(G, compute_uv=False)
    for gradient, least in ((merged(given.D, given.X, r), 0.99), (found["gradient"], 0.9999)):
        one = start("lora_one", given, r, statistics={"gradient": gradient})
        left, _ = np.linalg.qr(dense(one.B))
        right, _ = np.linalg.qr(dense(one.A).T)
        assert np.linalg.norm(left.T @ G @ right) ** 2 >= least * float((S[:r] ** 2).sum())
