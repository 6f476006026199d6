"""The common sub-layers from a config, under the names that most families give them. No torch."""

from __future__ import annotations

from typing import Any

from compress.models.config import Config, Routed
from compress.models.layers.attention import Attention
from compress.models.layers.mlp import Mlp
from compress.models.layers.moe import MoE, Router

MIXER = ("input_layernorm", "attn_norm")
"""The norm in front of a token mixer: in checkpoints and in GGUF."""
FEED_FORWARD = ("post_attention_layernorm", "ffn_norm")


def attention(c: Config, norm: tuple[str, str] = MIXER, **options: Any) -> Attention:
    """Grouped-query attention; options: fields of `Attention`."""
    sizes: dict[str, Any] = {"heads": c.heads, "kv_heads": c.kv_heads, "head_dim": c.head_width, "eps": c.eps}
    if "rope" not in options:
        options["rope"] = c.rope()
    return Attention(c.hidden, norm[0], norm[1], **{**sizes, **options})


def mlp(c: Config, width: int | None = None, norm: tuple[str, str] = FEED_FORWARD, **options: Any) -> Mlp:
    """The dense feed-forward, intermediate_size wide by default."""
    return Mlp(c.hidden, *norm, width=width or c.intermediate_size, **options)


def moe(
    c: Routed,
    *,
    prefix: str = "mlp.",
    width: int | None = None,
    normalised: bool = True,
    norm: tuple[str, str] = FEED_FORWARD,
    router: Router | None = None,
    **options: Any,
) -> MoE:
    """Routed experts below `prefix`; options: fields of `MoE`."""
    router = router or Router(f"{prefix}gate.weight", c.num_experts_per_tok, normalised=normalised)
    width = width or c.expert_width
    return MoE(
        c.hidden, *norm, router=router, experts=c.experts, width=width, expert=prefix + "experts.{e}.", **options
    )
