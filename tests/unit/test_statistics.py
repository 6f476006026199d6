"""Moments against numpy, the shrinkage formula and its extremes, the drift correction as least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.statistics import Moments, blend, corrected_target


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _moments(
    x: Tensor, gate: Tensor | None = None, original: Tensor | None = None, lag: Tensor | None = None
) -> Moments:
    moments = Moments.zeros(x.shape[1], drift=original is not None, residual=None if lag is None else lag.shape[1])
    for at in torch.arange(len(x)).split(37):  # batches of unequal length
        moments.add(
            x[at],
            None if original is None else original[at],
            None if gate is None else gate[at],
            None if lag is None else lag[at],
        )
    return moments


def test_gram_is_numpys() -> None:
    x = 3.0 * _randn(500, 24) + 1.0
    moments = _moments(x)
    wide = x.double().numpy()
    np.testing.assert_allclose(moments.gram.numpy(), wide.T @ wide, rtol=1e-5, atol=1e-3)
    assert (moments.tokens, moments.weight) == (500, 500.0)
    mean = blend(moments, None, 1.0)
    np.testing.assert_allclose(mean.gram.numpy(), wide.T @ wide / 500, rtol=1e-5, atol=1e-5)
    assert (mean.tokens, mean.borrowed, mean.drift, mean.residual) == (500, 0.0, None, None)


def test_gates_weigh_the_squared_error() -> None:
    """An expert's output is scaled by its gate g: sum of (g e)^2 over tokens is e^T (sum g^2 x x^T) e."""
    x, gate = _randn(300, 16), torch.rand(300, generator=torch.Generator().manual_seed(1))
    original, lag = x + 0.1 * _randn(300, 16, seed=2), _randn(300, 8, seed=3)
    moments = _moments(x, gate, original, lag)
    w, a, b, r = (gate.double().numpy() ** 2)[:, None], *(t.double().numpy() for t in (x, original, lag))
    np.testing.assert_allclose(moments.gram.numpy(), a.T @ (w * a), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moments.drift.numpy(), (b - a).T @ (w * a), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moments.residual.numpy(), r.T @ (w * a), rtol=1e-4, atol=1e-4)
    assert moments.weight == pytest.approx(w.sum()) and moments.tokens == 300


def test_inputs_are_not_modified() -> None:
    x, gate = _randn(20, 8), torch.full((20,), 0.5)
    before = x.clone()
    _moments(x, gate, x + 1)
    assert torch.equal(x, before)


def test_no_tokens_is_no_change() -> None:
    moments = Moments.zeros(8, drift=True)
    moments.add(torch.zeros(0, 8), torch.zeros(0, 8), torch.zeros(0))
    assert moments.tokens == 0 and not moments.gram.any() and torch.isfinite(blend(moments, None, 1.0).gram).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_non_finite_activations_show(bad: float) -> None:
    """Also where the square of a finite activation overflows, and where the gate of the token is zero."""
    assert _moments(_randn(5, 8)).finite
    x = _randn(5, 8)
    x[2, 3] = bad
    assert not _moments(x).finite
    if abs(bad) != 1e30:
        assert not _moments(x, torch.zeros(5)).finite


@pytest.mark.parametrize("tokens", [1, 10, 1000])
@pytest.mark.parametrize("strength", [0.0, 0.5, 4.0])
def test_shrinkage_formula(tokens: int, strength: float) -> None:
    n = 12
    own = _moments(2.0 * _randn(tokens, n), torch.full((tokens,), 0.3), 1.9 * _randn(tokens, n))
    pool = _moments(_randn(400, n, seed=4), None, 1.1 * _randn(400, n, seed=4))
    blended = blend(own, pool, strength)
    prior = strength * n
    share = prior / (tokens + prior)
    for name in ("gram", "drift"):
        expected = (1 - share) * getattr(own, name).double() / own.weight + share * getattr(pool, name).double() / 400
        torch.testing.assert_close(getattr(blended, name).double(), expected, rtol=1e-4, atol=1e-5)
    assert blended.borrowed == pytest.approx(share) and blended.tokens == tokens


def test_shrinkage_extremes() -> None:
    n = 8
    pool, nothing = _moments(_randn(200, n)), Moments.zeros(n)
    cold = blend(nothing, pool, 1.0)
    torch.testing.assert_close(cold.gram, pool.gram / 200)
    assert (cold.borrowed, cold.tokens) == (1.0, 0)
    assert blend(nothing, pool, 0.0).borrowed == 1.0  # nothing of its own, so the pool even unasked
    hot = _moments(_randn(100_000, n, seed=5))
    assert blend(hot, pool, 1.0).borrowed < 1e-3
    for empty in (None, Moments.zeros(n)):
        alone = blend(hot, empty, 1.0)
        assert alone.borrowed == 0.0
        torch.testing.assert_close(alone.gram, hot.gram / 100_000)


def test_blend_of_a_gate_weighted_expert_has_the_pools_scale() -> None:
    """Normalised by their own weights, grams of the same distribution agree whatever the gates."""
    x = _randn(20_000, 6)
    expert, pool = _moments(x, torch.full((20_000,), 0.1)), _moments(x)
    torch.testing.assert_close(blend(expert, pool, 5.0).gram, pool.gram / 20_000, rtol=1e-3, atol=1e-4)


def test_drift_correction_is_the_least_squares_weight() -> None:
    """Undamped, the corrected weight is argmin_V ||V x - W x0||^2; damping pulls V towards W."""
    weight, x0 = _randn(5, 10), _randn(400, 10, seed=6)
    x = x0 @ (torch.eye(10) + 0.1 * _randn(10, 10, seed=7)) + 0.05 * _randn(400, 10, seed=8)
    statistics = blend(_moments(x, None, x0), None, 0.0)
    expected = torch.linalg.lstsq(x.double(), x0.double() @ weight.double().T).solution.T
    torch.testing.assert_close(corrected_target(weight, statistics, 1e-9, 1.0).double(), expected, rtol=1e-3, atol=1e-4)
    ridge = 0.3 * statistics.gram.double().diagonal().mean()
    gram = statistics.gram.double() + ridge * torch.eye(10, dtype=torch.float64)
    damped = weight.double() + weight.double() @ statistics.drift.double() @ torch.linalg.inv(gram)
    torch.testing.assert_close(corrected_target(weight, statistics, 0.3, 1.0).double(), damped, rtol=1e-4, atol=1e-5)
    half = corrected_target(weight, statistics, 0.3, 0.5).double()
    torch.testing.assert_close(half, (damped + weight) / 2, rtol=1e-4, atol=1e-5)


def test_residual_correction_repairs_the_stream() -> None:
    """r + V x should be r0 + W x0: V is the least-squares map from x to W x0 + (r0 - r)."""
    weight, x0, lag = _randn(4, 9), _randn(300, 9, seed=9), 0.3 * _randn(300, 4, seed=10)
    x = x0 + 0.1 * _randn(300, 9, seed=11)
    statistics = blend(_moments(x, None, x0, lag), None, 0.0)
    target = x0.double() @ weight.double().T + lag.double()
    expected = torch.linalg.lstsq(x.double(), target).solution.T
    ours = corrected_target(weight, statistics, 1e-9, 1.0, 1.0)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-4)


def test_without_drift_the_weight_is_the_target() -> None:
    weight, x = _randn(4, 6), _randn(50, 6, seed=12)
    for statistics in (blend(_moments(x), None, 0.0), blend(_moments(x, None, x), None, 0.0)):
        assert torch.equal(corrected_target(weight, statistics, 0.1, 1.0), weight)
    moved = blend(_moments(x, None, 2 * x), None, 0.0)
    assert torch.equal(corrected_target(weight, moved, 0.1, 0.0), weight)
