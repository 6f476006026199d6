"""ggml MXFP4: blocks of 32 e2m1 levels under a power of two (OCP Microscaling Formats 1.0, section 5).

ggml keeps the levels doubled, so the byte e stands for the scale 2^(e - 128). Byte 255 is the standard's NaN and never
written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.base import ScalarCodec
from compress.codecs.bits import pack_nibbles, u8, unpack_nibbles
from compress.codecs.grid import ScaleGrid
from compress.codecs.tables import Table

# kvalues_mxfp4, ggml-common.h, in rising order without the second zero
LEVELS = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)
CODES = (15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7)
SMALLEST, LARGEST = -128, 126  # exponents of the bytes 0 and 254


def power_of_two(wanted: Tensor) -> Tensor:
    """The storable power of two nearest to `wanted`; the smallest one for what is not positive."""
    mantissa, exponent = torch.frexp(wanted)  # wanted = mantissa 2^exponent, mantissa in [1/2, 1)
    exponent = torch.where(wanted > 0, exponent - (mantissa <= 0.75).int(), SMALLEST)
    return torch.ldexp(torch.ones_like(wanted), exponent.clamp(SMALLEST, LARGEST))


class MXFP4(ScalarCodec[ScaleGrid]):
    name, span, sub, block_bytes = "mxfp4", 32, 32, 17
    low, high = LEVELS[0], LEVELS[-1]
    levels = Table(torch.tensor(LEVELS, dtype=torch.float32))
    codes = Table(torch.tensor(CODES, dtype=torch.uint8))
    _edges = Table((levels.values[1:] + levels.values[:-1]) / 2)
    _decoded = Table(torch.zeros(16).scatter_(0, codes.values.long(), levels.values))  # by code

    def index(self, units: Tensor) -> Tensor:
        return torch.bucketize(units.contiguous(), self._edges.on(units.device))

    def round(self, target: Tensor) -> Tensor:
        return self.levels.on(target.device)[self.index(target)]

    def _search_scale(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Every power of two that can be best, from one that clips nothing down to one that clips to a sixteenth."""
        _, top = torch.frexp(x.abs().amax(2))
        x = torch.ldexp(x, -top[..., None])  # now at most 1, so that squares neither overflow nor vanish
        best_error, best = torch.full_like(x[..., 0], torch.inf), torch.zeros_like(top)
        curvature: Tensor | None = None
        for exponent in range(-3, -8, -1):
            u = self.round(x * 2.0**-exponent)
            error, square = (a * (x - u * 2.0**exponent) ** 2).sum(2), (a * u * u).sum(2)
            curvature = square if curvature is None else torch.where(error < best_error, square, curvature)
            best = torch.where(error < best_error, top + exponent, best)
            best_error = torch.minimum(error, best_error)
        assert curvature is not None
        chosen = torch.where((x == 0).all(2), SMALLEST, best).clamp(SMALLEST, LARGEST)
        return torch.ldexp(torch.ones_like(best_error), chosen), curvature

    def storable(self, scale: Tensor) -> Tensor:
        return power_of_two(scale)

    def refit(self, weight: Tensor, units: Tensor, grid: ScaleGrid, gram: Tensor) -> ScaleGrid:
        # The steps are float32 differences: next to a large scale the smallest would round to zero, which has no byte.
        return ScaleGrid(power_of_two(super().refit(weight, units, grid, gram).scale))

    def pack_blocks(self, units: Tensor, grid: ScaleGrid) -> Tensor:
        exponent = torch.frexp(grid.scale)[1] - 1
        codes = self.codes.on(units.device)[self.index(units)]
        return torch.cat((u8(exponent - SMALLEST), pack_nibbles(codes)), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, None]:
        scale = torch.ldexp(torch.ones(len(blocks), 1, device=blocks.device), blocks[:, :1].int() + SMALLEST)
        units = self._decoded.on(blocks.device)[unpack_nibbles(blocks[:, 1:]).long()]
        return units, scale, None


CODEC = MXFP4()
