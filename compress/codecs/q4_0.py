"""ggml Q4_0: blocks of 32, one half-precision scale of either sign."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.base import ScalarCodec
from compress.codecs.bits import half_bytes, pack_nibbles, read_half, unpack_nibbles
from compress.codecs.grid import ScaleGrid


class Q4_0(ScalarCodec[ScaleGrid]):
    name, span, sub, block_bytes = "q4_0", 32, 32, 18
    low, high = -8, 7
    signed_scale = True

    def pack_blocks(self, units: Tensor, grid: ScaleGrid) -> Tensor:
        return torch.cat((half_bytes(grid.scale), pack_nibbles(units + 8)), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, None]:
        return unpack_nibbles(blocks[:, 2:]).float() - 8, read_half(blocks, 0), None


CODEC = Q4_0()
