"""Packed tensors back to the float32 values that an engine computes with: codecs, incoherence and orders of columns undone."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.codecs import get_codec
from compress.transforms.incoherence import Incoherence, unpack_signs
from compress.weights import Packed


def decode(packed: Packed) -> Tensor:
    """What an engine computes with: float32 of the packed shape."""
    values = get_codec(packed.codec).unpack(packed)
    if "columns" in packed.parts:
        return in_checkpoint_order(values, packed.parts["columns"])
    if "signs_in" not in packed.parts:
        return values
    rows, columns = packed.shape
    signs_in, signs_out = unpack_signs(packed.parts["signs_in"], columns), unpack_signs(packed.parts["signs_out"], rows)
    return Incoherence(signs_in, signs_out).restore(values)


def in_checkpoint_order(values: Tensor, order: Tensor) -> Tensor:
    """values: [m, n] with column order[i] of the checkpoint at i -> the checkpoint's."""
    out = torch.empty_like(values)
    out[:, order.long()] = values
    return out
