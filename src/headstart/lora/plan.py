"""What a calibration collects of which layer, and the empty statistics for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import BadOption, UnsupportedLayer
from headstart.linalg import named_generator
from headstart.lora import matrix
from headstart.lora.calibration import Found
from headstart.lora.config import LoraConfig
from headstart.lora.observe import is_called, shows_inputs
from headstart.lora.targets import Target, targets
from headstart.statistics import GradientSpectrum, GradientSum, InputSpectrum, Moments, Squares

INPUTS = ("inputs", "preserved")
GRADIENTS = ("gradient", "output_gradients", "output_squares")
WIDTH = 4  # directions kept of a gradient for each rank of the adapter


@dataclass(frozen=True)
class Plan:
    """What is collected where: every layer's needs, and the largest rank that asks for them."""

    targets: Mapping[str, Target]
    needs: Mapping[str, frozenset[str]]
    ranks: Mapping[str, int]
    seed: int
    dense: bool
    exact_inputs: bool

    @classmethod
    def of(cls, model: nn.Module, configs: Sequence[LoraConfig], dense: bool, exact_inputs: bool) -> Plan:
        chosen: dict[str, Target] = {}
        needs: dict[str, frozenset[str]] = {}
        ranks: dict[str, int] = {}
        for config in configs:
            for target in targets(model, config) if config.strategy.needs else ():
                chosen[target.name] = target
                needs[target.name] = needs.get(target.name, frozenset()) | set(config.strategy.needs)
                ranks[target.name] = max(ranks.get(target.name, 0), target.layout.block_rank(target.rank))
        if not configs:
            raise BadOption("no config is given, so nothing is to be measured: pass at least one LoraConfig")
        if not chosen:
            names = " and ".join(repr(config.strategy.name) for config in configs)
            raise BadOption(f"{names} looks at no data: leave the calibration data out")
        for name, target in chosen.items():
            others = needs[name] - {"gradient"}
            seen = is_called(target) or (shows_inputs(target) and others <= set(INPUTS))
            if others and (not seen or target.layout.kind == "embedding"):
                raise UnsupportedLayer(
                    f"the inputs of {name!r} are token ids, or are not seen (it is read, or has a forward of its own): "
                    "exclude it, or choose an init that needs its gradient alone"
                )
        return cls(chosen, needs, ranks, configs[0].seed, dense, exact_inputs)

    def asks(self, *names: str) -> bool:
        return any(needs & set(names) for needs in self.needs.values())

    def empty(self, leaders: Mapping[str, str], device: torch.device | None = None) -> Found:
        """Statistics of nothing, for every layer that runs; layers that are given the same inputs share theirs."""
        running = {n: t for n, t in self.targets.items() if n in leaders or not shows_inputs(t)}
        found: Found = {name: {} for name in running}
        for name, target in running.items():
            followers = [n for n, leader in leaders.items() if leader == name]
            shared = {need for n in followers for need in self.needs[n] & set(INPUTS)}
            place = device or matrix.parameter_of(target.module, target.parameter).device
            blocks = target.layout.blocks(matrix.outline(target.module, target.parameter))
            for need in sorted(shared | (self.needs[name] - set(INPUTS))):
                found[name][need] = [
                    self._new(need, f"{name}:{i}", block, self.ranks[name], place) for i, block in enumerate(blocks)
                ]
        for name, leader in leaders.items():
            target = self.targets[name]
            count = len(target.layout.blocks(matrix.outline(target.module, target.parameter)))
            for need in self.needs[name] & set(INPUTS):
                own = found[leader][need]
                # The parts of a fused projection multiply the same rows.
                found[name][need] = own[:1] * count if target.layout.copies > 1 or len(own) != count else own
        return found

    def _new(self, need: str, name: str, block: Tensor, rank: int, device: torch.device) -> Any:
        m, n = block.shape
        generator = named_generator(self.seed, need, name)
        if need == "gradient":
            kind = GradientSum if self.dense else GradientSpectrum
            return kind.empty(m, n, WIDTH * rank, generator, device)
        if need == "output_gradients":
            return Moments.empty(m, device)
        if need == "output_squares":
            return Squares.empty(m, device)
        return (
            Moments.empty(n, device) if self.exact_inputs else InputSpectrum.empty(n, WIDTH * rank, generator, device)
        )
