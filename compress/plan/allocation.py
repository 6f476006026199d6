"""How a budget of bytes is shared out by what a survey found: shares of many matrices, sparsities of layers.

Bytes are those of 16-bit storage. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isfinite

import numpy as np

CELLS = 20_000  # of the knapsack's grid


def pooled_shares(
    spectra: Sequence[Sequence[float]], shapes: Sequence[tuple[int, int]], share: float, low: float, high: float
) -> list[float]:
    """Every matrix's share of its own 16-bit bytes, from one pool of singular values (COMPOT, arXiv 2602.15200: its
    one-shot global allocation).

    spectra: the singular values of every original weight; shapes: (m, n) of each. Values are divided by the root of
    the sum of squares of their matrix and pooled; the smallest go, and the share of a matrix's values that stays,
    clamped to [low, high], is its share of bytes. One is the most: such a matrix stays dense, which high >= 1 allows.

    A unit is what one singular value of a matrix costs, `2mn / len(spectrum)` bytes. Values go one by one, so the bytes
    that are kept are within `share` of all, and less than the largest unit below it. Raises ValueError when `share` is
    not within the guards.
    """
    if not 0 < low <= share <= high:
        raise ValueError(f"a share of {share:g} is not within the guards {low:g} to {high:g}")
    high = min(high, 1.0)
    lengths = np.array([len(s) for s in spectra])
    sizes = np.array([2.0 * m * n for m, n in shapes])
    owner = np.repeat(np.arange(len(spectra)), lengths)
    order = np.argsort(np.concatenate([_normalised(s) for s in spectra]), kind="stable")
    budget = share * sizes.sum() * (1 + 1e-12)

    def shares(removed: int) -> np.ndarray:
        kept = lengths - np.bincount(owner[order[:removed]], minlength=len(spectra))
        return np.clip(kept / lengths, low, high)

    few, many = 0, len(order)  # what is removed: the least that meets the budget
    while few < many:
        middle = (few + many) // 2
        if shares(middle) @ sizes <= budget:
            many = middle
        else:
            few = middle + 1
    return [float(x) for x in shares(few)]


def _normalised(spectrum: Sequence[float]) -> np.ndarray:
    values = np.asarray(spectrum, dtype=np.float64)
    norm = np.linalg.norm(values)
    return values / norm if norm > 0 else values


def knapsack(costs: Sequence[Sequence[float]], bytes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """One choice for every matrix, of least total cost within `budget` bytes: indices (ROCKET, arXiv 2602.11008: a
    multiple-choice knapsack by dynamic programming).

    costs, bytes: of every choice of every matrix; one whose cost is not finite is never taken. Bytes above each matrix's
    smallest choice are counted in cells of a grid, rounded up, so the budget holds; exact where all of them fit the grid
    as they are. What rounding left over buys the upgrades that save most for each byte. Raises ValueError when no
    combination fits.
    """
    choices = [_frontier(c, b) for c, b in zip(costs, bytes, strict=True)]
    if not all(choices):
        raise ValueError(f"matrix {choices.index([])} has no choice of finite cost")
    spare = budget - sum(options[0][0] for options in choices)
    if spare < 0:
        raise ValueError(f"the smallest choices need {budget - spare} bytes of {budget}")
    # more room than the largest choices can use only coarsens the grid
    spare = min(spare, sum(options[-1][0] - options[0][0] for options in choices))
    steps = [[size - options[0][0] for size, _, _ in options] for options in choices]
    cell = _cell(steps, spare)
    best = np.zeros(spare // cell + 1)
    taken = []
    for options, above in zip(choices, steps, strict=True):
        candidates = np.full((len(options), len(best)), np.inf)
        for row, (_, cost, _), extra in zip(candidates, options, above, strict=True):
            offset = -(-extra // cell)
            if offset < len(best):
                row[offset:] = best[: len(best) - offset] + cost
        taken.append(candidates.argmin(0).astype(np.int16))
        best = candidates.min(0)
    at, picked = len(best) - 1, []
    for above, rows in zip(reversed(steps), reversed(taken), strict=True):
        picked.append(int(rows[at]))
        at -= -(-above[picked[-1]] // cell)
    picked.reverse()
    _spend(choices, picked, budget)
    return [options[i][2] for options, i in zip(choices, picked, strict=True)]


def _frontier(costs: Sequence[float], sizes: Sequence[int]) -> list[tuple[int, float, int]]:
    """(bytes, cost, index) of the choices that no smaller one beats, by rising bytes and falling cost."""
    frontier: list[tuple[int, float, int]] = []
    for size, cost, index in sorted(zip(sizes, costs, range(len(costs)), strict=True)):
        if isfinite(cost) and (not frontier or cost < frontier[-1][1]):
            frontier.append((size, cost, index))
    return frontier


def _cell(steps: Sequence[Sequence[int]], spare: int) -> int:
    """Bytes of a cell: the largest that divides every step, or as many as make the grid fit CELLS."""
    common = int(np.gcd.reduce([step for above in steps for step in above])) or 1
    return common if spare // common < CELLS else ceil(spare / CELLS)


def _spend(choices: Sequence[Sequence[tuple[int, float, int]]], picked: list[int], budget: int) -> None:
    """Upgrade `picked` while something fits into the bytes that are left, the best saving for a byte first."""
    left = budget - sum(options[i][0] for options, i in zip(choices, picked, strict=True))
    while True:
        upgrades = [
            ((options[now][1] - options[to][1]) / (options[to][0] - options[now][0]), which, to)
            for which, (options, now) in enumerate(zip(choices, picked, strict=True))
            for to in range(now + 1, len(options))
            if options[to][0] - options[now][0] <= left
        ]
        if not upgrades:
            return
        _, which, to = max(upgrades)
        left -= choices[which][to][0] - choices[which][picked[which]][0]
        picked[which] = to


def outlier_weighted(
    outlier_ratios: Sequence[float], weights: Sequence[int], sparsity: float, spread: float = 0.08
) -> list[float]:
    """A sparsity for every layer, falling linearly with its share of outliers (OWL, arXiv 2310.05175).

    outlier_ratios: of each layer, the share of `|W| |x|` far above their mean; weights: its parameters. The mean,
    weighted by them, is `sparsity`; the layer furthest from it is `spread` away, less where that would leave [0, 1).
    Raises ValueError for a sparsity outside [0, 1) or a negative spread.
    """
    if not 0 <= sparsity < 1 or spread < 0:
        raise ValueError(f"a sparsity of {sparsity:g} with a spread of {spread:g} is impossible")
    ratios = np.asarray(outlier_ratios, dtype=np.float64)
    below = ratios - np.average(ratios, weights=weights)
    peak, lowest, highest = np.abs(below).max(), below.max(), -below.min()
    if peak <= 1e-12 * np.abs(ratios).max():
        return [sparsity] * len(ratios)
    slope = min(spread / peak, sparsity / lowest, (1 - sparsity) * (1 - 1e-9) / highest)
    return [max(float(x), 0.0) for x in sparsity - slope * below]
