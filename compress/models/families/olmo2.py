"""OLMo 2: norms behind the sub-layers alone, and over all heads of queries and keys at once."""

from __future__ import annotations

from compress.models.config import Config, Eps, EvenHeads
from compress.models.layers.attention import NORMED_TOGETHER, Attention
from compress.models.layers.compose import attention, mlp
from compress.models.layers.mlp import Mlp
from compress.models.spec import Block, Family, Gguf

NONE = ("", "")


def mixer(c: Config, bias: bool, **options: object) -> Attention:
    """Attention that reads the stream as it is."""
    behind = {"post": "post_attention_layernorm", "post_gguf": "post_attention_norm"}
    return attention(c, NONE, qk_norm="heads", bias=bias, output_bias=bias, **behind, **options)


def feed_forward(c: Config) -> Mlp:
    return mlp(c, norm=NONE, post="post_feedforward_layernorm", post_gguf="post_ffw_norm")


class Olmo2Config(EvenHeads):
    rms_norm_eps: Eps = 1e-5
    attention_bias: bool = False


def block(c: Olmo2Config, layer: int) -> Block:
    return mixer(c, c.attention_bias), feed_forward(c)


FAMILY = Family(
    model_types=("olmo2",),
    hf_architecture="Olmo2ForCausalLM",
    config=Olmo2Config,
    gguf=Gguf("olmo2", heads_fill_width=True, tied=False, claims=lambda m: not m.get("attention.sliding_window")),
    block=block,
    fixed_heads=NORMED_TOGETHER,
)
