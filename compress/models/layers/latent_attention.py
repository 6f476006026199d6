"""Multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434). No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import UnsupportedModel
from compress.models.layers.base import GgufValue, Input, Past, Weight, linear
from compress.models.layers.hosted import Hosted
from compress.models.layers.rope import Rope
from compress.models.layers.views import Gathered, Piece
from compress.reading import in_words

if TYPE_CHECKING:
    from compress.models.gguf.keys import Metadata


@dataclass(frozen=True)
class LatentAttention(Hosted):
    """Keys and values, and queries where `q_rank` is not 0, through low-rank latents with norms of their own.

    nope, rope_dim: channels of a query or key head without and with positions; value_dim: of a value head.
    """

    heads: int = 0
    q_rank: int = 0
    kv_rank: int = 0
    nope: int = 0
    rope_dim: int = 0
    value_dim: int = 0
    eps: float = 1e-6
    rope: Rope = Rope(0, 1e4, 0)  # noqa: RUF009  (frozen)
    bias: bool = False

    @property
    def linears(self) -> Mapping[str, str]:
        latent = {"q_b_proj": "attention.q_latent"} if self.q_rank else {}
        first = "q_a_proj" if self.q_rank else "q_proj"
        return {
            first: "attention.in",
            **latent,
            "kv_b_proj": "attention.kv_latent",
            "o_proj": "attention.out",
        }

    def inputs(self) -> Iterator[Input]:
        p = self.prefix
        yield Input("attention.in", self.hidden, 0, "attention.in", "in", made_by=self.made_by)
        if self.q_rank:
            norm = (f"{p}q_a_layernorm.weight",)
            yield Input("attention.q_latent", self.q_rank, 1, "attention.in", "q_latent", made_by=norm)
        norm = (f"{p}kv_a_layernorm.weight",)
        yield Input("attention.kv_latent", self.kv_rank, 1, "attention.in", "kv_latent", made_by=norm)
        yield Input("attention.out", self.heads * self.value_dim, 2, "attention.out", "out")

    def tensors(self) -> Iterator[Weight]:
        p, h, R = self.prefix, self.heads, self.kv_rank
        queries = h * (self.nope + self.rope_dim)
        reads: dict[str, Any] = {"reads": self.reads, "fused": "the latents' projections"}
        if self.q_rank:
            yield from linear(
                f"{p}q_a_proj",
                self.q_rank,
                self.hidden,
                "attention.q_a",
                "attn_q_a",
                "attention.in",
                self.bias,
                **reads,
            )
            yield Weight(f"{p}q_a_layernorm.weight", (self.q_rank,), "norms", "attn_q_a_norm.weight")
            yield from linear(f"{p}q_b_proj", queries, self.q_rank, "attention.q_b", "attn_q_b", "attention.q_latent")
        else:
            yield from linear(f"{p}q_proj", queries, self.hidden, "attention.q", "attn_q", "attention.in", **reads)
        yield from linear(
            f"{p}kv_a_proj_with_mqa", R + self.rope_dim, self.hidden, "attention.kv_a", "attn_kv_a_mqa", "attention.in",
            self.bias, **reads,
        )  # fmt: skip
        yield Weight(f"{p}kv_a_layernorm.weight", (R,), "norms", "attn_kv_a_norm.weight")
        sizes = (self.nope, self.value_dim)
        pieces = (  # llama.cpp multiplies queries into the latent: a matrix a head, keys' transposed
            Piece("attn_k_b.weight", Gathered(h, sizes, (0,)), shape=(h, R, self.nope), swapped=True),
            Piece("attn_v_b.weight", Gathered(h, sizes, (1,)), shape=(h, self.value_dim, R)),
        )
        yield from linear(
            f"{p}kv_b_proj", h * sum(sizes), R, "attention.kv_b", "attn_kv_b", "attention.kv_latent", pieces=pieces
        )
        yield from linear(
            f"{p}o_proj", self.hidden, h * self.value_dim, "attention.o", "attn_output", "attention.out", self.bias,
            writes=True, alone=True,
        )  # fmt: skip

    def past(self) -> Past:
        latent = self.kv_rank + self.rope_dim
        return Past(token=latent, row=latent)

    def gguf_keys(self) -> Mapping[str, GgufValue]:
        return {
            "attention.head_count": self.heads,
            "attention.head_count_kv": 1,  # the latent is one for all heads
            "attention.key_length": self.kv_rank + self.rope_dim,
            "attention.value_length": self.kv_rank,
            "attention.key_length_mla": self.nope + self.rope_dim,
            "attention.value_length_mla": self.value_dim,
            "attention.q_lora_rank": self.q_rank,
            "attention.kv_lora_rank": self.kv_rank,
            "attention.layer_norm_rms_epsilon": self.eps,
            "rope.dimension_count": self.rope_dim,
            "rope.freq_base": self.rope.theta,
            **self._scaling_keys(),
        }

    def _scaling_keys(self) -> Mapping[str, GgufValue]:
        """Rope scaling: llama.cpp's deepseek2 multiplies cos and sin by `attn_factor` and scores by that and by 1 + multiplier
        ln(factor), squared; transformers by its attention factor, and scores by mscale_all_dim's squared."""
        scaling, kind = self.rope.parameters, self.rope.type
        if kind not in ("yarn", "linear"):
            return {}
        factor = float(scaling["factor"])
        if factor == 1:
            return {}
        log = math.log(factor)

        def mscale(value: float) -> float:
            return 0.1 * value * log + 1.0

        keys: dict[str, GgufValue] = {"rope.scaling.type": kind, "rope.scaling.factor": factor}
        if kind == "linear":
            return {**keys, "rope.scaling.yarn_log_multiplier": (1 / mscale(1) - 1) / log}
        keys["rope.scaling.original_context_length"] = int(
            scaling.get("original_max_position_embeddings") or self.rope.max_positions
        )
        own, everywhere = scaling.get("mscale"), scaling.get("mscale_all_dim")
        turned = scaling.get("attention_factor")
        if turned is None:
            turned = mscale(own) / mscale(everywhere) if own and everywhere else mscale(1)
        multiplier = ((mscale(everywhere) if everywhere else 1.0) / turned - 1) / log
        if abs(multiplier) < 1e-9:
            return {**keys, "rope.scaling.attn_factor": float(turned / mscale(1))}
        keys["rope.scaling.yarn_log_multiplier"] = float(multiplier)
        return keys if turned == 1 else {**keys, "rope.scaling.attn_factor": float(turned)}


def latent_scaling_of(metadata: Metadata) -> dict[str, Any]:
    """Keys of config.json for what a file says of scaled positions: `LatentAttention._scaling_keys` backwards."""
    kind, factor = metadata.get("rope.scaling.type"), metadata.positive("rope.scaling.factor", 1.0)
    multiplier, attention = (metadata.get(f"rope.scaling.{key}") for key in ("yarn_log_multiplier", "attn_factor"))
    if kind != "yarn" or factor == 1:
        return {}
    for number in (multiplier, attention):
        if number is not None and not (isinstance(number, int | float) and abs(number) < 1e6):
            raise UnsupportedModel(f"{metadata.path}: rope scaling by {in_words(number)} is not read from GGUF")
    log = math.log(factor)
    turned = (attention or 1.0) * (1.0 if multiplier is not None else 0.1 * log + 1.0)
    everywhere = ((1 + (multiplier or 0.0) * log) * turned - 1) / (0.1 * log)
    scaling = {
        "rope_type": kind,
        "factor": float(factor),
        "original_max_position_embeddings": metadata.get("rope.scaling.original_context_length"),
        "attention_factor": float(f"{turned:.7g}"),
        "mscale_all_dim": float(f"{everywhere:.6g}") if abs(everywhere) > 1e-5 else None,
    }
    return {"rope_scaling": {key: value for key, value in scaling.items() if value is not None}}
