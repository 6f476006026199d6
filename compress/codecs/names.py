"""Which codecs exist and what they cost, without importing torch: the numbers `plan` and `recipe` work with.

Kinds: `float` (values stored as they are), `ggml` (llama.cpp's block formats), `uniform` (intN with one scale and
zero point per group of a row, as GPTQ checkpoints store them), `bnb` (bitsandbytes' 4-bit blocks) and `vector` (points
of a lattice or a trellis in incoherent space, one scale a row, a sign for every row and column), `block` (records of
a fixed size like ggml's, from a codec registered by the user), and two that a plan makes of others: `sparse` (a mask and the
kept values in a float or uniform codec: `sparse-bf16`, `2:4-int4-g128`) and `factors` (two matrices whose product is the
weight, each in a codec of its own: `factors(bf16,sparse-bf16)`). Names are case-insensitive; the canonical form is lower
case. ggml sizes are those of ggml-common.h, fallbacks those of
llama-quant.cpp.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil, comb, prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.weights import Pattern


@dataclass(frozen=True, slots=True)
class Kind:
    """What holds for all codecs of one kind: the facts that planners, solvers, containers and runtimes ask for.

    is_float: values are stored as they are; is_integer: intN codes with a scale, and maybe a zero point, for every group;
    stores_zero: a zero is stored exactly whatever its neighbours are, and can go beside a mask, so that single weights
    may be pruned; incoherent: made for weights between random Hadamard transforms, where its codes live unless a recipe
    says otherwise; needs_full_blocks: rows must be a multiple of `CodecInfo.block`; falls_back: llama.cpp stores
    something else where they are not; fixed_rows: every row by itself takes the same number of bytes; small_units: units
    are small integers, a byte each while a model is worked on; codes_a_byte: so are the codes until a container packs
    them; has_mask, is_factored: made by a plan of other codecs, with a mask or as the product of two matrices.
    """

    is_float: bool = False
    is_integer: bool = False
    stores_zero: bool = False
    incoherent: bool = False
    needs_full_blocks: bool = True
    falls_back: bool = False
    fixed_rows: bool = False
    small_units: bool = False
    codes_a_byte: bool = False
    has_mask: bool = False
    is_factored: bool = False


KINDS: Mapping[str, Kind] = {
    "float": Kind(is_float=True, stores_zero=True, needs_full_blocks=False, fixed_rows=True),
    "ggml": Kind(falls_back=True, fixed_rows=True, small_units=True),
    "uniform": Kind(is_integer=True, stores_zero=True, needs_full_blocks=False, small_units=True, codes_a_byte=True),
    "bnb": Kind(),
    "vector": Kind(incoherent=True),
    "block": Kind(fixed_rows=True),
    "sparse": Kind(has_mask=True),
    "factors": Kind(needs_full_blocks=False, is_factored=True),
}


@dataclass(frozen=True, slots=True)
class CodecInfo:
    """One codec by its canonical `name`.

    A row of `columns` weights takes `row_bytes` of them; `block` columns share a record of `block_bytes`
    (float: one value; uniform: the group, 0 for the whole row; vector: columns coded together). `bits` is the width
    of one code, `symmetric` says that the zero point is fixed at 2^(bits-1), `rows` how many rows must be coded
    together. `fallback_only` codecs cannot be asked for in a recipe. `parts` are the codecs that a sparse one (of its
    values) or a factored one (dictionary, coefficients) is made of; `keep` of `of` columns stay in an n:m codec.
    `double_quantized`: the scales are quantized, too; `exact_bfloat16`: units are bfloat16 numbers; `scales_by`: the codec
    on which scalings are judged in its place, where it is slow to search. The other facts are those of its `Kind`.
    """

    name: str
    kind: str
    block: int
    block_bytes: int = 0
    bits: int = 0
    symmetric: bool = True
    fallback: str | None = None
    fallback_only: bool = False
    rows: int = 1
    parts: tuple[str, ...] = ()
    keep: int = 0
    of: int = 0
    double_quantized: bool = False
    exact_bfloat16: bool = False
    scales_by: str | None = None

    @property
    def facts(self) -> Kind:
        """What holds for its kind."""
        return KINDS[self.kind]

    @property
    def derived(self) -> bool:
        """Whether a plan makes it of other codecs, so that a recipe cannot name it."""
        return self.has_mask or self.is_factored

    @property
    def is_float(self) -> bool:
        """See Kind."""
        return self.facts.is_float

    @property
    def is_integer(self) -> bool:
        """See Kind."""
        return self.facts.is_integer

    @property
    def stores_zero(self) -> bool:
        """See Kind."""
        return self.facts.stores_zero

    @property
    def incoherent(self) -> bool:
        """See Kind."""
        return self.facts.incoherent

    @property
    def needs_full_blocks(self) -> bool:
        """See Kind."""
        return self.facts.needs_full_blocks

    @property
    def falls_back(self) -> bool:
        """See Kind."""
        return self.facts.falls_back

    @property
    def fixed_rows(self) -> bool:
        """See Kind."""
        return self.facts.fixed_rows

    @property
    def has_mask(self) -> bool:
        """See Kind."""
        return self.facts.has_mask

    @property
    def is_factored(self) -> bool:
        """See Kind."""
        return self.facts.is_factored

    @property
    def stores_mask(self) -> bool:
        """Whether a mask is stored anywhere: its own, or one of its factors'."""
        return self.has_mask or any(codec_info(part).has_mask for part in self.parts)

    @property
    def one_scale_a_row(self) -> str:
        """The codec with the same codes and one scale a row; itself where scales have no groups to choose."""
        return f"int{self.bits}-row" if self.is_integer else self.name

    @property
    def is_row_int8(self) -> bool:
        """Whether codes are signed bytes with one scale a row, which multiply 8-bit activations as integers."""
        return self.is_integer and self.bits == 8 and self.symmetric and self.block == 0


def _ggml(name: str, block: int, size: int, fallback: str | None = None, *, only: bool = False) -> CodecInfo:
    return CodecInfo(name, "ggml", block, size, fallback=fallback, fallback_only=only)


_FIXED = {
    info.name: info
    for info in (
        CodecInfo("f32", "float", 1, 4),
        CodecInfo("f16", "float", 1, 2),
        CodecInfo("bf16", "float", 1, 2),
        _ggml("q8_0", 32, 34),
        _ggml("q4_0", 32, 18),
        _ggml("q4_1", 32, 20),
        _ggml("q5_0", 32, 22, only=True),
        _ggml("q5_1", 32, 24, only=True),
        _ggml("q6_k", 256, 210, "q8_0"),
        _ggml("q5_k", 256, 176, "q5_1"),
        _ggml("q4_k", 256, 144, "q5_0"),
        _ggml("q3_k", 256, 110, "q4_0"),
        _ggml("q2_k", 256, 84, "q4_0"),
        _ggml("iq4_nl", 32, 18),
        _ggml("iq4_xs", 256, 136, "iq4_nl"),
        _ggml("iq3_xxs", 256, 98, "iq4_nl"),
        _ggml("iq3_s", 256, 110, "iq4_nl"),
        _ggml("iq2_s", 256, 82, "iq4_nl"),
        _ggml("iq2_xs", 256, 74, "iq4_nl"),
        _ggml("iq2_xxs", 256, 66, "iq4_nl"),
        _ggml("iq1_m", 256, 56, "iq4_nl"),
        _ggml("iq1_s", 256, 50, "iq4_nl"),
        _ggml("tq2_0", 256, 66, "q4_0"),
        _ggml("tq1_0", 256, 54, "q4_0"),
        _ggml("mxfp4", 32, 17),
        CodecInfo("nf4", "bnb", 64, 32 + 4, bits=4),
        CodecInfo("nf4-dq", "bnb", 64, 32 + 1, bits=4, double_quantized=True),
        CodecInfo("fp4", "bnb", 64, 32 + 4, bits=4),
        CodecInfo("fp4-dq", "bnb", 64, 32 + 1, bits=4, double_quantized=True),
        CodecInfo("e8p", "vector", 8, 2, bits=2, exact_bfloat16=True),
        CodecInfo("e8p3", "vector", 8, 3, bits=3),
        CodecInfo("e8p4", "vector", 8, 4, bits=4),
        CodecInfo("trellis2", "vector", 16, 4, bits=2, rows=16, scales_by="e8p"),
        CodecInfo("trellis3", "vector", 16, 6, bits=3, rows=16, scales_by="e8p3"),
        CodecInfo("trellis4", "vector", 16, 8, bits=4, rows=16, scales_by="e8p4"),
    )
}
GROUPS = (128, 64, 32)
"""Columns that may share a scale, largest first."""
_UNIFORM = re.compile(r"int(2|3|4|8)-(g32|g64|g128|row)(-asym)?")
_SPARSE = re.compile(r"(?:sparse|(\d+):(\d+))-(.+)")
_FACTORS = re.compile(r"factors\(([^(),]+),([^(),]+)\)")

FIXED_NAMES: tuple[str, ...] = tuple(name for name, info in _FIXED.items() if not info.fallback_only)
"""Codecs a recipe may name, except the uniform family `int{2,3,4,8}-{g32|g64|g128|row}[-asym]`."""

UNIFORM_NAMES: tuple[str, ...] = tuple(
    f"int{bits}-{group}{suffix}"
    for bits in (2, 3, 4, 8)
    for group in ("g32", "g64", "g128", "row")
    for suffix in ("", "-asym")
)


_REGISTERED: dict[str, CodecInfo] = {}


def register_info(info: CodecInfo) -> None:
    """Make a codec from outside known by name. Raises ValueError when the name is taken or not lower case, or its kind is unknown."""
    if info.kind not in KINDS:
        raise ValueError(f"{info.name} is of an unknown kind {info.kind!r}; kinds are {', '.join(KINDS)}")
    if info.name != info.name.strip().lower() or not info.name:
        raise ValueError(f"{info.name!r}: names of codecs are written in lower case")
    known = _REGISTERED.get(info.name)
    patterns = (_UNIFORM, _SPARSE, _FACTORS)
    if info.name in _FIXED or any(p.fullmatch(info.name) for p in patterns) or known not in (None, info):
        raise ValueError(f"there is a codec called {info.name} already; give yours another name")
    _REGISTERED[info.name] = info


def registered() -> tuple[str, ...]:
    """Names of the codecs from outside."""
    return tuple(_REGISTERED)


@cache
def codec_info(name: str) -> CodecInfo:
    """The codec called `name`, in any case. Raises KeyError with the nearest names in its message."""
    canonical = name.strip().lower()
    if canonical in _REGISTERED:
        return _REGISTERED[canonical]
    if canonical in _FIXED:
        return _FIXED[canonical]
    if match := _UNIFORM.fullmatch(canonical):
        bits, group, asymmetric = match.groups()
        block = 0 if group == "row" else int(group[1:])
        return CodecInfo(canonical, "uniform", block, bits=int(bits), symmetric=asymmetric is None)
    if (match := _FACTORS.fullmatch(canonical)) and not any(codec_info(part).is_factored for part in match.groups()):
        return CodecInfo(canonical, "factors", 1, parts=match.groups())
    if (match := _SPARSE.fullmatch(canonical)) and (inner := codec_info(match[3])).stores_zero:
        keep, of = int(match[1] or 0), int(match[2] or 0)
        return CodecInfo(canonical, "sparse", inner.block, bits=inner.bits, symmetric=inner.symmetric,
                         parts=(inner.name,), keep=keep, of=of)  # fmt: skip
    near = difflib.get_close_matches(canonical[:64], (*FIXED_NAMES, *UNIFORM_NAMES, *_REGISTERED), n=2, cutoff=0.4)
    raise KeyError(f"unknown codec {name[:64]!r}; nearest: {', '.join(near) or ', '.join(FIXED_NAMES)}")


SPARSE_VALUES = tuple(kind for kind, facts in KINDS.items() if facts.stores_zero)
"""Kinds of codec that hold a zero exactly, so that kept values can be stored beside a mask."""


def sparse_name(values: str, pattern: Pattern) -> str:
    """The codec that stores what `pattern` keeps in the codec `values`."""
    return f"{pattern.keep}:{pattern.of}-{values}" if pattern.of else f"sparse-{values}"


def mask_bits(codec: str) -> int:
    """Bits of the mask of `of` columns of an n:m codec: enough to number its combinations."""
    info = codec_info(codec)
    return (comb(info.of, info.keep) - 1).bit_length()


def block_columns(codec: str) -> int:
    """Columns that share one stored record; 1 for floats, 0 when the whole row does (`int4-row`)."""
    return codec_info(codec).block


def fits(codec: str, in_features: int) -> bool:
    """Whether rows of `in_features` can be stored at all; uniform codecs allow a last group that is not full."""
    info = codec_info(codec)
    return not info.needs_full_blocks or in_features % (info.block or 1) == 0


def ggml_fallback(codec: str, in_features: int) -> str | None:
    """What llama.cpp stores instead of a ggml codec when rows of `in_features` do not divide into its blocks; None when
    they do, and for all other codecs.

    Types with 256 columns a block fall to one with 32 (iq2/iq3/iq4_xs -> iq4_nl, q2_k/q3_k -> q4_0, q4_k ->
    q5_0, q5_k -> q5_1, q6_k -> q8_0), and to f16 where 32 does not divide either. Types that start at 32 have
    no rule there (llama-quantize stops); they fall to f16 here. Source: tensor_type_fallback in llama-
    quant.cpp.
    """
    if fits(codec, in_features) or not codec_info(codec).falls_back:
        return None
    fallback = codec_info(codec).fallback
    return fallback if fallback is not None and fits(fallback, in_features) else "f16"


def smaller_group(codec: str, columns: Iterable[int]) -> str | None:
    """The uniform codec with the same codes and the largest smaller group that divides rows of so many columns; None for
    codecs without groups, and where none does."""
    info, columns = codec_info(codec), tuple(columns)
    group = next((g for g in GROUPS if g < (info.block or 0) and not any(n % g for n in columns)), None)
    if info.kind != "uniform" or group is None:
        return None
    return f"int{info.bits}-g{group}{'' if info.symmetric else '-asym'}"


def row_bytes(codec: str, in_features: int) -> int:
    """Bytes of one row of a float or ggml matrix. Raises ValueError for other codecs, whose rows share something."""
    info = codec_info(codec)
    if not info.fixed_rows:
        raise ValueError(f"rows of {info.name} share something; use stored_bytes(codec, shape)")
    if not fits(codec, in_features):
        raise ValueError(f"{info.name} needs rows of a multiple of {info.block} columns, not {in_features}")
    return in_features // info.block * info.block_bytes


def stored_bytes(codec: str, shape: tuple[int, ...]) -> int:
    """Bytes of a whole tensor of `shape` (rows of shape[-1]) with everything needed to read it back.

    Uniform codecs are counted as a GPTQ checkpoint stores them: codes in int32 words down the columns,
    float16 scales and packed zero points per group, and the int32 group index of every column. Double-quantized
    bitsandbytes codecs add a float32 for every 256 blocks and one for the tensor, vector codecs a float16 scale and a
    sign bit a row and a sign bit a column.
    """
    info = codec_info(codec)
    if info.fixed_rows:
        return prod(shape[:-1]) * row_bytes(codec, shape[-1])
    *lead, rows, columns = shape
    if info.kind == "bnb":
        blocks = rows * columns // info.block
        return prod(lead) * (blocks * info.block_bytes + (4 * (ceil(blocks / 256) + 1) if info.double_quantized else 0))
    if info.incoherent:
        codes = rows * columns * info.bits // 8
        return prod(lead) * (codes + 2 * rows + ceil(rows / 8) + ceil(columns / 8))
    if info.derived:
        raise ValueError(f"what {info.name} takes depends on what is kept; use packed_bytes")
    groups = ceil(columns / info.block) if info.block else 1
    codes = ceil(columns * info.bits / 32) * rows * 4
    scales = groups * rows * 2
    zeros = groups * ceil(rows * info.bits / 32) * 4
    return prod(lead) * (codes + scales + zeros + columns * 4)


def packed_bytes(codec: str, shape: tuple[int, ...], kept: int | None = None, atoms: int | None = None) -> int:
    """Bytes of a tensor as our own container stores it, packed to its bits, signs of incoherence not counted.

    kept: stored values of a sparse codec, or of the coefficients of a factored one, where they are sparse; atoms: rows
    of its dictionary.
    """
    info, (rows, columns) = codec_info(codec), (1, *shape)[-2:]
    if info.is_factored:
        assert atoms is not None
        return packed_bytes(info.parts[0], (atoms, columns)) + packed_bytes(info.parts[1], (rows, atoms), kept)
    if info.incoherent:
        return stored_bytes(info.name, shape) - ceil(rows / 8) - ceil(columns / 8)
    if not info.is_integer and not info.has_mask:
        return stored_bytes(info.name, shape)
    groups = (ceil(columns / info.block) if info.block else 1) if info.bits else 0
    scales = rows * (2 * groups + (0 if info.symmetric else ceil(groups * info.bits / 8)))
    if info.is_integer:
        return scales + rows * ceil(columns * info.bits / 8)
    assert kept is not None
    mask = rows * ceil(columns // info.of * mask_bits(codec) / 8 if info.of else columns / 8)
    return scales + mask + (ceil(kept * info.bits / 8) if info.bits else kept * codec_info(info.parts[0]).block_bytes)


KIND_NAMES = {
    "float": "f32, f16, bf16",
    "ggml": "the ggml codecs",
    "uniform": "the intN codecs",
    "bnb": "nf4 and fp4",
    "vector": "e8p and trellis",
    "block": "registered codecs",
    "sparse": "pruned weights without their zeros",
    "factors": "factorised weights",
}
