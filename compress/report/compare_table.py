"""A comparison in a terminal of any width, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

from compress.report.advice import Advice
from compress.report.columns import Column, columns
from compress.report.compare import Comparison, Row, text_facts
from compress.report.layout import GAP, Grid, Head, Line, Prose

NAME_SHARE, NAME_LEAST = 0.3, 18  # of the width, or so many columns, before names are folded


def notes(comparison: Comparison) -> list[str]:
    """What the marks and brackets of a table mean, and with what its rows were measured."""
    lines = []
    if any(row.on_front for row in comparison.rows):
        lines.append("* on the front: no other variant here is both smaller and closer to the original")
    if any(row.failed for row in comparison.rows):
        lines.append("! failed its integrity gate; never on the front")
    scores = next((row.scores for row in comparison.rows if row.scores and not row.mark), None)
    if scores is not None:
        lines.append(f"[low, high]: 95% intervals. KL in nats per token; {text_facts(scores)}.")
    engines = sorted({row.scores.engine for row in comparison.variants if row.scores})
    if len(engines) > 1:
        lines.append(f"Scored by different engines: {', '.join(engines)}.")
    if any(row.speed for row in comparison.rows):
        lines.append("Tokens/s of different runs compare by the multiple of the original's, measured in the same run.")
        own, others = (
            sorted({row.speed.engine for row in rows if row.speed})
            for rows in (comparison.originals, comparison.variants)
        )
        if own and others and own != others:
            lines.append(
                f"The original was timed in {', '.join(own)}, the variants in {', '.join(others)}: part of the multiple is the engine's."
            )
    return lines


def marked(row: Row) -> str:
    """What stands before a row's name."""
    return ("!" if row.failed else "*" if row.on_front else "") + row.mark


class CompareTable:
    """One line a variant. Columns that do not fit beside each other go on in a further block, so that none is cut; size and
    KL divergence stand in the first."""

    def __init__(self, comparison: Comparison, advice: Advice):
        self.comparison, self.advice = comparison, advice

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Prose(self.comparison.model, "bold")
        for warning in self.comparison.warnings:
            yield Prose(warning, "yellow")
        for number, block in enumerate(self._blocks(options.max_width)):
            if number:
                yield Text()
            yield self._table(block, self._name_width(options.max_width))
        yield Text()
        for sentence in self.advice.sentences:
            yield Prose(sentence)
        yield Text()
        for note in notes(self.comparison):
            yield Prose(note, "dim")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(20, options.max_width), options.max_width)

    def _blocks(self, width: int) -> list[list[Column]]:
        """Columns that stand beside each other, in their order but for key ones, which are all in the first block."""
        shown = columns(self.comparison)
        room = width - self._name_width(width) - self._marks_width - 2 * GAP + GAP
        first = {id(column) for column in shown if column.key}
        left = room - sum(self._width(column) for column in shown if column.key)
        for column in shown:
            if not column.key and (wanted := self._width(column)) <= left:
                first.add(id(column))
                left -= wanted
            elif not column.key and not column.left:
                break  # the others in their order; names of containers may wait
        blocks, left = [[column for column in shown if id(column) in first]], 0
        for column in (column for column in shown if id(column) not in first):
            wanted = self._width(column)
            if wanted > left:
                blocks.append([])
                left = room
            blocks[-1].append(column)
            left -= wanted
        return [block for block in blocks if block]

    def _width(self, column: Column) -> int:
        """With the gap in front of it."""
        cells = (str(column.cell(row)) for row in self.comparison.rows)
        return GAP + max(map(cell_len, (*column.heading.split(), *cells)))

    @property
    def _marks_width(self) -> int:
        return max(len(marked(row)) for row in self.comparison.rows)

    def _name_width(self, width: int) -> int:
        longest = max(cell_len(row.name) for row in self.comparison.rows)
        return min(longest, max(int(width * NAME_SHARE), NAME_LEAST))

    def _table(self, block: Sequence[Column], name_width: int) -> Grid:
        heads = (
            Head("", right=False),
            Head("", right=False, most=name_width),
            *(Head(column.heading, right=not column.left, folds=0) for column in block),
        )
        originals, lines = len(self.comparison.originals), []
        for number, row in enumerate(self.comparison.rows, 1):
            style = "dim" if row.original or row.mark else "bold" if row.on_front else ""
            cells = (marked(row), row.name, *(str(column.cell(row)) for column in block))
            lines.append(Line(cells, style, section=number == originals))
        return Grid(heads, lines)


def compare_markdown(comparison: Comparison, advice: Advice) -> str:
    """All columns in one table of GitHub's Markdown, then what to take, ending with a newline."""
    shown = columns(comparison)
    lines = [f"{_escaped(warning)}  " for warning in comparison.warnings]
    lines += [""] if lines else []
    lines += [
        "| | variant | " + " | ".join(_escaped(column.heading) for column in shown) + " |",
        "|---|---|" + "|".join("---" if column.left else "---:" for column in shown) + "|",
    ]
    for row in comparison.rows:
        cells = [marked(row), row.name, *(str(column.cell(row)) for column in shown)]
        lines.append("| " + " | ".join(map(_escaped, cells)) + " |")
    lines += ["", *(f"- {_escaped(sentence)}" for sentence in advice.sentences), ""]
    told = notes(comparison)
    return "\n".join([*lines, *(f"{_escaped(note)}  " for note in told[:-1]), *map(_escaped, told[-1:]), ""])


def _escaped(text: str) -> str:
    """Without what means something in Markdown or HTML."""
    for character in "\\`*_|<>":
        text = text.replace(character, f"\\{character}")
    return text
