"""bitsandbytes folders: NF4 and FP4, with and without double quantization, and LLM.int8.

4 bits: `name` holds two codes a byte, the earlier in the high half (its type may be any of a byte or more), `name.absmax` one scale
for every block of the weight, row after row, `name.quant_map` the 16 levels, `name.quant_state.bitsandbytes__nf4` (or `__fp4`) the
bytes of a JSON object with types and sizes. Double quantization: `name.absmax` uint8 with `name.nested_quant_map` [256],
`name.nested_absmax` for 256 each, and an offset in that JSON. 8 bits: `m.weight` int8 [out, in] and `m.SCB` float32 [out], the
largest value of every row, which stands for 127. Source: bitsandbytes' QuantState and int8_vectorwise_dequant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError

from compress.errors import CheckpointError
from compress.limits import WIDTH
from compress.models.config import Keys
from compress.models.index import Entry
from compress.models.sources.base import Coded, Format, Stored, require, stored_bytes, unfit
from compress.reading import Unreadable, parse_json, shown

if TYPE_CHECKING:
    from torch import Tensor

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_STATE_BYTES = 1 << 12
_STEP = 7.874015718698502e-3  # 1 / 127, as bitsandbytes writes it
_ROWS = 0  # of its layouts for int8, the only one that is written to files since version 0.43


class State(Keys):
    """What `quant_state` says of one tensor."""

    blocksize: Annotated[int, Field(ge=1, le=1 << 20)]
    shape: Annotated[list[Annotated[int, Field(ge=1, le=WIDTH * WIDTH)]], Field(min_length=1, max_length=3)]
    nested_blocksize: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    nested_offset: float | None = None


def find(settings: Mapping[str, Any], stored: Stored) -> Iterator[tuple[str, Coded]]:
    """See Format. Raises CheckpointError for codes without their state, and where sizes contradict each other."""
    states = {match[1]: (match[0], match[2]) for key in stored if (match := _STATE.fullmatch(key))}
    for name, entry in stored.items():
        module = name.removesuffix(".weight")
        if name in states:
            yield name, _four_bits(name, entry, *states[name], stored)
        elif entry.dtype == "I8" and f"{module}.SCB" in stored:
            yield name, _eight_bits(name, entry, module, stored)
        elif entry.dtype == "U8" and entry.shape[1:] == (1,):
            kind = settings.get("bnb_4bit_quant_type") or "fp4"
            missing = f"{name}.quant_state.bitsandbytes__{kind}"
            raise CheckpointError(
                f"the checkpoint has no tensor {shown(missing)}, without which {shown(name)} cannot be read"
            )


def _four_bits(name: str, entry: Entry, key: str, kind: str, stored: Stored) -> Coded:
    state = _state(key, require(key, stored, "U8"))
    count = math.prod(state.shape)
    nested = state.nested_offset is not None
    parts = {"codes": (name, entry), "state": (key, stored[key])}
    for part, dtype in {"absmax": "U8" if nested else "F32", "quant_map": "F32"}.items():
        parts[part] = (f"{name}.{part}", require(f"{name}.{part}", stored, dtype))
    for part in ("nested_absmax", "nested_quant_map") if nested else ():
        parts[part] = (f"{name}.{part}", require(f"{name}.{part}", stored, "F32"))
    blocks = -(-count // state.blocksize)
    sizes = {"absmax": blocks, "quant_map": 16, "nested_quant_map": 256}
    sizes["nested_absmax"] = -(-blocks // (state.nested_blocksize or 256))
    if entry.bytes != -(-count // 2):
        raise unfit(name, entry)
    for part, size in sizes.items():
        if part in parts and math.prod(parts[part][1].shape) != size:
            raise unfit(*parts[part])
    return Coded(
        entry.file,
        kind.upper(),
        tuple(state.shape),
        span=entry.span,
        parts=parts,
        decode=partial(_decode_four, state=state),
    )


def _state(key: str, entry: Entry) -> State:
    if entry.bytes > _STATE_BYTES:
        raise unfit(key, entry)
    try:
        return State.model_validate(parse_json(stored_bytes(entry).decode()))
    except (UnicodeDecodeError, Unreadable, ValidationError):
        raise CheckpointError(f"{shown(key)} in {entry.file.name} is damaged; fetch it again") from None


def _decode_four(parts: Mapping[str, Tensor], state: State) -> Tensor:
    import torch

    count, flat = math.prod(state.shape), {name: part.reshape(-1) for name, part in parts.items()}
    octets, absmax = flat["codes"].contiguous().view(torch.uint8), flat["absmax"]
    if state.nested_offset is not None:
        over = flat["nested_absmax"].repeat_interleave(state.nested_blocksize or 256)[: len(absmax)]
        absmax = flat["nested_quant_map"][absmax.int()] * over + torch.tensor(state.nested_offset)
    codes = torch.stack((octets >> 4, octets & 15), dim=1).reshape(-1)[:count]
    levels = flat["quant_map"][codes.int()]
    return (levels * absmax.repeat_interleave(state.blocksize)[:count]).reshape(state.shape)


def _eight_bits(name: str, entry: Entry, module: str, stored: Stored) -> Coded:
    scale = require(f"{module}.SCB", stored, "F32", "F16")
    parts = {"codes": (name, entry), "scale": (f"{module}.SCB", scale)}
    if len(entry.shape) != 2 or scale.shape != entry.shape[:1]:
        raise unfit(f"{module}.SCB", scale)
    layout = f"{module}.weight_format"
    if layout in stored:
        parts["layout"] = (layout, require(layout, stored, "U8"))
        if stored_bytes(stored[layout])[:1] != bytes([_ROWS]):
            raise CheckpointError(
                f"{shown(name)} is in a layout of bitsandbytes for some GPUs; save it again with version 0.43 or later"
            )
    return Coded(entry.file, "LLM.int8", entry.shape, span=entry.span, parts=parts, decode=_decode_eight)


def _decode_eight(parts: Mapping[str, Tensor]) -> Tensor:
    return parts["codes"].float() * parts["scale"].float()[:, None] * _STEP


FORMAT = Format(
    name="bitsandbytes",
    methods=("bitsandbytes",),
    holds="NF4 and FP4, with and without double quantization; LLM.int8",
    find=find,
)
