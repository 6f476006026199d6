"""Codes of a few bits in bytes: every row starts at a byte, its first code in that byte's lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] of values below 2^bits -> uint8 [rows, ceil(n * bits / 8)].

    Row r is the little-endian number `sum_j codes[r, j] * 2^(bits * j)`: int4 puts code 2i into the low half of byte i,
    eight 3-bit codes fill three bytes. Unused bits of the last byte are zero. bits: 1 to 8.
    """
    rows, n = codes.shape
    if bits == 8:
        return codes.contiguous()
    padded = torch.zeros(rows, -(-n // 8) * 8, dtype=torch.int64, device=codes.device)
    padded[:, :n] = codes
    words = (padded.reshape(rows, -1, 8) << _multiples(bits, 8, codes)).sum(2)
    data = (words[..., None] >> _multiples(8, bits, codes)) & 0xFF
    return data.to(torch.uint8).reshape(rows, -1)[:, : packed_bytes(n, bits)].contiguous()


def unpack_bits(data: Tensor, bits: int, n: int) -> Tensor:
    """uint8 [rows, ceil(n * bits / 8)] -> uint8 [rows, n], the inverse of `pack_bits`."""
    if bits == 8:
        return data
    rows = data.shape[0]
    if 8 % bits == 0:
        shifts = _multiples(bits, 8 // bits, data).to(torch.uint8)
        codes = (data[..., None] >> shifts) & ((1 << bits) - 1)
    else:
        whole = torch.nn.functional.pad(data, (0, -data.shape[1] % bits)).reshape(rows, -1, bits)
        words = (whole.to(torch.int64) << _multiples(8, bits, data)).sum(2)
        codes = ((words[..., None] >> _multiples(bits, 8, data)) & ((1 << bits) - 1)).to(torch.uint8)
    return codes.reshape(rows, -1)[:, :n]


def unpack_run(data: Tensor, bits: int, first: int, last: int) -> Tensor:
    """Codes first..last of one packed row, uint8 [bytes] -> uint8 [last - first]."""
    start = first // 8 * 8  # eight codes fill whole bytes
    chunk = data[start * bits // 8 : packed_bytes(last, bits)]
    return unpack_bits(chunk[None], bits, last - start)[0, first - start :]


def packed_bytes(n: int, bits: int) -> int:
    """Bytes of a row of n codes."""
    return -(-n * bits // 8)


def _multiples(step: int, count: int, like: Tensor) -> Tensor:
    return step * torch.arange(count, device=like.device)
