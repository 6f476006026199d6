"""Figures of ours, drawn by matplotlib outside pyplot: SVG for a page that is light or dark, a picture, what a notebook shows.

An SVG keeps its text as text, and its colours are the page's: each is drawn in a stand-in that becomes a CSS variable.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from compress.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (4.6, 3.3)  # inches; at 72 points each, as wide as a phone, so that text there is nearly as large as around it
FONT = 8.5
DPI = 220  # of pictures and heat maps
NOTEBOOK_DPI = 120  # pixels of a notebook's page an inch; its pictures have twice as many


@dataclass(frozen=True)
class Theme:
    """Colours: text and front; what stands back; the points; grid lines; what is behind."""

    ink: str
    muted: str
    accent: str
    grid: str
    paper: str


PRINTED = Theme("#1d2230", "#6b7280", "#2563c9", "#e3e6eb", "#ffffff")
STAND_INS = Theme("#010203", "#020304", "#030405", "#040506", "#050607")  # of a page's --ink, --muted, ...


@contextmanager
def drawing(purpose: str) -> Iterator[None]:
    """matplotlib with our settings and none of its warnings, as of letters that its own font lacks. purpose: what needs it."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("matplotlib", "report", purpose) from error
    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "compress", "font.size": FONT, "axes.labelsize": FONT, "text.parse_math": False,
        "xtick.labelsize": FONT, "ytick.labelsize": FONT, "font.family": ["DejaVu Sans"],
    }  # fmt: skip
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def new_axes(theme: Theme, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """A figure of so many inches, outside pyplot, and its axes."""
    figure = _picture_class()(figsize=size, layout="constrained", facecolor=theme.paper)
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.grid)
    axes.tick_params(which="both", colors=theme.muted, length=3, width=0.6)
    axes.grid(which="major", color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


_serial = re.compile(r'(\bid="|url\(#|href="#)')


def svg(figure: Figure, told: str) -> str:
    """The figure as an element of a page: no size of its own, the page's font and colours, names of its own."""
    from hashlib import sha256
    from html import escape

    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, dpi=DPI, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", text[text.index(">") + 1 :], flags=re.DOTALL)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    for role, stand_in in vars(STAND_INS).items():
        body = body.replace(stand_in, f"var(--{role})")
    prefix = sha256(f"{told}{body}".encode()).hexdigest()[:8]
    body = _serial.sub(rf"\g<1>{prefix}-", body)
    return f'<svg {box[0]} role="img" aria-label="{escape(told)}">{body}'


@cache
def _picture_class() -> type[Figure]:
    """Figures that notebooks show by themselves: only those of pyplot are known to them."""
    from matplotlib.figure import Figure

    class Picture(Figure):
        def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
            out = io.BytesIO()
            with drawing("a picture"):
                self.savefig(out, format="png", dpi=2 * NOTEBOOK_DPI)
            width, height = (round(NOTEBOOK_DPI * inches) for inches in self.get_size_inches())
            data = {"text/plain": repr(self), "image/png": base64.b64encode(out.getvalue()).decode()}
            return data, {"image/png": {"width": width, "height": height}}

    return Picture
