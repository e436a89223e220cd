"""A start on a kind of layer in a dtype and a shell, and how two models or outputs are compared."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from headstart.lora import adapt as lora
from headstart.lora.config import LoraConfig, Target, targets
from headstart.lora.layers import Start
from headstart.testing.kinds import Kind
from headstart.testing.shells import NATIVE, Shell

RANK = 4


@dataclass(frozen=True)
class Case:
    """One start on one kind of layer: what a law is stated about.

    Attributes:
        init: the strategy's name; kind: the layer; dtype, device: of its weights; shell: how it is adapted.
        changes: fields of the config beyond those of the kind.
    """

    init: str
    kind: Kind
    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"
    shell: Shell = NATIVE
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.init} on {self.kind.name}, {str(self.dtype).removeprefix('torch.')}, {self.shell.name}"

    @property
    def config(self) -> LoraConfig:
        fields = {"r": RANK, "lora_alpha": 2 * RANK, "init_lora_weights": self.init, **self.kind.fields}
        return LoraConfig.from_dict({**fields, **self.changes})

    def but(self, **changes: Any) -> Case:
        """The same case with other config fields."""
        return replace(self, changes={**self.changes, **changes})

    def model(self) -> nn.Module:
        """A fresh base: the same weights every time, none of them zero."""
        return copy.deepcopy(_fresh(self.kind.name, self.kind.make, self.dtype, str(self.device)))

    def adapted(self) -> nn.Module:
        return self.shell.adapt(self.model(), self.config)

    @cached_property
    def trained(self) -> nn.Module:
        """A model that was adapted and trained a little; a law that changes it does so on a copy."""
        return train(self, self.adapted())

    def starts(self, model: nn.Module | None = None) -> dict[str, tuple[Target, Start]]:
        """Every layer's start, by name."""
        found = targets(model or self.model(), self.config)
        return {target.name: (target, lora.start_of(target, self.config)[0]) for target in found}

    def outputs(self, model: nn.Module, grad: bool = False) -> list[Tensor]:
        """What a model computes, as a flat list."""
        with torch.set_grad_enabled(grad):
            keywords = {name: self._placed(value) for name, value in self.kind.keywords().items()}
            return list(_tensors(model(*map(self._placed, self.kind.inputs()), **keywords)))

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)

    def runs(self) -> bool:
        """Whether the base itself computes in this dtype, on this device, with what is installed."""
        try:
            self.outputs(self.model())
        except (ImportError, NotImplementedError, RuntimeError):
            return False
        return True

    @cached_property
    def preserves(self) -> bool:
        """Whether the start says that the function does not move at step zero."""
        starts = self.starts().values()
        return all(start.anchor is not None or not any(p.any() for p in products(t, start)) for t, start in starts)


@cache
def _fresh(name: str, make: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> nn.Module:
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.5)
    torch.set_rng_state(state)
    return model.to(device, dtype).eval()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Sequence):
        for item in value:
            yield from _tensors(item)


def products(target: Target, start: Start) -> list[Tensor]:
    """s·B₀·A₀ of each of a layer's matrices, in float64."""
    return [start.scaling * (B @ A) for A, B in target.layout.unpack(start.A.double(), start.B.double())]


def fingerprint(model: nn.Module) -> dict[str, object]:
    """All that must be as it was when a model is left alone: values to the bit, identities, flags, modes, hooks."""
    found: dict[str, object] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = [list(value) for key, value in module.__dict__.items() if key.endswith("_hooks") and value]
        found[f"{name}()"] = (id(module), type(module), module.training, hooks, sorted(module.__dict__))
        for leaf, parameter in module._parameters.items():
            held = parameter is not None and (
                id(parameter),
                parameter.requires_grad,
                bits(parameter),
                bits(parameter.grad),
            )
            found[f"{name}.{leaf}"] = held
        for leaf, buffer in module._buffers.items():
            found[f"{name}.{leaf}"] = (id(buffer), bits(buffer))
    return found


def bits(tensor: Tensor | None) -> object:
    """The shape, layout and contents of a tensor, comparable."""
    if tensor is None or tensor.is_meta:
        return None if tensor is None else tuple(tensor.shape)
    raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device.type, hashlib.sha256(raw).hexdigest()


def train(case: Case, model: nn.Module, steps: int = 2, rate: float = 0.03) -> nn.Module:
    """Sign descent on the squares of the outputs: whatever has a gradient moves, however small that is."""
    for _ in range(steps):
        loss = torch.stack([(y.float() - 0.5).square().mean() for y in case.outputs(model, grad=True)]).sum()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(rate * gradient.sign())
    return model


def same(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float, what: str) -> None:
    """Outputs agree: to the bit where the tolerance is 0, otherwise relative to the largest value."""
    assert len(found) == len(wanted), f"{what}: {len(found)} outputs instead of {len(wanted)}"
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (
            f"{what}: {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
        )
        apart, size = float((a.double() - b.double()).abs().max()), float(b.double().abs().max())
        assert apart <= tolerance * size, f"{what}: off by {apart:.2e}, allowed {tolerance * size:.2e}"


def rounding(case: Case, times: float = 1.0) -> float:
    """One rounding of an output in half precision, 1e-6 in float32."""
    return times * (1e-6 if case.dtype == torch.float32 else torch.finfo(case.dtype).eps)
