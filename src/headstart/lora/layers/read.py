"""Models that read a layer's weight and never call the layer, as Mamba, WavLM and DeBERTa do.

A branch beside the layer would take no part there: to such a model `layer.weight` is the weight with the change in it.
Its input is not seen, so dropout does not apply.
"""

from __future__ import annotations

import dis
import inspect
from functools import cache
from types import FunctionType

from torch import nn

# What is asked of a weight without its values; and where weights are filled.
_FACTS = {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda", "is_meta", "data"}
_FILLING = {"__init__", "reset_parameters", "_reset_parameters", "_init_weights", "init_weights", "tie_weights"}


def is_read(parent: nn.Module, leaf: str) -> bool:
    """Whether a module's own code computes with `self.<leaf>.weight`. torch's own modules are known: encoder.py."""
    return any(_reads(kind, leaf) for kind in type(parent).__mro__ if not kind.__module__.startswith("torch."))


@cache
def _reads(kind: type, leaf: str) -> bool:
    for name, function in vars(kind).items():
        if not isinstance(function, FunctionType) or name in _FILLING:
            continue
        code = inspect.unwrap(function).__code__
        if leaf not in code.co_names or "weight" not in code.co_names:
            continue
        steps = list(dis.get_instructions(code))
        for owner, weight, use in zip(steps, steps[1:], steps[2:], strict=False):
            read = owner.argval == leaf and weight.argval == "weight" and weight.opname == "LOAD_ATTR"
            if read and not (use.opname in ("LOAD_ATTR", "LOAD_METHOD") and use.argval in _FACTS):
                return True
    return False
