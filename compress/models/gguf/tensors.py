"""The tensors of a checkpoint out of a GGUF file: one at a time, experts unstacked, in the checkpoint's order.

The declarations that a writer follows (`TensorSpec.pieces`) are followed backwards. Goes through `gguf.dequantize` only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CheckpointError
from compress.models.gguf.header import Header, Stored
from compress.models.index import FLOAT_CODEC, Entry
from compress.models.layers.rope import FREQUENCIES, LONG, SHORT
from compress.models.layers.views import Piece
from compress.models.spec import ModelSpec, TensorSpec
from compress.reading import shown

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

QUANTIZED = "bf16"
"""The float codec of what was quantized: that of most originals. Decoded values have no type of their own."""


@dataclass(frozen=True)
class Part:
    """What one GGUF tensor has of a checkpoint's: a slice of `stored`, where it stacks experts. span: its bytes."""

    piece: Piece
    stored: Stored
    shape: tuple[int, ...]
    span: tuple[int, int]

    def blocks(self) -> np.ndarray:
        """Its bytes, uint8 [rows, bytes a row]. Raises CheckpointError where the file has become shorter."""
        import numpy as np

        start, stop = self.span
        with self.stored.file.open("rb") as file:
            file.seek(start)
            data = np.fromfile(file, dtype=np.uint8, count=stop - start)
        if len(data) < stop - start:
            raise CheckpointError(f"{self.stored.file} is truncated: {shown(self.stored.name)} is not all there")
        return data.reshape(prod(self.shape[:-1]), -1)

    def decoded(self) -> np.ndarray:
        """Its values as the file orders them, float32."""
        import gguf
        import numpy as np

        values = gguf.dequantize(self.blocks(), gguf.GGMLQuantizationType[self.stored.type])
        return np.asarray(values, dtype=np.float32).reshape(self.shape)


@dataclass(frozen=True)
class Decoded(Entry):
    """A checkpoint's tensor in a GGUF file: float32 where it was quantized, else of the type that it has there."""

    parts: tuple[Part, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(part.span[1] - part.span[0] for part in self.parts)

    @property
    def codec(self) -> str | None:
        return FLOAT_CODEC.get(self.dtype) or (QUANTIZED if decodable(self.dtype) else None)

    @property
    def quantized(self) -> bool:
        return self.dtype not in FLOAT_CODEC

    def opened(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def read(self, name: str, opened: Any = None) -> Tensor:
        import torch

        values = torch.from_numpy(self.restored([(part.piece, part.decoded()) for part in self.parts]))
        return values.to({"F16": torch.float16, "BF16": torch.bfloat16}.get(self.dtype, torch.float32))

    def matrices(self, name: str, opened: Any = None) -> Iterator[Tensor]:
        yield self.read(name)

    def restored(self, pieces: Sequence[tuple[Piece, np.ndarray]]) -> np.ndarray:
        """This tensor from its pieces as the file has them, float32."""
        return restored(pieces, self.shape)


@cache
def decodable(type: str) -> bool:
    """Whether gguf-py decodes a type."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[type]
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def piece_shape(tensor: TensorSpec, piece: Piece) -> tuple[int, ...]:
    """Of one GGUF tensor that a checkpoint's becomes, experts not stacked."""
    if piece.shape is not None:
        return piece.shape
    rows, *columns = tensor.shape
    return (rows if piece.rows is None else len(piece.rows.index(rows)), *columns)


def restored(pieces: Sequence[tuple[Piece, np.ndarray]], shape: tuple[int, ...]) -> np.ndarray:
    """A checkpoint's tensor from its pieces as the file has them, float32."""
    import numpy as np

    if len(pieces) == 1 and pieces[0][0].plain:
        return pieces[0][1].reshape(shape)
    out = np.empty(shape, dtype=np.float32)
    for piece, values in pieces:
        if piece.swapped:
            values = values.swapaxes(1, 2)
        if piece.map is not None:
            values = piece.map.undo(values)
        rows = np.arange(shape[0]) if piece.rows is None else piece.rows.index(shape[0])
        values = values.reshape(len(rows), *shape[1:])
        if piece.columns is not None:
            columns = np.empty_like(values)
            columns[:, piece.columns.index(shape[1])] = values
            values = columns
        out[rows] = values
    return out


def entries_of(spec: ModelSpec, header: Header) -> dict[str, Decoded]:
    """The model's tensors in a file by their checkpoint names.

    Raises CheckpointError for the first that is missing or of another shape than the model has it.
    """
    first, found = header.files[0], {}
    stored_here = [tensor for tensor in spec.tensors() if tensor.gguf]
    for tensor in stored_here:
        parts = []
        for piece in tensor.pieces:
            stored = header.tensors.get(piece.name)
            if stored is None:
                missing = {p.name for t in stored_here for p in t.pieces} - set(header.tensors)
                raise CheckpointError(f"{first} lacks {piece.name} (and {len(missing) - 1} more tensors)")
            parts.append(_part(spec, tensor, piece, stored))
        types = [part.stored.type for part in parts]
        dtype = next((kind for kind in types if kind not in FLOAT_CODEC), types[0])
        found[tensor.name] = Decoded(parts[0].stored.file, dtype, tensor.shape, span=parts[0].span, parts=tuple(parts))
    return found


def _part(spec: ModelSpec, tensor: TensorSpec, piece: Piece, stored: Stored) -> Part:
    shape = piece_shape(tensor, piece)
    expected = shape if tensor.expert is None else (spec.experts, *shape)
    if _squeezed(stored.shape) != _squeezed(expected):
        raise CheckpointError(
            f"{stored.name} in {stored.file} has shape {stored.shape}, its metadata implies {expected}"
        )
    start, stop = stored.span
    if tensor.expert is not None:
        each = (stop - start) // spec.experts
        start, stop = start + tensor.expert * each, start + (tensor.expert + 1) * each
    return Part(piece, stored, shape, (start, stop))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """GGUF does not tell a row from a matrix of one row."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def unclaimed(spec: ModelSpec, header: Header) -> Mapping[str, Path]:
    """Tensors that are no part of the model, and their files. llama.cpp reads frequencies of rotary positions from one."""
    claimed = {piece.name for tensor in spec.tensors() if tensor.gguf for piece in tensor.pieces}
    return {name: t.file for name, t in header.tensors.items() if name not in claimed and name not in ROPE_FACTORS}


ROPE_FACTORS = (FREQUENCIES, LONG, SHORT)
