"""Install an adapter, fold it in, take it out.

Whatever changes a model computes first, for all layers, and commits after: a failure or an interrupt on layer k
leaves the model as it was, to the bit.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from headstart import linalg
from headstart.errors import (
    AdapterState,
    BadOption,
    HeadstartError,
    MetaWeight,
    MissingStatistic,
    NonFiniteWeight,
    NoSignal,
    UnsupportedLayer,
)
from headstart.inits.strategy import Factors
from headstart.lora import matrix, quantized, rebase
from headstart.lora.calibrate import calibrate
from headstart.lora.calibration import Calibration
from headstart.lora.config import Holders, LoraConfig, Target, holders_of, targets, with_heads
from headstart.lora.delta import Branch, NormCache, row_norms
from headstart.lora.layers import LoraLayer, Start, TrainedModule, frozen_module, lora_layers, wrap
from headstart.lora.layers.encoder import Switch, switches
from headstart.lora.rates import BASE, Rate, Reach
from headstart.lora.report import InitReport, LayerReport

_KEY = "_headstart_adapter"
_READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    """

    model: nn.Module
    config: LoraConfig
    report: InitReport
    holders: list[tuple[Holders, nn.Module]] = field(default_factory=list)
    flags: list[tuple[nn.Parameter, bool]] = field(default_factory=list)
    biases: dict[str, Tensor] = field(default_factory=dict)
    switches: list[Switch] = field(default_factory=list)

    def layers(self) -> dict[str, LoraLayer]:
        """The LoRA layers by name."""
        return dict(lora_layers(self.model))

    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def count(self) -> tuple[int, int]:
        """Trainable and all parameters."""
        trained = sum(p.numel() for p in self.parameters())
        return trained, sum(quantized.elements(p) for p in self.model.parameters())

    def learning_rate(self, base: float = BASE) -> Rate:
        """The peak rate of AdamW that fits this start: `base`, plain LoRA's, times what the start makes of a step.

        It is a float with a `reason`. `headstart.search_rate` finds one on data instead, without a base.

        Example:
            >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
            >>> rate = adapt(model, LoraConfig(r=4, init_lora_weights="pissa")).learning_rate(base=1e-3)
            >>> 0 < rate < 1e-3
            True
        """
        return self.report.learning_rate(base)

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Within this context the model is the base model, to the bit."""
        switches = [m for m in self.model.modules() if isinstance(m, LoraLayer | TrainedModule)]
        before = [module.enabled for module in switches]
        merged = [(layer, layer.weight_parameter) for layer in self.layers().values() if layer.merged]
        biases = self.trained_biases()
        trained = {name: bias.data for name, bias in biases.items()}
        try:
            for module in switches:
                module.enabled = False
            for layer, _ in merged:
                layer.unmerge()
            self._switch(off=False)
            # Through .data: a graph that waits for its backward does not mind a value that comes back.
            for name, bias in biases.items():
                bias.data = self.biases[name].to(bias)
            yield self.model
        finally:
            for module, enabled in zip(switches, before, strict=True):
                module.enabled = enabled
            for layer, weight in merged:
                layer.merge(weight)
            self._switch(off=True)
            for name, bias in biases.items():
                bias.data = trained[name]

    def _switch(self, off: bool) -> None:
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


def prepare(
    model: nn.Module, config: LoraConfig, calibration: Calibration | None = None
) -> tuple[list[tuple[Target, Start]], InitReport]:
    """Every layer's start, and how they were found. Changes nothing."""
    began = time.perf_counter()
    chosen = targets(model, config)
    starts, layers = [], []
    for target in chosen:
        start, layer = start_of(target, config, calibration)
        starts.append((target, start))
        layers.append(layer)
    seconds = time.perf_counter() - began
    data = None if calibration is None else calibration.facts()
    return starts, InitReport(config.strategy.name, config.options, config.seed, tuple(layers), seconds, data)


def start_of(target: Target, config: LoraConfig, calibration: Calibration | None = None) -> tuple[Start, LayerReport]:
    """One layer's start, from its strategy. Changes nothing."""
    try:
        return _start_of(target, config, calibration)
    except NoSignal as error:
        if config.init_fallback is None:
            raise NoSignal(f"{error} (layer {target.name!r}, init {config.strategy.name!r})") from error
        instead = replace(config, init_lora_weights=config.init_fallback, init_options={}, init_fallback=None)
        start, report = start_of(target, instead)
        return start, replace(report, facts=({"note": f"started with {config.init_fallback!r}: {error}"},))
    except HeadstartError as error:
        raise type(error)(f"{error} (layer {target.name!r}, init {config.strategy.name!r})") from error


def _start_of(target: Target, config: LoraConfig, calibration: Calibration | None) -> tuple[Start, LayerReport]:
    stored = matrix.parameter_of(target.module, target.parameter)
    material = _material(target, config)
    weight = _weight(target, config) if material is None else material.weight
    blocks = target.layout.blocks(weight)
    rank = target.layout.block_rank(target.rank)
    needs = config.strategy.needs
    known = [{} if calibration is None else calibration.of(target.name, needs, i) for i in range(len(blocks))]
    if material is not None:
        known = [{**given, "quantize": quantize} for given, quantize in zip(known, material.maps, strict=True)]
    found = [_factors(block, rank, i, target, config, known[i]) for i, block in enumerate(blocks)]
    base = None if material is None else rebase.base_of(material, target.layout, found)
    A, B = (_placed(factor, stored) for factor in target.layout.pack([(f.A, f.B) for f in found]))
    anchored = found[0].anchored
    start = Start(
        A=A,
        B=B,
        rank=target.rank,
        alpha=target.alpha,
        scaling=target.scaling,
        anchor=(A.clone(), B.clone()) if anchored else None,
        frozen=found[0].frozen,
        core=None if found[0].core is None else torch.stack([_core(f).to(A) for f in found]),
        base=None if base is None else base.to(A.device),
        dropout=config.lora_dropout,
    )
    if config.use_dora:
        if material is not None:
            own = matrix.values(target.module, target.parameter)
            weight = own if base is None or base.weight is None else base.weight
        start = replace(start, magnitude=_magnitude(target, weight, start))
    facts = tuple(dict(f.facts) for f in found if f.facts)
    reaches = tuple(_reach(f, target, i, calibration) for i, f in enumerate(found))
    return start, LayerReport(target.name, tuple(weight.shape), target.rank, target.scaling, anchored, facts, reaches)


def _reach(factors: Factors, target: Target, block: int, calibration: Calibration | None) -> Reach:
    found = {} if calibration is None else calibration.layers.get(target.name, {})
    trained = "" if factors.core is not None else "".join(sorted({"A", "B"} - factors.frozen))
    inputs = found["inputs"][block] if "inputs" in found else None
    return Reach.of(factors.A, factors.B, target.scaling, trained, inputs)


def _weight(target: Target, config: LoraConfig) -> Tensor:
    """The weight's values; only its shape where nobody reads them and a quantised one would have to be unpacked."""
    read = matrix.values if config.strategy.reads_weight or config.use_dora else matrix.outline
    return read(target.module, target.parameter)


def _material(target: Target, config: LoraConfig) -> rebase.Material | None:
    """What a start that quantises works on."""
    if not config.strategy.quantizes:
        return None
    return rebase.material(target.name, target.module, target.parameter, target.layout, config.options)


def _core(factors: Factors) -> Tensor:
    assert factors.core is not None
    return factors.core


def _factors(
    block: Tensor, rank: int, index: int, target: Target, config: LoraConfig, known: Mapping[str, object]
) -> Factors:
    strategy = config.strategy
    if block.dtype not in _READABLE:
        raise UnsupportedLayer(f"a weight of {block.dtype} is quantised: load the model in bf16, fp16 or fp32")
    given: dict[str, object] = {
        "shape": tuple(block.shape),
        "rank": rank,
        "scaling": target.scaling,
        "kind": target.layout.kind,
        "generator": linalg.named_generator(config.seed, strategy.name, f"{target.name}:{index}"),
        **known,
    }
    if strategy.reads_weight:
        if block.is_meta:
            raise MetaWeight("the start reads the weight, which is not loaded: load it, or choose init 'kaiming'")
        given["weight"] = block
    factors = strategy.start(given, config.options)
    if not bool(factors.A.isfinite().all() and factors.B.isfinite().all()):
        count = int(block.numel() - block.isfinite().sum()) if strategy.reads_weight else 0
        raise NonFiniteWeight(f"the weight holds {count} NaN or infinite values: repair the checkpoint")
    return factors


def _placed(factor: Tensor, weight: Tensor) -> Tensor:
    """Where the weight is; a weight on the meta device gets real factors on the CPU."""
    return factor.contiguous() if weight.is_meta else factor.to(weight.device).contiguous()


def _magnitude(target: Target, weight: Tensor, start: Start) -> Tensor:
    """DoRA's m: the row norms of what the layer multiplies with at step zero, so that the ratio starts at one."""
    if weight.is_meta:
        raise MetaWeight("use_dora needs the weight's row norms, and it is not loaded: load it first")
    branch = Branch(start.A, start.B, start.scaling, start.anchor)
    norms = row_norms(target.layout, weight, branch, NormCache(), training=False).clone()
    if not bool(norms.isfinite().all()):
        raise NonFiniteWeight("the weight holds NaN or infinite values: repair the checkpoint")
    return norms


def install(
    model: nn.Module, config: LoraConfig, starts: Sequence[tuple[Target, Start]], report: InitReport
) -> Adapter:
    """Commit: put the layers in, freeze the rest. Only what was computed before is used."""
    adapter = Adapter(model, config, report)
    occupants: dict[nn.Module, nn.Module] = {}
    wrapped: list[tuple[Holders, nn.Module, nn.Module]] = []
    for target, start in starts:
        base = occupants.get(target.module, target.module)
        occupants[target.module] = wrap(base, target.layout, start, target.parameter)
        wrapped.append((target.holders, base, occupants[target.module]))
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
        adapter._switch(off=True)
        for parameter, _ in adapter.flags:
            if id(parameter) not in own:
                parameter.requires_grad_(id(parameter) in trained)
        model.__dict__[_KEY] = adapter
    except BaseException:  # an interrupt, between two of these lines
        _take_out(adapter, keep_trained=False)
        raise
    return adapter


def _new_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    if isinstance(layer, TrainedModule):
        yield from layer.trained.parameters()
    elif isinstance(layer, LoraLayer):
        yield from layer.factors


def _trained_modules(model: nn.Module, config: LoraConfig) -> list[tuple[Holders, nn.Module, nn.Module]]:
    """Copies of the modules that train in full."""
    wanted = [
        module
        for name, module in model.named_modules()
        if any(name == kept or name.endswith(f".{kept}") for kept in config.modules_to_save or ())
    ]
    places = holders_of(model)
    return [(places[module], module, TrainedModule(module, copy.deepcopy(module))) for module in wanted]


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


def base_name(name: str) -> str:
    """The name that a parameter has in the base model."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter that is installed in a model.

    Raises:
        AdapterState: if there is none.
    """
    adapter = model.__dict__.get(_KEY)
    if not isinstance(adapter, Adapter):
        raise AdapterState(f"{type(model).__name__} has no adapter: adapt(model, config) or load(model, path) first")
    return adapter


def check_plain(model: nn.Module) -> None:
    """Refuse a model that is adapted already."""
    if _KEY in model.__dict__ or any(True for _ in lora_layers(model)):
        raise AdapterState("the model has an adapter already: remove(model) or merge(model) it first")
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise AdapterState("the model carries PEFT layers: use headstart.peft for it, or unload them first")
    if any(matrix.is_sharded(p) for p in model.parameters()):
        raise AdapterState("the model is sharded, and a start needs whole weights: adapt it first, then shard it")
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise AdapterState("torch.inference_mode makes tensors that never train: load and adapt outside of it")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        lost: by layer, the share of the update that rounding to the weight's dtype took away, ‖(W' − W) − Δ‖/‖Δ‖,
            measured on sampled rows. A quantised weight is quantised anew, and the error of that is what is lost, over
            all rows: above 1 it is larger than the update.
    """

    lost: Mapping[str, float]

    @property
    def worst(self) -> float:
        return max(self.lost.values(), default=0.0)


def merge(model: nn.Module, *, reversible: bool = False) -> MergeReport:
    """Fold the adapter into the weights.

    In float16 and bfloat16 every element is the float64 sum, rounded once. In float32 it is a chain of
    multiply-adds, wrong by a few ulp of its terms. With DoRA it is computed in float64 and then cast.

    The merged weights are new tensors, which are all there before the first is put in: a merge needs memory for one
    more copy of the adapted weights, and a reversible one keeps both. What shares a weight with an adapted layer keeps
    its own.

    Args:
        model: an adapted model.
        reversible: keep the adapter and the frozen weights, so that `unmerge(model)` restores the same bits.
            Otherwise the adapter is gone, and the model is made of its own modules again.

    Returns:
        How much of the update survived the rounding, by layer.

    Raises:
        AdapterState: if there is no adapter. NonFiniteWeight: if a factor is not finite; nothing is changed.
    """
    adapter = adapter_of(model)
    layers = {name: layer for name, layer in adapter.layers().items() if not layer.merged}
    if reversible and not layers:
        warnings.warn("the model is merged already, and nothing was done: unmerge(model) first", stacklevel=2)
    if any(matrix.is_sharded(layer.original) for layer in layers.values()):
        raise AdapterState("the model is sharded: save the adapter, and merge it into the whole base")
    with torch.no_grad():
        check_finite(layers, "merged")
        found = {name: _merged(layer) for name, layer in layers.items()}
    shared = _shared(model, layers)
    for name, layer in layers.items():
        layer.merge(found[name][0])
    if shared:
        warnings.warn(
            f"{', '.join(shared)} shared a weight with other modules and has one of its own now; "
            "where the model's config says that they are tied (tie_word_embeddings), set it to False before saving",
            stacklevel=2,
        )
    if not reversible:
        flags = {id(parameter): flag for parameter, flag in adapter.flags}
        for layer in layers.values():
            flag = flags.get(id(layer.original), False)
            layer.forget_original()
            layer.weight_parameter.requires_grad_(flag)
        _take_out(adapter, keep_trained=True)
    return MergeReport({name: lost for name, (_, lost) in found.items()})


def check_finite(layers: Mapping[str, LoraLayer], purpose: str) -> None:
    """Refuse factors that hold NaN or infinity."""
    for name, layer in layers.items():
        tensors = layer.factors if layer.magnitude is None else (*layer.factors, layer.magnitude)
        if not all(math.isfinite(float(tensor.detach().abs().sum())) for tensor in tensors):
            raise NonFiniteWeight(f"a factor holds NaN or infinity: this adapter cannot be {purpose} (layer {name!r})")


def _merged(layer: LoraLayer) -> tuple[nn.Parameter, float]:
    """The merged parameter, and the share of the update that it lost."""
    weight = layer.merged_weight()
    parameter = matrix.stored(weight, like=layer.original)
    if not quantized.is_quantized(parameter):
        return parameter, _lost(layer, weight)
    module = frozen_module(layer)
    update = torch.linalg.vector_norm(weight.double() - layer.frozen_values().double())
    error = torch.linalg.vector_norm(matrix.dense(parameter, module).double() - weight.double())
    return parameter, float(error / update) if update else 0.0


def _lost(layer: LoraLayer, merged: Tensor, rows: int = 16) -> float:
    """The share of the update that rounding took, on evenly spaced rows of the first block."""
    block, new = layer.layout.blocks(layer.frozen_values())[0], layer.layout.blocks(merged)[0]
    if layer.magnitude is not None or block.dtype in (torch.float32, torch.float64):
        return 0.0
    A, B = layer.branch().pairs(layer.layout)[0]
    index = torch.linspace(0, len(block) - 1, min(rows, len(block)), device=block.device).long()
    exact = layer.scaling * (B[index].double() @ A.double())
    size = exact.norm()
    return float(((new[index].double() - block[index].double()) - exact).norm() / size) if size else 0.0


def _shared(model: nn.Module, layers: Mapping[str, LoraLayer]) -> list[str]:
    """The layers whose frozen weight is also somebody else's."""
    count: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                count[id(parameter)] = count.get(id(parameter), 0) + 1
    return [name for name, layer in layers.items() if count.get(id(layer.original), 0) > 1]


def unmerge(model: nn.Module) -> None:
    """Put the frozen weights back, bit by bit, after `merge(model, reversible=True)`.

    Raises:
        AdapterState: if there is no adapter, or it is not merged.
    """
    layers = adapter_of(model).layers()
    if not any(layer.merged for layer in layers.values()):
        raise AdapterState("nothing is merged here: merge(model, reversible=True) first")
    for layer in layers.values():
        layer.unmerge()


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
    _take_out(adapter, keep_trained=False)
    return model


def _take_out(adapter: Adapter, keep_trained: bool) -> None:
    for holders, base in reversed(adapter.holders):
        for parent, leaf in holders:
            occupant = parent._modules[leaf]
            trained = keep_trained and isinstance(occupant, TrainedModule)
            parent._modules[leaf] = cast(TrainedModule, occupant).trained if trained else base
    for parameter, flag in adapter.flags:
        parameter.requires_grad_(flag)
    adapter._switch(off=False)
    adapter.model.__dict__.pop(_KEY, None)
