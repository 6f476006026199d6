"""ggml Q6_K: super-blocks of 256 = 16 x 16 columns, int8 scales, 6-bit symmetric levels."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.base import ScalarCodec
from compress.codecs.bits import half_bytes, read_half, u8
from compress.codecs.grid import SuperBlockGrid
from compress.codecs.scales import IntegerScale


class Q6_K(ScalarCodec[SuperBlockGrid]):
    name, span, sub, block_bytes = "q6_k", 256, 16, 210
    low, high = -32, 31
    signed_scale = True
    scale_rule = IntegerScale(-128, 127)
    shrinks = tuple(1.01 - 0.01 * i for i in range(12))

    def pack_blocks(self, units: Tensor, grid: SuperBlockGrid) -> Tensor:
        q = u8(units + 32).reshape(-1, 2, 4, 32)  # half, quarter of the half, column
        nibble, two = q & 0xF, q >> 4
        low = torch.cat((nibble[:, :, 0] | (nibble[:, :, 2] << 4), nibble[:, :, 1] | (nibble[:, :, 3] << 4)), dim=2)
        high = two[:, :, 0] | (two[:, :, 1] << 2) | (two[:, :, 2] << 4) | (two[:, :, 3] << 6)
        return torch.cat((low.reshape(-1, 128), high.reshape(-1, 64), u8(grid.integers), half_bytes(grid.d)), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, None]:
        low = blocks[:, :128].reshape(-1, 2, 2, 32)
        low = torch.cat((low & 0xF, low >> 4), dim=2)
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).reshape(1, 1, 4, 1)
        high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
        units = (low | (high << 4)).reshape(-1, 256).float() - 32
        scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
        return units, read_half(blocks, 208) * scales, None


CODEC = Q6_K()
