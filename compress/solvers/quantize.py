"""Codes and scales for a matrix or for what is kept of it: scales, error feedback, then descent.

Minimises tr((W-Q) H (W-Q)^T), H the damped gram of the layer's inputs. Without a mask this is GPTQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs import stack
from compress.codecs.base import BlockCodec
from compress.codecs.grid import Grid, rows_joined
from compress.solvers.base import Solution, check_prunable, damped_stack, relative_error
from compress.solvers.descent import NO_EXCHANGES, Exchanges, sweep_codes, sweep_kept
from compress.solvers.feedback import Columns, round_columns
from compress.solvers.options import GptqOptions
from compress.weights import Masked

SETTLING = 4  # sweeps in which the kept weights of a dense target take over from the pruned ones


def quantize(
    weight: Tensor,
    gram: Tensor,
    codec: BlockCodec,
    options: GptqOptions,
    mask: Tensor | None = None,
    sparse: Masked | None = None,
    exchanges: Exchanges = NO_EXCHANGES,
) -> Solution:
    """weight: float32 [R, n]; gram: [n, n] second moment of the inputs, any scale. n must be a multiple of the span.

    mask: bool [R, n], where it is False the result is zero, whatever the weight is there; sparse: instead, a mask and the
    floats that come nearest to the weight under it, where they are known. exchanges: as in `sweep_kept`, for the
    passes over the codes. Raises NumericalError when the gram cannot be factorised, ValueError for a mask with a codec
    that has no zero.
    """
    return quantize_alike(weight[None], gram[None], codec, options, mask, sparse, exchanges)[0]


def quantize_alike(
    weights: Tensor,
    grams: Tensor,
    codec: BlockCodec,
    options: GptqOptions,
    mask: Tensor | None = None,
    sparse: Masked | None = None,
    exchanges: Exchanges = NO_EXCHANGES,
) -> list[Solution]:
    """B matrices of one shape side by side, each as `quantize` alone would solve it.

    weights: float32 [B, R, n]; grams: [B, n, n]. One matrix for any codec, several for those that stack; mask, sparse, exchanges:
    as there, of one matrix.
    """
    if mask is not None or sparse is not None:
        check_prunable(codec)
    count, rows, n = weights.shape
    damped = damped_stack(grams, options.damping, codec.step if options.act_order else None)
    hessian = damped.hessian if count > 1 else damped.hessian[0]
    order, weight = damped.order, weights.reshape(-1, n).contiguous()
    if sparse is None and mask is not None:
        sparse = _settled(weight, mask, hessian)
    target, mask = (weight, None) if sparse is None else (sparse.values, sparse.mask)
    fitted = [codec.fit(own, h.diagonal()) for own, h in zip(target.split(rows), damped.hessian, strict=True)]
    grid = fitted[0] if count == 1 else rows_joined(fitted)
    columns = Columns(codec, grid, order, None if mask is None else stack.in_order(mask.T, order).contiguous())
    units = round_columns(stack.in_order(target.T, order).contiguous(), damped.upper, columns)
    units = stack.in_order(units, order.argsort(1)).T.contiguous()
    for _ in range(options.refits):
        grid = codec.refit(weight, units, grid, hessian)
    for _ in range(options.sweeps):
        if mask is None:
            units = sweep_codes(weight, units, grid, hessian, codec)
        else:
            units, mask = _sweep_kept_codes(weight, units, mask, grid, codec, hessian, exchanges)
        grid = codec.refit(weight, units, grid, hessian)
    dense, found = codec.decode(units, grid), []
    for b, gram in enumerate(grams):
        at = slice(b * rows, (b + 1) * rows)
        error = relative_error(weight[at], dense[at], gram.float())
        own = grid if count == 1 else grid.rows(at)
        found.append(Solution(units[at], own, codec, damped.damping[b], damped.retries[b], error, mask))
    return found


def _settled(weight: Tensor, mask: Tensor, hessian: Tensor) -> Masked:
    """The kept weights [R, n] near their least-squares optimum: what they are rounded from, and scales are fitted to."""
    kept = mask.T.contiguous()
    values = torch.where(kept, weight.T, 0.0)
    for _ in range(SETTLING):
        sweep_kept(weight.T, values, kept, hessian)
    return Masked(values.T.contiguous(), mask)


def _sweep_kept_codes(
    weight: Tensor,
    units: Tensor,
    mask: Tensor,
    grid: Grid,
    codec: BlockCodec,
    hessian: Tensor,
    exchanges: Exchanges,
) -> tuple[Tensor, Tensor]:
    """`sweep_kept` on a grid: units and mask [R, n] -> new ones."""
    columns = Columns(codec, grid, torch.arange(weight.shape[1], device=weight.device))
    values = (units.T * columns.scale).contiguous()
    kept = mask.T.clone(memory_format=torch.contiguous_format)

    def settle(wanted: Tensor, at: slice) -> Tensor:
        return columns.nearest(wanted, at)[1]

    sweep_kept(weight.T, values, kept, hessian, exchanges=exchanges, settle=settle)
    units = columns.nearest(values, slice(0, len(values)))[0]
    return units.T.contiguous(), kept.T.contiguous()
