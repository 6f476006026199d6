"""Magnitude pruning: the smallest weights of every row go. The control that looks at no activations."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.solvers.masks import kept_by_row
from compress.solvers.options import MagnitudeOptions
from compress.weights import Masked, Pattern

NEEDS_GRAM = False


def prune(weight: Tensor, gram: Tensor | None, pattern: Pattern, options: MagnitudeOptions) -> Masked:
    """weight: float32 [R, n]; gram is not used. What stays keeps its value.

    Raises ValueError when groups of an n:m pattern do not fill the row.
    """
    mask = kept_by_row(weight.abs(), pattern)
    return Masked(torch.where(mask, weight, 0.0), mask)
