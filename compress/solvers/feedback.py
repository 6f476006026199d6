"""Error feedback: columns are fixed one after the other, and those still free make up for what each has lost.

GPTQ (arXiv 2210.17323, algorithm 1) and SparseGPT (arXiv 2301.00774, algorithm 1) are the same recursion, which with
several columns at a time is LDLQ (arXiv 2307.13304). They differ in the values that a column may take.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compress.codecs import stack
from compress.codecs.base import BlockCodec
from compress.codecs.grid import Grid
from compress.codecs.scales import safe_divisor

BLOCK = 128  # columns whose updates to the rest are batched into one product
MICRO = 16  # columns whose updates to the rest of the block are batched

Fix = Callable[[Tensor, slice, Tensor, Tensor | None], Tensor]
"""(wanted values [step, R], columns, importance [step] or [R, step], metric [step, step] or one a matrix, or None) -> the values
they get."""


class Columns:
    """A grid laid out column by column, rows of this transposed layout being contiguous: [n, R].

    order: [n], the column that comes first, second, ..., or [B, n] of B stacked matrices; mask: bool [n, R] in that order, or
    None: where it is False, unit and value are zero.
    """

    def __init__(self, codec: BlockCodec, grid: Grid, order: Tensor, mask: Tensor | None = None):
        order = order.reshape(-1, order.shape[-1])

        def expand(values: Tensor) -> Tensor:
            return stack.in_order(codec.columns(values).T, order).contiguous()

        self.codec, self.mask = codec, mask
        self.grid = grid.laid_out(expand)
        self.scale, self.inverse = self.grid.scale, expand(1.0 / safe_divisor(grid.scale))

    def quantize(self, x: Tensor, at: slice, weight: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
        """x: [step, R] wanted values -> units and the values they decode to, both [step, R]."""
        target = self.grid.raised(x, lambda values: values[at]) * self.inverse[at]
        if self.codec.step == 1:
            zero = self.grid.zero_points(lambda values: values[at].T.reshape(-1))
            units = self.codec.nearest(target.T, weight, None, zero).T
        else:
            if self.codec.rows > 1:
                weight = weight * self.scale[at].T.square()  # rows of one tile may differ in scale
            units = self.codec.nearest(target.T.contiguous(), weight, metric).T
        if self.mask is not None:
            units = torch.where(self.mask[at], units, 0.0)
        return units, self.grid.lowered(units * self.scale[at], lambda values: values[at])

    def nearest(self, x: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        """The same for scalar codecs without offsets, any number of columns at once, each by itself, and no mask."""
        target = (x * self.inverse[at]).T.reshape(-1, 1)
        zero = self.grid.zero_points(lambda values: values[at].T.reshape(-1))
        units = self.codec.nearest(target, torch.ones_like(target[0]), None, zero).reshape(x.T.shape).T
        return units, units * self.scale[at]


def feedback(
    x: Tensor,
    upper: Tensor,
    fix: Fix,
    *,
    step: int = 1,
    reach: Callable[[slice], None] | None = None,
    every: int = 1,
    batches: tuple[int, int] = (BLOCK, MICRO),
) -> None:
    """Fix `step` columns at a time, from the first to the last; U_bb^-T (x - q) U_b,rest is taken off the rest.

    x: float32 [n, R], overwritten with what is left to make up for; upper: U with U^T U = H^-1, [n, n], in the same
    order, or [B, n, n] of B matrices whose rows are stacked (`codecs.stack`). `reach(columns)` is called before the first of every `every` columns is fixed, when x has those columns as
    all earlier ones left them: `every` is the block, or divides the micro-block. batches: columns whose updates to the
    rest are one product (a block), and within it those whose updates to the rest of the block are (a micro-block).
    """
    block, micro = batches
    n, rows = x.shape
    upper = stack.stacked(upper)
    single = stack.spread(upper.diagonal(dim1=1, dim2=2), rows)
    for start in range(0, n, block):
        stop = min(start + block, n)
        errors = torch.empty_like(x[start:stop])
        for low in range(start, stop, micro):
            high = min(low + micro, stop)
            for i in range(low, high, step):
                if reach is not None and i % every == 0:
                    reach(slice(i, min(i + every, n)))
                at = slice(i, i + step)
                if step == 1:
                    error = (x[at] - fix(x[at], at, single[at].T, None)) / single[at]
                else:
                    inverse = torch.linalg.inv_ex(upper[:, at, at])[0]
                    metric = inverse @ inverse.mT  # (U_bb^T U_bb)^-1
                    error = stack.before(inverse.mT, x[at] - fix(x[at], at, *importance(metric, rows)))
                errors[i - start : i - start + step] = error
                if i + step < high:
                    stack.take_off(x[i + step : high], upper[:, at, i + step : high], error)
            if high < stop:
                stack.take_off(x[high:stop], upper[:, low:high, high:stop], errors[low - start : high - start])
        if stop < n:
            stack.take_off(x[stop:], upper[:, start:stop, stop:], errors)


def importance(metric: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """A step's metrics [B, step, step] as codecs want them: the importance of its columns, [step] or [rows, step], and the metric
    [step, step] or [B, step, step]."""
    diagonal = metric.diagonal(dim1=1, dim2=2)
    if len(metric) == 1:
        return diagonal[0], metric[0]
    return diagonal.repeat_interleave(rows // len(metric), 0), metric


def round_columns(x: Tensor, upper: Tensor, columns: Columns) -> Tensor:
    """Feedback that rounds to a grid. x: [n, R], overwritten; returns units [n, R] in the same order."""
    units = torch.empty_like(x)

    def fix(wanted: Tensor, at: slice, importance: Tensor, metric: Tensor | None) -> Tensor:
        units[at], value = columns.quantize(wanted, at, importance, metric)
        return value

    feedback(x, upper, fix, step=columns.codec.step)
    return units
