"""Gemma 3: norms of 1 + w in front of the sub-layers and behind them, sliding windows in five of six layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from compress.limits import LAYERS, ROWS
from compress.models.config import Heads, Positions, Positive, Width
from compress.models.gguf.keys import Metadata
from compress.models.layers.compose import attention, mlp
from compress.models.layers.mlp import GELU_TANH
from compress.models.layers.windows import Interleaved, read_windows, window_keys, window_problems
from compress.models.spec import Block, Ends, Family, Gguf

BEHIND: dict[str, Any] = {"post": "post_attention_layernorm", "post_gguf": "post_attention_norm"}
FEED_FORWARD = ("pre_feedforward_layernorm", "ffn_norm")
BEHIND_FEED_FORWARD: dict[str, Any] = {"post": "post_feedforward_layernorm", "post_gguf": "post_ffw_norm"}
LAYERS_27B = 62
"""By their number llama.cpp knows the model whose scores are not divided by the root of head_dim."""


class Gemma3Config(Interleaved):
    """Published configs leave out what is as in the 4B model."""

    PERIOD: ClassVar[int] = 6
    LOCAL_THETA: ClassVar[float] = 10000.0
    GGUF: ClassVar[Mapping[str, str]] = {"final_logit_softcapping": "final_logit_softcapping"}

    hidden_size: Width = 2304
    intermediate_size: Width = 9216
    num_hidden_layers: Annotated[int, Field(ge=1, le=LAYERS)] = 26
    num_attention_heads: Heads = 8
    num_key_value_heads: Heads | None = 4
    head_dim: Width = 256
    vocab_size: Annotated[int, Field(ge=1, le=ROWS)] = 262208
    max_position_embeddings: Positions = 131072
    rope_theta: Positive = 1e6
    sliding_window: Width = 4096
    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    query_pre_attn_scalar: Positive = 256
    attention_bias: bool = False
    final_logit_softcapping: Positive | None = None
    use_bidirectional_attention: Literal[False] | None = None
    tie_word_embeddings: bool = True


def ends(c: Any) -> Ends:
    """Embeddings times the root of their width."""
    return Ends(scale=c.hidden**0.5, softcap=c.final_logit_softcapping)


def block(c: Gemma3Config, layer: int, **options: Any) -> Block:
    """options: fields of `Attention`."""
    mixer = attention(
        c,
        bias=c.attention_bias,
        output_bias=c.attention_bias,
        rope=c.rope_of(layer),
        window=c.window(layer),
        scale=c.query_pre_attn_scalar**-0.5,
        norm_shift=1.0,
        **BEHIND,
        **({"qk_norm": "head"} | options),
    )
    return mixer, mlp(c, norm=FEED_FORWARD, activation=GELU_TANH, norm_shift=1.0, **BEHIND_FEED_FORWARD)


def gguf_keys(c: Gemma3Config) -> Mapping[str, Any]:
    return {**window_keys(c, Gemma3Config.PERIOD), "final_logit_softcapping": c.final_logit_softcapping}


def scalar(layers: int, largest: int, hidden: int, heads: int, head_dim: int) -> int:
    """By whose root llama.cpp divides scores. largest: layers of the 27B model."""
    return hidden // heads if layers == largest else head_dim


def scalar_problems(c: Gemma3Config, arch: str, largest: int) -> list[str]:
    if c.query_pre_attn_scalar == (theirs := scalar(c.layers, largest, c.hidden, c.heads, c.head_dim)):
        return []
    given = f"{c.query_pre_attn_scalar:g}"
    return [f"llama.cpp's {arch} divides scores by the root of {theirs}, not of query_pre_attn_scalar {given}"]


def gguf_problems(c: Gemma3Config) -> list[str]:
    return [*window_problems(c, "gemma3", ("linear", "yarn")), *scalar_problems(c, "gemma3", LAYERS_27B)]


def read_scalar(m: Metadata, largest: int) -> dict[str, Any]:
    """What llama.cpp divides scores by; the activation is the architecture's."""
    sizes = (m.number("embedding_length"), m.number("attention.head_count"), m.number("attention.key_length", 256))
    return {"query_pre_attn_scalar": scalar(len(m.layers), largest, *sizes), "hidden_act": None}


def read_gguf(m: Metadata) -> dict[str, Any]:
    """The positions of either kind of layer, and what llama.cpp divides scores by."""
    return {**read_windows(m, Gemma3Config.PERIOD, Gemma3Config.LOCAL_THETA), **read_scalar(m, LAYERS_27B)}


FAMILY = Family(
    model_types=("gemma3_text",),
    hf_architecture="Gemma3ForCausalLM",
    config=Gemma3Config,
    gguf=Gguf(
        "gemma3", activation=GELU_TANH.name, windows=True, keys=gguf_keys, problems=gguf_problems, read=read_gguf
    ),
    block=block,
    ends=ends,
    final_shift=1.0,
    heads_divide_width=True,
)
