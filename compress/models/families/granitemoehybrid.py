"""Granite 4: Mamba-2 beside attention, mostly without positions; feed-forwards with routed experts beside a shared one, or dense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from compress.limits import HEADS
from compress.models.config import Width, one_a_layer
from compress.models.families.granite import multiplier_keys
from compress.models.families.granite import read_gguf as granite_read
from compress.models.families.granitemoe import BIASES, GraniteMoeConfig, attends, experts
from compress.models.gguf.keys import Metadata
from compress.models.layers.base import Sublayer
from compress.models.layers.compose import MIXER, mlp
from compress.models.layers.mamba2 import Mamba2
from compress.models.layers.moe import SharedExpert
from compress.models.spec import Block, Family, Gguf

ROPE = "rope"
OLD = {"mamba": "linear_attention", "attention": "full_attention"}
"""Names of kinds of layers before transformers 5."""
INFINITY = {"__float__": "Infinity"}
"""As transformers writes it."""
Limits = Annotated[list[Annotated[float, Field(ge=0, allow_inf_nan=True)]], Field(min_length=2, max_length=2)]


class GraniteHybridConfig(GraniteMoeConfig):
    """Layers of Mamba-2 among those of attention; experts, or none."""

    layer_types: list[Literal["full_attention", "linear_attention"]] | None = None
    position_embedding_type: str | None = None
    shared_intermediate_size: Width = 1024
    mamba_n_heads: Annotated[int, Field(ge=1, le=HEADS)] = 128
    mamba_n_groups: Annotated[int, Field(ge=1, le=HEADS)] = 1
    mamba_d_state: Width = 256
    mamba_d_head: Width | Literal["auto"] = "auto"
    mamba_d_conv: Annotated[int, Field(ge=2, le=1024)] = 4
    mamba_expand: Annotated[int, Field(ge=1, le=1024)] = 2
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    time_step_limit: Limits = Field(default=[0.0, inf])

    GGUF: ClassVar[Mapping[str, str]] = {
        "mamba_n_heads": "ssm.time_step_rank",
        "mamba_n_groups": "ssm.group_count",
        "mamba_d_state": "ssm.state_size",
        "mamba_d_conv": "ssm.conv_kernel",
    }

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """Layers by their older names, too; without experts, the shared one is the feed-forward."""
        kinds = given.get("layer_types", given.get("layers_block_type"))
        if isinstance(kinds, list):
            given = {**given, "layer_types": [OLD.get(k, k) if isinstance(k, str) else k for k in kinds]}
        if isinstance(limits := given.get("time_step_limit"), list):
            given = {**given, "time_step_limit": [inf if one == INFINITY else one for one in limits]}
        config = super().read(given)
        if config.experts:
            return config
        return config.having(intermediate_size=config.shared_intermediate_size, num_experts_per_tok=0)

    @property
    def attention_layers(self) -> tuple[bool, ...]:
        """Which layers are attention."""
        kinds = self.layer_types or ["linear_attention"] * self.layers
        return tuple(kind == "full_attention" for kind in kinds)

    @property
    def state_head(self) -> int:
        """Channels of a head of Mamba-2."""
        width = self.mamba_d_head
        return width if isinstance(width, int) else self.mamba_expand * self.hidden // self.mamba_n_heads

    @property
    def turns(self) -> bool:
        """Whether attention has positions."""
        return self.position_embedding_type == ROPE

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        yield from one_a_layer(self.layer_types, self.layers)
        inner, heads = self.mamba_expand * self.hidden, self.mamba_n_heads
        if self.state_head * heads != inner:
            yield f"mamba_n_heads: {heads} heads of mamba_d_head are not the {inner} channels that mamba_expand asks for"
        if heads % self.mamba_n_groups:
            yield f"mamba_n_heads: {heads} heads do not divide into the {self.mamba_n_groups} groups of mamba_n_groups"
        if self.experts and not self.num_experts_per_tok:
            yield f"num_experts_per_tok: none of {self.experts} experts"


def mamba(c: GraniteHybridConfig) -> Mamba2:
    low, high = c.time_step_limit
    return Mamba2(
        c.hidden,
        *MIXER,
        heads=c.mamba_n_heads,
        head_dim=c.state_head,
        state=c.mamba_d_state,
        groups=c.mamba_n_groups,
        kernel=c.mamba_d_conv,
        eps=c.eps,
        limits=(low, high),
        bias=c.mamba_proj_bias,
        conv_bias=c.mamba_conv_bias,
        residual=c.residual_multiplier,
    )


def mixer(c: GraniteHybridConfig, layer: int) -> Sublayer:
    """Attention or Mamba-2."""
    return attends(c, rope=c.rope() if c.turns else None) if c.attention_layers[layer] else mamba(c)


def feed_forward(c: GraniteHybridConfig) -> Sublayer:
    """Gate and up of what every token passes through are one tensor."""
    joined: dict[str, Any] = {"leaves": ("", "", "output_linear"), "joined": "input_linear", "parted": True}
    if not c.experts:
        return mlp(c, prefix="shared_mlp.", residual=c.residual_multiplier, **joined)
    return experts(c, shared=SharedExpert("shared_mlp.", c.shared_intermediate_size, **joined))


def block(c: GraniteHybridConfig, layer: int) -> Block:
    return mixer(c, layer), feed_forward(c)


def gguf_keys(c: GraniteHybridConfig) -> Mapping[str, Any]:
    """Layers without heads of keys and values are Mamba-2; positions are switched off by a key of their scaling."""
    keys = {**multiplier_keys(c), "rope.dimension_count": c.head_width, "rope.scaling.finetuned": c.turns}
    if all(c.attention_layers):
        return keys
    heads = tuple(c.kv_heads if attention else 0 for attention in c.attention_layers)
    return {
        **keys,
        **mamba(c).gguf_keys(),
        "attention.head_count": c.heads,
        "attention.head_count_kv": heads,
        "attention.layer_norm_rms_epsilon": c.eps,
    }


def gguf_problems(c: GraniteHybridConfig) -> list[str]:
    """What llama.cpp's hybrid of Granite cannot be."""
    if all(c.attention_layers):
        return [] if c.turns or not c.experts else ["llama.cpp's granitemoe has rotary positions; this model has none"]
    problems = list(mamba(c).gguf_problems("granitehybrid"))
    if c.mamba_expand != 2:
        problems.append(f"llama.cpp's granitehybrid wants mamba_expand: 2; this model has {c.mamba_expand}")
    return problems


def read_gguf(m: Metadata) -> dict[str, Any]:
    """Which layers are Mamba-2, and how wide things are."""
    kinds = {True: "linear_attention", False: "full_attention"}
    heads, width = m.fields.get(f"{m.arch}.attention.head_count_kv"), m.number("embedding_length")
    shared = m.get("expert_shared_feed_forward_length") or m.get("feed_forward_length")
    return {
        **granite_read(m),
        "layer_types": [kinds[f"blk.{layer}.ssm_in.weight" in m.names] for layer in m.layers],
        "num_key_value_heads": max(heads) if isinstance(heads, list) and heads else heads,
        "mamba_expand": m.number("ssm.inner_size", 2 * width) // max(width, 1),
        "shared_intermediate_size": shared,
        "num_local_experts": m.number("expert_count", 0),
        "position_embedding_type": ROPE if m.get("rope.scaling.finetuned") is not False else None,
    }


FAMILY = Family(
    model_types=("granitemoehybrid",),
    hf_architecture="GraniteMoeHybridForCausalLM",
    config=GraniteHybridConfig,
    gguf=Gguf(
        "granitehybrid",
        variants=(
            ("granitemoe", lambda c: all(c.attention_layers) and c.experts),
            ("granite", lambda c: all(c.attention_layers)),
        ),
        normalises=True,
        dense_layers=False,
        biases=("ssm_conv1d", *BIASES),
        llama3=True,
        expert_width=False,
        keys=gguf_keys,
        problems=gguf_problems,
        claims=lambda m: m.has("ssm_in.weight") or m.has("ffn_gate_shexp.weight"),
        read=read_gguf,
    ),
    block=block,
    ends=lambda c: c.ends,
    fixed_heads="states of Mamba-2 have heads of their own, and those of attention stay with them",
    fixed_channels="config.json names the width of a feed-forward by another key where there are no experts",
    experts_key=("num_local_experts",),
    shared_key="shared_intermediate_size",
)
