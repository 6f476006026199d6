"""Documents that changed sides between an original and its variant: what a change of accuracy hides.

An accuracy that stays can hide as many answers lost as gained. Counted over the very same documents, by the definition of
"Accuracy is not all you need" (arXiv 2407.09141): a flip is an answer that went from right to wrong or from wrong to right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from compress.scoring.intervals import Interval
from compress.scoring.results import Flips

_Z = 1.959963984540054  # 97.5% quantile of the normal distribution


def flips(
    before: np.ndarray,
    after: np.ndarray,
    answers: tuple[Sequence[str], Sequence[str]] | None = None,
) -> Flips:
    """before, after: right or not, bool [n] each, n > 0, of the same documents in the same order; answers: what was
    answered, before and after, where that is known. ValueError where the documents are not as many."""
    if before.shape != after.shape:
        raise ValueError(f"flips need the same documents, got {before.shape} and {after.shape}")
    changed = None if answers is None else share(np.array([a != b for a, b in zip(*answers, strict=True)]))
    return Flips(n=len(before), lost=share(before & ~after), gained=share(~before & after), changed=changed)


def share(member: np.ndarray) -> Interval:
    """The share of true ones in bool [n], n > 0, with Wilson's interval."""
    count = int(member.sum())
    return Interval(count / len(member), *wilson(count, len(member)))


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Wilson's 95% score interval for a proportion; count > 0."""
    share, z2 = successes / count, _Z**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    # at 0 and at `count` successes the bound is exactly 0 and 1; rounding must not step past the estimate
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


def paired_change(before: np.ndarray, after: np.ndarray) -> Interval:
    """Share of right ones after less that before, bool [n] each of the same documents.

    Agresti and Min's adjusted Wald interval for matched pairs (half a document added to each cell; Statistics in Medicine
    24:729, 2005), which stays honest when few or no answers differ.
    """
    count, gained, lost = len(before), int(np.sum(~before & after)), int(np.sum(before & ~after))
    total, plus, minus = count + 2, gained + 0.5, lost + 0.5
    middle = (plus - minus) / total
    half = _Z * math.sqrt(plus + minus - (plus - minus) ** 2 / total) / total
    return Interval((gained - lost) / count, max(middle - half, -1.0), min(middle + half, 1.0))
