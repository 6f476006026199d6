"""Llama 2 and 3."""

from compress.models.spec import Family

FAMILY = Family(
    model_types=("llama",),
    hf_architecture="LlamaForCausalLM",
    gguf_arch="llama",
    attention_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
)
