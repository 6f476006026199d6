"""ggml Q5_K: as Q4_K with a fifth bit a column."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.base import ScalarCodec
from compress.codecs.bits import half_bytes, pack_scales_6bit, read_half, u8, unpack_scales_6bit
from compress.codecs.grid import SuperBlockMinGrid
from compress.codecs.scales import IntegerScale


class Q5_K(ScalarCodec[SuperBlockMinGrid]):
    name, span, sub, block_bytes = "q5_k", 256, 32, 176
    low, high = 0, 31
    scale_rule = min_rule = IntegerScale(0, 63)
    shrinks = (1.02, 1.0, 0.98, 0.96, 0.94, 0.92)

    def pack_blocks(self, units: Tensor, grid: SuperBlockMinGrid) -> Tensor:
        q = u8(units).reshape(-1, 8, 32)
        weights = (1 << torch.arange(8, device=q.device)).reshape(1, 8, 1)
        high = ((q >> 4).to(torch.int32) * weights).sum(1)
        low = (q & 0xF).reshape(-1, 4, 2, 32)
        scales = pack_scales_6bit(grid.integers, grid.min_integers)
        return torch.cat(
            (
                half_bytes(grid.d),
                half_bytes(grid.dmin),
                scales,
                u8(high),
                (low[:, :, 0] | (low[:, :, 1] << 4)).reshape(-1, 128),
            ),
            dim=1,
        )

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scales, mins = unpack_scales_6bit(blocks[:, 4:16])
        shifts = torch.arange(8, device=blocks.device, dtype=torch.uint8).reshape(1, 8, 1)
        high = (blocks[:, None, 16:48] >> shifts) & 1
        low = blocks[:, 48:].reshape(-1, 4, 1, 32)
        low = torch.cat((low & 0xF, low >> 4), dim=2).reshape(-1, 8, 32)
        units = (low | (high << 4)).reshape(-1, 256).float()
        return units, read_half(blocks, 0) * scales, read_half(blocks, 2) * mins


CODEC = Q5_K()
