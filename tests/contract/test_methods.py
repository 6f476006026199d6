"""What every solver and codec found in the folders must do; a new file is tested without being listed."""

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
from compress.codecs.base import BlockCodec, Codec
from compress.codecs.names import UNIFORM_NAMES, codec_info
from compress.solvers.base import Solution, relative_error
from compress.solvers.options import SOLVERS

SHARED = {
    "__init__",
    "base",
    "options",
    "names",
    "bits",
    "lattice",
}  # files of the folders that are no method


def _files(package: ModuleType) -> list[str]:
    return sorted(p.stem for p in Path(package.__path__[0]).glob("*.py") if p.stem not in SHARED)


SOLVER_NAMES = _files(compress.solvers)
CODEC_FILES = _files(compress.codecs)
# files that stand for a family of names, and the names tested here
FAMILIES = {
    "e8p": ("e8p", "e8p3", "e8p4"),
    "float": ("f32", "f16", "bf16"),
    "nf4": ("nf4", "nf4-dq"),
    "fp4": ("fp4", "fp4-dq"),
    "trellis": ("trellis2", "trellis3", "trellis4"),
    "uniform": ("int2-g64", "int3-g128-asym", "int4-g128", "int4-row", "int8-g32-asym"),
}
CODECS = [name for stem in CODEC_FILES for name in FAMILIES.get(stem, (stem,))]
SOLVABLE = [name for name in CODECS if get_codec(name).kind != "float"]
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
@pytest.mark.parametrize("name", SOLVER_NAMES)
def test_solver_files_and_options_go_together(name: str) -> None:
    module = importlib.import_module(f"compress.solvers.{name}")
    options = SOLVERS[name]()
    assert options.name == name and isinstance(module.NEEDS_GRAM, bool) and module.__doc__ and SOLVERS[name].__doc__
    assert set(SOLVERS) == set(SOLVER_NAMES)
    assert all(field.description for key, field in SOLVERS[name].model_fields.items() if key != "name")


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
    assert {n for n in CODECS if codec_info(n).kind != "uniform"} == set(_FIXED)


@pytest.mark.parametrize("name", SOLVABLE)
def test_rescaled_grids_decode_to_what_their_bytes_say(name: str) -> None:
    """Scales tuned after the codes are known: rows that are zero stay so, and no code is refused."""
    weight, gram = (t.clone() for t in _fixture(name))
    weight[2] = 0.0
    solution = _solve("rtn", name, weight, gram)
    grid, codec = solution.grid, solution.codec
    shape = (grid.scale if grid.d is None else grid.d).shape
    factor = 1 + 0.2 * torch.rand(shape, generator=torch.Generator().manual_seed(7))
    offset_factor = None if grid.dmin is None else 0.9 * torch.ones_like(grid.dmin)
    moved = codec.rescaled(grid, factor, offset_factor)
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
