"""Mixtral: Llama attention, top-k experts whose probabilities are renormalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from compress.models.config import Chosen, Eps, EvenHeads, Experts, Positive, Routed, Windows
from compress.models.layers.compose import attention, moe
from compress.models.spec import Block, Family, Gguf


class MixtralConfig(Routed, Windows, EvenHeads):
    num_local_experts: Experts = 8
    num_experts_per_tok: Chosen = 2
    rms_norm_eps: Eps = 1e-5
    rope_theta: Positive = 1e6

    GGUF: ClassVar[Mapping[str, str]] = {
        "num_local_experts": "expert_count",
        "moe_intermediate_size": "",
        "sliding_window": "attention.sliding_window",
    }


def block(c: MixtralConfig, layer: int) -> Block:
    prefix = "block_sparse_moe."
    experts = moe(c, prefix=prefix, width=c.intermediate_size, leaves=("w1", "w3", "w2"))
    return attention(c, window=c.window(layer), paired=True), experts


FAMILY = Family(
    model_types=("mixtral",),
    hf_architecture="MixtralForCausalLM",
    config=MixtralConfig,
    gguf=Gguf(
        "llama",
        normalises=True,
        biases=("attn_q", "attn_k", "attn_v", "attn_output"),
        llama3=True,
        expert_width=False,
        claims=lambda m: m.number("expert_count", 0) > 0,
    ),
    block=block,
)
