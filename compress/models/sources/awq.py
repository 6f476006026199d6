"""AWQ folders in the GEMM layout of AutoAWQ: eight interleaved 4-bit codes a word, along the outputs.

A linear `m` of [out, in] is `m.qweight` int32 [in, out / 8], `m.qzeros` int32 [in / group, out / 8] and `m.scales` [in / group,
out]. The word of outputs 8j to 8j+7 holds, from its lowest bits, outputs 8j + (0, 2, 4, 6, 1, 3, 5, 7). Zero points are stored as
they are. Source: AutoAWQ's awq/modules/linear/gemm.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from compress.models.sources.arithmetic import unpacked
from compress.models.sources.base import Coded, Format, Stored, require, unfit
from compress.models.sources.gptq import FLOATS, packing
from compress.reading import in_words

if TYPE_CHECKING:
    from torch import Tensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs comes first, second, ... from the lowest bits."""
WORD = len(ORDER)
_WORDS, _ZEROS, _SCALES = ".qweight", ".qzeros", ".scales"


def problem(settings: Mapping[str, Any]) -> str | None:
    """See Format."""
    version = settings.get("version") or "gemm"
    return None if str(version).lower() == "gemm" else f"in the {in_words(version)} layout; only gemm is read"


def find(settings: Mapping[str, Any], stored: Stored) -> Iterator[tuple[str, Coded]]:
    """See Format. Raises CheckpointError where shapes contradict each other."""
    for words in (key for key in stored if key.endswith(_WORDS)):
        module = words.removesuffix(_WORDS)
        qweight, qzeros = require(words, stored, "I32"), require(module + _ZEROS, stored, "I32")
        scales = require(module + _SCALES, stored, *FLOATS)
        if len(qweight.shape) != 2 or len(scales.shape) != 2:
            raise unfit(words, qweight)
        (columns, width), (groups, rows) = qweight.shape, scales.shape
        if width * WORD != rows or not groups or columns % groups:
            raise unfit(module + _SCALES, scales)
        if qzeros.shape != (groups, width):
            raise unfit(module + _ZEROS, qzeros)
        yield f"{module}.weight", Coded(
            qweight.file, "AWQ int4", (rows, columns), span=qweight.span, decode=_decode,
            parts={"codes": (words, qweight), "zeros": (module + _ZEROS, qzeros), "scales": (module + _SCALES, scales)},
        )  # fmt: skip


def _decode(parts: Mapping[str, Tensor]) -> Tensor:
    scales = parts["scales"].float().T  # [out, groups]
    codes, zeros = (_columns(parts[part]).float() for part in ("codes", "zeros"))
    group = codes.shape[1] // scales.shape[1]
    return (codes - zeros.repeat_interleave(group, 1)) * scales.repeat_interleave(group, 1)


def _columns(words: Tensor) -> Tensor:
    """int32 words [n, out / 8] -> uint8 codes [out, n]."""
    import torch

    codes = unpacked(words, 4, words.shape[1] * WORD).reshape(*words.shape, WORD)
    back = torch.tensor([ORDER.index(output) for output in range(WORD)])
    return codes[:, :, back].flatten(1).T


FORMAT = Format(
    name="AWQ",
    methods=("awq", "auto-round"),
    holds="4 bits, layout gemm; AutoRound's auto_awq",
    find=find,
    claims=lambda settings: settings.get("quant_method") != "auto-round" or "awq" in packing(settings),
    problem=problem,
    beside="quant_config.json",
)
