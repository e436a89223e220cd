r"""Share a rank budget among layers.

    maximise Σ_l Σ_{j ≤ r_l} q_{l,j}  subject to  Σ_l c_l·r_l ≤ budget,  minimum ≤ r_l ≤ maximum

q_{l,1} ≥ q_{l,2} ≥ … is what one more rank is worth in layer l, c_l = m_l + n_l what it costs in parameters. Taking the
best q/c that still fits, again and again, is optimal up to one item, because the values of a layer only fall.

    rule                            q_{l,j}
    `explained_variance` (EVA)      λ_j/tr Σ of the inputs' covariance Σ
    `gradient_energy`               S_j²/‖G‖² of the gradient G
    any spectrum                    S_j² of W (PiSSA), of W·C (CorDA), …

EVA itself counts components and not parameters (`count="components"`). GoRA's rule is no such sum: it hands the budget
out in proportion to mean |W∘G| (`in_proportion`).

Paischer et al. (2024), arXiv 2410.07170, section 3.3; He et al. (2025), arXiv 2502.12171, section 3.2.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.errors import BadOption, nearest
from headstart.statistics import GradientSpectrum, GradientSum, InputSpectrum, Moments

COUNTS = ("parameters", "components")


@dataclass(frozen=True)
class Allocation:
    """Ranks, and what they come to.

    Attributes:
        ranks: of each layer, in the order given; 0 for a layer that is better left alone.
        parameters: Σ c_l·r_l.
        value: Σ q_{l,j} of what was taken, where there are values.
    """

    ranks: Mapping[str, int]
    parameters: int
    value: float = math.nan

    @property
    def left_out(self) -> list[str]:
        """The layers without a rank."""
        return [name for name, rank in self.ranks.items() if not rank]

    def patterns(
        self, r: int, alpha: float, *, use_rslora: bool = False, scalings: Mapping[str, float] | None = None
    ) -> tuple[dict[str, int], dict[str, float]]:
        r"""`rank_pattern` and `alpha_pattern` for the layers whose rank or α is not r or α, by full name.

        α follows the rank so that every layer keeps its scaling, that of (r, α) where `scalings` has no other for it:
        α_l = s_l·r_l, or s_l·√r_l with rsLoRA. The anchor ^ keeps PEFT, which matches a suffix, from finding one
        layer's name at the end of another's.

        Example:
            >>> allocation = Allocation({"h.0.q": 4, "h.0.v": 16, "h.1.q": 0, "h.1.v": 8}, parameters=448)
            >>> allocation.patterns(8, 16.0)
            ({'^h\\.0\\.q': 4, '^h\\.0\\.v': 16}, {'^h\\.0\\.q': 8.0, '^h\\.0\\.v': 32.0})
        """
        power = 0.5 if use_rslora else 1.0
        given = {name: rank for name, rank in self.ranks.items() if rank}
        kept = dict.fromkeys(given, alpha / r**power) | dict(scalings or {})
        alphas = {name: kept[name] * rank**power for name, rank in given.items()}
        return (
            {f"^{re.escape(name)}": rank for name, rank in given.items() if rank != r},
            {f"^{re.escape(name)}": own for name, own in alphas.items() if not math.isclose(own, alpha)},
        )


def allocate(
    scores: Mapping[str, Sequence[float]],
    costs: Mapping[str, int],
    budget: int,
    *,
    minimum: int = 0,
    maximum: int | None = None,
    count: str = "parameters",
) -> Allocation:
    """Ranks that hold the most value within a budget.

    Args:
        scores: of each layer, what its first, second, … rank is worth: falling, and no further than it can go.
        costs: of each layer, the parameters of one rank, m + n.
        budget: in parameters, or in ranks where `count` is "components".
        minimum: rank of every layer, whatever it is worth.
        maximum: of any layer; by default as far as its scores go.
        count: "parameters", or "components": PEFT's rule for EVA, where every rank costs the same. Then `parameters`
            is not bounded by the budget; where ranks move to wide layers it grows.

    Raises:
        BadOption: if scores rise, names differ, or the minimum does not fit.

    Example:
        >>> scores = {"narrow": [0.6, 0.3, 0.05], "wide": [0.9, 0.5, 0.4]}
        >>> allocate(scores, {"narrow": 10, "wide": 30}, 60)
        Allocation(ranks={'narrow': 3, 'wide': 1}, parameters=60, value=1.85...)
        >>> allocate(scores, {"narrow": 10, "wide": 30}, 4, count="components")
        Allocation(ranks={'narrow': 1, 'wide': 3}, parameters=100, value=2.4)
    """
    limits = _limits(scores, costs, minimum, maximum)
    if count not in COUNTS:
        raise BadOption(f"count is {count!r}{nearest(str(count), COUNTS)} (choose 'parameters' or 'components')")
    price = {name: 1 if count == "components" else costs[name] for name in scores}
    ranks = dict.fromkeys(scores, minimum)
    left = budget - minimum * sum(price.values())
    if left < 0:
        raise BadOption(f"a rank of {minimum} everywhere takes {budget - left} of a budget of {budget}: raise it")
    order = {name: i for i, name in enumerate(scores)}  # equals go to the layer named first
    offers = [_offer(scores, price, order, name, minimum) for name in scores if minimum < limits[name]]
    heapq.heapify(offers)
    while offers:
        *_, name = heapq.heappop(offers)
        if price[name] > left:
            continue  # And so are all its further ranks; a cheaper layer may still fit.
        ranks[name] += 1
        left -= price[name]
        if ranks[name] < limits[name]:
            heapq.heappush(offers, _offer(scores, price, order, name, ranks[name]))
    value = math.fsum(score for name, rank in ranks.items() for score in scores[name][:rank])
    return Allocation(ranks, sum(costs[name] * rank for name, rank in ranks.items()), value)


def in_proportion(
    importance: Mapping[str, float],
    costs: Mapping[str, int],
    rank: int,
    *,
    minimum: int | None = None,
    maximum: int | None = None,
    power: float = 1.0,
) -> Allocation:
    """GoRA's ranks: every layer gets its share of the budget, and buys what it can.

        budget = Σ_l rank·c_l^power,  r_l = ⌊(budget·I_l/Σ I)/c_l^power⌋ within [minimum, maximum]

    Args:
        importance: I of each layer, not negative; see `importance_of`.
        costs: of each layer, the parameters of one rank, m + n.
        rank: what every layer would have if all were equal.
        minimum: half of that by default; maximum: four times that. Both bind after the budget is handed out, which
            therefore may not be met: see `parameters`.
        power: 1 as in the reference repository, 0.5 as in the paper.

    Raises:
        BadOption: if names differ, or nothing is important.

    Example:
        >>> in_proportion({"a": 3.0, "b": 1.0, "c": 0.0}, {"a": 10, "b": 10, "c": 10}, rank=4)
        Allocation(ranks={'a': 9, 'b': 3, 'c': 2}, parameters=140, value=nan)
    """
    low, high = rank // 2 if minimum is None else minimum, 4 * rank if maximum is None else maximum
    if importance.keys() != costs.keys():
        raise BadOption(f"importance and costs name different layers: {sorted(importance.keys() ^ costs.keys())[:3]}")
    total = math.fsum(importance.values())
    if not (0 < total < math.inf and min(importance.values()) >= 0):
        raise BadOption(f"importances sum to {total}: give numbers that are not negative, and not all zero")
    prices = {name: float(costs[name]) ** power for name in importance}
    budget = rank * math.fsum(prices.values())
    # Deviation: rounded down once. The reference rounds the share to an integer before it divides.
    fair = {name: math.floor(budget * own / total / prices[name] + 1e-9) for name, own in importance.items()}
    ranks = {name: min(max(r, low), high) for name, r in fair.items()}
    return Allocation(ranks, sum(costs[name] * r for name, r in ranks.items()))


# ------------------------------------------------------------------ what a rank is worth


def explained_variance(inputs: Moments | InputSpectrum, k: int) -> list[float]:
    """EVA's rule: the shares of the inputs' variance that their k main directions hold."""
    varying = inputs.energy - float(inputs.mean @ inputs.mean)
    values: list[float] = inputs.leading(k, centred=True).S.double().tolist()
    return [value / max(varying, 1e-300) for value in values]


def gradient_energy(gradient: GradientSpectrum | GradientSum, k: int, generator: torch.Generator) -> list[float]:
    """The shares of the gradient's energy that its k main directions hold; zeros without a gradient."""
    _, S, _ = gradient.leading(k, generator)
    energy = float(torch.linalg.vector_norm(gradient.dense())) ** 2
    shares: list[float] = (S.double() ** 2 / max(energy, 1e-300)).tolist()
    return shares


def importance_of(weight: Float[Tensor, "m n"], gradient: GradientSpectrum | GradientSum) -> float:
    """GoRA's rule: mean |W∘G|, how much the loss would feel the weight go."""
    G = gradient.dense()
    rows = max(1, (1 << 20) // weight.shape[1])
    parts = zip(weight.detach().split(rows), G.split(rows), strict=True)
    return math.fsum(float((part.float() * step).abs().sum(dtype=torch.float64)) for part, step in parts) / G.numel()


# ------------------------------------------------------------------ below


def _limits(
    scores: Mapping[str, Sequence[float]], costs: Mapping[str, int], minimum: int, maximum: int | None
) -> dict[str, int]:
    """How far each layer can go."""
    if scores.keys() != costs.keys():
        raise BadOption(f"scores and costs name different layers: {sorted(scores.keys() ^ costs.keys())[:3]}")
    if minimum < 0 or (maximum is not None and maximum < max(minimum, 1)):
        raise BadOption(f"minimum is {minimum} and maximum {maximum}: choose 0 ≤ minimum ≤ maximum")
    for name, values in scores.items():
        if len(values) < minimum:
            raise BadOption(f"{name!r} has scores for {len(values)} ranks, and minimum={minimum} asks for more")
        slack = 1e-6 * abs(values[0]) if values else 0.0
        if any(not later <= earlier + slack for earlier, later in pairwise(values)):
            raise BadOption(f"the scores of {name!r} rise or are NaN: give what one more rank adds, largest first")
    return {name: len(values) if maximum is None else min(len(values), maximum) for name, values in scores.items()}


def _offer(
    scores: Mapping[str, Sequence[float]],
    price: Mapping[str, int],
    order: Mapping[str, int],
    name: str,
    rank: int,
) -> tuple[float, int, str]:
    """The next rank of a layer, best first in a heap."""
    return -scores[name][rank] / price[name], order[name], name
