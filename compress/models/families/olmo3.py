"""OLMo 3: OLMo 2 with sliding windows in three of four layers, whose positions are not scaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from compress.models.config import Eps, EvenHeads, Positive, Width
from compress.models.families.olmo2 import feed_forward, mixer
from compress.models.gguf.keys import Metadata
from compress.models.layers.attention import NORMED_TOGETHER
from compress.models.layers.windows import Interleaved, read_windows, window_keys, window_problems
from compress.models.spec import Block, Family, Gguf


class Olmo3Config(Interleaved, EvenHeads):
    PERIOD: ClassVar[int] = 4
    LOCAL_THETA: ClassVar[float] = 500000.0

    rms_norm_eps: Eps = 1e-5
    rope_theta: Positive = 500000.0
    sliding_window: Width = 4096
    attention_bias: bool = False


def block(c: Olmo3Config, layer: int) -> Block:
    return mixer(c, c.attention_bias, rope=c.rope_of(layer), window=c.window(layer)), feed_forward(c)


def gguf_keys(c: Olmo3Config) -> Mapping[str, Any]:
    return window_keys(c, 4)


def gguf_problems(c: Olmo3Config) -> list[str]:
    return list(window_problems(c, "olmo2", ("linear", "yarn"), same_base=True))


def read_gguf(m: Metadata) -> dict[str, Any]:
    return read_windows(m, 4, m.positive("rope.freq_base", 10000.0))


FAMILY = Family(
    model_types=("olmo3",),
    hf_architecture="Olmo3ForCausalLM",
    config=Olmo3Config,
    gguf=Gguf(
        "olmo2",
        heads_fill_width=True,
        tied=False,
        windows=True,
        keys=gguf_keys,
        problems=gguf_problems,
        claims=lambda m: bool(m.get("attention.sliding_window")),
        read=read_gguf,
    ),
    block=block,
    fixed_heads=NORMED_TOGETHER,
)
