"""ggml Q3_K: super-blocks of 256 = 16 x 16 columns, 6-bit signed scales, 3-bit symmetric levels."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.base import ScalarCodec
from compress.codecs.bits import half_bytes, read_half, u8
from compress.codecs.grid import SuperBlockGrid
from compress.codecs.scales import IntegerScale


class Q3_K(ScalarCodec[SuperBlockGrid]):
    name, span, sub, block_bytes = "q3_k", 256, 16, 110
    low, high = -4, 3
    signed_scale = True
    scale_rule = IntegerScale(-32, 31)

    def pack_blocks(self, units: Tensor, grid: SuperBlockGrid) -> Tensor:
        q = u8(units + 4).reshape(-1, 8, 32)
        weights = (1 << torch.arange(8, device=q.device)).reshape(1, 8, 1)
        mask = u8(((q >> 2).to(torch.int32) * weights).sum(1))
        low = (q & 3).reshape(-1, 2, 4, 32)
        low = low[:, :, 0] | (low[:, :, 1] << 2) | (low[:, :, 2] << 4) | (low[:, :, 3] << 6)
        s = u8(grid.integers + 32)
        nibbles = (s[:, :8] & 0xF) | ((s[:, 8:] & 0xF) << 4)
        two = (s >> 4).reshape(-1, 4, 4)
        highs = two[:, 0] | (two[:, 1] << 2) | (two[:, 2] << 4) | (two[:, 3] << 6)
        return torch.cat((mask, low.reshape(-1, 64), nibbles, highs, half_bytes(grid.d)), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, None]:
        eight = torch.arange(8, dtype=torch.uint8, device=blocks.device).reshape(1, 8, 1)
        four = (2 * eight[:, :4]).reshape(1, 1, 4, 1)
        high = (blocks[:, None, :32] >> eight) & 1
        low = ((blocks[:, 32:96].reshape(-1, 2, 1, 32) >> four) & 3).reshape(-1, 8, 32)
        units = (low | (high << 2)).reshape(-1, 256).float() - 4
        nibbles = torch.cat((blocks[:, 96:104] & 0xF, blocks[:, 96:104] >> 4), dim=1)
        two = ((blocks[:, None, 104:108] >> four[0]) & 3).reshape(-1, 16)
        scales = (nibbles | (two << 4)).float() - 32
        return units, read_half(blocks, 108) * scales, None


CODEC = Q3_K()
