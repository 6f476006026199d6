"""Mixed-precision products: factors rounded to bfloat16, sums in float32, where a processor has units for that.

AMX on CPUs multiplies so at several times the speed of float32; on CUDA the tensor cores do, with the ten bits of TF32. Only
what goes through this module is rounded, and only inside `rounded()`: the linears of our own forwards, routers among them, and the
sums of moments. Position angles, softmax, what transformers' modules compute, solvers and scores stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 64
"""Rows are filled up to multiples of it on the CPU, whose library compiles and keeps a kernel for every size that it meets:
experts see any number of tokens."""

_ROUNDED = ContextVar("rounded", default=False)
_FORMATS = {"cpu": "bf16", "cuda": "tf32"}


@contextmanager
def rounded(wanted: bool = True) -> Iterator[None]:
    """Within, and in this thread alone, products round their factors; wanted=False: they do not."""
    token = _ROUNDED.set(wanted)
    try:
        yield
    finally:
        _ROUNDED.reset(token)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. x: float32 [..., n]; weight: float32 [m, n]; bias: [m]. Returns float32 [..., m]."""
    with _units(x.device) as padded:
        if not padded or x.dim() != 2:
            return F.linear(x, weight, bias)
        return F.linear(_filled(x), weight, bias)[: len(x)]


def add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums += left^T right. left: float32 [tokens, m]; right: [tokens, n]; sums: [m, n], in place."""
    with _units(sums.device) as padded:
        if padded:
            left, right = _filled(left), _filled(right)
        sums.addmm_(left.T, right)


def _filled(x: Tensor) -> Tensor:
    """x [rows, n] with rows of zeros behind it."""
    missing = -len(x) % PADDING
    return F.pad(x, (0, 0, 0, missing)) if missing else x


@contextmanager
def _units(device: torch.device) -> Iterator[bool]:
    """torch told which units may multiply, where factors are rounded; as it was afterwards. Gives whether rows are to be filled
    up."""
    settings = _settings(device) if _ROUNDED.get() else None
    if settings is None:
        yield False
        return
    before, settings.fp32_precision = settings.fp32_precision, _FORMATS[device.type]
    try:
        yield device.type == "cpu"
    finally:
        settings.fp32_precision = before


def _settings(device: torch.device) -> Any:
    """Where torch keeps what float32 products may be made of, None for devices that have no choice."""
    backends: Any = torch.backends  # mkldnn.matmul is an attribute of an instance, which mypy takes for a module
    return {"cpu": backends.mkldnn.matmul, "cuda": backends.cuda.matmul}.get(device.type)
