"""DeepSeek-V2: multi-head latent attention, dense first layers, softmax routing by groups, shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from compress.models.config import Experts, Shared, Width
from compress.models.gguf.keys import Metadata
from compress.models.grouped import Grouped
from compress.models.layers.base import Sublayer
from compress.models.layers.compose import FEED_FORWARD, MIXER, mlp, moe
from compress.models.layers.latent_attention import LatentAttention, latent_scaling_of
from compress.models.layers.moe import Router, SharedExpert
from compress.models.spec import Block, Family, Gguf

MODULE = "transformers.models.deepseek_v2.modeling_deepseek_v2.DeepseekV2{}"
UNREAD_Q_RANK = (26, 27)
"""llama.cpp takes models of so many layers for V2-Lite, which has no latent queries."""


class LatentConfig(Grouped):
    """Latent attention."""

    attention_bias: bool = False
    mlp_bias: bool = False
    q_lora_rank: Width | None = None
    kv_lora_rank: Width = 512
    qk_nope_head_dim: Width = 128
    qk_rope_head_dim: Width = 64
    v_head_dim: Width = 128
    rope_interleave: bool = True

    GGUF: ClassVar[Mapping[str, str]] = {
        "num_key_value_heads": "",
        "head_dim": "",
        "kv_lora_rank": "attention.kv_lora_rank",
        "qk_rope_head_dim": "rope.dimension_count",
        "v_head_dim": "attention.value_length_mla",
    }
    GGUF_HAS: ClassVar[Mapping[str, str]] = {"attention_bias": "attn_output.bias"}


class DeepseekV2Config(LatentConfig):
    n_routed_experts: Experts = 64
    n_shared_experts: Shared = 2
    q_lora_rank: Width | None = 1536
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
    moe_intermediate_size: Width = 1407

    @property
    def grouped(self) -> bool:
        return self.topk_method == "group_limited_greedy"


def mixer(c: LatentConfig, module: str, kind: type[LatentAttention] = LatentAttention, **options: Any) -> Sublayer:
    """Latent attention; module: the dotted class, its last word left open; options: more fields of `kind`."""
    return kind(
        c.hidden,
        *MIXER,
        config=c.text,
        module=module.format("Attention"),
        prefix="self_attn.",
        rotary=module.format("RotaryEmbedding"),
        heads=c.heads,
        q_rank=c.q_lora_rank or 0,
        kv_rank=c.kv_lora_rank,
        nope=c.qk_nope_head_dim,
        rope_dim=c.qk_rope_head_dim,
        value_dim=c.v_head_dim,
        eps=c.eps,
        rope=c.rope(c.qk_rope_head_dim),
        bias=c.attention_bias,
        **options,
    )


def feed_forward(
    c: Grouped, layer: int, router: Router, *, bias: bool = False, norm: tuple[str, str] = FEED_FORWARD
) -> Sublayer:
    """Dense in the first layers, then routed and shared experts."""
    if not c.is_sparse(layer):
        return mlp(c, bias=bias, norm=norm)
    shared, width = c.n_shared_experts, c.expert_width
    found = SharedExpert("mlp.shared_experts.", shared * width) if shared else None
    return moe(c, router=router, shared=found, norm=norm)


def block(c: DeepseekV2Config, layer: int) -> Block:
    router = Router(
        "mlp.gate.weight",
        c.num_experts_per_tok,
        normalised=False,
        scale=float(c.routed_scaling_factor),
        groups=c.n_group if c.grouped else 1,
        top_groups=c.topk_group if c.grouped else 1,
    )
    return mixer(c, MODULE), feed_forward(c, layer, router, bias=c.mlp_bias)


def gguf_keys(c: Grouped, *, sigmoid: bool = False) -> Mapping[str, Any]:
    """How experts are chosen."""
    keys: dict[str, Any] = {
        "leading_dense_block_count": c.leading,
        "expert_count": c.experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_shared_count": c.n_shared_experts,
        "expert_shared_feed_forward_length": None,
        "expert_weights_scale": float(c.routed_scaling_factor),
        "expert_weights_norm": sigmoid and c.norm_topk_prob,
        "expert_gating_func": 2 if sigmoid else 1,
    }
    groups, best = c.n_group, c.topk_group
    if sigmoid and groups > 1 and best < groups:
        keys |= {"expert_group_count": groups, "expert_group_used_count": best}
    return keys


def read_groups(m: Metadata) -> dict[str, Any]:
    """How experts are chosen."""
    groups, best = m.number("expert_group_count", 1), m.number("expert_group_used_count", 1)
    return {"n_group": groups, "topk_group": best}


def read_gguf(m: Metadata) -> dict[str, Any]:
    """Latent queries, heads, how experts are chosen, and rope scaling, which is said otherwise than elsewhere."""
    return {
        "q_lora_rank": m.number("attention.q_lora_rank", 0) or None,
        "num_key_value_heads": m.number("attention.head_count"),
        "qk_nope_head_dim": m.number("attention.key_length_mla") - m.number("rope.dimension_count"),
        **read_groups(m),
        **latent_scaling_of(m),
    }


def is_sigmoid(m: Metadata) -> bool:
    """llama.cpp calls DeepSeek-V2 and V3 alike."""
    return m.number("expert_gating_func", 1) == 2


def gguf_problems(c: LatentConfig) -> list[str]:
    """What llama.cpp's deepseek2 computes otherwise or refuses."""
    problems = []
    if isinstance(c, DeepseekV2Config) and c.grouped and c.n_group > 1:
        problems.append("llama.cpp ranks groups of experts by their two best, this model by its best one")
    if c.q_lora_rank and c.layers in UNREAD_Q_RANK:
        problems.append(f"llama.cpp takes models of {c.layers} layers for DeepSeek-V2-Lite, without latent queries")
    if not all(map(c.is_sparse, range(c.leading, c.layers))):
        problems.append("llama.cpp's deepseek2 wants all dense layers in front of those with experts")
    if not c.n_shared_experts:
        problems.append("llama.cpp's deepseek2 wants shared experts")
    if not c.rope_interleave:
        problems.append("rope_interleave: false is not supported in GGUF")
    return problems


HEADS = "heads of latent attention share their keys and values"
CHANNELS = "the shared experts' width is a multiple of the routed ones'"
FAMILY = Family(
    model_types=("deepseek_v2",),
    hf_architecture="DeepseekV2ForCausalLM",
    config=DeepseekV2Config,
    gguf=Gguf("deepseek2", keys=gguf_keys, problems=gguf_problems, claims=lambda m: not is_sigmoid(m), read=read_gguf),
    block=block,
    fixed_heads=HEADS,
    fixed_channels=CHANNELS,
    example={"num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1},
)
