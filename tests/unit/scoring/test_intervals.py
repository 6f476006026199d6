"""Intervals against matrices, the jackknife and scipy, and against the truth: how often they hold it on real windows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from compress.scoring.intervals import Interval, mean_interval, paired_difference, paired_ratio, ratio_of_sums

NUMBERS = json.loads((Path(__file__).parent / "windows.json").read_text())
"""Window means of the demo model and of two copies of it rounded to nearest, on all windows of eval/wikipedia, in order;
made by benchmarks/coverage.py --numbers."""


def half(interval: Interval) -> float:
    assert interval.low is not None and interval.high is not None
    assert interval.high - interval.value == pytest.approx(interval.value - interval.low)
    return interval.high - interval.value


def sample(seed: int, clusters: int = 9, most: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Values of documents of unequal size, alike within one, and their documents."""
    rng = np.random.default_rng(seed)
    documents = np.repeat(np.arange(clusters), rng.integers(1, most, clusters))
    return rng.normal(size=clusters)[documents] + rng.normal(0, 0.5, len(documents)), documents


def test_documents_of_one_window_give_the_ordinary_t_interval() -> None:
    values, _ = sample(0)
    for documents in (None, np.arange(len(values)) * 7 - 3):
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        found = mean_interval(values, documents)
        assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-12)
    assert found.value == pytest.approx(values.mean())


@pytest.mark.parametrize("seed", range(4))
def test_the_closed_form_is_the_matrix_formula(seed: int) -> None:
    """CR2 with Bell and McCaffrey's degrees of freedom, as Imbens and Kolesar (2016) write them for any regression."""
    values, documents = sample(seed)
    count = len(values)
    design = np.ones((count, 1))
    hat = design @ np.linalg.inv(design.T @ design) @ design.T
    residual = values - hat @ values
    variance, columns = 0.0, []
    for document in np.unique(documents):
        own = documents == document
        w, v = np.linalg.eigh(np.eye(own.sum()) - hat[np.ix_(own, own)])
        adjust = v @ np.diag(w**-0.5) @ v.T
        variance += float((design[own].T @ adjust @ residual[own])[0]) ** 2 / count**2
        columns.append((np.eye(count) - hat)[:, own] @ adjust @ design[own][:, 0] / count)
    eigenvalues = np.linalg.eigvalsh(np.array(columns) @ np.array(columns).T)
    freedom = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    expected = stats.t.ppf(0.975, freedom) * math.sqrt(variance)
    assert half(mean_interval(values, documents)) == pytest.approx(expected, rel=1e-9)


def test_counts_are_as_many_values() -> None:
    """A mean over 3 tokens is three tokens of that mean."""
    values, documents = sample(5)
    counts = np.random.default_rng(5).integers(1, 5, len(values))
    long = mean_interval(np.repeat(values, counts), np.repeat(documents, counts))
    short = mean_interval(values, documents, counts)
    sums = ratio_of_sums(values * counts, counts, documents)
    for found in (short, sums):
        assert (found.value, found.low, found.high) == pytest.approx((long.value, long.low, long.high))


def test_windows_scored_twice_tell_nothing_new() -> None:
    values, documents = sample(1)
    once, twice = mean_interval(values, documents), mean_interval(np.tile(values, 2), np.tile(documents, 2))
    assert half(twice) == pytest.approx(half(once))
    assert half(mean_interval(np.tile(values, 2))) < 0.75 * half(once)  # what ignoring documents makes of it


def test_equal_documents_give_the_jackknife() -> None:
    """Leaving out one document at a time; of a ratio, to first order."""
    rng = np.random.default_rng(2)
    documents = np.repeat(np.arange(12), 5)
    a = 2 + rng.normal(0, 0.2, 12)[documents] + rng.normal(0, 0.2, 60)
    b = a * (1.5 + rng.normal(0, 0.05, 12)[documents])

    def jackknife(statistic, freedom: int = 11) -> float:
        left = np.array([statistic(documents != document) for document in range(12)])
        return float(stats.t.ppf(0.975, freedom) * math.sqrt(11 / 12 * ((left - left.mean()) ** 2).sum()))

    assert half(mean_interval(a, documents)) == pytest.approx(jackknife(lambda kept: a[kept].mean()), rel=1e-9)
    assert half(paired_difference(a, b, documents)) == pytest.approx(
        jackknife(lambda kept: (a - b)[kept].mean()), rel=1e-9
    )
    ratio = paired_ratio(a, b, documents)
    assert ratio.low is not None and ratio.high is not None
    assert ratio.value == pytest.approx(a.mean() / b.mean())
    expected = jackknife(lambda kept: math.log(a[kept].mean() / b[kept].mean()))
    assert math.log(ratio.high / ratio.value) == pytest.approx(expected, rel=0.02)
    assert math.log(ratio.value / ratio.low) == pytest.approx(expected, rel=0.02)


def test_one_document_allows_none() -> None:
    one = np.zeros(5, int)
    assert mean_interval(np.arange(5.0), one) == Interval(2.0)
    assert paired_ratio(np.arange(1.0, 6), np.ones(5), one) == Interval(3.0)
    assert mean_interval(np.array([4.0])) == Interval(4.0)
    # nothing counts in the other one
    assert ratio_of_sums(np.array([3.0, 0.0]), np.array([2, 0])) == Interval(1.5)


def test_a_long_document_costs_degrees_of_freedom() -> None:
    """One document of as many windows as all others have together is worth about two of them, not twelve."""
    rng = np.random.default_rng(3)
    effect = rng.normal(size=12)
    equal = np.repeat(np.arange(12), 2)
    unequal = np.concatenate([np.zeros(12, int), np.arange(12)])
    assert half(mean_interval(effect[unequal], unequal)) > 1.2 * half(mean_interval(effect[equal], equal))


def test_bounds_and_bad_calls() -> None:
    values = np.array([0.0, 0.0, 0.0, 1.0])
    assert mean_interval(values, low=0.0, high=1.0).low == 0.0
    assert mean_interval(1 - values, low=0.0, high=1.0).high == 1.0
    with pytest.raises(ValueError, match="must match"):
        mean_interval(values, np.arange(3))
    with pytest.raises(ValueError, match="nothing is counted"):
        mean_interval(values, counts=np.zeros(4))
    with pytest.raises(ValueError, match="same windows"):
        paired_ratio(values, values[1:])


# --------------------------------------------------------------------------------- on real windows

DOCUMENTS = np.array(NUMBERS["documents"])
NLL, NLL_ONE, KLD_ONE, SAME_ONE, KLD_TWO = (
    np.array(NUMBERS[name]) for name in ("nll", "nll_one", "kld_one", "same_one", "kld_two")
)
ESTIMATES = {
    "log perplexity": lambda i, d: mean_interval(NLL_ONE[i], d),
    "difference": lambda i, d: paired_difference(NLL_ONE[i], NLL[i], d),
    "KL": lambda i, d: mean_interval(KLD_ONE[i], d, low=0.0),
    "ratio of KL": lambda i, d: paired_ratio(KLD_ONE[i], KLD_TWO[i], d),
    "top-1": lambda i, d: mean_interval(SAME_ONE[i], d, low=0.0, high=1.0),
}
TRUTH = {name: estimate(np.arange(len(NLL)), None).value for name, estimate in ESTIMATES.items()}


def drawn(windows: np.ndarray, size: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """One window of each of `size` equal parts, [draws, size]."""
    edges = np.arange(size + 1) * len(windows) // size
    return windows[rng.integers(edges[:-1], edges[1:], (draws, size))]


def held(samples: list[tuple[np.ndarray, np.ndarray | None]]) -> dict[str, float]:
    """Share of samples (windows, their documents) whose interval holds the mean of all windows."""
    return {
        name: float(np.mean([(found := estimate(*each)).low <= TRUTH[name] <= found.high for each in samples]))
        for name, estimate in ESTIMATES.items()
    }


def test_intervals_of_windows_spread_over_the_text_hold_its_mean() -> None:
    rng = np.random.default_rng(6)
    samples = [(i, DOCUMENTS[i]) for i in drawn(np.arange(len(NLL)), 40, 1500, rng)]
    found = held(samples)
    assert all(0.9 <= share <= 0.98 for share in found.values()), found


@pytest.mark.parametrize("size", [40, 100, 400])
def test_intervals_hold_the_mean_of_such_texts(size: int) -> None:
    """Texts made up of the documents, drawn with replacement: what an interval is for."""
    rng = np.random.default_rng(7)
    members = [np.flatnonzero(document == DOCUMENTS) for document in np.unique(DOCUMENTS)]
    samples = []
    for _ in range(800):
        chosen = rng.integers(len(members), size=len(members))
        windows = np.concatenate([members[i] for i in chosen])
        labels = np.repeat(np.arange(len(chosen)), [len(members[i]) for i in chosen])
        at = drawn(np.arange(len(windows)), size, 1, rng)[0]
        samples.append((windows[at], labels[at]))
    found = held(samples)
    assert all(0.9 <= share <= 0.98 for share in found.values()), found
    if size == 400:  # several windows of most documents: ignoring that fails
        assert held([(windows, None) for windows, _ in samples])["log perplexity"] < 0.9


def test_windows_in_a_row_do_not() -> None:
    starts = np.random.default_rng(8).integers(len(NLL) - 39, size=500)
    found = held([(start + np.arange(40), None) for start in starts])
    assert found["log perplexity"] < 0.85 and found["KL"] < 0.9
