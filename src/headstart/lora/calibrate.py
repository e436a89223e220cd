"""One pass over the user's data: the union of the statistics that some configs ask for, in memory known beforehand.

    probe    a first row shows which layers run, and which of them are given the same tensor (q, k, v; gate, up)
    pass     inputs are counted in forwards, gradients merged in backwards, each micro-batch at once
    reduce   the processes of a distributed run end with the same statistics

Means are weighted by tokens, not by batches. The model comes back as it was, whatever happens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import AdapterState, BadOption, CalibrationError, MetaWeight, MissingStatistic
from headstart.lora import batches as reading
from headstart.lora import matrix, reduce
from headstart.lora.calibration import Calibration, Found, each, size, tensors
from headstart.lora.calls import Calls, Loss
from headstart.lora.config import LoraConfig
from headstart.lora.fingerprint import fingerprint
from headstart.lora.layers import lora_layers
from headstart.lora.observe import Observer, Sharing, shows_inputs, undisturbed
from headstart.lora.plan import GRADIENTS, Plan
from headstart.lora.targets import Target
from headstart.lora.tokens import Tokens


def calibrate(
    model: nn.Module,
    config: LoraConfig | Sequence[LoraConfig],
    data: Iterable[Any],
    *,
    preserve: Iterable[Any] | None = None,
    loss: Loss | None = None,
    batches: int = 64,
    dense: bool = False,
    exact_inputs: bool = True,
    memory_limit: int | None = None,
    progress: bool = False,
) -> Calibration:
    """Measure what the strategies of one config, or of several at once, need to know about the data.

    Args:
        model: the base, before it is adapted; it comes back untouched.
        config: what will be adapted, and how it starts.
        data: batches that the model's forward accepts (mappings, tuples or tensors), read once. Padding by
            `attention_mask` and tokens whose `labels` are -100 do not count as inputs.
        preserve: batches of what is not to be forgotten, for the strategies that ask for it.
        loss: from the model and a batch to a mean loss, or to a mean loss and the number of tokens that it is a mean
            of; left out, the loss that the model returns.
        batches: at most so many are read.
        dense: keep every gradient whole, which takes as much memory as the adapted weights in float32.
        exact_inputs: keep second moments whole, (n, n); otherwise their leading directions.
        memory_limit: of the statistics, in bytes.
        progress: show a bar, where tqdm is installed.

    Raises:
        CalibrationError: no batch, no loss, a loss that is not finite, statistics beyond the limit.
        MetaWeight: if the model is not loaded. AdapterState: if it is adapted already.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> batches = [torch.randn(8, 4) for _ in range(3)]
        >>> found = calibrate(model, LoraConfig(r=2, init_lora_weights="eva"), batches)
        >>> moments = found.layers["0"].get("inputs")[0]
        >>> found.batches, moments.count
        (3, 24)
    """
    configs = [config] if isinstance(config, LoraConfig) else list(config)
    _check_is_base(model)
    plan = Plan.of(model, configs, dense, exact_inputs)
    if preserve is None and plan.asks("preserved"):
        raise MissingStatistic("this strategy weighs the data against what is to be preserved: pass preserve=")
    if preserve is not None and not plan.asks("preserved"):
        raise BadOption(
            "no init here weighs its data against what is to be preserved: leave preserve= out, and for one that looks "
            "at preserved data alone (lora_null, corda with mode='kpm') pass that as data="
        )
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise BadOption(f"batches is {batches!r}: choose an integer of at least 1")
    began, modules = time.perf_counter(), [target.module for target in plan.targets.values()]
    with undisturbed(model):
        with reduce.together():
            first, stream = reading.peeked(data, "data")
            count = reading.count_of(data, batches)
            calls = Calls(model, loss, plan.asks(*GRADIENTS), modules)
            leaders = _probe(plan, calls, first)
        leaders = reduce.agreed(leaders)
        _check_limit(plan.empty(leaders, torch.device("meta")), memory_limit)
        with reduce.together():
            found, seen = plan.empty(leaders), Seen()
            one_pass = _Pass(plan, found, leaders, calls, seen)
            one_pass.run(reading.shown(stream, count, progress), halfway=count // 2)
            if preserve is not None:
                _, others = reading.peeked(preserve, "preserve")
                calls = Calls(model, loss, False, modules)
                alone = _Pass(plan, found, leaders, calls, Seen(), preserved=True)
                alone.run(reading.shown(others, batches, progress))
    reduce.everywhere(each(found), plan.seed)
    ran = reduce.union(seen.layers)
    reduce.total(seen, "batches", "tokens", "loss", "weight")
    found = {name: kinds for name, kinds in found.items() if name in ran or name not in leaders}
    _check_finite(found)
    _compare(found)
    known = fingerprint(plan.targets.values())
    return Calibration(found, seen.batches, seen.tokens, seen.mean_loss, time.perf_counter() - began, known)


def _check_is_base(model: nn.Module) -> None:
    if any(True for _ in lora_layers(model)):
        raise AdapterState("the model has an adapter, and a start is of the base: calibrate before you adapt")
    for name, module in model.named_modules():
        if "_hf_hook" in module.__dict__:  # accelerate brings the weights when the module is called
            continue
        if any(weight is not None and matrix.is_hollow(weight) for weight in module._parameters.values()):
            raise MetaWeight(
                f"the weights of {name!r} are not loaded, and a pass over data needs them: load them first"
            )


@dataclass
class Seen:
    """What a pass counts.

    Attributes:
        batches, tokens: that were read; loss: the sum of the tokens' losses; weight: how many have one.
        layers: that ran.
    """

    batches: int = 0
    tokens: int = 0
    loss: float = 0.0
    weight: float = 0.0
    layers: set[str] = field(default_factory=set)

    @property
    def mean_loss(self) -> float | None:
        return self.loss / self.weight if self.weight else None


def _probe(plan: Plan, calls: Calls, first: Any) -> dict[str, str]:
    """The layer that keeps the inputs of each: the first that is given the same.

    What a row does not reach, an expert for one, other data may: such a layer keeps its own.
    """
    observer = Observer({name: target for name, target in plan.targets.items() if shows_inputs(target)})
    with observer.watching(), torch.no_grad():
        try:
            calls.forward(reading.first_row(first))
        except Exception:  # A loss may compare the rows of a batch, and one of them is none.
            observer.sharing = Sharing()
            calls.forward(first)
    leaders = observer.sharing.leaders(plan.targets)
    if not leaders and all(map(shows_inputs, plan.targets.values())):
        raise CalibrationError("the first batch reaches none of the layers that are to be adapted: check the batch")
    return {name: leaders.get(name, name) for name, target in plan.targets.items() if shows_inputs(target)}


class _Pass:
    """The batches, one after the other, into the statistics."""

    def __init__(
        self,
        plan: Plan,
        found: Found,
        leaders: Mapping[str, str],
        calls: Calls,
        seen: Seen,
        preserved: bool = False,
    ) -> None:
        self.plan, self.found, self.leaders, self.calls, self.seen = plan, found, leaders, calls, seen
        self.inputs = "preserved" if preserved else "inputs"
        self.tokens = Tokens(calls.model)
        self.weight = 1.0
        self.gradients = [s for layer in found.values() for s in layer.get("gradient", ())] if calls.backward else []

    def run(self, stream: Iterator[Any], halfway: int = 0) -> None:
        observer = Observer({name: self.plan.targets[name] for name in self.found})
        observer.on_input = self._input if self.plan.asks(self.inputs) else None
        if self.calls.backward:
            observer.on_gradient, observer.on_weight = self._gradient, self._weight
        with observer.watching(), self.tokens.watching():
            for index, batch in enumerate(stream):
                if index == halfway and index:
                    for statistic in self.gradients:
                        statistic.split()
                self._batch(observer, index, batch)

    def _batch(self, observer: Observer, index: int, batch: Any) -> None:
        self.seen.batches += 1
        self.seen.tokens += reading.tokens(batch)
        for piece in reading.pieces(self.calls.model, batch) if self.calls.by_rows else [batch]:
            self._piece(observer, index, piece)

    def _piece(self, observer: Observer, index: int, batch: Any) -> None:
        self.tokens.begin(batch, self.calls.device)
        observer.sharing, observer.forward = Sharing(), True
        with torch.set_grad_enabled(self.calls.backward):
            value, self.weight = self.calls.forward(batch)
        self._check_sharing(observer.sharing, index)
        if value is None or not self.calls.backward:
            return
        loss = float(value.detach())
        if not math.isfinite(loss):
            raise CalibrationError(f"the loss of calibration batch {index} is {loss}: look at that batch")
        if not value.requires_grad:
            raise CalibrationError("the loss does not depend on any layer that is to be adapted: check the loss")
        self.seen.loss += loss * self.weight
        self.seen.weight += self.weight
        observer.forward = False
        with torch.autocast(value.device.type, enabled=False):  # In which the gradients are summed.
            value.backward()
        for statistic in self.gradients:
            statistic.count += self.weight

    def _input(self, name: str, x: Tensor) -> None:
        if self.leaders[name] == name and self.inputs in self.found[name]:
            target = self.plan.targets[name]
            if target.layout.own_way:
                _check_rows(name, target, x)
            both = zip(self.found[name][self.inputs], target.layout.input_rows(target.module, x), strict=True)
            with torch.autocast(x.device.type, enabled=False):
                for statistic, X in {id(statistic): (statistic, X) for statistic, X in both}.values():
                    statistic.add(self._counted(name, x, X))

    def _gradient(self, name: str, x: Tensor, dy: Tensor) -> None:
        target, found = self.plan.targets[name], self.found[name]
        outputs = target.layout.output_rows(target.module, dy)
        for need in ("output_gradients", "output_squares"):
            for i, statistic in enumerate(found.get(need, ())):
                statistic.add(self._counted(name, x, outputs[i]).float() * self.weight)
        if "gradient" not in found:
            return
        if target.layout.kind == "embedding":
            (statistic,), (D,) = found["gradient"], [outputs[0].float() * self.weight]
            assert isinstance(target.module, nn.Embedding)
            statistic.add_dense(_of_lookup(target.module, statistic.shape[1], x.reshape(-1), D).t())
            return
        inputs = target.layout.input_rows(target.module, x)
        for statistic, D, X in zip(found["gradient"], outputs, inputs, strict=True):
            statistic.add(D, X, self.weight)

    def _weight(self, name: str, gradient: Tensor) -> None:
        if "gradient" not in self.found[name]:
            return
        blocks = self.plan.targets[name].layout.blocks(gradient)
        for statistic, block in zip(self.found[name]["gradient"], blocks, strict=True):
            statistic.add_dense(block.float() * self.weight)

    def _counted(self, name: str, x: Tensor, rows: Tensor) -> Tensor:
        """Rows made of x, without padding where they are rows of tokens."""
        return reading.counted(rows, x.shape, self.tokens.mask(self.plan.targets[name].module, x))

    def _check_sharing(self, sharing: Sharing, index: int) -> None:
        self.seen.layers |= sharing.seen.keys()
        for name, calls in sharing.seen.items():
            if calls != sharing.seen.get(self.leaders[name]):
                raise CalibrationError(
                    f"layer {name!r} is given the inputs of {self.leaders[name]!r} in the first batch and others in "
                    f"batch {index}: calibrate them apart, with exclude_modules"
                )


def _check_rows(name: str, target: Target, x: Tensor) -> None:
    width = target.layout.blocks(matrix.outline(target.module))[0].shape[1]
    if x.shape[-1] != width:
        raise CalibrationError(f"layer {name!r} is given rows of {x.shape[-1]}, and multiplies {width}: exclude it")


def _of_lookup(embedding: nn.Embedding, rows: int, ids: Tensor, D: Tensor) -> Tensor:
    """The gradient of an embedding's weight, (V, m): some scale what they look up, and padding never learns."""
    G = D.new_zeros(rows, D.shape[1]).index_add_(0, ids, D)
    scale = matrix.embed_scale(embedding)
    if scale is not None:
        G.mul_(scale)
    if embedding.padding_idx is not None:
        G[embedding.padding_idx] = 0
    return G


def _check_finite(found: Found) -> None:
    for name, kinds in found.items():
        for kind, blocks in kinds.items():
            if not all(map(math.isfinite, _extremes(blocks))):
                raise CalibrationError(f"layer {name!r} met NaN or infinite {kind.replace('_', ' ')}: look at the data")


def _extremes(statistics: Sequence[Any]) -> Iterator[float]:
    """The smallest and the largest numbers of every tensor: one reading, and NaN is among them if there is one."""
    for statistic in statistics:
        for tensor in tensors(statistic):
            yield from map(float, tensor.aminmax())


def _compare(found: Found) -> None:
    """Every layer's gradient is told the largest of all."""
    gradients = [s for layer in found.values() for s in layer.get("gradient", ()) if s.count]
    largest = max((s.norm() for s in gradients), default=0.0)
    for statistic in gradients:
        statistic.largest = largest or None


def _check_limit(found: Found, limit: int | None) -> None:
    if limit is not None and size(found) > limit:
        raise CalibrationError(
            f"the statistics of {len(found)} layers take {size(found) / 2**20:.1f} MB and the limit is "
            f"{limit / 2**20:.1f} MB: adapt fewer layers, lower the rank, or pass exact_inputs=False"
        )
