"""The large product of a layer: W·x, the branch, gain and bias, written once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.lora.branch.gain import rescale

# Rows of X and of W that are copied to float32 at a time (`_multiply_wide`).
TOKENS, ROWS = 1024, 512

# Below this many tokens, casting W to float32 costs more than the slow 16-bit product that it avoids.
FEW_TOKENS = 32


def multiply(
    left: tuple[Tensor, ...],
    right: tuple[Tensor, ...],
    out: Float[Tensor, "T m"],
    *,
    gain: Float[Tensor, " m"] | None = None,
    bias: Float[Tensor, " m"] | None = None,
) -> Tensor:
    """out = gain·Σᵢ leftᵢ·rightᵢᵀ + bias, with leftᵢ: (T, kᵢ) and rightᵢ: (m, kᵢ)."""
    if out.is_cpu and len(out) >= FEW_TOKENS and _emulated(out.dtype):
        return _multiply_wide(left, right, out, gain, bias)
    (first, *others), (W, *factors) = left, right
    W = W.to(out.dtype)
    if bias is None or gain is not None:
        torch.mm(first, W.t(), out=out)
    else:
        torch.addmm(bias.to(out.dtype), first, W.t(), out=out)
    for a, b in zip(others, factors, strict=True):
        out.addmm_(a, b.t())
    return out if gain is None else rescale(out, gain, bias, out)


def _multiply_wide(
    left: tuple[Tensor, ...], right: tuple[Tensor, ...], out: Tensor, gain: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The same as float32 products of copied tiles, for a CPU that has to emulate 16-bit ones.

    There [X | h]·[W | B]ᵀ is a single product, four times as fast, and everything is rounded once. The copies are a few
    percent of the work and bounded by `TOKENS` and `ROWS`.
    """
    width = sum(a.shape[1] for a in left)
    L = out.new_empty(min(TOKENS, len(out)), width, dtype=torch.float32)
    R = out.new_empty(min(ROWS, out.shape[1]), width, dtype=torch.float32)
    if right[0].stride(0) == 1:
        R = R.view(width, -1).t()  # as W lies in memory: a copy that transposes costs as much as the product
    for t in range(0, len(out), TOKENS):
        tokens = _side_by_side([a[t : t + TOKENS] for a in left], L)
        for i in range(0, out.shape[1], ROWS):
            tile = tokens @ _side_by_side([b[i : i + ROWS] for b in right], R).t()
            if gain is not None:
                tile *= gain[i : i + ROWS]
            if bias is not None:
                tile += bias[i : i + ROWS]
            out[t : t + TOKENS, i : i + ROWS] = tile
    return out


def _side_by_side(parts: list[Tensor], buffer: Tensor) -> Tensor:
    """[part | part | …], cast. By copies: `torch.cat` casts what is transposed one number at a time."""
    filled = buffer[: len(parts[0])]
    for part, columns in zip(parts, filled.split([part.shape[1] for part in parts], dim=1), strict=True):
        columns.copy_(part)
    return filled


@functools.cache
def _emulated(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies `dtype` in software. Known for x86, and to PyTorch versions that can tell."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    native = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}.get(dtype, ())
    return capabilities.get("architecture") == "x86_64" and bool(native) and not any(map(capabilities.get, native))
