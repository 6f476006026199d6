"""Where a run computes: the one place that names a device, a float type and threads.

Weights and activations are put on the device when they are read and come back when they are written; solvers, codecs and
forwards compute where their tensors lie.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compress import products
from compress.errors import RecipeError
from compress.limits import DEVICE_SOLVE_BYTES, SOLVE_BYTES
from compress.machine import DEVICE, look


@dataclass(frozen=True)
class Placement:
    """device: of all that is computed, in float32; rounded: but the products of forwards and of sums of moments, see
    `compress.products`."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rounded: bool = False

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

    def multiplying(self, precision: str, own_codec: str) -> Placement:
        """The same with products of a recipe's `precision`: "auto" rounds the factors to bfloat16 where those of the checkpoint
        are of that type and the device has units that multiply so."""
        return replace(
            self, rounded=precision == "bf16" or (precision == "auto" and own_codec == "bf16" and self._has_units)
        )

    @property
    def _has_units(self) -> bool:
        if self.device.type == "cuda":
            return torch.cuda.get_device_capability(self.device) >= (8, 0)
        return self.device.type == "cpu" and "amx_bf16" in look().cpu.features

    @property
    def products(self) -> str:
        """In words for a scorecard."""
        return "bfloat16 factors, float32 sums" if self.rounded else "float32"

    def observing(self) -> AbstractContextManager[None]:
        """Within, forwards and sums of moments multiply as this says."""
        return products.rounded(self.rounded)

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor in its own type."""
        return tensor.to(self.device)

    def weight(self, tensor: Tensor) -> Tensor:
        """A checkpoint's tensor as it is computed with."""
        return tensor.to(self.device).float()

    @property
    def solvers(self) -> int:
        """How many solves run beside each other where there are enough of them."""
        return torch.get_num_threads() if self.device.type == "cpu" else 1

    @property
    def solve_bytes(self) -> int:
        """Memory that matrices solved as a stack may take together."""
        return SOLVE_BYTES if self.device.type == "cpu" else DEVICE_SOLVE_BYTES

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
