"""ggml's codecs below two bits, its free-sign tables, ternary, MXFP4 and Q4_1: llama.cpp's C code, gguf, brute force."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.codecs import get_codec
from compress.codecs.base import BlockCodec
from compress.codecs.grid import Grid, ScaleGrid, ShiftedGrid, SuperBlockGrid, SuperBlockMinGrid
from compress.codecs.lattice import ternary_scale
from compress.codecs.mxfp4 import power_of_two
from compress.codecs.names import codec_info, ggml_fallback, row_bytes
from compress.solvers import gptq, rtn
from compress.solvers.options import GptqOptions, RtnOptions
from compress.weights import Packed

# Bytes of a block at which half-precision numbers lie; iq1_m spreads one over the high nibbles of four words.
HALVES = {
    "q4_1": (0, 2), "iq1_s": (0,), "iq1_m": (), "iq2_s": (0,), "iq3_s": (0,), "tq1_0": (52,), "tq2_0": (64,),
    "mxfp4": (),
}  # fmt: skip
NAMES = tuple(HALVES)
TERNARY = ("tq1_0", "tq2_0")
FREE_SIGNS = ("iq2_s", "iq3_s")


def _c():
    """llama.cpp's C code; skips the test where llama-cpp-python is not installed."""
    pytest.importorskip("llama_cpp")
    from compress.engines import ggml

    return ggml


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _importance(n: int, seed: int = 1) -> Tensor:
    return torch.exp(_randn(n, seed=seed))


def _gram(n: int, seed: int = 2) -> Tensor:
    """Correlated activations with a few loud channels."""
    mix = _randn(n, n, seed=seed) / n**0.5 + 0.5 * torch.eye(n)
    x = (_randn(3 * n, n, seed=seed + 1) @ mix) * torch.exp(0.7 * _randn(n, seed=seed + 2))
    return x.T @ x / (3 * n)


def _rounded(codec: BlockCodec, weight: Tensor, importance: Tensor) -> tuple[Tensor, Grid]:
    solution = rtn.solve(weight, torch.diag(importance), codec, RtnOptions())
    return solution.units, solution.grid


def _random_blocks(name: str, count: int = 96, seed: int = 0) -> np.ndarray:
    """Random bits but for the half-precision numbers, which are finite and not zero."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (count, codec_info(name).block_bytes), dtype=np.uint8)
    halves = (random.choice((-1, 1), (count, 2)) * 10 ** random.uniform(-6, 4, (count, 2))).astype(np.float16)
    for k, start in enumerate(HALVES[name]):
        blocks[:, start : start + 2] = halves[:, k].copy().view(np.uint8).reshape(-1, 2)
    if name == "iq1_m":
        d = halves[:, 0].copy().view(np.uint16)
        for k in range(4):
            blocks[:, 49 + 2 * k] = (blocks[:, 49 + 2 * k] & 0xF) | ((d >> (4 * k)) & 0xF).astype(np.uint8) << 4
    return blocks


def _decoded(name: str, blocks: np.ndarray) -> np.ndarray:
    """gguf's reading, checked against llama.cpp's."""
    with np.errstate(over="ignore"):  # the largest powers of two overflow in every reader alike
        values = gguf.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(_c().dequantize_rows(name, blocks, values.shape[1]), values)
    return values


# -- bytes
@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_fallbacks(name: str) -> None:
    codec = get_codec(name)
    assert (codec.span, codec.block_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    assert codec.bits_per_weight(1024) == row_bytes(name, 1024) / 1024 * 8
    small = {"tq1_0": "q4_0", "tq2_0": "q4_0", "q4_1": None, "mxfp4": None}.get(name, "iq4_nl")
    assert ggml_fallback(name, 96) == small and ggml_fallback(name, 40) == "f16" and ggml_fallback(name, 512) is None


@pytest.mark.parametrize("name", NAMES)
def test_random_bits_decode_as_in_c_and_python(name: str) -> None:
    blocks = _random_blocks(name, 256)
    packed = Packed(name, (len(blocks), codec_info(name).block), {"blocks": torch.from_numpy(blocks)})
    np.testing.assert_array_equal(get_codec(name).unpack(packed).numpy(), _decoded(name, blocks))


@pytest.mark.parametrize("name", NAMES)
def test_bytes_survive_unpack_and_pack(name: str) -> None:
    """Units and grid parsed from bytes give those bytes back; MXFP4 has two zeros and a NaN, TQ1_0 13 unused bytes."""
    codec, blocks = get_codec(name), _random_blocks(name, seed=1)
    if name == "mxfp4":
        blocks[:, 0] = np.minimum(blocks[:, 0], 254)
        low, high = blocks[:, 1:] & 15, blocks[:, 1:] >> 4
        blocks[:, 1:] = np.where(low == 8, 0, low) | np.where(high == 8, 0, high) << 4
    elif name == "tq1_0":
        blocks = gguf.quantize(_randn(96, 256).numpy(), gguf.GGMLQuantizationType.TQ1_0)
    data = torch.from_numpy(blocks)
    units, scale, offset = codec.unpack_blocks(data)
    rule, grid = codec.scale_rule, ScaleGrid(scale)
    if name == "q4_1":
        grid = SuperBlockMinGrid(scale, scale, torch.ones_like(scale), offset, offset, torch.ones_like(scale))
    elif rule is not None:  # the smallest multiplier is that of the integer 0
        d = torch.from_numpy(blocks[:, :2].copy().view(np.float16)).float()
        if name == "iq1_m":
            nibbles = [(blocks[:, 49 + 2 * k] >> 4).astype(np.uint16) << 4 * k for k in range(4)]
            d = torch.from_numpy(sum(nibbles).astype(np.uint16).view(np.float16)).float()[:, None]
        grid = SuperBlockGrid(scale, d, ((scale / d - rule.shift) / rule.factor).round())
    if name == "iq1_s":  # signed zeros tell the shift where the scale is zero
        grid = ShiftedGrid.of(grid, torch.where(offset.signbit() != scale.signbit(), 0.125, -0.125))
    assert torch.equal(codec.pack(units, grid).parts["blocks"], data)


@pytest.mark.parametrize("name", NAMES)
def test_both_solvers_round_trip_through_bytes(name: str) -> None:
    """What a solver saw is what three readers compute, and feedback beats rounding where inputs correlate."""
    codec, weight, gram = get_codec(name), 0.02 * _randn(8, 512), _gram(512)
    rounded = rtn.solve(weight, gram, codec, RtnOptions())
    solved = gptq.solve(weight, gram, codec, GptqOptions())
    assert solved.error < 0.65 * rounded.error < 0.15
    for solution in (rounded, solved):
        packed = solution.pack()
        blocks = packed.parts["blocks"]
        assert blocks.dtype == torch.uint8 and tuple(blocks.shape) == (8, row_bytes(name, 512))
        assert torch.equal(codec.unpack(packed), solution.decode())
        np.testing.assert_array_equal(_decoded(name, blocks.numpy()), solution.decode().numpy())


# -- nearest against brute force
def _codewords(codec: BlockCodec) -> Tensor:
    """Everything a step can hold, float64 [K, step]."""
    if codec.step == 1:
        levels = {"mxfp4": (0, 1, 2, 3, 4, 6, 8, 12), "q4_1": tuple(range(16))}.get(codec.name, (0, 1))
        signed = levels if codec.name == "q4_1" else sorted({s * v for v in levels for s in (1, -1)})
        return torch.tensor(signed, dtype=torch.float64)[:, None]
    kind = getattr(gguf.quants, "IQ1_S" if codec.name == "iq1_m" else codec.name.upper())
    kind.init_grid()
    points = torch.from_numpy(kind.grid.reshape(-1, codec.step)).double()
    if codec.name == "iq1_m":
        return torch.cat((points + 0.125, points - 0.125))
    if codec.name in FREE_SIGNS:
        signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=codec.step)), dtype=torch.float64)
        return (points[:, None] * signs).reshape(-1, codec.step)
    return points


def _costs(error: Tensor, metric: Tensor) -> Tensor:
    return ((error @ metric) * error).sum(-1)


@pytest.mark.parametrize("name", NAMES)
def test_nearest_is_the_best_codeword(name: str) -> None:
    codec = get_codec(name)
    words, step = _codewords(codec), codec.step
    count = 10 if name == "iq2_s" else 60  # there are 2^18 words
    target = _randn(count, step, seed=5) * float(words.abs().mean()) * torch.linspace(0.05, 2.5, count)[:, None]
    target[::7] = words[torch.linspace(0, len(words) - 1, len(target[::7])).long()].float()
    weight = torch.exp(1.5 * _randn(count, step, seed=6))
    root = _randn(step, 3 * step, seed=7)
    metric = root @ root.T / (3 * step) + 0.3
    for units, metrics in (
        (codec.nearest(target, weight), [torch.diag(w).double() for w in weight]),
        (codec.nearest(target, weight[0]), [torch.diag(weight[0]).double()] * count),
        (codec.nearest(target, metric.diagonal(), metric), [metric.double()] * count),
    ):
        rows = list(zip(units.double(), target.double(), metrics, strict=True))
        assert all((words == u).all(1).any() for u, _, _ in rows)
        cost = torch.stack([_costs(u - t, m) for u, t, m in rows])
        best = torch.stack([_costs(words - t, m).min() for _, t, m in rows])
        slack = 1e-5 * torch.stack([_costs(t, m) + _costs(u, m) for u, t, m in rows])
        assert (cost >= best - slack).all()
        if name in FREE_SIGNS and torch.equal(metrics[0], metric.double()):  # a shortlist, ranked again
            assert cost.sum() <= 1.15 * best.sum()
        else:
            assert (cost <= best + slack).all()


# -- scales against brute force
def test_ternary_scale_is_the_best_of_all_patterns() -> None:
    weight, importance = _randn(40, 6, seed=8).double(), torch.exp(_randn(40, 6, seed=9)).double()
    scale, curvature = ternary_scale(weight, importance)
    patterns = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=6)), dtype=torch.float64)
    pull = (importance * weight) @ patterns.T
    square = importance @ (patterns**2).T
    best = (importance * weight**2).sum(1) - (pull.clamp_min(0) ** 2 / square.clamp_min(1e-9)).amax(1)
    units = (weight / scale[:, None]).round().clamp(-1, 1)
    torch.testing.assert_close((importance * (weight - scale[:, None] * units) ** 2).sum(1), best)
    torch.testing.assert_close((importance * units**2).sum(1), curvature)


def test_mxfp4_scale_is_the_best_power_of_two() -> None:
    weight, importance = _randn(50, 32, seed=10) * 10 ** torch.linspace(-9, 9, 50)[:, None], _importance(32)
    codec = get_codec("mxfp4")
    units, grid = _rounded(codec, weight, importance)
    ours = (importance * (weight - codec.decode(units, grid)).double() ** 2).sum(1)
    best = torch.full_like(ours, torch.inf)
    for exponent in range(-60, 60):
        values = codec.nearest((weight * 2.0**-exponent).reshape(-1, 1), torch.ones(1)).reshape(weight.shape)
        best = torch.minimum(best, (importance * (weight - values * 2.0**exponent).double() ** 2).sum(1))
    torch.testing.assert_close(ours, best, rtol=1e-4, atol=0)  # the search blurs importance by a thousandth


def test_power_of_two_is_the_nearest_there_is() -> None:
    wanted = torch.cat(
        (_randn(200, seed=11).abs() * 10 ** torch.linspace(-36, 36, 200), torch.tensor([0.0, -3.0, 3e38]))
    )
    storable = 2.0 ** torch.arange(-128, 127, dtype=torch.float64)
    gap = (wanted.double()[:, None] - storable).abs()
    assert ((power_of_two(wanted).double() - wanted.double()).abs() <= gap.amin(1)).all()
    assert torch.isin(power_of_two(wanted).double(), storable).all()


@pytest.mark.parametrize(("name", "limit"), [("iq1_s", 1.02), ("iq1_m", 1.02), ("iq2_s", 1.02), ("iq3_s", 1.02)])
def test_fit_is_near_the_best_scale_there_is(name: str, limit: float) -> None:
    """Rows that repeat one sub-block need one effective scale; all of them are scanned, with either shift for IQ1_S."""
    codec = get_codec(name)
    weight, importance = _randn(12, codec.sub, seed=12).repeat(1, 256 // codec.sub), torch.ones(256)
    ours = ((weight - codec.decode(*_rounded(codec, weight, importance))) ** 2).sum(1)
    sub = weight[:, : codec.sub]
    best = torch.full((12,), torch.inf)
    top = float(codec.points.abs().max())
    for stretch, shift in itertools.product(
        torch.linspace(0.2, 1.3, 150), (0.125, -0.125) if name == "iq1_s" else (0,)
    ):
        scale = sub.abs().amax(1, keepdim=True) * stretch / top
        target = (sub / scale).reshape(-1, codec.step) - shift
        units = codec.nearest(target, torch.ones(codec.step)).reshape(sub.shape)
        best = torch.minimum(best, ((sub - scale * (units + shift)) ** 2).sum(1) * (256 // codec.sub))
    assert 0.995 * best.sum() <= ours.sum() <= limit * best.sum()


# Relative errors of ggml_quantize_chunk on `_weights`, without and with importance: building its tables takes many seconds.
LLAMA_CPP = {
    ("iq1_s", "gaussian"): (0.23382, 0.19402),
    ("iq1_s", "laplace"): (0.29755, 0.24311),
    ("iq1_m", "gaussian"): (0.20196, 0.14894),
    ("iq1_m", "laplace"): (0.23050, 0.17677),
    ("iq2_s", "gaussian"): (0.06160, 0.04851),
    ("iq2_s", "laplace"): (0.08711, 0.07102),
}


def _weights(source: str) -> Tensor:
    if source == "gaussian":
        return 0.02 * _randn(24, 512, seed=13)
    uniform = torch.rand(24, 512, generator=torch.Generator().manual_seed(14)) - 0.5
    return -0.02 * uniform.sign() * torch.log1p(-2 * uniform.abs().clamp_max(0.4999999))


@pytest.mark.parametrize("source", ["gaussian", "laplace"])
@pytest.mark.parametrize("name", NAMES)
def test_fit_is_no_worse_than_llama_cpp(name: str, source: str) -> None:
    """Importance-weighted relative error against ggml_quantize_chunk's, given the same importance."""
    weight, codec = _weights(source), get_codec(name)
    for importance, frozen in zip(
        (torch.ones(512), _importance(512)), LLAMA_CPP.get((name, source), (0, 0)), strict=True
    ):
        ours = codec.decode(*_rounded(codec, weight, importance))
        theirs = frozen or _error(weight, _by_llama_cpp(name, weight, importance), importance)
        assert _error(weight, ours, importance) <= theirs


def _by_llama_cpp(name: str, weight: Tensor, importance: Tensor) -> Tensor:
    blocks = _c().quantize_rows(name, weight.numpy(), importance.numpy())
    return torch.from_numpy(_c().dequantize_rows(name, blocks, weight.shape[1]))


def _error(weight: Tensor, decoded: Tensor, importance: Tensor) -> float:
    return float((importance * (weight - decoded) ** 2).sum() / (importance * weight**2).sum())


@pytest.mark.parametrize("name", NAMES)
def test_refit_never_raises_the_objective(name: str) -> None:
    codec, weight, gram = get_codec(name), 0.05 * _randn(8, 512, seed=15), _gram(512)
    units, grid = _rounded(codec, weight, gram.diagonal())
    if name == "mxfp4":
        grid = ScaleGrid(2 * grid.scale)  # a power of two that was chosen with care has nowhere to go

    def objective(grid: Grid) -> Tensor:
        return _costs((weight - codec.decode(units, grid)).double(), gram.double())

    before = first = objective(grid)
    for _ in range(3):
        grid = codec.refit(weight, units, grid, gram)
        assert (objective(grid) <= before * (1 + 1e-5)).all()
        before = objective(grid)
        assert torch.equal(codec.unpack(codec.pack(units, grid)), codec.decode(units, grid))
    assert before.sum() < (0.3 if name == "mxfp4" else 0.999) * first.sum()


# -- any input
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8)
@given(data=st.data())
def test_any_weight_decodes_to_finite_values(name: str, data: st.DataObject) -> None:
    """Sizes from 1e-30 to 1e30, dead columns, rows that are constant or zero."""
    rows, n = data.draw(st.integers(1, 3)), codec_info(name).block * data.draw(st.integers(1, 2))
    weight = _randn(rows, n, seed=data.draw(st.integers(0, 99)))
    weight *= torch.tensor([10.0 ** data.draw(st.floats(-30, 30)) for _ in range(rows)])[:, None]
    kind = data.draw(st.sampled_from(["plain", "constant", "zero", "one"]))
    if kind == "constant":
        weight[0] = weight[0, 0]
    elif kind == "zero":
        weight[0] = 0.0
    elif kind == "one":
        weight[0] = torch.where(torch.arange(n) == n // 2, weight[0], 0.0)
    importance = _importance(n) * 10.0 ** data.draw(st.floats(-8, 8))
    importance[data.draw(st.integers(0, n - 1)) :: data.draw(st.integers(1, 9))] = 0.0
    codec = get_codec(name)
    units, grid = _rounded(codec, weight, importance)
    decoded = codec.decode(units, grid)
    assert torch.isfinite(decoded).all()
    assert torch.equal(codec.unpack(codec.pack(units, grid)), decoded)
    if kind == "zero":
        assert (decoded[0] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_row_is_kept(name: str) -> None:
    weight = torch.tensor([0.37, -0.37])[:, None].expand(2, codec_info(name).block)
    codec = get_codec(name)
    decoded = codec.decode(*_rounded(codec, weight, torch.ones(weight.shape[1])))
    worst = {"mxfp4": 0.04, "iq3_s": 0.25}.get(
        name, 0.02
    )  # IQ3_S has no point with four equal columns but the smallest
    assert (decoded - weight).abs().max() <= worst * 0.37


@pytest.mark.parametrize("name", NAMES)
def test_only_half_precision_scales_saturate(name: str) -> None:
    """Beyond 65504 a scale is clamped and signs survive; a power of two goes on to 2^126."""
    n, size = codec_info(name).block, 1e25 if name == "mxfp4" else 1e9
    weight = (
        size * torch.sign(_randn(3, n, seed=16)) * (1 + torch.rand(3, n, generator=torch.Generator().manual_seed(1)))
    )
    codec = get_codec(name)
    decoded = codec.decode(*_rounded(codec, weight, torch.ones(n)))
    assert torch.isfinite(decoded).all() and decoded.abs().max() >= 65504
    if name == "mxfp4":
        assert (decoded / weight - 1).abs().max() < 0.35
    elif name != "q4_1":
        assert (decoded.sign() == weight.sign()).float().mean() > 0.8
