"""The best rank-r factors of a low-rank change: what merging two adapters by SVD asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import torch
from torch import Tensor

from benchmarks.measure import Call, Row, Scale, Target, measure, row
from benchmarks.subjects import linears, peft_config
from headstart import linalg

RANK, SHARES = 16, (0.7, 0.3)
WIDTHS = {"full": (1024, 2048), "quick": (1024,), "toy": (64,)}


def rows(scale: Scale) -> Iterator[Row]:
    for n in WIDTHS[scale]:
        generator = torch.Generator().manual_seed(0)
        B1, B2 = (torch.randn(n, RANK, generator=generator) for _ in SHARES)
        A1, A2 = (torch.randn(RANK, n, generator=generator) for _ in SHARES)
        B, A = torch.cat([SHARES[0] * B1, SHARES[1] * B2], dim=1), torch.cat([A1, A2])

        def peer(pairs: tuple[tuple[Tensor, Tensor], ...] = ((A1, B1), (A2, B2)), n: int = n) -> Call:
            model = two_adapters(pairs, n)
            return lambda: combined(model)

        arms = {"ours": lambda B=B, A=A: lambda: linalg.recompress(B, A, RANK), "peft": peer}
        costs = measure(arms, repeats=5 if scale != "toy" else 1)
        whole = B.double() @ A.double()
        small_B, small_A, _ = linalg.recompress(B, A, RANK)
        ours = float((whole - small_B.double() @ small_A.double()).norm() / whole.norm())
        low_A, low_B = combined(two_adapters(((A1, B1), (A2, B2)), n))
        theirs = float((whole - low_B.double() @ low_A.double()).norm() / whole.norm())
        target = Target(time=0.01 if scale == "full" else 1, also={"as close": ours <= theirs + 1e-4})
        note = f"distance from the sum: ours {ours:.4f}, PEFT {theirs:.4f}"
        yield row(f"two adapters of rank 16 into one, {n}×{n}", costs["ours"], costs["peft"], target, note)


def two_adapters(pairs: tuple[tuple[Tensor, Tensor], ...], n: int) -> Any:
    model = peft.get_peft_model(linears([torch.zeros(n, n)]), peft_config(), adapter_name="0")
    model.add_adapter("1", peft_config())
    (layer,) = (module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear))
    with torch.no_grad():
        for name, (A, B) in zip("01", pairs, strict=True):
            layer.lora_A[name].weight.copy_(A)
            layer.lora_B[name].weight.copy_(B)
    return model


def combined(model: Any) -> tuple[Tensor, Tensor]:
    model.add_weighted_adapter(["0", "1"], list(SHARES), "sum", combination_type="svd", svd_rank=RANK)
    (layer,) = (module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear))
    return layer.lora_A["sum"].weight.detach(), layer.lora_B["sum"].weight.detach()
