"""What passes through the layers of a model that runs: their inputs, and the gradients of their outputs.

Gradients are taken where a layer's output meets the rest of the graph, so that no weight asks for one: quantised and
frozen weights serve as well, and nothing of the model's size is allocated. What a layer saw is saved as autograd saves
it, so that gradient checkpointing recomputes it, and a layer that is used twice is seen twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import CalibrationError
from headstart.lora import matrix, quantized
from headstart.lora.layers.read import is_read
from headstart.lora.targets import Target

Take = Callable[[str, Tensor, Tensor], None]


class Sharing:
    """Which layers are given the very same tensors. A tensor is known again while it is alive and unchanged."""

    def __init__(self) -> None:
        self.seen: dict[str, list[int]] = {}
        self._alive: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._count = 0

    def note(self, name: str, x: Tensor) -> None:
        """A layer is called with this."""
        ref, version, token = self._alive.get(id(x), (None, 0, 0))
        if ref is None or ref() is not x or version != x._version:
            self._count += 1
            token = self._count
            self._alive[id(x)] = weakref.ref(x), x._version, token
        self.seen.setdefault(name, []).append(token)

    def leaders(self, targets: Mapping[str, Target]) -> dict[str, str]:
        """For every layer that ran, the first that saw the same, read alike: it keeps what both of them need."""
        first: dict[object, str] = {}
        read = {name: targets[name].layout.reading(targets[name].module) for name in self.seen}
        return {name: first.setdefault((read[name], *tokens), name) for name, tokens in self.seen.items()}


class _Tap(torch.autograd.Function):
    """y, and a look at its gradient beside the x that it came from."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, live: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        if y._is_view():
            return y.view_as(y)
        ctx.mark_dirty(y)  # Returned as itself: a view could not be changed in place by what follows.
        return y

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.take(x, grad[0].detach())
        return grad[0], None, None, None


_tap: Callable[..., Tensor] = _Tap.apply


def shows_inputs(target: Target) -> bool:
    """Whether the layer is called as a module, with the rows that its weight multiplies.

    An attention projects within itself, its output projection included; a lookup or a convolution with a forward of its
    own may change what it is given; some are read and never called; and a bare parameter is anyone's.
    """
    if target.parameter != "weight" or (target.layout.own_way and target.layout.kind != "linear"):
        return False
    inside = isinstance(target.module, nn.MultiheadAttention | nn.modules.linear.NonDynamicallyQuantizableLinear)
    return not inside and not is_read(target.module, target.holders)


def is_called(target: Target) -> bool:
    """Whether, besides, what it puts out are the products: a router's scores have gradients of another kind."""
    return shows_inputs(target) and not target.layout.own_way


class Observer:
    """Hooks in a model for as long as `watching` lasts.

    Attributes:
        on_input: called with a layer's name and its input, in a forward.
        on_gradient: called with a layer's name, its input and the gradient of its output, in a backward.
        on_weight: called with a layer's name and the gradient of its weight, where the layer cannot be watched itself.
        sharing: the calls since it was last replaced.
        forward: whether inputs count now. In a backward, checkpointing runs layers again.
    """

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self.targets = targets
        self.sharing = Sharing()
        self.forward = True
        self.on_input: Callable[[str, Tensor], None] | None = None
        self.on_gradient: Take | None = None
        self.on_weight: Callable[[str, Tensor], None] | None = None
        self._live = torch.zeros((), requires_grad=True)

    @contextmanager
    def watching(self) -> Iterator[Observer]:
        """Hooks stand within, and are gone after, whatever happens."""
        handles: list[Any] = []
        replaced: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
        try:
            for name, target in self.targets.items():
                if shows_inputs(target):
                    hook = self._hook(name, is_called(target))
                    handles.append(target.module.register_forward_hook(hook, with_kwargs=True))
                if not is_called(target) and self.on_weight is not None:
                    weight = matrix.parameter_of(target.module, target.parameter)
                    if not weight.is_floating_point():
                        raise CalibrationError(f"{name!r} holds a quantised parameter, whose gradient cannot be seen")
                    if not matrix.is_sharded(weight):
                        # A parameter of its own: what shares the weight has no part in what this layer learns.
                        own = target.module._parameters
                        replaced.append((own, matrix.weight_name(target.module, target.parameter), weight))
                        weight = own[replaced[-1][1]] = nn.Parameter(weight.detach())
                    weight.requires_grad_(True)
                    handles.append(weight.register_post_accumulate_grad_hook(self._weight_hook(name)))
            yield self
        finally:
            for parameters, key, weight in replaced:
                parameters[key] = weight
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, taps: bool) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Tensor | None:
            x = args[0] if args else next(iter(kwargs.values()))
            if self.forward:
                self.sharing.note(name, x)
                if self.on_input is not None:
                    self.on_input(name, x.detach())
            if not taps or self.on_gradient is None or not torch.is_grad_enabled():
                return None
            if not isinstance(y, Tensor):
                raise CalibrationError(
                    f"layer {name!r} puts out a {type(y).__name__}, whose gradient is not one of its rows: exclude it"
                )
            take = self.on_gradient
            return _tap(y, x, self._live.to(y.device), lambda x, dy: take(name, x, dy))

        return hook

    def _weight_hook(self, name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            if gradient is not None and self.on_weight is not None:
                self.on_weight(name, gradient)

        return hook


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Whatever runs within, the model comes back: modes, flags, gradients, buffers, the random state.

    Within, nothing asks for a gradient, and what is random in training (dropout) or learns (batch norm) rests.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    held = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    rates = _rates(model)
    config = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)
    fast = torch.backends.mha.get_fastpath_enabled()  # torch's encoders compute past their modules on it
    devices = sorted({p.device.index or 0 for p, _, _ in flags if p.device.type == "cuda"})
    blocks = quantized.turning(model)
    try:
        quantized.keep_blocks(blocks)
        with torch.random.fork_rng(devices=devices):
            _rest(model)
            for module, name, _ in rates:
                setattr(module, name, 0.0)
            for parameter, _, _ in flags:
                parameter.requires_grad_(False)
                parameter.grad = None
            if caches:
                config.use_cache = False  # type: ignore[union-attr]
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        quantized.release_blocks(blocks)
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training
        for module, name, rate in rates:
            setattr(module, name, rate)
        for module, own in held:  # Some are replaced instead of written to.
            module._buffers.update(own)
        for parameter, asks, gradient in flags:
            parameter.requires_grad_(asks)
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        if caches:
            config.use_cache = caches  # type: ignore[union-attr]


def _rest(model: nn.Module) -> None:
    """Evaluation; but modules whose activations are checkpointed, which models do in training only, train."""
    model.eval()
    for module in _checkpointed(model):
        module.training = True


def _rates(model: nn.Module) -> list[tuple[Any, str, float]]:
    """What checkpointed modules drop by themselves, without a Dropout below them: hidden states, or whole layers.

    Some keep the rate, others ask their config.
    """
    training = _checkpointed(model)
    owners = {id(owner): owner for module in training for owner in (module, module.__dict__.get("config"))}
    return [
        (owner, name, value)
        for owner in owners.values()
        for name, value in getattr(owner, "__dict__", {}).items()
        if "drop" in name and isinstance(value, float)
    ]


def _checkpointed(model: nn.Module) -> list[nn.Module]:
    """The modules that checkpoint, as transformers marks them; what is below them stays in evaluation."""
    return [module for module in model.modules() if module.__dict__.get("gradient_checkpointing")]
