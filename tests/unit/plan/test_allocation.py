"""Sharing out bytes: definitions counted by hand, brute force over all choices, and budgets kept on random input."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from compress.plan import allocation as allocate
from compress.plan.allocation import knapsack, outlier_weighted, pooled_shares
from compress.plan.factors import factor_bytes, factor_sizes

SHAPES = [(256, 256), (128, 256), (512, 256), (256, 512), (300, 700), (2048, 512), (64, 48)]


# -- the factors of one matrix
def test_bytes_are_counted_as_they_are_stored() -> None:
    """Two rows of nine atoms: 16-bit dictionary and coefficients, and two bytes of mask for either row."""
    dictionary, coefficients = np.zeros((9, 5), np.float16), np.zeros((2, 4), np.float16)
    mask = np.packbits(np.zeros((2, 9), bool), axis=1)
    assert factor_bytes(2, 5, 9, 4, sparse=False) == dictionary.nbytes + coefficients.nbytes
    assert factor_bytes(2, 5, 9, 4, sparse=True) == dictionary.nbytes + coefficients.nbytes + mask.nbytes


@pytest.mark.parametrize("ratio", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_sizes_use_the_budget_up_at_the_wanted_ratio(m: int, n: int, share: float, ratio: float) -> None:
    k, s = factor_sizes(m, n, share, ratio, True)
    assert 1 <= s <= k <= n
    left = share * 2 * m * n - factor_bytes(m, n, k, s, True)
    assert 0 <= left < (2 * m if s < k else 2 * (m + n) + m)  # less than one coefficient more, or one atom and its own
    if m * n > 30_000 and share >= 0.6:
        assert left < 0.01 * share * 2 * m * n
    if k < 0.9 * n:  # a small s is coarse: one more of it moves the ratio by itself
        assert k / s == pytest.approx(ratio, rel=0.1 + 1 / s)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_no_pair_near_the_ratio_leaves_less(share: float) -> None:
    """Brute force over every (k, s): none within reach of the wanted ratio fills the budget better."""
    m, n, ratio, budget = 24, 32, 2.0, int(share * 2 * 24 * 32)
    pairs = [(k, s) for k in range(1, n + 1) for s in range(1, k + 1) if factor_bytes(m, n, k, s, True) <= budget]
    full = {k: max(s for other, s in pairs if other == k) for k in {k for k, _ in pairs}}  # as many as fit
    nearest = min(abs(np.log(k / s / ratio)) for k, s in full.items())
    near = [(k, s) for k, s in full.items() if abs(np.log(k / s / ratio)) <= nearest + np.log(1.1) + 1e-12]
    k, s = factor_sizes(m, n, share, ratio, True)
    assert (k, s) in near
    assert factor_bytes(m, n, k, s, True) == max(factor_bytes(m, n, *pair, True) for pair in near)


def test_a_complete_dictionary_leaves_the_rest_to_coefficients() -> None:
    """Four times as many outputs as inputs: a ratio of 3 would take 317 atoms out of 256."""
    k, s = factor_sizes(1024, 256, 0.8, 3.0, True)
    assert k > 0.9 * 256 and k / s < 0.9 * 3
    assert factor_bytes(1024, 256, k, s, True) > 0.99 * 0.8 * 2 * 1024 * 256


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_dense_factor_has_the_largest_rank_that_fits(m: int, n: int) -> None:
    for share in (0.2, 0.6, 0.9):
        k, s = factor_sizes(m, n, share, 2.0, False)
        assert k == s and 2 * k * (m + n) <= share * 2 * m * n < 2 * (k + 1) * (m + n)


def test_nothing_fits_or_nothing_is_gained() -> None:
    assert factor_sizes(16, 16, 0.01, 2.0, True) is None and factor_sizes(16, 16, 0.01, 2.0, False) is None
    assert factor_sizes(16, 16, 1.0, 2.0, True) is None and factor_sizes(16, 16, 1.2, 2.0, False) is None


# -- one pool of singular values
def _spectra(seed: int) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Matrices of differing shapes, scales and decays; one is all zero."""
    random = np.random.default_rng(seed)
    shapes = [tuple(int(x) for x in random.integers(4, 60, 2)) for _ in range(random.integers(2, 9))]
    spectra = [
        random.lognormal(0, 2) * np.exp(-random.uniform(0, 6) * np.sort(random.random(min(shape)))) for shape in shapes
    ]
    spectra[0] = spectra[0] * (seed % 5 > 0)
    return spectra, shapes


@pytest.mark.parametrize("seed", range(40))
def test_shares_meet_the_budget_to_one_unit_within_the_guards(seed: int) -> None:
    spectra, shapes = _spectra(seed)
    random = np.random.default_rng(seed + 1000)
    share = random.uniform(0.1, 0.95)
    low, high = share * random.uniform(0.05, 1), share + (1 - share) * random.choice([0.0, 0.5, 1.0])
    shares = pooled_shares(spectra, shapes, share, low, high)
    sizes = np.array([2 * m * n for m, n in shapes])
    unit = max(size / len(s) for size, s in zip(sizes, spectra, strict=True))
    budget = share * sizes.sum()
    assert budget - unit < np.dot(shares, sizes) <= budget * (1 + 1e-9)
    assert all(low - 1e-12 <= x <= high + 1e-12 for x in shares)


def test_shares_are_the_largest_values_of_the_pool() -> None:
    """Without guards in the way: what stays is the top of the normalised pool, counted by hand."""
    spectra = [[600.0, 300.0, 200.0, 0.0], [3.0, 3.0, 3.0, 3.0], [0.08, 0.01, 0.0, 0.0]]  # of norm 700, 6, 0.0806
    shapes = [(4, 10)] * 3
    # pool: .857 .429 .286 0 | .5 .5 .5 .5 | .992 .124 0 0
    assert pooled_shares(spectra, shapes, 0.5, 0.05, 1.0) == [0.25, 1.0, 0.25]
    assert pooled_shares(spectra, shapes, 7 / 12, 0.05, 1.0) == [0.5, 1.0, 0.25]
    assert pooled_shares(spectra, shapes, 8 / 12, 0.05, 1.0) == [0.75, 1.0, 0.25]


def test_guards_hold_what_the_pool_would_not() -> None:
    spectra, shapes = [[6.0, 3.0, 2.0, 0.0], [300.0] * 4, [8.0, 1.0, 0.0, 0.0]], [(4, 10)] * 3
    shares = pooled_shares(spectra, shapes, 0.6, 0.3, 0.8)
    assert shares[1] == 0.8 and min(shares) >= 0.3
    assert pooled_shares(spectra, shapes, 0.6, 0.6, 0.9) == pytest.approx([0.6] * 3)
    assert pooled_shares(spectra, shapes, 0.6, 0.2, 0.6) == pytest.approx([0.6] * 3)
    assert pooled_shares(spectra, shapes, 1.0, 0.2, 1.0) == [1.0] * 3


@pytest.mark.parametrize(("low", "high"), [(0.6, 0.9), (0.1, 0.4), (0.0, 1.0)])
def test_a_share_outside_its_guards_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="not within the guards"):
        pooled_shares([[1.0, 0.5]], [(2, 2)], 0.5, low, high)


# -- the knapsack
def _brute_force(costs: list[list[float]], sizes: list[list[int]], budget: int) -> float:
    """Least total cost of all combinations that fit; infinite when none of finite cost does."""
    best = np.inf
    for choice in itertools.product(*(range(len(row)) for row in costs)):
        picked = [row[i] for row, i in zip(costs, choice, strict=True)]
        fits = sum(row[i] for row, i in zip(sizes, choice, strict=True)) <= budget
        if fits:
            best = min(best, sum(picked))
    return best


def _choices(seed: int, coarse: int = 1) -> tuple[list[list[float]], list[list[int]], int]:
    random = np.random.default_rng(seed)
    counts = random.integers(1, 6, random.integers(1, 6))
    sizes = [[int(x) * coarse for x in random.integers(1, 60, count)] for count in counts]
    costs = [[float(x) for x in random.random(count)] for count in counts]
    low, high = sum(min(row) for row in sizes), sum(max(row) for row in sizes)
    return costs, sizes, int(random.integers(low, high + 2))


@pytest.mark.parametrize("seed", range(40))
def test_choices_are_optimal_where_the_grid_is_exact(seed: int) -> None:
    costs, sizes, budget = _choices(seed, coarse=1 + 1023 * (seed % 2))
    if seed % 3 == 0:  # some choices are impossible
        costs = [[x if x < 0.9 else float("inf") for x in row] for row in costs]
    best = _brute_force(costs, sizes, budget)
    if not np.isfinite(best):
        with pytest.raises(ValueError):
            knapsack(costs, sizes, budget)
        return
    picked = knapsack(costs, sizes, budget)
    assert sum(row[i] for row, i in zip(sizes, picked, strict=True)) <= budget
    assert sum(row[i] for row, i in zip(costs, picked, strict=True)) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_a_coarse_grid_keeps_the_budget_and_its_own_optimum(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least as good as the best combination whose sizes above the smallest, rounded up to cells, fit."""
    monkeypatch.setattr(allocate, "CELLS", 16)
    costs, sizes, budget = _choices(seed, coarse=997)
    least = [min(row) for row in sizes]
    spare = min(budget - sum(least), sum(max(row) for row in sizes) - sum(least))
    cell = max(-(-spare // 16), 1)
    rounded = [[-(-(x - low) // cell) for x in row] for row, low in zip(sizes, least, strict=True)]
    picked = knapsack(costs, sizes, budget)
    found = sum(row[i] for row, i in zip(costs, picked, strict=True))
    assert sum(row[i] for row, i in zip(sizes, picked, strict=True)) <= budget
    assert found <= _brute_force(costs, rounded, spare // cell) + 1e-12
    assert found >= _brute_force(costs, sizes, budget) - 1e-12


def test_many_matrices_leave_next_to_nothing() -> None:
    """300 matrices of 40 choices: far more bytes than cells, and the budget is used to 0.1 %."""
    random = np.random.default_rng(0)
    sizes = [sorted(int(x) for x in random.integers(10_000, 10_000_000, 40)) for _ in range(300)]
    costs = [sorted((float(x) for x in random.random(40)), reverse=True) for _ in range(300)]
    budget = int(0.6 * sum(row[-1] for row in sizes))
    picked = knapsack(costs, sizes, budget)
    used = sum(row[i] for row, i in zip(sizes, picked, strict=True))
    assert 0.999 * budget < used <= budget


def test_impossible_knapsacks_are_refused() -> None:
    with pytest.raises(ValueError, match="need 12 bytes of 11"):
        knapsack([[0.1], [0.2, 0.3]], [[5], [8, 7]], 11)
    with pytest.raises(ValueError, match="matrix 1 has no choice"):
        knapsack([[0.1], [float("inf"), float("nan")]], [[5], [8, 7]], 100)
    assert knapsack([[float("inf"), 0.3]], [[1, 2]], 5) == [1]
    assert knapsack([[0.1, 0.05]], [[5, 9]], 10**9) == [1]


# -- sparsities of layers
@pytest.mark.parametrize("seed", range(40))
def test_layer_sparsities_keep_their_mean_and_their_spread(seed: int) -> None:
    random = np.random.default_rng(seed)
    ratios = random.lognormal(-4, 1, random.integers(2, 40))
    weights = random.integers(1, 10**7, len(ratios))
    sparsity, spread = random.choice([0.0, 0.02, 0.5, 0.7, 0.97]), random.choice([0.0, 0.08, 0.3])
    layers = np.array(outlier_weighted(ratios, weights, sparsity, spread))
    assert np.average(layers, weights=weights) == pytest.approx(sparsity, abs=1e-9)
    assert (layers >= 0).all() and (layers < 1).all()
    assert np.abs(layers - sparsity).max() <= spread + 1e-12
    assert (np.diff(layers[np.argsort(ratios, kind="stable")]) <= 1e-15).all()
    if sparsity in (0.5, 0.7) and spread == 0.08:  # nothing but the spread limits these
        assert np.abs(layers - sparsity).max() == pytest.approx(spread)


def test_layer_sparsities_by_hand() -> None:
    """Ratios 1, 2, 4 with weights 2, 1, 1 have the mean 2; the furthest, 4, gets the whole spread."""
    assert outlier_weighted([1.0, 2.0, 4.0], [2, 1, 1], 0.5, 0.1) == pytest.approx([0.55, 0.5, 0.4])
    assert outlier_weighted([3.0, 3.0], [1, 5], 0.4) == [0.4, 0.4]
    assert outlier_weighted([0.0, 0.0], [1, 5], 0.4) == [0.4, 0.4]


def test_impossible_sparsities_are_refused() -> None:
    for sparsity, spread in ((1.0, 0.1), (-0.1, 0.1), (0.5, -0.1)):
        with pytest.raises(ValueError, match="impossible"):
            outlier_weighted([1.0, 2.0], [1, 1], sparsity, spread)
