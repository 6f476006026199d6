"""Choosing what goes: exact counts from scores, for every pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.weights import Pattern


def lowest(scores: Tensor, count: int) -> Tensor:
    """bool [N, m], True at exactly `count` smallest scores of every row, equal ones from the left. scores: [N, m]."""
    if not count:
        return scores.new_zeros(scores.shape, dtype=torch.bool)
    last = scores.kthvalue(count, dim=1, keepdim=True)[0]
    below, equal = scores < last, scores == last
    return below | (equal & (equal.cumsum(1) <= count - below.sum(1, keepdim=True)))


def kept_by_row(scores: Tensor, pattern: Pattern) -> Tensor:
    """bool [R, n], True where a weight stays: of every row, or of every group of a row, the lowest scores [R, n] go.

    Raises ValueError when groups do not fill the row.
    """
    check_groups(scores.shape[1], pattern)
    if not pattern.of:
        return ~lowest(scores, pattern.pruned(scores.shape[1]))
    return ~lowest(scores.reshape(-1, pattern.of), pattern.of - pattern.keep).reshape(scores.shape)


def check_groups(columns: int, pattern: Pattern) -> None:
    """Raises ValueError when n:m groups do not fill a row of so many columns."""
    if pattern.of and columns % pattern.of:
        raise ValueError(f"{pattern} needs a multiple of {pattern.of} columns, not {columns}")
