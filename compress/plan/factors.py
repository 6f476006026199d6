"""Sizes of the factors of one matrix: a dictionary and coefficients. Bytes are those of 16-bit storage. No torch."""

from __future__ import annotations

from functools import lru_cache
from math import ceil, log

RATIO_SLACK = 0.1  # how far k / s may stray from the wanted ratio to use a budget up
KNAPSACK_SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of a matrix's bytes to choose from, beside all of them


def factor_bytes(m: int, n: int, k: int, s: int, sparse: bool) -> int:
    """Bytes of a dictionary [k, n] and of s coefficients for each of m rows in 16 bits, sparse ones with a bitmask of k
    bits, rounded up to bytes, for every row."""
    return 2 * k * n + 2 * m * s + (m * ceil(k / 8) if sparse else 0)


@lru_cache(maxsize=4096)
def factor_sizes(m: int, n: int, share: float, k_over_s: float, sparse: bool) -> tuple[int, int] | None:
    """The (k, s) that use up `share` of a 16-bit matrix [m, n], never more: factor_bytes(m, n, k, s) <= share * 2mn.

    Sparse: s <= k <= n. Of the k whose k / s lies within 10 % of the nearest to k_over_s that the budget allows, the
    one that leaves fewest bytes; so where a complete dictionary, k = n, costs less than its part, the rest goes to s.
    Not sparse: the largest s = k <= min(m, n), whatever the ratio. None when nothing fits, and for a share of one or
    more: the matrix itself is then as small, and exact.
    """
    if share >= 1:
        return None
    budget = int(share * 2 * m * n)
    if not sparse:
        k = min(budget // (2 * (m + n)), m, n)
        return (k, k) if k >= 1 else None
    fitting = []
    for k in range(1, n + 1):
        s = min(k, (budget - factor_bytes(m, n, k, 0, True)) // (2 * m))
        if s < 1:
            continue
        fitting.append((abs(log(k / s / k_over_s)), budget - factor_bytes(m, n, k, s, True), k, s))
    if not fitting:
        return None
    nearest = min(fitting)[0]
    _, _, k, s = min((f for f in fitting if f[0] <= nearest + log(1 + RATIO_SLACK)), key=lambda f: (f[1], f[0]))
    return k, s
