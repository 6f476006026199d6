"""What every solver returns, and the linear algebra they share."""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True)
class DampedStack:
    """Damped grams of B matrices, ready for error feedback.

    hessian: float32 [B, n, n], of a mean diagonal near one; order: int64 [B, n], in which columns are rounded; upper: float32
    [B, n, n], upper triangular U with U^T U the hessian's inverse in that order; damping, retries: of each, see `damped_gram`.
    """

    hessian: Tensor
    order: Tensor
    upper: Tensor
    damping: tuple[float, ...]
    retries: tuple[int, ...]


def damped_stack(grams: Tensor, damping: float, step: int | None, tries: int = 8) -> DampedStack:
    """What error feedback needs of grams [B, n, n], each of any scale. step: columns that are rounded together, steps by falling
    mean diagonal (act-order of GPTQ's authors); None: columns in their own order.

    Damping is raised for those that cannot be factorised, as `damped_gram` does, and NumericalError raised where none helps.
    """
    if not torch.isfinite(grams).all():
        raise NumericalError("gram is not finite; calibration activations overflowed")
    dampings, retries = [damping] * len(grams), [0] * len(grams)
    for _ in range(tries):
        hessian, order, ordered = _in_order(grams, dampings, step)
        upper, failed = inverse_factor(ordered)
        del ordered
        left = failed.nonzero()[:, 0].tolist()
        if not left:
            return DampedStack(hessian, order, upper.float(), tuple(dampings), tuple(retries))
        for b in left:
            dampings[b], retries[b] = max(dampings[b] * 10, 1e-8), retries[b] + 1
    raise NumericalError(
        f"gram cannot be factorised even with damping {dampings[left[0]]:g}; check the calibration data"
    )


def _in_order(grams: Tensor, dampings: Sequence[float], step: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Damped grams in float32, the orders of their columns, and the grams in these, float64: the only such copy that stays, since
    those of wide layers take gigabytes."""
    damped = grams.to(torch.float64, copy=True)
    for own, damping in zip(damped, dampings, strict=True):
        mean = float(own.diagonal().mean())
        own.diagonal().add_(damping * (mean if mean > 0 else 1.0))
        _to_size_one(own)
    hessian = damped.float()
    order = _natural(hessian) if step is None else energy_order(hessian, step)
    damped = damped.gather(1, order[:, :, None].expand_as(damped))
    return hessian, order, damped.gather(2, order[:, None].expand_as(damped))


def energy_order(hessian: Tensor, step: int) -> Tensor:
    """Steps of columns by falling mean diagonal. hessian: [B, n, n] -> int64 [B, n]."""
    steps = (
        hessian.diagonal(dim1=1, dim2=2).unflatten(1, (-1, step)).mean(2).argsort(dim=1, descending=True, stable=True)
    )
    columns = torch.arange(hessian.shape[1], device=hessian.device).reshape(-1, step)
    return columns[steps].flatten(1)


def _natural(hessian: Tensor) -> Tensor:
    """Columns in their own order, [B, n]."""
    return torch.arange(hessian.shape[1], device=hessian.device).expand(hessian.shape[:2])


def _to_size_one(gram: Tensor) -> None:
    """Scale a gram in place by a power of four to a mean diagonal near one: its unit is arbitrary, and such a factor, whose root
    is exact, changes no digit."""
    gram.mul_(4.0 ** -(frexp(float(gram.diagonal().mean()))[1] // 2))


def check_prunable(codec: BlockCodec) -> None:
    """Raises ValueError where a unit of zero is not coded by itself or does not decode to zero."""
    if not codec.info.stores_zero:
        raise ValueError(f"{codec.name} cannot leave single weights out; use an intN codec")


def inverse_factor(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Upper triangular U with `gram^-1 = U^T U`, and where there is none, int32 [B], not zero. grams: float64 [B, n, n].

    From one Cholesky factorisation: with J the reversal of order, J gram J = L L^T gives gram = R R^T for the upper
    triangular R = J L J, so U = R^-1.
    """
    lower, failed = torch.linalg.cholesky_ex(grams.flip(1, 2))
    eye = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    return torch.linalg.solve_triangular(lower.flip(1, 2), eye.expand_as(grams), upper=True), failed
