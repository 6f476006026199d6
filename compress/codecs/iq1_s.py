"""ggml IQ1_S: super-blocks of 256, a 3-bit scale and a shift of +-1/8 per 32, eight columns from 2048 ternary points.

A value is `scale * (point + shift)`; to the solvers the shift is an offset of `-scale * shift`.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from compress.codecs.bits import half_bytes, pack_words, read_half, u8, unpack_words
from compress.codecs.grid import ShiftedGrid, SuperBlockGrid
from compress.codecs.lattice import SignedCodec
from compress.codecs.scales import IntegerScale

SHIFT = 0.125  # IQ1S_DELTA, ggml-common.h


class _Shifted(SignedCodec[SuperBlockGrid]):
    """The points with one of the two shifts added, to search scales with."""

    name, span, sub = "iq1_s", 256, 32
    table = "IQ1_S"

    def __init__(self, shift: float):
        self.shift = shift

    @cached_property
    def points(self) -> Tensor:
        return super().points + self.shift


class _Unshifted(SignedCodec[SuperBlockGrid]):
    """The points as they are, whose scales are stored and improved."""

    name, span, sub = "iq1_s", 256, 32
    table = "IQ1_S"
    scale_rule = IntegerScale(0, 7, factor=2.0, shift=1.0)


class IQ1_S(SignedCodec[ShiftedGrid]):
    name, span, sub, block_bytes = "iq1_s", 256, 32, 50
    table = "IQ1_S"
    scale_rule = _Unshifted.scale_rule
    _up, _down, _plain = _Shifted(SHIFT), _Shifted(-SHIFT), _Unshifted()

    def fit(self, weight: Tensor, importance: Tensor) -> ShiftedGrid:
        up, down = self._up._wanted(weight, importance), self._down._wanted(weight, importance)
        # scale^2 curvature is what a least-squares scale explains
        better = up[0] * up[0] * up[1] >= down[0] * down[0] * down[1]
        scale, curvature = (torch.where(better, u, d) for u, d in zip(up, down, strict=True))
        return ShiftedGrid.of(self._plain.store(scale, curvature), torch.where(better, SHIFT, -SHIFT))

    def refit(self, weight: Tensor, units: Tensor, grid: ShiftedGrid, gram: Tensor) -> ShiftedGrid:
        """See BlockCodec.refit; the shifts stay."""
        points = units + self.columns(grid.shift)
        return ShiftedGrid.of(self._plain.refit(weight, points, _unshifted(grid), gram), grid.shift)

    def rescaled(self, grid: ShiftedGrid, factor: Tensor, offset_factor: Tensor | None = None) -> ShiftedGrid:
        """See BlockCodec.rescaled; the offset is a multiple of the scale and follows it."""
        return ShiftedGrid.of(self._plain.rescaled(_unshifted(grid), factor), grid.shift)

    def pack_blocks(self, units: Tensor, grid: ShiftedGrid) -> Tensor:
        index = self.index(units.reshape(-1, 8, 4, 8))
        high = ((index >> 8) << (3 * torch.arange(4, device=units.device))).sum(2)
        words = high | (grid.integers.to(torch.int64) << 12) | ((grid.shift < 0).to(torch.int64) << 15)
        return torch.cat((half_bytes(grid.d), u8(index).reshape(-1, 32), pack_words(words, 2)), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        words = unpack_words(blocks[:, 34:], 2)
        high = (words[..., None] >> (3 * torch.arange(4, device=blocks.device))) & 7
        units = self.points_on(blocks.device)[blocks[:, 2:34].long() | (high.reshape(-1, 32) << 8)]
        scale = read_half(blocks, 0) * _Unshifted.scale_rule.multiplier(((words >> 12) & 7).float())
        return units.reshape(-1, 256), scale, -(scale * torch.where(words >> 15 > 0, -SHIFT, SHIFT))


def _unshifted(grid: ShiftedGrid) -> SuperBlockGrid:
    return SuperBlockGrid(grid.scale, grid.d, grid.integers)


CODEC = IQ1_S()
