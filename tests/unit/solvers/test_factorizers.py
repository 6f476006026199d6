"""Factorizers against Eckart and Young, brute force, numpy's least squares and naive float64 versions of the papers."""

from __future__ import annotations

import itertools
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.plan.factors import factor_bytes, factor_sizes
from compress.solvers import compot, rocket, svd
from compress.solvers.base import damped_gram
from compress.solvers.compot import procrustes, threshold
from compress.solvers.dictionary import alternate, solve_coefficients, solve_dictionary, squared_error, strongest
from compress.solvers.options import FACTORIZERS, CompotOptions, FactorizerOptions, RocketOptions, SvdOptions
from compress.solvers.rocket import support
from compress.solvers.whitening import balanced, whiten
from compress.weights import Factors

METHODS = {"svd": svd, "compot": compot, "rocket": rocket}
DAMPING = 0.01
every_method = pytest.mark.parametrize("name", METHODS)


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _gram(n: int, seed: int = 1, tokens: int = 2000) -> Tensor:
    """Correlated activations with a few loud channels, float32 [n, n]."""
    mix = _randn(n, n, seed=seed) / n**0.5 + 0.5 * torch.eye(n)
    x = (_randn(tokens, n, seed=seed + 1) @ mix) * torch.exp(0.7 * _randn(n, seed=seed + 2))
    return x.T @ x / tokens


def _subspaces(m: int, n: int, count: int, rank: int, seed: int = 3) -> Tensor:
    """Rows from a union of `count` subspaces of dimension `rank`, which together span far more: what a sparse code can
    say and a low rank cannot."""
    bases = _randn(count, rank, n, seed=seed)
    rows = torch.einsum("crn,cjr->cjn", bases, _randn(count, -(-m // count), rank, seed=seed + 1))
    return (0.05 * rows.reshape(-1, n)[:m] + 0.005 * _randn(m, n, seed=seed + 2)).contiguous()


def _damped(gram: Tensor, damping: float = DAMPING) -> np.ndarray:
    wide = gram.double().numpy()
    return wide + damping * np.trace(wide) / len(wide) * np.eye(len(wide))


def _error(weight: Tensor, product: Tensor, gram: np.ndarray) -> float:
    """tr((W-Q) G (W-Q)^T) / tr(W G W^T)."""
    w = weight.double().numpy()
    lost = w - product.double().numpy()
    return float(np.sum(lost @ gram * lost) / np.sum(w @ gram * w))


def _factorize(name: str, weight: Tensor, gram: Tensor, k: int, s: int, **options: float) -> Factors:
    return METHODS[name].factorize(weight, gram, k, s, FACTORIZERS[name](**options))


def _dense(name: str, *arguments: object, **options: float) -> Tensor:
    factors = _factorize(name, *arguments, **options)
    return factors.coefficients.double() @ factors.dictionary.double()


def _orthonormal(k: int, n: int, seed: int = 5) -> Tensor:
    return torch.linalg.qr(_randn(n, k, seed=seed, dtype=torch.float64))[0].T.contiguous()


# -- svd
@pytest.mark.parametrize(("m", "n", "k"), [(40, 24, 7), (24, 40, 7), (24, 40, 23), (1, 16, 1)])
def test_svd_loses_the_tail_of_the_whitened_spectrum(m: int, n: int, k: int) -> None:
    """Eckart and Young: rank k loses at least the singular values of W G^(1/2), the symmetric root, behind the k-th."""
    weight, gram = _randn(m, n), _gram(n)
    values, vectors = np.linalg.eigh(damped := _damped(gram))
    spectrum = np.linalg.svd(weight.double().numpy() @ (vectors * values**0.5) @ vectors.T, compute_uv=False)
    bound = (spectrum[k:] ** 2).sum() / (spectrum**2).sum()
    assert _error(weight, _dense("svd", weight, gram, k, 1), damped) == pytest.approx(bound, rel=1e-6, abs=1e-12)


def test_svd_does_not_look_at_s() -> None:
    weight, gram = _randn(20, 16), _gram(16)
    one, other = (_factorize("svd", weight, gram, 6, s) for s in (1, 6))
    assert torch.equal(one.coefficients, other.coefficients) and one.mask is None


# -- the two exact steps of compot
@pytest.mark.parametrize("s", [1, 2, 4])
def test_thresholding_finds_the_best_of_all_supports(s: int) -> None:
    k, dictionary, target = 6, _orthonormal(6, 9), _randn(8, 9, dtype=torch.float64)
    coefficients, mask = threshold(target @ dictionary.T, s)
    assert (mask.sum(1) == s).all() and torch.equal(coefficients != 0, mask)
    atoms = dictionary.numpy()
    for row, found in zip(target.numpy(), coefficients.numpy(), strict=True):
        best = min(
            np.linalg.norm(row - np.linalg.lstsq(atoms[list(at)].T, row, rcond=None)[0] @ atoms[list(at)])
            for at in itertools.combinations(range(k), s)
        )
        assert np.linalg.norm(row - found @ atoms) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("k", [4, 12])
def test_procrustes_reaches_the_nuclear_norm(k: int) -> None:
    """Least |T - C D|^2 over orthonormal rows is |T|^2 + |C|^2 - 2 |C^T T|_*; an unused atom still gets a row."""
    target, coefficients = _randn(30, 12, dtype=torch.float64), _randn(30, k, seed=2, dtype=torch.float64)
    coefficients[:, 1] = 0
    dictionary = procrustes(target, coefficients)
    torch.testing.assert_close(dictionary @ dictionary.T, torch.eye(k, dtype=torch.float64))
    nuclear = np.linalg.norm((coefficients.T @ target).numpy(), "nuc")
    least = float(target.square().sum() + coefficients.square().sum()) - 2 * nuclear
    assert squared_error(target, dictionary, coefficients) == pytest.approx(least, rel=1e-12)


def test_no_step_of_compot_raises_the_error() -> None:
    target, s = whiten(_subspaces(96, 48, 8, 5), _gram(48), DAMPING).target, 6
    dictionary = _orthonormal(24, 48)  # far from any optimum, so that every step has work to do
    errors = []
    for _ in range(12):
        coefficients, _ = threshold(target @ dictionary.T, s)
        errors.append(squared_error(target, dictionary, coefficients))
        dictionary = procrustes(target, coefficients)
        errors.append(squared_error(target, dictionary, coefficients))
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]


def _naive_compot(weight: Tensor, gram: np.ndarray, k: int, s: int, iterations: int) -> np.ndarray:
    """The paper's own orientation, d_in x d_out with G = R^T R, column by column; returns the product [m, n]."""
    root = np.linalg.cholesky(gram).T
    white = root @ weight.double().numpy().T
    dictionary = np.linalg.svd(white)[0][:, :k]

    def coefficients() -> np.ndarray:
        projected = dictionary.T @ white
        for column in projected.T:
            column[np.argsort(-np.abs(column))[s:]] = 0
        return projected

    for _ in range(iterations):
        left, _, right = np.linalg.svd(white @ coefficients().T, full_matrices=False)
        dictionary = left @ right
    return (np.linalg.inv(root) @ dictionary @ coefficients()).T


@pytest.mark.parametrize("iterations", [0, 1, 20])
@pytest.mark.parametrize(("m", "n", "k", "s"), [(64, 32, 16, 6), (20, 32, 14, 5), (20, 32, 32, 9)])
def test_compot_is_the_paper_when_nothing_is_added(m: int, n: int, k: int, s: int, iterations: int) -> None:
    weight, gram = _subspaces(m, n, 4, 6), _gram(n)
    mine = _dense("compot", weight, gram, k, s, iterations=iterations, rounds=0)
    naive = torch.from_numpy(_naive_compot(weight, _damped(gram), k, s, iterations))
    if k <= min(m, n):  # beyond the rank, or where an atom falls out of use, its direction is anyone's choice
        torch.testing.assert_close(mine, naive, rtol=1e-4, atol=1e-6)
    assert _error(weight, mine, damped := _damped(gram)) <= 1.05 * _error(weight, naive, damped) + 1e-12


def test_a_complete_dictionary_reproduces_the_weight() -> None:
    for m, n in ((40, 24), (12, 24)):
        weight = _randn(m, n)
        torch.testing.assert_close(_dense("compot", weight, _gram(n), n, n).float(), weight, rtol=1e-5, atol=1e-6)


# -- least squares on either side
def _code(m: int = 30, n: int = 20, k: int = 12, s: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A target, atoms that are not orthogonal, and what a support keeps of poor coefficients."""
    target, dictionary = _randn(m, n, dtype=torch.float64), _randn(k, n, seed=2, dtype=torch.float64)
    dictionary *= torch.logspace(-2, 2, k, dtype=torch.float64)[:, None]
    mask = strongest(_randn(m, k, seed=3, dtype=torch.float64), s)
    return target, dictionary, mask, _randn(m, k, seed=4, dtype=torch.float64) * mask


def test_coefficients_are_numpys_least_squares_on_their_support() -> None:
    target, dictionary, mask, start = _code()
    solved = solve_coefficients(target, dictionary, mask, start)
    assert not solved[~mask].any()
    for row, keep, found in zip(target.numpy(), mask.numpy(), solved.numpy(), strict=True):
        expected = np.linalg.lstsq(dictionary.numpy()[keep].T, row, rcond=None)[0]
        np.testing.assert_allclose(found[keep], expected, rtol=1e-6)


def test_conjugate_gradients_need_as_many_steps_as_a_row_has_coefficients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steepest descent would need hundreds."""
    target, dictionary, mask, start = _code()
    exact = solve_coefficients(target, dictionary, mask, start)
    monkeypatch.setattr("compress.solvers.dictionary.MOST_STEPS", 4)
    torch.testing.assert_close(solve_coefficients(target, dictionary, mask, start), exact, rtol=1e-6, atol=1e-9)


def test_coefficients_of_an_ambiguous_dictionary_are_still_optimal() -> None:
    """Twice the same atom: many solutions, one error, also where an atom is zero or a row keeps nothing."""
    target, dictionary, mask, start = _code()
    dictionary[3], dictionary[5], mask[0], start[0] = dictionary[4], 0, False, 0
    solved = solve_coefficients(target, dictionary, mask, start)
    for row, keep, found in zip(target.numpy(), mask.numpy(), solved.numpy(), strict=True):
        atoms = dictionary.numpy()[keep]
        expected = np.linalg.lstsq(atoms.T, row, rcond=None)[0]
        assert np.linalg.norm(row - found @ dictionary.numpy()) == pytest.approx(
            np.linalg.norm(row - expected @ atoms), rel=1e-9
        )


def test_the_dictionary_is_numpys_ridge_regression() -> None:
    target, _, _, coefficients = _code()
    ridge = 0.03
    mu = ridge * float((coefficients**2).sum()) / coefficients.shape[1]
    k, n = coefficients.shape[1], target.shape[1]
    rows = np.vstack([coefficients.numpy(), mu**0.5 * np.eye(k)])
    expected = np.linalg.lstsq(rows, np.vstack([target.numpy(), np.zeros((k, n))]), rcond=None)[0]
    np.testing.assert_allclose(solve_dictionary(target, coefficients, ridge).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_alternating_never_raises_the_error_and_keeps_the_support() -> None:
    target, dictionary, mask, start = _code()
    errors = []
    for rounds in range(6):
        found, coefficients = alternate(target, dictionary, start, mask, 1e-6, rounds)
        errors.append(squared_error(target, found, coefficients))
        assert not coefficients[~mask].any()
    assert all(after < before for before, after in itertools.pairwise(errors))


def test_a_round_that_costs_more_than_it_gains_is_dropped() -> None:
    target, dictionary, mask, start = _code()
    best = alternate(target, dictionary, start, mask, 1e-9, 40)
    shrunk = alternate(target, *best, mask, 1e3, 3)
    assert torch.equal(shrunk[0], best[0]) and torch.equal(shrunk[1], best[1])


@pytest.mark.parametrize("name", ["compot", "rocket"])
def test_rounds_of_least_squares_lower_the_error(name: str) -> None:
    weight, gram = _subspaces(96, 48, 8, 5), _gram(48)
    errors = [
        _error(weight, _dense(name, weight, gram, 30, 6, rounds=rounds), _damped(gram)) for rounds in (1, 2, 5, 10)
    ]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.99 * errors[0]


# -- rocket
@pytest.mark.parametrize(
    ("s", "reactivated", "own"), [(4, 0.0, 4), (4, 0.005, 3), (4, 0.5, 2), (1, 0.3, 0), (6, 0.9, 0)]
)
def test_support_is_the_rows_best_then_the_matrixs(s: int, reactivated: float, own: int) -> None:
    importance = _randn(7, 6).abs()
    expected = np.zeros((7, 6), dtype=bool)
    for row, values in zip(expected, importance.numpy(), strict=True):
        row[np.argsort(-values)[:own]] = True
    left = sorted(
        ((float(importance[i, j]), i, j) for i in range(7) for j in range(6) if not expected[i, j]), reverse=True
    )
    for _, i, j in left[: 7 * (s - own)]:
        expected[i, j] = True
    mask = support(importance, s, reactivated)
    assert np.array_equal(mask.numpy(), expected) and mask.sum() == 7 * s


@pytest.mark.parametrize("exponent", [0.0, 0.5])
def test_one_round_of_rocket_is_the_paper_without_its_tuning(exponent: float) -> None:
    weight, gram, k, s, ridge = _subspaces(64, 32, 4, 6), _gram(32), 18, 5, 1e-3
    root = np.linalg.cholesky(_damped(gram)).T
    white = root @ weight.double().numpy().T
    basis = np.linalg.eigh(white @ white.T)[1][:, ::-1][:, :k]
    code = basis.T @ white
    sizes = np.linalg.norm(np.linalg.solve(root, basis), axis=0)
    importance = np.abs(code) * sizes[:, None] ** exponent
    code = code * support(torch.from_numpy(importance.T), s, 0.2).numpy().T
    mu = ridge * np.trace(code @ code.T) / k
    dictionary = white @ code.T @ np.linalg.inv(code @ code.T + mu * np.eye(k))
    naive = torch.from_numpy((np.linalg.solve(root, dictionary) @ code).T)
    mine = _dense("rocket", weight, gram, k, s, ridge=ridge, rounds=1, exponent=exponent, reactivated=0.2)
    torch.testing.assert_close(mine, naive, rtol=1e-4, atol=1e-6)


# -- what is stored
def test_atoms_and_their_coefficients_have_one_size() -> None:
    mask = strongest(_randn(30, 8, seed=3), 3)
    mask[:, 2] = False
    dictionary = _randn(8, 20) * torch.logspace(-3, 3, 8)[:, None]
    coefficients = _randn(30, 8, seed=4) * mask
    d, c = balanced(dictionary.double(), coefficients.double(), mask)
    torch.testing.assert_close(c @ d, coefficients.double() @ dictionary.double())
    used = [j for j in range(8) if j != 2]
    stored = torch.stack([c[mask[:, j], j].square().mean() for j in used])
    torch.testing.assert_close(d.square().mean(1)[used], stored)
    assert not d[2].any() and not c[:, 2].any()


@every_method
def test_rounding_to_bfloat16_costs_what_bfloat16_costs(name: str) -> None:
    """Squared relative error of a product of two roundings to 8 bits of mantissa: 2 * 2^-18 / 3 at most on average."""
    weight, gram = _subspaces(96, 64, 8, 5), _gram(64)
    factors = _factorize(name, weight, gram, 40, 20)
    rounded = factors.coefficients.bfloat16().double() @ factors.dictionary.bfloat16().double()
    extra = _error(weight, rounded, _damped(gram)) - _error(weight, factors.dense(), _damped(gram))
    assert extra < 4 * 2.0**-18


# -- every method
@every_method
def test_factors_are_what_was_asked_for(name: str) -> None:
    weight, gram = _subspaces(40, 24, 4, 5), _gram(24)
    before = weight.clone(), gram.clone()
    factors, again = (_factorize(name, weight, gram, 14, 5) for _ in range(2))
    assert factors.dictionary.shape == (14, 24) and factors.coefficients.shape == (40, 14)
    assert factors.dictionary.dtype == factors.coefficients.dtype == torch.float32
    assert factors.dictionary.is_contiguous() and factors.coefficients.is_contiguous()
    if name != "svd":
        assert factors.mask.sum() == 40 * 5 and not factors.coefficients[~factors.mask].any()
    if name == "compot":
        assert (factors.mask.sum(1) == 5).all()
    assert torch.equal(factors.dictionary, again.dictionary) and torch.equal(factors.coefficients, again.coefficients)
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])


@every_method
def test_units_do_not_matter(name: str) -> None:
    """A gram in other units gives the same factors; a weight in other units gives the product in those."""
    weight, gram = _subspaces(40, 24, 4, 5), _gram(24)
    product = _dense(name, weight, gram, 14, 5)
    torch.testing.assert_close(_dense(name, weight, gram * 2.0**40, 14, 5), product, rtol=1e-5, atol=1e-7)
    for unit in (2.0**-60, 2.0**60):
        torch.testing.assert_close(_dense(name, weight * unit, gram, 14, 5) / unit, product, rtol=1e-5, atol=1e-7)


@every_method
def test_damping_that_had_to_be_raised_is_reported(name: str) -> None:
    """Eight tokens for 32 columns: rounding leaves negative eigenvalues, which the damping must exceed."""
    weight, gram = _randn(40, 32), _gram(32, tokens=8)
    _, damping, retries = damped_gram(gram, 1e-12)
    lowest = float(np.linalg.eigvalsh(gram.double().numpy())[0] / np.trace(gram.double().numpy()) * 32)
    assert retries > 1 and damping / 10 < -lowest < damping
    factors = _factorize(name, weight, gram, 12, 5, damping=1e-12)
    assert (factors.damping, factors.retries) == (damping, retries)


@every_method
def test_a_healthy_gram_gets_the_damping_that_was_asked_for(name: str) -> None:
    weight, gram = _randn(40, 32), _gram(32)
    for damping in (0.01, 0.3):
        factors = _factorize(name, weight, gram, 12, 5, damping=damping)
        assert (factors.damping, factors.retries) == (damping, 0)


def _degenerate() -> dict[str, tuple[Tensor, Tensor]]:
    weight, gram = _randn(20, 16), _gram(16)
    dead = gram.clone()
    dead[3], dead[:, 3] = 0, 0
    x = _randn(1, 16, seed=9)
    return {
        "dead column": (weight, dead),
        "rank one": (weight, x.T @ x),
        "no activations": (weight, torch.zeros(16, 16)),
        "zero weight": (torch.zeros(20, 16), gram),
        "one weight": (torch.zeros(20, 16).index_put((torch.tensor(2), torch.tensor(5)), torch.tensor(1.0)), gram),
        "one row": (weight[:1], gram),
        "equal rows": (weight[:1].expand(20, 16), gram),
        "view": (_randn(16, 40)[:, ::2].T, gram),
    }


@every_method
@pytest.mark.parametrize("case", _degenerate())
def test_degenerate_inputs_give_finite_factors(name: str, case: str) -> None:
    weight, gram = _degenerate()[case]
    factors = _factorize(name, weight, gram, 9, 4)
    assert torch.isfinite(factors.dictionary).all() and torch.isfinite(factors.coefficients).all()
    if case == "view":
        dense = _factorize(name, weight.contiguous(), gram, 9, 4).dense()
        torch.testing.assert_close(factors.dense(), dense, rtol=1e-4, atol=1e-6)
    if case in ("zero weight", "one weight", "one row", "equal rows") and name != "rocket":
        # of rank one at most: a single atom says it all (rocket's atoms are shrunk by its ridge)
        assert float((factors.dense() - weight).square().sum()) <= 1e-9 * float(weight.square().sum())


@every_method
def test_impossible_inputs_are_refused(name: str) -> None:
    weight, gram = _randn(20, 16), _gram(16)
    for k, s in ((17, 4), (0, 0)) if name == "svd" else ((17, 4), (4, 5), (4, 0)):
        with pytest.raises(ValueError, match="do not fit a matrix of 16 columns"):
            _factorize(name, weight, gram, k, s)
    gram[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        _factorize(name, weight, gram, 8, 4)


# -- at equal bytes
def _at_share(name: str, weight: Tensor, gram: Tensor, share: float) -> float:
    m, n = weight.shape
    k, s = factor_sizes(m, n, share, 2.0, name != "svd")
    assert factor_bytes(m, n, k, s, name != "svd") <= share * 2 * m * n
    return _error(weight, _dense(name, weight, gram, k, s), gram.double().numpy())


@pytest.mark.parametrize("share", [0.8, 0.6])
def test_sparse_codes_beat_a_low_rank_where_there_are_subspaces(share: float) -> None:
    """128 rows from eight subspaces that together span everything, bitmask counted."""
    weight, gram = _subspaces(256, 128, 8, 24), _gram(128)
    low_rank, orthogonal, free = (_at_share(name, weight, gram, share) for name in ("svd", "compot", "rocket"))
    assert orthogonal < 0.7 * low_rank
    assert free < low_rank


def test_options_reach_every_method() -> None:
    modules: dict[str, ModuleType] = METHODS
    assert set(modules) == set(FACTORIZERS)
    for name, kind in (("svd", SvdOptions), ("compot", CompotOptions), ("rocket", RocketOptions)):
        assert FACTORIZERS[name] is kind and issubclass(kind, FactorizerOptions) and modules[name].NEEDS_GRAM
