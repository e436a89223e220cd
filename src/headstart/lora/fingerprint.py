"""A few numbers of every weight, by which a calibration knows the model that it is of."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from headstart.lora import matrix
from headstart.lora.targets import Target

COUNT = 16  # numbers of each weight
Fingerprint = Mapping[str, Sequence[float]]  # by layer


def fingerprint(targets: Iterable[Target]) -> dict[str, list[float]]:
    """Numbers that lie evenly over each weight. Weights that are quantised, sharded or not loaded have none."""
    picked = {target.name: _picked(matrix.parameter_of(target.module, target.parameter)) for target in targets}
    found = {name: numbers for name, numbers in picked.items() if numbers is not None}
    if not found:
        return {}
    place = next(iter(found.values())).device
    together = torch.cat([numbers.to(place) for numbers in found.values()]).cpu()  # The one wait for a device.
    parts = together.split([len(numbers) for numbers in found.values()])
    return {name: part.tolist() for name, part in zip(found, parts, strict=True)}


def _picked(weight: Tensor) -> Tensor | None:
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.is_meta or not weight.is_floating_point():
        return None
    numbers = weight.detach().reshape(-1)
    return numbers[:: max(1, len(numbers) // COUNT)][:COUNT].float()


def apart(one: Fingerprint, other: Fingerprint) -> float:
    """‖a − b‖/‖a‖ of a layer, the median of those that both know: 0 for the same model, 1.4 for unrelated ones."""
    distances = []
    for name in one.keys() & other.keys():
        a, b = torch.tensor(one[name]), torch.tensor(other[name])
        if a.shape == b.shape:
            distances.append(float((a - b).norm() / a.norm().clamp_min(1e-30)))
    return statistics.median(distances) if distances else 0.0
