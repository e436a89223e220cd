"""A result as a picture: one panel for each of its groups of curves."""

from __future__ import annotations

from pathlib import Path

from benchmarks.theory.experiments import Result

GRID = "#d9d9d9"
COLORS = ("#3b6fb6", "#d1495b", "#2a9d8f", "#e09f3e", "#6c4f8c", "#6b6b6b")
DASHES = ("-", "--", ":", "-.", "-", "--")  # Where curves lie on one another, both are seen.

# By experiment: the x axis and its scale, and the scale of y.
AXES = {
    "alignment": ("step", "linear", {"angle": "linear"}),
    "spectral_start": ("samples over dimension, N/d", "log", {}),
    "convergence": ("step", "linear", {}),
    "condition": ("condition number κ", "log", {}),
    "relu": ("step", "linear", {}),
}
UNITS = {
    "alignment": {"angle": "‖(I − VVᵀ)·V₄(A)‖", "risk": "½‖BA − Δ‖²"},
    "convergence": {"preconditioned": "½‖BA − Δ‖²", "plain descent": "½‖BA − Δ‖²"},
    "relu": {"κ = 1": "‖BA − Δ‖/‖Δ‖", "κ = 10": "‖BA − Δ‖/‖Δ‖"},
}


def draw(name: str, result: Result, path: Path) -> None:
    """Write the picture of an experiment, in the format that the path's suffix names."""
    import matplotlib
    from matplotlib.figure import Figure  # Figure alone has no window and no global state.

    x_label, x_scale, y_scales = AXES[name]
    panels = result.curves
    figure = Figure(figsize=(3.8 * len(panels) + 2.4, 3.6), dpi=110, layout="constrained")
    for i, (title, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for color, dash, (label, curve) in zip(COLORS, DASHES, curves.items(), strict=False):
            points = [(x, y) for x, y in zip(result.x, curve, strict=False) if y is not None]
            marker = "o" if len(points) < 12 and len(result.x) < 12 else None
            axes.plot(
                *zip(*points, strict=True), dash, color=color, linewidth=1.8, label=label, marker=marker, markersize=4
            )
        axes.set(xlabel=x_label, ylabel=UNITS.get(name, {}).get(title, ""), title=title)
        axes.set_xscale(x_scale)
        axes.set_yscale(y_scales.get(title, "log"))
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if x_scale == "log":
            axes.set_xticks(result.x, labels=[f"{x:g}" for x in result.x], minor=False)
            axes.set_xticks([], minor=True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
