"""On-disk numeric formats. A codec's file name is its YAML name; `names` knows their sizes without torch."""

from __future__ import annotations

import importlib
import re
from functools import cache
from typing import TYPE_CHECKING

from compress.codecs.names import CodecInfo, codec_info, register_info

if TYPE_CHECKING:
    from compress.codecs.base import BlockCodec, Codec
    from compress.codecs.float import FloatCodec
    from compress.codecs.sparse import SparseCodec

_UNIFORM = re.compile(r"int(2|3|4|8)-(g32|g64|g128|row)(-asym)?")


_REGISTERED: dict[str, Codec] = {}


def register(info: CodecInfo, codec: Codec) -> None:
    """Add a codec from outside this package; docs/adding-a-codec.md is a worked example.

    Raises ValueError when the name is taken or the two disagree.
    """
    if info.name != codec.name or info.kind != codec.kind:
        raise ValueError(f"{info.name} ({info.kind}) describes another codec than {codec.name} ({codec.kind})")
    register_info(info)
    _REGISTERED[info.name] = codec


@cache
def get_codec(name: str) -> Codec:
    """The codec called `name`. Raises KeyError for an unknown name (recipes are checked long before)."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name in ("f32", "f16", "bf16"):
        from compress.codecs.float import FloatCodec

        return FloatCodec(name)
    if match := _UNIFORM.fullmatch(name):
        from compress.codecs.uniform import UniformCodec

        group = None if match[2] == "row" else int(match[2][1:])
        return UniformCodec(name, int(match[1]), group, match[3] is None)
    if (info := codec_info(name)).has_mask:
        from compress.codecs.sparse import SparseCodec

        return SparseCodec(name)
    if info.is_factored:
        from compress.codecs.factors import FactorsCodec

        return FactorsCodec(name, *(get_codec(part) for part in info.parts))
    if name.startswith("e8p"):
        return importlib.import_module("compress.codecs.e8p").E8P_CODECS[name]
    if name.startswith("trellis"):
        return importlib.import_module("compress.codecs.trellis").TRELLISES[name]
    try:
        if name.endswith("-dq"):
            return importlib.import_module(f"compress.codecs.{name.removesuffix('-dq')}").DOUBLE_QUANTIZED
        return importlib.import_module(f"compress.codecs.{name}").CODEC
    except (ModuleNotFoundError, AttributeError):
        raise KeyError(name) from None


def block_codec(name: str, in_features: int) -> BlockCodec:
    """The codec as a solver needs it, with row-wide groups bound to the row length."""
    from compress.codecs.base import BlockCodec

    codec = get_codec(name)
    if not isinstance(codec, BlockCodec):
        raise TypeError(f"{name} has no codes of its own; there is nothing to solve")
    return codec.for_row(in_features)


def float_codec(name: str) -> FloatCodec:
    """The codec of values that are stored as they are, rounded to a type. Raises TypeError for any other."""
    from compress.codecs.float import FloatCodec

    codec = get_codec(name)
    if not isinstance(codec, FloatCodec):
        raise TypeError(f"{name} is no float type; values are not stored in it as they are")
    return codec


def sparse_codec(name: str) -> SparseCodec:
    """The codec that stores a mask beside values in another. Raises TypeError for any other."""
    from compress.codecs.sparse import SparseCodec

    codec = get_codec(name)
    if not isinstance(codec, SparseCodec):
        raise TypeError(f"{name} has no place for a mask")
    return codec
