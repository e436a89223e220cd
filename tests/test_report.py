"""The page of a comparison: whole, self-contained, legible on a screen, a phone and paper."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from headstart.choose.page import figures
from headstart.choose.page.canvas import outline
from headstart.choose.page.scales import Scale
from headstart.choose.trials.comparison import Comparison
from headstart.choose.trials.plan import Plan, Timing
from headstart.choose.trials.result import Measured
from headstart.lora.config import LoraConfig

pytest.importorskip("jinja2", reason="the page needs the extra headstart[compare]")
pytest.importorskip("scipy", reason="comparisons need the extra headstart[compare]")

NAMES = ("kaiming", "pissa", "lora_one", "<b>eva & co</b>")
COMMAND = "headstart compare --model m --data 'a b.jsonl' --inits kaiming,pissa"


def outcomes(seeds: int) -> dict[str, dict[str, Any]]:
    """The jobs of a comparison in which the second arm is better, the third no different, the fourth diverges at 1."""
    rates, found = [1e-3, 1e-2, 1.0], {}
    for index, arm in enumerate(NAMES):
        for rung, places in enumerate([(0, 1, 2), (0, 1), (0, 1)]):
            for place in places:
                failed = "the loss is nan at step 4" if index == 3 and place == 2 else ""
                found[f"tune|{arm}|0|{rung}|{place}"] = {
                    "kind": "tune", "arm": arm, "seed": 0, "rate": rates[place], "rung": rung, "step": 10 * 2**rung,
                    "steps": 10, "value": None if failed else 1.0 + 0.2 * abs(place - 1) - 0.1 * rung,
                    "diverged": failed, "seconds": {"training": 1.0, "evaluation": 0.05},
                }  # fmt: skip
        for seed in range(1, seeds + 1):
            moved = (0.0, -0.2 + 0.002 * seed, 0.01 * (seed % 3 - 1), 0.3 + 0.01 * (seed % 2))[index]
            curve = [[step, 2.0 - 0.012 * step * (1 + 0.3 * (index == 1)) + 0.01 * seed] for step in range(1, 41)]
            found[f"final|{arm}|{seed}|0|1"] = {
                "kind": "final", "arm": arm, "seed": seed, "rate": 1e-2, "curve": curve,
                "value": 0.8 + 0.01 * seed + moved, "preserved": 0.5 + 0.05 * index,
                "cost": {"init": 0.5 * index, "calibration": 0.2}, "step": 40, "steps": 40, "diverged": "",
                "seconds": {"training": 4.0, "evaluation": 0.2, "init": 0.5 * index},
            }  # fmt: skip
    return found


def comparison(seeds: int = 5, layers: int = 60) -> Comparison:
    plan = Plan(NAMES, 40, seeds, rates={name: [1e-3, 1e-2, 1.0] for name in NAMES}, timing=Timing(0.1))
    starts = {
        name: [
            {
                "layer": f"model.layers.{i}.q_proj",
                "moved": 0.1 * index / (1 + i),
                "captured": 0.1 + 0.2 * index / (1 + 0.1 * i),
            }
            for i in range(layers)
        ]
        for index, name in enumerate(NAMES)
    }
    base = {"tuning": 2.0, "judging": 2.0, "preserved": 0.4}
    measured = Measured(plan, base, starts, dict.fromkeys(NAMES, 1000), outcomes(seeds), {})
    facts = {"title": "Which start for m on <data>?", "command": COMMAND, "device": "cpu", "date": "2026-01-01"}
    return Comparison(measured, dict.fromkeys(NAMES, LoraConfig()), facts)


class Reader(HTMLParser):
    """What a page is made of: its tags, its links, its words."""

    VOID = ("meta", "link", "br", "img", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_whole_and_needs_nothing_from_outside() -> None:
    text = comparison().to_html()
    page = Reader(text)
    assert not page.open, "a tag is left open"
    assert not page.links
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert len(text) < 400_000


def test_what_is_named_by_a_user_is_text() -> None:
    text = comparison().to_html()
    assert "<b>eva" not in text
    assert "<data>" not in text
    assert "&lt;b&gt;eva &amp; co&lt;/b&gt;" in text


def test_the_page_says_what_was_found_and_how_to_do_it_again() -> None:
    found = comparison()
    words = " ".join(Reader(found.to_html()).words)
    assert found.verdict.headline in words
    assert "pissa beats kaiming" in found.verdict.headline
    assert "is worse than kaiming" in found.verdict.headline
    assert COMMAND in words
    assert "the loss is nan at step 4" in words
    for heading in ("Learning curves", "Loss against learning rate", "Learned and forgotten", "Where the starts point"):
        assert heading in words


def test_every_picture_is_a_picture() -> None:
    drawings = re.findall(r"<svg.*?</svg>", comparison().to_html(), re.DOTALL)
    assert len(drawings) > 12
    for drawing in drawings:
        picture = ElementTree.fromstring(drawing)
        _, _, width, height = map(float, picture.get("viewBox", "").split())
        for element in picture.iter():
            for name, limit in (
                ("x", width),
                ("x1", width),
                ("x2", width),
                ("y", height),
                ("y1", height),
                ("y2", height),
            ):
                if element.get(name):
                    assert -1 <= float(element.get(name, "")) <= limit + 1, ElementTree.tostring(element)
            assert "nan" not in ElementTree.tostring(element, encoding="unicode").split("<title>")[0].lower()


def test_a_page_of_nothing_much_is_a_page() -> None:
    found = comparison(seeds=1, layers=0)
    page = Reader(found.to_html())
    assert "No conclusion" in " ".join(page.words)
    assert not page.open


@pytest.mark.parametrize("low", [-3.0, 0.0, 1e-7, 12.0])
@pytest.mark.parametrize("span", [1e-6, 0.3, 4.0, 1e5])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_an_axis_holds_its_values_and_names_a_few(low: float, span: float, logarithmic: bool) -> None:
    values = [low, low + span] if not logarithmic else [abs(low) + 1e-9, abs(low) + span]
    scale = Scale.of(values, logarithmic)
    assert all(0 < scale(value) < 1 for value in values)
    ticks = scale.ticks(6)
    assert 1 <= len(ticks) <= 8
    assert all(scale.low <= value <= scale.high for value, _ in ticks)
    assert len({name for _, name in ticks}) == len(ticks), "two ticks of one name"


def test_no_two_arms_of_twelve_look_alike() -> None:
    looks = [(series % 8, outline(series, 0, 0, 5)) for series in range(12)]
    assert len(set(looks)) == 12


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium: playwright's own, or the system's."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    installed = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_api.sync_playwright() as playwright:
        if installed is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium on this machine")
        opened = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    comparison().save(tmp_path_factory.mktemp("page"))
    return next(tmp_path_factory.getbasetemp().glob("page*/report.html"))


LUMINANCE = """
(pair) => { const light = text => { const v = text.match(/[\\d.]+/g).slice(0, 3).map(Number).map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
  const [a, b] = pair.map(light).sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); }
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_is_legible(browser: Any, written: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    asked: list[str] = []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.goto(written.as_uri())
    assert asked == [written.as_uri()], "the page asks for something else"
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    small = page.evaluate(
        """() => [...document.querySelectorAll('svg text')].filter(t => t.getClientRects().length)
        .map(t => t.getBoundingClientRect().height).reduce((a, b) => Math.min(a, b), 99)"""
    )
    assert small >= 10, "text in a picture is too small to read"
    overlaps = page.evaluate(
        """() => [...document.querySelectorAll('svg')].filter(s => s.getClientRects().length).flatMap(svg => {
          const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
          return boxes.flatMap(([name, a], i) => boxes.slice(i + 1).filter(([, b]) =>
            Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
            Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4).map(([other]) => name + ' / ' + other)); })"""
    )
    assert not overlaps, "words lie on one another"
    colours = page.evaluate(
        """() => { const of = name => getComputedStyle(document.querySelector(name));
        const [body, lead] = [of('body'), of('.lead')];
        return [[body.color, body.backgroundColor], [lead.color, body.backgroundColor]]; }"""
    )
    for pair in colours:
        assert page.evaluate(LUMINANCE, pair) >= 4.5, "too little contrast"
    shades = page.evaluate(
        """() => [1, 2, 3].map(i => getComputedStyle(document.querySelector('path.dot.s' + i)).fill)"""
    )
    card = page.evaluate("() => getComputedStyle(document.querySelector('figure.plate')).backgroundColor")
    assert all(page.evaluate(LUMINANCE, [shade, card]) >= 2.9 for shade in shades)
    context.close()


def test_long_names_stay_on_the_page(browser: Any, tmp_path: Path) -> None:
    text = comparison(layers=1).to_html().replace("lora_one", "kaiming-" + "x" * 80).replace("pissa", "初期化" * 16)
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    for width in (1280, 390):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto((tmp_path / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.close()


@pytest.mark.parametrize("name", ["arm number 10 r=1024", "kaiming, rank 64, twice the batch", "初期化の比較" * 4])
def test_names_of_arms_stay_inside_their_picture(browser: Any, name: str) -> None:
    found = {"low": -1.0, "high": 1.0, "mean": 0.0, "told": False, "pairs": [0.1]}
    drawn = figures.differences({"arms": [{"name": "a"}, {"name": name, "difference": found}]}, 890)
    page = browser.new_page(viewport={"width": 940, "height": 300})
    page.set_content(
        "<style>text { font: 600 13px system-ui, sans-serif } .end { text-anchor: end }</style>"
        f"<div style='width: 890px'>{drawn}</div>"
    )
    lefts = "[...document.querySelectorAll('svg, text')].map(t => t.getBoundingClientRect().left)"
    svg, *words = page.evaluate(lefts)
    assert min(words) >= svg
    page.close()


def test_the_page_prints(browser: Any, written: Path) -> None:
    page = browser.new_page()
    page.goto(written.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf(format="A4")[:5] == b"%PDF-"
    page.close()
