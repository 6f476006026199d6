"""The nearest of a table's points under a metric, as one product: (u - t) M (u - t)^T is linear in the coordinates of u and in their
products two at a time, so a row of coefficients for every target times a column of these for every point is the cost of all pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.codecs import stack

CACHED = 1 << 17  # costs of points at a time: a few such tables stay in a core's cache
TURNS = 3  # columns whose sign may be the one that turns; all eight take off another 0.02% of the error
STRIDE = 8


@dataclass(frozen=True)
class Form:
    """(u - t) M (u - t)^T for targets t as a function of u: constant [N], linear [N, w], quadratic [N or 1, w (w + 1) / 2] of
    u_i u_j."""

    constant: Tensor
    linear: Tensor
    quadratic: Tensor

    @classmethod
    def of(cls, metric: Tensor, target: Tensor) -> Form:
        """metric: [w, w], or [B, w, w] for a part each of the targets [N, w]."""
        metrics, (i, j) = stack.stacked(metric), torch.triu_indices(*metric.shape[-2:], device=metric.device)
        upper = metrics[:, i, j] * torch.where(i == j, 1.0, 2.0)
        rows = len(target) // len(metrics)
        turned = stack.times(target, metrics)
        constant = (turned * target).sum(1)
        return cls(constant, -2 * turned, upper.repeat_interleave(rows, 0) if len(upper) > 1 else upper)

    def rows(self, at: Tensor) -> Form:
        """Of some targets, int64 [k]."""
        quadratic = self.quadratic[at] if len(self.quadratic) > 1 else self.quadratic
        return Form(self.constant[at], self.linear[at], quadratic)

    def with_signs(self, signs: Tensor) -> Tensor:
        """Its coefficients for |u| where u has these signs [N, C, w]: [N, C, w + w (w + 1) / 2]."""
        i, j = torch.triu_indices(*[signs.shape[2]] * 2, device=signs.device)
        both = signs[..., i] * signs[..., j]
        return torch.cat((self.linear[:, None] * signs, self.quadratic[:, None] * both), dim=2)


def monomials(points: Tensor) -> Tensor:
    """Of every point [K, w] its coordinates, then the products of two of them: [w + w (w + 1) / 2, K]."""
    i, j = torch.triu_indices(*[points.shape[1]] * 2)
    return torch.cat((points, points[:, i] * points[:, j]), 1).T.contiguous()


def least(wanted: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Which point costs least, and with which of C patterns of signs: coefficients [N, C, F], table [F, K] -> int64 [N], [N]."""
    picks, costs = [], []
    for part in wanted.flatten(0, 1).split(max(1, CACHED // table.shape[1])):
        cost = part @ table
        picks.append(lowest(cost))
        costs.append(cost.gather(1, picks[-1]))
    pick, cost = (torch.cat(parts).view(wanted.shape[:2]) for parts in (picks, costs))
    best = cost.argmin(1, keepdim=True)
    return pick.gather(1, best)[:, 0], best[:, 0]


def chosen(patterns: Tensor, index: Tensor) -> Tensor:
    """One of each target's patterns: [N, C, w], int64 [N] -> [N, w]."""
    return patterns.gather(1, index[:, None, None].expand(-1, 1, patterns.shape[2]))[:, 0]


def one_turned(signs: Tensor, price: Tensor) -> Tensor:
    """Signs [N, w] with one of them turned, of TURNS columns with the lowest price [N, w]: [N, TURNS, w]."""
    cheapest = price.topk(TURNS, dim=1, largest=False, sorted=False).indices[..., None]
    patterns = signs[:, None].expand(-1, TURNS, -1).clone()
    return patterns.scatter_(2, cheapest, -patterns.gather(2, cheapest))


def lowest(cost: Tensor, keep: int = 1) -> Tensor:
    """The places of the `keep` lowest costs of every row, in no order: [N, K] -> int64 [N, keep].

    The minima of every STRIDE-th cost are vectorized, as argmin and topk are not; the `keep` lowest lie in the `keep`
    classes with the lowest minima, so that only these are looked through.
    """
    classes = cost.shape[1] // STRIDE
    if cost.shape[1] % STRIDE or classes < 2 * keep:
        return cost.argmin(1, keepdim=True) if keep == 1 else cost.topk(keep, 1, largest=False, sorted=False).indices
    table = cost.view(-1, STRIDE, classes)
    minima = table.amin(1)
    if keep == 1:
        place = minima.argmin(1, keepdim=True)
        return table.gather(2, place[:, None].expand(-1, STRIDE, 1))[..., 0].argmin(1, keepdim=True) * classes + place
    places = minima.topk(keep, 1, largest=False, sorted=False).indices
    near = table.gather(2, places[:, None].expand(-1, STRIDE, keep)).flatten(1)
    found = near.topk(keep, 1, largest=False, sorted=False).indices
    return found // keep * classes + places.gather(1, found % keep)
