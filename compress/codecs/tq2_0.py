"""ggml TQ2_0: blocks of 256 ternary columns of 2 bits, one half-precision scale.

Made for models trained with ternary weights. The fourth code would decode to 2; engines do not expect it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.base import ScalarCodec
from compress.codecs.bits import half_bytes, read_half, u8
from compress.codecs.grid import ScaleGrid
from compress.codecs.lattice import ternary_scale


class Ternary(ScalarCodec[ScaleGrid]):
    """Levels -1, 0 and 1; the best scale is known in closed form."""

    span = sub = 256
    low, high = -1, 1

    def _search_scale(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return ternary_scale(x, a)


class TQ2_0(Ternary):
    name, block_bytes = "tq2_0", 66

    def pack_blocks(self, units: Tensor, grid: ScaleGrid) -> Tensor:
        q = u8(units + 1).reshape(-1, 2, 4, 32)
        low = q[:, :, 0] | (q[:, :, 1] << 2) | (q[:, :, 2] << 4) | (q[:, :, 3] << 6)
        return torch.cat((low.reshape(-1, 64), half_bytes(grid.scale)), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, None]:
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).reshape(1, 1, 4, 1)
        units = ((blocks[:, :64].reshape(-1, 2, 1, 32) >> shifts) & 3).reshape(-1, 256).float() - 1
        return units, read_half(blocks, 64), None


CODEC = TQ2_0()
