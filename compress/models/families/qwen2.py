"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from compress.models.spec import Family

FAMILY = Family(
    model_types=("qwen2",),
    hf_architecture="Qwen2ForCausalLM",
    gguf_arch="qwen2",
    attention_bias=True,
    sliding_window=True,
    window_rule="late",
    defaults={"use_sliding_window": False},
)
