"""compressed-tensors checkpoints, the format of vLLM's LLM Compressor.

A linear layer `m` of [out, in] is stored in one of two ways (compressed_tensors.compressors, version 0.19):

    pack-quantized  weight only, int4 or int8, groups or rows: `m.weight_packed` int32 [out, in * bits / 32] (codes of a
                    row, lowest bits first), `m.weight_scale` float16 [out, groups], `m.weight_shape` int64 [2] and,
                    asymmetric, `m.weight_zero_point` int32 [out * bits / 32, groups], packed down the outputs
    int-quantized   W8A8: `m.weight` int8 [out, in], `m.weight_scale` float16 [out, 1]; the engine rounds every token of
                    the inputs to int8 by its largest value

Packed codes and zero points are unsigned, offset by 2^(bits-1) from the integers the package's documentation speaks of:
the very codes of our uniform codecs. Integers span -2^(bits-1) to 2^(bits-1) - 1 in both.

transformers unpacks the weights when a model first runs and then computes in its own float type. The inputs of W8A8
linears it really rounds, every token in steps of max / 127.5 (vLLM: max / 127), except that inputs without a batch
dimension (Qwen2-MoE's shared expert) share one step; routed experts it fuses into one tensor, decodes in the scales'
float16 and leaves their inputs alone. `check_plan` refuses what would come out wrong there. Engines that compute in
bfloat16 round the scales to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.codecs.names import CodecInfo, codec_info
from compress.containers._hosts import VLLM, WHOLE
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
from compress.containers._uses import CHAT, SERVERS, transformers
from compress.containers.base import TRANSFORMERS, Container, PlannedTensor, WriteRequest
from compress.errors import OutputError
from compress.models.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from compress.weights import Packed


@dataclass(frozen=True, order=True)
class Scheme:
    """One linear's numeric format; `group` 0 means one scale per row, `activations` W8A8."""

    bits: int
    group: int
    symmetric: bool
    activations: bool

    @property
    def format(self) -> str:
        return "int-quantized" if self.activations else "pack-quantized"

    @property
    def word(self) -> int:
        """Codes in an int32."""
        return 32 // self.bits

    def groups(self, columns: int) -> int:
        return columns // self.group if self.group else 1

    def settings(self, targets: Sequence[str]) -> dict[str, Any]:
        """The config group of the linears that `targets` match."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if self.group else "channel",
            "group_size": self.group or None,
            "dynamic": False,
        }
        token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        return {
            "targets": list(targets),
            "weights": weights,
            "input_activations": token if self.activations else None,
            "output_activations": None,
            "format": self.format,
        }


def _scheme(planned: PlannedTensor) -> Scheme | None:
    """The format of a planned tensor that `codec_problem` has nothing against; None for floats."""
    if planned.codec in FLOATS:
        return None
    info = codec_info(planned.codec)
    return Scheme(info.bits, info.block, info.symmetric, planned.activations is not None)


def codec_problem(planned: PlannedTensor) -> str | None:
    """Why one tensor cannot be stored as planned, and what to do about it; None when it can."""
    tensor, codec = planned.spec, planned.codec
    if planned.activations and (planned.activations != "int8" or codec != "int8-row"):
        return (
            f"{tensor.name}: engines round activations to int8 only beside weights in int8-row, not {codec}; "
            "use int8-row or drop activations"
        )
    if codec in FLOATS:
        return None
    info = codec_info(codec)
    if info.kind != "uniform" or info.bits not in (4, 8):
        return (
            f"{tensor.name}: the kernels for compressed-tensors read int4 and int8, not {codec}; "
            "use one of these, or container gptq for int2 and int3"
        )
    if len(tensor.shape) != 2 or tensor.role in ("embeddings", "router"):
        return f"{tensor.name}: engines keep {tensor.role} in float, not {codec}; leave it out of the rules"
    if planned.activations and tensor.role == "lm_head":
        return f"{tensor.name}: vLLM does not round the inputs of the head; drop activations there or keep it in float"
    if planned.activations and tensor.role.startswith("shared_experts."):
        return (
            f"{tensor.name}: transformers rounds the inputs of shared experts with one scale for all tokens of a batch; "
            "drop activations for shared_experts (their weights may stay int8-row)"
        )
    (rows, columns), word = tensor.shape, 32 // info.bits
    if columns % (info.block or word) or rows % word:
        return (
            f"{tensor.name} is {rows} x {columns}: {codec} needs multiples of {word} rows and {info.block or word} "
            "columns; use a smaller group or keep it in float"
        )
    return None


def _expert_problem(tensors: Sequence[PlannedTensor]) -> str | None:
    """Why an engine would load the routed experts wrongly or not at all, or None.

    transformers fuses them while it loads: with one scheme for the whole model, and only from packed codes without zero
    points (DecompressExperts in its integrations/compressed_tensors.py, 5.17). Float experts, and those of a second
    scheme, it leaves at random or wrong values with a line in its load report.
    """
    experts = [planned for planned in tensors if planned.spec.role.startswith("routed_experts.")]
    schemes = {_scheme(planned): planned for planned in reversed(experts)}
    if not any(_scheme(planned) for planned in linears(tensors)):
        return None
    for scheme, planned in schemes.items():
        name = planned.spec.name
        if scheme is None:
            return (
                f"{name}: beside quantized linears transformers leaves float routed experts at random values; "
                "quantize routed_experts, too, or use container gptq"
            )
        if scheme.activations:
            return (
                f"{name}: transformers cannot load routed experts with int8 inputs; drop activations for "
                "routed_experts (their weights may stay int8-row)"
            )
        if not scheme.symmetric:
            return (
                f"{name}: neither vLLM nor transformers loads routed experts with zero points; use "
                f"{planned.codec.removesuffix('-asym')} for routed_experts, or container gptq or awq"
            )
    if len(schemes) > 1:
        one, other, *_ = schemes.values()
        return (
            f"{one.spec.name} is {one.codec}, {other.spec.name} {other.codec}: transformers decodes all routed experts "
            "by one scheme; give routed_experts one codec, or use container gptq"
        )
    return None


def check_plan(spec: ModelSpec, tensors: Sequence[PlannedTensor]) -> None:
    """Raise OutputError for a plan the format or its engines cannot hold, before anything is computed."""
    problems = [problem for planned in tensors if (problem := codec_problem(planned))]
    problem = problems[0] if problems else stacked_problem("compressed-tensors", tensors)
    problem = problem or _expert_problem(tensors) or fused_problem(tensors, _scheme)
    if problem:
        raise OutputError(problem)
    quantization_config(spec, tensors)


def quantization_config(spec: ModelSpec, tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
    """The `quantization_config` of config.json for a plan: schemes and their targets, and every linear that stays float.

    One scheme targets the class "Linear", several the names of their linears. OutputError if nothing is quantized.
    """
    modules: dict[Scheme, list[str]] = {}
    kept: list[str] = []
    for planned in linears(tensors):
        scheme = _scheme(planned)
        alike = kept if scheme is None else modules.setdefault(scheme, [])
        alike.append(module_of(planned.spec))
    if not modules:
        raise OutputError(
            "nothing in this plan is quantized; compressed-tensors needs at least one int4 or int8 linear"
        )
    names = [*kept, *(name for group in modules.values() for name in group)]
    order = sorted(modules, key=lambda scheme: (-len(modules[scheme]), scheme))
    formats = {scheme.format for scheme in order}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": scheme.settings(["Linear"] if len(order) == 1 else _targets(modules[scheme], names))
            for index, scheme in enumerate(order)
        },
        "ignore": _targets(kept, names) + (["lm_head"] if spec.tied else []),
    }


def _kind(module: str) -> str:
    """A module's name without its layer; all routed experts are of one kind, as engines fuse them."""
    return re.sub(r"\.experts\..*", ".experts.*", re.sub(r"\.\d+(?=\.)", ".#", module))


def _targets(chosen: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Targets that match exactly `chosen` of all `modules`: one expression for a kind that is chosen as a whole, names
    otherwise."""
    chosen = set(chosen)
    split = {_kind(module) for module in modules if module not in chosen}
    out: dict[str, None] = {}
    for module in sorted(chosen):
        kind = _kind(module)
        if kind in split or kind == module:
            out[module] = None
        else:
            out["re:^" + re.escape(kind).replace(r"\#", r"\d+").replace(r"\*", ".*") + "$"] = None
    return list(out)


def _slots(planned: PlannedTensor) -> list[Slot]:
    tensor, scheme = planned.spec, _scheme(planned)
    if scheme is None:
        return [Slot(tensor.name, FLOATS[planned.codec][0], tensor.shape)]
    module, (rows, columns) = module_of(tensor), tensor.shape
    groups = scheme.groups(columns)
    scale = Slot(f"{module}.weight_scale", "F16", (rows, groups))
    if scheme.activations:
        return [Slot(f"{module}.weight", "I8", (rows, columns)), scale]
    slots = [
        Slot(f"{module}.weight_packed", "I32", (rows, columns // scheme.word)),
        scale,
        Slot(f"{module}.weight_shape", "I64", (2,)),
    ]
    if not scheme.symmetric:
        slots.append(Slot(f"{module}.weight_zero_point", "I32", (rows // scheme.word, groups)))
    return slots


def tensor_bytes(planned: PlannedTensor, own: str = "") -> int:
    """Bytes of one tensor in the file."""
    return sum(slot.bytes for slot in _slots(planned))


def _encode(packed: Packed, planned: PlannedTensor) -> dict[str, Tensor]:
    """Checkpoint tensors of one weight: `_slots` filled."""
    import torch

    tensor, scheme = planned.spec, _scheme(planned)
    check_arrival(packed, planned, scheme.groups(tensor.shape[1]) if scheme else 0)
    if scheme is None:
        return {tensor.name: packed.parts["values"]}
    module = module_of(tensor)
    codes, scales, zeros = (packed.parts[key].detach().cpu() for key in ("codes", "scales", "zeros"))
    middle = 1 << (scheme.bits - 1)
    if scheme.symmetric and bool((zeros != middle).any()):
        raise OutputError(f"{tensor.name} is {planned.codec} but has zero points other than {middle}")
    out = {f"{module}.weight_scale": scales.to(torch.float16)}
    if scheme.activations:
        return {**out, f"{module}.weight": (codes.to(torch.int16) - middle).to(torch.int8)}
    out[f"{module}.weight_packed"] = int32_words(codes, scheme.bits)
    out[f"{module}.weight_shape"] = torch.tensor(tensor.shape, dtype=torch.int64)
    if not scheme.symmetric:
        out[f"{module}.weight_zero_point"] = int32_words(zeros.T.contiguous(), scheme.bits).T.contiguous()
    return out


def write(request: WriteRequest) -> list[Path]:
    """Write the folder (weights, config.json, tokenizer, compress.json) and return its weight files in order.

    intN tensors keep the very codes of `fetch`; floats are stored as planned. `fetch` is called once per tensor.
    OutputError for a plan the format cannot hold, a full disk, or a folder that holds something else.
    """
    check_plan(request.spec, request.tensors)
    return write_folder(request, _slots, _encode, quantization_config(request.spec, request.tensors))


def _holds(info: CodecInfo) -> bool:
    return info.kind == "float" or info.bits in (4, 8)


CONTAINER = Container(
    name="compressed-tensors",
    rank=5,
    usual="W4A16",
    engines="vLLM, transformers with compressed-tensors",
    kinds=frozenset({"float", "uniform"}),
    holds=_holds,
    float_roles=("embeddings",),
    activations=True,
    masks="its sparse formats (sparse-bitmask, sparse-24-bitmask, marlin-24) are no longer loaded by the package "
    "(0.19), transformers or vLLM, so zeros are stored like other weights",
    quant_method="compressed-tensors",
    engine=replace(TRANSFORMERS, package="compressed_tensors", distribution="compressed-tensors", extra="ct"),
    hosts=(VLLM, WHOLE),
    library="transformers",
    uses=(*SERVERS, transformers("compressed-tensors"), CHAT),
    tensor_bytes=tensor_bytes,
    entry_bytes=entry_bytes,
    check_plan=check_plan,
    write=write,
    open_dense=open_decoded,
)
