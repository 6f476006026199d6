"""Which codecs exist and what they cost, without importing torch: the numbers `plan` and `recipe` work with.

Kinds: `float` (values stored as they are), `ggml` (llama.cpp's block formats), `uniform` (intN with one scale and
zero point per group of a row, as GPTQ checkpoints store them), `bnb` (bitsandbytes' 4-bit blocks) and `vector` (points
of a lattice or a trellis in incoherent space, one scale a row, a sign for every row and column) and `block` (records of
a fixed size like ggml's, from a codec registered by the user). Names are case-insensitive; the canonical form is lower
case. ggml sizes are those of ggml-common.h, fallbacks those of
llama-quant.cpp.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache
from math import ceil, prod


@dataclass(frozen=True, slots=True)
class CodecInfo:
    """One codec by its canonical `name`.

    A row of `columns` weights takes `row_bytes` of them; `block` columns share a record of `block_bytes`
    (float: one value; uniform: the group, 0 for the whole row; vector: columns coded together). `bits` is the width
    of one code, `symmetric` says that the zero point is fixed at 2^(bits-1), `rows` how many rows must be coded
    together. `fallback_only` codecs cannot be asked for in a recipe.
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
        CodecInfo("nf4-dq", "bnb", 64, 32 + 1, bits=4),
        CodecInfo("fp4", "bnb", 64, 32 + 4, bits=4),
        CodecInfo("fp4-dq", "bnb", 64, 32 + 1, bits=4),
        *(CodecInfo(f"e8p{bits if bits > 2 else ''}", "vector", 8, bits, bits=bits) for bits in (2, 3, 4)),
        *(CodecInfo(f"trellis{bits}", "vector", 16, 2 * bits, bits=bits, rows=16) for bits in (2, 3, 4)),
    )
}
_UNIFORM = re.compile(r"int(2|3|4|8)-(g32|g64|g128|row)(-asym)?")

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
    """Make a codec from outside known by name. Raises ValueError when the name is taken."""
    known = _REGISTERED.get(info.name)
    if info.name in _FIXED or _UNIFORM.fullmatch(info.name) or known not in (None, info):
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
    near = difflib.get_close_matches(canonical, (*FIXED_NAMES, *UNIFORM_NAMES, *_REGISTERED), n=2, cutoff=0.4)
    raise KeyError(f"unknown codec {name!r}; nearest: {', '.join(near) or ', '.join(FIXED_NAMES)}")


def block_columns(codec: str) -> int:
    """Columns that share one stored record; 1 for floats, 0 when the whole row does (`int4-row`)."""
    return codec_info(codec).block


def fits(codec: str, in_features: int) -> bool:
    """Whether rows of `in_features` can be stored at all; uniform codecs allow a last group that is not full."""
    info = codec_info(codec)
    return info.kind == "uniform" or in_features % info.block == 0


def ggml_fallback(codec: str, in_features: int) -> str | None:
    """What llama.cpp stores instead when rows of `in_features` do not divide into blocks; None when they do.

    Types with 256 columns a block fall to one with 32 (iq2/iq3/iq4_xs -> iq4_nl, q2_k/q3_k -> q4_0, q4_k ->
    q5_0, q5_k -> q5_1, q6_k -> q8_0), and to f16 where 32 does not divide either. Types that start at 32 have
    no rule there (llama-quantize stops); they fall to f16 here. Source: tensor_type_fallback in llama-
    quant.cpp.
    """
    if fits(codec, in_features):
        return None
    fallback = codec_info(codec).fallback
    return fallback if fallback is not None and fits(fallback, in_features) else "f16"


def row_bytes(codec: str, in_features: int) -> int:
    """Bytes of one row of a float or ggml matrix. Raises ValueError for other codecs, whose rows share something."""
    info = codec_info(codec)
    if info.kind not in ("float", "ggml", "block"):
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
    if info.kind in ("float", "ggml", "block"):
        return prod(shape[:-1]) * row_bytes(codec, shape[-1])
    *lead, rows, columns = shape
    if info.kind == "bnb":
        blocks = rows * columns // info.block
        return prod(lead) * (blocks * info.block_bytes + (4 * (ceil(blocks / 256) + 1) if "dq" in info.name else 0))
    if info.kind == "vector":
        codes = rows * columns * info.bits // 8
        return prod(lead) * (codes + 2 * rows + ceil(rows / 8) + ceil(columns / 8))
    groups = ceil(columns / info.block) if info.block else 1
    codes = ceil(columns * info.bits / 32) * rows * 4
    scales = groups * rows * 2
    zeros = groups * ceil(rows * info.bits / 32) * 4
    return prod(lead) * (codes + scales + zeros + columns * 4)


KIND_NAMES = {
    "float": "f32, f16, bf16",
    "ggml": "the ggml codecs",
    "uniform": "the intN codecs",
    "bnb": "nf4 and fp4",
    "vector": "e8p and trellis",
    "block": "registered codecs",
}


@dataclass(frozen=True, slots=True)
class ContainerInfo:
    """What a container can hold (codec kinds, and roles it can only hold as floats) and who runs it.

    incoherence: it has a place for the signs of the Hadamard transforms, or decodes them away; activations: it can say
    that an engine rounds the inputs of a linear.
    """

    kinds: frozenset[str]
    engines: str
    float_roles: tuple[str, ...] = ()
    incoherence: bool = False
    activations: bool = False


CONTAINERS: dict[str, ContainerInfo] = {
    "gguf": ContainerInfo(frozenset({"float", "ggml"}), "llama.cpp and what is built on it"),
    # Engines look embeddings up as plain rows; no loader of these formats unpacks them.
    "gptq": ContainerInfo(frozenset({"float", "uniform"}), "vLLM, SGLang, gptqmodel", ("embeddings",)),
    "awq": ContainerInfo(frozenset({"float", "uniform"}), "vLLM, SGLang, gptqmodel", ("embeddings", "lm_head")),
    "bitsandbytes": ContainerInfo(
        frozenset({"float", "bnb"}), "transformers with bitsandbytes", ("embeddings", "lm_head")
    ),
    "compressed-tensors": ContainerInfo(
        frozenset({"float", "uniform"}),
        "vLLM, transformers with compressed-tensors",
        ("embeddings",),
        activations=True,
    ),
    # Ours: every codec as it is.
    "compress": ContainerInfo(
        frozenset(KIND_NAMES), "transformers after `import compress`", incoherence=True, activations=True
    ),
    # Every codec as the values it decodes to.
    "safetensors": ContainerInfo(frozenset(KIND_NAMES), "whatever runs the original; dense", incoherence=True),
}


def activation_problem(container: str) -> str | None:
    """Why a container cannot hold a rule with activations, or None."""
    if CONTAINERS[container].activations:
        return None
    others = [name for name, info in CONTAINERS.items() if info.activations]
    return f"container {container} says nothing about activations; use {' or '.join(others)}"


def incoherence_problem(container: str) -> str | None:
    """Why a container cannot hold codes between Hadamard transforms, or None."""
    if CONTAINERS[container].incoherence:
        return None
    others = [name for name, info in CONTAINERS.items() if info.incoherence]
    return f"container {container} has no place for the signs of incoherence; use {' or '.join(others)}"
