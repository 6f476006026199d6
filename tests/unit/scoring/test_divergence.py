"""Scores against closed forms, a slow textbook reference, and simulated coverage of the intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import CalibrationError, CheckpointError, NumericalError
from compress.scoring import divergence
from compress.scoring.divergence import (
    mean_interval,
    paired_difference,
    paired_ratio,
    score,
    score_many,
    token_nll,
    token_stats,
)


class Fixed:
    """A LogitSource that looks up the logits of each token: a bigram model."""

    def __init__(self, table: np.ndarray, name: str = "fixed"):
        self.table, self.name, self.vocab_size = table.astype(np.float32), name, table.shape[1]
        self.alive = 0

    def logits(self, sequences):
        for sequence in sequences:
            yield self.table[np.asarray(sequence)]


def test_kl_and_likelihood_of_known_categoricals():
    p, q = np.array([0.5, 0.25, 0.125, 0.125]), np.array([0.25, 0.25, 0.25, 0.25])
    shift = np.array([[3.0], [-40.0]])  # logits are defined up to a constant per row
    stats = token_stats(np.log(p) + shift, np.log(q) - 2 * shift, np.array([0, 2]))
    # KL = 1/2 log 2 + 0 + 2 * 1/8 log 1/2 = 1/4 log 2
    assert stats.kld == pytest.approx([0.25 * math.log(2)] * 2, rel=1e-12)
    assert stats.nll_ref == pytest.approx([math.log(2), math.log(8)], rel=1e-12)
    assert stats.nll_cand == pytest.approx([math.log(4)] * 2, rel=1e-12)
    assert stats.same_top1.tolist() == [True, True]  # a tie goes to the lower id


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.sampled_from([0.01, 1.0, 30.0]))
def test_matches_the_textbook_sums(seed, vocabulary, spread):
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(0, spread, (7, vocabulary)).astype(np.float32) for _ in range(2))
    targets = rng.integers(0, vocabulary, 7)
    stats = token_stats(a, b, targets)
    for row in range(7):
        p, q = (np.longdouble(x[row]) for x in (a, b))
        p, q = np.exp(p - p.max()), np.exp(q - q.max())
        p, q = p / p.sum(), q / q.sum()
        assert stats.kld[row] == pytest.approx(float(np.sum(p * np.log(p / q))), rel=1e-9, abs=1e-13)
        assert stats.nll_ref[row] == pytest.approx(float(-np.log(p[targets[row]])), rel=1e-9, abs=1e-13)
        assert stats.nll_cand[row] == pytest.approx(float(-np.log(q[targets[row]])), rel=1e-9, abs=1e-13)
    np.testing.assert_allclose(token_nll(b, targets), stats.nll_cand, atol=1e-7)
    assert (stats.kld >= 0).all()


def test_slicing_rows_changes_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    a, b, targets = rng.normal(size=(9, 11)), rng.normal(size=(9, 11)), rng.integers(0, 11, 9)
    whole = token_stats(a, b, targets)
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", 25)  # two rows at a time
    sliced = token_stats(a, b, targets)
    for field in ("nll_ref", "nll_cand", "kld", "same_top1"):
        assert np.array_equal(getattr(whole, field), getattr(sliced, field))


def test_logits_are_not_modified():
    a, b = np.ones((2, 3)), np.full((2, 3), 2.0)
    token_stats(a, b, np.array([0, 1]))
    assert (a == 1).all() and (b == 2).all()


def test_perplexity_of_the_uniform_model_is_the_vocabulary():
    windows = np.random.default_rng(0).integers(0, 17, (5, 8))
    scores, stats = score(None, Fixed(np.zeros((17, 17))), windows, tokenizer="bytes")
    assert scores.perplexity.value == pytest.approx(17, rel=1e-12)
    assert scores.perplexity.low == pytest.approx(17) and scores.perplexity.high == pytest.approx(17)
    assert (scores.tokens, scores.windows, scores.window_length, scores.stride) == (35, 5, 8, 8)
    assert (scores.kld, scores.base_perplexity, scores.tokenizer, scores.engine) == (
        None,
        None,
        "bytes",
        "fixed",
    )
    assert stats.nll.shape == (5,) and stats.kld is None


def test_a_model_against_itself():
    table = np.random.default_rng(1).normal(size=(9, 9))
    windows = np.random.default_rng(2).integers(0, 9, (6, 12))
    scores, _ = score(Fixed(table), Fixed(table), windows)
    assert scores.kld.mean == scores.kld.max == 0 and scores.top1_agreement.value == 1
    assert scores.perplexity_ratio == divergence.Interval(1.0, 1.0, 1.0)
    assert scores.perplexity == scores.base_perplexity == scores.of_reference().perplexity
    assert scores.of_reference().kld is None


def test_scores_of_a_bigram_pair_by_hand():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 6, 6)).astype(np.float32)
    windows = rng.integers(0, 6, (4, 10))
    ticks = []
    scores, stats = score(Fixed(a), Fixed(b), windows, progress=lambda done, total: ticks.append((done, total)))
    p, q = (np.exp(x.astype(float)) / np.exp(x.astype(float)).sum(1, keepdims=True) for x in (a, b))
    kld = (p * np.log(p / q)).sum(1)[windows[:, :-1]]
    nll = -np.log(q[windows[:, :-1], windows[:, 1:]])
    nll_ref = -np.log(p[windows[:, :-1], windows[:, 1:]])
    assert scores.kld.mean == pytest.approx(kld.mean()) and scores.kld.max == pytest.approx(kld.max())
    assert scores.kld.median == pytest.approx(np.median(kld))
    assert scores.kld.p999 == pytest.approx(np.quantile(kld, 0.999))
    assert scores.perplexity.value == pytest.approx(np.exp(nll.mean()))
    assert scores.perplexity_ratio.value == pytest.approx(np.exp(nll.mean() - nll_ref.mean()))
    assert stats.kld == pytest.approx(kld.mean(1)) and stats.nll_ref == pytest.approx(nll_ref.mean(1))
    assert scores.top1_agreement.value == pytest.approx((a.argmax(1) == b.argmax(1))[windows[:, :-1]].mean())
    # t quantile for 3 degrees of freedom, from a table
    half = 3.182446 * kld.mean(1).std(ddof=1) / 2
    assert scores.kld.high - scores.kld.mean == pytest.approx(half, rel=1e-6)
    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]
    both = score_many(Fixed(a), [Fixed(b), Fixed(a)], windows)
    assert both[0][0] == scores and both[1][0].kld.mean == 0


def test_one_window_has_no_interval():
    scores, _ = score(Fixed(np.eye(4)), Fixed(np.zeros((4, 4))), np.array([[0, 1, 2]]))
    assert scores.perplexity.low is None and scores.kld.high is None and scores.top1_agreement.low is None


def test_intervals_cover_when_tokens_of_a_window_are_alike():
    """95% means 95%: window effects as strong as the noise, 12 windows of 50; token-wise bars fail."""
    rng = np.random.default_rng(4)
    covered = token_wise = ratio = difference = 0
    trials = 2000
    for _ in range(trials):
        effect = rng.normal(0, 0.3, (12, 1))
        tokens = 1.0 + effect + rng.normal(0, 0.3, (12, 50))
        interval = mean_interval(tokens.mean(1))
        covered += interval.low <= 1.0 <= interval.high
        half = 1.96 * tokens.std(ddof=1) / math.sqrt(tokens.size)
        token_wise += abs(tokens.mean() - 1.0) <= half
        # a second variant that shares the window effects: twice as bad on average
        other = 2.0 + 2 * effect + rng.normal(0, 0.3, (12, 50))
        paired = paired_ratio(tokens.mean(1), other.mean(1))
        ratio += paired.low <= 0.5 <= paired.high
        paired = paired_difference(tokens.mean(1), other.mean(1))
        difference += paired.low <= -1.0 <= paired.high
    assert 0.935 < covered / trials < 0.965
    assert 0.935 < difference / trials < 0.965
    assert 0.93 < ratio / trials < 0.97
    assert token_wise / trials < 0.5


def test_pairing_is_tighter_than_two_intervals():
    rng = np.random.default_rng(5)
    hard = rng.gamma(2.0, 1.0, 40)
    a, b = hard * 0.5 + rng.normal(0, 0.01, 40), hard
    paired = paired_ratio(a, b)
    assert paired.high - paired.low < 0.05 * (mean_interval(a).high / mean_interval(b).low)
    assert paired.low < 0.5 < paired.high
    with pytest.raises(ValueError, match="same windows"):
        paired_difference(a, b[1:])


def test_overflowing_perplexity_is_infinite():
    table = np.zeros((2, 2))
    table[:, 0] = 5000.0
    scores, _ = score(None, Fixed(table), np.array([[1, 1, 1], [1, 1, 1]]))
    assert scores.perplexity.value == math.inf


def test_digest_tells_texts_apart():
    source = Fixed(np.zeros((4, 4)))
    one, same, other = (
        score(None, source, windows)[0].text_digest
        for windows in (
            np.array([[0, 1, 2, 3]]),
            np.array([[0, 1, 2, 3]], np.int32),
            np.array([[0, 1], [2, 3]]),
        )
    )
    assert one == same != other


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_name_engine_and_window(broken):
    table = np.zeros((5, 5))
    table[3, 2] = broken
    windows = np.array([[0, 1, 2], [1, 3, 0]])
    with pytest.raises(NumericalError, match=r"^engine X: logits of window 1 .* token 1 on"):
        score(Fixed(np.zeros((5, 5))), Fixed(table, "engine X"), windows)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (np.zeros((0, 5), int), "windows"),
        (np.zeros((3, 1), int), "windows"),
        (np.zeros((3, 4)), "integer"),
        (np.full((1, 4), 7), "token id 7"),
        (np.full((1, 4), -1), "token id -1"),
    ],
)
def test_bad_windows(windows, message):
    with pytest.raises(CalibrationError, match=message):
        score(None, Fixed(np.zeros((5, 5))), windows)


def test_different_vocabularies():
    with pytest.raises(CheckpointError, match="vocabularies differ"):
        score(Fixed(np.zeros((5, 5))), Fixed(np.zeros((6, 6))), np.array([[0, 1]]))
