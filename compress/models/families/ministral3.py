"""Ministral 3: Mistral whose positions are scaled by YaRN and whose queries grow with the text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from compress.models.config import Eps, Positive, Width, Windows
from compress.models.gguf.keys import Metadata
from compress.models.layers.attention import Temperature
from compress.models.layers.compose import attention, mlp
from compress.models.layers.rope import scaling_of
from compress.models.spec import Block, Family, Gguf

USUAL = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
"""The rope parameters of a config.json without any."""


class Ministral3Config(Windows):
    head_dim: Width | None = 128
    rms_norm_eps: Eps = 1e-5
    rope_theta: Positive = 1e6

    def _rope(self, kind: str = "") -> Mapping[str, Any]:
        return super()._rope(kind) or USUAL


def block(c: Ministral3Config, layer: int) -> Block:
    scale, rope = c.parameter("llama_4_scaling_beta"), c.rope()
    growth = Temperature(float(scale), rope.original) if scale else None
    return attention(c, window=c.window(layer), rope=rope, temperature=growth, paired=True), mlp(c)


def gguf_keys(c: Ministral3Config) -> Mapping[str, Any]:
    """How queries grow, at the lengths that YaRN begins at."""
    scale = c.parameter("llama_4_scaling_beta")
    return {"attention.temperature_scale": float(scale)} if scale else {}


def gguf_problems(c: Ministral3Config) -> list[str]:
    """What llama.cpp cannot say."""
    if c.parameter("llama_4_scaling_beta") and c.rope().type != "yarn":
        return ["llama.cpp's mistral3 lets queries grow with the text under yarn alone"]
    return []


def read_gguf(m: Metadata) -> dict[str, Any]:
    """Window, theta and scaling, which other writers say by YaRN's multiplier."""
    rope = scaling_of(m, {}).get("rope_scaling", {"rope_type": "default"})
    if multiplier := m.get("rope.scaling.yarn_log_multiplier"):
        log = math.log(m.positive("rope.scaling.factor"))
        rope["attention_factor"] = (1 + 0.1 * log) / (1 + 0.1 * float(multiplier) * log)
    scale = m.get("attention.temperature_scale")
    rope |= {"rope_theta": m.get("rope.freq_base"), "llama_4_scaling_beta": scale or 0.0}
    return {"sliding_window": m.get("attention.sliding_window"), "rope_parameters": rope, "rope_scaling": None}


FAMILY = Family(
    model_types=("ministral3",),
    hf_architecture="Ministral3ForCausalLM",
    config=Ministral3Config,
    gguf=Gguf("mistral3", keys=gguf_keys, problems=gguf_problems, read=read_gguf),
    block=block,
)
