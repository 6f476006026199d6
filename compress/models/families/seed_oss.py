"""Seed-OSS: Llama with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from compress.models.config import Config, Width
from compress.models.layers.compose import attention, mlp
from compress.models.spec import Block, Family, Gguf


class SeedOssConfig(Config):
    head_dim: Width = 128
    attention_bias: bool = True
    attention_out_bias: bool = False
    mlp_bias: bool = False

    GGUF_HAS: ClassVar[Mapping[str, str]] = {
        "attention_bias": "attn_q.bias",
        "attention_out_bias": "attn_output.bias",
        "mlp_bias": "ffn_gate.bias",
    }


def block(c: SeedOssConfig, layer: int) -> Block:
    mixer = attention(c, bias=c.attention_bias, output_bias=c.attention_out_bias)
    return mixer, mlp(c, norm=("post_attention_layernorm", "post_attention_norm"), bias=c.mlp_bias)


FAMILY = Family(
    model_types=("seed_oss",),
    hf_architecture="SeedOssForCausalLM",
    config=SeedOssConfig,
    gguf=Gguf("seed_oss", biases=("attn_q", "attn_k", "attn_v")),
    block=block,
)
