"""Hidden states of calibration text in files: the process itself never holds more than a batch of windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import ResumeError
from compress.files import disk_errors, writing
from compress.limits import BATCH_TOKENS

_CHUNK = 1 << 20


def mapped(path: Path, *shape: int) -> Tensor:
    """Zeros, float32, in a file of their own that replaces what was there: the operating system keeps in memory what
    fits. The file may be deleted while the tensor is in use."""
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

    The operating system keeps in memory what fits; the process itself never holds more than a batch. device: where what is
    read goes.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], device: torch.device | None = None):
        self.path, self.shape, self.device = path, shape, device

    @property
    def batches(self) -> list[tuple[int, int]]:
        """Windows that go through a block at once: first, behind the last."""
        windows, length, _ = self.shape
        size = max(1, BATCH_TOKENS // length)
        return [(start, min(start + size, windows)) for start in range(0, windows, size)]

    def read(self, start: int, stop: int) -> Tensor:
        """Windows start..stop as a tensor of its own."""
        stride = self.shape[1] * self.shape[2]
        try:
            with self.path.open("rb") as file:
                file.seek(4 * start * stride)
                flat = np.fromfile(file, dtype=np.float32, count=(stop - start) * stride)
        except FileNotFoundError:
            raise ResumeError(f"{self.path} is missing; start over with --fresh") from None
        if flat.size != (stop - start) * stride:
            raise ResumeError(f"{self.path} is truncated; start over with --fresh")
        return torch.from_numpy(flat.reshape(stop - start, *self.shape[1:])).to(self.device)

    @contextmanager
    def writing(self) -> Iterator[ActivationWriter]:
        """Append batches; the file gets its name when all are written and synced."""
        with writing(self.path) as file:
            yield ActivationWriter(file)

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)


class ActivationWriter:
    """Appends to an activation file."""

    def __init__(self, file: Any):
        self._file = file

    def append(self, hidden: Tensor) -> None:
        self._file.write(hidden.cpu().contiguous().numpy().data)
