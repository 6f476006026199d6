"""GLM-4.7-Flash: latent attention and routing of DeepSeek-V3, one dense layer in front."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from compress.models.config import Chosen, Eps, Experts, Positive, Shared, Width
from compress.models.families.deepseek_v2 import CHANNELS, HEADS, LatentConfig, feed_forward, gguf_problems, mixer
from compress.models.families.deepseek_v3 import GGUF, MODULE, router
from compress.models.spec import Block, Family


class Glm4MoeLiteConfig(LatentConfig):
    rms_norm_eps: Eps = 1e-5
    q_lora_rank: Width | None = 768
    qk_nope_head_dim: Width = 192
    v_head_dim: Width = 256
    n_routed_experts: Experts = 64
    num_experts_per_tok: Chosen = 4
    n_shared_experts: Shared = 1
    moe_intermediate_size: Width = 1536
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 1.8
    mlp_layer_types: list[Literal["dense", "sparse"]] | None = None
    """Decides in place of first_k_dense_replace; without it the first layer alone is dense."""

    def is_sparse(self, layer: int) -> bool:
        kinds = self.mlp_layer_types
        return bool(self.experts) and (kinds[layer] == "sparse" if kinds else layer > 0)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.mlp_layer_types and len(self.mlp_layer_types) != self.layers:
            yield (
                f"mlp_layer_types: a list of {len(self.mlp_layer_types)} for the {self.layers} layers of num_hidden_layers"
            )


def block(c: Glm4MoeLiteConfig, layer: int) -> Block:
    return mixer(c, MODULE), feed_forward(c, layer, router(c))


def problems(c: Glm4MoeLiteConfig) -> list[str]:
    """What llama.cpp cannot say."""
    found = gguf_problems(c)
    if not all(map(c.is_sparse, range(c.leading, c.layers))):
        found.append("llama.cpp's deepseek2 wants all dense layers in front of those with experts")
    return found


FAMILY = Family(
    model_types=("glm4_moe_lite",),
    hf_architecture="Glm4MoeLiteForCausalLM",
    config=Glm4MoeLiteConfig,
    gguf=replace(
        GGUF, problems=problems, claims=lambda m: False
    ),  # a file of it reads as DeepSeek-V3, which it computes
    block=block,
    fixed_heads=HEADS,
    fixed_channels=CHANNELS,
    experts_key=("n_routed_experts", "num_experts", "num_local_experts"),
)
