"""Nemotron-H and Nemotron 3: every layer is Mamba-2, attention without positions, a feed-forward or routed experts, none gated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from compress.errors import UnsupportedModel
from compress.limits import HEADS
from compress.models.config import Chosen, Eps, Experts, Positions, Scale, Width
from compress.models.families.deepseek_v3 import router
from compress.models.gguf.keys import Metadata
from compress.models.grouped import Ranked
from compress.models.layers.attention import Attention
from compress.models.layers.base import Sublayer
from compress.models.layers.mamba2 import Mamba2
from compress.models.layers.mlp import RELU2, Fused, Mlp
from compress.models.layers.moe import MoE, SharedExpert
from compress.models.spec import Block, Family, Gguf, Names

Kind = Literal["linear_attention", "full_attention", "mlp", "moe"]
LETTERS: Mapping[str, Kind] = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
"""Of hybrid_override_pattern."""
OLD: Mapping[str, Kind] = {"mamba": "linear_attention", "attention": "full_attention"}
NORM = ("norm", "attn_norm")
LEAVES = ("up_proj", "down_proj")


class NemotronHConfig(Ranked):
    """One list says of every layer what it is."""

    num_key_value_heads: Annotated[int, Field(ge=1, le=HEADS)] | None = 8
    head_dim: Width | None = 128
    layer_norm_epsilon: Eps = 1e-5
    max_position_embeddings: Positions = 4096
    mlp_hidden_act: Literal["relu2"] = "relu2"
    mamba_hidden_act: Literal["silu", "swish"] = "silu"
    layers_block_type: list[Kind]
    mlp_bias: bool = False
    use_bias: bool = False
    use_conv_bias: bool = True
    conv_kernel: Annotated[int, Field(ge=2, le=1024)] = 4
    ssm_state_size: Width = 128
    mamba_num_heads: Annotated[int, Field(ge=1, le=HEADS)] = 128
    mamba_head_dim: Width = 64
    n_groups: Annotated[int, Field(ge=1, le=HEADS)] = 8
    time_step_min: Scale = 0.001
    intermediate_size: Width = 21504
    n_routed_experts: Experts = 8
    num_experts_per_tok: Chosen = 2
    moe_intermediate_size: Width = 7688
    moe_shared_expert_intermediate_size: Width = 7688
    moe_latent_size: Width | None = None
    norm_topk_prob: bool = True

    GGUF: ClassVar[Mapping[str, str]] = {
        "rms_norm_eps": "",
        "rope_theta": "",
        "layer_norm_epsilon": "attention.layer_norm_epsilon",
        "conv_kernel": "ssm.conv_kernel",
        "ssm_state_size": "ssm.state_size",
        "mamba_num_heads": "ssm.time_step_rank",
        "n_groups": "ssm.group_count",
        "n_routed_experts": "expert_count",
        "moe_shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        "norm_topk_prob": "expert_weights_norm",
        "routed_scaling_factor": "expert_weights_scale",
        "n_group": "expert_group_count",
        "topk_group": "expert_group_used_count",
    }
    GGUF_HAS: ClassVar[Mapping[str, str]] = {"mlp_bias": "ffn_up.bias"}

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """The older ways to write down the layers, too; their number follows, and what no layer has is not there."""
        kinds, pattern = given.get("layers_block_type"), given.get("hybrid_override_pattern")
        if kinds is None and isinstance(pattern, str):
            kinds = [LETTERS.get(letter, letter) for letter in pattern]
        if isinstance(kinds, list):
            kinds = [OLD.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
            given = {**given, "layers_block_type": kinds, "num_hidden_layers": len(kinds)}
        config = super().read(given)
        if not config.has("mlp"):
            config = config.having(intermediate_size=0)
        if not config.has("moe"):
            none = {"n_routed_experts": 0, "num_experts_per_tok": 0, "moe_shared_expert_intermediate_size": 0}
            config = config.having(moe_intermediate_size=None, num_experts=None, num_local_experts=None, **none)
        return config

    def has(self, kind: Kind) -> bool:
        """Whether any layer is of a kind."""
        return kind in self.layers_block_type

    @property
    def eps(self) -> float:
        return self.layer_norm_epsilon

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.mamba_num_heads % self.n_groups:
            yield f"mamba_num_heads: {self.mamba_num_heads} heads do not divide into the {self.n_groups} groups of n_groups"


def block(c: NemotronHConfig, layer: int) -> Block:
    return (MAKERS[c.layers_block_type[layer]](c),)


def mamba(c: NemotronHConfig) -> Mamba2:
    """transformers lets no time step be shorter than time_step_min."""
    return Mamba2(
        c.hidden,
        *NORM,
        heads=c.mamba_num_heads,
        head_dim=c.mamba_head_dim,
        state=c.ssm_state_size,
        groups=c.n_groups,
        kernel=c.conv_kernel,
        eps=c.eps,
        norm_groups=c.n_groups,
        limits=(c.time_step_min, inf),
        bias=c.use_bias,
        conv_bias=c.use_conv_bias,
        prefix="mixer.",
    )


def attention(c: NemotronHConfig) -> Sublayer:
    sizes: dict[str, Any] = {"heads": c.heads, "kv_heads": c.kv_heads, "head_dim": c.head_width, "eps": c.eps}
    return Attention(c.hidden, *NORM, rope=None, prefix="mixer.", **sizes)


def mlp(c: NemotronHConfig) -> Sublayer:
    return Mlp(
        c.hidden, *NORM, width=c.intermediate_size, bias=c.mlp_bias, prefix="mixer.", leaves=LEAVES, activation=RELU2
    )


def moe(c: NemotronHConfig) -> Sublayer:
    if c.moe_latent_size is not None or c.mlp_bias:
        key, what = (
            ("mlp_bias", "biases") if c.mlp_bias else ("moe_latent_size", "a latent space (Nemotron 3 Super and Ultra)")
        )
        raise UnsupportedModel(f"{key}: experts with {what} are not supported in models of model_type {c.model_type}")
    return MoE(
        c.hidden,
        *NORM,
        router=router(c, "mixer."),
        experts=c.experts,
        width=c.expert_width,
        expert="mixer.experts.{e}.",
        leaves=LEAVES,
        activation=RELU2,
        fused=Fused("mixer.experts.up_proj", "mixer.experts.down_proj"),
        shared=SharedExpert("mixer.shared_experts.", c.moe_shared_expert_intermediate_size, leaves=LEAVES),
    )


MAKERS = {"linear_attention": mamba, "full_attention": attention, "mlp": mlp, "moe": moe}


def gguf_keys(c: NemotronHConfig) -> Mapping[str, Any]:
    """What a layer is, llama.cpp reads from its heads of keys and its channels: Mamba-2 has neither."""
    kinds, width = c.layers_block_type, {"mlp": c.intermediate_size, "moe": c.expert_width}
    keys: dict[str, Any] = {
        "attention.head_count": c.heads,
        "attention.head_count_kv": tuple(c.kv_heads if kind == "full_attention" else 0 for kind in kinds),
        "attention.key_length": c.head_width,
        "attention.value_length": c.head_width,
        "attention.layer_norm_rms_epsilon": c.eps,
        "attention.layer_norm_epsilon": c.eps,
        "feed_forward_length": tuple(width.get(kind, 0) for kind in kinds),
    }
    if c.has("moe"):
        keys |= {
            "expert_gating_func": 2,
            "expert_shared_count": 1,
            "expert_weights_norm": c.norm_topk_prob,
            "expert_weights_scale": float(c.routed_scaling_factor),
            "expert_group_count": c.n_group,
            "expert_group_used_count": c.topk_group,
        }
    return keys


def gguf_problems(c: NemotronHConfig) -> list[str]:
    """What llama.cpp's layers of Nemotron-H cannot be."""
    problems = list(mamba(c).gguf_problems("nemotron_h"))
    if c.has("mlp") and c.has("moe"):
        problems.append(
            "llama.cpp's nemotron_h_moe has experts in every feed-forward; some layers of this model have none"
        )
    return problems


def read_gguf(m: Metadata) -> dict[str, Any]:
    """What the layers are, by their tensors, and how wide."""
    marks: Mapping[str, Kind] = {
        "ssm_in.weight": "linear_attention",
        "attn_q.weight": "full_attention",
        "ffn_gate_inp.weight": "moe",
        "ffn_up.weight": "mlp",
    }
    kinds = [next((kind for n, kind in marks.items() if f"blk.{i}.{n}" in m.names), None) for i in m.layers]
    widths, heads = (m.fields.get(f"{m.arch}.{key}") for key in ("feed_forward_length", "attention.head_count_kv"))
    return {
        "layers_block_type": kinds,
        "num_key_value_heads": most(heads),
        "intermediate_size": most(widths) or None,
        "mamba_head_dim": m.number("ssm.inner_size") // max(m.number("ssm.time_step_rank"), 1),
    }


def most(values: Any) -> Any:
    """The largest of a list that a file has for all layers."""
    return (
        max(values) if isinstance(values, list) and all(isinstance(one, int) for one in values) and values else values
    )


FAMILY = Family(
    model_types=("nemotron_h",),
    hf_architecture="NemotronHForCausalLM",
    config=NemotronHConfig,
    names=Names("backbone.embeddings", "backbone.norm_f", "lm_head", "backbone.layers.{n}."),
    gguf=Gguf(
        "nemotron_h",
        variants=(("nemotron_h_moe", lambda c: c.has("moe")),),
        activation="relu2",
        biases=("ssm_conv1d", "exp_probs_b", "ffn_up", "ffn_down"),
        keys=gguf_keys,
        problems=gguf_problems,
        read=read_gguf,
    ),
    block=block,
    fixed_heads="states of Mamba-2 have heads of their own, and those of attention stay with them",
    shared_key="moe_shared_expert_intermediate_size",
    example={"layers_block_type": ["mamba", "moe", "mamba", "attention"] * 3},
)
