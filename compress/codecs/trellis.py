"""Trellis-coded quantization (QTIP, arXiv 2406.11235): K bits a weight, one f16 scale a row, for Gaussian-like rows.

A tile of 16x16 weights, read row after row, is one sequence of 256 values and one circular string of 256 K bits, the
first symbol first, its most significant bit first. The state at value t is the window of the last L bits up to and
including symbol t; where the string begins, the window reaches round to its end (tail-biting, section 3.2), so a tile
stores exactly K bits a weight. The value is `code_table(L, K)[state]`, in units of the row's scale.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cache, cached_property
from math import lcm, prod
from statistics import NormalDist

import torch
from torch import Tensor

from compress.codecs.base import BlockCodec, Rows
from compress.codecs.grid import ScaleGrid
from compress.codecs.lookup import look_up
from compress.codecs.scales import half
from compress.codecs.tables import Table
from compress.weights import Packed

TILE = 16
PLACE, TURN = 0.7635, 0.424  # multipliers of the table's hashes: the least error over 2, 3 and 4 bits of 15 pairs tried
STATE_BITS = 12  # the table is 8 KiB of half precision; each bit more doubles both it and the search
SEAM = 64  # values on either side of the seam that decide the state there
FLOATS = 1 << 24  # path costs kept for the way back: 64 MiB
SPREAD = 1.03  # costs nothing at 2 bits, gains 1% at 4; the errors that solvers feed back widen their targets
LARGEST = 32.0  # targets beyond, many times the largest code, would cost float32 its precision


@cache
def code_table(state_bits: int, bits: int) -> Tensor:
    """Value of every state: float32 [2^state_bits], exact in half precision.

    The values are the quantiles of a normal distribution in 2^bits equally probable strata. State s = (h, middle, c),
    h its first and c its last `bits` bits, has stratum `h + c + turn(middle)` mod 2^bits and a place in it that depends
    on (h, middle) alone. So the states that follow one state lie in different strata at the same place, and the states
    that lead to one lie in different strata: paths part and meet far from each other (set partitioning: Ungerboeck,
    IEEE Trans. Inf. Theory 28, 1982). Places and turns are multiplicative hashes.

    Raises ValueError when the window holds fewer than two symbols.
    """
    if state_bits < 2 * bits:
        raise ValueError(f"a window of {state_bits} bits does not hold two symbols of {bits}")
    strata, places = 1 << bits, 1 << (state_bits - bits)
    middles = places >> bits
    states = torch.arange(1 << state_bits)
    prefix, symbol = states >> bits, states & (strata - 1)
    head, middle = prefix // middles, prefix % middles
    turn = middle * _odd(places, TURN) % places * strata // places
    stratum = (head + symbol + turn) % strata
    place = prefix * _odd(places, PLACE) % places
    normal = NormalDist()
    quantiles = torch.tensor([normal.inv_cdf((i + 0.5) / len(states)) for i in range(len(states))])
    return quantiles.half().float()[stratum * places + place]


def _odd(modulus: int, fraction: float) -> int:
    """The multiplier at that fraction of the modulus, made odd so that it permutes the residues."""
    return int(modulus * fraction) | 1


# -- search ----------------------------------------------------------------------------------------------------
def encode(target: Tensor, weight: Tensor, table: Tensor, bits: int) -> Tensor:
    """States of a near-optimal tail-biting path: int64 [N, T], each the shifted predecessor of the next, circularly.

    target: float32 [N, T] in units of the table; weight: [N, T], non-negative price of a squared error; table: float32
    [2^L]. Two passes (QTIP, algorithm 4): a free path across the seam fixes the state there, and the best path that
    starts and ends in it is exact. The first pass sees `SEAM` values on either side; the rest has no say in that state.
    """
    length = target.shape[1]
    tiles = max(1, FLOATS // (length * (len(table) >> bits)))
    chunks = zip(target.split(tiles), weight.split(tiles), strict=True)
    return torch.cat([_tail_biting(x.T.contiguous(), w.T.contiguous(), table, bits) for x, w in chunks])


def _tail_biting(target: Tensor, weight: Tensor, table: Tensor, bits: int) -> Tensor:
    """target, weight: [T, B] -> states [B, T]."""
    target = target.clamp(-LARGEST, LARGEST)
    weight = weight / weight.amax(0).clamp_min(1e-30)
    weight = weight.clamp_min(1e-6)  # not zero: path costs are kept in units of the present weight
    near = min(SEAM, target.shape[0] // 2)
    target_there, weight_there = (torch.cat((values[-near:], values[:near])) for values in (target, weight))
    seam = viterbi(target_there, weight_there, table, bits)[near] >> bits
    return viterbi(target, weight, table, bits, seam).T


def viterbi(target: Tensor, weight: Tensor, table: Tensor, bits: int, seam: Tensor | None = None) -> Tensor:
    """States of the path of least weighted squared error: int64 [T, B].

    target: [T, B]; weight: [T, B], positive; table: [2^L]; seam: int64 [B], the L - bits bits before the first symbol,
    which then also are the last bits of the last state; None leaves both ends free. Tiles are the last dimension, so
    that every operation runs over contiguous memory.
    """
    (length, tiles), symbols = target.shape, 1 << bits
    suffixes = len(table) >> bits
    levels = table.reshape(suffixes, symbols, 1)
    ratio = torch.cat((torch.ones_like(weight[:1]), weight[:-1])) / weight
    best = target.new_zeros(suffixes, tiles)  # least cost of a path whose last L - bits bits are these
    if seam is not None:
        best.fill_(torch.inf).scatter_(0, seam[None], 0.0)
    history = _history((length, suffixes, tiles), target)
    cost = torch.empty_like(levels.expand(-1, -1, tiles), memory_format=torch.contiguous_format)
    for t in range(length):
        torch.mul(best, ratio[t], out=history[t])
        torch.sub(levels, target[t], out=cost)
        cost.square_().add_(history[t, :, None])
        best = cost.reshape(symbols, suffixes, tiles).amin(0)  # the oldest symbol leaves the window
    suffix = best.argmin(0) if seam is None else seam
    return _trace(history, target, table, bits, suffix)


_scratch = threading.local()


def _history(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised float32. On a CPU every thread keeps and reuses its own up to `FLOATS`: to touch fresh pages would
    take as long as the search."""
    if like.device.type != "cpu" or prod(shape) > FLOATS:
        return like.new_empty(shape)
    if not hasattr(_scratch, "floats"):
        _scratch.floats = torch.empty(FLOATS)
    return _scratch.floats[: prod(shape)].view(shape)


def _trace(history: Tensor, target: Tensor, table: Tensor, bits: int, suffix: Tensor) -> Tensor:
    """Walk back from the last L - bits bits `suffix` [B]. The few candidates of each step are priced again: cheaper than
    keeping every argmin on the way forward."""
    length, suffixes, tiles = history.shape
    oldest = torch.arange(1 << bits, device=target.device)[:, None] * suffixes
    states = suffix.new_empty(length, tiles)
    for t in range(length - 1, -1, -1):
        candidates = oldest + suffix
        cost = (table[candidates] - target[t]).square_() + history[t].gather(0, candidates >> bits)
        states[t] = candidates.gather(0, cost.argmin(0, keepdim=True))[0]
        suffix = states[t] >> bits
    return states


# -- bytes -----------------------------------------------------------------------------------------------------
def pack_states(states: Tensor, bits: int) -> Tensor:
    """States of tail-biting paths, int64 [..., T] -> uint8 [..., T * bits / 8]: the newest symbol of each."""
    places = torch.arange(bits - 1, -1, -1, device=states.device)
    string = (states[..., None] >> places) & 1
    octets = string.reshape(*states.shape[:-1], -1, 8) << torch.arange(7, -1, -1, device=states.device)
    return octets.sum(-1).to(torch.uint8)


def unpack_states(codes: Tensor, bits: int, state_bits: int) -> Tensor:
    """Inverse of `pack_states`: uint8 [..., T * bits / 8] -> int32 [..., T]. state_bits: at most 24."""
    octets = codes.to(torch.int32)
    words = octets.clone()  # every byte with those before it, so that a window lies within one word
    for back in range(1, (state_bits + 14) // 8):
        words |= octets.roll(back, -1) << (8 * back)
    group = lcm(8, bits)  # bits after which symbols and bytes start together again
    words = words.unflatten(-1, (-1, group // 8))
    states = words.new_empty(*words.shape[:-1], group // bits)
    for i in range(group // bits):
        last = i * bits + bits - 1
        torch.bitwise_right_shift(words[..., last // 8], 7 - last % 8, out=states[..., i])
    return states.bitwise_and_((1 << state_bits) - 1).flatten(-2)


class TrellisCodec(BlockCodec[ScaleGrid]):
    """`bits` a weight on a trellis of 2^state_bits states.

    Parts: codes uint8 [m/16, n/16, 32 * bits], one tile each; scales float16 [m].
    """

    kind = "vector"
    step = TILE
    rows = TILE
    stacks = True

    def __init__(self, name: str, bits: int, state_bits: int = STATE_BITS):
        self.name, self.bits, self.state_bits = name, bits, state_bits

    def for_row(self, in_features: int) -> TrellisCodec:
        """This codec with one scale for a row of `in_features` columns."""
        bound = TrellisCodec(self.name, self.bits, self.state_bits)
        bound.span = bound.sub = in_features
        return bound

    def bits_per_weight(self, in_features: int) -> float:
        return self.bits + 16.0 / in_features

    @cached_property
    def _table(self) -> Table:
        return Table(code_table(self.state_bits, self.bits))

    def table(self, device: torch.device) -> Tensor:
        """Value of every state, float32 [2^state_bits]."""
        return self._table.on(device)

    # -- the solver's view -------------------------------------------------------------------------------------
    def fit(self, weight: Tensor, importance: Tensor) -> ScaleGrid:
        """A little more than the root mean square of every row, whatever `importance`: the rows are taken for normal."""
        return ScaleGrid(half(weight.square().mean(1, keepdim=True).sqrt() * SPREAD))

    def nearest(
        self, target: Tensor, weight: Tensor, metric: Tensor | None = None, zero: Tensor | None = None
    ) -> Tensor:
        """target: [N, 16], all rows in order, sixteen of them a tile; weight: [16] or [N, 16]. A path is chosen by the
        diagonal `weight` alone: `metric` is not used. Raises ValueError when N is not a multiple of 16."""
        _check_rows(len(target))
        price = weight.expand_as(target).reshape(-1, TILE * TILE)
        table = self.table(target.device)
        states = encode(target.reshape(-1, TILE * TILE), price, table, self.bits)
        return table[states].reshape(target.shape)

    # -- bytes -------------------------------------------------------------------------------------------------
    def pack(self, units: Tensor, grid: ScaleGrid) -> Packed:
        """units: [m, n] as `nearest` gave them. Raises ValueError when a tile is not a tail-biting path."""
        rows, n = units.shape
        _check_rows(rows)
        codes = torch.cat([self._encode_units(band) for band in units.split(TILE * _bands(n))])
        return Packed(self.name, (rows, n), {"codes": codes, "scales": grid.scale[:, 0].half()})

    def _encode_units(self, units: Tensor) -> Tensor:
        """float32 [m, n] -> uint8 [m/16, n/16, 32 * bits]: every value of the table stands for one state."""
        rows, n = units.shape
        tiles = units.reshape(rows // TILE, TILE, n // TILE, TILE).transpose(1, 2).flatten(2)
        values, states = self.table(units.device).sort()
        index = torch.searchsorted(values, tiles.contiguous()).clamp_max(len(values) - 1)
        codes = pack_states(states[index], self.bits)
        if not torch.equal(self.decode_codes(codes), units):
            raise ValueError(f"{self.name}: the units of a tile are not the values of a tail-biting path")
        return codes

    def decode_codes(self, codes: Tensor) -> Tensor:
        """uint8 [m/16, n/16, 32 * bits], any rows of tiles -> float32 [m, n] in units of the rows' scales."""
        high, wide = codes.shape[:2]
        states = unpack_states(codes, self.bits, self.state_bits)
        values = self.table(codes.device).index_select(0, states.flatten())
        return values.reshape(high, wide, TILE, TILE).transpose(1, 2).reshape(high * TILE, wide * TILE)

    def unpack(self, packed: Packed) -> Tensor:
        bands = packed.parts["codes"].split(_bands(packed.shape[1]))
        units = torch.cat([self.decode_codes(band) for band in bands])
        return units.mul_(packed.parts["scales"].float()[:, None])

    def decode_rows(
        self, shape: tuple[int, int], parts: Mapping[str, Tensor], rows: Rows, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See Codec; rows: a slice. One look-up for two columns, by the bits that make both states."""
        assert isinstance(rows, slice)
        codes = parts["codes"][rows.start // TILE : rows.stop // TILE]
        high, wide = codes.shape[:2]
        # every byte with the two before it on the tile's circle, which hold all bits of the states that end in it
        octets = torch.cat((codes[..., -2:], codes), dim=-1).to(torch.int32)
        words = octets[..., 2:] | octets[..., 1:-1] << 8 | octets[..., :-2] << 16
        group = 3 if self.bits == 3 else 1  # bytes after which pairs end at the same bits again
        words = words.reshape(high, wide, TILE, -1, group)
        pairs = 4 * group // self.bits
        index = torch.empty((high, TILE, wide, TILE // 2 // pairs, pairs), dtype=torch.int32, device=codes.device)
        table = _pairs(self, codes.device)
        for pair in range(pairs):
            octet, bit = divmod(2 * self.bits * (pair + 1) - 1, 8)
            index[..., pair] = ((words[..., octet] >> (7 - bit)) & (len(table) - 1)).transpose(1, 2)
        values = look_up(index, table).reshape(-1, shape[1])
        return values.to(dtype), parts["scales"][rows].float()[:, None]


@cache
def _pairs(codec: TrellisCodec, device: torch.device) -> Tensor:
    """Entry i: the values of the two states within i, in half precision, which holds them; [2^(state_bits + bits), 2]."""
    windows = torch.arange(1 << (codec.state_bits + codec.bits), device=device)
    states = torch.stack((windows >> codec.bits, windows & ((1 << codec.state_bits) - 1)), dim=1)
    return codec.table(device)[states].half()


def _bands(n: int) -> int:
    """Rows of tiles of about a million weights: what passes through wide integers at a time."""
    return max(1, (1 << 20) // (TILE * n))


def _check_rows(rows: int) -> None:
    if rows % TILE:
        raise ValueError(f"a trellis codes {TILE} rows together; {rows} rows are not a multiple")


TRELLISES = {f"trellis{bits}": TrellisCodec(f"trellis{bits}", bits) for bits in (2, 3, 4)}
