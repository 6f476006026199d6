"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from compress.models.config import EvenHeads, Windows
from compress.models.layers.compose import attention, mlp
from compress.models.spec import Block, Family, Gguf


class Qwen2Config(Windows, EvenHeads):
    use_sliding_window: bool = False


def block(c: Qwen2Config, layer: int) -> Block:
    return attention(c, bias=True, window=c.window(layer, "late")), mlp(c)


FAMILY = Family(
    model_types=("qwen2",),
    hf_architecture="Qwen2ForCausalLM",
    config=Qwen2Config,
    gguf=Gguf("qwen2", heads_fill_width=True, biases=("attn_q", "attn_k", "attn_v")),
    block=block,
)
