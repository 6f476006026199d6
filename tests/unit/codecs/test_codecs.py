"""Codecs against llama.cpp's C code, the gguf package, brute force and closed forms."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.codecs import block_codec, float_codec, get_codec, sparse_codec
from compress.codecs.base import BlockCodec, Codec
from compress.codecs.grid import Grid, ScaleGrid, SuperBlockGrid, SuperBlockMinGrid
from compress.codecs.lattice import lowest
from compress.codecs.names import FIXED_NAMES, UNIFORM_NAMES, codec_info, row_bytes
from compress.codecs.scales import IntegerScale, half
from compress.models.checkpoint import Checkpoint
from compress.weights import Packed
from tests.tiny import demo_model
from tests.unit.codecs.test_codecs_ggml_small import NAMES as SMALL

# Bytes of a block at which half-precision numbers lie: the super-scale, then the super-minimum.
HALVES = {
    "q8_0": (0,), "q4_0": (0,), "q5_0": (0,), "q5_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
    "q3_k": (108,), "q2_k": (80, 82), "iq2_xxs": (0,), "iq2_xs": (0,), "iq3_xxs": (0,),
    "iq4_nl": (0,), "iq4_xs": (0,),
}  # fmt: skip
GGML = tuple(HALVES)
LATTICE = ("iq2_xxs", "iq2_xs", "iq3_xxs")
SCALAR = tuple(name for name in GGML if name not in LATTICE)
SOME_UNIFORM = ("int2-g32", "int3-g64-asym", "int4-g128", "int4-g32-asym", "int8-row", "int8-g64-asym")


def _c():
    """llama.cpp's C code; skips the test where llama-cpp-python is not installed."""
    pytest.importorskip("llama_cpp")
    from compress.engines import ggml

    return ggml


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _importance(n: int, seed: int = 1) -> Tensor:
    """Log-normal, as second moments of activations are."""
    return torch.exp(_randn(n, seed=seed))


def _nearest(codec: BlockCodec, weight: Tensor, grid: Grid, importance: Tensor) -> Tensor:
    """Units of a whole matrix, each step on its own."""
    offset, zero = getattr(grid, "offset", None), getattr(grid, "zero", None)
    shifted = weight if offset is None else weight + codec.columns(offset)
    scale = codec.columns(grid.scale)
    target = (shifted / torch.where(scale == 0, 1.0, scale)).reshape(-1, codec.step)
    weights = importance.expand_as(weight).reshape(-1, codec.step)
    zero = None if zero is None else codec.columns(zero).reshape(-1)
    return codec.nearest(target, weights, None, zero).reshape(weight.shape)


def _round_trip(codec: BlockCodec, weight: Tensor, importance: Tensor) -> tuple[Tensor, Grid]:
    grid = codec.fit(weight, importance)
    return _nearest(codec, weight, grid, importance), grid


def _random_blocks(name: str, count: int = 96, seed: int = 0) -> np.ndarray:
    """Random bits but for the half-precision numbers, which are finite and not zero."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (count, codec_info(name).block_bytes), dtype=np.uint8)
    for start in HALVES[name]:
        values = (generator.choice((-1, 1), count) * 10 ** generator.uniform(-6, 4, count)).astype(np.float16)
        blocks[:, start : start + 2] = values.view(np.uint8).reshape(-1, 2)
    return blocks


def _python_decode(name: str, blocks: np.ndarray) -> np.ndarray:
    return gguf.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()])


def _grid_of(codec: BlockCodec, blocks: Tensor) -> tuple[Tensor, Grid]:
    """Units and grid, one block a row, parsed from bytes."""

    def number(start: int) -> Tensor:
        return blocks[:, start : start + 2].contiguous().view(torch.float16).float()

    def integers(values: Tensor, d: Tensor, rule: IntegerScale) -> Tensor:
        return ((values / d - rule.shift) / rule.factor).round()

    units, scale, offset = codec.unpack_blocks(blocks)
    if codec.scale_rule is None:
        return units, ScaleGrid(scale)
    if codec.name == "q5_1":
        one = torch.ones_like(scale)
        return units, SuperBlockMinGrid(scale, scale, one, offset, offset, one)
    d = number(HALVES[codec.name][0])
    grid = SuperBlockGrid(scale, d, integers(scale, d, codec.scale_rule))
    if codec.min_rule is None:
        return units, grid
    dmin = number(HALVES[codec.name][1])
    mins = integers(offset, dmin, codec.min_rule)
    return units, SuperBlockMinGrid(scale, d, grid.integers, offset, dmin, mins)


# -- bytes against two other decoders
def test_every_ggml_codec_is_covered() -> None:
    named = {n for n in (*FIXED_NAMES, "q5_0", "q5_1", "q5_k") if codec_info(n).kind == "ggml"}
    assert set(GGML) | set(SMALL) == named and not set(GGML) & set(SMALL)


@pytest.mark.parametrize("name", GGML)
def test_sizes_are_those_of_gguf(name: str) -> None:
    codec = get_codec(name)
    assert (codec.span, codec.block_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    assert codec.bits_per_weight(1024) == row_bytes(name, 1024) / 1024 * 8


@pytest.mark.parametrize("name", GGML)
def test_random_bits_decode_as_in_c_and_python(name: str) -> None:
    blocks = _random_blocks(name)
    ours = get_codec(name).unpack(
        Packed(name, (len(blocks), codec_info(name).block), {"blocks": torch.from_numpy(blocks)})
    )
    np.testing.assert_array_equal(ours.numpy(), _python_decode(name, blocks))
    np.testing.assert_array_equal(ours.numpy(), _c().dequantize_rows(name, blocks, codec_info(name).block))


@pytest.mark.parametrize("name", GGML)
def test_random_bits_survive_unpack_and_pack(name: str) -> None:
    """Units and grid parsed from any bytes give those bytes back: the representation is unique."""
    codec = get_codec(name)
    blocks = torch.from_numpy(_random_blocks(name, seed=1))
    packed = codec.pack(*_grid_of(codec, blocks))
    assert packed.codec == name and packed.shape == (len(blocks), codec.span)
    assert torch.equal(packed.parts["blocks"], blocks)


@pytest.mark.parametrize("name", GGML)
def test_llama_cpp_bytes_survive_unpack_and_pack(name: str) -> None:
    codec, rows = get_codec(name), _randn(24, codec_info(name).block)
    blocks = torch.from_numpy(_c().quantize_rows(name, rows.numpy(), _importance(rows.shape[1]).numpy()))
    assert torch.equal(codec.pack(*_grid_of(codec, blocks)).parts["blocks"], blocks)


@pytest.mark.parametrize("name", GGML)
def test_packed_bytes_decode_identically_everywhere(name: str) -> None:
    """What the solver saw (`decode`) is what our reader, gguf's and llama.cpp's compute from the bytes."""
    weight = 0.02 * _randn(6, 768)
    codec = block_codec(name, weight.shape[1])
    units, grid = _round_trip(codec, weight, _importance(weight.shape[1]))
    packed, seen = codec.pack(units, grid), codec.decode(units, grid)
    blocks = packed.parts["blocks"]
    assert blocks.dtype == torch.uint8 and tuple(blocks.shape) == (6, row_bytes(name, 768))
    assert torch.equal(codec.unpack(packed), seen)
    np.testing.assert_array_equal(_python_decode(name, blocks.numpy()), seen.numpy())
    np.testing.assert_array_equal(_c().dequantize_rows(name, blocks.numpy(), 768), seen.numpy())


# -- fit against llama.cpp's own search
@functools.cache
def _weights(source: str) -> Tensor:
    if source == "gaussian":
        return 0.02 * _randn(48, 512, seed=3)
    if source == "laplace":
        uniform = torch.rand(48, 512, generator=torch.Generator().manual_seed(4)) - 0.5
        return -0.02 * uniform.sign() * torch.log1p(-2 * uniform.abs().clamp_max(0.4999999))
    return Checkpoint.open(demo_model()).load(f"model.layers.1.{source}.weight").float()[:96, :256].contiguous()


@pytest.mark.parametrize("source", ["gaussian", "laplace", "self_attn.q_proj", "mlp.experts.0.gate_proj"])
@pytest.mark.parametrize("name", GGML)
def test_fit_is_no_worse_than_llama_cpp(name: str, source: str) -> None:
    """Importance-weighted error of fit + nearest against ggml_quantize_chunk, given the same importance."""
    weight = _weights(source)
    n = weight.shape[1]
    codec = block_codec(name, n)
    for importance in (torch.ones(n), _importance(n)):
        ours = codec.decode(*_round_trip(codec, weight, importance))
        blocks = _c().quantize_rows(name, weight.numpy(), importance.numpy())
        theirs = torch.from_numpy(_c().dequantize_rows(name, blocks, n))
        assert (importance * (weight - ours) ** 2).sum() <= (importance * (weight - theirs) ** 2).sum()


@pytest.mark.parametrize(("name", "limit"), [
    ("q8_0", 1.5), ("q4_0", 1.01), ("q5_0", 1.06), ("iq4_nl", 1.06), ("int2-g32", 1.04),
    ("int3-g32", 1.05), ("int4-g32", 1.09),
])  # fmt: skip
def test_fit_is_near_the_best_scale_there_is(name: str, limit: float) -> None:
    """One scale per 32 columns: an exhaustive scan of scales of both signs, best rounding for each."""
    weight, importance = _randn(64, 32, seed=5), _importance(32)
    codec = block_codec(name, 32)
    ours = (importance * (weight - codec.decode(*_round_trip(codec, weight, importance))) ** 2).sum(1)
    best = torch.full((64,), torch.inf)
    longest = min(abs(codec.low), codec.high) / max(abs(codec.low), codec.high)
    for stretch in torch.linspace(0.3, 1.1 / longest, 1200):
        for sign in (1, -1) if codec.signed_scale else (1,):
            scale = half(weight.abs().amax(1, keepdim=True) * sign * stretch / max(abs(codec.low), codec.high))
            error = (importance * (weight - scale * codec.round(weight / scale)) ** 2).sum(1)
            best = torch.minimum(best, error)
    assert ours.sum() >= 0.995 * best.sum(), "the scan is not exhaustive"
    assert ours.sum() <= limit * best.sum()


@pytest.mark.parametrize("name", ["int2-g32-asym", "int3-g32-asym"])
def test_asymmetric_fit_is_near_the_best_there_is(name: str) -> None:
    """Scan of scales for every zero point."""
    weight, importance = _randn(48, 32, seed=6) + 0.4, _importance(32)
    codec = block_codec(name, 32)
    ours = (importance * (weight - codec.decode(*_round_trip(codec, weight, importance))) ** 2).sum(1)
    spread = (weight.amax(1) - weight.amin(1))[:, None] / codec.high
    best = torch.full((48,), torch.inf)
    for zero, stretch in itertools.product(range(codec.high + 1), torch.linspace(0.4, 1.3, 200)):
        scale = half(spread * stretch)
        units = (weight / scale + zero).round().clamp(0, codec.high) - zero
        best = torch.minimum(best, (importance * (weight - scale * units) ** 2).sum(1))
    assert best.sum() * 0.995 <= ours.sum() <= 1.15 * best.sum()


# -- lattices against brute force
EVEN = torch.tensor(
    [s for s in itertools.product((1.0, -1.0), repeat=8) if s.count(-1.0) % 2 == 0], dtype=torch.float64
)


def _all_points(codec: BlockCodec) -> Tensor:
    """Every magnitude pattern of eight columns, float64 [K, 8]."""
    points = codec.points.double()
    if points.shape[1] == 8:
        return points
    pairs = torch.cartesian_prod(torch.arange(len(points)), torch.arange(len(points)))
    return torch.cat((points[pairs[:, 0]], points[pairs[:, 1]]), dim=1)


def _brute_diagonal(codec: BlockCodec, target: Tensor, weight: Tensor) -> Tensor:
    """Lowest cost [N] over all points and even sign patterns; given the signs, two halves are independent."""
    points, t, w = codec.points.double(), target.double(), weight.double()
    width = points.shape[1]
    total = torch.zeros(len(t), len(EVEN), dtype=torch.float64)
    for start in range(0, 8, width):
        at = slice(start, start + width)
        signed = t[:, None, at] * EVEN[:, at]
        cost = (w[:, None, at] * signed**2).sum(2, keepdim=True) + (w[:, at] @ (points**2).T)[:, None]
        total += (cost - 2 * (w[:, None, at] * signed) @ points.T).amin(2)
    return total.amin(1)


def _targets(codec: BlockCodec, count: int, seed: int) -> Tensor:
    """Gaussian targets of many sizes, some coordinates exactly zero, some points of the lattice itself."""
    top = float(codec.points.max())
    target = _randn(count, 8, seed=seed) * top * torch.linspace(0.02, 2.0, count)[:, None]
    target[::5, 2] = 0.0
    points = _all_points(codec).float()
    target[::7] = points[torch.linspace(0, len(points) - 1, len(target[::7])).long()]
    return target


@pytest.mark.parametrize("name", LATTICE)
def test_lattice_points_are_distinct_and_indexed(name: str) -> None:
    codec = get_codec(name)
    assert len(codec.points.unique(dim=0)) == len(codec.points) and (codec.points > 0).all()
    assert torch.equal(codec.index(codec.points), torch.arange(len(codec.points)))


@pytest.mark.parametrize("name", LATTICE)
def test_lattice_nearest_is_exact_for_a_diagonal_metric(name: str) -> None:
    codec = get_codec(name)
    target = _targets(codec, 120, 7)
    weight = torch.exp(1.5 * _randn(120, 8, seed=8))
    for weights in (weight, torch.ones(8)):
        units = codec.nearest(target, weights)
        wide = weights.expand_as(target)
        assert (((units < 0).sum(1) & 1) == 0).all()
        assert (codec.index(units.reshape(len(units), -1, codec.points.shape[1])) >= 0).all()
        cost = (wide.double() * (units.double() - target.double()) ** 2).sum(1)
        best = _brute_diagonal(codec, target, wide)
        slack = 1e-5 * (wide.double() * (target.double() ** 2 + units.double() ** 2)).sum(1)
        assert (cost >= best - slack).all() and (cost <= best + slack).all()


@pytest.mark.parametrize("name", LATTICE)
def test_lattice_full_metric_is_better_than_the_diagonal_one_and_near_brute_force(name: str) -> None:
    codec = get_codec(name)
    target = _targets(codec, 60, 9)
    root = _randn(8, 24, seed=10)
    metric = root @ root.T / 24 + 0.3
    full = codec.nearest(target, metric.diagonal(), metric)
    diagonal = codec.nearest(target, metric.diagonal())

    def cost(units: Tensor) -> Tensor:
        error = (units - target).double()
        return ((error @ metric.double()) * error).sum(1)

    assert (cost(full) <= cost(diagonal) * (1 + 1e-5) + 1e-3).all()
    assert (((full < 0).sum(1) & 1) == 0).all()
    # exact optimum; points of two halves are too many to enumerate with every sign
    if codec.points.shape[1] == 8:
        m, t = metric.double(), target.double()
        best = torch.full((len(t),), torch.inf, dtype=torch.float64)
        constant = ((t @ m) * t).sum(1)
        for signs in EVEN:
            point = codec.points.double() * signs
            value = ((point @ m) * point).sum(1)[None] - 2 * (t @ m) @ point.T
            best = torch.minimum(best, constant + value.amin(1))
        assert (cost(full) >= best * (1 - 1e-6) - 1e-3).all()
        assert cost(full).sum() <= 1.25 * best.sum()


# -- refit
def _objective(weight: Tensor, quantized: Tensor, gram: Tensor) -> Tensor:
    """tr((W-Q) G (W-Q)^T) row by row in float64."""
    error = weight.double() - quantized.double()
    return ((error @ gram.double()) * error).sum(1)


def _gram(n: int, tokens: int, seed: int = 11) -> Tensor:
    """Correlated activations with a few loud channels."""
    mix = _randn(n, n, seed=seed) / n**0.5 + 0.5 * torch.eye(n)
    x = (_randn(tokens, n, seed=seed + 1) @ mix) * torch.exp(0.7 * _randn(n, seed=seed + 2))
    return x.T @ x / tokens


@pytest.mark.parametrize("name", [*GGML, *SOME_UNIFORM])
def test_refit_never_raises_the_objective(name: str) -> None:
    n = 512
    weight, gram = 0.05 * _randn(12, n, seed=12), _gram(n, 1500)
    codec = block_codec(name, n)
    units, grid = _round_trip(codec, weight, gram.diagonal())
    before = _objective(weight, codec.decode(units, grid), gram)
    saved = grid.clone().tensors()
    for _ in range(3):
        new = codec.refit(weight, units, grid, gram)
        after = _objective(weight, codec.decode(units, new), gram)
        assert (after <= before * (1 + 1e-5)).all()
        grid, before = new, after
    packed = codec.pack(units, grid)
    assert torch.equal(codec.unpack(packed), codec.decode(units, grid))
    again = codec.fit(weight, gram.diagonal())
    for field, fresh in again.tensors().items():
        assert torch.equal(saved[field], fresh), "refit changed the grid it was given"


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "iq4_nl", "int4-row", "int4-g32"])
def test_refit_with_one_scale_is_the_least_squares_scale(name: str) -> None:
    """32 columns, one scale a row: closed form s = u G w / u G u, rounded to half."""
    weight, gram = 0.05 * _randn(16, 32, seed=13), _gram(32, 200)
    codec = block_codec(name, 32)
    units, grid = _round_trip(codec, weight, gram.diagonal())
    new = codec.refit(weight, units, grid, gram)
    pull = units.double() @ gram.double()
    best = (pull * weight.double()).sum(1) / (pull * units.double()).sum(1)
    torch.testing.assert_close(new.scale[:, 0].double(), best, rtol=1.0 / 1024, atol=0)


# -- uniform integers
@pytest.mark.parametrize("name", UNIFORM_NAMES)
def test_uniform_stores_code_minus_zero_times_scale(name: str) -> None:
    info = codec_info(name)
    n = 256
    weight = 0.1 * _randn(5, n, seed=14) + 0.03
    codec = block_codec(name, n)
    units, grid = _round_trip(codec, weight, _importance(n))
    packed = codec.pack(units, grid)
    codes, scales, zeros = (packed.parts[key] for key in ("codes", "scales", "zeros"))
    groups = n // info.block if info.block else 1
    assert codes.dtype == zeros.dtype == torch.uint8 and scales.dtype == torch.float16
    assert codes.shape == (5, n) and scales.shape == zeros.shape == (5, groups)
    assert int(codes.max()) <= 2**info.bits - 1 and int(zeros.max()) <= 2**info.bits - 1
    if info.symmetric:
        assert (zeros == 2 ** (info.bits - 1)).all()
    group = np.arange(n) // (info.block or n)
    value = (codes.numpy().astype(np.float32) - zeros.numpy()[:, group]) * scales.numpy().astype(np.float32)[:, group]
    np.testing.assert_array_equal(get_codec(name).unpack(packed).numpy(), value)
    np.testing.assert_array_equal(codec.decode(units, grid).numpy(), value)
    # rounding to nearest: inside the range no value is off by more than half a step
    step = scales.float().numpy()[:, group]
    inside = (codes.numpy() > 0) & (codes.numpy() < 2**info.bits - 1)
    assert (np.abs(value - weight.numpy())[inside] <= 0.5001 * step[inside]).all()


@pytest.mark.parametrize("name", UNIFORM_NAMES)
def test_uniform_recovers_values_on_its_own_grid(name: str) -> None:
    info = codec_info(name)
    n = 128
    codec = block_codec(name, n)
    low, high = codec.low, codec.high
    levels = torch.randint(low, high + 1, (4, n), generator=torch.Generator().manual_seed(15)).float()
    levels[:, ::32], levels[:, 1::32] = low, high  # every group holds both ends
    zero = 0 if info.symmetric else high // 3
    weight = (levels - zero) * 0.0078125
    units, grid = _round_trip(codec, weight, torch.ones(n))
    torch.testing.assert_close(codec.decode(units, grid), weight, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("name", "columns", "bits"), [
    ("int4-g128", 1024, 4 + 20 / 128), ("int2-g32-asym", 64, 2 + 18 / 32), ("int8-row", 512, 8 + 24 / 512),
])  # fmt: skip
def test_uniform_bits_count_scales_and_zeros(name: str, columns: int, bits: float) -> None:
    assert get_codec(name).bits_per_weight(columns) == pytest.approx(bits)


# -- any input
@pytest.mark.parametrize("name", [*GGML, *SOME_UNIFORM])
@settings(max_examples=8)
@given(data=st.data())
def test_any_weight_decodes_to_finite_values(name: str, data: st.DataObject) -> None:
    """Sizes from 1e-30 to 1e30, dead columns, rows that are constant or zero."""
    block = codec_info(name).block or 64
    rows, n = data.draw(st.integers(1, 4)), block * data.draw(st.integers(1, 2))
    exponents = st.floats(-30, 30)
    weight = _randn(rows, n, seed=data.draw(st.integers(0, 99)))
    weight *= torch.tensor([10.0 ** data.draw(exponents) for _ in range(rows)])[:, None]
    kind = data.draw(st.sampled_from(["plain", "constant", "zero", "one"]))
    if kind == "constant":
        weight[0] = weight[0, 0]
    elif kind == "zero":
        weight[0] = 0.0
    elif kind == "one":
        weight[0] = torch.where(torch.arange(n) == n // 2, weight[0], 0.0)
    importance = _importance(n) * 10.0 ** data.draw(st.floats(-8, 8))
    importance[data.draw(st.integers(0, n - 1)) :: data.draw(st.integers(1, 9))] = 0.0
    codec = block_codec(name, n)
    units, grid = _round_trip(codec, weight, importance)
    decoded = codec.decode(units, grid)
    assert torch.isfinite(decoded).all()
    assert torch.equal(codec.unpack(codec.pack(units, grid)), decoded)
    if kind == "zero":
        assert (decoded[0] == 0).all()


@pytest.mark.parametrize("name", [*GGML, *SOME_UNIFORM])
def test_half_precision_overflow_is_clamped_not_lost(name: str) -> None:
    """Scales beyond 65504 saturate: values shrink to what can be stored, with their signs where there is no
    zero point."""
    n = codec_info(name).block or 64
    weight = (
        1e9 * torch.sign(_randn(3, n, seed=16)) * (1 + torch.rand(3, n, generator=torch.Generator().manual_seed(1)))
    )
    codec = block_codec(name, n)
    decoded = codec.decode(*_round_trip(codec, weight, torch.ones(n)))
    assert torch.isfinite(decoded).all() and decoded.abs().max() > 65504
    if not name.endswith("-asym"):
        assert (decoded.sign() == weight.sign()).float().mean() > (0.8 if name in LATTICE else 0.9)


@pytest.mark.parametrize("name", [*GGML, *SOME_UNIFORM])
def test_powers_of_two_scale_through(name: str) -> None:
    """Weights or importance times 2^k: the same codes, scales times 2^k or unchanged."""
    n = max(256, codec_info(name).block)
    weight, importance = _randn(4, n, seed=17), _importance(n)
    codec = block_codec(name, n)
    units, grid = _round_trip(codec, weight, importance)
    bigger_units, bigger = _round_trip(codec, 16 * weight, importance)
    torch.testing.assert_close(codec.decode(bigger_units, bigger), 16 * codec.decode(units, grid), rtol=2e-3, atol=0)
    for factor in (2.0**-30, 2.0**30):
        other = codec.decode(*_round_trip(codec, weight, factor * importance))
        error = (importance * (weight - codec.decode(units, grid)) ** 2).sum()
        assert (importance * (weight - other) ** 2).sum() <= 1.001 * error


@pytest.mark.parametrize("name", [*GGML, *SOME_UNIFORM])
def test_a_constant_row_is_kept(name: str) -> None:
    n = codec_info(name).block or 64
    weight = torch.tensor([0.37, -0.37])[:, None].expand(2, n)  # also a view with stride 0
    codec = block_codec(name, n)
    decoded = codec.decode(*_round_trip(codec, weight, torch.ones(n)))
    worst = 0.35 if name in LATTICE else 0.03  # an odd number of minus signs cannot be stored
    assert (decoded - weight).abs().mean() <= worst * 0.37


# -- floats
@pytest.mark.parametrize(("name", "dtype"), [("f32", np.float32), ("f16", np.float16)])
def test_floats_round_as_numpy(name: str, dtype: type) -> None:
    values = _randn(3, 7)
    codec = get_codec(name)
    np.testing.assert_array_equal(
        codec.unpack(codec.encode(values)).numpy(), values.numpy().astype(dtype).astype(np.float32)
    )
    assert codec.bits_per_weight(7) == 8 * np.dtype(dtype).itemsize


def test_bf16_rounds_as_llama_cpp() -> None:
    values = _randn(3, 7)
    packed = get_codec("bf16").encode(values)
    blocks = _c().quantize_rows("bf16", values.numpy())
    assert np.array_equal(packed.parts["values"].view(torch.uint8).numpy(), blocks)


def test_unknown_codec_is_a_key_error() -> None:
    for name in ("q4_z", "base", "int5-g128", "names"):
        with pytest.raises(KeyError):
            get_codec(name)


@pytest.mark.parametrize(
    ("ask", "name"),
    [(float_codec, "q8_0"), (float_codec, "sparse-bf16"), (sparse_codec, "bf16"), (sparse_codec, "int4-g32")],
)
def test_a_codec_is_only_given_for_what_it_can_do(ask: Callable[[str], Codec], name: str) -> None:
    with pytest.raises(TypeError, match=name):
        ask(name)
    assert float_codec("f16") is get_codec("f16") and sparse_codec("2:4-bf16") is get_codec("2:4-bf16")


@pytest.mark.parametrize(("width", "keep"), [(512, 1), (1024, 10), (256, 10), (100, 10), (24, 1), (160, 10), (3, 2)])
def test_lowest_are_those_that_sorting_finds(width: int, keep: int) -> None:
    costs = torch.randn(200, width, generator=torch.Generator().manual_seed(width))
    found = lowest(costs, keep)
    assert found.shape == (200, keep)
    assert torch.equal(found.sort(1).values, costs.argsort(1)[:, :keep].sort(1).values)
