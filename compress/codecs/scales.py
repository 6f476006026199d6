"""Numbers that can be stored: half precision, and small integers times a half-precision super-scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-30


def half(values: Tensor) -> Tensor:
    """Round to half precision and back; overflow is clamped to the largest finite half."""
    return values.clamp(-65504.0, 65504.0).half().float()


def safe_divisor(values: Tensor) -> Tensor:
    """Zeros replaced by one, so that empty sub-blocks decode to zero instead of NaN."""
    return torch.where(values.abs() < TINY, torch.ones_like(values), values)


@dataclass(frozen=True)
class IntegerScale:
    """Sub-block scales stored as `d * (factor * i + shift)`, i an integer in [low, high], d half precision."""

    low: int
    high: int
    factor: float = 1.0
    shift: float = 0.0

    def multiplier(self, integers: Tensor) -> Tensor:
        """What multiplies d, float32 of the integers' shape."""
        return integers * self.factor + self.shift

    def nearest(self, ratio: Tensor) -> Tensor:
        """The integer whose multiplier is nearest to a wanted value over d; float32 of the same shape."""
        return ((ratio - self.shift) / self.factor).round().clamp(self.low, self.high)

    @property
    def largest(self) -> float:
        """Multiplier of the largest magnitude."""
        top, bottom = self.high * self.factor + self.shift, self.low * self.factor + self.shift
        return top if abs(top) >= abs(bottom) else bottom

    def project(self, wanted: Tensor, curvature: Tensor, per_span: int) -> tuple[Tensor, Tensor]:
        """The super-scale d of each span, and the integers, whose products come closest to the wanted values.

        wanted, curvature: float32 [R, J], the latter the price of a squared deviation; per_span: sub-blocks of a span.
        Returns d [R, J / per_span] and integers [R, J], both float32. A search over shrunken and stretched peaks, each
        followed by the least-squares d.
        """
        rows = wanted.shape[0]
        want, cost = wanted.reshape(rows, -1, per_span), curvature.reshape(rows, -1, per_span)
        peak = want.gather(2, want.abs().argmax(2, keepdim=True))[..., 0]
        best_error = torch.full_like(peak, torch.inf)
        best_d, best_i = torch.zeros_like(peak), torch.zeros_like(want)
        signs = (1.0, -1.0) if self.low < 0 else (1.0,)
        for sign in signs:
            for stretch in _STRETCHES:
                d = half(peak * (sign * stretch / self.largest))
                multiplier = self.multiplier(self.nearest(want / safe_divisor(d)[..., None]))
                # the best d for these integers, then once more the best integers
                d = half((cost * want * multiplier).sum(2) / (cost * multiplier**2).sum(2).clamp_min(TINY))
                integers = self.nearest(want / safe_divisor(d)[..., None])
                error = (cost * (want - d[..., None] * self.multiplier(integers)) ** 2).sum(2)
                better = error < best_error
                best_error = torch.where(better, error, best_error)
                best_d = torch.where(better, d, best_d)
                best_i = torch.where(better[..., None], integers, best_i)
        return best_d, best_i.reshape(rows, -1)


_STRETCHES: tuple[float, ...] = tuple(torch.linspace(0.85, 1.25, 17).tolist())
"""Peaks to try, relative to the one that the largest multiplier reaches: float32 numbers."""
