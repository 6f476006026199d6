"""ggml IQ3_S: super-blocks of 256, 4-bit scales per 32, four columns from a 512-entry table with 4 sign bits."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.bits import half_bytes, pack_bits, read_half, u8, unpack_bits
from compress.codecs.grid import SuperBlockGrid
from compress.codecs.lattice import FreeSignCodec
from compress.codecs.scales import IntegerScale


class IQ3_S(FreeSignCodec[SuperBlockGrid]):
    name, span, sub, block_bytes = "iq3_s", 256, 32, 110
    step = 4
    table = "IQ3_S"
    scale_rule = IntegerScale(0, 15, factor=2.0, shift=1.0)

    def pack_blocks(self, units: Tensor, grid: SuperBlockGrid) -> Tensor:
        index = self.index(units.reshape(-1, 64, 4))
        s = u8(grid.integers).reshape(-1, 4, 2)
        return torch.cat(
            (
                half_bytes(grid.d),
                u8(index),
                pack_bits(index.reshape(-1, 8, 8) > 255),
                pack_bits(units.reshape(-1, 32, 8) < 0),
                s[..., 0] | (s[..., 1] << 4),
            ),
            dim=1,
        )

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, None]:
        index = blocks[:, 2:66].long() | (unpack_bits(blocks[:, 66:74]).long().reshape(-1, 64) << 8)
        signs = 1.0 - 2.0 * unpack_bits(blocks[:, 74:106]).float()
        s = torch.stack((blocks[:, 106:] & 0xF, blocks[:, 106:] >> 4), dim=2).reshape(-1, 8).float()
        units = self.points_on(blocks.device)[index].reshape(-1, 256) * signs.reshape(-1, 256)
        return units, read_half(blocks, 0) * self.scale_rule.multiplier(s), None


CODEC = IQ3_S()
