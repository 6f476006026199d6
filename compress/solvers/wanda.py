"""Wanda (arXiv 2306.11695, equation 1): a weight counts as much as its size times the norm of its input."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.solvers.masks import kept_by_row
from compress.solvers.options import WandaOptions
from compress.weights import Masked, Pattern

NEEDS_GRAM = True
SILENT = 1e-6  # norm of an input that was always zero, as a fraction of the loudest: its weights rank by size, last


def prune(weight: Tensor, gram: Tensor, pattern: Pattern, options: WandaOptions) -> Masked:
    """The lowest `|w| * sqrt(gram_jj)` of every row, or of every group of a row, go; what stays keeps its value.

    weight: float32 [R, n]; gram: [n, n] second moment of the inputs, any scale. Raises ValueError when groups of an n:m
    pattern do not fill the row, NumericalError when the gram is not finite.
    """
    norms = gram.diagonal().clamp_min(0).sqrt()
    if not torch.isfinite(norms).all():
        raise NumericalError("gram is not finite; calibration activations overflowed")
    loudest = norms.max()
    norms = torch.where(norms > 0, norms / loudest, SILENT).float()
    mask = kept_by_row(weight.abs() * norms, pattern)
    return Masked(torch.where(mask, weight, 0.0), mask)
