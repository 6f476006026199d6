"""Block coordinate descent on tr((W-Q) H (W-Q)^T): codes, or what a mask keeps. The objective never rises.

Feedback never looks back; here every step of columns moves to its optimum given all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.codecs import stack
from compress.codecs.base import BlockCodec
from compress.codecs.grid import Grid
from compress.solvers.feedback import BLOCK, Columns, importance

WIDTH = 32  # columns that sweeps over floats take at a time, at least

Move = Callable[[slice, Tensor, Tensor, Tensor], Tensor]
"""(columns, present values [step, R], minus half the gradient there, curvature [B, step, step]) -> new values."""

Settle = Callable[[Tensor, slice], Tensor]
"""(wanted values [m, R], columns) -> the storable values nearest to them."""


@dataclass(frozen=True)
class Exchanges:
    """How often, before its columns are swept, each group of `group` columns of each row revives a pruned weight in place
    of the kept one that is cheapest to drop, where that lowers the objective."""

    times: int = 0
    group: int = BLOCK


NO_EXCHANGES = Exchanges()


def descend(weight: Tensor, values: Tensor, hessian: Tensor, step: int, move: Move) -> None:
    """One pass over all columns. weight, values: float32 [n, R], the latter moved in place; hessian: [n, n], or [B, n, n] of B
    matrices whose rows are stacked."""
    n, block = len(values), max(BLOCK // step, 1) * step
    hessian = stack.stacked(hessian)
    pull = stack.before(hessian, weight - values)  # minus half the gradient
    for start in range(0, n, block):
        stop = min(start + block, n)
        moved = torch.zeros_like(values[start:stop])
        for i in range(start, stop, step):
            at = slice(i, min(i + step, stop))
            value = move(at, values[at], pull[at], hessian[:, at, at])
            delta = value - values[at]
            values[at] = value
            moved[i - start : at.stop - start] = delta
            stack.take_off(pull[i:stop], hessian[:, i:stop, at].mT, delta)
        stack.take_off(pull[:start], hessian[:, :start, start:stop].mT, moved)
        stack.take_off(pull[stop:], hessian[:, stop:, start:stop].mT, moved)


def sweep_codes(weight: Tensor, units: Tensor, grid: Grid, hessian: Tensor, codec: BlockCodec) -> Tensor:
    """One pass in which every step of columns takes the codes nearest its optimum. weight, units: [R, n] -> [R, n]; hessian as in
    `descend`."""
    rows, n = weight.shape
    hessian = stack.stacked(hessian)
    columns = Columns(codec, grid, torch.arange(n, device=weight.device).expand(len(hessian), n))
    single = stack.spread(hessian.diagonal(dim1=1, dim2=2), rows)
    quantized = codec.decode(units, grid).T.contiguous()
    units = units.T.contiguous()

    def move(at: slice, present: Tensor, pull: Tensor, curve: Tensor) -> Tensor:
        if codec.step == 1:
            units[at], value = columns.quantize(present + pull / single[at], at, single[at].T, None)
            return value
        wanted = present + _solved(curve, pull)
        new_units, value = columns.quantize(wanted, at, *importance(curve, rows))
        # the codec's search may miss the present point: keep it where it is better
        new, old = value - wanted, present - wanted
        before, after = ((error * stack.before(curve, error)).sum(0) for error in (old, new))
        worse = _per_tile(after, codec) > _per_tile(before, codec)
        units[at], value = torch.where(worse, units[at], new_units), torch.where(worse, present, value)
        return value

    descend(weight.T, quantized, hessian, codec.step, move)
    return units.T.contiguous()


def _solved(curve: Tensor, pull: Tensor) -> Tensor:
    """curve^-1 pull, of every matrix: [B, step, step], [step, R] -> [step, R]."""
    if len(curve) == 1:
        return torch.linalg.solve(curve[0], pull)
    return torch.linalg.solve(curve, pull.unflatten(1, (len(curve), -1)).transpose(0, 1)).transpose(0, 1).flatten(1)


def _per_tile(cost: Tensor, codec: BlockCodec) -> Tensor:
    """Cost of every row [R] -> of all rows that are coded together with it, [R]."""
    if codec.rows == 1:
        return cost
    return cost.reshape(-1, codec.rows).sum(1).repeat_interleave(codec.rows)


def sweep_kept(
    weight: Tensor,
    values: Tensor,
    mask: Tensor,
    hessian: Tensor,
    *,
    exchanges: Exchanges = NO_EXCHANGES,
    settle: Settle = lambda wanted, at: wanted,
) -> None:
    """One pass in which every kept weight moves to its optimum, column by column.

    weight, values, mask: [n, R], the latter two changed in place; hessian: [n, n]; settle: the storable value nearest a
    wanted one, by default itself.
    """

    def move(at: slice, present: Tensor, pull: Tensor, curve: Tensor) -> Tensor:
        value, pull, kept = present.clone(), pull.clone(), mask[at]
        (curve,) = curve  # a mask is of one matrix

        def change(part: slice, delta: Tensor) -> None:
            value[part] += delta
            pull.addmm_(curve[:, part], delta, alpha=-1)

        for low in range(0, len(value), exchanges.group):
            here = slice(low, min(low + exchanges.group, len(value)))
            there = slice(at.start + here.start, at.start + here.stop)
            for _ in range(exchanges.times):
                change(here, _exchange(value[here], pull[here], kept[here], curve[here, here], settle, there))
            for i in range(here.start, here.stop):
                one = slice(i, i + 1)
                wanted = settle(value[one] + pull[one] / curve[i, i], slice(at.start + i, at.start + i + 1))
                change(one, torch.where(kept[one], wanted - value[one], 0.0))
        return value

    descend(weight, values, hessian, -(-WIDTH // exchanges.group) * exchanges.group, move)


def _exchange(value: Tensor, pull: Tensor, kept: Tensor, curve: Tensor, settle: Settle, at: slice) -> Tensor:
    """Steps [m, R] that drop one kept weight of each row and revive one pruned one, where that gains; kept is updated.

    With p minus half the gradient, dropping i costs 2 q_i p_i + q_i^2 H_ii and leaves p_j' = p_j + q_i H_ij; reviving j
    at v, storable and near p_j' / H_jj, then gains 2 v p_j' - v^2 H_jj.
    """
    diagonal = curve.diagonal()[:, None]
    cost, drop = torch.where(kept, value * (2 * pull + value * diagonal), torch.inf).min(0, keepdim=True)
    dropped = value.gather(0, drop)
    pull = pull + dropped * curve[drop[0]].T
    revived = settle(pull / diagonal, at)
    gain, revive = torch.where(kept, -torch.inf, revived * (2 * pull - revived * diagonal)).max(0, keepdim=True)
    better = gain > cost
    kept.scatter_(0, drop, kept.gather(0, drop) & ~better)
    kept.scatter_(0, revive, kept.gather(0, revive) | better)
    step = torch.zeros_like(value).scatter_(0, drop, torch.where(better, -dropped, 0.0))
    return step.scatter_add_(0, revive, torch.where(better, revived.gather(0, revive), 0.0))
