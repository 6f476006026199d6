"""The documents of a text set: read, mixed by weight, shuffled by a seed."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from compress.errors import CalibrationError
from compress.text.hub import Progress, hub_rows
from compress.text.rows import STDIN, Row, json_lines, kind_of, named, read_text, rows, sniffed
from compress.text.sets import TextSet, data_root, find_data, load_definition
from compress.text.shapes import Misread, Talk, understood
from compress.text.sources import part, parts
from compress.text.talks import Document, Speaker

_BLANK = r"(?:\n \n|\n{5})"  # a blank row in the file, and where rows are joined by blank lines
_HEADING = re.compile(rf"{_BLANK} = (?!=)[^\n]*[^\n= ] = (?={_BLANK})")


# ------------------------------------------------------------------------------------------ documents


@dataclass
class Reading:
    """How calibration text is read, and what was met on the way: talks become text, lines are due.

    progress: told how far a download is.
    """

    speaker: Speaker
    progress: Progress | None = None
    ended: list[str] = field(default_factory=list)
    """Parts of a mix that had no more, in that order."""


def load_documents(definition: TextSet, *, seed: int | None = None, as_file: bool = False) -> Iterator[str]:
    """The non-empty documents of a set that holds no talks: in file order, or shuffled by `seed`. as_file: text files as they
    are, less a last line end, also where the set's format words them otherwise.

    A mix takes the next document from the part that is furthest behind its weight, counted in characters, and
    ends when that part has no more, so the proportions hold over any prefix. With `ends: last` the others go on.

    Raises:
        CalibrationError: a file is missing or damaged, rows hold no text, the hub cannot be reached.
        MissingExtra: a hub set without the `datasets` package, a Parquet file without pyarrow.
    """
    return (document.text for document in read_documents(definition, seed=seed, as_file=as_file))


def read_documents(
    definition: TextSet, reading: Reading | None = None, *, seed: int | None = None, as_file: bool = False
) -> Iterator[Document]:
    """The same with talks, which `reading` makes text of; without one they are refused."""
    if definition.mix:
        yield from _mixed(definition, reading, seed, as_file)
    elif definition.hub:
        yield from _hub_documents(definition, reading, seed)
    else:
        found = [text for file in definition.files for text in _file_texts(file, definition, reading, as_file)]
        if seed is not None:
            random.Random(seed).shuffle(found)
        yield from (_document(text, reading) for text in found)  # talks are rendered as far as they are wanted


def _file_texts(file: Path, definition: TextSet, reading: Reading | None, as_file: bool) -> Iterator[Talk | str]:
    """What a file holds, but for what is empty."""
    kind = definition.format or (sniffed(file) if file == STDIN else kind_of(file.name) or "text")
    if kind not in ("text", "wikitext"):
        for row in rows(file, kind):
            if text := _row_text(row, definition.column, named(file), reading):
                yield text
        return
    text = read_text(file)
    if as_file:
        text = text.removesuffix("\n")
    elif kind == "wikitext":
        # The rows of the hub's "wikitext" set joined by blank lines, the text of most published perplexities:
        # a row is a line with its end, or nothing where the line is blank.
        lines = text.removesuffix("\n").split("\n")
        text = "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)
    if text.strip():
        yield text


def _row_text(row: Row, column: str, source: str, reading: Reading | None) -> Talk | str:
    """What a row says, empty where that is nothing."""
    try:
        found = understood(row.value, column)
    except Misread as why:
        raise CalibrationError(f"{source}, {row.place}: {why}") from None
    if isinstance(found, str):
        return found if found.strip() else ""
    if reading is None:
        raise CalibrationError(
            f"{source}, {row.place}: talks are read for calibration only; render each with the model's chat template into "
            "one text, and name it as 'column'"
        )
    return found if found.messages else ""


def _document(text: Talk | str, reading: Reading | None) -> Document:
    if isinstance(text, str):
        return Document(text)
    assert reading is not None  # see `_row_text`
    return reading.speaker.text_of(text)


def articles(definition: TextSet, document: str) -> list[int]:
    """Where the articles of a document begin, in characters, the first at 0: WikiText files hold many, each under a heading
    ` = Title = ` between blank lines."""
    if definition.format != "wikitext":
        return [0]
    return [0, *(heading.start() for heading in _HEADING.finditer(document) if heading.start() > 0)]


def stamp(definition: TextSet) -> tuple[tuple[str, int, int], ...]:
    """What tells whether the files of a set are still the same: their names, sizes and times of change."""
    files = [*definition.files, *([definition.path] if definition.path else [])]
    own = tuple((str(file), found.st_size, found.st_mtime_ns) for file in files if (found := _stat(file)))
    return sum((stamp(part(definition, name)) for name in definition.mix), own)


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:
        return None


def _mixed(definition: TextSet, reading: Reading | None, seed: int | None, as_file: bool) -> Iterator[Document]:
    found = parts(definition)
    open_parts = {name: read_documents(one, reading, seed=seed, as_file=as_file) for name, one in found.items()}
    taken = dict.fromkeys(open_parts, 0.0)
    while taken:
        behind = min(taken, key=lambda name: taken[name])
        document = next(open_parts[behind], None)
        if document is None:
            del taken[behind]
            if reading is not None:
                reading.ended.append(behind)
            if definition.ends == "first":
                return
            continue
        taken[behind] += len(document.text) / definition.mix[behind]
        yield document


def reads_hub(definition: TextSet) -> bool:
    """Whether a set, or a part of its mix, has to be downloaded."""
    return bool(definition.hub) or any(one.hub for one in parts(definition).values())


def hub_sets(definition: TextSet) -> tuple[str, ...]:
    """The sets of the hub, by id, that a set or the parts of its mix are."""
    found = (one.hub.get("path") for one in (definition, *parts(definition).values()))
    return tuple(dict.fromkeys(path for path in found if path))


def _hub_documents(definition: TextSet, reading: Reading | None, seed: int | None) -> Iterator[Document]:
    column = definition.hub.get("column", definition.column)
    source = f"hub set '{definition.hub['path']}'"
    found = hub_rows(definition.hub, seed, None if reading is None else reading.progress)
    for number, row in enumerate(found, start=1):
        if text := _row_text(Row(f"row {number}", row), column, source, reading):
            yield _document(text, reading)


def task_documents(name: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` rows (all if None) of a bundled task, e.g. "blimp" or "lambada", as in its file.

    BLiMP's rows go round the 67 phenomena, so a limit that is a multiple of 67 weighs them equally.

    Raises:
        CalibrationError: no such task, or not a set of JSON lines.
    """
    definition = load_definition(find_data("eval", name))
    if not definition.files or not all(".jsonl" in file.name for file in definition.files):
        raise CalibrationError(f"'{name}' is not a task: it holds no JSON lines")
    found = (row.value for file in definition.files for row in json_lines(file) if isinstance(row.value, dict))
    return list(islice(found, limit))


def is_bundled_task(name: str) -> bool:
    """Whether a task of that name and its documents ship with the project."""
    return re.fullmatch(r"[\w-]+", name) is not None and (data_root("eval") / "tasks" / f"{name}.yaml").is_file()


def task_texts(row: Mapping[str, Any]) -> list[str]:
    """All texts of a task's document."""
    values = (value if isinstance(value, list) else [value] for value in row.values())
    return [text for entries in values for text in entries if isinstance(text, str)]
