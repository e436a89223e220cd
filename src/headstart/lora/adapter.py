"""An adapter that is installed in a model: its layers, what they stand in the place of, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from headstart.errors import AdapterState
from headstart.lora import quantized
from headstart.lora.config import LoraConfig
from headstart.lora.layers import LoraLayer, TrainedModule, lora_layers
from headstart.lora.layers.encoder import Switch
from headstart.lora.rates import Rate
from headstart.lora.report import InitReport
from headstart.lora.targets import Holders, inside

KEY = "_headstart_adapter"


@dataclass
class Adapter:
    """An adapter that is installed in a model.

    Attributes:
        model: the model, changed in place.
        config: what it was made from.
        report: how it was started.
        holders: where each replaced module stands, and what stood there, in the order of installation.
        flags: `requires_grad` of every parameter before.
        biases: the values that the trained biases had before, by their name in the base model.
        switches: what keeps torch's encoders from computing past the layers.
        aside: what the trained biases hold, while the adapter is disabled and the model has its own.
        blocks: the 4-bit layers that bitsandbytes is kept from turning around.
    """

    model: nn.Module
    config: LoraConfig
    report: InitReport
    holders: list[tuple[Holders, nn.Module]] = field(default_factory=list)
    flags: list[tuple[nn.Parameter, bool]] = field(default_factory=list)
    biases: dict[str, Tensor] = field(default_factory=dict)
    switches: list[Switch] = field(default_factory=list)
    aside: dict[str, Tensor] = field(default_factory=dict)
    blocks: list[nn.Module] = field(default_factory=list)

    def layers(self) -> dict[str, LoraLayer]:
        """The LoRA layers by name."""
        return dict(lora_layers(self.model))

    def release(self, layer: LoraLayer, places: Holders) -> None:
        """Put back what stood where this layer stands: in `places`, in the model or below another layer."""
        under = layer.base_layer
        for parent, leaf in places:
            parent._modules[leaf] = under
        self.holders = [
            (places, under if base is layer else base) for places, base in self.holders if base is not under
        ]

    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def count(self) -> tuple[int, int]:
        """Trainable and all parameters."""
        trained = sum(p.numel() for p in self.parameters())
        return trained, sum(quantized.elements(p) for p in self.model.parameters())

    def learning_rate(self, base: float | None = None, *, steps: int | None = None) -> Rate:
        """The peak rate of AdamW that fits this start: `base`, plain LoRA's, times what the start makes of a step.

        It is a float with a `reason`. Without a base, plain LoRA's is guessed from the layers' width; `steps`, the
        length of the run, makes it surer.
        `headstart.search_rate` confirms it on data.

        Example:
            >>> from headstart import adapt
            >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
            >>> rate = adapt(model, LoraConfig(r=4, init_lora_weights="pissa")).learning_rate(base=1e-3)
            >>> 0 < rate < 1e-3
            True
        """
        return self.report.learning_rate(base, steps=steps)

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Within this context the model is the base model, to the bit."""
        switches = [m for m in self.model.modules() if isinstance(m, LoraLayer | TrainedModule)]
        before = [module.enabled for module in switches]
        merged = [(layer, layer.weight_parameter) for layer in self.layers().values() if layer.merged]
        biases = self.trained_biases()
        trained, outer = {name: bias.data for name, bias in biases.items()}, self.aside
        try:
            self.aside = outer or trained
            for module in switches:
                module.enabled = False
            for layer, _ in merged:
                layer.unmerge()
            self.switch(off=False)
            # Through .data: a graph that waits for its backward does not mind a value that comes back.
            for name, bias in biases.items():
                bias.data = self.biases[name].to(bias)
            yield self.model
        finally:
            for module, enabled in zip(switches, before, strict=True):
                module.enabled = enabled
            for layer, weight in merged:
                layer.merge(weight)
            self.switch(off=True)
            for name, bias in biases.items():
                bias.data = trained[name]
            self.aside = outer

    def switch(self, off: bool) -> None:
        """torch's fast path past the layers, off or as the model had it."""
        for switch in self.switches:
            switch.set(off)

    def trained_biases(self) -> dict[str, nn.Parameter]:
        """The biases that train, by their name in the base model. Asked anew: sharding replaces parameters."""
        if not self.biases:
            return {}
        named = {base_name(name): parameter for name, parameter in self.model.named_parameters()}
        return {name: named[name] for name in self.biases}

    def __str__(self) -> str:
        trainable, total = self.count()
        share = 100 * trainable / total if total else 0.0
        return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"

    def __repr__(self) -> str:
        return f"Adapter({self.config.strategy.name!r}, {len(self.layers())} layers, {self})"


def base_name(name: str) -> str:
    """The name that a parameter has in the base model."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter that is installed in a model.

    Raises:
        AdapterState: if there is none.
    """
    adapter = (inside(model) or model).__dict__.get(KEY)
    if not isinstance(adapter, Adapter):
        if is_pefts(model):
            raise AdapterState(
                "this is a PeftModel: its own save_pretrained, merge_and_unload, unload and disable_adapter serve it"
            )
        raise AdapterState(f"{type(model).__name__} has no adapter: adapt(model, config) or load(model, path) first")
    return adapter


def is_pefts(module: nn.Module) -> bool:
    """Whether this is a module of PEFT's, as it is or with our branch."""
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)


@contextmanager
def put_back(adapter: Adapter) -> Iterator[None]:
    """Whatever ends what runs within too early, the layers stand and compute as before."""
    stood = [(parent, leaf, parent._modules[leaf]) for places, _ in adapter.holders for parent, leaf in places]
    flags = [(parameter, parameter.requires_grad) for parameter in adapter.model.parameters()]
    unmerged = [layer for layer in adapter.layers().values() if not layer.merged]
    try:
        yield
    except BaseException:
        for parent, leaf, module in stood:
            parent._modules[leaf] = module
        for layer in unmerged:
            layer.unmerge()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        adapter.switch(off=True)
        adapter.blocks += quantized.turning(adapter.model)
        quantized.keep_blocks(adapter.blocks)
        adapter.model.__dict__[KEY] = adapter
        raise


def take_out(adapter: Adapter, keep_trained: bool) -> None:
    """Put back what stood where the layers stand; modules that were trained in full may stay."""
    for holders, base in reversed(adapter.holders):
        for parent, leaf in holders:
            occupant = parent._modules[leaf]
            trained = keep_trained and isinstance(occupant, TrainedModule)
            parent._modules[leaf] = cast(TrainedModule, occupant).trained if trained else base
    for parameter, flag in adapter.flags:
        parameter.requires_grad_(flag)
    adapter.switch(off=False)
    quantized.release_blocks(adapter.blocks)
    adapter.blocks = []
    adapter.model.__dict__.pop(KEY, None)
