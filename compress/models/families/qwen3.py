"""Qwen3: per-head RMSNorm on queries and keys."""

from __future__ import annotations

from compress.models.config import Config
from compress.models.layers.compose import attention, mlp
from compress.models.spec import Block, Family, Gguf


def block(c: Config, layer: int) -> Block:
    bias = c.flag("attention_bias")
    return attention(c, qk_norm=True, bias=bias, output_bias=bias, window=c.window(layer, "late")), mlp(c)


FAMILY = Family(
    model_types=("qwen3",),
    hf_architecture="Qwen3ForCausalLM",
    gguf=Gguf("qwen3"),
    block=block,
    slides=True,
    defaults={"use_sliding_window": False, "head_dim": 128},
)
