"""ggml IQ1_M: super-blocks of 256, 3-bit scales per 16, eight columns from 2048 ternary points shifted by +-1/8."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from compress.codecs.bits import half_bytes, pack_words, u8, unpack_words
from compress.codecs.grid import SuperBlockGrid
from compress.codecs.iq1_s import SHIFT
from compress.codecs.lattice import SignedCodec
from compress.codecs.scales import IntegerScale


class IQ1_M(SignedCodec[SuperBlockGrid]):
    name, span, sub, block_bytes = "iq1_m", 256, 16, 56
    table = "IQ1_S"  # the same points; here each group of eight has a shift of its own
    scale_rule = IntegerScale(0, 7, factor=2.0, shift=1.0)

    @cached_property
    def points(self) -> Tensor:
        """Shifted points, float32 [4096, 8]: first those shifted up, then those shifted down."""
        grid = super().points
        return torch.cat((grid + SHIFT, grid - SHIFT))

    def pack_blocks(self, units: Tensor, grid: SuperBlockGrid) -> Tensor:
        index = self.index(units.reshape(-1, 32, 8))
        fields = torch.arange(4, device=units.device)
        nibble = ((index >> 8) & 15).reshape(-1, 16, 2)  # three bits of the point, one of the shift
        scales = (grid.integers.to(torch.int64).reshape(-1, 4, 4) << (3 * fields)).sum(2)
        d = unpack_words(half_bytes(grid.d), 2)
        words = scales | (((d >> (4 * fields)) & 15) << 12)
        return torch.cat((u8(index), u8(nibble[..., 0] | (nibble[..., 1] << 4)), pack_words(words, 2)), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, None]:
        fields = torch.arange(4, device=blocks.device)
        nibble = torch.stack((blocks[:, 32:48] & 0xF, blocks[:, 32:48] >> 4), dim=2).reshape(-1, 32)
        words = unpack_words(blocks[:, 48:], 2)
        d = pack_words(((words >> 12) << (4 * fields)).sum(1, keepdim=True), 2).view(torch.float16).float()
        s = ((words[..., None] >> (3 * fields)) & 7).reshape(-1, 16).float()
        units = self.points_on(blocks.device)[blocks[:, :32].long() | (nibble.long() << 8)].reshape(-1, 256)
        return units, d * self.scale_rule.multiplier(s), None


CODEC = IQ1_M()
