r"""What LoftQ and QPiSSA share: the best of their steps, measured against plain quantisation.

    remaining = ‖W − Q − s·B·A‖/‖W − q(W)‖                            W, Q: (m, n), B: (m, r), A: (r, n)

For q(W) with B = 0 that is 1. Where no step leaves less, the layer is left with just this, and a Kaiming start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headstart.errors import BadOption
from headstart.inits.checks import check_finite, check_scaling
from headstart.inits.split import split_evenly
from headstart.inits.strategy import Factors
from headstart.linalg import Spectrum, add_lowrank, topk_svd

Pair = tuple[Tensor, Tensor]

# What is lost has hardly a spectrum: a closer look at its leading directions changes the error by less than 1e-5.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Step:
    """A spectrum and the base that goes with it: q(W − B·A) for what was taken from W, q(W) where nothing was."""

    spectrum: Spectrum
    taken: Pair | None
    Q: Tensor


def check_count(num_iter: int) -> None:
    """An iteration that iterates."""
    if isinstance(num_iter, bool) or not isinstance(num_iter, int) or num_iter < 1:
        raise BadOption(f"num_iter is {num_iter!r}: choose an integer of at least 1")


def leading(residual: Tensor, rank: int, generator: torch.Generator) -> Spectrum:
    """The r leading singular triplets."""
    return topk_svd(residual, rank, generator=generator, tolerance=TOLERANCE)


def pair(spectrum: Spectrum) -> Pair:
    """(A, B) with B·A = U·S·Vᵀ, whatever s is, and in memory as a file gives them back: then Q is the same bits."""
    start = split_evenly(spectrum, scaling=1.0)
    return start.A.contiguous(), start.B.contiguous()


def less(weight: Tensor, taken: Pair) -> Tensor:
    """W − B·A, each element rounded once to W's dtype."""
    A, B = taken
    return add_lowrank(weight, B, A, -1.0)


def best(weight: Tensor, plain: Tensor, steps: Iterable[Step], scaling: float, otherwise: Factors) -> Factors:
    """The start of the step that leaves least of the error.

    Args:
        plain: q(W); otherwise: the start where no step leaves less than that.
    """
    check_scaling(scaling)
    W = weight.float()
    lost = _norm(W - plain.float())
    check_finite(weight, lost)
    nothing = torch.zeros_like(otherwise.A), torch.zeros_like(otherwise.B)
    note = "left as plain quantisation has it: no correction makes the error smaller"
    found = replace(otherwise, base=plain, taken=nothing, facts={"remaining": 1.0, "note": note})
    for number, step in enumerate(steps if lost else (), start=1):
        remaining = float(_norm(less(W - step.Q.float(), pair(step.spectrum))) / lost)
        if remaining < found.facts["remaining"]:
            start = split_evenly(step.spectrum, scaling)
            facts = {"remaining": remaining, "step": number, **start.facts}
            found = replace(start, anchored=False, base=step.Q, taken=step.taken or nothing, facts=facts)
    return found


def _norm(residual: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(residual, dtype=torch.float64)
    return norm
