"""AFMoE (Arcee Trinity): gated attention with positions where it slides, norms on both sides, sigmoid routing, shared experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from compress.limits import LAYERS
from compress.models.config import (
    Channels,
    Chosen,
    Eps,
    Experts,
    Layers,
    Positions,
    Positive,
    Routed,
    Width,
    Windows,
)  # fmt: skip
from compress.models.families.deepseek_v2 import CHANNELS
from compress.models.families.hy_v3 import router
from compress.models.layers.compose import attention, mlp, moe
from compress.models.layers.moe import SharedExpert
from compress.models.spec import Block, Ends, Family, Gguf

PERIOD = 4
"""llama.cpp lets every so manieth layer attend in full, and leaves positions out there."""


class AfmoeConfig(Routed, Windows):
    head_dim: Width = 128
    attention_bias: bool = False
    rms_norm_eps: Eps = 1e-5
    max_position_embeddings: Positions = 16384
    sliding_window: Channels | None = 1024
    global_attn_every_n_layers: Annotated[int, Field(ge=1, le=LAYERS)] = PERIOD
    mup_enabled: bool = False
    num_dense_layers: Layers = 1
    num_experts: Experts = 64
    num_experts_per_tok: Chosen = 6
    num_shared_experts: Chosen = 2
    moe_intermediate_size: Width = 1408
    route_scale: Positive = 1.0

    GGUF: ClassVar[Mapping[str, str]] = {
        "num_experts": "expert_count",
        "num_shared_experts": "expert_shared_count",
        "num_dense_layers": "leading_dense_block_count",
        "route_scale": "expert_weights_scale",
        "sliding_window": "attention.sliding_window",
    }

    def slides(self, layer: int) -> bool:
        """Whether a layer attends through the window, and has positions."""
        if self.layer_types is not None:
            return self.layer_types[layer] == "sliding_attention"
        return (layer + 1) % self.global_attn_every_n_layers != 0

    def window(self, layer: int, rule: Literal["all", "late", "even"] = "all") -> int | None:
        return self.widest() if self.slides(layer) else None

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if not self.experts and self.num_dense_layers < self.layers:
            yield f"num_experts: missing, and only {self.num_dense_layers} of {self.layers} layers are dense"


def block(c: AfmoeConfig, layer: int) -> Block:
    bias = c.attention_bias
    mixer = attention(
        c,
        qk_norm="head",
        bias=bias,
        output_bias=bias,
        rope=c.rope() if c.slides(layer) else None,
        window=c.window(layer),
        gating="gate_proj",
        post="post_attention_layernorm",
        post_gguf="post_attention_norm",
    )
    norms: dict[str, Any] = {
        "norm": ("pre_mlp_layernorm", "ffn_norm"), "post": "post_mlp_layernorm", "post_gguf": "post_ffw_norm",
    }  # fmt: skip
    if layer < c.num_dense_layers:
        return mixer, mlp(c, **norms)
    shared = SharedExpert("mlp.shared_experts.", c.num_shared_experts * c.expert_width)
    return mixer, moe(c, router=router(c.num_experts_per_tok, c.route_scale), shared=shared, **norms)


def gguf_keys(c: AfmoeConfig) -> Mapping[str, Any]:
    """How experts are chosen, and which layers slide."""
    return {
        "leading_dense_block_count": min(c.num_dense_layers, c.layers),
        "expert_shared_count": c.num_shared_experts,
        "expert_weights_scale": float(c.route_scale),
        "expert_weights_norm": True,
        "expert_gating_func": 2,
        "attention.sliding_window_pattern": PERIOD,
    }


def gguf_problems(c: AfmoeConfig) -> list[str]:
    """What llama.cpp's afmoe computes otherwise."""
    problems = []
    if not c.mup_enabled:
        problems.append(
            "llama.cpp's afmoe multiplies embeddings by the root of their width; this model (mup_enabled) does not"
        )
    if not c.widest() or any(c.slides(layer) != ((layer + 1) % PERIOD != 0) for layer in range(c.layers)):
        problems.append(f"llama.cpp's afmoe wants a sliding window in all layers but every {PERIOD}th")
    return problems


FAMILY = Family(
    model_types=("afmoe",),
    hf_architecture="AfmoeForCausalLM",
    config=AfmoeConfig,
    gguf=Gguf(
        "afmoe",
        normalises=True,
        windows=True,
        biases=("exp_probs_b",),
        keys=gguf_keys,
        problems=gguf_problems,
        read=lambda metadata: {"mup_enabled": True},
    ),
    ends=lambda c: Ends(scale=c.hidden**0.5 if c.mup_enabled else 1.0),
    block=block,
    fixed_channels=CHANNELS,
    example={"mup_enabled": True},
)
