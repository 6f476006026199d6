"""What every block codec shares: effective scales, fitting, refitting, packing to bytes.

A block codec stores each weight as `scale * (unit - zero) - offset`. Units are the codec's levels (integers, or
points of a lattice); scales and offsets belong to a *sub-block* of consecutive columns; a *span* of sub-blocks is
packed together and may hold the sub-block scales as small integers times one half-precision number. Solvers see
only this picture: they choose units through `nearest`, improve scales through `refit`, and hand both to `pack`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from compress.weights import Packed

TINY = 1e-30


@dataclass(frozen=True)
class IntegerScale:
    """Sub-block scales stored as `d * (factor * i + shift)`, i an integer in [low, high], d half precision."""

    low: int
    high: int
    factor: float = 1.0
    shift: float = 0.0

    def multiplier(self, integers: Tensor) -> Tensor:
        return integers * self.factor + self.shift

    def nearest(self, ratio: Tensor) -> Tensor:
        return ((ratio - self.shift) / self.factor).round().clamp(self.low, self.high)

    @property
    def largest(self) -> float:
        """Multiplier of the largest magnitude."""
        top, bottom = self.high * self.factor + self.shift, self.low * self.factor + self.shift
        return top if abs(top) >= abs(bottom) else bottom


@dataclass(frozen=True)
class Grid:
    """Scales of a whole matrix of R rows and J sub-blocks a row.

    `scale`, `offset`, `zero`: float32 [R, J], exactly the values the decoder will use (offset and zero None when the
    codec has none). `d`, `dmin`: float32 [R, S], half-precision super-scales of the S spans; `integers`,
    `min_integers`: float32 [R, J], the stored sub-block integers.
    """

    scale: Tensor
    offset: Tensor | None = None
    zero: Tensor | None = None
    d: Tensor | None = None
    dmin: Tensor | None = None
    integers: Tensor | None = None
    min_integers: Tensor | None = None


def half(values: Tensor) -> Tensor:
    """Round to half precision and back; overflow is clamped to the largest finite half."""
    return values.clamp(-65504.0, 65504.0).half().float()


class Codec(ABC):
    """One on-disk numeric format. Instances are immutable and hold no tensors of any model."""

    name: str
    kind: str

    @abstractmethod
    def bits_per_weight(self, in_features: int) -> float:
        """Everything stored, scales and padding included, over the number of weights in a row."""

    @abstractmethod
    def unpack(self, packed: Packed) -> Tensor:
        """Decode to float32 of the packed shape."""


class BlockCodec(Codec):
    """Base of all codecs with scales. Subclasses set the class attributes and implement `nearest`, `pack`,
    `unpack_grid`; the rest is shared.

    span: columns packed together; sub: columns that share a scale; step: columns coded together; rows: rows coded
    together, of which `nearest` then gets whole tiles: all rows of a step in order, a multiple of `rows`.
    """

    kind = "ggml"
    span: int
    sub: int
    step: int = 1
    rows: int = 1
    block_bytes: int
    scale_rule: IntegerScale | None = None
    min_rule: IntegerScale | None = None

    def bits_per_weight(self, in_features: int) -> float:
        return 8.0 * self.block_bytes / self.span

    # -- the solver's view -------------------------------------------------------------------------------------
    @abstractmethod
    def nearest(
        self, target: Tensor, weight: Tensor, metric: Tensor | None = None, zero: Tensor | None = None
    ) -> Tensor:
        """Closest representable units.

        target: [N, step] in unit space, `(x + offset) / scale`; weight: [step] or [N, step] non-negative importance of
        each coordinate in that space; metric: optional [step, step] positive definite form that overrides `weight`
        in the final choice; zero: [N] zero points where the codec has them. Returns float32 units minus zero, [N, step].
        """

    @abstractmethod
    def fit(self, weight: Tensor, importance: Tensor) -> Grid:
        """Scales that minimise the importance-weighted rounding error. weight: [R, n]; importance: [n], >= 0."""

    def rounding(self, weight: Tensor, importance: Tensor) -> tuple[Grid, Tensor]:
        """What plain rounding to nearest works with: the scales, and the weight in unit space, [R, n].

        Formats whose own tools fix how they round override it, so that `rtn` gives the bytes of those tools.
        """
        grid = self.fit(weight, importance)
        shifted = weight if grid.offset is None else weight + self.columns(grid.offset)
        divisor = torch.where(grid.scale.abs() < TINY, torch.ones_like(grid.scale), grid.scale)
        return grid, shifted / self.columns(divisor)

    def columns(self, values: Tensor, repeat: int | None = None) -> Tensor:
        """[R, J] per sub-block -> [R, n] per column."""
        return values.repeat_interleave(repeat or self.sub, dim=1)

    def decode(self, units: Tensor, grid: Grid) -> Tensor:
        """units [R, n] (zero already subtracted) -> float32 [R, n], as the decoder will compute it."""
        out = units * self.columns(grid.scale)
        return out if grid.offset is None else out - self.columns(grid.offset)

    # -- scales ------------------------------------------------------------------------------------------------
    def store(
        self, scale: Tensor, offset: Tensor | None, curvature: Tensor, offset_curvature: Tensor | None = None
    ) -> Grid:
        """Nearest storable grid to the wanted effective scales.

        scale, offset: [R, J]; curvature: [R, J], how much a squared deviation of each scale costs.
        """
        if self.scale_rule is None:
            return Grid(scale=half(scale))
        d, integers = self._project(scale, curvature, self.scale_rule)
        grid = Grid(scale=self._effective(d, integers, self.scale_rule), d=d, integers=integers)
        if offset is None or self.min_rule is None:
            return grid
        dmin, mins = self._project(offset, curvature if offset_curvature is None else offset_curvature, self.min_rule)
        return replace(grid, dmin=dmin, min_integers=mins, offset=self._effective(dmin, mins, self.min_rule))

    def rescaled(self, grid: Grid, factor: Tensor, offset_factor: Tensor | None = None) -> Grid:
        """The storable grid nearest to `grid` with its real numbers multiplied; integers and zero points stay.

        factor: float32 [R, S] for codecs with super-scales, which multiplies those, else [R, J]; offset_factor: [R, S],
        for `dmin`, or None to keep it.
        """
        if grid.d is None:
            return replace(grid, scale=self.store(grid.scale * factor, None, torch.ones_like(factor)).scale)
        d = half(grid.d * factor)
        grid = replace(grid, d=d, scale=self._effective(d, grid.integers, self.scale_rule))
        if grid.dmin is None or offset_factor is None:
            return grid
        dmin = half(grid.dmin * offset_factor)
        return replace(grid, dmin=dmin, offset=self._effective(dmin, grid.min_integers, self.min_rule))

    def _effective(self, d: Tensor, integers: Tensor, rule: IntegerScale) -> Tensor:
        return d.repeat_interleave(self.span // self.sub, dim=1) * rule.multiplier(integers)

    def _project(self, wanted: Tensor, curvature: Tensor, rule: IntegerScale) -> tuple[Tensor, Tensor]:
        """Search the super-scale d of each span whose integer multiples come closest to the wanted values."""
        rows, per_span = wanted.shape[0], self.span // self.sub
        want = wanted.reshape(rows, -1, per_span)
        cost = curvature.reshape(rows, -1, per_span)
        peak = want.gather(2, want.abs().argmax(2, keepdim=True))[..., 0]
        best_error = torch.full_like(peak, torch.inf)
        best_d, best_i = torch.zeros_like(peak), torch.zeros_like(want)
        signs = (1.0, -1.0) if rule.low < 0 else (1.0,)
        for sign in signs:
            for stretch in torch.linspace(0.85, 1.25, 17).tolist():
                d = half(peak * (sign * stretch / rule.largest))
                integers = rule.nearest(want / torch.where(d.abs() < TINY, torch.ones_like(d), d)[..., None])
                multiplier = rule.multiplier(integers)
                # the best d for these integers, then once more the best integers
                d = half((cost * want * multiplier).sum(2) / (cost * multiplier**2).sum(2).clamp_min(TINY))
                integers = rule.nearest(want / torch.where(d.abs() < TINY, torch.ones_like(d), d)[..., None])
                error = (cost * (want - d[..., None] * rule.multiplier(integers)) ** 2).sum(2)
                better = error < best_error
                best_error = torch.where(better, error, best_error)
                best_d = torch.where(better, d, best_d)
                best_i = torch.where(better[..., None], integers, best_i)
        return best_d, best_i.reshape(rows, -1)

    def refit(self, weight: Tensor, units: Tensor, grid: Grid, gram: Tensor) -> Grid:
        """Coordinate descent on the stored scales for fixed units; never increases tr((W-Q) gram (W-Q)^T).

        weight, units: [R, n]; gram: [n, n]. Every step moves one stored number of every row to the storable value
        nearest its optimum given all others.
        """
        error = weight - self.decode(units, grid)
        pull = error @ gram
        scale, offset = grid.scale.clone(), None if grid.offset is None else grid.offset.clone()
        integers = None if grid.integers is None else grid.integers.clone()
        mins = None if grid.min_integers is None else grid.min_integers.clone()
        d = None if grid.d is None else grid.d.clone()
        dmin = None if grid.dmin is None else grid.dmin.clone()
        per_span = self.span // self.sub

        # Within a span only its own columns are kept up to date; what it moved reaches later spans in one product.
        local = block = moved = torch.empty(0)

        def move(delta: Tensor, direction: Tensor, where: slice) -> None:
            """Q += delta * direction on the span's columns `where`."""
            change = direction * delta[:, None]
            moved[:, where] += change
            local.sub_(change @ block[where])

        def optimum(direction: Tensor, where: slice) -> tuple[Tensor, Tensor]:
            """Best step along `direction` and its curvature."""
            curve = ((direction @ block[where, where]) * direction).sum(1)
            return (direction * local[:, where]).sum(1) / curve.clamp_min(TINY), curve

        for span in range(weight.shape[1] // self.span):
            at = slice(span * self.span, (span + 1) * self.span)
            local, block, moved = pull[:, at].contiguous(), gram[at, at], torch.zeros_like(weight[:, at])
            codes = units[:, at]
            for sub in range(per_span):
                j = span * per_span + sub
                where = slice(sub * self.sub, (sub + 1) * self.sub)
                direction = codes[:, where]
                step, curve = optimum(direction, where)
                new = self._nearest_scale(scale[:, j] + step, None if d is None else d[:, span], self.scale_rule)
                new_scale = new if d is None else d[:, span] * self.scale_rule.multiplier(new)
                # a step along a coordinate is an improvement only if it lands nearer the optimum
                good = ((new_scale - scale[:, j] - step).abs() < step.abs()) & (curve > TINY)
                delta = torch.where(good, new_scale - scale[:, j], torch.zeros_like(step))
                move(delta, direction, where)
                scale[:, j] += delta
                if integers is not None:
                    integers[:, j] = torch.where(good, new, integers[:, j])
                    scale[:, j] = d[:, span] * self.scale_rule.multiplier(integers[:, j])
                if offset is not None:
                    ones = torch.full_like(direction, -1.0)
                    step, _ = optimum(ones, where)
                    new = self._nearest_scale(offset[:, j] + step, dmin[:, span], self.min_rule)
                    new_offset = dmin[:, span] * self.min_rule.multiplier(new)
                    good = (new_offset - offset[:, j] - step).abs() < step.abs()
                    delta = torch.where(good, new_offset - offset[:, j], torch.zeros_like(step))
                    move(delta, ones, where)
                    mins[:, j] = torch.where(good, new, mins[:, j])
                    offset[:, j] = dmin[:, span] * self.min_rule.multiplier(mins[:, j])
            where = slice(0, self.span)
            subs = slice(span * per_span, (span + 1) * per_span)
            if d is not None:
                direction = codes * self.columns(self.scale_rule.multiplier(integers[:, subs]))
                delta = self._move_super(d, span, *optimum(direction, where))
                move(delta, direction, where)
                scale[:, subs] = d[:, span, None] * self.scale_rule.multiplier(integers[:, subs])
            if dmin is not None:
                direction = -self.columns(self.min_rule.multiplier(mins[:, subs]))
                delta = self._move_super(dmin, span, *optimum(direction, where))
                move(delta, direction, where)
                offset[:, subs] = dmin[:, span, None] * self.min_rule.multiplier(mins[:, subs])
            if at.stop < weight.shape[1]:
                pull[:, at.stop :].addmm_(moved, gram[at, at.stop :], alpha=-1)
        return Grid(scale=scale, offset=offset, zero=grid.zero, d=d, dmin=dmin, integers=integers, min_integers=mins)

    @staticmethod
    def _nearest_scale(wanted: Tensor, d: Tensor | None, rule: IntegerScale | None) -> Tensor:
        if d is None or rule is None:
            return half(wanted)
        return rule.nearest(wanted / torch.where(d.abs() < TINY, torch.ones_like(d), d))

    @staticmethod
    def _move_super(d: Tensor, span: int, step: Tensor, curve: Tensor) -> Tensor:
        new = half(d[:, span] + step)
        good = ((new - d[:, span] - step).abs() < step.abs()) & (curve > TINY)
        delta = torch.where(good, new - d[:, span], torch.zeros_like(step))
        d[:, span] = torch.where(good, new, d[:, span])
        return delta

    # -- bytes -------------------------------------------------------------------------------------------------
    def pack(self, units: Tensor, grid: Grid) -> Packed:
        """units [R, n], grid -> the bytes that ship."""
        rows, n = units.shape
        blocks = self.pack_blocks(units.reshape(-1, self.span), self._per_block(grid))
        return Packed(self.name, (rows, n), {"blocks": blocks.reshape(rows, n // self.span * self.block_bytes)})

    def unpack(self, packed: Packed) -> Tensor:
        rows, n = packed.shape
        units, scale, offset = self.unpack_blocks(packed.parts["blocks"].reshape(-1, self.block_bytes))
        out = units * scale.repeat_interleave(self.sub, dim=1)
        if offset is not None:
            out = out - offset.repeat_interleave(self.sub, dim=1)
        return out.reshape(rows, n)

    def _per_block(self, grid: Grid) -> Grid:
        per = self.span // self.sub
        wide = {
            k: None if v is None else v.reshape(-1, 1 if k in ("d", "dmin") else per) for k, v in vars(grid).items()
        }
        return Grid(**wide)

    def pack_blocks(self, units: Tensor, grid: Grid) -> Tensor:
        """units [B, span], grid with one block a row -> uint8 [B, block_bytes]."""
        raise NotImplementedError

    def unpack_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """uint8 [B, block_bytes] -> float32 units [B, span], scale [B, span/sub], offset or None."""
        raise NotImplementedError


class ScalarCodec(BlockCodec):
    """Codecs that code one column at a time with levels `low..high` (or an explicit list)."""

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

    def fit(self, weight: Tensor, importance: Tensor) -> Grid:
        chunk = max(1, (1 << 19) // weight.shape[1])  # working set that stays in cache
        parts = [self._fit_rows(rows, importance) for rows in weight.split(chunk)]
        return Grid(
            *(None if v[0] is None else torch.cat(v) for v in zip(*(vars(p).values() for p in parts), strict=True))
        )

    def _fit_rows(self, weight: Tensor, importance: Tensor) -> Grid:
        rows = weight.shape[0]
        x = weight.reshape(rows, -1, self.sub)
        a = importance.reshape(1, -1, self.sub)
        a = a + a.mean(2, keepdim=True) * 1e-3 + TINY  # a column nobody uses still must not blow up the scale
        if self.asymmetric:
            scale, offset, curvature, offset_curvature = self._search_affine(x, a)
            return self.store(scale, offset, curvature, offset_curvature)
        scale, curvature = self._search_scale(x, a)
        return self.store(scale, None, curvature)

    def _search_scale(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Best symmetric scale of each sub-block: shrunk maxima, each followed by least squares."""
        peak = x.gather(2, x.abs().argmax(2, keepdim=True))
        best_gain = torch.full_like(peak[..., 0], -1.0)
        best = torch.zeros_like(best_gain)
        ends = (self.low, self.high) if self.signed_scale else (self._span_of_levels,)
        peak = peak if self.signed_scale else peak.abs()

        def consider(scale: Tensor) -> None:
            nonlocal best, best_gain
            u = self.round(x / torch.where(scale.abs() < TINY, torch.ones_like(scale), scale)[..., None])
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
        u = self.round(x / torch.where(best.abs() < TINY, torch.ones_like(best), best)[..., None])
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
