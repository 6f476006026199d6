"""The modules of the runtime, one by one: bits against Python's integers, fast look-ups against the codecs, integer
products against numpy, and that nothing is decoded whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from compress.codecs import block_codec
from compress.codecs.names import codec_info, stored_bytes
from compress.codecs.packing import pack_bits, packed_bytes, unpack_bits
from compress.containers.compress import Setting, stored_parts
from compress.decode import decode
from compress.runtime.decode import decode_rows
from compress.runtime.embedding import PackedEmbedding
from compress.runtime.linear import PackedLinear, integer_matmul
from compress.runtime.weight import CHUNK_BYTES
from compress.solvers import rtn
from compress.solvers.options import RtnOptions
from compress.transforms.incoherence import Incoherence, pack_signs
from compress.weights import Packed


# -- bits --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [1, 7, 8, 64, 101])
def test_bits_are_those_of_one_long_number(bits: int, n: int) -> None:
    """Against Python's integers: row r is the sum of codes[r, j] * 2^(bits * j), little-endian."""
    codes = torch.randint(0, 2**bits, (3, n), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    data = pack_bits(codes, bits)
    for row, packed in zip(codes.tolist(), data, strict=True):
        number = sum(code << (bits * j) for j, code in enumerate(row))
        assert bytes(packed.tolist()) == number.to_bytes(packed_bytes(n, bits), "little")
    assert torch.equal(unpack_bits(data, bits, n), codes)


def test_two_4_bit_codes_share_a_byte_low_half_first() -> None:
    assert pack_bits(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]


# -- rows of every codec -----------------------------------------------------------------------------------------------
ALL = (
    "int2-g32", "int2-row-asym", "int3-g64", "int3-row", "int4-g128", "int4-g32-asym", "int8-row", "int8-g64-asym",
    "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "q4_0", "q5_0", "q5_1", "iq2_xxs", "iq2_xs", "iq3_xxs", "iq4_nl",
    "iq4_xs", "nf4", "nf4-dq", "fp4", "fp4-dq", "e8p", "e8p3", "e8p4", "trellis2", "trellis3", "trellis4",
)  # fmt: skip


@pytest.mark.parametrize("codec", ALL)
def test_look_ups_agree_with_the_codec(codec: str) -> None:
    """Slices of rows, and for codecs that embeddings may have any rows, are what the codec's own `unpack` gives."""
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(1)) * torch.rand(48, 1)
    packed = rtn.solve(weight, None, block_codec(codec, 256), RtnOptions()).pack()
    expected, parts = decode(packed), stored_parts(packed)

    def check(rows: slice | torch.Tensor) -> None:
        values, scale = decode_rows(codec, (48, 256), parts, rows, torch.float32)
        values = values if scale is None else values * scale
        torch.testing.assert_close(values, expected[rows], rtol=1e-6, atol=0)

    check(slice(16, 48))
    check(slice(0, 16))
    if codec_info(codec).kind != "vector":
        check(torch.tensor([5, 47, 5, 0]))
        check(slice(17, 18))
    info = codec_info(codec)
    size = sum(part.numel() * part.element_size() for part in parts.values())
    if info.kind == "uniform":
        groups = 256 // info.block if info.block else 1
        zeros = 0 if info.symmetric else packed_bytes(groups, info.bits)
        assert size == 48 * (256 * info.bits // 8 + 2 * groups + zeros) <= stored_bytes(codec, (48, 256))
    else:
        signs = 48 // 8 + 256 // 8 if info.kind == "vector" else 0
        assert size == stored_bytes(codec, (48, 256)) - signs


# -- linears -----------------------------------------------------------------------------------------------------------
def packed_linear(codec: str, shape: tuple[int, int], **setting: Any) -> tuple[PackedLinear, torch.Tensor]:
    """A linear and its decoded weight."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
    packed = rtn.solve(weight, None, block_codec(codec, shape[1]), RtnOptions()).pack()
    if setting.get("incoherence"):
        drawn = Incoherence.draw(*shape, 1, 2)
        signs = {"signs_in": pack_signs(drawn.signs_in), "signs_out": pack_signs(drawn.signs_out)}
        packed = Packed(packed.codec, packed.shape, {**packed.parts, **signs})
    return PackedLinear(Setting(codec, **setting), shape, stored_parts(packed)), decode(packed)


def test_8_bit_activations_are_integers() -> None:
    """numpy, from the stored bytes: codes and activations as integers, one scale each."""
    linear, dense = packed_linear("int8-row", (40, 96), activations="int8")
    x = (
        torch.randn(7, 96, generator=torch.Generator().manual_seed(3))
        * torch.tensor([1e-3, 1, 10, 0, 1, 1, 100])[:, None]
    )
    weight = linear.codes.numpy().astype(np.int64) - 128
    scale = np.abs(x.numpy()).max(1, keepdims=True).astype(np.float32) / np.float32(127)
    with np.errstate(invalid="ignore"):
        codes = np.nan_to_num(np.rint(x.numpy() / scale)).astype(np.int64)
    assert np.abs(codes).max() == 127
    expected = (codes @ weight.T) * scale * linear.scales.numpy().astype(np.float32).T
    with torch.inference_mode():
        np.testing.assert_allclose(linear(x).numpy(), expected, rtol=1e-6)
    # another codec has the same activations and its own weight
    other, dense = packed_linear("int4-g32", (40, 96), activations="int8")
    with torch.inference_mode():
        np.testing.assert_allclose(other(x).numpy(), (codes * scale) @ dense.numpy().T, rtol=1e-3, atol=1e-5)
    rounded = torch.from_numpy(codes * scale).float() @ dense.T
    assert (rounded - x @ dense.T).abs().max() > 1e-4  # the rounding is really there


def test_integer_products_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (k, 6000), generator=generator, dtype=torch.int8) for k in (3, 5))
    a[0], b[0] = 127, 127  # 96774000, far beyond float32's integers
    expected = torch.from_numpy(a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T)
    assert torch.equal(integer_matmul(a, b).long(), expected)


@pytest.mark.parametrize("codec", ["int4-g64", "e8p", "trellis3", "q4_k"])
def test_a_weight_is_never_decoded_whole(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of at most CHUNK_BYTES, with a last one that is not full, in products and in gradients."""
    import compress.runtime.weight as weight_module

    incoherent = codec_info(codec).kind == "vector"
    linear, dense = packed_linear(codec, (80, 256), incoherence=incoherent)
    monkeypatch.setattr(weight_module, "CHUNK_BYTES", 48 * 256 * 4)
    seen = []

    def watched(name: str, shape: Any, parts: Mapping[str, Any], rows: slice, dtype: Any) -> Any:
        seen.append(rows)
        return decode_rows(name, shape, parts, rows, dtype)

    monkeypatch.setattr(weight_module, "decode_rows", watched)
    assert CHUNK_BYTES <= 4 << 20
    x = torch.randn(3, 2, 256, requires_grad=True)
    y = linear(x)
    assert [(s.start, s.stop) for s in seen] == [(0, 48), (48, 80)]
    torch.testing.assert_close(y, x @ dense.T, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, direction)
    torch.testing.assert_close(gradient, direction @ dense, rtol=1e-4, atol=1e-4)


def test_casting_leaves_the_parts_alone() -> None:
    linear, _ = packed_linear("nf4", (64, 128))
    linear.bias = torch.nn.Parameter(torch.zeros(64))
    before = {name: part.clone() for name, part in linear.parts.items()}
    linear.to(torch.bfloat16)
    assert linear.bias.dtype == torch.bfloat16
    assert all(
        torch.equal(part, before[name]) and part.dtype == before[name].dtype for name, part in linear.parts.items()
    )
    embedding = PackedEmbedding(Setting("nf4"), (64, 128), before, torch.float32).to(torch.bfloat16)
    assert embedding(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    scaled = PackedEmbedding(Setting("nf4"), (64, 128), before, torch.float32, scale=7.5)
    plain = PackedEmbedding(Setting("nf4"), (64, 128), before, torch.float32)
    assert torch.equal(scaled(torch.arange(64)), 7.5 * plain(torch.arange(64)))
