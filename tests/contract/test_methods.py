"""What every solver, pruner, factorizer and codec found in the folders must do; a new file is tested without being listed.

One folder holds the first three; the registries of `options.py` tell them apart.
"""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import compress.codecs
import compress.solvers
from compress.codecs import block_codec, get_codec
from compress.codecs import names as codec_names
from compress.codecs.base import BlockCodec, Codec
from compress.codecs.names import UNIFORM_NAMES, codec_info, row_bytes
from compress.solvers.base import Solution, relative_error
from compress.solvers.options import FACTORIZERS, PRUNERS, SOLVERS
from compress.weights import Factors, Masked, Pattern

SHARED = {
    "__init__",
    "base",
    "options",
    "feedback",
    "descent",
    "quantize",
    "masks",
    "whitening",
    "dictionary",
    "names",
    "bits",
    "lattice",
    "forms",
    "stack",
    "packing",
    "grid",
    "lookup",
    "tables",
    "scales",
    "refit",
    "factors",
}  # files of the folders that are no method


def _files(package: ModuleType) -> list[str]:
    return sorted(p.stem for p in Path(package.__path__[0]).glob("*.py") if p.stem not in SHARED)


METHOD_FILES = _files(compress.solvers)
REGISTRIES = {"solve": SOLVERS, "prune": PRUNERS, "factorize": FACTORIZERS}
SOLVER_NAMES, PRUNER_NAMES, FACTORIZER_NAMES = (sorted(names) for names in REGISTRIES.values())
CODEC_FILES = _files(compress.codecs)
# files that stand for a family of names, and the names tested here
FAMILIES = {
    "e8p": ("e8p", "e8p3", "e8p4"),
    "float": ("f32", "f16", "bf16"),
    "nf4": ("nf4", "nf4-dq"),
    "fp4": ("fp4", "fp4-dq"),
    "sparse": ("sparse-bf16", "sparse-int4-g128", "2:4-int3-g64-asym"),
    "trellis": ("trellis2", "trellis3", "trellis4"),
    "uniform": ("int2-g64", "int3-g128-asym", "int4-g128", "int4-row", "int8-g32-asym"),
}
CODECS = [name for stem in CODEC_FILES for name in FAMILIES.get(stem, (stem,))]
SOLVABLE = [name for name in CODECS if isinstance(get_codec(name), BlockCodec)]
PAIRS = [(solver, codec) for solver in SOLVER_NAMES for codec in SOLVABLE]
N = 256


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def _fixture(codec: str) -> tuple[Tensor, Tensor]:
    """Weight and the gram of correlated inputs with loud channels: [12, 256], or two tiles high and [32, 64] where rows
    are coded together."""
    rows, n = (12, N) if codec_info(codec).rows == 1 else (2 * codec_info(codec).rows, 64)
    mix = _randn(n, n, seed=1) / n**0.5 + 0.5 * torch.eye(n)
    x = (_randn(1500, n, seed=2) @ mix) * torch.exp(0.7 * _randn(n, seed=3))
    return 0.05 * _randn(rows, n, seed=4), x.T @ x / 1500


def _solve(solver: str, codec: str | BlockCodec, weight: Tensor, gram: Tensor) -> Solution:
    bound = block_codec(codec, weight.shape[1]) if isinstance(codec, str) else codec
    return importlib.import_module(f"compress.solvers.{solver}").solve(weight, gram, bound, SOLVERS[solver]())


@functools.cache
def _plain(solver: str, codec: str) -> Solution:
    """The fixture's own solution."""
    return _solve(solver, codec, *_fixture(codec))


def _same(a: Solution, b: Solution) -> None:
    parts_a, parts_b = a.pack().parts, b.pack().parts
    assert parts_a.keys() == parts_b.keys()
    for key in parts_a:
        assert torch.equal(parts_a[key], parts_b[key])


# -- the files themselves
def test_every_method_has_a_file_and_one_registry() -> None:
    assert sorted([*SOLVERS, *PRUNERS, *FACTORIZERS]) == METHOD_FILES
    for stem in SHARED - {"__init__"}:
        assert any(Path(p.__path__[0], f"{stem}.py").exists() for p in (compress.solvers, compress.codecs)), stem


@pytest.mark.parametrize("name", METHOD_FILES)
def test_method_files_and_options_go_together(name: str) -> None:
    module = importlib.import_module(f"compress.solvers.{name}")
    kind = next(kind for kind, registry in REGISTRIES.items() if name in registry)
    cls = REGISTRIES[kind][name]
    assert cls().name == name and isinstance(module.NEEDS_GRAM, bool) and module.__doc__ and cls.__doc__
    assert [other for other in REGISTRIES if hasattr(module, other)] == [kind]
    assert all(
        field.description for key, field in cls.model_fields.items() if key != "name" and key in cls.__annotations__
    )


@pytest.mark.parametrize("name", CODECS)
def test_codec_files_and_names_go_together(name: str) -> None:
    codec, info = get_codec(name), codec_info(name)
    assert isinstance(codec, Codec) and (codec.name, codec.kind) == (name, info.kind)
    assert get_codec(name) is codec
    assert importlib.import_module(type(codec).__module__).__doc__


def test_every_known_name_has_a_file() -> None:
    from compress.codecs.names import _FIXED

    for name in (*_FIXED, *UNIFORM_NAMES):
        assert re.fullmatch(r"[a-z][a-z0-9_-]*", name) and get_codec(name).name == name
    assert {n for n in CODECS if codec_info(n).kind not in ("uniform", "sparse")} == set(_FIXED)


@pytest.mark.parametrize("name", CODECS)
def test_declared_facts_are_those_of_the_codec(name: str) -> None:
    """What `names.py` says without torch, against what the codec does."""
    codec, info = get_codec(name), codec_info(name)
    assert codec.info == info
    assert info.is_float == (info.kind == "float") == hasattr(codec, "encode")
    assert info.derived == (name not in codec_names._FIXED and not info.is_integer)
    assert (info.kind in codec_names.SPARSE_VALUES) == info.stores_zero == _has_sparse_form(name)
    if info.fixed_rows:
        assert 8 * row_bytes(name, 2 * info.block) == codec.bits_per_weight(2 * info.block) * 2 * info.block
    if info.scales_by is not None:
        other = codec_info(info.scales_by)
        assert (other.incoherent, other.bits, other.rows) == (info.incoherent, info.bits, 1)
    if info.exact_bfloat16:
        assert all(torch.equal(t, t.bfloat16().float()) for t in codec.tables())
    if isinstance(codec, BlockCodec) and info.stores_zero:
        weight, gram = _fixture(name)
        mask = torch.arange(weight.shape[1]).expand_as(weight) % 3 > 0
        solution = importlib.import_module("compress.solvers.rtn").solve(
            weight, gram, block_codec(name, weight.shape[1]), SOLVERS["rtn"](), mask
        )
        assert not codec.unpack(solution.pack())[~mask].any()


def _has_sparse_form(name: str) -> bool:
    try:
        return codec_info(f"sparse-{name}").has_mask
    except KeyError:
        return False


@pytest.mark.parametrize("name", SOLVABLE)
def test_rescaled_grids_decode_to_what_their_bytes_say(name: str) -> None:
    """Scales tuned after the codes are known: rows that are zero stay so, and no code is refused."""
    weight, gram = (t.clone() for t in _fixture(name))
    weight[2] = 0.0
    solution = _solve("rtn", name, weight, gram)
    grid, codec = solution.grid, solution.codec
    stored, *offsets = grid.reals
    factor = 1 + 0.2 * torch.rand(stored.shape, generator=torch.Generator().manual_seed(7))
    moved = codec.rescaled(grid, factor, *(0.9 * torch.ones_like(dmin) for dmin in offsets))
    decoded = codec.decode(solution.units, moved)
    assert torch.equal(codec.unpack(codec.pack(solution.units, moved)), decoded)
    assert not decoded[2].any()
    if name != "mxfp4":  # whose scales are powers of two
        assert decoded.norm() > 1.02 * solution.decode().norm()


# -- every solver with every codec
@pytest.mark.parametrize(("solver", "codec"), PAIRS)
def test_deterministic_pure_and_bytes_hold_what_was_solved(solver: str, codec: str) -> None:
    weight, gram = (t.clone() for t in _fixture(codec))
    first, again = _plain(solver, codec), _solve(solver, codec, weight, gram)
    _same(first, again)
    assert first.error == again.error
    assert torch.equal(weight, _fixture(codec)[0]) and torch.equal(gram, _fixture(codec)[1]), "an input was modified"
    decoded = get_codec(codec).unpack(first.pack())
    assert decoded.dtype == torch.float32 and decoded.shape == weight.shape
    assert torch.equal(decoded, first.decode())
    assert first.error == pytest.approx(relative_error(weight, decoded, gram), rel=1e-4)
    assert 0 < first.error < 0.5


@pytest.mark.parametrize(("solver", "codec"), PAIRS)
def test_rows_are_independent(solver: str, codec: str) -> None:
    """A row-permuted weight gives row-permuted bytes; float32 sums may break a rare tie the other way. Rows that are
    coded together move together."""
    weight, gram = _fixture(codec)
    tile = codec_info(codec).rows
    order = torch.randperm(len(weight) // tile, generator=torch.Generator().manual_seed(5))
    order = (order[:, None] * tile + torch.arange(tile)).flatten()
    straight, shuffled = _plain(solver, codec), _solve(solver, codec, weight[order], gram)
    same = (straight.units[order] == shuffled.units).all(1)
    assert same.float().mean() >= 0.9
    torch.testing.assert_close(straight.decode()[order][same], shuffled.decode()[same], rtol=1e-3, atol=1e-5)
    assert shuffled.error == pytest.approx(straight.error, rel=1e-2)


@pytest.mark.parametrize(("solver", "codec"), PAIRS)
def test_one_row_and_a_non_contiguous_view(solver: str, codec: str) -> None:
    weight, gram = _fixture(codec)
    tile = codec_info(codec).rows
    one = _solve(solver, codec, weight[tile : 2 * tile], gram)
    assert one.decode().shape == (tile, weight.shape[1])
    view = weight.T.contiguous().T  # column-major
    strided = torch.stack((weight, torch.full_like(weight, torch.nan)), dim=2)[..., 0]
    assert not view.is_contiguous() and not strided.is_contiguous()
    plain = _plain(solver, codec)
    for other in (view, strided):
        solution = _solve(solver, codec, other, gram)
        assert (solution.units == plain.units).float().mean() >= 0.9
        assert solution.error == pytest.approx(plain.error, rel=3e-2)


@pytest.mark.parametrize(("solver", "codec"), PAIRS)
def test_dead_columns_and_a_rank_deficient_gram(solver: str, codec: str) -> None:
    """Six tokens, every fourth channel silent: finite values of the weight's own size, an honest error."""
    weight, _ = _fixture(codec)
    x = _randn(6, weight.shape[1], seed=6)
    x[:, ::4] = 0.0
    gram = x.T @ x / 6
    solution = _solve(solver, codec, weight, gram)
    decoded = solution.decode()
    assert torch.isfinite(decoded).all() and decoded.abs().max() <= 6 * weight.abs().max()
    assert solution.error == pytest.approx(relative_error(weight, decoded, gram), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(("solver", "codec"), PAIRS)
def test_empty_and_zero_inputs(solver: str, codec: str) -> None:
    """No statistics at all; a weight that is all zero; zero rows among others."""
    weight, gram = _fixture(codec)
    assert torch.isfinite(_solve(solver, codec, weight, torch.zeros_like(gram)).decode()).all()
    assert not _solve(solver, codec, torch.zeros_like(weight[: codec_info(codec).rows]), gram).decode().any()
    partly = weight.clone()
    partly[2] = 0.0
    assert not _solve(solver, codec, partly, gram).decode()[2].any()


@pytest.mark.parametrize(("solver", "codec"), [pair for pair in PAIRS if pair[0] != "rtn"])
def test_no_worse_than_rounding(solver: str, codec: str) -> None:
    """Gram-weighted error on the fixed correlated fixture."""
    assert _plain(solver, codec).error < 0.9 * _plain("rtn", codec).error


# -- every pruner with every pattern
PATTERNS = [Pattern(0.5), Pattern(0.7), Pattern.n_of_m(2, 4), Pattern.n_of_m(4, 8)]
PRUNINGS = [pytest.param(pruner, pattern, id=f"{pruner}-{pattern}") for pruner in PRUNER_NAMES for pattern in PATTERNS]
MATRIX = "int4-g128"  # whose fixture is a plain matrix [12, 256]


def _prune(pruner: str, pattern: Pattern, weight: Tensor, gram: Tensor) -> Masked:
    """With the gram left out where it is not needed; counts and zeros are checked for every result."""
    module = importlib.import_module(f"compress.solvers.{pruner}")
    masked = module.prune(weight, gram if module.NEEDS_GRAM else None, pattern, PRUNERS[pruner]())
    assert masked.mask.dtype == torch.bool and masked.mask.shape == masked.values.shape == weight.shape
    assert int(masked.mask.sum()) == pattern.kept(*weight.shape)
    if pattern.of:
        assert (masked.mask.reshape(len(weight), -1, pattern.of).sum(2) == pattern.keep).all()
    assert masked.values.dtype == torch.float32 and torch.isfinite(masked.values).all()
    assert not masked.values[~masked.mask].any()
    return masked


@functools.cache
def _pruned(pruner: str, pattern: Pattern) -> Masked:
    """The fixture's own result."""
    return _prune(pruner, pattern, *_fixture(MATRIX))


@pytest.mark.parametrize(("pruner", "pattern"), PRUNINGS)
def test_pruners_are_deterministic_and_pure(pruner: str, pattern: Pattern) -> None:
    weight, gram = (t.clone() for t in _fixture(MATRIX))
    first, again = _pruned(pruner, pattern), _prune(pruner, pattern, weight, gram)
    assert torch.equal(first.mask, again.mask) and torch.equal(first.values, again.values)
    assert torch.equal(weight, _fixture(MATRIX)[0]) and torch.equal(gram, _fixture(MATRIX)[1]), "an input was modified"
    again.values.zero_()
    assert torch.equal(weight, _fixture(MATRIX)[0]), "the result shares memory with the weight"


@pytest.mark.parametrize(("pruner", "pattern"), PRUNINGS)
def test_pruned_rows_may_come_in_any_order(pruner: str, pattern: Pattern) -> None:
    weight, gram = _fixture(MATRIX)
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(5))
    straight, shuffled = _pruned(pruner, pattern), _prune(pruner, pattern, weight[order], gram)
    if pruner in ("magnitude", "wanda"):
        assert torch.equal(straight.mask[order], shuffled.mask)
        assert torch.equal(straight.values[order], shuffled.values)
    errors = [relative_error(w, m.values, gram) for w, m in ((weight, straight), (weight[order], shuffled))]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


@pytest.mark.parametrize(("pruner", "pattern"), PRUNINGS)
def test_pruners_take_one_row_and_non_contiguous_views(pruner: str, pattern: Pattern) -> None:
    weight, gram = _fixture(MATRIX)
    kept = weight.clone()
    assert _prune(pruner, pattern, kept[3:4], gram).values.shape == (1, N)
    assert torch.equal(kept, weight), "a row shares its memory with its transpose"
    plain = relative_error(weight, _pruned(pruner, pattern).values, gram)
    strided = torch.stack((weight, torch.full_like(weight, torch.nan)), dim=2)[..., 0]
    for other in (weight.T.contiguous().T, strided):
        assert not other.is_contiguous()
        masked = _prune(pruner, pattern, other, gram)
        assert relative_error(weight, masked.values, gram) == pytest.approx(plain, rel=1e-2)
        assert torch.equal(other, weight)


@pytest.mark.parametrize(("pruner", "pattern"), PRUNINGS)
def test_pruners_take_degenerate_input(pruner: str, pattern: Pattern) -> None:
    """Six tokens with silent channels, no statistics at all, a zero weight, a zero row."""
    weight, gram = _fixture(MATRIX)
    x = _randn(6, N, seed=6)
    x[:, ::4] = 0.0
    assert _prune(pruner, pattern, weight, x.T @ x / 6).values.abs().max() < 10 * weight.abs().max()
    blind = _prune(pruner, pattern, weight, torch.zeros_like(gram))
    magnitudes = weight[blind.mask].abs().mean()
    assert magnitudes > 1.2 * weight.abs().mean()  # without statistics, size decides
    assert not _prune(pruner, pattern, torch.zeros_like(weight), gram).values.any()
    partly = weight.clone()
    partly[2] = 0.0
    assert not _prune(pruner, pattern, partly, gram).values[2].any()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_pruners_that_see_the_inputs_beat_magnitude(pattern: Pattern) -> None:
    weight, gram = _fixture(MATRIX)
    errors = {name: relative_error(weight, _pruned(name, pattern).values, gram) for name in PRUNER_NAMES}
    assert all(error < 0.9 * errors["magnitude"] for name, error in errors.items() if name != "magnitude"), errors
    assert errors["sparsegpt"] == min(errors.values())


# -- every factorizer
SIZES = [(32, 16), (64, 20), (16, 16)]
FACTORINGS = [
    pytest.param(name, *size, id=f"{name}-{size[0]}-{size[1]}") for name in FACTORIZER_NAMES for size in SIZES
]


@functools.cache
def _matrix() -> tuple[Tensor, Tensor]:
    """Weight [96, 64] and the gram of correlated inputs with loud channels."""
    mix = _randn(64, 64, seed=1) / 8 + 0.5 * torch.eye(64)
    x = (_randn(1500, 64, seed=2) @ mix) * torch.exp(0.7 * _randn(64, seed=3))
    return 0.05 * _randn(96, 64, seed=4), x.T @ x / 1500


def _factorize(name: str, k: int, s: int, weight: Tensor, gram: Tensor) -> Factors:
    """Shapes, counts and finiteness are checked for every result."""
    module = importlib.import_module(f"compress.solvers.{name}")
    assert module.NEEDS_GRAM
    factors = module.factorize(weight, gram, k, s, FACTORIZERS[name]())
    assert factors.dictionary.shape == (k, weight.shape[1]) and factors.coefficients.shape == (len(weight), k)
    for values in (factors.dictionary, factors.coefficients):
        assert values.dtype == torch.float32 and torch.isfinite(values).all()
    if factors.mask is not None:
        assert factors.mask.dtype == torch.bool and int(factors.mask.sum()) == s * len(weight)
        assert name == "rocket" or (factors.mask.sum(1) == s).all()  # which shares some among the rows
        assert not factors.coefficients[~factors.mask].any()
    return factors


@pytest.mark.parametrize(("name", "k", "s"), FACTORINGS)
def test_factorizers_are_deterministic_and_pure(name: str, k: int, s: int) -> None:
    weight, gram = (t.clone() for t in _matrix())
    first, again = (_factorize(name, k, s, weight, gram) for _ in range(2))
    assert torch.equal(first.dictionary, again.dictionary) and torch.equal(first.coefficients, again.coefficients)
    assert torch.equal(weight, _matrix()[0]) and torch.equal(gram, _matrix()[1]), "an input was modified"
    strided = torch.stack((weight, torch.full_like(weight, torch.nan)), dim=2)[..., 0]
    for other in (weight.T.contiguous().T, strided):
        errors = [relative_error(weight, f.dense(), gram) for f in (first, _factorize(name, k, s, other, gram))]
        assert errors[0] == pytest.approx(errors[1], rel=1e-2)


@pytest.mark.parametrize(("name", "k", "s"), FACTORINGS)
def test_factorizers_take_degenerate_input(name: str, k: int, s: int) -> None:
    """Six tokens with silent channels, no statistics at all, a zero weight, zero rows, a single row."""
    weight, gram = _matrix()
    x = _randn(6, 64, seed=6)
    x[:, ::4] = 0.0
    few = x.T @ x / 6
    assert relative_error(weight, _factorize(name, k, s, weight, few).dense(), few) < 0.05
    blind = _factorize(name, k, s, weight, torch.zeros_like(gram)).dense()
    assert (weight - blind).norm() < weight.norm()
    assert not _factorize(name, k, s, torch.zeros_like(weight), gram).dense().any()
    partly = weight.clone()
    partly[2] = 0.0
    assert _factorize(name, k, s, partly, gram).dense()[2].abs().max() < 1e-6
    assert _factorize(name, k, s, weight[:1], gram).dense().shape == (1, 64)


@pytest.mark.parametrize("name", FACTORIZER_NAMES)
@pytest.mark.parametrize("k", [8, 24, 48])
def test_full_coefficients_are_no_worse_than_a_plain_svd(name: str, k: int) -> None:
    """Gram-weighted error; the plain decomposition knows nothing of the inputs."""
    weight, gram = _matrix()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    plain = (left[:, :k] * values[:k]) @ right[:k]
    ours = _factorize(name, k, k, weight, gram).dense()
    assert relative_error(weight, ours, gram) < 0.95 * relative_error(weight, plain, gram)
