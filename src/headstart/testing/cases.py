"""A start on a kind of layer in a dtype and a shell, and how two models or outputs are compared."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from headstart import statistics
from headstart.errors import UnsupportedLayer
from headstart.inits import strategy as registry
from headstart.lora.calibrate import calibrate
from headstart.lora.calibration import Calibration
from headstart.lora.config import LoraConfig
from headstart.lora.layers import Start
from headstart.lora.starts import start_of
from headstart.lora.targets import Target, targets
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
        return self.adapt(self.model())

    def adapt(self, model: nn.Module) -> nn.Module:
        """A base of this case, adapted."""
        known = {} if self.calibration is None else {"calibration": self.calibration}
        return self.shell.adapt(model, self.config, **known)

    @cached_property
    def calibration(self) -> Calibration | None:
        """What a start that looks at data knows: of batches like the inputs, and of the same in another order."""
        needs = registry.get(self.init)[0].needs
        if not needs:
            return None
        seen = [self._varied(i) for i in range(4)]

        def loss(model: nn.Module, batch: Sequence[Any]) -> Tensor:
            keywords = {name: self._placed(value) for name, value in self.kind.keywords().items()}
            found = _tensors(model(*map(self._placed, batch), **keywords))
            return torch.stack([(y.float() - 0.5).square().mean() for y in found]).sum()

        preserve = seen[2:] if "preserved" in needs else None
        found = calibrate(self.model(), self.config, seen, preserve=preserve, loss=loss)
        return replace(found, weights={})  # A law may change the weights under it.

    def _varied(self, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        inputs = self.kind.inputs()
        return tuple(
            x + torch.randn(x.shape, generator=generator) if x.is_floating_point() else x.roll(seed, -1) for x in inputs
        )

    @cached_property
    def trained(self) -> nn.Module:
        """A model that was adapted and trained a little; a law that changes it does so on a copy."""
        return train(self, self.adapted())

    def starts(
        self, model: nn.Module | None = None, known: Calibration | None = None
    ) -> dict[str, tuple[Target, Start]]:
        """Every layer's start, by name."""
        known = known or self.calibration
        found = targets(model or self.model(), self.config)
        return {target.name: (target, start_of(target, self.config, known)[0]) for target in found}

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
        """Whether the base itself computes in this dtype, on this device, with what is installed, and can be seen."""
        if registry.get(self.init)[0].quantizes and find_spec("bitsandbytes") is None:
            return False
        try:
            self.outputs(self.model())
        except (ImportError, NotImplementedError, RuntimeError):
            return False
        try:
            return self.calibration is None or True
        except UnsupportedLayer:
            return False
        except Exception:  # What is wrong with a start, the laws say.
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


def known_of_rows(name: str, m: int, n: int) -> Calibration:
    """What may be known about a layer, from random inputs and gradients."""
    generator = torch.Generator().manual_seed(3)
    X, D, other = (torch.randn(32, size, generator=generator) for size in (n, m, n))
    known = {need: [statistic] for need, statistic in statistics.of_rows(X, D, other, generator).items()}
    return Calibration({name: known}, batches=1, tokens=32)


def products(target: Target, start: Start) -> list[Tensor]:
    """s·B₀·A₀, or s·B₀·R₀·A₀, of each of a layer's matrices, in float64."""
    A, B = start.A.double(), start.B.double()
    if start.core is not None:
        A, B = target.layout.with_core(A, B, start.core.double())
    return [start.scaling * (b @ a) for a, b in target.layout.unpack(A, B)]


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
