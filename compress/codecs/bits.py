"""Byte-level helpers of the ggml codecs (layouts: ggml-common.h and ggml-quants.c of llama.cpp, MIT)."""

from __future__ import annotations

import torch
from torch import Tensor


def half_bytes(values: Tensor) -> Tensor:
    """float32 [B] or [B, k] holding half-precision values -> uint8 [B, 2k], little-endian."""
    return values.half().reshape(values.shape[0], -1).contiguous().view(torch.uint8)


def read_half(blocks: Tensor, start: int) -> Tensor:
    """The half-precision number at byte `start` of every block -> float32 [B, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def u8(values: Tensor) -> Tensor:
    """Integer-valued tensor, negative values in two's complement -> uint8."""
    return (values.to(torch.int32) & 0xFF).to(torch.uint8)


def pack_nibbles(values: Tensor) -> Tensor:
    """[..., 32] in 0..15 -> uint8 [..., 16]; element i in the low half of byte i, i + 16 in its high half."""
    v = u8(values)
    return v[..., :16] | (v[..., 16:] << 4)


def unpack_nibbles(data: Tensor) -> Tensor:
    """uint8 [..., 16] -> [..., 32], inverse of `pack_nibbles`."""
    return torch.cat((data & 0xF, data >> 4), dim=-1)


def pack_scales_6bit(scales: Tensor, mins: Tensor) -> Tensor:
    """Eight 6-bit scales and mins -> 12 bytes (Q4_K, Q5_K)."""
    s, m = u8(scales), u8(mins)
    first = s[:, :4] | ((s[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    third = (s[:, 4:] & 0xF) | ((m[:, 4:] & 0xF) << 4)
    return torch.cat((first, second, third), dim=1)


def unpack_scales_6bit(data: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `pack_scales_6bit`."""
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat((first & 63, (third & 0xF) | ((first >> 6) << 4)), dim=1)
    mins = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    return scales, mins


def pack_words(values: Tensor, width: int) -> Tensor:
    """int64 [B, k] -> uint8 [B, k * width], little-endian words of `width` bytes."""
    shifts = torch.arange(width, device=values.device) * 8
    return ((values[..., None] >> shifts) & 0xFF).to(torch.uint8).reshape(values.shape[0], -1)


def unpack_words(data: Tensor, width: int) -> Tensor:
    """uint8 [B, k * width] -> int64 [B, k]."""
    shifts = torch.arange(width, device=data.device) * 8
    return (data.reshape(data.shape[0], -1, width).to(torch.int64) << shifts).sum(-1)


def pack_signs(negative: Tensor) -> Tensor:
    """bool [..., 8] with an even number of True -> int64 [...]: the seven sign bits that ggml stores."""
    weights = 1 << torch.arange(7, device=negative.device)
    return (negative[..., :7].to(torch.int64) * weights).sum(-1)


def unpack_signs(bits: Tensor) -> Tensor:
    """int64 [...] of seven bits -> float32 [..., 8] of +-1; the eighth makes the number of minus signs even."""
    seven = (bits[..., None] >> torch.arange(7, device=bits.device)) & 1
    eighth = seven.sum(-1, keepdim=True) & 1
    return 1.0 - 2.0 * torch.cat((seven, eighth), dim=-1).float()


def pack_bits(values: Tensor) -> Tensor:
    """bool [B, k, 8] -> uint8 [B, k], the first of eight in the lowest bit."""
    return (values.to(torch.int64) << torch.arange(8, device=values.device)).sum(-1).to(torch.uint8)


def unpack_bits(data: Tensor) -> Tensor:
    """uint8 [B, k] -> uint8 [B, k, 8] of 0 and 1, inverse of `pack_bits`."""
    return (data[..., None] >> torch.arange(8, dtype=torch.uint8, device=data.device)) & 1
