"""The init report: what was decided when an adapter was started, layer by layer.

It is an object, it is saved beside the adapter, and the command line prints it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headstart.errors import BadOption
from headstart.lora.rates import Rate, Reach, predicted


@dataclass(frozen=True)
class LayerReport:
    """One layer's start.

    Attributes:
        name: the layer's full name; shape: of its weight, as stored.
        rank: the rank it was given; scaling: its s.
        anchored: whether frozen copies of the factors keep the function.
        facts: what the strategy found out, one mapping for each block of the weight.
        reaches: how far a step of the factors moves the output, one for each block.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    scaling: float
    anchored: bool
    facts: tuple[Mapping[str, Any], ...] = ()
    reaches: tuple[Reach, ...] = ()


@dataclass(frozen=True)
class InitReport:
    """A whole adapter's start.

    Attributes:
        strategy: its name; options: those that were set; seed: of its random draws.
        layers: one report each.
        seconds: of wall time.
        data: the batches, tokens and loss that it was found in, for a strategy that looks at data.
    """

    strategy: str
    options: Mapping[str, Any]
    seed: int
    layers: tuple[LayerReport, ...]
    seconds: float
    data: Mapping[str, Any] | None = None

    @property
    def worst(self) -> dict[str, Any]:
        """The weakest certificate among the layers: the largest residual and energy loss, and the routes taken."""
        facts = [fact for layer in self.layers for fact in layer.facts]
        found: dict[str, Any] = {}
        for name in ("residual", "energy_loss"):
            values = [fact[name] for fact in facts if fact.get(name) is not None]
            if values:
                found[name] = max(values)
        routes = sorted({str(fact["route"]) for fact in facts if fact.get("route")})
        return {**found, "routes": routes} if routes else found

    def learning_rate(self, base: float | None = None, *, steps: int | None = None) -> Rate:
        """The peak rate of AdamW that fits this start, and why.

        Args:
            base: the rate that fits plain LoRA (kaiming, r = 16, s = 1) on this model and run length; guessed from the
                layers' width where left out.
            steps: of the run, where it is known: in a short one a large start wants more of its rate taken off.
        """
        if base is not None and not 0 < base < math.inf:
            raise BadOption(f"base is {base!r}: pass the rate that fits plain LoRA, as 2e-4")
        return predicted(self.strategy, (reach for layer in self.layers for reach in layer.reaches), base, steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        layers = [{**vars(layer), "reaches": [vars(reach) for reach in layer.reaches]} for layer in self.layers]
        return {**vars(self), "options": dict(self.options), "layers": layers}

    def to_json(self) -> str:
        """The same as text, one line a layer."""
        values = self.to_dict()
        # json indents at a tenth of the speed.
        layers = ",\n".join(json.dumps(layer, default=str) for layer in values.pop("layers"))
        return f'{json.dumps(values, default=str)[:-1]}, "layers": [\n{layers}\n]}}\n'

    def __str__(self) -> str:
        anchored = sum(layer.anchored for layer in self.layers)
        lines = [f"{self.strategy}: {len(self.layers)} layers in {self.seconds:.2f} s, {anchored} anchored"]
        if self.data is not None:
            lines.append(f"  data: {self.data['batches']} batches, {self.data['tokens']:,} tokens")
        lines += [f"  {name}: {value}" for name, value in self.worst.items()]
        for layer in self.layers:
            lines += [f"  {layer.name}: {fact['note']}" for fact in layer.facts if "note" in fact]
        return "\n".join(lines)
