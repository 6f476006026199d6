"""ggml TQ1_0: blocks of 256 ternary columns, five to a byte in base 3, one half-precision scale.

Made for models trained with ternary weights. A byte holds the fraction 0.t0t1t2t3t4 (base 3) in 1/256, rounded up, so
that multiplying by three and keeping the carry gives one digit after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.bits import half_bytes, read_half
from compress.codecs.grid import ScaleGrid
from compress.codecs.tq2_0 import Ternary

# (first column, digits, bytes): the columns of one digit lie side by side
PARTS = ((0, 5, 32), (160, 5, 16), (240, 4, 4))


class TQ1_0(Ternary):
    name, block_bytes = "tq1_0", 54

    def pack_blocks(self, units: Tensor, grid: ScaleGrid) -> Tensor:
        trits = units.to(torch.int64) + 1
        data = []
        for start, digits, width in PARTS:
            place = 3 ** (4 - torch.arange(digits, device=units.device))
            number = (trits[:, start : start + digits * width].reshape(-1, digits, width) * place[:, None]).sum(1)
            data.append((number * 256 + 242) // 243)
        return torch.cat((torch.cat(data, dim=1).to(torch.uint8), half_bytes(grid.scale)), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, None]:
        units, at = [], 0
        for _, digits, width in PARTS:
            power = 3 ** torch.arange(digits, device=blocks.device)
            rest = (blocks[:, at : at + width].long()[:, None] * power[:, None]) & 0xFF
            units.append(((rest * 3) >> 8).reshape(len(blocks), -1))
            at += width
        return torch.cat(units, dim=1).float() - 1, read_half(blocks, 52), None


CODEC = TQ1_0()
