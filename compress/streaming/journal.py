"""What a run has finished, on disk: packed tensors per unit of work, activations, and the journal that orders them.

A unit is the embeddings, one block, the head, or what a later stage made of tensors of those. Its files are complete and synced before the journal names it, so
a run killed at any moment continues from the last named unit. Nothing here is delivered; the folder goes when the
run succeeds.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import OutputError, ResumeError
from compress.weights import Packed

if TYPE_CHECKING:
    import torch

SEPARATOR = "|"  # between tensor and part in a unit's file; no checkpoint uses it in names
_CHUNK = 1 << 20


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """OSErrors (no space, no permission) as one line that names the folder and the fix."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another --output"
        ) from error


def write_synced(path: Path, data: bytes) -> None:
    """Write under a temporary name, sync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


class Journal:
    """The work folder of one run."""

    def __init__(self, folder: Path, digest: str, units: dict[str, Any]):
        self.folder = folder
        self.digest = digest
        self.units = units
        """unit name -> its report, in the order they were finished"""
        self._where: dict[str, Path] = {}
        for unit in units:
            self._index(unit)

    @classmethod
    def open(cls, folder: Path, digest: str, *, fresh: bool = False) -> Journal:
        """Continue what `folder` holds or start anew. Raises ResumeError if it belongs to another recipe."""
        if fresh and folder.exists():
            shutil.rmtree(folder)
        path = folder / "journal.json"
        if path.exists():
            try:
                state = json.loads(path.read_text())
                if not isinstance(state["units"], dict):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise ResumeError(f"{path} is damaged; start over with --fresh") from None
            if state.get("digest") != digest:
                raise ResumeError(
                    f"{folder.parent} holds an unfinished run of another recipe, model or version; "
                    "finish that one, choose another --output, or discard it with --fresh"
                )
            return cls(folder, digest, state["units"])
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, digest, {})

    def finish(self, unit: str, tensors: Mapping[str, Packed], report: Mapping[str, Any]) -> None:
        """Make a unit durable: its tensors, then its line in the journal."""
        self.write(unit, tensors)
        self.name({unit: report})

    def write(self, unit: str, tensors: Mapping[str, Packed]) -> None:
        """The tensors of a unit, which count for nothing until the journal names it."""
        from safetensors.torch import save

        parts: dict[str, torch.Tensor] = {}
        meta: dict[str, str] = {}
        for name, packed in tensors.items():
            meta[name] = json.dumps({"codec": packed.codec, "shape": list(packed.shape), "parts": list(packed.parts)})
            for part, tensor in packed.parts.items():
                parts[f"{name}{SEPARATOR}{part}"] = tensor.contiguous()
        write_synced(self._file(unit), save(parts, metadata=meta or None))

    def name(self, reports: Mapping[str, Mapping[str, Any]]) -> None:
        """Name written units, all at once. Their tensors replace those of the same names in earlier units."""
        self.units |= {unit: dict(report) for unit, report in reports.items()}
        state = {"digest": self.digest, "units": self.units}
        write_synced(self.folder / "journal.json", json.dumps(state).encode())
        for unit in reports:
            self._index(unit)

    def fetch(self, name: str) -> Packed:
        """One tensor of a finished unit."""
        from safetensors import safe_open

        with safe_open(self._where[name], "pt") as file:
            facts = json.loads(file.metadata()[name])
            parts = {part: file.get_tensor(f"{name}{SEPARATOR}{part}") for part in facts["parts"]}
        return Packed(facts["codec"], tuple(facts["shape"]), parts)

    def __contains__(self, unit: str) -> bool:
        return unit in self.units

    def _file(self, unit: str) -> Path:
        return self.folder / f"{unit}.safetensors"

    def _index(self, unit: str) -> None:
        from safetensors import safe_open

        try:
            with safe_open(self._file(unit), "pt") as file:
                self._where.update(dict.fromkeys(file.metadata() or {}, self._file(unit)))
        except Exception as error:
            raise ResumeError(f"{self._file(unit)} is missing or damaged ({error}); start over with --fresh") from None


def mapped(path: Path, *shape: int) -> torch.Tensor:
    """Zeros, float32, in a file of their own that replaces what was there: the operating system keeps in memory what
    fits. The file may be deleted while the tensor is in use."""
    import torch

    size = math.prod(shape)
    if not size:
        return torch.zeros(*shape)
    path.unlink(missing_ok=True)
    with disk_errors(path), path.open("wb") as file:  # written out: a full disk is an error here, not a crash later
        for start in range(0, 4 * size, _CHUNK):
            file.write(bytes(min(_CHUNK, 4 * size - start)))
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(*shape)


class Activations:
    """Hidden states [windows, length, width] in float32, in a file: read and written a few windows at a time.

    The operating system keeps in memory what fits; the process itself never holds more than a batch.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]):
        self.path, self.shape = path, shape

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Windows start..stop as a tensor of its own."""
        import torch

        stride = self.shape[1] * self.shape[2]
        with self.path.open("rb") as file:
            file.seek(4 * start * stride)
            flat = np.fromfile(file, dtype=np.float32, count=(stop - start) * stride)
        if flat.size != (stop - start) * stride:
            raise ResumeError(f"{self.path} is truncated; start over with --fresh")
        return torch.from_numpy(flat.reshape(stop - start, *self.shape[1:]))

    @contextmanager
    def writing(self) -> Iterator[ActivationWriter]:
        """Append batches; the file gets its name when all are written and synced."""
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with disk_errors(self.path):
            try:
                with temporary.open("wb") as file:
                    yield ActivationWriter(file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
            finally:
                temporary.unlink(missing_ok=True)

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)


class ActivationWriter:
    """Appends to an activation file."""

    def __init__(self, file: Any):
        self._file = file

    def append(self, hidden: torch.Tensor) -> None:
        self._file.write(hidden.contiguous().numpy().data)
