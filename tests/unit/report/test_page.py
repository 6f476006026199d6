"""The page of a comparison: self-contained, whole, escaped; and where its labels go."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from itertools import combinations

import pytest

from compress.errors import CompressError, MissingExtra
from compress.report.advice import advise
from compress.report.compare import Run, compare
from compress.report.labels import Box, place
from tests.cards import card, full_card

VOID = {"meta", "br", "link", "img", "input", "hr"}
NAMES = ("two-bit", "four-bit", "a<script>alert(1)</script>&b", "$x_1$ \\frac", "名前")


class Page(HTMLParser):
    """Collects elements, what they refer to, and their text; fails on elements that do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.said.append(data)


@pytest.fixture(scope="module")
def html() -> str:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    from compress.report.page import page

    secret = "/home/jane doe/models/secret-7b"
    cards = [full_card(name, 9_000_000 - 10**6 * i, 0.01 * 2**i, model="models/tiny") for i, name in enumerate(NAMES)]
    cards[0] = cards[0].model_copy(
        update={"notes": (f"{secret} and /srv/data/x.gguf have little in common",), "model": secret}
    )
    cards[1:] = [c.model_copy(update={"model": secret}) for c in cards[1:]]
    comparison = compare([Run(c) for c in [*cards, card("other", 5, 0.1)]])
    return page(comparison, advise(comparison))


@pytest.fixture(scope="module")
def parsed(html: str) -> Page:
    return Page(html)


def test_it_is_well_formed_and_needs_nothing_from_elsewhere(html: str, parsed: Page) -> None:
    assert "script" not in parsed.tags and "link" not in parsed.tags
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in parsed.links)
    assert not re.search(r"url\((?!#)", html) and "@import" not in html and "http" not in html
    assert len(parsed.ids) == len(set(parsed.ids))
    named = {link[1:] for link in parsed.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", html))
    assert named <= set(parsed.ids)


def test_it_says_every_variant_by_name(html: str, parsed: Page) -> None:
    text = " ".join(parsed.said)
    for name in NAMES:
        assert text.count(name) >= 4, name  # table, plots, maps, provenance
    assert "<script>alert" not in html
    assert "0.0100 [0.0090, 0.0110]".split()[0] in text and "[0.0090, 0.0110]" in text
    assert "† 1 variant is of another original" in text


def test_it_holds_no_path_of_this_machine(html: str) -> None:
    assert "jane" not in html and "/home" not in html and "/srv" not in html
    assert "secret-7b and x.gguf have little in common" in html


def test_it_is_light_and_dark_wide_and_narrow(html: str) -> None:
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    light, dark = (set(re.findall(r"--(\w+): #", part)) for part in html.split("prefers-color-scheme: dark")[:2])
    assert light >= dark >= {"paper", "ink", "muted", "accent", "grid"}
    used = set(re.findall(r"var\(--(\w+)\)", html))
    assert used <= light
    plots = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(plots) == 3 + len(NAMES) + 1  # size against three measures; a map of errors each; one of experts
    for plot in plots:
        assert 'role="img"' in plot and "aria-label=" in plot and " width=" not in plot[: plot.index(">")]
        assert "var(--muted)" in plot and "#000000" not in re.sub(r"data:[^\"]*", "", plot)


def test_contrast_is_enough(html: str) -> None:
    """WCAG 2.1: 4.5 for text against what is behind it, in both schemes."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for scheme in html.split("prefers-color-scheme: dark")[:2]:
        colours = dict(re.findall(r"--(\w+): #(\w{6})", scheme))
        for name in ("ink", "muted", "accent", "bad", "warn"):
            light, dark = sorted((luminance(colours[name]), luminance(colours["paper"])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def test_table_has_real_headers(parsed: Page, html: str) -> None:
    assert {"table", "caption", "thead", "tbody", "th"} <= set(parsed.tags)
    assert html.count('scope="row"') == len(NAMES) + 1 + 2  # two originals
    assert html.count('scope="col"') > 10


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.report.page import page

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    comparison = compare([Run(card("a", 5, 0.1)), Run(card("b", 6, 0.01))])
    with pytest.raises(MissingExtra, match=r"compare --html needs matplotlib; .*compress-llm\[report\]"):
        page(comparison, advise(comparison))


def test_pictures() -> None:
    pytest.importorskip("matplotlib")
    from compress.report.plots import picture

    two = compare([Run(card("a", 5_000_000, 0.1)), Run(card("b", 6_000_000, 0.01))])
    assert picture(two, "x.png").startswith(b"\x89PNG\r\n\x1a\n")
    assert picture(two, "x.svg") == picture(two, "y.SVG") and b">a</text>" in picture(two, "x.svg")
    with pytest.raises(CompressError, match=r"ends in \.png or \.svg"):
        picture(two, "x.jpg")
    with pytest.raises(CompressError, match="fewer than two"):
        picture(compare([Run(card("a", 5, 0.1))]), "x.png")


def test_labels_cover_neither_each_other_nor_points() -> None:
    """Ten points close together."""
    points = [(200 + 14 * (i % 5), 150 + 17 * (i // 5) + 5 * i) for i in range(10)]
    taken = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    frame = Box(0, 0, 460, 330)
    spots = place(points, [(60.0, 11.0)] * 10, taken, frame)
    assert all(one.box.common(other.box) == 0 for one, other in combinations(spots, 2))
    assert all(spot.box.common(box) == 0 for spot in spots for box in taken)
    assert all(spot.box.common(frame) == pytest.approx(spot.box.area) for spot in spots)
    assert spots == place(points, [(60.0, 11.0)] * 10, taken, frame)
