"""What an init and a training run take, in memory and time, before a weight is loaded.

    training   weights + adapter + Adam's moments + what a pass keeps for its backward + the loss
    init       weights + statistics + what the pass over the data keeps; or weights + the adapter + one decomposition

Memory is what torch allocates at the fullest moment; the libraries themselves, and on a GPU its context, come on top.
Time is work, counted, over the operations a second that a machine was measured or is stated to do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headstart.choose import costs
from headstart.choose.machine import Speed, duration, size, speed
from headstart.choose.memory import (
    Memory,
    activations_of,
    calibration_of,
    decomposition_of,
    loss_of,
    replaced_of,
    weights_of,
    working_of,
)
from headstart.choose.outlines import outline_of
from headstart.choose.setting import OPTIMIZERS, Setting
from headstart.choose.shapes import Matrix, Outline, leaders
from headstart.errors import BadRank

if TYPE_CHECKING:
    from headstart.choose.outlines import Model


@dataclass(frozen=True)
class Time:
    """Seconds.

    Attributes:
        init: of the pass over the data and the decompositions. step: of one optimiser step.
        training: of all steps, where their number is known. speed: what they were divided by.
    """

    init: float
    step: float
    training: float | None
    speed: Speed


@dataclass(frozen=True)
class Estimate:
    """A prediction, in parts.

    Attributes:
        setting: what was asked. outline: the model.
        trainable, total: parameters. layers: how many are adapted.
        memory: in bytes. time: in seconds, None where nothing is known about the machine.
        flops: of the init, and of one optimiser step.
    """

    setting: Setting
    outline: Outline = field(repr=False)
    trainable: int
    total: int
    layers: int
    memory: Memory
    time: Time | None
    flops: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        memory = {name: value for name, value in vars(self.memory).items() if name != "accumulates"}
        memory |= {"training": self.memory.training, "init": self.memory.init, "peak": self.memory.peak}
        time = None if self.time is None else {**vars(self.time), "speed": vars(self.time.speed)}
        return {
            "model": {"kind": self.outline.kind, "parameters": self.outline.parameters, "read": self.outline.read},
            "setting": dataclasses.asdict(self.setting),
            "trainable": self.trainable,
            "total": self.total,
            "layers": self.layers,
            "bytes": memory,
            "flops": {"init": self.flops[0], "step": self.flops[1]},
            "seconds": time,
        }

    def __str__(self) -> str:
        setting, memory = self.setting, self.memory
        share = 100 * self.trainable / self.total
        batch = f"{setting.batch_size} × {setting.max_length} tokens"
        lines = [
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}",
            f"predicted memory: {size(memory.peak)} on each device, and the libraries' own",
            f"  training {size(memory.training):>10}   of which",
        ]
        parts = ("weights", "adapter", "adam", "activations", "loss", "working", "gradients")
        lines += [f"    {name:<12}{size(getattr(memory, name)):>10}{_NOTES.get(name, '')}" for name in parts]
        lines.append(f"  init     {size(memory.init):>10}   of which")
        for name in ("statistics", "passing", "decomposition"):
            lines.append(f"    {name:<14}{size(getattr(memory, name)):>8}{_NOTES.get(name, '')}")
        how = {
            "config": f"counted from the config's shapes, for batches of {batch}",
            "trace": f"traced through a pass without values, for batches of {batch}",
            "modules": f"activations are what goes into and out of every matrix, unsure, for batches of {batch}",
        }[self.outline.read]
        lines.append(f"  {how}")
        return "\n".join([*lines, *self._times()])

    def _times(self) -> list[str]:
        if self.time is None:
            return ["predicted time: unknown without numpy: state --tflops"]
        steps = "" if self.time.training is None else f", training {duration(self.time.training)}"
        return [
            f"predicted time: init {duration(self.time.init)}, a step {duration(self.time.step)}{steps}",
            f"  within a factor of {self.time.speed.factor:g}: {self.time.speed.reason}",
        ]


_NOTES = {
    "activations": "   kept for the backward pass",
    "loss": "   at once with them, or the next line's, whichever is more",
    "working": "   the backward pass of one block",
    "gradients": "   when the activations are gone",
    "statistics": "   kept of the data",
    "passing": "   what the passes over it hold",
    "decomposition": "   the dearest weight, on the way",
}


def estimate(model: Model, *, tflops: float | None = None, timed: bool = True, **fields: Any) -> Estimate:
    """Predict the memory and the time of an init and of training, from shapes alone.

    Args:
        model: a folder, a hub name, 'smollm2'; a config.json or what stands in one; a transformers config; a module.
        tflops: the dense peak of the device, in the dtype of the weights; left out, this CPU is measured.
        timed: whether to predict time.
        fields: of `Setting`: init, r, target_modules, dtype, quantised, batch_size, max_length, …

    Raises:
        UnknownField, BadOption, BadRank, NoTarget, UnknownInit: for what cannot be meant. FileError: for no model.

    Example:
        >>> config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        ...           "num_attention_heads": 32, "vocab_size": 32000, "dtype": "bfloat16"}
        >>> found = estimate(config, init="pissa", r=16, batch_size=1, max_length=512, timed=False)
        >>> f"{found.total:,}", f"{found.trainable:,}", found.memory.weights
        ('6,778,392,576', '39,976,960', 13476831232)
    """
    setting = Setting.of(fields)
    outline = outline_of(model, None if setting.dtype == "auto" else setting.dtype)
    setting = setting.settled(outline)
    rate = speed(setting.dtype, tflops) if timed else None
    return predict(outline, setting, rate)


def predict(outline: Outline, setting: Setting, rate: Speed | None = None) -> Estimate:
    """The arithmetic: an outline and a setting to an estimate.

    Raises:
        NoTarget, BadRank, UnknownInit: where the setting does not fit the model.
    """
    setting = setting.settled(outline)
    start = costs.start_of(setting.init)
    chosen = outline.chosen(setting.target_modules, setting.exclude_modules)
    _check_ranks(start, chosen, setting)
    factors = sum(setting.r * (x.m + x.n) * x.count for x in chosen)
    trainable = _trainable(start, chosen, setting.r)
    cores = setting.r**2 * sum(x.count for x in chosen) if "R" in start.trains else 0
    adapter = 4 * (factors * (2 if start.anchored else 1) + cores)
    passing, statistics = calibration_of(outline, start, chosen, setting)
    memory = Memory(
        weights=weights_of(outline, setting) + replaced_of(start, chosen, setting),
        adapter=adapter,
        gradients=4 * trainable,
        adam=OPTIMIZERS[setting.optimizer] * trainable,
        activations=activations_of(outline, setting, chosen),
        loss=loss_of(outline, setting, setting.loss),
        working=working_of(outline, setting),
        decomposition=decomposition_of(start, chosen, setting.r),
        statistics=statistics,
        passing=passing,
        accumulates=setting.gradient_accumulation > 1,
    )
    flops = _init_flops(outline, start, chosen, setting), _step_flops(outline, chosen, setting)
    total = outline.parameters + factors + cores
    return Estimate(setting, outline, trainable, total, len(chosen), memory, _time(flops, setting, rate), flops)


def _check_ranks(start: costs.Start, chosen: Sequence[Matrix], setting: Setting) -> None:
    # Noise may be of any rank. Directions of a weight, or of what is measured of it, are counted.
    for matrix in chosen:
        if start.work != "free" and setting.r > min(matrix.m, matrix.n):
            raise BadRank(
                f"rank {setting.r} does not fit a {(matrix.m, matrix.n)} weight: choose 1 to {min(matrix.m, matrix.n)} "
                f"or exclude it (init {setting.init!r}, layer {matrix.name!r})"
            )


def _trainable(start: costs.Start, chosen: Sequence[Matrix], r: int) -> int:
    each = {"A": sum(x.n * x.count for x in chosen) * r, "B": sum(x.m * x.count for x in chosen) * r}
    return sum(each[letter] if letter in each else r * r * sum(x.count for x in chosen) for letter in start.trains)


# ------------------------------------------------------------------ time


def _step_flops(outline: Outline, chosen: Sequence[Matrix], setting: Setting) -> float:
    """Forward, backward through what is frozen, and three times the branches, for they train."""
    tokens = setting.batch_size * setting.max_length * setting.gradient_accumulation
    passes = 3.0 if setting.gradient_checkpointing else 2.0
    branch = sum(2.0 * setting.r * (x.m + x.n) * x.used * x.count * x.calls for x in chosen)
    return tokens * (passes * outline.flops(setting.max_length) + (passes + 1) * branch)


def _init_flops(outline: Outline, start: costs.Start, chosen: Sequence[Matrix], setting: Setting) -> float:
    work = sum(x.count * costs.work_of(start.work, x.m, x.n, setting.r).flops for x in chosen)
    if not start.needs:
        return work
    tokens = setting.calibration_batches * setting.batch_size * setting.max_length
    passing = outline.flops(setting.max_length) - outline.head_flops
    if start.looks_at_gradients:
        passing = (3.0 if setting.gradient_checkpointing else 2.0) * outline.flops(setting.max_length)
    return work + tokens * (passing + costs.statistics_flops(start.needs, chosen, leaders(chosen), setting.r))


def _time(flops: tuple[float, float], setting: Setting, rate: Speed | None) -> Time | None:
    if rate is None:
        return None
    init, step = (work / rate.flops for work in flops)
    return Time(init, step, None if setting.steps is None else step * setting.steps, rate)
