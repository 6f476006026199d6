"""Pruners against float64 re-derivations, brute force over all masks, and closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compress.codecs import block_codec
from compress.errors import NumericalError
from compress.solvers import gptq, magnitude, sparsegpt, wanda
from compress.solvers.base import damped_gram
from compress.solvers.descent import _exchange
from compress.solvers.masks import lowest
from compress.solvers.options import GptqOptions, MagnitudeOptions, SparseGptOptions, WandaOptions
from compress.weights import Masked, Pattern

HALF, THIRD = Pattern(0.5), Pattern(0.37)
TWO_FOUR, FOUR_EIGHT = Pattern.n_of_m(2, 4), Pattern.n_of_m(4, 8)
PATTERNS = [HALF, THIRD, TWO_FOUR, FOUR_EIGHT, Pattern.n_of_m(1, 6)]
PUBLISHED = {"sweeps": 0}
DAMPING = 0.01


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _inputs(n: int, tokens: int, seed: int) -> Tensor:
    """Correlated activations with a few loud channels, [tokens, n]; two halves of them have the same distribution."""
    mix = _randn(n, n, seed=seed) / n**0.5 + 0.5 * torch.eye(n)
    return (_randn(tokens, n, seed=seed + 1) @ mix) * torch.exp(0.7 * _randn(n, seed=seed + 2))


def _gram(n: int, tokens: int = 2000, seed: int = 1) -> Tensor:
    x = _inputs(n, tokens, seed)
    return x.T @ x / tokens


def _damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    return gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def _costs(weight: Tensor, values: Tensor, gram: Tensor) -> Tensor:
    """(w - q) G (w - q)^T of every row, float64 [R]."""
    error = weight.double() - values.double()
    return ((error @ gram.double()) * error).sum(1)


def _objective(weight: Tensor, values: Tensor, gram: Tensor) -> float:
    return float(_costs(weight, values, gram).sum())


def _least_squares(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """The best values [R, n] under a mask, row by row from the normal equations in float64."""
    wide, out = gram.double(), torch.zeros(weight.shape, dtype=torch.float64)
    for row, kept in enumerate(mask):
        if kept.any():
            out[row, kept] = torch.linalg.solve(wide[kept][:, kept], wide[kept] @ weight[row].double())
    return out


def _check_counts(masked: Masked, pattern: Pattern) -> None:
    rows, n = masked.mask.shape
    assert masked.mask.dtype == torch.bool and int(masked.mask.sum()) == pattern.kept(rows, n)
    assert not masked.values[~masked.mask].any()
    if pattern.of:
        assert (masked.mask.reshape(rows, -1, pattern.of).sum(2) == pattern.keep).all()


# -- counts
def test_lowest_takes_exactly_so_many_and_equal_ones_from_the_left() -> None:
    scores = torch.tensor([[1.0, 1, 1, 1], [3, 1, 2, 1], [0, 0, 5, 0], [4, 3, 2, 1]])
    for count in range(5):
        wanted = torch.zeros(4, 4, dtype=torch.bool)
        for row in range(4):
            wanted[row, sorted(range(4), key=lambda i: (float(scores[row, i]), i))[:count]] = True
        assert torch.equal(lowest(scores, count), wanted)


@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern(0.0), Pattern(0.99)], ids=str)
@pytest.mark.parametrize("kind", ["ties", "zeros", "half"])
def test_counts_are_exact_where_scores_are_equal(kind: str, pattern: Pattern) -> None:
    n = 48
    weight = {"ties": _randn(5, n).round(), "zeros": torch.zeros(5, n), "half": _randn(5, n)}[kind]
    if kind == "half":
        weight[:, ::2] = 0.0
    gram = torch.diag((torch.arange(n) % 3).float())  # a third of the columns dead
    for masked in (
        magnitude.prune(weight, None, pattern, MagnitudeOptions()),
        wanda.prune(weight, gram, pattern, WandaOptions()),
        sparsegpt.prune(weight, gram, pattern, SparseGptOptions(block=16)),
    ):
        _check_counts(masked, pattern)


# -- magnitude and wanda
def _naive_scores(scores: Tensor, pattern: Pattern) -> Tensor:
    """Rows, or groups of a row, sorted one by one."""
    rows, n = scores.shape
    mask = torch.ones(rows, n, dtype=torch.bool)
    width = pattern.of or n
    for row, start in itertools.product(range(rows), range(0, n, width)):
        order = sorted(range(start, start + width), key=lambda j: float(scores[row, j]))
        mask[row, order[: pattern.pruned(width)]] = False
    return mask


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_magnitude_and_wanda_are_their_formulas(pattern: Pattern) -> None:
    """|w|, and |w| times the norm of the input's column (arXiv 2306.11695, equation 1), from the activations themselves."""
    x, weight = _inputs(48, 300, seed=3), _randn(9, 48)
    plain = magnitude.prune(weight, None, pattern, MagnitudeOptions())
    scored = wanda.prune(weight, x.T @ x, pattern, WandaOptions())
    norms = torch.stack([column.double().norm() for column in x.T])
    assert torch.equal(plain.mask, _naive_scores(weight.double().abs(), pattern))
    assert torch.equal(scored.mask, _naive_scores(weight.double().abs() * norms, pattern))
    assert not torch.equal(plain.mask, scored.mask)
    for masked in (plain, scored):
        assert torch.equal(masked.values, weight * masked.mask)


def test_wanda_lets_silent_inputs_go_first_and_ranks_them_by_size() -> None:
    weight, gram = _randn(6, 32), torch.diag(1e-3 + _randn(32, seed=1).square())
    gram[:8, :8] = 0.0
    masked = wanda.prune(weight, gram, Pattern(0.125), WandaOptions())  # four go, and eight could
    smallest = weight[:, :8].abs().argsort(1)[:, :4]
    assert torch.equal((~masked.mask).nonzero()[:, 1].reshape(6, 4), smallest.sort(1)[0])
    silent = wanda.prune(weight, torch.zeros(32, 32), HALF, WandaOptions())
    assert torch.equal(silent.mask, magnitude.prune(weight, None, HALF, MagnitudeOptions()).mask)


# -- sparsegpt as published
def _naive_sparsegpt(weight: Tensor, hessian: Tensor, pattern: Pattern, block: int) -> Masked:
    """Optimal brain surgery in float64: the inverse Hessian of what is not yet fixed is computed anew for each column."""
    w, (rows, n) = weight.double().clone(), weight.shape
    mask = torch.ones(rows, n, dtype=torch.bool)
    alone = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(n)])
    for j in range(n):
        if pattern.of and j % pattern.of == 0:
            score = w[:, j : j + pattern.of] ** 2 / alone[j : j + pattern.of]
            for row in range(rows):
                mask[row, j + score[row].argsort()[: pattern.of - pattern.keep]] = False
        if not pattern.of and j % block == 0:
            stop = min(j + block, n)
            score = (w[:, j:stop] ** 2 / alone[j:stop]).flatten()
            count = rows * (int(stop * pattern.sparsity + 1e-9) - int(j * pattern.sparsity + 1e-9))
            gone = torch.ones(len(score), dtype=torch.bool)
            gone[score.argsort()[:count]] = False
            mask[:, j:stop] = gone.reshape(rows, -1)
        inverse = torch.linalg.inv(hessian[j:, j:])
        w[:, j:] -= torch.where(mask[:, j], 0.0, w[:, j])[:, None] / inverse[0, 0] * inverse[0]
    return Masked(w, mask)


@pytest.mark.parametrize("block", [16, 24, 128])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_is_optimal_brain_surgery_in_blocks(pattern: Pattern, block: int) -> None:
    """Algorithm 1 of arXiv 2301.00774; 24 divides neither 96 in whole blocks of 128 nor a batch of 16 columns."""
    n = 96
    weight, gram = _randn(10, n, seed=4), _gram(n, seed=5)
    ours = sparsegpt.prune(weight, gram, pattern, SparseGptOptions(block=block, **PUBLISHED))
    naive = _naive_sparsegpt(weight, _damped(gram), pattern, block)
    assert torch.equal(ours.mask, naive.mask)
    assert (ours.values - naive.values).norm() < 1e-6 * naive.values.norm()
    if not pattern.of:
        for start in range(0, n, block):
            stop = min(start + block, n)
            gone = int((~ours.mask[:, start:stop]).sum())
            assert gone == 10 * (pattern.pruned(stop) - pattern.pruned(start))


# -- brute force
def _best_masks(weight: Tensor, gram: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """For each row the mask of least error, weights solved again, and that error: all C(n, keep) of them."""
    n = weight.shape[1]
    masks = torch.zeros(0, n, dtype=torch.bool)
    for kept in itertools.combinations(range(n), keep):
        mask = torch.zeros(1, n, dtype=torch.bool)
        mask[0, list(kept)] = True
        masks = torch.cat((masks, mask))
    costs = torch.stack(
        [_costs(weight, _least_squares(weight, mask.expand(len(weight), n), gram), gram) for mask in masks]
    )
    least, which = costs.min(0)
    return masks[which], least


def test_with_a_diagonal_gram_wanda_and_sparsegpt_are_optimal() -> None:
    weight, gram = _randn(30, 8, seed=6), torch.diag(torch.exp(2 * _randn(8, seed=7)))
    best, least = _best_masks(weight, _damped(gram), 4)
    for sweeps in (0, 4):
        rows = [sparsegpt.prune(w[None], gram, HALF, SparseGptOptions(sweeps=sweeps)) for w in weight]
        assert torch.equal(torch.cat([row.mask for row in rows]), best)
        torch.testing.assert_close(_costs(weight, torch.cat([row.values for row in rows]), _damped(gram)), least)
    assert torch.equal(wanda.prune(weight, gram, HALF, WandaOptions()).mask, _best_masks(weight, gram, 4)[0])
    assert not torch.equal(magnitude.prune(weight, None, HALF, MagnitudeOptions()).mask, best)


def test_sparsegpt_comes_near_the_best_of_all_masks() -> None:
    """Eight correlated columns, four kept, each row by itself: no mask does better than the best, and ours nearly as well."""
    weight, gram = _randn(60, 8, seed=8), _gram(8, tokens=40, seed=9)
    hessian = _damped(gram)
    _, least = _best_masks(weight, hessian, 4)

    def costs(**options: object) -> Tensor:
        masked = [sparsegpt.prune(w[None], gram, HALF, SparseGptOptions(**options)) for w in weight]
        return torch.cat([_costs(w[None], m.values, hessian) for w, m in zip(weight, masked, strict=True)])

    published, fixed, ours = costs(sweeps=0), costs(sweeps=30, exchange=False), costs(sweeps=30)
    for cost in (published, fixed, ours):
        assert (cost >= least * (1 - 1e-5)).all()
    # a third from the best of 70 masks; each step takes a third of what was left
    assert ours.sum() < 1.35 * least.sum()
    assert ours.sum() < 0.7 * fixed.sum() and fixed.sum() < 0.7 * published.sum()
    assert (ours < 1.001 * least).float().mean() > 0.4


# -- sweeps
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sweeps_converge_to_least_squares_under_their_mask(pattern: Pattern) -> None:
    n = 48
    weight, gram = _randn(7, n, seed=10), _gram(n, seed=11)
    start = sparsegpt.prune(weight, gram, pattern, SparseGptOptions(**PUBLISHED))
    ours = sparsegpt.prune(weight, gram, pattern, SparseGptOptions(sweeps=300, exchange=False))
    assert torch.equal(ours.mask, start.mask)
    optimum = _least_squares(weight, ours.mask, _damped(gram))
    torch.testing.assert_close(ours.values.double(), optimum, rtol=1e-4, atol=1e-4)
    assert (start.values - optimum).norm() > 1e-2 * optimum.norm()


@pytest.mark.parametrize("exchange", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_sweep_raises_the_objective(pattern: Pattern, exchange: bool) -> None:
    n = 192  # more than a block of 128
    weight, gram = 0.05 * _randn(16, n, seed=12), _gram(n, seed=13)
    costs = []
    for sweeps in range(6):
        masked = sparsegpt.prune(weight, gram, pattern, SparseGptOptions(sweeps=sweeps, exchange=exchange))
        _check_counts(masked, pattern)
        costs.append(_objective(weight, masked.values, _damped(gram)))
    for before, after in itertools.pairwise(costs):
        assert after <= before * (1 + 1e-6), costs
    assert costs[-1] < 0.9 * costs[0]


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
def test_sweeps_end_where_dropping_the_cheapest_and_reviving_another_costs_more(pattern: Pattern) -> None:
    n = 32
    weight, gram = _randn(5, n, seed=14), _gram(n, tokens=100, seed=15)
    hessian, width = _damped(gram), pattern.of or n
    masked = sparsegpt.prune(weight, gram, pattern, SparseGptOptions(sweeps=200))
    base = _costs(weight, masked.values, hessian)
    for row, start in itertools.product(range(5), range(0, n, width)):
        columns = range(start, start + width)

        def cost(dropped: int, row: int = row) -> float:
            values = masked.values[row : row + 1].clone()
            values[0, dropped] = 0.0
            return float(_costs(weight[row : row + 1], values, hessian))

        drop = min((j for j in columns if masked.mask[row, j]), key=cost)
        values = masked.values[row].double().clone()
        values[drop] = 0.0
        pull = hessian @ (weight[row].double() - values)
        for revive in (j for j in columns if not masked.mask[row, j]):
            assert cost(drop) - pull[revive] ** 2 / hessian[revive, revive] >= base[row] * (1 - 1e-5)


@pytest.mark.parametrize("grid", [0.0, 0.5], ids=["floats", "codes"])
def test_an_exchange_is_the_best_revival_for_the_cheapest_drop_or_nothing(grid: float) -> None:
    """Every row against all its pairs, by the objective itself, from a point that is no optimum."""
    n, rows = 10, 200
    weight, gram = _randn(rows, n, seed=26), _gram(n, seed=28)
    start, hessian = sparsegpt.prune(weight, gram, Pattern(0.4), SparseGptOptions(**PUBLISHED)), _damped(gram)
    values = (start.values / grid).round() * grid if grid else start.values
    mask = start.mask

    def settle(wanted: Tensor, at: slice) -> Tensor:
        return (wanted / grid).round() * grid if grid else wanted

    pull = hessian.float() @ (weight - values).T
    kept = mask.T.contiguous()
    step = _exchange(values.T.contiguous(), pull, kept, hessian.float(), settle, slice(0, n)).T
    change = _costs(weight, values + step, hessian) - _costs(weight, values, hessian)
    moved = 0
    for row in range(rows):
        base, dropped = _costs(weight[row : row + 1], values[row : row + 1], hessian), []
        for i in mask[row].nonzero()[:, 0].tolist():
            without = values[row].double().clone()
            without[i] = 0.0
            dropped.append((float(_costs(weight[row : row + 1], without[None], hessian) - base), i, without))
        _, cheapest, without = min(dropped, key=lambda entry: entry[0])
        best = torch.inf
        for j in (~mask[row]).nonzero()[:, 0].tolist():
            trial, wanted = without.clone(), hessian[j] @ (weight[row].double() - without) / hessian[j, j]
            trial[j] = settle(wanted, slice(j, j + 1))
            best = min(best, float(_costs(weight[row : row + 1], trial[None], hessian) - base))
        assert float(change[row]) == pytest.approx(min(best, 0.0), rel=1e-3, abs=1e-4)
        flipped = (kept[:, row] != mask[row]).nonzero()[:, 0].tolist()
        assert len(flipped) == (2 if step[row].any() else 0) and kept[:, row].sum() == mask[row].sum()
        assert not flipped or cheapest in flipped
        moved += bool(flipped)
    assert 0.1 * rows < moved < 0.9 * rows


@pytest.mark.parametrize("seed", [20, 40, 60])
@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
def test_each_step_helps_on_inputs_it_has_not_seen(pattern: Pattern, seed: int) -> None:
    x = _inputs(128, 4000, seed)
    seen, unseen = (part.T @ part / len(part) for part in x.chunk(2))
    weight = _randn(64, 128, seed=seed + 5)
    masks = [
        magnitude.prune(weight, None, pattern, MagnitudeOptions()),
        wanda.prune(weight, seen, pattern, WandaOptions()),
        sparsegpt.prune(weight, seen, pattern, SparseGptOptions(**PUBLISHED)),
        sparsegpt.prune(weight, seen, pattern, SparseGptOptions(exchange=False)),
        sparsegpt.prune(weight, seen, pattern, SparseGptOptions()),
    ]
    costs = [_objective(weight, masked.values, unseen) for masked in masks]
    for worse, better in itertools.pairwise(costs):
        assert better < 0.99 * worse, costs


# -- mask and codes together
@pytest.mark.parametrize("name", ["int4-g128", "int3-g32-asym"])
@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
def test_mask_and_codes_together_beat_one_after_the_other(pattern: Pattern, name: str) -> None:
    """Pruned first and quantized after, the mask fixed: worse on the gram, and on inputs not seen, for every seed."""
    n = 128
    for seed in (30, 50, 70):
        x, weight = _inputs(n, 4000, seed), 0.05 * _randn(64, n, seed=seed + 5)
        seen, unseen = (part.T @ part / len(part) for part in x.chunk(2))
        codec = block_codec(name, n)
        first = sparsegpt.prune(weight, seen, pattern, SparseGptOptions())
        apart = gptq.solve(first.values, seen, codec, GptqOptions(), first.mask)
        together = sparsegpt.prune_and_quantize(weight, seen, codec, SparseGptOptions(), GptqOptions(), pattern)
        decoded = together.decode()
        _check_counts(Masked(decoded, together.mask), pattern)
        assert torch.equal(codec.unpack(together.pack()), decoded)
        for gram in (seen, unseen):
            assert _objective(weight, decoded, gram) < 0.995 * _objective(weight, apart.decode(), gram)
        assert together.error == pytest.approx(
            _objective(weight, decoded, seen) / _objective(weight, torch.zeros_like(weight), seen), rel=1e-3
        )


def test_code_sweeps_end_where_no_code_can_improve_alone() -> None:
    """Changing any one kept code of any row to any other costs more, with the mask the descent has ended with."""
    n = 32
    weight, gram = _randn(6, n, seed=16), _gram(n, tokens=100, seed=17)
    codec = block_codec("int3-g32", n)
    solution = sparsegpt.prune_and_quantize(
        weight, gram, codec, SparseGptOptions(), GptqOptions(damping=DAMPING, sweeps=40), HALF
    )
    values, scale = solution.decode().double(), solution.grid.scale.double()
    error, hessian = weight.double() - values, _damped(gram)
    for level in range(codec.low, codec.high + 1):
        delta = torch.where(solution.mask, level * scale - values, 0.0)  # of one column at a time
        change = -2 * delta * (error @ hessian) + delta**2 * hessian.diagonal()
        assert (change >= -1e-5 * _costs(weight, values, hessian)[:, None]).all()


def test_scales_are_not_spent_on_what_goes() -> None:
    """Large weights on silent inputs are pruned, and scales are those of the others."""
    n = 64
    weight, gram = _randn(8, n, seed=18), _gram(n, seed=19)
    gram[::2] = gram[:, ::2] = 0.0
    weight[:, ::2] *= 10.0
    codec = block_codec("int4-g64", n)
    options = SparseGptOptions(damping=1e-5)
    solution = sparsegpt.prune_and_quantize(weight, gram, codec, options, GptqOptions(), Pattern(0.6))
    assert solution.mask[:, ::2].float().mean() < 0.15  # in the place of codes that rounding made zero
    lean = weight * solution.mask
    lean[:, ::2] = 0.0
    lean = codec.fit(lean, gram.diagonal()).scale
    torch.testing.assert_close(solution.grid.scale, lean, rtol=0.3, atol=0.0)
    assert (codec.fit(weight, gram.diagonal()).scale > 2 * lean).all()


# -- the damping that was needed
@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
def test_damping_that_had_to_be_raised_is_reported(pattern: Pattern) -> None:
    """Eight tokens for 64 columns: rounding leaves negative eigenvalues, which the damping must exceed."""
    weight, gram, codec = _randn(4, 64, seed=31), _gram(64, tokens=8, seed=32), block_codec("int4-g64", 64)
    _, damping, retries = damped_gram(gram, 1e-12)
    lowest_eigenvalue = float(torch.linalg.eigvalsh(gram.double())[0] / gram.double().diagonal().mean())
    assert retries > 1 and damping / 10 < -lowest_eigenvalue < damping
    options = SparseGptOptions(damping=1e-12)
    masked = sparsegpt.prune(weight, gram, pattern, options)
    together = sparsegpt.prune_and_quantize(weight, gram, codec, options, GptqOptions(), pattern)
    for solved in (masked, together):
        assert (solved.damping, solved.retries) == (damping, retries)


def test_a_healthy_gram_gets_the_damping_that_was_asked_for() -> None:
    weight, gram = _randn(4, 64, seed=31), _gram(64, seed=32)
    for damping in (0.01, 0.3):
        masked = sparsegpt.prune(weight, gram, HALF, SparseGptOptions(damping=damping))
        assert (masked.damping, masked.retries) == (damping, 0)
    for masked in (
        magnitude.prune(weight, None, HALF, MagnitudeOptions()),
        wanda.prune(weight, gram, HALF, WandaOptions()),
    ):
        assert (masked.damping, masked.retries) == (0.0, 0)


# -- what cannot be done
def test_wrong_requests_are_refused() -> None:
    weight, gram = _randn(4, 30), torch.eye(30)
    for prune in (
        lambda: magnitude.prune(weight, None, TWO_FOUR, MagnitudeOptions()),
        lambda: wanda.prune(weight, gram, TWO_FOUR, WandaOptions()),
        lambda: sparsegpt.prune(weight, gram, TWO_FOUR, SparseGptOptions()),
    ):
        with pytest.raises(ValueError, match=r"2:4 needs a multiple of 4 columns, not 30"):
            prune()
    with pytest.raises(ValueError, match="q4_0"):
        sparsegpt.prune_and_quantize(
            _randn(4, 32), torch.eye(32), block_codec("q4_0", 32), SparseGptOptions(), GptqOptions(), TWO_FOUR
        )
    for bad in (torch.nan, torch.inf):
        for prune, options in ((wanda.prune, WandaOptions()), (sparsegpt.prune, SparseGptOptions())):
            with pytest.raises(NumericalError, match="gram"):
                prune(weight, torch.full_like(gram, bad), HALF, options)


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
def test_gram_and_weight_of_any_size_give_the_same_mask(pattern: Pattern) -> None:
    """Neither has a unit: powers of two change nothing at all."""
    weight, gram = _randn(8, 64, seed=21), _gram(64, seed=22)
    for prune, options in ((wanda.prune, WandaOptions()), (sparsegpt.prune, SparseGptOptions())):
        plain = prune(weight, gram, pattern, options)
        for unit, energy in ((2.0**40, 1.0), (2.0**-40, 1.0), (1.0, 2.0**40), (1.0, 2.0**-40)):
            other = prune(weight * unit, gram * energy, pattern, options)
            assert torch.equal(other.mask, plain.mask)
            assert torch.equal(other.values, plain.values * unit)
