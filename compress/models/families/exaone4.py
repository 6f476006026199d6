"""EXAONE 4: norms behind the sub-layers alone and on each head; layers without a window have no positions where others slide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.models.config import Channels, Eps, EvenHeads, Windows
from compress.models.families.olmo2 import NONE, feed_forward
from compress.models.gguf.keys import Metadata
from compress.models.layers.compose import attention
from compress.models.spec import Block, Family, Gguf

PERIOD, SLIDING = 4, 64
"""llama.cpp's: which layers slide, and the number of layers of the one model that has any that do."""


class Exaone4Config(Windows, EvenHeads):
    rms_norm_eps: Eps = 1e-5
    sliding_window: Channels | None = 4096
    sliding_window_pattern: int | str | None = PERIOD
    """Every how many layers one attends in full, where layer_types does not say which; words there are for people."""

    def slides(self, layer: int) -> bool:
        """Whether a layer attends through the window."""
        if self.layer_types is not None:
            return self.layer_types[layer] == "sliding_attention"
        period = self.sliding_window_pattern if isinstance(self.sliding_window_pattern, int) else PERIOD
        return bool(self.widest()) and (layer + 1) % max(period, 1) != 0


def block(c: Exaone4Config, layer: int) -> Block:
    rope = c.rope() if c.slides(layer) or not c.widest() else None
    window = c.widest() if c.slides(layer) else None
    behind = {"post": "post_attention_layernorm", "post_gguf": "post_attention_norm"}
    return attention(c, NONE, rope=rope, window=window, qk_norm="head", **behind), feed_forward(c)


def gguf_keys(c: Exaone4Config) -> Mapping[str, Any]:
    """Positions, which the first layer may not have."""
    return c.rope().gguf_keys()


def gguf_problems(c: Exaone4Config) -> list[str]:
    """What llama.cpp computes otherwise."""
    usual = [(layer + 1) % PERIOD != 0 for layer in range(c.layers)]
    if not c.widest() or (c.layers == SLIDING and usual == [c.slides(layer) for layer in range(c.layers)]):
        return []
    return [f"llama.cpp's exaone4 slides in models of {SLIDING} layers alone, in all but every {PERIOD}th"]


def read_gguf(m: Metadata) -> dict[str, Any]:
    """The window, and which layers slide."""
    kinds = {True: "sliding_attention", False: "full_attention"}
    window = m.get("attention.sliding_window") if len(m.layers) == SLIDING else None
    slides = [bool(window) and (layer + 1) % PERIOD != 0 for layer in m.layers]
    return {"sliding_window": window, "layer_types": [kinds[one] for one in slides]}


FAMILY = Family(
    model_types=("exaone4",),
    hf_architecture="Exaone4ForCausalLM",
    config=Exaone4Config,
    gguf=Gguf(
        "exaone4",
        heads_fill_width=True,
        llama3=True,
        windows=True,
        keys=gguf_keys,
        problems=gguf_problems,
        read=read_gguf,
    ),
    block=block,
    example={"sliding_window": None},
)
