"""What quantized checkpoints have in common: packed integers, small floats, scales that share a block. Pure functions.

Formats: OCP Microscaling Formats 1.0 (E2M1, E8M0); words of packed codes as AutoGPTQ, AutoAWQ and compressed-tensors write them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of every 4-bit float."""
E8M0_BIAS = 127


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 words [rows, n] -> the first `count` codes of `bits` bits of every row, uint8 [rows, count]; lowest bits first, codes
    may cross words."""
    import torch

    data = words.contiguous().view(torch.uint8)
    data = torch.nn.functional.pad(data, (0, -data.shape[1] % bits)).reshape(len(words), -1, bits)
    eight = data[:, :, 0].long()  # eight codes are `bits` bytes
    for byte in range(1, bits):
        eight |= data[:, :, byte].long() << 8 * byte
    codes = torch.empty(*eight.shape, 8, dtype=torch.uint8)
    for place in range(8):
        codes[:, :, place] = eight >> place * bits & (1 << bits) - 1
    return codes.reshape(len(words), -1)[:, :count]


def unpacked_words(count: int, bits: int) -> int:
    """int32 words that `count` codes take."""
    return -(-count * bits // 32)


def e2m1(octets: Tensor) -> Tensor:
    """uint8 [..., n] -> float32 [..., 2 n]: two 4-bit floats a byte, the low half first."""
    import torch

    table = torch.tensor(E2M1)
    return torch.stack((table[(octets & 15).int()], table[(octets >> 4).int()]), dim=-1).flatten(-2)


def scale_values(scale: Tensor) -> Tensor:
    """Scales as float32; uint8 stands for the exponents of powers of two."""
    import torch

    return torch.exp2(scale.float() - E8M0_BIAS) if scale.dtype == torch.uint8 else scale.float()


def shared(size: int, scales: int, wanted: int | None = None) -> int | None:
    """How many neighbours of `size` share one of `scales`: all, one, `wanted` with a shorter last run, or equal runs; None where
    they cannot be shared out."""
    if scales in (1, size):
        return size if scales == 1 else 1
    if wanted is not None and -(-size // wanted) == scales:
        return wanted
    return size // scales if scales and size % scales == 0 else None


def grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a matrix's scales: of one for all, of one a row, or as they are."""
    rows, columns = (*shape, 1, 1)[:2]
    return rows, columns


def spread(scale: Tensor, size: int, run: int, dim: int) -> Tensor:
    """Scales along a dimension, each for the `run` neighbours that share it, or one for all, left to be broadcast."""
    return scale if scale.shape[dim] == 1 else scale.repeat_interleave(run, dim).narrow(dim, 0, size)


def scaled(values: Tensor, scale: Tensor, runs: tuple[int, int]) -> Tensor:
    """float32 [rows, columns]: every value times the scale that its block of `runs` shares. scale: as `grid` reads its shape."""
    rows, columns = values.shape
    matrix = scale_values(scale).reshape(grid(tuple(scale.shape)))
    return values.float() * spread(spread(matrix, rows, runs[0], 0), columns, runs[1], 1)
