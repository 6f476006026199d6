"""Mistral: Llama whose layers may all attend through a sliding window."""

from __future__ import annotations

from compress.models.config import Config
from compress.models.layers.compose import attention, mlp
from compress.models.spec import Block, Family, Gguf


def block(c: Config, layer: int) -> Block:
    return attention(c, window=c.window(layer), paired=True), mlp(c)


FAMILY = Family(
    model_types=("mistral",),
    hf_architecture="MistralForCausalLM",
    gguf=Gguf("llama", normalises=True, biases=None, llama3=True, expert_width=False),
    block=block,
    slides=True,
    defaults={"sliding_window": 4096},
)
