"""ggml IQ3_XXS: super-blocks of 256, 4-bit scales per 32, four columns from a 256-entry table, 7 sign bits per eight."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.bits import half_bytes, pack_signs, pack_words, read_half, unpack_signs, unpack_words
from compress.codecs.grid import SuperBlockGrid
from compress.codecs.lattice import LatticeCodec
from compress.codecs.scales import IntegerScale


class IQ3_XXS(LatticeCodec[SuperBlockGrid]):
    name, span, sub, block_bytes = "iq3_xxs", 256, 32, 98
    table = "IQ3_XXS"
    scale_rule = IntegerScale(0, 15, factor=0.5, shift=0.25)  # d * (s + 1/2) / 2

    def pack_blocks(self, units: Tensor, grid: SuperBlockGrid) -> Tensor:
        index = self.index(units.reshape(-1, 64, 4)).to(torch.uint8)
        fields = 7 * torch.arange(4, device=units.device)
        words = (pack_signs(units.reshape(-1, 8, 4, 8) < 0) << fields).sum(2) | (grid.integers.to(torch.int64) << 28)
        return torch.cat((half_bytes(grid.d), index, pack_words(words, 4)), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, None]:
        words = unpack_words(blocks[:, 66:], 4)
        signs = unpack_signs((words[..., None] >> (7 * torch.arange(4, device=blocks.device))) & 0x7F)
        units = self.points_on(blocks.device)[blocks[:, 2:66].long()].reshape(-1, 256) * signs.reshape(-1, 256)
        return units, read_half(blocks, 0) * self.scale_rule.multiplier((words >> 28).float()), None


CODEC = IQ3_XXS()
