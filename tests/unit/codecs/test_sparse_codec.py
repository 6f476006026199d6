"""Masks and kept values against a reader that knows only the format's description, and their bytes against the plan's."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.codecs import block_codec, get_codec
from compress.codecs.names import codec_info, mask_bits, packed_bytes, sparse_name
from compress.codecs.packing import pack_bits, unpack_run
from compress.codecs.sparse import SparseCodec, row_starts
from compress.runtime.decode import decode_rows
from compress.solvers import rtn
from compress.solvers.options import RtnOptions
from compress.weights import Packed, Pattern

CODECS = (
    "sparse-bf16", "sparse-f32", "sparse-int4-g32", "sparse-int3-g32-asym", "sparse-int2-row", "sparse-int8-row-asym",
    "2:4-bf16", "2:4-int4-g32-asym", "4:8-int8-row", "1:4-f32", "3:7-f16",
)  # fmt: skip
ROWS, COLUMNS = 13, 96


def columns_of(codec: str) -> int:
    """No multiple of eight where nothing asks for one."""
    info = codec_info(codec)
    return 98 if info.of == 7 else 91 if info.block in (0, 1) and not info.of else COLUMNS


def random_mask(codec: str, rows: int, columns: int) -> Tensor:
    info, random = codec_info(codec), torch.Generator().manual_seed(len(codec))
    if not info.of:
        return torch.rand(rows, columns, generator=random) < 0.4
    order = torch.rand(rows, columns // info.of, info.of, generator=random).argsort(2)
    return torch.zeros(order.shape, dtype=torch.bool).scatter_(2, order[..., : info.keep], True).reshape(rows, columns)


def packed(codec: str) -> tuple[Packed, Packed, Tensor]:
    """A random matrix as the codec stores it, as its values' codec stores it whole, and the mask."""
    columns, inner = columns_of(codec), codec_info(codec).parts[0]
    weight = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(1))
    mask = random_mask(codec, ROWS, columns)
    mask[3] = random_mask(codec, ROWS, columns)[4] if codec_info(codec).of else False  # a row without anything
    if codec_info(inner).kind == "float":
        whole = get_codec(inner).encode(weight)
    else:
        whole = rtn.solve(weight, None, block_codec(inner, columns), RtnOptions()).pack()
    return get_codec(codec).pack(whole, mask), whole, mask


def bits_of(octets: np.ndarray) -> np.ndarray:
    return np.unpackbits(octets, bitorder="little")


def read_by_description(codec: str, stored: Packed) -> np.ndarray:
    """The matrix, number by number, as the module's docstring describes the bytes."""
    info, (rows, columns) = codec_info(codec), stored.shape
    parts = stored.parts
    out, at = np.zeros((rows, columns), np.float32), 0
    for row in range(rows):
        bits = bits_of(parts["mask"][row].numpy())
        if info.of:
            width, table = mask_bits(codec), list(combinations(range(info.of), info.keep))
            numbers = bits[: columns // info.of * width].reshape(-1, width) @ (1 << np.arange(width))
            kept = [group * info.of + place for group, number in enumerate(numbers) for place in table[number]]
        else:
            kept = np.flatnonzero(bits[:columns])
        for column in kept:
            if not info.bits:
                out[row, column] = parts["values"][at].float()
            else:
                code = bits_of(parts["codes"].numpy())[at * info.bits : (at + 1) * info.bits] @ (
                    1 << np.arange(info.bits)
                )
                groups = parts["scales"].shape[1]
                group = column * groups // columns
                zero = 2 ** (info.bits - 1)
                if not info.symmetric:
                    zeros = bits_of(parts["zeros"][row].numpy())
                    zero = zeros[group * info.bits : (group + 1) * info.bits] @ (1 << np.arange(info.bits))
                scale = parts["scales"][row, group].float().numpy()
                out[row, column] = (np.float32(code) - np.float32(zero)) * scale
            at += 1
    return out


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_say_what_the_description_says(codec: str) -> None:
    stored, whole, mask = packed(codec)
    decoded = get_codec(codec).unpack(stored)
    assert np.array_equal(read_by_description(codec, stored), decoded.numpy())
    assert torch.equal(decoded, get_codec(whole.codec).unpack(whole) * mask)


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_are_as_many_as_planned(codec: str) -> None:
    stored, _, mask = packed(codec)
    size = sum(part.numel() * part.element_size() for part in stored.parts.values())
    assert size == packed_bytes(codec, stored.shape, int(mask.sum()))


@pytest.mark.parametrize("codec", CODECS)
def test_some_rows_of_a_running_model(codec: str) -> None:
    stored, _, _ = packed(codec)
    whole = get_codec(codec).unpack(stored)
    parts = {**stored.parts, "starts": row_starts(codec, stored.parts["mask"], stored.shape[1])}
    for rows in (slice(0, ROWS), slice(2, 5), slice(ROWS - 1, ROWS)):
        values, scale = decode_rows(codec, stored.shape, parts, rows, torch.float32)
        assert torch.equal(values if scale is None else values * scale, whole[rows])


def test_sizes_in_closed_form() -> None:
    """A bit for the mask and half of the values; 3 bits for two of four; 7 for four of eight."""
    shape, half = (128, 256), 128 * 128
    assert packed_bytes("sparse-bf16", shape, half) * 8 == 128 * 256 * (1 + 8)
    assert packed_bytes("2:4-bf16", shape, half) * 8 == 128 * 256 * (0.75 + 8)
    assert packed_bytes("4:8-bf16", shape, half) * 8 == 128 * 256 * (0.875 + 8)
    assert packed_bytes("sparse-int4-g128", shape, half) * 8 == 128 * 256 * (1 + 2 + 16 / 128)
    assert packed_bytes("factors(bf16,sparse-bf16)", (300, 256), 300 * 60, 120) == 2 * 120 * 256 + 300 * (15 + 2 * 60)
    assert packed_bytes("factors(bf16,bf16)", (300, 256), None, 120) == 2 * 120 * (256 + 300)


def test_patterns_name_their_codecs_and_count_what_stays() -> None:
    assert sparse_name("int4-g128", Pattern.n_of_m(2, 4)) == "2:4-int4-g128"
    assert sparse_name("bf16", Pattern(0.5)) == "sparse-bf16"
    assert Pattern(0.3).kept(10, 100) == 700 and Pattern.n_of_m(4, 8).kept(3, 64) == 96
    assert Pattern(1 / 3).kept(2, 96) == 128  # no third more for a rounded share


def test_a_mask_that_breaks_its_pattern_is_refused() -> None:
    codec = get_codec("2:4-f32")
    assert isinstance(codec, SparseCodec)
    mask = random_mask("2:4-f32", 2, 8)
    mask[1, :4] = True
    with pytest.raises(ValueError, match="keeps 2 of every 4"):
        codec.pack(get_codec("f32").encode(torch.ones(2, 8)), mask)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_runs_of_codes_start_anywhere(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (61,), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    data = pack_bits(codes[None], bits)[0]
    for first, last in ((0, 61), (5, 9), (7, 7), (8, 61), (59, 61)):
        assert torch.equal(unpack_run(data, bits, first, last), codes[first:last])
