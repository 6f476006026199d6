"""ggml IQ2_S: super-blocks of 256, 4-bit scales per 16, eight columns from a 1024-entry table with 8 sign bits."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.bits import half_bytes, pack_bits, read_half, u8, unpack_bits
from compress.codecs.grid import SuperBlockGrid
from compress.codecs.lattice import FreeSignCodec
from compress.codecs.scales import IntegerScale


class IQ2_S(FreeSignCodec[SuperBlockGrid]):
    name, span, sub, block_bytes = "iq2_s", 256, 16, 82
    table = "IQ2_S"
    scale_rule = IntegerScale(0, 15, factor=0.25, shift=0.125)  # d * (s + 1/2) / 4

    def pack_blocks(self, units: Tensor, grid: SuperBlockGrid) -> Tensor:
        groups = units.reshape(-1, 32, 8)
        index = self.index(groups)
        high = ((index >> 8).reshape(-1, 8, 4) << (2 * torch.arange(4, device=units.device))).sum(2)
        s = u8(grid.integers).reshape(-1, 8, 2)
        return torch.cat(
            (half_bytes(grid.d), u8(index), pack_bits(groups < 0), u8(high), s[..., 0] | (s[..., 1] << 4)), dim=1
        )

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, None]:
        high = (blocks[:, 66:74, None].long() >> (2 * torch.arange(4, device=blocks.device))) & 3
        index = blocks[:, 2:34].long() | (high.reshape(-1, 32) << 8)
        signs = 1.0 - 2.0 * unpack_bits(blocks[:, 34:66]).float()
        s = torch.stack((blocks[:, 74:] & 0xF, blocks[:, 74:] >> 4), dim=2).reshape(-1, 16).float()
        units = (self.points_on(blocks.device)[index] * signs).reshape(-1, 256)
        return units, read_half(blocks, 0) * self.scale_rule.multiplier(s), None


CODEC = IQ2_S()
