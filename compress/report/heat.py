"""Heat maps of one run: the error of every layer and role, the tokens that every expert saw."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.report.compare import Row
from compress.report.figures import PRINTED, STAND_INS, Theme, drawing, new_axes, svg
from compress.report.scorecard import LayerError, Scorecard

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAT = (0.145, 0.388, 0.788)  # one hue whose opacity says how much: it reads on white and on black
FAINTEST = 0.08  # opacity of the least value
WIDTH, LEGEND = 3.9, 1.0  # inches; of a map, and of what stands beside one that is a picture on its own
DECADES = 1000  # from the least error that is told from none to the greatest
GRID_CELLS = 1200  # lines between cells, up to so many


@dataclass(frozen=True)
class Heat:
    """What a map shows.

    grid: [down, across], None where there is nothing; scale: values of the least and the greatest opacity, by logarithm;
    told: the map in a sentence; legend: what its values are; crosses: (across, down).
    """

    grid: tuple[tuple[float | None, ...], ...]
    scale: tuple[float, float]
    down: tuple[str, ...]
    across: tuple[str, ...]
    axis: str
    told: str
    legend: str
    crosses: tuple[tuple[int, int], ...] = ()


def error_scale(rows: Sequence[Row]) -> tuple[float, float]:
    """Least and greatest error of any layer, for one colour scale over all variants."""
    return _scale([error for row in rows for error in row.errors])


def _scale(errors: Sequence[LayerError]) -> tuple[float, float]:
    found = [error.error for error in errors if error.error > 0 and error.layer is not None]
    return (max(min(found), max(found) / DECADES), max(found)) if found else (1e-6, 1.0)


def error_map(row: Row, scale: tuple[float, float]) -> str:
    """SVG: roles down, layers across, opacity by the logarithm of the relative output error."""
    heat = _errors(row.errors, scale)
    return _as_svg(heat, f"{row.name}: {heat.told}")


def expert_map(row: Row) -> str:
    """SVG: layers down, experts across, opacity by the logarithm of the tokens; a cross where an expert is cold."""
    heat = _experts(row.card)
    return _as_svg(heat, f"{row.name}: {heat.told}")


def error_figure(card: Scorecard) -> Figure | None:
    """The map of errors as a picture on its own; None where the card has none."""
    return (
        _picture(_errors(card.errors, _scale(card.errors))) if any(e.layer is not None for e in card.errors) else None
    )


def expert_figure(card: Scorecard) -> Figure | None:
    """The map of tokens as a picture on its own; None where the model has no experts."""
    return _picture(_experts(card)) if card.experts else None


def role_name(role: str) -> str:
    """routed_experts.gate -> "routed experts gate"."""
    return re.sub(r"[_.]", " ", role)


def _errors(found: Sequence[LayerError], scale: tuple[float, float]) -> Heat:
    errors = [error for error in found if error.layer is not None]
    several = len({error.variant for error in errors}) > 1

    def name(error: LayerError) -> str:
        return f"{error.variant} {role_name(error.role)}" if several else role_name(error.role)

    roles = list(dict.fromkeys(map(name, errors)))
    layers = sorted({error.layer for error in errors if error.layer is not None})
    values = {(name(error), error.layer): error.error for error in errors}
    worst = max(errors, key=lambda error: error.error)
    return Heat(
        grid=tuple(tuple(values.get((role, layer)) for layer in layers) for role in roles),
        scale=scale,
        down=tuple(roles),
        across=tuple(map(str, layers)),
        axis="layer",
        told=f"largest {worst.error:.2g} in {name(worst)} of layer {worst.layer}",
        legend="relative output error",
    )


def _experts(card: Scorecard) -> Heat:
    layers = card.experts
    most = max((count for layer in layers for count in layer.tokens), default=1)
    grid = tuple(tuple(float(count) if count else None for count in layer.tokens) for layer in layers)
    crosses = tuple((expert, number) for number, layer in enumerate(layers) for expert in layer.cold)
    width = max(len(layer.tokens) for layer in layers)
    return Heat(
        grid=grid,
        scale=(1.0, float(max(most, 2))),
        down=tuple(f"layer {layer.layer}" for layer in layers),
        across=tuple(map(str, range(width))),
        axis="expert",
        told=f"tokens per expert, {len(crosses)} of {sum(map(len, grid))} experts cold",
        legend="tokens",
        crosses=crosses,
    )


def _as_svg(heat: Heat, told: str) -> str:
    with drawing("compare --html"):
        figure, _ = _drawn(heat, STAND_INS, WIDTH)
        return svg(figure, told)


def _picture(heat: Heat) -> Figure:
    """With what it shows above it, and a scale beside it."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.ticker import FuncFormatter

    with drawing("plot()"):
        figure, axes = _drawn(heat, PRINTED, WIDTH + LEGEND)
        axes.set_title(heat.told, color=PRINTED.ink, fontsize="medium", loc="left")
        shades = LinearSegmentedColormap.from_list("heat", [(*HEAT, FAINTEST), (*HEAT, 1.0)])
        low, high = heat.scale
        values = ScalarMappable(LogNorm(low, max(high, 1.001 * low)), shades)
        bar = figure.colorbar(values, ax=axes, aspect=12, format=FuncFormatter(lambda value, _: f"{value:g}"))
        bar.minorticks_off()
        bar.set_label(heat.legend, color=PRINTED.muted)
        bar.ax.tick_params(which="both", colors=PRINTED.muted, length=2, width=0.6)
        bar.outline.set_visible(False)
        return figure


def _drawn(heat: Heat, theme: Theme, width: float) -> tuple[Figure, Axes]:
    import numpy as np

    down, across, (low, high) = heat.down, heat.across, heat.scale
    cells = np.zeros((len(down), len(across), 4))
    cells[..., :3] = HEAT
    for y, line in enumerate(heat.grid):
        for x, value in enumerate(line):
            if value is not None:
                part = np.log(max(value, low) / low) / max(np.log(high / low), 1e-9)
                cells[y, x, 3] = FAINTEST + (1 - FAINTEST) * min(float(part), 1.0)
    height = 0.5 + 0.2 * min(len(down), 16) + 0.02 * max(len(down) - 16, 0)
    figure, axes = new_axes(theme, (width, height if theme is STAND_INS else max(height + 0.3, 1.5)))
    axes.imshow(cells, aspect="auto", interpolation="nearest")
    axes.plot(
        [x for x, _ in heat.crosses], [y for _, y in heat.crosses], "x", color=theme.ink, markersize=3.4, markeredgewidth=0.9
    )  # fmt: skip
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if len(down) * len(across) <= GRID_CELLS:
        axes.set_xticks([x - 0.5 for x in range(1, len(across))], minor=True)
        axes.set_yticks([y - 0.5 for y in range(1, len(down))], minor=True)
        axes.grid(which="minor", color=theme.paper, linewidth=1)
        axes.set_axisbelow(False)
    axes.tick_params(which="both", length=0)
    for set_ticks, names, most in ((axes.set_xticks, across, 16), (axes.set_yticks, down, 24)):
        step = -(-len(names) // most)
        set_ticks(range(0, len(names), step), names[::step])
    axes.set_xlabel(heat.axis, color=theme.muted)
    return figure, axes
