"""Hadamard transforms and incoherence against dense matrices, scipy and the algebra they must obey."""

from __future__ import annotations

import hashlib

import pytest
import scipy.linalg
import torch
from torch import Tensor

from compress.transforms.hadamard import (
    LARGEST_BASE,
    block_length,
    hadamard_base,
    hadamard_transform,
    inverse_hadamard_transform,
    random_signs,
)
from compress.transforms.incoherence import Incoherence, pack_signs, unpack_signs

BASES = tuple(range(12, LARGEST_BASE + 1, 8))


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _dense(n: int) -> Tensor:
    """The transform of length n as a matrix: its columns are the transformed unit vectors."""
    return hadamard_transform(torch.eye(n, dtype=torch.float64), 0)


@pytest.mark.parametrize("order", (1, 2, 4, *BASES))
def test_bases_are_hadamard_matrices(order: int) -> None:
    base = hadamard_base(order)
    assert base.shape == (order, order) and (base.abs() == 1).all()
    assert torch.equal(base @ base.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", (0, 3, 8, 16, 24, 260, -12))
def test_other_orders_are_refused(order: int) -> None:
    with pytest.raises(ValueError, match=f"order {order}"):
        hadamard_base(order)


@pytest.mark.parametrize("k", (0, 1, 2, 3, 6, 7, 8, 10))
def test_powers_of_two_are_sylvesters(k: int) -> None:
    """scipy's matrix, in every split of the exponent into passes."""
    torch.testing.assert_close(_dense(2**k), torch.from_numpy(scipy.linalg.hadamard(2**k)).double() / 2 ** (k / 2))


@pytest.mark.parametrize(
    "n", (12, 24, 96, 20, 160, 344, 688, 56, 448, 188 * 2, 236, 228 * 4, 16 * 9 * 11, 16 * 15 * 49)
)
def test_other_lengths_mix_every_column_alike(n: int) -> None:
    """11008 = 172 * 64 and its like, and the products of two bases: all entries of the matrix are +-1/sqrt(n)."""
    if n > 2000:
        x = _randn(1, n)
        torch.testing.assert_close(inverse_hadamard_transform(hadamard_transform(x)), x)
        assert block_length(n) == n
        return
    dense = _dense(n)
    assert block_length(n) == n
    torch.testing.assert_close(dense.abs(), torch.full_like(dense, n**-0.5))
    torch.testing.assert_close(dense @ dense.T, torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize(
    ("n", "block"), [(1, 1), (3, 1), (6, 2), (10, 2), (214, 2), (107 * 8, 8), (9 * 12, 108), (81 * 4, 108)]
)
def test_lengths_without_a_matrix_are_transformed_in_blocks(n: int, block: int) -> None:
    """Every divisor with a known matrix is at most `block`; the dense matrix is block-diagonal."""
    assert block_length(n) == block
    dense = _dense(n)
    torch.testing.assert_close(dense, torch.block_diag(*[_dense(block)] * (n // block)))
    torch.testing.assert_close(dense @ dense.T, torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", (4096, 11008, 14336, 13696, 29568, 10944, 896))
def test_inverse_and_norm_at_the_widths_of_real_models(n: int) -> None:
    x = _randn(3, n)
    y = hadamard_transform(x)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(inverse_hadamard_transform(y), x)
    assert block_length(n) == (128 if n == 13696 else n)


def test_any_axis_and_dtype() -> None:
    x = _randn(2, 24, 5)
    along = hadamard_transform(x, 1)
    torch.testing.assert_close(along, torch.einsum("ij,bjc->bic", _dense(24), x))
    torch.testing.assert_close(inverse_hadamard_transform(along, -2), x)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        low = hadamard_transform(x.to(dtype), 1)
        assert low.dtype == dtype
        torch.testing.assert_close(low.double(), along, rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match="0 columns"):
        hadamard_transform(torch.zeros(3, 0))


def test_gradients_flow_even_after_use_in_inference_mode() -> None:
    with torch.inference_mode():
        hadamard_transform(_randn(2, 44))
    x = _randn(2, 44).requires_grad_()
    (hadamard_transform(x) * _randn(2, 44, seed=1)).sum().backward()
    torch.testing.assert_close(x.grad, inverse_hadamard_transform(_randn(2, 44, seed=1)))


# -- incoherence
def test_turned_weight_is_the_dense_product_and_comes_back() -> None:
    m, n = 24, 40
    turn, weight = Incoherence.draw(m, n, 1, 2), _randn(m, n)
    out, into = _dense(m) * turn.signs_out.double(), _dense(n) * turn.signs_in.double()
    turned = turn.weight(weight)
    torch.testing.assert_close(turned, out @ weight @ into.T)
    torch.testing.assert_close(turn.restore(turned), weight, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("m", "n"), [(12, 20), (6, 56), (16, 107)])
def test_what_a_runtime_computes_is_the_original_layer(m: int, n: int) -> None:
    turn, weight, x = Incoherence.draw(m, n, 3, 4), _randn(m, n), _randn(2, 3, n, seed=1)
    y = turn.output(turn.input(x) @ turn.weight(weight).T)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-12, atol=1e-12)


def test_gram_turns_with_the_inputs() -> None:
    m, n = 20, 88
    turn, weight, delta, x = Incoherence.draw(m, n, 5, 6), _randn(m, n), _randn(m, n, seed=1), _randn(300, n, seed=2)
    gram = x.T @ x
    turned = turn.gram(gram)
    torch.testing.assert_close(turned, turn.input(x).T @ turn.input(x))
    for w in (weight, delta):
        loss, turned_loss = (w @ gram * w).sum(), (turn.weight(w) @ turned * turn.weight(w)).sum()
        torch.testing.assert_close(turned_loss, loss)
    assert turn.gram(gram.float()).dtype == torch.float32


def test_outliers_spread() -> None:
    """A matrix with a loud column, a loud row and a single spike: max / rms falls to that of Gaussian entries.

    Of 128 * 256 Gaussians the largest is near sqrt(2 ln 32768) = 4.6.
    """
    weight = _randn(128, 256)
    weight[:, 7] *= 40
    weight[3] *= 40
    weight[60, 100] = 500
    turned = Incoherence.draw(128, 256, 7, 8).weight(weight)
    before, after = (w.abs().max() / w.square().mean().sqrt() for w in (weight, turned))
    assert before > 50 and after < 12
    smooth = _randn(128, 256)
    smooth[60, 100] = 500
    spread = Incoherence.draw(128, 256, 7, 8).weight(smooth)
    assert spread.abs().max() / spread.square().mean().sqrt() < 6


def test_signs_are_fair_reproducible_and_apart() -> None:
    a, b = Incoherence.draw(4096, 4096, 1, 2), Incoherence.draw(4096, 4096, 1, 2)
    assert torch.equal(a.signs_in, b.signs_in) and torch.equal(a.signs_out, b.signs_out)
    assert a.signs_in.dtype == torch.float32 and (a.signs_in.abs() == 1).all()
    other = Incoherence.draw(4096, 4096, 2, 2)
    for first, second in ((a.signs_in, a.signs_out), (a.signs_in, other.signs_in)):
        assert abs(float((first * second).mean())) < 5 / 64  # five standard deviations
    assert torch.equal(other.signs_in, a.signs_out)  # one stream a seed, whatever the side
    assert abs(float(a.signs_in.mean())) < 5 / 64


def test_signs_never_change() -> None:
    """A rotation is drawn again from its seed whenever a tensor is read."""
    digest = hashlib.shake_256(b"compress signs 3").digest(2)
    bits = [digest[i // 8] >> i % 8 & 1 for i in range(11)]
    assert random_signs(11, "signs 3").tolist() == [-1.0 if bit else 1.0 for bit in bits]
    assert torch.equal(Incoherence.draw(5, 11, 3, 4).signs_in, random_signs(11, "signs 3"))
    assert random_signs(16, "R1 0").tolist() == [1, 1, 1, -1, -1, -1, -1, 1, 1, -1, 1, 1, -1, 1, 1, -1]


def test_signs_pack_to_bits() -> None:
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0])
    packed = pack_signs(signs)
    assert packed.tolist() == [0b10010010, 0b00000001]
    assert torch.equal(unpack_signs(packed, 10), signs)
    for n in (1, 7, 8, 9, 107):
        drawn = Incoherence.draw(1, n, n, 0).signs_in
        assert pack_signs(drawn).shape == (-(-n // 8),) and torch.equal(unpack_signs(pack_signs(drawn), n), drawn)
    with pytest.raises(ValueError, match="2 bytes of signs for 17"):
        unpack_signs(packed, 17)
