"""Shared by the ggml codecs that look several columns up in a table at once. The tables are those of the `gguf` package.

`LatticeCodec`: magnitudes and an even number of minus signs. The nearest point under a diagonal metric is exact:
flipping the coordinate whose `importance * |x| * magnitude` is smallest costs least, whatever the scale.
`FreeSignCodec`: magnitudes and a sign bit for every column. `SignedCodec`: whole points, few enough to try them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from compress.codecs import stack
from compress.codecs.base import BlockCodec
from compress.codecs.forms import CACHED, Form, chosen, least, lowest, monomials, one_turned
from compress.codecs.grid import G
from compress.codecs.scales import TINY
from compress.codecs.tables import Table

SHORTLIST = 10  # candidates that the exact metric re-ranks, where points are pairs from a table


class TableCodec(BlockCodec[G]):
    """`table` names the gguf class whose grid it is: [K, width], width 4 or 8; `signed` says that the grid holds values,
    not magnitudes. Shared here: the table, its index, and the search for scales.
    """

    step = 8
    stacks = True
    table: str
    signed = False
    stretches: tuple[float, ...] = (0.75, 0.84, 0.93, 1.02, 1.12)

    @cached_property
    def points(self) -> Tensor:
        """Magnitudes (values if `signed`), float32 [K, width]."""
        import gguf.quants

        source = getattr(gguf.quants, self.table)
        source.init_grid()
        return torch.from_numpy(source.grid.copy()).float().reshape(source.grid_shape)

    @cached_property
    def _points(self) -> Table:
        return Table(self.points)

    def points_on(self, device: torch.device) -> Tensor:
        """`points` on a device."""
        return self._points.on(device)

    @cached_property
    def _lookup(self) -> tuple[Table, Table, Table]:
        """Sorted distinct magnitudes, the places of their digits, and the table from the numbers that these make to the
        row of `points`."""
        levels = self.points.unique()
        digits = torch.bucketize(self.points, levels)
        radix = len(levels) ** torch.arange(self.points.shape[1])
        keys = (digits * radix).sum(1)
        table = torch.full((len(levels) ** self.points.shape[1],), -1, dtype=torch.int64)
        table[keys] = torch.arange(len(self.points))
        return Table(levels), Table(radix), Table(table)

    @cached_property
    def _monomials(self) -> Table:
        return Table(monomials(self.points))

    def _least(self, form: Form, signs: Tensor) -> Tensor:
        """The point at which a form is least, with any of some signs: [N, C, w] -> [N, w]."""
        point, sign = least(form.with_signs(signs), self._monomials.on(signs.device))
        return self.points_on(signs.device)[point] * chosen(signs, sign)

    def index(self, units: Tensor) -> Tensor:
        """float32 units [..., width] -> rows of `points`, int64 [...]."""
        levels, radix, table = (t.on(units.device) for t in self._lookup)
        digits = torch.bucketize(units if self.signed else units.abs(), levels)
        return table[(digits * radix).sum(-1)]

    # -- scales ------------------------------------------------------------------------------------------------
    def fit(self, weight: Tensor, importance: Tensor) -> G:
        return self.store(*self._wanted(weight, importance))

    def _wanted(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Best scale of every sub-block before it is stored, and what a squared deviation costs; both [R, J]."""
        importance = importance + importance.mean() * 1e-3 + TINY
        blocks = weight.reshape(-1, self.sub)
        a = importance.expand_as(weight).reshape(-1, self.sub)
        chunk = max(1, CACHED // (self.sub // self.step * len(self.points)))
        parts = [self._search(*both) for both in zip(blocks.split(chunk), a.split(chunk), strict=True)]
        scale, curvature = (torch.cat(v).reshape(len(weight), -1) for v in zip(*parts, strict=True))
        return scale, curvature

    def _tables(self, groups: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per independent part of a step: sum w x p and sum w p^2 of every point with its best signs, each [N, K].

        groups, weight: [N, step].
        """
        raise NotImplementedError

    def _starts(self, weight: Tensor, importance: Tensor) -> Iterator[Tensor]:
        """Scales to start the search from, [B]; weight, importance: [B, sub]."""
        peak, top = weight.abs().amax(1), float(self.points.max())
        for stretch in self.stretches:
            yield peak * (stretch / top)

    def _search(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Best scale of every sub-block: a few starts, then least squares on the exact nearest points. weight, importance:
        [B, sub]."""
        groups, a = weight.reshape(-1, self.step), importance.reshape(-1, self.step)
        per_sub = self.sub // self.step
        tables = self._tables(groups, a)
        best = torch.zeros(len(groups) // per_sub, device=weight.device)
        best_gain = torch.full_like(best, -1.0)
        for start in self._starts(weight, importance):
            scale = start.clamp_min(TINY)
            per_group = scale.repeat_interleave(per_sub)[:, None]
            xu, uu = torch.zeros_like(best), torch.zeros_like(best)
            for dot, square in tables:
                pick = lowest(torch.addcmul(square, dot, -2 / per_group))
                xu += dot.gather(1, pick).reshape(-1, per_sub).sum(1)
                uu += square.gather(1, pick).reshape(-1, per_sub).sum(1)
            gain = xu * xu.abs() / uu.clamp_min(TINY)
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best = torch.where(better, xu / uu.clamp_min(TINY), best)
        for _ in range(2):
            per_group = best.clamp_min(TINY).repeat_interleave(per_sub)[:, None]
            u = self.nearest(groups / per_group, a)
            xu = (a * groups * u).reshape(-1, self.sub).sum(1)
            uu = (a * u * u).reshape(-1, self.sub).sum(1).clamp_min(TINY)
            best = (xu / uu).clamp_min(0.0)
        return best, uu


class LatticeCodec(TableCodec[G]):
    """Eight columns a step: magnitudes from a table of width 4 or 8, an even number of minus signs."""

    def nearest(
        self, target: Tensor, weight: Tensor, metric: Tensor | None = None, zero: Tensor | None = None
    ) -> Tensor:
        negative = target < 0
        odd = (negative.sum(1) & 1).bool()
        if self.points.shape[1] == 8:
            if metric is not None:
                return self._under(metric, target, weight, negative, odd)
            return self._nearest(target.abs(), weight.expand_as(target), negative, odd)
        units = self._of_halves(target.abs(), weight.expand_as(target), negative, odd, 1 if metric is None else 4)
        if metric is None:
            return units[:, 0]
        cost = stack.quadratic(units - target[:, None], metric)
        return units.gather(1, cost.argmin(1)[:, None, None].expand(-1, 1, 8))[:, 0]

    def _under(self, metric: Tensor, target: Tensor, weight: Tensor, negative: Tensor, odd: Tensor) -> Tensor:
        """The nearest of all points under a metric, with the signs of the target, one of them turned where their number is odd."""
        form, signs = Form.of(metric, target), torch.where(negative, -1.0, 1.0)
        turned = one_turned(signs, weight * target.abs())
        units = torch.empty_like(target)
        for at, patterns in ((~odd, signs[:, None]), (odd, turned)):
            rows = at.nonzero()[:, 0]
            units[rows] = self._least(form.rows(rows), patterns[rows])
        return units

    def _tables(self, groups: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
        magnitude = groups.abs()
        if self.points.shape[1] == 8:
            return [self._exact(magnitude, weight, ((groups < 0).sum(1) & 1).bool())]
        points, pull = self.points_on(groups.device), weight * magnitude
        halves = (slice(0, 4), slice(4, 8))
        return [(pull[:, h] @ points.T, weight[:, h] @ (points**2).T) for h in halves]

    def _exact(self, magnitude: Tensor, weight: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
        """Per group and point of eight columns: sum w x p with the signs that serve best, and sum w p^2; each [N, K]."""
        points = self.points_on(magnitude.device)
        pull = weight * magnitude
        dot, square = pull @ points.T, weight @ (points**2).T
        flipped = odd.nonzero()[:, 0]
        if len(flipped):  # the others have an even number of minus signs as they are
            dot.index_add_(0, flipped, self._cheapest(pull[flipped]), alpha=-2)
        return dot, square

    def _cheapest(self, pull: Tensor) -> Tensor:
        """The smallest pull times coordinate of every point, [N, w] -> [N, K]."""
        points = self.points_on(pull.device)
        cheapest = pull[:, :1] * points[:, 0]
        product = torch.empty_like(cheapest)
        for i in range(1, points.shape[1]):
            torch.minimum(cheapest, torch.mul(pull[:, i : i + 1], points[:, i], out=product), out=cheapest)
        return cheapest

    def _correlations(self, magnitude: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per group and point: sum w m p, sum w p^2 and the cheapest w m p; each [N, K]."""
        points = self.points_on(magnitude.device)
        pull = weight * magnitude
        return pull @ points.T, weight @ (points**2).T, self._cheapest(pull)

    @staticmethod
    def _flip(points: Tensor, pull: Tensor, negative: Tensor, flip: Tensor) -> Tensor:
        """Signed points: the signs of the target, with the cheapest coordinate flipped where `flip`.

        points: [N, C, w]; pull: [N, w]; negative: [N, w]; flip: [N] or [N, C] bool.
        """
        flip = flip[:, None].expand(points.shape[:2]) if flip.dim() == 1 else flip
        cheapest = (pull[:, None] * points).argmin(2, keepdim=True)
        sign = torch.where(negative, -1.0, 1.0)[:, None].expand_as(points).clone()
        sign.scatter_(2, cheapest, sign.gather(2, cheapest) * torch.where(flip, -1.0, 1.0)[..., None])
        return points * sign

    def _nearest(self, magnitude: Tensor, weight: Tensor, negative: Tensor, odd: Tensor) -> Tensor:
        """The nearest point under the diagonal metric, with signs: [N, 8]. Exact."""
        dot, square = self._exact(magnitude, weight, odd)
        best = lowest(square.sub_(dot, alpha=2))
        return self._flip(self.points_on(magnitude.device)[best], weight * magnitude, negative, odd)[:, 0]

    def _of_halves(self, magnitude: Tensor, weight: Tensor, negative: Tensor, odd: Tensor, keep: int) -> Tensor:
        """Good points under the diagonal metric whose halves come from the table, with signs: [N, C, 8], of the `keep` best of
        either half; when parity is off, one of the two halves takes the flip. One, the nearest, for keep = 1."""
        plain: list[tuple[Tensor, Tensor]] = []
        flipped: list[tuple[Tensor, Tensor]] = []
        for half in (slice(0, 4), slice(4, 8)):
            m, w, neg = magnitude[:, half], weight[:, half], negative[:, half]
            dot, square, cheapest = self._correlations(m, w)
            for cost, out, flip in (
                (square - 2 * dot, plain, False),
                (square - 2 * (dot - 2 * cheapest), flipped, True),
            ):
                best = cost.topk(keep, dim=1, largest=False, sorted=True)
                flips = torch.full_like(odd, flip)
                out.append((best.values, self._flip(self.points_on(m.device)[best.indices], w * m, neg, flips)))
        combos, costs = [], []
        for first, second, wanted in (
            (plain[0], plain[1], ~odd),
            (flipped[0], plain[1], odd),
            (plain[0], flipped[1], odd),
        ):
            cost = first[0][:, :, None] + second[0][:, None, :]
            costs.append((cost + torch.where(wanted, 0.0, torch.inf)[:, None, None]).flatten(1))
            a = first[1][:, :, None].expand(-1, -1, keep, -1)
            b = second[1][:, None].expand(-1, keep, -1, -1)
            combos.append(torch.cat((a, b), dim=3).flatten(1, 2))
        cost, combo = torch.cat(costs, 1), torch.cat(combos, 1)
        keep = min(keep * keep, SHORTLIST)
        chosen = cost.topk(keep, dim=1, largest=False, sorted=False).indices
        return combo.gather(1, chosen[..., None].expand(-1, -1, 8))


class FreeSignCodec(TableCodec[G]):
    """Magnitudes from a table as wide as the step, and a stored sign for every column."""

    # Few points lie near the corner, so rows without outliers are better off further inside.
    stretches = (0.75, 0.84, 0.93, 1.02, 1.12, 1.25, 1.4, 1.6, 1.9, 2.3)

    def nearest(
        self, target: Tensor, weight: Tensor, metric: Tensor | None = None, zero: Tensor | None = None
    ) -> Tensor:
        magnitude, sign = target.abs(), torch.where(target < 0, -1.0, 1.0)
        pull = weight * magnitude
        if metric is None:
            points = self.points_on(target.device)
            square = weight @ (points**2).T  # [K] or [N, K]
            return points[lowest(torch.addmm(square, pull, points.T, alpha=-2))[:, 0]] * sign
        # The coordinate nearest zero may do better on the other side.
        least = pull.argmin(1, keepdim=True)
        other = sign.scatter(1, least, -sign.gather(1, least))
        return self._least(Form.of(metric, target), torch.stack((sign, other), dim=1))

    def _tables(self, groups: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
        points = self.points_on(groups.device)
        return [((weight * groups.abs()) @ points.T, weight @ (points**2).T)]


class SignedCodec(TableCodec[G]):
    """Points that already have their signs; the nearest one is exact under any metric."""

    signed = True
    stretches = (0.85, 1.0, 1.15)

    def nearest(
        self, target: Tensor, weight: Tensor, metric: Tensor | None = None, zero: Tensor | None = None
    ) -> Tensor:
        if metric is not None and metric.dim() == 3:
            return stack.each(self.nearest, target, weight, metric)
        points = self.points_on(target.device)
        chunk = max(1, (1 << 21) // len(points))
        if metric is not None:
            square, pull = ((points @ metric) * points).sum(1), target @ metric
        else:
            square, pull = None, target * weight
        weights = weight.expand_as(target)
        out = torch.empty_like(target)
        for i in range(0, len(target), chunk):
            at = slice(i, i + chunk)
            constant = weights[at] @ (points**2).T if square is None else square
            out[at] = points[lowest(torch.addmm(constant, pull[at], points.T, alpha=-2))[:, 0]]
        return out

    def _tables(self, groups: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
        points = self.points_on(groups.device)
        return [((weight * groups) @ points.T, weight @ (points**2).T)]

    def _starts(self, weight: Tensor, importance: Tensor) -> Iterator[Tensor]:
        scale = ternary_scale(weight, importance)[0]
        for stretch in self.stretches:
            yield scale * stretch


def ternary_scale(weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The scale s that minimises sum a (x - s u)^2 over all u in {-1, 0, 1}, and sum a u^2 for it; both [...].

    weight, importance: [..., n]. Exact: for any s the nonzero u are the largest |x|, so there are n choices; each has
    s = sum a |x| / sum a and explains (sum a |x|)^2 / sum a, summed over what is not zero.
    """
    magnitude, order = weight.abs().sort(dim=-1, descending=True)
    a = importance.expand_as(weight).gather(-1, order)
    pull, curvature = (a * magnitude).cumsum(-1), a.cumsum(-1)
    best = (pull * (pull / curvature.clamp_min(TINY))).argmax(-1, keepdim=True)
    pull, curvature = pull.gather(-1, best)[..., 0], curvature.gather(-1, best)[..., 0]
    return pull / curvature.clamp_min(TINY), curvature
