"""Several changes of one weight into one: sums, TIES and DARE, on the changes themselves.

    linear         Σ wᵢ·Δᵢ
    ties           mean of the wᵢ·Δᵢ that are large and agree with the majority
    dare_linear    Σ wᵢ·mᵢ⊙Δᵢ/d                   mᵢ: 1 with probability d
    dare_ties      mean of the wᵢ·mᵢ⊙Δᵢ/d that agree with the majority

"Large" are the share d (the density) of the elements of each Δᵢ with the largest magnitudes; the majority at an
element is the sign of the sum of what is left there; the mean is over the changes that have this sign.

Yadav, Tam, Choshen, Raffel, Bansal (2023), "TIES-Merging: Resolving Interference When Merging Models", arXiv
2306.01708. Yu, Yu, Yu, Huang, Li (2023), "Language Models are Super Mario: Absorbing Abilities from Homologous Models
as a Free Lunch", arXiv 2311.03099.

Deviation: the weights wᵢ are ours (both papers have one factor for all). They take part in the vote, so that a negative
one votes for the opposite sign.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headstart.errors import BadOption
from headstart.linalg.triplets import named_generator

EXACT = ("linear", "cat", "svd")
SPARSE = ("ties", "dare_linear", "dare_ties")
METHODS = (*EXACT, *SPARSE)


def blend(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    method: str,
    *,
    density: float = 0.5,
    seed: int = 0,
    name: str = "",
) -> Tensor:
    """One change out of several of the same shape.

    Args:
        method: one of `METHODS`; the first three are the weighted sum.
        density: the share of elements that TIES keeps, or DARE does not drop.
        seed, name: of what DARE drops: the same for a layer of this name wherever, and in whichever order, it is drawn.

    Example:
        >>> ours, theirs = torch.tensor([3.0, -1.0, 2.0]), torch.tensor([1.0, 2.0, -1.0])
        >>> blend([ours, theirs], [1.0, 1.0], "ties", density=1.0)
        tensor([2., 2., 2.])
    """
    if method.startswith("dare"):
        kept = [
            delta * _drawn(delta.shape, density, named_generator(seed, "dare", f"{name}:{i}")).to(delta) / density
            for i, delta in enumerate(deltas)
        ]
    else:
        kept = [trimmed(delta, density) for delta in deltas] if method == "ties" else list(deltas)
    scaled = [weight * delta for weight, delta in zip(weights, kept, strict=True)]
    return agreed(scaled) if method.endswith("ties") else _sum(scaled)


def trimmed(delta: Tensor, density: float) -> Tensor:
    """The share `density` of the elements with the largest magnitudes, the others zero."""
    count = int(density * delta.numel())
    if count >= delta.numel():
        return delta
    kept = torch.zeros_like(delta)
    if count:
        index = delta.abs().flatten().topk(count, sorted=False).indices
        kept.view(-1)[index] = delta.flatten()[index]
    return kept


def agreed(deltas: Sequence[Tensor]) -> Tensor:
    """By element, the mean of the changes whose sign is that of their sum (the positive ones where that is zero)."""
    majority = torch.where(_sum(deltas) >= 0, 1.0, -1.0).to(deltas[0])
    total, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta in deltas:
        agrees = delta.sign() == majority
        total += delta * agrees
        count += agrees
    return total / count.clamp_min(1)


def check_method(method: str, density: float, rank: int | None, *, truncates: bool) -> None:
    """Refuse what cannot be meant.

    Args:
        truncates: whether `rank` may be given with every method.
    """
    if method not in METHODS:
        raise BadOption(f"method is {method!r}: choose {', '.join(METHODS)}")
    if not 0 < density <= 1:
        raise BadOption(f"density is {density!r}: choose the share of elements to keep, above 0 up to 1")
    if method == "svd" and rank is None:
        raise BadOption("svd truncates to a rank: give --rank")
    if rank is not None and (rank < 1 or not (truncates or method == "svd")):
        raise BadOption(f"rank is {rank!r} with method {method!r}: a positive rank goes with method svd")


def _drawn(shape: torch.Size, density: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) < density


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total
