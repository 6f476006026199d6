"""The frozen values that flow from solvers through the journal to containers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Loader = Callable[[str], "Tensor"]
"""A model's tensors by their checkpoint names, one at a time."""


@dataclass(frozen=True, order=True)
class Pattern:
    """Which weights of a matrix may stay.

    sparsity: the share that goes, in [0, 1). of = 0: anywhere; else `of - keep` of every `of` consecutive columns of a row.
    """

    sparsity: float
    keep: int = 0
    of: int = 0

    @classmethod
    def n_of_m(cls, keep: int, of: int) -> Pattern:
        """2:4 is `n_of_m(2, 4)`."""
        return cls(1 - keep / of, keep, of)

    def pruned(self, columns: int) -> int:
        """Weights that go from a row of so many columns (unstructured: on average over the rows)."""
        return columns // self.of * (self.of - self.keep) if self.of else int(columns * self.sparsity + 1e-9)

    def kept(self, rows: int, columns: int) -> int:
        """Weights of a whole matrix that stay: exactly so many, whatever the method."""
        return rows * (columns - self.pruned(columns))

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.of else f"{self.sparsity:.3g}"


@dataclass(frozen=True)
class Masked:
    """A pruned matrix: values float32 [R, n], zero where mask (bool [R, n], True where a weight stays) is False.

    damping: fraction of the mean diagonal that was added to the gram (0 when unused); retries: how often it had to be
    raised.
    """

    values: Tensor
    mask: Tensor
    damping: float = 0.0
    retries: int = 0


@dataclass(frozen=True)
class Factors:
    """A matrix [m, n] as coefficients [m, k] @ dictionary [k, n], both float32.

    mask: bool [m, k], the coefficients that are stored; None when all are. damping: fraction of the mean diagonal that
    was added to the gram (0 when unused); retries: how often it had to be raised.
    """

    dictionary: Tensor
    coefficients: Tensor
    mask: Tensor | None = None
    damping: float = 0.0
    retries: int = 0

    def dense(self) -> Tensor:
        return self.coefficients @ self.dictionary


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
      sparse   {"mask": uint8, bits of what is kept, "values": the kept values in order, row by row} or, of intN codes,
               "codes" (uint8, packed to bits), "scales" and, asymmetric, "zeros"; codecs/sparse.py says more
      factors  the parts of two tensors, "dictionary.<part>" of [k, in] and "coefficients.<part>" of [out, k]
    """

    codec: str
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
