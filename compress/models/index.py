"""Where a checkpoint's tensors lie: the index of several files and the header of each, checked before anything is read.

Formats: model.safetensors.index.json as transformers writes it; 8-byte little-endian header length, JSON header, data
(huggingface/safetensors README).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from compress.errors import CheckpointError
from compress.limits import HEADER_BYTES, INDEX_BYTES, TENSOR_LENGTH
from compress.models.layers.base import Slice
from compress.reading import Unreadable, dotted, in_words, parse_json, path_problem, read_json, size_of, wrong

if TYPE_CHECKING:
    from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "C64": 64, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
"""Of a number of each type, as far as safetensors has named them; sizes of others are not checked."""

FLOAT_CODEC = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "F32": "f32", "F16": "f16", "BF16": "bf16"}
"""torch's and safetensors' names of the float types a checkpoint may have -> codecs."""


def named_codec(config: Mapping[str, Any]) -> str | None:
    """The float codec of the type that config.json names, None where it names none of them."""
    keys = (k for k in (config, config.get("text_config")) if isinstance(k, Mapping))
    said = (k.get(name) for k in keys for name in ("dtype", "torch_dtype"))
    return FLOAT_CODEC.get(str(next(filter(None, said), None)))


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies, and how it is read: file, dtype name and shape as the safetensors header gives them.

    part: of another tensor that holds several, by its full name; span: its bytes in the file, from and to.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    part: Slice | None = None
    span: tuple[int, int] = (0, 0)

    @property
    def lies(self) -> tuple[tuple[Path, tuple[int, int]], ...]:
        """The files that it lies in, and its bytes in each."""
        return ((self.file, self.span),)

    @property
    def bytes(self) -> int:
        return self.span[1] - self.span[0]

    @property
    def codec(self) -> str | None:
        """The float codec of its numbers, None where they are no floats that a checkpoint may have."""
        return FLOAT_CODEC.get(self.dtype)

    @property
    def quantized(self) -> bool:
        """Whether its numbers were rounded to a coarser type before they came into the file."""
        return False

    def opened(self) -> AbstractContextManager[Any]:
        """Its file, for `read` and `matrices` of all entries of it."""
        from safetensors import safe_open

        return safe_open(self.file, "pt")

    def read(self, name: str, opened: Any) -> Tensor:
        """The tensor, whose name this is. Raises SafetensorError, OSError or CheckpointError."""
        if self.part is None or self.part.whole:
            return opened.get_tensor(name if self.part is None else self.part.name)
        return part_of(opened, self.part)

    def matrices(self, name: str, opened: Any) -> Iterator[Tensor]:
        """The stored tensor of this name, or the matrices of a stack, one in memory at a time."""
        if len(self.shape) < 3:
            yield opened.get_tensor(name)
            return
        stack = opened.get_slice(name)
        yield from (stack[n] for n in range(self.shape[0]))


def part_of(file: Any, part: Slice) -> Tensor:
    """Some rows of one entry of a stacked tensor, without reading the others."""
    stored = file.get_slice(part.name)
    rows = slice(part.start, part.stop)
    if part.index is None:
        found = stored[:, rows].T if part.transposed else stored[rows]
    else:
        entry = stored[part.index : part.index + 1][0]
        found = entry[:, rows].T if part.transposed else entry[rows]
    return found[:: part.step].contiguous()


# ------------------------------------------------------------------------------------------ the index

Name = Annotated[str, Field(min_length=1, max_length=TENSOR_LENGTH)]


class Index(BaseModel):
    """model.safetensors.index.json: the file of every tensor. What else it says is not read."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", defer_build=True)
    weight_map: Annotated[dict[Name, Name], Field(min_length=1)]


def read_index(folder: Path) -> dict[str, Path]:
    """The file of every tensor that the index of a model folder names, whether it is there or not.

    Raises CheckpointError where the index is damaged, or names a file outside the folder.
    """
    path = folder / INDEX
    try:
        index = Index.model_validate(read_json(path, INDEX_BYTES))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(f"{path} is not valid: {dotted(first['loc'])}: {wrong(first)}; fetch it again") from None
    files = {name: _inside(folder, name) for name in dict.fromkeys(index.weight_map.values())}
    return {tensor: files[file] for tensor, file in index.weight_map.items()}


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder by its name in the index; a link may lead into the blobs of a hub cache, nowhere else."""
    parts = PurePosixPath(name).parts
    if PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or not parts or path_problem(name):
        raise CheckpointError(
            f"{folder / INDEX} names {in_words(name)}, which is no file of its folder; fetch it again"
        )
    path = folder / name
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} leads nowhere: {error}") from None
    blobs = real.parent.name == "blobs" and (real.parents[1] / "snapshots").is_dir()
    if not real.is_relative_to(folder.resolve()) and not blobs:
        raise CheckpointError(f"{path} is a link to {real}, outside the folder; put the file itself there")
    return path


# ------------------------------------------------------------------------------------------- headers


class Stored(BaseModel):
    """One tensor in the header of a safetensors file."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", defer_build=True)
    dtype: Annotated[str, Field(max_length=32)]
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=2**48)]], Field(max_length=16)]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=2, max_length=2)]

    @property
    def start(self) -> int:
        return self.data_offsets[0]

    @property
    def stop(self) -> int:
        return self.data_offsets[1]


@cache
def _tensors() -> TypeAdapter[dict[str, Stored]]:
    return TypeAdapter(dict[str, Stored])


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, from its header; checks that the file holds exactly them.

    Raises CheckpointError where it is missing, no regular file, damaged or truncated.
    """
    damaged = f"{path} is not a safetensors file or its header is damaged"
    try:
        size = size_of(path)
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise CheckpointError(f"{path} is truncated: its header alone needs {length + 8} bytes, it has {size}")
            if length > HEADER_BYTES:
                raise CheckpointError(f"{damaged}: a header of {length:,} bytes; at most {HEADER_BYTES:,} are read")
            header = parse_json(file.read(length).decode())
        if not isinstance(header, dict):
            raise CheckpointError(f"{damaged}; fetch it again")
        header.pop("__metadata__", None)
        stored = _tensors().validate_python(header)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is listed in the index but does not exist; fetch the missing shard") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}; check it and its permissions"
        ) from None
    except Unreadable as error:
        raise CheckpointError(f"{damaged}: it {error}; fetch it again") from None
    except (struct.error, UnicodeDecodeError):
        raise CheckpointError(f"{damaged}; fetch it again") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(f"{damaged}: {dotted(first['loc'])}: {wrong(first)}; fetch it again") from None
    data = 8 + length
    _check_data(path, stored, size - data)
    return {
        name: Entry(path, t.dtype, tuple(t.shape), span=(data + t.start, data + t.stop)) for name, t in stored.items()
    }


def _check_data(path: Path, stored: Mapping[str, Stored], size: int) -> None:
    """Tensors follow each other without gaps, each as long as its shape says, up to the end of the file."""
    end = 0
    for name, tensor in sorted(stored.items(), key=lambda item: item[1].data_offsets):
        bits = prod(tensor.shape) * BITS.get(tensor.dtype, 0)
        if tensor.start != end or tensor.stop < end or (tensor.dtype in BITS and bits != 8 * (tensor.stop - end)):
            raise CheckpointError(
                f"{path} is damaged: the bytes of {in_words(name)} are not where its shape says; fetch it again"
            )
        end = tensor.stop
    if end > size:
        raise CheckpointError(f"{path} is truncated: {end} bytes of data expected, {size} found; fetch it again")
    if end < size:
        raise CheckpointError(f"{path} is damaged: {size - end} bytes belong to no tensor; fetch it again")
