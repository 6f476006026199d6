"""The frozen values that flow from solvers through the journal to containers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """One tensor exactly as it ships.

    `parts` by kind of codec:
      float    {"values": the tensor in that dtype}
      ggml     {"blocks": uint8 [out, row_bytes]}: ggml's row layout
      uniform  {"codes": uint8 [out, in], "scales": float16 [out, groups], "zeros": uint8 [out, groups]};
               value = (code - zero) * scale
    """

    codec: str
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
