"""Checkpoints that are quantized already: a tensor that several stored ones make, and a format that says which. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from compress.errors import CheckpointError, ConfigError
from compress.models.config import Keys
from compress.models.index import Entry, part_of
from compress.models.sources.arithmetic import grid, shared
from compress.reading import dotted, shown, wrong

if TYPE_CHECKING:
    from torch import Tensor

Stored = Mapping[str, Entry]
"""The tensors of a checkpoint's files by name."""


@dataclass(frozen=True)
class Coded(Entry):
    """A tensor that the files hold as codes and what makes numbers of them.

    dtype: what it is quantized to, in words; parts: by what they are to `decode`, each under its name in the files; decode:
    from the parts of one matrix to float32; stack: the number of matrices where there are several, each of which has its own
    entry in every part; own: the float codec of its numbers, which have no type of their own.
    """

    parts: Mapping[str, tuple[str, Entry]] = field(default_factory=dict)
    decode: Callable[[Mapping[str, Tensor]], Tensor] = lambda parts: next(iter(parts.values()))
    stack: int = 0
    own: str = "bf16"

    @property
    def lies(self) -> tuple[tuple[Path, tuple[int, int]], ...]:
        return tuple((entry.file, entry.span) for _, entry in self.parts.values())

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for _, entry in self.parts.values())

    @property
    def codec(self) -> str | None:
        return self.own

    @property
    def quantized(self) -> bool:
        return True

    def read(self, name: str, opened: Any) -> Tensor:
        stored = _Decoding(self, opened)
        return stored.get_tensor(name) if self.part is None else part_of(stored, self.part)

    def matrices(self, name: str, opened: Any) -> Iterator[Tensor]:
        stored = _Decoding(self, opened)
        yield from (stored.matrix(n) for n in range(self.stack)) if self.stack else (stored.matrix(),)


@dataclass(frozen=True)
class _Decoding:
    """What reads one coded tensor as an opened file reads a plain one."""

    entry: Coded
    opened: Any

    def get_tensor(self, name: str) -> Tensor:
        import torch

        count = self.entry.stack
        return torch.stack([self.matrix(n) for n in range(count)]) if count else self.matrix()

    def get_slice(self, name: str) -> _Decoding:
        return self

    def __getitem__(self, place: Any) -> Tensor:
        if self.entry.stack and isinstance(place, slice) and place.stop == (place.start or 0) + 1:
            return self.matrix(place.start or 0)[None]
        return self.get_tensor("")[place]

    def matrix(self, number: int | None = None) -> Tensor:
        """The tensor, or one matrix of a stack, from its parts."""
        loaded = {}
        for role, (name, entry) in self.entry.parts.items():
            with nullcontext(self.opened) if entry.file == self.entry.file else entry.opened() as file:
                if number is None or not entry.shape or entry.shape[0] != self.entry.stack:
                    loaded[role] = file.get_tensor(name)
                else:
                    loaded[role] = file.get_slice(name)[number]
        return self.entry.decode(loaded)


@dataclass(frozen=True)
class Format:
    """One way in which checkpoints hold quantized tensors.

    name: as people call it; methods: the values of quant_method that say so; holds: what it reads, for the table in the
    documentation; find: the coded tensors of a checkpoint by the names that they had as floats, from what config.json says of it.
    claims: whether that means this format, of several with one quant_method; problem: why it is another layout than those that
    are read, or None; beside: the file that says it in older folders, where config.json does not.
    """

    name: str
    methods: tuple[str, ...]
    holds: str
    find: Callable[[Mapping[str, Any], Stored], Iterator[tuple[str, Coded]]]
    claims: Callable[[Mapping[str, Any]], bool] = lambda settings: True
    problem: Callable[[Mapping[str, Any]], str | None] = lambda settings: None
    beside: str = ""


Settings = TypeVar("Settings", bound=Keys)


def read_settings(kind: type[Settings], settings: Mapping[str, Any]) -> Settings:
    """What config.json says of a format. Raises ConfigError with every value that is of another kind."""
    try:
        return kind.model_validate({key: value for key, value in settings.items() if value is not None})
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise ConfigError([f"quantization_config.{dotted(fault['loc'])}: {wrong(fault)}" for fault in faults]) from None


def require(name: str, stored: Stored, *dtypes: str) -> Entry:
    """A stored tensor of one of these types. CheckpointError where it is missing or of another."""
    entry = stored.get(name)
    if entry is None:
        raise CheckpointError(f"the checkpoint has no tensor {shown(name)}, which others cannot be read without")
    if entry.dtype not in dtypes:
        raise CheckpointError(
            f"{shown(name)} in {entry.file.name} is stored as {shown(entry.dtype)}, not as {' or '.join(dtypes)}"
        )
    return entry


def require_one(name: str, stored: Stored, *dtypes: str) -> Entry:
    """The same of a tensor that holds one number. CheckpointError where it holds others."""
    entry = require(name, stored, *dtypes)
    if prod(entry.shape) != 1:
        raise unfit(name, entry)
    return entry


def unfit(name: str, entry: Entry) -> CheckpointError:
    """Of parts whose shapes contradict each other."""
    return CheckpointError(
        f"{shown(name)} in {entry.file.name} does not fit what it belongs to: it is {list(entry.shape)}; fetch it again"
    )


def runs_of(
    name: str, scale: Entry, shape: tuple[int, ...], wanted: tuple[int, int] | None = None, stack: int = 0
) -> tuple[int, int]:
    """Rows and columns of a matrix of this shape that share a scale. name: of the scales, which a stack has for each matrix.

    Raises CheckpointError where the scales cannot be shared out."""
    own = scale.shape[1:] if stack and scale.shape[:1] == (stack,) else scale.shape
    found = [
        shared(size, count, run) for size, count, run in zip(shape, grid(own), wanted or (None, None), strict=True)
    ]
    rows, columns = found
    if len(own) > 2 or rows is None or columns is None:
        raise unfit(name, scale)
    return rows, columns


def stored_bytes(entry: Entry) -> bytes:
    """A small tensor as it lies in its file. Raises CheckpointError where that cannot be read."""
    try:
        with entry.file.open("rb") as file:
            file.seek(entry.span[0])
            return file.read(entry.bytes)
    except OSError as error:
        raise CheckpointError(f"{entry.file} cannot be read: {error.strerror or error}") from None
