"""Hunyuan 1, mixtures of experts (A13B): Hunyuan's attention, routed experts beside a shared one as wide as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AliasChoices, BeforeValidator, Field

from compress.models.config import Chosen, Experts, Routed, Width
from compress.models.families.hunyuan_v1_dense import HunyuanConfig, mixer
from compress.models.layers.compose import moe
from compress.models.layers.moe import Router, SharedExpert
from compress.models.spec import Block, Family, Gguf


def _one(value: Any) -> Any:
    """A number for all layers, which may be written down for each."""
    alike = isinstance(value, list) and value and all(type(one) is type(value[0]) and one == value[0] for one in value)
    return value[0] if alike else value


class HunyuanMoeConfig(HunyuanConfig, Routed):
    num_experts: Annotated[Experts, BeforeValidator(_one)] = 1
    num_experts_per_tok: Annotated[Chosen, BeforeValidator(_one)] = Field(
        default=1, validation_alias=AliasChoices("moe_topk", "num_experts_per_tok")
    )
    moe_intermediate_size: Annotated[Width, BeforeValidator(_one)] | None = None
    """Written down, and not what the experts are made of: that is intermediate_size."""

    GGUF: ClassVar[Mapping[str, str]] = {
        "num_experts": "expert_count",
        "moe_intermediate_size": "",
        "intermediate_size": "expert_feed_forward_length",
    }

    @property
    def expert_width(self) -> int:
        return self.intermediate_size


def block(c: HunyuanMoeConfig, layer: int) -> Block:
    router = Router("mlp.gate.wg.weight", c.num_experts_per_tok)
    return mixer(c), moe(c, router=router, shared=SharedExpert("mlp.shared_mlp.", c.intermediate_size))


FAMILY = Family(
    model_types=("hunyuan_v1_moe",),
    hf_architecture="HunYuanMoEV1ForCausalLM",
    config=HunyuanMoeConfig,
    gguf=Gguf("hunyuan-moe", normalises=True, dense_layers=False),
    block=block,
    fixed_channels="the shared expert is as wide as the routed ones",
    example={"num_experts": 64, "moe_topk": 8},
)
