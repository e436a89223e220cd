r"""The quantised base of an adapter, in its folder: what it is, and how it is made again.

    metadata "quantized"           recipes, each with a few elements of the layers' Q = q(W − B·A)
    quantized_base.safetensors     <layer>.A, <layer>.B: what was taken from W, where that is something

The adapter is plain LoRA on Q. A float model is given Q when the adapter is loaded; one that is quantised must hold it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from headstart.errors import KeyMismatch, MetaWeight, WrongBase
from headstart.files.adapter import TAKEN, AdapterFile
from headstart.lora import matrix, quantized, rebase
from headstart.lora.layouts import Pair
from headstart.lora.quantized import Recipe
from headstart.lora.rebase import Base
from headstart.lora.targets import Target

_SAMPLES = 16
Bases = Mapping[str, tuple[Base, Callable[[], Tensor]]]


def described(bases: Bases) -> list[dict[str, Any]]:
    """What the metadata says about quantised bases.

    Args:
        bases: by the layers' paths, each with what reads its Q.
    """
    found: dict[Recipe, dict[str, list[float]]] = {}
    for path, (base, read) in bases.items():
        if base.recipe is not None:
            found.setdefault(base.recipe, {})[path] = sample(read(), _SAMPLES)
    taken = sorted(path for path, (base, _) in bases.items() if base.taken is not None)
    recipes = [{**dataclasses.asdict(recipe), "samples": samples} for recipe, samples in found.items()]
    return [{**recipe, "taken": [path for path in taken if path in recipe["samples"]]} for recipe in recipes]


def taken_from(bases: Bases) -> dict[str, Tensor]:
    """The tensors of the second file."""
    pairs = {path: base.taken for path, (base, _) in bases.items() if base.taken is not None}
    return {f"{path}.{letter}": t for path, pair in pairs.items() for letter, t in zip("AB", pair, strict=True)}


def warning(bases: Bases) -> str | None:
    """What whoever saves such an adapter must know."""
    recipes = sorted({str(base.recipe) for base, _ in bases.values()})
    if not recipes:
        return None
    said = f"this adapter makes up for what quantising its base lost ({'; '.join(recipes)}): load it on that base"
    if any(base.taken is not None for base, _ in bases.values()):
        said += f", which is quantised from W − B·A ({TAKEN}; headstart.files.residual.subtract makes it)"
    return f"{said}. On a float model headstart.load makes it; PEFT would add the factors to the float weights"


def sample(weight: Tensor, count: int = 4) -> list[float]:
    """A few elements of a weight, by which its model is recognised. Not of a sharded one, which would be gathered."""
    if matrix.is_sharded(weight):
        return []
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, count + 2)[1:-1].long().to(flat.device)
    return [] if flat.is_meta else [float(f"{value:.4g}") for value in flat[index].float().tolist()]


def apart(pairs: list[tuple[float, float]]) -> float:
    """How far two sampled weights are from each other, relative to the first."""
    size = math.sqrt(sum(a * a for a, _ in pairs))
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs)) / size if size else 0.0


# ------------------------------------------------------------------ reading


def recipes_of(file: AdapterFile) -> Iterator[tuple[str, Recipe, list[float]]]:
    """Every layer with a quantised base: its path, the recipe, and a sample of Q."""
    for entry in file.provenance.get("quantized", ()):
        recipe = Recipe(entry["bits"], entry["quant_type"], entry["blocksize"], entry["nested"])
        for path, values in entry["samples"].items():
            yield path, recipe, values


def base_of(path: str, target: Target, file: AdapterFile) -> Base | None:
    """The base that an entry of a file stands on, for a model's layer.

    Raises:
        WrongBase: if the layer is quantised otherwise. BadOption: if it is to be quantised without bitsandbytes.
    """
    recipe = next((recipe for name, recipe, _ in recipes_of(file) if name == path), None)
    if recipe is None:
        return None
    stored = matrix.parameter_of(target.module, target.parameter)
    if quantized.is_quantized(stored):
        own = quantized.recipe_of(stored)
        if dataclasses.replace(own, nested=recipe.nested) != recipe:
            raise WrongBase(f"{file.folder} was made for a {recipe} base, and {target.name!r} is {own}")
        return Base(recipe)
    if stored.is_meta:
        raise MetaWeight(f"{file.folder} needs the values of {target.name!r}, to quantise them: load them first")
    taken = taken_of(path, target, file)
    return Base(recipe, rebase.replacement(stored.detach(), target.layout, recipe, taken), taken)


def taken_of(path: str, target: Target, file: AdapterFile) -> Pair | None:
    """What was taken from a layer's weight before it was quantised, as the layout stores it.

    Raises:
        KeyMismatch: if it does not fit the weight.
    """
    if path not in file.taken:
        return None
    stored = matrix.parameter_of(target.module, target.parameter)
    A, B = (tensor.to(stored.device, torch.float32) for tensor in file.taken[path])
    try:
        rebase.subtracted(torch.empty_like(stored, device="meta"), target.layout, (A.to("meta"), B.to("meta")))
    except (RuntimeError, ValueError, IndexError) as error:
        raise KeyMismatch(f"{file.folder / TAKEN}: the tensors of {path!r} do not fit the weight: {error}") from error
    return A, B


def check_held(weights: Mapping[str, Callable[[], Tensor]], file: AdapterFile) -> None:
    """Refuse a quantised model that does not hold the file's Q.

    Args:
        weights: what reads those of the weights that the model itself holds quantised, by the layer's path.
    """
    pairs: list[tuple[float, float]] = []
    for path, _, values in recipes_of(file):
        if path in weights:
            pairs += zip(values, sample(weights[path](), _SAMPLES), strict=True)
    # Double quantisation, or weights rounded before, move Q by less than a percent; another step of LoftQ, by six.
    if (distance := apart(pairs)) > 0.03:
        how = " Make it with headstart.files.residual.subtract." if file.taken else ""
        raise WrongBase(
            f"{file.folder} makes up for another quantised base: sampled weights differ by {distance:.0%} of their "
            f"size.{how} Pass strict=False if you mean this one"
        )
