"""PiSSA and OLoRA on single weights: time, memory, and how far the result is from the best one there is.

The weights have a spectrum as slow as a language model's, or are SmolLM2's own. The truth is the spectrum of the
weight as it is stored, in float64. Memory is what torch holds of what it allocates, to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import headstart as hs
from benchmarks.measure import Arm, Cost, Row, Scale, Target, measure, once, row
from benchmarks.subjects import attach_ours, attach_peft, linears, singular_values, smollm2, weight

SIZES = {
    "full": ((4096, 4096), (4096, 11008)),
    "quick": ((1024, 1024), (1024, 2816)),
    "toy": ((64, 64), (64, 96)),
}
RANKS = {"full": (8, 16, 32, 128), "quick": (8, 32), "toy": (4,)}
FAST = "pissa_niter_16"


@dataclass(frozen=True)
class Work:
    """Weights to decompose, and their leading singular values."""

    name: str
    weights: Sequence[Tensor]
    truth: Sequence[Tensor]

    def arms(self, r: int, **inits: tuple[str, str]) -> dict[str, Arm]:
        """Arms by name, given as (library, init)."""
        attach = {"headstart": attach_ours, "peft": attach_peft}
        return {name: attach[who](lambda: linears(self.weights), init=init, r=r) for name, (who, init) in inits.items()}


def rows(scale: Scale) -> Iterator[Row]:
    for size in SIZES[scale]:
        for dtype in (torch.float32, torch.bfloat16):
            work = _synthetic(size, dtype, max(RANKS[scale]))
            yield from _pissa(work, scale, full=dtype == torch.float32 and scale != "quick")
            yield from _olora(work, scale, dtype)
    if scale != "toy":
        yield from _pissa(_real(scale), scale, full=True)


def _synthetic(size: tuple[int, int], dtype: torch.dtype, largest: int) -> Work:
    W = weight(*size).to(dtype)
    name = f"{size[0]}×{size[1]} {str(dtype)[6:]}"
    return Work(name, [W], [singular_values(W, largest)])


def _real(scale: Scale) -> Work:
    layers = (0, 7, 15, 22, 29) if scale == "full" else (15,)
    modules = smollm2(torch.float32).named_modules()
    inside = [m for n, m in modules if isinstance(m, nn.Linear) and any(f".{i}." in n for i in layers)]
    weights = [module.weight.detach() for module in inside]
    name = f"the {len(weights)} weights of {len(layers)} layers of SmolLM2-135M, float32"
    return Work(name, weights, [singular_values(W, max(RANKS[scale])) for W in weights])


def _pissa(work: Work, scale: Scale, full: bool) -> Iterator[Row]:
    if full:
        everything = once(work.arms(16 if scale != "toy" else 4, peft=("peft", "pissa"))["peft"])
    for r in RANKS[scale]:
        arms = work.arms(r, ours=("headstart", "pissa"), fast=("headstart", FAST), peft=("peft", FAST))
        costs = measure(arms, repeats=3, exact=True)
        found = {name: _quality(_result(arm, r), work) for name, arm in arms.items()}
        note = f"energy lost {found['ours'].loss:.1e}, PEFT {found['peft'].loss:.1e}"
        target = Target(
            time=1.1,
            also={
                "singular values to 1e-4": found["ours"].error <= 1e-4,
                "energy loss ≤ 1e-6": found["ours"].loss <= 1e-6,
                **_bounded(costs["ours"], work, r),
            },
        )
        yield row(f"PiSSA, certified, beside {FAST}: {work.name}, r={r}", costs["ours"], costs["peft"], target, note)
        target = Target(time=0.4, also={"as accurate": found["fast"].loss <= found["peft"].loss})
        note = f"energy lost {found['fast'].loss:.1e}, PEFT {found['peft'].loss:.1e}"
        yield row(f"PiSSA as {FAST}: {work.name}, r={r}", costs["fast"], costs["peft"], target, note)
        if full:
            target = Target(time=1 / 25)
            yield row(f"PiSSA, certified, beside pissa: {work.name}, r={r}", costs["ours"], everything, target)


def _bounded(cost: Cost, work: Work, r: int) -> dict[str, bool]:
    """Whether the memory is that of the basis, one block of rows, and the results."""
    if cost.peak is None:
        return {}
    short, long = sorted(max((W.shape for W in work.weights), key=math.prod))
    results = sum(4 * r * sum(W.shape) for W in work.weights)
    numbers = 10 * (r + 16) * short + 2 * r * long + (1 << 21) + results
    return {f"≤ {4 * numbers / 1e6:.0f} MB (basis, block, results)": cost.peak <= 4 * numbers / 1e6}


def _olora(work: Work, scale: Scale, dtype: torch.dtype) -> Iterator[Row]:
    for r in RANKS[scale][-1:] if scale == "toy" else (16, RANKS[scale][-1]):
        arms = work.arms(r, ours=("headstart", "olora"), peft=("peft", "olora"))
        costs = measure(arms, repeats=3, exact=True)
        # At r = 128 the factors and their anchors alone are a twentieth of what PEFT needs.
        target = Target(time=1 / 90 if dtype == torch.float32 else 1 / 40, memory=1 / 50 if r == 16 else None)
        lost = {name: _quality(_result(arm, r), work).loss for name, arm in arms.items()}
        note = f"share of the best energy held: {1 - lost['ours']:.4f}, PEFT {1 - lost['peft']:.4f}"
        yield row(f"OLoRA: {work.name}, r={r}", costs["ours"], costs["peft"], target, note)


@dataclass(frozen=True)
class Quality:
    """How far from the best.

    Attributes:
        error: the largest relative error of a singular value. loss: the share of the best energy that is not held.
    """

    error: float
    loss: float


def _result(arm: Arm, r: int) -> list[tuple[Tensor, Tensor]]:
    """The factors that an arm puts on its layers."""
    torch.manual_seed(0)  # PEFT draws from the global state.
    adapted: Any = arm()()
    if isinstance(adapted, hs.Adapter):
        pairs = [layer.factors for layer in adapted.layers().values()]
    else:
        layers = [
            module for module in adapted.modules() if type(module).__name__ == "Linear" and "lora_A" in module._modules
        ]
        pairs = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]
    return [(A.detach().double(), B.detach().double()) for A, B in pairs]


def _quality(pairs: Sequence[tuple[Tensor, Tensor]], work: Work) -> Quality:
    errors, held, best = [], 0.0, 0.0
    for (A, B), W, truth in zip(pairs, work.weights, work.truth, strict=True):
        top = truth[: len(A)]
        S = (A.norm(dim=1) * B.norm(dim=0)).sort(descending=True).values
        errors.append(float(((S - top) / top).abs().max()))
        Q = torch.linalg.qr(B).Q
        held += sum(float((Q.T @ columns.double()).square().sum()) for columns in W.split(512, dim=1))
        best += float(top.square().sum())
    return Quality(max(errors), 1 - held / best)
