"""The strategies as pure functions: laws over all of them, an oracle for each, and PEFT where PEFT is right."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import headstart as hs
import oracles
from headstart import inits
from headstart.errors import BadAlpha, BadOption, BadRank, MetaWeight, NonFiniteWeight, SVDError, UnknownInit
from headstart.inits.strategy import Factors, Strategy

ALL = [name for name in inits.names() if not inits.get(name)[0].needs and not inits.get(name)[0].quantizes]
READ_WEIGHT = [name for name in ALL if inits.get(name)[0].reads_weight]
DRAWN = [name for name in ALL if not inits.get(name)[0].reads_weight]
SCALED = [name for name in ALL if inits.get(name)[0].divides_by_scaling]
MOVING = ["random", "init_ab"]  # these change the function at step zero, and say so
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

RANK = 4
CERTIFIED = 1e-3  # of the product, where the energy lost is certified to 1e-6


def strategy(name: str) -> Strategy:
    return inits.get(name)[0]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(
    name: str,
    weight: Tensor,
    rank: int = RANK,
    scaling: float = 1.0,
    seed: int = 0,
    kind: str = "linear",
    **options: Any,
) -> Factors:
    """What a shell does: give everything, let the signature take what it wants."""
    everything = {"weight": weight, "shape": tuple(weight.shape), "rank": rank, "scaling": scaling, "kind": kind}
    return strategy(name).start({**everything, "generator": seeded(seed)}, options)


def weight(m: int = 24, n: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A full-rank matrix with a slow spectrum, as trained weights have."""
    S = 1.0 / np.arange(1, min(m, n) + 1) ** 0.7
    return torch.from_numpy(oracles.with_spectrum(m, n, S, seed)).to(dtype)


def product(factors: Factors, scaling: float = 1.0) -> np.ndarray:
    return (scaling * factors.B.double() @ factors.A.double()).numpy()


def assert_near(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    """Near in the Frobenius norm, relative to what is wanted."""
    size = float(np.linalg.norm(wanted))
    assert float(np.linalg.norm(found - wanted)) <= tolerance * size, f"off by {np.linalg.norm(found - wanted) / size}"


def projector(columns: Tensor) -> np.ndarray:
    return (columns.double() @ columns.double().T).numpy()


# ------------------------------------------------------------------ laws over all strategies


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16), (4, 40), (4, 4)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_factors_have_their_shapes_in_float32(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    factors = start(name, weight(*shape, dtype))
    assert factors.A.shape == (RANK, shape[1])
    assert factors.B.shape == (shape[0], RANK)
    assert factors.A.dtype == factors.B.dtype == torch.float32
    assert factors.A.isfinite().all()
    assert factors.B.isfinite().all()
    assert not factors.A.requires_grad
    assert not factors.B.requires_grad


@pytest.mark.parametrize("name", ALL)
def test_a_start_touches_neither_the_weight_nor_the_global_randomness(name: str) -> None:
    W = nn.Parameter(weight())
    before, state = W.detach().clone(), torch.get_rng_state()
    start(name, W)
    assert torch.equal(W, before)
    assert W.grad is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ALL)
def test_one_seed_gives_one_start(name: str) -> None:
    first, again, other = start(name, weight()), start(name, weight()), start(name, weight(), seed=1)
    assert torch.equal(first.A, again.A)
    assert torch.equal(first.B, again.B)
    same = torch.equal(first.A, other.A) and torch.equal(first.B, other.B)
    assert not same or name not in DRAWN


@pytest.mark.parametrize("name", DRAWN)
def test_a_start_that_takes_a_shape_needs_no_values(name: str) -> None:
    factors = start(name, torch.empty(24, 16, device="meta"))
    assert torch.equal(factors.A, start(name, weight()).A)


@pytest.mark.parametrize("name", [name for name in ALL if name not in MOVING])
def test_the_function_is_preserved_at_step_zero(name: str) -> None:
    factors = start(name, weight())
    assert factors.anchored or not product(factors).any()


@pytest.mark.parametrize("name", MOVING)
def test_a_start_that_moves_the_function_does(name: str) -> None:
    factors = start(name, weight())
    assert not factors.anchored
    assert product(factors).any()


@pytest.mark.parametrize("name", ALL)
def test_every_direction_can_learn(name: str) -> None:
    """Of each direction, one factor is non-zero and the other one trains."""
    factors = start(name, weight())
    assert_alive(factors)


def assert_alive(factors: Factors) -> None:
    feeds_B = factors.A.norm(dim=1) > 1e-6 if "B" not in factors.frozen else torch.tensor(False)
    feeds_A = factors.B.norm(dim=0) > 1e-6 if "A" not in factors.frozen else torch.tensor(False)
    assert bool((feeds_A | feeds_B).all())


@pytest.mark.parametrize("rank", [2, 4, 8])
@pytest.mark.parametrize("name", SCALED)
def test_what_the_branch_holds_does_not_depend_on_alpha(name: str, rank: int) -> None:
    W = weight()
    scalings = [0.5, 1.0, 4.0, 2 / math.sqrt(rank), math.sqrt(rank)]  # alpha r/2, r, 4r; rsLoRA's with alpha 2 and r
    products = [product(start(name, W, rank, s), s) for s in scalings]
    for found in products[1:]:
        assert_near(found, products[0], 1e-6)


@pytest.mark.parametrize("scaling", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", SCALED)
def test_a_scaling_that_cannot_be_divided_by_is_refused(name: str, scaling: float) -> None:
    with pytest.raises(BadAlpha, match="choose a lora_alpha above 0"):
        start(name, weight(), scaling=scaling)


@pytest.mark.parametrize("rank", [0, 17, 64])
@pytest.mark.parametrize("name", READ_WEIGHT)
def test_a_rank_that_does_not_fit_is_refused_with_numbers(name: str, rank: int) -> None:
    with pytest.raises(BadRank, match=rf"rank {rank} does not fit a \(24, 16\) weight: choose 1 to 16"):
        start(name, weight(), rank)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", READ_WEIGHT)
def test_a_weight_that_is_not_finite_is_refused(name: str, bad: float) -> None:
    W = weight()
    W[5, 9] = W[7, 1] = bad
    with pytest.raises(NonFiniteWeight, match="2 NaN or infinite values"):
        start(name, W)


@pytest.mark.parametrize("name", READ_WEIGHT)
def test_a_weight_without_values_is_refused(name: str) -> None:
    with pytest.raises(MetaWeight, match="load it first"):
        start(name, torch.empty(24, 16, device="meta"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)], ids=str)
@pytest.mark.parametrize("name", READ_WEIGHT)
def test_a_zero_weight_gets_a_start_that_trains(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    factors = start(name, torch.zeros(shape, dtype=dtype))
    assert_alive(factors)
    assert not product(factors).any()
    assert factors.facts["effective_rank"] == 0
    if not factors.frozen:  # Kaiming's form: B = 0, and A of Kaiming's size
        assert not factors.B.any()
        assert factors.A.square().mean().item() == pytest.approx(1 / (3 * shape[1]), rel=0.3)


@pytest.mark.parametrize("true_rank", [1, 2, 3])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)], ids=str)
@pytest.mark.parametrize("name", READ_WEIGHT)
def test_a_deficient_weight_leaves_no_dead_direction(name: str, shape: tuple[int, int], true_rank: int) -> None:
    W = torch.from_numpy(oracles.with_spectrum(*shape, np.arange(true_rank, 0.0, -1.0))).float()
    factors = start(name, W, scaling=2.0)
    assert_alive(factors)
    if name in ("pissa", "olora"):  # all of W fits
        assert factors.facts["effective_rank"] == true_rank
        assert_near(product(factors, 2.0), W.double().numpy())
    if name == "milora":  # nothing of it does
        assert np.abs(product(factors, 2.0)).max() < 1e-5


def test_pissa_fills_null_directions_with_rows_orthogonal_to_the_weight() -> None:
    W = torch.from_numpy(oracles.with_spectrum(24, 16, np.array([3.0, 2.0]))).float()
    factors = start("pissa", W)
    assert not factors.B[:, 2:].any()
    assert (W @ factors.A[2:].T).abs().max() < 1e-5
    torch.testing.assert_close(factors.A[2:].norm(dim=1), torch.full((2,), 3**-0.5))  # a Kaiming row's norm


@pytest.mark.parametrize("true_rank", [1, 3, 8, 10])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40)], ids=str)
def test_mica_writes_where_a_deficient_weight_does_not(shape: tuple[int, int], true_rank: int) -> None:
    """Integers, so that the zero singular values are zero and not the rounding of the weight."""
    m, n = shape
    W = torch.randint(-3, 4, (m, true_rank)).float() @ torch.randint(-3, 4, (true_rank, n)).float()
    factors = start("mica", W)
    torch.testing.assert_close(factors.B.T @ factors.B, torch.eye(RANK))
    reach = torch.linalg.svdvals(W.T @ factors.B)
    torch.testing.assert_close(reach, torch.linalg.svdvals(W)[-RANK:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)], ids=str)
def test_milora_of_an_exactly_deficient_weight_trains(shape: tuple[int, int]) -> None:
    m, n = shape
    factors = start("milora", torch.randint(-3, 4, (m, 3)).float() @ torch.randint(-3, 4, (3, n)).float())
    assert factors.facts["effective_rank"] == 0
    torch.testing.assert_close(factors.A.norm(dim=1), torch.full((RANK,), 3**-0.5))


DEFICIENT = {
    "columns of zeros": (torch.randn(24, 20, generator=seeded(1)) @ torch.randn(20, 20, generator=seeded(2)), (24, 32)),
    "rows of zeros": (torch.randn(20, 24, generator=seeded(1)), (24, 24)),
    "a zero block": (torch.randn(20, 16, generator=seeded(1)), (32, 24)),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", DEFICIENT)
def test_the_trailing_directions_of_a_deficient_weight_are_its_null_spaces(kind: str, turned: bool) -> None:
    """On both sides, and not what rounding makes of them: a unit vector, which reads one input, or noise."""
    part, shape = DEFICIENT[kind]
    W = torch.zeros(shape)
    W[: len(part), : part.shape[1]] = part
    W = W.T.contiguous() if turned else W
    milora, mica = start("milora", W), start("mica", W)
    assert not milora.B.any()
    assert float((W @ milora.A.T).norm() / W.norm()) < 1e-6
    assert float((W.T @ mica.B).norm() / W.norm()) < 1e-6
    torch.testing.assert_close(milora.A @ milora.A.T, torch.eye(RANK) / 3)
    again = start("milora", W * 3.7)  # Other rounding, the same null space.
    torch.testing.assert_close(again.A, milora.A, atol=1e-5, rtol=0)


def test_the_trailing_directions_of_float64_are_found_below_the_root_of_its_precision() -> None:
    W = torch.from_numpy(oracles.with_spectrum(40, 50, np.logspace(0, -12, 40)))
    wanted = oracles.milora(W.numpy(), RANK)
    assert_near(product(start("milora", W)), wanted, 1e-3)


@pytest.mark.parametrize("name", READ_WEIGHT)
def test_a_zero_block_starts_as_the_others_of_its_layer_do(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    with torch.no_grad():
        model[0].weight[:4] = 0
        x = torch.randn(2, 8, 6, 6, generator=seeded())
        wanted = model(x)
        hs.adapt(model, hs.LoraConfig(r=4, init_lora_weights=name, target_modules=["0"]))
        assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize(("name", "option"), [("normal", "std"), ("init_ab", "c"), ("pissa", "tolerance")])
def test_a_size_that_is_none_is_refused(name: str, option: str, bad: float) -> None:
    with pytest.raises(BadOption, match=f"{option} is .*: choose a number above 0"):
        start(name, weight(400, 300), **{option: bad})


def test_factors_that_overflow_are_not_blamed_on_the_weight() -> None:
    config = hs.LoraConfig(r=2, init_lora_weights="normal", init_options={"std": 1e300})
    with pytest.raises(NonFiniteWeight, match="the factors overflow float32: scale the weight"):
        hs.adapt(nn.Sequential(nn.Linear(4, 4)), config)


LAYOUTS = {
    "transposed": lambda W: W.T.contiguous().T,
    "strided": lambda W: torch.stack([W, torch.full_like(W, math.nan)], 2).flatten(1)[:, ::2],
    "a slice": lambda W: torch.cat([W, torch.full_like(W, math.nan)])[: len(W)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", READ_WEIGHT)
def test_a_matrix_has_one_start_however_it_is_stored(name: str, layout: str, dtype: torch.dtype) -> None:
    W = weight(dtype=dtype)
    stored = LAYOUTS[layout](W)
    assert torch.equal(stored, W)
    found, wanted = start(name, stored), start(name, W)
    torch.testing.assert_close(found.A, wanted.A, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.B, wanted.B, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", READ_WEIGHT)
def test_an_expanded_weight_is_served(name: str) -> None:
    W = weight()[:, :1].expand(24, 16)
    assert_alive(start(name, W))
    assert_near(product(start("pissa", W)), W.double().numpy())


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("name", ["pissa", "milora", "loram", "olora"])
def test_the_start_follows_the_size_of_the_weight(name: str, size: float) -> None:
    W = weight()
    assert_near(product(start(name, W * size)) / size, product(start(name, W)), 1e-4)


# ------------------------------------------------------------------ the oracle of each paper


SHAPES = [(24, 16), (16, 24), (32, 32), (150, 140)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", oracles.PRODUCTS)
def test_the_branch_holds_what_the_paper_fixes(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = weight(*shape, dtype)
    wanted = oracles.PRODUCTS[name](W.double().numpy(), RANK)
    for scaling in (1.0, 0.25):
        assert_near(product(start(name, W, scaling=scaling), scaling), wanted, CERTIFIED if name == "pissa" else 1e-5)


def test_pissa_is_as_near_as_the_tolerance_asks() -> None:
    W = weight(150, 140)
    wanted = oracles.pissa(W.double().numpy(), RANK)
    assert_near(product(start("pissa", W, tolerance=1e-8)), wanted, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mica_freezes_the_minor_left_vectors(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = weight(*shape, dtype)
    factors = start("mica", W)
    assert factors.frozen == {"B"}
    assert not factors.A.any()
    assert_near(projector(factors.B), oracles.mica(W.double().numpy(), RANK))


@pytest.mark.parametrize("name", ["pissa", "milora"])
def test_the_spectrum_is_split_evenly(name: str) -> None:
    W, s = weight(), 4.0
    factors = start(name, W, scaling=s)
    S = np.linalg.svd(W.double().numpy(), compute_uv=False)
    wanted = torch.from_numpy(np.diag(S[:RANK] if name == "pissa" else S[-RANK:]) / s).float()
    torch.testing.assert_close(factors.B.T @ factors.B, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(factors.A @ factors.A.T, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scaling", [0.5, 1.0, 4.0])
def test_olora_keeps_b_orthonormal_and_r_upper_triangular(scaling: float) -> None:
    factors = start("olora", weight(), scaling=scaling)
    torch.testing.assert_close(factors.B.T @ factors.B, torch.eye(RANK))
    assert factors.A[:, :RANK].tril(-1).abs().max() < 1e-6
    assert (factors.A[:, :RANK].diagonal() > 0).all()


def test_olora_survives_dependent_columns() -> None:
    W = weight()
    W[:, 2] = 3 * W[:, 0]
    factors = start("olora", W)
    torch.testing.assert_close(factors.B.T @ factors.B, torch.eye(RANK))
    assert_near(product(factors)[:, :RANK], W[:, :RANK].double().numpy())


def test_loram_is_seedless_and_needs_the_size_alone() -> None:
    W = weight()
    noise = torch.randn(W.shape)
    other = noise * (W.norm() / noise.norm())
    torch.testing.assert_close(start("loram", W).A, start("loram", other, seed=7).A)


def test_loram_trains_at_rank_one_and_on_a_vector() -> None:
    assert_alive(start("loram", weight(), rank=1))
    assert_alive(start("loram", weight(1, 16), rank=1))
    assert_alive(start("loram", torch.ones(1, 1), rank=1))


def test_a_wrong_pissa_preserves_the_function_and_fails_the_oracle() -> None:
    """The control: identity at step zero alone proves nothing."""
    W = weight().double()
    _, S, _ = torch.linalg.svd(W)
    root = S[:RANK].sqrt()
    U, V = (torch.linalg.qr(torch.randn(d, RANK, dtype=torch.float64))[0] for d in W.shape)
    impostor = Factors(A=(V * root).T.float(), B=(U * root).float(), anchored=True)
    anchor = copy.deepcopy(impostor)
    x = torch.randn(16)
    y = W.float() @ x + (impostor.B @ (impostor.A @ x) - anchor.B @ (anchor.A @ x))
    assert torch.equal(y, W.float() @ x)
    with pytest.raises(AssertionError, match="off by"):
        assert_near(product(impostor), oracles.pissa(W.numpy(), RANK), CERTIFIED)


def test_power_iterations_without_a_spare_column_fail_the_oracle() -> None:
    """The other control: what PEFT calls pissa_niter_2 is visibly not PiSSA on a slow spectrum."""
    W = weight(150, 140)
    U, S, V = torch.svd_lowrank(W, q=RANK, niter=2)
    fast = Factors(A=(V * S.sqrt()).T, B=U * S.sqrt(), anchored=True)
    with pytest.raises(AssertionError, match="off by"):
        assert_near(product(fast), oracles.pissa(W.double().numpy(), RANK), CERTIFIED)


# ------------------------------------------------------------------ the drawn starts


def test_kaiming_is_uniform_within_one_over_root_n() -> None:
    factors = start("kaiming", weight(64, 400), rank=16)
    assert factors.A.abs().max() <= 0.05
    assert factors.A.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.02)
    assert not factors.B.any()


def test_kaiming_on_an_embedding_changes_the_roles() -> None:
    factors = start("kaiming", weight(64, 400), rank=16, kind="embedding")
    assert not factors.A.any()
    assert factors.B.std().item() == pytest.approx(1.0, rel=0.05)


def test_kaiming_on_a_convolution_counts_the_kernel() -> None:
    """A of PEFT's own convolution (r, in, k, k), seen as a matrix, has the bound of its fan-in."""
    factors = start("kaiming", weight(8, 3 * 5 * 5), rank=16, kind="conv")
    assert 0.9 * 75**-0.5 < factors.A.abs().max() <= 75**-0.5


@pytest.mark.parametrize(("name", "std"), [("gaussian", 1 / 16), ("normal", 0.02)])
def test_the_normal_starts_have_their_size(name: str, std: float) -> None:
    factors = start(name, weight(64, 400), rank=16)
    assert factors.A.std().item() == pytest.approx(std, rel=0.02)
    assert factors.A.mean().item() == pytest.approx(0, abs=0.03 * std)
    assert not factors.B.any()


def test_random_draws_both_factors_as_a_linear_layer_would() -> None:
    factors = start("random", weight(400, 400), rank=16)
    assert 0.99 * 0.05 < factors.A.abs().max() <= 0.05
    assert 0.99 * 0.25 < factors.B.abs().max() <= 0.25


def test_init_ab_gives_both_factors_one_bound() -> None:
    factors = start("init_ab", weight(300, 400), rank=16, c=2.0)
    for factor in (factors.A, factors.B):
        assert 0.99 * 0.1 < factor.abs().max() <= 0.1
        assert factor.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.03)


def test_init_ab_is_anchored_where_it_is_reset() -> None:
    moved, reset = start("init_ab", weight()), start("init_ab", weight(), reset=True)
    assert torch.equal(moved.A, reset.A)
    assert (moved.anchored, reset.anchored) == (False, True)


@pytest.mark.parametrize("rank", [2, 4, 16])
def test_orthogonal_has_two_halves_that_do_not_meet(rank: int) -> None:
    factors = start("orthogonal", weight(200, 300), rank)
    assert factors.anchored
    assert np.abs(product(factors)).max() < 1e-6
    assert torch.linalg.matrix_rank(factors.A) == torch.linalg.matrix_rank(factors.B) == rank // 2
    assert factors.A.square().mean().item() == pytest.approx(0.005, rel=0.2)  # half of 0.1², as PEFT's


@pytest.mark.parametrize("rank", [1, 5])
def test_orthogonal_refuses_an_odd_rank(rank: int) -> None:
    with pytest.raises(BadRank, match=rf"rank {rank} is odd and 'orthogonal' halves it: choose {rank + 1}"):
        start("orthogonal", weight(), rank)


# ------------------------------------------------------------------ reports, options, names


@pytest.mark.parametrize("name", ["pissa", "milora", "mica"])
def test_a_certified_start_reports_its_certificate(name: str) -> None:
    facts = start(name, weight()).facts
    assert {"effective_rank", "route", "residual", "energy", "energy_loss", "gap"} <= facts.keys()
    assert facts["effective_rank"] == RANK
    assert facts["residual"] < 1e-3


def test_pissa_reports_the_energy_it_holds() -> None:
    S = np.linalg.svd(weight().double().numpy(), compute_uv=False)
    assert start("pissa", weight()).facts["energy"] == pytest.approx((S[:RANK] ** 2).sum() / (S**2).sum(), rel=1e-4)


@pytest.mark.parametrize("niter", [2, 4, 16])
def test_pissa_with_iterations_is_at_least_as_good_as_what_it_is_named_after(niter: int) -> None:
    W = weight(300, 280)
    _, S, _ = torch.svd_lowrank(W, q=RANK, niter=niter)
    ours = product(start("pissa", W, niter=niter))
    assert np.linalg.norm(ours) ** 2 >= 0.999 * float((S**2).sum())


def test_pissa_refuses_what_it_cannot_do() -> None:
    with pytest.raises(BadOption, match="niter is -1"):
        start("pissa", weight(), niter=-1)
    with pytest.raises(BadOption, match=r"'pissa' has no option 'iter'.* did you mean 'niter'"):
        start("pissa", weight(), iter=4)
    with pytest.raises(SVDError, match="tolerance"):
        start("pissa", weight(300, 280), tolerance=1e-30)


def test_names_come_in_the_order_of_the_tables() -> None:
    known = [
        "kaiming",
        "gaussian",
        "normal",
        "random",
        "init_ab",
        "orthogonal",
        "loram",
        "olora",
        "pissa",
        "milora",
        "mica",
    ]
    assert inits.names()[: len(known)] == known


def test_peft_spellings_are_understood() -> None:
    assert inits.get(True)[0].name == "kaiming"
    assert inits.get(False)[0].name == "random"
    found, options = inits.get("pissa_niter_16")
    assert (found.name, options) == ("pissa", {"niter": 16})
    with pytest.raises(UnknownInit, match="did you mean 'pissa'"):
        inits.get("pisa")


def test_the_normal_start_comes_with_its_recipe() -> None:
    assert strategy("normal").preset == {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05}


@pytest.mark.parametrize("name", ALL)
def test_a_strategy_says_what_it_does_and_where_it_is_published(name: str) -> None:
    assert strategy(name).paper.startswith("https://")
    assert 10 < len(strategy(name).fact) <= 80
    assert set(strategy(name).options) <= {"niter", "tolerance", "c", "reset", "std"}


# ------------------------------------------------------------------ PEFT and loralib, where they are right


def peft_layer(init: str | bool, W: Tensor, rank: int, alpha: float) -> Any:
    """PEFT's own LoRA layer on a Linear of this weight."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False))
    model[0].weight.data = W.clone()
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=init, target_modules=["0"])
    return peft.get_peft_model(model, config).base_model.model[0]


def peft_factors(init: str | bool, W: Tensor, rank: int = RANK, alpha: float = RANK) -> Factors:
    layer = peft_layer(init, W, rank, alpha)
    return Factors(layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())


@pytest.mark.parametrize("alpha", [2, 4, 16])
def test_pissa_holds_what_peft_subtracts(alpha: float) -> None:
    W, s = weight(48, 32), alpha / RANK
    layer = peft_layer("pissa", W, RANK, alpha)
    residual = W - torch.from_numpy(product(start("pissa", W, scaling=s), s)).float()
    torch.testing.assert_close(layer.base_layer.weight.detach(), residual, atol=1e-5, rtol=1e-4)
    assert_near(product(start("pissa", W, scaling=s), s), product(peft_factors("pissa", W, alpha=alpha), s))


def test_olora_is_pefts_at_scaling_one_up_to_sign() -> None:
    W = weight(48, 32)
    ours, theirs = start("olora", W), peft_factors("olora", W)
    sign = (ours.B * theirs.B).sum(0).sign()
    torch.testing.assert_close(ours.B, theirs.B * sign)
    torch.testing.assert_close(ours.A, theirs.A * sign[:, None])


def test_olora_holds_the_same_at_every_scaling_where_peft_does_not() -> None:
    W = weight(48, 32)
    assert_near(product(start("olora", W, scaling=4.0), 4.0), product(peft_factors("olora", W)))
    with pytest.raises(AssertionError, match="off by"):
        assert_near(product(peft_factors("olora", W, alpha=16), 4.0), product(peft_factors("olora", W)))


def test_mica_spans_what_pefts_does() -> None:
    W = weight(48, 32)
    assert_near(projector(start("mica", W).B), projector(peft_factors("mica", W).B), 1e-4)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("kaiming", True), ("gaussian", "gaussian"), ("random", False), ("orthogonal", "orthogonal")]
)
def test_drawn_starts_have_the_sizes_of_pefts(ours: str, theirs: str | bool) -> None:
    W = weight(300, 400)
    found, wanted = start(ours, W, rank=16), peft_factors(theirs, W, rank=16)
    for mine, other in ((found.A, wanted.A), (found.B, wanted.B)):
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.08)
        if ours != "orthogonal" and ours != "gaussian":
            assert mine.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.02)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_kaiming_has_the_sizes_of_loralibs(kind: str) -> None:
    loralib = pytest.importorskip("loralib")
    found = start("kaiming", torch.zeros(300, 400), rank=16, kind=kind)
    layer = loralib.Linear(400, 300, r=16) if kind == "linear" else loralib.Embedding(400, 300, r=16)
    for mine, other in ((found.A, layer.lora_A), (found.B, layer.lora_B)):
        assert mine.shape == other.shape
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.05)


# ------------------------------------------------------------------ any shape at all


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int, float]:
    m, n = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rank = draw(st.integers(1, min(m, n)))
    W = torch.randn(m, n, generator=seeded(draw(st.integers(0, 99))), dtype=torch.float64)
    kept = draw(st.integers(0, min(m, n)))  # the rank of W, from zero
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (
        (U[:, :kept] * S[:kept] @ Vh[:kept]).to(draw(st.sampled_from(DTYPES))),
        rank,
        draw(st.sampled_from([0.5, 1.0, 4.0])),
    )


@pytest.mark.parametrize("name", READ_WEIGHT)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems())
def test_any_weight_gets_a_start_that_trains(name: str, problem: tuple[Tensor, int, float]) -> None:
    W, rank, scaling = problem
    factors = start(name, W, rank, scaling)
    assert factors.A.shape == (rank, W.shape[1])
    assert factors.B.shape == (W.shape[0], rank)
    assert_alive(factors)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_pissa_misses_no_more_than_the_best_does(problem: tuple[Tensor, int, float]) -> None:
    W, rank, scaling = problem
    dense = W.double().numpy()
    missed = np.linalg.norm(dense - product(start("pissa", W, rank, scaling), scaling))
    best = np.linalg.norm(dense - oracles.pissa(dense, rank))
    assert missed <= best + 1e-5 * max(np.linalg.norm(dense), 1e-30)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_milora_takes_no_more_than_the_least_does(problem: tuple[Tensor, int, float]) -> None:
    W, rank, scaling = problem
    dense = W.double().numpy()
    taken = np.linalg.norm(product(start("milora", W, rank, scaling), scaling))
    assert taken == pytest.approx(np.linalg.norm(oracles.milora(dense, rank)), abs=1e-5 * max(np.linalg.norm(dense), 1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_olora_reproduces_the_first_columns(problem: tuple[Tensor, int, float]) -> None:
    W, rank, scaling = problem
    dense = W.double().numpy()
    found = product(start("olora", W, rank, scaling), scaling)
    assert np.linalg.norm((found - dense)[:, :rank]) <= 1e-5 * max(np.linalg.norm(dense), 1e-30)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_loram_holds_its_share_of_the_energy(problem: tuple[Tensor, int, float]) -> None:
    W, rank, scaling = problem
    m, n = W.shape
    share = math.log(max(rank, 2)) / math.log(max(min(m, n), 2))
    energy = np.linalg.norm(product(start("loram", W, rank, scaling), scaling)) ** 2
    assert energy == pytest.approx(share * float(W.double().norm()) ** 2, rel=1e-4)
