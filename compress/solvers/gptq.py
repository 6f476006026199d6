"""Error feedback (GPTQ) for scalar, lattice and trellis codecs, then coordinate descent on codes and scales.

Minimises tr((W-Q) H (W-Q)^T), H the damped gram of the layer's inputs.

1. Scales from the codec's own importance-weighted search.
2. Feedback (GPTQ, arXiv 2210.17323, algorithm 1; eight columns at a time it is LDLQ, arXiv 2307.13304): with
   U^T U = H^-1, round a step b of columns to the point nearest under (U_bb^T U_bb)^-1 and move the rounding error
   (x - q) U_bb^-1 U_b,rest to the columns not yet rounded.
3. Sweeps: every step of columns moves to the code nearest its optimum given all others, then every stored scale
   does. Each move lowers the objective; feedback alone never looks back.
"""

from __future__ import annotations

from math import frexp

import torch
from torch import Tensor

from compress.codecs.base import BlockCodec, Grid
from compress.solvers.base import Solution, damped_gram, inverse_factor, relative_error, safe_divisor
from compress.solvers.options import GptqOptions

NEEDS_GRAM = True
BLOCK = 128  # columns whose updates to the rest are batched into one product
MICRO = 16  # columns whose updates to the rest of the block are batched


class _Columns:
    """A grid laid out column by column, rows of this transposed layout being contiguous: [n, R]."""

    def __init__(self, codec: BlockCodec, grid: Grid, order: Tensor):
        def expand(values: Tensor | None) -> Tensor | None:
            return None if values is None else codec.columns(values).T[order].contiguous()

        self.codec = codec
        self.scale = expand(grid.scale)
        self.inverse = expand(1.0 / safe_divisor(grid.scale))
        self.offset = expand(grid.offset)
        self.zero = expand(grid.zero)

    def quantize(self, x: Tensor, at: slice, weight: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
        """x: [step, R] wanted values -> units and the values they decode to, both [step, R]."""
        target = x if self.offset is None else x + self.offset[at]
        target = target * self.inverse[at]
        zero = None if self.zero is None else self.zero[at].T.reshape(-1)
        if self.codec.step == 1:
            units = self.codec.nearest(target.T, weight, None, zero).T
        else:
            if self.codec.rows > 1:
                weight = weight * self.scale[at].T.square()  # rows of one tile may differ in scale
            units = self.codec.nearest(target.T.contiguous(), weight, metric).T
        value = units * self.scale[at]
        return units, value if self.offset is None else value - self.offset[at]


def solve(weight: Tensor, gram: Tensor, codec: BlockCodec, options: GptqOptions) -> Solution:
    """weight: float32 [R, n]; gram: [n, n] second moment of the inputs, any scale. n must be a multiple of the span.

    Raises NumericalError when the gram cannot be factorised.
    """
    weight = weight.contiguous()
    damped, damping, retries = damped_gram(gram, options.damping)
    # the gram's unit is arbitrary; a power of four, whose root is exact, brings it near one and changes no digit
    damped *= 4.0 ** -(frexp(float(damped.diagonal().mean()))[1] // 2)
    order = _order(damped, codec.step, options.act_order)
    hessian = damped.float()
    damped = damped[order][:, order]  # in place of the other: wide layers have gigabytes of it
    upper = inverse_factor(damped).float()
    del damped
    grid = codec.fit(weight, hessian.diagonal())
    units = _feedback(weight.T[order].contiguous(), upper, _Columns(codec, grid, order))
    inverse_order = order.argsort()
    units = units[inverse_order].T.contiguous()
    for _ in range(options.refits):
        grid = codec.refit(weight, units, grid, hessian)
    for _ in range(options.sweeps):
        units = _sweep(weight, units, grid, hessian, codec)
        grid = codec.refit(weight, units, grid, hessian)
    return Solution(
        units, grid, codec, damping, retries, relative_error(weight, codec.decode(units, grid), gram.float())
    )


def _order(hessian: Tensor, step: int, act_order: bool) -> Tensor:
    """Columns in the order they are rounded: steps by falling mean diagonal, or as they stand."""
    n = hessian.shape[0]
    natural = torch.arange(n, device=hessian.device)
    if not act_order:
        return natural
    steps = hessian.diagonal().reshape(-1, step).mean(1).argsort(descending=True, stable=True)
    return natural.reshape(-1, step)[steps].reshape(-1)


def _feedback(x: Tensor, upper: Tensor, columns: _Columns) -> Tensor:
    """x: [n, R], overwritten with what is left to compensate; returns units [n, R] in the same order."""
    n, step = x.shape[0], columns.codec.step
    units = torch.empty_like(x)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        errors = torch.empty_like(x[start:stop])
        for low in range(start, stop, MICRO):
            high = min(low + MICRO, stop)
            for i in range(low, high, step):
                at = slice(i, i + step)
                pivot = upper[at, at]
                if step == 1:
                    units[at], value = columns.quantize(x[at], at, pivot[0], None)
                    error = (x[at] - value) / pivot
                else:
                    inverse = torch.linalg.inv_ex(pivot)[0]
                    metric = inverse @ inverse.T  # (U_bb^T U_bb)^-1
                    units[at], value = columns.quantize(x[at], at, metric.diagonal(), metric)
                    error = inverse.T @ (x[at] - value)
                errors[i - start : i - start + step] = error
                if i + step < high:
                    x[i + step : high].addmm_(upper[at, i + step : high].T, error, alpha=-1)
            if high < stop:
                x[high:stop].addmm_(upper[low:high, high:stop].T, errors[low - start : high - start], alpha=-1)
        if stop < n:
            x[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return units


def _sweep(weight: Tensor, units: Tensor, grid: Grid, hessian: Tensor, codec: BlockCodec) -> Tensor:
    """One pass of block coordinate descent over the codes; the objective never rises."""
    n, step = weight.shape[1], codec.step
    columns = _Columns(codec, grid, torch.arange(n, device=weight.device))
    quantized = codec.decode(units, grid).T.contiguous()
    pull = hessian @ (weight.T - quantized)  # minus half the gradient, [n, R]
    units = units.T.contiguous()
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        moved = torch.zeros_like(quantized[start:stop])
        for i in range(start, stop, step):
            at = slice(i, i + step)
            curve = hessian[at, at]
            if step == 1:
                wanted = quantized[at] + pull[at] / curve
                new_units, value = columns.quantize(wanted, at, curve[0], None)
            else:
                wanted = quantized[at] + torch.linalg.solve(curve, pull[at])
                new_units, value = columns.quantize(wanted, at, curve.diagonal(), curve)
                # the codec's search may miss the present point: keep it where it is better
                new, old = value - wanted, quantized[at] - wanted
                worse = _per_tile((new * (curve @ new)).sum(0), codec) > _per_tile((old * (curve @ old)).sum(0), codec)
                new_units, value = torch.where(worse, units[at], new_units), torch.where(worse, quantized[at], value)
            delta = value - quantized[at]
            units[at], quantized[at] = new_units, value
            moved[i - start : i - start + step] = delta
            pull[i:stop].addmm_(hessian[i:stop, at], delta, alpha=-1)
        pull[:start].addmm_(hessian[:start, start:stop], moved, alpha=-1)
        pull[stop:].addmm_(hessian[stop:, start:stop], moved, alpha=-1)
    return units.T.contiguous()


def _per_tile(cost: Tensor, codec: BlockCodec) -> Tensor:
    """Cost of every row [R] -> of all rows that are coded together with it, [R]."""
    if codec.rows == 1:
        return cost
    return cost.reshape(-1, codec.rows).sum(1).repeat_interleave(codec.rows)
