"""Shared by the ggml lattice codecs: eight columns a step, magnitudes from a table, an even number of minus signs.

The tables are those of the `gguf` package. With sign parity the nearest point under a diagonal metric is exact:
flipping the coordinate whose `importance * |x| * magnitude` is smallest costs least, whatever the scale.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from compress.codecs.base import TINY, BlockCodec, Grid

SHORTLIST = 10  # candidates that the exact metric re-ranks


class LatticeCodec(BlockCodec):
    """`table` names the gguf class whose grid holds the magnitudes: [K, width], width 4 or 8."""

    step = 8
    table: str
    stretches = (0.75, 0.84, 0.93, 1.02, 1.12)

    @cached_property
    def points(self) -> Tensor:
        """Magnitudes, float32 [K, width]."""
        import gguf.quants

        source = getattr(gguf.quants, self.table)
        source.init_grid()
        return torch.from_numpy(source.grid.copy()).float().reshape(source.grid_shape)

    @cached_property
    def _lookup(self) -> tuple[Tensor, Tensor]:
        """Sorted distinct magnitudes, and the table from mixed-radix digits to the row of `points`."""
        levels = self.points.unique()
        digits = torch.bucketize(self.points, levels)
        keys = (digits * self._radix(len(levels))).sum(1)
        table = torch.full((len(levels) ** self.points.shape[1],), -1, dtype=torch.int64)
        table[keys] = torch.arange(len(self.points))
        return levels, table

    def _radix(self, base: int) -> Tensor:
        return base ** torch.arange(self.points.shape[1])

    def index(self, units: Tensor) -> Tensor:
        """float32 units [..., width] -> rows of `points`, int64 [...]."""
        levels, table = self._lookup
        levels, table = levels.to(units.device), table.to(units.device)
        digits = torch.bucketize(units.abs(), levels)
        return table[(digits * self._radix(len(levels)).to(units.device)).sum(-1)]

    def nearest(
        self, target: Tensor, weight: Tensor, metric: Tensor | None = None, zero: Tensor | None = None
    ) -> Tensor:
        points = self.points.to(target.device)
        magnitude = target.abs()
        negative = target < 0
        odd = (negative.sum(1) & 1).bool()
        weight = weight.expand_as(target)
        keep = SHORTLIST if metric is not None else 1
        if points.shape[1] == 8:
            units = self._shortlist(magnitude, weight, negative, odd, keep)
        else:
            units = self._shortlist_halves(magnitude, weight, negative, odd, 4 if keep > 1 else 1)
        if units.shape[1] == 1:
            return units[:, 0]
        error = units - target[:, None]
        cost = ((error @ metric) * error).sum(2)
        return units.gather(1, cost.argmin(1)[:, None, None].expand(-1, 1, 8))[:, 0]

    def _correlations(self, magnitude: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per group and point: sum w m p, sum w p^2 and the cheapest w m p; each [N, K]."""
        points = self.points.to(magnitude.device)
        pull = weight * magnitude
        cheapest = pull[:, :1] * points[:, 0]
        for i in range(1, points.shape[1]):
            torch.minimum(cheapest, pull[:, i : i + 1] * points[:, i], out=cheapest)
        return pull @ points.T, weight @ (points**2).T, cheapest

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

    def _shortlist(self, magnitude: Tensor, weight: Tensor, negative: Tensor, odd: Tensor, keep: int) -> Tensor:
        """The `keep` best points under the diagonal metric, with signs: [N, keep, 8]. Exact for keep = 1; a longer
        list, which is ranked again, is chosen before the price of the flip is added."""
        points = self.points.to(magnitude.device)
        pull = weight * magnitude
        if keep == 1:
            dot, square, cheapest = self._correlations(magnitude, weight)
            best = (square - 2 * (dot - 2 * odd[:, None] * cheapest)).argmin(1, keepdim=True)
        else:
            cost = torch.addmm(weight @ (points**2).T, pull, points.T, alpha=-2)
            best = cost.topk(keep, dim=1, largest=False, sorted=False).indices
        return self._flip(points[best], pull, negative, odd)

    def _shortlist_halves(self, magnitude: Tensor, weight: Tensor, negative: Tensor, odd: Tensor, keep: int) -> Tensor:
        """The same for points of four columns: when parity is off, one of the two halves takes the flip."""
        plain, flipped = [], []
        for half in (slice(0, 4), slice(4, 8)):
            m, w, neg = magnitude[:, half], weight[:, half], negative[:, half]
            dot, square, cheapest = self._correlations(m, w)
            for cost, out, flip in (
                (square - 2 * dot, plain, False),
                (square - 2 * (dot - 2 * cheapest), flipped, True),
            ):
                best = cost.topk(keep, dim=1, largest=False, sorted=True)
                flips = torch.full_like(odd, flip)
                out.append((best.values, self._flip(self.points.to(m.device)[best.indices], w * m, neg, flips)))
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
        best = cost.topk(keep, dim=1, largest=False, sorted=False).indices
        return combo.gather(1, best[..., None].expand(-1, -1, 8))

    # -- scales ------------------------------------------------------------------------------------------------
    def fit(self, weight: Tensor, importance: Tensor) -> Grid:
        rows = weight.shape[0]
        chunk = max(1, (1 << 20) // (weight.shape[1] // 8 * len(self.points)))
        importance = importance + importance.mean() * 1e-3 + TINY
        parts = [self._search(rows_, importance) for rows_ in weight.split(chunk)]
        scale, curvature = (torch.cat(v) for v in zip(*parts, strict=True))
        return self.store(scale.reshape(rows, -1), None, curvature.reshape(rows, -1))

    def _search(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Best scale of every sub-block: stretched maxima, then least squares on the exact nearest points."""
        rows = weight.shape[0]
        groups = weight.reshape(-1, 8)
        a = importance.reshape(1, -1, 8).expand(rows, -1, -1).reshape(-1, 8)
        per_sub = self.sub // 8
        peak = weight.abs().reshape(-1, self.sub).amax(1)
        magnitude, odd = groups.abs(), (((groups < 0).sum(1) & 1).bool())[:, None]
        if self.points.shape[1] == 8:
            dot, square, cheapest = self._correlations(magnitude, a)
            tables = [(dot - 2 * odd * cheapest, square)]
        else:
            tables = [self._correlations(magnitude[:, h], a[:, h])[:2] for h in (slice(0, 4), slice(4, 8))]
        best, best_gain = torch.zeros_like(peak), torch.full_like(peak, -1.0)
        top = float(self.points.max())
        for stretch in self.stretches:
            scale = (peak * (stretch / top)).clamp_min(TINY)
            per_group = scale.repeat_interleave(per_sub)[:, None]
            xu, uu = torch.zeros_like(peak), torch.zeros_like(peak)
            for dot, square in tables:
                pick = (square - (2 / per_group) * dot).argmin(1, keepdim=True)
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
        return best.reshape(rows, -1), uu.reshape(rows, -1)
