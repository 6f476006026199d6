"""Products with rounded factors: exact on bfloat16 numbers, only where they are asked for, and only through their own functions."""

from __future__ import annotations

import threading

import pytest
import torch

from compress import products
from compress.machine import look
from compress.statistics import Moments
from compress.streaming.placement import Placement

AMX = "amx_bf16" in look().cpu.features


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 37, 64, 200])
def test_factors_are_rounded_and_sums_are_not(rows: int) -> None:
    x, weight, bias = _randn(rows, 512), _randn(96, 512, seed=1), _randn(96, seed=2)
    exact = x.double() @ weight.double().T + bias
    rounded = x.bfloat16().double() @ weight.bfloat16().double().T + bias
    with products.rounded():
        found = products.linear(x, weight, bias)
        of_rounded = products.linear(x.bfloat16().float(), weight.bfloat16().float(), bias)
    assert found.shape == exact.shape and found.dtype == torch.float32
    assert torch.allclose(of_rounded.double(), rounded, atol=1e-3), "what bfloat16 holds is multiplied without loss"
    gap = float((found.double() - exact).norm() / exact.norm())
    assert gap < 4e-3
    if AMX:
        assert gap > 1e-4, "nothing was rounded"
    assert torch.allclose(products.linear(x, weight, bias).double(), exact, atol=1e-4)


def test_batches_of_windows_pass_as_rows_do() -> None:
    x, weight = _randn(2, 33, 64), _randn(48, 64, seed=1)
    with products.rounded():
        assert torch.allclose(
            products.linear(x, weight).flatten(0, 1), products.linear(x.flatten(0, 1), weight), atol=1e-4
        )


def test_sums_of_moments_are_float32_whatever_the_number_of_tokens() -> None:
    x = _randn(301, 128).bfloat16().float()
    moments = Moments.zeros(128)
    with products.rounded():
        for part in x.split(37):
            moments.add(part)
    assert torch.allclose(moments.gram.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-3)
    assert moments.tokens == 301


def test_settings_of_torch_are_as_before_and_other_threads_keep_theirs() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    x, weight = _randn(64, 256), _randn(256, 256, seed=1)
    plain, elsewhere = products.linear(x, weight), []
    with products.rounded():
        products.linear(x, weight)
        assert torch.backends.mkldnn.matmul.fp32_precision == before
        assert torch.equal(x @ weight.T, plain), "what is not ours is not rounded"
        thread = threading.Thread(target=lambda: elsewhere.append(products.linear(x, weight)))
        thread.start()
        thread.join()
        with products.rounded(False):
            assert torch.equal(products.linear(x, weight), plain)
        with pytest.raises(RuntimeError):
            products.linear(x, weight[:, :3])
        assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert torch.equal(elsewhere[0], plain)
    assert torch.equal(products.linear(x, weight), plain)


@pytest.mark.parametrize(
    ("precision", "own", "rounded"),
    [
        ("float32", "bf16", False),
        ("bf16", "f32", True),
        ("auto", "bf16", AMX),
        ("auto", "f32", False),
        ("auto", "f16", False),
    ],
)
def test_what_auto_means(precision: str, own: str, rounded: bool) -> None:
    placement = Placement().multiplying(precision, own)
    assert placement.rounded == rounded
    assert placement.products == ("bfloat16 factors, float32 sums" if rounded else "float32")
    x, weight = _randn(64, 256), _randn(64, 256, seed=1)
    with placement.observing():
        found = products.linear(x, weight)
    assert torch.equal(found, products.linear(x, weight)) == (not rounded or not AMX)
