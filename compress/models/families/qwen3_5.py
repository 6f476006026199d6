"""Qwen3.5 and 3.6, dense: gated DeltaNet layers beside gated full attention; norms of 1 + w."""

from __future__ import annotations

from compress.models.config import Config
from compress.models.families.qwen3_5_moe import gguf_keys
from compress.models.families.qwen3_next import BIASES, DEFAULTS, FEED_FORWARD, HEADS, gguf_problems, mixer
from compress.models.layers.compose import mlp
from compress.models.spec import Block, Family, Gguf

MODULE = "transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5GatedDeltaNet"


def block(c: Config, layer: int) -> Block:
    return mixer(c, layer, MODULE), mlp(c, norm=FEED_FORWARD, norm_shift=1.0)


FAMILY = Family(
    model_types=("qwen3_5_text",),
    hf_architecture="Qwen3_5ForCausalLM",
    gguf=Gguf("qwen35", biases=BIASES, keys=gguf_keys, problems=gguf_problems),
    block=block,
    final_shift=1.0,
    fixed_heads=HEADS,
    defaults={
        k: v
        for k, v in DEFAULTS.items()
        if "expert" not in k and k not in ("intermediate_size", "moe_intermediate_size")
    },
)
