"""OLMoE: norms over all heads at once, routed experts whose probabilities stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from compress.models.config import Chosen, Eps, EvenHeads, Experts, Positive, Routed
from compress.models.layers.attention import NORMED_TOGETHER
from compress.models.layers.compose import attention, moe
from compress.models.spec import Block, Family, Gguf


class OlmoeConfig(Routed, EvenHeads):
    rms_norm_eps: Eps = 1e-5
    attention_bias: bool = False
    clip_qkv: Positive | None = None
    num_experts: Experts = 64
    num_experts_per_tok: Chosen = 8

    GGUF: ClassVar[Mapping[str, str]] = {
        "num_experts": "expert_count",
        "head_dim": "",
        "moe_intermediate_size": "",
        "intermediate_size": "feed_forward_length",
    }
    GGUF_HAS: ClassVar[Mapping[str, str]] = {"attention_bias": "attn_q.bias"}

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.clip_qkv is not None:
            yield f"clip_qkv: queries, keys and values that are clipped at {self.clip_qkv:g} are not supported"


def block(c: OlmoeConfig, layer: int) -> Block:
    mixer = attention(c, qk_norm="heads", bias=c.attention_bias, output_bias=c.attention_bias)
    return mixer, moe(c, width=c.intermediate_size, normalised=c.norm_topk_prob)


def gguf_problems(c: OlmoeConfig) -> list[str]:
    shared = f"llama.cpp's olmoe wants keys and values for every head; {c.heads} heads share {c.kv_heads} here"
    return [shared] if c.kv_heads != c.heads else []


FAMILY = Family(
    model_types=("olmoe",),
    hf_architecture="OlmoeForCausalLM",
    config=OlmoeConfig,
    gguf=Gguf(
        "olmoe",
        normalises=False,
        dense_layers=False,
        heads_fill_width=True,
        tied=False,
        expert_width=False,
        problems=gguf_problems,
    ),
    block=block,
    fixed_heads=NORMED_TOGETHER,
    heads_divide_width=True,
)
