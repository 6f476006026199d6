"""Llama 2 and 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from compress.models.config import EvenHeads
from compress.models.gguf.keys import Metadata
from compress.models.layers.compose import attention, mlp
from compress.models.spec import Block, Family, Gguf


class LlamaConfig(EvenHeads):
    attention_bias: bool = False
    mlp_bias: bool = False

    GGUF_HAS: ClassVar[Mapping[str, str]] = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"}


def is_mistral(m: Metadata) -> bool:
    """llama.cpp calls Llama what has a sliding window, or heads that transformers' Llama refuses."""
    heads = max(m.number("attention.head_count"), 1)
    return bool(m.get("attention.sliding_window")) or m.number("embedding_length") % heads != 0


def block(c: LlamaConfig, layer: int) -> Block:
    return attention(c, bias=c.attention_bias, output_bias=c.attention_bias, paired=True), mlp(c, bias=c.mlp_bias)


FAMILY = Family(
    model_types=("llama",),
    hf_architecture="LlamaForCausalLM",
    config=LlamaConfig,
    gguf=Gguf(
        "llama",
        normalises=True,
        biases=None,
        llama3=True,
        expert_width=False,
        claims=lambda m: not m.number("expert_count", 0) and not is_mistral(m),
    ),
    block=block,
    heads_divide_width=True,
)
