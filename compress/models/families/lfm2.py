"""LFM2 and 2.5: gated short convolutions beside attention with norms on queries and keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from compress.limits import WIDTH
from compress.models.config import Eps, EvenHeads, Layers, Positions, Positive, Width, one_a_layer
from compress.models.gguf.keys import Metadata
from compress.models.layers.base import Sublayer
from compress.models.layers.compose import attention, mlp
from compress.models.layers.short_conv import ShortConv
from compress.models.spec import Block, Family, Gguf, Names

MIXER = ("operator_norm", "attn_norm")
FEED_FORWARD = ("ffn_norm", "ffn_norm")
LEAVES = ("w1", "w3", "w2")
"""gate, up and down."""
NAMES = Names(norm="model.embedding_norm", norm_gguf="token_embd_norm")


class ConvConfig(EvenHeads):
    """Layers of short convolutions among those of attention."""

    norm_eps: Eps = 1e-5
    rope_theta: Positive = 1e6
    tie_word_embeddings: bool = True
    tie_embedding: bool | None = None
    conv_bias: bool = False
    conv_L_cache: Annotated[int, Field(ge=2, le=1024)] = 3
    layer_types: list[Literal["full_attention", "conv"]] | None = None
    max_position_embeddings: Positions = 128_000

    GGUF: ClassVar[Mapping[str, str]] = {
        "rms_norm_eps": "",
        "norm_eps": "attention.layer_norm_rms_epsilon",
        "conv_L_cache": "shortconv.l_cache",
    }

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        config = super().read(given)
        return config if config.tie_embedding is None else config.having(tie_word_embeddings=config.tie_embedding)

    @property
    def eps(self) -> float:
        return self.norm_eps

    @property
    def attends(self) -> tuple[bool, ...]:
        """Which layers are attention."""
        kinds = self.layer_types or ["full_attention"] * self.layers
        return tuple(kind == "full_attention" for kind in kinds)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        yield from one_a_layer(self.layer_types, self.layers)


class Lfm2Config(ConvConfig):
    """The feed-forward's width is two thirds of intermediate_size, rounded up, unless it is not to be adjusted."""

    block_ff_dim: Width | None = None
    block_auto_adjust_ff_dim: bool = True
    block_ffn_dim_multiplier: Positive = 1.0
    block_multiple_of: Annotated[int, Field(ge=1, le=WIDTH)] = 256
    full_attn_idxs: list[Layers] | None = None

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        config = super().read(given)
        width = config.block_ff_dim or config.intermediate_size
        if config.block_auto_adjust_ff_dim:
            multiple = config.block_multiple_of
            width = -(-int(config.block_ffn_dim_multiplier * int(2 * width / 3)) // multiple) * multiple
        return config.having(intermediate_size=width)

    @property
    def attends(self) -> tuple[bool, ...]:
        """By layer_types, else by the indices, else all."""
        if self.layer_types is None and self.full_attn_idxs is not None:
            return tuple(layer in self.full_attn_idxs for layer in range(self.layers))
        return super().attends


def mixer(c: ConvConfig, layer: int) -> Sublayer:
    """Attention or a short convolution."""
    if not c.attends[layer]:
        return ShortConv(c.hidden, *MIXER, kernel=c.conv_L_cache, bias=c.conv_bias)
    leaves, norms = ("q_proj", "k_proj", "v_proj", "out_proj"), ("q_layernorm", "k_layernorm")
    return attention(c, MIXER, qk_norm="head", leaves=leaves, norms=norms)


def dense(c: ConvConfig) -> Sublayer:
    """The feed-forward."""
    return mlp(c, norm=FEED_FORWARD, prefix="feed_forward.", leaves=LEAVES)


def block(c: Lfm2Config, layer: int) -> Block:
    return mixer(c, layer), dense(c)


def gguf_keys(c: ConvConfig) -> Mapping[str, Any]:
    """Layers without heads of keys and values are convolutions."""
    return {"attention.head_count_kv": tuple(c.kv_heads if attends else 0 for attends in c.attends)}


def read_gguf(m: Metadata) -> dict[str, Any]:
    """Which layers are convolutions."""
    kinds = {True: "conv", False: "full_attention"}
    heads = m.fields.get(f"{m.arch}.attention.head_count_kv")
    return {
        "layer_types": [kinds[f"blk.{layer}.shortconv.conv.weight" in m.names] for layer in m.layers],
        "num_key_value_heads": max(heads) if isinstance(heads, list) and heads else heads,
    }


HEADS = "convolutions have no heads that could be pruned, and those of attention stay with them"
FAMILY = Family(
    model_types=("lfm2",),
    hf_architecture="Lfm2ForCausalLM",
    config=Lfm2Config,
    names=NAMES,
    gguf=Gguf(
        "lfm2",
        heads_fill_width=True,
        keys=gguf_keys,
        read=lambda m: {**read_gguf(m), "block_auto_adjust_ff_dim": False},
    ),
    block=block,
    fixed_heads=HEADS,
    fixed_channels="the width of feed-forwards is what config.json's keys round it to, and few are possible",
)
