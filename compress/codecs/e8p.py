"""E8P and its residual forms (QuIP#, arXiv 2402.04396, section 4): eight columns a code, one f16 scale a row.

A 16-bit code is a point of the lattice E8 shifted by a quarter, near the origin: `s + 1/4` or `s - 1/4` with s eight
half-integers of even sum. The magnitudes of s are a row of a table of 256: the 227 rows with a norm^2 of at most 10,
then 29 of norm^2 12. Of the 224 rows with that norm the first in lexicographic order that hold no 5/2 are taken; which
ones hardly matters (a choice optimised greedily on a Gaussian source lowers the error by 0.1%).

On a standard normal source, at the best scale and with an exact search, the squared error is 0.0916 a weight (QuIP#
reports 0.089 for its own table; a 2-bit Lloyd-Max scalar 0.1175, no code below 0.0625).

    bits 8..15  row of the table
    bits 1..7   set where coordinate 1..7 of s is negative; the sign of coordinate 0 makes the sum of s even
    bit  0      set for -1/4

Three and four bits a weight add a second code for what the first leaves (residual vector quantization): one of 256
short vectors of E8, or E8P again, times a fixed ratio. Meant for rows of roughly Gaussian entries of one size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from compress.codecs import stack
from compress.codecs.base import BlockCodec, Rows
from compress.codecs.forms import Form, chosen, least, monomials, one_turned
from compress.codecs.grid import ScaleGrid
from compress.codecs.lookup import look_up
from compress.codecs.scales import TINY, half
from compress.weights import Packed

CHUNK = 2048  # groups searched at once: some 20 MiB of scratch
SCAN = 1024  # of them compared with the whole table at once: 1 MiB an operand stays in the cache
PACKED = 1 << 20  # weights whose codes are looked up at once
BARRED = 1e30  # the cost of what is no point; less than infinity, which times nothing is no number
LARGEST = 1e4  # targets beyond, thousands of times the largest point, would cost float32 its precision
SHIFTS = (0.25, -0.25)


# -- codebooks -------------------------------------------------------------------------------------------------
@cache
def magnitudes() -> Tensor:
    """The table: float32 [256, 8] of 1/2, 3/2 and 5/2."""
    rows = torch.tensor(list(itertools.product((0.5, 1.5, 2.5), repeat=8)))
    norms = rows.square().sum(1)
    return torch.cat((rows[norms <= 10], rows[(norms == 12) & (rows.amax(1) == 1.5)][:29]))


@cache
def e8p_points() -> Tensor:
    """Every code's point, float32 [65536, 8]; exact in half precision and in bfloat16."""
    codes = torch.arange(1 << 16)
    rows = magnitudes()[codes >> 8]
    bits = codes[:, None] >> torch.arange(8) & 1
    negative, minus = bits.bool(), bits[:, :1].bool()
    negative[:, 0] = False
    odd = torch.where(negative, -rows, rows).sum(1).remainder(2) > 0.5
    negative[:, 0] = odd  # flipping a half-integer changes the sum by an odd number
    return torch.where(negative, -rows, rows) + torch.where(minus, SHIFTS[1], SHIFTS[0])


@cache
def e8_short_vectors() -> Tensor:
    """The 1-bit book: the origin, the 240 vectors of E8 of norm^2 2 and 15 of norm^2 4, float32 [256, 8]."""
    integers = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=8)))
    halves = torch.tensor(list(itertools.product((-0.5, 0.5), repeat=8)))
    halves = halves[halves.sum(1).remainder(2) == 0]
    axes = torch.cat((2 * torch.eye(8), -2 * torch.eye(8)))[:15]
    return torch.cat((torch.zeros(1, 8), integers[integers.square().sum(1) == 2], halves, axes))


@cache
def _rows_by_digits() -> Tensor:
    """Row of the table for base-4 digits `magnitude - 1/2`, -1 where there is none: int16 [65536]."""
    table = torch.full((4**8,), -1, dtype=torch.int16)
    table[((magnitudes() - 0.5).long() << _digit_shifts()).sum(1)] = torch.arange(256, dtype=torch.int16)
    return table


def _digit_shifts() -> Tensor:
    return 2 * torch.arange(8)


def _row(s: Tensor) -> Tensor:
    """Half-integers [..., 8] -> row of the table, int64 [...]; -1 outside it."""
    digits = (s.abs() - 0.5).clamp_max(3.0).long().clamp_min_(0)  # NaN becomes the smallest integer
    return _on(_rows_by_digits, s.device)[(digits << _on(_digit_shifts, s.device)).sum(-1)].long()


def e8p_index(points: Tensor) -> Tensor:
    """Points [..., 8] -> codes int16 [...], the inverse of `e8p_points()[codes & 0xffff]`.

    Raises ValueError for points that E8P does not hold.
    """
    minus = points[..., 0].remainder(1) < 0.5
    s = points - torch.where(minus, -0.25, 0.25)[..., None]
    row = _row(s)
    signs = (s < 0).long() << torch.arange(8, device=s.device)
    codes = (row << 8) + signs[..., 1:].sum(-1) + minus.long()
    if bool((row < 0).any()) or not torch.equal(_on(e8p_points, points.device)[codes], points):
        raise ValueError("units are not points of E8P")
    return (codes - (codes >> 15 << 16)).to(torch.int16)


@cache
def _on(book: Callable[[], Tensor], device: torch.device | None, dtype: torch.dtype | None = None) -> Tensor:
    """A table of this module on a device, kept; made outside inference mode, because it may later meet autograd."""
    with torch.inference_mode(False):
        return book().to(device, dtype)


# -- search ----------------------------------------------------------------------------------------------------
def _round_lattice(x: Tensor, weight: Tensor) -> Tensor:
    """Nearest half-integers of even sum under a diagonal metric (Conway and Sloane, IEEE Trans. Inf. Theory 28, 1982):
    round, and when the sum is odd move the coordinate for which that costs least to its second choice."""
    s = x.floor().add_(0.5)
    off = x - s
    odd = s.sum(1).remainder(2) > 0.5
    cheapest = (weight * (1 - 2 * off.abs())).argmin(1, keepdim=True)
    move = torch.where(off.gather(1, cheapest) < 0, -1.0, 1.0) * odd[:, None]
    return s.scatter_add_(1, cheapest, move)


def _signed(rows: Tensor, parity: Tensor, pull: Tensor, negative: Tensor) -> Tensor:
    """Rows of the table with the signs of the target, the cheapest flipped where the sum would be odd.

    rows, [N, C, 8]; parity: bool [N, C], their sums are odd; pull: `weight * |x|`, [N, 8]; negative: x < 0, [N, 8].
    """
    flip = (negative.sum(1) & 1).bool()[:, None] != parity
    cheapest = (pull[:, None] * rows).argmin(2, keepdim=True)
    sign = torch.where(negative, -1.0, 1.0)[:, None].expand_as(rows).clone()
    sign.scatter_(2, cheapest, sign.gather(2, cheapest) * torch.where(flip, -1.0, 1.0)[..., None])
    return rows * sign


def _scan(x: Tensor, weight: Tensor) -> Tensor:
    """Best of the whole table under a diagonal metric; x, weight: [N, 8] -> [N, 8], the shift not yet added."""
    table = _on(magnitudes, x.device)
    odd = table.sum(1).remainder(2) > 0.5
    negative, pull = x < 0, weight * x.abs()
    cheapest = pull[:, :1] * table[:, 0]
    product = torch.empty_like(cheapest)
    for i in range(1, 8):
        torch.minimum(cheapest, torch.mul(pull[:, i : i + 1], table[:, i], out=product), out=cheapest)
    flip = (negative.sum(1) & 1).bool()[:, None] != odd
    cost = torch.addmm(cheapest.mul_(flip), pull, table.T, beta=4, alpha=-2).addmm_(weight, table.square().T)
    best = cost.argmin(1, keepdim=True)
    return _signed(table[best], odd[best], pull, negative)[:, 0]


def _nearest_of(targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Which of several targets lies nearest to E8P, and where, under a diagonal metric.

    targets: [N, C, 8]; weight: [N, 8] -> the nearest point for every target and shift, [N, 2 C, 8], targets varying
    fastest, and its cost [N, 2 C], infinite where it was not looked for because another is better.

    The unrestricted lattice is searched first. Its point bounds what a shift can offer, so the table is scanned only
    where that point lies outside and nothing better is known: on a Gaussian source once for every two groups.
    """
    count, per = len(targets), 2 * targets.shape[1]
    shift = torch.tensor(SHIFTS, device=targets.device).repeat_interleave(targets.shape[1])[None, :, None]
    wide = weight[:, None].expand(-1, per, -1)
    x = torch.cat((targets, targets), 1) - shift
    s = _round_lattice(x.reshape(-1, 8), wide.reshape(-1, 8)).reshape(count, per, 8)
    bound = (wide * (x - s).square()).sum(2)
    cost = bound.masked_fill(_row(s) < 0, torch.inf)
    for everything in (False, True):
        wanted = cost.isinf() & (bound < cost.amin(1, keepdim=True))
        if not everything:  # the most promising alone: it often rules the others out
            first = bound.masked_fill(~wanted, torch.inf).argmin(1, keepdim=True)
            wanted &= torch.zeros_like(wanted).scatter_(1, first, True)
        group, place = wanted.nonzero(as_tuple=True)
        for g, p in zip(group.split(SCAN), place.split(SCAN), strict=True):
            s[g, p] = _scan(x[g, p], weight[g])
            cost[g, p] = (weight[g] * (x[g, p] - s[g, p]).square()).sum(1)
    return s + shift, cost


def _nearest_diagonal(target: Tensor, weight: Tensor) -> Tensor:
    """Exact nearest point under a diagonal metric; target, weight: [N, 8]."""
    points, cost = _nearest_of(target[:, None], weight)
    return _take(points, cost.argmin(1))


def _take(points: Tensor, index: Tensor) -> Tensor:
    """points [N, C, 8], index [N] -> [N, 8]."""
    return points.gather(1, index[:, None, None].expand(-1, 1, 8))[:, 0]


def _candidates(target: Tensor, weight: Tensor, keep: int) -> Tensor:
    """The nearest point under the diagonal metric, then for either shift `keep` rows of the table that come close
    before the sum is made even; target, weight: [N, 8] -> [N, 1 + 2 keep, 8]."""
    table = _on(magnitudes, target.device)
    odd = table.sum(1).remainder(2) > 0.5
    found = [_nearest_diagonal(target, weight)[:, None]]
    for shift in SHIFTS:
        x = target - shift
        pull = weight * x.abs()
        cost = torch.addmm(weight @ table.square().T, pull, table.T, alpha=-2)
        best = cost.topk(keep, dim=1, largest=False, sorted=False).indices
        found.append(_signed(table[best], odd[best], pull, x < 0) + shift)
    return torch.cat(found, 1)


def _cost(target: Tensor, candidates: Tensor, weight: Tensor, metric: Tensor | None) -> Tensor:
    """Of candidates [N, C, 8] for targets [N, 8], under the metric or else the diagonal `weight`: [N, C]."""
    error = candidates - target[:, None]
    return (error * (weight[:, None] * error if metric is None else error @ metric)).sum(2)


@cache
def _monomials() -> Tensor:
    """Of the table's rows, then 1 for those of even sum and 1 for those of odd sum: [46, 256]."""
    odd = magnitudes().sum(1).remainder(2)
    return torch.cat((monomials(magnitudes()), 1 - odd[None], odd[None]))


def _nearest_signed(metric: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The nearest of all points under a metric, for either shift with the signs of what is left of the target or, where the sum
    of a row would be odd with those, with one of them turned. target, weight: [N, 8]."""
    wanted, tried = [], []
    for shift in SHIFTS:
        x = target - shift
        signs = torch.where(x < 0, -1.0, 1.0)
        patterns = torch.cat((signs[:, None], one_turned(signs, weight * x.abs())), 1)
        form = Form.of(metric, x)
        bars = torch.zeros(*patterns.shape[:2], 2, device=x.device)
        odd = (patterns < 0).sum(2) & 1
        bars.scatter_(2, 1 - odd[..., None], BARRED)  # a minus sign changes the sum by an odd number
        wanted.append(torch.cat((form.with_signs(patterns), bars + form.constant[:, None, None]), 2))
        tried.append(patterns)
    patterns = torch.cat(tried, 1)
    row, index = least(torch.cat(wanted, 1), _on(_monomials, target.device))
    shifts = torch.where(index < patterns.shape[1] // 2, *SHIFTS)
    return _on(magnitudes, target.device)[row] * chosen(patterns, index) + shifts[:, None]


# -- codecs ----------------------------------------------------------------------------------------------------
class E8PCodec(BlockCodec[ScaleGrid]):
    """Two bits a weight.

    gaussian_scale: best scale of a standard normal source.
    """

    kind = "vector"
    step = 8
    stacks = True
    gaussian_scale = 0.97
    stretches = (0.8, 0.9, 1.0, 1.1, 1.25)
    fit_groups = 128  # of a row, evenly spread, in the search for its scale

    def __init__(self, name: str, bits: int):
        self.name, self.bits = name, bits

    def for_row(self, in_features: int) -> E8PCodec:
        """This codec with one scale for a row of `in_features` columns."""
        bound = type(self)(self.name, self.bits)
        bound.span = bound.sub = in_features
        return bound

    def bits_per_weight(self, in_features: int) -> float:
        return self.bits + 16.0 / in_features

    # -- the solver's view -------------------------------------------------------------------------------------
    def nearest(
        self, target: Tensor, weight: Tensor, metric: Tensor | None = None, zero: Tensor | None = None
    ) -> Tensor:
        """See BlockCodec. Exact under a diagonal metric for two bits; under others, for two bits, of all points with the signs
        that serve a diagonal one best, for more the best of a short list."""
        target, weight = target.clamp(-LARGEST, LARGEST), weight.expand_as(target)
        if metric is not None:
            return self._under(metric, target, weight)
        chunks = zip(target.split(CHUNK), weight.split(CHUNK), strict=True)
        return torch.cat([self._search(x, w) for x, w in chunks])

    def _search(self, target: Tensor, weight: Tensor) -> Tensor:
        """Of a chunk of targets."""
        return _nearest_diagonal(target, weight)

    def _under(self, metric: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """The nearest point under a metric or one a matrix."""
        return _nearest_signed(metric, target, weight)

    def fit(self, weight: Tensor, importance: Tensor) -> ScaleGrid:
        """Scales [R, 1]: multiples of a row's root mean square are tried on some of its groups, and the least-squares
        scale for the best one's points is kept."""
        stride = max(1, weight.shape[1] // 8 // self.fit_groups)
        a = (importance + importance.mean() * 1e-3 + TINY).reshape(-1, 8)[::stride]
        scales = []
        for part in weight.split(max(1, CHUNK // len(a))):
            x = part.reshape(len(part), -1, 8)[:, ::stride]
            rms = ((a * x * x).sum((1, 2)) / a.sum()).sqrt()
            best, most = torch.zeros_like(rms), torch.full_like(rms, -1.0)
            for stretch in self.stretches:
                scale = (rms * (self.gaussian_scale * stretch)).clamp_min(TINY)
                target = (x / scale[:, None, None]).reshape(-1, 8)
                u = self.nearest(target, a.expand_as(x).reshape(-1, 8)).reshape(x.shape)
                xu, uu = (a * x * u).sum((1, 2)), (a * u * u).sum((1, 2))
                gain = xu * xu / uu
                best, most = torch.where(gain > most, xu / uu, best), torch.maximum(gain, most)
            scales.append(best)
        return ScaleGrid(half(torch.cat(scales))[:, None])

    # -- bytes -------------------------------------------------------------------------------------------------
    def tables(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Values of the codes of every plane, [65536 or 256, 8]: a group's units are their sum."""
        return (_on(e8p_points, device, dtype),)

    def decode_codes(self, *planes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes [..., n / 8], "codes" and for three and four bits "residual" -> units [..., n], exact in half
        precision."""
        tables = self.tables(planes[0].device, dtype)
        values = [table[plane.long() & len(table) - 1] for table, plane in zip(tables, planes, strict=True)]
        return sum(values[1:], values[0]).flatten(-2)

    def encode_units(self, units: Tensor) -> dict[str, Tensor]:
        """Units [m, n] -> the parts "codes" int16 [m, n / 8] and, for three and four bits, "residual" uint8 or int16.

        Raises ValueError for units that no code decodes to.
        """
        return {"codes": e8p_index(units.unflatten(-1, (-1, 8)))}

    def pack(self, units: Tensor, grid: ScaleGrid) -> Packed:
        """The parts of `encode_units` and "scales", float16 [m]."""
        rows, n = units.shape
        some = [self.encode_units(part) for part in units.split(max(1, PACKED // n))]
        codes = {name: torch.cat([parts[name] for parts in some]) for name in some[0]}
        return Packed(self.name, (rows, n), {**codes, "scales": grid.scale[:, 0].half()})

    def unpack(self, packed: Packed) -> Tensor:
        planes = [packed.parts[name] for name in ("codes", "residual") if name in packed.parts]
        return self.decode_codes(*planes) * packed.parts["scales"].float()[:, None]

    def decode_rows(
        self, shape: tuple[int, int], parts: Mapping[str, Tensor], rows: Rows, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See Codec; one look-up for eight columns of a plane."""
        planes = [parts[name][rows] for name in ("codes", "residual") if name in parts]
        # sums of two planes are exact in half precision, but not in bfloat16
        exact = dtype if dtype == torch.bfloat16 and self.info.exact_bfloat16 else torch.float16
        tables = _whole_tables(self, planes[0].device, exact)
        first, *rest = (
            look_up((plane.view(torch.uint16) if plane.dtype == torch.int16 else plane).to(torch.int32), table)
            for plane, table in zip(planes, tables, strict=True)
        )
        for values in rest:
            first += values
        return first.reshape(-1, shape[1]).to(dtype), parts["scales"][rows].float()[:, None]


@cache
def _whole_tables(codec: E8PCodec, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Its tables, kept as whole rows in memory."""
    return tuple(table.contiguous() for table in codec.tables(device, dtype))


class ResidualCodec(E8PCodec):
    """E8P and, `ratio` times finer, a second code for what it leaves.

    Several first codes are tried, with the best second code of each. Coordinates of either point are multiples of 1/4,
    those of the first odd ones; with a ratio p / q, q a power of two, a sum has one decomposition, and half precision
    holds it exactly.
    """

    stretches = (0.88, 0.95, 1.02, 1.09, 1.18)  # the finer the code, the sharper its best scale
    beam: int  # first codes from the table of either shift, besides the nearest one
    ratio: Fraction

    def _second(self, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """targets [N, C, 8], weight [N, 8] -> D C points, targets varying fastest, and their costs, [N, D C]."""
        raise NotImplementedError

    def _under(self, metric: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        if metric.dim() == 3:
            return stack.each(lambda x, w, own: self._under(own, x, w), target, weight, metric)
        chunks = zip(target.split(CHUNK), weight.split(CHUNK), strict=True)
        return torch.cat([self._search(x, w, metric) for x, w in chunks])

    def _search(self, target: Tensor, weight: Tensor, metric: Tensor | None = None) -> Tensor:
        ratio = float(self.ratio)
        first = _candidates(target, weight, self.beam)
        second, cost = self._second((target[:, None] - first) / ratio, weight)
        sums = first.repeat(1, second.shape[1] // first.shape[1], 1) + second * ratio
        if metric is not None:
            cost = _cost(target, sums, weight, metric).masked_fill_(cost.isinf(), torch.inf)
        return _take(sums, cost.argmin(1))

    def _parted(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Units [..., n] -> the points of both stages, [..., n / 8, 8]: with a, b the points in quarters, 4 q u is
        q a + p b, which is q + p b modulo 2 q as a is odd."""
        p, q = self.ratio.numerator, self.ratio.denominator
        whole = (units.unflatten(-1, (-1, 8)) * (4 * q)).round().long()
        b = ((whole - q) * pow(p, -1, 2 * q) + q) % (2 * q) - q
        return (whole - p * b).float() / (4 * q), b.float() / 4


class _E8P3(ResidualCodec):
    gaussian_scale = 1.0
    ratio = Fraction(9, 16)
    beam = 4

    def _second(self, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        book = _on(e8_short_vectors, targets.device)
        pull = (weight[:, None] * targets).flatten(0, 1)
        cost = torch.baddbmm(
            (weight @ book.square().T)[:, None],
            pull.reshape(targets.shape),
            book.T.expand(len(targets), -1, -1),
            alpha=-2,
        )
        least, index = cost.min(2)
        return book[index], least + (weight[:, None] * targets.square()).sum(2)

    def tables(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return *super().tables(device, dtype), _on(e8_short_vectors, device, dtype) * float(self.ratio)

    def encode_units(self, units: Tensor) -> dict[str, Tensor]:
        first, second = self._parted(units)
        book = _on(e8_short_vectors, units.device)
        norms = book.square().sum(1)
        index = torch.cat([(norms - 2 * x @ book.T).argmin(1) for x in second.reshape(-1, 8).split(CHUNK)])
        index = index.reshape(second.shape[:-1])
        if not torch.equal(book[index], second):
            raise ValueError("units are not sums of an E8P point and a short vector")
        return {"codes": e8p_index(first), "residual": index.to(torch.uint8)}


class _E8P4(ResidualCodec):
    gaussian_scale = 1.14
    ratio = Fraction(17, 64)
    beam = 2

    def _second(self, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return _nearest_of(targets, weight)

    def tables(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        points = super().tables(device, dtype)[0]
        return points, points * float(self.ratio)

    def encode_units(self, units: Tensor) -> dict[str, Tensor]:
        first, second = self._parted(units)
        return {"codes": e8p_index(first), "residual": e8p_index(second)}


E8P_CODECS = {"e8p": E8PCodec("e8p", 2), "e8p3": _E8P3("e8p3", 3), "e8p4": _E8P4("e8p4", 4)}
