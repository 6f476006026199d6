"""Flips and paired changes of accuracy, against published figures, counts by hand and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compress.scoring.flips import flips, paired_change, wilson
from compress.scoring.intervals import Interval
from compress.scoring.tasks.outcomes import Outcomes, task_scores


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(successes, count, low, high):
    assert wilson(successes, count) == pytest.approx((low, high), abs=5e-5)


def right(*documents: int) -> np.ndarray:
    return np.array(documents, bool)


def test_flips_by_hand():
    before, after = right(1, 1, 1, 0, 0, 0, 0, 1), right(1, 0, 0, 1, 0, 0, 0, 1)
    found = flips(before, after, (list("aaabbbba"), list("abcacbba")))
    assert (found.n, found.lost.value, found.gained.value) == (8, 2 / 8, 1 / 8)
    assert found.changed.value == 4 / 8  # the three flips, and one wrong answer that became another wrong one
    assert (found.lost.low, found.lost.high) == wilson(2, 8)
    assert flips(before, after).changed is None
    assert found.gained.value - found.lost.value == paired_change(before, after).value
    with pytest.raises(ValueError, match="same documents"):
        flips(before, after[1:])


def test_paired_difference_of_accuracies():
    same = paired_change(right(*[1] * 30, *[0] * 10), right(*[1] * 30, *[0] * 10))
    assert same.value == 0 and same.low < 0 < same.high  # no change seen is not proof of none
    worse = paired_change(right(*[1] * 30, *[0] * 10), right(*[1] * 10, *[0] * 30))
    assert worse.value == -0.5 and worse.high < 0
    # Agresti and Min (2005): cells 20.5 and 0.5 of 42
    half = 1.959964 * math.sqrt(21 - 20**2 / 42) / 42
    assert (worse.low, worse.high) == pytest.approx((-20 / 42 - half, -20 / 42 + half), abs=1e-6)


def test_intervals_cover():
    rng = np.random.default_rng(0)
    probabilities = [0.5, 0.1, 0.06, 0.34]  # both right, gained, lost, both wrong
    truth = {"change": 0.04, "lost": 0.06, "gained": 0.1}
    covered = dict.fromkeys(truth, 0)
    for _ in range(1000):
        kind = rng.choice(4, 200, p=probabilities)
        before, after = np.isin(kind, (0, 2)), np.isin(kind, (0, 1))
        found = flips(before, after)
        intervals: dict[str, Interval] = {
            "change": paired_change(before, after), "lost": found.lost, "gained": found.gained,
        }  # fmt: skip
        for name, interval in intervals.items():
            covered[name] += interval.low <= truth[name] <= interval.high
    assert all(0.93 < count / 1000 < 0.985 for count in covered.values())


def outcomes(documents: list[int], groups: list[str] | None = None, **values: list[float]) -> Outcomes:
    columns = {name: np.array(column, float) for name, column in values.items()}
    return Outcomes(np.array(documents), columns, None if groups is None else tuple(groups))


def test_rows_compare_documents_with_themselves():
    groups = ["a", "a", "b", "b"]
    before = outcomes([3, 4, 5, 6], groups, acc=[1, 1, 0, 0], f1=[0.5, 0.5, 0.5, 0.1], perplexity=[-1, -2, -3, -4])
    after = outcomes([3, 4, 5, 6], groups, acc=[0, 1, 1, 0], f1=[0.25, 0.25, 0.5, 0.1], perplexity=[-1, -2, -3, -5])
    rows = task_scores({"t": after}, {"t": before})
    assert list(rows) == ["t", "t.f1", "t.perplexity", "t.a", "t.b"]
    assert rows["t"].difference["value"] == 0 and (rows["t"].flips.lost.value, rows["t"].flips.gained.value) == (
        0.25,
        0.25,
    )
    assert (rows["t.a"].flips.lost.value, rows["t.a"].n, rows["t.a"].group) == (0.5, 2, "a")
    assert rows["t.f1"].kind == "mean" and rows["t.f1"].difference["value"] == pytest.approx(-0.125)
    assert rows["t.perplexity"].kind == "perplexity" and rows["t.perplexity"].difference is None
    assert rows["t.perplexity"].value == pytest.approx(math.exp(11 / 4))
    with pytest.raises(ValueError, match="same documents"):
        task_scores({"t": after}, {"t": outcomes([3, 4, 5, 7], acc=[0, 0, 0, 0])})
