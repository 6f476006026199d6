"""Gemma 4, text: Gemma 3 with wider heads in full layers, whose keys may be their values, and experts beside the feed-forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from compress.errors import UnsupportedModel
from compress.models.config import Channels, Chosen, Experts, Heads, Keys, Layers, Positions, Positive, Routed, Width
from compress.models.families.gemma3 import BEHIND, BEHIND_FEED_FORWARD, FEED_FORWARD, ends
from compress.models.gguf.keys import Metadata
from compress.models.layers.base import Sublayer
from compress.models.layers.compose import attention, mlp
from compress.models.layers.mlp import GELU_TANH, Fused
from compress.models.layers.moe import Router, SharedExpert
from compress.models.layers.parallel_moe import ParallelMoE
from compress.models.layers.rope import Rope
from compress.models.layers.windows import Interleaved, read_windows, window_keys, window_problems
from compress.models.spec import Block, Family, Gguf

HEADS = (
    "sliding and full layers of Gemma 4 have heads of different widths and numbers, and no head can go from both alike"
)
FULL, SLIDING = "full_attention", "sliding_attention"
PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
SCALAR: dict[str, Any] = {"scalar": "layer_scalar", "scalar_gguf": "layer_output_scale.weight"}


class LayerKeys(Keys):
    """What is another in one layer than in the others."""

    model_config = ConfigDict(extra="forbid")

    head_dim: Width | None = None
    num_key_value_heads: Heads | None = None


class Gemma4Config(Routed, Interleaved):
    """Full layers' heads by global_head_dim and num_global_key_value_heads, or layer by layer in per_layer_config."""

    PERIOD: ClassVar[int] = 6
    LOCAL_THETA: ClassVar[float] = 10000.0
    GGUF: ClassVar[Mapping[str, str]] = {
        "num_experts": "expert_count",
        "num_experts_per_tok": "",
        "top_k_experts": "expert_used_count",
        "final_logit_softcapping": "final_logit_softcapping",
        "hidden_size_per_layer_input": "embedding_length_per_layer_input",
        "num_kv_shared_layers": "attention.shared_kv_layers",
    }

    num_key_value_heads: Heads | None = 4
    head_dim: Width = 256
    global_head_dim: Width = 512
    num_global_key_value_heads: Heads | None = None
    per_layer_config: dict[str, LayerKeys] | None = None
    max_position_embeddings: Positions = 131072
    sliding_window: Width = 512
    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    attention_bias: bool = False
    attention_k_eq_v: bool = False
    final_logit_softcapping: Positive | None = None
    use_bidirectional_attention: Literal["vision"] | None = None
    tie_word_embeddings: bool = True
    hidden_size_per_layer_input: Channels | None = 256
    num_kv_shared_layers: Layers = 0
    enable_moe_block: bool = False
    num_experts: Experts | None = None
    num_experts_per_tok: Chosen = Field(default=1, validation_alias="top_k_experts")

    @property
    def experts(self) -> int:
        return super().experts if self.enable_moe_block else 0

    def slides(self, layer: int) -> bool:
        """transformers makes the last layer a full one whatever the config says."""
        return layer < self.layers - 1 and super().slides(layer)

    def sizes(self, layer: int) -> tuple[int, int]:
        """Width of a head, and key-value heads."""
        if self.per_layer_config is not None:
            own = self.per_layer_config.get(str(layer), LayerKeys())
            return own.head_dim or self.head_dim, own.num_key_value_heads or self.kv_heads
        if self.slides(layer):
            return self.head_dim, self.kv_heads
        few = self.num_global_key_value_heads if self.attention_k_eq_v else None
        return self.global_head_dim, few or self.kv_heads

    def sizes_of(self, kind: str) -> tuple[int, int]:
        """Those of all layers of a kind."""
        return next(
            (self.sizes(n) for n in range(self.layers) if self.slides(n) == (kind == SLIDING)),
            (self.head_dim, self.kv_heads),
        )

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.enable_moe_block and not (self.experts and self.moe_intermediate_size):
            yield "enable_moe_block: needs num_experts, top_k_experts and moe_intermediate_size"
        for kind in (FULL, SLIDING):
            found = {self.sizes(n) for n in range(self.layers) if self.slides(n) == (kind == SLIDING)}
            if len(found) > 1:
                yield f"per_layer_config: layers of {kind} have different heads, which is not supported"
            if any(self.heads % kv_heads for _, kv_heads in found):
                yield f"num_attention_heads: {self.heads} heads cannot share those of keys and values of {kind} evenly"

    def rope(self, dim: int | None = None, kind: str = "") -> Rope:
        kind = kind or FULL
        return super().rope(dim or self.sizes_of(kind)[0], kind)

    def _rope(self, kind: str = "") -> Mapping[str, Any]:
        found = super()._rope(kind)
        return found if self._given.get("rope_parameters") or kind == SLIDING else PROPORTIONAL


def block(c: Gemma4Config, layer: int) -> Block:
    if c.hidden_size_per_layer_input:
        raise UnsupportedModel(
            "Gemma 4 with inputs of every layer's own (hidden_size_per_layer_input, E2B and E4B) is not supported: its blocks read "
            "more than the residual stream"
        )
    if c.num_kv_shared_layers:
        raise UnsupportedModel(
            "Gemma 4 whose last layers use keys and values of earlier ones (num_kv_shared_layers, E2B and E4B) is not supported: "
            "its blocks read more than the residual stream"
        )
    head_dim, kv_heads = c.sizes(layer)
    mixer = attention(
        c,
        head_dim=head_dim,
        kv_heads=kv_heads,
        qk_norm="head",
        bias=c.attention_bias,
        output_bias=c.attention_bias,
        rope=c.rope_of(layer),
        window=c.window(layer),
        scale=1.0,
        value_norm=True,
        keys_are_values=c.attention_k_eq_v and not c.slides(layer),
        **BEHIND,
    )
    return mixer, _feed_forward(c)


def _feed_forward(c: Gemma4Config) -> Sublayer:
    if not c.experts:
        return mlp(c, norm=FEED_FORWARD, activation=GELU_TANH, **BEHIND_FEED_FORWARD, **SCALAR)
    return ParallelMoE(
        c.hidden,
        "",
        "",
        router=Router("router.proj.weight", c.num_experts_per_tok),
        experts=c.experts,
        width=c.expert_width,
        expert="experts.{e}.",
        shared=SharedExpert("mlp.", c.intermediate_size),
        fused=Fused("experts.gate_up_proj", "experts.down_proj", only=True),
        activation=GELU_TANH,
        **BEHIND_FEED_FORWARD,
        **SCALAR,
    )


def gguf_keys(c: Gemma4Config) -> Mapping[str, Any]:
    kv_heads = tuple(c.sizes(layer)[1] for layer in range(c.layers))
    (full, _), (sliding, _) = c.sizes_of(FULL), c.sizes_of(SLIDING)
    return {
        **window_keys(c, 0),
        "attention.sliding_window_pattern": tuple(c.slides(layer) for layer in range(c.layers)),
        "attention.head_count_kv": kv_heads if len(set(kv_heads)) > 1 else kv_heads[0],
        "attention.key_length": full,
        "attention.value_length": full,
        "attention.key_length_swa": sliding,
        "attention.value_length_swa": sliding,
        "attention.shared_kv_layers": 0,
        "rope.dimension_count_swa": sliding,
        "embedding_length_per_layer_input": 0,
        "final_logit_softcapping": c.final_logit_softcapping,
    }


def gguf_problems(c: Gemma4Config) -> list[str]:
    problems = list(window_problems(c, "gemma4", ("proportional",)))
    if not problems and c.rope(kind=FULL).type != "proportional":
        problems.append("llama.cpp's gemma4 wants proportional rotary positions in full layers")
    return problems


def read_gguf(m: Metadata) -> dict[str, Any]:
    """Heads of either kind of layer; values of full layers by whether they have a tensor."""
    said = read_windows(m, Gemma4Config.PERIOD, Gemma4Config.LOCAL_THETA)
    full = [layer for layer, kind in enumerate(said["layer_types"]) if kind == FULL]
    kv_heads = m.get("attention.head_count_kv")
    heads = kv_heads if isinstance(kv_heads, list) and len(kv_heads) == len(m.layers) else [kv_heads] * len(m.layers)
    slides = next((heads[n] for n in m.layers if n not in full), heads[0])
    return {
        **said,
        "hidden_act": None,
        "head_dim": m.number("attention.key_length_swa", 256),
        "global_head_dim": m.number("attention.key_length", 512),
        "num_key_value_heads": slides,
        "num_global_key_value_heads": next((heads[n] for n in full), slides),
        "attention_k_eq_v": any(f"blk.{n}.attn_v.weight" not in m.names for n in full),
        "enable_moe_block": m.number("expert_count", 0) > 0,
    }


FAMILY = Family(
    model_types=("gemma4_text",),
    hf_architecture="Gemma4ForCausalLM",
    config=Gemma4Config,
    gguf=Gguf(
        "gemma4",
        normalises=True,
        activation=GELU_TANH.name,
        windows=True,
        keys=gguf_keys,
        problems=gguf_problems,
        read=read_gguf,
    ),
    block=block,
    ends=ends,
    fixed_heads=HEADS,
    shared_key="intermediate_size",
    example={"hidden_size_per_layer_input": 0},
)
