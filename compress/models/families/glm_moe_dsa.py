"""GLM-5 and 5.1: latent attention to the tokens that an indexer chooses, routing of DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from compress.limits import LAYERS
from compress.models.config import Chosen, Eps, Experts, Heads, Layers, Positive, Shared, Width
from compress.models.families.deepseek_v2 import CHANNELS, HEADS, feed_forward
from compress.models.families.deepseek_v3 import router
from compress.models.families.deepseek_v32 import FAMILY as V32
from compress.models.families.deepseek_v32 import SparseConfig, sparse_mixer
from compress.models.spec import Block, Family

MODULE = "transformers.models.glm_moe_dsa.modeling_glm_moe_dsa.GlmMoeDsa{}"


class GlmMoeDsaConfig(SparseConfig):
    rms_norm_eps: Eps = 1e-5
    q_lora_rank: Width | None = 2048
    qk_nope_head_dim: Width = 192
    v_head_dim: Width = 256
    index_n_heads: Heads = 32
    n_routed_experts: Experts = 256
    num_experts_per_tok: Chosen = 8
    n_shared_experts: Shared = 1
    moe_intermediate_size: Width = 2048
    first_k_dense_replace: Layers = 3
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 2.5
    indexer_types: list[Literal["full", "shared"]] | None = None
    index_topk_pattern: str | list[str] | None = None
    index_topk_freq: Annotated[int, Field(ge=0, le=LAYERS)] = 1
    """Every how many layers choose tokens anew, where no list says it."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        shared = "shared" in (self.indexer_types or ()) or {"S", "shared"} & set(self.index_topk_pattern or ())
        if shared or (self.indexer_types is None and self.index_topk_pattern is None and self.index_topk_freq > 1):
            yield (
                "indexer_types: layers that read the tokens which an earlier layer has chosen (GLM-5.2) are not supported: blocks "
                "are computed one by one"
            )


def block(c: GlmMoeDsaConfig, layer: int) -> Block:
    return sparse_mixer(c, MODULE), feed_forward(c, layer, router(c))


FAMILY = Family(
    model_types=("glm_moe_dsa",),
    hf_architecture="GlmMoeDsaForCausalLM",
    config=GlmMoeDsaConfig,
    gguf=replace(V32.gguf, arch="glm-dsa"),
    block=block,
    fixed_heads=HEADS,
    fixed_channels=CHANNELS,
)
