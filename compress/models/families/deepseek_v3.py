"""DeepSeek-V3 and R1, Kimi-K2: latent attention, dense first layers, sigmoid routing by groups with a correction, shared experts."""

from __future__ import annotations

from compress.models.config import Chosen, Experts, Layers, Positive, Shared, Width
from compress.models.families.deepseek_v2 import (
    CHANNELS,
    HEADS,
    LatentConfig,
    feed_forward,
    gguf_keys,
    gguf_problems,
    is_sigmoid,
    mixer,
    read_gguf,
)
from compress.models.grouped import Groups, Ranked
from compress.models.layers.moe import Router
from compress.models.spec import Block, Family, Gguf

MODULE = "transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3{}"


class DeepseekV3Config(LatentConfig):
    n_routed_experts: Experts = 256
    n_shared_experts: Shared = 1
    num_experts_per_tok: Chosen = 8
    first_k_dense_replace: Layers = 3
    n_group: Groups = 8
    topk_group: Groups = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 2.5
    q_lora_rank: Width | None = 1536
    moe_intermediate_size: Width = 2048


def router(c: Ranked, prefix: str = "mlp.") -> Router:
    """Sigmoid scores, a correction for the choice alone, the best groups by their two best. prefix: of the tensors."""
    return Router(
        f"{prefix}gate.weight",
        c.num_experts_per_tok,
        score="sigmoid",
        normalised=c.norm_topk_prob,
        scale=float(c.routed_scaling_factor),
        correction=f"{prefix}gate.e_score_correction_bias",
        groups=c.n_group,
        top_groups=c.topk_group,
        group_score="top2",
    )


def block(c: DeepseekV3Config, layer: int) -> Block:
    return mixer(c, MODULE), feed_forward(c, layer, router(c), bias=c.mlp_bias)


GGUF = Gguf(
    "deepseek2",
    biases=("exp_probs_b",),
    keys=lambda c: gguf_keys(c, sigmoid=True),
    problems=gguf_problems,
    claims=is_sigmoid,
    read=lambda m: {**read_gguf(m), "norm_topk_prob": bool(m.get("expert_weights_norm"))},
)
FAMILY = Family(
    model_types=("deepseek_v3",),
    hf_architecture="DeepseekV3ForCausalLM",
    config=DeepseekV3Config,
    gguf=GGUF,
    block=block,
    fixed_heads=HEADS,
    fixed_channels=CHANNELS,
    also=("kimi_k2",),
)
