"""Latent attention to chosen tokens (DeepSeek Sparse Attention, DSA, of DeepSeek-V3.2-Exp). No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from compress.models.layers.base import GgufValue, Past, Weight
from compress.models.layers.latent_attention import LatentAttention


@dataclass(frozen=True)
class SparseLatentAttention(LatentAttention):
    """Latent attention to the `top` tokens that an indexer scores best, all of them in shorter texts.

    index_heads, index_dim: of the indexer, whose queries are made of the latent queries, and whose keys and weights of what
    the attention reads. Its matrices are small beside what they choose, and stay floats.
    """

    index_heads: int = 0
    index_dim: int = 0
    top: int = 0
    masked: bool = True

    def tensors(self) -> Iterator[Weight]:
        yield from super().tensors()
        p, queries = f"{self.prefix}indexer.", self.index_heads * self.index_dim
        reads = self.reads
        yield Weight(
            f"{p}wq_b.weight", (queries, self.q_rank), "small", "indexer.attn_q_b.weight", "attention.q_latent"
        )
        yield Weight(
            f"{p}wk.weight",
            (self.index_dim, self.hidden),
            "small",
            "indexer.attn_k.weight",
            "attention.in",
            reads=reads,
        )
        yield Weight(f"{p}k_norm.weight", (self.index_dim,), "norms", "indexer.k_norm.weight")
        yield Weight(f"{p}k_norm.bias", (self.index_dim,), "biases", "indexer.k_norm.bias")
        yield Weight(
            f"{p}weights_proj.weight", (self.index_heads, self.hidden), "small", "indexer.proj.weight", "attention.in",
            reads=reads,
        )  # fmt: skip

    def past(self) -> Past:
        past = super().past()
        whole = self.heads * (self.nope + self.rope_dim + self.value_dim)
        return replace(past, token=past.token + self.index_dim, expanded=whole + self.index_dim, scored=True)

    def gguf_keys(self) -> Mapping[str, GgufValue]:
        return {
            **super().gguf_keys(),
            "attention.indexer.head_count": self.index_heads,
            "attention.indexer.key_length": self.index_dim,
            "attention.indexer.top_k": self.top,
        }
