"""MiMo-V2-Flash: sliding attention with sinks and twice the key heads beside full attention, values narrower than keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from compress.errors import CheckpointError
from compress.models.config import (
    Chosen,
    Eps,
    Experts,
    Scale,
    Width,
    Windows,
    one_a_layer,
)  # fmt: skip
from compress.models.families.deepseek_v3 import router
from compress.models.gguf.keys import Metadata
from compress.models.grouped import Ranked, listed_in
from compress.models.layers.compose import attention, mlp, moe
from compress.models.spec import Block, Family, Gguf

FULL, SLIDING = "full_attention", "sliding_attention"
POSITIONS: Mapping[str, Mapping[str, Any]] = {
    FULL: {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.334},
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.334},
}
"""transformers' rotary positions of a config that gives none."""
SHARE = 0.334
PERIOD = 6
PATTERN, KV_HEADS = "attention.sliding_window_pattern", "attention.head_count_kv"


class MimoConfig(Ranked, Windows):
    head_dim: Width = 192
    v_head_dim: Width = 128
    attention_bias: bool = False
    attention_value_scale: Scale | None = 0.707
    sliding_window: Width = 128
    rms_norm_eps: Eps = 1e-5
    num_key_value_heads: int = 4
    n_routed_experts: Experts = 256
    num_experts_per_tok: Chosen = 8
    moe_intermediate_size: Width = 2048
    norm_topk_prob: bool = True
    mlp_layer_types: list[Literal["dense", "sparse"]] | None = None

    LAYER_ROPES: ClassVar[bool] = True
    GGUF: ClassVar[Mapping[str, str]] = {
        "num_key_value_heads": "",
        "n_routed_experts": "expert_count",
        "v_head_dim": "attention.value_length",
        "attention_value_scale": "attention.value_scale",
        "sliding_window": "attention.sliding_window",
    }

    def kind(self, layer: int) -> str:
        """Of a layer's attention: by layer_types, else full in the first and every 6th."""
        if self.layer_types is not None:
            return self.layer_types[layer]
        return FULL if layer == 0 or (layer + 1) % PERIOD == 0 else SLIDING

    def heads_of(self, layer: int) -> int:
        """Key and value heads of a layer."""
        return self.kv_heads * (2 if self.kind(layer) == SLIDING else 1)

    def is_sparse(self, layer: int) -> bool:
        return layer > 0 if self.mlp_layer_types is None else self.mlp_layer_types[layer] == "sparse"

    def turning(self, kind: str) -> int:
        """Channels of a head that turn."""
        return int(self.head_width * self._rope(kind).get("partial_rotary_factor", SHARE))

    def _rope(self, kind: str = "") -> Mapping[str, Any]:
        return (self._given.get("rope_parameters") or POSITIONS).get(kind or FULL) or {}

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        table = self._given.get("rope_parameters")
        if table and not all(isinstance(table.get(kind), dict) for kind in (FULL, SLIDING)):
            yield f"rope_parameters: needs those of {FULL} and of {SLIDING}, each under its name"
        if self.heads % (2 * self.kv_heads):
            yield f"num_attention_heads: {self.heads} heads cannot share the {2 * self.kv_heads} of sliding layers evenly"
        yield from one_a_layer(self.mlp_layer_types, self.layers, "mlp_layer_types")


def block(c: MimoConfig, layer: int) -> Block:
    kind = c.kind(layer)
    slides = kind == SLIDING
    mixer = attention(
        c,
        bias=c.attention_bias,
        rope=c.rope(c.turning(kind), kind),
        window=c.widest() if slides else None,
        sinks="attention_sink_bias" if slides else "",
        value_dim=c.v_head_dim,
        value_scale=1.0 if c.attention_value_scale is None else c.attention_value_scale,
    )
    mixer = replace(mixer, kv_heads=c.heads_of(layer))
    if not c.is_sparse(layer):
        return mixer, mlp(c)
    return mixer, moe(c, router=router(c))


def gguf_keys(c: MimoConfig) -> Mapping[str, Any]:
    """What differs from layer to layer, and the scale of values."""
    layers = range(c.layers)
    return {
        KV_HEADS: tuple(c.heads_of(layer) for layer in layers),
        PATTERN: tuple(c.kind(layer) == SLIDING for layer in layers),
        "rope.dimension_count": c.turning(FULL),
        "rope.freq_base": c.rope(c.turning(FULL), FULL).theta,
        "rope.freq_base_swa": c.rope(c.turning(SLIDING), SLIDING).theta,
        "attention.value_scale": 1.0 if c.attention_value_scale is None else float(c.attention_value_scale),
    }


def gguf_problems(c: MimoConfig) -> list[str]:
    """What llama.cpp's mimo2 cannot compute."""
    problems = []
    if c.routed_scaling_factor != 1:
        problems.append("llama.cpp's mimo2 does not scale routing weights; this model does")
    if c.n_group > 1:
        problems.append("llama.cpp's mimo2 chooses from all experts; this model chooses groups first")
    if c.turning(FULL) != c.turning(SLIDING):
        problems.append("llama.cpp's mimo2 turns as many channels in all layers")
    if any(c.rope(c.turning(kind), kind).type != "default" for kind in (FULL, SLIDING)):
        problems.append("llama.cpp's mimo2 scales no positions")
    return problems


def _each(m: Metadata, key: str) -> list[int]:
    """What a file says of every layer."""
    m.used.add(key)
    said = m.fields.get(f"{m.arch}.{key}")
    if not isinstance(said, list) or len(said) != len(m.layers):
        raise CheckpointError(f"{m.path}: {m.arch}.{key} does not say it of {len(m.layers)} layers; fetch it again")
    return said


def read_gguf(m: Metadata) -> dict[str, Any]:
    """What differs from layer to layer. Raises CheckpointError where it is not said of every layer."""
    slides, heads = _each(m, PATTERN), _each(m, KV_HEADS)
    head = next((n if not sliding else n // 2 for n, sliding in zip(heads, slides, strict=True)), 1)
    share = (m.number("rope.dimension_count") + 0.5) / max(m.number("attention.key_length"), 1)  # rounded down again
    bases = {FULL: m.positive("rope.freq_base", 10000.0), SLIDING: m.positive("rope.freq_base_swa", 10000.0)}
    return {
        "num_key_value_heads": head,
        "layer_types": [SLIDING if one else FULL for one in slides],
        **listed_in(m),
        "rope_theta": None,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": share}
            for kind, base in bases.items()
        },
    }


FAMILY = Family(
    model_types=("mimo_v2_flash",),
    hf_architecture="MiMoV2FlashForCausalLM",
    config=MimoConfig,
    gguf=Gguf(
        "mimo2",
        normalises=True,
        windows=True,
        tied=False,
        biases=("exp_probs_b",),
        keys=gguf_keys,
        problems=gguf_problems,
        read=read_gguf,
    ),
    block=block,
    fixed_heads="layers that slide have other key heads than those that attend in full",
)
