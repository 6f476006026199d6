"""MXFP4 as gpt-oss has its experts: 32 four-bit floats share a power of two.

All experts of a layer are stacked, rows of `in`: `name_blocks` uint8 [experts, out, in / 32, 16], the low half of a byte first, and
`name_scales` uint8 [experts, out, in / 32], exponents with a bias of 127. `name` is the tensor as transformers has it, [experts,
in, out]. Source: transformers' integrations/mxfp4.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from compress.models.sources.arithmetic import e2m1, scale_values
from compress.models.sources.base import Coded, Format, Stored, require, unfit

if TYPE_CHECKING:
    from torch import Tensor

_BLOCKS, _SCALES = "_blocks", "_scales"


def find(settings: Mapping[str, Any], stored: Stored) -> Iterator[tuple[str, Coded]]:
    """See Format. Raises CheckpointError where scales do not fit their blocks."""
    for blocks in (key for key in stored if key.endswith(_BLOCKS) and len(stored[key].shape) == 4):
        name = blocks.removesuffix(_BLOCKS)
        values, scales = require(blocks, stored, "U8"), require(name + _SCALES, stored, "U8")
        experts, rows, groups, octets = values.shape
        if octets != 16:
            raise unfit(blocks, values)
        if scales.shape != (experts, rows, groups):
            raise unfit(name + _SCALES, scales)
        yield name, Coded(
            values.file, "MXFP4", (experts, groups * 32, rows), span=values.span, stack=experts,
            parts={"values": (blocks, values), "scales": (name + _SCALES, scales)}, decode=_decode,
        )  # fmt: skip


def _decode(parts: Mapping[str, Tensor]) -> Tensor:
    """float32 [in, out] of blocks [out, in / 32, 16]."""
    values = e2m1(parts["values"]) * scale_values(parts["scales"])[..., None]
    return values.flatten(1).T.contiguous()


FORMAT = Format(
    name="MXFP4",
    methods=("mxfp4",),
    holds="stacked experts as gpt-oss has them (`*_blocks`, `*_scales`)",
    find=find,
)
