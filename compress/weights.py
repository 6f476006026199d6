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
      block    the same, of records that a registered codec defines
      uniform  {"codes": uint8 [out, in], "scales": float16 [out, groups], "zeros": uint8 [out, groups]};
               value = (code - zero) * scale
      bnb      {"codes": uint8 [out, in / 2], the even column in the high half, "absmax": float32 [out, in / 64]};
               double-quantized "absmax" is uint8 and goes with "nested_absmax" float32 [ceil(out * in / 64 / 256)] and
               "offset" float32 [1]; codecs/nf4.py says what they stand for
      vector   e8p: {"codes": int16 [out, in / 8], "scales": float16 [out]}, with three and four bits "residual" uint8 or
               int16 [out, in / 8]; trellis: see codecs/trellis.py; solve.py adds "signs_in" and "signs_out", uint8
    """

    codec: str
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
