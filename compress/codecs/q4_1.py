"""ggml Q4_1: blocks of 32, half-precision scale and minimum; llama.cpp's Q4_0 mix has it in the first layers."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.bits import half_bytes, pack_nibbles, read_half, unpack_nibbles
from compress.codecs.grid import SuperBlockMinGrid
from compress.codecs.q5_1 import Q5_1


class Q4_1(Q5_1):
    name, span, sub, block_bytes = "q4_1", 32, 32, 20
    low, high = 0, 15
    shrinks = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85)

    def pack_blocks(self, units: Tensor, grid: SuperBlockMinGrid) -> Tensor:
        return torch.cat((half_bytes(grid.d), half_bytes(-grid.dmin), pack_nibbles(units)), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return unpack_nibbles(blocks[:, 4:]).float(), read_half(blocks, 0), -read_half(blocks, 2)


CODEC = Q4_1()
