"""ggml IQ4_NL: blocks of 32, one half-precision scale, sixteen non-linear levels."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.base import ScalarCodec
from compress.codecs.bits import half_bytes, pack_nibbles, read_half, unpack_nibbles
from compress.codecs.grid import G, ScaleGrid
from compress.codecs.tables import Table

# kvalues_iq4nl, ggml-common.h
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class NonLinear4(ScalarCodec[G]):
    """Rounding to the table above."""

    low, high = LEVELS[0], LEVELS[-1]
    signed_scale = True
    shrinks = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
    levels = Table(torch.tensor(LEVELS, dtype=torch.float32))
    _edges = Table((levels.values[1:] + levels.values[:-1]) / 2)

    def index(self, units: Tensor) -> Tensor:
        return torch.bucketize(units.contiguous(), self._edges.on(units.device))

    def round(self, target: Tensor) -> Tensor:
        return self.levels.on(target.device)[self.index(target)]


class IQ4_NL(NonLinear4[ScaleGrid]):
    name, span, sub, block_bytes = "iq4_nl", 32, 32, 18

    def pack_blocks(self, units: Tensor, grid: ScaleGrid) -> Tensor:
        return torch.cat((half_bytes(grid.scale), pack_nibbles(self.index(units))), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, None]:
        return self.levels.on(blocks.device)[unpack_nibbles(blocks[:, 2:]).long()], read_half(blocks, 0), None


CODEC = IQ4_NL()
