"""Granite 3, dense: Llama with factors on embeddings, scores, sub-layers and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from compress.models.config import EvenHeads, Positive
from compress.models.gguf.keys import Metadata
from compress.models.layers.compose import attention, mlp
from compress.models.spec import Block, Ends, Family, Gguf


class Multipliers(EvenHeads):
    """What Granite multiplies by."""

    embedding_multiplier: Positive = 1.0
    attention_multiplier: Positive = 1.0
    residual_multiplier: Positive = 1.0
    logits_scaling: Positive = 1.0

    GGUF: ClassVar[Mapping[str, str]] = {
        "embedding_multiplier": "embedding_scale",
        "attention_multiplier": "attention.scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }

    @property
    def ends(self) -> Ends:
        return Ends(scale=self.embedding_multiplier, divisor=self.logits_scaling)


def multiplier_keys(c: Multipliers) -> Mapping[str, Any]:
    """GGUF's."""
    return {key: getattr(c, name) for name, key in Multipliers.GGUF.items()}


class GraniteConfig(Multipliers):
    attention_bias: bool = False
    mlp_bias: bool = False

    GGUF_HAS: ClassVar[Mapping[str, str]] = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"}


def block(c: GraniteConfig, layer: int) -> Block:
    bias, residual = c.attention_bias, c.residual_multiplier
    mixer = attention(
        c, bias=bias, output_bias=bias, paired=True, scale=c.attention_multiplier, residual=c.residual_multiplier
    )
    return mixer, mlp(c, bias=c.mlp_bias, residual=residual)


def read_gguf(m: Metadata) -> dict[str, Any]:
    """llama.cpp takes what is absent for the usual scale of scores."""
    if m.get("attention.scale"):
        return {}
    return {"attention_multiplier": float(m.number("attention.key_length")) ** -0.5}


FAMILY = Family(
    model_types=("granite",),
    hf_architecture="GraniteForCausalLM",
    config=GraniteConfig,
    gguf=Gguf("granite", biases=None, llama3=True, keys=multiplier_keys, read=read_gguf),
    block=block,
    ends=lambda c: c.ends,
)
