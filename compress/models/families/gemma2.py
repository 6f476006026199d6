"""Gemma 2: Gemma 3 without norms on queries and keys, bounded scores and logits, sliding windows in every second layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from compress.models.config import Positions, Positive
from compress.models.families import gemma3
from compress.models.families.gemma3 import Gemma3Config, ends
from compress.models.gguf.keys import Metadata
from compress.models.layers.mlp import GELU_TANH
from compress.models.layers.windows import read_windows, window_keys
from compress.models.spec import Block, Family, Gguf

LAYERS_27B = 46


class Gemma2Config(Gemma3Config):
    PERIOD: ClassVar[int] = 2
    LAYER_ROPES: ClassVar[bool] = False
    GGUF: ClassVar[Mapping[str, str]] = {"attn_logit_softcapping": "attn_logit_softcapping"}

    max_position_embeddings: Positions = 8192
    rope_theta: Positive = 10000.0
    final_logit_softcapping: Positive | None = 30.0
    attn_logit_softcapping: Positive | None = 50.0


def block(c: Gemma2Config, layer: int) -> Block:
    return gemma3.block(c, layer, qk_norm="", softcap=c.attn_logit_softcapping or 0.0)


def gguf_keys(c: Gemma2Config) -> Mapping[str, Any]:
    bounds = ("attn_logit_softcapping", "final_logit_softcapping")
    return {**window_keys(c, Gemma2Config.PERIOD), **{key: getattr(c, key) for key in bounds}}


def gguf_problems(c: Gemma2Config) -> list[str]:
    problems = gemma3.scalar_problems(c, "gemma2", LAYERS_27B)
    if c.attn_logit_softcapping is None or c.final_logit_softcapping is None:
        problems.append("llama.cpp's gemma2 bounds scores and logits always; this model does not")
    if not c.tie_word_embeddings:
        problems.append("llama.cpp's gemma2 takes the embeddings for the head; this model has a head of its own")
    return problems


def read_gguf(m: Metadata) -> dict[str, Any]:
    said = read_windows(m, Gemma2Config.PERIOD, m.positive("rope.freq_base", 10000.0))
    full = said.pop("rope_parameters")["full_attention"]
    return {**said, "rope_parameters": full, **gemma3.read_scalar(m, LAYERS_27B)}


FAMILY = Family(
    model_types=("gemma2",),
    hf_architecture="Gemma2ForCausalLM",
    config=Gemma2Config,
    gguf=Gguf(
        "gemma2", activation=GELU_TANH.name, windows=True, keys=gguf_keys, problems=gguf_problems, read=read_gguf
    ),
    block=block,
    ends=ends,
    final_shift=1.0,
    heads_divide_width=True,
)
