"""Results as pieces of HTML for notebooks: plain tables, in the colours and fonts of the page around them, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from compress.report.advice import Advice
from compress.report.columns import columns
from compress.report.compare import Comparison, Row
from compress.report.compare_table import marked, notes
from compress.report.layout import Grid, Head, Line
from compress.report.plan_table import role_table, saving_lines, totals
from compress.report.scorecard import Scorecard
from compress.report.table import Figures, evaluation_facts

if TYPE_CHECKING:
    from compress.plan.plan import Plan

_LEFT, _RIGHT = "text-align: left", "text-align: right"
_FINE = "font-size: smaller; opacity: 0.75"


def scorecard_html(card: Scorecard, paths: Sequence[str] = ()) -> str:
    """What was measured, a column for the original and each artifact; the gate; what there is to know; where the artifacts lie."""
    figures = Figures(card)
    parts = [_line(f"<b>{escape(card.model)}</b> · recipe <b>{escape(card.recipe)}</b>")]
    parts.append(_table(Grid((Head("", right=False), *map(Head, figures.heads)), figures.lines)))
    parts += [_line(escape(line), _FINE) for line in evaluation_facts(card).splitlines()]
    parts.append(_line(escape(_verdict(card))))
    parts += [_line(escape(f"Note: {note}"), _FINE) for note in card.notes]
    parts += [_line(f"<code>{escape(path)}</code>") for path in paths]
    return _whole(parts)


def _verdict(card: Scorecard) -> str:
    failed = [f"{check.name}: {check.detail}" for check in card.gate.checks if not check.passed]
    told = f" ({sum(check.passed for check in card.gate.checks)} of {len(card.gate.checks)} checks)"
    count = len(card.fallbacks)
    told += f", {count or 'no'} fallback{'' if count == 1 else 's'}"
    return (
        f"Integrity gate: {'passed' if card.gate.passed else 'FAILED'}{told}{''.join(f'; {line}' for line in failed)}"
    )


def comparison_html(comparison: Comparison, advice: Advice) -> str:
    """A line a variant, what to take, what the marks mean."""
    shown = columns(comparison)
    heads = [Head("", right=False), *(Head(column.heading, right=not column.left) for column in shown)]

    def line(row: Row) -> Line:
        name = f"{marked(row)} {row.name}".strip()
        return Line((name, *(str(column.cell(row)) for column in shown)), "bold" if row.on_front else "")

    parts = [_line(f"<b>{escape(comparison.model)}</b>")]
    parts += [_line(escape(warning)) for warning in comparison.warnings]
    parts.append(_table(Grid(heads, [line(row) for row in comparison.rows])))
    parts.append(f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in advice.sentences)}</ul>")
    parts += [_line(escape(note), _FINE) for note in notes(comparison)]
    return _whole(parts)


def plan_html(plan: Plan) -> str:
    """A line a role and codec, what it makes and takes, what there is to know."""
    parts = [_line(f"<b>{escape(plan.recipe.model)}</b> · recipe <b>{escape(plan.recipe.name)}</b>")]
    parts.append(_table(role_table(plan)))
    parts += [_line(escape(f"{name}: {told}")) for name, told in totals(plan).pairs]
    parts += [_line(escape(line.text.plain), _FINE) for line in saving_lines(plan)]
    parts += [_line(escape(f"Fallback: {exchange}"), _FINE) for exchange in plan.exchanges]
    parts += [_line(escape(f"Note: {warning}"), _FINE) for warning in plan.warnings]
    return _whole(parts)


def _table(grid: Grid) -> str:
    """Lines in bold stay so."""

    def cells(texts: Sequence[str], tag: str) -> str:
        styles = (_RIGHT if head.right else _LEFT for head in grid.heads)
        return "".join(f'<{tag} style="{s}">{escape(t)}</{tag}>' for t, s in zip(texts, styles, strict=True))

    heads = cells([head.text for head in grid.heads], "th")
    body = "".join(f"<tr>{cells(line.cells, 'th' if 'bold' in line.style else 'td')}</tr>" for line in grid.lines)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _line(markup: str, style: str = "") -> str:
    return f'<div style="{style}">{markup}</div>' if style else f"<div>{markup}</div>"


def _whole(parts: Sequence[str]) -> str:
    return "<div>" + "\n".join(parts) + "</div>"
