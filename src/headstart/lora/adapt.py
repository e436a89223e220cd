"""Install an adapter, and take it out.

Whatever changes a model computes first, for all layers, and commits after: a failure or an interrupt on layer k
leaves the model as it was, to the bit.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from headstart.errors import (
    AdapterState,
    BadOption,
    MissingStatistic,
    nearest,
)
from headstart.lora import matrix, quantized
from headstart.lora.adapter import KEY, Adapter, adapter_of, is_pefts, take_out
from headstart.lora.calibrate import calibrate
from headstart.lora.calibration import Calibration
from headstart.lora.config import LoraConfig
from headstart.lora.layers import LoraLayer, Start, TrainedModule, lora_layers, wrap
from headstart.lora.layers.encoder import switches
from headstart.lora.layers.read import is_read
from headstart.lora.report import InitReport
from headstart.lora.starts import prepare
from headstart.lora.targets import Holders, Target, holders_of, with_heads


def adapt(
    model: nn.Module,
    config: LoraConfig | None = None,
    *,
    data: Iterable[Any] | None = None,
    calibration: Calibration | None = None,
    **options: Any,
) -> Adapter:
    """Install low-rank adapters in a model, in place, and freeze the rest.

    Args:
        model: any module; its frozen weights are never written to.
        config: what to adapt and how; `LoraConfig()` where it is left out.
        data: batches for a strategy that looks at data, as `calibrate` takes them.
        calibration: instead of data, what `calibrate` found.
        options: of `calibrate`, with data: preserve, loss, batches, memory_limit, …

    Returns:
        The adapter. The model computes the function it computed before, unless the strategy is one whose point is
        that it does not (its `anchored` is False and its B is not zero).

    Raises:
        ConfigError, TargetError, WeightError: before anything is changed, naming the layer and what to do.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> print(adapt(model, LoraConfig(r=2, init_lora_weights="pissa")))
        trainable params: 52 || all params: 142 || trainable%: 36.6197
    """
    check_plain(model)
    config = with_heads(model, config or LoraConfig())
    return install(model, config, *prepare(model, config, measured(model, config, data, calibration, **options)))


def measured(
    model: nn.Module,
    config: LoraConfig,
    data: Iterable[Any] | None = None,
    calibration: Calibration | None = None,
    **options: Any,
) -> Calibration | None:
    """What the config's strategy needs to know: given, or found in the data now.

    Raises:
        BadOption: if it is given what it does not look at. MissingStatistic: if it is given nothing.
    """
    known = inspect.signature(calibrate).parameters
    if unknown := [name for name in options if name not in known]:
        raise BadOption(f"nothing here takes an option {unknown[0]!r}{nearest(unknown[0], known)}")
    needs = config.strategy.needs
    if not needs:
        if data is not None or calibration is not None or options:
            raise BadOption(f"init {config.strategy.name!r} looks at no data: leave data and its options out")
        return None
    if calibration is not None:
        if data is not None or options:
            raise BadOption("a calibration is what was found in data already: pass one or the other")
        return calibration
    if data is None:
        raise MissingStatistic(
            f"init {config.strategy.name!r} looks at the data ({', '.join(needs)}): pass data=, batches that the "
            "model's forward accepts"
        )
    return calibrate(model, config, data, **options)


def install(
    model: nn.Module, config: LoraConfig, starts: Sequence[tuple[Target, Start]], report: InitReport
) -> Adapter:
    """Commit: put the layers in, freeze the rest. Only what was computed before is used."""
    adapter = Adapter(model, config, report)
    occupants: dict[nn.Module, nn.Module] = {}
    wrapped: list[tuple[Holders, nn.Module, nn.Module]] = []
    for target, start in starts:
        base = occupants.get(target.module, target.module)
        around = wrap(base, target.layout, start, target.parameter)
        around.read = target.parameter == "weight" and is_read(target.module, target.holders)
        occupants[target.module] = around
        wrapped.append((target.holders, base, around))
    wrapped += _trained_modules(model, config)

    own = {id(p) for _, _, layer in wrapped for p in _new_parameters(layer)}
    adapter.flags = [(p, p.requires_grad) for p in model.parameters()]
    biases = trained_biases(model, starts, config)
    adapter.biases = {name: bias.detach().clone() for name, bias in biases.items()}
    trained = {id(bias) for bias in biases.values()}
    try:
        for holders, base, layer in wrapped:
            adapter.holders.append((holders, base))
            for parent, leaf in holders:
                parent._modules[leaf] = layer
        adapter.switches = list(switches(model))
        adapter.switch(off=True)
        adapter.blocks = quantized.turning(model)
        quantized.keep_blocks(adapter.blocks)
        for parameter, _ in adapter.flags:
            if id(parameter) not in own:
                parameter.requires_grad_(id(parameter) in trained)
        model.__dict__[KEY] = adapter
    except BaseException:  # an interrupt, between two of these lines
        take_out(adapter, keep_trained=False)
        raise
    return adapter


def _new_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    if isinstance(layer, TrainedModule):
        yield from layer.trained.parameters()
    elif isinstance(layer, LoraLayer):
        yield from layer.factors


def _trained_modules(model: nn.Module, config: LoraConfig) -> list[tuple[Holders, nn.Module, nn.Module]]:
    """Copies of the modules that train in full. What lies in one trains with it."""
    wanted: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        named = any(name == kept or name.endswith(f".{kept}") for kept in config.modules_to_save or ())
        if named and not any(name.startswith(f"{outer}.") for outer in wanted):
            wanted[name] = module
    places = holders_of(model)
    return [(places[module], module, TrainedModule(module, copy.deepcopy(module))) for module in wanted.values()]


def trained_biases(
    model: nn.Module, starts: Sequence[tuple[Target, Start]], config: LoraConfig
) -> dict[str, nn.Parameter]:
    """The biases that the config lets train, by name. Modules that train in full have theirs anyway."""
    if config.bias == "none":
        return {}
    if config.bias == "all":
        apart = [f".{name}." for name in config.modules_to_save or ()]
        found = {n: p for n, p in model.named_parameters() if n.endswith("bias")}
        return {n: p for n, p in found.items() if not any(part in f".{n}" for part in apart)}
    wanted = [(target.name, target.module) for target, _ in starts]
    own = {f"{name}.bias": module._parameters.get("bias") for name, module in wanted}
    return {name: parameter for name, parameter in own.items() if parameter is not None}


def check_plain(model: nn.Module) -> None:
    """Refuse a model that is adapted already."""
    if KEY in model.__dict__ or any(True for _ in lora_layers(model)):
        raise AdapterState("the model has an adapter already: remove(model) or merge(model) it first")
    if any(map(is_pefts, model.modules())):
        raise AdapterState("the model carries PEFT layers: use headstart.peft for it, or unload them first")
    if any(matrix.is_sharded(p) for p in model.parameters()):
        raise AdapterState("the model is sharded, and a start needs whole weights: adapt it first, then shard it")
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        raise AdapterState("the model has lazy layers without a shape yet: run one batch through it first")
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise AdapterState("torch.inference_mode makes tensors that never train: load and adapt outside of it")


def remove(model: nn.Module) -> nn.Module:
    """Take the adapter out: the model is the base model again, to the bit, flags and biases included.

    Raises:
        AdapterState: if there is no adapter.
    """
    adapter = adapter_of(model)
    for layer in adapter.layers().values():
        layer.unmerge()
    with torch.no_grad():
        for name, bias in adapter.trained_biases().items():
            bias.copy_(adapter.biases[name])
    take_out(adapter, keep_trained=False)
    return model
