"""Llama 2 and 3."""

from __future__ import annotations

from compress.models.config import Config
from compress.models.layers.compose import attention, mlp
from compress.models.spec import Block, Family, Gguf


def block(c: Config, layer: int) -> Block:
    bias = c.flag("attention_bias")
    return attention(c, bias=bias, output_bias=bias, paired=True), mlp(c, bias=c.flag("mlp_bias"))


FAMILY = Family(
    model_types=("llama",),
    hf_architecture="LlamaForCausalLM",
    gguf=Gguf("llama", normalises=True, biases=None, llama3=True, expert_width=False),
    block=block,
    heads_divide_width=True,
)
