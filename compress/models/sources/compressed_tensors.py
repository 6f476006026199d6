"""compressed-tensors folders (LLM Compressor; Kimi K2's int4 experts): packed integers, int8, FP8, NVFP4 and MXFP4.

A linear `m` of [out, in] is one of

    packed integers  `m.weight_packed` int32 [out, in * bits / 32] (codes of a row, lowest bits first), `m.weight_scale` [out, groups],
                     `m.weight_shape` [2]; asymmetric: `m.weight_zero_point` int32 [out * bits / 32, groups], packed down the
                     outputs; ordered by activations: `m.weight_g_idx` int32 [in]
    plain numbers    `m.weight` int8 or float8 [out, in], `m.weight_scale` for blocks, groups, rows or all of it, asymmetric:
                     `m.weight_zero_point` of the same shape
    4-bit floats     `m.weight_packed` uint8 [out, in / 2], the low half of a byte first, `m.weight_scale` float8 [out, in / 16] over
                     `m.weight_global_scale` (NVFP4), or uint8 [out, in / 32], exponents with a bias of 127 (MXFP4)

Packed codes and zero points are offset by 2^(bits-1). Source: compressed_tensors.compressors, version 0.19.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.errors import CheckpointError
from compress.models.index import Entry
from compress.models.sources.arithmetic import e2m1, grid, scaled, spread, unpacked, unpacked_words
from compress.models.sources.base import Coded, Format, Stored, require, require_one, runs_of, stored_bytes, unfit
from compress.models.sources.fp8 import FLOAT8, SCALES, float8
from compress.reading import in_words, shown

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
    "mxfp8-quantized", "mixed-precision", "dense",
)  # fmt: skip
_PACKED, _SCALE, _ZERO, _ORDER = ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_g_idx"
_SHAPE, _GLOBAL = ".weight_shape", ".weight_global_scale"
_BITS = range(1, 9)


def problem(settings: Mapping[str, Any]) -> str | None:
    """See Format."""
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        return f"with masks in the format {in_words(sparsity['format'])}, which is not read"
    groups = settings.get("config_groups")
    said = (
        [group.get("format") for group in groups.values() if isinstance(group, dict)]
        if isinstance(groups, dict)
        else []
    )
    unknown = sorted({in_words(form) for form in (settings.get("format"), *said) if form not in (None, *FORMATS)})
    return f"in the format {unknown[0]}; read are {', '.join(FORMATS)}" if unknown else None


def find(settings: Mapping[str, Any], stored: Stored) -> Iterator[tuple[str, Coded]]:
    """See Format. Raises CheckpointError where shapes contradict each other."""
    for name, entry in stored.items():
        if name.endswith(_PACKED):
            module = name.removesuffix(_PACKED)
            yield f"{module}.weight", (_packed if entry.dtype == "I32" else _floats)(module, stored)
        elif name.endswith(".weight") and (name.removesuffix(".weight") + _SCALE) in stored and entry.dtype != "U8":
            yield name, _plain(name.removesuffix(".weight"), entry, stored)


def _packed(module: str, stored: Stored) -> Coded:
    words, scale = require(module + _PACKED, stored, "I32"), require(module + _SCALE, stored, "F16", "BF16", "F32")
    size = require(module + _SHAPE, stored, "I64", "I32")
    *stacked, rows, columns = _numbers(size)
    stack = stacked[0] if stacked else 0
    bits = next((b for b in _BITS if words.shape == (*stacked, rows, unpacked_words(columns, b))), None)
    if bits is None:
        raise unfit(module + _PACKED, words)
    parts = {"codes": (module + _PACKED, words), "scale": (module + _SCALE, scale), "shape": (module + _SHAPE, size)}
    if module + _ZERO in stored:
        zeros = require(module + _ZERO, stored, "I32")
        groups = grid(scale.shape[1:] if stack else scale.shape)[1]
        if zeros.shape != (*stacked, unpacked_words(rows, bits), groups):
            raise unfit(module + _ZERO, zeros)
        parts["zeros"] = (module + _ZERO, zeros)
    if module + _ORDER in stored:
        index = require(module + _ORDER, stored, "I32", "I64")
        if index.shape != (*stacked, columns):
            raise unfit(module + _ORDER, index)
        parts["order"] = (module + _ORDER, index)
    runs = runs_of(module + _SCALE, scale, (rows, columns), None, stack)
    return Coded(
        words.file, f"int{bits}", (*stacked, rows, columns), span=words.span, parts=parts, stack=stack,
        decode=partial(_unpack, shape=(rows, columns), bits=bits, runs=runs, name=module),
    )  # fmt: skip


def _plain(module: str, entry: Entry, stored: Stored) -> Coded:
    name = f"{module}.weight"
    require(name, stored, "I8", *FLOAT8)
    if module + _ORDER in stored:
        raise CheckpointError(
            f"the checkpoint holds {shown(module)}{_ORDER} beside numbers that are not packed; it is not read"
        )
    if entry.dtype in FLOAT8:
        return float8(entry, name, module + _SCALE, stored)
    *stacked, rows, columns = entry.shape
    stack = stacked[0] if stacked else 0
    scale = require(module + _SCALE, stored, *SCALES)
    parts = {"codes": (name, entry), "scale": (module + _SCALE, scale)}
    if module + _ZERO in stored:
        zeros = require(module + _ZERO, stored, "I8", "I32")
        if zeros.shape != scale.shape:
            raise unfit(module + _ZERO, zeros)
        parts["zeros"] = (module + _ZERO, zeros)
    runs = runs_of(module + _SCALE, scale, (rows, columns), None, stack)
    return Coded(
        entry.file, "int8", entry.shape, span=entry.span, parts=parts, stack=stack, decode=partial(_integers, runs=runs)
    )


def _floats(module: str, stored: Stored) -> Coded:
    values = require(module + _PACKED, stored, "U8")
    parts = {"values": (module + _PACKED, values)}
    if len(values.shape) not in (2, 3):
        raise unfit(module + _PACKED, values)
    nested = module + _GLOBAL in stored
    scale = require(module + _SCALE, stored, *(("F8_E4M3",) if nested else ("U8", "F8_E8M0")))
    parts["scale"] = (module + _SCALE, scale)
    if nested:
        parts["over"] = (module + _GLOBAL, require_one(module + _GLOBAL, stored, "F32"))
    *stacked, rows, half = values.shape
    stack = stacked[0] if stacked else 0
    runs = runs_of(module + _SCALE, scale, (rows, 2 * half), None, stack)
    return Coded(
        values.file, "NVFP4" if nested else "MXFP4", (*stacked, rows, 2 * half), span=values.span, parts=parts, stack=stack,
        decode=partial(_small_floats, runs=runs),
    )  # fmt: skip


def _numbers(entry: Entry) -> tuple[int, ...]:
    """The integers of a small tensor."""
    data = stored_bytes(entry)
    kind = "q" if entry.dtype == "I64" else "i"
    count = len(data) // struct.calcsize(kind)
    found = struct.unpack(f"<{count}{kind}", data)
    if count not in (2, 3) or min(found) < 1:
        raise CheckpointError(
            f"a weight_shape in {entry.file.name} is {list(found)}, which is no matrix's; fetch it again"
        )
    return found


def _unpack(parts: Mapping[str, Tensor], shape: tuple[int, int], bits: int, runs: tuple[int, int], name: str) -> Tensor:
    rows, columns = shape
    middle = 1 << (bits - 1)
    scale = parts["scale"].float()
    scale = scale.reshape(grid(tuple(scale.shape)))
    codes = unpacked(parts["codes"], bits, columns).float() - middle
    zeros = None
    if "zeros" in parts:
        zeros = unpacked(parts["zeros"].T, bits, rows).T.float() - middle
    if "order" in parts and (index := parts["order"].long()).min() >= 0:  # -1: was never set, columns are in turn
        if index.max() >= scale.shape[1]:
            raise CheckpointError(f"{shown(name)}{_ORDER} names groups that there are no scales of; fetch it again")
        scale, zeros, runs = scale[:, index], None if zeros is None else zeros[:, index], (runs[0], 1)
    if zeros is not None:
        codes -= spread(zeros, columns, runs[1], 1)
    return scaled(codes, scale, runs)


def _integers(parts: Mapping[str, Tensor], runs: tuple[int, int]) -> Tensor:
    codes = parts["codes"].float()
    if "zeros" in parts:
        zeros = parts["zeros"].float().reshape(grid(tuple(parts["zeros"].shape)))
        codes -= spread(spread(zeros, codes.shape[0], runs[0], 0), codes.shape[1], runs[1], 1)
    return scaled(codes, parts["scale"], runs)


def _small_floats(parts: Mapping[str, Tensor], runs: tuple[int, int]) -> Tensor:
    scale = parts["scale"]
    if "over" in parts:
        scale = scale.float() / parts["over"].reshape(())
    return scaled(e2m1(parts["values"]), scale, runs)


FORMAT = Format(
    name="compressed-tensors",
    methods=("compressed-tensors",),
    holds="packed integers of 1 to 8 bits (groups or rows, symmetric or not, ordered by activations), int8, FP8, NVFP4, MXFP4",
    find=find,
    problem=problem,
)
