"""Factored matrices: a dictionary [k, n] and coefficients [m, k], each a tensor in a codec of its own.

`factors(bf16,sparse-bf16)` names the codec of the dictionary, whose rows are atoms, then that of the coefficients. The
parts are those of both, `dictionary.<part>` and `coefficients.<part>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.codecs.names import codec_info
from compress.weights import Packed

if TYPE_CHECKING:
    from torch import Tensor


def join(
    codec: str, shape: tuple[int, ...], dictionary: Mapping[str, Tensor], coefficients: Mapping[str, Tensor]
) -> Packed:
    """One tensor from the parts of its two."""
    parts = {f"dictionary.{part}": value for part, value in dictionary.items()}
    return Packed(codec, shape, parts | {f"coefficients.{part}": value for part, value in coefficients.items()})


def split(codec: str, shape: tuple[int, ...], parts: Mapping[str, Any]) -> tuple[Packed, Packed]:
    """The dictionary and the coefficients. parts: of the whole, packed to bits or not."""
    first, second = codec_info(codec).parts
    atoms = len(parts["dictionary.values" if codec_info(first).kind == "float" else "dictionary.codes"])
    return (
        Packed(first, (atoms, shape[1]), _of("dictionary", parts)),
        Packed(second, (shape[0], atoms), _of("coefficients", parts)),
    )


def _of(factor: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    return {part.removeprefix(f"{factor}."): v for part, v in parts.items() if part.startswith(f"{factor}.")}
