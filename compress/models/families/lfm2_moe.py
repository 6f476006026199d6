"""LFM2 and 2.5, mixtures of experts: as LFM2, with dense first layers and sigmoid routing with a correction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from compress.models.config import Chosen, Experts, Layers, Positive, Routed, Width
from compress.models.families.lfm2 import (
    FEED_FORWARD,
    HEADS,
    LEAVES,
    NAMES,
    ConvConfig,
    dense,
    gguf_keys,
    mixer,
    read_gguf,
)
from compress.models.layers.base import Sublayer
from compress.models.layers.compose import moe
from compress.models.layers.mlp import Fused
from compress.models.layers.moe import Router
from compress.models.spec import Block, Family, Gguf


class Lfm2MoeConfig(ConvConfig, Routed):
    num_experts: Experts = 32
    num_experts_per_tok: Chosen = 4
    moe_intermediate_size: Width = 1792
    num_dense_layers: Layers = 2
    norm_topk_prob: bool = True
    use_expert_bias: bool = True
    routed_scaling_factor: Positive = 1.0

    GGUF: ClassVar[Mapping[str, str]] = {
        "num_experts": "expert_count",
        "num_dense_layers": "leading_dense_block_count",
    }
    GGUF_HAS: ClassVar[Mapping[str, str]] = {"use_expert_bias": "exp_probs_b.bias"}

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if not self.experts and self.num_dense_layers < self.layers:
            yield f"num_experts: missing, and only {self.num_dense_layers} of {self.layers} layers are dense"
        if self.layer_types is None:
            yield "layer_types: missing; transformers does not know which layers are convolutions"


def experts(c: Lfm2MoeConfig) -> Sublayer:
    """Routed experts. transformers adds 1e-6 to the sum that it divides routing weights by, of scores about a half."""
    router = Router(
        "feed_forward.gate.weight",
        c.num_experts_per_tok,
        score="sigmoid",
        normalised=c.norm_topk_prob,
        scale=float(c.routed_scaling_factor),
        correction="feed_forward.expert_bias" if c.use_expert_bias else None,
    )
    fused = Fused("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")
    return moe(c, prefix="feed_forward.", norm=FEED_FORWARD, router=router, leaves=LEAVES, fused=fused)


def block(c: Lfm2MoeConfig, layer: int) -> Block:
    return mixer(c, layer), dense(c) if layer < c.num_dense_layers else experts(c)


def moe_keys(c: Lfm2MoeConfig) -> Mapping[str, Any]:
    """Sigmoid routing behind the dense layers."""
    return {**gguf_keys(c), "leading_dense_block_count": c.num_dense_layers, "expert_gating_func": 2}


def moe_problems(c: Lfm2MoeConfig) -> list[str]:
    """What llama.cpp's routing of LFM2 has no word for."""
    problems = []
    if c.routed_scaling_factor != 1:
        problems.append("llama.cpp's lfm2moe does not scale routing weights; this model does")
    if not c.use_expert_bias:
        problems.append("llama.cpp's lfm2moe wants a correction for the choice of experts; this model has none")
    return problems


FAMILY = Family(
    model_types=("lfm2_moe",),
    hf_architecture="Lfm2MoeForCausalLM",
    config=Lfm2MoeConfig,
    names=NAMES,
    gguf=Gguf(
        "lfm2moe",
        normalises=True,
        heads_fill_width=True,
        biases=("exp_probs_b",),
        keys=moe_keys,
        problems=moe_problems,
        read=read_gguf,
    ),
    block=block,
    fixed_heads=HEADS,
    example={"layer_types": ["conv", "conv", "full_attention"] * 4},
)
