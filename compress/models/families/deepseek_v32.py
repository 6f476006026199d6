"""DeepSeek-V3.2: DeepSeek-V3 whose latent attention reads the tokens that an indexer chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

from compress.models.config import Heads, Positions, Width
from compress.models.families.deepseek_v2 import CHANNELS, HEADS, LatentConfig, feed_forward, gguf_problems, mixer
from compress.models.families.deepseek_v3 import GGUF, DeepseekV3Config, router
from compress.models.grouped import Listed
from compress.models.layers.base import Sublayer
from compress.models.layers.sparse_latent_attention import SparseLatentAttention
from compress.models.spec import Block, Family

MODULE = "transformers.models.deepseek_v32.modeling_deepseek_v32.DeepseekV32{}"


class SparseConfig(Listed, LatentConfig):
    """An indexer beside latent attention with latent queries."""

    index_topk: Positions = 2048
    index_head_dim: Width = 128
    index_n_heads: Heads = 64
    GGUF: ClassVar[Mapping[str, str]] = {
        "index_topk": "attention.indexer.top_k",
        "index_head_dim": "attention.indexer.key_length",
        "index_n_heads": "attention.indexer.head_count",
    }

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.q_lora_rank is None:
            yield "q_lora_rank: an indexer reads latent queries, and there are none"
        if self.index_head_dim < self.qk_rope_head_dim:
            yield f"index_head_dim: {self.index_head_dim} channels cannot hold the {self.qk_rope_head_dim} of qk_rope_head_dim"


class DeepseekV32Config(DeepseekV3Config, SparseConfig):
    pass


def sparse_mixer(c: SparseConfig, module: str) -> Sublayer:
    """Latent attention behind an indexer."""
    sizes = {"index_heads": c.index_n_heads, "index_dim": c.index_head_dim, "top": c.index_topk}
    return mixer(c, module, SparseLatentAttention, **sizes)


def block(c: DeepseekV32Config, layer: int) -> Block:
    return sparse_mixer(c, MODULE), feed_forward(c, layer, router(c))


def sparse_problems(c: SparseConfig) -> list[str]:
    """What llama.cpp refuses."""
    problems = gguf_problems(c)
    if c.index_head_dim % 64:
        problems.append(f"llama.cpp's indexers want heads of a multiple of 64 channels, not {c.index_head_dim}")
    return problems


FAMILY = Family(
    model_types=("deepseek_v32",),
    hf_architecture="DeepseekV32ForCausalLM",
    config=DeepseekV32Config,
    gguf=replace(
        GGUF,
        arch="deepseek32",
        biases=("exp_probs_b", "indexer.k_norm"),
        problems=sparse_problems,
        claims=lambda m: True,
    ),
    block=block,
    fixed_heads=HEADS,
    fixed_channels=CHANNELS,
)
