"""Bytes, part by part: what stands, what a pass keeps, and the fullest moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from headstart.choose import costs
from headstart.choose.setting import PACKED, Setting
from headstart.choose.shapes import SIZES, Matrix, Outline, leaders

# TRL projects at most so many tokens to so many words of the vocabulary at once, in float32.
TILE = (4096, 32768)


@dataclass(frozen=True)
class Memory:
    """Bytes, by part.

    Attributes:
        weights: of the frozen model. adapter: the factors, and the frozen copies of an anchored start.
        gradients: of what trains. adam: the optimiser's moments.
        activations: kept for the backward pass. loss: the logits, and what is made of them at once.
        working: what the backward pass of one block, or one decomposition, holds on top.
        statistics: what a calibration keeps. passing: what its passes hold on top.
    """

    weights: int
    adapter: int
    gradients: int
    adam: int
    activations: int
    loss: int
    working: int
    decomposition: int = 0
    statistics: int = 0
    passing: int = 0
    accumulates: bool = False

    @property
    def training(self) -> int:
        """The fullest moment of a step: the beginning of its backward pass, or the optimiser's turn."""
        standing = self.weights + self.adapter + self.adam + self.gradients * self.accumulates
        backward = self.activations + max(self.loss, self.working)
        return standing + max(backward, self.gradients * (not self.accumulates))

    @property
    def init(self) -> int:
        """The fullest moment of the init: the pass over the data, or the last decomposition."""
        return self.weights + self.statistics + max(self.passing, self.adapter + self.decomposition)

    @property
    def peak(self) -> int:
        return max(self.training, self.init)


def weights_of(outline: Outline, setting: Setting) -> int:
    whole = SIZES[setting.dtype]
    packed = 0
    if setting.quantised is not None:
        # A checkpoint that was stored so has packed its experts, too; quantising while loading leaves them.
        stored = outline.quantised is not None
        packed = sum(x.size for x in outline.matrices if x.linear or (stored and x.count > 1 and not x.convolution))
    return int((outline.parameters - packed) * whole + packed * PACKED.get(setting.quantised or "", 0.0))


def replaced_of(start: costs.Start, chosen: Sequence[Matrix], setting: Setting) -> int:
    """The quantised form that a start puts in the place of float weights: held as numbers, beside what it replaces."""
    return SIZES[setting.dtype] * sum(x.size for x in chosen) if start.base and setting.quantised is None else 0


def activations_of(outline: Outline, setting: Setting, chosen: Sequence[Matrix]) -> int:
    """What a pass keeps: the model's own, the inputs of adapted layers that nobody kept, and h = A·x of each."""
    whole, tokens = SIZES[setting.dtype], setting.batch_size * setting.max_length
    own = outline.kept.total(setting.batch_size, setting.max_length, whole, setting.padded)
    own += whole * tokens * _inputs(chosen)
    if setting.gradient_checkpointing:  # The inputs of all blocks, and the inside of one at a time.
        own = own / max(outline.depth, 1) + whole * tokens * outline.hidden * outline.depth
    within = sum(setting.r * x.count * x.used * x.calls for x in chosen)
    if setting.gradient_checkpointing:
        within /= max(outline.depth, 1)
    return int(own + whole * tokens * within)


def _inputs(chosen: Sequence[Matrix]) -> float:
    """Numbers a token that adapted layers keep of what they are given, what several are given once."""
    first = leaders(chosen)
    return sum(x.n * x.used * x.count * x.calls for x in chosen if not x.keeps and first[x.name] == x.name)


def loss_of(outline: Outline, setting: Setting, how: str) -> int:
    """What stands of the logits at once: log-probabilities and two gradients of theirs, or one tile of TRL's."""
    tokens = setting.batch_size * setting.max_length
    if how == "tiled":
        return 4 * min(tokens, TILE[0]) * min(outline.vocabulary, TILE[1])
    return 3 * 4 * tokens * outline.vocabulary


def working_of(outline: Outline, setting: Setting) -> int:
    """What the backward pass of one block makes and drops, and one matrix unpacked where they are quantised."""
    unpacked = max((x.m * x.n for x in outline.matrices if x.linear), default=0) if setting.quantised else 0
    whole = SIZES[setting.dtype]
    return int(whole * (setting.batch_size * setting.max_length * outline.working + unpacked))


def calibration_of(outline: Outline, start: costs.Start, chosen: Sequence[Matrix], setting: Setting) -> tuple[int, int]:
    """What the passes over the data hold, and the statistics that are kept of it."""
    if not start.needs:
        return 0, 0
    statistics = costs.statistics_bytes(start.needs, chosen, leaders(chosen), setting.r)
    statistics += costs.halves_bytes(start.needs, chosen, setting.r)
    if start.looks_at_gradients and outline.causal:
        rows = max(1, costs.PIECE // setting.max_length)
        setting = replace(setting, batch_size=min(setting.batch_size, rows))
    whole, tokens = SIZES[setting.dtype], setting.batch_size * setting.max_length
    if start.looks_at_gradients:
        largest = max(x.m * x.n for x in chosen)
        passing = outline.kept.total(setting.batch_size, setting.max_length, whole, setting.padded)
        passing += whole * tokens * _inputs(chosen)
        if setting.gradient_checkpointing:
            passing = passing / max(outline.depth, 1) + whole * tokens * outline.hidden * outline.depth
        at_once = max(loss_of(outline, setting, "whole"), working_of(outline, setting) + 2 * 4 * largest)
        return int(passing + at_once), statistics
    # Without gradients a block's tensors are dropped as the next is made; second moments multiply float32 rows.
    widest = max(x.n for x in chosen)
    return int(whole * tokens * (outline.working + outline.hidden) + 4 * tokens * widest * (whole < 4)), statistics


def decomposition_of(start: costs.Start, chosen: Sequence[Matrix], r: int) -> int:
    """The dearest weight; and of inputs that several layers share, the directions that were found once, in float64."""
    dearest = max(costs.work_of(start.work, x.m, x.n, r).bytes for x in chosen)
    if start.work != "leading" or "inputs" not in start.needs:
        return dearest
    first = leaders(chosen)
    return dearest + sum(2 * 8 * r * x.n * x.count for x in chosen if first[x.name] == x.name)
