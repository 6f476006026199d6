"""dots.llm1: per-head norms on queries and keys, dense first layers, sigmoid routing with a correction, shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from compress.models.config import Channels, EvenHeads, Experts, Shared, Width, Windows
from compress.models.families.deepseek_v2 import CHANNELS, feed_forward, gguf_keys, read_groups
from compress.models.families.deepseek_v3 import router
from compress.models.gguf.keys import Metadata
from compress.models.grouped import Grouped
from compress.models.layers.compose import attention
from compress.models.spec import Block, Family, Gguf


class Dots1Config(Grouped, Windows, EvenHeads):
    attention_bias: bool = False
    sliding_window: Channels | None = 4096
    max_window_layers: Channels = 62
    n_routed_experts: Experts = 0
    n_shared_experts: Shared = 0
    moe_intermediate_size: Width = 1408

    GGUF_HAS: ClassVar[Mapping[str, str]] = {"attention_bias": "attn_q.bias"}


def block(c: Dots1Config, layer: int) -> Block:
    bias = c.attention_bias
    mixer = attention(c, qk_norm="head", bias=bias, output_bias=bias, window=c.window(layer, "late"))
    return mixer, feed_forward(c, layer, router(c))


def read_gguf(m: Metadata) -> dict[str, Any]:
    """How experts are chosen."""
    said = {"norm_topk_prob": bool(m.get("expert_weights_norm")), "sliding_window": m.get("attention.sliding_window")}
    return {**read_groups(m), **said}


def gguf_problems(c: Dots1Config) -> list[str]:
    """What llama.cpp's dots1 refuses."""
    problems = [] if c.n_shared_experts else ["llama.cpp's dots1 wants shared experts"]
    if c.kv_heads != c.heads:
        problems.append(
            f"llama.cpp's dots1 wants keys and values for every head; {c.heads} heads share {c.kv_heads} here"
        )
    return problems


FAMILY = Family(
    model_types=("dots1",),
    hf_architecture="Dots1ForCausalLM",
    config=Dots1Config,
    gguf=Gguf(
        "dots1",
        tied=False,
        biases=("exp_probs_b",),
        keys=lambda c: gguf_keys(c, sigmoid=True),
        problems=gguf_problems,
        read=read_gguf,
    ),
    block=block,
    fixed_channels=CHANNELS,
    example={"num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1},
)
