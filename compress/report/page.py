"""A comparison as one HTML file: no script, no font, no picture from elsewhere; light and dark; nothing of this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.reading import shown
from compress.report.advice import Advice
from compress.report.columns import Column, columns
from compress.report.compare import Comparison, Row, model_name
from compress.report.compare_table import notes
from compress.report.heat import error_map, error_scale, expert_map, role_name
from compress.report.measured import cleaner, measured
from compress.report.numbers import Cell, human_seconds
from compress.report.plots import Measure, measures, size_plot
from compress.report.scorecard import Scorecard
from compress.report.table import fallback_line

TEMPLATES = Path(__file__).parent / "templates"
SHOWN_LINES = 12  # of fallbacks and checks of one run


@dataclass(frozen=True)
class Line:
    """A row of the table as it is shown."""

    row: Row
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Figure:
    """A plot with what stands above it; svg is markup."""

    svg: str
    caption: str
    name: str = ""


@dataclass(frozen=True)
class Told:
    """What a run has to say about its own making."""

    names: tuple[str, ...]
    passed: bool
    summary: str
    checks: tuple[str, ...]
    fallbacks: tuple[str, ...]
    notes: tuple[str, ...]


def page(comparison: Comparison, advice: Advice) -> str:
    """The whole file. Raises MissingExtra without matplotlib."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    def emphasized(sentence: str) -> Markup:
        """A sentence with the names that it says to take in bold."""
        text = escape(sentence)
        for name in advice.picks:
            text = Markup(str(text).replace(str(escape(name)), f"<strong>{escape(name)}</strong>", 1))
        return text

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg": Markup, "emphasized": emphasized}
    return environment.get_template("compare.html").render(_context(comparison, advice)) + "\n"


def _context(comparison: Comparison, advice: Advice) -> dict[str, Any]:
    shown_columns = columns(comparison)
    runs = _runs(comparison)
    return {
        "model": comparison.model,
        "advice": advice,
        "warnings": comparison.warnings,
        "plots": [_plot(comparison, measure) for measure in measures(comparison)],
        "columns": shown_columns,
        "lines": [_line(row, shown_columns) for row in comparison.rows],
        "notes": notes(comparison),
        "errors": list(_error_maps(comparison)),
        "scale": error_scale(comparison.variants),
        "experts": list(_expert_maps(comparison)),
        "runs": [_told(card, rows) for card, rows in runs],
        "measured": list(measured(comparison)),
        "made": [_made(card, rows) for card, rows in runs],
    }


def _plot(comparison: Comparison, measure: Measure) -> Figure:
    better = "higher" if measure.more_is_better else "lower"
    return Figure(
        size_plot(comparison, measure), f"{measure.heading[0].upper()}{measure.heading[1:]} – {better} is better"
    )


def _line(row: Row, shown_columns: Sequence[Column]) -> Line:
    return Line(row, tuple(column.cell(row) for column in shown_columns))


def _runs(comparison: Comparison) -> list[tuple[Scorecard, list[Row]]]:
    """Every card once, with its rows."""
    found: dict[int, tuple[Scorecard, list[Row]]] = {}
    for row in comparison.variants:
        found.setdefault(id(row.card), (row.card, []))[1].append(row)
    return list(found.values())


def _error_maps(comparison: Comparison) -> Iterator[Figure]:
    each = [
        {row.errors: row for row in reversed(rows)} for _, rows in _runs(comparison)
    ]  # of containers of one run the first
    scale = error_scale(comparison.variants)
    for row in (
        row for rows in each for row in reversed(rows.values()) if any(e.layer is not None for e in row.errors)
    ):
        outside = [f"{role_name(error.role)} {error.error:.1g}" for error in row.errors if error.layer is None]
        codecs = list(dict.fromkeys(error.codec for error in row.errors if error.layer is not None))
        told = f"{', '.join(codecs)}{'; ' if outside else ''}{', '.join(outside)}"
        yield Figure(error_map(row, scale), told, row.name)


def _expert_maps(comparison: Comparison) -> Iterator[Figure]:
    """One for all runs that saw the same tokens in the same experts."""
    alike: dict[Any, list[Row]] = {}
    for card, rows in _runs(comparison):
        if card.experts:
            alike.setdefault(tuple((layer.tokens, layer.cold) for layer in card.experts), []).append(rows[0])
    for rows in alike.values():
        yield Figure(expert_map(rows[0]), "", ", ".join(row.name for row in rows))


def _told(card: Scorecard, rows: Sequence[Row]) -> Told:
    clean = cleaner(card)
    gate = card.gate
    done = f" ({sum(check.passed for check in gate.checks)} of {len(gate.checks)} checks)" if gate.checks else ""
    count = len(card.fallbacks)
    fallbacks = [clean(fallback_line(first, n).replace("->", "→")) for first, n in card.fallback_kinds]
    return Told(
        names=tuple(row.name for row in rows),
        passed=gate.passed,
        summary=f"gate {'passed' if gate.passed else 'FAILED'}{done}, {count or 'no'} fallback{'' if count == 1 else 's'}",
        checks=tuple(
            clean(f"{'ok' if check.passed else 'FAILED'}: {check.name}{f': {check.detail}' if check.detail else ''}")
            for check in gate.checks
        ),
        fallbacks=tuple(_first(fallbacks)),
        notes=tuple(clean(note) for note in card.notes),
    )


def _first(lines: Sequence[str]) -> list[str]:
    more = len(lines) - SHOWN_LINES
    return [*lines[:SHOWN_LINES], *([f"and {more} more kinds in scorecard.json"] if more > 0 else [])]


def _made(card: Scorecard, rows: Sequence[Row]) -> tuple[str, list[str]]:
    """What a run was made with."""
    facts = [f"recipe {shown(card.recipe)}" + (f" ({card.recipe_digest[:12]})" if card.recipe_digest else "")]
    if card.calibration:
        settings = card.calibration
        facts.append(
            f"calibration {settings.get('samples')} x {settings.get('length')} of {model_name(str(settings.get('dataset')))}"
        )
    facts += [f"{shown(name)} {shown(version)}" for name, version in card.versions.items()]
    if card.stages:
        facts.append(f"made in {human_seconds(sum(stage.seconds for stage in card.stages))}")
    if card.created:
        facts.append(shown(card.created[:10]))
    return ", ".join(row.name for row in rows), facts
