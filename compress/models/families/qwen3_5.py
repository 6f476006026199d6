"""Qwen3.5 and 3.6, dense: gated DeltaNet layers beside gated full attention; norms of 1 + w."""

from __future__ import annotations

from compress.models.families.qwen3_5_moe import gguf_keys, read_gguf
from compress.models.families.qwen3_next import BIASES, FEED_FORWARD, HEADS, DeltaConfig, draft, gguf_problems, mixer
from compress.models.layers.compose import mlp
from compress.models.spec import Block, Family, Gguf

MODULE = "transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5GatedDeltaNet"


def block(c: DeltaConfig, layer: int) -> Block:
    return mixer(c, layer, MODULE), mlp(c, norm=FEED_FORWARD, norm_shift=1.0)


FAMILY = Family(
    model_types=("qwen3_5_text",),
    hf_architecture="Qwen3_5ForCausalLM",
    config=DeltaConfig,
    gguf=Gguf("qwen35", biases=BIASES, keys=gguf_keys, problems=gguf_problems, read=read_gguf),
    block=block,
    draft=lambda c: draft(c, mlp(c, norm=FEED_FORWARD, norm_shift=1.0)),
    final_shift=1.0,
    fixed_heads=HEADS,
)
