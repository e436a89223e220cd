r"""Thin factors, and a weight changed by a product of them.

    W + s·B·A                                                         W: (m, n), B: (m, r), A: (r, n)

None of this forms the dense B·A.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.errors import BadRank
from headstart.linalg.sides import BLOCK
from headstart.linalg.spectrum import signs

CHUNK = 1 << 15  # Numbers that stay in the cache from cast to cast.


def thin_qr(columns: Float[Tensor, "m r"]) -> tuple[Float[Tensor, "m q"], Float[Tensor, "q r"]]:
    """Q with orthonormal columns and R upper triangular with a diagonal that is not negative, q = min(m, r).

    Q is orthonormal also where the columns are dependent or zero.
    """
    work = columns if columns.dtype == torch.float64 else columns.float()
    Q, R = torch.linalg.qr(work)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R.dtype)
    return Q * sign, sign[:, None] * R


def recompress(
    B: Float[Tensor, "m k"], A: Float[Tensor, "k n"], rank: int
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"], float]:
    """The best factors of B·A of a smaller (or larger) rank, and the share of ‖B·A‖² that they drop.

    Two thin QRs and the SVD of a (k, k) core, in float64: B·A is never formed. The spectrum is split evenly; rank
    beyond that of B·A is filled with zeros.
    """
    largest = min(B.shape[0], A.shape[1])
    if not 1 <= rank <= largest:
        raise BadRank(f"rank {rank} does not fit factors of a {B.shape[0], A.shape[1]} weight: choose 1 to {largest}")
    with torch.no_grad():
        QB, RB = torch.linalg.qr(B.double())
        QA, RA = torch.linalg.qr(A.double().t())
        U, S, Vh = torch.linalg.svd(RB @ RA.t(), full_matrices=False)
        kept = min(rank, len(S))
        root = S[:kept].sqrt()
        sign = signs(QB @ U[:, :kept], QA @ Vh[:kept].t())
        small_B, small_A = B.new_zeros(B.shape[0], rank), A.new_zeros(rank, A.shape[1])
        small_B[:, :kept] = (QB @ (U[:, :kept] * (root * sign))).to(B.dtype)
        small_A[:kept] = ((Vh[:kept] * (root * sign)[:, None]) @ QA.t()).to(A.dtype)
        energy = float((S**2).sum())
        return small_B, small_A, float((S[kept:] ** 2).sum()) / energy if energy else 0.0


# ------------------------------------------------------------------ a low-rank change of a weight


def add_lowrank(
    W: Float[Tensor, "m n"], B: Float[Tensor, "m r"], A: Float[Tensor, "r n"], scaling: float
) -> Float[Tensor, "m n"]:
    """W + s·B·A as a new tensor of W's dtype, without the dense product.

    For float16 and bfloat16 every element is the exact sum rounded once, to nearest even. A cast from float64 goes
    through float32 and so rounds twice, which is wrong where the first rounding lands on a tie of the second: the
    few elements near one are found by a bracket, and settled from the float64 sum.
    """
    with torch.no_grad():
        if W.dtype in (torch.float32, torch.float64):
            return torch.addmm(W, B.to(W.dtype), A.to(W.dtype), alpha=scaling)
        (m, n), out = W.shape, torch.empty(W.shape, dtype=W.dtype, device=W.device)
        left, right = B.double() * scaling, A.double()
        step = max(1, min(m, CHUNK // max(1, n)))
        sums = torch.empty(step, n, dtype=torch.float64, device=W.device)
        near, end = torch.empty(2, step, n, device=W.device)
        upper = torch.empty(step, n, dtype=W.dtype, device=W.device)
        for start in range(0, m, step):
            rows = slice(start, min(start + step, m))
            count = rows.stop - start
            exact, lower = sums[:count].copy_(W[rows]).addmm_(left[rows], right), out[rows]
            near[:count].copy_(exact)
            lower.copy_(torch.mul(near, 1 - 2**-22, out=end)[:count])
            upper.copy_(torch.mul(near, 1 + 2**-22, out=end))
            unsure = _differing(lower, upper[:count])
            if len(unsure):
                lower.view(-1)[unsure] = _round_once(exact.view(-1)[unsure], W.dtype)
        return out


def _differing(one: Tensor, other: Tensor) -> Tensor:
    """Where two contiguous tensors of a two-byte dtype differ; compared four at a time, most being equal."""
    one, other = one.view(-1).view(torch.int16), other.view(-1).view(torch.int16)
    if len(one) % 4:
        return torch.ne(one, other).nonzero().flatten()
    fours = torch.ne(one.view(torch.int64), other.view(torch.int64)).nonzero()
    return (4 * fours + torch.arange(4, device=one.device)).flatten()


def _round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 → a half type in one rounding. A plain cast goes through float32 and rounds twice."""
    near = x.float()
    bits = near.view(torch.int32)
    error = x.abs() - near.abs().double()
    # Round to odd: an inexact float32 gets its last bit set, so that no false tie is left for the second rounding.
    shift = torch.sign(error).nan_to_num().int() * (bits & 1 == 0)
    return (bits + shift).view(torch.float32).to(dtype)


def row_norms_squared(W: Float[Tensor, "m n"]) -> Float[Tensor, " m"]:
    """‖Wᵢ‖² per row in float64: what `lowrank_row_norms` can be given once for a frozen weight."""
    with torch.no_grad():
        return torch.cat([(block.double() ** 2).sum(1) for block in _row_blocks(W)])


def lowrank_row_norms(
    W: Float[Tensor, "m n"],
    B: Float[Tensor, "m r"],
    A: Float[Tensor, "r n"],
    scaling: float,
    squared: Float[Tensor, " m"] | None = None,
) -> Float[Tensor, " m"]:
    """‖Wᵢ + s·(B·A)ᵢ‖ per row, without B·A.

        ‖Wᵢ‖² + 2s·⟨(W·Aᵀ)ᵢ, Bᵢ⟩ + s²·⟨(B·A·Aᵀ)ᵢ, Bᵢ⟩

    Rows in which the three cancel more than a hundredfold are computed directly.

    Args:
        squared: `row_norms_squared(W)`, where the caller keeps it.
    """
    with torch.no_grad():
        squared = row_norms_squared(W) if squared is None else squared.double()
        # A compiled graph cannot choose rows: there float64 serves them all.
        compiling = torch.compiler.is_compiling()
        work = torch.float64 if compiling else torch.promote_types(W.dtype, torch.float32)
        wide_A, wide_B = A.double(), B.double()
        across = A.to(work).t()
        WA = torch.cat([block.to(work) @ across for block in _row_blocks(W)]).double()
        cross = 2 * scaling * (WA * wide_B).sum(1)
        moved = scaling**2 * ((wide_B @ (wide_A @ wide_A.t())) * wide_B).sum(1)
        norms = squared + cross + moved
        if compiling:
            return norms.clamp_min(0).sqrt().float()
        doubtful = torch.nonzero(100 * norms < squared + moved).flatten()
        for rows in doubtful.split(max(1, (BLOCK // 4) // W.shape[1])):
            direct = torch.addmm(W[rows].double(), wide_B[rows], wide_A, alpha=scaling)
            norms[rows] = (direct**2).sum(1)
        return norms.clamp_min(0).sqrt().float()


def _row_blocks(W: Tensor) -> Iterator[Tensor]:
    dtype = torch.promote_types(W.dtype, torch.float32)
    step = max(1, BLOCK // W.shape[1])
    for start in range(0, W.shape[0], step):
        yield W[start : start + step].to(dtype)
