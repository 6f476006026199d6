"""Qwen1.5/2-MoE: routed experts beside one shared expert behind a sigmoid gate."""

from __future__ import annotations

from compress.models.config import Config
from compress.models.layers.compose import attention, mlp, moe
from compress.models.layers.moe import SharedExpert
from compress.models.spec import Block, Family, Gguf


def block(c: Config, layer: int) -> Block:
    mixer = attention(c, bias=c.flag("qkv_bias"), window=c.window(layer, "even"))
    if not c.is_sparse(layer):
        return mixer, mlp(c)
    shared = SharedExpert(
        "mlp.shared_expert.", c.get("shared_expert_intermediate_size"), "mlp.shared_expert_gate.weight"
    )
    return mixer, moe(c, normalised=bool(c.get("norm_topk_prob", False)), shared=shared)


FAMILY = Family(
    model_types=("qwen2_moe",),
    hf_architecture="Qwen2MoeForCausalLM",
    gguf=Gguf(
        "qwen2moe",
        normalises=False,
        dense_layers=False,
        heads_fill_width=True,
        tied=False,
        biases=("attn_q", "attn_k", "attn_v"),
    ),
    block=block,
    slides=True,
    defaults={
        "use_sliding_window": False,
        "qkv_bias": True,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
)
