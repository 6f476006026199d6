"""GPTQ checkpoints, the format of AutoGPTQ: int32 words of packed codes, one scale and zero point per group.

A linear layer `m` of [out, in] becomes `m.qweight` int32 [in / 32 * bits, out] (32 codes of a column in `bits` words,
lowest bits first), `m.qzeros` int32 [groups, out / 32 * bits], `m.scales` float16 [groups, out] and `m.g_idx` int32
[in] (group of every input). Symmetric codecs are stored as format v1 ("gptq": zero points minus one); asymmetric ones
as v2 ("gptq_v2": zero points as they are), because v1 cannot hold a zero point of 0 (0 - 1 overflows into its
neighbours; the loaders' v1 to v2 conversion adds ones word by word). Source: AutoGPTQ's qlinear_cuda_old.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.containers._hosts import VLLM
from compress.containers._quantized import check_arrival, module_of, open_decoded, stacked_problem, write_folder
from compress.containers._safetensors import FLOATS, Slot, entry_bytes
from compress.containers._uses import CHAT, GPTQMODEL, SERVERS
from compress.containers.base import Container, Files, PlannedTensor, WriteRequest
from compress.errors import OutputError
from compress.models.spec import ModelSpec, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from compress.weights import Packed

_CODEC = re.compile(r"int(2|3|4|8)-(g32|g64|g128|row)(-asym)?")
_PACK = 32  # codes per pack of `bits` words


@dataclass(frozen=True, order=True)
class Format:
    """One module's numeric format; `group` is -1 for one group per row."""

    bits: int
    group: int
    symmetric: bool

    def groups(self, columns: int) -> int:
        return 1 if self.group == -1 else math.ceil(columns / self.group)


def parse_codec(name: str) -> Format | None:
    """The format of a uniform codec's name ("int4-g128", "int3-row-asym"), None for other codecs."""
    match = _CODEC.fullmatch(name)
    return Format(int(match[1]), -1 if match[2] == "row" else int(match[2][1:]), match[3] is None) if match else None


def codec_problem(tensor: TensorSpec, codec: str) -> str | None:
    """Why `tensor` cannot be stored as `codec` in a GPTQ checkpoint, or None."""
    if codec in FLOATS:
        return None
    if parse_codec(codec) is None:
        return f"{tensor.name}: GPTQ checkpoints hold intN codecs and floats, not {codec}"
    if len(tensor.shape) != 2 or tensor.role in ("embeddings", "router"):
        return f"{tensor.name}: GPTQ checkpoints keep {tensor.role} in float, not {codec}"
    if tensor.shape[0] % _PACK or tensor.shape[1] % _PACK:
        return f"{tensor.name} is {tensor.shape[0]} x {tensor.shape[1]}: GPTQ packs {_PACK} rows and columns at a time"
    return None


def check_plan(spec: ModelSpec, tensors: Sequence[PlannedTensor]) -> None:
    """Raise OutputError for a plan the format cannot hold, before anything is computed."""
    problems = [p for p in (codec_problem(planned.spec, planned.codec) for planned in tensors) if p]
    if problem := problems[0] if problems else stacked_problem("gptq", tensors):
        raise OutputError(problem)
    quantization_config(tensors)


def _slots(planned: PlannedTensor) -> list[Slot]:
    tensor, form = planned.spec, parse_codec(planned.codec)
    if form is None:
        return [Slot(tensor.name, FLOATS[planned.codec][0], tensor.shape)]
    rows, columns = tensor.shape
    module, groups = module_of(tensor), form.groups(columns)
    return [
        Slot(f"{module}.qweight", "I32", (columns // _PACK * form.bits, rows)),
        Slot(f"{module}.qzeros", "I32", (groups, rows // _PACK * form.bits)),
        Slot(f"{module}.g_idx", "I32", (columns,)),
        Slot(f"{module}.scales", "F16", (groups, rows)),
    ]


def tensor_bytes(planned: PlannedTensor, own: str = "") -> int:
    """Bytes of one tensor in the file."""
    return sum(slot.bytes for slot in _slots(planned))


def pack_words(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [n, m] -> int32 words [n / 32 * bits, m]: 32 codes fill `bits` words, lowest bits first.

    Codes of 3 bits cross word borders; n must be a multiple of 32.
    """
    import numpy as np

    count, width = values.shape
    codes = values.reshape(count // _PACK, _PACK, width).astype(np.uint64)
    words = np.zeros((count // _PACK, bits, width), dtype=np.uint64)
    for index in range(_PACK):
        word, shift = divmod(index * bits, 32)
        words[:, word] |= codes[:, index] << np.uint64(shift)
        if shift + bits > 32:
            words[:, word + 1] |= codes[:, index] >> np.uint64(32 - shift)
    return (words & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32).reshape(-1, width)


def _encode(packed: Packed, planned: PlannedTensor) -> dict[str, Tensor]:
    """Checkpoint tensors of one weight: `_slots` filled."""
    import numpy as np
    import torch

    tensor, form = planned.spec, parse_codec(planned.codec)
    check_arrival(packed, planned, 0 if form is None else form.groups(tensor.shape[1]))
    if form is None:
        return {tensor.name: packed.parts["values"]}
    codes, scales, zeros = (packed.parts[key].detach().cpu() for key in ("codes", "scales", "zeros"))
    columns = tensor.shape[1]
    offset = 1 if form.symmetric else 0
    stored_zeros = zeros.numpy().astype(np.uint8) - np.uint8(offset)
    if form.symmetric and bool((zeros == 0).any()):
        raise OutputError(f"{tensor.name} has a zero point of 0, which GPTQ's v1 format cannot hold")
    module = module_of(tensor)
    qzeros = pack_words(np.ascontiguousarray(stored_zeros), form.bits)  # over rows of the weight
    return {
        f"{module}.qweight": torch.from_numpy(pack_words(np.ascontiguousarray(codes.numpy().T), form.bits)),
        f"{module}.qzeros": torch.from_numpy(np.ascontiguousarray(qzeros.T)),
        f"{module}.g_idx": torch.arange(columns, dtype=torch.int32) // (columns if form.group == -1 else form.group),
        f"{module}.scales": scales.to(torch.float16).T.contiguous(),
    }


def quantization_config(tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
    """The `quantization_config` of config.json for a plan: the commonest format, and what departs from it.

    `dynamic` maps regular expressions over module names to what differs: "-:" leaves a module in float, "+:" gives it
    other bits or groups. OutputError if nothing is quantized or symmetric and asymmetric codecs are mixed.
    """
    formats = {module_of(p.spec): parse_codec(p.codec) for p in tensors if len(p.spec.shape) == 2}
    counts = Counter(form for form in formats.values() if form is not None)
    if not counts:
        raise OutputError("nothing in this plan is quantized to intN; a GPTQ checkpoint needs at least one such module")
    if len({form.symmetric for form in counts}) > 1:
        raise OutputError("a GPTQ checkpoint is symmetric or asymmetric throughout; choose one for all modules")
    base = max(counts, key=lambda form: (counts[form], form))
    linears = {
        module_of(p.spec): parse_codec(p.codec)
        for p in tensors
        if len(p.spec.shape) == 2 and p.spec.role not in ("embeddings", "lm_head")
    }
    dynamic: dict[str, dict[str, int]] = {}
    for pattern, form in _patterns(linears):
        if form is None:
            dynamic[f"-:{pattern}"] = {}
        elif form != base:
            dynamic[f"+:{pattern}"] = {"bits": form.bits, "group_size": form.group}
    name = next((module_of(p.spec) for p in tensors if p.spec.role == "lm_head" and not p.spec.beside), "lm_head")
    head = formats.get(name)
    if head is not None and head != base:
        dynamic[f"+:^{re.escape(name)}$"] = {"bits": head.bits, "group_size": head.group}
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": base.bits,
        "group_size": base.group,
        "desc_act": False,
        "sym": base.symmetric,
        "lm_head": head is not None,
        "checkpoint_format": "gptq" if base.symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"compress:{__version__}"]},
    }
    return {**config, "dynamic": dynamic} if dynamic else config


def _patterns(formats: Mapping[str, Format | None]) -> list[tuple[str, Format | None]]:
    """(regular expression, format) covering every module once: one expression for all layers and experts of a kind
    where they agree, else one each."""
    kinds: dict[str, dict[str, Format | None]] = {}
    for module, form in formats.items():
        kinds.setdefault(re.sub(r"\.\d+(?=\.)", ".#", module), {})[module] = form
    out = []
    for kind, modules in kinds.items():
        if len(set(modules.values())) == 1:
            expression = re.escape(kind).replace(r"\#", "#").replace("#", r"\d+")
            out.append((f"^{expression}$", next(iter(modules.values()))))
        else:
            out.extend((f"^{re.escape(module)}$", form) for module, form in modules.items())
    return out


def write(request: WriteRequest) -> list[Path]:
    """Write the folder (weights, config.json, tokenizer, compress.json) and return its weight files in order.

    intN tensors keep the very codes of `fetch`; floats are stored as planned. `fetch` is called once per tensor.
    OutputError for a plan the format cannot hold, a full disk, or a folder that holds something else.
    """
    check_plan(request.spec, request.tensors)
    quantization = quantization_config(request.tensors)
    beside = {"quantize_config.json": quantization}  # what AutoGPTQ reads
    return write_folder(request, _slots, _encode, quantization, beside)


def load_dense(path: Files, spec: ModelSpec) -> dict[str, Tensor]:
    """All tensors of a folder, float32."""
    load = open_decoded(path, spec)
    return {tensor.name: load(tensor.name) for tensor in spec.tensors()}


CONTAINER = Container(
    name="gptq",
    rank=2,
    usual="W4A16",
    engines="vLLM, SGLang, gptqmodel",
    hosts=(VLLM,),
    kinds=frozenset({"float", "uniform"}),
    float_roles=("embeddings",),  # engines look them up as plain rows; no loader of these formats unpacks them
    masks="the GPTQ layout has no masks: zeros take as many bits as other weights",
    quant_method="gptq",
    library="transformers",
    uses=(*SERVERS, GPTQMODEL, CHAT),
    tensor_bytes=tensor_bytes,
    entry_bytes=entry_bytes,
    check_plan=check_plan,
    write=write,
    open_dense=open_decoded,
)
