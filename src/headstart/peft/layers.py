"""PEFT's LoRA layers with our branch: the class of an injected layer is exchanged for one of these.

Each is a subclass of the PEFT layer that it replaces, so that everything PEFT knows about it stays true. Its forward
is headstart's; the frozen weight is never written to; a merge is rounded once and an unmerge restores the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from headstart.errors import AdapterState, NonFiniteWeight, UnsupportedLayer
from headstart.lora import delta, matrix
from headstart.lora.delta import Branch, NormCache
from headstart.lora.layers import Start, attention, convolution, embedding, experts, linear
from headstart.lora.layers.layer import Merged
from headstart.lora.matrix import Layout

Run = Callable[..., Any]
ANCHORED = (
    "has an anchored start, and PEFT knows how to mix factors, not anchors: save the adapter, "
    "load it under another name, as plain LoRA of twice the rank, and mix that"
)


class ShellLayer(nn.Module):
    """What the exchanged layers share. Mixed in before a PEFT layer."""

    layout: Layout
    weight_name: str
    run: Run | None = None

    _norms: dict[str, NormCache]
    _kept: Merged
    # The factors that do not train. An attention is of our class from birth, and asked for them before `enter`.
    _fixed: Mapping[str, frozenset[str]] = MappingProxyType({})

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
    lora_alpha: dict[str, float]
    use_dora: Any
    r: dict[str, int]
    scaling: dict[str, float]
    get_base_layer: Callable[[], nn.Module]

    def enter(self, adapter: str, start: Start, layout: Layout, parameter: str) -> None:
        """Take over a start for one adapter of this layer. The layer's class was exchanged just before."""
        if "layout" not in self.__dict__:
            self.layout = layout
            self.weight_name = matrix.weight_name(self.get_base_layer(), parameter)
            self._norms, self._fixed, self._kept = {}, {}, Merged()
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
        if start.magnitude is not None:
            weight = self.lora_magnitude_vector[adapter].weight
            weight.data = start.magnitude.detach().clone().reshape(weight.shape)
        self._fix()

    def start(self, adapter: str) -> Start:
        """An adapter as it is now, as a start."""
        A, B = (factor.detach().clone() for factor in self.layout.from_file(*self.stored(adapter)))
        anchor = self.anchor(adapter)
        magnitude = self.magnitude(adapter)
        return Start(
            A=A,
            B=B,
            rank=self.rank(adapter),
            alpha=self.lora_alpha[adapter],
            scaling=self.scaling[adapter],
            anchor=None if anchor is None else (anchor[0].clone(), anchor[1].clone()),
            frozen=self._fixed.get(adapter, frozenset()),
            magnitude=None if magnitude is None else magnitude.detach().flatten(),
        )

    def stored(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """PEFT's own two parameters."""
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight

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

    def anchor(self, adapter: str) -> matrix.Pair | None:
        A, B = (self._buffers.get(f"anchor_{name}_{adapter}") for name in "AB")
        return None if A is None or B is None else (A, B)

    def magnitude(self, adapter: str) -> Tensor | None:
        return self.lora_magnitude_vector[adapter].weight if self.use_dora.get(adapter) else None

    def branch(self, adapter: str) -> Branch:
        """The branch of one adapter as it runs now."""
        A, B = self.layout.from_file(*self.stored(adapter))
        dropout = self.lora_dropout[adapter]
        p = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        branch = Branch(A, B, self.scaling[adapter], self.anchor(adapter), p, self.magnitude(adapter))
        if branch.magnitude is None:
            return branch
        cache = self._norms.setdefault(adapter, NormCache())
        return branch.with_norm(delta.row_norms(self.layout, self.original, branch, cache, self.training))

    @property
    def original(self) -> nn.Parameter:
        """The frozen weight, merged or not."""
        kept = self._kept.original
        return kept[0] if kept else matrix.parameter_of(self.get_base_layer(), self.weight_name)

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
        anchored = [name for name in (mixed or present) if self.anchor(name) is not None]
        if anchored and (mixed or len(present) > 1):
            raise AdapterState(f"{anchored[0]!r} {ANCHORED}")
        return super().forward(*args, **kwargs)

    def _ours(self, adapter: str) -> bool:
        """Whether the adapter is plain LoRA or DoRA, and not one of PEFT's variants of it."""
        return adapter not in self.lora_variant or bool(self.use_dora.get(adapter))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW as the weight is stored."""
        branch = self.branch(adapter)
        change = torch.zeros_like(self.original, dtype=branch.A.dtype)
        for block, (A, B) in zip(self.layout.blocks(change), branch.pairs(self.layout), strict=True):
            block.copy_(branch.scaling * (B @ A))
        return change

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters in; the weights are new tensors, and the frozen one is kept for `unmerge`."""
        for adapter in check_adapters_to_merge(cast(BaseTunerLayer, self), adapter_names):
            if adapter not in self.present():
                continue
            base = self.get_base_layer()
            weight = matrix.parameter_of(base, self.weight_name)
            with torch.no_grad():
                merged = delta.merged_weight(self.layout, weight.detach(), self.branch(adapter))
            if safe_merge and not bool(merged.isfinite().all()):
                raise NonFiniteWeight(f"adapter {adapter!r} gives weights that are not finite: nothing was merged")
            if not self._kept.original:
                self._kept.original.append(weight)
            base._parameters[self.weight_name] = nn.Parameter(merged, requires_grad=False)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Put the frozen weight back: the same parameter, the same bits."""
        if self._kept.original:
            self.get_base_layer()._parameters[self.weight_name] = self._kept.original.pop()
        self.merged_adapters.clear()

    def train(self, mode: bool = True) -> Any:
        self._norms.clear()
        return super().train(mode)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)  # type: ignore[misc]
        self._fix()

    def set_requires_grad(self, *args: Any, **kwargs: Any) -> None:
        super().set_requires_grad(*args, **kwargs)  # type: ignore[misc]
        self._fix()

    def _fix(self) -> None:
        """PEFT lets both factors of an active adapter train."""
        for adapter, letters in self._fixed.items():
            for letter, factor in zip("AB", self.stored(adapter), strict=True):
                if letter in letters:
                    factor.requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        self._fixed = {name: letters for name, letters in self._fixed.items() if name != adapter_name}
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        for name in "AB":
            self._buffers.pop(f"anchor_{name}_{adapter_name}", None)
        self._norms.pop(adapter_name, None)


class ShellLinear(ShellLayer, lora.Linear):
    run = staticmethod(linear.run)


class ShellEmbedding(ShellLayer, lora.Embedding):
    run = staticmethod(embedding.run)
    lora_embedding_A: Any
    lora_embedding_B: Any

    def key(self, letter: str, adapter: str) -> str:
        return f"lora_embedding_{letter}.{adapter}"

    def stored(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]

    def present(self) -> Any:
        return self.lora_embedding_A


class ShellConv1d(ShellLayer, lora.layer.Conv1d):
    run = staticmethod(convolution.run)


class ShellConv2d(ShellLayer, lora.layer.Conv2d):
    run = staticmethod(convolution.run)


class ShellConv3d(ShellLayer, lora.layer.Conv3d):
    run = staticmethod(convolution.run)


class ShellAttention(ShellLayer, lora.layer.MultiheadAttention):
    """PEFT registers the base's weights anew whenever modules are listed; here they stay the parameters they are."""

    run = staticmethod(attention.run)

    def _restore_weights(self) -> None:
        return None

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.MultiheadAttention:
        base = self.get_base_layer()
        assert isinstance(base, nn.MultiheadAttention)
        output = cast(ShellLayer, base.out_proj)
        if merge:
            self.merge(safe_merge, adapter_names)
            output.merge(safe_merge, adapter_names)
        base._modules["out_proj"] = output.get_base_layer()
        return base


class ParamWrapper(ShellLayer, lora.layer.ParamWrapper):
    """A bare parameter, swapped in for the forward. PEFT asks for it by the name of its class, so it has PEFT's."""

    parameter_name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        present = [name for name in self.active_adapters if name in self.present()]
        if self.disable_adapters or self.merged or len(present) != 1 or kwargs.get("adapter_names") is not None:
            return super().forward(*args, **kwargs)
        path = f"{'base_layer.' * _depth(self.base_layer)}{self.parameter_name}"
        weight = experts.effective_weight(self.layout, self.original, self.branch(present[0]))
        kwargs.pop("adapter_names", None)
        return torch.func.functional_call(self.base_layer, {path: weight}, args, kwargs)


def _depth(module: nn.Module) -> int:
    return 1 + _depth(module.base_layer) if isinstance(module, lora.layer.ParamWrapper) else 0


_SHELLS: dict[type[nn.Module], type[ShellLayer]] = {
    lora.Linear: ShellLinear,
    lora.Embedding: ShellEmbedding,
    lora.layer.Conv1d: ShellConv1d,
    lora.layer.Conv2d: ShellConv2d,
    lora.layer.Conv3d: ShellConv3d,
    lora.layer.ParamWrapper: ParamWrapper,
}


def exchange(layer: nn.Module) -> ShellLayer:
    """Give a freshly injected PEFT layer our class.

    Raises:
        UnsupportedLayer: if PEFT made it of a kind that we do not serve, such as a quantised one.
    """
    if isinstance(layer, ShellLayer):
        return layer
    shell = _SHELLS.get(type(layer))
    if shell is None:
        raise UnsupportedLayer(f"PEFT serves this layer with {type(layer).__name__}, which headstart does not")
    layer.__class__ = shell
    assert isinstance(layer, ShellLayer)
    return layer


def shell_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, ShellLayer]]:
    """The layers that carry an adapter, by name."""
    for name, module in model.named_modules():
        if isinstance(module, ShellLayer) and adapter in module.present():
            yield name, module
