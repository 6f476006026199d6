"""Plots of a comparison: every variant by its size and something that was measured."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.report.advice import NO_SMALLER
from compress.report.compare import Comparison, Row, accuracies, accuracy_change
from compress.report.figures import DPI, FONT, PRINTED, STAND_INS, Theme, drawing, new_axes, svg
from compress.report.labels import Box, place
from compress.report.numbers import human_bytes
from compress.scoring.intervals import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_FROM = 3.0  # from this ratio of largest to smallest on, sizes are shown on a logarithmic axis
FEW_DECADES = 100  # a logarithmic axis of values whose ratio is less has ticks at 2 and 5, too
TICK_STEPS = (1, 1.5, 2, 3, 4, 5, 6, 8)
TICK_ROOM = 0.13  # share of the axis that a label takes


@dataclass(frozen=True)
class Measure:
    """What stands on the upright axis: its name, in short and in full, its value for a row, where the original lies, whether
    more is better."""

    name: str
    heading: str
    value: Callable[[Row], Interval | None]
    original: float | None = None
    more_is_better: bool = False
    logarithmic: bool = False

    def of(self, row: Row) -> Interval | None:
        """The value where it can be drawn."""
        found = self.value(row)
        ends = () if found is None else (found.value, found.low, found.high)
        return found if all(end is None or isfinite(end) for end in ends) else None


def measures(comparison: Comparison) -> list[Measure]:
    """Those that two variants or more were measured by."""
    tasks = accuracies(comparison)
    which = f"mean of {len(tasks)} tasks" if len(tasks) > 1 else "one task"
    found = [
        Measure("kl", "KL divergence, nats per token", lambda row: row.kld, logarithmic=True),
        Measure("accuracy", f"accuracy, change in points ({which})", lambda row: _points(row, tasks), 0.0, True),
        Measure("speed", "tokens/s over the original's", lambda row: row.generation, 1.0, True),
    ]
    return [m for m in found if sum(m.of(row) is not None for row in smaller(comparison)) > 1]


def _points(row: Row, tasks: Sequence[str]) -> Interval | None:
    change = accuracy_change(row, tasks)
    if change is None:
        return None
    low, high = (None if end is None else 100 * end for end in (change.low, change.high))
    return Interval(100 * change.value, low, high)


# ---------------------------------------------------------------- size against something


def smaller(comparison: Comparison) -> list[Row]:
    """Variants that are smaller than their original: the others stretch the axes and are nothing to choose."""
    return [row for row in comparison.comparable if row.share is None or row.share < NO_SMALLER]


def size_plot(comparison: Comparison, measure: Measure) -> str:
    """SVG for a page: every variant by its size and a measure, error bars, labels, the front."""
    with drawing("compare --html"):
        figure, told = _size_figure(comparison, measure, STAND_INS), f"{measure.heading} against size"
        figure.axes[0].set_ylabel("")  # the page says it above
        return svg(figure, told)


def picture(comparison: Comparison, target: str) -> bytes:
    """The plot of size and divergence as a file of its own, .png or .svg by its name. Raises CompressError for others, and
    where fewer than two variants have a divergence."""
    kind = Path(target).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise CompressError(f"cannot draw {target}; give --picture a name that ends in .png or .svg")
    found, out = _measure(comparison, "kl"), io.BytesIO()
    with drawing("compare --picture"):
        figure = _size_figure(comparison, found, PRINTED)
        figure.savefig(
            out, format=kind, dpi=DPI, facecolor=PRINTED.paper, metadata={"Date": None} if kind == "svg" else None
        )
    return out.getvalue()


def size_figure(comparison: Comparison, of: str = "kl") -> Figure:
    """The plot of size and a measure (kl, accuracy, speed), on white. Raises CompressError where fewer than two variants have
    it."""
    found = _measure(comparison, of)
    with drawing("plot()"):
        return _size_figure(comparison, found, PRINTED)


_WANTED = {"kl": "a KL divergence from one original", "accuracy": "scores of tasks", "speed": "a speed"}


def _measure(comparison: Comparison, name: str) -> Measure:
    if name not in _WANTED:
        raise CompressError(f"there is no plot of {name!r}; use {', '.join(_WANTED)}")
    found = next((measure for measure in measures(comparison) if measure.name == name), None)
    if found is None:
        raise CompressError(f"there is nothing to draw: fewer than two variants have {_WANTED[name]}")
    return found


def _size_figure(comparison: Comparison, measure: Measure, theme: Theme) -> Figure:
    from matplotlib.ticker import FuncFormatter

    figure, axes = new_axes(theme)
    points = [(row, value) for row in smaller(comparison) if (value := measure.of(row)) is not None]
    points.sort(key=lambda point: (point[0].bytes, point[0].name))
    front = _front(points, measure)
    if measure.logarithmic:
        axes.set_yscale("log")
        floor = min((value.value for _, value in points if value.value > 0), default=1e-6) / 10
        points = [(row, _above(value, floor)) for row, value in points]
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ends = [end for _, value in points for end in (value.value, value.low, value.high) if end is not None]
        few = max(ends) < FEW_DECADES * min(ends)  # one or two powers of ten are too few to read a value by
        between = FuncFormatter(lambda value, _: f"{value:g}" if few and f"{value:e}"[0] in "25" else "")
        axes.yaxis.set_minor_formatter(between)
    originals = [row.bytes for row in comparison.originals if not row.mark]
    sizes = [*(row.bytes for row, _ in points), *originals]
    _size_axis(axes, min(sizes), max(sizes))
    for row, value in points:
        best = row.name in front
        low, high = (value.value if end is None else end for end in (value.low, value.high))
        axes.plot([row.bytes] * 2, [low, high], color=theme.accent if best else theme.muted, linewidth=1.1, zorder=3)
        axes.plot(
            [row.bytes], [value.value], "o", markersize=5, zorder=4, markeredgewidth=1.2,
            color=theme.accent if best else theme.paper, markeredgecolor=theme.accent if best else theme.muted,
        )  # fmt: skip
    steps = [(row.bytes, value.value) for row, value in points if row.name in front]
    axes.step([x for x, _ in steps], [y for _, y in steps], where="post", color=theme.accent, linewidth=0.8, alpha=0.45)
    dashed: Any = {"color": theme.muted, "linewidth": 0.8, "linestyle": (0, (4, 3)), "zorder": 1}
    for size in originals:
        axes.axvline(size, **dashed)
    if measure.original is not None:
        axes.axhline(measure.original, **dashed)
    axes.set_ylabel(measure.heading, color=theme.muted)
    axes.set_xlabel("size of all files", color=theme.muted)
    axes.margins(y=0.12)
    _label(figure, axes, points, front, measure.original, theme)
    return figure


def _above(value: Interval, floor: float) -> Interval:
    """On a logarithmic axis nothing is at zero or below."""
    low, high = (None if end is None else max(end, floor) for end in (value.low, value.high))
    return Interval(max(value.value, floor), low, high)


def _front(points: Sequence[tuple[Row, Interval]], measure: Measure) -> set[str]:
    """Names of those that no other beats in size and measure; points by size."""
    sign = -1 if measure.more_is_better else 1
    best, names = float("inf"), set()
    for row, value in sorted(points, key=lambda point: (point[0].bytes, sign * point[1].value)):
        if sign * value.value < best:
            best = sign * value.value
            names.add(row.name)
    return names


def _size_axis(axes: Axes, least: int, most: int) -> None:
    """Sizes in their binary units, with a few round ticks."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if most / max(least, 1) >= LOG_FROM:
        axes.set_xscale("log")
        axes.set_xlim(least / 1.3, most * 1.15)
    else:
        margin = 0.12 * (most - least) or 0.1 * most
        axes.set_xlim(max(least - margin, 0), most + margin)
    low, high = axes.get_xlim()
    ticks = [step * 10.0**tens * 1024.0**unit for unit in range(5) for tens in range(3) for step in TICK_STEPS]
    inside = sorted({tick for tick in ticks if low <= tick <= high})
    while len(inside) > 7:
        inside = inside[::2]
    log = axes.get_xscale() == "log"

    def along(size: float) -> float:
        return math.log(size / low) / math.log(high / low) if log else (size - low) / (high - low)

    apart: list[float] = []
    for tick in inside:
        if not apart or along(tick) - along(apart[-1]) >= TICK_ROOM:
            apart.append(tick)
    inside = apart
    if len(inside) < 3:
        inside = [low + (high - low) * part / 4 for part in range(1, 4)]
    axes.xaxis.set_major_locator(FixedLocator(inside))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(size: float) -> str:
    number, unit = human_bytes(size).split(" ")
    return f"{float(number):g} {unit}"


def _label(
    figure: Figure,
    axes: Axes,
    points: Sequence[tuple[Row, Interval]],
    front: set[str],
    level: float | None,
    theme: Theme,
) -> None:
    """Names beside their points, where they cover neither each other nor what is drawn; further off with a thin line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    frame = axes.get_window_extent(renderer)
    inside, scale = Box(frame.x0, frame.y0, frame.x1, frame.y1), figure.dpi / 72
    at = [_pixels(axes, row.bytes, value.value) for row, value in points]
    taken = [box for row, value in points for box in _covered(axes, row, value, scale)]
    ends = [spot for (row, _), spot in zip(points, at, strict=True) if row.name in front]
    for (x, y), (right, below) in pairwise(ends):
        taken += [Box(x, y - scale, right, y + scale), Box(right - scale, min(y, below), right + scale, max(y, below))]
    if level is not None:
        y = _pixels(axes, 1.0, level)[1]
        taken.append(Box(inside.x0, y - scale, inside.x1, y + scale))
    sizes = []
    for row, _ in points:
        text = axes.text(0, 0, row.name, fontsize=FONT)
        extent = text.get_window_extent(renderer)
        sizes.append((extent.width, extent.height))
        text.remove()
    behind: Any = {"boxstyle": "square,pad=0.05", "facecolor": theme.paper, "edgecolor": "none", "alpha": 0.8}
    line: Any = {"arrowstyle": "-", "color": theme.muted, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 4}
    for (row, value), spot in zip(points, place(at, sizes, taken, inside, scale), strict=True):
        axes.annotate(
            row.name, (row.bytes, value.value), (spot.dx / scale, spot.dy / scale), textcoords="offset points", fontsize=FONT,
            ha=spot.horizontal, va=spot.vertical, color=theme.ink if row.name in front else theme.muted,
            arrowprops=line if spot.far else None, bbox=behind, zorder=5,
        )  # fmt: skip


def _pixels(axes: Axes, x: float, y: float) -> tuple[float, float]:
    found = axes.transData.transform((x, y))
    return float(found[0]), float(found[1])


def _covered(axes: Axes, row: Row, value: Interval, scale: float) -> list[Box]:
    """A point and its error bar."""
    x, y = _pixels(axes, row.bytes, value.value)
    low, high = (_pixels(axes, row.bytes, value.value if end is None else end)[1] for end in (value.low, value.high))
    return [Box(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale), Box(x - scale, low, x + scale, high)]
