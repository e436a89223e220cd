"""What each start does, as rows of a table."""

from __future__ import annotations

from typing import Any

from headstart.inits import get, names
from headstart.inits.small import on_a_small_matrix

__all__ = ["on_a_small_matrix", "table"]


def table() -> list[dict[str, Any]]:
    """One row a registered start, of plain values."""
    rows = []
    for name in names():
        strategy = get(name)[0]
        start = on_a_small_matrix(strategy, {})
        rows.append(
            {
                "name": name,
                "needs": ["the weight"] * strategy.reads_weight + list(strategy.needs),
                "anchored": start.anchored,
                "trains": " and ".join([*sorted(set("AB") - start.frozen), *["R"] * (start.core is not None)]),
                "options": dict(strategy.options),
                "fact": strategy.fact,
                "paper": strategy.paper,
            }
        )
    return rows
