"""What PEFT's LoRA layers get from us: our branch, anchors, cores, bases, merge and unmerge.

The forward is headstart's; the frozen weight is never written to; a merge is rounded once and an unmerge restores the
same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from headstart.errors import AdapterState, NonFiniteWeight
from headstart.lora import delta, matrix, quantized
from headstart.lora.delta import Branch, NormCache
from headstart.lora.layers import Start
from headstart.lora.layers.layer import Merged
from headstart.lora.layouts import Layout, Pair
from headstart.lora.quantized import Recipe
from headstart.lora.rebase import Base

Run = Callable[..., Any]
ANCHORED = (
    "has an anchored start, and PEFT knows how to mix factors, not anchors: save the adapter, "
    "load it under another name, as plain LoRA of twice the rank, and mix that"
)
CORED = (
    "trains a core between its factors, and PEFT knows how to mix factors, not cores: save the adapter, "
    "load it under another name, as plain LoRA, and mix that"
)
BASED = "stands on a quantised base of its own, on which no other adapter stands: use it alone"


class ShellLayer(nn.Module):
    """What the exchanged layers share. Mixed in before a PEFT layer."""

    layout: Layout
    weight_name: str
    run: Run | None = None

    _norms: dict[str, NormCache]
    _kept: Merged
    # The factors that do not train. An attention is of our class from birth, and asked for them before `enter`.
    _fixed: Mapping[str, frozenset[str]] = MappingProxyType({})
    _recipes: Mapping[str, Recipe | None] = MappingProxyType({})

    # What PEFT's layers have.
    base_layer: nn.Module
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    merged_adapters: list[str]
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_magnitude_vector: Any
    lora_variant: Any
    lora_bias: dict[str, bool]
    lora_alpha: dict[str, float]
    use_dora: Any
    r: dict[str, int]
    scaling: dict[str, float]
    get_base_layer: Callable[[], nn.Module]

    def enter(self, adapter: str, start: Start, layout: Layout, parameter: str) -> None:
        """Take over a start for one adapter of this layer. The layer's class was exchanged just before."""
        self.adopt(layout, parameter)
        for module in (self, *self.children()):
            if module is not self.base_layer:
                module.training = self.get_base_layer().training
        # To the bit: α/√r of PEFT's config may be rounded otherwise.
        self.r[adapter], self.lora_alpha[adapter], self.scaling[adapter] = start.rank, start.alpha, start.scaling
        self._fixed = {**self._fixed, adapter: start.frozen}
        # PEFT's modules hold the factors in the form of its files.
        for factor, value in zip(self.stored(adapter), layout.to_file(start.A, start.B), strict=True):
            factor.data = value.detach().clone()
        anchor_A, anchor_B = start.anchor or (None, None)
        self.register_buffer(f"anchor_A_{adapter}", anchor_A)
        self.register_buffer(f"anchor_B_{adapter}", anchor_B)
        replaced = start.base or Base(None)
        taken_A, taken_B = replaced.taken or (None, None)
        for name, tensor in (("base_weight", replaced.weight), ("taken_A", taken_A), ("taken_B", taken_B)):
            self.register_buffer(f"{name}_{adapter}", tensor)
        self._recipes = {**self._recipes, adapter: replaced.recipe}
        # PEFT has just set the flags of the factors: a new core's is theirs.
        before = self.core(adapter)
        train = (self.stored(adapter)[0] if before is None else before).requires_grad
        core = None if start.core is None else nn.Parameter(start.core.detach().clone(), requires_grad=train)
        self.register_parameter(f"lora_core_{adapter}", core)
        if start.magnitude is not None:
            weight = self.lora_magnitude_vector[adapter].weight
            weight.data = start.magnitude.detach().clone().reshape(weight.shape)
        self._fix()

    def adopt(self, layout: Layout, parameter: str) -> None:
        """What every layer of ours knows, whoever started its adapters."""
        if "layout" not in self.__dict__:
            self.layout = layout
            self.weight_name = matrix.weight_name(self.get_base_layer(), parameter)
            self._norms, self._fixed, self._kept = {}, {}, Merged()

    def start(self, adapter: str) -> Start:
        """An adapter as it is now, as a start."""
        A, B = (factor.detach().clone() for factor in self.layout.from_file(*self.stored(adapter)))
        anchor = self.anchor(adapter)
        magnitude, core = self.magnitude(adapter), self.core(adapter)
        return Start(
            A=A,
            B=B,
            rank=self.rank(adapter),
            alpha=self.lora_alpha[adapter],
            scaling=self.scaling[adapter],
            anchor=None if anchor is None else (anchor[0].clone(), anchor[1].clone()),
            frozen=self._fixed.get(adapter, frozenset()),
            core=None if core is None else core.detach().clone(),
            base=self.base(adapter),
            magnitude=None if magnitude is None else magnitude.detach().flatten(),
        )

    def stored(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """PEFT's own two parameters."""
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight

    def plain_factors(self, adapter: str) -> Pair:
        """A and B as the layout stores them, with the core multiplied into A."""
        A, B = self.layout.from_file(*self.stored(adapter))
        core = self.core(adapter)
        return (A, B) if core is None else self.layout.with_core(A, B, core)

    def core(self, adapter: str) -> nn.Parameter | None:
        """What trains between the factors of an adapter."""
        return self._parameters.get(f"lora_core_{adapter}")

    def key(self, letter: str, adapter: str) -> str:
        """What a state dict calls a factor, behind the layer's name."""
        return f"lora_{letter}.{adapter}.weight"

    def present(self) -> Any:
        """The adapters of this layer."""
        return self.lora_A

    def rank(self, adapter: str) -> int:
        return int(self.r[adapter])

    def frozen(self, adapter: str) -> str:
        """The factors of an adapter that never train."""
        return "".join(sorted(self._fixed.get(adapter, ())))

    def anchor(self, adapter: str) -> Pair | None:
        A, B = (self._buffers.get(f"anchor_{name}_{adapter}") for name in "AB")
        return None if A is None or B is None else (A, B)

    def magnitude(self, adapter: str) -> Tensor | None:
        return self.lora_magnitude_vector[adapter].weight if self.use_dora.get(adapter) else None

    def branch(self, adapter: str) -> Branch:
        """The branch of one adapter as it runs now."""
        A, B = self.plain_factors(adapter)
        dropout = self.lora_dropout[adapter]
        p = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        held = self.branch_base(adapter)
        branch = Branch(A, B, self.scaling[adapter], self.anchor(adapter), p, self.magnitude(adapter), base=held)
        if branch.magnitude is None:
            return branch
        cache = self._norms.setdefault(adapter, NormCache())
        read = functools.partial(self.frozen_values, adapter)
        stored = self.original if held is None else held
        return branch.with_norm(delta.row_norms(self.layout, stored, branch, cache, self.training, read))

    @property
    def original(self) -> nn.Parameter:
        """The frozen weight, merged or not."""
        kept = self._kept.original
        return kept[0] if kept else matrix.parameter_of(self.get_base_layer(), self.weight_name)

    def original_values(self) -> Tensor:
        """The values of the weight that the model was given."""
        return matrix.dense(self.original, self.get_base_layer())

    def frozen_values(self, adapter: str) -> Tensor:
        """The values of what an adapter stands on."""
        held = self.branch_base(adapter)
        return self.original_values() if held is None else held

    def branch_base(self, adapter: str) -> Tensor | None:
        """What stands in the frozen weight's place for an adapter."""
        return self._buffers.get(f"base_weight_{adapter}")

    def base(self, adapter: str) -> Base | None:
        """What an adapter stands on where that is not the frozen weight as it was given."""
        if self._recipes.get(adapter) is None:
            return None
        A, B = (self._buffers.get(f"taken_{letter}_{adapter}") for letter in "AB")
        taken = None if A is None or B is None else (A, B)
        return Base(self._recipes[adapter], self.branch_base(adapter), taken)

    def unmixable(self, adapter: str) -> str | None:
        """Why PEFT cannot mix an adapter with others, for a message; None where its factors alone say what it is."""
        if self.anchor(adapter) is not None:
            return f"{adapter!r} {ANCHORED}"
        if self.core(adapter) is not None:
            return f"{adapter!r} {CORED}"
        return f"{adapter!r} {BASED}" if self.branch_base(adapter) is not None else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mixed = kwargs.get("adapter_names")
        if self.merged and mixed is None and not self.disable_adapters and self.training and torch.is_grad_enabled():
            raise AdapterState("this layer is merged, its factors would get no gradient: unmerge_adapter() first")
        if self.disable_adapters or self.merged:
            return super().forward(*args, **kwargs)
        present = [name for name in self.active_adapters if name in self.present()]
        run = type(self).run
        if run is not None and len(present) == 1 and mixed is None and self._ours(present[0]):
            kwargs.pop("adapter_names", None)
            return run(self.base_layer, self.layout, self.branch(present[0]), *args, **kwargs)
        if mixed or len(present) > 1:
            for name in mixed or present:
                if reason := self.unmixable(name):
                    raise AdapterState(reason)
        return super().forward(*args, **kwargs)

    def _ours(self, adapter: str) -> bool:
        """Whether the adapter is plain LoRA or DoRA, and not one of PEFT's variants, or with a bias of its own."""
        if self.lora_bias.get(adapter):
            return False
        return adapter not in self.lora_variant or bool(self.use_dora.get(adapter))

    def unmergeable(self, adapter: str) -> str | None:
        """Why an adapter cannot be folded into the weight, for a message; None where it can."""
        if adapter not in self.present() or self._ours(adapter):
            return None
        kind = "lora_bias" if self.lora_bias.get(adapter) else type(self.lora_variant[adapter]).__name__
        return f"{adapter!r} is not a product of two factors alone ({kind}): merge it in a model of PEFT's own"

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW as the weight is stored."""
        branch = self.branch(adapter)
        shape = matrix.outline(self.get_base_layer(), self.weight_name).shape
        change = torch.zeros(shape, dtype=branch.A.dtype, device=branch.A.device)
        for block, (A, B) in zip(self.layout.blocks(change), branch.pairs(self.layout), strict=True):
            block.copy_(branch.scaling * (B @ A))
        return change if branch.base is None else change + (branch.base - self.original_values())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters in; the weights are new tensors, and the frozen one is kept for `unmerge`."""
        names = check_adapters_to_merge(cast(BaseTunerLayer, self), adapter_names)
        for adapter in (*self.merged_adapters, *names):
            if self.branch_base(adapter) is not None and len(self.merged_adapters) + len(names) > 1:
                raise AdapterState(f"{adapter!r} {BASED}")
        for adapter in names:
            if adapter not in self.present():
                continue
            base = self.get_base_layer()
            weight = matrix.parameter_of(base, self.weight_name)
            branch = self.branch(adapter)
            under = matrix.dense(weight, base) if branch.base is None else branch.base
            with torch.no_grad():
                merged = delta.merged_weight(self.layout, under, branch)
            if safe_merge and not bool(merged.isfinite().all()):
                raise NonFiniteWeight(f"adapter {adapter!r} gives weights that are not finite: nothing was merged")
            if not self._kept.original:
                self._kept.original.append(weight)
            quantized.put(base, self.weight_name, matrix.stored(merged, like=weight))
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Put the frozen weight back: the same parameter, the same bits."""
        if self._kept.original:
            quantized.put(self.get_base_layer(), self.weight_name, self._kept.original.pop())
        self.merged_adapters.clear()

    def held(self) -> nn.Parameter:
        """The weight as it stands in the model, merged or not."""
        return matrix.parameter_of(self.get_base_layer(), self.weight_name)

    def merged_again(self, weight: nn.Parameter, adapters: list[str]) -> None:
        """What a merge that failed leaves: the weight that was held before, with these adapters in it."""
        if self.held() is not weight:
            quantized.put(self.get_base_layer(), self.weight_name, weight)
        if not adapters:
            self._kept.original.clear()
        self.merged_adapters[:] = adapters

    def train(self, mode: bool = True) -> Any:
        self._norms.clear()
        return super().train(mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)  # type: ignore[misc]
        self._fix()
        for adapter in self._fixed:
            self._train_core(adapter, adapter in self.active_adapters and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)  # type: ignore[misc]
        self._fix()
        for adapter in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._train_core(adapter, requires_grad)

    def _train_core(self, adapter: str, train: bool) -> None:
        """PEFT knows of no core."""
        if (core := self.core(adapter)) is not None:
            core.requires_grad_(train)

    def _fix(self) -> None:
        """PEFT lets both factors of an active adapter train."""
        for adapter, letters in self._fixed.items():
            for letter, factor in zip("AB", self.stored(adapter), strict=True):
                if letter in letters:
                    factor.requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        self._fixed = {name: letters for name, letters in self._fixed.items() if name != adapter_name}
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        for name in ("anchor_A", "anchor_B", "base_weight", "taken_A", "taken_B"):
            self._buffers.pop(f"{name}_{adapter_name}", None)
        self._recipes = {name: recipe for name, recipe in self._recipes.items() if name != adapter_name}
        self._parameters.pop(f"lora_core_{adapter_name}", None)
        self._norms.pop(adapter_name, None)


def shell_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, ShellLayer]]:
    """The layers that carry an adapter, by name."""
    for name, module in model.named_modules():
        if isinstance(module, ShellLayer) and adapter in module.present():
            yield name, module
