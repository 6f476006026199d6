"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from compress.models.config import Config
from compress.models.layers.compose import attention, mlp
from compress.models.spec import Block, Family, Gguf


def block(c: Config, layer: int) -> Block:
    return attention(c, bias=True, window=c.window(layer, "late")), mlp(c)


FAMILY = Family(
    model_types=("qwen2",),
    hf_architecture="Qwen2ForCausalLM",
    gguf=Gguf("qwen2", heads_fill_width=True, biases=("attn_q", "attn_k", "attn_v")),
    block=block,
    slides=True,
    defaults={"use_sliding_window": False},
)
