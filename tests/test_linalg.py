"""The decompositions against dense float64 linear algebra, and against answers that are wrong on purpose."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart import linalg
from headstart.errors import BadOption, BadRank, MetaWeight, NonFiniteWeight
from headstart.linalg import (
    add_lowrank,
    bottomk_svd,
    fast,
    lowrank_row_norms,
    named_generator,
    recompress,
    thin_qr,
    topk_svd,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(m: int, n: int, decay: float = 0.5, seed: int = 0) -> Tensor:
    """A float64 matrix with singular values i^-decay: slow, as those of language models are."""
    g = generator(seed)
    U = torch.linalg.qr(torch.randn(m, min(m, n), generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, min(m, n), generator=g, dtype=torch.float64)).Q
    return (U * torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -decay) @ V.T


@dataclass(frozen=True)
class Judgement:
    """How triplets compare with the float64 truth."""

    error: float
    loss: float
    skewness: float

    @property
    def certified(self) -> bool:
        return self.error <= 1e-4 and self.loss <= 1e-6 and self.skewness <= 1e-5


def judge(U: Tensor, S: Tensor, V: Tensor, W: Tensor) -> Judgement:
    truth = torch.linalg.svdvals(W.double())[: len(S)]
    U, S, V = U.double(), S.double(), V.double()
    eye = torch.eye(len(S), dtype=torch.float64)
    held = float((U.T @ W.double()).square().sum())
    skewness = max(float((Q.T @ Q - eye).abs().max()) for Q in (U, V))
    return Judgement(float(((S - truth) / truth[0]).abs().max()), 1 - held / float(truth.square().sum()), skewness)


@pytest.mark.parametrize("k", [1, 8, 24])
@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (400, 400), (96, 130), (200, 210)])
@pytest.mark.parametrize("decay", [0.1, 0.5, 1.0])
def test_the_leading_triplets_are_those_of_float64(shape: tuple[int, int], k: int, decay: float) -> None:
    W = weight(*shape, decay=decay).float()
    found = topk_svd(W, k, generator=generator())
    assert judge(found.U, found.S, found.V, W).certified
    assert found.certificate.rank == k


@pytest.mark.parametrize("k", [8, 24])
def test_the_same_judge_condemns_a_range_finder_without_power_iterations(k: int) -> None:
    W = weight(300, 700, decay=0.5).float()
    torch.manual_seed(0)
    assert not judge(*torch.svd_lowrank(W, q=k, niter=0), W).certified
    assert not judge(*torch.svd_lowrank(W, q=k, niter=2), W).certified


def test_the_same_judge_condemns_random_orthonormal_factors() -> None:
    W = weight(300, 700).float()
    U, V = thin_qr(torch.randn(300, 8))[0], thin_qr(torch.randn(700, 8))[0]
    assert not judge(U, torch.linalg.svdvals(W)[:8], V, W).certified


def test_the_certificate_tells_what_a_short_effort_reached() -> None:
    W = weight(400, 500, decay=0.3).float()
    hasty, full = topk_svd(W, 16, generator=generator(), niter=0), topk_svd(W, 16, generator=generator())
    assert full.certificate.residual < hasty.certificate.residual
    assert full.certificate.energy is not None
    assert hasty.certificate.energy is not None
    assert full.certificate.energy > hasty.certificate.energy
    true = torch.linalg.svdvals(W.double())
    assert full.certificate.energy == pytest.approx(float((true[:16] ** 2).sum() / (true**2).sum()), rel=1e-5)
    assert full.certificate.gap == pytest.approx(float((true[15] - true[16]) / true[15]), abs=2e-2)


NARROW = {
    "noise round the identity": lambda: torch.eye(600) + 1e-4 * torch.randn(600, 600, generator=generator()),
    "orthogonal, in bfloat16": lambda: weight(700, 600, decay=0).bfloat16(),
    "values from 1 to 1.1": lambda: (weight(600, 600, decay=0) * torch.linspace(1, 1.1, 600)).float(),
}


@pytest.mark.parametrize("k", [8, 40])
@pytest.mark.parametrize("kind", NARROW)
def test_values_that_are_nearly_one_are_certified_by_what_is_left_between_them(kind: str, k: int) -> None:
    """Small residuals say little there: a hundred other directions have values as near."""
    W = NARROW[kind]()
    found = topk_svd(W, k, generator=generator())
    judgement = judge(found.U, found.S, found.V, W)
    assert judgement.error <= 1e-5
    assert judgement.loss <= 2e-6
    assert found.certificate.energy_loss >= judgement.loss / 5 - 1e-7  # float32's


def test_the_certified_residual_is_the_true_residual() -> None:
    W = weight(350, 300, decay=0.2).float()
    found = topk_svd(W, 12, generator=generator())
    U, S, V = found.U.double(), found.S.double(), found.V.double()
    forth = ((W.double() @ V - U * S).norm(dim=0) / S).max()
    back = ((W.double().T @ U - V * S).norm(dim=0) / S).max()
    assert found.certificate.residual == pytest.approx(float(max(forth, back)), rel=0.3, abs=1e-6)


@pytest.mark.parametrize("shape", [(350, 300), (300, 350)])
@pytest.mark.parametrize("niter", [0, 2, 8])
def test_the_certificate_of_a_given_effort_estimates_what_was_reached(shape: tuple[int, int], niter: int) -> None:
    for decay in (0.05, 0.2, 1.0):
        W = weight(*shape, decay=decay).float()
        found = topk_svd(W, 12, generator=generator(), niter=niter)
        assert "Lanczos" in found.certificate.route
        U, S, V = found.U.double(), found.S.double(), found.V.double()
        forth, back = W.double() @ V - U * S, W.double().T @ U - V * S
        reached = max(float((side.norm(dim=0) / S).max()) for side in (forth, back))
        assert 0.5 * reached - 1e-6 <= found.certificate.residual <= 12 * reached + 1e-6


@pytest.mark.parametrize("niter", [2, 4, 16])
@pytest.mark.parametrize("k", [4, 16])
def test_niter_is_at_least_as_accurate_as_that_many_rounds_of_svd_lowrank(niter: int, k: int) -> None:
    W = weight(500, 600, decay=0.4).float()
    held = []
    for seed in range(3):
        torch.manual_seed(seed)
        U = torch.svd_lowrank(W, q=k, niter=niter)[0]
        held.append(float((U.T @ W).square().sum()))
    ours = topk_svd(W, k, generator=generator(), niter=niter)
    assert float((ours.U.T @ W).square().sum()) >= 0.999 * max(held)


def test_the_same_seed_gives_the_same_bits_and_moves_no_global_state() -> None:
    W, before = weight(200, 300).float(), torch.get_rng_state()
    one, two = topk_svd(W, 8, generator=generator(3)), topk_svd(W, 8, generator=generator(3))
    assert torch.equal(one.U, two.U)
    assert torch.equal(one.S, two.S)
    assert torch.equal(one.V, two.V)
    assert torch.equal(torch.get_rng_state(), before)


def test_signs_do_not_depend_on_the_start() -> None:
    W = weight(200, 300, decay=1.0).float()
    first = topk_svd(W, 6, generator=generator(0))
    for seed in range(1, 6):
        other = topk_svd(W, 6, generator=generator(seed))
        assert torch.allclose(first.U, other.U, atol=5e-3)


def test_the_transpose_has_the_transposed_triplets() -> None:
    W = weight(260, 180, decay=0.8).float()
    one, two = topk_svd(W, 6, generator=generator()), topk_svd(W.T.contiguous(), 6, generator=generator())
    assert torch.allclose((one.U * one.S) @ one.V.T, ((two.U * two.S) @ two.V.T).T, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_decomposed_as_they_are(dtype: torch.dtype) -> None:
    W = weight(300, 280).to(dtype)
    found = topk_svd(W, 8, generator=generator())
    assert judge(found.U, found.S, found.V, W).certified
    assert found.U.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e20, 1e36])
def test_scales_whose_squares_overflow_are_served(scale: float) -> None:
    W = weight(200, 150).float() * scale
    found = topk_svd(W, 4, generator=generator())
    truth = torch.linalg.svdvals(W.double())[:4]
    assert torch.allclose(found.S.double(), truth, rtol=1e-4)


@pytest.mark.parametrize("shape", [(60, 50), (300, 280)])
def test_a_deficient_weight_has_orthonormal_triplets_and_says_its_rank(shape: tuple[int, int]) -> None:
    W = (torch.randn(shape[0], 3, generator=generator()) @ torch.randn(3, shape[1], generator=generator(1))).float()
    found = topk_svd(W, 6, generator=generator())
    assert found.certificate.rank == 3
    assert (found.S[3:] == 0).all()
    assert torch.allclose(found.U.T @ found.U, torch.eye(6), atol=1e-5)
    assert torch.allclose(found.V.T @ found.V, torch.eye(6), atol=1e-5)
    zero = topk_svd(torch.zeros(shape), 6, generator=generator())
    assert zero.certificate.rank == 0
    assert torch.allclose(zero.U.T @ zero.U, torch.eye(6), atol=1e-5)


def test_layouts_in_memory_do_not_matter() -> None:
    W = weight(160, 400).float()
    wide = torch.zeros(160, 800)
    wide[:, ::2] = W
    for view in (wide[:, ::2], W.T.contiguous().T, torch.randn(1, 400, generator=generator()).expand(160, 400)):
        found = topk_svd(view, 1, generator=generator())
        assert judge(found.U, found.S, found.V, view).certified


@pytest.mark.parametrize(
    ("operator", "k", "error"),
    [
        (torch.ones(4, 5), 5, BadRank),
        (torch.ones(4, 5), 0, BadRank),
        (torch.ones(4, 5, 6), 1, BadOption),
        (torch.full((4, 5), torch.nan), 1, NonFiniteWeight),
        (torch.full((300, 200), torch.inf), 1, NonFiniteWeight),
        (torch.ones(4, 5, device="meta"), 1, MetaWeight),
    ],
)
def test_what_cannot_be_decomposed_is_refused_by_name(operator: Tensor, k: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        topk_svd(operator, k, generator=generator())


class Product:
    """D·X without D·X: an operator known by its products."""

    def __init__(self, D: Tensor, X: Tensor) -> None:
        self.D, self.X = D, X
        self.shape, self.dtype, self.device = (len(D), X.shape[1]), D.dtype, D.device

    def matmul(self, Y: Tensor) -> Tensor:
        return self.D @ (self.X @ Y)

    def rmatmul(self, Y: Tensor) -> Tensor:
        return self.X.T @ (self.D.T @ Y)


def test_an_operator_is_decomposed_by_its_products_alone() -> None:
    D, X = weight(300, 64, seed=1).float(), weight(64, 400, seed=2).float()
    found = topk_svd(Product(D, X), 8, generator=generator())
    assert judge(found.U, found.S, found.V, D @ X).certified


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 97), n=st.integers(1, 97), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_small_shape_and_rank(m: int, n: int, share: float, seed: int) -> None:
    k = 1 + int(share * (min(m, n) - 1))
    W = torch.randn(m, n, generator=generator(seed))
    found = topk_svd(W, k, generator=generator())
    assert torch.allclose(found.S.double(), torch.linalg.svdvals(W.double())[:k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("niter", [None, 4, 16])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("shape", [(300, 400), (500, 300)])
@pytest.mark.parametrize("true_rank", [1, 5, 20])
def test_few_directions_are_found_however_many_are_asked_for(
    true_rank: int, shape: tuple[int, int], every: int, niter: int | None
) -> None:
    """A Krylov space has no more of them than the weight, and its rounding lies where they do."""
    m, n = shape
    thin, dense = torch.randn(m, n, generator=generator(1)), torch.randn(true_rank, n, generator=generator(2))
    for W in (thin * (torch.arange(n) < true_rank), thin[:, :true_rank] @ dense):
        W = W * (torch.arange(m)[:, None] % every == 0)
        wanted = torch.linalg.svdvals(W.double())
        for k in (3, 8, 30):
            found = topk_svd(W, k, generator=generator(), niter=niter)
            bound = 1e-2 if niter == 4 else 1e-5  # so few rounds promise little
            assert (found.S.double() - wanted[:k]).abs().max() < bound * wanted[0]
            for side in (found.U, found.V):
                torch.testing.assert_close(side.T @ side, torch.eye(k), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(40, 70), (150, 90)])
def test_the_trailing_triplets_are_those_of_float64(shape: tuple[int, int]) -> None:
    W = weight(*shape, decay=1.0).float()
    found = bottomk_svd(W, 5, generator=generator())
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    assert torch.allclose(found.S.double().sort().values, S[-5:].sort().values, rtol=1e-5)
    overlap = torch.linalg.svdvals(U[:, -5:].T @ found.U.double())
    assert overlap.min() > 1 - 1e-6
    assert torch.linalg.svdvals(Vh[-5:] @ found.V.double()).min() > 1 - 1e-6


def test_the_trailing_triplets_of_a_deficient_weight_are_known_to_be_zero() -> None:
    W = weight(40, 30).float()
    W[:, 10:14] = 0
    assert bottomk_svd(W, 6, generator=generator()).certificate.rank == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thin_qr_is_orthonormal_also_of_dependent_columns(dtype: torch.dtype) -> None:
    columns = torch.randn(60, 5, generator=generator()).to(dtype)
    columns[:, 3] = columns[:, 1]
    Q, R = thin_qr(columns)
    assert torch.allclose(Q.T @ Q, torch.eye(5), atol=1e-5)
    assert torch.allclose(Q @ R, columns.float(), atol=1e-4)
    assert (R.diagonal() >= -1e-5).all()


@pytest.mark.parametrize("rank", [1, 4, 8, 12])
def test_recompress_is_the_best_product_of_its_rank(rank: int) -> None:
    B, A = torch.randn(40, 8, generator=generator()), torch.randn(8, 60, generator=generator(1))
    small_B, small_A, dropped = recompress(B, A, rank)
    S = torch.linalg.svdvals(B.double() @ A.double())
    kept = min(rank, 8)
    apart = float((small_B.double() @ small_A.double() - B.double() @ A.double()).square().sum())
    assert small_B.shape == (40, rank)
    assert small_A.shape == (rank, 60)
    assert apart == pytest.approx(float(S[kept:].square().sum()), abs=1e-6 * float(S.square().sum()))
    assert dropped == pytest.approx(float(S[kept:].square().sum() / S.square().sum()), abs=1e-12)


HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", "numba"])
def casts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own casts, and the compiled ones."""
    monkeypatch.setattr(fast, "_loaded", [])
    if request.param == "numba":
        pytest.importorskip("numba")
        fast.prepare(fast.WORTH)
        assert fast.ready() is not None


def nearest(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The float64 values rounded once to a half type: the nearest of three neighbours, ties to the even one."""
    guess = exact.to(dtype)
    bits = guess.view(torch.int16).int()
    best, distance = guess.clone(), (guess.double() - exact).abs()
    for step in (-1, 1):
        other = (bits + step).to(torch.int16).view(dtype)
        apart = (other.double() - exact).abs()
        closer = (apart < distance) | ((apart == distance) & (bits & 1 == 1))
        best, distance = torch.where(closer, other, best), torch.where(closer, apart, distance)
    return best


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("casts")
def test_a_merge_rounds_every_element_once(dtype: torch.dtype, size: float) -> None:
    W = torch.randn(600, 500, generator=generator()).to(dtype)
    B, A = torch.randn(600, 8, generator=generator(1)) * size, torch.randn(8, 500, generator=generator(2))
    exact = W.double() + 0.37 * (B.double() @ A.double())
    assert torch.equal(add_lowrank(W, B, A, 0.37), nearest(exact, dtype))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("casts")
def test_a_merge_rounds_ties_to_even_and_their_neighbours_away(dtype: torch.dtype, sign: int) -> None:
    """Every half there is, subnormal and largest too, moved to just below, onto and just above the next tie."""
    count = int(torch.tensor(torch.inf, dtype=dtype).view(torch.int16))
    patterns = torch.arange(count, dtype=torch.int16)
    W, after = patterns.view(dtype), (patterns + 1).view(dtype)
    gap = (after.double() - W.double()).nan_to_num(posinf=0)
    gap[-1] = gap[-2]  # the largest and infinity
    A = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 0.0, 1.0]])
    B = sign * torch.stack([gap / 2, gap * 2.0**-36], dim=1)
    wanted = torch.stack([W, torch.where(patterns % 2 == 0, W, after), after], dim=1)
    W = sign * W[:, None].expand(-1, 3)
    assert torch.equal(add_lowrank(W, B, A, 1.0), sign * wanted)
    assert not torch.equal((W.double() + B @ A.double()).to(dtype), sign * wanted), "casting does it too"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("casts")
def test_a_merge_is_exact_where_every_row_holds_a_tie(dtype: torch.dtype) -> None:
    """Factors of few digits, on more rows and columns than are computed at a time."""
    W = torch.ones(300, 1100, dtype=dtype)
    B, A = torch.randint(1, 4, (300, 1), generator=generator()).float(), torch.full((1, 1100), 2.0**-8)
    B, A = (B, A) if dtype == torch.bfloat16 else (B, A * 2.0**-3)
    exact = W.double() + B.double() @ A.double()
    assert torch.equal(add_lowrank(W, B, A, 1.0), nearest(exact, dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("casts")
def test_a_merge_is_exact_beside_outliers_and_at_high_rank(dtype: torch.dtype) -> None:
    W = (torch.randn(70, 333, generator=generator()) * 0.02).to(dtype)
    W[3, 5], W[11] = 3e4, W[11] * 1000
    B, A = torch.randn(70, 512, generator=generator(1)) * 1e-3, torch.randn(512, 333, generator=generator(2))
    B[7], A[:, 9] = B[7] * 1e4, A[:, 9] * 100
    exact = W.double() + 0.37 * (B.double() @ A.double())
    assert torch.equal(add_lowrank(W, B, A, 0.37), nearest(exact, dtype))
    assert torch.equal(add_lowrank(W, torch.zeros_like(B), A, 0.37), W)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.usefixtures("casts")
def test_a_merge_keeps_what_is_not_finite_where_it_is(dtype: torch.dtype) -> None:
    W = torch.ones(4, 5, dtype=dtype)
    W[0, 1], W[0, 2], W[2, 3] = torch.inf, -torch.inf, torch.nan
    B, A = torch.ones(4, 2), torch.full((2, 5), 0.25)
    B[3] = 1e38  # beyond both halves
    found = add_lowrank(W, B, A, 8.0)
    assert found[0].tolist() == [5, torch.inf, -torch.inf, 5, 5]
    assert found[2].isnan().tolist() == [False, False, False, True, False]
    assert (found[1] == 5).all()
    assert (found[3] == torch.inf).all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (3, 200_000), (1300, 257)])
@pytest.mark.usefixtures("casts")
def test_a_merge_serves_any_shape_and_layout(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    m, n = shape
    stored = torch.randn(n, 2 * m, generator=generator()).to(dtype)
    B, A = torch.randn(m, 3, generator=generator(1)), torch.randn(3, n, generator=generator(2))
    for W in (
        stored[:, ::2].T,
        stored[:, :m].T.contiguous(),
        stored[:1, :1].expand(m, n) if m * n else stored[:, :m].T,
    ):
        before = W.clone()
        found = add_lowrank(W, B, A, 0.5)
        exact = W.double() + 0.5 * (B.double() @ A.double())
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert torch.equal(W, before)
        wanted = nearest(exact, dtype) if dtype in HALVES else exact.to(dtype)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0 if dtype in HALVES else 1e-6)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.usefixtures("casts")
def test_a_merge_is_the_same_under_autocast(dtype: torch.dtype) -> None:
    W = torch.randn(64, 48, generator=generator()).to(dtype)
    B, A = torch.randn(64, 8, generator=generator(1)), torch.randn(8, 48, generator=generator(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = add_lowrank(W, B, A, 0.5)
    assert found.dtype == dtype
    assert torch.equal(found, add_lowrank(W, B, A, 0.5))


def test_compiled_casts_are_loaded_where_they_pay_and_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_loaded", [])
    fast.prepare(fast.WORTH - 1)
    assert fast.ready() is None
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "headstart.linalg.compiled", raising=False)
    fast.load.cache_clear()
    fast.prepare(fast.WORTH)
    assert fast.ready() is None
    fast.load.cache_clear()


def test_a_merge_that_rounds_twice_is_seen() -> None:
    W = torch.randn(600, 500, generator=generator()).bfloat16()
    B, A = torch.randn(600, 8, generator=generator(1)) * 1e-2, torch.randn(8, 500, generator=generator(2))
    exact = W.double() + 0.37 * (B.double() @ A.double())
    assert not torch.equal(W + (0.37 * (B @ A)).bfloat16(), nearest(exact, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_row_norms_need_no_dense_product(dtype: torch.dtype) -> None:
    W = torch.randn(90, 70, generator=generator()).to(dtype)
    B, A = torch.randn(90, 4, generator=generator(1)), torch.randn(4, 70, generator=generator(2))
    exact = (W.double() + 0.5 * (B.double() @ A.double())).norm(dim=1)
    for squared in (None, linalg.row_norms_squared(W)):
        found = lowrank_row_norms(W, B, A, 0.5, squared=squared)
        assert torch.allclose(found.double(), exact, rtol=1e-6)


def test_row_norms_survive_cancellation() -> None:
    B, A = torch.randn(30, 4, generator=generator(1)), torch.randn(4, 50, generator=generator(2))
    W = -(B @ A) + 1e-3 * torch.randn(30, 50, generator=generator(3))
    exact = (W.double() + B.double() @ A.double()).norm(dim=1)
    assert torch.allclose(lowrank_row_norms(W, B, A, 1.0).double(), exact, rtol=1e-5)
    assert (lowrank_row_norms(torch.zeros(3, 50), torch.zeros(3, 4), A, 1.0) == 0).all()


def test_named_generators_depend_on_every_part_of_the_name() -> None:
    drawn = {
        float(torch.rand(1, generator=named_generator(*name)))
        for name in ((0, "pissa", "a"), (1, "pissa", "a"), (0, "olora", "a"), (0, "pissa", "b"))
    }
    assert len(drawn) == 4
    assert float(torch.rand(1, generator=named_generator(0, "pissa", "a"))) in drawn
