"""Solvers against naive float64 versions of the published algorithms, brute force and closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compress.codecs import block_codec
from compress.codecs.base import BlockCodec
from compress.codecs.grid import Grid, ZeroPointGrid
from compress.errors import NumericalError
from compress.solvers import gptq, rtn
from compress.solvers.base import Solution, damped_gram, inverse_factor, relative_error
from compress.solvers.options import GptqOptions, RtnOptions

PLAIN = {"sweeps": 0, "refits": 0}
DAMPING = 0.01


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _gram(n: int, tokens: int = 2000, seed: int = 1) -> Tensor:
    """Correlated activations with a few loud channels, float32 [n, n]."""
    mix = _randn(n, n, seed=seed) / n**0.5 + 0.5 * torch.eye(n)
    x = (_randn(tokens, n, seed=seed + 1) @ mix) * torch.exp(0.7 * _randn(n, seed=seed + 2))
    return x.T @ x / tokens


def _damped(gram: Tensor, damping: float) -> Tensor:
    return gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def _objective(weight: Tensor, quantized: Tensor, gram: Tensor) -> float:
    error = weight.double() - quantized.double()
    return float(((error @ gram.double()) * error).sum())


def _columns(values: Tensor, codec: BlockCodec) -> Tensor:
    """Per sub-block -> per column, float64."""
    return values.double().repeat_interleave(codec.sub, dim=1)


def _zeros(grid: Grid) -> Tensor:
    """Zero points of a grid of integers, which symmetric ones have in the middle of their codes."""
    return grid.zero if isinstance(grid, ZeroPointGrid) else torch.zeros_like(grid.scale)


def _values(units: Tensor, grid: Grid, codec: BlockCodec) -> Tensor:
    offset = getattr(grid, "offset", None)
    out = units.double() * _columns(grid.scale, codec)
    return out if offset is None else out - _columns(offset, codec)


def _naive_gptq(weight: Tensor, gram: Tensor, codec: BlockCodec, grid: Grid, order: list[list[int]]) -> Tensor:
    """Textbook optimal-brain error feedback in float64 with a static grid: returns units [R, n].

    `order` lists the columns of every step in the order they are fixed. After each step its error is spread
    by H^-1, and the step is struck from H^-1 by Gaussian elimination (OBC, arXiv 2208.11580; no Cholesky).
    """
    w, inverse = weight.double().clone(), torch.linalg.inv(gram.double())
    scale = _columns(grid.scale, codec)
    offset, zero = getattr(grid, "offset", None), getattr(grid, "zero", None)
    offset = None if offset is None else _columns(offset, codec)
    zero = None if zero is None else zero.repeat_interleave(codec.sub, dim=1)
    units = torch.zeros_like(w)
    for at in order:
        block = torch.linalg.inv(inverse[at][:, at])
        target = (w[:, at] + (0 if offset is None else offset[:, at])) / scale[:, at]
        metric = None if len(at) == 1 else block.float()
        units[:, at] = codec.nearest(
            target.float(), block.diagonal().float(), metric, None if zero is None else zero[:, at[0]]
        ).double()
        value = units[:, at] * scale[:, at] - (0 if offset is None else offset[:, at])
        w -= (w[:, at] - value) @ block @ inverse[at]
        inverse -= inverse[:, at] @ block @ inverse[at]
    return units


def _order(hessian: Tensor, step: int, act_order: bool) -> list[list[int]]:
    steps = [list(range(i, i + step)) for i in range(0, len(hessian), step)]
    if act_order:
        steps.sort(key=lambda at: -float(hessian.diagonal()[at].mean()))
    return steps


# -- gptq against the textbook
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["int4-g128", "int3-g64-asym", "q4_k", "q2_k", "iq4_xs", "q5_1", "iq2_xxs", "iq3_xxs"])
def test_gptq_is_textbook_gptq(name: str, act_order: bool) -> None:
    """The codes of eliminating step after step from H^-1; a lattice step is eight columns (LDLQ)."""
    n = 256
    weight, gram = 0.05 * _randn(12, n, seed=3), _gram(n)
    codec = block_codec(name, n)
    solution = gptq.solve(weight, gram, codec, GptqOptions(damping=0.02, act_order=act_order, **PLAIN))
    hessian = _damped(gram, 0.02)
    units = _naive_gptq(weight, hessian, codec, solution.grid, _order(hessian, codec.step, act_order))
    # a tie that float32 breaks the other way changes the rest of its row
    same = (solution.units.double() == units).all(1)
    assert same.sum() >= 11, f"{int((~same).sum())} of 12 rows differ"
    naive = _objective(weight, _values(units, solution.grid, codec), hessian)
    assert _objective(weight, solution.decode(), hessian) == pytest.approx(naive, rel=2e-2)


def _block_ldl(hessian: Tensor, order: list[list[int]]) -> tuple[Tensor, list[Tensor]]:
    """H = M D M^T by block elimination from the last step to the first: float64 M, unit upper triangular by blocks in
    that order, and the diagonal blocks of D (the decomposition of QuIP#, arXiv 2402.04396, section 4.1)."""
    rest, factor, blocks = hessian.clone(), torch.eye(len(hessian), dtype=torch.float64), []
    for k in range(len(order) - 1, -1, -1):
        at, before = order[k], [i for step in order[:k] for i in step]
        blocks.insert(0, rest[at][:, at].clone())
        share = torch.linalg.solve(blocks[0], rest[at][:, before]).T
        factor[torch.tensor(before, dtype=torch.long)[:, None], torch.tensor(at)] = share
        rest[torch.tensor(before, dtype=torch.long)[:, None], torch.tensor(before, dtype=torch.long)] -= (
            share @ blocks[0] @ share.T
        )
    return factor, blocks


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["iq2_xs", "e8p", "e8p4", "trellis2", "trellis4"])
def test_steps_of_many_columns_are_ldlq(name: str, act_order: bool) -> None:
    """Steps of 8 or 16 columns: each is rounded with the errors of those before it, weighed by the block LDL factor."""
    codec = block_codec(name, n := 256 if name == "iq2_xs" else 64)
    rows, gram = 32, _gram(n)
    weight = 0.05 * _randn(rows, n, seed=3)
    options = GptqOptions(damping=0.02, act_order=act_order, **PLAIN)
    solution = gptq.solve(weight, gram, codec, options)
    hessian = _damped(gram, 0.02)
    order = _order(hessian, codec.step, act_order)
    factor, blocks = _block_ldl(hessian, order)
    dense = torch.zeros_like(hessian)
    for at, block in zip(order, blocks, strict=True):
        dense[torch.tensor(at)[:, None], torch.tensor(at)] = block
    torch.testing.assert_close(factor @ dense @ factor.T, hessian)
    scale, units = _columns(solution.grid.scale, codec), torch.zeros(rows, n, dtype=torch.float64)
    error = torch.zeros_like(units)
    for at, block in zip(order, blocks, strict=True):
        target = weight[:, at].double() + error @ factor[:, at]
        price = block.diagonal() * (scale[:, at] ** 2 if codec.rows > 1 else 1)
        units[:, at] = codec.nearest((target / scale[:, at]).float(), price.float(), block.float()).double()
        error[:, at] = weight[:, at].double() - units[:, at] * scale[:, at]
    same = (solution.units.double() == units).reshape(rows // codec.rows, -1).all(1)
    if codec.rows == 1:
        assert same.sum() >= rows - 2  # a tie that float32 breaks the other way changes the rest of its row
    ours, theirs = (_objective(weight, q, hessian) for q in (solution.decode(), weight.double() - error))
    assert ours == pytest.approx(theirs, rel=2e-2)
    assert (solution.units.double() == units).double().mean() > (0.9 if codec.rows == 1 else 0.6)
    # what is minimised: the error in the factor's coordinates, block by block
    spread = error @ factor
    by_blocks = sum(float(((spread[:, at] @ b) * spread[:, at]).sum()) for at, b in zip(order, blocks, strict=True))
    assert theirs == pytest.approx(by_blocks, rel=1e-9)


def test_act_order_is_not_natural_order() -> None:
    weight, gram = 0.05 * _randn(4, 256, seed=3), _gram(256)
    codec = block_codec("int4-g128", 256)
    orders = [gptq.solve(weight, gram, codec, GptqOptions(act_order=a, **PLAIN)).units for a in (True, False)]
    assert not torch.equal(*orders)


@pytest.mark.parametrize("name", ["int4-g128", "int3-row-asym", "q4_k", "q6_k", "iq4_nl", "iq2_xs", "iq3_xxs"])
def test_independent_columns_need_no_feedback(name: str) -> None:
    """With a diagonal gram every column's optimum is its nearest level: gptq = nearest in the same grid."""
    n = 256
    weight = 0.05 * _randn(6, n, seed=4)
    gram = torch.diag(torch.exp(_randn(n, seed=5)))
    codec = block_codec(name, n)
    solution = gptq.solve(weight, gram, codec, GptqOptions(damping=DAMPING, **PLAIN))
    hessian = _damped(gram, DAMPING)
    independent = _naive_gptq(
        weight, torch.diag(hessian.diagonal()), codec, solution.grid, _order(hessian, codec.step, False)
    )
    assert (solution.units.double() == independent).float().mean() > 0.998


@pytest.mark.parametrize("name", ["int4-g128", "q4_k", "q3_k", "iq4_nl", "iq2_xxs"])
def test_gptq_of_white_inputs_is_rtn(name: str) -> None:
    weight, gram = 0.05 * _randn(6, 256, seed=6), 3.0 * torch.eye(256)
    codec = block_codec(name, 256)
    nearest = rtn.solve(weight, gram, codec, RtnOptions())
    solved = gptq.solve(weight, gram, codec, GptqOptions(**PLAIN))
    assert (nearest.units == solved.units).float().mean() > 0.998
    assert solved.error == pytest.approx(nearest.error, rel=1e-3)


@pytest.mark.parametrize("name", ["int4-g128", "int2-g64", "int4-g32-asym", "q4_0", "q5_1", "q4_k", "q6_k",
                                  "q3_k", "q2_k",
                                  "iq4_xs", "iq2_xxs", "iq2_xs", "iq3_xxs"])  # fmt: skip
def test_each_stage_lowers_the_damped_objective(name: str) -> None:
    """rtn >= feedback >= + refits >= + sweeps, measured in float64."""
    n = 256
    weight, gram = 0.05 * _randn(16, n, seed=7), _gram(n, seed=8)
    codec, hessian = block_codec(name, n), _damped(gram, DAMPING)
    stages = [rtn.solve(weight, gram, codec, RtnOptions())]
    stages += [
        gptq.solve(weight, gram, codec, GptqOptions(damping=DAMPING, refits=refits, sweeps=sweeps))
        for refits, sweeps in ((0, 0), (1, 0), (3, 0), (3, 1), (3, 3))
    ]
    costs = [_objective(weight, s.decode(), hessian) for s in stages]
    for before, after in itertools.pairwise(costs):
        assert after <= before * (1 + 1e-5), costs
    assert costs[-1] < 0.9 * costs[0]


# -- brute force
@pytest.mark.parametrize("columns", [4, 8])
def test_two_bit_rows_come_near_the_best_codes(columns: int) -> None:
    """Every one of the 4^n codes of a row, in the grid the solver ended with."""
    rows = 24
    weight, gram = _randn(rows, columns, seed=9), _gram(columns, tokens=64, seed=10)
    codec, hessian = block_codec("int2-row", columns), _damped(gram, DAMPING)
    solution = gptq.solve(weight, gram, codec, GptqOptions(damping=DAMPING))
    plain = gptq.solve(weight, gram, codec, GptqOptions(damping=DAMPING, **PLAIN))
    nearest = rtn.solve(weight, gram, codec, RtnOptions())
    levels = torch.arange(codec.low, codec.high + 1, dtype=torch.float64)
    codes = torch.cartesian_prod(*[levels] * columns)
    factor = torch.linalg.cholesky(hessian)

    def rows_of(s: Solution) -> Tensor:
        return (((weight - s.decode()).double() @ factor) ** 2).sum(1)

    scale = solution.grid.scale[:, 0].double()
    rests = [(weight[r].double() - codes * scale[r]) @ factor for r in range(rows)]
    best = torch.stack([(rest**2).sum(1).min() for rest in rests])
    assert (rows_of(solution) >= best * (1 - 1e-5)).all()
    assert rows_of(solution).sum() <= 1.25 * best.sum()
    assert rows_of(solution).sum() <= rows_of(plain).sum() <= rows_of(nearest).sum()


def test_sweeps_end_where_no_single_code_can_improve() -> None:
    """Coordinate descent run long enough is a local optimum: changing any one code of any row costs more."""
    n = 32
    weight, gram = _randn(6, n, seed=11), _gram(n, tokens=100, seed=12)
    codec, hessian = block_codec("int3-g32", n), _damped(gram, DAMPING)
    solution = gptq.solve(weight, gram, codec, GptqOptions(damping=DAMPING, sweeps=60))
    quantized = solution.decode().double()
    error = weight.double() - quantized
    base = ((error @ hessian) * error).sum(1)
    scale = _columns(solution.grid.scale, codec)
    for level in range(codec.low, codec.high + 1):
        delta = level * scale - quantized  # of one column at a time
        cost = base[:, None] - 2 * delta * (error @ hessian) + delta**2 * hessian.diagonal()
        assert (cost >= base[:, None] * (1 - 1e-5)).all()


# -- rtn
@pytest.mark.parametrize("name", ["int4-g128", "int4-g32-asym", "q4_k", "q8_0", "iq4_nl", "iq2_xxs"])
def test_rtn_rounds_to_the_nearest_value_of_its_grid(name: str) -> None:
    n = 256
    weight, gram = 0.05 * _randn(5, n, seed=13), _gram(n)
    codec = block_codec(name, n)
    solution = rtn.solve(weight, gram, codec, RtnOptions())
    diagonal = torch.diag(gram.diagonal().double())
    naive = _naive_gptq(weight, diagonal, codec, solution.grid, _order(diagonal, codec.step, False))
    assert (solution.units.double() == naive).float().mean() > 0.998
    assert (solution.damping, solution.retries) == (0.0, 0)
    assert solution.error == pytest.approx(relative_error(weight, solution.decode(), gram))


def test_rtn_without_gram_is_unweighted_and_an_empty_gram_counts_as_none() -> None:
    weight = _randn(4, 128, seed=14)
    codec = block_codec("int4-g64", 128)
    none, empty, white = (
        rtn.solve(weight, g, codec, RtnOptions()) for g in (None, torch.zeros(128, 128), torch.eye(128))
    )
    assert torch.equal(none.units, empty.units) and torch.equal(none.units, white.units)
    assert none.error == pytest.approx(float(((weight - none.decode()) ** 2).sum() / (weight**2).sum()))


def test_importance_moves_error_to_the_columns_that_matter_less() -> None:
    weight = _randn(32, 256, seed=15)
    codec = block_codec("q2_k", 256)
    loud = torch.ones(256)
    loud[::4] = 100.0
    flat = rtn.solve(weight, None, codec, RtnOptions()).decode()
    weighted = rtn.solve(weight, torch.diag(loud), codec, RtnOptions()).decode()
    before, after = ((weight - q)[:, ::4].square().mean() for q in (flat, weighted))
    assert after < 0.9 * before


# -- damping and degenerate statistics
def test_relative_error_is_the_trace_formula() -> None:
    weight, gram = _randn(3, 16, seed=16), _gram(16, tokens=50)
    quantized = weight + 0.1 * _randn(3, 16, seed=17)
    expected = _objective(weight, quantized, gram) / _objective(weight, torch.zeros_like(weight), gram)
    assert relative_error(weight, quantized, gram) == pytest.approx(expected, rel=1e-5)


def test_inverse_factor_inverts_the_damped_gram() -> None:
    gram = _gram(48)
    damped, damping, retries = damped_gram(gram, 0.05)
    upper = inverse_factor(damped[None])[0][0]
    assert (damping, retries) == (0.05, 0)
    torch.testing.assert_close(damped.double(), _damped(gram, 0.05), rtol=1e-6, atol=1e-6)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(
        (upper.double().T @ upper.double()), torch.linalg.inv(_damped(gram, 0.05)), rtol=1e-4, atol=1e-6
    )


def test_damping_ladder_is_climbed_and_recorded() -> None:
    """A gram with a negative eigenvalue (float32 sums have them) needs damping of at least its size."""
    basis = torch.linalg.qr(_randn(32, 32, seed=18))[0]
    eigenvalues = torch.cat((torch.tensor([-1e-3]), torch.ones(31)))
    gram = basis @ torch.diag(eigenvalues) @ basis.T
    mean = float(gram.diagonal().mean())
    damped, damping, retries = damped_gram((gram + gram.T) / 2, 1e-6)
    upper = inverse_factor(damped[None])[0][0]
    assert retries == 4 and damping == pytest.approx(1e-2)  # 1e-6, 1e-5, 1e-4, 1e-3 (just too small), 1e-2
    assert float(torch.linalg.eigvalsh(damped.double())[0]) == pytest.approx(damping * mean - 1e-3, rel=1e-2)
    assert torch.isfinite(upper).all()
    codec = block_codec("int4-g32", 32)
    solution = gptq.solve(_randn(4, 32), (gram + gram.T) / 2, codec, GptqOptions(damping=1e-6))
    assert solution.retries >= retries and solution.damping >= damping * 0.99


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gram_is_a_numerical_error(bad: float) -> None:
    gram = _gram(32)
    gram[3, 5] = gram[5, 3] = bad
    with pytest.raises(NumericalError) as error:
        gptq.solve(_randn(4, 32), gram, block_codec("int4-g32", 32), GptqOptions())
    assert "\n" not in str(error.value) and "gram" in str(error.value)


def test_a_gram_no_damping_repairs_is_a_numerical_error() -> None:
    with pytest.raises(NumericalError):
        damped_gram(-1e12 * torch.eye(8) + torch.diag(torch.tensor([1.1e13] + [0.0] * 7)), 1e-8, tries=3)


@pytest.mark.parametrize("name", ["int4-g64", "int3-row-asym", "q4_k", "q2_k", "iq2_xxs", "iq3_xxs"])
def test_rank_deficient_gram_and_dead_columns(name: str) -> None:
    """Eight tokens for 256 columns, a quarter of them always zero: still better than rounding."""
    n = 256
    weight = 0.05 * _randn(8, n, seed=19)
    x = _randn(8, n, seed=20)
    x[:, ::4] = 0.0
    gram, codec = x.T @ x / 8, block_codec(name, n)
    nearest = rtn.solve(weight, gram, codec, RtnOptions())
    solution = gptq.solve(weight, gram, codec, GptqOptions())
    decoded = solution.decode()
    assert torch.isfinite(decoded).all() and decoded.abs().max() < 10 * weight.abs().max()
    assert solution.error < nearest.error
    assert torch.equal(codec.unpack(solution.pack()), decoded)


@pytest.mark.parametrize("name", ["int4-g64", "q4_k", "iq2_xxs"])
def test_an_expert_that_saw_nothing_is_rounded(name: str) -> None:
    weight = 0.05 * _randn(4, 256, seed=21)
    codec = block_codec(name, 256)
    solution = gptq.solve(weight, torch.zeros(256, 256), codec, GptqOptions())
    nearest = rtn.solve(weight, None, codec, RtnOptions())
    ours, theirs = (float(((weight - s.decode()) ** 2).sum()) for s in (solution, nearest))
    assert ours <= 1.001 * theirs


def test_gram_of_any_size_gives_the_same_codes() -> None:
    """The gram's unit does not matter: powers of two change nothing at all."""
    weight, gram = 0.05 * _randn(6, 256, seed=22), _gram(256)
    for name in ("int4-g128", "q4_k"):
        codec = block_codec(name, 256)
        one, big, small = (gptq.solve(weight, g, codec, GptqOptions()) for g in (gram, gram * 2.0**20, gram * 2.0**-20))
        for other in (big, small):
            assert (one.units == other.units).float().mean() > 0.99
            assert other.error == pytest.approx(one.error, rel=1e-2)


# -- options
def test_options_are_validated() -> None:
    for wrong in ({"damping": 0.0}, {"sweeps": -1}, {"dampign": 0.1}, {"sweeps": "2"}):
        with pytest.raises(ValueError):
            GptqOptions(**wrong)


def _naive_clip(weight: Tensor, gram: Tensor, rounded, group: int) -> Tensor:
    """One group of one row at a time, each limit in turn; `rounded` must treat groups independently."""
    out = weight.clone()
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], group):
            at = slice(start, start + group)
            w, block = weight[row : row + 1, at], gram[at, at].double()
            errors = []
            for i in range(10):
                limit = w.abs().max() * (1 - i / 20)
                lost = (rounded(w.clamp(-limit, limit)) - w).double()
                errors.append(float(lost @ block @ lost.T))
            limit = w.abs().max() * (1 - errors.index(min(errors)) / 20)
            out[row, at] = w[0].clamp(-limit, limit)
        candidates = [r[row].double() for r in (weight, out)]
        lost = [rounded(c.float().reshape(-1, group)).flatten().double() - candidates[0] for c in candidates]
        if lost[1] @ gram.double() @ lost[1] >= lost[0] @ gram.double() @ lost[0]:
            out[row] = weight[row]
    return out


def test_clipping_matches_a_search_group_by_group() -> None:
    weight, gram = _randn(12, 64) ** 3, _gram(64)  # long tails

    def by_group(w: Tensor) -> Tensor:
        """Plain rounding to seven levels by the largest weight of each group of 16."""
        groups = w.reshape(-1, 16)
        scale = groups.abs().amax(1, keepdim=True).clamp_min(1e-9) / 3
        return ((groups / scale).round() * scale).reshape(w.shape)

    ours, wanted = rtn.clip(weight, gram, by_group, 16), _naive_clip(weight, gram, by_group, 16)
    assert torch.equal(ours, wanted) and not torch.equal(ours, weight)


@pytest.mark.parametrize("name", ["int3-g128", "q4_k"])
def test_clipping_helps_a_codec_that_searches_its_own_scales(name: str) -> None:
    weight = _randn(32, 256) * (1 + 4 * (_randn(32, 256, seed=5) > 2.5)).float()
    gram, codec = _gram(256), block_codec(name, 256)
    plain, clipped = (rtn.solve(weight, gram, codec, RtnOptions(clip=clip)).decode() for clip in (False, True))

    def errors(quantized: Tensor) -> Tensor:
        lost = (quantized - weight).double()
        return ((lost @ gram.double()) * lost).sum(1)

    before, after = errors(plain), errors(clipped)
    assert after.sum() < 0.99 * before.sum() and bool((after <= before * 1.0001).all())


# -- masks
def _mask(rows: int, n: int, share: float = 0.5, seed: int = 30) -> Tensor:
    """Exactly so many weights of every row stay, anywhere."""
    return _randn(rows, n, seed=seed).argsort(1).argsort(1) < round(n * share)


def _least_squares(weight: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """The best values under a mask, row by row from the normal equations in float64."""
    out = torch.zeros(weight.shape, dtype=torch.float64)
    for row, kept in enumerate(mask):
        out[row, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight[row].double())
    return out


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["int4-g128", "int3-g64-asym"])
def test_masked_gptq_feeds_back_what_the_mask_takes(name: str, act_order: bool) -> None:
    """Textbook feedback in which a pruned column's value is zero, whatever has reached it by then."""
    n = 256
    weight, gram, mask = 0.05 * _randn(12, n, seed=3), _gram(n), _mask(12, n)
    codec, hessian = block_codec(name, n), _damped(gram, 0.02)
    weight = _least_squares(weight, mask, hessian).float()  # nothing is left to take over before rounding
    solution = gptq.solve(weight, gram, codec, GptqOptions(damping=0.02, act_order=act_order, **PLAIN), mask)
    w, inverse = weight.double(), torch.linalg.inv(hessian)
    scale, zero = _columns(solution.grid.scale, codec), _columns(_zeros(solution.grid), codec)
    units = torch.zeros_like(w)
    for (j,) in _order(hessian, 1, act_order):
        nearest = codec.nearest((w[:, j] / scale[:, j]).float()[:, None], torch.ones(1), None, zero[:, j].float())
        units[:, j] = torch.where(mask[:, j], nearest[:, 0].double(), 0.0)
        w -= ((w[:, j] - units[:, j] * scale[:, j]) / inverse[j, j])[:, None] * inverse[j]
        inverse -= inverse[:, j, None] @ inverse[None, j] / inverse[j, j]
    assert (solution.units.double() == units).all(1).sum() >= 11


@pytest.mark.parametrize("name", ["int2-row", "int2-row-asym"])
def test_masked_two_bit_rows_come_near_the_best_codes(name: str) -> None:
    """Every one of the 4^5 codes of a row with five of eight weights kept, in the grid the solver ended with."""
    rows, columns = 24, 8
    weight, gram = _randn(rows, columns, seed=9), _gram(columns, tokens=64, seed=10)
    mask, codec, hessian = _mask(rows, columns, 5 / 8), block_codec(name, columns), _damped(gram, DAMPING)
    factor = torch.linalg.cholesky(hessian)
    costs = {}
    for sweeps in (0, 2, 8):
        options = GptqOptions(damping=DAMPING, sweeps=sweeps, refits=min(sweeps, 2))
        solution = gptq.solve(weight, gram, codec, options, mask)
        assert solution.mask is mask or torch.equal(solution.mask, mask)
        costs[sweeps] = (((weight - solution.decode()).double() @ factor) ** 2).sum(1)
    scale, zero = solution.grid.scale[:, 0].double(), _zeros(solution.grid)[:, 0].double()
    best = torch.zeros(rows, dtype=torch.float64)
    for row in range(rows):
        levels = torch.arange(codec.low, codec.high + 1, dtype=torch.float64) - zero[row]
        codes = torch.cartesian_prod(*[levels if kept else torch.zeros(1).double() for kept in mask[row]])
        best[row] = (((weight[row].double() - codes * scale[row]) @ factor) ** 2).sum(1).min()
    assert (costs[8] >= best * (1 - 1e-5)).all()
    assert costs[8].sum() <= 1.1 * best.sum()
    assert costs[8].sum() <= costs[2].sum() <= costs[0].sum()


@pytest.mark.parametrize("name", ["int4-g128", "int3-g64-asym", "int2-row"])
def test_what_is_pruned_is_exactly_zero(name: str) -> None:
    weight, gram, mask = 0.05 * _randn(16, 256, seed=23), _gram(256), _mask(16, 256)
    codec = block_codec(name, 256)
    for solution in (
        gptq.solve(weight, gram, codec, GptqOptions(), mask),
        rtn.solve(weight, gram, codec, RtnOptions(), mask),
        rtn.solve(weight, gram, codec, RtnOptions(clip=True), mask),
        rtn.solve(weight, None, codec, RtnOptions(), mask),
    ):
        assert torch.equal(solution.mask, mask)
        assert not solution.units[~mask].any() and not solution.decode()[~mask].any()
        assert torch.equal(codec.unpack(solution.pack()), solution.decode())
        assert solution.decode()[mask].count_nonzero() > 0.5 * mask.sum()


def test_a_mask_that_keeps_everything_changes_nothing() -> None:
    weight, gram = 0.05 * _randn(16, 256, seed=24), _gram(256)
    everything = torch.ones_like(weight, dtype=torch.bool)
    for name in ("int4-g128", "int3-g64-asym"):
        codec = block_codec(name, 256)
        plain, masked = (gptq.solve(weight, gram, codec, GptqOptions(), m) for m in (None, everything))
        assert plain.mask is None and (plain.units == masked.units).float().mean() > 0.995
        nearest = [rtn.solve(weight, gram, codec, RtnOptions(), m) for m in (None, everything)]
        assert torch.equal(nearest[0].units, nearest[1].units)


@pytest.mark.parametrize("name", ["int4-g128", "int3-g64-asym"])
def test_of_a_dense_target_the_kept_weights_take_over(name: str) -> None:
    """As good as rounding the least-squares optimum under the mask, and far better than rounding the weights that stay."""
    n = 256
    weight, gram, mask = 0.05 * _randn(16, n, seed=25), _gram(n), _mask(16, n)
    codec, hessian = block_codec(name, n), _damped(gram, DAMPING)
    optimum = _least_squares(weight, mask, hessian).float()
    targets = {"dense": weight, "optimum": optimum, "as they are": weight * mask}
    costs = {
        key: _objective(weight, gptq.solve(target, gram, codec, GptqOptions(damping=DAMPING), mask).decode(), hessian)
        for key, target in targets.items()
    }
    floats = _objective(weight, optimum, hessian)
    assert floats < costs["dense"] < 1.03 * costs["optimum"]
    assert costs["dense"] - floats < 0.2 * (costs["as they are"] - floats)


def test_masked_sweeps_lower_the_damped_objective() -> None:
    weight, gram, mask = 0.05 * _randn(16, 256, seed=26), _gram(256, seed=8), _mask(16, 256)
    codec, hessian = block_codec("int3-g64", 256), _damped(gram, DAMPING)
    floats, costs = _objective(weight, _least_squares(weight, mask, hessian), hessian), []
    for refits, sweeps in ((0, 0), (1, 0), (3, 0), (3, 1), (3, 3)):
        options = GptqOptions(damping=DAMPING, refits=refits, sweeps=sweeps)
        costs.append(_objective(weight, gptq.solve(weight, gram, codec, options, mask).decode(), hessian))
    for before, after in itertools.pairwise(costs):
        assert after <= before * (1 + 1e-5), costs
    assert costs[-1] - floats < 0.9 * (costs[0] - floats)


@pytest.mark.parametrize("name", ["q4_k", "iq4_nl", "iq2_xxs", "e8p"])
def test_codecs_without_single_zeros_take_no_mask(name: str) -> None:
    weight = _randn(16, 256)
    for solver, options in ((gptq, GptqOptions()), (rtn, RtnOptions())):
        with pytest.raises(ValueError, match=name):
            solver.solve(weight, torch.eye(256), block_codec(name, 256), options, torch.ones(16, 256).bool())
