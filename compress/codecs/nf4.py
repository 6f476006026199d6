"""bitsandbytes' 4-bit blocks: NF4, the quantiles of a normal distribution, and what it shares with FP4.

64 consecutive columns share one float32 `absmax`; a code stands for a level in [-1, 1] times it (QLoRA, arXiv
2305.14314, section 3). Double quantization (`-dq`) stores the absmax values of the whole matrix as 8-bit codes: their
mean is subtracted, and 256 of them, row after row, share one float32. The 8-bit levels are the dynamic map of arXiv
1511.04561.

`rounding` (plain rounding to nearest) gives the bytes of bitsandbytes; `fit` searches better scales for solvers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from compress.codecs.base import Rows, ScalarCodec
from compress.codecs.grid import DoubleQuantizedGrid, ScaleGrid
from compress.codecs.lookup import look_up
from compress.codecs.scales import TINY
from compress.codecs.tables import Table
from compress.weights import Packed

BLOCK, NESTED_BLOCK = 64, 256
PACKED = 1 << 20  # weights whose codes pass through wide integers at once
# QLoRA, appendix E
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_SMALLEST_DIVISOR = 1e-38  # bitsandbytes' own guard against empty blocks
_BINS = 65535  # bitsandbytes rounds to this many steps before it looks the nearest 8-bit level up on a CPU


def dynamic_map() -> Tensor:
    """The 256 sorted levels of the signed dynamic 8-bit type, float32.

    For each of seven decimal exponents e the midpoints of 2^e equal parts of [0.1, 1], times 10^(e - 6), with both
    signs; and 0 and 1.
    """
    levels = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        ends = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (ends[:-1] + ends[1:]) / 2 * 10.0 ** (exponent - 6)
        levels += [middles, -middles]
    return torch.cat(levels).sort().values


BlockGrid = ScaleGrid | DoubleQuantizedGrid


class FourBit(ScalarCodec[BlockGrid]):
    """One 4-bit type. `table`: the level of each code; `nested`: whether absmax is quantized, too."""

    kind = "bnb"
    stacks = False  # 256 scales share a number, whichever rows they are of
    span = sub = BLOCK
    low, high = -1, 1
    shrinks = tuple(1.1 - 0.05 * i for i in range(12))

    def __init__(self, name: str, table: Sequence[float] | Tensor, *, nested: bool):
        self.name, self.nested = name, nested
        self.table = torch.as_tensor(table, dtype=torch.float32)
        self.absmax_map = dynamic_map()
        order = self.table.argsort(stable=True)
        rising = self.table[order]
        self._levels, self._order, self._sorted = Table(self.table), Table(order), Table(rising)
        self._edges = Table((rising[1:] + rising[:-1]) / 2)
        self.nested_levels = Table(self.absmax_map)
        self.nested_edges = Table((self.absmax_map[1:] + self.absmax_map[:-1]) / 2)

    def bits_per_weight(self, in_features: int) -> float:
        return 4 + 8 * (1 + 4 / NESTED_BLOCK if self.nested else 4) / BLOCK

    # -- levels ------------------------------------------------------------------------------------------------
    def round(self, target: Tensor) -> Tensor:
        """Nearest level; halfway cases go down, as in bitsandbytes."""
        return self._sorted.on(target.device)[torch.bucketize(target.contiguous(), self._edges.on(target.device))]

    def codes(self, units: Tensor) -> Tensor:
        """Codes of levels, int64. FP4 has a code for -0.0, which differs from 0.0 in its sign bit alone."""
        apart = torch.where((units == 0) & units.signbit(), torch.full_like(units, TINY), units)
        return self._order.on(units.device)[torch.bucketize(apart.contiguous(), self._edges.on(units.device))]

    # -- scales ------------------------------------------------------------------------------------------------
    def rounding(self, weight: Tensor, importance: Tensor) -> tuple[BlockGrid, Tensor]:
        """bitsandbytes' own: absmax of each block, whatever the importance; codes from absmax before it is quantized."""
        absmax = weight.reshape(weight.shape[0], -1, BLOCK).abs().amax(2)
        return self._stored(absmax), weight * self.columns(1.0 / absmax.clamp_min(_SMALLEST_DIVISOR))

    def fit(self, weight: Tensor, importance: Tensor) -> BlockGrid:
        return self._stored(super().fit(weight, importance).scale)

    def storable(self, scale: Tensor) -> Tensor:
        return scale

    def _stored(self, scale: Tensor) -> BlockGrid:
        """The grid that holds `scale` [R, J]: as it is, or in 8 bits around its mean as bitsandbytes rounds it."""
        if not self.nested:
            return ScaleGrid(scale)
        flat = scale.reshape(-1)
        mean = flat.mean()
        deviation = flat - mean
        padded = torch.nn.functional.pad(deviation, (0, -len(flat) % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
        nested = padded.abs().amax(1)
        ratio = deviation * _per_scale(torch.where(nested > 0, 1.0 / nested, nested), len(flat))
        bins = ((ratio + 1) * (_BINS / 2) + 0.5).floor()
        codes = torch.bucketize(bins * 2 / _BINS - 1, self.nested_edges.on(scale.device))
        codes = torch.where(_per_scale(nested, len(flat)) > 0, codes, torch.zeros_like(codes)).reshape(scale.shape)
        return self.nested_grid(codes, nested, mean.reshape(1))

    def nested_grid(self, codes: Tensor, nested: Tensor, mean: Tensor) -> DoubleQuantizedGrid:
        """The grid of quantized scales: codes int64 [R, J], nested float32 [ceil(R J / 256)], mean float32 [1]."""
        shared = _per_scale(nested, codes.numel()).reshape(codes.shape)
        values = self.nested_levels.on(codes.device)[codes] * shared + mean
        return DoubleQuantizedGrid(values, codes, nested, mean)

    def rescaled(self, grid: BlockGrid, factor: Tensor, offset_factor: Tensor | None = None) -> BlockGrid:
        """See BlockCodec.rescaled; nested scales are quantized again around their new mean."""
        return self._stored(grid.scale * factor)

    def refit(self, weight: Tensor, units: Tensor, grid: BlockGrid, gram: Tensor) -> BlockGrid:
        """Move every scale of every row, block by block, to the storable value nearest its optimum given all others.

        weight, units: [R, n]; gram: [n, n]. Never increases tr((W-Q) gram (W-Q)^T). The optimum is sought among scales
        that are not negative; the mean and the nested absmax stay.
        """
        pull = (weight - self.decode(units, grid)) @ gram
        levels = _NestedLevels(self, grid) if isinstance(grid, DoubleQuantizedGrid) else _AnyLevels()
        scale = grid.scale.clone()
        for block in range(scale.shape[1]):
            at = slice(block * BLOCK, (block + 1) * BLOCK)
            direction = units[:, at]
            curve = ((direction @ gram[at, at]) * direction).sum(1)
            step = (direction * pull[:, at]).sum(1) / curve.clamp_min(TINY)
            new = levels.nearest((scale[:, block] + step).clamp_min(0.0), block)
            # a step along a coordinate is an improvement only if it lands nearer the optimum
            good = ((new - scale[:, block] - step).abs() < step.abs()) & (curve > TINY)
            delta = torch.where(good, new - scale[:, block], torch.zeros_like(step))
            pull[:, at.stop :].addmm_(direction * delta[:, None], gram[at, at.stop :], alpha=-1)
            scale[:, block] = torch.where(good, new, scale[:, block])
            levels.take(good, block)
        return levels.grid(scale)

    # -- bytes -------------------------------------------------------------------------------------------------
    def pack(self, units: Tensor, grid: BlockGrid) -> Packed:
        some = units.split(max(1, PACKED // units.shape[1]))
        codes = torch.cat([self.codes(part).to(torch.uint8) for part in some])
        parts = {"codes": (codes[:, ::2] << 4) | codes[:, 1::2]}
        if isinstance(grid, DoubleQuantizedGrid):
            parts |= {"absmax": grid.codes.to(torch.uint8), "nested_absmax": grid.nested, "offset": grid.mean}
        else:
            parts["absmax"] = grid.scale
        return Packed(self.name, tuple(units.shape), parts)

    def unpack(self, packed: Packed) -> Tensor:
        parts = packed.parts
        codes = torch.stack((parts["codes"] >> 4, parts["codes"] & 0xF), dim=2).reshape(packed.shape)
        grid: BlockGrid
        if self.nested:
            grid = self.nested_grid(parts["absmax"].long(), parts["nested_absmax"], parts["offset"])
        else:
            grid = ScaleGrid(parts["absmax"])
        return self.decode(self._levels.on(codes.device)[codes.int()], grid)

    def decode_rows(
        self, shape: tuple[int, int], parts: Mapping[str, Tensor], rows: Rows, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See Codec."""
        data = parts["codes"][rows].to(torch.int32)
        values = look_up(data, _pairs(self, data.device)).reshape(len(data), -1, BLOCK)
        scales = (
            _nested_scales(self.nested_levels.on(data.device), parts, rows) if self.nested else parts["absmax"][rows]
        )
        return values.mul_(scales[..., None]).reshape(len(data), shape[1]).to(dtype), None


class _AnyLevels:
    """Scales that can be any number."""

    def nearest(self, wanted: Tensor, block: int) -> Tensor:
        """The storable scales of a block of every row [R] that are nearest to the wanted ones."""
        return wanted

    def take(self, good: Tensor, block: int) -> None:
        """What `nearest` found becomes the block's scale where `good`, bool [R]."""

    def grid(self, scale: Tensor) -> BlockGrid:
        """The grid of these scales [R, J]."""
        return ScaleGrid(scale)


class _NestedLevels(_AnyLevels):
    """Scales that are 8-bit codes around a mean, which stays, as the numbers do that 256 of them share."""

    def __init__(self, codec: FourBit, grid: DoubleQuantizedGrid):
        self.codec, self.nested, self.mean = codec, grid.nested, grid.mean
        self.codes, self.found = grid.codes.clone(), grid.codes[:, 0]
        self.shared = _per_scale(grid.nested, grid.codes.numel()).reshape(grid.codes.shape)
        self.levels, self.edges = (t.on(grid.scale.device) for t in (codec.nested_levels, codec.nested_edges))

    def nearest(self, wanted: Tensor, block: int) -> Tensor:
        shared = self.shared[:, block]
        self.found = torch.bucketize((wanted - self.mean) / shared.clamp_min(TINY), self.edges)
        return self.levels[self.found] * shared + self.mean

    def take(self, good: Tensor, block: int) -> None:
        self.codes[:, block] = torch.where(good, self.found, self.codes[:, block])

    def grid(self, scale: Tensor) -> BlockGrid:
        return self.codec.nested_grid(self.codes, self.nested, self.mean)


def _per_scale(nested: Tensor, count: int) -> Tensor:
    """[ceil(count / 256)] -> [count], every value for the 256 scales that share it."""
    return nested.repeat_interleave(NESTED_BLOCK)[:count]


def _nested_scales(levels: Tensor, parts: Mapping[str, Tensor], rows: Rows) -> Tensor:
    """Block scales of double quantization, float32 [k, blocks]: 256 of them share a scale, row after row."""
    codes, nested = parts["absmax"], parts["nested_absmax"]
    starts = torch.arange(len(codes), device=codes.device)[rows] * codes.shape[1]
    place = (starts[:, None] + torch.arange(codes.shape[1], device=codes.device)) // NESTED_BLOCK
    return levels[codes[rows].long()] * nested[place] + parts["offset"]


@cache
def _pairs(codec: FourBit, device: torch.device) -> Tensor:
    """Entry i: the levels of the two codes in byte i, the high half first; float32 [256, 2]."""
    octets = torch.arange(256, device=device)
    return codec.table.to(device)[torch.stack((octets >> 4, octets & 0xF), dim=1)]


CODEC = FourBit("nf4", LEVELS, nested=False)
DOUBLE_QUANTIZED = FourBit("nf4-dq", LEVELS, nested=True)
