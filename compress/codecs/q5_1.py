"""ggml Q5_1: blocks of 32, half-precision scale and minimum; Q5_K's fallback for short rows."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compress.codecs.base import Grid, IntegerScale, ScalarCodec, half
from compress.codecs.bits import half_bytes, read_half
from compress.codecs.q5_0 import pack_fifth_bits, unpack_fifth_bits


class Q5_1(ScalarCodec):
    name, span, sub, block_bytes = "q5_1", 32, 32, 24
    low, high = 0, 31
    # one sub-block a span: the "integer" is always 1 and d, dmin carry the values
    scale_rule = min_rule = IntegerScale(1, 1)
    shrinks = (1.02, 1.0, 0.98, 0.96, 0.94, 0.92)

    def store(
        self, scale: Tensor, offset: Tensor | None, curvature: Tensor, offset_curvature: Tensor | None = None
    ) -> Grid:
        d, dmin, one = half(scale), half(offset), torch.ones_like(scale)
        return replace(Grid(scale=d), offset=dmin, d=d, dmin=dmin, integers=one, min_integers=one)

    def pack_blocks(self, units: Tensor, grid: Grid) -> Tensor:
        return torch.cat((half_bytes(grid.d), half_bytes(-grid.dmin), pack_fifth_bits(units)), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return unpack_fifth_bits(blocks[:, 4:]), read_half(blocks, 0), -read_half(blocks, 2)


CODEC = Q5_1()
