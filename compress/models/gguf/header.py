"""GGUF's header: metadata and where the tensors lie, checked before anything is read. No torch.

Format: docs/gguf.md of ggml-org/ggml, versions 2 and 3, little-endian. As in llama.cpp, tensors follow each other in the order
of their list, each from a multiple of the alignment on.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import BinaryIO

from compress.errors import CheckpointError
from compress.limits import GGUF_ALIGNMENT, GGUF_BYTES, GGUF_FIELDS, GGUF_KEY, GGUF_TENSORS, GGUF_VALUES, TENSOR_LENGTH
from compress.reading import Unreadable, in_words, shown, size_of

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SET = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DIMENSIONS = 4
_ENTRIES = 2**48  # of one dimension

Value = int | float | bool | str | list["Value"]


@dataclass(frozen=True)
class Stored:
    """One tensor of a file. type: of its blocks, as ggml names it; shape: rows last, as in a checkpoint; span: its bytes in
    the file, from and to."""

    file: Path
    name: str
    type: str
    shape: tuple[int, ...]
    span: tuple[int, int]


@dataclass(frozen=True)
class Header:
    """What a file, or a split set of them, says before its data. digest: sha256 of all of it."""

    files: tuple[Path, ...]
    fields: dict[str, Value]
    tensors: dict[str, Stored]
    digest: str


def shards(path: Path) -> list[Path]:
    """All files of the set that `path` (one of its files, or a single file) belongs to, in order."""
    path = Path(path)
    match = _SET.fullmatch(path.name)
    if not match:
        return [path]
    count = int(match[2])
    return [path.with_name(f"{match[1]}-{index + 1:05d}-of-{count:05d}.gguf") for index in range(count)]


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does, or there is none and its name is one of GGUF's."""
    try:
        if not path.is_file():
            return not path.exists() and path.name.endswith(".gguf")
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def read_set(path: Path) -> Header:
    """The headers of all files of the set that `path` belongs to; metadata is that of the first.

    Raises CheckpointError where a file is missing, no GGUF, damaged, truncated or of another set.
    """
    files = shards(path)
    if lost := next((file for file in files if not file.exists()), None):
        if len(files) == 1:
            raise CheckpointError(f"no GGUF file at {lost}")
        raise CheckpointError(f"{lost} is missing; all {len(files)} files of the set must lie together")
    return _read_set(tuple(files), tuple((f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@lru_cache(maxsize=2)
def _read_set(files: tuple[Path, ...], stamp: object) -> Header:
    parts = [read_header(file) for file in files]
    tensors: dict[str, Stored] = {}
    for index, part in enumerate(parts):
        if len(parts) > 1 and (part.fields.get("split.no"), part.fields.get("split.count")) != (index, len(parts)):
            raise CheckpointError(
                f"{part.files[0]} does not say that it is file {index + 1} of {len(parts)} of its set; fetch it again"
            )
        if twice := next((name for name in part.tensors if name in tensors), None):
            raise CheckpointError(f"{part.files[0]} holds {shown(twice)}, as another file of its set does")
        tensors |= part.tensors
    said = parts[0].fields.get("split.tensors.count", len(tensors))
    if len(parts) > 1 and said != len(tensors):
        raise CheckpointError(f"{files[0]} and its set hold {len(tensors)} tensors instead of {said}; fetch them again")
    return Header(files, parts[0].fields, tensors, sha256("".join(p.digest for p in parts).encode()).hexdigest())


def read_header(path: Path) -> Header:
    """The header of one file; checks that the file holds exactly the tensors that it lists.

    Raises CheckpointError where it is missing, no regular file, no GGUF, damaged or truncated.
    """
    try:
        size = size_of(path)
        with path.open("rb") as file:
            source = _Source(file, size)
            count, fields = _fields(source)
            alignment = fields.get("general.alignment", 32)
            tensors = list(_tensors(source, path, count))
            end = source.position
            _require(
                type(alignment) is int and 0 < alignment <= GGUF_ALIGNMENT and alignment & (alignment - 1) == 0,
                f"general.alignment is {in_words(alignment)}",
            )
            assert isinstance(alignment, int)
            placed = _placed(tensors, -(-end // alignment) * alignment, alignment, size)
            file.seek(0)
            digest = sha256(file.read(end)).hexdigest()
    except FileNotFoundError:
        raise CheckpointError(f"no GGUF file at {path}") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}; check it and its permissions"
        ) from None
    except Unreadable as error:
        raise CheckpointError(f"{path} is not a readable GGUF file: {error}; write or download it again") from None
    return Header((path,), fields, placed, digest)


class _Source:
    """The bytes of a header, of which no more are read than the file has and the limits allow."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.position, self.values = file, size, 0, 0

    def take(self, count: int) -> bytes:
        """The next bytes. Raises Unreadable where there are not so many."""
        if count > self.size - self.position:
            raise Unreadable("it is truncated or damaged: its header does not end within the file")
        if self.position + count > GGUF_BYTES:
            raise Unreadable(f"its header takes more than {GGUF_BYTES:,} bytes")
        self.position += count
        data = self.file.read(count)
        if len(data) < count:
            raise Unreadable("it is truncated")
        return data

    def number(self, kind: str) -> int:
        found: int = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]
        return found

    def text(self, most: int = GGUF_BYTES) -> str:
        length = self.number("Q")
        if length > most:
            raise Unreadable(f"it is damaged: a text of {length:,} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise Unreadable("it is damaged: a text is not UTF-8") from None

    def value(self, kind: int) -> Value:
        """A value of one of GGUF's types; arrays hold no arrays."""
        if kind == _STRING:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise Unreadable(f"it is damaged: {kind} is no type of a value")
        inner, count = self.number("I"), self.number("Q")
        self.values += count
        if self.values > GGUF_VALUES:
            raise Unreadable(f"its lists hold {self.values:,} values; at most {GGUF_VALUES:,} are read")
        if inner == _STRING:
            return [self.text() for _ in range(count)]
        if inner not in _NUMBERS:
            raise Unreadable(f"it is damaged: {inner} is no type of a list's values")
        return list(struct.unpack(f"<{count}{_NUMBERS[inner]}", self.take(count * struct.calcsize(_NUMBERS[inner]))))


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise Unreadable(f"it is damaged: {what}")


def _fields(source: _Source) -> tuple[int, dict[str, Value]]:
    """How many tensors there are, and the metadata."""
    if source.size < len(MAGIC) or source.take(len(MAGIC)) != MAGIC:
        raise Unreadable("it does not begin with GGUF")
    version = source.number("I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        raise Unreadable("it is big-endian" if swapped else f"it is of version {version}; 2 and 3 are read")
    count, keys = source.number("Q"), source.number("Q")
    _require(count <= GGUF_TENSORS, f"{count:,} tensors")
    _require(keys <= GGUF_FIELDS, f"{keys:,} keys of metadata")
    fields: dict[str, Value] = {}
    for _ in range(keys):
        key = source.text(GGUF_KEY)
        _require(key not in fields, f"{shown(key)} is there twice")
        fields[key] = source.value(source.number("I"))
    return count, fields


@dataclass(frozen=True)
class _Listed:
    stored: Stored
    bytes: int
    offset: int


def _tensors(source: _Source, path: Path, count: int) -> Iterator[_Listed]:
    """The list of tensors, each with its size and its offset in the data."""
    import gguf

    for _ in range(count):
        name = source.text(TENSOR_LENGTH)
        dimensions = source.number("I")
        _require(dimensions <= _DIMENSIONS, f"{shown(name)} has {dimensions:,} dimensions")
        sizes = [source.number("Q") for _ in range(dimensions)]
        kind, offset = source.number("I"), source.number("Q")
        try:
            type = gguf.GGMLQuantizationType(kind)
            block, size = gguf.GGML_QUANT_SIZES[type]
        except (ValueError, KeyError):
            raise Unreadable(f"{shown(name)} has the type {kind}, which gguf-py {_version()} does not know") from None
        _require(all(0 < n < _ENTRIES for n in sizes), f"{shown(name)} has the shape {sizes[::-1]}")
        row = sizes[0] if sizes else 1
        _require(row % block == 0, f"{shown(name)} has rows of {row}, which {type.name} does not divide")
        yield _Listed(
            Stored(path, name, type.name, tuple(reversed(sizes)), (0, 0)), prod(sizes) // block * size, offset
        )


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")


def _placed(listed: Sequence[_Listed], start: int, alignment: int, size: int) -> dict[str, Stored]:
    """Tensors by name, with their places in a file of `size` bytes: one behind the other up to its end."""
    found: dict[str, Stored] = {}
    end = 0
    for tensor in listed:
        name = tensor.stored.name
        _require(name not in found, f"{shown(name)} is there twice")
        at = -(-end // alignment) * alignment
        _require(tensor.offset == at, f"the bytes of {shown(name)} are not where the tensors before it end")
        end = at + tensor.bytes
        _require(start + end <= size, f"it is truncated: {shown(name)} ends at {start + end:,} of {size:,} bytes")
        stored = tensor.stored
        found[name] = Stored(stored.file, name, stored.type, stored.shape, (start + at, start + end))
    if found and size - start > -(-end // alignment) * alignment:
        raise Unreadable(f"it is damaged: {size - start - end:,} bytes behind its last tensor belong to none")
    return found
