"""ggml Q5_1: blocks of 32, half-precision scale and minimum; Q5_K's fallback for short rows."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.base import ScalarCodec
from compress.codecs.bits import half_bytes, read_half
from compress.codecs.grid import SuperBlockMinGrid
from compress.codecs.q5_0 import pack_fifth_bits, unpack_fifth_bits
from compress.codecs.scales import IntegerScale, half


class Q5_1(ScalarCodec[SuperBlockMinGrid]):
    name, span, sub, block_bytes = "q5_1", 32, 32, 24
    low, high = 0, 31
    # one sub-block a span: the "integer" is always 1 and d, dmin carry the values
    scale_rule = min_rule = IntegerScale(1, 1)
    shrinks = (1.02, 1.0, 0.98, 0.96, 0.94, 0.92)

    def store_affine(
        self, scale: Tensor, offset: Tensor, curvature: Tensor, offset_curvature: Tensor
    ) -> SuperBlockMinGrid:
        d, dmin, one = half(scale), half(offset), torch.ones_like(scale)
        return SuperBlockMinGrid(d, d, one, dmin, dmin, one)

    def pack_blocks(self, units: Tensor, grid: SuperBlockMinGrid) -> Tensor:
        return torch.cat((half_bytes(grid.d), half_bytes(-grid.dmin), pack_fifth_bits(units)), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return unpack_fifth_bits(blocks[:, 4:]), read_half(blocks, 0), -read_half(blocks, 2)


CODEC = Q5_1()
