r"""Adapters that need a changed base, as their own frameworks saved them: made to mean something on the original one.

PiSSA, OLoRA, CorDA and LoRA-GA, as PEFT runs them, take s·B₀·A₀ from the frozen weight and save A and B alone:

    ΔW = s·B·A − s·B₀·A₀ = [s·B | −s·B₀]·[A ; A₀]

A₀ and B₀ are read from a folder saved before training, or made again from the base's weight where they are a function
of it:

    PiSSA      s·B₀·A₀ = U_r·S_r·V_rᵀ
    OLoRA      s·B₀·A₀ = s·Q_r·R_r = s·Q_r·Q_rᵀ·W

The other starts looked at data or at chance. LoftQ replaces W by its quantised form, which is no low-rank change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from headstart.errors import NotPortable, WrongBase
from headstart.files.adapter import AdapterFile
from headstart.files.doctor.deviation import REPEATS, Block, repetition, started
from headstart.files.load import sites_of
from headstart.files.portable.change import Change
from headstart.lora import matrix

Pair = tuple[Tensor, Tensor]
_REMADE = ("pissa", "olora")


def changes_of(
    file: AdapterFile, changes: Sequence[Change], base: nn.Module | None, initial: Mapping[str, Pair] | None
) -> list[Change]:
    """The changes on the original base.

    Args:
        initial: (A₀, B₀) by path, where they were saved.

    Raises:
        NotPortable: if A₀ and B₀ cannot be known.
    """
    init = str(file.config["init_lora_weights"]).lower()
    if init == "loftq":
        raise NotPortable(
            f"{file.folder} started with LoftQ: it stands on a quantised base, and means nothing on the float one. "
            "Serve it on that base, or merge it there"
        )
    if initial is not None:
        return [_difference(change, _scaled(initial[change.path], change.scaling)) for change in changes]
    if init not in _REMADE:
        why = "drew at random" if re.fullmatch(r"pissa_niter_\d+", init) else "made from data"
        raise NotPortable(
            f"{file.folder} started with {init!r}, which replaced the base's weights by what it {why}. Pass `initial`, "
            "the folder of the adapter saved before training; without it, what was trained cannot be known"
        )
    if base is None:
        raise NotPortable(
            f"{file.folder} started with {init!r}, which replaced the base's weights: pass the base (or `initial`, the "
            "adapter saved before training), and the start is made again from it"
        )
    sites = sites_of(base, file)
    return [
        change if change.embedding else _difference(change, _remade(init, change, *sites[change.path]))
        for change in changes
    ]


def _difference(change: Change, start: Pair) -> Change:
    """s·B·A less a start, as one pair. Where the two agree the factors are close: `stored` sees to it."""
    A, B = change.product()
    A0, B0 = (tensor.flatten(1).double() for tensor in start)
    return change.with_factors(torch.cat([A, A0]), torch.cat([B, -B0], 1))


def _scaled(start: Pair, scaling: float) -> Pair:
    A, B = start
    return A, B.double() * scaling


def _remade(init: str, change: Change, module: nn.Module, parameter: str) -> Pair:
    """A₀ and s·B₀ from the weight."""
    if not matrix.is_linear(module) or (init == "olora" and matrix.is_conv1d(module)):
        raise NotPortable(f"{change.name!r}: PEFT has no {init!r} for a {type(module).__name__}")
    (W,) = matrix.layout(module, parameter).blocks(matrix.values(module, parameter))
    block = Block(W, *change.product())
    if (cosine := repetition(block)) < REPEATS:
        raise WrongBase(
            f"{change.name!r} holds no {init!r} start of this base (cosine {cosine:.2f}, near 1 expected): pass the "
            "base that it was trained on. If the adapter was converted already, set its init_lora_weights to true"
        )
    return started(block, init, change.rank, change.scaling)
