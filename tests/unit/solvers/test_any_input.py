"""Vector and bitsandbytes codecs, and the solvers, on any size, dead columns, constant rows and grams of any rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.codecs import block_codec
from compress.codecs.names import codec_info
from compress.solvers import gptq, rtn
from compress.solvers.base import Solution, relative_error
from compress.solvers.options import GptqOptions, RtnOptions
from compress.transforms.hadamard import hadamard_transform, inverse_hadamard_transform
from compress.transforms.incoherence import Incoherence

VECTOR = ("e8p", "e8p3", "e8p4", "trellis2", "trellis3", "trellis4")
BNB = ("nf4", "nf4-dq", "fp4", "fp4-dq")


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _wide_error(weight: Tensor, decoded: Tensor, gram: Tensor) -> float:
    """The relative error in float64, which neither overflows nor vanishes here."""
    w, g = weight.double(), gram.double()
    delta = w - decoded.double()
    return float(((delta @ g) * delta).sum() / ((w @ g) * w).sum())


def _check(solution: Solution, weight: Tensor, kind: str) -> None:
    decoded = solution.decode()
    assert torch.isfinite(decoded).all()
    assert torch.equal(solution.codec.unpack(solution.pack()), decoded), "what is stored is not what was evaluated"
    if kind == "zero":
        assert not decoded[0].any()


@pytest.mark.parametrize("name", [*VECTOR, *BNB])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_weight_and_gram_are_solved_to_finite_values(name: str, data: st.DataObject) -> None:
    tile, block = codec_info(name).rows, codec_info(name).block
    rows = tile * data.draw(st.integers(1, 3 if tile == 1 else 2))
    n = block * data.draw(st.integers(1, 3))
    exponents = st.floats(-30, 30)
    weight = _randn(rows, n, seed=data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        weight *= 10.0 ** data.draw(exponents)
    else:
        weight *= torch.tensor([10.0 ** data.draw(exponents) for _ in range(rows)])[:, None]
    kind = data.draw(st.sampled_from(["plain", "constant", "zero", "one"]))
    if kind == "constant":
        weight[0] = weight[0, 0]
    elif kind == "zero":
        weight[0] = 0.0
    elif kind == "one":
        weight[0] = torch.where(torch.arange(n) == n // 2, weight[0], 0.0)
    x = _randn(data.draw(st.integers(1, 2 * n)), n, seed=1)  # fewer tokens than columns: a rank-deficient gram
    x[:, data.draw(st.integers(0, n - 1)) :: data.draw(st.integers(1, 9))] = 0.0
    gram = x.T @ x * 10.0 ** data.draw(exponents)
    codec = block_codec(name, n)
    _check(rtn.solve(weight, None, codec, RtnOptions()), weight, kind)
    _check(rtn.solve(weight, gram, codec, RtnOptions()), weight, kind)
    _check(gptq.solve(weight, gram, codec, GptqOptions(sweeps=1, refits=1)), weight, kind)


@pytest.mark.parametrize("name", ["nf4", "fp4-dq"])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_the_reported_error_is_true_at_any_size(name: str, size: float) -> None:
    """Squares of these weights are nothing or infinite in float32."""
    weight, x = _randn(8, 64) * size, _randn(100, 64, seed=1)
    gram = x.T @ x
    for solution in (
        rtn.solve(weight, gram, block_codec(name, 64), RtnOptions()),
        gptq.solve(weight, gram, block_codec(name, 64), GptqOptions()),
    ):
        assert 1e-4 < solution.error < 0.1
        assert solution.error == pytest.approx(_wide_error(weight, solution.decode(), gram), rel=1e-3)


@pytest.mark.parametrize("name", VECTOR)
@pytest.mark.parametrize("size", [1e-12, 1e9])
def test_rows_beyond_half_precision_say_that_they_are_lost(name: str, size: float) -> None:
    """Scales that a half cannot hold become 0 or 65504: finite values, and an error near one instead of none."""
    weight, gram = _randn(16, 32) * size, torch.eye(32)
    solution = gptq.solve(weight, gram, block_codec(name, 32), GptqOptions(sweeps=1))
    _check(solution, weight, "plain")
    assert 0.9 < solution.error <= 1.0001


def test_an_empty_weight_has_no_error() -> None:
    gram = torch.eye(4)
    assert relative_error(torch.zeros(2, 4), torch.zeros(2, 4), gram) == 0.0
    tiny = torch.full((2, 4), 1e-42)  # subnormal
    assert relative_error(tiny, torch.zeros(2, 4), gram) == pytest.approx(1.0, rel=0.01)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_incoherence_is_orthonormal_for_any_shape_and_size(data: st.DataObject) -> None:
    m, n = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    weight = _randn(m, n, seed=data.draw(st.integers(0, 99))).double() * 10.0 ** data.draw(st.floats(-30, 30))
    turn = Incoherence.draw(m, n, data.draw(st.integers(0, 1 << 32)), data.draw(st.integers(0, 1 << 32)))
    turned, size = turn.weight(weight), weight.norm()
    assert abs(float(turned.norm() / size) - 1) < 1e-12
    assert float((turn.restore(turned) - weight).norm() / size) < 1e-12
    x = weight[0]
    assert float((inverse_hadamard_transform(hadamard_transform(x)) - x).norm()) <= 1e-12 * float(x.norm())
