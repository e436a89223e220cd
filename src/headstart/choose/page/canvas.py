"""A plot as an SVG: axes, lines, bands, points. What it looks like is the page's style sheet's business."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from headstart.choose.page.scales import Scale

SERIES = 8  # colours, after which they begin again, with other marks
Point = tuple[float, float]


class Canvas:
    """A plot of a given size with two axes.

    Args:
        width, height: in the units in which text is 12 to 13 high.
        says: what a screen reader reads.
        left: room for the names of the ticks.
    """

    def __init__(self, width: int, height: int, x: Scale, y: Scale, says: str, left: int = 52) -> None:
        self.x, self.y = x, y
        self.left, self.right, self.top, self.bottom = left, width - 14, 30, height - 44
        self.svg = Element("svg", viewBox=f"0 0 {width} {height}", role="img", xmlns="http://www.w3.org/2000/svg")
        self.svg.set("aria-label", says)

    def place(self, x: float, y: float) -> Point:
        """Where a point of the plot is in the picture."""
        across, up = self.right - self.left, self.bottom - self.top
        return round(self.left + across * self.x(x), 1), round(self.bottom - up * self.y(y), 1)

    def axes(self, x_title: str, y_title: str, upright: bool = True) -> None:
        """Grid, ticks and titles; `upright` is whether the vertical axis counts anything."""
        for value, name in self.y.ticks(max(3, (self.bottom - self.top) // 42)) if upright else ():
            y = self.place(self.x.low, value)[1]
            self._line((self.left, y), (self.right, y), "grid")
            self.text(self.left - 8, y + 4, name, "tick end")
        wide = max((len(name) for _, name in self.x.ticks(6)), default=4)
        for value, name in self.x.ticks(max(2, int((self.right - self.left) // (9 * wide + 22)))):
            x = self.place(value, self.y.low)[0]
            self._line((x, self.bottom), (x, self.bottom + 5), "axis")
            self.text(x, self.bottom + 19, name, "tick middle")
        self._line((self.left, self.bottom), (self.right, self.bottom), "axis")
        self.text((self.left + self.right) / 2, self.bottom + 38, x_title, "title middle")
        if y_title:
            self.text(4, 14, y_title, "title")

    def line(self, points: Sequence[Point], series: int, extra: str = "") -> None:
        """A line through points."""
        if len(points) > 1:
            path = "M" + "L".join(f"{x},{y}" for x, y in (self.place(*point) for point in points))
            SubElement(self.svg, "path", {"d": path, "class": f"line s{series % SERIES} {extra}".strip()})

    def band(self, points: Sequence[tuple[float, float, float]], series: int) -> None:
        """The area between a lower and an upper value."""
        if len(points) > 1:
            upper = [self.place(x, high) for x, _, high in points]
            lower = [self.place(x, low) for x, low, _ in reversed(points)]
            path = "M" + "L".join(f"{x},{y}" for x, y in [*upper, *lower]) + "Z"
            SubElement(self.svg, "path", {"d": path, "class": f"band s{series % SERIES}"})

    def dot(self, x: float, y: float, series: int, says: str = "", size: float = 5, extra: str = "") -> None:
        """A point with its series' own mark."""
        self.mark(*self.place(x, y), series, says, size, extra)

    def mark(self, x: float, y: float, series: int, says: str = "", size: float = 5, extra: str = "") -> None:
        """The same at a place of the picture."""
        shape = SubElement(self.svg, "path", {"d": outline(series, x, y, size)})
        shape.set("class", f"dot s{series % SERIES} {extra}".strip())
        if says:
            SubElement(shape, "title").text = says

    def whisker(self, start: Point, end: Point, series: int, extra: str = "") -> None:
        """A thick line between two points of the plot."""
        (x1, y1), (x2, y2) = self.place(*start), self.place(*end)
        self._line((x1, y1), (x2, y2), f"whisker s{series % SERIES} {extra}".strip())

    def rule(self, start: Point, end: Point, name: str = "rule") -> None:
        """A thin line between two points of the plot."""
        self._line(self.place(*start), self.place(*end), name)

    def text(self, x: float, y: float, words: str, name: str) -> None:
        """Words at a place of the picture."""
        SubElement(self.svg, "text", {"x": f"{x:g}", "y": f"{y:g}", "class": name}).text = words

    def _line(self, start: Point, end: Point, name: str) -> None:
        ends = {"x1": start[0], "y1": start[1], "x2": end[0], "y2": end[1]}
        SubElement(self.svg, "line", {**{key: f"{value:g}" for key, value in ends.items()}, "class": name})

    def __str__(self) -> str:
        return tostring(self.svg, encoding="unicode")


def outline(series: int, x: float, y: float, size: float) -> str:
    """The mark of a series: a circle, a square, a triangle, a diamond, and so on, told apart without colour.

    Where the colours begin again, each has another mark than before.
    """
    corners = {
        1: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        2: [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
        3: [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        4: [(0, 1.2), (1.1, -0.8), (-1.1, -0.8)],
        5: [(-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4), (0.4, 1.2), (-0.4, 1.2),
            (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)],
        6: [(-1.2, 0), (-0.6, -1.05), (0.6, -1.05), (1.2, 0), (0.6, 1.05), (-0.6, 1.05)],
        7: [(-1.3, -0.6), (1.3, -0.6), (1.3, 0.6), (-1.3, 0.6)],
    }.get((series + series // SERIES) % SERIES)  # fmt: skip
    if corners is None:
        return f"M{x - size:g},{y:g}a{size:g},{size:g} 0 1,0 {2 * size:g},0a{size:g},{size:g} 0 1,0 {-2 * size:g},0Z"
    return "M" + "L".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners) + "Z"
