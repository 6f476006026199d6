"""ggml Q8_0: blocks of 32, one half-precision scale, int8 levels."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.base import ScalarCodec
from compress.codecs.bits import half_bytes, read_half, u8
from compress.codecs.grid import ScaleGrid


class Q8_0(ScalarCodec[ScaleGrid]):
    name, span, sub, block_bytes = "q8_0", 32, 32, 34
    low, high = -127, 127
    shrinks = tuple(1.003 - 0.0025 * i for i in range(12))

    def pack_blocks(self, units: Tensor, grid: ScaleGrid) -> Tensor:
        return torch.cat((half_bytes(grid.scale), u8(units)), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, None]:
        return blocks[:, 2:].contiguous().view(torch.int8).float(), read_half(blocks, 0), None


CODEC = Q8_0()
