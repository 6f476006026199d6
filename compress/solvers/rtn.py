"""Round to nearest: scales by importance-weighted search, no error feedback. The control every solver must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs.base import BlockCodec
from compress.solvers.base import Solution, relative_error
from compress.solvers.options import RtnOptions

NEEDS_GRAM = False


def _flat(values: Tensor, codec: BlockCodec) -> Tensor:
    """[R, n] -> [R * n / step, step]: row after row, or step after step where rows are coded together."""
    steps = values.reshape(len(values), -1, codec.step)
    return (steps.transpose(0, 1) if codec.rows > 1 else steps).reshape(-1, codec.step)


def solve(weight: Tensor, gram: Tensor | None, codec: BlockCodec, options: RtnOptions) -> Solution:
    """weight: float32 [R, n]; gram: [n, n] or None (unweighted). The diagonal weighs the columns."""
    weight = weight.contiguous()
    n = weight.shape[1]
    importance = torch.ones(n, device=weight.device) if gram is None else gram.diagonal().float().clamp_min(0)
    if float(importance.sum()) == 0:
        importance = torch.ones_like(importance)
    grid, target = codec.rounding(weight, importance)
    target = _flat(target, codec)
    zero = None if grid.zero is None else codec.columns(grid.zero).reshape(-1)
    weights = importance.expand_as(weight)
    if codec.rows > 1:
        weights = weights * codec.columns(grid.scale).square()  # rows of one tile may differ in scale
    weights = _flat(weights, codec)
    chunks = range(0, len(target), 1 << 15)
    units = torch.cat(
        [
            codec.nearest(
                target[i : i + (1 << 15)],
                weights[i : i + (1 << 15)],
                None,
                None if zero is None else zero[i : i + (1 << 15)],
            )
            for i in chunks
        ]
    )
    if codec.rows > 1:
        units = units.reshape(-1, weight.shape[0], codec.step).transpose(0, 1)
    units = units.reshape(weight.shape)
    reference = torch.diag(importance) if gram is None else gram.float()
    return Solution(units, grid, codec, 0.0, 0, relative_error(weight, codec.decode(units, grid), reference))
