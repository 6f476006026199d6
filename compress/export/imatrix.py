"""Importance matrices as llama.cpp reads them: the sums of squared inputs that llama-imatrix collects, as GGUF and as .dat.

The layouts are those that llama.cpp's tools/imatrix wrote in mid 2026; both are read by llama-quantize --imatrix.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.containers import atomic_files
from compress.files import writing


@dataclass(frozen=True)
class Importance:
    """What one tensor of a GGUF file saw. sums: float32 [matrices, n] of squared inputs, a row an expert; counts: tokens of
    each, [matrices]."""

    sums: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class ImportanceMatrix:
    """All of a model. tensors: by GGUF name; dataset: the text by name; chunks: windows of `length` tokens."""

    tensors: Mapping[str, Importance]
    dataset: str
    chunks: int
    length: int


def write_gguf(path: Path, matrix: ImportanceMatrix) -> None:
    """The newer format: general.type imatrix, `<tensor>.in_sum2` [matrices, n] and `<tensor>.counts` [matrices, 1]."""
    import gguf

    with atomic_files(path, sum(found.sums.nbytes for found in matrix.tensors.values())) as folder:
        writer = gguf.GGUFWriter(folder / path.name, arch="imatrix")
        try:
            writer.kv_data[0].clear()  # llama-imatrix names no architecture: it is no model
            writer.add_type(gguf.GGUFType.IMATRIX)
            writer.add_array("imatrix.datasets", [matrix.dataset])
            writer.add_uint32("imatrix.chunk_count", matrix.chunks)
            writer.add_uint32("imatrix.chunk_size", matrix.length)
            for name, found in sorted(matrix.tensors.items()):
                writer.add_tensor(f"{name}.in_sum2", found.sums.astype("<f4"))
                writer.add_tensor(f"{name}.counts", found.counts.astype("<f4").reshape(-1, 1))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def write_dat(path: Path, matrix: ImportanceMatrix) -> None:
    """The older format, which forks of llama.cpp read: of every tensor mean squares times the windows it saw. An expert that
    nothing reached has ones, as a reader of the newer format gives it."""
    with writing(path) as file:
        file.write(struct.pack("<i", len(matrix.tensors)))
        for name, found in sorted(matrix.tensors.items()):
            calls = max(1, round(float(found.counts.max()) / matrix.length))
            counts = found.counts[:, None]
            means = np.where(counts > 0, found.sums / np.maximum(counts, 1), 1.0)
            values = (means * calls).astype("<f4").ravel()
            encoded = name.encode()
            file.write(struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", calls, len(values)))
            file.write(values.tobytes())
        dataset = matrix.dataset.encode()
        file.write(struct.pack("<ii", matrix.chunks, len(dataset)) + dataset)
