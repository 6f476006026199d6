"""Qwen3-Next: gated DeltaNet layers beside gated full attention, routed experts and a shared one; norms of 1 + w."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from compress.limits import LAYERS
from compress.models.around import Draft
from compress.models.config import (
    Channels,
    Chosen,
    Config,
    Experts,
    Heads,
    Share,
    Sparse,
    Width,
    one_a_layer,
)
from compress.models.gguf.keys import Metadata
from compress.models.layers.base import Sublayer, Weight, shifted
from compress.models.layers.compose import MIXER, attention, moe
from compress.models.layers.gated_delta_net import GatedDeltaNet
from compress.models.layers.mlp import Fused
from compress.models.layers.moe import SharedExpert
from compress.models.spec import Block, Family, Gguf

FEED_FORWARD = ("post_attention_layernorm", "post_attention_norm")
MODULE = "transformers.models.qwen3_next.modeling_qwen3_next.Qwen3NextGatedDeltaNet"


class DeltaConfig(Config):
    """Layers of gated DeltaNet among those of gated attention."""

    head_dim: Width = 256
    partial_rotary_factor: Share = 0.25
    attention_bias: bool = False
    linear_num_key_heads: Heads = 16
    linear_num_value_heads: Heads = 32
    linear_key_head_dim: Width = 128
    linear_value_head_dim: Width = 128
    linear_conv_kernel_dim: Annotated[int, Field(ge=1, le=1024)] = 4
    full_attention_interval: Annotated[int, Field(ge=1, le=LAYERS)] = 4
    layer_types: list[Literal["full_attention", "linear_attention"]] | None = None

    GGUF: ClassVar[Mapping[str, str]] = {
        "linear_num_key_heads": "ssm.group_count",
        "linear_num_value_heads": "ssm.time_step_rank",
        "linear_key_head_dim": "ssm.state_size",
        "linear_value_head_dim": "ssm.state_size",
        "linear_conv_kernel_dim": "ssm.conv_kernel",
        "full_attention_interval": "full_attention_interval",
    }
    GGUF_HAS: ClassVar[Mapping[str, str]] = {"attention_bias": "attn_output.bias"}

    @property
    def linear_layers(self) -> tuple[bool, ...]:
        """Which layers are linear attention: by layer_types, else all but every so many."""
        if self.layer_types:
            return tuple(kind == "linear_attention" for kind in self.layer_types)
        return tuple((layer + 1) % self.full_attention_interval != 0 for layer in range(self.layers))

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        yield from one_a_layer(self.layer_types, self.layers)
        keys, values = self.linear_num_key_heads, self.linear_num_value_heads
        if values % keys:
            yield f"linear_num_value_heads: {values} heads cannot share the {keys} of linear_num_key_heads evenly"


class DeltaMoeConfig(DeltaConfig, Sparse):
    """The same with routed experts and one shared in every layer."""

    intermediate_size: Channels = 0  # no layer is dense
    num_experts: Experts = 512
    num_experts_per_tok: Chosen = 10
    moe_intermediate_size: Width = 512
    shared_expert_intermediate_size: Width = 512
    norm_topk_prob: bool = True

    GGUF: ClassVar[Mapping[str, str]] = {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}


def mixer(c: DeltaConfig, layer: int, module: str, *, joined: bool = False) -> Sublayer:
    """Gated DeltaNet, or attention whose output is gated."""
    if not c.linear_layers[layer]:
        return full_attention(c)
    return GatedDeltaNet(
        c.hidden,
        *MIXER,
        config=c.text,
        module=module,
        prefix="linear_attn.",
        key_heads=c.linear_num_key_heads,
        value_heads=c.linear_num_value_heads,
        head_dim=c.linear_value_head_dim,
        kernel=c.linear_conv_kernel_dim,
        joined=joined,
        norm_shift=1.0,
    )


def full_attention(c: DeltaConfig) -> Sublayer:
    """Attention whose output is gated."""
    rope, bias = c.rope(int(c.head_dim * c.turning_share)), c.attention_bias
    return attention(c, qk_norm="head", gate=True, norm_shift=1.0, rope=rope, bias=bias, output_bias=bias)


def draft(c: DeltaConfig, feed_forward: Sublayer) -> Draft:
    """One layer of full attention, over the last hidden state beside the embedding of the token that followed."""

    def norm(name: str, gguf: str) -> Weight:
        return Weight(name, (c.hidden,), "norms", gguf, shift=1.0, pieces=shifted(gguf, 1.0))

    others = (
        Weight("mtp.fc.weight", (c.hidden, 2 * c.hidden), "mtp", "nextn.eh_proj.weight"),
        norm("mtp.pre_fc_norm_embedding.weight", "nextn.enorm.weight"),
        norm("mtp.pre_fc_norm_hidden.weight", "nextn.hnorm.weight"),
        norm("mtp.norm.weight", "nextn.shared_head_norm.weight"),
    )
    return Draft("mtp.layers.0.", (full_attention(c), feed_forward), others)


def experts(c: DeltaMoeConfig, normalised: bool = True) -> Sublayer:
    """Routed experts and one shared behind a sigmoid gate."""
    shared = SharedExpert("mlp.shared_expert.", c.shared_expert_intermediate_size, "mlp.shared_expert_gate.weight")
    fused = Fused("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    return moe(c, normalised=normalised, shared=shared, fused=fused, norm=FEED_FORWARD, norm_shift=1.0)


def block(c: DeltaMoeConfig, layer: int) -> Block:
    return mixer(c, layer, MODULE, joined=True), experts(c, c.norm_topk_prob)


def gguf_keys(c: DeltaConfig) -> Mapping[str, Any]:
    """The pattern of layers."""
    return {
        "full_attention_interval": c.full_attention_interval,
        "attention.recurrent_layers": c.linear_layers,
    }


def read_gguf(m: Metadata) -> dict[str, Any]:
    """Which layers are linear, and the share of a head that turns."""
    kinds = {True: "linear_attention", False: "full_attention"}
    return {
        "layer_types": [kinds[f"blk.{layer}.ssm_conv1d.weight" in m.names] for layer in m.layers],
        "partial_rotary_factor": m.turning_share,
    }


def gguf_problems(c: DeltaConfig) -> list[str]:
    """What llama.cpp's DeltaNet cannot compute."""
    problems = []
    if c.linear_key_head_dim != c.linear_value_head_dim:
        problems.append("llama.cpp's gated DeltaNet wants key and value heads of one width")
    if all(c.linear_layers) or not any(c.linear_layers):
        problems.append("llama.cpp's gated DeltaNet architectures want layers of both kinds")
    if isinstance(c, Sparse) and (c.decoder_sparse_step != 1 or c.mlp_only_layers):
        problems.append("dense layers among sparse ones are not supported")
    return problems


HEADS = "heads of linear attention cannot be pruned, and those of full attention stay with them"
BIASES = ("attn_q", "attn_k", "attn_v")
FAMILY = Family(
    model_types=("qwen3_next",),
    hf_architecture="Qwen3NextForCausalLM",
    config=DeltaMoeConfig,
    gguf=Gguf(
        "qwen3next",
        normalises=True,
        dense_layers=False,
        biases=BIASES,
        keys=gguf_keys,
        problems=gguf_problems,
        read=read_gguf,
    ),
    block=block,
    draft=lambda c: draft(c, experts(c, c.norm_topk_prob)),
    final_shift=1.0,
    fixed_heads=HEADS,
)
