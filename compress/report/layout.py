"""Tables and sentences that no width cuts: lines break between words and never inside a figure; tables that are too wide fold
names, then leave columns out in a fixed order, then become a stanza a row."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

GAP = 2  # between columns
INDENT = 2  # of what goes on from the line above
NARROW = 24  # columns that a sentence has at least beside its name

_UNITS = "B|KiB|MiB|GiB|TiB|KB|MB|GB|TB|s|min|h|points|times|bits|tokens|nats"
_INTERVAL = r"\[[^\[\]]{1,40}\]"
_WHOLE = tuple(
    map(
        re.compile,
        (
            rf"\S+(?: (?:{_UNITS}))? {_INTERVAL}\S*",  # an estimate and its interval; where that is too wide, the interval
            rf"{_INTERVAL}\S*",
            rf"(?<![^\s(])[-+~]?\d[\d.,]*%? (?:{_UNITS})\b\S*",
            r"`[^`]{1,40}`\S*",
            r"--[\w-]+ (?:'[^']{1,60}'|[^\s']\S*)",  # an option and its value
        ),
    )
)
_JOINTS = re.compile(r"(?<=[-_./:,@])(?=[^\s\d])|(?<=[a-zA-Z][-_/@])")
"""Where a word may be broken that is wider than the line: not inside a number."""


def broken(text: str, width: int, indent: int = 0) -> list[tuple[int, int]]:
    """Spans [start, stop) of `text` that make lines of at most `width` columns, the first one `indent` wider than the others.

    Breaks between words; inside one only where it is wider than a line, at its joints.
    """
    lines: list[tuple[int, int]] = []
    start = stop = 0
    for first, last in _pieces(text, width - indent):
        room = width - (indent if lines else 0)
        if stop > start and cell_len(text[start:last]) > room:
            lines.append((start, stop))
            start = first
        stop = last
    return [*lines, (start, stop)]


def narrowest(text: str) -> int:
    """Columns that a text takes at least: its widest word, interval or number with its unit."""
    found = (match[0] for kind in (*_WHOLE[1:], re.compile(r"\S+")) for match in kind.finditer(text))
    return max(map(cell_len, found), default=0)


def _pieces(text: str, width: int) -> Iterator[tuple[int, int]]:
    """Spans of what stays together, each with no space at its ends."""
    found = (match for kind in _WHOLE for match in kind.finditer(text))
    whole = [match.span() for match in found if cell_len(match[0]) <= width]
    start = 0
    for space in (*re.finditer(r"\s+", text), None):
        end = len(text) if space is None else space.start()
        if space is not None and any(first < end < last for first, last in whole):
            continue
        if end > start:
            yield from _parts(text, start, end, width)
        start = end if space is None else space.end()


def _parts(text: str, start: int, end: int, width: int) -> Iterator[tuple[int, int]]:
    """One word, or the parts of one that is wider than a line."""
    joints = [start + match.end() for match in _JOINTS.finditer(text[start:end])]
    while cell_len(text[start:end]) > width:
        fitting = [joint for joint in joints if joint > start and cell_len(text[start:joint]) <= width]
        cut = fitting[-1] if fitting else start + 1
        while not fitting and cell_len(text[start : cut + 1]) <= width:
            cut += 1
        yield start, cut
        start = cut
    if end > start:
        yield start, end


class Prose:
    """A sentence or more, to be broken into lines; those behind the first are indented."""

    def __init__(self, text: str | Text, style: str = "", indent: int = INDENT):
        self.text, self.indent = Text(text, style=style) if isinstance(text, str) else text, indent

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, line in enumerate(self.lines(options.max_width)):
            yield Text(" " * self.indent if number else "").append_text(line)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widest = max((cell_len(line) for line in self.text.plain.splitlines()), default=0)
        return Measurement(min(widest, 20), widest)

    def lines(self, width: int) -> Iterator[Text]:
        """Without the indentation."""
        for part in self.text.split("\n", allow_blank=True):
            for start, stop in broken(part.plain, width, self.indent):
                yield part[start:stop] if stop > start else Text()


@dataclass(frozen=True)
class Head:
    """The heading of a column. right: of figures, aligned at their ends; folds: the least width that names may be folded to, 0
    for never; most: the width that they are folded to in any case, 0 for none; spare: where there is no room the columns with
    the greatest are left out first, those with 0 never."""

    text: str
    right: bool = True
    folds: int = 0
    most: int = 0
    spare: int = 0


@dataclass(frozen=True)
class Line:
    """A cell for every column. section: a line is left free behind it."""

    cells: tuple[str, ...]
    style: str = ""
    section: bool = False


class Grid:
    """A table for any width.

    Too wide, it brings columns closer, folds names, then leaves spare columns out; where even that does not do, every line
    becomes a stanza: its names, then every figure behind its heading.
    """

    def __init__(self, heads: Sequence[Head], lines: Sequence[Line]):
        self.heads, self.lines = tuple(heads), tuple(lines)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fitting = self._fitting(options.max_width)
        yield from self._stanzas(options.max_width) if fitting is None else self._table(*fitting)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(20, options.max_width), options.max_width)

    def _fitting(self, room: int) -> tuple[dict[int, int], int] | None:
        """Width by number of the columns that are shown, and the gap between them; None where too few would fit."""
        natural = {n: self._natural(n) for n in range(len(self.heads))}
        spare = sorted((n for n in natural if self.heads[n].spare), key=lambda n: -self.heads[n].spare)
        for gone in range(len(spare) + 1):
            left = {n: width for n, width in natural.items() if n not in spare[:gone]}
            for gap in (GAP, 1):
                free = room - gap * (len(left) - 1)
                if (widths := self._folded(left, free)) is not None:
                    return self._headed(widths, free), gap
        return None

    def _headed(self, widths: dict[int, int], room: int) -> dict[int, int]:
        """With the room that is left given to headings: two lines for each before one for any."""
        widths = dict(widths)
        for height in (2, 1):
            for n in widths:
                text, free = self.heads[n].text, room - sum(widths.values())
                wider = range(widths[n], widths[n] + free + 1)
                widths[n] = next((w for w in wider if len(_lines(text, w)) <= height), widths[n])
        return widths

    def _natural(self, n: int) -> int:
        """The widest cell, or the widest word of the heading."""
        head = self.heads[n]
        found = max(map(cell_len, (*head.text.split(), *(line.cells[n] for line in self.lines))), default=0)
        return min(found, head.most) if head.most else found

    def _folded(self, natural: dict[int, int], room: int) -> dict[int, int] | None:
        """The widths where names give way to figures, the widest first; None where they cannot."""
        widths = dict(natural)
        over = sum(widths.values()) - room
        for n in sorted((n for n in widths if self.heads[n].folds), key=lambda n: -widths[n]):
            less = min(max(over, 0), max(widths[n] - self.heads[n].folds, 0))
            widths[n], over = widths[n] - less, over - less
        return widths if over <= 0 else None

    def _table(self, widths: dict[int, int], gap: int) -> Iterator[Text]:
        heads = {n: _lines(self.heads[n].text, width) for n, width in widths.items()}
        if any(head.text for head in self.heads):
            yield from self._aligned(heads, widths, gap, "bold", low=True)
            yield Text("─" * (sum(widths.values()) + gap * (len(widths) - 1)))
        for line in self.lines:
            cells = {n: _lines(line.cells[n], width) for n, width in widths.items()}
            yield from self._aligned(cells, widths, gap, line.style)
            if line.section:
                yield Text()

    def _aligned(
        self, cells: dict[int, list[str]], widths: dict[int, int], gap: int, style: str, low: bool = False
    ) -> Iterator[Text]:
        """Cells beside each other, the shorter ones at the top, or low."""
        height = max(map(len, cells.values()))
        for at in range(height):
            shown = []
            for n, width in widths.items():
                number = at - (height - len(cells[n])) if low else at
                text = cells[n][number] if 0 <= number < len(cells[n]) else ""
                space = " " * (width - cell_len(text))
                shown.append(space + text if self.heads[n].right else text + space)
            yield Text((" " * gap).join(shown).rstrip(), style=style)

    def _stanzas(self, width: int) -> Iterator[Text]:
        for line in self.lines:
            cells = [(head, cell) for head, cell in zip(self.heads, line.cells, strict=True) if cell]
            figures = [f"{head.text} {cell}" for head, cell in cells if head.right]
            yield from _packed([cell for head, cell in cells if not head.right], "  ", width, "bold")
            for text in _packed(figures, " · ", width - INDENT, line.style):
                yield Text(" " * INDENT).append_text(text)
            if line.section:
                yield Text()


def _lines(text: str, width: int) -> list[str]:
    return [text[start:stop] for start, stop in broken(text, width)]


def _packed(items: Sequence[str], between: str, width: int, style: str) -> Iterator[Text]:
    """Items beside each other, as many on a line as fit."""
    line = ""
    for item in items:
        if line and cell_len(line + between + item) > width:
            yield Text(line + between.rstrip(), style=style)
            line = item
        else:
            line = line + between + item if line else item
    for start, stop in broken(line, width) if line else ():
        yield Text(line[start:stop], style=style)


@dataclass(frozen=True)
class Facts:
    """Names on the left, sentences beside them; under them where it is narrow."""

    pairs: tuple[tuple[str, str | Text], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        left = max((cell_len(name) for name, _ in self.pairs), default=0) + GAP
        beside = options.max_width - left >= NARROW
        for name, told in self.pairs:
            lead = name.ljust(left) if beside else ""
            if name and not beside:
                yield from Prose(name).lines(options.max_width)
            indent = left if beside else INDENT
            for number, line in enumerate(Prose(told, indent=0).lines(options.max_width - indent)):
                yield Text(lead if beside and number == 0 else " " * indent).append_text(line)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(20, options.max_width), options.max_width)
