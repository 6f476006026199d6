"""A comparison in a terminal of any width, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from compress.report.advice import Advice
from compress.report.columns import Column, columns
from compress.report.compare import Comparison, Row, text_facts

GAP = 2  # between columns
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
    """One line a variant. Columns that do not fit beside each other go on in a further block, so that none is cut."""

    def __init__(self, comparison: Comparison, advice: Advice):
        self.comparison, self.advice = comparison, advice

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.comparison.model, style="bold")
        for warning in self.comparison.warnings:
            yield Text(warning, style="yellow")
        for number, block in enumerate(self._blocks(options.max_width)):
            if number:
                yield Text()
            yield self._table(block, options.max_width)
        yield Text()
        for sentence in self.advice.sentences:
            yield Text(sentence)
        yield Text()
        yield Group(*(Text(note, style="dim") for note in notes(self.comparison)))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(20, options.max_width)

    def _blocks(self, width: int) -> list[list[Column]]:
        left = room = self._room(width)
        blocks: list[list[Column]] = [[]]
        for column in columns(self.comparison):
            wanted = self._width(column)
            if wanted > room and blocks[-1]:
                blocks.append([])
                room = left
            blocks[-1].append(column)
            room -= wanted
        return blocks

    def _width(self, column: Column) -> int:
        return GAP + max(
            cell_len(text) for text in (column.heading, *(str(column.cell(row)) for row in self.comparison.rows))
        )

    def _room(self, width: int) -> int:
        """Beside marks and names."""
        return width - self._name_width(width) - self._marks_width - 2 * GAP

    @property
    def _marks_width(self) -> int:
        return max(len(marked(row)) for row in self.comparison.rows)

    def _name_width(self, width: int) -> int:
        longest = max(cell_len(row.name) for row in self.comparison.rows)
        return min(longest, max(int(width * NAME_SHARE), NAME_LEAST))

    def _table(self, block: Sequence[Column], width: int) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        table.add_column("", width=self._marks_width, no_wrap=True)
        table.add_column("", min_width=self._name_width(width), overflow="fold")
        fits = sum(map(self._width, block)) <= self._room(
            width
        )  # else names give way, then a column on its own is folded
        for column in block:
            heading = Text(column.heading)
            table.add_column(heading, justify="left" if column.left else "right", overflow="fold", no_wrap=fits)
        originals = len(self.comparison.originals)
        for number, row in enumerate(self.comparison.rows, 1):
            style = "dim" if row.original or row.mark else "bold" if row.on_front else ""
            cells = [Text(str(column.cell(row))) for column in block]
            table.add_row(Text(marked(row)), Text(row.name), *cells, style=style, end_section=number == originals)
        return table


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
