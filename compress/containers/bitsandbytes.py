"""bitsandbytes' 4-bit checkpoints, which transformers loads as they are: `AutoModelForCausalLM.from_pretrained(folder)`.

A linear layer `m` of [out, in] becomes `m.weight` uint8 [out * in / 2, 1] (two codes a byte, the even column in the high
half), `m.weight.absmax` (float32, or uint8 when double-quantized) of out * in / 64 blocks, `m.weight.quant_map` float32
[16] and `m.weight.quant_state.bitsandbytes__nf4` (or `__fp4`), the bytes of a JSON object with types and sizes.
Double quantization adds `m.weight.nested_absmax` and `m.weight.nested_quant_map` float32 [256], and puts the mean of
absmax into that JSON. Source: `QuantState.as_dict` of bitsandbytes.

transformers replaces every nn.Linear by a 4-bit one except those in `llm_int8_skip_modules`, to which it adds nothing of
its own once the list is there: the head must be on it, tied or not. Its routed experts are no nn.Linear and stay floats.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.codecs.names import CodecInfo, codec_info
from compress.containers._hosts import WHOLE
from compress.containers._quantized import check_arrival, module_of, open_decoded, write_folder
from compress.containers._safetensors import FLOATS, Slot, entry_bytes
from compress.containers._uses import CHAT, transformers
from compress.containers.base import TRANSFORMERS, Container, Files, PlannedTensor, WriteRequest
from compress.errors import OutputError
from compress.models.spec import ModelSpec, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from compress.weights import Packed

_BLOCK, _NESTED_BLOCK = 64, 256
_OFFSET_ROOM = 24  # characters of the longest float32 in JSON, so that the size is known before the value
_OTHERWISE = "leave it in float or export to container compress"


def _quant_type(info: CodecInfo) -> str:
    return info.name.removesuffix("-dq")


def _nested(info: CodecInfo) -> bool:
    return info.name.endswith("-dq")


# -- what transformers would load --------------------------------------------------------------------------------------
def codec_problem(tensor: TensorSpec, codec: str) -> str | None:
    """Why `tensor` cannot be stored as `codec` in such a folder, or None."""
    info = codec_info(codec)
    if info.name in FLOATS:
        return None
    if info.kind != "bnb":
        return f"{tensor.name}: container bitsandbytes holds nf4, fp4 and floats, not {codec}"
    if tensor.role.startswith("routed_experts"):
        return (
            f"{tensor.name}: transformers fuses routed experts into tensors that bitsandbytes leaves in float, so it "
            f"could not load {codec} there; {_OTHERWISE}"
        )
    if len(tensor.shape) != 2 or tensor.role in ("embeddings", "lm_head", "router"):
        return f"{tensor.name}: bitsandbytes keeps {tensor.role} in float, not {codec}; {_OTHERWISE}"
    if tensor.shape[1] % _BLOCK:
        return f"{tensor.name}: rows of {tensor.shape[1]} do not divide into blocks of {_BLOCK}; {_OTHERWISE}"
    return None


def check_plan(spec: ModelSpec, tensors: Sequence[PlannedTensor]) -> None:
    """Raise OutputError for a plan that transformers would load wrongly, before anything is computed."""
    problems = [p for p in (codec_problem(planned.spec, planned.codec) for planned in tensors) if p]
    if problems:
        raise OutputError(problems[0])
    quantization_config(tensors)


def quantization_config(tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
    """The `quantization_config` of config.json for a plan. OutputError if nothing is quantized or types are mixed."""
    infos = {module_of(p.spec): codec_info(p.codec) for p in tensors if len(p.spec.shape) == 2}
    names = sorted({info.name for info in infos.values() if info.kind == "bnb"})
    if not names:
        raise OutputError("nothing in this plan is quantized to nf4 or fp4; use container safetensors")
    if len(names) > 1:
        raise OutputError(
            f"this plan mixes {' and '.join(names)}, and config.json names one 4-bit type for all modules; choose one "
            "or export to container compress"
        )
    chosen = codec_info(names[0])
    floats = {module for module, info in infos.items() if info.kind == "float"} | {"lm_head"}
    # names are matched from their start: one entry stands for all experts of a layer
    skipped = {re.sub(r"\.experts\..*", ".experts", module) for module in floats - {"model.embed_tokens"}}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": _quant_type(chosen),
        "bnb_4bit_use_double_quant": _nested(chosen),
        "bnb_4bit_compute_dtype": _float_type(tensors),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(skipped),
    }


def _float_type(tensors: Sequence[PlannedTensor]) -> str:
    """The commonest float among the matrices, which transformers computes in."""
    counts = Counter(p.codec for p in tensors if p.codec in FLOATS and len(p.spec.shape) == 2)
    return FLOATS[counts.most_common(1)[0][0] if counts else "f16"][1]


# -- tensors in the file -----------------------------------------------------------------------------------------------
def _state(info: CodecInfo, shape: tuple[int, ...], dtype: str, offset: float = 0.0) -> dict[str, Any]:
    """What `quant_state` says about one tensor."""
    state = {"quant_type": _quant_type(info), "blocksize": _BLOCK, "dtype": dtype, "shape": list(shape)}
    if _nested(info):
        state |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return state


def _state_bytes(info: CodecInfo, shape: tuple[int, ...], dtype: str) -> int:
    return len(json.dumps(_state(info, shape, dtype))) + _OFFSET_ROOM


def _slots(planned: PlannedTensor, dtype: str) -> list[Slot]:
    tensor, info = planned.spec, codec_info(planned.codec)
    if info.kind == "float":
        return [Slot(tensor.name, FLOATS[info.name][0], tensor.shape)]
    count = math.prod(tensor.shape)
    blocks = count // _BLOCK
    slots = [
        Slot(tensor.name, "U8", (count // 2, 1)),
        Slot(f"{tensor.name}.absmax", "U8" if _nested(info) else "F32", (blocks,)),
        Slot(f"{tensor.name}.quant_map", "F32", (16,)),
        Slot(_state_name(tensor.name, info), "U8", (_state_bytes(info, tensor.shape, dtype),)),
    ]
    if _nested(info):
        slots.append(Slot(f"{tensor.name}.nested_absmax", "F32", (math.ceil(blocks / _NESTED_BLOCK),)))
        slots.append(Slot(f"{tensor.name}.nested_quant_map", "F32", (256,)))
    return slots


def tensor_bytes(planned: PlannedTensor, own: str = "") -> int:
    """Bytes of one tensor in the file, to the one by which the name of the float type may be shorter."""
    return sum(slot.bytes for slot in _slots(planned, "bfloat16"))


def _state_name(name: str, info: CodecInfo) -> str:
    return f"{name}.quant_state.bitsandbytes__{_quant_type(info)}"


def _encode(packed: Packed, planned: PlannedTensor, dtype: str) -> dict[str, Tensor]:
    """Checkpoint tensors of one weight: `_slots` filled."""
    import torch

    from compress.codecs import get_codec
    from compress.codecs.nf4 import FourBit

    check_arrival(packed, planned, 0)
    tensor, info, name = planned.spec, codec_info(planned.codec), planned.spec.name
    if info.kind == "float":
        return {name: packed.parts["values"]}
    codec = get_codec(info.name)
    if not isinstance(codec, FourBit):
        raise OutputError(f"{name}: {info.name} has no table of levels for bitsandbytes to look up; use nf4 or fp4")
    offset = float(packed.parts["offset"]) if _nested(info) else 0.0
    text = json.dumps(_state(info, tensor.shape, dtype, offset)).encode()
    padded = text.ljust(_state_bytes(info, tensor.shape, dtype))  # JSON ignores spaces at its end
    tensors = {
        name: packed.parts["codes"].reshape(-1, 1),
        f"{name}.absmax": packed.parts["absmax"].reshape(-1),
        f"{name}.quant_map": codec.table,
        _state_name(name, info): torch.tensor(list(padded), dtype=torch.uint8),
    }
    if _nested(info):
        tensors[f"{name}.nested_absmax"] = packed.parts["nested_absmax"]
        tensors[f"{name}.nested_quant_map"] = codec.absmax_map
    return tensors


def write(request: WriteRequest) -> list[Path]:
    """Write the folder (weights, config.json, tokenizer, compress.json) and return its weight files in order.

    4-bit tensors keep the very codes of `fetch`; floats are stored as planned. `fetch` is called once per tensor.
    OutputError for a plan the format cannot hold, a full disk, or a folder that holds something else.
    """
    check_plan(request.spec, request.tensors)
    dtype = _float_type(request.tensors)
    return write_folder(
        request,
        lambda planned: _slots(planned, dtype),
        lambda packed, planned: _encode(packed, planned, dtype),
        quantization_config(request.tensors),
    )


def load_dense(path: Files, spec: ModelSpec) -> dict[str, Tensor]:
    """All tensors of a folder, float32."""
    load = open_decoded(path, spec)
    return {tensor.name: load(tensor.name) for tensor in spec.tensors()}


CONTAINER = Container(
    name="bitsandbytes",
    rank=4,
    usual="nf4-dq",
    engines="transformers with bitsandbytes",
    kinds=frozenset({"float", "bnb"}),
    float_roles=("embeddings", "lm_head"),
    masks="bitsandbytes has no masks: zeros take as many bits as other weights",
    quant_method="bitsandbytes",
    engine=replace(TRANSFORMERS, package="bitsandbytes", distribution="bitsandbytes", extra="bnb"),
    hosts=(WHOLE,),
    library="transformers",
    uses=(transformers("bitsandbytes", "accelerate"), CHAT),
    tensor_bytes=tensor_bytes,
    entry_bytes=entry_bytes,
    check_plan=check_plan,
    write=write,
    open_dense=open_decoded,
)
