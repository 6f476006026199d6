"""DeepSeek-V3 and R1: latent attention, dense first layers, sigmoid routing by groups with a correction, shared experts."""

from __future__ import annotations

from compress.models.config import Config
from compress.models.families.deepseek_v2 import CHANNELS, HEADS, feed_forward, gguf_keys, gguf_problems, mixer
from compress.models.layers.moe import Router
from compress.models.spec import Block, Family, Gguf

MODULE = "transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3{}"


def block(c: Config, layer: int) -> Block:
    router = Router(
        "mlp.gate.weight",
        c.need("num_experts_per_tok"),
        score="sigmoid",
        normalised=bool(c.get("norm_topk_prob")),
        scale=float(c.get("routed_scaling_factor")),
        correction="mlp.gate.e_score_correction_bias",
        groups=c.get("n_group") or 1,
        top_groups=c.get("topk_group") or 1,
        group_score="top2",
    )
    return mixer(c, MODULE), feed_forward(c, layer, router)


FAMILY = Family(
    model_types=("deepseek_v3",),
    hf_architecture="DeepseekV3ForCausalLM",
    gguf=Gguf("deepseek2", biases=("exp_probs_b",), keys=lambda c: gguf_keys(c, sigmoid=True), problems=gguf_problems),
    block=block,
    fixed_heads=HEADS,
    fixed_channels=CHANNELS,
    experts_key=("n_routed_experts", "num_experts", "num_local_experts"),
    defaults={
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "n_group": 8,
        "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "kv_lora_rank": 512, "q_lora_rank": 1536, "moe_intermediate_size": 2048,
    },
)  # fmt: skip
