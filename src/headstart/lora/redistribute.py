"""A config whose ranks follow what a calibration found: the same budget, spent where it is worth most."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from headstart.errors import BadOption, MissingStatistic, nearest
from headstart.linalg import named_generator
from headstart.lora import matrix
from headstart.lora.calibration import Calibration
from headstart.lora.config import LoraConfig
from headstart.lora.ranks import (
    Allocation,
    allocate,
    explained_variance,
    gradient_energy,
    importance_of,
    in_proportion,
)
from headstart.lora.targets import Target, targets

RULES = {"eva": "inputs", "gradient": "gradient", "gora": "gradient"}


def redistribute(
    model: nn.Module,
    config: LoraConfig,
    calibration: Calibration | None = None,
    *,
    rule: str = "eva",
    scores: Mapping[str, Sequence[float]] | None = None,
    budget: int | None = None,
    minimum: int = 0,
    maximum: int | None = None,
) -> tuple[LoraConfig, Allocation]:
    """The config with its rank budget shared anew among its layers; layers without a rank are excluded.

    Args:
        model: the base.
        config: what would be adapted, at which ranks: what that costs in parameters is the budget.
        calibration: of this model, with the inputs (rule "eva") or the gradients (the others).
        rule: "eva" the inputs' explained variance; "gradient" the gradient's energy; "gora" mean |W∘G|.
        scores: instead of a rule, any spectrum: what the first, second, … rank of each layer is worth, falling.
        budget: in parameters; not for rule "gora", whose budget is the config's rank.
        minimum: rank of any layer; none by default, and half of the config's by rule "gora", where 0 says the same.
        maximum: likewise; four times the config's by default.

    Returns:
        The config, with `rank_pattern` and `alpha_pattern` by full name so that every layer keeps its scaling, and the
        allocation, which says what the ranks come to in parameters.

    Raises:
        BadOption: a rule that does not exist, a budget that the minimum exceeds or that has no room for any rank.
        MissingStatistic: if the calibration did not see what the rule looks at.

    Example:
        >>> from headstart.lora.calibrate import calibrate
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        >>> config = LoraConfig(r=2, init_lora_weights="eva")
        >>> found = calibrate(model, config, [torch.randn(64, 8)])
        >>> _, allocation = redistribute(model, config, found, minimum=1)
        >>> sum(allocation.ranks.values()), allocation.parameters
        (4, 64)
    """
    chosen = targets(model, config)
    costs = {target.name: _cost(target) for target in chosen}
    largest = {target.name: maximum or max(4 * target.rank, minimum) for target in chosen}
    room = {target.name: _room(target) for target in chosen}
    if rule == "gora" and budget is not None:
        raise BadOption("rule 'gora' hands out what the config's rank comes to: choose r instead of a budget")
    shares = scores is None and rule == "gora"
    if scores is None:
        scores = _scores(chosen, calibration, rule, largest, config.seed)
    if shares:
        importance = {name: values[0] for name, values in scores.items()}
        allocation = in_proportion(importance, costs, rank=config.r, minimum=minimum or None, maximum=maximum)
        ranks = {name: min(rank, room[name]) for name, rank in allocation.ranks.items()}
        allocation = Allocation(ranks, sum(costs[name] * rank for name, rank in ranks.items()))
    else:
        if maximum is None:
            scores = {name: values[: largest.get(name)] for name, values in scores.items()}
        spent = sum(costs[target.name] * target.rank for target in chosen)
        allocation = allocate(scores, costs, spent if budget is None else budget, minimum=minimum, maximum=maximum)
    if not any(allocation.ranks.values()):
        raise BadOption(
            f"no layer is given a rank: the cheapest takes {min(costs.values())} parameters a rank. Raise the budget "
            "or the maximum"
        )
    scalings = {target.name: target.scaling for target in chosen}
    ranks, alphas = allocation.patterns(config.r, config.lora_alpha, use_rslora=config.use_rslora, scalings=scalings)
    changed = dataclasses.replace(
        config,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        exclude_modules=_without(config.exclude_modules, allocation),
    )
    return changed, allocation


def _scores(
    chosen: Sequence[Target], calibration: Calibration | None, rule: str, largest: Mapping[str, int], seed: int
) -> dict[str, Sequence[float]]:
    if rule not in RULES:
        raise BadOption(f"no rule is called {rule!r}{nearest(rule, RULES)} (known: {', '.join(RULES)})")
    if calibration is None:
        raise MissingStatistic(f"rule {rule!r} looks at the data: pass what calibrate() found, or scores of your own")
    found: dict[str, Sequence[float]] = {}
    for target in chosen:
        (block,) = _only_block(target)
        known = calibration.of(target.name, (RULES[rule],), 0, block)[RULES[rule]]
        k = min(largest[target.name], *block.shape)
        if rule == "eva":
            found[target.name] = explained_variance(known, k)
        elif rule == "gradient":
            found[target.name] = gradient_energy(known, k, named_generator(seed, rule, target.name))
        else:
            found[target.name] = [importance_of(block, known)]
    return found


def _only_block(target: Target) -> list[Tensor]:
    blocks = target.layout.blocks(matrix.values(target.module, target.parameter))
    if len(blocks) > 1:
        raise BadOption(f"{target.name!r} is made of {len(blocks)} matrices, which have one rank: exclude it")
    return blocks


def _cost(target: Target) -> int:
    """Parameters of one rank."""
    blocks = target.layout.blocks(matrix.outline(target.module, target.parameter))
    return sum(sum(block.shape) for block in blocks) * target.layout.block_rank(target.rank) // target.rank


def _room(target: Target) -> int:
    """The largest rank that its weight has."""
    blocks = target.layout.blocks(matrix.outline(target.module, target.parameter))
    return matrix.largest_rank([block.shape for block in blocks])


def _without(excluded: str | Sequence[str] | None, allocation: Allocation) -> str | Sequence[str] | None:
    """What is excluded already, and the layers without a rank: by full name, where it is not the end of another's."""
    names = allocation.left_out
    if not names:
        return excluded
    ends = tuple(f".{name}" for name in names)
    kept = [name for name, rank in allocation.ranks.items() if rank and name.endswith(ends)]
    if not isinstance(excluded, str) and not kept:
        return [*(excluded or ()), *names]
    if not isinstance(excluded, str):
        excluded = "|".join(rf"(?:.*\.)?{re.escape(entry)}" for entry in excluded or ())
    return "|".join([*([f"(?:{excluded})"] if excluded else []), *map(re.escape, names)])
