"""Codes of a few bits as numbers, by tables: all codes in a byte (or two) are looked up at once.

An entry of up to 16 bytes is fetched as one number, several times faster than as a row of a matrix.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

_OF_WIDTH = {4: torch.float32, 8: torch.float64, 16: torch.complex128}


def look_up(index: Tensor, table: Tensor) -> Tensor:
    """table [m, v] at int32 index of any shape -> [index.numel(), v]; a row of the table takes 4, 8 or 16 bytes."""
    width = table.shape[1] * table.element_size()
    whole = table.view(_OF_WIDTH[width]).reshape(-1)
    return whole.index_select(0, index.reshape(-1)).view(table.dtype).reshape(-1, table.shape[1])


def codes(data: Tensor, bits: int, n: int, middle: int = 0) -> Tensor:
    """uint8 [k, b] as `pack_bits` wrote it -> float32 [k, n], a tensor of its own: codes minus `middle`.

    bits: 2, 3, 4 or 8.
    """
    if bits == 8:
        return data.float().sub_(middle)
    if bits == 3:
        whole = functional.pad(data, (0, -data.shape[1] % 3)).reshape(len(data), -1, 3).to(torch.int32)
        words = whole[..., 0] | whole[..., 1] << 8 | whole[..., 2] << 16
        index = torch.stack((words & 0xFFF, words >> 12), dim=2)
    else:
        index = data.to(torch.int32)
    return look_up(index, _code_table(bits, middle, data.device)).reshape(len(data), -1)[:, :n].contiguous()


@cache
def _code_table(bits: int, middle: int, device: torch.device) -> Tensor:
    """Entry i: the codes that the bits of i consist of, the lowest first, minus `middle`. For bits 2 and 4 i is a byte,
    for 3 it has 12 bits; float32 [256, 8 / bits] or [4096, 4]."""
    width = 12 if bits == 3 else 8
    shifts = torch.arange(0, width, bits, device=device)
    codes = (torch.arange(1 << width, device=device)[:, None] >> shifts) & ((1 << bits) - 1)
    return (codes - middle).float()
