"""FP8 with scales for blocks, rows or whole tensors: DeepSeek's and Qwen's FP8 releases, FBGEMM, static per-tensor FP8.

`name` float8 [out, in] and `name_scale_inv` (or `name_scale`) of [out / 128, in / 128], the last blocks shorter, of [out, 1], or
one number; the weight is their product. Scales may be float32, bfloat16, or powers of two (ue8m0, as F8_E8M0 or as the bytes of
exponents). Experts may be stacked. Weights of 4-bit floats, two a byte, have scales of the same names. Sources: transformers'
integrations/finegrained_fp8.py; DeepSeek-V3's inference/fp8_cast_bf16.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from compress.models.config import Keys
from compress.models.index import Entry
from compress.models.sources.arithmetic import e2m1, scaled
from compress.models.sources.base import Coded, Format, Stored, read_settings, require, runs_of

if TYPE_CHECKING:
    from torch import Tensor

FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_PACKED = ("I8", "U8")
_SUFFIXES = ("_scale_inv", "_scale")


class Fp8Keys(Keys):
    """What is read of quantization_config."""

    weight_block_size: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)] | None = None


def find(settings: Mapping[str, Any], stored: Stored) -> Iterator[tuple[str, Coded]]:
    """See Format. Raises CheckpointError where scales do not fit their weights."""
    size = read_settings(Fp8Keys, settings).weight_block_size
    block = (size[0], size[1]) if size else None
    for name, entry in stored.items():
        if entry.dtype not in (*FLOAT8, *_PACKED) or len(entry.shape) not in (2, 3):
            continue
        scales = next((name + suffix for suffix in _SUFFIXES if name + suffix in stored), None)
        if scales is not None:
            yield name, float8(entry, name, scales, stored, block)


def float8(entry: Entry, name: str, scales: str, stored: Stored, block: tuple[int, int] | None = None) -> Coded:
    """A weight, or a stack of them, of small floats with its scales."""
    packed = entry.dtype in _PACKED
    *_, rows, columns = entry.shape
    shape = (rows, columns * 2 if packed else columns)
    stack = entry.shape[0] if len(entry.shape) == 3 else 0
    scale = require(scales, stored, *SCALES)
    runs = runs_of(scales, scale, shape, None if packed else block, stack)
    return Coded(
        entry.file, "FP4" if packed else "FP8", (*entry.shape[:-2], *shape), span=entry.span, stack=stack,
        parts={"values": (name, entry), "scale": (scales, scale)}, decode=partial(_decode, runs=runs),
    )  # fmt: skip


def _decode(parts: Mapping[str, Tensor], runs: tuple[int, int]) -> Tensor:
    import torch

    values = parts["values"]
    if values.dtype in (torch.int8, torch.uint8):
        values = e2m1(values.view(torch.uint8))
    return scaled(values, parts["scale"], runs)


FORMAT = Format(
    name="FP8",
    methods=("fp8", "fbgemm_fp8", "mxfp8"),
    holds="E4M3 or E5M2, scales of blocks (`weight_scale_inv`, ragged edges, ue8m0), of rows or of whole tensors",
    find=find,
)
