"""Granite 3, mixtures of experts: as Granite, all experts of a layer in two tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from compress.limits import EXPERTS
from compress.models.config import Experts, Routed, Width
from compress.models.families.granite import Multipliers, multiplier_keys, read_gguf
from compress.models.layers.attention import Attention
from compress.models.layers.compose import attention, moe
from compress.models.layers.mlp import Fused
from compress.models.layers.moe import MoE, Router
from compress.models.spec import Block, Family, Gguf

PREFIX = "block_sparse_moe."
STACKED = Fused(f"{PREFIX}input_linear.weight", f"{PREFIX}output_linear.weight", only=True)


class GraniteMoeConfig(Multipliers, Routed):
    attention_bias: bool = False
    num_local_experts: Experts = 8
    num_experts_per_tok: Annotated[int, Field(ge=0, le=EXPERTS)] = 2
    intermediate_size: Width = 11008

    GGUF: ClassVar[Mapping[str, str]] = {"num_local_experts": "expert_count", "moe_intermediate_size": ""}
    GGUF_HAS: ClassVar[Mapping[str, str]] = {"attention_bias": "attn_q.bias"}

    @property
    def expert_width(self) -> int:
        return self.intermediate_size


def attends(c: GraniteMoeConfig, **options: Any) -> Attention:
    """Attention, whose scores have a scale of their own."""
    bias, scale = c.attention_bias, c.attention_multiplier
    return attention(
        c, bias=bias, output_bias=bias, paired=True, scale=scale, residual=c.residual_multiplier, **options
    )


def experts(c: GraniteMoeConfig, **options: Any) -> MoE:
    """Experts whose weights are a softmax over the chosen ones."""
    router = Router(f"{PREFIX}router.layer.weight", c.num_experts_per_tok)
    return moe(c, prefix=PREFIX, router=router, fused=STACKED, residual=c.residual_multiplier, **options)


def block(c: GraniteMoeConfig, layer: int) -> Block:
    return attends(c), experts(c)


BIASES = ("attn_q", "attn_k", "attn_v", "attn_output")
FAMILY = Family(
    model_types=("granitemoe",),
    hf_architecture="GraniteMoeForCausalLM",
    config=GraniteMoeConfig,
    gguf=Gguf(
        "granitemoe",
        normalises=True,
        dense_layers=False,
        biases=BIASES,
        llama3=True,
        expert_width=False,
        keys=multiplier_keys,
        claims=lambda m: not m.has("ffn_gate_shexp.weight"),
        read=read_gguf,
    ),
    block=block,
    ends=lambda c: c.ends,
    experts_key=("num_local_experts",),
)
