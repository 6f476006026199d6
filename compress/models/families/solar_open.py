"""Solar Open: GLM-4.5 without dense layers, positions on whole heads."""

from __future__ import annotations

from dataclasses import replace

from compress.models.config import Channels, Chosen, Eps, Experts, Positive, Share, Shared, Width
from compress.models.families.deepseek_v2 import CHANNELS, feed_forward
from compress.models.families.deepseek_v3 import router
from compress.models.families.glm4_moe import FAMILY as GLM
from compress.models.grouped import Grouped
from compress.models.layers.compose import attention
from compress.models.spec import Block, Family


class SolarOpenConfig(Grouped):
    intermediate_size: Channels = 0  # no layer is dense
    head_dim: Width = 128
    rms_norm_eps: Eps = 1e-5
    rope_theta: Positive = 1e6
    partial_rotary_factor: Share = 1.0
    attention_bias: bool = False
    n_routed_experts: Experts = 128
    num_experts_per_tok: Chosen = 8
    n_shared_experts: Shared = 1
    moe_intermediate_size: Width = 1280
    norm_topk_prob: bool = True

    def is_sparse(self, layer: int) -> bool:
        return bool(self.experts)


def block(c: SolarOpenConfig, layer: int) -> Block:
    mixer = attention(c, rope=c.rope(int(c.head_width * c.turning_share)), bias=c.attention_bias)
    return mixer, feed_forward(c, layer, router(c), norm=("post_attention_layernorm", "post_attention_norm"))


FAMILY = Family(
    model_types=("solar_open",),
    hf_architecture="SolarOpenForCausalLM",
    config=SolarOpenConfig,
    gguf=replace(GLM.gguf, claims=lambda m: False),  # a file of it reads as GLM-4.5, which it computes
    block=block,
    fixed_channels=CHANNELS,
)
