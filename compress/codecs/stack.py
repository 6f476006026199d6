"""Matrices of one shape side by side, as solvers and codecs see them: rows stacked, each with a gram of its own.

B matrices [R, n] are one of [B R, n] or, columns first, [n, B R]; what belongs to a matrix as a whole is [B, n, n]. Everything that
works on rows is blind to where one matrix ends; only products with the grams are not, and they are here. One matrix alone is
multiplied as such, and several one by one on the CPU, so that stacking changes no digit there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def stacked(gram: Tensor) -> Tensor:
    """A gram [n, n] as a stack of one, a stack as it is."""
    return gram if gram.dim() == 3 else gram[None]


def times(rows: Tensor, grams: Tensor) -> Tensor:
    """Every row with its own matrix's gram: rows [B R, k], grams [B, k, j] -> [B R, j]."""
    if len(grams) == 1:
        return rows @ grams[0]
    if rows.device.type == "cpu":
        return torch.cat([part @ gram for part, gram in zip(rows.chunk(len(grams)), grams, strict=True)])
    return (rows.unflatten(0, (len(grams), -1)) @ grams).flatten(0, 1)


def before(grams: Tensor, columns: Tensor) -> Tensor:
    """The same from the left: grams [B, j, k], columns [k, B R] -> [j, B R]."""
    if len(grams) == 1:
        return grams[0] @ columns
    if columns.device.type == "cpu":
        return torch.cat([gram @ part for gram, part in zip(grams, columns.chunk(len(grams), 1), strict=True)], 1)
    return (grams @ _apart(columns, grams)).transpose(0, 1).flatten(1)


def take_off(columns: Tensor, grams: Tensor, change: Tensor) -> None:
    """columns -= grams^T change, in place. columns: [j, B R]; grams: [B, k, j]; change: [k, B R]."""
    if len(grams) == 1:
        columns.addmm_(grams[0].T, change, alpha=-1)
    else:  # on the CPU a loop over the matrices within torch, since what is changed is no contiguous batch
        _apart(columns, grams).baddbmm_(grams.mT, _apart(change, grams), alpha=-1)


def spread(values: Tensor, rows: int) -> Tensor:
    """Numbers of every matrix's columns beside its rows: [B, n] -> [n, B R], or [n, 1] for one matrix."""
    return values.T if len(values) == 1 else values.T.repeat_interleave(rows // len(values), 1)


def in_order(columns: Tensor, order: Tensor) -> Tensor:
    """columns [n, B R] with those of each matrix in its own order, [B, n]."""
    if len(order) == 1:
        return columns[order[0]]
    wide = columns.unflatten(1, (len(order), -1))
    return wide.gather(0, order.T[..., None].expand_as(wide)).flatten(1)


def quadratic(error: Tensor, metric: Tensor) -> Tensor:
    """e M e^T of every candidate: error [N, C, step]; metric [step, step], or [B, step, step], one for every N / B of the N."""
    if metric.dim() == 2:
        return ((error @ metric) * error).sum(2)
    turned = torch.cat([part @ own for part, own in zip(error.chunk(len(metric)), metric, strict=True)])
    return (turned * error).sum(2)


def each(nearest: Callable[[Tensor, Tensor, Tensor], Tensor], target: Tensor, weight: Tensor, metric: Tensor) -> Tensor:
    """`nearest` asked for every matrix by itself: target, weight [N, step] and metric [B, step, step] in B parts."""
    parts = zip(target.chunk(len(metric)), weight.expand_as(target).chunk(len(metric)), metric, strict=True)
    return torch.cat([nearest(*part) for part in parts])


def _apart(columns: Tensor, grams: Tensor) -> Tensor:
    """[k, B R] as a view [B, k, R]."""
    return columns.unflatten(1, (len(grams), -1)).transpose(0, 1)
