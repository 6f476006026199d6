"""GLM-4.5, 4.6 and 4.7: positions on half of a head, dense first layers, DeepSeek-V3's routing, shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from compress.models.config import Chosen, Eps, Experts, Layers, Positive, Share, Shared, Width
from compress.models.families.deepseek_v2 import CHANNELS, feed_forward, gguf_keys, read_groups
from compress.models.families.deepseek_v3 import router
from compress.models.gguf.keys import Metadata
from compress.models.grouped import Grouped
from compress.models.layers.compose import attention
from compress.models.spec import Block, Family, Gguf


class Glm4MoeConfig(Grouped):
    rms_norm_eps: Eps = 1e-5
    partial_rotary_factor: Share = 0.5
    attention_bias: bool = False
    use_qk_norm: bool = False
    n_routed_experts: Experts = 128
    num_experts_per_tok: Chosen = 8
    n_shared_experts: Shared = 1
    moe_intermediate_size: Width = 1408
    first_k_dense_replace: Layers = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 1.0

    GGUF_HAS: ClassVar[Mapping[str, str]] = {"attention_bias": "attn_q.bias", "use_qk_norm": "attn_q_norm.weight"}


def block(c: Glm4MoeConfig, layer: int) -> Block:
    rope, norm = c.rope(int(c.head_width * c.turning_share)), "head" if c.use_qk_norm else ""
    mixer = attention(c, rope=rope, qk_norm=norm, bias=c.attention_bias)
    return mixer, feed_forward(c, layer, router(c), norm=("post_attention_layernorm", "post_attention_norm"))


def read_gguf(m: Metadata) -> dict[str, Any]:
    """How experts are chosen, and the share of a head that turns."""
    return {
        **read_groups(m),
        "norm_topk_prob": bool(m.get("expert_weights_norm")),
        "partial_rotary_factor": m.turning_share,
    }


def gguf_problems(c: Grouped) -> list[str]:
    return [] if c.n_shared_experts else ["llama.cpp's glm4moe wants shared experts"]


FAMILY = Family(
    model_types=("glm4_moe",),
    hf_architecture="Glm4MoeForCausalLM",
    config=Glm4MoeConfig,
    gguf=Gguf(
        "glm4moe",
        biases=("attn_q", "attn_k", "attn_v", "exp_probs_b"),
        keys=lambda c: gguf_keys(c, sigmoid=True),
        problems=gguf_problems,
        read=read_gguf,
    ),
    block=block,
    fixed_channels=CHANNELS,
)
