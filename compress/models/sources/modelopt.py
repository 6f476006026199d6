"""ModelOpt folders: NVFP4 and static FP8.

A linear `m` of [out, in] is `m.weight` uint8 [out, in / 2], the low half of a byte first, `m.weight_scale` float8 [out, in / 16] and
`m.weight_scale_2` float32, which are multiplied; or `m.weight` float8 with one `m.weight_scale`. Source: modelopt's
torch/quantization/qtensor/nvfp4_tensor.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.models.index import Entry
from compress.models.sources.arithmetic import e2m1, scaled
from compress.models.sources.base import Coded, Format, Stored, require, require_one, runs_of, unfit
from compress.models.sources.fp8 import FLOAT8, float8

if TYPE_CHECKING:
    from torch import Tensor

_SCALE, _OVER = "_scale", "_scale_2"


def find(settings: Mapping[str, Any], stored: Stored) -> Iterator[tuple[str, Coded]]:
    """See Format. Raises CheckpointError where shapes contradict each other."""
    for name, entry in stored.items():
        if entry.dtype in FLOAT8 and name + _SCALE in stored:
            yield name, float8(entry, name, name + _SCALE, stored)
        elif entry.dtype == "U8" and name + _OVER in stored:
            yield name, _nvfp4(name, entry, stored)


def _nvfp4(name: str, entry: Entry, stored: Stored) -> Coded:
    if len(entry.shape) != 2:
        raise unfit(name, entry)
    (rows, half), scale = entry.shape, require(name + _SCALE, stored, "F8_E4M3")
    parts = {"values": (name, entry), "scale": (name + _SCALE, scale)}
    parts["over"] = (name + _OVER, require_one(name + _OVER, stored, "F32"))
    runs = runs_of(name + _SCALE, scale, (rows, 2 * half))
    return Coded(
        entry.file, "NVFP4", (rows, 2 * half), span=entry.span, parts=parts, decode=partial(_decode, runs=runs)
    )


def _decode(parts: Mapping[str, Tensor], runs: tuple[int, int]) -> Tensor:
    return scaled(e2m1(parts["values"]), parts["scale"].float() * parts["over"].reshape(()), runs)


FORMAT = Format(
    name="ModelOpt",
    methods=("modelopt", "modelopt_fp4"),
    holds="NVFP4 (`weight_scale`, `weight_scale_2`), static FP8",
    find=find,
    beside="hf_quant_config.json",
)
