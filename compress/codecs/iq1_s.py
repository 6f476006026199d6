"""ggml IQ1_S: super-blocks of 256, a 3-bit scale and a shift of +-1/8 per 32, eight columns from 2048 ternary points.

A value is `scale * (point + shift)`; to the solvers the shift is an offset of `-scale * shift`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from compress.codecs.base import Grid, IntegerScale
from compress.codecs.bits import half_bytes, pack_words, read_half, u8, unpack_words
from compress.codecs.lattice import SignedCodec

SHIFT = 0.125  # IQ1S_DELTA, ggml-common.h


class _Shifted(SignedCodec):
    """The points with one of the two shifts added, to search scales with."""

    name, span, sub = "iq1_s", 256, 32
    table = "IQ1_S"

    def __init__(self, shift: float):
        self.shift = shift

    @cached_property
    def points(self) -> Tensor:
        return super().points + self.shift


class IQ1_S(SignedCodec):
    name, span, sub, block_bytes = "iq1_s", 256, 32, 50
    table = "IQ1_S"
    scale_rule = IntegerScale(0, 7, factor=2.0, shift=1.0)
    _up, _down = _Shifted(SHIFT), _Shifted(-SHIFT)

    def fit(self, weight: Tensor, importance: Tensor) -> Grid:
        up, down = self._up._wanted(weight, importance), self._down._wanted(weight, importance)
        # scale^2 curvature is what a least-squares scale explains
        better = up[0] * up[0] * up[1] >= down[0] * down[0] * down[1]
        scale, curvature = (torch.where(better, u, d) for u, d in zip(up, down, strict=True))
        return self._shifted(self.store(scale, None, curvature), torch.where(better, SHIFT, -SHIFT))

    @staticmethod
    def _shifted(grid: Grid, shift: Tensor) -> Grid:
        return replace(grid, offset=-(grid.scale * shift))

    @staticmethod
    def _shift(grid: Grid) -> Tensor:
        """The shifts of a grid, [R, J]; signed zeros keep them where the scale is zero."""
        return torch.where(torch.signbit(grid.offset) != torch.signbit(grid.scale), SHIFT, -SHIFT)

    def refit(self, weight: Tensor, units: Tensor, grid: Grid, gram: Tensor) -> Grid:
        shift = self._shift(grid)
        points = units + self.columns(shift)
        return self._shifted(super().refit(weight, points, replace(grid, offset=None), gram), shift)

    def rescaled(self, grid: Grid, factor: Tensor, offset_factor: Tensor | None = None) -> Grid:
        """See BlockCodec.rescaled; the offset is a multiple of the scale and follows it."""
        return self._shifted(super().rescaled(grid, factor), self._shift(grid))

    def pack_blocks(self, units: Tensor, grid: Grid) -> Tensor:
        index = self.index(units.reshape(-1, 8, 4, 8))
        high = ((index >> 8) << (3 * torch.arange(4, device=units.device))).sum(2)
        words = high | (grid.integers.to(torch.int64) << 12) | ((self._shift(grid) < 0).to(torch.int64) << 15)
        return torch.cat((half_bytes(grid.d), u8(index).reshape(-1, 32), pack_words(words, 2)), dim=1)

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        words = unpack_words(blocks[:, 34:], 2)
        high = (words[..., None] >> (3 * torch.arange(4, device=blocks.device))) & 7
        units = self.points.to(blocks.device)[blocks[:, 2:34].long() | (high.reshape(-1, 32) << 8)]
        scale = read_half(blocks, 0) * self.scale_rule.multiplier(((words >> 12) & 7).float())
        return units.reshape(-1, 256), scale, -(scale * torch.where(words >> 15 > 0, -SHIFT, SHIFT))


CODEC = IQ1_S()
