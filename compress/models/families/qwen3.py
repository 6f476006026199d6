"""Qwen3: per-head RMSNorm on queries and keys."""

from compress.models.spec import Family

FAMILY = Family(
    model_types=("qwen3",),
    hf_architecture="Qwen3ForCausalLM",
    gguf_arch="qwen3",
    qk_norm=True,
    attention_bias="attention_bias",
    output_bias="attention_bias",
    sliding_window=True,
    window_rule="late",
    defaults={"use_sliding_window": False, "head_dim": 128},
)
