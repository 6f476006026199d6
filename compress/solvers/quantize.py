"""Codes and scales for a matrix or for what is kept of it: scales, error feedback, then descent.

Minimises tr((W-Q) H (W-Q)^T), H the damped gram of the layer's inputs. Without a mask this is GPTQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.base import BlockCodec
from compress.solvers.base import Solution, check_prunable, damped_gram, inverse_factor, of_size_one, relative_error
from compress.solvers.descent import NO_EXCHANGES, Exchanges, sweep_codes, sweep_kept
from compress.solvers.feedback import Columns, energy_order, round_columns
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
    weight = weight.contiguous()
    if mask is not None or sparse is not None:
        check_prunable(codec)
    damped, damping, retries = damped_gram(gram, options.damping)
    damped = of_size_one(damped)
    hessian = damped.float()
    natural = torch.arange(weight.shape[1], device=weight.device)
    order = energy_order(hessian, codec.step) if options.act_order else natural
    damped = damped[order][:, order]  # in place of the other: wide layers have gigabytes of it
    upper = inverse_factor(damped).float()
    del damped
    if sparse is None and mask is not None:
        sparse = _settled(weight, mask, hessian)
    target, mask = (weight, None) if sparse is None else (sparse.values, sparse.mask)
    grid = codec.fit(target, hessian.diagonal())
    columns = Columns(codec, grid, order, None if mask is None else mask.T[order].contiguous())
    units = round_columns(target.T[order].contiguous(), upper, columns)
    units = units[order.argsort()].T.contiguous()
    for _ in range(options.refits):
        grid = codec.refit(weight, units, grid, hessian)
    for _ in range(options.sweeps):
        if mask is None:
            units = sweep_codes(weight, units, grid, hessian, codec)
        else:
            units, mask = _sweep_kept_codes(weight, units, mask, Columns(codec, grid, natural), hessian, exchanges)
        grid = codec.refit(weight, units, grid, hessian)
    error = relative_error(weight, codec.decode(units, grid), gram.float())
    return Solution(units, grid, codec, damping, retries, error, mask)


def _settled(weight: Tensor, mask: Tensor, hessian: Tensor) -> Masked:
    """The kept weights [R, n] near their least-squares optimum: what they are rounded from, and scales are fitted to."""
    kept = mask.T.contiguous()
    values = torch.where(kept, weight.T, 0.0)
    for _ in range(SETTLING):
        sweep_kept(weight.T, values, kept, hessian)
    return Masked(values.T.contiguous(), mask)


def _sweep_kept_codes(
    weight: Tensor, units: Tensor, mask: Tensor, columns: Columns, hessian: Tensor, exchanges: Exchanges
) -> tuple[Tensor, Tensor]:
    """`sweep_kept` on a grid laid out in natural order: units and mask [R, n] -> new ones."""
    values = (units.T * columns.scale).contiguous()
    kept = mask.T.clone(memory_format=torch.contiguous_format)

    def settle(wanted: Tensor, at: slice) -> Tensor:
        return columns.nearest(wanted, at)[1]

    sweep_kept(weight.T, values, kept, hessian, exchanges=exchanges, settle=settle)
    units = columns.nearest(values, slice(0, len(values)))[0]
    return units.T.contiguous(), kept.T.contiguous()
