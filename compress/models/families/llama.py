"""Llama 2 and 3."""

from __future__ import annotations

from compress.models.config import EvenHeads
from compress.models.layers.compose import attention, mlp
from compress.models.spec import Block, Family, Gguf


class LlamaConfig(EvenHeads):
    attention_bias: bool = False
    mlp_bias: bool = False


def block(c: LlamaConfig, layer: int) -> Block:
    return attention(c, bias=c.attention_bias, output_bias=c.attention_bias, paired=True), mlp(c, bias=c.mlp_bias)


FAMILY = Family(
    model_types=("llama",),
    hf_architecture="LlamaForCausalLM",
    config=LlamaConfig,
    gguf=Gguf("llama", normalises=True, biases=None, llama3=True, expert_width=False),
    block=block,
    heads_divide_width=True,
)
