"""What all LoRA layers share: the factors beside a frozen module, and the way in and out of its weight.

    y = W·x + s·B·A·d(x)                          d: dropout, in training
    y = W·x + s·(B·A − B₀·A₀)·d(x)                anchored: the function at step zero is the base's
    y = W·x + s·B·R·A·d(x)                        a trained core R between the two
    y = Q·x + s·B·A·d(x)                          a quantised base Q in W's place
    y = m/‖W + s·B·A‖ ⊙ (W·x + s·B·A·d(x))        DoRA, m: (m,), norms by row

A layer holds its frozen module as `base_layer`, whose weight is never written to. The parameters carry the names of
PEFT's files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headstart.errors import AdapterState, UnsupportedLayer
from headstart.lora import delta, matrix, quantized
from headstart.lora.delta import Branch, NormCache
from headstart.lora.layouts import Layout, Pair
from headstart.lora.rebase import Base

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Start:
    """The stored tensors that a layer begins with, and how it uses them.

    Attributes:
        A, B: the factors, as the layout stores them.
        anchor: frozen copies of both where the start must not move the function.
        rank, alpha, scaling: of the layer.
        frozen: the factors that do not train.
        core: (blocks, r, r), trained between the factors.
        base: what the branch stands on where that is not the frozen weight as it was given.
        dropout: on the branch, in training.
        magnitude: DoRA's row norms, (m,).
    """

    A: Tensor
    B: Tensor
    rank: int
    alpha: float
    scaling: float
    anchor: Pair | None = None
    frozen: frozenset[str] = frozenset()
    core: Tensor | None = None
    base: Base | None = None
    dropout: float = 0.0
    magnitude: Tensor | None = None


class Factor(nn.Module):
    """A parameter called `weight`, so that its name in a state dict is PEFT's."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


@dataclass
class Merged:
    """The parameter that a merge took out, so that an unmerge can put back the same bits."""

    original: list[nn.Parameter] = field(default_factory=list)


class LoraLayer(nn.Module):
    """A frozen module and a branch. The subclasses say how the branch runs."""

    base_layer: nn.Module
    anchor_A: Tensor | None
    anchor_B: Tensor | None
    base_weight: Tensor | None
    taken_A: Tensor | None
    taken_B: Tensor | None

    def __init__(self, base: nn.Module, layout: Layout, start: Start, parameter: str = "weight") -> None:
        super().__init__()
        # Before `base_layer`, which answers for every name that this layer lacks: it may be such a layer itself.
        anchor_A, anchor_B = start.anchor or (None, None)
        self.register_buffer("anchor_A", anchor_A)
        self.register_buffer("anchor_B", anchor_B)
        replaced = start.base or Base(None)
        taken_A, taken_B = replaced.taken or (None, None)
        self.register_buffer("base_weight", replaced.weight)
        self.register_buffer("taken_A", taken_A)
        self.register_buffer("taken_B", taken_B)
        self.recipe = replaced.recipe
        magnitude = None if start.magnitude is None else nn.Parameter(start.magnitude)
        self.register_parameter("lora_magnitude_vector", magnitude)
        self.register_parameter("lora_core", None if start.core is None else nn.Parameter(start.core))
        self.base_layer = base
        self.layout = layout
        self.parameter_name = matrix.weight_name(frozen_module(base), parameter)
        self.rank, self.alpha, self.scaling, self.dropout = start.rank, start.alpha, start.scaling, start.dropout
        self.enabled = True
        self.read = False  # see read.py
        self._norms = NormCache()
        self._merged = Merged()
        self._hold(start.A, start.B)
        for name, factor in zip("AB", self.factors, strict=True):
            factor.requires_grad_(name not in start.frozen)
        for module in self.modules():
            if module is self or isinstance(module, Factor):
                module.training = base.training

    def _hold(self, A: Tensor, B: Tensor) -> None:
        self.lora_A, self.lora_B = Factor(A), Factor(B)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B, as they are stored."""
        return self.lora_A.weight, self.lora_B.weight

    @property
    def plain_factors(self) -> Pair:
        """The same with the core multiplied into A: what everyone else calls A and B."""
        core = self.core
        return self.factors if core is None else self.layout.with_core(*self.factors, core)

    @property
    def core(self) -> nn.Parameter | None:
        """What trains between the factors."""
        return self._parameters["lora_core"]

    @property
    def anchor(self) -> Pair | None:
        """A₀ and B₀, as they are stored."""
        return None if self.anchor_A is None or self.anchor_B is None else (self.anchor_A, self.anchor_B)

    @property
    def base(self) -> Base | None:
        """What the branch stands on where that is not the frozen weight as it was given."""
        if self.recipe is None:
            return None
        taken = None if self.taken_A is None or self.taken_B is None else (self.taken_A, self.taken_B)
        return Base(self.recipe, self.base_weight, taken)

    @property
    def magnitude(self) -> nn.Parameter | None:
        return self._parameters["lora_magnitude_vector"]

    @property
    def active(self) -> bool:
        """Whether the branch takes part in the forward.

        Raises:
            AdapterState: if the layer is merged and about to be trained.
        """
        if self._merged.original:
            if self.training and torch.is_grad_enabled():
                raise AdapterState("this layer is merged, its factors would get no gradient: unmerge(model) first")
            return False
        return self.enabled

    def train(self, mode: bool = True) -> Self:
        self._norms = NormCache()
        return super().train(mode)

    def branch(self) -> Branch:
        """The branch as it runs now."""
        dropout = self.dropout if self.training else 0.0
        branch = Branch(*self.plain_factors, self.scaling, self.anchor, dropout, self.magnitude, base=self.base_weight)
        if branch.magnitude is None:
            return branch
        source = self.original if self.base_weight is None else self.base_weight
        norms = delta.row_norms(self.layout, source, branch, self._norms, self.training, self.frozen_values)
        return branch.with_norm(norms)

    def frozen_values(self) -> Tensor:
        """The values of what the branch stands on."""
        return self.original_values() if self.base_weight is None else self.base_weight

    def original_values(self) -> Tensor:
        """The values of the weight that the model was given."""
        return matrix.dense(self.original, frozen_module(self.base_layer))

    @property
    def weight_parameter(self) -> nn.Parameter:
        """The frozen weight; the merged one while merged."""
        return matrix.parameter_of(frozen_module(self.base_layer), self.parameter_name)

    @property
    def original(self) -> nn.Parameter:
        """The frozen weight, merged or not."""
        return self._merged.original[0] if self._merged.original else self.weight_parameter

    @property
    def merged(self) -> bool:
        return bool(self._merged.original)

    def merged_weight(self) -> Tensor:
        """A new tensor: the weight with the branch folded in. In half precision each element is rounded once.

        In float32 it is a chain of multiply-adds, wrong by a few ulp of its terms.
        """
        return delta.merged_weight(self.layout, self.frozen_values(), self.branch())

    def merge(self, weight: nn.Parameter) -> None:
        """Put a merged weight in the place of the frozen one, which is kept for `unmerge`."""
        if not self._merged.original:
            self._merged.original.append(self.weight_parameter)
        self._put(weight)

    def unmerge(self) -> None:
        """Put the frozen weight back: the same parameter, the same bits."""
        if self._merged.original:
            self._put(self._merged.original[0])
            self.forget_original()

    def forget_original(self) -> None:
        """Make a merge final."""
        self._merged.original.clear()

    def _put(self, weight: nn.Parameter) -> None:
        quantized.put(frozen_module(self.base_layer), self.parameter_name, weight)

    def __getattr__(self, name: str) -> Any:
        # Models read `layer.weight.dtype`, `layer.in_features`, …: the frozen module answers.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            if name == "weight" and self.read and self.active:
                return delta.effective_weight(self.layout, self.weight_parameter, self.branch())
            return getattr(super().__getattr__("base_layer"), name)

    def extra_repr(self) -> str:
        words = [f"rank={self.rank}", f"scaling={self.scaling:.4g}"]
        words += [f"dropout={self.dropout:g}"] if self.dropout else []
        words += ["anchored"] if self.anchor is not None else []
        words += ["dora"] if self.magnitude is not None else []
        words += ["merged"] if self.merged else [] if self.enabled else ["disabled"]
        return ", ".join(words)


def frozen_output(module: nn.Module, branch: Branch, *args: Any, **kwargs: Any) -> Tensor:
    """What the frozen module puts out; with the branch's base in its weight's place, where it has one."""
    if branch.base is None:
        return module(*args, **kwargs)  # type: ignore[no-any-return]
    swapped = {matrix.weight_name(module): branch.base}
    return torch.func.functional_call(module, swapped, args, kwargs)  # type: ignore[no-any-return]


def swapped_output(module: nn.Module, layout: Layout, branch: Branch, *args: Any, **kwargs: Any) -> Any:
    """What the frozen module puts out with the changed weight in its weight's place, whatever it does with it."""
    if branch.dropout:
        raise UnsupportedLayer(
            f"{type(module).__name__} has a forward of its own, and its input cannot be dropped on the branch alone: "
            "set lora_dropout=0, or exclude it"
        )
    weight = delta.effective_weight(layout, matrix.parameter_of(module), branch)
    return torch.func.functional_call(module, {"weight": weight}, args, kwargs)


def frozen_module(module: nn.Module) -> nn.Module:
    """The frozen module below any number of LoRA layers."""
    while isinstance(module, LoraLayer):
        module = module.base_layer
    return module
