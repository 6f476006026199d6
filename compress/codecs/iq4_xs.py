"""ggml IQ4_XS: super-blocks of 256 = 8 x 32 columns, 6-bit signed scales, the levels of IQ4_NL."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.bits import half_bytes, pack_nibbles, pack_words, read_half, unpack_nibbles, unpack_words
from compress.codecs.grid import SuperBlockGrid
from compress.codecs.iq4_nl import NonLinear4
from compress.codecs.scales import IntegerScale


class IQ4_XS(NonLinear4[SuperBlockGrid]):
    name, span, sub, block_bytes = "iq4_xs", 256, 32, 136
    scale_rule = IntegerScale(-32, 31)

    def pack_blocks(self, units: Tensor, grid: SuperBlockGrid) -> Tensor:
        s = (grid.integers + 32).to(torch.int64)
        high = ((s >> 4) << (2 * torch.arange(8, device=s.device))).sum(1, keepdim=True)
        low = ((s & 0xF).reshape(-1, 4, 2) << torch.tensor([0, 4], device=s.device)).sum(2)
        q = pack_nibbles(self.index(units).reshape(-1, 8, 32)).reshape(-1, 128)
        return torch.cat((half_bytes(grid.d), pack_words(high, 2), low.to(torch.uint8), q), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, None]:
        high = (unpack_words(blocks[:, 2:4], 2) >> (2 * torch.arange(8, device=blocks.device))) & 3
        low = torch.stack((blocks[:, 4:8] & 0xF, blocks[:, 4:8] >> 4), dim=2).reshape(-1, 8)
        scales = (low + (high << 4)).float() - 32
        units = self.levels.on(blocks.device)[unpack_nibbles(blocks[:, 8:].reshape(-1, 8, 16)).reshape(-1, 256).long()]
        return units, read_half(blocks, 0) * scales, None


CODEC = IQ4_XS()
