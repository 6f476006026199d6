"""ggml Q5_0: blocks of 32, one half-precision scale of either sign; Q4_K's fallback for short rows."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.base import ScalarCodec
from compress.codecs.bits import half_bytes, pack_nibbles, pack_words, read_half, unpack_nibbles, unpack_words
from compress.codecs.grid import ScaleGrid


def pack_fifth_bits(levels: Tensor) -> Tensor:
    """[B, 32] in 0..31 -> uint8 [B, 20]: the high bits as a 32-bit word, then the nibbles."""
    level = levels.to(torch.int64)
    high = ((level >> 4) << torch.arange(32, device=levels.device)).sum(1, keepdim=True)
    return torch.cat((pack_words(high, 4), pack_nibbles(level & 0xF)), dim=1)


def unpack_fifth_bits(data: Tensor) -> Tensor:
    """Inverse of `pack_fifth_bits`, as float32."""
    high = (unpack_words(data[:, :4], 4) >> torch.arange(32, device=data.device)) & 1
    return (unpack_nibbles(data[:, 4:]).to(torch.int64) + (high << 4)).float()


class Q5_0(ScalarCodec[ScaleGrid]):
    name, span, sub, block_bytes = "q5_0", 32, 32, 22
    low, high = -16, 15
    signed_scale = True

    def pack_blocks(self, units: Tensor, grid: ScaleGrid) -> Tensor:
        return torch.cat((half_bytes(grid.scale), pack_fifth_bits(units + 16)), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, None]:
        return unpack_fifth_bits(blocks[:, 2:]) - 16, read_half(blocks, 0), None


CODEC = Q5_0()
