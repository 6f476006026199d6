"""Where a run computes: the one place that names a device, a float type and threads.

Weights and activations are put on the device when they are read and come back when they are written; solvers, codecs and
forwards compute where their tensors lie.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.errors import RecipeError
from compress.machine import DEVICE


@dataclass(frozen=True)
class Placement:
    """device: of all that is computed, in float32."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def choose(cls, wanted: str | None = None) -> Placement:
        """The device called `wanted`, else by the environment's COMPRESS_DEVICE, else the CPU; auto: cuda, then mps, then cpu.

        Raises RecipeError for a name that is none, or a device that this machine does not have.
        """
        name = wanted or os.environ.get(DEVICE) or "cpu"
        source = "--device" if wanted else DEVICE
        if name == "auto":
            return cls(torch.device("cuda" if _has("cuda") else "mps" if _has("mps") else "cpu"))
        try:
            device = torch.device(name)
        except RuntimeError:
            device = torch.device("meta")
        if device.type not in ("cpu", "cuda", "mps"):
            raise RecipeError(f"{source} {name}: no such device; use auto, cpu, cuda, cuda:N or mps")
        if device.type != "cpu" and not _has(device.type):
            raise RecipeError(
                f"{source} {name}: torch finds no {device.type} here; use cpu, or a torch that was built for it"
            )
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise RecipeError(
                f"{source} {name}: there are {torch.cuda.device_count()} such devices; use a smaller number"
            )
        return cls(device)

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor in its own type."""
        return tensor.to(self.device)

    def weight(self, tensor: Tensor) -> Tensor:
        """A checkpoint's tensor as it is computed with."""
        return tensor.to(self.device).float()

    @contextmanager
    def workers(self, jobs: int) -> Iterator[int]:
        """Threads for `jobs` independent solves: one each on the CPU when there are enough of them to fill the cores."""
        cores = torch.get_num_threads()
        if jobs < cores or cores == 1 or self.device.type != "cpu":
            yield 1
            return
        torch.set_num_threads(1)
        try:
            yield cores
        finally:
            torch.set_num_threads(cores)


CPU = Placement()


def _has(kind: str) -> bool:
    return torch.cuda.is_available() if kind == "cuda" else torch.backends.mps.is_available()
