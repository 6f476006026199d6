"""What a file of text holds: its kind, by its name, and its rows, each with the place where it stands."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from compress.errors import CalibrationError, MissingExtra

STDIN = Path("-")
"""Stands for standard input wherever a file does."""
KINDS = {
    ".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet",
}  # fmt: skip
PACKED = (".xz", ".gz")
_UNPACK: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (b"\xfd7zXZ\x00", lzma.decompress),
    (b"\x1f\x8b", gzip.decompress),
)
"""By the first bytes, which do not lie as names may."""
CELL = 2**27  # characters of one cell of a table


class Row(NamedTuple):
    """A row of a file. place: where it stands, in words; value: a mapping, or a text where a JSON list holds texts."""

    place: str
    value: Mapping[str, Any] | str


def kind_of(name: str) -> str | None:
    """The kind of file that a name tells, packed or not; None where it tells none that is read."""
    name = name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return KINDS.get(Path(name).suffix)


def suffixes() -> str:
    """The kinds that are read, for people."""
    return f"{', '.join(KINDS)}, also with {' or '.join(PACKED)}"


def sniffed(file: Path) -> str:
    """The kind of standard input, by what it holds: JSON, JSON lines, or text."""
    text = read_text(file)
    start = text.lstrip()
    if start[:1] == "[" and _is_json(start):
        return "json"
    return "jsonl" if start[:1] == "{" and _is_json(start.partition("\n")[0]) else "text"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def rows(file: Path, kind: str) -> Iterator[Row]:
    """The rows of a file of any kind but text. CalibrationError for what cannot be read, MissingExtra for Parquet without
    pyarrow."""
    read = {"jsonl": json_lines, "json": _json, "csv": _table, "tsv": _table, "parquet": _parquet}[kind]
    return read(file)


def json_lines(file: Path) -> Iterator[Row]:
    """Rows of JSON, one a line."""
    # Not str.splitlines(): a JSON string may hold U+2028, which that takes for a line end.
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{named(file)}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise CalibrationError(f'{named(file)}, line {number}: expected an object, e.g. {{"text": "..."}}')
        yield Row(f"line {number}", row)


def _json(file: Path) -> Iterator[Row]:
    """A JSON list of rows or texts; one row alone; or, under that name all the same, JSON lines."""
    text = read_text(file)
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from json_lines(file)
            return
        raise CalibrationError(f"{named(file)}: not JSON ({error})") from error
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{named(file)}: not JSON ({error})") from error
    for number, row in enumerate(found if isinstance(found, list) else [found], start=1):
        if not isinstance(row, dict | str):
            raise CalibrationError(
                f'{named(file)}, row {number}: expected an object, e.g. {{"text": "..."}}, or a text'
            )
        yield Row(f"row {number}", row)


def _table(file: Path) -> Iterator[Row]:
    """A table whose first row names the columns; a tab or a comma between cells, by the name."""
    csv.field_size_limit(CELL)
    tabs = kind_of(file.name) == "tsv"
    reader = csv.reader(io.StringIO(read_text(file), newline=""), delimiter="\t" if tabs else ",", strict=True)
    try:
        columns = next(reader, [])
        for cells in reader:
            if cells and len(cells) != len(columns):
                told = f"{len(cells)} cells under {len(columns)} columns"
                raise CalibrationError(
                    f"{named(file)}, line {reader.line_num}: {told}; quote cells that hold a separator"
                )
            if cells:
                yield Row(f"line {reader.line_num}", dict(zip(columns, cells, strict=True)))
    except csv.Error as error:
        raise CalibrationError(
            f"{named(file)}, line {reader.line_num}: not a table ({error}); correct its quotes"
        ) from None


def _parquet(file: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException
    except ImportError as error:
        raise MissingExtra("pyarrow", "hub", f"{file}, a Parquet file,") from error
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", row)
    except FileNotFoundError:
        raise _missing(file) from None
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(f"{file}: damaged or no Parquet file ({reason}); fetch it again") from None


def read_text(file: Path) -> str:
    """A whole file as text, unpacked. CalibrationError for one that is missing, damaged, or no text."""
    try:
        data = standard_input() if file == STDIN else file.read_bytes()
        for magic, unpack in _UNPACK:
            if data.startswith(magic):
                data = unpack(data)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise _missing(file) from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise CalibrationError(f"{named(file)}: damaged or not UTF-8 text ({error})") from error
    if "\0" in text:
        raise CalibrationError(f"{named(file)} is no text: it holds NUL characters; give UTF-8 text")
    return text


@cache
def standard_input() -> bytes:
    """All of standard input, read once and kept, so that a plan and its run see the same. CalibrationError where nobody
    sends anything."""
    if sys.stdin is None or sys.stdin.isatty():
        raise CalibrationError(
            "the calibration text is '-', but nothing is sent to standard input; send it there, e.g. "
            "cat talks.jsonl | compress run ..., or name a file"
        )
    return sys.stdin.buffer.read()


def named(file: Path) -> str:
    """A file for people."""
    return "standard input" if file == STDIN else str(file)


def _missing(file: Path) -> CalibrationError:
    return CalibrationError(f"{file}: no such file; it is named by the set's definition")
