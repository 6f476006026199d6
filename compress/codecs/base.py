"""What every block codec shares: effective scales, fitting, refitting, packing to bytes.

A block codec stores each weight as `scale * (unit - zero) - offset`. Units are the codec's levels (integers, or
points of a lattice); scales and offsets belong to a *sub-block* of consecutive columns; a *span* of sub-blocks is
packed together and may hold the sub-block scales as small integers times one half-precision number. Solvers see
only this picture: they choose units through `nearest`, improve scales through `refit`, and hand both to `pack`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Generic, cast

import torch
from torch import Tensor

from compress.codecs import stack
from compress.codecs.grid import G, ScaleGrid, SuperBlockGrid, SuperBlockMinGrid, rows_joined
from compress.codecs.names import CodecInfo, codec_info
from compress.codecs.refit import descend, numbers, refitted
from compress.codecs.scales import TINY, IntegerScale, half, safe_divisor
from compress.weights import Packed

Rows = slice | Tensor
"""Rows a to b (multiples of what the codec codes together), or int64 [k] of any rows."""


class Codec(ABC):
    """One on-disk numeric format. Instances are immutable and hold no tensors of any model."""

    name: str
    kind: str

    @property
    def info(self) -> CodecInfo:
        """What is declared of the codec without torch."""
        return codec_info(self.name)

    @abstractmethod
    def bits_per_weight(self, in_features: int) -> float:
        """Everything stored, scales and padding included, over the number of weights in a row."""

    @abstractmethod
    def unpack(self, packed: Packed) -> Tensor:
        """Decode to float32 of the packed shape."""

    def decode_rows(
        self, shape: tuple[int, int], parts: Mapping[str, Tensor], rows: Rows, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Some rows of a stored matrix: values [k, n] of `dtype` and, for codecs with one scale a row, those scales
        float32 [k, 1], still to be multiplied.

        shape: of the whole matrix; parts: as our own container stores them, without the signs of incoherence. This one
        goes by `unpack`: of the rows alone where each has its own entry in every part. Formats with faster look-ups
        override it.
        """
        if all(part.dim() and part.shape[0] == shape[0] for part in parts.values()):
            chosen = {name: part[rows] for name, part in parts.items()}
            count = len(next(iter(chosen.values())))
            return self.unpack(Packed(self.name, (count, shape[1]), chosen)).to(dtype), None
        return self.unpack(Packed(self.name, shape, dict(parts)))[rows].to(dtype), None


class BlockCodec(Codec, Generic[G]):
    """Base of all codecs with scales, of the grid type G. Subclasses set the class attributes and implement `nearest`,
    `fit`, `pack_blocks` and `unpack_blocks`; the rest is shared.

    span: columns packed together; sub: columns that share a scale; step: columns coded together; rows: rows coded
    together, of which `nearest` then gets whole tiles: all rows of a step in order, a multiple of `rows`. stacks: matrices can be
    solved side by side (`codecs.stack`), since grids have numbers for every row and `nearest` and `refit` take several metrics.
    """

    kind = "ggml"
    span: int
    sub: int
    step: int = 1
    rows: int = 1
    stacks = False
    block_bytes: int
    scale_rule: IntegerScale | None = None
    min_rule: IntegerScale | None = None

    def bits_per_weight(self, in_features: int) -> float:
        return 8.0 * self.block_bytes / self.span

    def for_row(self, in_features: int) -> BlockCodec[G]:
        """The codec for rows of `in_features` columns, where its spans depend on them; else itself."""
        return self

    # -- the solver's view -------------------------------------------------------------------------------------
    @abstractmethod
    def nearest(
        self, target: Tensor, weight: Tensor, metric: Tensor | None = None, zero: Tensor | None = None
    ) -> Tensor:
        """Closest representable units.

        target: [N, step] in unit space, `(x + offset) / scale`; weight: [step] or [N, step] non-negative importance of
        each coordinate in that space; metric: optional [step, step] positive definite form that overrides `weight`
        in the final choice, or [B, step, step], one for every N / B targets; zero: [N] zero points where the codec has
        them. Returns float32 units minus zero, [N, step].
        """

    @abstractmethod
    def fit(self, weight: Tensor, importance: Tensor) -> G:
        """Scales that minimise the importance-weighted rounding error. weight: [R, n]; importance: [n], >= 0."""

    def rounding(self, weight: Tensor, importance: Tensor) -> tuple[G, Tensor]:
        """What plain rounding to nearest works with: the scales, and the weight in unit space, [R, n].

        Formats whose own tools fix how they round override it, so that `rtn` gives the bytes of those tools.
        """
        grid = self.fit(weight, importance)
        return grid, grid.raised(weight, self.columns) / self.columns(safe_divisor(grid.scale))

    def columns(self, values: Tensor, repeat: int | None = None) -> Tensor:
        """[R, J] per sub-block -> [R, n] per column."""
        return values.repeat_interleave(repeat or self.sub, dim=1)

    def decode(self, units: Tensor, grid: G) -> Tensor:
        """units [R, n] (zero already subtracted) -> float32 [R, n], as the decoder will compute it."""
        return grid.lowered(units * self.columns(grid.scale), self.columns)

    # -- scales ------------------------------------------------------------------------------------------------
    def storable(self, scale: Tensor) -> Tensor:
        """The nearest scales that can be stored, of the same shape; for codecs without super-scales."""
        return half(scale)

    def store(self, scale: Tensor, curvature: Tensor) -> G:
        """Nearest storable grid to the wanted effective scales, without offsets.

        scale: [R, J]; curvature: [R, J], how much a squared deviation of each scale costs.
        """
        if self.scale_rule is None:
            return cast(G, ScaleGrid(self.storable(scale)))
        d, integers = self.scale_rule.project(scale, curvature, self.span // self.sub)
        return cast(G, SuperBlockGrid(self._effective(d, integers, self.scale_rule), d, integers))

    def store_affine(self, scale: Tensor, offset: Tensor, curvature: Tensor, offset_curvature: Tensor) -> G:
        """Nearest storable grid to the wanted effective scales and offsets; all [R, J], see `store`."""
        assert self.scale_rule is not None and self.min_rule is not None
        d, integers = self.scale_rule.project(scale, curvature, self.span // self.sub)
        dmin, mins = self.min_rule.project(offset, offset_curvature, self.span // self.sub)
        scale, offset = self._effective(d, integers, self.scale_rule), self._effective(dmin, mins, self.min_rule)
        return cast(G, SuperBlockMinGrid(scale, d, integers, offset, dmin, mins))

    def rescaled(self, grid: G, factor: Tensor, offset_factor: Tensor | None = None) -> G:
        """The storable grid nearest to `grid` with its stored real numbers multiplied; integers and zero points stay.

        factor: float32, of the shape of `grid.reals[0]`; offset_factor: of that of `grid.reals[1]` where there are two,
        or None to keep those.
        """
        if not isinstance(grid, SuperBlockGrid):
            return replace(grid, scale=self.store(grid.scale * factor, torch.ones_like(factor)).scale)
        assert self.scale_rule is not None
        d = half(grid.d * factor)
        grid = replace(grid, d=d, scale=self._effective(d, grid.integers, self.scale_rule))
        if offset_factor is None or not isinstance(grid, SuperBlockMinGrid):
            return grid
        assert self.min_rule is not None
        dmin = half(grid.dmin * offset_factor)
        return replace(grid, dmin=dmin, offset=self._effective(dmin, grid.min_integers, self.min_rule))

    def _effective(self, d: Tensor, integers: Tensor, rule: IntegerScale) -> Tensor:
        return d.repeat_interleave(self.span // self.sub, dim=1) * rule.multiplier(integers)

    def refit(self, weight: Tensor, units: Tensor, grid: G, gram: Tensor) -> G:
        """Coordinate descent on the stored scales for fixed units; never increases tr((W-Q) gram (W-Q)^T).

        weight, units: [R, n]; gram: [n, n], or [B, n, n] of B matrices whose rows are stacked. Every step moves one stored number
        of every row to the storable value nearest its optimum given all others.
        """
        gram = stack.stacked(gram)
        pull = stack.times(weight - self.decode(units, grid), gram)
        moving = numbers(grid, self.storable, self.scale_rule, self.min_rule, self.columns)
        descend(units, pull, gram, moving, self.span, self.sub)
        return refitted(grid, moving)

    # -- bytes -------------------------------------------------------------------------------------------------
    def pack(self, units: Tensor, grid: G) -> Packed:
        """units [R, n], grid -> the bytes that ship."""
        rows, n = units.shape
        blocks = self.pack_blocks(units.reshape(-1, self.span), grid.by_span(self.span // self.sub))
        return Packed(self.name, (rows, n), {"blocks": blocks.reshape(rows, n // self.span * self.block_bytes)})

    def unpack(self, packed: Packed) -> Tensor:
        rows, n = packed.shape
        units, scale, offset = self.unpack_blocks(packed.parts["blocks"].reshape(-1, self.block_bytes))
        out = units * scale.repeat_interleave(self.sub, dim=1)
        if offset is not None:
            out = out - offset.repeat_interleave(self.sub, dim=1)
        return out.reshape(rows, n)

    def decode_rows(
        self, shape: tuple[int, int], parts: Mapping[str, Tensor], rows: Rows, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See Codec; `BlockCodec.unpack` without columns of repeated scales."""
        if type(self).unpack is not BlockCodec.unpack:
            return super().decode_rows(shape, parts, rows, dtype)
        blocks = parts["blocks"][rows]
        units, scale, offset = self.unpack_blocks(blocks.reshape(-1, self.block_bytes))
        values = units.reshape(*scale.shape, self.sub) * scale[..., None]
        if offset is not None:
            values -= offset[..., None]
        return values.reshape(len(blocks), shape[1]).to(dtype), None

    def pack_blocks(self, units: Tensor, grid: G) -> Tensor:
        """units [B, span], grid with one block a row -> uint8 [B, block_bytes]."""
        raise NotImplementedError

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """uint8 [B, block_bytes] -> float32 units [B, span], scale [B, span/sub], offset or None."""
        raise NotImplementedError


class ScalarCodec(BlockCodec[G]):
    """Codecs that code one column at a time with levels `low..high` (or an explicit list)."""

    stacks = True
    low: int = 0
    high: int = 0
    signed_scale = False
    """Whether the stored scale may be negative, so that either end of the level range can face the larger tail."""
    shrinks: tuple[float, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.74, 0.68, 0.62)

    @property
    def asymmetric(self) -> bool:
        return self.min_rule is not None

    def round(self, target: Tensor) -> Tensor:
        """Nearest level of each element."""
        return target.round().clamp_(self.low, self.high)

    def nearest(
        self, target: Tensor, weight: Tensor, metric: Tensor | None = None, zero: Tensor | None = None
    ) -> Tensor:
        return self.round(target)

    @cached_property
    def _span_of_levels(self) -> float:
        return float(max(abs(self.low), abs(self.high)))

    def fit(self, weight: Tensor, importance: Tensor) -> G:
        chunk = max(1, (1 << 19) // weight.shape[1])  # working set that stays in cache
        return rows_joined([self._fit_rows(rows, importance) for rows in weight.split(chunk)])

    def _fit_rows(self, weight: Tensor, importance: Tensor) -> G:
        rows = weight.shape[0]
        x = weight.reshape(rows, -1, self.sub)
        a = importance.reshape(1, -1, self.sub)
        a = a + a.mean(2, keepdim=True) * 1e-3 + TINY  # a column nobody uses still must not blow up the scale
        return (
            self.store_affine(*self._search_affine(x, a)) if self.asymmetric else self.store(*self._search_scale(x, a))
        )

    def _search_scale(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Best symmetric scale of each sub-block: shrunk maxima, each followed by least squares."""
        peak = x.gather(2, x.abs().argmax(2, keepdim=True))
        best_gain = torch.full_like(peak[..., 0], -1.0)
        best = torch.zeros_like(best_gain)
        ends = (self.low, self.high) if self.signed_scale else (self._span_of_levels,)
        peak = peak if self.signed_scale else peak.abs()

        def consider(scale: Tensor) -> None:
            nonlocal best, best_gain
            u = self.round(x / safe_divisor(scale)[..., None])
            xu, uu = (a * x * u).sum(2), (a * u * u).sum(2).clamp_min(TINY)
            gain = xu * xu / uu  # how much of sum a x^2 this rounding explains
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best = torch.where(better, xu / uu, best)

        for end in ends:
            for shrink in self.shrinks:
                consider(peak[..., 0] * (shrink / end))
        for _ in range(2):
            consider(best)
        u = self.round(x / safe_divisor(best)[..., None])
        return best, (a * u * u).sum(2)

    def _search_affine(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Best `scale * u - offset` with offset >= 0: shrunk ranges, each followed by least squares."""
        lowest, highest = x.amin(2).clamp_max(0.0), x.amax(2).clamp_min(0.0)
        aw, ax, axx = a.sum(2).expand(x.shape[:2]), (a * x).sum(2), (a * x * x).sum(2)
        best_error = torch.full_like(lowest, torch.inf)
        best_scale, best_offset = torch.zeros_like(lowest), torch.zeros_like(lowest)

        def consider(scale: Tensor, offset: Tensor) -> None:
            nonlocal best_error, best_scale, best_offset
            u = self.round((x + offset[..., None]) / scale.clamp_min(TINY)[..., None])
            au = a * u
            su, suu, sxu = au.sum(2), (au * u).sum(2), (au * x).sum(2)
            det = (aw * suu - su * su).clamp_min(TINY)
            s = (aw * sxu - ax * su) / det
            m = (s * su - ax) / aw
            negative = m < 0
            s = torch.where(negative, sxu / suu.clamp_min(TINY), s).clamp_min(0.0)
            m = m.clamp_min(0.0)
            error = axx - 2 * s * sxu + 2 * m * ax + s * s * suu - 2 * s * m * su + m * m * aw
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale, best_offset = torch.where(better, s, best_scale), torch.where(better, m, best_offset)

        for bottom in self.shrinks:
            for top in self.shrinks:
                consider((highest * top - lowest * bottom) / self.high, -lowest * bottom)
        for _ in range(2):
            consider(best_scale, best_offset)
        u = self.round((x + best_offset[..., None]) / best_scale.clamp_min(TINY)[..., None])
        return best_scale, best_offset, (a * u * u).sum(2), aw.contiguous()
