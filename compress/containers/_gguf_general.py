"""GGUF's `general.*` metadata: what the file is, of which model, under which licence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.containers.base import PlannedTensor, WriteRequest

if TYPE_CHECKING:
    import gguf

# codec with the most bytes -> general.file_type, which engines only show
FILE_TYPES = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q4_0": "MOSTLY_Q4_0", "q4_1": "MOSTLY_Q4_1",
    "q5_0": "MOSTLY_Q5_0", "q5_1": "MOSTLY_Q5_1", "q8_0": "MOSTLY_Q8_0", "q2_k": "MOSTLY_Q2_K", "q3_k": "MOSTLY_Q3_K_M",
    "q4_k": "MOSTLY_Q4_K_M", "q5_k": "MOSTLY_Q5_K_M", "q6_k": "MOSTLY_Q6_K", "iq2_xxs": "MOSTLY_IQ2_XXS",
    "iq2_xs": "MOSTLY_IQ2_XS", "iq2_s": "MOSTLY_IQ2_S", "iq3_xxs": "MOSTLY_IQ3_XXS", "iq3_s": "MOSTLY_IQ3_S",
    "iq4_nl": "MOSTLY_IQ4_NL", "iq4_xs": "MOSTLY_IQ4_XS", "iq1_s": "MOSTLY_IQ1_S", "iq1_m": "MOSTLY_IQ1_M",
    "tq1_0": "MOSTLY_TQ1_0", "tq2_0": "MOSTLY_TQ2_0", "mxfp4": "MOSTLY_MXFP4_MOE",
}  # fmt: skip
_HUB = "https://huggingface.co"


def add_general(writer: gguf.GGUFWriter, request: WriteRequest) -> None:
    """Name, origin and licence of the model, size and kind of file."""
    import gguf

    identity, experts = request.identity, request.spec.experts
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(identity.name)
    parameters = sum(planned.spec.parameters for planned in request.tensors)
    writer.add_size_label(f"{experts}x{_count(parameters // experts)}" if experts else _count(parameters))
    if identity.owner:
        writer.add_organization(identity.owner)
    for add, text in (
        (writer.add_license, identity.license),
        (writer.add_license_name, identity.license_name),
        (writer.add_license_link, identity.license_link),
    ):
        if text:
            add(text)
    if identity.tags:
        writer.add_tags(identity.tags)
    if identity.languages:
        writer.add_languages(identity.languages)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, identity.name)
    if identity.owner:
        writer.add_base_model_organization(0, identity.owner)
        writer.add_base_model_repo_url(0, f"{_HUB}/{identity.id}")
    if identity.commit:
        writer.add_base_model_version(0, identity.commit)
    writer.add_file_type(gguf.LlamaFileType[_file_type(request.tensors, request.options.scheme)])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _file_type(tensors: Sequence[PlannedTensor], scheme: str | None) -> str:
    """llama.cpp's name of the mixture: the scheme's own, or the codec most matrices were meant to get."""
    import gguf

    if scheme is not None and (name := f"MOSTLY_{scheme}") in gguf.LlamaFileType.__members__:
        return name
    sizes: dict[str, int] = {}
    for planned in tensors:
        if len(planned.spec.shape) > 1:
            codec = planned.wanted or planned.codec
            sizes[codec] = sizes.get(codec, 0) + math.prod(planned.spec.shape)
    most = max(sizes, key=lambda codec: sizes[codec]) if sizes else "f32"
    return FILE_TYPES.get(most, "GUESSED")


def _count(parameters: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit}"
    return str(parameters)
