"""Where a start points, layer by layer, in two numbers.

moved      ‖s·B₀·A₀‖ / ‖W‖        how large the start is beside the weight (anchored or not)
captured   ‖W·V‖² / ‖W‖²          V: an orthonormal basis of A₀'s rows, (n, r): the share of W's energy that lies
                                  in the directions which A₀ reads. Random ones hold r/n of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headstart.lora.adapter import Adapter
from headstart.lora.layers import LoraLayer


@torch.no_grad()
def pictures(adapter: Adapter) -> list[dict[str, Any]]:
    """One entry a layer: its name, `moved` and `captured`. For an adapter that has not been trained."""
    found = []
    for name, layer in adapter.layers().items():
        moved, captured = _layer(layer)
        found.append({"layer": name, "moved": moved, "captured": captured})
    return found


def _layer(layer: LoraLayer) -> tuple[float, float]:
    blocks = layer.layout.blocks(layer.frozen_values())
    pairs = layer.layout.unpack(*layer.plain_factors)
    product, seen, whole = 0.0, 0.0, 0.0
    for block, (A, B) in zip(blocks, pairs, strict=True):
        A, B = A.detach().float(), B.detach().float()
        product += float(((B.T @ B) * (A @ A.T)).sum())
        seen += _energy_in(block, A)
        whole += float(torch.linalg.vector_norm(block, dtype=torch.float32)) ** 2
    if whole == 0:
        return 0.0, 0.0
    return layer.scaling * (max(product, 0.0) / whole) ** 0.5, min(1.0, seen / whole)


def _energy_in(W: Tensor, A: Tensor) -> float:
    basis = torch.linalg.qr(A.T).Q.to(W.dtype if W.is_floating_point() else torch.float32)
    return float(torch.linalg.vector_norm(W @ basis, dtype=torch.float32)) ** 2
