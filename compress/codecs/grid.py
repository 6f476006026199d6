"""Quantization grids: the scales, zero points and minimums of a whole matrix, one small type per legal combination.

R rows, J sub-blocks a row (the columns that share a scale), S spans a row (the sub-blocks that are packed together). All
tensors are float32 unless said otherwise and hold exactly the values that the decoder will use. Every grid stands for
`scale * unit - offset`, with `unit` the code minus its zero point; only some have an offset or a zero point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self, TypeVar

import torch
from torch import Tensor

Layout = Callable[[Tensor], Tensor]
"""Numbers of sub-blocks [R, J] -> the same numbers where they are needed: a column each, transposed, some rows of it."""


@dataclass(frozen=True)
class Grid:
    """Base of all grids. scale: [R, J], the effective scales."""

    scale: Tensor

    # -- what a grid does to values ------------------------------------------------------------------------------------
    def raised(self, values: Tensor, layout: Layout) -> Tensor:
        """Weights plus their offsets, which over the scales are unit space. layout: from [R, J] to the values' shape."""
        return values

    def lowered(self, values: Tensor, layout: Layout) -> Tensor:
        """The inverse of `raised`: scaled units less their offsets."""
        return values

    def zero_points(self, layout: Layout) -> Tensor | None:
        """The zero points in a layout; None where units are codes themselves."""
        return None

    def laid_out(self, layout: Layout) -> Grid:
        """What a decoder needs of this grid, no more, with every tensor in another layout."""
        return ScaleGrid(layout(self.scale))

    # -- what is stored as real numbers --------------------------------------------------------------------------------
    @property
    def reals(self) -> tuple[Tensor, ...]:
        """The stored real numbers, which can be tuned while all integers stay: [R, J] or [R, S] each."""
        return (self.scale,)

    def terms(self, units: Tensor, columns: Layout) -> tuple[Tensor, ...]:
        """The addends of the decoded weight, float32 [R, n], each in proportion to one of `reals`.

        units: [R, n]; columns: from [R, J] to [R, n].
        """
        return (units * columns(self.scale),)

    # -- all tensors at once -------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its field."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def clone(self) -> Self:
        """A copy that shares no memory."""
        return type(self)(**{name: value.clone() for name, value in self.tensors().items()})

    def rows(self, at: slice) -> Self:
        """Those of some rows of the matrix, for grids with a row of numbers for each."""
        return type(self)(**{name: value[at] for name, value in self.tensors().items()})

    def by_span(self, sub_blocks: int) -> Self:
        """The same grid with one span a row: [R S, sub_blocks], or [R S, 1] of what a span has one of."""
        wide = {
            name: value.reshape(-1, 1 if name in _ONE_A_SPAN else sub_blocks) for name, value in self.tensors().items()
        }
        return type(self)(**wide)


G = TypeVar("G", bound=Grid)
_ONE_A_SPAN = ("d", "dmin")


@dataclass(frozen=True)
class ScaleGrid(Grid):
    """Symmetric: one stored scale a sub-block and nothing else (absmax quantization, lattices, trellises)."""


@dataclass(frozen=True)
class ZeroPointGrid(Grid):
    """Affine with integer zero points: `scale * (code - zero)`. zero: [R, J], integers."""

    zero: Tensor

    def zero_points(self, layout: Layout) -> Tensor:
        return layout(self.zero)

    def laid_out(self, layout: Layout) -> ZeroPointGrid:
        return ZeroPointGrid(layout(self.scale), layout(self.zero))


@dataclass(frozen=True)
class OffsetGrid(Grid):
    """Affine with real offsets, `scale * unit - offset`. offset: [R, J]. Codecs store it in one of the forms below."""

    offset: Tensor

    def raised(self, values: Tensor, layout: Layout) -> Tensor:
        return values + layout(self.offset)

    def lowered(self, values: Tensor, layout: Layout) -> Tensor:
        return values - layout(self.offset)

    def laid_out(self, layout: Layout) -> OffsetGrid:
        return OffsetGrid(layout(self.scale), layout(self.offset))


@dataclass(frozen=True)
class SuperBlockGrid(Grid):
    """Two-level scales (k-quants without minimums): small integers times one half-precision number a super-block.

    d: [R, S], half-precision values; integers: [R, J], stored sub-block integers; scale follows from both.
    """

    d: Tensor
    integers: Tensor

    @property
    def reals(self) -> tuple[Tensor, ...]:
        return (self.d,)


@dataclass(frozen=True)
class SuperBlockMinGrid(OffsetGrid, SuperBlockGrid):
    """Two-level scales and minimums (k-quants of "type 1"): `scale * code - offset`.

    offset: the effective minimums; dmin: [R, S], half-precision values; min_integers: [R, J], stored sub-block integers
    of the minimums.
    """

    dmin: Tensor
    min_integers: Tensor

    @property
    def reals(self) -> tuple[Tensor, ...]:
        return self.d, self.dmin

    def terms(self, units: Tensor, columns: Layout) -> tuple[Tensor, ...]:
        return units * columns(self.scale), -columns(self.offset)


@dataclass(frozen=True)
class ShiftedGrid(OffsetGrid, SuperBlockGrid):
    """Two-level scales of points that are all shifted alike: `scale * (point + shift)`.

    shift: [R, J], of which a bit each is stored; the offset, `-scale * shift`, follows the scale.
    """

    shift: Tensor

    @classmethod
    def of(cls, grid: SuperBlockGrid, shift: Tensor) -> ShiftedGrid:
        """The grid of unshifted points, with its points shifted."""
        return cls(grid.scale, grid.d, grid.integers, -(grid.scale * shift), shift)

    def terms(self, units: Tensor, columns: Layout) -> tuple[Tensor, ...]:
        return (self.lowered(units * columns(self.scale), columns),)


@dataclass(frozen=True)
class DoubleQuantizedGrid(Grid):
    """Scales that are quantized, too (QLoRA's double quantization): `levels[codes] * nested + mean`.

    codes: int64 [R, J]; nested: [ceil(R J / 256)], shared by 256 scales row after row; mean: [1].
    """

    codes: Tensor
    nested: Tensor
    mean: Tensor


STORED: Mapping[str, type[Grid]] = {
    grid.__name__: grid
    for grid in (ScaleGrid, ZeroPointGrid, SuperBlockGrid, SuperBlockMinGrid, ShiftedGrid, DoubleQuantizedGrid)
}
"""The grids that codecs make, by the name under which files know them."""


def rows_joined(grids: Sequence[G]) -> G:
    """One grid of the rows of several, all of one type with one row of numbers for every row of the matrix."""
    first = grids[0]
    return replace(first, **{name: torch.cat([g.tensors()[name] for g in grids]) for name in first.tensors()})
