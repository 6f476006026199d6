"""Mistral: Llama whose layers may all attend through a sliding window."""

from compress.models.spec import Family

FAMILY = Family(
    model_types=("mistral",),
    hf_architecture="MistralForCausalLM",
    gguf_arch="llama",
    sliding_window=True,
    defaults={"sliding_window": 4096},
)
