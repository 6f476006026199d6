"""AWQ checkpoints, the GEMM layout of AutoAWQ: int32 words of eight interleaved 4-bit codes along the outputs.

A linear layer `m` of [out, in] becomes `m.qweight` int32 [in, out / 8], `m.qzeros` int32 [in / group, out / 8] and
`m.scales` float16 [in / group, out]. The word of outputs 8j to 8j+7 holds, from its lowest bits, outputs
8j + (0, 2, 4, 6, 1, 3, 5, 7). Zero points are stored as they are; symmetric codecs have 8. Source: AutoAWQ's
awq/modules/linear/gemm.py. The name is that of the file format: any solver may have chosen the codes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.codecs.names import CodecInfo, codec_info
from compress.containers._hosts import VLLM
from compress.containers._quantized import (
    check_arrival,
    fused_problem,
    int32_words,
    linears,
    module_of,
    open_decoded,
    stacked_problem,
    write_folder,
)
from compress.containers._safetensors import FLOATS, Slot, entry_bytes
from compress.containers._uses import CHAT, GPTQMODEL, SERVERS
from compress.containers.base import Container, PlannedTensor, WriteRequest
from compress.errors import OutputError
from compress.models.sources.awq import ORDER, WORD
from compress.models.spec import ModelSpec, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from compress.weights import Packed

_CODEC = re.compile(r"int4-g(32|64|128)(-asym)?")


def _group(codec: str) -> int | None:
    """Columns that share a scale, None for floats and what the format cannot hold."""
    match = _CODEC.fullmatch(codec)
    return int(match[1]) if match else None


def codec_problem(planned: PlannedTensor) -> str | None:
    """Why one tensor cannot be stored as planned, and what to do about it; None when it can."""
    tensor, codec = planned.spec, planned.codec
    if planned.activations:
        return f"{tensor.name}: AWQ checkpoints say nothing about activations; use container compressed-tensors"
    if codec in FLOATS:
        return None
    group = _group(codec)
    if group is None:
        bits = codec_info(codec).bits if codec_info(codec).kind == "uniform" else 4
        instead = "container gptq or compressed-tensors" if bits != 4 else "int4-g128-asym"
        return f"{tensor.name}: AWQ checkpoints hold int4 in groups of 32, 64 or 128, not {codec}; use {instead}"
    if len(tensor.shape) != 2 or tensor.role in ("embeddings", "router", "lm_head"):
        return f"{tensor.name}: AWQ checkpoints keep {tensor.role} in float, not {codec}; leave it out of the rules"
    rows, columns = tensor.shape
    if rows % WORD or columns % group:
        return (
            f"{tensor.name} is {rows} x {columns}: AWQ packs {WORD} rows a word and whole groups of {group} columns; "
            "use a smaller group or leave it in float"
        )
    return None


def check_plan(spec: ModelSpec, tensors: Sequence[PlannedTensor]) -> None:
    """Raise OutputError for a plan the format or its engines cannot hold, before anything is computed."""
    problems = [problem for planned in tensors if (problem := codec_problem(planned))]
    if problems:
        raise OutputError(problems[0])
    if problem := stacked_problem("awq", tensors) or fused_problem(tensors, lambda planned: _group(planned.codec)):
        raise OutputError(problem)
    quantization_config(tensors)


def quantization_config(tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
    """The `quantization_config` of config.json for a plan.

    `modules_to_not_convert` names every linear that stays float: vLLM looks for these as parts of module names, and for
    fused experts by their common prefix. gptqmodel 7.6 does not read that list, it obeys `dynamic`, as in GPTQ
    checkpoints. OutputError if nothing is quantized or groups differ.
    """
    groups: dict[int, str] = {}
    for planned in linears(tensors):
        if (group := _group(planned.codec)) is not None:
            groups.setdefault(group, planned.spec.name)
    if not groups:
        raise OutputError("nothing in this plan is quantized to int4; an AWQ checkpoint needs at least one such linear")
    if len(groups) > 1:
        where = ", ".join(f"{group} ({name})" for group, name in sorted(groups.items()))
        raise OutputError(f"an AWQ checkpoint has one group size, this plan has {where}; choose one or use gptq")
    kept = sorted({_kept(planned.spec) for planned in linears(tensors) if planned.codec in FLOATS} - {"lm_head"})
    config = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": next(iter(groups)),
        "zero_point": True,
        "modules_to_not_convert": [*kept, "lm_head"],
        "meta": {"quantizer": [f"compress:{__version__}"]},
    }
    return {**config, "dynamic": {rf"-:^{re.escape(module)}(\.|$)": {} for module in kept}} if kept else config


def _kept(tensor: TensorSpec) -> str:
    """The name under which a float linear is listed: its own, or that of all experts of the layer."""
    module = module_of(tensor)
    return module if tensor.expert is None else module.split(".experts.")[0] + ".experts"


def _slots(planned: PlannedTensor) -> list[Slot]:
    tensor, group = planned.spec, _group(planned.codec)
    if group is None:
        return [Slot(tensor.name, FLOATS[planned.codec][0], tensor.shape)]
    module, (rows, columns) = module_of(tensor), tensor.shape
    return [
        Slot(f"{module}.qweight", "I32", (columns, rows // WORD)),
        Slot(f"{module}.qzeros", "I32", (columns // group, rows // WORD)),
        Slot(f"{module}.scales", "F16", (columns // group, rows)),
    ]


def tensor_bytes(planned: PlannedTensor, own: str = "") -> int:
    """Bytes of one tensor in the file."""
    return sum(slot.bytes for slot in _slots(planned))


def _pack(values: Tensor) -> Tensor:
    """uint8 codes [out, n] -> int32 words [n, out / 8]."""
    rows, n = values.shape
    interleaved = values.T.reshape(n, rows // WORD, WORD)[:, :, list(ORDER)]
    return int32_words(interleaved.reshape(n, rows), 4)


def _encode(packed: Packed, planned: PlannedTensor) -> dict[str, Tensor]:
    """Checkpoint tensors of one weight: `_slots` filled."""
    import torch

    tensor, group = planned.spec, _group(planned.codec)
    check_arrival(packed, planned, 0 if group is None else tensor.shape[1] // group)
    if group is None:
        return {tensor.name: packed.parts["values"]}
    module = module_of(tensor)
    codes, scales, zeros = (packed.parts[key].detach().cpu() for key in ("codes", "scales", "zeros"))
    return {
        f"{module}.qweight": _pack(codes),
        f"{module}.qzeros": _pack(zeros),
        f"{module}.scales": scales.to(torch.float16).T.contiguous(),
    }


def write(request: WriteRequest) -> list[Path]:
    """Write the folder (weights, config.json, tokenizer, compress.json) and return its weight files in order.

    int4 tensors keep the very codes of `fetch`; floats are stored as planned. `fetch` is called once per tensor.
    OutputError for a plan the format cannot hold, a full disk, or a folder that holds something else.
    """
    check_plan(request.spec, request.tensors)
    return write_folder(request, _slots, _encode, quantization_config(request.tensors))


def _holds(info: CodecInfo) -> bool:
    return info.kind == "float" or _group(info.name) is not None


CONTAINER = Container(
    name="awq",
    rank=3,
    usual="awq-w4-g128",
    engines="vLLM, SGLang, gptqmodel",
    hosts=(VLLM,),
    kinds=frozenset({"float", "uniform"}),
    holds=_holds,
    float_roles=("embeddings", "lm_head"),
    masks="the AWQ layout has no masks: zeros take as many bits as other weights",
    one_group=True,
    quant_method="awq",
    library="transformers",
    uses=(*SERVERS, GPTQMODEL, CHAT),
    tensor_bytes=tensor_bytes,
    entry_bytes=entry_bytes,
    check_plan=check_plan,
    write=write,
    open_dense=open_decoded,
)
