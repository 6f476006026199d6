"""Some rows of a stored tensor as numbers: every codec has its own way, a fast look-up or its `unpack`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.codecs import get_codec
from compress.codecs.base import Rows


def decode_rows(
    codec: str, shape: tuple[int, int], parts: Mapping[str, Tensor], rows: Rows, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Values [k, n] of `dtype` and, where a codec has one scale a row, those scales float32 [k, 1], still to be
    multiplied.

    shape: of the whole matrix; parts: as stored in the container (`stored_parts`), without the signs of incoherence; for
    codecs with a mask also "starts" (`codecs.sparse.row_starts`).
    """
    return get_codec(codec).decode_rows(shape, parts, rows, dtype)
