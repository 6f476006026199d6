"""Qwen3.5 and 3.6, mixtures of experts: as Qwen3-Next, with separate projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.models.config import Chosen, Experts
from compress.models.families.qwen3_next import (
    BIASES,
    HEADS,
    DeltaConfig,
    DeltaMoeConfig,
    draft,
    experts,
    gguf_problems,
    mixer,
)
from compress.models.families.qwen3_next import gguf_keys as next_keys
from compress.models.families.qwen3_next import read_gguf as next_read
from compress.models.gguf.keys import Metadata
from compress.models.spec import Block, Family, Gguf

MODULE = "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeGatedDeltaNet"


class Qwen35MoeConfig(DeltaMoeConfig):
    num_experts: Experts = 256
    num_experts_per_tok: Chosen = 8


def block(c: Qwen35MoeConfig, layer: int) -> Block:
    return mixer(c, layer, MODULE), experts(c)


def gguf_keys(c: DeltaConfig) -> Mapping[str, Any]:
    """As Qwen3-Next's, and the sections of multimodal positions, which do not matter for text."""
    sections = [*(c.parameter("mrope_section") or (11, 11, 10)), 0]
    return {**next_keys(c), "rope.dimension_sections": tuple(sections[:4])}


def read_gguf(m: Metadata) -> dict[str, Any]:
    """As Qwen3-Next's, and the sections."""
    said, sections = next_read(m), m.fields.get(f"{m.arch}.rope.dimension_sections")
    if not isinstance(sections, list):
        return said
    rope = {"rope_type": "default", "rope_theta": m.get("rope.freq_base"), "mrope_section": sections[:3]}
    return {**said, "rope_parameters": {**rope, "partial_rotary_factor": said["partial_rotary_factor"]}}


FAMILY = Family(
    model_types=("qwen3_5_moe_text",),
    hf_architecture="Qwen3_5MoeForCausalLM",
    config=Qwen35MoeConfig,
    gguf=Gguf(
        "qwen35moe",
        normalises=True,
        dense_layers=False,
        biases=BIASES,
        keys=gguf_keys,
        problems=gguf_problems,
        read=read_gguf,
    ),
    block=block,
    draft=lambda c: draft(c, experts(c)),
    final_shift=1.0,
    fixed_heads=HEADS,
)
