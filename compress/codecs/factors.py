"""Factored matrices: a dictionary [k, n] and coefficients [m, k], each a tensor in a codec of its own.

`factors(bf16,sparse-bf16)` names the codec of the dictionary, whose rows are atoms, then that of the coefficients. The
parts are those of both, `dictionary.<part>` and `coefficients.<part>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compress.codecs.base import Codec
from compress.codecs.names import codec_info
from compress.weights import Packed


class FactorsCodec(Codec):
    """The product of two matrices. dictionary, coefficients: their codecs."""

    kind = "factors"

    def __init__(self, name: str, dictionary: Codec, coefficients: Codec):
        self.name, self.dictionary, self.coefficients = name, dictionary, coefficients

    def bits_per_weight(self, in_features: int) -> float:
        """Raises ValueError: that depends on the number of atoms; `packed_bytes` counts them."""
        raise ValueError(f"what {self.name} takes depends on its sizes; use packed_bytes")

    def unpack(self, packed: Packed) -> Tensor:
        """What a factored tensor stands for, float32 [m, n]."""
        dictionary, coefficients = split(packed.codec, packed.shape, packed.parts)
        atoms, rows = self.dictionary.unpack(dictionary), self.coefficients.unpack(coefficients)
        return rows @ atoms


def join(
    codec: str, shape: tuple[int, ...], dictionary: Mapping[str, Tensor], coefficients: Mapping[str, Tensor]
) -> Packed:
    """One tensor from the parts of its two."""
    parts = {f"dictionary.{part}": value for part, value in dictionary.items()}
    return Packed(codec, shape, parts | {f"coefficients.{part}": value for part, value in coefficients.items()})


def split(codec: str, shape: tuple[int, ...], parts: Mapping[str, Any]) -> tuple[Packed, Packed]:
    """The dictionary and the coefficients. parts: of the whole, packed to bits or not."""
    first, second = codec_info(codec).parts
    atoms = len(parts["dictionary.values" if codec_info(first).is_float else "dictionary.codes"])
    return (
        Packed(first, (atoms, shape[1]), _of("dictionary", parts)),
        Packed(second, (shape[0], atoms), _of("coefficients", parts)),
    )


def _of(factor: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    return {part.removeprefix(f"{factor}."): v for part, v in parts.items() if part.startswith(f"{factor}.")}
