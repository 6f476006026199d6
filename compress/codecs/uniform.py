"""Uniform integers: b bits a weight, one half-precision scale (and zero point) per group, as GPTQ checkpoints store.

Names: `int{2,3,4,8}-{g32,g64,g128,row}[-asym]`. Symmetric codecs have the zero point at 2^(b-1).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.codecs.base import Rows, ScalarCodec
from compress.codecs.grid import ScaleGrid, ZeroPointGrid
from compress.codecs.lookup import codes as looked_up
from compress.codecs.scales import TINY, half
from compress.weights import Packed

SMALLEST = 6.2e-5 / 2**10  # half precision rounds it to its smallest positive number


class UniformCodec(ScalarCodec[ScaleGrid | ZeroPointGrid]):
    """One instance per (bits, group, symmetric); `group` None means the whole row."""

    kind = "uniform"
    signed_scale = False

    def __init__(self, name: str, bits: int, group: int | None, symmetric: bool):
        self.name, self.bits, self.group, self.symmetric = name, bits, group, symmetric
        self.low, self.high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
        # a symmetric range may start above the maximum: the lower end has one more level
        top = 2 ** (bits - 1) / (2 ** (bits - 1) - 1) if symmetric and bits > 2 else 1.01
        self.shrinks = tuple(top - (0.0033 if bits == 8 else 0.025) * i for i in range(12 if bits == 8 else 18))

    def for_row(self, in_features: int) -> UniformCodec:
        """This codec with spans of `in_features` columns where the group is the row."""
        bound = UniformCodec(self.name, self.bits, self.group, self.symmetric)
        bound.span = bound.sub = self.group or in_features
        return bound

    def bits_per_weight(self, in_features: int) -> float:
        groups = 1 if self.group is None else in_features / self.group
        return self.bits + (16.0 + self.bits) * groups / in_features

    @property
    def asymmetric(self) -> bool:
        return not self.symmetric

    def store(self, scale: Tensor, curvature: Tensor) -> ScaleGrid:
        # a half-precision scale of zero would silence the group: keep the smallest half instead
        return ScaleGrid(half(scale.clamp_min(SMALLEST)))

    def store_affine(self, scale: Tensor, offset: Tensor, curvature: Tensor, offset_curvature: Tensor) -> ZeroPointGrid:
        scale = self.store(scale, curvature).scale
        return ZeroPointGrid(scale, (offset / scale).round().clamp(0, self.high))

    def nearest(
        self, target: Tensor, weight: Tensor, metric: Tensor | None = None, zero: Tensor | None = None
    ) -> Tensor:
        if zero is None:
            return self.round(target)
        low = self.low - zero[:, None]
        return torch.minimum(torch.maximum(target.round(), low), low + (self.high - self.low))

    def _search_affine(self, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Shrunk ranges with an integer zero point, ranked by weighted error."""
        lowest, highest = x.amin(2).clamp_max(0.0), x.amax(2).clamp_min(0.0)
        best_error = torch.full_like(lowest, torch.inf)
        best_scale, best_zero = torch.ones_like(lowest), torch.zeros_like(lowest)
        ax, size = a * x, (a * x * x).sum(2)
        for shrink in self.shrinks:
            scale = half(((highest - lowest) * (shrink / self.high)).clamp_min(SMALLEST))
            zero = (-lowest * shrink / scale).round().clamp(0, self.high)
            u = (x / scale[..., None]).add_(zero[..., None]).round_().clamp_(0, self.high).sub_(zero[..., None])
            xu, uu = (ax * u).sum(2), (a * u).mul_(u).sum(2).clamp_min(TINY)
            best_fit = half((xu / uu).clamp_min(SMALLEST))
            error = size - 2 * best_fit * xu + best_fit**2 * uu
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale, best_zero = torch.where(better, best_fit, best_scale), torch.where(better, zero, best_zero)
        return best_scale, best_scale * best_zero, best_scale, best_scale

    def pack(self, units: Tensor, grid: ScaleGrid | ZeroPointGrid) -> Packed:
        zeros = grid.zero if isinstance(grid, ZeroPointGrid) else torch.full_like(grid.scale, 2 ** (self.bits - 1))
        codes = units + self.columns(zeros)
        return Packed(
            self.name,
            tuple(units.shape),
            {
                "codes": codes.round().to(torch.uint8),
                "scales": grid.scale.half(),
                "zeros": zeros.round().to(torch.uint8),
            },
        )

    def unpack(self, packed: Packed) -> Tensor:
        codes, scales, zeros = (packed.parts[k].float() for k in ("codes", "scales", "zeros"))
        repeat = self.group or packed.shape[1]
        return (codes - zeros.repeat_interleave(repeat, 1)) * scales.repeat_interleave(repeat, 1)

    def decode_rows(
        self, shape: tuple[int, int], parts: Mapping[str, Tensor], rows: Rows, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See Codec; the parts' codes and zero points packed to their bits."""
        scales = parts["scales"][rows].float()
        count, groups = scales.shape
        middle = 2 ** (self.bits - 1) if self.symmetric else 0
        values = looked_up(parts["codes"][rows], self.bits, shape[1], middle)
        if self.symmetric and groups == 1:
            return values.to(dtype), scales
        grouped = values.reshape(count, groups, -1)
        if not self.symmetric:
            grouped.sub_(looked_up(parts["zeros"][rows], self.bits, groups)[..., None])
        return grouped.mul_(scales[..., None]).reshape(count, shape[1]).to(dtype), None
