"""ERNIE 4.5, mixtures of experts: softmax routing with a correction, dense first layers, shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AliasChoices, Field

from compress.limits import LAYERS
from compress.models.config import Chosen, EvenHeads, Experts, Layers, Routed, Shared, Width
from compress.models.families.deepseek_v2 import CHANNELS
from compress.models.families.ernie4_5 import ErnieConfig
from compress.models.gguf.keys import Metadata
from compress.models.layers.compose import attention, mlp, moe
from compress.models.layers.moe import Router, SharedExpert
from compress.models.spec import Block, Family, Gguf


class Ernie45MoeConfig(ErnieConfig, Routed, EvenHeads):
    num_experts: Experts = Field(default=64, validation_alias=AliasChoices("moe_num_experts", "num_experts"))
    num_experts_per_tok: Chosen = Field(default=6, validation_alias=AliasChoices("moe_k", "num_experts_per_tok"))
    moe_intermediate_size: Width = 1536
    moe_num_shared_experts: Shared = 2
    moe_layer_start_index: Layers = 1
    moe_layer_end_index: Annotated[int, Field(ge=-1, le=LAYERS)] = -1
    """The last layer with experts; -1 for the model's last."""
    moe_layer_interval: Annotated[int, Field(ge=1, le=LAYERS)] = 1

    GGUF: ClassVar[Mapping[str, str]] = {
        "num_experts": "expert_count",
        "moe_layer_start_index": "leading_dense_block_count",
        "moe_layer_interval": "interleave_moe_layer_step",
    }

    @property
    def end(self) -> int:
        """Behind the last layer that may have experts."""
        return self.layers if self.moe_layer_end_index == -1 else self.moe_layer_end_index + 1

    def is_sparse(self, layer: int) -> bool:
        possible = self.moe_layer_start_index <= layer < self.end
        return bool(self.experts) and possible and (layer + 1) % self.moe_layer_interval == 0


def block(c: Ernie45MoeConfig, layer: int) -> Block:
    mixer = attention(c, interleaved=True)
    if not c.is_sparse(layer):
        return mixer, mlp(c)
    correction = "mlp.moe_statics.e_score_correction_bias"
    router = Router("mlp.gate.weight", c.num_experts_per_tok, correction=correction, correction_row=True)
    width = c.moe_num_shared_experts * c.expert_width
    return mixer, moe(c, router=router, shared=SharedExpert("mlp.shared_experts.", width) if width else None)


def gguf_keys(c: Ernie45MoeConfig) -> Mapping[str, Any]:
    """Which layers have experts."""
    return {
        "leading_dense_block_count": c.moe_layer_start_index,
        "interleave_moe_layer_step": c.moe_layer_interval,
        "expert_shared_count": c.moe_num_shared_experts,
    }


def gguf_problems(c: Ernie45MoeConfig) -> list[str]:
    return ["llama.cpp's ernie4_5-moe has no dense layers behind those with experts"] if c.end < c.layers else []


def read_gguf(m: Metadata) -> dict[str, Any]:
    """Shared experts."""
    each = m.number("expert_feed_forward_length")
    return {"moe_num_shared_experts": m.number("expert_shared_feed_forward_length", 0) // max(each, 1)}


FAMILY = Family(
    model_types=("ernie4_5_moe",),
    hf_architecture="Ernie4_5_MoeForCausalLM",
    config=Ernie45MoeConfig,
    gguf=Gguf(
        "ernie4_5-moe",
        normalises=True,
        biases=("exp_probs_b",),
        keys=gguf_keys,
        problems=gguf_problems,
        read=read_gguf,
    ),
    block=block,
    fixed_channels=CHANNELS,
    experts_key=("moe_num_experts", "num_experts"),
)
