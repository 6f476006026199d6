"""Qwen1.5/2-MoE: routed experts beside one shared expert behind a sigmoid gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from compress.models.config import Chosen, EvenHeads, Experts, Sparse, Width, Windows
from compress.models.layers.compose import attention, mlp, moe
from compress.models.layers.moe import SharedExpert
from compress.models.spec import Block, Family, Gguf


class Qwen2MoeConfig(Sparse, Windows, EvenHeads):
    use_sliding_window: bool = False
    qkv_bias: bool | None = True
    num_experts: Experts = 60
    num_experts_per_tok: Chosen = 4
    moe_intermediate_size: Width = 1408
    shared_expert_intermediate_size: Width = 5632

    GGUF: ClassVar[Mapping[str, str]] = {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}
    GGUF_HAS: ClassVar[Mapping[str, str]] = {"qkv_bias": "attn_q.bias"}


def block(c: Qwen2MoeConfig, layer: int) -> Block:
    mixer = attention(c, bias=bool(c.qkv_bias), window=c.window(layer, "even"))
    if not c.is_sparse(layer):
        return mixer, mlp(c)
    shared = SharedExpert("mlp.shared_expert.", c.shared_expert_intermediate_size, "mlp.shared_expert_gate.weight")
    return mixer, moe(c, normalised=c.norm_topk_prob, shared=shared)


FAMILY = Family(
    model_types=("qwen2_moe",),
    hf_architecture="Qwen2MoeForCausalLM",
    config=Qwen2MoeConfig,
    gguf=Gguf(
        "qwen2moe",
        normalises=False,
        dense_layers=False,
        heads_fill_width=True,
        tied=False,
        biases=("attn_q", "attn_k", "attn_v"),
    ),
    block=block,
)
