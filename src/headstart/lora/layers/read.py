"""Models that read a layer's weight and never call the layer, as Mamba, WavLM and DeBERTa do.

A branch beside the layer would take no part there: to such a model `layer.weight` is the weight with the change in it.
Its input is not seen, so dropout does not apply. What is looked for is `self.<layer>.weight` in the code of the module
that holds the layer; under another name, or from farther away, it is not seen.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator
from functools import cache
from types import CodeType, FunctionType

from torch import nn

from headstart.lora import quantized

# What is asked of a weight without its values; and where weights are filled.
_FACTS = {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_cuda", "is_meta"}
_FILLING = {"__init__", "reset_parameters", "_reset_parameters", "_init_weights", "init_weights", "tie_weights"}
_EMPTY = {"EXTENDED_ARG", "CACHE", "NOP"}


def is_read(module: nn.Module, holders: Iterable[tuple[nn.Module, str]]) -> bool:
    """Whether a module that holds a layer computes with its weight itself. torch's own are known: encoder.py.

    Args:
        holders: every (parent, attribute) under which the layer stands in the model.
    """
    weight = module._parameters.get("weight")
    if weight is None or quantized.is_quantized(weight):
        return False
    kinds = ((kind, leaf) for parent, leaf in holders for kind in type(parent).__mro__)
    return any(_reads(kind, leaf) for kind, leaf in kinds if not kind.__module__.startswith("torch."))


@cache
def _reads(kind: type, leaf: str) -> bool:
    functions = (_function(value) for name, value in vars(kind).items() if name not in _FILLING)
    return any(_computes(code, leaf) for found in functions if found is not None for code in _codes(found.__code__))


def _function(value: object) -> FunctionType | None:
    """The function behind a method, a property, or what decorates one."""
    for name in ("fget", "__func__"):
        value = getattr(value, name, None) or value
    inner = inspect.unwrap(value) if isinstance(value, FunctionType) else None
    return inner if isinstance(inner, FunctionType) else value if isinstance(value, FunctionType) else None


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions within it."""
    yield code
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _codes(one)


def _computes(code: CodeType, leaf: str) -> bool:
    """Whether `self.<leaf>.weight` is used for more than what it says without its values."""
    if leaf not in code.co_names or "weight" not in code.co_names:
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname not in _EMPTY]
    for i in range(1, len(steps) - 2):
        owner, weight, use = steps[i : i + 3]
        if (owner.argval, weight.argval, weight.opname) != (leaf, "weight", "LOAD_ATTR"):
            continue
        fact = use.opname in ("LOAD_ATTR", "LOAD_METHOD") and use.argval in _FACTS
        # A use that is the last step returns the weight.
        is_none = "NONE" in use.opname or (
            use is not steps[-1] and use.argval is None and steps[i + 3].opname == "IS_OP"
        )
        its_type = i > 1 and steps[i - 2].argval == "isinstance"
        if not (fact or is_none or its_type):
            return True
    return False
