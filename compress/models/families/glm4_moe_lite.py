"""GLM-4.7-Flash: latent attention and routing of DeepSeek-V3, one dense layer in front."""

from __future__ import annotations

from dataclasses import replace

from compress.models.config import Chosen, Eps, Experts, Layers, Positive, Shared, Width
from compress.models.families.deepseek_v2 import CHANNELS, HEADS, LatentConfig, feed_forward, mixer
from compress.models.families.deepseek_v3 import GGUF, MODULE, router
from compress.models.grouped import Listed
from compress.models.spec import Block, Family


class Glm4MoeLiteConfig(Listed, LatentConfig):
    rms_norm_eps: Eps = 1e-5
    q_lora_rank: Width | None = 768
    qk_nope_head_dim: Width = 192
    v_head_dim: Width = 256
    n_routed_experts: Experts = 64
    num_experts_per_tok: Chosen = 4
    n_shared_experts: Shared = 1
    moe_intermediate_size: Width = 1536
    first_k_dense_replace: Layers = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 1.8


def block(c: Glm4MoeLiteConfig, layer: int) -> Block:
    return mixer(c, MODULE), feed_forward(c, layer, router(c))


FAMILY = Family(
    model_types=("glm4_moe_lite",),
    hf_architecture="Glm4MoeLiteForCausalLM",
    config=Glm4MoeLiteConfig,
    gguf=replace(GGUF, claims=lambda m: False),  # a file of it reads as DeepSeek-V3, which it computes
    block=block,
    fixed_heads=HEADS,
    fixed_channels=CHANNELS,
)
