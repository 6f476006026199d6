"""Qwen3-Next: gated DeltaNet layers beside gated full attention, routed experts and a shared one; norms of 1 + w."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.models.config import Config
from compress.models.layers.base import Sublayer
from compress.models.layers.compose import MIXER, attention, moe
from compress.models.layers.gated_delta_net import GatedDeltaNet
from compress.models.layers.moe import SharedExpert
from compress.models.spec import Block, Family, Gguf

FEED_FORWARD = ("post_attention_layernorm", "post_attention_norm")
MODULE = "transformers.models.qwen3_next.modeling_qwen3_next.Qwen3NextGatedDeltaNet"
DEFAULTS = {
    "head_dim": 256,
    "intermediate_size": 0,  # no layer is dense
    "partial_rotary_factor": 0.25,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
}


def linear_layers(c: Config) -> tuple[bool, ...]:
    """Which layers are linear attention: by layer_types, else all but every fourth."""
    kinds, every = c.get("layer_types"), c.get("full_attention_interval", 4)
    return tuple((kinds[n] == "linear_attention") if kinds else (n + 1) % every != 0 for n in range(c.layers))


def mixer(c: Config, layer: int, module: str, *, joined: bool = False) -> Sublayer:
    """Gated DeltaNet, or attention whose output is gated."""
    if not linear_layers(c)[layer]:
        rope, bias = c.rope(int(c.head_dim * c.turning_share)), c.flag("attention_bias")
        return attention(c, qk_norm=True, gate=True, norm_shift=1.0, rope=rope, bias=bias, output_bias=bias)
    return GatedDeltaNet(
        c.hidden,
        *MIXER,
        config=c.text,
        module=module,
        prefix="linear_attn.",
        key_heads=c.need("linear_num_key_heads"),
        value_heads=c.need("linear_num_value_heads"),
        head_dim=c.need("linear_value_head_dim"),
        kernel=c.need("linear_conv_kernel_dim"),
        joined=joined,
        norm_shift=1.0,
    )


def experts(c: Config, normalised: bool = True) -> Sublayer:
    """Routed experts and one shared behind a sigmoid gate."""
    width = c.need("shared_expert_intermediate_size")
    shared = SharedExpert("mlp.shared_expert.", width, "mlp.shared_expert_gate.weight")
    fused = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    return moe(c, normalised=normalised, shared=shared, fused=fused, norm=FEED_FORWARD, norm_shift=1.0)


def block(c: Config, layer: int) -> Block:
    return mixer(c, layer, MODULE, joined=True), experts(c, bool(c.get("norm_topk_prob")))


def gguf_keys(c: Config) -> Mapping[str, Any]:
    """The pattern of layers."""
    return {
        "full_attention_interval": c.get("full_attention_interval", 4),
        "attention.recurrent_layers": linear_layers(c),
    }


def gguf_problems(c: Config) -> list[str]:
    """What llama.cpp's DeltaNet cannot compute."""
    problems = []
    if c.get("linear_key_head_dim") != c.get("linear_value_head_dim"):
        problems.append("llama.cpp's gated DeltaNet wants key and value heads of one width")
    if all(linear_layers(c)) or not any(linear_layers(c)):
        problems.append("llama.cpp's gated DeltaNet architectures want layers of both kinds")
    if c.get("decoder_sparse_step", 1) != 1 or c.get("mlp_only_layers"):
        problems.append("dense layers among sparse ones are not supported")
    return problems


HEADS = "heads of linear attention cannot be pruned, and those of full attention stay with them"
BIASES = ("attn_q", "attn_k", "attn_v")
FAMILY = Family(
    model_types=("qwen3_next",),
    hf_architecture="Qwen3NextForCausalLM",
    gguf=Gguf("qwen3next", normalises=True, dense_layers=False, biases=BIASES, keys=gguf_keys, problems=gguf_problems),
    block=block,
    final_shift=1.0,
    fixed_heads=HEADS,
    defaults=DEFAULTS,
)
