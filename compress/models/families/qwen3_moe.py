"""Qwen3-MoE: routed experts only, per-head RMSNorm on queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from compress.models.config import Chosen, EvenHeads, Experts, Sparse, Width, Windows
from compress.models.layers.compose import attention, mlp, moe
from compress.models.spec import Block, Family, Gguf


class Qwen3MoeConfig(Sparse, Windows, EvenHeads):
    use_sliding_window: bool = False
    attention_bias: bool = False

    GGUF_HAS: ClassVar[Mapping[str, str]] = {"attention_bias": "attn_q.bias"}
    num_experts: Experts = 128
    num_experts_per_tok: Chosen = 8
    moe_intermediate_size: Width = 768


def block(c: Qwen3MoeConfig, layer: int) -> Block:
    bias = c.attention_bias
    mixer = attention(c, qk_norm="head", bias=bias, output_bias=bias, window=c.window(layer))
    return mixer, moe(c, normalised=c.norm_topk_prob) if c.is_sparse(layer) else mlp(c)


FAMILY = Family(
    model_types=("qwen3_moe",),
    hf_architecture="Qwen3MoeForCausalLM",
    config=Qwen3MoeConfig,
    gguf=Gguf("qwen3moe", normalises=True, dense_layers=False),
    block=block,
    example={"norm_topk_prob": True},
)
