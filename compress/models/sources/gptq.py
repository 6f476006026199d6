"""GPTQ folders of AutoGPTQ, gptqmodel and AutoRound: 2, 3, 4 or 8 bits, groups in any order, zero points of two versions.

A linear `m` of [out, in] is `m.qweight` int32 [in / 32 * bits, out] (32 codes of a column in `bits` words, lowest bits first),
`m.qzeros` int32 [groups, out / 32 * bits], `m.scales` [groups, out] and, as a rule, `m.g_idx` int32 [in] (group of every input).
Version 1 ("gptq", and where nothing is said) stores zero points minus one, version 2 ("gptq_v2") as they are. Source: AutoGPTQ's
qlinear_cuda_old.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from compress.errors import CheckpointError
from compress.models.config import Keys, Word
from compress.models.sources.arithmetic import unpacked, unpacked_words
from compress.models.sources.base import Coded, Format, Stored, read_settings, require, unfit
from compress.reading import in_words, shown

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("F16", "BF16", "F32")
_BITS = (2, 3, 4, 8)
_WORDS, _ZEROS, _SCALES, _GROUPS = ".qweight", ".qzeros", ".scales", ".g_idx"


class GptqKeys(Keys):
    """What is read of quantization_config."""

    bits: Annotated[int, Field(ge=1, le=8)] | None = None
    group_size: Annotated[int, Field(ge=-1)] = -1
    checkpoint_format: Word = "gptq"


def packing(settings: Mapping[str, Any]) -> str:
    """The layout that AutoRound says it has written, one of other programs."""
    return str(settings.get("packing_format") or "auto_round:auto_gptq")


def problem(settings: Mapping[str, Any]) -> str | None:
    """See Format."""
    if "gptq" not in packing(settings):
        return f"in the layout {in_words(packing(settings))}; of AutoRound's, auto_gptq and auto_awq are read"
    layout = "marlin" if settings.get("is_marlin_format") else settings.get("checkpoint_format") or "gptq"
    return None if layout in ("gptq", "gptq_v2") else f"in the layout {in_words(layout)}; read are gptq and gptq_v2"


def find(settings: Mapping[str, Any], stored: Stored) -> Iterator[tuple[str, Coded]]:
    """See Format. Raises CheckpointError where shapes contradict each other or nothing says the number of bits."""
    said = read_settings(GptqKeys, settings)
    for words in (key for key in stored if key.endswith(_WORDS)):
        module = words.removesuffix(_WORDS)
        qweight, qzeros = require(words, stored, "I32"), require(module + _ZEROS, stored, "I32")
        scales = require(module + _SCALES, stored, *FLOATS)
        parts = {"codes": (words, qweight), "zeros": (module + _ZEROS, qzeros), "scales": (module + _SCALES, scales)}
        if len(qweight.shape) != 2 or len(scales.shape) != 2:
            raise unfit(words, qweight)
        groups, rows = scales.shape
        if module + _GROUPS in stored:
            index = require(module + _GROUPS, stored, "I32", "I64")
            parts["groups"] = (module + _GROUPS, index)
            columns = index.shape[0] if len(index.shape) == 1 else 0
        elif said.group_size > 0:
            columns = groups * said.group_size
        else:
            columns = qweight.shape[0] * 32 // (said.bits or 4)
        bits = next((b for b in _BITS if unpacked_words(columns, b) == qweight.shape[0]), None)
        if bits not in _BITS or unpacked_words(columns, bits) != qweight.shape[0] or qweight.shape[1] != rows:
            raise unfit(words, qweight)
        if qzeros.shape != (groups, unpacked_words(rows, bits)):
            raise unfit(module + _ZEROS, qzeros)
        group = said.group_size if said.group_size > 0 else columns
        if "groups" not in parts and -(-columns // group) != groups:
            raise unfit(module + _SCALES, scales)
        offset = 0 if said.checkpoint_format == "gptq_v2" else 1
        yield f"{module}.weight", Coded(
            qweight.file, f"GPTQ int{bits}", (rows, columns), span=qweight.span, parts=parts,
            decode=partial(_decode, name=module, bits=bits, offset=offset, group=group),
        )  # fmt: skip


def _decode(parts: Mapping[str, Tensor], name: str, bits: int, offset: int, group: int) -> Tensor:
    import torch

    scales = parts["scales"].float()  # [groups, out]
    groups, rows = scales.shape
    words, index = parts["codes"], parts.get("groups")
    columns = len(index) if index is not None else len(words) * 32 // bits
    index = torch.arange(columns) // group if index is None else index.long()
    if columns and not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise CheckpointError(
            f"{shown(name)}.g_idx names groups that {shown(name)}.scales does not have; fetch it again"
        )
    zeros = (unpacked(parts["zeros"], bits, rows).int() + offset) % (1 << bits)
    codes = unpacked(words.T, bits, columns)  # [out, in]
    return (codes.float() - zeros.float().T[:, index]) * scales.T[:, index]


FORMAT = Format(
    name="GPTQ",
    methods=("gptq", "auto-round"),
    holds="2, 3, 4 and 8 bits, zero points of v1 and v2, `desc_act`; AutoRound's auto_gptq; not the layouts marlin and bitblas",
    find=find,
    claims=lambda settings: "awq" not in packing(settings),
    problem=problem,
    beside="quantize_config.json",
)
