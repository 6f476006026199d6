"""Hunyuan 3: per-head norms on queries and keys, a dense first layer, sigmoid routing with a correction, shared experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from compress.models.config import Chosen, Eps, Experts, Positions, Positive, Routed, Shared, Width, one_a_layer
from compress.models.families.deepseek_v2 import CHANNELS
from compress.models.grouped import listed_in
from compress.models.layers.compose import attention, mlp, moe
from compress.models.layers.moe import Router, SharedExpert
from compress.models.spec import Block, Family, Gguf


class HyV3Config(Routed):
    head_dim: Width = 128
    attention_bias: bool = False
    mlp_bias: Literal[False] = False
    rms_norm_eps: Eps = 1e-5
    rope_theta: Positive = 11158840.0
    max_position_embeddings: Positions = 131072
    num_experts: Experts = 192
    num_experts_per_tok: Chosen = 8
    num_shared_experts: Shared = 1
    moe_intermediate_size: Width = 1536
    router_scaling_factor: Positive = 2.826
    mlp_layer_types: list[Literal["dense", "sparse"]] | None = None

    GGUF: ClassVar[Mapping[str, str]] = {
        "num_experts": "expert_count",
        "num_shared_experts": "expert_shared_count",
        "router_scaling_factor": "expert_weights_scale",
    }

    def is_sparse(self, layer: int) -> bool:
        if self.mlp_layer_types is None:
            return layer > 0
        return self.mlp_layer_types[layer] == "sparse"

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        yield from one_a_layer(self.mlp_layer_types, self.layers, "mlp_layer_types")


def router(k: int, scale: float, gguf: str = "exp_probs_b.bias") -> Router:
    """Sigmoid scores with a correction for the choice, averaged and scaled. gguf: the name of that in GGUF."""
    return Router(
        "mlp.router.gate.weight", k, "sigmoid", scale=float(scale), correction="mlp.expert_bias", correction_gguf=gguf
    )


def block(c: HyV3Config, layer: int) -> Block:
    bias = c.attention_bias
    mixer = attention(c, qk_norm="head", bias=bias, output_bias=bias)
    if not c.is_sparse(layer):
        return mixer, mlp(c)
    width = c.num_shared_experts * c.expert_width
    shared = SharedExpert("mlp.shared_mlp.", width) if width else None
    return mixer, moe(c, router=router(c.num_experts_per_tok, c.router_scaling_factor, "exp_probs_b"), shared=shared)


def gguf_keys(c: HyV3Config) -> Mapping[str, Any]:
    """How experts are chosen."""
    return {
        "expert_shared_count": c.num_shared_experts,
        "expert_weights_scale": float(c.router_scaling_factor),
        "expert_weights_norm": True,
        "expert_gating_func": 2,
    }


def gguf_problems(c: HyV3Config) -> list[str]:
    return [] if c.num_shared_experts else ["llama.cpp's hy_v3 wants a shared expert"]


FAMILY = Family(
    model_types=("hy_v3",),
    hf_architecture="HYV3ForCausalLM",
    config=HyV3Config,
    gguf=Gguf(
        "hy_v3", normalises=True, biases=("exp_probs_b",), keys=gguf_keys, problems=gguf_problems, read=listed_in
    ),
    block=block,
    fixed_channels=CHANNELS,
)
