"""ggml IQ2_XS: super-blocks of 256, 4-bit scales per 16, eight columns from a 512-entry table with 7 sign bits."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.bits import half_bytes, pack_signs, pack_words, read_half, unpack_signs, unpack_words
from compress.codecs.grid import SuperBlockGrid
from compress.codecs.lattice import LatticeCodec
from compress.codecs.scales import IntegerScale


class IQ2_XS(LatticeCodec[SuperBlockGrid]):
    name, span, sub, block_bytes = "iq2_xs", 256, 16, 74
    table = "IQ2_XS"
    scale_rule = IntegerScale(0, 15, factor=0.25, shift=0.125)

    def pack_blocks(self, units: Tensor, grid: SuperBlockGrid) -> Tensor:
        groups = units.reshape(-1, 32, 8)
        words = self.index(groups) | (pack_signs(groups < 0) << 9)
        s = grid.integers.to(torch.int64).reshape(-1, 8, 2)
        return torch.cat(
            (half_bytes(grid.d), pack_words(words, 2), (s[..., 0] | (s[..., 1] << 4)).to(torch.uint8)), dim=1
        )

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, None]:
        words = unpack_words(blocks[:, 2:66], 2)
        units = (self.points_on(blocks.device)[words & 511] * unpack_signs(words >> 9)).reshape(-1, 256)
        s = torch.stack((blocks[:, 66:] & 0xF, blocks[:, 66:] >> 4), dim=2).reshape(-1, 16).float()
        return units, read_half(blocks, 0) * self.scale_rule.multiplier(s), None


CODEC = IQ2_XS()
