"""SmoothQuant (arXiv 2211.10438, equation 4): activations' outliers move into the weights.

Meant for 8-bit activations: the scale is a closed form of the largest activations and weights, nothing is searched, and
weights may round worse than before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.statistics import Moments
from compress.transforms.base import Fold, Quantize, rounding_error
from compress.transforms.options import SmoothOptions

SMALLEST = 1e-5  # of either maximum, as published: dead channels stay finite


def scale(fold: Fold, weights: Mapping[str, Tensor], absmax: Tensor, options: SmoothOptions) -> Tensor:
    """s = max|x|^alpha / max|w|^(1 - alpha), float32 [fold.rows]: what W is multiplied with and x divided by.

    absmax: [fold.channels], the largest |x| of each channel; max|w| is over all rows of all consumers. Channels that
    share a producer's row share the larger maximum. Channels that were never active keep a scale of one.
    """
    peaks = [weights[name].float().abs().amax(0) for name in fold.consumers]
    x = fold.gather(absmax.float()).amax(1)
    w = fold.gather(torch.stack(peaks).amax(0)).amax(1).clamp_min(SMALLEST)
    wanted = (x.clamp_min(SMALLEST) ** options.alpha / w ** (1 - options.alpha)).clamp_min(SMALLEST)
    return torch.where(x > 0, wanted, torch.ones_like(x))


def search(
    fold: Fold,
    weights: Mapping[str, Tensor],
    seen: Moments,
    quantize: Quantize,
    options: SmoothOptions,
    own: Mapping[str, Moments] | None = None,
) -> tuple[Tensor, float, float]:
    """`scale` and the weights' `rounding_error` before and after it; the same call as AWQ's.

    seen, quantize, own: as in `rounding_error`; seen.peak must be there. Raises ValueError without magnitudes.
    """
    if seen.peak is None:
        raise ValueError(f"{fold.input}: moments without magnitudes; collect them with magnitudes=True")
    chosen = scale(fold, weights, seen.peak, options)
    before = rounding_error(fold, weights, torch.ones_like(chosen), seen, quantize, own)
    return chosen, before, rounding_error(fold, weights, chosen, seen, quantize, own)
