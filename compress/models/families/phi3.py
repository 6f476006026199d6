"""Phi-3 and Phi-4: q, k and v in one tensor, gate and up in another; positions on a part of a head, LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.models.config import Eps, EvenHeads, Positions, Windows
from compress.models.gguf.keys import Metadata
from compress.models.layers.compose import attention, mlp
from compress.models.spec import Block, Family, Gguf


class Phi3Config(Windows, EvenHeads):
    rms_norm_eps: Eps = 1e-5
    original_max_position_embeddings: Positions = 4096
    """Goes before the one among the rope parameters."""

    def _scaling(self, kind: str = "") -> Mapping[str, Any] | None:
        found = super()._scaling(kind)
        own = self.original_max_position_embeddings
        return found and {**found, "original_max_position_embeddings": own}


def block(c: Phi3Config, layer: int) -> Block:
    rope = c.rope(int(c.head_width * c.turning_share))
    return attention(c, joined="qkv_proj", rope=rope, window=c.window(layer)), mlp(c, joined="gate_up_proj")


def read_gguf(m: Metadata) -> dict[str, Any]:
    """A window, the share of a head that turns, and the positions before scaling."""
    said = {
        "sliding_window": m.get("attention.sliding_window"),
        "partial_rotary_factor": m.turning_share,
        "original_max_position_embeddings": m.get("rope.scaling.original_context_length"),
    }
    return {key: value for key, value in said.items() if value is not None}


FAMILY = Family(
    model_types=("phi3",),
    hf_architecture="Phi3ForCausalLM",
    config=Phi3Config,
    gguf=Gguf("phi3", heads_fill_width=True, longrope=True, read=read_gguf),
    block=block,
    fixed_heads="queries, keys and values are rows of one tensor",
    fixed_channels="gate and up are rows of one tensor",
)
