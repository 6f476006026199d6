"""A matrix that stays packed: its parts as buffers, products by decoding a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.codecs.names import codec_info
from compress.codecs.sparse import row_starts
from compress.containers.compress import SIGNS, Setting
from compress.runtime.decode import decode_rows

CHUNK_BYTES = 1 << 20
"""Rows decoded at once: they stay in a core's cache until they are multiplied, and are too few for the allocator to
return them to the operating system after every use."""
FEW_TOKENS = 8
"""Up to so many tokens a CPU multiplies faster in float32, in which most codecs decode, than it converts."""


class PackedWeight(nn.Module):
    """One coded tensor of [rows, columns]; `parts` (name -> tensor, possibly on the meta device) become buffers.

    Subclasses are what a model calls. Moving the module moves the parts; casting it leaves them as they are.
    """

    mask: Tensor
    """The part of that name, of codecs that have one."""

    def __init__(self, setting: Setting, shape: tuple[int, int], parts: Mapping[str, Tensor]):
        super().__init__()
        self.setting, self.shape = setting, shape
        self._starts: Tensor | None = None
        self.part_names = tuple(parts)
        for name, tensor in parts.items():
            self.register_buffer(name, tensor)

    @property
    def parts(self) -> dict[str, Tensor]:
        """What the codec reads: all parts but the signs of incoherence."""
        parts = {name: getattr(self, name) for name in self.part_names if name not in SIGNS}
        if codec_info(self.setting.codec).has_mask:
            parts["starts"] = self._row_starts()
        return parts

    def _row_starts(self) -> Tensor:
        """Where the kept values of each row begin: not stored, it follows from the mask."""
        mask = self.mask
        if self._starts is None or self._starts.device != mask.device:
            self._starts = row_starts(self.setting.codec, mask, self.shape[1])
        return self._starts

    def decoded(self, rows: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """See decode_rows."""
        return decode_rows(self.setting.codec, self.shape, self.parts, rows, dtype)

    def chunks(self, size: int = 4) -> Iterator[slice]:
        """All rows, a few at a time; size: bytes that decoding takes a value, four for codecs that go by float32."""
        together = codec_info(self.setting.codec).rows
        step = max(1, CHUNK_BYTES // (size * self.shape[1] * together)) * together
        for start in range(0, self.shape[0], step):
            yield slice(start, min(start + step, self.shape[0]))

    def product(self, x: Tensor) -> Tensor:
        """x [tokens, columns] times the transposed matrix, as it is coded: [tokens, rows] of x's dtype.

        Differentiable in x; what is decoded is never kept for the way back.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self)
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        exact = codec_info(self.setting.codec).exact_bfloat16 and x.dtype == torch.bfloat16
        few = x.device.type == "cpu" and len(x) <= FEW_TOKENS and not exact
        dtype = torch.float32 if few else x.dtype
        turned = x.to(dtype).T
        out = torch.empty(self.shape[0], len(x), dtype=dtype, device=x.device)
        for rows in self.chunks(2 if exact else 4):
            values, scale = self.decoded(rows, dtype)
            torch.mm(values, turned, out=out[rows])
            if scale is not None:
                out[rows] *= scale
        return out.T.to(x.dtype).contiguous()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        parts = {name: part for name in self.part_names if (part := self._buffers.pop(name)) is not None}
        super()._apply(fn, recurse)
        for name, tensor in parts.items():
            moved = fn(tensor)
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    def extra_repr(self) -> str:
        what = f"{self.shape[1]} -> {self.shape[0]}, {self.setting.codec}"
        extra = [f"activations {self.setting.activations}"] if self.setting.activations else []
        return ", ".join([what, *(["incoherence"] if self.setting.incoherence else []), *extra])


class _Product(torch.autograd.Function):
    """x W^T whose gradient decodes W again."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: PackedWeight) -> Tensor:
        context.weight = weight
        return weight._product(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        (gradient,) = gradients
        weight: PackedWeight = context.weight
        total: Tensor | None = None
        for rows in weight.chunks():
            values, scale = weight.decoded(rows, gradient.dtype)
            part = gradient[:, rows] if scale is None else gradient[:, rows] * scale.to(gradient.dtype).T
            total = part @ values if total is None else total.addmm_(part, values)
        return total, None
