"""SmolLM3: Llama whose every fourth layer has no positions (NoPE)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from compress.limits import LAYERS
from compress.models.config import EvenHeads, Positive, Windows, one_a_layer
from compress.models.gguf.keys import Metadata
from compress.models.layers.compose import attention, mlp
from compress.models.spec import Block, Family, Gguf

INTERVAL = 4
"""llama.cpp's: no key says another."""


class SmolLM3Config(Windows, EvenHeads):
    use_sliding_window: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = True
    rope_theta: Positive = 2e6
    no_rope_layers: list[Annotated[int, Field(ge=0, le=1)]] | None = None
    """1 for every layer with positions, 0 for one without."""
    no_rope_layer_interval: Annotated[int, Field(ge=1, le=LAYERS)] = INTERVAL

    GGUF_HAS: ClassVar[Mapping[str, str]] = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"}

    def turns(self, layer: int) -> bool:
        """Whether a layer has positions."""
        if self.no_rope_layers is not None:
            return bool(self.no_rope_layers[layer])
        return (layer + 1) % self.no_rope_layer_interval != 0

    def slides(self, layer: int) -> bool:
        """Whether a layer attends through the window: as layer_types says, without it those without positions."""
        if self.layer_types is not None:
            return self.layer_types[layer] == "sliding_attention"
        return not self.turns(layer)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        yield from one_a_layer(self.no_rope_layers, self.layers, "no_rope_layers")


def block(c: SmolLM3Config, layer: int) -> Block:
    rope, window = c.rope() if c.turns(layer) else None, c.widest() if c.slides(layer) else None
    bias = c.attention_bias
    mixer = attention(c, rope=rope, window=window, bias=bias, output_bias=bias, paired=True)
    return mixer, mlp(c, bias=c.mlp_bias)


def gguf_keys(c: SmolLM3Config) -> Mapping[str, Any]:
    """Positions, which no layer may have that is the first."""
    return c.rope().gguf_keys()


def gguf_problems(c: SmolLM3Config) -> list[str]:
    """What llama.cpp computes otherwise."""
    if all(c.turns(layer) == ((layer + 1) % INTERVAL != 0) for layer in range(c.layers)):
        return []
    return [f"llama.cpp's smollm3 leaves positions out of every {INTERVAL}th layer, this model out of others"]


def read_gguf(m: Metadata) -> dict[str, Any]:
    """A window, where there is one."""
    window = m.get("attention.sliding_window")
    return {"sliding_window": window, "use_sliding_window": bool(window)}


FAMILY = Family(
    model_types=("smollm3",),
    hf_architecture="SmolLM3ForCausalLM",
    config=SmolLM3Config,
    gguf=Gguf("smollm3", keys=gguf_keys, problems=gguf_problems, read=read_gguf, llama3=True),
    block=block,
)
