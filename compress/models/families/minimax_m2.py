"""MiniMax-M2: norms over all heads at once, positions on a part of a head, sigmoid routing with a correction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from compress.models.config import Chosen, Experts, Positive, Routed, Width
from compress.models.gguf.keys import Metadata
from compress.models.layers.attention import NORMED_TOGETHER
from compress.models.layers.compose import attention, moe
from compress.models.layers.moe import Router
from compress.models.spec import Block, Family, Gguf


class MiniMaxM2Config(Routed):
    head_dim: Width = 128
    rope_theta: Positive = 5e6
    rotary_dim: Width | None = None
    """Channels of a head that turn, as the published configurations say it."""
    num_local_experts: Experts = 256
    num_experts_per_tok: Chosen = 8

    GGUF: ClassVar[Mapping[str, str]] = {
        "num_local_experts": "expert_count",
        "moe_intermediate_size": "",
        "intermediate_size": "expert_feed_forward_length",
    }

    @property
    def turning(self) -> int:
        """Channels of a head that turn."""
        share = self.turning_share
        return self.rotary_dim if self.rotary_dim and share == 1.0 else int(self.head_width * share)


def block(c: MiniMaxM2Config, layer: int) -> Block:
    prefix = "block_sparse_moe."
    router = Router(
        f"{prefix}gate.weight",
        c.num_experts_per_tok,
        score="sigmoid",
        correction=f"{prefix}e_score_correction_bias",
    )
    experts = moe(c, prefix=prefix, width=c.intermediate_size, router=router, leaves=("w1", "w3", "w2"))
    return attention(c, rope=c.rope(c.turning), qk_norm="heads"), experts


def gguf_keys(c: MiniMaxM2Config) -> Mapping[str, Any]:
    """How experts are chosen: by sigmoid scores."""
    return {"expert_gating_func": 2}


def read_gguf(m: Metadata) -> dict[str, Any]:
    """The share of a head that turns."""
    return {"partial_rotary_factor": m.turning_share}


FAMILY = Family(
    model_types=("minimax_m2",),
    hf_architecture="MiniMaxM2ForCausalLM",
    config=MiniMaxM2Config,
    gguf=Gguf(
        "minimax-m2",
        normalises=True,
        dense_layers=False,
        tied=False,
        biases=("exp_probs_b",),
        keys=gguf_keys,
        read=read_gguf,
    ),
    block=block,
    fixed_heads=NORMED_TOGETHER,
)
