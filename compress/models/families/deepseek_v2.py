"""DeepSeek-V2: multi-head latent attention, dense first layers, softmax routing by groups, shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.models.config import Config
from compress.models.layers.base import Sublayer
from compress.models.layers.compose import MIXER, mlp, moe
from compress.models.layers.latent_attention import LatentAttention
from compress.models.layers.moe import Router, SharedExpert
from compress.models.spec import Block, Family, Gguf

MODULE = "transformers.models.deepseek_v2.modeling_deepseek_v2.DeepseekV2{}"
UNREAD_Q_RANK = (26, 27)
"""llama.cpp takes models of so many layers for V2-Lite, which has no latent queries."""


def mixer(c: Config, module: str) -> Sublayer:
    """Latent attention; module: the dotted class, its last word left open."""
    return LatentAttention(
        c.hidden,
        *MIXER,
        config=c.text,
        module=module.format("Attention"),
        prefix="self_attn.",
        rotary=module.format("RotaryEmbedding"),
        heads=c.heads,
        q_rank=c.get("q_lora_rank") or 0,
        kv_rank=c.need("kv_lora_rank"),
        nope=c.need("qk_nope_head_dim"),
        rope_dim=c.need("qk_rope_head_dim"),
        value_dim=c.need("v_head_dim"),
        eps=c.eps,
        rope=c.rope(c.need("qk_rope_head_dim")),
        bias=c.flag("attention_bias"),
    )


def feed_forward(c: Config, layer: int, router: Router) -> Sublayer:
    """Dense in the first layers, then routed and shared experts."""
    if not c.experts or layer < c.get("first_k_dense_replace", 0):
        return mlp(c, bias=c.flag("mlp_bias"))
    shared, width = c.get("n_shared_experts") or 0, c.need("moe_intermediate_size")
    return moe(c, router=router, shared=SharedExpert("mlp.shared_experts.", shared * width) if shared else None)


def block(c: Config, layer: int) -> Block:
    grouped = c.get("topk_method") == "group_limited_greedy"
    router = Router(
        "mlp.gate.weight",
        c.need("num_experts_per_tok"),
        normalised=False,
        scale=float(c.get("routed_scaling_factor", 1.0)),
        groups=c.get("n_group", 1) if grouped else 1,
        top_groups=c.get("topk_group", 1) if grouped else 1,
    )
    return mixer(c, MODULE), feed_forward(c, layer, router)


def gguf_keys(c: Config, *, sigmoid: bool = False) -> Mapping[str, Any]:
    """How experts are chosen."""
    keys: dict[str, Any] = {
        "leading_dense_block_count": c.get("first_k_dense_replace", 0),
        "expert_count": c.experts,
        "expert_used_count": c.get("num_experts_per_tok"),
        "expert_feed_forward_length": c.get("moe_intermediate_size"),
        "expert_shared_count": c.get("n_shared_experts") or 0,
        "expert_shared_feed_forward_length": None,
        "expert_weights_scale": float(c.get("routed_scaling_factor", 1.0)),
        "expert_weights_norm": sigmoid and bool(c.get("norm_topk_prob", True)),
        "expert_gating_func": 2 if sigmoid else 1,
    }
    groups, best = c.get("n_group") or 1, c.get("topk_group") or 1
    if sigmoid and groups > 1 and best < groups:
        keys |= {"expert_group_count": groups, "expert_group_used_count": best}
    return keys


def gguf_problems(c: Config) -> list[str]:
    """What llama.cpp's deepseek2 computes otherwise or refuses."""
    problems = []
    if c.get("topk_method") == "group_limited_greedy" and (c.get("n_group") or 1) > 1:
        problems.append("llama.cpp ranks groups of experts by their two best, this model by its best one")
    if c.get("q_lora_rank") and c.layers in UNREAD_Q_RANK:
        problems.append(f"llama.cpp takes models of {c.layers} layers for DeepSeek-V2-Lite, without latent queries")
    if not c.get("n_shared_experts"):
        problems.append("llama.cpp's deepseek2 wants shared experts")
    if c.get("rope_interleave", True) is False:
        problems.append("rope_interleave: false is not supported in GGUF")
    return problems


HEADS = "heads of latent attention share their keys and values"
CHANNELS = "the shared experts' width is a multiple of the routed ones'"
FAMILY = Family(
    model_types=("deepseek_v2",),
    hf_architecture="DeepseekV2ForCausalLM",
    gguf=Gguf("deepseek2", keys=gguf_keys, problems=gguf_problems),
    block=block,
    fixed_heads=HEADS,
    fixed_channels=CHANNELS,
    experts_key=("n_routed_experts", "num_experts", "num_local_experts"),
    defaults={
        "n_routed_experts": 64, "n_shared_experts": 2, "first_k_dense_replace": 0, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512, "topk_method": "greedy", "moe_intermediate_size": 1407,
    },
)  # fmt: skip
