"""Float codecs: f32, f16 and bf16 as they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.codecs.base import Codec, Rows
from compress.weights import Packed

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class FloatCodec(Codec):
    kind = "float"

    def __init__(self, name: str):
        self.name = name
        self.dtype = DTYPES[name]

    def bits_per_weight(self, in_features: int) -> float:
        return 8.0 * self.dtype.itemsize

    def encode(self, values: Tensor) -> Packed:
        """Round to the nearest value of the type. Values beyond its range become infinite: callers check."""
        return Packed(self.name, tuple(values.shape), {"values": values.to(self.dtype).contiguous()})

    def unpack(self, packed: Packed) -> Tensor:
        return packed.parts["values"].float()

    def decode_rows(
        self, shape: tuple[int, int], parts: Mapping[str, Tensor], rows: Rows, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """See Codec."""
        return parts["values"][rows].to(dtype), None
