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
from headstart.linalg import fast
from headstart.linalg.sides import BLOCK
from headstart.linalg.spectrum import signs

# The last 38 of a float64's 52 digits. The other 14 exceed the 10 of a half type by the two that the proof needs, and
# are so few that float32 holds them also where bfloat16 is subnormal.
CUT = (1 << 38) - 1
TILE = (128, 1024)  # Numbers that stay in the cache from cast to cast, and enough rows for a fast product.


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

    For float16 and bfloat16 every element is the float64 sum rounded once, to nearest even; in bfloat16 by a
    compiled loop where `prepare` has loaded it. For float32 and float64 it is a chain of multiplications and additions
    in that dtype, wrong by a few ulp of |W| + |s|·|B|·|A|.
    """
    with torch.no_grad():
        if W.dtype in (torch.float32, torch.float64):
            # In place, which autocast lets alone.
            summed = W.clone(memory_format=torch.contiguous_format)
            return summed.addmm_(B.to(W.dtype), A.to(W.dtype), alpha=scaling)
        out = torch.empty(W.shape, dtype=W.dtype, device=W.device)
        left, right = B.double() * scaling, A.double()
        brief = W.dtype == torch.bfloat16 and W.device.type == "cpu" and W.numel()
        if brief and W.is_contiguous() and (compiled := fast.ready()) is not None:
            compiled(out, W, left, right)
            return out
        into = _with_ties if brief else _through_odd
        wide = max(1, min(TILE[1], W.shape[1]))
        tall = TILE[0] * TILE[1] // wide
        spare = torch.empty(2, tall * wide, dtype=torch.float64, device=W.device)
        for old, a, new in zip(W.split(wide, 1), right.split(wide, 1), out.split(wide, 1), strict=True):
            into(new, old, left, a, tall, spare)
        return out


def _through_odd(out: Tensor, W: Tensor, left: Tensor, right: Tensor, tall: int, spare: Tensor) -> None:
    for new, old, b in zip(out.split(tall), W.split(tall), left.split(tall), strict=True):
        x, odd = (buffer[: old.numel()].view(old.shape) for buffer in spare)
        # Through float32: torch casts float16 to float64 one number at a time.
        new.copy_(_round_to_odd(x.copy_(old.float()).addmm_(b, right), odd))


def _with_ties(out: Tensor, W: Tensor, left: Tensor, right: Tensor, tall: int, spare: Tensor) -> None:
    """Through float32, which rounds twice and is half the work; what that may have spoilt is done again.

    The second rounding is wrong only where it meets a tie: where the lower half of a float32 number is 0x8000, by
    chance one number in 65,536. Asking which rows those are would make another device wait.
    """
    least = torch.empty(len(W), dtype=torch.int32, device=W.device)
    for new, old, b, low in zip(out.split(tall), W.split(tall), left.split(tall), least.split(tall), strict=True):
        x = spare[0, : old.numel()].view(old.shape)
        y, halves = spare[1].view(torch.float32).split(spare.shape[1])
        y, halves = y[: old.numel()].view(old.shape), halves[: old.numel()].view(old.shape).view(torch.int32)
        new.copy_(y.copy_(x.copy_(old).addmm_(b, right)))
        torch.amin(torch.bitwise_left_shift(y.view(torch.int32), 16, out=halves), 1, out=low)
    ties = (least == torch.iinfo(torch.int32).min).nonzero().flatten()
    for rows in ties.split(tall):  # Factors of few digits may put one into every row.
        out[rows] = rounded(W[rows].double().addmm_(left[rows], right), W.dtype)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 in another dtype, rounded once, to nearest even.

    Example:
        >>> rounded(torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64), torch.bfloat16).item()
        1.0078125
    """
    return (_round_to_odd(x, torch.empty_like(x)) if dtype.itemsize == 2 else x).to(dtype)


def _round_to_odd(x: Tensor, out: Tensor) -> Tensor:
    """float64 cut to 14 binary digits, of which the last is set where anything was cut off.

    A cast from float64 to a half type goes through float32 and rounds twice, which is wrong where the first rounding
    lands on a tie of the second. What is odd is no tie, and float32 holds it exactly: the cast rounds once. (Boldo,
    Melquiond (2008), "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd".)
    """
    bits, odd = x.view(torch.int64), out.view(torch.int64)
    torch.bitwise_and(bits, CUT, out=odd).add_(CUT).bitwise_or_(bits).bitwise_and_(~CUT)
    return out


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
