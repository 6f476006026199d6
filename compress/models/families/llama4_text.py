"""Llama 4, its language model: chunked attention beside full attention without positions, experts that scale their input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from compress.limits import LAYERS, POSITIONS
from compress.models.config import (
    Channels,
    Chosen,
    Eps,
    Experts,
    Layers,
    Positions,
    Positive,
    Routed,
    Scale,
    Width,
    one_a_layer,
)
from compress.models.gguf.keys import Metadata
from compress.models.layers.attention import Temperature
from compress.models.layers.compose import attention, mlp, moe
from compress.models.layers.mlp import Fused
from compress.models.layers.moe import Router, SharedExpert
from compress.models.spec import Block, Family, Gguf

PREFIX = "feed_forward."
STACKED = Fused(f"{PREFIX}experts.gate_up_proj", f"{PREFIX}experts.down_proj", transposed=True, only=True)
CHUNK, EVERY, FLOOR, GROWTH = 8192, 4, 8192, 0.1
"""llama.cpp's chunks, its layers without positions, and by what the queries of those grow."""
UNNORMED = 128
"""llama.cpp takes models of so many experts for Maverick, whose queries and keys are not normed."""
Every = Annotated[int, Field(ge=1, le=LAYERS)]


class Llama4TextConfig(Routed):
    intermediate_size: Width = 8192
    intermediate_size_mlp: Width = 16384
    head_dim: Width = 128
    attention_bias: bool = False
    num_local_experts: Experts = 16
    num_experts_per_tok: Chosen = 1
    rms_norm_eps: Eps = 1e-5
    rope_theta: Positive = 500000.0
    max_position_embeddings: Positions = 131072
    moe_layers: list[Layers] | None = None
    interleave_moe_layer_step: Every = 1
    use_qk_norm: bool = True
    no_rope_layers: list[Literal[0, 1]] | None = None
    no_rope_layer_interval: Every = 4
    attention_chunk_size: Channels | None = 8192
    layer_types: list[Literal["chunked_attention", "full_attention"]] | None = None
    attn_temperature_tuning: bool | int = True
    floor_scale: Annotated[int, Field(ge=1, le=POSITIONS)] = 8192
    attn_scale: Scale = 0.1

    GGUF: ClassVar[Mapping[str, str]] = {
        "num_local_experts": "expert_count",
        "intermediate_size": "expert_feed_forward_length",
        "intermediate_size_mlp": "feed_forward_length",
        "moe_intermediate_size": "",
        "interleave_moe_layer_step": "interleave_moe_layer_step",
    }

    @property
    def expert_width(self) -> int:
        return self.intermediate_size

    @property
    def turns(self) -> tuple[bool, ...]:
        """Which layers have rotary positions."""
        if self.no_rope_layers:
            return tuple(map(bool, self.no_rope_layers))
        return tuple((layer + 1) % self.no_rope_layer_interval != 0 for layer in range(self.layers))

    @property
    def chunks(self) -> tuple[int | None, ...]:
        """Tokens that see each other, a layer; None for all."""
        kinds = self.layer_types or ["chunked_attention" if turns else "full_attention" for turns in self.turns]
        return tuple((self.attention_chunk_size or None) if kind == "chunked_attention" else None for kind in kinds)

    def is_sparse(self, layer: int) -> bool:
        if self.moe_layers is not None:
            return layer in self.moe_layers
        return (layer + 1) % self.interleave_moe_layer_step == 0

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        yield from one_a_layer(self.layer_types, self.layers)
        if self.no_rope_layers and len(self.no_rope_layers) < self.layers:
            yield f"no_rope_layers: a list of {len(self.no_rope_layers)} for the {self.layers} layers of num_hidden_layers"


def block(c: Llama4TextConfig, layer: int) -> Block:
    turns, bias = c.turns[layer], c.attention_bias
    grows = bool(c.attn_temperature_tuning) and not turns
    mixer = attention(
        c,
        bias=bias,
        output_bias=bias,
        rope=c.rope() if turns else None,
        interleaved=True,
        qk_norm="bare" if c.use_qk_norm and turns else "",
        norm_after_rope=True,
        chunk=c.chunks[layer],
        temperature=Temperature(c.attn_scale, c.floor_scale, 1) if grows else None,
    )
    if not c.is_sparse(layer):
        return mixer, mlp(c, c.intermediate_size_mlp, prefix=PREFIX)
    router = Router(f"{PREFIX}router.weight", c.num_experts_per_tok, "sigmoid", normalised=False, at_input=True)
    shared = SharedExpert(f"{PREFIX}shared_expert.", c.intermediate_size)
    return mixer, moe(c, prefix=PREFIX, router=router, shared=shared, fused=STACKED)


def gguf_keys(c: Llama4TextConfig) -> Mapping[str, Any]:
    """Which layers have experts, and the width of the others."""
    return {
        "interleave_moe_layer_step": c.interleave_moe_layer_step,
        "feed_forward_length": c.intermediate_size_mlp,
        "expert_shared_feed_forward_length": None,
    }


def gguf_problems(c: Llama4TextConfig) -> list[str]:
    """What llama.cpp's llama4 computes otherwise."""
    problems, layers = [], range(c.layers)
    if c.layers < EVERY:
        problems.append(f"llama.cpp's llama4 wants a layer without positions, the {EVERY}th; this model has {c.layers}")
    if any(c.is_sparse(layer) != ((layer + 1) % c.interleave_moe_layer_step == 0) for layer in layers):
        problems.append("llama.cpp's llama4 has experts in every so manieth layer; moe_layers says something else")
    if any(c.turns[layer] != ((layer + 1) % EVERY != 0) for layer in layers):
        problems.append(f"llama.cpp's llama4 leaves positions out in every {EVERY}th layer")
    if any(c.chunks[layer] != (CHUNK if c.turns[layer] else None) for layer in layers):
        problems.append(f"llama.cpp's llama4 attends within chunks of {CHUNK} tokens in the layers with positions")
    if not c.attn_temperature_tuning or (c.floor_scale, c.attn_scale) != (FLOOR, GROWTH):
        problems.append(f"llama.cpp's llama4 lets queries grow every {FLOOR} tokens by {GROWTH:g}")
    if c.use_qk_norm == (c.experts == UNNORMED):
        problems.append(f"llama.cpp's llama4 norms queries and keys but in models of {UNNORMED} experts")
    return problems


def read_gguf(m: Metadata) -> dict[str, Any]:
    """Whether queries and keys are normed, which the number of experts tells."""
    return {"use_qk_norm": m.number("expert_count") != UNNORMED}


FAMILY = Family(
    model_types=("llama4_text",),
    hf_architecture="Llama4ForCausalLM",
    config=Llama4TextConfig,
    gguf=Gguf(
        "llama4", normalises=False, windows=True, llama3=True, keys=gguf_keys, problems=gguf_problems, read=read_gguf
    ),
    block=block,
    fixed_channels="dense layers have a width of their own, which config.json calls by another name",
)
