"""Qwen3: per-head RMSNorm on queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from compress.models.config import Width, Windows
from compress.models.layers.compose import attention, mlp
from compress.models.spec import Block, Family, Gguf


class Qwen3Config(Windows):
    use_sliding_window: bool = False
    head_dim: Width = 128
    attention_bias: bool = False

    GGUF_HAS: ClassVar[Mapping[str, str]] = {"attention_bias": "attn_q.bias"}


def block(c: Qwen3Config, layer: int) -> Block:
    bias = c.attention_bias
    return attention(c, qk_norm="head", bias=bias, output_bias=bias, window=c.window(layer, "late")), mlp(c)


FAMILY = Family(
    model_types=("qwen3",),
    hf_architecture="Qwen3ForCausalLM",
    config=Qwen3Config,
    gguf=Gguf("qwen3"),
    block=block,
)
