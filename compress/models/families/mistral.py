"""Mistral: Llama whose layers may all attend through a sliding window."""

from __future__ import annotations

from compress.models.config import Channels, EvenHeads, Windows
from compress.models.families.llama import is_mistral
from compress.models.layers.compose import attention, mlp
from compress.models.spec import Block, Family, Gguf


class MistralConfig(Windows, EvenHeads):
    sliding_window: Channels | None = 4096


def block(c: MistralConfig, layer: int) -> Block:
    return attention(c, window=c.window(layer), paired=True), mlp(c)


FAMILY = Family(
    model_types=("mistral",),
    hf_architecture="MistralForCausalLM",
    config=MistralConfig,
    gguf=Gguf(
        "llama",
        normalises=True,
        biases=None,
        llama3=True,
        expert_width=False,
        claims=lambda m: not m.number("expert_count", 0) and is_mistral(m),
        read=lambda m: {"sliding_window": m.get("attention.sliding_window")},
    ),
    block=block,
)
