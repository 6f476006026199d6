"""ggml Q2_K: super-blocks of 256 = 16 x 16 columns, 4-bit scales and minimums, 2-bit levels."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.base import ScalarCodec
from compress.codecs.bits import half_bytes, read_half, u8
from compress.codecs.grid import SuperBlockMinGrid
from compress.codecs.scales import IntegerScale


class Q2_K(ScalarCodec[SuperBlockMinGrid]):
    name, span, sub, block_bytes = "q2_k", 256, 16, 84
    low, high = 0, 3
    scale_rule = min_rule = IntegerScale(0, 15)
    shrinks = (1.0, 0.9, 0.8, 0.7, 0.6)

    def pack_blocks(self, units: Tensor, grid: SuperBlockMinGrid) -> Tensor:
        q = u8(units).reshape(-1, 2, 4, 32)
        low = q[:, :, 0] | (q[:, :, 1] << 2) | (q[:, :, 2] << 4) | (q[:, :, 3] << 6)
        scales = u8(grid.integers) | (u8(grid.min_integers) << 4)
        return torch.cat((scales, low.reshape(-1, 64), half_bytes(grid.d), half_bytes(grid.dmin)), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).reshape(1, 1, 4, 1)
        units = ((blocks[:, 16:80].reshape(-1, 2, 1, 32) >> shifts) & 3).reshape(-1, 256).float()
        scales = blocks[:, :16]
        return units, read_half(blocks, 80) * (scales & 0xF), read_half(blocks, 82) * (scales >> 4)


CODEC = Q2_K()
