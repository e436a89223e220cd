"""An anatomy as one self-contained HTML page: no script, no request, light and dark, for a phone and for paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from headstart.files.doctor.anatomy import Anatomy, LayerAnatomy

WIDTH, HEIGHT = 96, 24  # of a spectrum's picture


@dataclass(frozen=True)
class Row:
    """One kind of layer through the depth of the model: its layers by block, None where a block has none.

    Attributes:
        kind: what the layers' names have in common; cells: one a block.
    """

    kind: str
    cells: tuple[LayerAnatomy | None, ...]

    @property
    def layers(self) -> list[LayerAnatomy]:
        return [cell for cell in self.cells if cell is not None]


def grid(layers: Sequence[LayerAnatomy]) -> tuple[list[str], list[Row]]:
    """The blocks of a model and its kinds of layer; what has no number stands in a block of its own."""
    placed: dict[str, dict[str, LayerAnatomy]] = {}
    for layer in layers:
        match = re.fullmatch(r"(.*?)\.(\d+)\.(.+)", layer.name)
        kind, block = (match[3], match[2]) if match else (layer.name, "")
        while block in placed.get(kind, {}):  # an encoder's block 0 and a decoder's
            kind = f"{kind}′"
        placed.setdefault(kind, {})[block] = layer
    blocks = sorted({block for row in placed.values() for block in row}, key=lambda b: (b == "", len(b), b))
    return blocks, [Row(kind, tuple(row.get(block) for block in blocks)) for kind, row in placed.items()]


def share(layer: LayerAnatomy) -> float:
    """What the picture shows: ‖ΔW‖/‖W‖ where the base is known, otherwise ‖ΔW‖."""
    return layer.norm if layer.relative is None else layer.relative


def outline(spectrum: Sequence[float]) -> str:
    """The SVG path of a spectrum: one step for each singular value, relative to the largest."""
    top = max(spectrum, default=0.0) or 1.0
    # No more steps than there are points to see them on.
    kept = [spectrum[i * len(spectrum) // min(len(spectrum), WIDTH)] for i in range(min(len(spectrum), WIDTH))]
    step = WIDTH / max(1, len(kept))
    points = [f"M0 {HEIGHT}"]
    for index, value in enumerate(kept):
        height = HEIGHT * (1 - value / top)
        points.append(f"V{height:.1f}H{(index + 1) * step:.1f}")
    return "".join(points) + f"V{HEIGHT}Z"


def shown(value: object) -> str:
    """A value in words; of long numbers the leading digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def to_html(found: Anatomy) -> str:
    """The page. Whatever a stranger wrote is escaped."""
    from jinja2 import Environment

    source = resources.files("headstart.files.doctor").joinpath("anatomy.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    blocks, rows = grid(found.layers)
    top = max((share(layer) for layer in found.layers), default=0.0) or 1.0
    measured = any(layer.relative is not None for layer in found.layers)
    functions = {"share": share, "shown": shown, "outline": outline}
    sizes = {"width": WIDTH, "height": HEIGHT, "top": top}
    return template.render(found=found, blocks=blocks, rows=rows, measured=measured, **functions, **sizes)
