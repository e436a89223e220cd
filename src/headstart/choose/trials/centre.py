"""Where an arm's grid of rates is centred: at the rate that its start predicts."""

from __future__ import annotations

from headstart.lora.adapter import Adapter

BASE = 1e-3  # Of plain LoRA. A grid reaches 32 times below and above its centre, and its search further.


def centre(adapter: Adapter) -> float:
    """The rate round which an installed adapter's rates are searched."""
    return float(adapter.learning_rate(base=BASE))
