"""Activation-aware weight scaling (AWQ, arXiv 2306.00978, section 3.2): channels that matter get finer steps.

A linear's input channels are scaled up where activations are large, before rounding, and the scale is undone in what
produces the input. One exponent per group of linears is searched on a grid, against plain rounding.
The second half of the authors' method, clipping, is an option of the rtn solver: it changes what is rounded, not the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.statistics import Moments
from compress.transforms.base import Fold, Quantize, rounding_error
from compress.transforms.options import AwqOptions

SMALLEST = 1e-4  # of a scale before it is normalised, as published


def search(
    fold: Fold,
    weights: Mapping[str, Tensor],
    seen: Moments,
    quantize: Quantize,
    options: AwqOptions,
    own: Mapping[str, Moments] | None = None,
) -> tuple[Tensor, float, float]:
    """The scale with the least `rounding_error`, float32 [fold.rows], and that error before and after.

    seen, quantize, own: as in `rounding_error`; seen.absolute must be there. No scale at all is one of the candidates,
    so that `after` never exceeds `before`. Raises ValueError without magnitudes.
    """
    best = torch.ones(fold.rows, device=seen.gram.device)
    before = least = rounding_error(fold, weights, best, seen, quantize, own)
    for scale in candidates(fold, weights, seen, options):
        error = rounding_error(fold, weights, scale, seen, quantize, own)
        if error < least:
            best, least = scale, error
    return best, before, least


def candidates(fold: Fold, weights: Mapping[str, Tensor], seen: Moments, options: AwqOptions) -> list[Tensor]:
    """mean|x|^r for r = 0 ... 1 in `options.grid` steps, normalised to sqrt(max min) = 1; float32 [fold.rows] each.

    duo: divided by mean|w|^(1 - r) with w relative to the largest of its row (AutoAWQ's `duo_scaling`), so that
    channels that the weights themselves make loud are not scaled up twice.
    """
    if seen.absolute is None:
        raise ValueError(f"{fold.input}: moments without magnitudes; collect them with magnitudes=True")
    x = fold.gather(seen.absolute / max(seen.tokens, 1)).mean(1)
    w = fold.gather(_relative_magnitude(fold, weights)).mean(1) if options.duo else torch.ones_like(x)
    scales = []
    for step in range(options.grid + 1):
        r = step / options.grid
        scale = (x**r / (w ** (1 - r) + SMALLEST)).clamp_min(SMALLEST)
        scales.append(scale / (scale.max() * scale.min()).sqrt())
    return scales


def _relative_magnitude(fold: Fold, weights: Mapping[str, Tensor]) -> Tensor:
    """Mean over all rows of all consumers of |w| / max|w of the row|, [fold.channels]."""
    total, rows = torch.zeros(fold.channels, device=weights[fold.consumers[0]].device), 0
    for name in fold.consumers:
        weight = weights[name].float().abs()
        total += (weight / (weight.amax(1, keepdim=True) + 1e-6)).sum(0)
        rows += len(weight)
    return total / rows
