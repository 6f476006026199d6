"""gpt-oss: sinks in every softmax, sliding and full attention in turns, biases everywhere, clamped SwiGLU in routed experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from compress.models.config import Channels, Chosen, Eps, Experts, Positions, Positive, Routed, Width, Windows
from compress.models.gguf.keys import Metadata
from compress.models.layers.compose import FEED_FORWARD, attention, moe
from compress.models.layers.mlp import Activation, Fused
from compress.models.layers.moe import Router
from compress.models.spec import Block, Family, Gguf

CLAMPED = Activation(slope=1.702, limit=7.0, offset=1.0)
YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""transformers' rotary positions of a config that gives none."""
EXPERTS = "mlp.experts."
STACKED = Fused(
    f"{EXPERTS}gate_up_proj",
    f"{EXPERTS}down_proj",
    transposed=True,
    interleaved=True,
    biases=(f"{EXPERTS}gate_up_proj_bias", f"{EXPERTS}down_proj_bias"),
    only=True,
)


class GptOssConfig(Routed, Windows):
    head_dim: Width = 64
    attention_bias: bool = True
    sliding_window: Channels | None = 128
    num_local_experts: Experts = 128
    num_experts_per_tok: Chosen = 4
    rms_norm_eps: Eps = 1e-5
    rope_theta: Positive = 150000.0
    max_position_embeddings: Positions = 131072

    GGUF: ClassVar[Mapping[str, str]] = {
        "num_local_experts": "expert_count",
        "intermediate_size": "expert_feed_forward_length",
        "moe_intermediate_size": "",
        "sliding_window": "attention.sliding_window",
    }

    @property
    def expert_width(self) -> int:
        return self.intermediate_size

    @property
    def slides(self) -> tuple[bool, ...]:
        """Which layers attend through the window: by layer_types, else every second from the first on."""
        if self.layer_types is not None:
            return tuple(kind == "sliding_attention" for kind in self.layer_types)
        return tuple(layer % 2 == 0 for layer in range(self.layers))

    def _rope(self, kind: str = "") -> Mapping[str, Any]:
        given = self._given.get("rope_parameters") is not None or self._given.get("rope_scaling") is not None
        return super()._rope(kind) if given else YARN


def block(c: GptOssConfig, layer: int) -> Block:
    bias = c.attention_bias
    window = c.widest() if c.slides[layer] else None
    router = Router("mlp.router.weight", c.num_experts_per_tok, bias=True)
    experts = moe(c, router=router, norm=NORM, fused=STACKED, activation=CLAMPED, bias=True)
    return attention(c, bias=bias, output_bias=bias, sinks="sinks", window=window), experts


def gguf_problems(c: GptOssConfig) -> list[str]:
    """What llama.cpp's gpt-oss cannot compute."""
    problems = []
    if not c.widest() or any(slides != (layer % 2 == 0) for layer, slides in enumerate(c.slides)):
        problems.append("llama.cpp's gpt-oss wants a sliding window in every second layer from the first on")
    if not c.attention_bias:
        problems.append("llama.cpp's gpt-oss wants biases on q, k, v and o")
    return problems


def read_gguf(m: Metadata) -> dict[str, Any]:
    """Rotary positions as they are where nothing is said of a scaling: not transformers' default."""
    return {} if m.get("rope.scaling.type") else {"rope_parameters": {"rope_type": "default"}}


NORM = (FEED_FORWARD[0], "post_attention_norm")
FAMILY = Family(
    model_types=("gpt_oss",),
    hf_architecture="GptOssForCausalLM",
    config=GptOssConfig,
    gguf=Gguf(
        "gpt-oss",
        normalises=True,
        windows=True,
        activation=CLAMPED.name,
        biases=(
            "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps",
        ),
        problems=gguf_problems,
        read=read_gguf,
    ),
    block=block,
)  # fmt: skip
