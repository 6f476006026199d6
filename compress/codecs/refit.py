"""Coordinate descent on the stored numbers of a grid, the codes being fixed.

With Q the decoded weight, the objective is tr((W-Q) G (W-Q)^T). Every step moves one stored number of every row to the
storable value nearest its optimum given all others, so it never rises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from compress.codecs import stack
from compress.codecs.grid import G, Grid, Layout, SuperBlockGrid, SuperBlockMinGrid
from compress.codecs.scales import TINY, IntegerScale, half, safe_divisor

Storable = Callable[[Tensor], Tensor]
"""Wanted scales [R] -> the nearest that can be stored."""


class Span:
    """The columns of one span, kept up to date while its numbers move; later spans hear of it in one product.

    pull: float32 [R, n], minus half the gradient there; gram: [B, n, n], of its columns; like: [R, n], for the layout.
    """

    def __init__(self, pull: Tensor, gram: Tensor, like: Tensor):
        self.pull, self.gram, self.moved = pull.contiguous(), gram, torch.zeros_like(like)

    def optimum(self, direction: Tensor, where: slice) -> tuple[Tensor, Tensor]:
        """Best step along `direction` [R, k] on the columns `where`, and its curvature; both [R]."""
        curve = (stack.times(direction, self.gram[:, where, where]) * direction).sum(1)
        return (direction * self.pull[:, where]).sum(1) / curve.clamp_min(TINY), curve

    def move(self, delta: Tensor, direction: Tensor, where: slice) -> None:
        """Q += delta * direction on the columns `where`. delta: [R]."""
        change = direction * delta[:, None]
        self.moved[:, where] += change
        self.pull.sub_(stack.times(change, self.gram[:, where]))


class Numbers(Protocol):
    """Stored numbers of one kind, which move in place."""

    def step_sub_block(self, span: Span, codes: Tensor, j: int, where: slice) -> None:
        """Move what sub-block j has. codes: the span's units [R, n]; where: the sub-block's columns within it."""

    def step_span(self, span: Span, codes: Tensor, s: int, subs: slice) -> None:
        """Move what span s has one of. subs: its sub-blocks."""

    def fields(self) -> dict[str, Tensor]:
        """The grid's fields that moved."""


class Scales:
    """Scales that are stored one by one."""

    def __init__(self, scale: Tensor, storable: Storable):
        self.scale, self.storable = scale.clone(), storable

    def step_sub_block(self, span: Span, codes: Tensor, j: int, where: slice) -> None:
        direction = codes[:, where]
        step, curve = span.optimum(direction, where)
        old = self.scale[:, j]
        new = self.storable(old + step)
        delta = torch.where(_nearer(old, new, step) & (curve > TINY), new - old, torch.zeros_like(step))
        span.move(delta, direction, where)
        self.scale[:, j] += delta

    def step_span(self, span: Span, codes: Tensor, s: int, subs: slice) -> None:
        pass

    def fields(self) -> dict[str, Tensor]:
        return {"scale": self.scale}


class Products:
    """Products of a super-scale and sub-block integers, which multiply the codes."""

    names = ("scale", "d", "integers")

    def __init__(self, grid: Grid, rule: IntegerScale, columns: Layout):
        self.product, self.d, self.integers = (getattr(grid, name).clone() for name in self.names)
        self.per_span = self.product.shape[1] // self.d.shape[1]
        self.rule, self.columns = rule, columns

    def direction(self, codes: Tensor) -> Tensor:
        """What the products multiply, [R, k]."""
        return codes

    def able(self, curve: Tensor) -> Tensor:
        """Whether a step along a direction of this curvature [R] can be trusted."""
        return curve > TINY

    def step_sub_block(self, span: Span, codes: Tensor, j: int, where: slice) -> None:
        d, direction = self.d[:, j // self.per_span], self.direction(codes[:, where])
        step, curve = span.optimum(direction, where)
        old = self.product[:, j]
        integers = self.rule.nearest((old + step) / safe_divisor(d))
        new = d * self.rule.multiplier(integers)
        good = _nearer(old, new, step) & self.able(curve)
        span.move(torch.where(good, new - old, torch.zeros_like(step)), direction, where)
        self.integers[:, j] = torch.where(good, integers, self.integers[:, j])
        self.product[:, j] = d * self.rule.multiplier(self.integers[:, j])

    def step_span(self, span: Span, codes: Tensor, s: int, subs: slice) -> None:
        where = slice(0, codes.shape[1])
        direction = self.direction(codes) * self.columns(self.rule.multiplier(self.integers[:, subs]))
        step, curve = span.optimum(direction, where)
        old = self.d[:, s]
        new = half(old + step)
        good = _nearer(old, new, step) & (curve > TINY)
        span.move(torch.where(good, new - old, torch.zeros_like(step)), direction, where)
        self.d[:, s] = torch.where(good, new, old)
        self.product[:, subs] = self.d[:, s, None] * self.rule.multiplier(self.integers[:, subs])

    def fields(self) -> dict[str, Tensor]:
        return dict(zip(self.names, (self.product, self.d, self.integers), strict=True))


class Minimums(Products):
    """The same for offsets, which are subtracted whatever the codes are."""

    names = ("offset", "dmin", "min_integers")

    def direction(self, codes: Tensor) -> Tensor:
        return torch.full_like(codes, -1.0)

    def able(self, curve: Tensor) -> Tensor:
        return torch.ones_like(curve, dtype=torch.bool)


def _nearer(old: Tensor, new: Tensor, step: Tensor) -> Tensor:
    """Whether a storable value lies nearer the optimum `old + step` than `old`: only then is it an improvement."""
    return (new - old - step).abs() < step.abs()


def numbers(
    grid: Grid, storable: Storable, rule: IntegerScale | None, min_rule: IntegerScale | None, columns: Layout
) -> list[Numbers]:
    """What can move in a grid, in the order in which it does."""
    if not isinstance(grid, SuperBlockGrid):
        return [Scales(grid.scale, storable)]
    assert rule is not None
    found: list[Numbers] = [Products(grid, rule, columns)]
    if isinstance(grid, SuperBlockMinGrid):
        assert min_rule is not None
        found.append(Minimums(grid, min_rule, columns))
    return found


def descend(units: Tensor, pull: Tensor, gram: Tensor, moving: list[Numbers], span_columns: int, sub: int) -> None:
    """One pass over all spans; `pull` [R, n], minus half the gradient, is used up.

    units: [R, n]; gram: [B, n, n]; span_columns, sub: columns of a span and of a sub-block.
    """
    per_span = span_columns // sub
    for s in range(units.shape[1] // span_columns):
        at = slice(s * span_columns, (s + 1) * span_columns)
        codes = units[:, at]
        span = Span(pull[:, at], gram[:, at, at], codes)
        for i in range(per_span):
            for kind in moving:
                kind.step_sub_block(span, codes, s * per_span + i, slice(i * sub, (i + 1) * sub))
        for kind in moving:
            kind.step_span(span, codes, s, slice(s * per_span, (s + 1) * per_span))
        if at.stop < units.shape[1]:
            stack.take_off(pull[:, at.stop :].T, gram[:, at, at.stop :], span.moved.T)


def refitted(grid: G, moving: list[Numbers]) -> G:
    """The grid with what has moved."""
    return replace(grid, **{name: value for kind in moving for name, value in kind.fields().items()})
