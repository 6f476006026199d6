"""Codecs, solvers, transforms and statistics work where their tensors live; a new file is tested without being listed.

On the stub of `tests/device_stub.py` every function gives, bit for bit, what it gives on the CPU, leaves its results on
the stub, and never lets tensors of both devices meet.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import compress.transforms
from compress.codecs import block_codec, get_codec
from compress.codecs.base import BlockCodec, Codec
from compress.codecs.names import _FIXED, UNIFORM_NAMES, codec_info, sparse_name
from compress.codecs.packing import pack_bits
from compress.codecs.sparse import row_starts
from compress.decode import decode
from compress.models.spec import ModelSpec, load_spec
from compress.plan.tensor import PlannedTensor
from compress.solve.tensor import solve_tensor
from compress.solvers.options import FACTORIZERS, PRUNERS, SOLVERS, GptqOptions, RtnOptions
from compress.statistics import Moments, blend, corrected_target
from compress.transforms import awq, hadamard, smooth
from compress.transforms.base import Fold, apply, rounding_error
from compress.transforms.incoherence import Incoherence, pack_signs, unpack_signs
from compress.transforms.options import AwqOptions, RotateOptions, SmoothOptions
from compress.transforms.rotate import Rotation
from compress.weights import Packed, Pattern
from tests.device_stub import DEVICE, StubTensor, on_device, second_device, synchronized
from tests.tiny import demo_model

CODECS = (*_FIXED, *UNIFORM_NAMES)
CODED = [name for name in CODECS if not codec_info(name).is_float]
PRUNABLE = [name for name in CODECS if codec_info(name).stores_zero]
PATTERNS = (Pattern(0.5), Pattern.n_of_m(2, 4), Pattern.n_of_m(4, 8))
MATRIX = "int4-g128"


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def _problem(codec: str) -> tuple[Tensor, Tensor]:
    """Weight and gram; one block of columns, or a few, and a row of zeros."""
    info = codec_info(codec)
    rows, n = (3, max(128, info.block)) if info.rows == 1 else (info.rows, 32)
    weight, x = 0.05 * _randn(rows, n, seed=1), _randn(2 * n, n, seed=2) * torch.exp(0.7 * _randn(n, seed=3))
    if info.rows == 1:
        weight[1] = 0.0
    return weight, x.T @ x / len(x)


# -- comparing ---------------------------------------------------------------------------------------------------------
def _leaves(found: Any) -> Iterator[Any]:
    """Tensors and other values of a result, in order; codecs have no tensors of a model."""
    if is_dataclass(found) and not isinstance(found, type):
        found = [getattr(found, f.name) for f in fields(found) if f.compare]  # not how long it took
    if isinstance(found, Mapping):
        found = [item for key in sorted(found) for item in (key, found[key])]
    if isinstance(found, (tuple, list)):
        for item in found:
            yield from _leaves(item)
    elif not isinstance(found, Codec):
        yield found


def _moved(given: Any) -> Any:
    """Arguments on the stub: copies, so that neither run sees what the other does."""
    if isinstance(given, Tensor):
        return on_device(given.clone())
    if isinstance(given, dict):
        return {key: _moved(value) for key, value in given.items()}
    return given


def _same_on_both(function: Callable[..., Any], *arguments: Any) -> None:
    """What `function` gives on the CPU and on the stub, bit for bit, and everything on the stub there."""
    plain = list(_leaves(function(*arguments)))
    with second_device():
        moved = list(_leaves(function(*(_moved(given) for given in arguments))))
    assert len(plain) == len(moved) and any(isinstance(leaf, Tensor) for leaf in plain)
    for here, there in zip(plain, moved, strict=True):
        if not isinstance(here, Tensor):
            assert here == there
            continue
        assert isinstance(there, StubTensor) and not isinstance(here, StubTensor)
        back = there.cpu()
        assert (here.dtype, here.shape) == (back.dtype, back.shape)
        assert torch.equal(_bits(here), _bits(back))


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().reshape(-1).view(torch.uint8)


# -- the stub itself ---------------------------------------------------------------------------------------------------
def test_the_stub_computes_and_says_where() -> None:
    x = _randn(4, 4)
    with second_device() as device:
        y = x.to(device)
        assert y.device == DEVICE and y.is_cuda and not y.is_cpu and y.to("cuda") is y and x.to("cpu") is x
        for made in (torch.zeros(2, device="cuda"), torch.arange(3, device=y.device), y.new_empty(2), y @ y, y.T, y[0],
                     torch.full_like(y, 2.0), torch.ones_like(x, device=device), y.topk(2).values, x.to(y),
                     functional.pad(y, (0, 1)), torch.where(y > 0, y, 0.0), y.split(2)[1]):  # fmt: skip
            assert made.device == DEVICE
        assert (y + torch.tensor(1.0)).device == DEVICE and y.to(x.device).device.type == "cpu"
        assert not isinstance(x + x, StubTensor) and torch.zeros(2).device.type == "cpu"
    assert torch.equal((y @ y).cpu(), x @ x) and y.device == DEVICE


def test_the_stub_catches_tensors_of_two_devices() -> None:
    x = _randn(4, 4)
    with second_device() as device:
        y = x.to(device)
        for mixed in (
            lambda: x + y,
            lambda: y @ x,
            lambda: torch.cat((x, y)),
            lambda: torch.where(x > 0, y, 0.0),
            lambda: y[torch.tensor([0, 1])],
            lambda: x[y > 0],
            lambda: y.__setitem__(0, x[0]),
            lambda: torch.add(y, y, out=torch.empty(4, 4)),
            lambda: y.index_add_(0, torch.arange(4), y),
            lambda: torch.stack((y[0, 0], torch.tensor(1.0))),
            lambda: functional.linear(y, x),
            lambda: torch.bucketize(y, torch.tensor([0.0, 1.0])),
            lambda: torch.equal(x, y),
            lambda: x.add_(y),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        for read in (lambda: y.numpy(), lambda: y.__array__()):
            with pytest.raises(TypeError, match="Tensor.cpu"):
                read()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, generator=torch.Generator(), device=device)
        with pytest.raises(RuntimeError, match="same device"):
            nn.Linear(4, 4)(y)
        assert nn.Linear(4, 4).to(device)(y).device == DEVICE


def test_the_stub_has_views_and_operations_in_place() -> None:
    x = _randn(4, 4)
    with second_device() as device:
        y = x.to(device)
        y[1:3].mul_(2.0)
        y.T[0] += 1.0
        out = torch.empty(4, 4, device=device)
        assert torch.mul(y, y, out=out[:, :4]).device == DEVICE
        expected = x.clone()
        expected[1:3] *= 2.0
        expected[:, 0] += 1.0
        assert torch.equal(y.cpu(), expected) and torch.equal(out.cpu(), expected * expected)
        here = torch.zeros(4, 4)
        assert not isinstance(here.copy_(y), StubTensor) and torch.equal(here, expected)
        copy = y.cpu()
        copy.zero_()
        assert torch.equal(y.cpu(), expected)


def test_the_stub_counts_how_often_the_cpu_waits() -> None:
    with second_device() as device:
        y = torch.ones(3, device=device)
        synchronized()
        assert bool(y.any()) and float(y.sum()) == 3.0 and y.tolist() == [1.0] * 3 and int(y[0]) == 1
        assert synchronized() == {"__bool__": 1, "__float__": 1, "tolist": 1, "__int__": 1} and not synchronized()


def test_the_stub_runs_what_a_forward_pass_needs() -> None:
    def block(x: Tensor, weight: Tensor) -> list[Tensor]:
        heads = functional.linear(x, weight).unflatten(-1, (2, 8)).transpose(0, 1)[None]
        mixed = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        normed = functional.rms_norm(mixed[0].transpose(0, 1).flatten(1), (16,), weight[0])
        gates, experts = functional.softmax(normed @ weight, dim=-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            token, place = torch.where(experts == expert)
            out.index_add_(0, token, functional.silu(x[token]) * gates[token, place, None])
        return [out, torch.cat((normed, out), dim=1), x.new_tensor(float(gates.sum()))]

    _same_on_both(block, _randn(6, 16), _randn(16, 16, seed=1))


# -- codecs ------------------------------------------------------------------------------------------------------------
def _stored(packed: Packed) -> dict[str, Tensor]:
    """Parts as our own container has them: codes of intN packed to their bits."""
    info, parts = codec_info(packed.codec), dict(packed.parts)
    if info.is_integer:
        parts["codes"] = pack_bits(parts["codes"], info.bits)
        parts["zeros"] = pack_bits(parts["zeros"], info.bits)
    if info.has_mask:
        parts["starts"] = row_starts(packed.codec, parts["mask"], packed.shape[1])
    return parts


def _rows(packed: Packed) -> list[Any]:
    """The fast decoders, in each type they are used in."""
    codec, parts = get_codec(packed.codec), _stored(packed)
    at = slice(0, packed.shape[0])
    types = (torch.float32, torch.float16, torch.bfloat16)
    return [codec.decode_rows(packed.shape, parts, at, dtype)[0] for dtype in types]


@pytest.mark.parametrize("name", CODED)
def test_codecs_with_every_solver(name: str) -> None:
    def everything(weight: Tensor, gram: Tensor) -> list[Any]:
        codec = block_codec(name, weight.shape[1])
        found = [codec.fit(weight, gram.diagonal()), codec.rounding(weight, gram.diagonal())]
        for solver in SOLVERS.values():
            options = solver(**{key: 1 for key in ("sweeps", "refits") if key in solver.model_fields})
            solution = options.implementation.solve(weight, gram, codec, options)
            grid, packed = solution.grid, solution.pack()
            factors = [torch.full_like(stored, 1.125) for stored in grid.reals]
            found += [solution, solution.decode(), packed, get_codec(name).unpack(packed), _rows(packed)]
            moved = codec.rescaled(grid, *factors)
            found += [
                moved,
                codec.refit(weight, solution.units, moved, gram),
                grid.terms(solution.units, codec.columns),
            ]
        return found

    _same_on_both(everything, *_problem(name))


@pytest.mark.parametrize("name", [name for name in CODECS if codec_info(name).is_float])
def test_float_codecs(name: str) -> None:
    def everything(weight: Tensor) -> list[Any]:
        packed = get_codec(name).encode(weight)
        return [packed, get_codec(name).unpack(packed), _rows(packed)]

    _same_on_both(everything, _problem(MATRIX)[0])


@pytest.mark.parametrize("name", PRUNABLE)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparse_codecs(name: str, pattern: Pattern) -> None:
    def everything(weight: Tensor, gram: Tensor) -> list[Any]:
        masked = PRUNERS["magnitude"]().implementation.prune(weight, gram, pattern, PRUNERS["magnitude"]())
        inner, codec = get_codec(name), get_codec(sparse_name(name, pattern))
        if isinstance(inner, BlockCodec):
            bound = block_codec(name, weight.shape[1])
            solved = RtnOptions().implementation.solve(weight, gram, bound, RtnOptions(), masked.mask).pack()
        else:
            solved = inner.encode(masked.values)
        packed = codec.pack(solved, masked.mask)
        return [packed, codec.unpack(packed), _rows(packed)]

    _same_on_both(everything, *_problem(name))


# -- solvers -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=2)), ids=str)
def test_solvers_with_masks_and_options(solver: str, flags: tuple[bool, bool]) -> None:
    """Every yes-or-no option either way, with a mask and without."""
    options = SOLVERS[solver]()
    booleans = {key: flags[0] for key, field in type(options).model_fields.items() if field.annotation is bool}
    options = options.model_copy(update=booleans)

    def everything(weight: Tensor, gram: Tensor) -> list[Any]:
        mask = weight > 0 if flags[1] else None
        return [options.implementation.solve(weight, gram, block_codec(MATRIX, weight.shape[1]), options, mask)]

    _same_on_both(everything, *_problem(MATRIX))


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_pruners(name: str, pattern: Pattern) -> None:
    options = PRUNERS[name]()

    def everything(weight: Tensor, gram: Tensor) -> list[Any]:
        module, codec = options.implementation, block_codec(MATRIX, weight.shape[1])
        found = [module.prune(weight, gram, pattern, options)]
        if hasattr(module, "prune_and_quantize"):
            found.append(module.prune_and_quantize(weight, gram, codec, options, GptqOptions(sweeps=1), pattern))
        return found

    _same_on_both(everything, *_problem(MATRIX))


@pytest.mark.parametrize("name", FACTORIZERS)
def test_factorizers(name: str) -> None:
    options = FACTORIZERS[name]()
    _same_on_both(lambda w, g: options.implementation.factorize(w, g, 24, 8, options), _randn(40, 32), _gram(32))


def _gram(n: int) -> Tensor:
    x = _randn(4 * n, n, seed=5)
    return x.T @ x / len(x)


# -- one tensor as a run solves it -------------------------------------------------------------------------------------
@pytest.mark.parametrize("codec", ["e8p", MATRIX])
@pytest.mark.parametrize("seen", [False, True], ids=["looked-up", "multiplied"])
def test_tensors_between_hadamard_transforms(codec: str, seen: bool) -> None:
    spec = next(t for t in _spec().tensors() if t.role == "attention.q")
    planned = PlannedTensor(spec, codec, GptqOptions(sweeps=1), 0, incoherence=True, values=codec)

    def everything(weight: Tensor, gram: Tensor) -> list[Any]:
        statistics = blend(Moments(gram, weight=1.0, tokens=9), None, 1.0) if seen else None
        outcome = solve_tensor(planned, weight, statistics)
        packed = outcome.pack()
        return [outcome, outcome.dense(), packed, decode(packed)]

    _same_on_both(everything, 0.05 * _randn(24, 128), _gram(128))


@functools.cache
def _spec() -> ModelSpec:
    import json

    return load_spec(json.loads((demo_model() / "config.json").read_text(encoding="utf-8")))


# -- statistics --------------------------------------------------------------------------------------------------------
def test_moments_and_targets() -> None:
    def everything(x: Tensor, original: Tensor, weight: Tensor) -> list[Any]:
        gate, lag = x[:, 0].abs(), original[:, :5] - x[:, :5]
        own, pool = (Moments.zeros(16, drift=True, residual=5, magnitudes=True, device=x.device) for _ in range(2))
        own.add(x, original, gate, lag)
        pool.add(x, original)
        assert own.finite
        found: list[Any] = [own, pool]
        for statistics in (blend(own, None, 1.0), blend(own, pool, 2.0)):
            found += [statistics, corrected_target(weight, statistics, 0.1, 0.5, 0.5)]
        return found

    _same_on_both(everything, _randn(40, 16), _randn(40, 16, seed=1), _randn(5, 16, seed=2))
    assert Moments.zeros(3).gram.device.type == "cpu"


# -- transforms --------------------------------------------------------------------------------------------------------
FOLD = Fold("mlp.in", 64, ("gate", "up"), ("router",), ("norm",))


def _block() -> dict[str, Tensor]:
    shapes = {"gate": (24, 64), "up": (24, 64), "router": (4, 64), "norm": (64,)}
    return {name: _randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def _scaled(search: Callable[..., Any], options: Any, weights: dict[str, Tensor], x: Tensor) -> list[Any]:
    """A fold's scale, by either method, and what it does to the block."""
    seen = Moments.zeros(64, magnitudes=True, device=x.device)
    seen.add(x)
    codec = block_codec("int4-g32", 64)

    def quantize(name: str, weight: Tensor, importance: Tensor) -> Tensor:
        gram = torch.diag(importance)
        return RtnOptions().implementation.solve(weight, gram, codec, RtnOptions()).decode()

    scale, *errors = search(FOLD, weights, seen, quantize, options)
    own = {"up": seen}
    return [scale, errors, apply(weights, FOLD, scale), rounding_error(FOLD, weights, scale, seen, quantize, own, 9)]


def _hadamard() -> None:
    for n in (1, 64, 96, 40, 172, 6):  # powers of two, all three constructions, blocks

        def both(x: Tensor) -> list[Tensor]:
            functions = (hadamard.hadamard_transform, hadamard.inverse_hadamard_transform)
            signs = hadamard.random_signs(x.shape[1], "key").to(x.device)
            return [f(values, dim) for f in functions for values, dim in ((x, 1), (x.T.double(), 0))] + [signs]

        _same_on_both(both, _randn(3, n))


def _incoherence() -> None:
    def everything(weight: Tensor, gram: Tensor) -> list[Any]:
        drawn = Incoherence.draw(*weight.shape, 1, 2, device=weight.device)
        there = Incoherence.draw(*weight.shape, 1, 2)  # signs of a CPU follow the tensors
        packed = pack_signs(drawn.signs_in)
        found = [drawn, packed, unpack_signs(packed, weight.shape[1]), there.weight(weight), there.input(gram)]
        return [*found, drawn.weight(weight), drawn.gram(gram), drawn.restore(weight), drawn.output(weight.T)]

    _same_on_both(everything, _randn(24, 64), _gram(64))


def _rotate() -> None:
    spec = _spec()
    rotation = Rotation.draw(spec, RotateOptions())
    given = {t.name: 0.1 * _randn(*t.shape, seed=i) for i, t in enumerate(spec.tensors()) if t.layer in (0, None)}
    turned = [name for name in given if rotation.sources(name)]

    def everything(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: rotation.tensor(name, tensors.__getitem__) for name in turned}

    _same_on_both(everything, given)


def _by_scales(search: Callable[..., Any], options: Any) -> Callable[[], None]:
    return lambda: _same_on_both(functools.partial(_scaled, search, options), _block(), _randn(90, 64, seed=8))


TRANSFORMS: dict[str, Callable[[], None]] = {
    "hadamard": _hadamard,
    "incoherence": _incoherence,
    "rotate": _rotate,
    "awq": _by_scales(awq.search, AwqOptions(grid=4)),
    "smooth": _by_scales(smooth.search, SmoothOptions()),
}


def test_every_transform_has_a_case() -> None:
    files = {p.stem for p in Path(compress.transforms.__path__[0]).glob("*.py")}
    assert files - {"__init__", "base", "options"} == set(TRANSFORMS)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    TRANSFORMS[name]()


# -- what the comparison can tell ----------------------------------------------------------------------------------------
def test_the_comparison_feels_a_table_that_stays_behind_and_a_result_that_comes_back() -> None:
    table = torch.arange(4.0)
    with pytest.raises(RuntimeError, match="same device"):
        _same_on_both(lambda x: x + table, torch.ones(4))
    with pytest.raises(RuntimeError, match="same device"):
        _same_on_both(lambda x: x @ torch.eye(4), torch.ones(4))
    with pytest.raises(AssertionError):
        _same_on_both(lambda x: x.cpu(), torch.ones(4))
    with pytest.raises(AssertionError):
        _same_on_both(lambda x: x + float(x.is_cuda), torch.ones(4))
