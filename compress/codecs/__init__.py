"""On-disk numeric formats. A codec's file name is its YAML name; `names` knows their sizes without torch."""

from __future__ import annotations

import importlib
import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.codecs.base import BlockCodec, Codec

_UNIFORM = re.compile(r"int(2|3|4|8)-(g32|g64|g128|row)(-asym)?")


@cache
def get_codec(name: str) -> Codec:
    """The codec called `name`. Raises KeyError for an unknown name (recipes are checked long before)."""
    if name in ("f32", "f16", "bf16"):
        from compress.codecs.float import FloatCodec

        return FloatCodec(name)
    if match := _UNIFORM.fullmatch(name):
        from compress.codecs.uniform import UniformCodec

        group = None if match[2] == "row" else int(match[2][1:])
        return UniformCodec(name, int(match[1]), group, match[3] is None)
    try:
        return importlib.import_module(f"compress.codecs.{name}").CODEC
    except (ModuleNotFoundError, AttributeError):
        raise KeyError(name) from None


def block_codec(name: str, in_features: int) -> BlockCodec:
    """The codec as a solver needs it, with row-wide groups bound to the row length."""
    codec = get_codec(name)
    if codec.kind == "float":
        raise TypeError(f"{name} stores values as they are; there is nothing to solve")
    return codec.for_row(in_features) if codec.kind == "uniform" else codec
