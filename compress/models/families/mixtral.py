"""Mixtral: Llama attention, top-k experts whose probabilities are renormalised."""

from __future__ import annotations

from compress.models.config import Config
from compress.models.layers.compose import attention, moe
from compress.models.spec import Block, Family, Gguf


def block(c: Config, layer: int) -> Block:
    prefix = "block_sparse_moe."
    experts = moe(c, prefix=prefix, width=c.need("intermediate_size"), leaves=("w1", "w3", "w2"))
    return attention(c, window=c.window(layer), paired=True), experts


FAMILY = Family(
    model_types=("mixtral",),
    hf_architecture="MixtralForCausalLM",
    gguf=Gguf(
        "llama", normalises=True, biases=("attn_q", "attn_k", "attn_v", "attn_output"), llama3=True, expert_width=False
    ),
    block=block,
    slides=True,
    defaults={"num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
)
