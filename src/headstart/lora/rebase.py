r"""The quantised base that LoftQ's and QPiSSA's factors make up for.

    Q = q(W − B·A)                                                    A, B: what was taken from W, often nothing

On a float model the frozen weight stays where it is, and the layer computes with Q in its place. Q is held as numbers:
W has to be kept anyway, any kind of layer can be quantised so, and merging loses nothing. A model that is quantised
already keeps its own Q; there the factors are fitted to the float weights in `original`, read one at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart import linalg
from headstart.errors import BadOption, MetaWeight
from headstart.inits.strategy import QUANTIZER, Factors
from headstart.lora import matrix, quantized
from headstart.lora.layouts import Layout, Pair, Parts
from headstart.lora.quantized import Recipe

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Base:
    """What the branch stands on, where that is not the weight that the model was given.

    Attributes:
        recipe: how it is quantised.
        weight: Q, as the weight is stored; None where the model holds it itself.
        taken: the pair that was taken from W before, as the layout stores it; None where nothing was.
    """

    recipe: Recipe | None
    weight: Tensor | None = None
    taken: Pair | None = None

    def to(self, device: torch.device) -> Base:
        weight = None if self.weight is None else self.weight.to(device)
        taken = None if self.taken is None else (self.taken[0].to(device), self.taken[1].to(device))
        return Base(self.recipe, weight, taken)


# ------------------------------------------------------------------ for a start


@dataclass(frozen=True)
class Material:
    """What a start that quantises is given: W, the map q of each of its blocks, and q's recipe, if the base has one."""

    weight: Tensor
    maps: Sequence[Callable[[Tensor], Tensor]]
    recipe: Recipe | None
    replaces: bool


def material(name: str, module: nn.Module, parameter: str, layout: Layout, options: Mapping[str, Any]) -> Material:
    """W and q for one layer.

    Raises:
        BadOption: if the model is quantised, and its float weights are not given, or another recipe is.
    """
    held = matrix.parameter_of(module, parameter)
    chosen = {key: options[key] for key in QUANTIZER if key in options}
    original = chosen.pop("original", None)
    if held.is_meta:
        raise MetaWeight("the start reads the weight, which is not loaded: load it first")
    if original is None:
        if quantized.is_quantized(held):
            raise BadOption(
                "this layer is quantised already, and only its float weights tell what that lost: pass "
                "init_options={'original': the folder of the float checkpoint}"
            )
        recipe = quantized.recipe(**chosen)
        weight = held.detach()
        return Material(weight, [recipe.image] * len(layout.blocks(weight)), recipe, replaces=True)
    Q, own = matrix.values(module, parameter), None
    weight = Q  # of a layer that the loader left as it was: nothing is lost, and the start is a plain one
    if quantized.is_quantized(held):
        own = quantized.recipe_of(held)
        if any(value != vars(own)[key] for key, value in chosen.items()):
            raise BadOption(f"this layer is quantised already ({own}): leave {', '.join(chosen)} out")
        weight = _original(original, f"{name}.{parameter}", module, Q.shape).to(held.device)
    return Material(weight, [_constant(block) for block in layout.blocks(Q)], own, replaces=False)


def _original(folder: str | os.PathLike[str], name: str, module: nn.Module, shape: torch.Size) -> Tensor:
    # transformers turns the weight of a Conv1D when it quantises it.
    source = module.__dict__.get("source_cls")
    if source is not None and source.__name__ == "Conv1D":
        return read_original(folder, name, torch.Size(reversed(shape))).T
    return read_original(folder, name, shape)


def _constant(block: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: block


def base_of(material: Material, layout: Layout, found: Sequence[Factors]) -> Base | None:
    """The base that the factors were fitted to."""
    if material.recipe is None:
        return None
    if not material.replaces:
        return Base(material.recipe)
    pairs = [f.taken for f in found if f.taken is not None]
    taken = layout.pack(pairs) if any(bool(B.any()) for _, B in pairs) else None
    if isinstance(layout, Parts):  # the rows between the parts are quantised too
        Q = replacement(material.weight, layout, material.recipe, taken)
        return Base(material.recipe, Q, taken)
    Q = torch.empty_like(material.weight)
    for block, factors in zip(layout.blocks(Q), found, strict=True):
        assert factors.base is not None
        block.copy_(factors.base)
    return Base(material.recipe, Q, taken)


# ------------------------------------------------------------------ from a recipe


def subtracted(weight: Tensor, layout: Layout, taken: Pair) -> Tensor:
    """W − B·A, as the weight is stored, each element rounded once."""
    rest = weight.clone()
    for block, source, (A, B) in zip(layout.blocks(rest), layout.blocks(weight), layout.unpack(*taken), strict=True):
        block.copy_(linalg.add_lowrank(source, B, A, -1.0))
    return rest


def replacement(weight: Tensor, layout: Layout, recipe: Recipe, taken: Pair | None) -> Tensor:
    """q(W − B·A), as the weight is stored: what `base_of` found, made again."""
    rest, Q = weight if taken is None else subtracted(weight, layout, taken), torch.empty_like(weight)
    whole = Layout(transposed=layout.transposed) if isinstance(layout, Parts) else layout
    for block, source in zip(whole.blocks(Q), whole.blocks(rest), strict=True):
        block.copy_(recipe.image(source))
    return Q


# ------------------------------------------------------------------ the float weights of a quantised model


def read_original(folder: str | os.PathLike[str], name: str, shape: torch.Size) -> Tensor:
    """One tensor of a checkpoint, by its name in the model; the other tensors are not read.

    Raises:
        BadOption: if the folder holds no safetensors, or no such tensor of this shape.
    """
    from safetensors import SafetensorError, safe_open

    where = Path(folder)
    try:
        files = _files(where)
        key = _key(name, files)
        with safe_open(where / files[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise BadOption(f"original {str(folder)!r} gives no {name!r}: {error}") from error
    if tensor.shape != shape:
        raise BadOption(f"original {str(folder)!r} holds {key!r} as {tuple(tensor.shape)}, the model {tuple(shape)}")
    return tensor


def _files(folder: Path) -> dict[str, str]:
    """The file of every tensor of a checkpoint."""
    from safetensors import safe_open

    if (folder / INDEX).is_file():
        return dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
    with safe_open(folder / SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), SINGLE)


def _key(name: str, files: Mapping[str, str]) -> str:
    """The tensor of this name, or of one that differs by a prefix, as the names of models with and without a head."""
    if name in files:
        return name
    near = [key for key in files if name.endswith(f".{key}") or key.endswith(f".{name}")]
    if len(near) != 1:
        raise KeyError(f"{len(near)} tensors of that name")
    return near[0]
