"""95% intervals of means over text: cluster-robust, with documents as the clusters.

Windows of one document are alike, so the independent units are documents, not windows (and not tokens: llama-perplexity's
standard error over tokens is up to 1.5x too small). Every estimate is a ratio of sums, R = sum x / sum n, over the
windows' totals x (nats, say) and counts n (tokens, say). Its variance is the CR2 ("bias-reduced linearization") estimate
of the regression of single tokens on a constant, and its t quantile has Bell and McCaffrey's degrees of freedom
(Bell and McCaffrey 2002; Imbens and Kolesar 2016). For a constant both have closed forms: with a document's
share w = sum of its n / sum of all n and its residual e = sum (x - R n),

    variance = sum_g e_g^2 / (1 - w_g) / (sum n)^2
    dof      = 1 / (sum_g w_g^2 + sum_{g != h} w_g^2 w_h^2 / ((1 - w_g) (1 - w_h)))

Documents of one window each and of one size give the ordinary t interval; one long document among short ones costs degrees
of freedom. Intervals take the documents for a sample of all such text: they say what other text of this kind would
give. One document allows none (low and high are None).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A point estimate and its 95% interval; low and high are None where one document allows none."""

    value: float
    low: float | None = None
    high: float | None = None


def ratio_of_sums(
    totals: np.ndarray,
    counts: np.ndarray,
    documents: np.ndarray | None = None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
) -> Interval:
    """sum(totals) / sum(counts), both float [N], with its interval, cut to the range [low, high] the quantity can take.

    documents: integers [N], equal for units of one document; None: every unit is one of its own. ValueError where the
    arrays differ in length or nothing is counted.
    """
    value, half = _estimate(totals, counts, documents)
    if half is None:
        return Interval(value)
    return Interval(value, max(value - half, low), min(value + half, high))


def mean_interval(
    means: np.ndarray,
    documents: np.ndarray | None = None,
    counts: np.ndarray | None = None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
) -> Interval:
    """Mean of means [N] over `counts` [N] things each (None: as many in each); else as `ratio_of_sums`."""
    means, counts = _weighed(means, counts)
    return ratio_of_sums(means * counts, counts, documents, low=low, high=high)


def paired_difference(
    a: np.ndarray, b: np.ndarray, documents: np.ndarray | None = None, counts: np.ndarray | None = None
) -> Interval:
    """Mean of a - b over the same windows ([N] window means each), paired. The rest as of `mean_interval`."""
    a, b = _pair(a, b)
    return mean_interval(a - b, documents, counts)


def paired_ratio(
    a: np.ndarray, b: np.ndarray, documents: np.ndarray | None = None, counts: np.ndarray | None = None
) -> Interval:
    """mean(a) / mean(b) over the same windows ([N] positive window means each), paired. The rest as of `mean_interval`.

    The interval is exp(log ratio +- t * se), with se by the delta method: that of the mean of a/mean(a) - b/mean(b).
    """
    a, b = _pair(a, b)
    a, counts = _weighed(a, counts)
    mean_a, mean_b = (float(np.average(values, weights=counts)) for values in (a, b))
    ratio = mean_a / mean_b
    _, half = _estimate((a / mean_a - b / mean_b) * counts, counts, documents)
    if half is None:
        return Interval(ratio)
    return Interval(ratio, ratio * math.exp(-half), ratio * math.exp(half))


def exponential(interval: Interval) -> Interval:
    """The interval of exp(x) given that of x; a perplexity beyond float64 is infinite."""
    low, high = (None if x is None else _exp(x) for x in (interval.low, interval.high))
    return Interval(_exp(interval.value), low, high)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def _estimate(totals: np.ndarray, counts: np.ndarray, documents: np.ndarray | None) -> tuple[float, float | None]:
    """The ratio of sums, and half its interval; see the module's docstring."""
    totals, counts = np.asarray(totals, np.float64), np.asarray(counts, np.float64)
    documents = np.arange(len(totals)) if documents is None else np.asarray(documents)
    if not totals.shape == counts.shape == documents.shape:
        raise ValueError(
            f"totals, counts and documents must match, got {totals.shape}, {counts.shape}, {documents.shape}"
        )
    if not (counts >= 0).all() or not (everything := float(counts.sum())) > 0:
        raise ValueError("nothing is counted")
    value = float(totals.sum() / everything)
    _, cluster = np.unique(documents, return_inverse=True)
    share = np.bincount(cluster, counts) / everything
    residual = np.bincount(cluster, totals - value * counts)[share > 0] / everything
    share = share[share > 0]
    if len(share) < 2:
        return value, None
    from scipy.stats import t

    error = math.sqrt(float((residual**2 / (1 - share)).sum()))
    return value, float(t.ppf(0.5 + CONFIDENCE / 2, _degrees_of_freedom(share))) * error


def _degrees_of_freedom(share: np.ndarray) -> float:
    """Bell and McCaffrey's, of clusters with these shares of the data; G - 1 for G equal ones."""
    pairs = share**2 / (1 - share)
    return 1 / float((share**2).sum() + pairs.sum() ** 2 - (pairs**2).sum())


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired scores need the same windows, got {a.shape} and {b.shape}")
    return a, b


def _weighed(means: np.ndarray, counts: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    means = np.asarray(means, np.float64)
    return means, np.ones_like(means) if counts is None else np.asarray(counts, np.float64)
