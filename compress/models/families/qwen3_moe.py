"""Qwen3-MoE: routed experts only, per-head RMSNorm on queries and keys."""

from compress.models.spec import Family, MoeNames

FAMILY = Family(
    model_types=("qwen3_moe",),
    hf_architecture="Qwen3MoeForCausalLM",
    gguf_arch="qwen3moe",
    qk_norm=True,
    attention_bias="attention_bias",
    output_bias="attention_bias",
    moe=MoeNames(router="mlp.gate.weight", expert="mlp.experts.{e}."),
    normalises_top_k="norm_topk_prob",
    sliding_window=True,
    defaults={"use_sliding_window": False, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
)
