"""ggml IQ2_XXS: super-blocks of 256, 4-bit scales per 32, eight columns from a 256-entry table with 7 sign bits."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.bits import half_bytes, pack_signs, pack_words, read_half, unpack_signs, unpack_words
from compress.codecs.grid import SuperBlockGrid
from compress.codecs.lattice import LatticeCodec
from compress.codecs.scales import IntegerScale


class IQ2_XXS(LatticeCodec[SuperBlockGrid]):
    name, span, sub, block_bytes = "iq2_xxs", 256, 32, 66
    table = "IQ2_XXS"
    scale_rule = IntegerScale(0, 15, factor=0.25, shift=0.125)  # d * (s + 1/2) / 4

    def pack_blocks(self, units: Tensor, grid: SuperBlockGrid) -> Tensor:
        groups = units.reshape(-1, 8, 4, 8)
        index = self.index(groups)
        fields = torch.arange(4, device=units.device)
        signs = (pack_signs(groups < 0) << (7 * fields)).sum(2) | (grid.integers.to(torch.int64) << 28)
        words = torch.stack(((index << (8 * fields)).sum(2), signs), dim=2).reshape(-1, 16)
        return torch.cat((half_bytes(grid.d), pack_words(words, 4)), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, None]:
        words = unpack_words(blocks[:, 2:], 4).reshape(-1, 8, 2)
        fields = torch.arange(4, device=blocks.device)
        index = (words[..., :1] >> (8 * fields)) & 0xFF
        signs = unpack_signs((words[..., 1:] >> (7 * fields)) & 0x7F)
        units = (self.points_on(blocks.device)[index] * signs).reshape(-1, 256)
        return units, read_half(blocks, 0) * self.scale_rule.multiplier((words[..., 1] >> 28).float()), None


CODEC = IQ2_XXS()
