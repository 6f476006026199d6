"""Llama 2/3 and Mistral."""

from compress.models.base import Family

FAMILY = Family(
    model_types=("llama", "mistral"),
    hf_architecture="LlamaForCausalLM",
    gguf_arch="llama",
    attention_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    sliding_window=True,
)
