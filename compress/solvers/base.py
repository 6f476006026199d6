"""What every solver returns, and the linear algebra they share."""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp

import torch
from torch import Tensor

from compress.codecs.base import BlockCodec
from compress.codecs.grid import Grid
from compress.codecs.scales import TINY
from compress.errors import NumericalError
from compress.weights import Packed


@dataclass(frozen=True)
class Solution:
    """Codes for one matrix and what it took to find them.

    units: float32 [R, n]; damping: fraction of the mean diagonal that was added to the gram (0 when unused);
    retries: how often the damping had to be raised; error: tr((W-Q) G (W-Q)^T) / tr(W G W^T) on the undamped gram;
    mask: bool [R, n], True where a weight stays, or None; units are zero elsewhere and decode to zero.
    """

    units: Tensor
    grid: Grid
    codec: BlockCodec
    damping: float
    retries: int
    error: float
    mask: Tensor | None = None

    def decode(self) -> Tensor:
        return self.codec.decode(self.units, self.grid)

    def pack(self) -> Packed:
        return self.codec.pack(self.units, self.grid)


def relative_error(weight: Tensor, quantized: Tensor, gram: Tensor) -> float:
    """tr((W-Q) G (W-Q)^T) / tr(W G W^T). weight, quantized: float32 [R, n] of any size; gram: float32 [n, n]."""
    unit = _unit(weight)
    delta, weight = (weight - quantized).mul_(unit), weight * unit
    return float(((delta @ gram) * delta).sum() / ((weight @ gram) * weight).sum().clamp_min(TINY))


def energy(weight: Tensor, gram: Tensor | None) -> float:
    """tr(W G W^T), the mean squared output. weight: float32 [R, n] of any size; gram: float32 [n, n], None: identity."""
    unit = _unit(weight)
    weight = weight * unit
    return float(((weight if gram is None else weight @ gram) * weight).sum()) / unit**2


def _unit(weight: Tensor) -> float:
    """A power of two, which costs no digit, that brings weights to one: squares of very small or large ones leave float32."""
    return 2.0 ** -max(frexp(float(weight.abs().max()))[1], -126)


def damped_gram(gram: Tensor, damping: float, tries: int = 8) -> tuple[Tensor, float, int]:
    """`gram + damping * mean(diag) * I` in float64, the damping that was needed and how often it was raised.

    gram: [n, n], symmetric positive semi-definite. When the result cannot be factorised the damping is raised tenfold,
    `tries` times at most. Raises NumericalError when no damping helps (non-finite statistics).
    """
    wide = gram.double()
    if not torch.isfinite(wide).all():
        raise NumericalError("gram is not finite; calibration activations overflowed")
    mean = float(wide.diagonal().mean())
    mean = mean if mean > 0 else 1.0
    for retry in range(tries):
        damped = wide.clone()
        damped.diagonal().add_(damping * mean)
        if not torch.linalg.cholesky_ex(damped)[1]:
            return damped, damping, retry
        damping = max(damping * 10, 1e-8)
    raise NumericalError(f"gram cannot be factorised even with damping {damping:g}; check the calibration data")


def of_size_one(gram: Tensor) -> Tensor:
    """`gram`, scaled in place by a power of four to a mean diagonal near one: its unit is arbitrary, and such a factor,
    whose root is exact, changes no digit."""
    return gram.mul_(4.0 ** -(frexp(float(gram.diagonal().mean()))[1] // 2))


def check_prunable(codec: BlockCodec) -> None:
    """Raises ValueError where a unit of zero is not coded by itself or does not decode to zero."""
    if not codec.info.stores_zero:
        raise ValueError(f"{codec.name} cannot leave single weights out; use an intN codec")


def inverse_factor(gram: Tensor) -> Tensor:
    """Upper triangular U with `gram^-1 = U^T U`. gram: float64 [n, n], positive definite.

    From one Cholesky factorisation: with J the reversal of order, J gram J = L L^T gives gram = R R^T for the upper
    triangular R = J L J, so U = R^-1.
    """
    lower = torch.linalg.cholesky(gram.flip(0, 1))
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
