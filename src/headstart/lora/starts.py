"""Every layer's start, from its weight, the strategy and what is known about the data. Changes nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from headstart import linalg
from headstart.errors import (
    HeadstartError,
    MetaWeight,
    NonFiniteWeight,
    NoSignal,
    UnsupportedLayer,
)
from headstart.inits.strategy import Factors
from headstart.lora import matrix, rebase
from headstart.lora.calibration import Calibration
from headstart.lora.config import LoraConfig
from headstart.lora.delta import Branch, NormCache, row_norms
from headstart.lora.layers import Start
from headstart.lora.rates import Reach
from headstart.lora.report import InitReport, LayerReport
from headstart.lora.targets import Target, targets

_READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def prepare(
    model: nn.Module, config: LoraConfig, calibration: Calibration | None = None
) -> tuple[list[tuple[Target, Start]], InitReport]:
    """Every layer's start, and how they were found. Changes nothing."""
    began = time.perf_counter()
    chosen = targets(model, config)
    starts, layers = [], []
    for target in chosen:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):  # It would halve precision.
            start, layer = start_of(target, config, calibration)
        starts.append((target, start))
        layers.append(layer)
    if calibration is not None:  # Now that its sizes fit.
        calibration.check_is_of(chosen)
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
    known = [
        {} if calibration is None else calibration.of(target.name, needs, i, block) for i, block in enumerate(blocks)
    ]
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
        if not count:
            raise NonFiniteWeight("the factors overflow float32: scale the weight, α or the option that does it down")
        raise NonFiniteWeight(f"the weight holds {count} NaN or infinite values: repair the checkpoint")
    return factors


def _placed(factor: Tensor, weight: Tensor) -> Tensor:
    """Where the weight is; a weight on the meta device gets real factors on the CPU."""
    return factor.contiguous() if weight.is_meta else factor.to(weight.device).contiguous()


def _magnitude(target: Target, weight: Tensor, start: Start) -> Tensor:
    """DoRA's m: the row norms of what the layer multiplies with at step zero, so that the ratio starts at one."""
    if weight.is_meta:
        raise MetaWeight("use_dora needs the weight's row norms, and it is not loaded: load it first")
    A, B = (start.A, start.B) if start.core is None else target.layout.with_core(start.A, start.B, start.core)
    norms = row_norms(
        target.layout, weight, Branch(A, B, start.scaling, start.anchor), NormCache(), training=False
    ).clone()
    if not bool(norms.isfinite().all()):
        raise NonFiniteWeight("the weight holds NaN or infinite values: repair the checkpoint")
    return norms
