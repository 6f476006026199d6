"""Our own container: every codec as it is, packed to its bits, run by transformers after `import compress`.

A folder of safetensors shards, config.json, the tokenizer and compress.json. A float tensor keeps its checkpoint name; a
coded `X.weight` becomes `X.<part>` for every part of its `Packed` (`X.blocks`, `X.codes`, `X.scales`, `X.signs_in`, ...).
intN codes and zero points are packed to their bits row by row (`pack_bits`); symmetric codecs store no zero points. A
factored weight becomes the parts of two tensors, `X.dictionary.<part>` and `X.coefficients.<part>`; pruned ones are as
codecs/sparse.py says.
config.json says how to read that:

    "quantization_config": {
      "quant_method": "compress", "format": 1,
      "parts": {"q4_k": ["blocks"], "int8-row": ["codes", "scales"]},
      "modules": {
        "model.layers.*.self_attn.q_proj": {"codec": "q4_k", "incoherence": false, "activations": null},
        "model.layers.3.mlp.experts.*.up_proj": {...}, "lm_head": {...}
      }
    }

`*` stands for a layer or an expert; of the rules that match a module the one with the fewest `*` counts, and null says
that it is stored as floats. Modules that no rule matches are floats. `_refusal.py` says what else lies there for programs that
cannot read that; the model card tells people.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.codecs.names import KIND_NAMES, codec_info, packed_bytes
from compress.containers import _refusal
from compress.containers._hosts import WHOLE
from compress.containers._quantized import stacked_problem
from compress.containers._safetensors import FLOATS, Slot, entry_bytes, write_checkpoint
from compress.containers._uses import CHAT, OWN
from compress.containers.base import (
    TRANSFORMERS,
    Container,
    Counted,
    Files,
    PlannedTensor,
    WriteRequest,
    folder_of,
)
from compress.errors import CheckpointError, OutputError
from compress.models.spec import ModelSpec, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from compress.weights import Packed

FORMAT = 1
METHOD = "compress"
REFUSAL, protect = _refusal.KEY, _refusal.protect
SIGNS = ("signs_in", "signs_out")
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
           "int8": "I8", "uint8": "U8"}  # fmt: skip
_EXPERT, _LAYER = re.compile(r"\.experts\.\d+\."), re.compile(r"\.layers\.\d+\.")


@dataclass(frozen=True, order=True)
class Setting:
    """How one module is stored and run.

    incoherence: the codes are those of the weight between two Hadamard transforms; activations: "int8" when its inputs
    are rounded, too.
    """

    codec: str
    incoherence: bool = False
    activations: str | None = None


Rules = dict[str, Setting | None]
"""Module name, with `*` for layers and experts -> setting; None for floats."""


def check_plan(spec: ModelSpec, tensors: Sequence[PlannedTensor]) -> None:
    """Raise OutputError for a plan the runtime cannot run, before anything is computed."""
    if problem := stacked_problem("compress", tensors):
        raise OutputError(problem)
    for planned in tensors:
        tensor, info = planned.spec, codec_info(planned.codec)
        if info.kind == "float":
            continue
        if len(tensor.shape) != 2 or tensor.role == "router":
            raise OutputError(f"{tensor.name}: container compress keeps {tensor.role} in float, not {info.name}")
        if tensor.role == "embeddings" and info.derived:
            raise OutputError(
                f"{tensor.name}: embeddings are looked up row by row and stay dense; drop them from the step"
            )
        if tensor.role == "embeddings" and (planned.incoherence or info.kind == "vector"):
            raise OutputError(
                f"{tensor.name}: embeddings are looked up row by row and cannot be coded between Hadamard transforms; "
                f"use {'another codec' if info.kind == 'vector' else 'incoherence: false'} for them"
            )


def tensor_bytes(planned: PlannedTensor, own: str = "") -> int:
    """Bytes of one tensor in the file: intN codes packed to their bits row by row, zero points where they differ."""
    rows, columns = (1, *planned.spec.shape)[-2:]
    atoms = planned.factors[0] if planned.factors else None
    size = packed_bytes(planned.codec, planned.spec.shape, planned.kept, atoms)
    return size + (ceil(rows / 8) + ceil(columns / 8) if planned.incoherence else 0)


# -- what config.json says ---------------------------------------------------------------------------------------------
def quantization_rules(tensors: Sequence[PlannedTensor]) -> Rules:
    """The rules of a plan: one for all layers and experts of a kind where they agree, and what departs from it."""
    settings: Rules = {}
    for planned in tensors:
        if len(planned.spec.shape) != 2 or planned.spec.role == "router":
            continue
        coded = codec_info(planned.codec).kind != "float"
        setting = Setting(planned.codec, planned.incoherence, planned.activations) if coded else None
        settings[module_name(planned.spec.name)] = setting
    rules = _fold(_fold(settings, _EXPERT), _LAYER)
    return {
        name: setting
        for name, setting in rules.items()
        if setting is not None or any(rules.get(wider) is not None for wider in _patterns(name)[1:])
    }


def setting_of(rules: Rules, module: str) -> Setting | None:
    """The setting of a module by its checkpoint name, None when it is stored as floats."""
    return next((rules[name] for name in _patterns(module) if name in rules), None)


def _patterns(module: str) -> list[str]:
    """Names a rule for `module` may have, the narrowest first."""
    any_expert = _EXPERT.sub(".experts.*.", module)
    return list(dict.fromkeys((module, any_expert, _LAYER.sub(".layers.*.", any_expert))))


def _fold(rules: Rules, number: re.Pattern[str]) -> Rules:
    """One rule with `*` for all names that differ in `number` only; names with other settings than most keep theirs."""
    groups: dict[str, Rules] = {}
    for name, setting in rules.items():
        single = number is _LAYER and _EXPERT.search(name)  # an exception among the experts of its layer
        groups.setdefault(name if single else number.sub(_starred, name), {})[name] = setting
    folded: Rules = {}
    for wide, members in groups.items():
        if len(members) == 1:
            folded.update(members)
            continue
        folded[wide] = Counter(members.values()).most_common(1)[0][0]
        folded.update({name: setting for name, setting in members.items() if setting != folded[wide]})
    return folded


def _starred(match: re.Match[str]) -> str:
    return re.sub(r"\d+", "*", match[0])


def read_rules(config: Mapping[str, Any]) -> Rules:
    """The rules of a `quantization_config`. CheckpointError for a format or a codec that this version does not know."""
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"this folder has format {config.get('format')!r} of the container compress, this version reads "
            f"format {FORMAT}; install a newer compress"
        )
    rules: Rules = {}
    for name, value in (config.get("modules") or {}).items():
        try:
            rules[name] = None if value is None else Setting(**value)
        except TypeError:
            raise CheckpointError(f"config.json: cannot read the entry of {name}; install a newer compress") from None
    known_activations = (None, "int8")
    for name, setting in rules.items():
        if setting is not None and setting.activations not in known_activations:
            raise CheckpointError(
                f"config.json: {name} wants activations in {setting.activations!r}; only int8 is known"
            )
    for codec in sorted({setting.codec for setting in rules.values() if setting is not None}):
        try:
            codec_info(codec)
        except KeyError:
            raise CheckpointError(
                f"config.json: codec {codec!r} is not known; install a newer compress, or load the plugin that registers it"
            ) from None
        if codec not in (config.get("parts") or {}):
            raise CheckpointError(f"config.json does not name the parts of codec {codec!r}; fetch the model again")
    return rules


# -- tensors in the file -----------------------------------------------------------------------------------------------
def module_name(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def stored_parts(packed: Packed) -> dict[str, Tensor]:
    """The parts of a coded tensor as they are stored: those of `packed`, intN codes and zero points packed to bits."""
    from compress.codecs.factors import join, split
    from compress.codecs.packing import pack_bits

    info = codec_info(packed.codec)
    if info.kind == "factors":
        dictionary, coefficients = (stored_parts(f) for f in split(packed.codec, packed.shape, packed.parts))
        return dict(join(packed.codec, packed.shape, dictionary, coefficients).parts)
    parts = {part: tensor.detach().cpu() for part, tensor in packed.parts.items()}
    if info.kind != "uniform":
        return parts
    zeros = parts.pop("zeros")
    if not info.symmetric:
        parts["zeros"] = pack_bits(zeros, info.bits)
    return {**parts, "codes": pack_bits(parts["codes"], info.bits)}


def packed_of(codec: str, shape: tuple[int, ...], parts: Mapping[str, Tensor]) -> Packed:
    """The inverse of `stored_parts`."""
    import torch

    from compress.codecs.factors import join, split
    from compress.codecs.packing import unpack_bits
    from compress.weights import Packed

    info = codec_info(codec)
    if info.kind == "factors":
        factors = (packed_of(f.codec, f.shape, f.parts) for f in split(codec, shape, parts))
        return join(codec, shape, *(factor.parts for factor in factors))
    if info.kind != "uniform":
        return Packed(codec, shape, dict(parts))
    groups = parts["scales"].shape[1]
    if info.symmetric:
        zeros = torch.full_like(parts["scales"], 2 ** (info.bits - 1), dtype=torch.uint8)
    else:
        zeros = unpack_bits(parts["zeros"], info.bits, groups)
    return Packed(codec, shape, {**parts, "codes": unpack_bits(parts["codes"], info.bits, shape[1]), "zeros": zeros})


def _encode(packed: Packed, tensor: TensorSpec, codec: str) -> dict[str, Tensor]:
    """Tensors of the file for one tensor of the checkpoint."""
    if packed.codec != codec or tuple(packed.shape) != tensor.shape:
        raise OutputError(
            f"{tensor.name} arrived as {packed.codec} {tuple(packed.shape)}, planned as {codec} {tensor.shape}"
        )
    if codec_info(codec).kind == "float":
        return {tensor.name: packed.parts["values"]}
    return {f"{module_name(tensor.name)}.{part}": values for part, values in stored_parts(packed).items()}


class _Layouts:
    """What a tensor takes in the file, learnt from the first of its codec and shape: containers do not know codecs."""

    def __init__(self, fetch: Callable[[str], Packed]):
        self._fetch = fetch
        self._known: dict[tuple[Any, ...], list[Slot]] = {}

    def slots(self, planned: PlannedTensor) -> list[Slot]:
        tensor, info = planned.spec, codec_info(planned.codec)
        if info.kind == "float":
            return [Slot(tensor.name, info.name.upper(), tensor.shape)]
        key = (info.name, tensor.shape, planned.incoherence, planned.kept, planned.factors)
        if key not in self._known:
            parts = stored_parts(self._fetch(tensor.name))
            self._known[key] = [Slot(p, _DTYPES[str(v.dtype)[6:]], tuple(v.shape)) for p, v in parts.items()]
        return [Slot(f"{module_name(tensor.name)}.{s.name}", s.dtype, s.shape) for s in self._known[key]]

    def parts(self) -> dict[str, list[str]]:
        """Names of the parts by codec, without the signs of incoherence."""
        names = {key[0]: [slot.name for slot in slots if slot.name not in SIGNS] for key, slots in self._known.items()}
        return dict(sorted(names.items()))


def write(request: WriteRequest) -> list[Path]:
    """Write the folder and return its weight files in order.

    Coded tensors keep the very codes of `fetch`, floats are stored as planned; the first tensor of every codec and
    shape is fetched twice. OutputError for a plan the runtime cannot run, a full disk, or a folder that holds something
    else.
    """
    spec, tensors = request.spec, request.tensors
    check_plan(spec, tensors)
    by_name = {planned.spec.name: planned for planned in tensors}
    layouts = _Layouts(request.fetch)

    def produce(name: str) -> dict[str, Tensor]:
        return _encode(request.fetch(name), by_name[name].spec, by_name[name].codec)

    sources = [(planned.spec.name, layouts.slots(planned)) for planned in tensors]
    modules = {
        name: None if setting is None else asdict(setting) for name, setting in quantization_rules(tensors).items()
    }
    quantization = {"quant_method": METHOD, "format": FORMAT, "parts": layouts.parts(), "modules": modules}
    dtype = FLOATS[request.options.dtype][1]
    settings = {"dtype": dtype, "quantization_config": quantization, **_refusal.SETTINGS}
    return write_checkpoint(request, sources, produce, settings, {_refusal.FILE: _refusal.SOURCE})


def open_dense(path: Files, spec: ModelSpec) -> Callable[[str], Tensor]:
    """A function that decodes one tensor of such a folder by its checkpoint name to float32.

    CheckpointError for a missing tensor, or a folder of a newer format.
    """
    from compress.decode import decode
    from compress.models.checkpoint import Checkpoint

    folder = folder_of(path)
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.quantization
    rules, parts_of = read_rules(config), config.get("parts") or {}
    shapes = {tensor.name: tensor.shape for tensor in spec.tensors()}

    def load(name: str) -> Tensor:
        if name in checkpoint:
            return checkpoint.load(name).float()
        module = module_name(name)
        setting = setting_of(rules, module)
        if setting is None:
            raise CheckpointError(f"{folder} has no tensor {name}")
        parts = {part: checkpoint.load(f"{module}.{part}") for part in part_names(parts_of, setting)}
        return decode(packed_of(setting.codec, shapes[name], parts))

    return load


def part_names(parts: Mapping[str, Sequence[str]], setting: Setting) -> tuple[str, ...]:
    """Parts of a module. parts: those of `quantization_config`."""
    return (*parts[setting.codec], *(SIGNS if setting.incoherence else ()))


# -- what is said about it ---------------------------------------------------------------------------------------------
def _shrunk(tensors: Counted) -> str:
    """How the runtime computes with masks and factors."""
    if any(t.factors is not None for t, _ in tensors):
        dense = sum(count * t.spec.parameters for t, count in tensors)
        used = sum(count * ((t.factors or (0, 0))[0] * t.spec.shape[1] + (t.kept or 0)) for t, count in tensors)
        return f"two products instead of one, {used / dense:.0%} of the multiplications"
    return "masks and values stay packed, rows are expanded a MiB at a time; no faster than dense"


CONTAINER = Container(
    name="compress",
    rank=6,
    usual="quip-2bit",
    engines="transformers after `import compress`",
    kinds=frozenset(KIND_NAMES),  # every codec as it is
    incoherence=True,
    activations=True,
    mask_row_bytes=8,  # where the values of a row begin
    shrunk=_shrunk,
    quant_method=METHOD,
    engine=TRANSFORMERS,
    hosts=(WHOLE,),
    library="transformers",
    uses=(OWN, CHAT),
    tensor_bytes=tensor_bytes,
    entry_bytes=entry_bytes,
    check_plan=check_plan,
    write=write,
    open_dense=open_dense,
)
