"""Qwen1.5/2-MoE: routed experts beside one shared expert behind a sigmoid gate."""

from compress.models.spec import Family, MoeNames

FAMILY = Family(
    model_types=("qwen2_moe",),
    hf_architecture="Qwen2MoeForCausalLM",
    gguf_arch="qwen2moe",
    attention_bias="qkv_bias",
    moe=MoeNames(
        router="mlp.gate.weight",
        expert="mlp.experts.{e}.",
        shared="mlp.shared_expert.",
        shared_router="mlp.shared_expert_gate.weight",
    ),
    normalises_top_k="norm_topk_prob",
    sliding_window=True,
    window_rule="even",
    defaults={
        "use_sliding_window": False,
        "qkv_bias": True,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
)
