"""Qwen3-MoE: routed experts only, per-head RMSNorm on queries and keys."""

from __future__ import annotations

from compress.models.config import Config
from compress.models.layers.compose import attention, mlp, moe
from compress.models.spec import Block, Family, Gguf


def block(c: Config, layer: int) -> Block:
    bias = c.flag("attention_bias")
    mixer = attention(c, qk_norm=True, bias=bias, output_bias=bias, window=c.window(layer))
    return mixer, moe(c, normalised=bool(c.get("norm_topk_prob", False))) if c.is_sparse(layer) else mlp(c)


FAMILY = Family(
    model_types=("qwen3_moe",),
    hf_architecture="Qwen3MoeForCausalLM",
    gguf=Gguf("qwen3moe", normalises=True, dense_layers=False),
    block=block,
    slides=True,
    defaults={"use_sliding_window": False, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
)
