"""The documents of a text set: read, mixed by weight, shuffled by a seed."""

from __future__ import annotations

import json
import lzma
import os
import random
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from compress.errors import CalibrationError, MissingExtra
from compress.text.sets import TextSet, data_root, find_data, load_definition

HUB_SHUFFLE_BUFFER = 10_000
_BLANK = r"(?:\n \n|\n{5})"  # a blank row in the file, and where rows are joined by blank lines
_HEADING = re.compile(rf"{_BLANK} = (?!=)[^\n]*[^\n= ] = (?={_BLANK})")


# ------------------------------------------------------------------------------------------ documents


def load_documents(definition: TextSet, *, seed: int | None = None, as_file: bool = False) -> Iterator[str]:
    """The non-empty documents of a set: in file order, or shuffled by `seed`. as_file: text files as they are, less a last
    line end, also where the set's format words them otherwise.

    A mix takes the next document from the part that is furthest behind its weight, counted in characters, and
    ends when that part has no more, so the proportions hold over any prefix.

    Raises:
        CalibrationError: a file is missing or damaged, a column is missing, the hub cannot be reached.
        MissingExtra: a hub set without the `datasets` package.
    """
    if definition.mix:
        yield from _mixed(definition, seed, as_file)
    elif definition.hub:
        yield from _hub_documents(definition, seed)
    else:
        texts = (text for file in definition.files for text in _file_documents(file, definition, as_file))
        documents = [text for text in texts if text.strip()]
        if seed is not None:
            random.Random(seed).shuffle(documents)
        yield from documents


def _file_documents(file: Path, definition: TextSet, as_file: bool) -> Iterator[str]:
    kind = definition.format or ("jsonl" if ".jsonl" in file.name else "text")
    if kind == "jsonl":
        for number, row in _json_lines(file):
            text = row.get(definition.column)
            if not isinstance(text, str):
                fix = "set 'column' to the field that holds it"
                if isinstance(row.get("messages") or row.get("conversations"), list):
                    fix = "rows of chat messages are not read; render each with the model's chat template into one text"
                raise CalibrationError(f"{file}, line {number}: no text in '{definition.column}'; {fix}")
            yield text
        return
    text = _read_text(file)
    if as_file:
        text = text.removesuffix("\n")
    elif kind == "wikitext":
        # The rows of the hub's "wikitext" set joined by blank lines, the text of most published perplexities:
        # a row is a line with its end, or nothing where the line is blank.
        lines = text.removesuffix("\n").split("\n")
        text = "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)
    yield text


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
    return sum((stamp(load_definition(_beside(definition, name))) for name in definition.mix), own)


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:
        return None


def _read_text(file: Path) -> str:
    try:
        data = file.read_bytes()
        text = (lzma.decompress(data) if file.suffix == ".xz" else data).decode("utf-8-sig")
    except FileNotFoundError:
        raise CalibrationError(f"{file}: no such file; it is named by the set's definition") from None
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{file}: damaged or not UTF-8 text ({error})") from error
    if "\0" in text:
        raise CalibrationError(f"{file} is no text: it holds NUL characters; give UTF-8 text")
    return text


def _json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not str.splitlines(): a JSON string may hold U+2028, which that takes for a line end.
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise CalibrationError(f"{file}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise CalibrationError(f'{file}, line {number}: expected an object, e.g. {{"text": "..."}}')
        yield number, row


def _mixed(definition: TextSet, seed: int | None, as_file: bool) -> Iterator[str]:
    parts = {}
    for name in definition.mix:
        part = load_definition(_beside(definition, name))
        if part.mix:
            raise CalibrationError(f"{definition.path}: '{name}' is itself a mix; name its parts instead")
        parts[name] = load_documents(part, seed=seed, as_file=as_file)
    taken = dict.fromkeys(parts, 0.0)
    while True:
        behind = min(taken, key=lambda name: taken[name])
        document = next(parts[behind], None)
        if document is None:
            return
        taken[behind] += len(document) / definition.mix[behind]
        yield document


def reads_hub(definition: TextSet) -> bool:
    """Whether a set, or a part of its mix, has to be downloaded."""
    return bool(definition.hub) or any(load_definition(_beside(definition, name)).hub for name in definition.mix)


def _beside(definition: TextSet, name: str) -> Path:
    folder = definition.path.parent if definition.path else data_root("calibration")
    path = folder / f"{name}.yaml"
    return path if path.is_file() else find_data("calibration", name)


def _hub_documents(definition: TextSet, seed: int | None) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtra("datasets", "hub", f"the set '{definition.name}'") from error
    hub = definition.hub
    column = hub.get("column", definition.column)
    try:
        rows = load_dataset(hub["path"], hub.get("name"), split=hub.get("split", "train"), streaming=True)
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=HUB_SHUFFLE_BUFFER)
        for row in rows:
            if column not in row:
                columns = ", ".join(row)
                raise CalibrationError(f"hub set '{hub['path']}' has no column '{column}'; it has: {columns}")
            if row[column].strip():
                yield row[column]
    except (OSError, ValueError) as error:  # no network, no such set, config or split
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "check the name and the network, or use a local set"
        raise CalibrationError(f"cannot read hub set '{hub['path']}': {reason}; {fix}") from error


def task_documents(name: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` rows (all if None) of a bundled task, e.g. "blimp" or "lambada", as in its file.

    BLiMP's rows go round the 67 phenomena, so a limit that is a multiple of 67 weighs them equally.

    Raises:
        CalibrationError: no such task, or not a set of JSON lines.
    """
    definition = load_definition(find_data("eval", name))
    if not definition.files or not all(".jsonl" in file.name for file in definition.files):
        raise CalibrationError(f"'{name}' is not a task: it holds no JSON lines")
    rows = (row for file in definition.files for _, row in _json_lines(file))
    return list(islice(rows, limit))


def is_bundled_task(name: str) -> bool:
    """Whether a task of that name and its documents ship with the project."""
    return re.fullmatch(r"[\w-]+", name) is not None and (data_root("eval") / "tasks" / f"{name}.yaml").is_file()


def task_texts(row: Mapping[str, Any]) -> list[str]:
    """All texts of a task's document."""
    values = (value if isinstance(value, list) else [value] for value in row.values())
    return [text for entries in values for text in entries if isinstance(text, str)]
