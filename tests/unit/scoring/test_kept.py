"""What is kept of the original, against a direct computation over all tokens."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from compress.scoring import cache
from compress.scoring.cache import KeptWindows, make_room
from compress.scoring.kept import DRAWN, LEAST, compare, keep, kept_tokens

ROWS, VOCABULARY = 400, 1200


@pytest.fixture(scope="module")
def models():
    """Logits of an original with a heavy tail and of a variant that is off everywhere, and the tokens that followed."""
    rng = np.random.default_rng(7)
    original = (1.5 * rng.standard_normal((ROWS, VOCABULARY))).astype(np.float32)
    original[:, :20] += 4 * rng.standard_normal((ROWS, 20)).astype(np.float32)
    variant = (original + 0.4 * rng.standard_normal((ROWS, VOCABULARY))).astype(np.float32)
    return original, variant, rng.integers(0, VOCABULARY, ROWS)


def direct(original, variant, targets):
    p, q = (log_softmax(x.astype(np.float64), axis=1) for x in (original, variant))
    index = np.arange(len(targets)), targets
    return (np.exp(p) * (p - q)).sum(axis=1), -p[index], -q[index]


def test_all_tokens_kept_give_the_divergence_itself(models):
    original, variant, targets = models
    kld, nll_ref, nll = direct(*models)
    stats = compare(keep(original, targets, VOCABULARY), variant, targets)
    np.testing.assert_allclose(stats.kld, kld, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(stats.nll_ref, nll_ref, atol=1e-7)
    np.testing.assert_allclose(stats.nll_cand, nll, atol=1e-7)
    assert (stats.same_top1 == (original.argmax(1) == variant.argmax(1))).all()


def test_few_tokens_kept_give_it_without_bias(models):
    """The rest holds a third of the mass here, of which one outcome for all would see nothing."""
    original, variant, targets = models
    kld, nll_ref, nll = direct(*models)
    runs = np.array([compare(keep(original, targets, 64, seed), variant, targets).kld for seed in range(12)])
    kept = keep(original, targets, 64)
    assert 0.2 < kept.rest.mean() < 0.9
    spread = runs.mean(axis=1).std(ddof=1)
    assert abs(runs.mean() - kld.mean()) < 3 * spread / np.sqrt(len(runs)) + 1e-9
    assert spread < 0.01 * kld.mean()
    stats = compare(kept, variant, targets)
    assert (stats.kld >= 0).all()
    np.testing.assert_allclose(stats.nll_ref, nll_ref, atol=1e-7)
    np.testing.assert_allclose(stats.nll_cand, nll, atol=1e-7)


def test_a_model_is_not_off_from_itself(models):
    original, _, targets = models
    assert compare(keep(original, targets, 64), original, targets).kld.max() == 0


def test_tokens_are_drawn_by_their_probability():
    """Of two tokens outside the kept one, 3 to 1: the systematic draw is off by one at most."""
    logits = np.log(np.array([[0.6, 0.3, 0.1]], np.float32))
    kept = keep(logits, np.array([0]), 1)
    assert kept.ids.tolist() == [[0]] and kept.rest[0] == pytest.approx(0.4)
    assert abs((kept.drawn == 1).sum() - 0.75 * DRAWN) <= 1


def test_as_many_tokens_as_fit():
    assert kept_tokens(100, 500, 1 << 20) == 500
    assert kept_tokens(1000, 50_000, 6 * 1000 * 2000) == 2000 - DRAWN  # two bytes an id, four a probability
    assert kept_tokens(1000, 100_000, 8 * 1000 * 2000) == 2000 - DRAWN  # four bytes an id
    assert kept_tokens(10**9, 50_000, 1) == LEAST


def test_kept_windows_come_back_and_damage_is_not_there(models, tmp_path, monkeypatch):
    original, _, targets = models
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    windows, kept = KeptWindows("a" * 64), keep(original, targets, 64)
    assert windows.read(3) is None
    windows.write(3, kept)
    again = KeptWindows("a" * 64).read(3)
    for name, part in vars(kept).items():
        np.testing.assert_array_equal(getattr(again, name), part)
    assert KeptWindows("b" * 64).read(3) is None
    (file,) = tmp_path.rglob("*.npz")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert windows.read(3) is None
    file.write_bytes(data[:100])
    assert windows.read(3) is None


def test_a_disk_that_refuses_costs_the_next_score_only(models, monkeypatch, tmp_path):
    original, _, targets = models
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "file"))
    windows = KeptWindows("a" * 64)
    windows.write(0, keep(original, targets, 64))
    assert windows.read(0) is None


def test_what_was_used_last_stays(tmp_path):
    for number, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "window").write_bytes(bytes(100))
        cache.os.utime(tmp_path / name, (number, number))
    make_room(tmp_path, 250)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["b", "c"]
