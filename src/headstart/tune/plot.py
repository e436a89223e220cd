"""The loss of a run as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headstart.files.atomic import write_files

TRAINED, HELD_OUT, GRID = "#3b6fb6", "#d1495b", "#d9d9d9"


def plot_losses(lines: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Draw the training loss, a running mean through it, and the held-out loss, into a PNG.

    Args:
        lines: of metrics.jsonl.
        path: where the picture goes, whole or not at all.
    """
    from matplotlib.figure import Figure  # Figure alone has no window and no global state.
    from matplotlib.ticker import MaxNLocator

    trained = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if trained:
        steps, losses = zip(*trained, strict=True)
        axes.plot(steps, losses, color=TRAINED, alpha=0.3, linewidth=1)
        axes.plot(steps, means := running_mean(losses), color=TRAINED, linewidth=2, label=f"training {means[-1]:.2f}")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        label = f"held out {losses[0]:.2f} → {losses[-1]:.2f}"
        axes.plot(steps, losses, color=HELD_OUT, linewidth=2, marker="o", markersize=4, label=label)
    axes.set(xlabel="step", ylabel="loss, nats a token", title=title)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, labelcolor="linecolor", handlelength=1.2)
    write_files(path.parent, {path.name: lambda fresh: figure.savefig(fresh, format="png")})


def running_mean(values: Sequence[float], share: float = 0.1) -> list[float]:
    """The exponential mean over about a tenth of the run, corrected for its start."""
    keep = 1 - 1 / max(1.0, share * len(values))
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means
