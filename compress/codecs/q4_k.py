"""ggml Q4_K: super-blocks of 256 = 8 x 32 columns, 6-bit scales and minimums, 4-bit levels."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.base import ScalarCodec
from compress.codecs.bits import half_bytes, pack_scales_6bit, read_half, u8, unpack_scales_6bit
from compress.codecs.grid import SuperBlockMinGrid
from compress.codecs.scales import IntegerScale


class Q4_K(ScalarCodec[SuperBlockMinGrid]):
    name, span, sub, block_bytes = "q4_k", 256, 32, 144
    low, high = 0, 15
    scale_rule = min_rule = IntegerScale(0, 63)
    shrinks = (1.0, 0.95, 0.9, 0.85, 0.8)

    def pack_blocks(self, units: Tensor, grid: SuperBlockMinGrid) -> Tensor:
        q = u8(units).reshape(-1, 4, 2, 32)
        scales = pack_scales_6bit(grid.integers, grid.min_integers)
        return torch.cat(
            (half_bytes(grid.d), half_bytes(grid.dmin), scales, (q[:, :, 0] | (q[:, :, 1] << 4)).reshape(-1, 128)),
            dim=1,
        )

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scales, mins = unpack_scales_6bit(blocks[:, 4:16])
        q = blocks[:, 16:].reshape(-1, 4, 1, 32)
        units = torch.cat((q & 0xF, q >> 4), dim=2).reshape(-1, 256).float()
        return units, read_half(blocks, 0) * scales, read_half(blocks, 2) * mins


CODEC = Q4_K()
